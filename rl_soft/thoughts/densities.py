r"""The distributions of a thought: sampling, exact log-densities, entropies; pure functions of tensors.

A soft token is a support S of K token ids with log-weights x, logsumexp(x) = 0; the model is fed sum_S e^{x_i} E_i.
With phi = log_softmax(logits / T), G standard Gumbel noise and z = phi + G, the policies are

    GumbelTopK      S the K largest of z over the whole vocabulary, x = log_softmax(z_S / tau)
    Dirichlet       S the K largest of phi; e^x ~ Dirichlet(gamma * pi_S)                   (arXiv 2508.03440)

K = 1 makes the first the discrete policy: one id, drawn from pi. Which kind of thought is drawn how: `kinds`.

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

**Absent slots.** A slot is absent where its log-weight is -inf (`is_present`), whatever its id: it is not in S. So
positions of different sizes, K-slot thoughts, cut ones with fewer ids, one-slot answer tokens, share one tensor call;
with no slot at all (padding) the log-density is 0.

Shapes: `...` batch, V vocabulary, K slots. Everything is computed in float32, or in float64 if the logits are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rl_soft.thoughts import noise

_INF = float("inf")


class SoftToken(NamedTuple):
    """A thought: what is fed to the model instead of a token embedding. A token is [id, ...] with [0, -inf, ...].

    Attributes:
        support: (..., K) int64, token ids by decreasing weight, so support[..., 0] is the strongest; at absent slots
            any id.
        log_weights: (..., K) float32, logsumexp 0 over the slots; -inf at absent slots. Never cast them to bfloat16.
    """

    support: Tensor
    log_weights: Tensor

    @property
    def present(self) -> Tensor:
        """(..., K) bool: the slots in use."""
        return is_present(self.log_weights)


def is_present(log_weights: Tensor) -> Tensor:
    """(..., K) bool: the slots in use; the others are absent."""
    return log_weights > -_INF


# ---------------------------------------------------------------- log-densities as functions of gathered statistics


def gather_statistics(logits: Tensor, support: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All that a log-density needs to know of the logits.

    Args:
        logits: (..., V), already divided by the temperature; float32 or float64.
        support: (..., K) int64.
        present: (..., K) bool, see `is_present`; None: all slots.

    Returns:
        support_log_probs (..., K): phi on the support, -inf at absent slots.
        log_outside (...): log of the mass outside it, by a logsumexp over the complement; 1 - Pi_S would cancel. -inf
            if K = V.
    """
    ids, present = fill_absent(support, torch.ones_like(support, dtype=torch.bool) if present is None else present)
    chosen = logits.gather(-1, ids).masked_fill(~present, -_INF)
    outside = _logsumexp(logits.scatter(-1, ids, -_INF))
    log_z = torch.cat([chosen, outside.unsqueeze(-1)], -1).logsumexp(-1)
    return chosen - log_z.unsqueeze(-1), outside - log_z


