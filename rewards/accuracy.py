"""Accuracy in the calling convention of TRL: `f(prompts, completions, **columns) -> list[float | None]`.

Works as it stands under `trl grpo --reward_funcs rewards.accuracy.math_accuracy`, with the gold answers in a column
`answer` and, if they are not all numbers or expressions, their types in a column `answer_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards.answers import judge_many

Completion = str | list[dict[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a completion, which in a conversational data set is a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def math_accuracy(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    answer_type: Sequence[str] | None = None,
    answer_text: Sequence[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    strict: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 for a correct answer, 0 for a wrong or an unparsed one, None where the gold answer is missing or unreadable.

    For each batch `log_metric`, which TRL passes, receives `unparsed_rate` (no answer was found, or none that can be
    read) and two counts: `grader_failures` (the worker ran out of time or memory, or crashed; the answer scores 0) and
    `unreadable_golds`.

    Args:
        prompts: not used.
        completions: strings, or lists of messages.
        answer: gold answers; one that is None or empty takes its completion out of the reward.
        answer_type: "number", "choice", "bool" or "free" for each; all "number" by default.
        answer_text: for each completion what stands behind its thinking, which is then judged alone; the trainers of
            rl_soft pass it.
        strict: accept only marked answers; `functools.partial(math_accuracy, strict=True)` is the strict reward.
    """
    texts = [completion_text(completion) for completion in completions] if answer_text is None else list(answer_text)
    golds = ["" if gold is None else str(gold).strip() for gold in answer]
    judgements = judge_many(texts, golds, answer_type or ["number"] * len(texts), strict)
    applies = [gold != "" and judgement.failure != "gold" for gold, judgement in zip(golds, judgements, strict=True)]
    if log_metric is not None and texts:
        log_metric("math_accuracy/unparsed_rate", sum(j.outcome == "unparsed" for j in judgements) / len(texts))
        failures = [judgement.failure for judgement in judgements]
        log_metric(
            "math_accuracy/grader_failures", sum(failures.count(kind) for kind in ("timeout", "memory", "crash"))
        )
        log_metric("math_accuracy/unreadable_golds", applies.count(False))
    return [float(j.outcome == "correct") if applied else None for j, applied in zip(judgements, applies, strict=True)]
