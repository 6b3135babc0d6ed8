"""Rewards for how a completion is written, as TRL and open-r1 have them; to be added to an accuracy reward.

Text is the whole completion: in phase explicit the strongest word of each thought, the end of thinking, the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.accuracy import Completion, completion_text

_ANSWER = re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>(?:\n|\Z)", re.DOTALL)
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
_STEPS = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")


def think_format(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """1 where the text begins with one `<think>` that a `</think>` closes, else 0 (TRL's `think_format_reward`)."""
    texts = map(completion_text, completions)
    return [float(text.startswith("<think>") and "</think>" in text and text.count("<think>") == 1) for text in texts]


def answer_format(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """1 where the text is a block `<think>` and then a block `<answer>`, each tag on a line of its own (open-r1)."""
    return [float(_ANSWER.match(completion_text(completion)) is not None) for completion in completions]


def tag_count(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """A quarter for each of the four tags of `answer_format` that stands in the text exactly once (open-r1)."""
    texts = map(completion_text, completions)
    return [sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS) for text in texts]


def reasoning_steps(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """A third for each step that is marked (`Step 1:`, a list, `First,`), at most 1 (open-r1)."""
    return [min(1.0, len(_STEPS.findall(completion_text(completion))) / 3) for completion in completions]


@dataclass(frozen=True)
class CodeFormat:
    """1 where `answer_format` holds and the answer has a fenced block of code, else 0 (open-r1).

    A column `language` says the language of each row.
    """

    language: str = "python"
    __name__: ClassVar[str] = "code_format"

    def __call__(
        self, completions: Sequence[Completion], language: Sequence[str] | None = None, **columns: Any
    ) -> list[float | None]:
        languages = [self.language] * len(completions) if language is None else language
        found: list[float | None] = []
        for completion, name in zip(completions, languages, strict=True):
            text = completion_text(completion)
            whole = _ANSWER.match(text)
            _, _, answer = whole[0].partition("\n<answer>\n") if whole else ("", "", "")
            found.append(float(re.search(rf"```{re.escape(name)}.*?```", answer, re.DOTALL) is not None))
        return found


@dataclass(frozen=True)
class Repetition:
    """`max_penalty` times the share of n-grams of token ids that stand there again (arXiv 2502.03373, C.2).

    A thought counts by its strongest id.
    """

    ngram_size: int = 3
    max_penalty: float = -1.0
    __name__: ClassVar[str] = "repetition"

    def __post_init__(self) -> None:
        if self.ngram_size < 1 or self.max_penalty > 0:
            raise ValueError(
                f"ngram_size must be at least 1, not {self.ngram_size}, and max_penalty at most 0, "
                f"not {self.max_penalty}"
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        return [self.max_penalty * self._again(list(ids)) for ids in completion_ids]

    def _again(self, ids: list[int]) -> float:
        grams = list(zip(*(ids[i:] for i in range(self.ngram_size)), strict=False))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0
