"""What the completions of benchmarks/smollm2.py compute: which operations, of which numbers, and whether rightly.

SVAMP gives the equation of each problem. The models were never shown it; it tells choosing from calculating.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rl_soft.evaluation.records import GREEDY

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
ANSWER = re.compile(r"####\s*(\d+)")
FIGURES = ("answer", "operations", "numbers", "holds", "follows")


def equations_of(svamp: Path) -> dict[str, tuple[Counter[str], Counter[float]]]:
    """Problem id -> its operations and its numbers: `( ( 8.0 - 3.0 ) + 2.0 )` has - and +, and 8, 3 and 2."""
    problems = json.loads((svamp / "SVAMP.json").read_text())
    return {
        p["ID"]: (Counter(re.findall(r" ([-+*/]) ", p["Equation"])), Counter(map(float, numbers_in(p["Equation"]))))
        for p in problems
    }


def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def written(records: list[Any], equations: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By the operation of a problem (`two` for two of them), over its samples: shares, and how many problems they are.

    answer: right ones. operations: the right ones were written. numbers: these, with the right numbers. holds: what is
    written left of each = has the value that stands right of it. follows: the answer is the last of these values. Of a
    soft thought its strongest id is written; what the model reads is the mixture.
    """
    found: dict[str, Counter[str]] = defaultdict(Counter)
    ids: dict[str, set[str]] = defaultdict(set)
    for r in records:
        if r["sample"] == GREEDY:
            continue
        name = r["problem_id"].partition("/")[2]
        operations, numbers = equations[name]
        kind = "two" if operations.total() > 1 else next(iter(operations))
        ids[kind].add(name)
        steps = EQUATION.findall(r["text"])
        same = Counter(sign for _, sign, _, _ in steps) == operations
        given = Counter(float(x) for a, _, b, _ in steps for x in (a, b)) - Counter(float(s[3]) for s in steps[:-1])
        answer, last = ANSWER.search(r["text"]), steps[-1][3] if steps else None
        figures = (
            r["outcome"] == "correct",
            same,
            same and given == numbers,
            bool(steps) and all(map(holds, steps)),
            answer is not None and answer[1] == last,
        )
        found[kind].update({"samples": 1} | dict(zip(FIGURES, figures, strict=True)))
    return {
        kind: {"problems": len(ids[kind])} | {name: counts[name] / counts["samples"] for name in FIGURES}
        for kind, counts in sorted(found.items())
    }


def holds(step: tuple[str, str, str, str]) -> bool:
    a, b, value = int(step[0]), int(step[2]), int(step[3])
    return {"+": a + b == value, "-": a - b == value, "*": a * b == value, "/": a == b * value and b != 0}[step[1]]
