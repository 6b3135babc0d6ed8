"""Word problems of the study: MAWPS and ASDiv for the warm start, SVAMP for RL and to be asked.

SVAMP (Patel et al. 2021, arXiv 2103.07191; MIT licence) has 1,000 short problems: about 100 were taken from ASDiv, and
each was varied by hand, so that a model which reads only part of a question fails. A problem and its variations are a
*family* here. Its authors also give 3,138 problems of MAWPS and ASDiv, each with its equation and with the places of
its numbers, so that other numbers can be put there. Two files of their repository are read from a folder, which
`download` fills.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
import urllib.request
from fractions import Fraction
from pathlib import Path
from typing import Any

from rl_soft.data.row import question_hash
from rl_soft.files import write_atomic

SOURCE = "https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53"
FILES = {"train.csv": "data/mawps-asdiv-a_svamp/train.csv", "SVAMP.json": "SVAMP.json"}
SHA256 = {
    "train.csv": "c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821",
    "SVAMP.json": "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
}
TRIES = 100  # to find numbers that fit
SIGNS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}


def download(folder: Path) -> None:
    """The files that are missing in the folder; raises SystemExit if one is not what it was."""
    for name, path in FILES.items():
        if (folder / name).exists():
            continue
        with urllib.request.urlopen(f"{SOURCE}/{path}") as answer:
            content = answer.read()
        if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
            raise SystemExit(f"{SOURCE}/{path} has SHA-256 {found}, not {SHA256[name]}")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, content.decode())


def to_learn_from(folder: Path, largest: int, copies: int) -> list[dict[str, Any]]:
    """MAWPS and ASDiv with their worked equations, in a fixed random order; no question twice.

    Each problem comes as it is and `copies` times with other numbers, where those are whole and at most `largest`, and
    what is computed from them, too.
    """
    rows, known = [], set()
    with (folder / "train.csv").open(newline="") as file:
        for i, line in enumerate(csv.DictReader(file)):
            given = [Fraction(x).limit_denominator(1000) for x in line["Numbers"].split()]
            generator = random.Random(i)
            for copy in range(1 + copies):
                numbers = others(given, generator, largest) if copy else given
                for _ in range(TRIES if copy else 0):
                    if fits(line["Equation"], numbers, largest):
                        break
                    numbers = others(given, generator, largest)
                if not fits(line["Equation"], numbers, largest):
                    continue
                steps, answer = worked(line["Equation"].split(), numbers)
                named = {f"number{n}": shown(x) for n, x in enumerate(numbers)}
                question = tidy(" ".join(named.get(word, word) for word in line["Question"].split()))
                if (key := question_hash(question)) not in known:
                    known.add(key)
                    rows.append(row(f"mawps-asdiv/{i}/{copy}", question, answer, steps))
    random.Random(0).shuffle(rows)
    return rows


def others(numbers: list[Fraction], generator: random.Random, largest: int) -> list[Fraction]:
    """Other numbers of a like size; 1 stays: it is often a unit, as in `for 1 pie`."""
    return [x if x == 1 else Fraction(generator.randint(2, max(12, min(2 * int(x), largest)))) for x in numbers]


def fits(equation: str, numbers: list[Fraction], largest: int) -> bool:
    steps, answer = worked(equation.split(), numbers)
    values = [*numbers, answer, *(Fraction(step.rpartition("=")[2]) for step in steps)]
    return bool(steps) and all(x.denominator == 1 and 0 <= x <= largest for x in values)


def to_be_asked(folder: Path, largest: int) -> list[list[dict[str, Any]]]:
    """SVAMP by families, in a fixed random order.

    Two problems are of one family if their texts before the question share half of their words, or if each is of one
    with a third: 802 problems of 101 families with numbers up to 200.
    """
    families: list[tuple[list[frozenset[str]], list[dict[str, Any]]]] = []
    for problem in json.loads((folder / "SVAMP.json").read_text()):
        question = tidy(f"{problem['Body'].rstrip('. ')}. {problem['Question']}")
        numbers = [Fraction(x) for x in re.findall(r"\d+\.\d+", problem["Equation"])]
        if all(x.denominator == 1 and 0 <= x <= largest for x in (*numbers, Fraction(problem["Answer"]))):
            words = words_of(problem["Body"])
            made = [words], [row(problem["ID"], question, Fraction(problem["Answer"]), [])]
            related = [f for f in families if any(2 * len(words & w) >= len(words | w) for w in f[0])]
            for family in related:
                made = made[0] + family[0], made[1] + family[1]
            families = [f for f in families if f not in related] + [made]
    found = [rows for _, rows in families]
    random.Random(0).shuffle(found)
    return found


def count_alike(asked: list[dict[str, Any]], learnt: list[dict[str, Any]]) -> int:
    """How many questions of `asked` share half of their words with one of `learnt`."""
    known = {words_of(row["question"]) for row in learnt}
    questions = [words_of(row["question"]) for row in asked]
    return sum(any(2 * len(words & other) >= len(words | other) for other in known) for words in questions)


def words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def worked(prefix: list[str], numbers: list[Fraction]) -> tuple[list[str], Fraction]:
    """The steps of an equation in prefix form, and its value: `- * n0 n1 n2` is n0*n1=..., then that less n2."""
    steps: list[str] = []
    words = iter(prefix)

    def value() -> Fraction:
        word = next(words)
        if word not in SIGNS:
            return numbers[int(word.removeprefix("number"))] if word.startswith("number") else Fraction(word)
        left, right = value(), value()
        made = SIGNS[word](left, right) if word != "/" or right else Fraction(-1)
        steps.append(f"{shown(left)}{word}{shown(right)}={shown(made)}")
        return made

    return steps, value()


def shown(x: Fraction) -> str:
    return str(x.numerator) if x.denominator == 1 else str(x)


def tidy(text: str) -> str:
    return re.sub(r"\s+([.,?!;:'])", r"\1", re.sub(r"\s+", " ", text)).strip()


def row(name: str, question: str, answer: Fraction, steps: list[str]) -> dict[str, Any]:
    return {"id": name, "question": question, "answer": shown(answer), "steps": steps, "answer_type": "number"}
