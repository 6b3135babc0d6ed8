"""Rollouts on a GPU: sampling, attention of one position, and what lies between the products of a layer, in Triton.

A step reads every weight once, and that is what it should take. PyTorch's operations in between are some forty short
kernels a layer and fifty passes over the vocabulary, each of which takes as long to start as it does to run. Here they
are ten a layer, and three passes to sample. Products stay cuBLAS's, called through their modules, so adapters are as
they are.

Roundings are those of transformers' operations: what a layer writes to half precision in between is rounded here too.

Not run on a GPU yet. In Triton's interpreter whole rollouts are held to PyTorch's operations, and the kernels compile
for an A100 and an H100 without either (tests/test_gpu_kernels.py).

Shapes: m rows, V vocabulary, K slots; n rows of T positions, A key-value heads with G queries each, Q = AG, D head
size, C columns of the cache, H hidden, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rl_soft import kernels, noise
from rl_soft.kernels import jit, tempered
from rl_soft.layers import Layer, Parts, casts, parts_of, patched

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch without a GPU come without it
    triton = None

SLOTS = 64  # of a draw; they are found one by one
WIDEST = 256  # head size
_BLOCK = 4096  # logits that a program of a draw holds
_SPLIT, _COLUMNS = 256, 32  # columns that a program of attention reads, and reads at a time


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@contextmanager
def gpu_kernels(model: nn.Module) -> Iterator[None]:
    """While on, steps without gradients take the kernels: in layers and in attention `sdpa`."""
    layers = {m: GpuLayer(m, parts) for m in model.modules() if (parts := parts_of(m)) is not None}
    with patched(layers, _attention):
        yield


class GpuLayer(Layer):
    """A layer, by its own products and a kernel for what lies between two of them."""

    def __init__(self, module: Any, parts: Parts) -> None:
        super().__init__(module, parts)
        self.dtypes = {m.weight.dtype for m in parts.norms}

    def takes(self, x: Tensor, cos: Tensor) -> bool:
        D = self.attention.head_dim
        return self.dtypes == {x.dtype} == {cos.dtype} and cos.shape[-1] == D and D <= WIDEST and kernels.usable(x)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, D = self.parts, self.attention.head_dim
        h = rms_norm(x, p.first_norm)[0]
        q, k, v = (m(h).unflatten(-1, (-1, D)) for m in (p.q, p.k, p.v))
        return *finish_heads(q, k, p.q_norm, p.k_norm, cos, sin), v

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        p = self.parts
        h, x = rms_norm(p.o(read.flatten(-2)), p.second_norm, x)
        return x + p.down(gated(p.gate(h), p.up(h)))


def rms_norm(x: Tensor, norm: Any, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The RMSNorm of x (..., H), or of residual + x, and what it is of."""
    x = x.contiguous()
    total = x if residual is None else torch.empty_like(x)
    out, H = torch.empty_like(x), x.shape[-1]
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(x.numel() // H,)](
            x, x if residual is None else residual.contiguous(), norm.weight, total, out, norm.variance_epsilon,
            H=H, ADD=residual is not None, BLOCK=triton.next_power_of_2(H), num_warps=8,
        )  # fmt: skip
    return out, total


