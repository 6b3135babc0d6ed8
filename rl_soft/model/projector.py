"""The projector: what a last hidden state goes through before it is fed as a thought (CODI, arXiv 2502.21074, 3.3).

    hidden   z = P(h)                     P = LayerNorm(W2 GELU(W1 h + b1) + b2)
    hybrid   z = P(h) + gate * mixture    of the same thought's gumbel mixture of token embeddings

It is `model.projector`, on disk projector.safetensors (side_modules.py).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl_soft.model.sharded import is_sharded
from rl_soft.model.side_modules import language_model, module_file, save_module, split_module, taken_out

PROJECTOR = "projector"
START_SHARE = 0.1  # of a hybrid thought: what a gate that is not yet trained gives the mixture, beside the state


class Projector(nn.Module):
    """Linear, exact GELU, Linear, LayerNorm, and the gate of a mixture, in the dtype of its weights.

    Args:
        width: H, of the hidden states and the embeddings.
        size: width between the two linear layers (the paper: H).
    """

    def __init__(self, width: int, size: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"):
        super().__init__()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.inner = nn.utils.skip_init(nn.Linear, width, size, **factory)  # draws no random numbers
        self.outer = nn.utils.skip_init(nn.Linear, size, width, **factory)
        self.norm = nn.LayerNorm(width, **factory)
        self.gate = nn.Parameter(torch.zeros(1, **factory))

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Weights and biases as nn.Linear draws them, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), from a seed of their own."""
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.inner, self.outer):
            bound = 1 / math.sqrt(linear.in_features)
            for parameter in (linear.weight, linear.bias):
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, hidden: Tensor, mixture: Tensor | None = None) -> Tensor:
        """(..., H) hidden states, and the mixtures (..., H) of a hybrid thought -> (..., H), dtype of `hidden`.

        Computed in the dtype of the weights, whatever the autocast.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            inner = F.gelu(self.inner(hidden.to(self.inner.weight.dtype)))  # (..., size)
            projected = self.norm(self.outer(inner))
            if mixture is not None:
                projected = projected + self.gate * mixture.to(projected.dtype)
        return projected.to(hidden.dtype)


def add_projector(
    model: PreTrainedModel,
    gated: bool,
    size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give a causal LM (without its PEFT wrapper) a trained `projector`; one that is there already is kept.

    A new one draws random numbers from `seed` alone. Added after LoRA, so that no adapter is put on it and nothing
    freezes it.

    Args:
        gated: whether the gate is trained too (thought hybrid). It starts from `start_gate`.
        size: width between the linear layers; None is the width of the model.
    """
    projector: Any = getattr(model, "projector", None)
    if projector is None:
        width = model.config.get_text_config().hidden_size
        model.projector = projector = Projector(width, size or width, dtype, model.device)
        projector.draw(seed)
        start_gate(model)
    projector.requires_grad_(True)
    projector.gate.requires_grad_(gated)


@torch.no_grad()
def start_gate(model: Any) -> None:
    """Set the gate so that a mixture is START_SHARE as large as a projected state: small, and with a gradient.

    Sizes are root mean squares: LayerNorm's weight on one side, the embeddings of the first ids on the other. A fixed
    number would not do: embeddings are 0.02 large in one model and 1 in another.
    """
    embedding, projector = model.get_input_embeddings(), model.projector
    weight = embedding.weight
    partitioned = hasattr(weight, "ds_id")
    if partitioned:  # ZeRO-3, while the model is loaded
        import deepspeed
    with deepspeed.zero.GatheredParameters([weight]) if partitioned else nullcontext():
        ids = torch.arange(min(1024, len(weight)), device=weight.device)
        embedded, projected = (x.float().square().mean().sqrt() for x in (embedding(ids), projector.norm.weight))
    projector.gate.fill_((START_SHARE * projected / embedded).item())


def beside_adapter(peft_config: Any) -> Any:
    """A LoraConfig whose `all-linear` leaves the projector out: it is trained whole."""
    if peft_config is not None and not peft_config.exclude_modules:
        peft_config.exclude_modules = rf"(.*\.)?{PROJECTOR}\..*"
    return peft_config


def load_projector(model: PreTrainedModel, folder: Path) -> None:
    """Give a causal LM (without its PEFT wrapper) the projector of a folder, in the shape in which it was saved.

    A folder of thought hidden has no gate; it then starts from `start_gate`, so that hybrid can go on from it.

    Raises:
        ValueError: the folder has none, or it was made for another width.
    """
    file = module_file(folder, PROJECTOR)
    if not file.exists():
        raise ValueError(f"{folder} has no {file.name}: it was not trained with thought hidden or hybrid")
    state = load_file(file)
    size, width = state["inner.weight"].shape
    expected = model.config.get_text_config().hidden_size
    if width != expected:
        raise ValueError(f"{file} is made for a model of width {width}, this one has {expected}")
    model.projector = Projector(width, size, device=model.device)
    read_projector(model, state)


def read_projector(model: Any, state: dict[str, Tensor]) -> None:
    """Load the weights of a projector; where `state` has no gate, it starts from `start_gate`."""
    gate = {} if "gate" in state else {"gate": model.projector.gate.detach()}
    model.projector.load_state_dict(state | gate)
    if gate:
        start_gate(model)


class KeepsProjector:
    """Mixin before a transformers Trainer: every folder that it writes has the projector in a file beside the weights,
    and a checkpoint is read back from both."""

    model: Any
    args: Any

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """DeepSpeed hands a gathered state in."""
        projector = getattr(language_model(self.model), PROJECTOR, None)
        if projector is None:
            return super()._save(output_dir, state_dict)  # type: ignore[misc]
        state, own = split_module(self.model.state_dict() if state_dict is None else state_dict, PROJECTOR)
        super()._save(output_dir, state)  # type: ignore[misc]
        if not projector.gate.requires_grad:
            own.pop("gate", None)  # thought hidden has none
        if self.args.should_save:
            save_module(Path(output_dir or self.args.output_dir), PROJECTOR, own)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        owner = language_model(self.model)
        if getattr(owner, PROJECTOR, None) is None or is_sharded(
            owner
        ):  # FSDP2 reads all of it from a file of its own
            return super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        with taken_out(owner, PROJECTOR):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        read_projector(owner, load_file(module_file(Path(resume_from_checkpoint), PROJECTOR)))
