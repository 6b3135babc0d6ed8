"""What a recipe or a trainer of ours cannot have, and why: a key that would have no effect is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_soft.config.arguments import EvalArguments
from rl_soft.config.evaluations import check_evaluations
from rl_soft.config.quantised import check_quantised
from rl_soft.config.trackers import check_trackers
from rl_soft.config.trainers import trainer_fields
from rl_soft.keys import Gathered, Mistakes, either, nearest
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.kinds import KINDS, RATIOS, check_trainable
from rl_soft.thoughts.kinds import RL as RL_METHODS
from rl_soft.thoughts.thinking import refuse_template_keys

if TYPE_CHECKING:
    from rl_soft.config.recipe import Recipe
    from rl_soft.thoughts.thinking import Thinking

PHASES = {"codi": "latent", "coconut": "latent", "sft": "explicit", "icot": "explicit"}  # RL trains both

# Set by us from other fields; a recipe that names one of these would contradict itself.
DERIVED_SFT = {
    "max_length": "max_row_tokens",
    "packing": "nothing: a row is a sequence",
    "padding_free": "nothing: a row is a sequence",
    "completion_only_loss": "the rows: the loss is on what follows the question",
    "dataset_kwargs": "the rows, which the layout makes",
}
HUB_STRATEGIES = ("every_save", "checkpoint", "all_checkpoints", "end")
SECRET = "config.yaml and the model's page would show it; use hf auth login, or the environment variable HF_TOKEN"
WHOLE = "training draws from the whole distribution, whose density it scores"
ENGINE = "soft thoughts are decoded by this package's own engine"
VLLM_KEYS = (  # of TRL's, that a run with use_vllm reads
    "vllm_mode", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length",
    "vllm_enable_sleep_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_group_port", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max",
)  # fmt: skip
# Keys of TRL's configuration that a soft rollout cannot have or never reads; the value TRL gives them anyway passes.
REFUSED = {
    "vllm_model_impl": "soft thoughts are fed to vLLM's own implementation of a model",
    "vllm_structured_outputs_regex": WHOLE,
    "repetition_penalty": WHOLE,
    "generation_kwargs": f"{ENGINE}; temperature and max_answer_tokens are keys of the recipe",
    "cache_implementation": ENGINE,
    "model_init_kwargs": "the model is loaded before the trainer; use dtype, attn_implementation and model_revision",
    "use_liger_kernel": "the exact density runs through this package's own chunked head",
    "use_transformers_continuous_batching": "continuous batching takes token ids only",
    "use_transformers_paged": "continuous batching takes token ids only",
    "transformers_continuous_batching_config": "continuous batching takes token ids only",
    "rollout_func": "the soft rollout is this package's own",
    "environment_factory": "soft rollouts have a single turn",
    "auto_find_batch_size": "a rollout must hold whole groups; lower per_device_train_batch_size instead",
}
NO_GROUPS = "PPO has no groups; each completion has the value that its own states predict"
GROUP_ONLY = {  # what only a method with groups can read
    "filter_groups": NO_GROUPS,
    "resample": NO_GROUPS,
    "max_resamples": NO_GROUPS,
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


def check_features(given: Mapping[str, Any], method: str = "grpo") -> None:
    """Refuse features of TRL's that soft rollouts cannot have, or never read.

    Args:
        given: values by the names of the fields of the method's trainer configuration.

    Raises:
        Mistakes: keys have other values than those that they have when they are not named.
    """
    if lines := list(unavailable(given, method)):
        raise Mistakes(lines)


def unavailable(given: Mapping[str, Any], method: str) -> Iterator[str]:
    """A line for each such key, which begins with it."""
    defaults = trainer_fields(method)
    for key, value in given.items():
        why = REFUSED.get(key)
        if key.startswith("vllm_") and why is None:
            why = None if given.get("use_vllm") and key in VLLM_KEYS else "it is read with use_vllm true"
        if why is not None and value is not None and value != defaults.get(key, False):
            yield f"{key} is not available: {why}"


def unread_keys(method: str) -> set[str]:
    """Keys whose values never had an effect on a run, whether they were refused when it was made or not."""
    return set(REFUSED) | ({"system_prompt", *EVALUATION} if method not in RL_METHODS else set())


def check_keys(values: Mapping[str, Any], method: str, path: Path) -> None:
    """Raises Mistakes for keys that the method derives from others, cannot have, or would never read."""
    lines = list(unavailable(values, method))
    derived = DERIVED_SFT if method == "sft" else {}
    unread = {key: getattr(EvalArguments(), key) for key in EVALUATION} if method not in RL_METHODS else {}
    for key, value in values.items():
        if key in MUST_BE_TRUE and method in RL_METHODS and not value:
            lines.append(f"{key} must be true: {MUST_BE_TRUE[key]}")
        elif key == "hub_token" and value:
            lines.append(f"{key} is not available: {SECRET}")
        elif method == "ppo" and key in GROUP_ONLY:
            lines.append(f"{key} is not available: {GROUP_ONLY[key]}")
        elif key in derived:
            lines.append(f"{key} is derived from {derived[key]}; remove it from {path}")
        elif key in unread and value != unread[key]:
            lines.append(
                f"{key} is not available: method {method} ends with a model and no evaluation; "
                f"use rl-soft eval MODEL --{key} {value}"
            )
    if lines:
        raise Mistakes(lines)


def check_together(recipe: Recipe) -> None:
    """Raises Mistakes for values of a recipe that do not fit together. A part of the recipe that could not be made for
    mistakes of its own is None, and what concerns it is not looked at."""
    gathered, method, extra = Gathered(), recipe.method, recipe.extra
    if recipe.data:
        with gathered:
            check_sources(recipe)
    if recipe.model:
        for check in (check_start, check_adapter_keys, check_quantised):
            with gathered:
                check(recipe)
    if recipe.thinking and extra:
        with gathered:
            check_thought(recipe)
        with gathered:
            if method == "coconut":
                check_stages(recipe)
    if extra and method in RL_METHODS:
        with gathered:
            check_reward_weights(extra.rewards, recipe.values.get("reward_weights"))
    if recipe.data and recipe.eval:
        with gathered:
            check_evaluations(recipe)
    with gathered:
        check_trackers(recipe.values.get("report_to"))
    with gathered:
        check_hub(recipe.training)
    gathered.tell()


def check_sources(recipe: Recipe) -> None:
    """Raises ValueError without a data set, or for settings of a second one that is not named."""
    path, data = recipe.path, recipe.data
    if not data.dataset:
        raise ValueError(f"dataset is missing in {path}")
    for name in ("options", "columns"):
        if getattr(data, f"eval_dataset_{name}") and not data.eval_dataset:
            raise ValueError(
                f"eval_dataset_{name}: {path} names no eval_dataset; problems of the same source take dataset_{name}"
            )


def check_start(recipe: Recipe) -> None:
    """Raises ValueError for a recipe that names no model to start from, or two."""
    path, model = recipe.path, recipe.model
    if model.model_revision not in (None, "main") and not model.model_name_or_path:
        raise ValueError(f"model_revision {model.model_revision!r} is of a hub id in model_name_or_path; leave it out")
    sources = [k for k in ("warm_start", "model_name_or_path", "model_config") if getattr(model, k)]
    if len(sources) != 1:
        remedy = f"; take one of them out with --{sources[0]} null" if sources else ""
        raise ValueError(
            f"{path} must name one of warm_start, model_name_or_path and model_config, not "
            f"{' and '.join(sources) or 'none of them'}{remedy}"
        )
    if model.model_config and not model.vocabulary:
        raise ValueError(f"vocabulary is missing in {path}: model_config makes a model for a character tokenizer")


def check_adapter_keys(recipe: Recipe) -> None:
    """Raises ValueError for an adapter that the run could not save, or not train."""
    model, beta = recipe.model, recipe.training.get("beta")
    if recipe.method in RL_METHODS:
        check_reference_revision(model.model_revision, beta, model.use_peft)
    if model.model_config and model.use_peft:
        raise ValueError(f"use_peft: {IN_MEMORY}")
    if model.lora_dropout and recipe.method in RL_METHODS:
        raise ValueError(f"lora_dropout must be 0, got {model.lora_dropout}: {MUST_BE_TRUE['disable_dropout']}")
    for name in ("use_dora", "use_rslora", "lora_modules_to_save"):
        if getattr(model, name) and not model.use_peft:
            raise ValueError(f"{name} belongs to an adapter: set use_peft true, or take {name} out")
    targets = model.lora_target_modules if isinstance(model.lora_target_modules, list) else []
    if both := sorted({*targets} & {*(model.lora_modules_to_save or [])}):
        raise ValueError(f"lora_modules_to_save: {both[0]} is in lora_target_modules too; leave it out of one of them")


def check_reference_revision(revision: str | None, beta: float | None, adapter: bool) -> None:
    """Raises ValueError for a KL whose reference, loaded again by its name, would be another revision."""
    if revision not in (None, "main") and beta and not adapter:
        raise ValueError(
            f"model_revision {revision!r} with beta {beta}: the reference is loaded again by its name, without a "
            "revision; fetch it (hf download ID --revision REVISION --local-dir DIR) and name the folder"
        )


def check_hub(training: Mapping[str, Any]) -> None:
    """Raises ValueError for a time to send the model that there is not."""
    strategy = training.get("hub_strategy")
    if strategy not in (None, *HUB_STRATEGIES):
        raise ValueError(
            f"hub_strategy must be one of {', '.join(HUB_STRATEGIES)}, got {strategy!r}"
            f"{nearest(strategy, HUB_STRATEGIES)}"
        )


def check_stages(recipe: Recipe) -> None:
    """Raises ValueError for thoughts that Coconut cannot give out in equal parts."""
    thinking, extra = recipe.thinking, recipe.extra
    if thinking.num_thoughts < 1 or thinking.num_thoughts % extra.thoughts_per_step:
        raise ValueError(
            f"num_thoughts must be a multiple of thoughts_per_step ({extra.thoughts_per_step}), one for each step "
            f"that thoughts replace, got {thinking.num_thoughts}"
        )


def check_reward_weights(rewards: list[Any], weights: Any) -> None:
    """Raises ValueError for another number of weights than of rewards."""
    if isinstance(weights, list) and len(weights) != len(rewards):
        names = ", ".join(str(next(iter(r))) if isinstance(r, dict) and r else str(r) for r in rewards)
        raise ValueError(
            f"reward_weights must hold one number for each of the {len(rewards)} rewards ({names}), got {weights}"
        )


def check_thought(recipe: Recipe) -> None:
    """Raises ValueError for a thought kind, a phase, a ratio or a system message that the method cannot train."""
    method, thinking, extra = recipe.method, recipe.thinking, recipe.extra
    thought, kind, rl = thinking.thought, KINDS[thinking.thought], method in RL_METHODS
    trained = [name for name, other in KINDS.items() if method in other.trained_by]
    if not (rl and thinking.phase == "explicit"):
        why = "phase latent takes none" if rl else f"method {method} trains questions as they are"
        refuse_template_keys(thinking, why)
    if rl:
        check_trainable(thought, extra.ratio)
        values = recipe.values
        training_cuts(values, thinking, extra.ratio, extra.order, bool(values.get("use_vllm")))
    phase = PHASES.get(method, thinking.phase)
    if method not in kind.trained_by or thinking.phase != phase:
        raise ValueError(
            f"method {method} trains phase {phase} with thought {either(trained)}, got phase {thinking.phase} with "
            f"thought {thought}" + (f", which {either(kind.trained_by)} can train" if thought not in trained else "")
        )
    if kind.needs_projector and not getattr(extra, "use_projector", True):
        raise ValueError(
            f"use_projector false: thought {thought} is the projected state plus a mixture; use thought hidden"
        )


def training_cuts(
    values: Mapping[str, Any], thinking: Thinking, ratio: str, order: str, use_vllm: bool = False
) -> Decoding | None:
    """The cuts of an RL policy, by its top_k, top_p, min_p and order; None where nothing is cut.

    Raises:
        ValueError: a value that is out of range, or cuts that do not go with the thought, the ratio or the engine.
    """
    top_k, top_p, min_p = (values.get(key) for key in ("top_k", "top_p", "min_p"))
    decoding = Decoding.of_training(top_k, 1.0 if top_p is None else top_p, min_p, order)
    if use_vllm and "vllm" not in thinking.engines:
        raise ValueError(f"switch {thinking.switch} is not available with use_vllm; use switch entropy")
    if decoding is None:
        return None
    if order == "paper":
        cut = "order paper"
    else:
        cut = f"top_k {top_k}" if top_k else f"min_p {min_p}" if min_p else f"top_p {top_p}"
    if order == "paper" and thinking.kind.has_dirichlet_noise:
        raise ValueError("order paper: the law of a dirichlet thought has no closed form then; use order exact")
    if RATIOS[ratio].one_by_one:
        able = [name for name in thinking.kind.ratios if not RATIOS[name].one_by_one]
        raise ValueError(f"{cut}: ratio {ratio} makes thoughts again from the whole distribution; use {either(able)}")
    if thinking.switch == "gate":
        raise ValueError(f"{cut}: a thought of one id hides its mode from switch gate; use switch entropy")
    if use_vllm:
        raise ValueError(f"{cut} with use_vllm: vLLM does not return the ids that a cut kept; use use_vllm false")
    return decoding


def refuse_checkpointing(args: Any, lead: str, instead: str) -> None:
    """Raises ValueError where layers are checkpointed and gradients flow from a thought to those before it.

    Args:
        args: the trainer's, or None.
        lead: how the message begins, with the key and what it does not go with.
        instead: how it ends, with the way out.
    """
    if getattr(args, "gradient_checkpointing", False):
        raise ValueError(f"{lead} gradients flow through the cache, which checkpointed layers drop; {instead}")
