"""Rewards for form, length and the number of thoughts, to be added to an accuracy reward with a small weight.

Each is a frozen dataclass, so it pickles, compares, and prints its parameters; `__name__` is what TRL logs it under.
All take TRL's keyword call and return one value per completion, or None where the reward does not apply.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.accuracy import Completion, completion_text, math_accuracy
from rewards.extraction import boxes, hashes


@dataclass(frozen=True)
class StrictFormat:
    r"""1 if the completion ends in exactly one marked answer, else 0.

    Args:
        mark: "boxed" for `\boxed{...}`, "hashes" for `#### ...`.
        think: ask for a thinking block before it, closed by one `</think>`; the prompt may have opened it already.
    """

    mark: Literal["boxed", "hashes"] = "boxed"
    think: bool = False
    __name__: ClassVar[str] = "strict_format"

    def __post_init__(self) -> None:
        if self.mark not in ("boxed", "hashes"):
            raise ValueError(f"mark {self.mark!r} is neither 'boxed' nor 'hashes'")

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return [float(self._holds(completion_text(completion))) for completion in completions]

    def _holds(self, text: str) -> bool:
        if self.think:
            thought, closed, text = text.partition("</think>")
            if not closed or "</think>" in text or "<think>" in text or "<think>" in thought.lstrip()[1:]:
                return False
        answers = (boxes if self.mark == "boxed" else hashes)(text)
        return len(answers) == 1 and not text[answers[0].end :].strip(" \r\n.$*")


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    0 up to `max_length - buffer` tokens, then linearly down to -1 at `max_length`, as in TRL's
    `get_soft_overlong_punishment`. Lengths are those of `completion_ids`, which for soft rollouts count the thoughts.
    """

    max_length: int
    buffer: int
    __name__: ClassVar[str] = "overlong"

    def __post_init__(self) -> None:
        if not 0 <= self.buffer <= self.max_length:
            raise ValueError(f"buffer must be in 0..max_length ({self.max_length}), not {self.buffer}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        start = self.max_length - self.buffer
        beyond = (max(len(ids) - start, 0) for ids in completion_ids)
        return [-min(tokens / self.buffer, 1.0) if self.buffer else -float(tokens > 0) for tokens in beyond]


@dataclass(frozen=True)
class CosineScaled:
    """Accuracy scaled by length along half a cosine (arXiv 2502.03373, C.1), as in TRL's `get_cosine_scaled_reward`.

    A right answer falls from `max_value_correct` to `min_value_correct` at `max_length` tokens, a wrong one rises from
    `min_value_wrong` to `max_value_wrong`; None where `math_accuracy` has none. Where we differ: `math_accuracy` says
    what is right, and lengths count the thoughts.
    """

    max_length: int
    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0
    __name__: ClassVar[str] = "cosine_scaled_reward"

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        answer: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        read = {name: columns[name] for name in ("answer_type", "answer_text") if name in columns}
        found = math_accuracy(prompts, completions, answer, **read)
        return [
            None if right is None else self._scaled(bool(right), len(ids) / self.max_length)
            for right, ids in zip(found, completion_ids, strict=True)
        ]

    def _scaled(self, right: bool, share: float) -> float:
        start, end = (
            (self.max_value_correct, self.min_value_correct) if right else (self.min_value_wrong, self.max_value_wrong)
        )
        return end + (start - end) * (1 + math.cos(min(share, 1.0) * math.pi)) / 2


def relative_length(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **columns: Any,
) -> list[float | None]:
    """1/2 for the shortest completion of a problem down to -1/2 for the longest; at most 0 for a wrong answer
    (Kimi k1.5, arXiv 2501.12599). 0 where all have one length, None where there is no gold answer.

    Args:
        prompts: completions of equal ones are compared.
    """
    read = {name: columns[name] for name in ("answer_type", "answer_text") if name in columns}
    accuracy = math_accuracy(prompts, completions, answer, **read)
    lengths = defaultdict(list)
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        lengths[repr(prompt)].append(len(ids))
    found: list[float | None] = []
    for prompt, ids, right in zip(prompts, completion_ids, accuracy, strict=True):
        shortest, longest = min(lengths[repr(prompt)]), max(lengths[repr(prompt)])
        score = 0.5 - (len(ids) - shortest) / (longest - shortest) if longest > shortest else 0.0
        found.append(None if right is None else score if right else min(0.0, score))
    return found


@dataclass(frozen=True)
class LengthCost:
    """`-cost` for every completion token after the first `free`."""

    cost: float
    free: int = 0
    __name__: ClassVar[str] = "length_cost"

    def __post_init__(self) -> None:
        _check_cost(self.cost, self.free)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [-self.cost * max(len(ids) - self.free, 0) for ids in completion_ids]


@dataclass(frozen=True)
class ThoughtCost:
    """`-cost` for every thought after the first `free`; None where the number of thoughts is not known.

    The column `thoughts` holds the number of thoughts of each completion.
    """

    cost: float
    free: int = 0
    __name__: ClassVar[str] = "thought_cost"

    def __post_init__(self) -> None:
        _check_cost(self.cost, self.free)

    def __call__(
        self, completions: Sequence[Completion], thoughts: Sequence[int | None] | None = None, **columns: Any
    ) -> list[float | None]:
        counts = [None] * len(completions) if thoughts is None else thoughts
        return [None if count is None else -self.cost * max(count - self.free, 0) for count in counts]


def _check_cost(cost: float, free: int) -> None:
    if cost < 0 or free < 0:
        raise ValueError(f"cost and free must not be negative: cost={cost}, free={free}")
