"""What a run starts from: its warm start, its weights, its adapter, and whether they fit together."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from rl_soft.config.recipe import (
    RL_METHODS,
    Recipe,
    load_recipe,
)
from rl_soft.config.refusals import IN_MEMORY
from rl_soft.model import policy
from rl_soft.model.projector import beside_adapter
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")


def with_adapter(model: Any, layout: Layout, peft_config: Any) -> Any:
    """`model` in a PEFT wrapper whose adapter holds the rows of <bot> and <eot> too."""
    from peft import get_peft_model

    if not model.name_or_path:
        raise ValueError(f"use_peft: {IN_MEMORY}")
    rows = [layout.bot_id, layout.eot_id]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    ends = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
    peft_config.trainable_token_indices = {names[id(module)]: rows for module in ends}
    adapted: Any = get_peft_model(model, beside_adapter(peft_config) if hasattr(model, "projector") else peft_config)
    # A longer vocabulary makes peft save both embedding matrices whole; only these rows differ from the base's.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def warm_start_of(recipe: Recipe) -> Recipe | None:
    """The warm start's recipe, with this run's seed; its path is relative to the working folder or to this recipe."""
    name = recipe.model.warm_start
    if name is None:
        return None
    path = next((p for p in (Path(name), recipe.path.parent / name) if p.exists()), Path(name))
    return load_recipe(path, {"seed": recipe.seed})


def starting_policy(recipe: Recipe, warm_start: Recipe | None) -> policy.Policy:
    m = recipe.model
    if m.model_config:
        return policy.make(m.model_config, m.vocabulary or "", recipe.seed, m.dtype, m.attn_implementation)
    source = str(warm_start.output_dir / "model") if warm_start is not None else str(m.model_name_or_path)
    start = policy.load_policy(source, m.dtype, m.attn_implementation, trainable=True)
    if hasattr(start.model, "peft_config"):
        check_adapter(recipe, source, start.model.peft_config["default"])
    if recipe.thinking.phase == "latent" and recipe.method not in RL_METHODS:
        policy.add_thought_tokens(start)
    return start


def check_adapter(recipe: Recipe, source: str, adapter: Any) -> None:
    """RL goes on with the adapter that it starts from. Refuse a recipe that asks for another one."""
    m = recipe.model
    if recipe.method not in RL_METHODS:
        raise ValueError(
            f"model {source} is an adapter, and method {recipe.method} makes a new one; start from its base, "
            f"{adapter.base_model_name_or_path}, or from a folder in which the two are merged"
        )
    if not m.use_peft:
        raise ValueError(f"model {source} is an adapter, and training goes on with it: set use_peft true")
    for name, theirs in (("lora_r", adapter.r), ("lora_alpha", adapter.lora_alpha)):
        if getattr(m, name) != theirs:
            raise ValueError(
                f"{name} is {getattr(m, name)} in {recipe.path}, but the adapter {source}, with which training goes "
                f"on, has {theirs}"
            )


def check_thinking(recipe: Recipe, trained: Thinking | None) -> None:
    """Refuse a checkpoint that was trained for another layout of its thoughts."""
    if trained is None:
        if recipe.thinking.phase == "latent":
            raise ValueError("phase latent needs a model trained for it; name a CODI recipe in warm_start")
        return
    for name in ("phase", "num_thoughts", "answer_prompt", "question_template"):
        ours, theirs = getattr(recipe.thinking, name), getattr(trained, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r} in {recipe.path}, but the checkpoint was trained with {theirs!r}")
    if trained.thought == "token" and recipe.thinking.thought != "token":
        raise ValueError(f"thought {recipe.thinking.thought} does not fit a checkpoint trained with thought token")


def lora_config(recipe: Recipe) -> Any:
    """The adapter that the recipe asks for, or None."""
    m = recipe.model
    if not m.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=m.lora_r,
        lora_alpha=m.lora_alpha,
        lora_dropout=m.lora_dropout,
        target_modules=m.lora_target_modules,
        task_type="CAUSAL_LM",
    )
