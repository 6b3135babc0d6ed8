"""Rewards for form, length and the number of thoughts, to be added to an accuracy reward with a small weight.

Each is a frozen dataclass, so it pickles, compares, and prints its parameters; `__name__` is what TRL logs it under.
All take TRL's keyword call and return one value per completion, or None where the reward does not apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.accuracy import Completion, completion_text
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

    0 up to `max_length - buffer` tokens, then linearly down to -1 at `max_length`.
    Lengths are those of `completion_ids`, which for soft rollouts count the thoughts too.
    """

    max_length: int
    buffer: int
    __name__: ClassVar[str] = "overlong"

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_length:
            raise ValueError(f"buffer must be in 1..max_length ({self.max_length}), not {self.buffer}")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        start = self.max_length - self.buffer
        return [-min(max(len(ids) - start, 0) / self.buffer, 1.0) for ids in completion_ids]


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
