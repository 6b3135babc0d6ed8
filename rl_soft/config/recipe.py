"""Recipes: validated as a whole, stored. A recipe is flat YAML (`reading`); its keys are the fields of `arguments`.

An unknown key is an error that names the nearest valid one. The command line beats the file. Keys of the trainers'
own configurations (`trainers`) are valid too, and names of TRL's scripts are read as ours (`theirs`). Nothing here
imports torch, so that a mistake is told at once.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rl_soft.config.arguments import (
    CoconutArguments,
    CodiArguments,
    DataArguments,
    EvalArguments,
    GRPOArguments,
    ICoTArguments,
    ModelArguments,
    PPOArguments,
    SFTArguments,
    TrackerArguments,
)
from rl_soft.config.commands import AnalysisArguments, EvaluationArguments, GenerateArguments, HarnessArguments
from rl_soft.config.elsewhere import hint_for
from rl_soft.config.evaluations import SAVE_STEPS
from rl_soft.config.like import settings_like
from rl_soft.config.reading import Loader, find_recipe, read_yaml
from rl_soft.config.refusals import GROUP_ONLY, check_keys, check_together, unread_keys
from rl_soft.config.theirs import is_theirs, method_of, over, read_theirs, renamed, told
from rl_soft.config.trainers import check_type, trainer_fields
from rl_soft.config.trainers import trainer_class as trainer_class
from rl_soft.files import write_atomic
from rl_soft.keys import Gathered, check, fields, nearest
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.kinds import RL as RL_METHODS
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")

SHARED = (Thinking, ModelArguments, DataArguments, EvalArguments, TrackerArguments)
GROUPS: dict[str, tuple[type, ...]] = {  # method -> whose fields are its keys
    "codi": (*SHARED, CodiArguments),
    "sft": (*SHARED, SFTArguments),
    "icot": (*SHARED, ICoTArguments),
    "coconut": (*SHARED, CoconutArguments),
    "grpo": (*SHARED, GRPOArguments),
    "ppo": (*SHARED, PPOArguments),
}
METHODS = tuple(GROUPS)
COMMANDS: dict[str, tuple[type, ...]] = {  # command on a model -> whose fields are its keys
    "eval": (EvaluationArguments, Thinking, Decoding),
    "generate": (GenerateArguments, Thinking, Decoding),
    "analyze": (AnalysisArguments, Thinking),
}
HARNESS = (HarnessArguments, Thinking, Decoding)  # keys of a model in lm-eval or lighteval
TRAINER_DEFAULTS = {  # where ours differ from TRL's and transformers'; for the precision see `train.precision`
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}


@dataclass
class Recipe:
    """A validated recipe. `training` holds the keys of the trainer's own configuration, built late by the method."""

    path: Path
    method: str
    thinking: Thinking
    model: ModelArguments
    data: DataArguments
    eval: EvalArguments
    trackers: TrackerArguments
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


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None, processes: int | None = None) -> Recipe:
    """Find, read and validate a recipe.

    Args:
        path: a file, or the name of a bundled recipe (`rl-soft recipes` lists them).
        overrides: values that beat the file's, by key.
        processes: on which TRL's batch sizes per device depend; those of the launcher if absent.

    Returns:
        What `rl_soft.run` takes.

    Raises:
        ValueError: no such recipe, or no method in it.
        Mistakes: a line for each unknown key (with the nearest valid one), value of the wrong type or out of range,
            key that we derive from others, feature that soft rollouts cannot have, and pair of values that do not fit.
    """
    path = find_recipe(path)
    given, overrides = read_yaml(path), overrides or {}
    return make_recipe(path, over(given, overrides), processes, is_theirs({**given, **overrides}))


def make_recipe(
    path: Path, values: dict[str, Any], processes: int | None = None, theirs: bool | None = None
) -> Recipe:
    """A recipe of the values that stand in a file; see `load_recipe`.

    Args:
        theirs: whether the file is one of TRL's scripts; None: if its values look so.
    """
    theirs = is_theirs(values) if theirs is None else theirs
    method = method_of(values, theirs)
    if method not in METHODS:
        if values.get("method") is None:
            own = "add thought: gumbel to TRL's keys, or " if theirs else ""
            raise ValueError(f"method is missing in {path}; {own}it is one of {', '.join(METHODS)}")
        hint = nearest(method, METHODS)
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {values.get('method')!r} ({path}){hint}")
    if values.get("eval_strategy") is False:  # YAML's reading of a bare no
        values["eval_strategy"] = "no"
    groups, of_trainer, mistakes = GROUPS[method], trainer_fields(method), Gathered()
    known = known_keys(method) | (
        GROUP_ONLY.keys() if method == "ppo" else set()
    )  # `check_keys` tells why PPO has none
    values = {**values, "method": method}
    values, notes, wrong = read_theirs(values, known, method, processes, theirs)
    mistakes.lines += wrong
    for line in told(notes):
        logger.info("%s", line)
    with mistakes:
        check_keys(values, method, path)
    for key in values:
        with mistakes:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in {path}{hint_for(key, known)}")
            if key in of_trainer:
                check_type(method, key, values[key])
    parts: list[Any] = [None] * len(groups)
    for i, group in enumerate(groups):
        with mistakes:
            parts[i] = group(**{k: v for k, v in values.items() if k in fields(group)})
    if not values.get("output_dir"):
        mistakes.lines.append(f"output_dir is missing in {path}")
    values.setdefault("seed", 42)  # resolved, so that a warm start is found whether or not its recipe names the seed
    values["output_dir"] = str(values.get("output_dir")).replace("{seed}", str(values["seed"]))
    training = {k: v for k, v in values.items() if k in of_trainer and k not in fields(Thinking)}
    made = [dataclasses.asdict(part) for part in parts if part is not None]
    resolved = values | {key: value for part in made for key, value in part.items()}
    thinking, model, data, evaluation, trackers, extra = parts
    recipe = Recipe(path, method, thinking, model, data, evaluation, trackers, extra, training, resolved)
    with mistakes:
        check_together(recipe)
    mistakes.tell()
    return recipe