def finish_heads(q: Tensor, k: Tensor, q_norm: Any, k_norm: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the heads, where there are, and RoPE: q (n, T, Q, D), k (n, T, A, D), cos and sin (n or 1, T, D)."""
    (n, T, Q, D), A = q.shape, k.shape[2]
    q, k = q.contiguous(), k.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    cos, sin = (a.expand(n, T, D).contiguous() for a in (cos, sin))
    normed = q_norm is not None
    with torch.cuda.device_of(q):
        _heads_kernel[(n * T,)](
            q, k, q_out, k_out, q_norm.weight if normed else q, k_norm.weight if normed else k, cos, sin,
            q_norm.variance_epsilon if normed else 0.0, k_norm.variance_epsilon if normed else 0.0,
            Q=Q, A=A, HALF=D // 2, NORMED=normed, Q_BLOCK=triton.next_power_of_2(Q), A_BLOCK=triton.next_power_of_2(A),
            HALF_BLOCK=triton.next_power_of_2(D // 2),
        )  # fmt: skip
    return q_out, k_out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (..., F) (SwiGLU, Shazeer 2020)."""
    gate, up = gate.contiguous(), up.contiguous()
    out, block = torch.empty_like(gate), 1024
    with torch.cuda.device_of(gate):
        _gated_kernel[(triton.cdiv(gate.numel(), block),)](gate, up, out, gate.numel(), BLOCK=block)
    return out


def _attention(
    sdpa: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(n, AG, 1, D) queries, (n, A, C, D) keys and values, (n, 1, 1, C) bool mask -> (n, 1, AG, D)."""
    n, heads, T, D = query.shape
    A, C = key.shape[1:3]
    seen = attention_mask
    if (
        (T > 1 or D > WIDEST or not kernels.usable(query) or len({query.dtype, key.dtype, value.dtype}) > 1)
        or (key.shape != value.shape or key.stride() != value.stride() or key.stride()[2:] != (D, 1))
        or (seen is not None and (seen.dtype != torch.bool or seen.shape != (n, 1, 1, C)))
        or (dropout or kwargs.get("position_bias") is not None or torch.is_grad_enabled() or casts(query))
    ):
        return sdpa(module, query, key, value, seen, dropout=dropout, scaling=scaling, **kwargs)
    query, seen = query.contiguous(), None if seen is None else seen.contiguous()
    G, splits, out = heads // A, triton.cdiv(C, _SPLIT), query.new_empty(n, 1, heads, D)
    means = query.new_empty(n * heads, splits, D, dtype=torch.float32)
    masses = query.new_empty(n * heads, splits, dtype=torch.float32)
    wide = triton.next_power_of_2(D)
    with torch.cuda.device_of(query):
        _attend_kernel[(n * A, splits)](
            query, key, value, query if seen is None else seen, means, masses, C, *key.stride()[:2],
            float(D**-0.5 if scaling is None else scaling), A=A, G=G, D=D, MASKED=seen is not None,
            G_BLOCK=max(16, triton.next_power_of_2(G)), D_BLOCK=max(16, wide), SPLIT=_SPLIT, COLUMNS=_COLUMNS,
            INTERPRETED=kernels.INTERPRETED, num_warps=4, num_stages=2,
        )  # fmt: skip
        _merge_kernel[(n * heads,)](
            means, masses, out, splits, D=D, D_BLOCK=wide, SPLITS=triton.next_power_of_2(splits)
        )
    return out, None


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def draw(logits: Tensor, temperature: Tensor, slots: int, seeds: Tensor, step: Any) -> tuple[Tensor, ...]:
    """A Gumbel top-K sample of each row, with the noise of `noise.gumbel`; one read of the logits.

    Args:
        logits: (m, V), any float dtype, rows contiguous; temperature: (m,) float32; slots: K, at most SLOTS.
        seeds: (m,) int64; step: int or (m,) int64.

    Returns:
        support (m, K) int64, the strongest first; values (m, K) float32, of logits / temperature - top + noise;
        top (m,), the largest of logits / temperature; mass (m,), the sum of exp(logits / temperature - top), NaN where
        a row has a logit that is NaN or +inf, or none that is finite; dot (m,), the same sum times the exponents.
    """
    m, V = logits.shape
    blocks = triton.cdiv(V, _BLOCK)
    low, high = (half.contiguous() for half in noise.keys(seeds, step))
    hashes = noise.index_hashes(V, logits.device)
    few = min(slots, _BLOCK)
    values = logits.new_empty(m, blocks * few, dtype=torch.float32)
    ids = logits.new_empty(m, blocks * few, dtype=torch.int32)
    sums = logits.new_empty(3, m, blocks, dtype=torch.float32)
    top, mass, dot = logits.new_empty(3, m, dtype=torch.float32)
    found, support = (logits.new_empty(m, slots, dtype=dtype) for dtype in (torch.float32, torch.int64))
    temperature = temperature.contiguous()
    with torch.cuda.device_of(logits):
        _draw_kernel[(m, blocks)](
            logits, logits.stride(0), temperature, low, high, hashes, values, ids, sums, m * blocks,
            V=V, K=few, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        _best_kernel[(m,)](
            logits, logits.stride(0), temperature, low, high, hashes, values, ids, sums, m * blocks,
            found, support, top, mass, dot,
            K=slots, COUNT=blocks * few, BLOCKS=blocks,
            WIDE=triton.next_power_of_2(blocks * few), BLOCKS_WIDE=triton.next_power_of_2(blocks), num_warps=4,
        )  # fmt: skip
    return support, found, top, mass, dot


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@jit
def _times(a, b, dtype: tl.constexpr):
    """A product in float32, rounded to what it is stored in."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(dtype)


@jit
def _rms_norm_kernel(x, residual, weight, total, out, eps, H: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row (Zhang and Sennrich 2019)."""
    at = tl.program_id(0).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    a = tl.load(x + at + columns, mask=inside, other=0.0)
    if ADD:
        b = tl.load(residual + at + columns, mask=inside, other=0.0)
        a = (a.to(tl.float32) + b.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + at + columns, a, mask=inside)
    a = a.to(tl.float32)
    y = (a / tl.sqrt(tl.sum(a * a, axis=0) / H + eps)).to(out.dtype.element_ty)
    tl.store(out + at + columns, _times(y, tl.load(weight + columns, mask=inside), out.dtype.element_ty), mask=inside)


@jit
def _turn(
    x, out, weight, cos, sin, eps, HEADS: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads of one row: a norm of each, and the rotation of its two halves (RoPE, Su et al. 2021)."""
    heads, halves = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    near = halves < HALF
    inside = (heads < HEADS)[:, None] & near[None, :]
    at = heads[:, None] * (2 * HALF) + halves[None, :]
    dtype = out.dtype.element_ty
    low, high = tl.load(x + at, mask=inside, other=0.0), tl.load(x + at + HALF, mask=inside, other=0.0)
    if NORMED:
        a, b = low.to(tl.float32), high.to(tl.float32)
        scale = 1 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        low = _times((a * scale).to(dtype), tl.load(weight + halves, mask=near)[None, :], dtype)
        high = _times((b * scale).to(dtype), tl.load(weight + HALF + halves, mask=near)[None, :], dtype)
    cos_low, cos_high = tl.load(cos + halves, mask=near)[None, :], tl.load(cos + HALF + halves, mask=near)[None, :]
    sin_low, sin_high = tl.load(sin + halves, mask=near)[None, :], tl.load(sin + HALF + halves, mask=near)[None, :]
    left = _times(low, cos_low, dtype).to(tl.float32) - _times(high, sin_low, dtype).to(tl.float32)
    right = _times(high, cos_high, dtype).to(tl.float32) + _times(low, sin_high, dtype).to(tl.float32)
    tl.store(out + at, left.to(dtype), mask=inside)
    tl.store(out + at + HALF, right.to(dtype), mask=inside)


@jit
def _heads_kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, q_eps, k_eps,
    Q: tl.constexpr, A: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr,
    Q_BLOCK: tl.constexpr, A_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    D: tl.constexpr = 2 * HALF
    cos += row * D
    sin += row * D
    _turn(q + row * Q * D, q_out + row * Q * D, q_weight, cos, sin, q_eps, Q, HALF, NORMED, Q_BLOCK, HALF_BLOCK)
    _turn(k + row * A * D, k_out + row * A * D, k_weight, cos, sin, k_eps, A, HALF, NORMED, A_BLOCK, HALF_BLOCK)


@jit
def _gated_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(out.dtype.element_ty)
    tl.store(out + at, _times(silu, tl.load(up + at, mask=inside), out.dtype.element_ty), mask=inside)


@jit
def _product(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _attend_kernel(
    q, k, v, seen, means, masses, C, row_stride, head_stride, scale,
    A: tl.constexpr, G: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
    G_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for the queries that share a head, and a stretch of columns: the mean value, and ln of the mass."""
    task, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = task // A, task % A
    groups, features = tl.arange(0, G_BLOCK), tl.arange(0, D_BLOCK)
    wide = (features < D)[None, :]
    block = (groups < G)[:, None] & wide
    query = tl.load(q + (task * G + groups[:, None]) * D + features[None, :], mask=block, other=0.0)
    start = row * row_stride + head * head_stride
    top = tl.full((G_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((G_BLOCK,), tl.float32)
    mean = tl.zeros((G_BLOCK, D_BLOCK), tl.float32)
    for first in range(split * SPLIT, min((split + 1) * SPLIT, C), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        on = columns < C
        if MASKED:
            on = on & (tl.load(seen + row * C + columns, mask=on, other=0) != 0)
        at = start + columns[:, None] * D + features[None, :]
        keys = tl.load(k + at, mask=on[:, None] & wide, other=0.0)  # what is not seen is not read
        values = tl.load(v + at, mask=on[:, None] & wide, other=0.0)
        score = _product(query, tl.trans(keys), INTERPRETED) * scale
        score = tl.where(on[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        reference = tl.where(higher > float("-inf"), higher, 0.0)
        p = tl.exp(score - reference[:, None])
        rescale = tl.exp(top - reference)
        total = total * rescale + tl.sum(p, axis=1)
        mean = mean * rescale[:, None] + _product(p.to(values.dtype), values, INTERPRETED)
        top = higher
    out = (task * G + groups) * tl.num_programs(1) + split
    tl.store(masses + out, top + tl.log(total), mask=groups < G)
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(means + out[:, None] * D + features[None, :], mean, mask=block)


@jit
def _merge_kernel(means, masses, out, splits, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """One program a query: the stretches together."""
    task = tl.program_id(0).to(tl.int64)
    parts, features = tl.arange(0, SPLITS), tl.arange(0, D_BLOCK)
    log_mass = tl.load(masses + task * splits + parts, mask=parts < splits, other=float("-inf"))
    share = tl.exp(log_mass - tl.max(log_mass, axis=0))
    inside = (parts < splits)[:, None] & (features < D)[None, :]
    mean = tl.load(means + (task * splits + parts[:, None]) * D + features[None, :], mask=inside, other=0.0)
    mean = tl.sum(mean * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(out + task * D + features, mean.to(out.dtype.element_ty), mask=features < D)


@jit
def _logarithm(x):
    """ln of normal numbers above 0, relative error 1e-7 (Cephes). The GPU's own is not that good near 1, where the
    largest Gumbel numbers come from."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the mantissa is in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    n, z = exponent.to(tl.float32), f * f
    p = f * 7.0376836292e-2 - 1.1514610310e-1
    p = (p * f + 1.1676998740e-1) * f - 1.2420140846e-1
    p = (p * f + 1.4249322787e-1) * f - 1.6668057665e-1
    p = (p * f + 2.0000714765e-1) * f - 2.4999993993e-1
    p = (p * f + 3.3333331174e-1) * f * z
    return f + (p - n * 2.12194440e-4 - z * 0.5) + n * 0.693359375


@jit
def _gumbel(index_hash, low, high):
    """`noise.gumbel` at one address, but for the last bits of its logarithms."""
    bits = (index_hash ^ low) * high
    bits += bits >> 16
    bits *= 0x7FEB352D
    bits += bits >> 15
    u = tl.abs(bits.to(tl.float32)) * 4.656612318092527e-10 + 2.3283064365386963e-10  # 2^-31 (1 - 2^-23), 2^-32
    w = 1 - u
    d = 1 - w  # ln(1 - u) = -u ln(w) / (w - 1), exact where w is rounded; and -u where it is 1
    small = d == 0
    e = tl.where(small, u, -u * _logarithm(w) / tl.where(small, 1.0, d))
    return -_logarithm(e)


@jit
def _draw_kernel(
    logits, stride, temperatures, lows, highs, hashes, values, ids, sums, count,
    V: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row and block of the vocabulary: its K best, and its sums relative to its largest logit."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    within = tl.arange(0, BLOCK)
    columns = block * BLOCK + within
    raw = tl.load(logits + row * stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    x = tempered(raw, 1 / tl.load(temperatures + row), 1.0, False)
    wrong = tl.max(tl.where((x != x) | (x == float("inf")), 1, 0), axis=0)
    top = tl.max(tl.where(x == x, x, float("-inf")), axis=0)
    shifted = x - tl.where(top > float("-inf"), top, 0.0)
    e = tl.exp(shifted)
    mass = tl.sum(e, axis=0)
    dot = tl.sum(tl.where(x == float("-inf"), 0.0, e * shifted), axis=0)
    at = row * blocks + block
    tl.store(sums + at, top)
    tl.store(sums + count + at, tl.where(wrong > 0, float("nan"), mass))
    tl.store(sums + 2 * count + at, dot)
    index_hash = tl.load(hashes + columns, mask=columns < V, other=0)
    z = x + _gumbel(index_hash, tl.load(lows + row), tl.load(highs + row))
    z = tl.where(z == z, z, float("-inf"))
    left = tl.full((BLOCK,), 1, tl.int1)
    for k in range(K):
        best = tl.max(tl.where(left, z, float("-inf")), axis=0)
        first = tl.min(tl.where(left & (z == best), within, BLOCK - 1), axis=0)
        tl.store(values + at * K + k, best)
        tl.store(ids + at * K + k, tl.minimum(block * BLOCK + first, V - 1))
        left = left & (within != first)


@jit
def _best_kernel(
    logits, stride, temperatures, lows, highs, hashes, values, ids, sums, count, found, support, tops, totals, dots,
    K: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr, BLOCKS_WIDE: tl.constexpr,
):  # fmt: skip
    """One program a row: the blocks together, and the values of the best once more, now that the largest is known."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS_WIDE)
    at, inside = row * BLOCKS + blocks, blocks < BLOCKS
    peaks = tl.load(sums + at, mask=inside, other=float("-inf"))
    top = tl.max(peaks, axis=0)
    apart = peaks - tl.where(top > float("-inf"), top, 0.0)
    rescale = tl.exp(apart)
    masses = tl.load(sums + count + at, mask=inside, other=0.0)
    mass = tl.sum(masses * rescale, axis=0)
    shift = tl.where(peaks > float("-inf"), apart, 0.0)
    dot = tl.sum((tl.load(sums + 2 * count + at, mask=inside, other=0.0) + masses * shift) * rescale, axis=0)
    tl.store(tops + row, top)
    tl.store(totals + row, tl.where(top > float("-inf"), mass, float("nan")))
    tl.store(dots + row, dot)
    low, high, inverse = tl.load(lows + row), tl.load(highs + row), 1 / tl.load(temperatures + row)
    candidates = tl.arange(0, WIDE)
    z = tl.load(values + row * COUNT + candidates, mask=candidates < COUNT, other=float("-inf"))
    left = candidates < COUNT
    for k in range(K):
        best = tl.max(tl.where(left, z, float("-inf")), axis=0)
        first = tl.min(tl.where(left & (z == best), candidates, COUNT - 1), axis=0)
        i = tl.load(ids + row * COUNT + first)
        x = tempered(tl.load(logits + row * stride + i).to(tl.float32), inverse, 1.0, False)
        value = x - tl.where(top > float("-inf"), top, 0.0) + _gumbel(tl.load(hashes + i), low, high)
        tl.store(found + row * K + k, value)
        tl.store(support + row * K + k, i.to(tl.int64))
        left = left & (candidates != first)
