"""Rollouts on a GPU: attention of one position, and what lies between the products of a layer, in Triton.

A step reads every weight once, and that is what it should take. PyTorch's operations in between are some forty short
kernels per layer and fifty passes over the vocabulary, each of which takes as long to start as it does to run. Here
they are ten per layer, and two passes to sample. Products stay cuBLAS's, called through their modules, so adapters
are as they are.

Roundings are those of transformers' operations: what a layer writes to half precision in between is rounded here too.

Not run on a GPU yet. In Triton's interpreter whole rollouts are held to PyTorch's operations, and the kernels compile
for an A100 and an H100 without either (tests/rollouts/test_gpu.py).

Shapes: m rows, V vocabulary, K slots; n rows of T positions, A key-value heads with G queries each, Q = AG, D head
size, C columns of the cache, H hidden, F width of the MLP.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_soft.model import head_triton as kernels
from rl_soft.model.head_triton import jit, tl, triton
from rl_soft.rollouts.kernels import gpu_sampling
from rl_soft.rollouts.kernels.layers import AGREE, Layer, Parts, is_step, parts_of, patched
from rl_soft.thoughts import noise

logger = logging.getLogger(__name__)

WIDEST = 256  # head size
_SPLIT, _COLUMNS = 256, 32  # columns that a program of attention reads, and reads at a time


def usable(x: Tensor) -> bool:
    """Whether the kernels take x: Triton starts, and on x's device and in its dtype they do what they are for."""
    return kernels.usable(x) and x.dtype in AGREE and _works(x.device, x.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """One call of attention and of a draw, beside PyTorch's. What lies in a layer is judged there (`layers`)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 1), (2, 300), (2, 300))  # heads, columns
    q, k, v = (torch.randn(2, *shape, 64, generator=generator).to(device, dtype) for shape in shapes)
    logits = torch.randn(2, 5000, generator=generator).to(device, dtype)
    seen = torch.arange(300, device=device) >= torch.tensor([[[[0]]], [[[280]]]], device=device)
    seeds, one = torch.arange(2, device=device), torch.ones(2, device=device)
    try:
        with torch.no_grad():
            read, _ = _attend(q, k, v, seen, 0.125)
            support, _, top, mass, _ = gpu_sampling.draw(logits, one, 4, seeds, 1)
            outside = gpu_sampling.log_outside(logits, one, support)
    except Exception as error:  # Triton has exceptions of many kinds: for resources, for compilers, for drivers
        logger.warning("rollout: steps take PyTorch's operations, Triton's kernels fail (%s)", str(error)[:200])
        return False
    phi = logits.double().log_softmax(-1)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double().repeat_interleave(3, 1), v.double().repeat_interleave(3, 1), attn_mask=seen, scale=0.125
    )
    found = (phi + noise.gumbel(seeds, 1, 5000)).topk(4).indices
    off = phi.scatter(-1, found, -torch.inf).logsumexp(-1) - (outside - top - mass.log())
    right = (read.transpose(1, 2) - exact).abs().max() < AGREE[dtype] and off.abs().max() < 1e-4
    if not (right and torch.equal(found, support)):
        logger.warning("rollout: steps take PyTorch's operations, Triton's kernels give other results on %s", device)
        return False
    return True


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
        return self.dtypes == {x.dtype} == {cos.dtype} and cos.shape[-1] == D and D <= WIDEST and usable(x)

    def judge(self, *args: Any) -> None:
        try:
            super().judge(*args)
        except RuntimeError:  # memory, for example, which the rollout deals with
            raise
        except Exception as error:  # Triton's are none of these
            self.agreed = False
            logger.warning("rollout: a layer keeps its own operations, Triton's kernels fail (%s)", str(error)[:200])

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
    (_, _, T, D), seen = query.shape, attention_mask
    if not (D <= WIDEST and is_step(query, key, value, seen, dropout, kwargs) and usable(query)):
        if T > 1 and seen is not None and seen.dtype == torch.bool:
            seen = seen | ~seen.any(-1, keepdim=True)  # some of CUDA's kernels make NaN of padding that sees nothing
        return sdpa(module, query, key, value, seen, dropout=dropout, scaling=scaling, **kwargs)
    return _attend(query, key, value, seen, D**-0.5 if scaling is None else scaling)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scaling: float) -> tuple[Tensor, None]:
    (n, heads, _, D), (A, C) = query.shape, key.shape[1:3]
    query, seen = query.contiguous(), None if seen is None else seen.contiguous()
    G, splits, out = heads // A, triton.cdiv(C, _SPLIT), query.new_empty(n, 1, heads, D)
    means = query.new_empty(n * heads, splits, D, dtype=torch.float32)
    masses = query.new_empty(n * heads, splits, dtype=torch.float32)
    wide = triton.next_power_of_2(D)
    with torch.cuda.device_of(query):
        _attend_kernel[(n * A, splits)](
            query, key, value, query if seen is None else seen, means, masses, C, *key.stride()[:2],
            float(scaling), A=A, G=G, D=D, MASKED=seen is not None,
            G_BLOCK=max(16, triton.next_power_of_2(G)), D_BLOCK=max(16, wide), SPLIT=_SPLIT, COLUMNS=_COLUMNS,
            INTERPRETED=kernels.INTERPRETED, num_warps=4, num_stages=2,
        )  # fmt: skip
        _merge_kernel[(n * heads,)](
            means, masses, out, splits, D=D, D_BLOCK=wide, SPLITS=triton.next_power_of_2(splits)
        )
    return out, None


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@jit
def _times(a, b, dtype: tl.constexpr):
    """A product in float32, rounded to what it is stored in."""
    return (a.to(tl.float32) * b.to(tl.float32)).to(dtype)


@jit
def _rms_norm_kernel(x, residual, weight, total, out, eps, H: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row (Zhang and Sennrich 2019)."""
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
    """One program per row."""
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
    """One program per query: the stretches together."""
    task = tl.program_id(0).to(tl.int64)
    parts, features = tl.arange(0, SPLITS), tl.arange(0, D_BLOCK)
    log_mass = tl.load(masses + task * splits + parts, mask=parts < splits, other=float("-inf"))
    share = tl.exp(log_mass - tl.max(log_mass, axis=0))
    inside = (parts < splits)[:, None] & (features < D)[None, :]
    mean = tl.load(means + (task * splits + parts[:, None]) * D + features[None, :], mask=inside, other=0.0)
    mean = tl.sum(mean * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(out + task * D + features, mean.to(out.dtype.element_ty), mask=features < D)