def fill_absent(support: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (..., K) that can be gathered, and the slots that count, (..., K) bool.

    Absent slots repeat a present id, so that they take nothing from the outside mass. A row without any slot is read
    as the single id 0.
    """
    ids = support.masked_fill(~present, 0)
    present = torch.cat([present[..., :1] | ~present.any(-1, keepdim=True), present[..., 1:]], -1)
    return torch.where(present, ids, ids.amax(-1, keepdim=True)), present


def on_kept(log_probs: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of a policy that draws from some kept ids alone (top-k, top-p, min-p), renormalised on them.

    Args:
        log_probs: (..., S) phi of the kept ids, those of the support among them; -inf at absent slots.
        log_weights: (..., S), -inf off the support.

    Returns:
        support_log_probs (..., S) and log_outside (...), as a log-density takes them: phi less the log of the kept
        mass, and the log of the share of the kept mass that is outside the support.
    """
    total = _logsumexp(log_probs)
    outside = _logsumexp(log_probs.masked_fill(is_present(log_weights), -_INF))
    return log_probs - total.unsqueeze(-1), outside - total


def entropy(logits: Tensor) -> Tensor:
    """Entropy, in nats, of softmax(logits); (..., V) -> (...); finite gradients also where logits are -inf."""
    return partial_entropy(logits.log_softmax(-1)).sum(-1)


def partial_entropy(log_probs: Tensor) -> Tensor:
    """-p ln p, elementwise; 0, with gradient 0, at p = 0."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min))


def gumbel_topk_log_prob(support_log_probs: Tensor, log_outside: Tensor, log_weights: Tensor, tau: float) -> Tensor:
    """ln p(S, x) of `GumbelTopK` (formula, base measure and sources: module docstring).

    Args:
        support_log_probs: (..., K) phi on the support; ignored at absent slots.
        log_outside: (...) log of the probability mass outside the support; -inf when there is none.
        log_weights: (..., K) x; -inf at absent slots. One slot gives the log-probability of a token.
        tau: Gumbel-Softmax temperature.

    Returns:
        (...) log-densities, differentiable in all three tensors, with finite gradients also at log_outside = -inf.
    """
    present = is_present(log_weights)
    count = present.sum(-1)
    phi = _full(support_log_probs)
    if phi.dtype == torch.float64:
        log_weights = log_weights.double()  # before they are multiplied: tau * x would be rounded to float32
    x = log_weights.masked_fill(~present, 0)
    x_min = log_weights.masked_fill(~present, _INF).amin(-1).masked_fill(count == 0, 0)
    scores = (phi - tau * x).masked_fill(~present, -_INF)
    scores = torch.cat([scores, (_full(log_outside) - tau * x_min).unsqueeze(-1)], -1)  # (..., K + 1)
    log_r = scores.log_softmax(-1)[..., :-1].masked_fill(~present, 0)
    size = count.clamp(min=1).to(log_r.dtype)
    return log_r.sum(-1) + size.lgamma() + (size - 1) * math.log(tau)


def dirichlet_log_prob(support_log_probs: Tensor, log_outside: Tensor, log_weights: Tensor, gamma: float) -> Tensor:
    """ln p(x | S) of `Dirichlet`: lgamma(gamma) - sum_S lgamma(a_i) + sum_S a_i x_i,  a = gamma * softmax(phi_S).

    In log-ratio coordinates; `torch.distributions.Dirichlet` is with respect to the weights, this minus sum_S x_i.
    With one slot x is certain and its log-density 0. Arguments and returns as in `gumbel_topk_log_prob`; log_outside
    is not read.
    """
    present = is_present(log_weights)
    log_a = math.log(gamma) + _full(support_log_probs).masked_fill(~present, -_INF).log_softmax(-1)
    log_a = log_a.masked_fill(~present, 0)
    a = log_a.exp()
    # lgamma(a) = lgamma(a + 1) - ln a: finite where a underflows
    terms = log_a - (a + 1).lgamma() + a * log_weights.masked_fill(~present, 0)
    log_prob = math.lgamma(gamma) + terms.masked_fill(~present, 0).sum(-1)
    return log_prob.masked_fill(~present.any(-1), 0)


# ---------------------------------------------------------------- distributions


class Distribution:
    """What the distributions share: the categorical at the given temperature, its entropy, and the sources of noise.

    Args:
        logits: (..., V), any float dtype.
        k: K, the number of slots, 1 <= K <= V.
        temperature: T > 0, divides the logits before anything else.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(self, logits: Tensor, k: int, temperature: float = 1.0) -> None:
        if not logits.is_floating_point() or logits.dim() == 0:
            raise ValueError(
                f"logits: expected a floating-point (..., V) tensor, got {logits.dtype} {tuple(logits.shape)}"
            )
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k: expected 1 <= k <= V = {logits.shape[-1]}, got {k}")
        check_positive("temperature", temperature)
        self.logits = _full(logits) if temperature == 1 else _full(logits) / temperature  # (..., V)
        self.k = k

    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, position: int | Tensor = 0
    ) -> SoftToken:
        """Draw a thought; no gradient. Where logits are -inf, fewer than K ids may be left: the rest is absent.

        Args:
            generator: sequential noise; the global generator if None.
            seeds: (...) int64, addressed noise instead (`noise`): a row's sample does not depend on its batch.
            position: with `seeds`, the index in the completion; an int or (...) int64.

        Returns:
            SoftToken of (..., K) tensors, by decreasing weight.

        Raises:
            ValueError: generator and seeds, or seeds of another shape or dtype.
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

    def _address(
        self, generator: torch.Generator | None, seeds: Tensor, position: int | Tensor
    ) -> tuple[Tensor, int | Tensor]:
        if generator is not None:
            raise ValueError("sample: give a generator or seeds, not both")
        if seeds.shape != self.logits.shape[:-1]:
            raise ValueError(f"seeds: expected shape {tuple(self.logits.shape[:-1])}, got {tuple(seeds.shape)}")
        return seeds.flatten(), position.flatten() if isinstance(position, Tensor) else position

    def _statistics(self, thought: SoftToken) -> tuple[Tensor, Tensor, Tensor]:
        check_thought(*thought, self.logits.shape[-1])
        support_log_probs, log_outside = gather_statistics(self.logits, thought.support, thought.present)
        if (thought.present & (support_log_probs == -_INF)).any():
            raise ValueError("support: an id whose logit is -inf; the policy cannot have drawn it")
        return support_log_probs, log_outside, thought.log_weights


class GumbelTopK(Distribution):
    """The K largest of phi + G over the whole vocabulary, softened by tau. Full support: a ratio is never 0/0.

    K = 1 is the discrete policy: one id from softmax(logits / T), whatever tau is. Density: module docstring.

    Args:
        logits: (..., V), any float dtype.
        k: K, the number of slots, 1 <= K <= V.
        tau: Gumbel-Softmax temperature > 0; the weights tend to one-hot as it falls.
        temperature: T > 0, divides the logits before anything else.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(self, logits: Tensor, k: int, tau: float, temperature: float = 1.0) -> None:
        super().__init__(logits, k, temperature)
        check_positive("tau", tau)
        self.tau = tau

    @torch.no_grad()
    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, position: int | Tensor = 0
    ) -> SoftToken:
        if seeds is None:
            e = torch.empty_like(self.logits).exponential_(generator=generator)
            z = e.clamp_(min=torch.finfo(e.dtype).tiny).log_().neg_()
        else:
            z = noise.gumbel(*self._address(generator, seeds, position), self.logits.shape[-1]).view(self.logits.shape)
        return _soft_token(*z.add_(self.logits).topk(self.k, -1), self.tau)  # phi up to a constant

    def log_prob(self, thought: SoftToken) -> Tensor:
        return gumbel_topk_log_prob(*self._statistics(thought), self.tau)


