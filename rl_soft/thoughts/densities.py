r"""The distributions of a thought: sampling, exact log-densities, entropies; pure functions of tensors.

A soft token is a support S of K token ids with log-weights x, logsumexp(x) = 0; the model is fed sum_S e^{x_i} E_i.
With phi = log_softmax(logits / T), G standard Gumbel noise and z = phi + G, the policies are

    GumbelTopK      S the K largest of z over the whole vocabulary, x = log_softmax(z_S / tau)
    FilteredGumbel  S kept by top-k, top-p, min-p, max-top-k on phi; x as above             (arXiv 2508.03440,
                    2511.06411)
    Dirichlet       S kept likewise; e^x ~ Dirichlet(gamma * pi_S)                          (arXiv 2508.03440)
    Token           one id, drawn from pi: K = 1
    Soft            S kept likewise; x = log_softmax(phi_S): deterministic, no density      (arXiv 2505.15778)

**GumbelTopK.** {S are the largest, with values z_S} has the density

    prod_S e^{phi_i - z_i} exp(-e^{phi_i - z_i}) * exp(-(1 - Pi_S) e^{-min_S z}),         Pi_S = sum_S pi_i,

the last factor being the probability that all others fall below. Writing z_i = tau (x_i + L) and integrating L out
leaves

    ln p(S, x) = lgamma(K) + (K-1) ln tau + sum_S ln r_i,
    r = softmax{phi_i - tau x_i for i in S;  ln(1 - Pi_S) - tau min_S x},

where the last entry, everything outside S, takes part in the softmax only. K = 1 is ln pi_i. K = V has nothing
outside: the ExpConcrete density of Maddison et al. (arXiv 1611.00712). The score of logit i is 1[i in S] - K r_i.
Publicly used instead: the product over all V Gumbel densities (arXiv 2511.06411: unbiased, but of the noise, so its
ratios spread far wider), and K Gumbel terms without the event that the others fall below (Latent-GRPO's code: not a
density, so ratios are biased). See docs/density.md.

**Base measure.** Densities are with respect to prod d(x_i - x_r), i != r, log-ratio coordinates for any reference r in
S, times counting measure over S. With respect to the simplex weights e^x add -sum_S x_i; it holds no parameter, so
ratios are the same.

**Absent slots.** A slot with log-weight -inf is absent, whatever its id: it is not in S. So positions of different
sizes, K-slot thoughts, nuclei with fewer ids, one-slot answer tokens, share one tensor call; with no slot at all
(padding) the log-density is 0.

Shapes: `...` batch, V vocabulary, K slots. Everything is computed in float32, or in float64 if the logits are.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from rl_soft.thoughts import noise

_INF = float("inf")


class SoftToken(NamedTuple):
    """A thought: what is fed to the model instead of a token.

    support: (..., K) int64, token ids by decreasing weight, so support[..., 0] is the strongest; 0 at absent slots.
    log_weights: (..., K) float32, logsumexp 0 over the slots; -inf at absent slots. Never cast them to bfloat16.
    """

    support: Tensor
    log_weights: Tensor

    @property
    def present(self) -> Tensor:
        """(..., K) bool: the slots in use."""
        return self.log_weights > -_INF

    def pad(self, k: int) -> SoftToken:
        """The same thought in k slots."""
        extra = (0, k - self.support.shape[-1])
        pad = torch.nn.functional.pad
        return SoftToken(pad(self.support, extra), pad(self.log_weights, extra, value=-_INF))


# ---------------------------------------------------------------- log-densities as functions of gathered statistics


def gather_statistics(logits: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """All that a log-density needs to know of the logits.

    Args:
        logits: (..., V), already divided by the temperature; float32 or float64.
        support: (..., K) int64; -1 marks an absent slot.

    Returns:
        log_probs (..., K): phi on the support, -inf at absent slots.
        log_outside (...): log of the mass outside it, by a logsumexp over the complement; 1 - Pi_S would cancel. -inf
            if K = V.
    """
    ids, present = slots(support)
    chosen = logits.gather(-1, ids).masked_fill(~present, -_INF)
    outside = _logsumexp(logits.scatter(-1, ids, -_INF))
    log_z = torch.cat([chosen, outside.unsqueeze(-1)], -1).logsumexp(-1)
    return chosen - log_z.unsqueeze(-1), outside - log_z


def slots(support: Tensor) -> tuple[Tensor, Tensor]:
    """Ids that can be gathered, and which slots are present, from a support with -1 at absent slots; (..., K) both.

    Absent slots repeat a present id. A row without any is read as the single id 0.
    """
    ids = support.clamp(min=0)
    present = support >= 0
    present = torch.cat([present[..., :1] | ~present.any(-1, keepdim=True), present[..., 1:]], -1)
    return torch.where(present, ids, ids.amax(-1, keepdim=True)), present


def entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of softmax(logits); (..., V) -> (...); finite gradients also where logits are -inf."""
    return partial_entropy(logits.log_softmax(-1)).sum(-1)


