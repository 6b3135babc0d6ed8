"""Word problems of the study: MAWPS and ASDiv to learn from, SVAMP to be asked.

SVAMP (Patel et al. 2021, arXiv 2103.07191; MIT licence) has 1,000 short problems, varied by hand so that a model which
reads only part of a question fails. Its authors give 3,138 problems of MAWPS and ASDiv to learn from, each with its
equation. Two files of their repository are read from a folder, which `download` fills.
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


def to_learn_from(folder: Path, largest: int) -> list[dict[str, Any]]:
    """MAWPS and ASDiv with their worked equations, in a fixed random order; no question twice."""
    rows, known = [], set()
    with (folder / "train.csv").open(newline="") as file:
        for i, line in enumerate(csv.DictReader(file)):
            numbers = [Fraction(x).limit_denominator(1000) for x in line["Numbers"].split()]
            named = {f"number{n}": shown(x) for n, x in enumerate(numbers)}
            question = tidy(" ".join(named.get(word, word) for word in line["Question"].split()))
            steps, answer = worked(line["Equation"].split(), numbers)
            values = [*numbers, answer, *(Fraction(step.rpartition("=")[2]) for step in steps)]
            if steps and all(whole(x, largest) for x in values) and (key := question_hash(question)) not in known:
                known.add(key)
                rows.append(row(f"mawps-asdiv/{i}", question, answer, steps))
    random.Random(0).shuffle(rows)
    return rows


def to_be_asked(folder: Path, largest: int) -> list[dict[str, Any]]:
    """SVAMP, in a fixed random order."""
    rows = []
    for problem in json.loads((folder / "SVAMP.json").read_text()):
        question = tidy(f"{problem['Body'].rstrip('. ')}. {problem['Question']}")
        numbers = [Fraction(x) for x in re.findall(r"\d+\.\d+", problem["Equation"])]
        if all(whole(x, largest) for x in (*numbers, Fraction(problem["Answer"]))):
            rows.append(row(problem["ID"], question, Fraction(problem["Answer"]), []))
    random.Random(0).shuffle(rows)
    return rows


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


def whole(x: Fraction, largest: int) -> bool:
    return x.denominator == 1 and 0 <= x <= largest


def shown(x: Fraction) -> str:
    return str(x.numerator) if x.denominator == 1 else str(x)


def tidy(text: str) -> str:
    return re.sub(r"\s+([.,?!;:'])", r"\1", re.sub(r"\s+", " ", text)).strip()


def row(name: str, question: str, answer: Fraction, steps: list[str]) -> dict[str, Any]:
    return {"id": name, "question": question, "answer": shown(answer), "steps": steps, "answer_type": "number"}
