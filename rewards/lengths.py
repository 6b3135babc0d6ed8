"""Accuracy and length in one reward: short right answers are worth most. Lengths are in tokens, thoughts included."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.accuracy import Completion, math_accuracy


def _right(prompts: Sequence[Any], completions: Sequence[Completion], columns: dict[str, Any]) -> list[float | None]:
    columns = {name: column for name, column in columns.items() if name != "log_metric"}  # accuracy logs its own
    return math_accuracy(prompts, completions, **columns)


def relative_length(
    prompts: Sequence[Any], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """1/2 for the shortest completion of a problem down to -1/2 for the longest; at most 0 for a wrong answer
    (Kimi k1.5, arXiv 2501.12599). 0 where all have one length, None where there is no gold answer.

    Args:
        prompts: completions of equal ones are compared.
    """
    lengths = defaultdict(list)
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        lengths[repr(prompt)].append(len(ids))
    found: list[float | None] = []
    for prompt, ids, right in zip(prompts, completion_ids, _right(prompts, completions, columns), strict=True):
        shortest, longest = min(lengths[repr(prompt)]), max(lengths[repr(prompt)])
        score = 0.5 - (len(ids) - shortest) / (longest - shortest) if longest > shortest else 0.0
        found.append(None if right is None else score if right else min(0.0, score))
    return found


@dataclass(frozen=True)
class CosineLength:
    """A right answer is worth `max_value_correct` at length 0 and `min_value_correct` at `max_len`; a wrong one
    `min_value_wrong` and `max_value_wrong`; along a cosine in between (arXiv 2502.03373, C.1). None without a gold.
    """

    max_len: int
    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0
    __name__: ClassVar[str] = "cosine_length"

    def __post_init__(self) -> None:
        if self.max_len < 1:
            raise ValueError(f"max_len must be at least 1, not {self.max_len}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        found: list[float | None] = []
        for ids, right in zip(completion_ids, _right(prompts, completions, columns), strict=True):
            share = (1 + math.cos(math.pi * min(len(ids) / self.max_len, 1.0))) / 2  # 1 at length 0, 0 at max_len
            last, first = (
                (self.min_value_correct, self.max_value_correct)
                if right
                else (self.max_value_wrong, self.min_value_wrong)
            )
            found.append(None if right is None else last + (first - last) * share)
        return found
