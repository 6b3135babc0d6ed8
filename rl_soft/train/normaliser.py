"""How TRL's losses add up over positions, for a term of ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def aggregate(trainer: Any, per_token: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What TRL makes of a term (B, C) of its per-token loss, with the normaliser of each loss type.

    Args:
        trainer: TRL's GRPOTrainer.
        inputs: the micro-batch, with completion_mask, tool_mask and num_items_in_batch.
    """
    mask = inputs["completion_mask"] * inputs["tool_mask"]  # (B, C)
    train = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if train else 1.0
    masked = per_token * mask
    if trainer.loss_type in ("cispo", "dapo", "vespo"):
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if train:  # num_items_in_batch spans the rollout; one optimizer step takes its share
            items = items * accumulation / trainer.args.steps_per_generation
        return masked.sum() / items
    if trainer.loss_type in ("grpo", "sapo"):
        value = (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    elif trainer.loss_type == "bnpo":
        value = masked.sum() / mask.sum().clamp(min=1.0)
    elif trainer.loss_type == "dr_grpo":
        value = masked.sum() / (len(mask) * trainer.max_completion_length)
    else:
        assert trainer.loss_type == "luspo"  # TRL has refused all others
        value = masked.sum(-1).mean()
    return value / accumulation
