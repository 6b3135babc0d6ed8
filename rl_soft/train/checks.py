"""What our trainers cannot do, told before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rl_soft.config.refusals import MUST_BE_TRUE, check_features, refuse_checkpointing
from rl_soft.model.projector import beside_adapter
from rl_soft.model.side_modules import language_model
from rl_soft.thoughts.layout import Layout


def check_hybrid(model: Any, ratio: str, args: Any, peft_config: Any) -> None:
    """Raises ValueError where RL cannot train hybrid thoughts: each is fed with a state that is made again, so the
    training pass takes them one after another, on a cache."""
    if ratio in ("pathwise", "conditional"):
        raise ValueError(f"ratio {ratio} is made for gumbel thoughts; thought hybrid takes joint, factored or top1")
    if getattr(language_model(model), "projector", None) is None:
        raise ValueError(
            "thought hybrid needs a model with a projector; start from a CODI run with thought hidden or hybrid"
        )
    refuse_checkpointing(
        args,
        "gradient_checkpointing: with thought hybrid",
        "use thought gumbel or gradient_checkpointing false",
    )
    if getattr(args, "beta", 0) and (peft_config is not None or hasattr(model, "peft_config")):
        raise ValueError(
            f"beta {args.beta}: the reference is the adapter switched off, and the projector of thought hybrid is "
            "trained beside it; use beta 0, or train all weights (use_peft false)"
        )


def check_given(given: Mapping[str, Any], layout: Layout, ratio: str, thought_epsilon: float | None) -> None:
    """Raises ValueError for what `SoftGRPOTrainer` cannot do; `given` holds TRL's arguments by name."""
    config, thinking = given.get("args"), layout.thinking
    for name in ("tools", "rollout_func", "environment_factory"):
        if given.get(name):
            raise ValueError(f"{name} cannot be used with soft rollouts: they have a single turn")
    if config is not None:
        check_features(vars(config))
    if not getattr(config, "disable_dropout", False) and any(
        isinstance(module, torch.nn.Dropout) and module.p for module in getattr(given.get("model"), "modules", list)()
    ):
        raise ValueError(f"disable_dropout must be true for this model: {MUST_BE_TRUE['disable_dropout']}")
    for name in ("train_dataset", "eval_dataset"):
        if found := {"image", "images"}.intersection(getattr(given.get(name), "column_names", None) or ()):
            raise ValueError(f"{name} has a column {min(found)}: soft rollouts take prompts of text alone")
    if thinking.thought == "soft":
        raise ValueError("thought soft is a point mass and has no density; use gumbel, dirichlet or token for RL")
    if thinking.thought == "hidden":
        raise ValueError("thought hidden is a point mass and has no density; use hybrid, gumbel or token for RL")
    if thinking.thought == "hybrid":
        check_hybrid(given.get("model"), ratio, config, beside_adapter(given.get("peft_config")))
    if thinking.thought == "dirichlet" and ratio != "joint":
        raise ValueError(f"ratio {ratio} is made for gumbel thoughts; thought dirichlet takes ratio joint")
    if ratio in ("pathwise", "conditional"):
        if thinking.phase != "latent":
            raise ValueError(f"ratio {ratio} needs phase latent, where every row has its thoughts first; use top1")
        refuse_checkpointing(
            config, f"gradient_checkpointing: with ratio {ratio}", "use ratio top1 or gradient_checkpointing false"
        )
    if thought_epsilon is not None and getattr(config, "importance_sampling_level", "token") == "sequence":
        raise ValueError("thought_epsilon: a sequence has one ratio; use importance_sampling_level token")
