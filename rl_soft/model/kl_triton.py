"""Triton kernels of the KL divergence (`kl`): what stands between the products of a chunk, 2 passes in place of 25.

One kernel reads both rows of logits twice, for the two normalisers and then for the divergence; one more reads them
for the gradient and writes it. Not run on a GPU yet; in Triton's interpreter they are held to PyTorch's operations
(tests/model/test_kl_triton.py).

Shapes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl_soft.model import head_triton as kernels
from rl_soft.model.head_triton import jit, tempered, tl, triton


def divergence(logits: Tensor, ref_logits: Tensor, temperature: Tensor, softcap: float | None) -> tuple[Tensor, ...]:
    """Of a chunk; one launch.

    Args:
        logits, ref_logits: (C, V) of any float dtype, neither capped nor tempered.
        temperature: (C, 1) float32; softcap: as in `head.soft_log_prob`.

    Returns:
        KL (C,), and what `gradient` takes: the two normalisers and the mean of ln pi - ln rho under pi, each (C,),
        float32.
    """
    out = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _divergence_kernel[(len(logits),)](
            logits, ref_logits, logits.stride(0), ref_logits.stride(0), temperature.contiguous(), float(softcap or 1),
            *out, V=logits.shape[1], HAS_SOFTCAP=softcap is not None, BLOCK=kernels._BLOCK, num_warps=8,
        )  # fmt: skip
    return tuple(out)


def gradient(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    softcap: float | None,
    found: tuple[Tensor, ...],
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the KL to the head's output, (C, V) in `dtype`, times scale (C,); overwrites the logits where
    they have that dtype. Other arguments as in `divergence`, which made `found`."""
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    scale = torch.ones_like(found[0]) if scale is None else scale.float().contiguous()
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(logits), triton.cdiv(logits.shape[1], kernels._BLOCK))](
            logits, ref_logits, out, logits.stride(0), ref_logits.stride(0), out.stride(0), temperature.contiguous(),
            float(softcap or 1), *found[1:], scale,
            V=logits.shape[1], HAS_SOFTCAP=softcap is not None, BLOCK=kernels._BLOCK, num_warps=8,
        )  # fmt: skip
    return out


@jit
def _normaliser(
    logits, row, stride, inverse, softcap, V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """ln sum exp of a row, online."""
    peak = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + row * stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        x = tempered(raw, inverse, softcap, HAS_SOFTCAP)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        reference = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(peak - reference) + tl.sum(tl.exp(x - reference), axis=0)
        peak = higher
    return peak + tl.log(total)


@jit
def _divergence_kernel(
    logits, ref_logits, stride, ref_stride, temperatures, softcap, kls, norms, ref_norms, means,
    V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row. Terms pi (u + e) for d = u > 0 and rho (e^d d - e^d + 1) for d = -u, e = e^-u - 1, as in
    `kl._divergence`; u + e by its series where u is small."""
    row = tl.program_id(0).to(tl.int64)
    inverse = 1 / tl.load(temperatures + row)
    norm = _normaliser(logits, row, stride, inverse, softcap, V, HAS_SOFTCAP, BLOCK)
    ref_norm = _normaliser(ref_logits, row, ref_stride, inverse, softcap, V, HAS_SOFTCAP, BLOCK)
    kl = 0.0
    mean = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        raw = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        ref_raw = tl.load(ref_logits + row * ref_stride + columns, mask=inside, other=0.0).to(tl.float32)
        log_p = tempered(raw, inverse, softcap, HAS_SOFTCAP) - norm
        d = log_p - (tempered(ref_raw, inverse, softcap, HAS_SOFTCAP) - ref_norm)
        u = tl.abs(d)
        series = u * u * (0.5 - u * (1 / 6 - u * (1 / 24 - u * (1 / 120 - u * (1 / 720 - u * (1 / 5040))))))
        s = tl.where(u < 0.3, series, u + tl.exp(-u) - 1)
        term = tl.where(d > 0, s, u * u - s * (1 + u))
        # for large u the difference above is 1 - (1 + u) e^-u
        term = tl.where((d <= 0) & (u >= 0.3), 1 - (1 + u) * tl.exp(-u), term)
        larger = tl.exp(log_p - tl.minimum(d, 0.0))
        kl += tl.sum(tl.where(inside, tl.maximum(term, 0.0) * larger, 0.0), axis=0)
        mean += tl.sum(tl.where(inside, tl.exp(log_p) * d, 0.0), axis=0)
    tl.store(kls + row, kl)
    tl.store(norms + row, norm)
    tl.store(ref_norms + row, ref_norm)
    tl.store(means + row, mean)


@jit
def _gradient_kernel(
    logits, ref_logits, out, stride, ref_stride, out_stride, temperatures, softcap, norms, ref_norms, means, scales,
    V: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block: pi (d - mean) / T, and the soft cap's derivative."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    temperature = tl.load(temperatures + row)
    inverse = 1 / temperature
    raw = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    ref_raw = tl.load(ref_logits + row * ref_stride + columns, mask=inside, other=0.0).to(tl.float32)
    x = tempered(raw, inverse, softcap, HAS_SOFTCAP)
    log_p = x - tl.load(norms + row)
    d = log_p - (tempered(ref_raw, inverse, softcap, HAS_SOFTCAP) - tl.load(ref_norms + row))
    g = tl.exp(log_p) * (d - tl.load(means + row)) * inverse * tl.load(scales + row)
    if HAS_SOFTCAP:
        tanh = x * (temperature / softcap)
        g *= 1 - tanh * tanh
    tl.store(out + row * out_stride + columns, g.to(out.dtype.element_ty), mask=inside)
