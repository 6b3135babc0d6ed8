"""Problems as the data set that TRL's trainer takes: `prompt` is the question, the other columns are for rewards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from rl_soft.data.sources import Row

logger = logging.getLogger("rl_soft")

# Names that TRL gives another meaning, or passes itself: a column of such a name does not reach the rewards.
TAKEN = {
    "prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
    "environment", "environments", "image", "images", "tools",
}  # fmt: skip


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """A column for each name that some row has; None where a row has none. Ours win over the file's of the same name.

    Columns: `prompt`, the question; `id`, `answer`, `answer_type`, `source` and, of puzzles and programs, `metadata`
    (JSON); and the columns of the record as the file has them, also of values of several types. One that holds what
    cannot be stored is left out, and a line says so.
    """
    made = [{**row.columns, **_own(row)} for row in rows]
    names = [name for name in dict.fromkeys(name for row in made for name in row) if name not in TAKEN]
    columns: dict[str, list[Any]] = {"prompt": [row.question for row in rows]}
    columns |= {name: [row.get(name) for row in made] for name in names}
    try:
        return Dataset.from_dict(columns, on_mixed_types="use_json")
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        kept = {name: values for name, values in columns.items() if name == "prompt" or _is_storable(name, values)}
        return Dataset.from_dict(kept, on_mixed_types="use_json")


def _own(row: Row) -> dict[str, Any]:
    own = {"id": row.id, "answer": row.answer, "answer_type": row.answer_type, "source": row.source}
    return own | ({"metadata": row.metadata} if row.metadata else {})


def _is_storable(name: str, values: list[Any]) -> bool:
    try:
        Dataset.from_dict({name: values}, on_mixed_types="use_json")
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        logger.warning("column %s does not reach the rewards: %s", name, " ".join(str(error).split())[:200])
        return False
    return True
