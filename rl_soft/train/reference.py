"""The reference policy of the KL: the model that training starts from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from rl_soft.model.projector import load_projector
from rl_soft.model.scored_forward import add_soft_forward
from rl_soft.model.sharded import whole_copy, whole_weights
from rl_soft.thoughts.kinds import KINDS
from rl_soft.train.soft_batch import SoftBatch, parts


class Reference:
    """The model that training starts from, which the KL is taken to: TRL's `ref_model`, or the policy with its adapter
    switched off, or with the copy "ref" of the adapter that training started from.

    Args:
        trainer: a `SoftGRPOTrainer`, whose models are made.
        chunk_size: as in the trainer.
    """

    def __init__(self, trainer: Any, chunk_size: int | None) -> None:
        self._trainer, model = trainer, trainer.accelerator.unwrap_model(trainer.model)
        copy_reference(model)
        if trainer.ref_model is not None:
            own = trainer.accelerator.unwrap_model(trainer.ref_model)
            with whole_weights(own):
                add_soft_forward(own, chunk_size)
            if KINDS[trainer.layout.thinking.thought].reads_hidden:
                load_projector(own, Path(str(own.name_or_path)))
                own.projector.requires_grad_(False)

    def head(self) -> Any:
        """A module from (N, H) states to (N, V) logits."""
        trainer = self._trainer
        model = trainer.model if trainer.ref_model is None else trainer.ref_model
        head = reference_head(trainer.accelerator.unwrap_model(model))
        return head if trainer.ref_model is None else whole_copy(head)

    @torch.no_grad()
    def states(self, soft: SoftBatch, batch: dict[str, Any]) -> Tensor:
        """(B, C, H), what the reference's head reads at the recorded actions; its loss terms need nothing else.

        Args:
            batch: TRL's, with prompt_ids, prompt_mask, completion_ids and completion_mask.
        """
        trainer = self._trainer
        args, layout = trainer.args, trainer.layout
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)  # (B, P+C)
        batch_size = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
        model: Any = trainer.ref_model
        switched: Any = nullcontext()
        if model is None:
            model, peft = trainer.model, trainer.accelerator.unwrap_model(trainer.model)
            switched = use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None)
        states = []
        with switched, disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs):
            for rows in parts(len(mask), batch_size):
                inputs = soft.take(rows).inputs(
                    batch["prompt_ids"][rows], layout.thinking, trainer.ratio, states_only=True
                )
                with trainer.accelerator.autocast():
                    states.append(model(attention_mask=mask[rows], soft=inputs).states)
        return torch.cat(states)


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


def copy_reference(model: Any) -> None:
    """Copy all that an adapter trains into its copy "ref". TRL copies what is named `.default.`, the matrices of
    layers; those of embeddings, single tokens and IA3's factors are named `.default`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if name.endswith(".default") and (copy := parameters.get(f"{name.removesuffix('default')}ref")) is not None:
            copy.data.copy_(parameter.data)


class _StartingRows(torch.nn.Module):
    """A head of which single tokens are trained, with the rows that they started from, merged at each call."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.rows, self.out_features = head.token_adapter, head.token_adapter.base_layer.out_features

    def forward(self, states: Tensor) -> Tensor:
        return self.rows.forward_adapters(states, ["ref"])


def check_reference(model: Any, args: Any, peft_config: Any) -> None:
    """Raises ValueError for a KL whose reference would be another model than the one that training starts from."""
    if not args.beta:
        return
    if not (peft_config or is_peft_model(model) or model.config._name_or_path):
        raise ValueError(
            f"beta {args.beta}: the reference is the starting model, loaded again by its path, and this one was made "
            "in memory; save it and load it by its path, train an adapter (use_peft), or set beta 0"
        )
    for config in getattr(model, "peft_config", {}).values():
        bias = getattr(config, "bias", "none")
        if bias != "none" or config.peft_type == "ADALORA":
            kind = f"bias {bias!r}" if bias != "none" else config.peft_type.value
            raise ValueError(
                f"beta {args.beta}: the reference is a copy of the adapter that training starts from, and PEFT holds "
                f"no second adapter with {kind}; set beta 0, or merge the adapter into its base"
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
