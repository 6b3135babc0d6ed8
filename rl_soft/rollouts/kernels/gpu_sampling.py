"""Sampling on a GPU, in Triton: a Gumbel top-K sample of rows of logits, and all that its density takes.

Two kernels read the logits once, and one more reads them for the mass outside; PyTorch takes fifty passes, most of
which write what the next one reads. Not run on a GPU yet. In Triton's interpreter they are held to PyTorch's
operations, and they compile for an A100 and an H100 without either (tests/rollouts/test_gpu_sampling.py).

Shapes: m rows, V vocabulary, K slots.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from rl_soft.model import head_triton as kernels
from rl_soft.model.head_triton import jit, tempered, tl, triton
from rl_soft.thoughts import noise

logger = logging.getLogger(__name__)

SLOTS = 64  # of a draw; they are found one by one
_BLOCK = 4096  # logits that a program of a draw holds


def usable(x: Tensor) -> bool:
    """Whether the kernels take x: Triton starts, and on x's device they do what they are for."""
    return kernels.usable(x) and x.is_floating_point() and _works(x.device, x.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """One draw, beside PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5000, generator=generator).to(device, dtype)
    seeds, one = torch.arange(2, device=device), torch.ones(2, device=device)
    try:
        with torch.no_grad():
            support, _, top, mass, _ = draw(logits, one, 4, seeds, 1)
            outside = log_outside(logits, one, support)
    except Exception as error:  # Triton has exceptions of many kinds: for resources, for compilers, for drivers
        logger.warning("rollout: sampling takes PyTorch's operations, Triton's kernels fail (%s)", str(error)[:200])
        return False
    phi = logits.double().log_softmax(-1)
    found = (phi + noise.gumbel(seeds, 1, 5000)).topk(4).indices
    off = phi.scatter(-1, found, -torch.inf).logsumexp(-1) - (outside - top - mass.log())
    if not (off.abs().max() < 1e-4 and torch.equal(found, support)):
        logger.warning(
            "rollout: sampling takes PyTorch's operations, Triton's kernels give other results on %s", device
        )
        return False
    return True


def draw(logits: Tensor, temperature: Tensor, slots: int, seeds: Tensor, position: Any) -> tuple[Tensor, ...]:
    """A Gumbel top-K sample of each row, with the noise of `noise.gumbel`; one read of the logits.

    Args:
        logits: (m, V), any float dtype, rows contiguous; temperature: (m,) float32; slots: K, at most SLOTS.
        seeds: (m,) int64; position: int or (m,) int64.

    Returns:
        support (m, K) int64, the strongest first; values (m, K) float32, of logits / temperature - top + noise;
        top (m,), the largest of logits / temperature; mass (m,), the sum of exp(logits / temperature - top), NaN where
        a row has a logit that is NaN or +inf, or none that is finite; dot (m,), the same sum times the exponents.
    """
    m, V = logits.shape
    blocks, hashes = triton.cdiv(V, _BLOCK), noise.index_hashes(V, logits.device)
    positions = position.contiguous() if isinstance(position, Tensor) else torch.full_like(seeds, position)
    few = min(slots, _BLOCK)
    values = logits.new_empty(m, blocks * few, dtype=torch.float32)
    ids = logits.new_empty(m, blocks * few, dtype=torch.int32)
    sums = logits.new_empty(3, m, blocks, dtype=torch.float32)
    top, mass, dot = logits.new_empty(3, m, dtype=torch.float32)
    found, support = (logits.new_empty(m, slots, dtype=dtype) for dtype in (torch.float32, torch.int64))
    temperature, seeds = temperature.contiguous(), seeds.contiguous()
    with torch.cuda.device_of(logits):
        _draw_kernel[(m, blocks)](
            logits, logits.stride(0), temperature, seeds, positions, hashes, values, ids, sums, m * blocks,
            V=V, K=few, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        _best_kernel[(m,)](
            logits, logits.stride(0), temperature, seeds, positions, hashes, values, ids, sums, m * blocks,
            found, support, top, mass, dot,
            K=slots, COUNT=blocks * few, BLOCKS=blocks,
            WIDE=triton.next_power_of_2(blocks * few), BLOCKS_WIDE=triton.next_power_of_2(blocks), num_warps=4,
        )  # fmt: skip
    return support, found, top, mass, dot


def log_outside(logits: Tensor, temperature: Tensor, ids: Tensor) -> Tensor:
    """(m,) float32, ln of the sum of exp(logits / temperature) over all ids but `ids` (m, K); other arguments as in
    `draw`."""
    (m, V), ids = logits.shape, ids.contiguous()
    blocks = triton.cdiv(V, _BLOCK)
    parts = logits.new_empty(m, blocks, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _outside_kernel[(m, blocks)](
            logits, logits.stride(0), temperature.contiguous(), ids, parts,
            V=V, K=ids.shape[1], BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return parts.logsumexp(-1)


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
def _splitmix(x):
    """`noise._splitmix` of one int64."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@jit
def _gumbel(index_hash, seed, position):
    """`noise.gumbel` at one address, but for the last bits of its logarithms."""
    key = _splitmix(_splitmix(_splitmix(seed) + position))
    bits = (index_hash ^ key.to(tl.int32)) * ((key >> 32).to(tl.int32) | 1)
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
    logits, stride, temperatures, seeds, positions, hashes, values, ids, sums, count,
    V: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block of the vocabulary: its K best, and its sums relative to its largest logit."""
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
    z = x + _gumbel(index_hash, tl.load(seeds + row), tl.load(positions + row))
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
    logits, stride, temperatures, seeds, positions, hashes, values, ids, sums, count,
    found, support, tops, totals, dots,
    K: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr, BLOCKS_WIDE: tl.constexpr,
):  # fmt: skip
    """One program per row: the blocks together, and the values of the best again, now that the largest is known."""
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
    seed, position, inverse = tl.load(seeds + row), tl.load(positions + row), 1 / tl.load(temperatures + row)
    candidates = tl.arange(0, WIDE)
    z = tl.load(values + row * COUNT + candidates, mask=candidates < COUNT, other=float("-inf"))
    left = candidates < COUNT
    for k in range(K):
        best = tl.max(tl.where(left, z, float("-inf")), axis=0)
        first = tl.min(tl.where(left & (z == best), candidates, COUNT - 1), axis=0)
        i = tl.load(ids + row * COUNT + first)
        x = tempered(tl.load(logits + row * stride + i).to(tl.float32), inverse, 1.0, False)
        value = x - tl.where(top > float("-inf"), top, 0.0) + _gumbel(tl.load(hashes + i), seed, position)
        tl.store(found + row * K + k, value)
        tl.store(support + row * K + k, i.to(tl.int64))
        left = left & (candidates != first)


@jit
def _outside_kernel(logits, stride, temperatures, ids, parts, V: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block: ln of its sum without `ids`."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits + row * stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    x = tempered(raw, 1 / tl.load(temperatures + row), 1.0, False)
    for k in range(K):
        x = tl.where(columns == tl.load(ids + row * K + k), float("-inf"), x)
    top = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - tl.where(top > float("-inf"), top, 0.0)), axis=0)
    tl.store(parts + row * tl.num_programs(1) + block, top + tl.log(total))
