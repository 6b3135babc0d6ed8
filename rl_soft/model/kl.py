r"""The exact KL divergence between the categoricals of two policies, from hidden states, never holding (N, V) logits.

    KL(pi || rho) = sum_j pi_j d_j,    d_j = ln pi_j - ln rho_j,        dKL / dl_j = pi_j (d_j - KL)

over the whole vocabulary, with l the policy's logits divided by the temperature. It is computed as
sum_j pi_j (d_j - 1 + e^{-d_j}), the expectation under pi of the one-sample estimate that TRL takes for a token (k3:
Schulman 2020, joschu.net/blog/kl-approx.html): the sums are equal, no term is negative, and an error in one of the
normalisers counts in the second order only, so that a policy that has hardly moved has a divergence of hardly more
than 0.

Chunk by chunk of rows, as in `head`: a frozen plain head forms the gradient to the hidden states in the forward pass,
a trained one computes both logits again in backward, any other module is called under `torch.utils.checkpoint`.

Shapes: N positions, H hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rl_soft.model import head_triton as kernels
from rl_soft.model import kl_triton
from rl_soft.model.chunks import HeadGradients, chunk_plan, grad_raw, most_calls, slices, tempered
from rl_soft.model.head_product import cast_like, logits_of, plain_head, through
from rl_soft.thoughts import densities


def categorical_kl(
    hidden: Tensor,
    lm_head: nn.Module | Tensor,
    ref_hidden: Tensor,
    ref_lm_head: nn.Module | Tensor,
    temperature: float | Tensor = 1.0,
    *,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """KL(pi || rho) per position; never negative, and 0 where the logits are equal.

    Args:
        hidden: (N, H) final hidden states of the policy, any float dtype.
        lm_head: its head's module, or the plain weight (V, H).
        ref_hidden: (N, H') final hidden states of the reference; no gradient goes there, nor to its head.
        ref_lm_head: the reference's head.
        temperature: T > 0, a float or (N,), of both; divides the (soft-capped) logits.
        chunk_size: rows per chunk, whose logits are alive twice; None takes half of what `head.soft_log_prob` takes.
        softcap: of both, as in `head.soft_log_prob`.

    Returns:
        (N,) float32, nats, differentiable in hidden and the policy's head.

    Raises:
        ValueError: for shapes or numbers out of range.
    """
    if len(ref_hidden) != len(hidden):
        raise ValueError(f"ref_hidden: expected the {len(hidden)} rows of hidden, got {len(ref_hidden)}")
    if softcap is not None:
        densities.check_positive("softcap", softcap)
    plain = plain_head(lm_head)
    vocab_size = len(plain[0]) if plain else getattr(lm_head, "out_features", None)
    divisor, rows = chunk_plan(hidden, hidden[:, :1], temperature, chunk_size, vocab_size)
    rows = rows if chunk_size else max(1, rows // 2)

    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    @torch.no_grad()
    def raw_reference(states: Tensor) -> Tensor:
        with torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):  # in backward, too
            return _call(ref_lm_head, states).float()  # (C, V)

    def reference(states: Tensor, divisor: Tensor) -> Tensor:
        return tempered(raw_reference(states), divisor, softcap)

    if plain is not None:
        ref_logits = lambda r: raw_reference(ref_hidden[r])  # noqa: E731
        return _PlainHead.apply(*cast_like(hidden, *plain), ref_logits, divisor, rows, softcap)

    def chunk(states: Tensor, ref_states: Tensor, divisor: Tensor) -> Tensor:
        logits = _call(lm_head, states).float()
        logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / divisor
        return _Logits.apply(logits, reference(ref_states, divisor))

    own = list(slices(len(hidden), rows))
    calls = max(most_calls(m, len(own), hidden.device) for m in (lm_head, ref_lm_head) if isinstance(m, nn.Module))
    parts = []
    for r in own + [slice(0, 1)] * (calls - len(own)):
        args = (hidden[r], ref_hidden[r], divisor[r])
        parts.append(checkpoint(chunk, *args, use_reentrant=False) if torch.is_grad_enabled() else chunk(*args))
    kl = torch.cat(parts[: len(own)])
    for unused in parts[len(own) :]:
        kl = kl + 0 * unused.sum()  # so that backward calls the modules as often, too
    return kl


def _call(lm_head: nn.Module | Tensor, states: Tensor) -> Tensor:
    plain = plain_head(lm_head)
    return lm_head(states) if plain is None else logits_of(*cast_like(states, *plain))  # type: ignore[operator]


class _PlainHead(torch.autograd.Function):
    """From (hidden, weight, bias); the gradient to hidden is formed at once if the head is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, ref_logits: Callable[[slice], Tensor], divisor, rows, softcap):
        ctx.ref_logits, ctx.rows, ctx.softcap = ref_logits, rows, softcap
        ctx.trained = any(ctx.needs_input_grad[1:3])
        values, grads = [], []
        for r in slices(len(hidden), rows):
            chunk = _Chunk(logits_of(hidden[r], weight, bias).float(), ref_logits(r), divisor[r], softcap)
            values.append(chunk.divergence)
            if ctx.needs_input_grad[0] and not ctx.trained:
                grads.append(through(chunk.gradient(None, weight.dtype), weight))
        saved = (hidden, weight, bias, divisor) if ctx.trained else (torch.cat(grads) if grads else None,)
        ctx.save_for_backward(*saved)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl):
        nothing = [None] * 4
        if not ctx.trained:
            (jacobian,) = ctx.saved_tensors
            return (grad_kl.unsqueeze(-1) * jacobian).to(jacobian.dtype), None, None, *nothing
        hidden, weight, bias, divisor = ctx.saved_tensors
        total = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        for r in slices(len(hidden), ctx.rows):
            chunk = _Chunk(logits_of(hidden[r], weight, bias).float(), ctx.ref_logits(r), divisor[r], ctx.softcap)
            total.add(r, chunk.gradient(grad_kl[r], weight.dtype))
        return *total.result(), *nothing


