"""Recipes: read, validated as a whole, stored. A recipe is flat YAML; its keys are the fields of `arguments`.

An unknown key is an error that names the nearest valid one. The command line beats the file. Keys of the trainers'
own configurations (transformers' TrainingArguments, TRL's GRPOConfig) are valid too.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rl_soft.config.arguments import (
    CoconutArguments,
    CodiArguments,
    DataArguments,
    EvalArguments,
    EvaluationArguments,
    ICoTArguments,
    ModelArguments,
    PPOArguments,
    RLArguments,
    SFTArguments,
)
from rl_soft.config.refusals import IN_MEMORY, MUST_BE_TRUE, check_keys, check_thought, check_trackers, unread_keys
from rl_soft.config.refusals import RL_METHODS as RL_METHODS
from rl_soft.files import write_atomic
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.thinking import Thinking

METHODS = ("codi", "sft", "icot", "coconut", "grpo", "ppo")

GROUPS: dict[str, tuple[type, ...]] = {
    "codi": (Thinking, ModelArguments, DataArguments, EvalArguments, CodiArguments),
    "sft": (Thinking, ModelArguments, DataArguments, EvalArguments, SFTArguments),
    "icot": (Thinking, ModelArguments, DataArguments, EvalArguments, ICoTArguments),
    "coconut": (Thinking, ModelArguments, DataArguments, EvalArguments, CoconutArguments),
    "grpo": (Thinking, ModelArguments, DataArguments, EvalArguments, RLArguments),
    "ppo": (Thinking, ModelArguments, DataArguments, EvalArguments, PPOArguments),
}
# The one way of thinking that a method trains: phase, thought.
TRAINED_THINKING = {
    "sft": ("explicit", "token"),
    "icot": ("explicit", "token"),
    "coconut": ("latent", "hidden"),
}
TRAINER_DEFAULTS = {  # where ours differ from the hosts'; precision and device are `device_defaults`
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 read as a number (YAML 1.1 asks for a dot) and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ValueError(f"key {key_node.value!r} appears twice (line {key_node.start_mark.line + 1})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Recipe:
    """A validated recipe. `training` holds the keys of the trainer's own configuration, built late by the method."""

    path: Path
    method: str
    thinking: Thinking
    model: ModelArguments
    data: DataArguments
    eval: EvalArguments
    extra: Any  # the last class of the method's GROUPS
    training: dict[str, Any]
    values: dict[str, Any]  # flat: every key of ours, and those of the trainer's that the recipe names

    @property
    def resolved(self) -> dict[str, Any]:
        """The values, with our defaults of the trainer's keys: what config.yaml stores."""
        return trainer_defaults(self.method) | self.values

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 42))


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's keys. Raises ValueError naming the file when it is missing or not a mapping."""
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"recipe {path} does not exist{hint}")
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold `key: value` lines")
    values.pop("_", None)  # the line that makes a recipe a Python program too
    return values


def parse_overrides(arguments: list[str], texts: Collection[str] = ()) -> dict[str, Any]:
    """`--key value` or `--key=value` pairs; values are read as YAML, those of the keys in `texts` as they stand."""
    values: dict[str, Any] = {}
    i = 0
    while i < len(arguments):
        word = arguments[i]
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if i + 1 == len(arguments) or (arguments[i + 1].startswith("--") and len(arguments[i + 1]) > 2):
                text = "true"  # a bare flag
            else:
                i += 1
                text = arguments[i]
        key = key.replace("-", "_")
        values[key] = text if key in texts else _read_value(text)
        i += 1
    return values