def known_keys(method: str) -> set[str]:
    """The keys of a method: ours, and those of its trainer's configuration."""
    return {"method", *trainer_fields(method), *(name for group in GROUPS[method] for name in fields(group))}


def warm_start_of(recipe: Recipe) -> Recipe | None:
    """The warm start's recipe, with this run's seed; or that of a run's folder, whatever its seed, to be shared.

    A path is relative to the working folder, that of a recipe also to this recipe.
    """
    name = recipe.model.warm_start
    if name is None:
        return None
    if (Path(name) / "config.yaml").is_file():
        return load_recipe(Path(name) / "config.yaml", {"output_dir": name})
    return load_recipe(find_recipe(name, recipe.path), {"seed": recipe.seed})


def load_command(command: str, model: str, overrides: dict[str, Any]) -> tuple[Any, dict[str, Any], Decoding]:
    """The arguments of a command on a model, the fields of `Thinking` that change the model's own, and the decoding.

    Args:
        command: a key of `COMMANDS`, or harness.
        model: the command's first argument.
        overrides: values by the names of the command's keys.

    Raises:
        Mistakes: a line for each unknown key (with the nearest valid one) and value of the wrong type or out of range.
    """
    if "model_name_or_path" in overrides:
        raise ValueError(f"model_name_or_path is the first argument of {command}, here {model!r}; leave the key out")
    groups = HARNESS if command == "harness" else COMMANDS[command]
    group, *others = groups
    known = sorted({name for part in groups for name in fields(part)})
    mistakes = Gathered()
    with mistakes:
        overrides = renamed(overrides, known)
    for key in overrides:
        if key not in known:
            hint = hint_for(key, known, "--") or "; known: " + ", ".join(known)
            mistakes.lines.append(f"{command} knows no --{key}{hint}")
    if overrides.get("like") and "like" in known:
        overrides = settings_like(str(overrides["like"]), overrides)
    values = {"model_name_or_path": model, **overrides}
    own, changes, cuts = ({k: v for k, v in values.items() if k in fields(c)} for c in (group, Thinking, Decoding))
    arguments, decoding = None, Decoding()
    with mistakes:
        check(Thinking, changes)
    with mistakes:
        arguments = group(**own)
    with mistakes:
        decoding = Decoding(**(cuts if Decoding in others else {}))
    mistakes.tell()
    return arguments, changes, decoding


def key_defaults(method: str | None = None) -> dict[str, Any]:
    """The default of each key of a method, or of `rl-soft eval`, that has one."""
    groups = COMMANDS["eval"] if method is None else GROUPS[method]
    known = {name: field for group in groups for name, field in fields(group).items()}
    return {name: field.get_default(call_default_factory=True) for name, field in known.items()}


def trainer_defaults(method: str) -> dict[str, Any]:
    """Our defaults of the trainer's keys, on any device."""
    # with dropout on, the recomputed density is not the rollout's
    return TRAINER_DEFAULTS | ({"disable_dropout": True} if method in RL_METHODS else {})


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


def has_begun(folder: Path) -> bool:
    """Whether a run directory holds anything besides the settings of a start that failed."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "model")) or any(
        path.stat().st_size for pattern in ("checkpoint-*/*", "eval_*/records.jsonl") for path in folder.glob(pattern)
    )


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
    before = (
        key_defaults(recipe.method) | trainer_defaults(recipe.method) | yaml.load(stored.read_text(), Loader=Loader)
    )
    now = recipe.resolved
    free = {"output_dir"} | unread_keys(recipe.method)  # a run may be moved
    for key in sorted((before.keys() | now.keys()) - free):
        if key in ("dtype", "bf16") and now.get(key) is None:  # then the run keeps its own (`train.precision`)
            continue
        if before.get(key) != now.get(key):
            if not has_begun(recipe.output_dir):  # a start that failed, and was corrected
                return False
            raise ValueError(
                f"output_dir {recipe.output_dir} holds a run with {key} = {before.get(key)!r}, this one has "
                f"{now.get(key)!r}; choose another output_dir to keep both"
            )
    return True