def partial_entropy(log_probs: Tensor) -> Tensor:
    """-p ln p, elementwise; 0, with gradient 0, at p = 0."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min))


def gumbel_topk_log_prob(log_probs: Tensor, log_outside: Tensor, log_weights: Tensor, tau: float) -> Tensor:
    """ln p(S, x) of `GumbelTopK` (formula, base measure and sources: module docstring).

    Args:
        log_probs: (..., K) phi on the support; ignored at absent slots.
        log_outside: (...) log of the probability mass outside the support; -inf when there is none.
        log_weights: (..., K) x; -inf at absent slots. One slot gives the log-probability of a token.
        tau: Gumbel-Softmax temperature.

    Returns:
        (...) log-densities, differentiable in all three tensors, with finite gradients also at log_outside = -inf.
    """
    present = log_weights > -_INF
    count = present.sum(-1)
    x = log_weights.masked_fill(~present, 0)
    x_min = log_weights.masked_fill(~present, _INF).amin(-1).masked_fill(count == 0, 0)
    scores = (_full(log_probs) - tau * x).masked_fill(~present, -_INF)
    scores = torch.cat([scores, (_full(log_outside) - tau * x_min).unsqueeze(-1)], -1)  # (..., K + 1)
    log_r = scores.log_softmax(-1)[..., :-1].masked_fill(~present, 0)
    size = count.clamp(min=1).to(log_r.dtype)
    return log_r.sum(-1) + size.lgamma() + (size - 1) * math.log(tau)


def filtered_gumbel_log_prob(log_probs: Tensor, log_outside: Tensor, log_weights: Tensor, tau: float) -> Tensor:
    """ln p(x | S) of `FilteredGumbel`: the ExpConcrete density on S, which counts as all there is; see
    `gumbel_topk_log_prob`.

    log_outside is taken for the common signature and not read. With one slot, x is certain and its log-density 0.
    """
    nothing = torch.zeros_like(log_outside).masked_fill((log_weights > -_INF).any(-1), -_INF)
    return gumbel_topk_log_prob(log_probs, nothing, log_weights, tau)


def dirichlet_log_prob(log_probs: Tensor, log_outside: Tensor, log_weights: Tensor, gamma: float) -> Tensor:
    """ln p(x | S) of `Dirichlet`: lgamma(gamma) - sum_S lgamma(a_i) + sum_S a_i x_i,  a = gamma * softmax(phi_S).

    In log-ratio coordinates; `torch.distributions.Dirichlet` is with respect to the weights, this minus sum_S x_i.
    Arguments and returns as in `gumbel_topk_log_prob`; log_outside is not read.
    """
    present = log_weights > -_INF
    log_a = math.log(gamma) + _full(log_probs).masked_fill(~present, -_INF).log_softmax(-1)
    log_a = log_a.masked_fill(~present, 0)
    a = log_a.exp()
    # lgamma(a) = lgamma(a + 1) - ln a: finite where a underflows
    terms = log_a - (a + 1).lgamma() + a * log_weights.masked_fill(~present, 0)
    log_prob = math.lgamma(gamma) + terms.masked_fill(~present, 0).sum(-1)
    return log_prob.masked_fill(~present.any(-1), 0)


# ---------------------------------------------------------------- distributions


class Thought:
    """What the distributions share: the categorical at the given temperature, its entropy, and the sources of noise.

    Args:
        logits: (..., V), any float dtype.
        k: K, the number of slots, 1 <= K <= V.
        temperature: T > 0, divides the logits before anything else.
        validate_args: check logits for NaN at a pass over them and a device synchronisation.

    Raises:
        ValueError: for an argument out of range; with `validate_args`, for NaN (or +inf) logits and rows of -inf
            alone.
    """

    def __init__(self, logits: Tensor, k: int, temperature: float = 1.0, validate_args: bool = False) -> None:
        if not logits.is_floating_point() or logits.dim() == 0:
            raise ValueError(
                f"logits: expected a floating-point (..., V) tensor, got {logits.dtype} {tuple(logits.shape)}"
            )
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k: expected 1 <= k <= V = {logits.shape[-1]}, got {k}")
        check_positive("temperature", temperature)
        self.logits = _full(logits) if temperature == 1 else _full(logits) / temperature  # (..., V)
        self.k = k
        if validate_args and not self.logits.logsumexp(-1).isfinite().all():
            raise ValueError("logits: NaN, +inf, or a row of -inf alone")

    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, step: int | Tensor = 0
    ) -> SoftToken:
        """Draws a thought; no gradient.

        Args:
            generator: sequential noise; the global generator if None.
            seeds: (...) int64, addressed noise instead (`noise.gumbel`): a row's sample does not depend on its batch.
            step: with `seeds`, the position in the chain of thoughts; an int or (...) int64.

        Returns:
            SoftToken, by decreasing weight.
        """
        raise NotImplementedError

    def log_prob(self, thought: SoftToken) -> Tensor:
        """The log-density of a thought, (...); base measure: log-ratio coordinates (module docstring).

        Raises:
            ValueError: for ids outside the vocabulary or repeated, log-weights that do not normalise, logits of -inf
                at a support id.
        """
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """Entropy, in nats, of the categorical softmax(logits / T) that the thought is made from; (...)."""
        return entropy(self.logits)

    def _gumbel(
        self, shape: torch.Size, generator: torch.Generator | None, seeds: Tensor | None, step: int | Tensor
    ) -> Tensor:
        if seeds is None:
            e = torch.empty(shape, dtype=self.logits.dtype, device=self.logits.device).exponential_(
                generator=generator
            )
            return e.clamp_(min=torch.finfo(e.dtype).tiny).log_().neg_()
        return noise.gumbel(*self._address(generator, seeds, step), shape[-1]).view(shape)

    def _address(
        self, generator: torch.Generator | None, seeds: Tensor, step: int | Tensor
    ) -> tuple[Tensor, int | Tensor]:
        if generator is not None:
            raise ValueError("sample: give a generator or seeds, not both")
        if seeds.shape != self.logits.shape[:-1]:
            raise ValueError(f"seeds: expected shape {tuple(self.logits.shape[:-1])}, got {tuple(seeds.shape)}")
        return seeds.flatten(), step.flatten() if isinstance(step, Tensor) else step

    def _statistics(self, thought: SoftToken) -> tuple[Tensor, Tensor, Tensor]:
        support, log_weights = thought
        check_thought(support, log_weights, self.logits.shape[-1])
        log_probs, log_outside = gather_statistics(self.logits, support.masked_fill(~thought.present, -1))
        if (thought.present & (log_probs == -_INF)).any():
            raise ValueError("support: an id whose logit is -inf; the policy cannot have drawn it")
        return log_probs, log_outside, log_weights


class GumbelTopK(Thought):
    """The K largest of phi + G over the whole vocabulary, softened by tau. Full support: a ratio is never 0/0.

    Args:
        logits, k, temperature, validate_args: as in `Thought`.
        tau: Gumbel-Softmax temperature > 0; the weights tend to one-hot as it falls.
    """

    def __init__(
        self, logits: Tensor, k: int, tau: float, temperature: float = 1.0, validate_args: bool = False
    ) -> None:
        super().__init__(logits, k, temperature, validate_args)
        check_positive("tau", tau)
        self.tau = tau

    @torch.no_grad()
    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, step: int | Tensor = 0
    ) -> SoftToken:
        z = self._gumbel(self.logits.shape, generator, seeds, step).add_(self.logits)  # phi up to a constant
        return _soft_token(*z.topk(self.k, -1), self.tau)

    def log_prob(self, thought: SoftToken) -> Tensor:
        return gumbel_topk_log_prob(*self._statistics(thought), self.tau)


class Token(GumbelTopK):
    """One id from softmax(logits / T): the discrete policy, `GumbelTopK` with K = 1."""

    def __init__(self, logits: Tensor, temperature: float = 1.0, validate_args: bool = False) -> None:
        super().__init__(logits, 1, 1.0, temperature, validate_args)


class Filtered(Thought):
    """What the filtered kinds share: the kept set, in the published order (T, top-k, top-p, min-p, max-top-k; then the
    noise).

    Args:
        logits, temperature, validate_args: as in `Thought`.
        k: max-top-k, the number of slots; kept sets with fewer ids leave slots absent.
        top_k: keep the top_k largest probabilities; None keeps all.
        top_p: then the smallest set, of the largest, with at least this share of the mass, 0 < top_p <= 1.
        min_p: then those of at least min_p times the largest probability, 0 <= min_p <= 1.

    The log-density is conditional on the kept set, and is taken on the support of the given thought: the set is frozen
    at the rollout, whatever the parameters have become since. One slot is certain: log-density 0.
    """

    def __init__(
        self,
        logits: Tensor,
        k: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        validate_args: bool = False,
    ) -> None:
        super().__init__(logits, k, temperature, validate_args)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected None or >= 1, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p: expected 0 <= min_p <= 1, got {min_p}")
        self.top_k, self.top_p, self.min_p = top_k, top_p, min_p

    def keep(self) -> tuple[Tensor, Tensor]:
        """The kept set: ids (..., K) by decreasing probability, and phi on it, (..., K), renormalised; -inf at absent
        slots."""
        width = min(max(self.k, self.top_k or 0), self.logits.shape[-1])
        logits, ids = self.logits.topk(width, -1)
        if self.top_k is not None:
            logits = logits.masked_fill(torch.arange(width, device=logits.device) >= self.top_k, -_INF)
        if self.top_p < 1:
            log_z = (logits if self.top_k is not None else self.logits).logsumexp(-1, keepdim=True)
            probs = (logits - log_z).exp()
            logits = logits.masked_fill(probs.cumsum(-1) - probs >= self.top_p, -_INF)  # the mass before an id
        if self.min_p > 0:
            logits = logits.masked_fill(logits < logits[..., :1] + math.log(self.min_p), -_INF)
        return ids[..., : self.k], logits[..., : self.k].log_softmax(-1)


class FilteredGumbel(Filtered):
    """Gumbel-Softmax inside the kept set; arguments as in `Filtered`, and tau > 0 as in `GumbelTopK`."""

    def __init__(self, logits: Tensor, k: int, tau: float, temperature: float = 1.0, **filters) -> None:
        super().__init__(logits, k, temperature, **filters)
        check_positive("tau", tau)
        self.tau = tau

    @torch.no_grad()
    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, step: int | Tensor = 0
    ) -> SoftToken:
        ids, log_probs = self.keep()
        z, order = (log_probs + self._gumbel(log_probs.shape, generator, seeds, step)).sort(-1, descending=True)
        return _soft_token(z, ids.gather(-1, order), self.tau)

    def log_prob(self, thought: SoftToken) -> Tensor:
        return filtered_gumbel_log_prob(*self._statistics(thought), self.tau)


class Dirichlet(Filtered):
    """Dirichlet(gamma * pi) on the kept set; arguments as in `Filtered`, and the total concentration gamma > 0.

    The published order truncates to max-top-k after the draw; the law of the K largest Dirichlet weights has no closed
    form, so here max-top-k comes before it. The two agree where k >= top_k. As published, ids with probability <= 1e-7
    leave the kept set.
    """

    def __init__(self, logits: Tensor, k: int, gamma: float, temperature: float = 1.0, **filters) -> None:
        super().__init__(logits, k, temperature, **filters)
        check_positive("gamma", gamma)
        self.gamma = gamma

    @torch.no_grad()
    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, step: int | Tensor = 0
    ) -> SoftToken:
        ids, log_probs = self.keep()
        log_probs = log_probs.masked_fill(log_probs <= math.log(1e-7), -_INF).log_softmax(-1)
        present = log_probs > -_INF
        log_a = (math.log(self.gamma) + log_probs).masked_fill(~present, 0)
        a = log_a.exp()
        # ln Gamma(a) draw = ln Gamma(a + 1) draw + ln(U) / a: no underflow at small a
        if seeds is None:
            boost = torch.empty_like(a).exponential_(generator=generator)
            log_gamma = torch._standard_gamma(a + 1, generator=generator).log()
        else:
            seeds, step = self._address(generator, seeds, step)
            boost = noise.exponential(seeds, step, self.k).view(a.shape).to(a.dtype)
            log_gamma = (
                noise.gamma(seeds, step, (a + 1).float().view(-1, self.k), stream=1).view(a.shape).to(a.dtype).log()
            )
        z, order = (log_gamma - boost / a).masked_fill(~present, -_INF).sort(-1, descending=True)
        return _soft_token(z, ids.gather(-1, order), 1.0)

    def log_prob(self, thought: SoftToken) -> Tensor:
        return dirichlet_log_prob(*self._statistics(thought), self.gamma)


class Soft(Filtered):
    """The kept set mixed by its own probabilities: a deterministic thought. Arguments as in `Filtered`."""

    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, step: int | Tensor = 0
    ) -> SoftToken:
        ids, log_probs = self.keep()
        return _soft_token(log_probs.detach(), ids, 1.0)

    def log_prob(self, thought: SoftToken) -> NoReturn:
        raise ValueError(
            "log_prob: a `soft` thought is a deterministic function of the logits, a point mass, and has no density; "
            "policy gradients need a random thought: `gumbel` (GumbelTopK), `dirichlet` or `token`"
        )


# ---------------------------------------------------------------- helpers and checks


def check_thought(support: Tensor, log_weights: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a thought that no policy over `vocab_size` ids can have made; synchronises with the
    device."""
    if support.shape != log_weights.shape:
        raise ValueError(f"support {tuple(support.shape)} and log_weights {tuple(log_weights.shape)} differ in shape")
    if support.dtype != torch.int64:
        raise ValueError(f"support: expected int64, got {support.dtype}")
    if log_weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_weights: expected float32 or float64 (less loses the density), got {log_weights.dtype}")
    present = log_weights > -_INF
    if (present & ((support < 0) | (support >= vocab_size))).any():
        raise ValueError(f"support: an id outside the vocabulary, 0 <= id < {vocab_size}")
    slots = torch.arange(support.shape[-1], device=support.device)
    ids = torch.where(present, support, -1 - slots).sort(-1).values  # absent slots are no repetition
    if (ids[..., 1:] == ids[..., :-1]).any():
        raise ValueError("support: an id is repeated")
    total = log_weights.logsumexp(-1)
    if not ((total.abs() < 1e-3) | (~present).all(-1)).all():
        raise ValueError("log_weights: logsumexp over the slots is not 0")


def check_positive(name: str, value: float) -> None:
    if not 0 < value < _INF:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _soft_token(z: Tensor, ids: Tensor, tau: float) -> SoftToken:
    log_weights = (z / tau).log_softmax(-1)
    return SoftToken(ids.masked_fill(log_weights == -_INF, 0), log_weights.float())


def _logsumexp(x: Tensor) -> Tensor:
    """logsumexp over the last dimension with a finite (zero) gradient where all entries are -inf."""
    empty = x.detach().amax(-1) == -_INF
    return x.masked_fill(empty.unsqueeze(-1), 0).logsumexp(-1).masked_fill(empty, -_INF)