def _read_value(text: str) -> Any:
    """A value as YAML; what YAML cannot read, or takes for a comment (`=`, `####`) or a key (`Answer: `), is the text
    that it is."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and not text.startswith("{"):
        return text
    return text if value is None and text.startswith("#") else value


def trainer_class(method: str) -> type:
    """The configuration dataclass of the host trainer (imported late: it is slow)."""
    if method == "sft":
        from trl import SFTConfig

        return SFTConfig
    if method not in RL_METHODS:
        from transformers import TrainingArguments

        return TrainingArguments
    from trl import GRPOConfig

    return GRPOConfig


def _check_type(f: dataclasses.Field, value: Any) -> Any:
    """Refuse a value of the wrong kind for our own fields; int is accepted for float."""
    annotation = str(f.type)
    allowed: tuple[type, ...] = ()
    for name, kinds in {
        "int": (int,), "float": (float, int), "str": (str,), "bool": (bool,), "list": (list,), "dict": (dict,),
    }.items():  # fmt: skip
        if re.search(rf"\b{name}\b", annotation):
            allowed += kinds
    if value is None:
        if "None" in annotation:
            return value
    elif isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return float(value) if "float" in annotation and isinstance(value, int) else value
    raise ValueError(f"{f.name} must be {annotation}, got {value!r}")


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a value of the wrong type or out of range, a key that
            we derive from others, or a feature that soft rollouts cannot have.
    """
    path = Path(path)
    values = {**read_yaml(path), **(overrides or {})}
    method = values.get("method")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r} ({path})")
    groups = GROUPS[method]
    trainer_fields = {f.name for f in dataclasses.fields(trainer_class(method)) if f.init}
    own_fields = {f.name: f for group in groups for f in dataclasses.fields(group)}
    known = trainer_fields | own_fields.keys() | {"method"}
    check_keys(values, method, trainer_class(method), path)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown key {key!r} in {path}{hint}")
    parts = []
    for group in groups:
        names = {f.name for f in dataclasses.fields(group)}
        parts.append(group(**{k: _check_type(own_fields[k], v) for k, v in values.items() if k in names}))
    thinking, model, data, evaluation, extra = parts
    if not values.get("output_dir"):
        raise ValueError(f"output_dir is missing in {path}")
    values.setdefault("seed", 42)  # resolved, so that a warm start is found whether or not its recipe names the seed
    values["output_dir"] = str(values["output_dir"]).replace("{seed}", str(values["seed"]))
    if not data.dataset:
        raise ValueError(f"dataset is missing in {path}")
    sources = [k for k in ("warm_start", "model_name_or_path", "model_config") if getattr(model, k)]
    if len(sources) != 1:
        raise ValueError(
            f"{path} must name one of warm_start, model_name_or_path and model_config, not "
            f"{' and '.join(sources) or 'none of them'}"
        )
    for name in ("options", "columns"):
        if getattr(data, f"eval_dataset_{name}") and not data.eval_dataset:
            raise ValueError(
                f"eval_dataset_{name}: {path} names no eval_dataset; problems of the same source take dataset_{name}"
            )
    if model.model_config and model.use_peft:
        raise ValueError(f"use_peft: {IN_MEMORY}")
    if model.lora_dropout and method in RL_METHODS:
        raise ValueError(f"lora_dropout must be 0, got {model.lora_dropout}: {MUST_BE_TRUE['disable_dropout']}")
    if model.model_config and not model.vocabulary:
        raise ValueError(f"vocabulary is missing in {path}: model_config makes a model for a character tokenizer")
    if evaluation.eval_k and max(evaluation.eval_k) > evaluation.eval_samples:
        raise ValueError(f"eval_k must be at most eval_samples ({evaluation.eval_samples}), got {evaluation.eval_k}")
    check_thought(method, thinking, extra)
    if method in TRAINED_THINKING and (thinking.phase, thinking.thought) != TRAINED_THINKING[method]:
        phase, thought = TRAINED_THINKING[method]
        raise ValueError(
            f"method {method} trains phase {phase} with thought {thought}, got phase {thinking.phase} with thought "
            f"{thinking.thought} ({path})"
        )
    if method == "coconut" and (thinking.num_thoughts < 1 or thinking.num_thoughts % extra.thoughts_per_step):
        raise ValueError(
            f"num_thoughts must be a multiple of thoughts_per_step ({extra.thoughts_per_step}), one for each step "
            f"that thoughts replace, got {thinking.num_thoughts}"
        )
    check_trackers(values.get("report_to"))
    training = {k: v for k, v in values.items() if k in trainer_fields and k != "temperature"}
    resolved = values | {key: value for part in parts for key, value in dataclasses.asdict(part).items()}
    return Recipe(path, method, thinking, model, data, evaluation, extra, training, resolved)


def load_evaluation(
    model: str,
    overrides: dict[str, Any],
    group: type = EvaluationArguments,
    command: str = "eval",
    others: tuple[type, ...] = (Thinking,),
) -> tuple[Any, dict[str, Any]]:
    """The arguments of `rl-soft eval` or another command on a model, and the fields of `Thinking` among them, which
    change the model's own.

    Args:
        others: whose fields may be given beside those of `group`.

    Raises:
        ValueError: an unknown key (with the nearest valid one), or a value of the wrong type or out of range.
    """
    fields = {f.name: f for part in (group, *others) for f in dataclasses.fields(part)}
    if "model_name_or_path" in overrides:
        raise ValueError(f"model_name_or_path is the first argument of {command}, here {model!r}; leave the key out")
    values = {"model_name_or_path": model, **overrides}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, sorted(fields), n=1)
            hint = f"; did you mean --{near[0]}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ValueError(f"{command} knows no --{key}{hint}")
        values[key] = _check_type(fields[key], values[key])
    names = {f.name for f in dataclasses.fields(group)}
    arguments = group(**{key: value for key, value in values.items() if key in names})
    return arguments, {key: value for key, value in values.items() if key not in names}