class _Logits(torch.autograd.Function):
    """From a chunk's logits (C, V) to (C,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor) -> Tensor:
        log_p, d = _log_ratio(logits, ref_logits)
        ctx.save_for_backward(log_p, d)
        return _divergence(log_p, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor, None]:
        log_p, d = ctx.saved_tensors
        return _gradient(log_p.clone(), d.clone()).mul_(grad_kl.unsqueeze(-1)), None


# ---------------------------------------------------------------- one chunk, (C, V)


class _Chunk:
    """Of float32 logits, neither capped nor tempered; by the kernels (`kl_triton`) where they run, which is the same.

    Attributes:
        divergence: (C,) float32.
    """

    def __init__(self, logits: Tensor, ref_logits: Tensor, divisor: Tensor, softcap: float | None) -> None:
        self.divisor, self.softcap, self.fused = divisor, softcap, kernels.usable(logits)
        if self.fused:
            self.logits, self.ref_logits = logits, ref_logits
            self.found = kl_triton.divergence(logits, ref_logits, divisor, softcap)
            self.divergence = self.found[0]
            return
        self.logits = tempered(logits, divisor, softcap)
        self.log_p, self.d = _log_ratio(self.logits, tempered(ref_logits, divisor, softcap))
        self.divergence = _divergence(self.log_p, self.d)

    def gradient(self, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(C, V), to the head's output, times scale (C,); for use once."""
        if self.fused:
            args = (self.logits, self.ref_logits, self.divisor, self.softcap, self.found, scale, dtype)
            return kl_triton.gradient(*args)
        grad = _gradient(self.log_p, self.d)
        grad = grad if scale is None else grad.mul_(scale.unsqueeze(-1))
        return grad_raw(grad, self.logits, self.divisor, self.softcap)


def _log_ratio(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """ln pi and d = ln pi - ln rho."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return log_p, torch.sub(log_p, log_q, out=log_q)


def _divergence(log_p: Tensor, d: Tensor) -> Tensor:
    """sum pi (d - 1 + e^-d), each term in the form that does not overflow: pi (u + e) for d = u > 0 and
    rho (e^d d - e^d + 1) for d = -u < 0, with e = e^-u - 1."""
    larger = d.clamp(max=0).neg_().add_(log_p).exp_()  # max(pi, rho)
    u = d.abs()
    e = u.neg().expm1_()
    total = u + e
    return torch.where(d > 0, total, e.mul_(u).add_(total).neg_()).clamp_(min=0).mul_(larger).sum(-1)


def _gradient(log_p: Tensor, d: Tensor) -> Tensor:
    """pi (d - KL), of KL to the logits; with the mean of d for KL, so that a row sums to 0. Overwrites both."""
    p = log_p.exp_()
    mean = torch.linalg.vecdot(p, d).unsqueeze(-1)
    return d.sub_(mean).mul_(p)
