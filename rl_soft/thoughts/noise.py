"""Addressed randomness: noise that is a pure function of (seed, position, index).

A generator hands its noise out in the order of the calls, so what a row gets depends on its batch, its rank and its
device. Here every number is a hash of its address instead (a counter-based generator: Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). A rollout keeps its noise when the batch is cut differently, moved or resumed,
and one seed per row is all there is to store.

A row's key is 64 bits of splitmix64 (Steele et al. 2014) over seed, position and stream; the index is hashed once to
32 bits and then mixed with the key. The integers are the same on every device; only the last bit of a logarithm may
differ. The quality is statistical, not cryptographic.

Shapes: B rows, V indices.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

_CPU_BLOCK = 32768  # elements per pass: an int32 and a float32 buffer of this size stay in the L2 cache


def address(run_seed: int, problem_id: str, sample: int, step: int = 0) -> int:
    """The seed, in [0, 2^63), of one sample of one problem of one run: the same in every process, on every machine.

    Training draws a problem again at another optimizer `step`; everything else is step 0.
    """
    digest = hashlib.blake2b(repr((run_seed, problem_id, sample, step)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gumbel(seeds: Tensor, position: int | Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, -ln E with E standard exponential.

    Args:
        seeds: (B,) int64, one seed per row.
        position: index in the completion; an int or (B,) int64.
        vocab_size: V.

    Returns:
        (B, V) float32 in [-2.8, 22.2]: finite always; what is cut off has probability 1e-7 below and 2e-10 above.
    """
    return _fill(seeds, position, vocab_size, 0, lambda u: u.neg_().log1p_().abs_().log2_().mul_(-math.log(2)))


def exponential(seeds: Tensor, position: int | Tensor, size: int, stream: int = 0) -> Tensor:
    """Standard exponential noise, (B, size) float32, positive and finite. Streams of one address are independent."""
    return _fill(seeds, position, size, stream, lambda u: u.neg_().log1p_().abs_())


def uniform(seeds: Tensor, position: int | Tensor, size: int, stream: int = 0) -> Tensor:
    """Uniform noise, (B, size) float32 in [2^-32, 1), with full relative precision near 0."""
    return _fill(seeds, position, size, stream, lambda u: u)


def normal(seeds: Tensor, position: int | Tensor, size: int, stream: int = 0) -> Tensor:
    """Standard normal noise (Box-Muller), (B, size) float32; takes the streams `stream` and `stream + 1`."""
    radius = exponential(seeds, position, size, stream).mul_(2).sqrt_()
    return radius.mul_(uniform(seeds, position, size, stream + 1).mul_(2 * math.pi).cos_())


def gamma(seeds: Tensor, position: int | Tensor, concentration: Tensor, stream: int = 0) -> Tensor:
    """Gamma(a, 1) noise for a >= 1 by the rejection of Marsaglia and Tsang (2000); the CPU never waits for a GPU.

    Eight proposals are drawn at once and the first accepted is taken; all eight fail with probability below 3e-11, and
    a - 1/3 is returned then. Takes the streams `stream` .. `stream + 23`.

    Args:
        concentration: (B, size) float32, a >= 1.
    """
    d = concentration - 1 / 3
    out, done = d.clone(), torch.zeros_like(d, dtype=torch.bool)
    for s in range(stream, stream + 24, 3):
        x = normal(seeds, position, d.shape[1], s)
        v = (1 + x / (9 * d).sqrt()).clamp(min=1e-6) ** 3
        log_u = exponential(seeds, position, d.shape[1], s + 2).neg_()
        accept = (v > 1e-17) & (log_u < x * x / 2 + d * (1 - v + v.log()))
        out = torch.where(accept & ~done, d * v, out)
        done |= accept
    return out


def _fill(
    seeds: Tensor, position: int | Tensor, size: int, stream: int, transform: Callable[[Tensor], Tensor]
) -> Tensor:
    """`transform`, an in-place map, of uniform noise; (B, size) float32. On a CPU, block by block within the cache."""
    low, high = keys(seeds, position, stream)
    index_hash = index_hashes(size, seeds.device)
    out = torch.empty(len(seeds), size, device=seeds.device)
    block = _CPU_BLOCK * torch.get_num_threads() if seeds.device.type == "cpu" else max(out.numel(), 1)
    rows, cols = max(1, block // max(size, 1)), min(size, block)
    for r in range(0, len(seeds), rows):
        for c in range(0, size, cols):
            bits = index_hash[c : c + cols] ^ low[r : r + rows]
            bits *= high[r : r + rows]
            bits += bits >> 16  # adding the (arithmetic) shift keeps the top bit, which an exclusive or would clear
            bits *= 0x7FEB352D
            bits += bits >> 15
            u = out[r : r + rows, c : c + cols].copy_(bits).abs_()  # [0, 2^31]
            transform(u.mul_(2**-31 * (1 - 2**-23)).add_(2**-32))
    return out


def keys(seeds: Tensor, position: int | Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
    """The two halves of each row's key, the second odd; (B, 1) int32."""
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds: expected a (B,) int64 tensor, got {tuple(seeds.shape)} {seeds.dtype}")
    low, high = _splitmix(_splitmix(_splitmix(seeds) + position) + stream).view(torch.int32).view(-1, 2, 1).unbind(1)
    return low, high | 1


@functools.lru_cache(maxsize=8)
def index_hashes(size: int, device: torch.device) -> Tensor:
    """A 32-bit hash of 0 .. size - 1; (size,) int32."""
    return _splitmix(torch.arange(size, device=device)).view(torch.int32)[::2].contiguous()


def _splitmix(x: Tensor) -> Tensor:
    """One round of splitmix64 on int64 tensors, a bijection; wraps around, and shifts logically."""
    x = x - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15 modulo 2^64
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ (x >> 31 & (1 << 33) - 1)
