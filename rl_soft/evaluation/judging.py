"""Which judge a row asks for: an answer compared, a puzzle's own scorer, or a program's tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rewards import livecodebench
from rewards.answers import Judgement, judge_many, unreadable_golds
from rewards.code import judge_programs, readable_tests
from rewards.scorers import UNSCORED, judge_puzzles
from rl_soft.data.sources import Row


def is_puzzle(row: Row) -> bool:
    """Whether its own reasoning-gym scorer judges a row: it has many right answers, or none that is written down."""
    return row.metadata != "" and row.answer_type != "code"


def check_golds(rows: Sequence[Row], dataset: str, run_code: bool = False) -> None:
    """Refuse, before any model work, rows that no completion could be right for.

    Raises:
        ValueError: a gold answer that cannot be read, named with its data set and row; programs as answers, unless it
            is confirmed that they may be run; a reasoning-gym task whose scorer cannot be used.
    """
    if any(row.answer_type == "code" for row in rows) and not run_code:
        raise ValueError(
            f"dataset {dataset} is graded by running the programs that the model writes, in a process with limits; "
            "to allow that, evaluate with `rl-soft eval --confirm_run_unsafe_code`"
        )
    for row in rows:
        if is_puzzle(row) and row.source in UNSCORED:
            raise ValueError(f"dataset {dataset}: the scorer of {row.source} cannot be used on its rows")
    answers = [row for row in rows if row.answer_type != "code" and not is_puzzle(row)]
    bad = [answers[i] for i in unreadable_golds([r.answer for r in answers], [r.answer_type for r in answers])]
    for row in rows:
        if row.answer_type == "code":
            problem = json.loads(row.metadata or "{}")
            if not livecodebench.is_problem(problem):
                bad += [] if readable_tests(row.answer) else [row]
                continue
            try:
                livecodebench.cases_of(problem)
            except ValueError as error:
                raise ValueError(f"dataset {dataset}, row {row.id}: {error}") from None
    if bad:
        others = ", ".join(row.id for row in bad[1:20])
        more = f"; nor can those of {len(bad) - 1} more rows: {others}" if others else ""
        raise ValueError(
            f"dataset {dataset}, row {bad[0].id}: the gold answer {bad[0].answer!r:.200} cannot be read "
            f"(answer_type {bad[0].answer_type}){more}"
        )


def judge_rows(texts: Sequence[str], rows: Sequence[Row], run_code: bool = False) -> list[Judgement]:
    """The judgement of each completion, by the judge that its row asks for."""
    judged: dict[int, Judgement] = {}

    def among(members: Iterable[int]) -> tuple[list[int], list[str], list[Row]]:
        numbers = list(members)
        return numbers, [texts[i] for i in numbers], [rows[i] for i in numbers]

    numbers, some, of = among(i for i, row in enumerate(rows) if row.answer_type == "code")
    if numbers and not run_code:
        raise ValueError("confirm_run_unsafe_code is not set, so programs are not run")
    metadata = [json.loads(row.metadata or "{}") for row in of]
    judged |= zip(numbers, judge_programs(some, [row.answer for row in of], metadata), strict=True)

    numbers, some, of = among(i for i, row in enumerate(rows) if is_puzzle(row))
    entries = [
        {"task": row.source, "question": row.question, "answer": row.answer, "metadata": row.metadata} for row in of
    ]
    judged |= zip(numbers, judge_puzzles(some, entries), strict=True)

    numbers, some, of = among(i for i in range(len(rows)) if i not in judged)
    judged |= zip(numbers, judge_many(some, [r.answer for r in of], [r.answer_type for r in of]), strict=True)
    return [judged[i] for i in range(len(rows))]