def load_decoder(
    model: str, overrides: dict[str, Any], group: type = EvaluationArguments, command: str = "eval"
) -> tuple[Any, dict[str, Any], Decoding]:
    """`load_evaluation` of a command that takes the fields of `Decoding` too; those come last, as a `Decoding`."""
    arguments, values = load_evaluation(model, overrides, group, command, (Thinking, Decoding))
    names = {f.name for f in dataclasses.fields(Decoding)}
    decoding = Decoding(**{key: value for key, value in values.items() if key in names})
    return arguments, {key: value for key, value in values.items() if key not in names}, decoding


def trainer_defaults(method: str) -> dict[str, Any]:
    """Our defaults of the trainer's keys, on any device."""
    # with dropout on, the recomputed density is not the rollout's
    return TRAINER_DEFAULTS | ({"disable_dropout": True} if method in RL_METHODS else {})


def device_defaults() -> dict[str, Any]:
    """Precision and device by what is there. On CPU `use_cpu` must be an argument of the trainer: as an accelerate
    setting or in the environment it turns DeepSpeed or the second process off without a word."""
    import torch

    if torch.cuda.is_available():
        return {"use_cpu": False, "bf16": torch.cuda.is_bf16_supported()}
    return {"use_cpu": True, "bf16": False}


def batch_plan(recipe: Recipe, world_size: int) -> dict[str, int]:
    """TRL's batch fields from prompts_per_step, num_generations, per_device_train_batch_size, updates_per_rollout.

    Raises:
        ValueError: a rollout that does not divide, with the nearest valid value.
    """
    G = int(recipe.training.get("num_generations", 8))
    per_device = int(recipe.training.get("per_device_train_batch_size", 8))
    P, updates = recipe.extra.prompts_per_step, recipe.extra.updates_per_rollout
    rows, slice_rows = P * G, per_device * world_size * updates
    if min(G, per_device, P, updates) < 1 or rows % slice_rows:
        valid = [b for b in range(1, rows + 1) if rows % (b * world_size * updates) == 0]
        if not valid:
            raise ValueError(
                f"prompts_per_step x num_generations = {P} x {G} = {rows} completions do not divide over "
                f"{world_size} processes and {updates} updates_per_rollout"
            )
        near = min(valid, key=lambda b: (abs(b - per_device), -b))
        raise ValueError(
            f"per_device_train_batch_size must divide prompts_per_step x num_generations / processes / "
            f"updates_per_rollout = {P} x {G} / {world_size} / {updates}; got {per_device}, nearest valid {near}"
        )
    steps = rows // (per_device * world_size)
    return {"steps_per_generation": steps, "gradient_accumulation_steps": steps // updates}


def write_config(recipe: Recipe) -> None:
    """Store the resolved recipe in its run directory, whole or not at all."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(recipe.resolved, sort_keys=True, allow_unicode=True)
    write_atomic(recipe.output_dir / "config.yaml", content)


def check_output_dir(recipe: Recipe) -> bool:
    """Whether the run directory already holds this run (to be resumed).

    Raises:
        ValueError: it holds another run, with the first key that differs. Nothing is ever overwritten.
    """
    stored = recipe.output_dir / "config.yaml"
    if not stored.exists():
        if recipe.output_dir.exists() and any(p.suffix != ".tmp" for p in recipe.output_dir.iterdir()):
            raise ValueError(f"output_dir {recipe.output_dir} is not empty and holds no run; choose another")
        return False
    # A field that did not exist when the run was made had, in effect, its default.
    defaults = {k: v for group in GROUPS[recipe.method] for k, v in dataclasses.asdict(group()).items()}
    before = defaults | trainer_defaults(recipe.method) | yaml.load(stored.read_text(), Loader=_Loader)
    now = recipe.resolved
    free = {"output_dir"} | unread_keys(recipe.method)  # a run may be moved
    for key in sorted((before.keys() | now.keys()) - free):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"output_dir {recipe.output_dir} holds a run with {key} = {before.get(key)!r}, this one has "
                f"{now.get(key)!r}; choose another output_dir to keep both"
            )
    return True
