"""The products of the LM head, in float32 whatever the dtype of its weight, and the same in rollouts and training.

A logit is rounded where a product leaves it. bfloat16 keeps 8 bits, so a logit of 20 is off by up to 1/16, and a
log-density by K times as much. The products here take operands as they are and keep their sums in float32: nothing but
the head's inputs is rounded.

Shapes: N positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rl_soft.model.sharded import is_hook_of_fsdp

HALF = (torch.bfloat16, torch.float16)
BLOCK = 8192  # rows of the weight that a CPU casts at once


def trained_whole(module: Any) -> Any:
    """The copy of a module that an adapter trains (PEFT's modules_to_save) and runs in its place; or the module."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None or module.disable_adapters or not module.active_adapters:
        return module
    return copies[module.active_adapters[0]]


def plain_head(lm_head: Any) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) if the head is `hidden @ weight.T + bias` and nothing else; None if it must be called as a
    module."""
    if isinstance(lm_head, Tensor):
        return lm_head, None
    lm_head = trained_whole(lm_head)
    hooks = [*lm_head._forward_hooks.values(), *lm_head._forward_pre_hooks.values()]
    is_linear = type(lm_head) is nn.Linear or type(lm_head).__mro__[1:3] == (FSDPModule, nn.Linear)
    if not is_linear or "forward" in vars(lm_head) or not all(map(is_hook_of_fsdp, hooks)):
        return None
    weight = lm_head.weight
    partitioned = hasattr(weight, "ds_id") or type(weight) not in (
        nn.Parameter,
        Tensor,
    )  # ZeRO-3; FSDP2, where not gathered
    return None if partitioned else (weight, lm_head.bias)


def cast_like(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype of the weight, or in autocast's where that is on: inside the Functions nothing is cast for us."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (N, H) @ weight (V, H).T + bias: (N, V), float32 where the operands are narrower."""
    if weight.dtype not in HALF:
        return F.linear(hidden, weight, bias)
    out = _float32_mm(hidden, weight.T)
    return out if bias is None else out.add_(bias)


def through(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient (N, H) to the states, in the weight's dtype, from that to the logits, (N, V) of any."""
    with _whole_reductions():
        return grad.to(weight.dtype) @ weight


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total (V, H) float32 += grad (N, V).T @ hidden (N, H), both of one dtype."""
    if grad.dtype in HALF:
        total += _float32_mm(grad.T, hidden)
    elif grad.dtype == total.dtype:
        total.addmm_(grad.T, hidden)
    else:
        total += grad.T @ hidden


def _float32_mm(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type != "cpu":
        with _whole_reductions():
            return torch.mm(a, b, out_dtype=torch.float32)
    # The CPU has no such product. Its operands are cast, the large one block by block.
    a, out = a.float(), torch.empty(len(a), b.shape[1])
    for start in range(0, b.shape[1], BLOCK):
        columns = slice(start, start + BLOCK)
        torch.mm(a, b[:, columns].float(), out=out[:, columns])
    return out


@contextmanager
def _whole_reductions() -> Iterator[None]:
    """cuBLAS may add up parts of a sum in bfloat16 or float16; here it adds them up in float32."""
    backend: Any = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(backend, name) for name in names]
    for name in names:
        setattr(backend, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(backend, name, value)


@contextmanager
def float32_logits(model: Any) -> Iterator[None]:
    """The model's own forward makes its logits as the training pass does: its head is `logits_of`, if it is plain.

    Args:
        model: a causal LM, possibly in a PEFT wrapper; its last step after the head (a scale, a cap) is then float32.
    """
    head = trained_whole(model.get_output_embeddings())
    if head is None or plain_head(head) is None:
        yield
        return
    inner, kept = head.forward, None
    if head.weight.device.type == "cpu" and head.weight.dtype in HALF:
        kept = head.weight.float()  # once, and not at every step

    def forward(hidden: Tensor) -> Tensor:
        states, weight, bias = cast_like(hidden, head.weight, head.bias)
        if weight.dtype not in HALF or torch.is_grad_enabled():
            return inner(hidden)
        flat = states.flatten(0, -2)
        out = logits_of(flat, weight, bias) if kept is None else logits_of(flat.float(), kept, bias)
        return out.unflatten(0, states.shape[:-1])

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
