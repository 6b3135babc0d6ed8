"""What our trainers cannot do, told before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import GRPOConfig

from rl_soft.config.refusals import check_features, refuse_checkpointing
from rl_soft.model.adapters import check_kind
from rl_soft.model.logit_map import logit_map
from rl_soft.model.policy import context_length
from rl_soft.model.quantised import check_divided, in_4bit
from rl_soft.model.side_modules import language_model
from rl_soft.rollouts.models import check_rollout_model
from rl_soft.thoughts.kinds import KINDS, RATIOS, check_trainable
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.precision import check_masters
from rl_soft.train.runtime.checkpoints import divided
from rl_soft.train.runtime.processes import refuse_fsdp


def check_config(
    args: Any, thinking: Thinking, ratio: str, thought_epsilon: float | None, given: Mapping[str, Any]
) -> None:
    """Raises ValueError for settings that do not go with soft rollouts, or with each other.

    Args:
        args: a `trl.GRPOConfig`.
        given: the trainer's other arguments, by TRL's names.
    """
    for name in ("tools", "rollout_func", "environment_factory"):
        if given.get(name):
            raise ValueError(f"{name} cannot be used with soft rollouts: they have a single turn")
    check_features(vars(args))
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr(given.get(name), "column_names", None)
        if isinstance(columns, list) and "prompt" not in columns:
            raise ValueError(f"{name} has no column prompt; it has {', '.join(columns)}")
        if name == "train_dataset" and isinstance(columns, list):
            prompts = args.generation_batch_size // args.num_generations
            if len(given[name]) < prompts:
                raise ValueError(
                    f"train_dataset has {len(given[name])} rows, and a rollout takes {prompts} prompts "
                    f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}): "
                    "nothing would be trained; lower per_device_train_batch_size or gradient_accumulation_steps"
                )
        if isinstance(columns, list) and (found := {"image", "images"}.intersection(columns)):
            raise ValueError(f"{name} has a column {min(found)}: soft rollouts take prompts of text alone")
    check_trainable(thinking.thought, ratio)
    if RATIOS[ratio].one_by_one:
        if thinking.phase != "latent":
            raise ValueError(f"ratio {ratio} needs phase latent, where every row has its thoughts first; use top1")
        refuse_fsdp(f"ratio {ratio}")
        refuse_checkpointing(
            args, f"gradient_checkpointing: with ratio {ratio}", "use ratio top1 or gradient_checkpointing false"
        )
    if thought_epsilon is not None and args.importance_sampling_level == "sequence":
        raise ValueError("thought_epsilon: a sequence has one ratio; use importance_sampling_level token")
    if args.temperature not in (GRPOConfig.temperature, thinking.temperature):
        raise ValueError(
            f"temperature is {args.temperature} in args and {thinking.temperature} in thinking; set it in thinking, "
            "as temperature (answers) and thought_temperature (thoughts)"
        )


def aux_loss_coefficient(config: Any, args: Any) -> float:
    """The weight that TRL gives to a load-balancing loss, 0.0 where the model has none (`output_router_logits`)."""
    if not hasattr(config, "output_router_logits"):
        return 0.0
    own = getattr(config, "router_aux_loss_coef", 0.0)
    return own if args.router_aux_loss_coef is None else args.router_aux_loss_coef


def check_model(model: Any, args: Any, thinking: Thinking, ratio: str, peft_config: Any) -> None:
    """Raises ValueError for a model or an adapter that rollouts or the training pass cannot take, at all or with this
    thought and ratio.

    A thought that reads hidden states is fed with one that is made again, so the training pass takes thoughts one
    after another, on a cache; so do the ratios that remake them.
    """
    if peft_config is not None:
        check_kind(peft_config, "peft_config")
    for name, config in getattr(model, "peft_config", {}).items():
        check_kind(config, f"the model's {name}")
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                f"the model's {name} adapter is on its head, which TRL does not train; leave the head out of "
                "target_modules, and ensure_weight_tying false"
            )
    trained = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
    if peft_config is None:
        check_masters(str(trained).removeprefix("torch."), args.deepspeed_plugin is not None)
    if in_4bit(model) and peft_config is None and not hasattr(model, "peft_config"):
        raise ValueError(
            "the model has weights of 4 bits, which are not trained themselves; train an adapter (use_peft)"
        )
    check_divided(model, divided(args))
    check_rollout_model(model)
    logit_map(language_model(model))
    reads_hidden = KINDS[thinking.thought].reads_hidden
    coefficient = aux_loss_coefficient(model.config.get_text_config(), args)
    if coefficient and (reads_hidden or RATIOS[ratio].one_by_one):
        what = f"thought {thinking.thought}" if reads_hidden else f"ratio {ratio}"
        raise ValueError(
            f"router_aux_loss_coef is {coefficient}, and {what} feeds thoughts one by one, where the load-balancing "
            "loss of a mixture of experts is not made; set router_aux_loss_coef 0, or use ratio top1"
        )
    if not reads_hidden:
        return
    thought = f"thought {thinking.thought}"
    if getattr(language_model(model), "projector", None) is None:
        raise ValueError(
            f"{thought} needs a model with a projector; start from a CODI run with thought hidden or hybrid"
        )
    refuse_fsdp(thought)
    refuse_checkpointing(
        args, f"gradient_checkpointing: with {thought}", "use thought gumbel or gradient_checkpointing false"
    )
    if args.beta and (peft_config is not None or hasattr(model, "peft_config")):
        raise ValueError(
            f"beta {args.beta}: the reference is the adapter switched off, and the projector of {thought} is "
            "trained beside it; use beta 0, or train all weights (use_peft false)"
        )


def check_prompts(dataset: Any, layout: Layout, model: Any) -> None:
    """Raises ValueError for the first training row whose prompt leaves a model without positions for a completion."""
    context = context_length(model)
    if context is None or not isinstance(dataset, Dataset):
        return
    for i, prompt in enumerate(dataset["prompt"]):
        tokens = len(layout.prompt_ids(prompt)) + layout.max_completion_length
        if tokens > context:
            raise ValueError(
                f"train_dataset, row {i}: prompt, thoughts and answer may take {tokens} tokens, and the model has "
                f"{context} positions; leave the row out, or lower num_thoughts or max_answer_tokens"
            )
