"""The value head of PPO: V(s) = w h + b + offset on the policy's last hidden states.

It is `model.value_head`, a module of the causal LM under any LoRA adapter; on disk it is value_head.safetensors beside
the weights, so that these open as a plain model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

VALUE_HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Linear):
    """One linear layer, zero at the start, and a constant that the trainer sets to the mean reward of its first
    rollout. A head that has to learn that constant by its weights learns to tell states apart on the way, for no
    reason, and is worse than a constant for hundreds of steps (docs/ppo.md)."""

    offset: Tensor

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: Any):
        super().__init__(hidden_size, 1, dtype=dtype, device="meta")  # draws no random numbers
        self.register_buffer("offset", torch.full((), torch.nan))  # NaN: no rollout yet
        self.to_empty(device=device)
        self.offset.fill_(torch.nan)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) of the weights' dtype -> (..., 1) float32."""
        return super().forward(hidden).float() + self.offset.float().nan_to_num(0.0)


def add_value_head(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Give a causal LM (without its PEFT wrapper) a `value_head`.

    It starts from the value_head.safetensors beside the weights that the model was loaded from, or from zero. Added
    after LoRA, so that no adapter is put on it and nothing freezes it.
    """
    model.value_head = ValueHead(model.config.get_text_config().hidden_size, dtype, model.device)
    if model.name_or_path and (Path(model.name_or_path) / VALUE_HEAD_FILE).exists():
        load_value_head(model, Path(model.name_or_path))


def state_values(model: Any, hidden: Tensor) -> Tensor | None:
    """V of hidden states (B, C, H) -> (B, C) float32; None where the model has no value head."""
    if not hasattr(model, "value_head"):
        return None
    with torch.autocast(hidden.device.type, enabled=False):
        return model.value_head(hidden.to(model.value_head.weight.dtype))[..., 0]


def split_value_head(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict without the value head, and the head's own."""
    mark = "value_head."
    head = {key.rpartition(mark)[2]: value for key, value in state.items() if mark in key}
    return {key: value for key, value in state.items() if mark not in key}, head


def save_value_head(folder: Path, head: dict[str, Tensor]) -> None:
    temporary = folder / (VALUE_HEAD_FILE + ".tmp")
    save_file({key: value.detach().cpu().contiguous() for key, value in head.items()}, temporary)
    os.replace(temporary, folder / VALUE_HEAD_FILE)


def load_value_head(model: Any, folder: Path) -> None:
    """Raises ValueError when the folder has no value head."""
    if not (folder / VALUE_HEAD_FILE).exists():
        raise ValueError(f"{folder} has no {VALUE_HEAD_FILE}: it was not written by PPO")
    model.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE))
