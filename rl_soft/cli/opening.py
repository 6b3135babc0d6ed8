"""What the commands on a model share: its thinking, its rows, its weights, and the folder that results go to."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch

from rl_soft.config.arguments import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.data import sources as data
from rl_soft.model import devices, policy
from rl_soft.model.adapters import merged
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")
Asked = TypeVar("Asked", EvaluationArguments, GenerateArguments, AnalysisArguments)


def thinking_of(model: str, changes: dict[str, Any]) -> Thinking:
    """The thinking that the model was trained for, with changes; explicit for a model that is not ours."""
    trained = policy.read_thinking(Path(model))
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
    )


def with_dtype(arguments: Asked) -> Asked:
    """The arguments with a dtype: the machine's, where none is given."""
    return dataclasses.replace(arguments, dtype=arguments.dtype or devices.default_dtype())  # type: ignore[type-var]


def load_policy(model: str, arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> policy.Policy:
    """An adapter in float32 is added into its weights where it can be: faster, and the same up to rounding."""
    devices.set_up()
    try:
        loaded = policy.load_policy(model, str(arguments.dtype), arguments.attn_implementation)
    except OSError as error:  # transformers' for a name that is neither a folder nor on the hub
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder here nor to be had from the hub: {first}") from None
    if loaded.model.dtype == torch.float32:
        loaded.model = merged(loaded.model)
    return loaded
