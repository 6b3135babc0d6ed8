"""The reference policy of the KL: the model that training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from rl_soft.model.projector import load_projector


def add_reference_projector(model: PreTrainedModel) -> None:
    """The projector that the reference, loaded again by its path, started with."""
    load_projector(model, Path(str(model.name_or_path)))
    model.projector.requires_grad_(False)


def reference_head(model: Any) -> Any:
    """The head of the reference policy, a module from (N, H) to (N, V) logits.

    Args:
        model: the reference model; or the policy in its PEFT wrapper, whose reference is the adapter switched off, or
            the copy named "ref" that TRL keeps of an adapter that training started from. (TRL refuses LoRA on the
            head; single tokens of it, or a head trained as a whole beside an adapter, are fine.)
    """
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    head = model.get_output_embeddings()
    if not isinstance(head, AuxiliaryTrainingWrapper):
        return head
    if "ref" not in model.peft_config:
        return head.original_module
    return head.modules_to_save["ref"] if isinstance(head, ModulesToSaveWrapper) else _StartingRows(head)


def copy_reference_rows(model: Any) -> None:
    """Copy the single tokens that an adapter trains into its copy "ref", where TRL puts the matrices alone."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and "ref" in module.trainable_tokens_delta:
            rows = module.trainable_tokens_delta
            rows["ref"].data.copy_(rows["default"].data)


class _StartingRows(torch.nn.Module):
    """A head of which single tokens are trained, with the rows that they started from, merged at each call."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.rows, self.out_features = head.token_adapter, head.token_adapter.base_layer.out_features

    def forward(self, states: Tensor) -> Tensor:
        return self.rows.forward_adapters(states, ["ref"])


def _prepare_reference(model: Any, args: Any, peft_config: Any) -> None:
    """Raises ValueError for a KL whose reference would be another model than the one that training starts from."""
    if args is None or not args.beta:
        return
    if not (isinstance(model, str) or peft_config or is_peft_model(model) or model.config._name_or_path):
        raise ValueError(
            f"beta {args.beta}: the reference is the starting model, loaded again by its path, and this one was made "
            "in memory; save it and load it by its path, train an adapter (use_peft), or set beta 0"
        )
    steps = -(-args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)
    if args.sync_ref_model and args.ref_model_sync_steps % steps:
        raise ValueError(
            f"ref_model_sync_steps must be a multiple of the {steps} optimizer steps of a rollout, whose reference "
            f"states are computed once; got {args.ref_model_sync_steps}"
        )
    if args.deepspeed_plugin is not None:  # accelerate does not start its communication on a CPU, and ZeRO-3 would
        import deepspeed  # take the reference, which is loaded next, for that of a single process

        deepspeed.init_distributed(deepspeed.get_accelerator().communication_backend_name())
