"""Rows drawn from a generator: reasoning-gym's tasks and our `chain_mod`.

Which questions are for evaluation is decided by their hash, so no seed of training meets a question of evaluation.
"""

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import fields
from decimal import Decimal
from typing import Any

from rl_soft.data.equations import SIGNS, equations, lines_of
from rl_soft.data.row import SPLITS, STEP_FORMS, Row, check, plain_number, question_hash, side_of

OWN_TASKS = ("chain_mod",)


def tasks() -> tuple[str, ...]:
    """Names of what can be generated."""
    from reasoning_gym.factory import DATASETS

    return (*OWN_TASKS, *DATASETS)


def generate(task: str, split: str, size: int | None, seed: int, options: dict[str, Any]) -> list[Row]:
    """`size` different questions of one side of the split. Raises ValueError where there are not so many."""
    check("split", split, SPLITS)
    if size is None:
        raise ValueError(f"{task} is generated: size (train_size, eval_problems) must say how many rows")
    rows: list[Row] = []
    seen: set[str] = set()
    dry = 0  # draws since the last new question of either split
    for row in _draw_task(task, seed, options):
        digest = question_hash(row.question)
        dry = dry + 1 if digest in seen else 0
        if digest not in seen and side_of(digest) == split:
            rows.append(row)
            if len(rows) == size:
                return rows
        seen.add(digest)
        if dry > 1000 + 10 * len(seen):
            break
    raise ValueError(
        f"{task} with {options or 'its defaults'} has {len(rows)} distinct {split} questions, fewer than {size}"
    )


def _draw_task(task: str, seed: int, options: dict[str, Any]) -> Iterator[Row]:
    """Yields rows for ever, repeats included.

    Item i of a reasoning-gym data set with seed s depends on s + i alone, so neighbouring seeds share almost all their
    items: ours start at a hash of the seed.
    """
    if task == "chain_mod":
        yield from _chain_mod(seed, options)
        return
    from reasoning_gym import create_dataset

    options = dict(options)
    compact = options.pop("compact", False) if task in ("chain_sum", "gsm_symbolic") else False
    form = options.pop("steps", "text") if task == "gsm_symbolic" else "text"
    check("steps", form, STEP_FORMS)
    block = 1000
    first = int(question_hash(f"seed {seed}")[:8], 16)
    for start in itertools.count(first, block):
        try:
            dataset = create_dataset(task, seed=start, size=block, **options)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"{task} refuses the options {options}: {error}; it has {_task_options(task)}") from error
        for i in range(block):
            entry = dataset[i]
            family, answer_type, metadata = None, "number", ""
            if task == "chain_sum":
                question, steps = _chain_sum(entry, compact)
            elif task == "gsm_symbolic":
                family = f"{task}/{dataset.task_indices[i]}"
                question, steps = _gsm_symbolic(entry, compact, form)
                if not steps:
                    continue
            else:
                answer_type, metadata = "free", json.dumps(entry["metadata"], default=str)
                question, steps = entry["question"], ()
            # Some puzzles have many answers and name none: their scorer alone judges.
            answer = "" if entry["answer"] is None else str(entry["answer"])
            answer = plain_number(answer) if answer_type == "number" else answer
            identity = f"{task}/{question_hash(question)}"
            yield Row(identity, question, steps, answer, answer_type, task, family, metadata)


def _chain_sum(entry: dict[str, Any], compact: bool) -> tuple[str, tuple[str, ...]]:
    """`4 + 3 - 2` has the steps `4 + 3 = 7`, `7 - 2 = 5`; compact: the question `4+3-2=` and steps without spaces."""
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    if compact:
        return expression.replace(" ", "") + "=", tuple(step.replace(" ", "") for step in steps)
    return entry["question"], tuple(steps)


def _chain_mod(seed: int, options: Mapping[str, Any]) -> Iterator[Row]:
    """Digits under +, - and *, from left to right, modulo 10: `7*3-4=` has the steps `7*3=1`, `1-4=7`.

    Every result is one digit, and adding up the terms does not give the answer.
    """
    unknown = options.keys() - {"terms"}
    terms = options.get("terms", 4)
    if unknown or type(terms) is not int or terms < 2:
        raise ValueError(f"chain_mod refuses the options {dict(options)}; it has terms, an integer of at least 2")
    draw = random.Random(question_hash(f"seed {seed}"))
    while True:
        result = draw.randrange(10)
        question, steps = str(result), []
        for _ in range(terms - 1):
            sign, term = draw.choice("+-*"), draw.randrange(10)
            value = SIGNS[sign](result, term) % 10
            steps.append(f"{result}{sign}{term}={value}")
            question, result = f"{question}{sign}{term}", value
        question += "="
        identity = f"chain_mod/{question_hash(question)}"
        yield Row(identity, question, tuple(steps), str(result), "number", "chain_mod", None)


def _gsm_symbolic(entry: dict[str, Any], compact: bool, form: str) -> tuple[str, tuple[str, ...]]:
    """The worked solution in lines, or its equations alone: no steps if these do not end in the answer."""
    question = entry["question"]
    if compact:
        question = question.removesuffix(" Give the result as your final answer. Do not include units.")
    steps = lines_of(entry["metadata"]["answer_cot"])
    if form == "equations":
        steps = tuple(equation for line in steps for equation in equations(line))
        if not steps or Decimal(steps[-1].rpartition("=")[2]) != Decimal(entry["answer"]):
            steps = ()
    return question, steps


def _task_options(task: str) -> str:
    from reasoning_gym.factory import DATASETS

    own = {"chain_sum": ["compact"], "gsm_symbolic": ["compact", "steps"]}.get(task, [])
    return ", ".join([f.name for f in fields(DATASETS[task][1]) if f.name not in ("seed", "size")] + own)
