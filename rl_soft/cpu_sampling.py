"""Sampling on a CPU: noise, softmax and top-K of a row of logits in one pass of `cpu_kernels.c`.

PyTorch takes fifteen passes over the vocabulary, each writing what the next one reads. Noise is that of `noise.gumbel`
but for the last bits of its logarithms.

Shapes: m rows, V vocabulary, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rl_soft import cpu_kernels, noise

SLOTS = 128  # the kernel inserts one by one


@dataclass
class Drawn:
    """A Gumbel top-K sample of each row, and what is known of its distribution."""

    logits: Tensor  # (m, V) float32, V rounded up to a multiple of a vector's length
    temperature: Tensor  # (m,) float32
    support: Tensor  # (m, K) int64, the strongest first
    values: Tensor  # (m, K) float32, their noisy log-probabilities, but for a number the same in all of a row
    top: Tensor  # (m,) float32, the largest of logits / temperature
    mass: Tensor  # (m,) float32, the sum of exp(logits / temperature - top); NaN where a logit is not finite
    entropy: Tensor  # (m,) float32, nats; NaN there too

    def log_probs(self, ids: Tensor) -> Tensor:
        """(m, K) float32, of ids (m, K)."""
        shifted = self.logits.gather(-1, ids) / self.temperature[:, None] - self.top[:, None]
        return shifted - self.mass.log()[:, None]

    def log_outside(self, ids: Tensor) -> Tensor:
        """(m,) float32, ln of the mass outside ids (m, K), summed over the complement."""
        kernels: Any = cpu_kernels.library()
        (m, V), ids, outside = self.logits.shape, ids.contiguous(), torch.empty_like(self.mass)
        inputs = (self.logits, self.temperature, self.top, ids, outside)
        kernels.mass_outside(*(x.data_ptr() for x in inputs), m, V, ids.shape[1])
        share = outside / self.mass
        if not bool((share <= 1e-30).any()):
            return share.log()
        phi = (self.logits / self.temperature[:, None]).log_softmax(-1)  # nothing underflows
        return phi.scatter_(-1, ids, -torch.inf).logsumexp(-1)


def draw(logits: Tensor, temperature: Tensor, slots: int, seeds: Tensor, step: Any) -> Drawn | None:
    """The sample of `noise.gumbel` at (seeds, step); None where there are no kernels, or not for this.

    Args:
        logits: (m, V), any float dtype; temperature: (m,) float32; seeds: (m,) int64; step: int or (m,) int64.
        slots: K.
    """
    m, V = logits.shape
    if logits.device.type != "cpu" or not 0 < slots <= min(V, SLOTS):
        return None
    kernels = cpu_kernels.library()
    if kernels is None:
        return None
    logits, temperature = F.pad(logits.float(), (0, -V % cpu_kernels.LANES), value=-torch.inf), temperature
    logits, temperature, V = logits.contiguous(), temperature.contiguous(), logits.shape[1]
    low, high = (half.contiguous() for half in noise.keys(seeds, step))
    hashes = noise.index_hashes(V, logits.device)
    (top, mass, dot), values = logits.new_empty(3, m), logits.new_empty(m, slots)
    support = torch.empty(m, slots, dtype=torch.int64)
    tensors = (logits, temperature, low, high, hashes, top, mass, dot, values, support)
    kernels.draw(*(x.data_ptr() for x in tensors), m, V, slots)
    return Drawn(logits, temperature, support, values, top, mass, mass.log() - dot / mass)
