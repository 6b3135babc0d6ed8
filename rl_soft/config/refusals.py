"""What a recipe or a trainer of ours cannot have, and why: a key that would have no effect is refused by its name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_soft.config.arguments import EvalArguments
from rl_soft.thoughts.kinds import check_trainable
from rl_soft.thoughts.thinking import Thinking

RL_METHODS = ("grpo", "ppo")
TRACKERS = ("tensorboard", "trackio", "wandb")

# Set by us from other fields; a recipe that names one of these would contradict itself.
DERIVED = {
    "generation_batch_size": "prompts_per_step",
    "steps_per_generation": "prompts_per_step and updates_per_rollout",
    "gradient_accumulation_steps": "prompts_per_step and updates_per_rollout",
    "max_completion_length": "num_thoughts and max_answer_tokens",
}
DERIVED_SFT = {
    "max_length": "max_row_tokens",
    "packing": "nothing: a row is a sequence",
    "padding_free": "nothing: a row is a sequence",
    "completion_only_loss": "the rows: the loss is on what follows the question",
    "dataset_kwargs": "the rows, which the layout makes",
}
WHOLE = "training draws from the whole distribution, whose density it scores"
CUT = f"{WHOLE}; rl-soft eval and rl-soft generate take cuts"
ENGINE = "soft thoughts are decoded by this package's own engine"
VLLM = "vLLM takes embeddings for prompts only, so soft thoughts cannot be decoded by it"
# Keys of TRL's configuration that a soft rollout cannot have or never reads; the value TRL gives them anyway passes.
REFUSED = {
    "use_vllm": VLLM,
    "top_p": CUT,
    "top_k": CUT,
    "min_p": CUT,
    "repetition_penalty": WHOLE,
    "generation_kwargs": f"{ENGINE}; temperature and max_answer_tokens are keys of the recipe",
    "cache_implementation": ENGINE,
    "chat_template_kwargs": "the layout makes the prompts; use system_prompt and question_template",
    "model_init_kwargs": "the model is loaded before the trainer; use dtype and attn_implementation",
    "use_liger_kernel": "the exact density runs through this package's own chunked head",
    "use_transformers_continuous_batching": "continuous batching takes token ids only",
    "use_transformers_paged": "continuous batching takes token ids only",
    "transformers_continuous_batching_config": "continuous batching takes token ids only",
    "rollout_func": "the soft rollout is this package's own",
    "environment_factory": "soft rollouts have a single turn",
    "auto_find_batch_size": "a rollout must hold whole groups; lower per_device_train_batch_size instead",
}
GROUP_ONLY = {  # what only a method with groups can read
    "scale_rewards": "PPO has no groups; it whitens advantages over the rollout",
    "multi_objective_aggregation": "PPO has no groups; it takes the weighted sum of the rewards",
}
EVALUATION = ("eval_samples", "eval_k")  # read by methods that evaluate before and after
IN_MEMORY = (
    "an adapter's folder names its base model by path, and model_config makes one in memory; train it whole "
    "(use_peft false), or start from a saved model (model_name_or_path)"
)
MUST_BE_TRUE = {
    "ds3_gather_for_generation": "rollouts end at different lengths on different processes",
    "disable_dropout": "with dropout on, the recomputed density is not the rollout's",
}


def check_features(given: Mapping[str, Any], trainer: type) -> None:
    """Refuse features of TRL's that soft rollouts cannot have, or never read.

    Args:
        given: values by the names of the fields of `trainer`, TRL's configuration class.

    Raises:
        ValueError: a key has another value than the one that it has when it is not named.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(trainer)}
    for key, value in given.items():
        why = REFUSED.get(key) or (VLLM if key.startswith("vllm_") else None)
        if why is not None and value is not None and value != defaults.get(key, False):
            raise ValueError(f"{key} is not available: {why}")


def unread_keys(method: str) -> set[str]:
    """Keys whose values never had an effect on a run, whether they were refused when it was made or not."""
    return set(REFUSED) | ({"system_prompt", *EVALUATION} if method not in RL_METHODS else set())


def check_keys(values: Mapping[str, Any], method: str, trainer: type, path: Path) -> None:
    """Raises ValueError for a key that the method derives from others, cannot have, or would never read."""
    check_features(values, trainer)
    derived = DERIVED if method in RL_METHODS else DERIVED_SFT if method == "sft" else {}
    unread = {key: getattr(EvalArguments(), key) for key in EVALUATION} if method not in RL_METHODS else {}
    for key, value in values.items():
        if key in MUST_BE_TRUE and method in RL_METHODS and not value:
            raise ValueError(f"{key} must be true: {MUST_BE_TRUE[key]}")
        if method == "ppo" and key in GROUP_ONLY:
            raise ValueError(f"{key} is not available: {GROUP_ONLY[key]}")
        if key in derived:
            raise ValueError(f"{key} is derived from {derived[key]}; remove it from {path}")
        if key in unread and value != unread[key]:
            raise ValueError(
                f"{key} is not available: method {method} ends with a model and no evaluation; "
                f"use rl-soft eval MODEL --{key} {value}"
            )


def check_thought(method: str, thinking: Thinking, extra: Any) -> None:
    """Raises ValueError for a thought kind, or a system message, that the method cannot train."""
    thought, rl = thinking.thought, method in RL_METHODS
    if thinking.system_prompt and not (rl and thinking.phase == "explicit"):
        why = "phase latent takes none" if rl else f"method {method} trains questions as they are"
        raise ValueError(
            f"system_prompt {thinking.system_prompt!r:.60} needs a chat template, and {why}; "
            "write it into question_template"
        )
    if rl:
        check_trainable(thought, extra.ratio)
    if method == "codi" and (thinking.phase != "latent" or thought == "token"):
        raise ValueError(
            f"thought {thought}, phase {thinking.phase}: codi trains latent thoughts; use phase latent with thought "
            "hidden, soft, gumbel or hybrid"
        )
    if method == "codi" and thought == "dirichlet":
        raise ValueError(
            "thought dirichlet cannot be trained by codi: its weights are drawn, and no gradient flows through the "
            "draw; warm up with gumbel or soft, and run RL with thought dirichlet"
        )
    if method == "codi" and thought == "hybrid" and not extra.use_projector:
        raise ValueError(
            "use_projector false: thought hybrid is the projected state plus a mixture; use thought hidden"
        )


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises ValueError for a tracker that is unknown or not installed, before anything is trained."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            raise ValueError(
                f"report_to must be none or of {', '.join(TRACKERS)}, got {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {name}")


def refuse_checkpointing(args: Any, lead: str, instead: str) -> None:
    """Raises ValueError where layers are checkpointed and gradients flow from a thought to those before it.

    Args:
        args: the trainer's, or None.
        lead: how the message begins, with the key and what it does not go with.
        instead: how it ends, with the way out.
    """
    if getattr(args, "gradient_checkpointing", False):
        raise ValueError(f"{lead} gradients flow through the cache, which checkpointed layers drop; {instead}")
