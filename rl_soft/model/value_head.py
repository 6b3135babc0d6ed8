"""The value head of PPO: V(s) = w h + b + offset on the policy's last hidden states.

It is `model.value_head`, on disk value_head.safetensors (side_modules.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_soft.model.side_modules import module_file

VALUE_HEAD = "value_head"


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
    if model.name_or_path and module_file(Path(model.name_or_path), VALUE_HEAD).exists():
        load_value_head(model, Path(model.name_or_path))


def state_values(model: Any, hidden: Tensor) -> Tensor | None:
    """V of hidden states (B, C, H) -> (B, C) float32; None where the model has no value head."""
    if not hasattr(model, "value_head"):
        return None
    with torch.autocast(hidden.device.type, enabled=False):
        return model.value_head(hidden.to(model.value_head.weight.dtype))[..., 0]


def load_value_head(model: Any, folder: Path) -> None:
    """Raises ValueError when the folder has no value head."""
    file = module_file(folder, VALUE_HEAD)
    if not file.exists():
        raise ValueError(f"{folder} has no {file.name}: it was not written by PPO")
    model.value_head.load_state_dict(load_file(file))
