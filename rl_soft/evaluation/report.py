"""Records to report: `build` for one evaluation, `compare` for several over the same problems.

Everything comes from `eval.json` and `records.jsonl` (see `records`); neither torch nor a GPU is needed. Five files
are written, each whole or not at all: report.json holds every figure, and report.md, passk.csv and passk.png are
functions of it alone; report.html adds the problems and completions to browse. A comparison also writes problems.png,
the per-problem scatter.

Where we differ from common practice: greedy and pass@1 (sampled) are separate rows; intervals stand beside every
figure; comparisons are paired by problem and refused where the questions differ.
"""

import contextlib
import gc
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rl_soft.evaluation import figures, html, records, render
from rl_soft.evaluation.differences import differences, names_of
from rl_soft.evaluation.passk import Floats, bootstrap, maj_at_n, paired_bootstrap, pass_at_k
from rl_soft.files import write_atomic

logger = logging.getLogger(__name__)

SCHEMA = 1
MIN_FAMILIES = 10  # with fewer, resampling whole families says little; problems are resampled instead
MIN_UNITS = 30  # problems or families to resample; with fewer, intervals are rough
MAX_UNPARSED = 0.02
MAX_TRUNCATED = 0.05
EXAMPLES = 5


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the cycle collector, which would walk through millions of records' lists again and again.

    They form no cycles. Of 65,000 records with their thoughts, reading takes 1.3 s of CPU time instead of 4.3 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def build(eval_dir: str | Path, ks: Sequence[int] | None = None) -> dict[str, Any]:
    """Write the report of one evaluation into its directory.

    Args:
        eval_dir: holds eval.json and records.jsonl.
        ks: the k of Pass@k, besides 1; by default the powers of two up to n, and n.

    Returns:
        What report.json holds.

    Raises:
        FileNotFoundError: not an evaluation directory.
        ValueError: no records, records that do not fit each other or the header, or k > n.
    """
    evaluation = Evaluation.load(Path(eval_dir))
    report = _report([evaluation], ks)
    _write(report, [evaluation], Path(eval_dir))
    return report


