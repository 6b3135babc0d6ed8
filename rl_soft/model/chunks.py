"""Chunks of positions for passes over the LM head, so that no (N, V) tensor is ever whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rl_soft.model.head_product import add_weight_gradient, through
from rl_soft.thoughts import densities


def tempered(logits: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    """Logits capped and divided by T, in place."""
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature)


def grad_raw(d: Tensor, logits: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    """From the gradient to the tempered logits to that of the head's output; overwrites d."""
    d.div_(temperature)
    if softcap is not None:
        capped = logits * (temperature / softcap)  # tanh of the raw logits / softcap
        d.mul_(capped.square_().neg_().add_(1))
    return d


def chunk_plan(
    hidden: Tensor, support: Tensor, temperature: float | Tensor, chunk_size: int | None, vocab_size: int | None
) -> tuple[Tensor, int]:
    """The temperature as (N, 1), and the rows per chunk; raises ValueError for what does not fit together."""
    n, device = len(hidden), hidden.device
    if hidden.dim() != 2 or support.dim() != 2 or len(support) != n:
        raise ValueError(
            f"expected hidden (N, H) and support (N, K), got {tuple(hidden.shape)} and {tuple(support.shape)}"
        )
    if support.shape[1] < 1 or (vocab_size and support.shape[1] > vocab_size):
        raise ValueError(f"support: expected 1 <= K <= V = {vocab_size}, got K = {support.shape[1]}")
    if isinstance(temperature, Tensor):
        if temperature.shape not in (torch.Size([]), torch.Size([n])):
            raise ValueError(f"temperature: expected a number or ({n},), got {tuple(temperature.shape)}")
        temperature = temperature.detach().to(device, torch.float32).expand(n).unsqueeze(-1)
    else:
        densities.check_positive("temperature", temperature)
        temperature = torch.full((n, 1), float(temperature), device=device)
    if chunk_size is None:
        chunk_size = max(1, (2**23 if device.type == "cpu" else 2**27) // (vocab_size or 2**17))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected None or >= 1, got {chunk_size}")
    return temperature, chunk_size


def most_calls(lm_head: nn.Module, calls: int, device: torch.device) -> int:
    """The most calls that any rank makes. A partitioned head is gathered at each, so all ranks must make as many."""
    partitioned = any(hasattr(p, "ds_id") or type(p) not in (nn.Parameter, Tensor) for p in lm_head.parameters())
    if not partitioned or not torch.distributed.is_initialized():
        return calls
    most = torch.tensor(calls, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


class HeadGradients:
    """The gradients to a plain head's inputs: hidden (N, H), weight (V, H) and bias (V,), summed chunk by chunk.

    Args:
        hidden, weight, bias: what went in.
        wanted: whether a gradient is wanted of each.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        self._hidden, self._weight = hidden, weight
        self._of_hidden = torch.empty_like(hidden) if wanted[0] else None
        # sums over many chunks, so float32 whatever the dtype of the weight
        self._of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self._of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None

    def add(self, rows: slice, grad: Tensor) -> None:
        """`grad` (C, V) is the gradient to the head's output on these rows."""
        if self._of_bias is not None:
            self._of_bias += grad.sum(0, dtype=torch.float32)
        grad = grad.to(self._weight.dtype)
        if self._of_hidden is not None:
            self._of_hidden[rows] = through(grad, self._weight)
        if self._of_weight is not None:
            add_weight_gradient(self._of_weight, grad, self._hidden[rows])

    def result(self) -> tuple[Tensor | None, ...]:
        """Of hidden, weight and bias; None where it was not wanted."""
        cast = (None if g is None else g.to(self._weight.dtype) for g in (self._of_weight, self._of_bias))
        return self._of_hidden, *cast


def slices(n: int, size: int) -> Iterator[slice]:
    """The chunks of n rows, `size` each; one, empty, of no rows."""
    for start in range(0, max(n, 1), size):
        yield slice(start, min(start + size, n))
