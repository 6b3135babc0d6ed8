"""What the commands on a model share: its thinking, its rows, its weights, and the folder that results go to."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rl_soft.config.arguments import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.data import sources as data
from rl_soft.model import policy
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")


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


def check_lengths(rows: list[data.Row], layout: Layout, context: int | None, dataset: str) -> None:
    """Refuse, by name, questions that leave a model without positions for thoughts and answer."""
    if context is None:
        return
    lengths = {row.id: len(layout.prompt_ids(row.question)) + layout.max_completion_length for row in rows}
    long = [name for name, length in lengths.items() if length > context]
    if long:
        raise ValueError(
            f"dataset {dataset}, row {long[0]}: question, thoughts and answer may take {lengths[long[0]]} tokens, and "
            f"the model has {context} positions; so may {len(long) - 1} more rows: lower num_thoughts or "
            f"max_answer_tokens, or leave them out with dataset_options: {{drop: [{', '.join(long[:20])}]}}"
        )


def load_rows(arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> list[data.Row]:
    return data.load_rows(
        arguments.dataset,
        arguments.split,
        arguments.eval_problems,
        arguments.data_seed_eval,
        arguments.dataset_options,
        arguments.dataset_columns,
    )


def load_policy(model: str, arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> policy.Policy:
    """An adapter in float32 is added into its weights, which is faster, and the same up to rounding."""
    try:
        loaded = policy.load_policy(model, arguments.dtype, arguments.attn_implementation)
    except OSError as error:  # transformers' for a name that is neither a folder nor on the hub
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder here nor to be had from the hub: {first}") from None
    if isinstance(loaded.model, PeftModel) and loaded.model.dtype == torch.float32:
        loaded.model = loaded.model.merge_and_unload()
    return loaded
