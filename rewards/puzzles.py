"""The reward of puzzles: reasoning-gym's own scorers, as evaluations ask them, in the calling convention of TRL."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.accuracy import Completion, completion_text
from rewards.scorers import UNSCORED, judge_puzzles


def puzzle_accuracy(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    metadata: Sequence[str | Mapping[str, Any] | None] | None = None,
    answer: Sequence[Any] | None = None,
    *,
    source: Sequence[str | None] | None = None,
    answer_text: Sequence[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 for an answer that its task's scorer gives the full score, 0 for another one, None where there is no scorer.

    Args:
        prompts: questions, or chats whose last message is the question.
        completions: strings, or lists of messages.
        metadata: for each what the task's scorer reads, a mapping or its JSON; None for a row that is no puzzle.
        answer: for each the task's reference answer; None or empty where it names none.
        source: for each the name of the task, where `metadata` has no `source_dataset`.
        answer_text: for each completion what stands behind its thinking, which is then judged alone.
        log_metric: receives `puzzle_accuracy/unparsed_rate` (nothing to score, or the scorer gave up).

    Raises:
        ValueError: metadata that is neither a mapping nor the JSON of one.
    """
    n = len(completions)
    texts = [completion_text(completion) for completion in completions] if answer_text is None else list(answer_text)
    golds = answer or [None] * n
    entries: dict[int, dict[str, str]] = {}
    for i, (held, name) in enumerate(zip(metadata or [None] * n, source or [None] * n, strict=True)):
        read = _mapping(held)
        task = str(read.get("source_dataset", name))
        if held is not None and task in _tasks() and task not in UNSCORED:
            gold = "" if golds[i] is None else str(golds[i])
            entries[i] = {
                "task": task, "question": _question(prompts[i]), "answer": gold, "metadata": json.dumps(read),
            }  # fmt: skip
    judged = dict(zip(entries, judge_puzzles([texts[i] for i in entries], list(entries.values())), strict=True))
    if log_metric is not None and judged:
        unparsed = sum(judgement.outcome == "unparsed" for judgement in judged.values())
        log_metric("puzzle_accuracy/unparsed_rate", unparsed / len(judged))
    return [float(judged[i].outcome == "correct") if i in judged else None for i in range(n)]


def _mapping(held: Any) -> dict[str, Any]:
    read = json.loads(held) if isinstance(held, str) and held.strip() else held or {}
    if not isinstance(read, Mapping):
        raise ValueError(f"metadata must be a mapping or the JSON of one, got {held!r:.80}")
    return dict(read)


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _tasks() -> Mapping[str, Any]:
    from reasoning_gym.factory import DATASETS

    return DATASETS
