"""Triton kernels for the lean pass on a GPU: what `head` does to a chunk's (C, V) logits between its products.

The products with the weight belong to cuBLAS. The passes in between are elementwise and bound by memory, so each is
one kernel: one read of the logits for the statistics, one read and one write for the gradient.

The logits are read as the product left them, float32 from operands of any dtype (`head_product`), and are capped and
tempered in registers. The gradient is rounded once, to the weight's dtype, in which the product back takes it.

The kernels do not know the support. Its K logits per row are gathered, -inf while the statistics are formed, and put
back; its gradient is scattered over what the kernel has left there. That is exact, since q, the law within the
complement, comes from a logsumexp over the complement alone, and it costs K values per row, whereas comparing every id
with 64 others would be bound by arithmetic.

Shapes: C rows of a chunk, V vocabulary, K slots.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without a GPU come without it
    triton = tl = None

logger = logging.getLogger(__name__)

_BLOCK = 4096  # logits that a program holds in registers: 16 per thread at 8 warps
# TRITON_INTERPRET=1, and not for the sake of vLLM's kernels (rollouts/vllm/cpu.py).
INTERPRETED = triton is not None and triton.knobs.runtime.interpret and "RL_SOFT_VLLM_ON_CPU" not in os.environ


def jit(function: Any) -> Any:
    """A Triton kernel; the function itself where there is no Triton."""
    return function if triton is None else triton.jit(function)


def usable(logits: Tensor) -> bool:
    """Whether the kernels take these logits: those on a GPU, and with TRITON_INTERPRET=1 those on a CPU, too."""
    return triton is not None and (INTERPRETED or (logits.is_cuda and _starts()))


@functools.cache
def _starts() -> bool:
    """Whether Triton starts: it compiles its launcher then, and a machine may have no C compiler, or no headers."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of several types: no compiler, one that fails, no driver
        logger.warning("Triton does not start (%s); log-densities are computed without its kernels", error)
        return False
    return True


def complement(logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Normaliser and mean of the logits off the support; one read of the chunk, by an online logsumexp.

    Args:
        logits: (C, V) of any float dtype, neither capped nor tempered; written to, and left as they were.
        ids: (C, K) int64, the support; ids may repeat.
        temperature: (C, 1) float32, which may be expanded.
        softcap: as in `head.soft_log_prob`.

    Returns:
        outside (C,): ln sum exp(l_j) over the complement, of the capped and tempered logits l; -inf if it is empty.
        mean (C,): sum q_j l_j with q the law within the complement; 0 if it is empty. Both float32.
    """
    chosen = logits.gather(-1, ids)
    logits.scatter_(-1, ids, -torch.inf)
    outside, mean = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever the tensors' is
        _complement_kernel[(len(logits),)](
            logits, logits.stride(0), temperature.contiguous(), float(softcap or 1), outside, mean,
            V=logits.shape[1], HAS_SOFTCAP=softcap is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    logits.scatter_(-1, ids, chosen)
    return outside, mean


def gradient(
    logits: Tensor,
    ids: Tensor,
    at_support: Tensor,
    outside: Tensor,
    level: Tensor,
    slope: Tensor,
    temperature: Tensor,
    softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient to the logits: -q_j (level + slope l_j) dl_j / dlogit_j off the support, q_j = exp(l_j - outside).

    Args:
        logits, ids, temperature, softcap: as in `complement`.
        at_support: (C, K) float32, the gradient on the support, complete; repeated ids are summed.
        outside: (C,) float32 from `complement`.
        level, slope: (C,) float32.
        out: (C, V) of any float dtype; the logits' own storage if None, which is overwritten.

    Returns:
        out.
    """
    out = logits if out is None else out
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(logits), triton.cdiv(logits.shape[1], _BLOCK))](
            logits, out, logits.stride(0), out.stride(0), temperature.contiguous(), float(softcap or 1),
            outside, level, slope,
            V=logits.shape[1], HAS_SOFTCAP=softcap is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return out.scatter_(-1, ids, 0).scatter_add_(-1, ids, at_support.to(out.dtype))


# ---------------------------------------------------------------- kernels


@jit
def tempered(raw, inverse, softcap, HAS_SOFTCAP: tl.constexpr):
    """Capped logits by 1 / T, since a division per logit would cost as much as its exponential; -inf stays -inf."""
    if HAS_SOFTCAP:
        tanh = 1 - 2 / (tl.exp(raw * (2 / softcap)) + 1)  # finite for all raw; Triton has no tanh of its own
        raw = tl.where(raw > float("-inf"), softcap * tanh, raw)
    return raw * inverse


@jit
def _complement_kernel(
    logits, stride, temperatures, softcap, outsides, means,
    V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; the support's logits are -inf."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    inverse = 1 / tl.load(temperatures + row)
    peak = float("-inf")
    total = 0.0  # sum exp(l - peak) so far
    moment = 0.0  # sum exp(l - peak) l
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + row * stride + columns, mask=columns < V, other=float("-inf"))
        x = tempered(raw.to(tl.float32), inverse, softcap, HAS_SOFTCAP)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        reference = tl.where(higher > float("-inf"), higher, 0.0)  # no -inf - -inf before the first logit
        p = tl.exp(x - reference)
        rescale = tl.exp(peak - reference)
        total = total * rescale + tl.sum(p, axis=0)
        moment = moment * rescale + tl.sum(tl.where(x == float("-inf"), 0.0, p * x), axis=0)
        peak = higher
    tl.store(outsides + row, peak + tl.log(total))
    tl.store(means + row, moment / tl.where(total > 0, total, 1.0))


@jit
def _gradient_kernel(
    logits, out, stride, out_stride, temperatures, softcap, outsides, levels, slopes,
    V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block. What it writes on the support means nothing and is overwritten."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    temperature = tl.load(temperatures + row)
    inverse = 1 / temperature
    raw = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    x = tempered(raw, inverse, softcap, HAS_SOFTCAP)
    q = tl.exp(x - tl.load(outsides + row))
    d = -q * (tl.load(levels + row) + tl.load(slopes + row) * x) * inverse
    if HAS_SOFTCAP:
        tanh = x * (temperature / softcap)
        d *= 1 - tanh * tanh
    d = tl.where(x == float("-inf"), 0.0, d)  # and not 0 * inf
    tl.store(out + row * out_stride + columns, d.to(out.dtype.element_ty), mask=inside)
