r"""The lean training pass: from final hidden states and the LM head to log-densities, never holding (N, V) logits.

A log-density needs three things of the logits of a position: phi on the support, the log of the mass outside, and, as
a metric or a bonus, the entropy (`densities`). They are computed chunk by chunk of rows, and so are their gradients.
With g_k, g_o, g_e the gradients of phi_k, of the log outside mass ln o and of the entropy e, c = sum_k g_k + g_o and
q_j = exp(l_j) / sum_off S exp(l),

    dl_j = q_j (g_o - o (c + g_e (phi_j + e)))          j off S
    dl_k = g_k - pi_k (c + g_e (phi_k + e))             k in S

Off S everything hangs on q, the law within the complement, which stays exact where pi_j = o q_j underflows: under a
peaked policy the weaker slots compete with ids of probability e^-100 and their gradients are still of order 1.

Three paths, same numbers:
    frozen plain weight     the gradient to the hidden states is formed in the forward pass, while the logits are
                            there, and only (N, H) is kept: no logits are ever computed twice (`_FrozenHead`)
    trained plain weight    the chunk's logits are recomputed in backward: one more product (`_TrainedHead`)
    any other module        called on each chunk under `torch.utils.checkpoint`: LoRA adapters, hooks, quantised
                            weights, and ZeRO-3 or FSDP partitions (inside the model's forward, so that the partition
                            is gathered)

Tokens are one-slot soft tokens and go through the same pass. On a GPU with Triton the passes of the first two over a
chunk's logits are one kernel each, the same numbers (`head_triton`).

Shapes: N positions, H hidden size, V vocabulary, K slots, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rl_soft.model import head_triton as kernels
from rl_soft.model.chunks import HeadGradients, chunk_plan, grad_raw, most_calls, slices, tempered
from rl_soft.model.head_product import cast_like, logits_of, plain_head, through
from rl_soft.thoughts import densities

# (support_log_probs, log_outside, log_weights, parameter) -> (...); the parameter is tau, or gamma of a Dirichlet
LogProb = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def soft_log_prob(
    hidden: Tensor,
    lm_head: nn.Module | Tensor,
    support: Tensor,
    log_weights: Tensor,
    parameter: float,
    temperature: float | Tensor = 1.0,
    *,
    density: LogProb = densities.gumbel_topk_log_prob,
    thought_mask: Tensor | None = None,
    kept: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    entropy_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-densities and entropies of thoughts and tokens.

    Args:
        hidden: (N, H) final hidden states, any float dtype; row i is the state that predicts position i.
        lm_head: the head's module, or its plain weight (V, H).
        support: (N, K) int64.
        log_weights: (N, K) float32; -inf at absent slots. A token is [id, ...], [0, -inf, ...].
        parameter: of the density: Gumbel-Softmax tau, or gamma of a Dirichlet.
        temperature: T > 0, a float or (N,); divides the (soft-capped) logits. A model's own logit scale s goes in as T
            / s.
        density: a function of gathered statistics from `densities`.
        thought_mask: (N,) bool; off it the result is the token log-probability of slot 0. Needed by
            `dirichlet_log_prob`; `gumbel_topk_log_prob` gives a one-slot position its token log-probability by itself.
        kept: (N, W) int64, where positions were drawn from a cut distribution: the ids that it kept beside the
            support, -1 at absent ones. Log-densities are then of the distribution on it; entropies never are.
        chunk_size: rows per chunk; None takes what keeps a chunk's logits at 32 MiB on a CPU and at 512 MiB elsewhere.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma), before the temperature.
        entropy_grad: False returns the entropy detached, which saves a frozen head one product.

    Returns:
        log_prob (N,) and entropy (N,) in nats, float32.

    Raises:
        ValueError: for shapes, dtypes or numbers out of range.
    """
    densities.check_positive("parameter", parameter)
    if softcap is not None:
        densities.check_positive("softcap", softcap)
    if log_weights.shape != support.shape:
        raise ValueError(
            f"log_weights: expected the shape of support {tuple(support.shape)}, got {tuple(log_weights.shape)}"
        )
    plain, present = plain_head(lm_head), densities.is_present(log_weights)
    if kept is not None:  # as further slots that hold no weight
        support, present = torch.cat([support, kept.clamp(min=0)], -1), torch.cat([present, kept >= 0], -1)
        log_weights = torch.cat([log_weights, log_weights.new_full(kept.shape, -torch.inf)], -1)

    def log_prob_of(support_log_probs: Tensor, log_outside: Tensor, rows: slice = slice(None)) -> Tensor:
        if kept is not None:
            support_log_probs, log_outside = densities.on_kept(support_log_probs, log_weights[rows])
        log_prob = density(support_log_probs, log_outside, log_weights[rows], parameter)
        return log_prob if thought_mask is None else torch.where(thought_mask[rows], log_prob, support_log_probs[:, 0])

    if plain is None or not torch.is_grad_enabled() or any(t is not None and t.requires_grad for t in plain):
        support_log_probs, log_outside, entropy = support_statistics(
            hidden, lm_head, support, temperature, present=present, chunk_size=chunk_size, softcap=softcap
        )
        return log_prob_of(support_log_probs, log_outside), entropy if entropy_grad else entropy.detach()
    chunking = chunk_plan(hidden, support, temperature, chunk_size, len(plain[0]))
    return _FrozenHead.apply(
        *cast_like(hidden, *plain), support, present, *chunking, softcap, log_prob_of, entropy_grad
    )