class Dirichlet(Distribution):
    """Dirichlet(gamma * pi) on the K most probable ids, renormalised; as published (arXiv 2508.03440), ids with
    probability <= 1e-7 among these leave it.

    The log-density is conditional on the support, and is taken on that of the given thought: it is frozen at the
    rollout, whatever the parameters have become since. The published order draws weights for more ids and then keeps
    the K largest; the law of those has no closed form, so here K comes before the draw (`decoding` has the other).

    Args:
        logits: (..., V), any float dtype.
        k: K, the number of slots, 1 <= K <= V.
        gamma: total concentration > 0; the weights come near the probabilities as it grows.
        temperature: T > 0, divides the logits before anything else.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(self, logits: Tensor, k: int, gamma: float, temperature: float = 1.0) -> None:
        super().__init__(logits, k, temperature)
        check_positive("gamma", gamma)
        self.gamma = gamma

    @torch.no_grad()
    def sample(
        self, generator: torch.Generator | None = None, seeds: Tensor | None = None, position: int | Tensor = 0
    ) -> SoftToken:
        values, ids = self.logits.topk(self.k, -1)
        support_log_probs = values.log_softmax(-1)
        rare = support_log_probs <= math.log(1e-7)
        support_log_probs = support_log_probs.masked_fill(rare, -_INF).log_softmax(-1)
        present = is_present(support_log_probs)
        log_a = (math.log(self.gamma) + support_log_probs).masked_fill(~present, 0)
        a = log_a.exp()
        # ln Gamma(a) draw = ln Gamma(a + 1) draw + ln(U) / a: no underflow at small a
        if seeds is None:
            boost = torch.empty_like(a).exponential_(generator=generator)
            log_gamma = torch._standard_gamma(a + 1, generator=generator).log()
        else:
            seeds, position = self._address(generator, seeds, position)
            boost = noise.exponential(seeds, position, self.k).view(a.shape).to(a.dtype)
            drawn = noise.gamma(seeds, position, (a + 1).float().view(-1, self.k), stream=1)
            log_gamma = drawn.view(a.shape).to(a.dtype).log()
        z, order = (log_gamma - boost / a).masked_fill(~present, -_INF).sort(-1, descending=True)
        return _soft_token(z, ids.gather(-1, order), 1.0)

    def log_prob(self, thought: SoftToken) -> Tensor:
        return dirichlet_log_prob(*self._statistics(thought), self.gamma)


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
    present = is_present(log_weights)
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
    """Raises ValueError for a number that is not positive and finite."""
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
