"""Models whose weights torch has sharded (FSDP2): each parameter is a DTensor, of which a process holds a part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds weights of the model, or of modules in it, apart."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_hook_of_fsdp(hook: Any) -> bool:
    """Whether a forward hook is one by which FSDP2 gathers and frees weights."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


@contextmanager
def whole_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """A sharded model is a plain one for as long: whole weights, transformers' own classes, no hooks of FSDP, and so
    no communication. Then all is as it was. For all processes to enter; it takes the memory of the whole weights.

    Args:
        dtype: of the weights; None: as they are trained.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    classes: list[Any] = [type(unit) for unit in units]
    kept: list[tuple[Any, dict[Any, Any]]] = []
    gathered: dict[int, nn.Parameter] = {}  # by the identity of the part; tied weights stay one
    for module in model.modules():
        for part in module._parameters.values():
            if isinstance(part, DTensor) and id(part) not in gathered:
                whole = part.detach().full_tensor()
                gathered[id(part)] = nn.Parameter(whole if dtype is None else whole.to(dtype), part.requires_grad)
    try:
        for unit, cls in zip(units, classes, strict=True):
            unit.__class__ = next(base for base in cls.__mro__[1:] if not issubclass(base, FSDPModule))
        for module in model.modules():
            for table in (module._parameters, module._forward_hooks, module._forward_pre_hooks):
                kept.append((table, dict(table)))
            for name, part in module._parameters.items():
                if part is not None and id(part) in gathered:
                    module._parameters[name] = gathered[id(part)]
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if is_hook_of_fsdp(hook)]:
                    del hooks[key]
        yield
    finally:
        for table, content in kept:
            table.clear()
            table.update(content)
        for unit, cls in zip(units, classes, strict=True):
            unit.__class__ = cls


def whole_copy(linear: nn.Module) -> nn.Module:
    """A linear module of its own with the whole weights of a sharded one; one that is whole is returned as it is."""
    if not isinstance(linear, nn.Linear) or not isinstance(linear.weight, DTensor):
        return linear
    copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for name, part in linear.named_parameters(recurse=False):
        whole = part.full_tensor().detach() if isinstance(part, DTensor) else part.detach()
        setattr(copy, name, nn.Parameter(whole, requires_grad=False))
    return copy
