"""reasoning-gym's own scorers, for puzzles with many right answers, in worker processes like those of `symbolic`.

An answer is right if its task's scorer gives it the full score of 1; partial credit is no credit here. Some scorers
evaluate an answer as Python: with `eval`, which is replaced by `ast.literal_eval` (only partial credit hangs on it),
or through sympy's parser, which ends in one: an answer that calls more than mathematical functions is kept from it.

This file is two programs, like `symbolic`: imported, the pool; run as a script, the worker.
"""

from __future__ import annotations

import ast
import atexit
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

if __name__ != "__main__":
    from rewards import symbolic
    from rewards.answers import Judgement
    from rewards.extraction import extract

# The scorers of the first two compare with tuples, which JSON returns as lists: a right answer would score 0.05. That
# of the third takes any answer for right, since bool("False") is True.
UNSCORED = ("arc_agi", "rearc", "game_of_life_halting")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MAX_ANSWER = 10_000  # characters; a board is longer than a number


def readings(text: str) -> list[str]:
    """What a completion may give as its answer: the marked answer alone, or the whole text, or its last line.

    A mark is reasoning-gym's `<answer>...</answer>`, or one that `extraction.extract` knows.
    """
    text = text.rpartition("</think>")[2].strip()
    if tags := _ANSWER_TAG.findall(text):
        return [tags[-1].strip()]
    if marked := extract(text, "free", strict=True):
        return [marked]
    return list(dict.fromkeys([text, text.rpartition("\n")[2].strip()])) if text else []


def judge_puzzles(texts: Sequence[str], entries: Sequence[Mapping[str, str]]) -> list[Judgement]:
    """Judges completions by the scorers of their tasks.

    Args:
        texts: completions.
        entries: for each `task`, `question`, `answer` and `metadata` (JSON), as in the data set's row.
    """
    read = [readings(text) for text in texts]
    questions = [
        (entry["task"], answer, entry["question"], entry["answer"], entry["metadata"])
        for answers, entry in zip(read, entries, strict=True)
        for answer in answers
        if 0 < len(answer) <= MAX_ANSWER
    ]
    verdict_of = dict(zip(questions, _verify(questions), strict=True))
    judgements = []
    for answers, entry in zip(read, entries, strict=True):
        keys = [(entry["task"], a, entry["question"], entry["answer"], entry["metadata"]) for a in answers]
        found = {key[1]: verdict_of[key] for key in keys if key in verdict_of}
        if right := next((answer for answer, verdict in found.items() if verdict is True), None):
            judgements.append(Judgement("correct", right))
        elif False in found.values():
            judgements.append(Judgement("wrong", answers[-1]))
        else:  # nothing to score, or the scorer gave up
            failure = next((verdict for verdict in found.values() if not isinstance(verdict, bool)), None)
            judgements.append(Judgement("unparsed", answers[-1] if answers else None, failure))
    return judgements


_pool: symbolic.Pool | None = None


def _verify(questions: Sequence[tuple[str, ...]]) -> list[symbolic.Verdict]:
    global _pool
    if _pool is None:
        _pool = symbolic.Pool(start=lambda: symbolic.Worker(__file__))
    return _pool.verify(questions)


@atexit.register
def close() -> None:
    """Stops the workers; the next answers get new ones."""
    global _pool
    old, _pool = _pool, None
    if old is not None:
        old.close()


# --- The worker ------------------------------------------------------------------------------------------------------

_EVAL = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")  # after which nothing scores 1
_PARSE = ("countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration")
_FUNCTIONS = {
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
    *("atanh", "exp", "log", "ln", "sqrt", "abs", "Abs", "Rational"),
}
_CALL = re.compile(r"([^\W\d]\w*|[)\]}'\"])\s*\(")
_REACH = re.compile(r"__|[#\\@:;'\"]|\.\s*[^\W\d]")  # names of Python's own, comments, attributes, strings


def plain_mathematics(answer: str) -> bool:
    """Whether an expression calls mathematical functions alone and reaches into nothing."""
    return not _REACH.search(answer) and {match[1] for match in _CALL.finditer(answer)} <= _FUNCTIONS


def scorer(task: str) -> Callable[[str, dict], float]:
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.factory import DATASETS

    score = get_score_answer_fn(task)
    if task in _EVAL:
        vars(importlib.import_module(DATASETS[task][0].__module__))["eval"] = ast.literal_eval
    return score


def serve(cpu_seconds: float, memory_bytes: int) -> None:
    """The worker's loop: reads questions from standard input until it closes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints can be taken for a reply
    import reasoning_gym  # noqa: F401  # before the limits: it is large

    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    scorers: dict[str, Callable[[str, dict], float]] = {}

    def grade(task: str, answer: str, question: str, gold: str, metadata: str) -> bytes:
        if task in _PARSE and not plain_mathematics(answer):
            return b"prediction"
        entry = {"question": question, "answer": gold, "metadata": json.loads(metadata or "{}")}
        try:
            return b"true" if scorers[task](answer, entry) >= 1.0 else b"false"
        except MemoryError:
            return b"memory"
        except Exception:
            return b"prediction"

    os.write(replies, b"ready")
    for line in sys.stdin.buffer:
        question = json.loads(line)
        if question[0] not in scorers:  # making one may take longer than using it
            scorers[question[0]] = scorer(question[0])
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # no handler: SIGPROF ends the process
        reply = grade(*question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, reply)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
