"""What the commands on a model decide before torch is imported: its thinking, its rows, the folder of the results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from rl_soft.config.commands import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.config.recipe import load_command
from rl_soft.data import sources as data
from rl_soft.evaluation.judging import check_golds
from rl_soft.keys import Gathered
from rl_soft.model.folder import model_folder, read_thinking
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.thinking import Thinking


def thinking_of(model: str, changes: dict[str, Any]) -> Thinking:
    """The thinking that the model was trained for, with changes; explicit for a model that is not ours."""
    trained = read_thinking(Path(model))
    if trained is not None:
        return dataclasses.replace(trained, **changes)
    if not Path(model).exists() and "end_of_thinking" not in changes:
        raise ValueError(
            f"no folder {model!r} is here; if it is meant for the hub, say where its thoughts end: --end_of_thinking"
        )
    return Thinking(**{"phase": "explicit", **changes})


def check_folder(name: str) -> None:
    """Raises ValueError for an output_dir that is a file, or is to lie in one."""
    path = Path(name)
    there = next((part for part in (path, *path.parents) if part.exists()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"output_dir {name}: {there} is a file; choose another")


def load_rows(arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> list[data.Row]:
    return data.load_rows(
        arguments.dataset,
        arguments.split,
        arguments.eval_problems,
        arguments.data_seed_eval,
        arguments.dataset_options,
        arguments.dataset_columns,
        "eval_problems",
    )


@dataclasses.dataclass
class Plan:
    """One evaluation: its thinking, its folder, and what `evaluate` writes down of it."""

    thinking: Thinking
    folder: Path
    described: dict[str, Any]


def plans_of(arguments: EvaluationArguments, changes: dict[str, Any], decoding: Decoding) -> list[Plan]:
    """One evaluation, or one per kind of `thoughts`; each is written down as if it were the only one.

    Raises:
        ValueError: `thought` beside `thoughts`, or a kind that the other settings do not allow.
    """
    if arguments.thoughts and "thought" in changes:
        raise ValueError(f"thought {changes['thought']} and thoughts {','.join(arguments.thoughts)}: give one of them")
    model, out = arguments.model_name_or_path, Path(arguments.output_dir)
    thinking = thinking_of(model, changes)
    kinds = {out / kind: dataclasses.replace(thinking, thought=kind) for kind in arguments.thoughts or ()}
    plans, cuts = [], {} if decoding == Decoding() else decoding.to_dict()
    for folder, one in (kinds or {out: thinking}).items():
        alone = dataclasses.replace(arguments, output_dir=str(folder), thoughts=None)
        described = {
            "name": folder.name,
            "model_name": model,
            "dataset": arguments.dataset,
            "split": arguments.split,
            "samples": arguments.eval_samples,
            "seed": arguments.eval_seed,
            "config": {**_written(alone), **one.to_dict(), **cuts},
        }
        plans.append(Plan(one, folder, described))
    return plans


def _written(arguments: EvaluationArguments) -> dict[str, Any]:
    """Name -> value. Where a server is makes no other records; our engine was the only one once, and is not named."""
    values = dataclasses.asdict(arguments)
    del values["server"]
    if values["engine"] == "ours":
        del values["engine"]
    return values


def check_control(arguments: EvaluationArguments) -> None:
    """Raises ValueError for shuffled thoughts with several samples per problem."""
    if arguments.control == "shuffle" and arguments.eval_samples > 1:
        raise ValueError(
            "control shuffle feeds a completion the thoughts of the one before it, which must be another problem's: "
            f"eval_samples must be 1, got {arguments.eval_samples}"
        )


def describe(model: str, overrides: dict[str, Any]) -> str:
    """What would be evaluated, as YAML, for `check eval`; rows are read where that is quick.

    Raises:
        Mistakes: what the evaluation would end with before it has loaded a model.
    """
    arguments, changes, decoding = load_command("eval", model_folder(model), overrides)
    mistakes, plans = Gathered(), list[Plan]()
    for check in (lambda: check_control(arguments), lambda: check_folder(arguments.output_dir)):
        with mistakes:
            check()
    with mistakes:
        plans = plans_of(arguments, changes, decoding)
    with mistakes:
        if data.is_at_hand(arguments.dataset, arguments.dataset_options):
            check_golds(load_rows(arguments), arguments.dataset, arguments.confirm_run_unsafe_code)
    mistakes.tell()
    values = {**dataclasses.asdict(arguments), **plans[0].thinking.to_dict(), **decoding.to_dict()}
    if arguments.thoughts:
        values.pop("thought")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
