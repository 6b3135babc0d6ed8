"""Sampling by kernels: softmax, entropy, noise and top-K of rows of logits in one pass, on a CPU (`cpu.c`) and
on a GPU (`gpu_sampling`).

PyTorch takes fifteen passes over the vocabulary on a CPU and fifty on a GPU, each writing what the next one reads.
Noise is that of `noise.gumbel` but for the last bits of its logarithms.

Shapes: m rows, V vocabulary, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_soft.rollouts.kernels import cpu as cpu_kernels
from rl_soft.rollouts.kernels import gpu_sampling
from rl_soft.thoughts import noise

SLOTS = 128  # on a CPU, where the kernel inserts one by one


@dataclass
class Drawn:
    """A Gumbel top-K sample of each row, and what is known of its distribution."""

    logits: Tensor  # (m, V), on a CPU float32 and V rounded up to a multiple of a vector's length
    temperature: Tensor  # (m,) float32
    support: Tensor  # (m, K) int64, the strongest first
    values: Tensor  # (m, K) float32, their noisy log-probabilities, but for a number the same in all of a row
    top: Tensor  # (m,) float32, the largest of logits / temperature
    mass: Tensor  # (m,) float32, the sum of exp(logits / temperature - top); NaN where a logit is not finite
    entropy: Tensor  # (m,) float32, nats; NaN there too

    def support_log_probs(self, ids: Tensor) -> Tensor:
        """(m, K) float32, ln pi of ids (m, K)."""
        shifted = self.logits.gather(-1, ids).float() / self.temperature[:, None] - self.top[:, None]
        return shifted - self.mass.log()[:, None]

    def log_outside(self, ids: Tensor) -> Tensor:
        """(m,) float32, ln of the mass outside ids (m, K), summed over the complement."""
        if gpu_sampling.usable(self.logits):
            return gpu_sampling.log_outside(self.logits, self.temperature, ids) - self.top - self.mass.log()
        library: Any = cpu_kernels.library()
        (m, V), ids, outside = self.logits.shape, ids.contiguous(), torch.empty_like(self.mass)
        inputs = (self.logits, self.temperature, self.top, ids, outside)
        library.mass_outside(*(x.data_ptr() for x in inputs), m, V, ids.shape[1])
        share = outside / self.mass
        log_share, low = share.log(), (share <= 1e-30).nonzero()[:, 0]
        if len(low):  # rows where it may have underflowed, by a way on which nothing does
            phi = (self.logits[low] / self.temperature[low, None]).log_softmax(-1)
            log_share[low] = phi.scatter_(-1, ids[low], -torch.inf).logsumexp(-1)
        return log_share


def draw(logits: Tensor, temperature: Tensor, slots: int, seeds: Tensor, position: Any) -> Drawn | None:
    """The sample of `noise.gumbel` at (seeds, position); None where there are no kernels, or not for this.

    Args:
        logits: (m, V), any float dtype; temperature: (m,) float32; seeds: (m,) int64; position: int or (m,) int64.
        slots: K.
    """
    m, V = logits.shape
    if gpu_sampling.usable(logits) and 0 < slots <= min(V, gpu_sampling.SLOTS):
        support, values, top, mass, dot = gpu_sampling.draw(logits, temperature, slots, seeds, position)
        return Drawn(logits, temperature, support, values, top, mass, mass.log() - dot / mass)
    if logits.device.type != "cpu" or not 0 < slots <= min(V, SLOTS):
        return None
    library = cpu_kernels.library()
    if library is None:
        return None
    logits = logits.float().contiguous()
    if short := -V % cpu_kernels.LANES:
        logits = F.pad(logits, (0, short), value=-torch.inf)
    temperature, V = temperature.contiguous(), logits.shape[1]
    low, high = (half.contiguous() for half in noise.keys(seeds, position))
    hashes = noise.index_hashes(V, logits.device)
    (top, mass, dot), values = logits.new_empty(3, m), logits.new_empty(m, slots)
    support = torch.empty(m, slots, dtype=torch.int64)
    tensors = (logits, temperature, low, high, hashes, top, mass, dot, values, support)
    library.draw(*(x.data_ptr() for x in tensors), m, V, slots)
    return Drawn(logits, temperature, support, values, top, mass, mass.log() - dot / mass)