def support_statistics(
    hidden: Tensor,
    lm_head: nn.Module | Tensor,
    support: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    present: Tensor | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a log-density needs to know of the logits, phi = log_softmax(logits / T), and the entropy.

    Args:
        support: (N, K) int64.
        present: (N, K) bool, see `densities.is_present`; None: all slots. A row without any (padding) is read as the
            single id 0.
        others: as in `soft_log_prob`.

    Returns:
        support_log_probs (N, K) phi on the support, -inf at absent slots; log_outside (N,) log of the mass outside;
        entropy (N,) in nats. float32, all differentiable.
    """
    plain = plain_head(lm_head)
    present = torch.ones_like(support, dtype=torch.bool) if present is None else present
    if plain is not None:
        chunking = chunk_plan(hidden, support, temperature, chunk_size, len(plain[0]))
        return _TrainedHead.apply(*cast_like(hidden, *plain), support, present, *chunking, softcap)

    assert isinstance(lm_head, nn.Module)

    def chunk(hidden: Tensor, support: Tensor, present: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = lm_head(hidden).float()  # (C, V)
        logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
        return *densities.gather_statistics(logits, support, present), densities.entropy(logits)

    vocab_size = getattr(lm_head, "out_features", None)
    temperature, chunk_size = chunk_plan(hidden, support, temperature, chunk_size, vocab_size)
    own = list(slices(len(hidden), chunk_size))
    spare = [slice(0, 1)] * (most_calls(lm_head, len(own), hidden.device) - len(own))
    parts = []
    for r in own + spare:
        args = (hidden[r], support[r], present[r], temperature[r])
        parts.append(checkpoint(chunk, *args, use_reentrant=False) if torch.is_grad_enabled() else chunk(*args))
    support_log_probs, log_outside, entropy = (torch.cat(part) for part in zip(*parts[: len(own)], strict=True))
    for _, _, unused in parts[len(own) :]:
        support_log_probs = support_log_probs + 0 * unused.sum()  # so that backward calls the module as often, too
    return support_log_probs, log_outside, entropy


class _TrainedHead(torch.autograd.Function):
    """Statistics of a plain head; backward recomputes each chunk's logits from (hidden, weight)."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, support, present, temperature, chunk_size, softcap):
        parts = []
        for r in slices(len(hidden), chunk_size):
            logits = _logits(hidden[r], weight, bias, temperature[r], softcap)
            parts.append(_statistics(logits, *densities.fill_absent(support[r], present[r]), temperature[r], softcap))
        stats = [torch.cat(part) for part in zip(*parts, strict=True)]
        ctx.save_for_backward(hidden, weight, bias, support, present, temperature, *stats)
        ctx.chunk_size, ctx.softcap = chunk_size, softcap
        ctx.set_materialize_grads(False)
        return tuple(stats[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        hidden, weight, bias, support, present, temperature, *stats = ctx.saved_tensors
        total = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        for r in slices(len(hidden), ctx.chunk_size):
            logits = _logits(hidden[r], weight, bias, temperature[r], ctx.softcap)
            chunk_stats, chunk_grads = Stats(*(s[r] for s in stats)), [None if g is None else g[r] for g in grads]
            slots = densities.fill_absent(support[r], present[r])
            args = (logits, *slots, temperature[r], ctx.softcap, chunk_stats, chunk_grads, weight.dtype)
            total.add(r, _grad_logits(*args))
        return *total.result(), *[None] * 5


class _FrozenHead(torch.autograd.Function):
    """Log-density and entropy of a frozen plain head; d log_prob / d hidden and d entropy / d hidden, (N, H) each, are
    formed at once."""

    @staticmethod
    def forward(
        ctx: Any, hidden, weight, bias, support, present, temperature, chunk_size, softcap, log_prob_of, entropy_grad
    ):
        parts, saved = [], []
        for r in slices(len(hidden), chunk_size):
            logits = _logits(hidden[r], weight, bias, temperature[r], softcap)
            slots = densities.fill_absent(support[r], present[r])
            stats = _statistics(logits, *slots, temperature[r], softcap)
            with torch.enable_grad():
                inputs = stats.support_log_probs.requires_grad_(), stats.log_outside.requires_grad_()
                log_prob = log_prob_of(*inputs, r)
                grads = torch.autograd.grad(log_prob.sum(), inputs, materialize_grads=True)  # rows are independent
            stats = Stats(*(s.detach() for s in stats))
            parts.append((log_prob.detach(), stats.entropy))
            if ctx.needs_input_grad[0]:
                ones = torch.ones_like(stats.entropy)
                wanted = [(*grads, None), (None, None, ones)] if entropy_grad else [(*grads, None)]
                args = (logits, *slots, temperature[r], softcap, stats)
                d = (_grad_logits(*args, g, weight.dtype, keep_logits=g is not wanted[-1]) for g in wanted)
                saved.append([through(x, weight) for x in d])
        ctx.save_for_backward(*(torch.cat(part) for part in zip(*saved, strict=True)))
        log_prob, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_prob, grad_entropy):
        total = None
        for grad, jacobian in zip((grad_log_prob, grad_entropy), ctx.saved_tensors, strict=False):
            if grad is not None:
                term = grad.unsqueeze(-1) * jacobian
                total = term if total is None else total + term
        dtype = ctx.saved_tensors[0].dtype
        return (None if total is None else total.to(dtype), *[None] * 9)


# ---------------------------------------------------------------- one chunk


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor, softcap: float | None) -> Tensor:
    """(C, V): float32, capped and divided by the temperature; for the kernels, as the product leaves them."""
    logits = logits_of(hidden, weight, bias)
    return logits if kernels.usable(logits) else tempered(logits.float(), temperature, softcap)


class Stats(NamedTuple):
    """Of a chunk, float32."""

    support_log_probs: Tensor  # (C, K), -inf at absent slots
    log_outside: Tensor  # (C,)
    entropy: Tensor  # (C,), nats
    log_z: Tensor  # (C,), the normaliser


def _statistics(logits: Tensor, ids: Tensor, present: Tensor, temperature: Tensor, softcap: float | None) -> Stats:
    """From `_logits`."""
    chosen = logits.gather(-1, ids)
    if kernels.usable(logits):
        outside, mean = kernels.complement(logits, ids, temperature, softcap)
        chosen = tempered(chosen.float(), temperature, softcap)
    else:
        outside, mean = _complement(logits, ids, chosen)
    chosen = chosen.masked_fill_(~present, -torch.inf)
    log_z = torch.cat([chosen, outside.unsqueeze(-1)], -1).logsumexp(-1)
    support_log_probs, log_outside = chosen - log_z.unsqueeze(-1), outside - log_z
    entropy = densities.partial_entropy(support_log_probs).sum(-1) + log_outside.exp() * (log_z - mean)
    return Stats(support_log_probs, log_outside, entropy, log_z)


def _complement(logits: Tensor, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp (C,) of the logits off the support, and their mean (C,) by the law within; one exponential per
    logit."""
    logits.scatter_(-1, ids, torch.finfo(logits.dtype).min)
    peak = logits.amax(-1, keepdim=True)
    p = (logits - peak).exp_()
    total, peak = p.sum(-1), peak.squeeze(-1)
    nothing = peak == torch.finfo(logits.dtype).min  # K = V
    mean = (p.mul_(logits).sum(-1) / total).masked_fill_(nothing, 0)
    outside = total.log().add_(peak).masked_fill_(nothing, -torch.inf)
    logits.scatter_(-1, ids, chosen)
    return outside, mean


def _grad_logits(
    logits: Tensor,
    ids: Tensor,
    present: Tensor,
    temperature: Tensor,
    softcap: float | None,
    stats: Stats,
    grads: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    keep_logits: bool = False,
) -> Tensor:
    """The gradient to the head's output, (C, V), from those to the three statistics (formula: module docstring).

    The kernel writes it in `dtype`, over the logits where they have it, unless `keep_logits`.
    """
    (support_log_probs, log_outside, entropy, log_z), (g_support, g_outside, g_entropy) = stats, grads
    zero = torch.zeros_like(log_z)
    g_support = torch.zeros_like(support_log_probs) if g_support is None else g_support.masked_fill(~present, 0)
    g_outside = zero if g_outside is None else g_outside
    common = g_support.sum(-1) + g_outside  # (C,)
    at_support = common.unsqueeze(-1)  # (C, 1)
    outside = log_outside + log_z
    mass = log_outside.exp()
    # o (c + g_e (phi_j + e)) - g_o = level + slope * l_j
    level, slope = mass * common - g_outside, zero
    if g_entropy is not None:
        slope = mass * g_entropy
        level = level + slope * (entropy - log_z)
        phi = support_log_probs.masked_fill(~present, 0)
        at_support = at_support + g_entropy.unsqueeze(-1) * (phi + entropy.unsqueeze(-1))
    at_support = g_support - support_log_probs.exp() * at_support  # (C, K), 0 at absent slots
    if kernels.usable(logits):
        chosen = tempered(logits.gather(-1, ids).float(), temperature, softcap)
        at_support = grad_raw(at_support, chosen, temperature, softcap)
        out = torch.empty_like(logits, dtype=dtype) if keep_logits or logits.dtype != dtype else None
        return kernels.gradient(logits, ids, at_support, outside, level, slope, temperature, softcap, out)
    q = (logits - outside.unsqueeze(-1)).exp_()
    if g_entropy is None:
        q.mul_(level.neg().unsqueeze(-1))
    else:
        q.mul_(torch.addcmul(level.unsqueeze(-1), logits, slope.unsqueeze(-1)).neg_())
    q.scatter_(-1, ids, 0.0).scatter_add_(-1, ids, at_support)
    return grad_raw(q, logits, temperature, softcap)
