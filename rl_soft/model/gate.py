"""The gate of switching thoughts: p(soft) = sigmoid(w h + b) on the state that the LM head reads.

It is `model.switch_gate`, on disk switch_gate.safetensors (side_modules.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rl_soft.model.sharded import is_sharded
from rl_soft.model.side_modules import language_model, module_file, save_module, split_module, taken_out
from rl_soft.thoughts.thinking import Thinking

GATE = "switch_gate"


class SwitchGate(nn.Module):
    """One logit per state; zero at the start, so that both modes are tried. No nn.Linear: no adapter is put on it."""

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) of any float dtype -> (...) float32 logits of soft."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.to(self.weight.dtype) @ self.weight + self.bias).float()


def mode_log_prob(gate: Tensor, is_soft: Tensor) -> Tensor:
    """ln p of a mode, from the gate's logits; shapes alike."""
    return F.logsigmoid(torch.where(is_soft, gate, -gate))


def add_gate(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Give a causal LM (without its PEFT wrapper) a trained gate; one that is there already is kept."""
    if getattr(model, GATE, None) is None:
        model.switch_gate = SwitchGate(model.config.get_text_config().hidden_size, dtype, model.device)
    model.switch_gate.requires_grad_(True)


def load_gate(model: Any, folder: Path) -> None:
    """Give a causal LM (without its PEFT wrapper) the gate of a folder."""
    state = load_file(module_file(folder, GATE))
    expected = model.config.get_text_config().hidden_size
    if len(state["weight"]) != expected:
        raise ValueError(
            f"{module_file(folder, GATE)} is made for a model of width {len(state['weight'])}, this one has {expected}"
        )
    model.switch_gate = SwitchGate(expected, device=model.device)
    model.switch_gate.load_state_dict(state)


def gate_of(model: Any, thinking: Thinking) -> SwitchGate | None:
    """The gate that thoughts of a model are switched by; None where none is asked for.

    Raises:
        ValueError: switch gate, and a model without one.
    """
    if thinking.switch != "gate":
        return None
    gate = getattr(language_model(model), GATE, None)
    if gate is None:
        raise ValueError(
            "switch gate needs a model with a gate (switch_gate.safetensors), which RL with switch gate trains; "
            "use switch entropy"
        )
    return gate


class KeepsGate:
    """Mixin before a transformers Trainer: every folder that it writes has the gate in a file beside the weights."""

    model: Any
    args: Any

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """DeepSpeed hands a gathered state in."""
        if getattr(language_model(self.model), GATE, None) is None:
            return super()._save(output_dir, state_dict)  # type: ignore[misc]
        state, own = split_module(self.model.state_dict() if state_dict is None else state_dict, GATE)
        super()._save(output_dir, state)  # type: ignore[misc]
        if self.args.should_save:
            save_module(Path(output_dir or self.args.output_dir), GATE, own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        owner = language_model(self.model)
        if getattr(owner, GATE, None) is None or is_sharded(owner):  # FSDP2 reads all of it from a file of its own
            return super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        with taken_out(owner, GATE):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        owner.switch_gate.load_state_dict(load_file(module_file(Path(resume_from_checkpoint), GATE)))