@_no_collection()
def compare(
    dirs: Sequence[str | Path],
    out: str | Path,
    names: Sequence[str] | None = None,
    metrics: str | Path | None = None,
    title: str | None = None,
    ks: Sequence[int] | None = None,
    curve: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the comparison of two or more evaluations of the same problems; each is paired with the first.

    Args:
        dirs: evaluation directories, the one to compare with first.
        out: directory for the files; made if it is missing.
        names: one per evaluation; by default those in their headers or, where two are equal, what differs in their
            paths.
        metrics: a metrics.jsonl whose `reward` by `step` becomes the right panel of passk.png.
        title: of the report and the figure; by default the finding, such as "pass@1 62 % → 85 %".
        ks: as in `build`.
        curve: the evaluations of a run by its steps (`curve.curve_of`), which become training.png and a table.

    Returns:
        What report.json holds.

    Raises:
        FileNotFoundError: a directory or the metrics file is missing.
        ValueError: fewer than two evaluations, names that do not fit, different problems, or what `build` refuses.
    """
    evaluations = [Evaluation.load(Path(directory)) for directory in dirs]
    if len(evaluations) < 2:
        raise ValueError(f"a comparison needs at least two evaluations, not {len(evaluations)}")
    names = list(names or names_of([Path(d) for d in dirs], [evaluation.name for evaluation in evaluations]))
    if len(names) != len(evaluations) or len(set(names)) != len(names):
        raise ValueError(f"{len(evaluations)} evaluations need as many different names, not {names}")
    for evaluation, name in zip(evaluations, names, strict=True):
        evaluation.name = name
        _refuse_other_problems(evaluations[0], evaluation)
    report = _report(evaluations, ks, _reward(Path(metrics)) if metrics else None, title)
    report["curve"] = curve
    Path(out).mkdir(parents=True, exist_ok=True)
    _write(report, evaluations, Path(out))
    return report


@dataclass(frozen=True)
class Problem:
    """One problem with its records: n samples in order, and the greedy answer if there is one."""

    id: str
    question_hash: str
    question: str
    gold: str
    family: str | None
    samples: list[records.Record]
    greedy: records.Record | None

    @property
    def records(self) -> list[records.Record]:
        return [self.greedy, *self.samples] if self.greedy else self.samples

    @cached_property
    def num_correct(self) -> int:
        return sum(record["outcome"] == "correct" for record in self.samples)

    @property
    def greedy_correct(self) -> bool | None:
        return None if self.greedy is None else self.greedy["outcome"] == "correct"

    @property
    def majority(self) -> float:
        """maj@n: the share of the plurality vote that goes to the right answer."""
        wrong = Counter(record["prediction"] for record in self.samples if record["outcome"] == "wrong")
        return maj_at_n(len(self.samples), self.num_correct, list(wrong.values()))


@dataclass
class Evaluation:
    """An evaluation directory in memory.

    Problems are in order of their ids. Of partial records they are those with all n samples or, if there is none,
    those with any; `partial` says so.
    """

    name: str
    header: dict[str, Any]
    problems: list[Problem]
    partial: str | None

    @classmethod
    def load(cls, eval_dir: Path) -> "Evaluation":
        header = records.read_header(eval_dir)
        path = eval_dir / "records.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{eval_dir} has no records.jsonl")
        by_problem: dict[str, list[records.Record]] = {}
        for record in records.read(path):
            by_problem.setdefault(record["problem_id"], []).append(record)
        problems = [_problem(rows, path) for _, rows in sorted(by_problem.items())]
        n, num_problems = header["n"], header["num_problems"]
        if len(problems) > num_problems or any(len(problem.samples) > n for problem in problems):
            raise ValueError(f"{path} holds more than the {num_problems} problems x {n} samples of its header")
        sampled = [problem for problem in problems if problem.samples]
        if not sampled:
            raise ValueError(f"{path} holds no samples yet")
        drawn = sum(len(problem.samples) for problem in sampled)
        greedy = sum(problem.greedy is not None for problem in sampled)
        partial = None
        if drawn < num_problems * n or 0 < greedy < len(sampled):
            sampled = [problem for problem in sampled if len(problem.samples) == n] or sampled
            partial = (
                f"{header['name']} has {drawn:,} of {num_problems * n:,} samples; its figures are over "
                f"{len(sampled):,} of {num_problems:,} problems"
            )
        return cls(header["name"], header, sampled, partial)

    @cached_property
    def num_samples_P(self) -> np.ndarray:
        return np.array([len(problem.samples) for problem in self.problems])

    @cached_property
    def num_correct_P(self) -> np.ndarray:
        return np.array([problem.num_correct for problem in self.problems])

    @property
    def n(self) -> int:
        """Samples that every problem has."""
        return int(self.num_samples_P.min())

    @property
    def families(self) -> list[str] | None:
        """(P,) labels to resample by, or None to resample problems."""
        labels = [problem.family for problem in self.problems if problem.family is not None]
        return labels if len(labels) == len(self.problems) and len(set(labels)) >= MIN_FAMILIES else None

    def pass_at(self, k: int) -> Floats:
        """(P,) estimates; that n < 2k is for the report to say, once."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(pass_at_k(self.num_samples_P, self.num_correct_P, k))

    @cached_property
    def greedy_P(self) -> Floats | None:
        """(P,) 0 or 1; None where some problem has no greedy answer."""
        correct = [problem.greedy_correct for problem in self.problems]
        return None if None in correct else np.array(correct, dtype=np.float64)


def _problem(rows: list[records.Record], path: Path) -> Problem:
    first = rows[0]
    for row in rows:
        for field in ("question_hash", "gold", "family"):
            if row[field] != first[field]:
                raise ValueError(f"{path}: problem {first['problem_id']} has two values of {field}")
    rows = sorted(rows, key=lambda row: row["sample"])
    greedy = rows.pop(0) if rows[0]["sample"] == records.GREEDY else None
    return Problem(
        first["problem_id"], first["question_hash"], first["question"], first["gold"], first["family"], rows, greedy
    )


def _refuse_other_problems(a: Evaluation, b: Evaluation) -> None:
    questions_a, questions_b = ({problem.id: problem.question_hash for problem in e.problems} for e in (a, b))
    if questions_a == questions_b:
        return
    differ = sorted({problem for problem, _ in questions_a.items() ^ questions_b.items()})
    raise ValueError(
        f"cannot pair {b.name!r} with {a.name!r}: {len(differ)} problems are in one only or ask different questions, "
        f"such as {', '.join(differ[:3])}"
    )


# The figures: plain dicts that survive a round trip through JSON.


def _report(
    evaluations: list[Evaluation],
    ks: Sequence[int] | None,
    reward: dict[str, Any] | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    n = min(evaluation.n for evaluation in evaluations)
    ks = sorted({1, *ks}) if ks else sorted({2**i for i in range(n.bit_length())} | {n})
    summaries = [_summary(evaluation, ks) for evaluation in evaluations]
    notes = differences([e.name for e in evaluations], [e.header for e in evaluations])
    notes += [note for evaluation in evaluations for note in _warnings(evaluation)]
    if n < 2 * ks[-1] and ks[-1] > 1:
        late = ", ".join(str(k) for k in ks if n < 2 * k)
        notes.append(f"n = {n} is less than 2k for k = {late}: the right end of the curve rests on few subsets.")
    if reward is not None and not reward["step"]:
        notes.append("The metrics hold no reward by step; the figure leaves it out.")
        reward = None
    return {
        "schema": SCHEMA,
        "kind": "comparison" if len(evaluations) > 1 else "evaluation",
        "title": title or _finding(summaries),
        "partial": [evaluation.partial for evaluation in evaluations if evaluation.partial],
        "warnings": notes,
        "n": n,
        "num_problems": len(evaluations[0].problems),
        "evaluations": summaries,
        "comparisons": [_comparison(evaluations[0], other, ks) for other in evaluations[1:]],
        "reward": reward,
        "curve": None,
    }


def _finding(summaries: list[dict[str, Any]]) -> str:
    first, last = summaries[0]["pass_at_k"], summaries[-1]["pass_at_k"]
    if len(summaries) == 2:
        return f"pass@1 {render.percent(first[0]['mean'])} → {render.percent(last[0]['mean'])}"
    if len(summaries) > 2:
        return f"pass@1 of {len(summaries)} evaluations"
    ends = [first[0], first[-1]] if len(first) > 1 else [first[0]]
    return f"{summaries[0]['name']}: " + ", ".join(f"pass@{row['k']} {render.percent(row['mean'])}" for row in ends)


def _summary(evaluation: Evaluation, ks: list[int]) -> dict[str, Any]:
    def interval(values: Iterable[float] | Floats) -> dict[str, float]:
        return asdict(bootstrap(np.asarray(values), evaluation.families))

    problems = evaluation.problems
    samples = [record for problem in problems for record in problem.samples]
    outcomes = Counter(record["outcome"] for record in samples)
    answers = [len({row["prediction"] for row in problem.samples} - {None}) for problem in problems]
    return {
        "name": evaluation.name,
        "header": evaluation.header,
        "num_problems": len(problems),
        "num_samples": len(samples),
        "n": evaluation.n,
        "resampled": "problems" if evaluation.families is None else "families",
        "greedy": None if evaluation.greedy_P is None else interval(evaluation.greedy_P),
        "pass_at_k": [{"k": k, **interval(evaluation.pass_at(k))} for k in ks],
        "maj_at_n": interval([problem.majority for problem in problems]),
        "outcomes": {outcome: outcomes[outcome] / len(samples) for outcome in records.OUTCOMES},
        "truncated": sum(record["truncated"] for record in samples) / len(samples),
        "distinct_answers": sum(answers) / len(problems),
        "mean_thoughts": sum(record["thoughts"] for record in samples) / len(samples),
        "mean_answer_tokens": sum(record["answer_tokens"] for record in samples) / len(samples),
        "problems": {
            "id": [problem.id for problem in problems],
            "num_samples": evaluation.num_samples_P.tolist(),
            "num_correct": evaluation.num_correct_P.tolist(),
            "greedy_correct": [problem.greedy_correct for problem in problems],
        },
        "solved_once": _examples(problem for problem in problems if problem.num_correct == 1),
        "never_solved": _examples(problem for problem in problems if problem.num_correct == 0),
    }


def _examples(problems: Iterable[Problem]) -> dict[str, Any]:
    """How many there are, and the first of them; each with its right completion, or its first where none is right."""
    problems = list(problems)
    shown = []
    for problem in problems[:EXAMPLES]:
        record = next((row for row in problem.samples if row["outcome"] == "correct"), problem.samples[0])
        completion = {field: record[field] for field in ("sample", "outcome", "prediction", "text")}
        shown.append({"id": problem.id, "question": problem.question, "gold": problem.gold, **completion})
    return {"count": len(problems), "examples": shown}


def _comparison(a: Evaluation, b: Evaluation, ks: list[int]) -> dict[str, Any]:
    def paired(values_a: Floats, values_b: Floats) -> dict[str, Any]:
        return asdict(paired_bootstrap(values_a, values_b, a.families))

    greedy = None if a.greedy_P is None or b.greedy_P is None else paired(a.greedy_P, b.greedy_P)
    solved = [(x.num_correct > 0, y.num_correct > 0, x.id) for x, y in zip(a.problems, b.problems, strict=True)]
    return {
        "a": a.name,
        "b": b.name,
        "greedy": greedy,
        "pass_at_k": [{"k": k, **paired(a.pass_at(k), b.pass_at(k))} for k in ks],
        "gained": [problem for by_a, by_b, problem in solved if by_b and not by_a],
        "lost": [problem for by_a, by_b, problem in solved if by_a and not by_b],
    }


def _warnings(evaluation: Evaluation) -> list[str]:
    samples = [record for problem in evaluation.problems for record in problem.samples]
    unparsed = sum(record["outcome"] == "unparsed" for record in samples) / len(samples)
    truncated = sum(record["truncated"] for record in samples) / len(samples)
    notes = []
    if unparsed > MAX_UNPARSED:
        notes.append(
            f"{evaluation.name}: {render.percent(unparsed, 1)} of the samples are unparsed; "
            "their score says more of the format than of the model."
        )
    if truncated > MAX_TRUNCATED:
        notes.append(f"{evaluation.name}: {render.percent(truncated, 1)} of the samples are truncated; raise the cap.")
    families = evaluation.families
    units = len(evaluation.problems) if families is None else len(set(families))
    if units < MIN_UNITS:
        unit = "problems" if families is None else "families"
        notes.append(f"{evaluation.name}: {units} {unit} are few; the intervals are rough.")
    return notes


def _reward(path: Path) -> dict[str, Any]:
    """{"step": [...], "reward": [...]} of a metrics.jsonl; of a step that was logged twice, the later line."""
    by_step: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            logger.warning("%s: skipping an unfinished line", path)
            continue
        if isinstance(row.get("reward"), int | float) and math.isfinite(row["reward"]) and "step" in row:
            by_step[row["step"]] = float(row["reward"])
    steps = sorted(by_step)
    return {"step": steps, "reward": [by_step[step] for step in steps]}


def _write(report: dict[str, Any], evaluations: list[Evaluation], out: Path) -> None:
    pictures = figures.draw(report)
    tables = [render.table(report), render.splits(report)] if report["comparisons"] else [render.table(report)]
    tables += [render.steps(report["curve"])] if report["curve"] else []
    problems = [{problem.id: problem.records for problem in evaluation.problems} for evaluation in evaluations]
    notes = [*(render.provenance(summary) for summary in report["evaluations"]), render.method(report)]
    notes += [render.cost(report["curve"])] if report["curve"] else []
    for name, png in pictures.items():
        write_atomic(out / name, png)
    write_atomic(out / "passk.csv", render.passk_csv(report))
    write_atomic(out / "report.md", render.markdown(report))
    write_atomic(out / "report.html", html.page(report, tables, notes, list(pictures.values()), problems))
    write_atomic(out / "report.json", json.dumps(report, indent=1) + "\n")
