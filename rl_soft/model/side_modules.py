"""Modules that training adds to a causal LM: its `projector`, its `value_head`, its
`switch_gate`.

Each is an attribute of the causal LM under any LoRA adapter, so that the optimizer, DeepSpeed and the model's moves
see it; on disk it is NAME.safetensors beside the weights, so that these open as a plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rl_soft.files import replacing


def language_model(model: Any) -> Any:
    """The causal LM itself, out of its PEFT wrapper, where side modules sit."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: Any) -> Any:
    """The module of a causal LM (without its PEFT wrapper) whose last states become logits.

    Where the base model only wraps a decoder (OPT), it is that decoder, which the causal LM calls itself.
    """
    base = model.base_model
    return base.get_decoder() if hasattr(base, "get_decoder") else base


def module_file(folder: Path, name: str) -> Path:
    """Where the module `name` of a model folder or a checkpoint is."""
    return folder / f"{name}.safetensors"


def split_module(state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict without the module `name`, and the module's own, by the names that it has inside."""
    rest, own = {}, {}
    for key, value in state.items():
        _, found, inside = f".{key}".rpartition(f".{name}.")
        if found:
            own[inside] = value
        else:
            rest[key] = value
    return rest, own


def save_module(folder: Path, name: str, state: dict[str, Tensor]) -> None:
    """Write a module's state, by the names that it has inside, to its file in `folder`, whole or not at all."""
    with replacing(module_file(folder, name)) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary)


@contextmanager
def taken_out(model: Any, name: str) -> Iterator[None]:
    """`model` without its module `name`, which is in a file of its own and so not missed when the weights are read."""
    module = getattr(model, name)
    delattr(model, name)
    try:
        yield
    finally:
        setattr(model, name, module)
