"""Records to report: `build` for one evaluation, `compare` for several over the same problems.

Everything comes from `eval.json` and `records.jsonl` (see `records`); neither torch nor a GPU is needed. Five files
are written, each whole or not at all: report.json holds every figure, and report.md, passk.csv and passk.png are
functions of it alone; report.html adds the problems and completions to browse. A comparison also writes problems.png,
the per-problem scatter.

Where we differ from common practice: greedy and pass@1 (sampled) are separate rows; intervals stand beside every
figure; comparisons are paired by problem and refused where the questions differ.
"""

import csv
import io
import json
import logging
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rl_soft import html, records
from rl_soft.passk import Floats, bootstrap, maj_at_k, paired_bootstrap, pass_at_k

logger = logging.getLogger(__name__)

SCHEMA = 1
MIN_FAMILIES = 10  # with fewer, resampling whole families says little; problems are resampled instead
MIN_UNITS = 30  # problems or families to resample; with fewer, intervals are rough
MAX_UNPARSED = 0.02
MAX_TRUNCATED = 0.05
EXAMPLES = 5

_COLOURS = ("#6e7781", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # grey, then Okabe and Ito's


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


def compare(
    dirs: Sequence[str | Path],
    out: str | Path,
    names: Sequence[str] | None = None,
    metrics: str | Path | None = None,
    title: str | None = None,
    ks: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write the comparison of two or more evaluations of the same problems; each is paired with the first.

    Args:
        dirs: evaluation directories, the one to compare with first.
        out: directory for the files; made if it is missing.
        names: one label for each evaluation; by default the names in their headers.
        metrics: a metrics.jsonl whose `reward` by `step` becomes the right panel of passk.png.
        title: of the report and the figure; by default the finding, such as "pass@1 62 % → 85 %".
        ks: as in `build`.

    Returns:
        What report.json holds.

    Raises:
        FileNotFoundError: a directory or the metrics file is missing.
        ValueError: fewer than two evaluations, names that do not fit, different problems, or what `build` refuses.
    """
    evaluations = [Evaluation.load(Path(directory)) for directory in dirs]
    if len(evaluations) < 2:
        raise ValueError(f"a comparison needs at least two evaluations, not {len(evaluations)}")
    names = [evaluation.name for evaluation in evaluations] if names is None else list(names)
    if len(names) != len(evaluations) or len(set(names)) != len(names):
        raise ValueError(f"{len(evaluations)} evaluations need as many different names, not {names}")
    for evaluation, name in zip(evaluations, names, strict=True):
        evaluation.name = name
        _refuse_other_problems(evaluations[0], evaluation)
    report = _report(evaluations, ks, _reward(Path(metrics)) if metrics else None, title)
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
        return maj_at_k(len(self.samples), self.num_correct, list(wrong.values()), len(self.samples))


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
    notes = [note for evaluation in evaluations for note in _warnings(evaluation)]
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
    }


def _finding(summaries: list[dict[str, Any]]) -> str:
    first, last = summaries[0]["pass_at_k"], summaries[-1]["pass_at_k"]
    if len(summaries) == 2:
        return f"pass@1 {_percent(first[0]['mean'])} → {_percent(last[0]['mean'])}"
    if len(summaries) > 2:
        return f"pass@1 of {len(summaries)} evaluations"
    ends = [first[0], first[-1]] if len(first) > 1 else [first[0]]
    return f"{summaries[0]['name']}: " + ", ".join(f"pass@{row['k']} {_percent(row['mean'])}" for row in ends)


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
    hashes_a, hashes_b = ([problem.question_hash for problem in e.problems] for e in (a, b))

    def paired(values_a: Floats, values_b: Floats) -> dict[str, Any]:
        return asdict(paired_bootstrap(values_a, values_b, a.families, hashes_a=hashes_a, hashes_b=hashes_b))

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
            f"{evaluation.name}: {_percent(unparsed, 1)} of the samples are unparsed; "
            "their score says more of the format than of the model."
        )
    if truncated > MAX_TRUNCATED:
        notes.append(f"{evaluation.name}: {_percent(truncated, 1)} of the samples are truncated; raise the cap.")
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


def model_card(run_dir: str | Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The README.md of a trained model: YAML front matter for the hub, and the report's figures.

    Args:
        run_dir: the run; its name is the model's.
        report: what `build` or `compare` returned; the last evaluation is the model's.
        config: the resolved recipe, flat. Its `base_model`, else `model_name_or_path`, is the base model; the front
            matter has it if it is a hub id.
    """
    name, last = Path(run_dir).resolve().name, report["evaluations"][-1]
    header, method = last["header"], str(config.get("method", "soft thinking"))
    base = config.get("base_model") or config.get("model_name_or_path")
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["rl-soft", "soft-thinking", method, *([config["thought"]] if config.get("thought") else [])],
    }
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) and not Path(base).exists():
        front["base_model"] = str(base)
    metrics = [{"type": "pass@k", "name": f"pass@{row['k']}", "value": row["mean"]} for row in last["pass_at_k"]]
    if last["greedy"]:
        metrics.insert(0, {"type": "accuracy", "name": "greedy", "value": last["greedy"]["mean"]})
    dataset = {"name": header["dataset"], "type": header["dataset"], "split": header["split"]}
    results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}]
    front["model-index"] = [{"name": name, "results": results}]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}", ""]
    lines += [f"**Partial records.** {'; '.join(report['partial'])}.", ""] if report["partial"] else []
    lines += [
        f"Trained with rl_soft by `{method}`"
        + (f" from {_code(str(base))}" if base else "")
        + ": the model thinks in "
        "soft tokens, so it needs rl_soft to decode as it was evaluated.",
        "",
        f"## Results: {report['title']}",
        "",
        *(f"{_provenance(summary)}  " for summary in report["evaluations"]),
        "",
        *_markdown_table(table(report)),
        "",
        _method(report),
    ]
    lines += ["", "## Warnings", "", *(f"- {note}" for note in report["warnings"])] if report["warnings"] else []
    shown = {key: value for key, value in config.items() if isinstance(value, str | int | float) and value != ""}
    settings = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in shown.items())
    lines += ["", "## Configuration", "", f"```yaml\n{settings}\n```"] if shown else []
    return "\n".join(lines) + "\n"


# The files.


def _write(report: dict[str, Any], evaluations: list[Evaluation], out: Path) -> None:
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a $ in a name is a dollar
        pictures = {"passk.png": _curves(report)}
        if report["comparisons"]:
            pictures["problems.png"] = _scatter(report)
    tables = [table(report), _splits(report)] if report["comparisons"] else [table(report)]
    problems = [{problem.id: problem.records for problem in evaluation.problems} for evaluation in evaluations]
    notes = [*(_provenance(summary) for summary in report["evaluations"]), _method(report)]
    for name, png in pictures.items():
        records.write_atomic(out / name, png)
    records.write_atomic(out / "passk.csv", _csv(report))
    records.write_atomic(out / "report.md", _markdown(report))
    records.write_atomic(out / "report.html", html.page(report, tables, notes, list(pictures.values()), problems))
    records.write_atomic(out / "report.json", json.dumps(report, indent=1) + "\n")


def _csv(report: dict[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["evaluation", "metric", "k", "mean", "low", "high", "se", "problems", "n"])

    def row(name: str, metric: str, k: object, values: dict[str, Any], n: int) -> None:
        figures = [f"{values[field]:.6f}" for field in ("mean", "low", "high", "se")]
        writer.writerow([name, metric, k, *figures, report["num_problems"], n])

    for summary in report["evaluations"]:
        if summary["greedy"]:
            row(summary["name"], "greedy", "", summary["greedy"], 1)
        for values in summary["pass_at_k"]:
            row(summary["name"], "pass", values["k"], values, summary["n"])
        row(summary["name"], "maj", summary["n"], summary["maj_at_n"], summary["n"])
    for pair in report["comparisons"]:
        name = f"{pair['b']} - {pair['a']}"
        if pair["greedy"]:
            row(name, "greedy difference", "", pair["greedy"], 1)
        for values in pair["pass_at_k"]:
            row(name, "pass difference", values["k"], values, report["n"])
    return file.getvalue()


def _markdown(report: dict[str, Any]) -> str:
    summaries, pairs = report["evaluations"], report["comparisons"]
    lines = [f"**Partial records.** {'; '.join(report['partial'])}.", ""] if report["partial"] else []
    lines += [f"# {report['title']}", ""]
    lines += [f"{_provenance(summary)}  " for summary in summaries]
    lines += ["", "![Pass@k](passk.png)", "", *_markdown_table(table(report))]
    if pairs:
        lines += ["", *_markdown_table(_splits(report))]
    lines += ["", _method(report), ""]
    for summary in summaries:
        shares = ", ".join(f"{outcome} {_percent(share, 1)}" for outcome, share in summary["outcomes"].items())
        lines.append(
            f"- {summary['name']}: {shares}; truncated {_percent(summary['truncated'], 1)}; "
            f"{summary['distinct_answers']:.1f} distinct answers a problem, {summary['mean_thoughts']:.1f} thoughts "
            f"and {summary['mean_answer_tokens']:.1f} answer tokens a sample."
        )
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {note}" for note in report["warnings"])]
    if pairs:
        lines += ["", "## Problems gained and lost", "", "![One point a problem](problems.png)"]
    for pair in pairs:
        for verb, by, but in (("gained", pair["b"], pair["a"]), ("lost", pair["a"], pair["b"])):
            ids = ", ".join(f"`{problem}`" for problem in pair[verb][:20]) or "none"
            more = f" and {len(pair[verb]) - 20} more (report.json)" if len(pair[verb]) > 20 else ""
            lines += ["", f"{verb.capitalize()}, solved by {by} in some sample and by {but} in none "]
            lines[-1] += f"({len(pair[verb])}): {ids}{more}."
    last = summaries[-1]
    for field, heading in (("solved_once", "Solved once"), ("never_solved", "Never solved")):
        lines += ["", f"## {heading} by {last['name']}: {last[field]['count']} problems"]
        for example in last[field]["examples"]:
            lines += ["", f"`{example['id']}`, gold {_code(example['gold'])}, sample {example['sample']} "]
            lines[-1] += f"is {example['outcome']}:"
            lines += ["", _fenced(example["question"] + "\n---\n" + example["text"])]
    return "\n".join(lines) + "\n"


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the first their head: greedy, pass@k and maj@n with intervals, and the paired differences."""
    summaries, pairs = report["evaluations"], report["comparisons"]
    names = [summary["name"] for summary in summaries] if pairs else ["estimate"]
    names += [f"{pair['b']} − {pair['a']}" for pair in pairs] if len(pairs) > 1 else ["Δ points"] * len(pairs)

    def row(label: str, of_summaries: list[Any], of_pairs: list[Any]) -> list[str]:
        cells = [label]
        for values in of_summaries:
            low, high = (_percent(values[end], 1) for end in ("low", "high")) if values else ("", "")
            cells += [_percent(values["mean"], 1), f"{low} – {high}"] if values else ["", ""]
        for values in of_pairs:
            low, high = (_points(values[end]) for end in ("low", "high")) if values else ("", "")
            cells += [_points(values["mean"]), f"{low} to {high}"] if values else ["", ""]
        return cells

    rows = [["", *(head for name in names for head in (name, "95 % CI"))]]
    if any(summary["greedy"] for summary in summaries):
        rows.append(row("greedy", [s["greedy"] for s in summaries], [p["greedy"] for p in pairs]))
    for i, values in enumerate(summaries[0]["pass_at_k"]):
        label = f"pass@{values['k']}"
        rows.append(row(label, [s["pass_at_k"][i] for s in summaries], [p["pass_at_k"][i] for p in pairs]))
    rows.append(row("maj@n", [s["maj_at_n"] for s in summaries], [None] * len(pairs)))
    return rows


def _splits(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the first their head: how many problems rose and fell, for every comparison."""
    rows = [["", "", "problems gained / lost / tied", "share of resamples ≤ 0"]]
    for pair in report["comparisons"]:
        values = [("greedy", pair["greedy"])] if pair["greedy"] else []
        values += [(f"pass@{row['k']}", row) for row in pair["pass_at_k"]]
        for label, row in values:
            split = f"{row['gained']} / {row['lost']} / {row['tied']}"
            rows.append([f"{pair['b']} − {pair['a']}", label, split, f"{row['share_not_positive']:.4f}"])
    return rows


def _markdown_table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def _provenance(summary: dict[str, Any]) -> str:
    """One line: what was evaluated, how, and with which code."""
    header = summary["header"]
    decoder = ", ".join(f"{key} {value}" for key, value in header["decoder"].items())
    versions = ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items())
    parts = [
        f"{summary['name']}: {header['model']}",
        f"{header['dataset']} ({header['split']})",
        f"{summary['num_problems']:,} problems × n = {summary['n']}",
        f"decoder: {decoder}" if decoder else "",
        f"seed {header['seed']}",
        versions,
        f"commit {header['git_commit'][:12]}" if header.get("git_commit") else "",
    ]
    return " · ".join(part for part in parts if part)


def _method(report: Mapping[str, Any]) -> str:
    unit = report["evaluations"][0]["resampled"]
    text = (
        "Unbiased pass@k from all samples; greedy is one deterministic answer and is not pass@1. maj@n is the "
        f"plurality of all samples. Intervals: BCa bootstrap over {unit}, 10,000 resamples."
    )
    if report["comparisons"]:
        text += " Differences are paired by problem, in percentage points."
    if len(report["comparisons"]) > 1:
        text += f" {len(report['comparisons'])} comparisons are made; their intervals are not adjusted for that."
    return text


def _percent(share: float, digits: int = 0) -> str:
    if digits == 0 and 0 < share < 1 and round(100 * share) in (0, 100):  # 99.5 % is not all
        digits = 1
    return f"{100 * share:.{digits}f} %"


def _points(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f}".replace("-", "−")


def _fence(text: str, shortest: int) -> str:
    """Backticks enough to enclose a text that may itself hold backticks."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


def _code(text: str) -> str:
    fence = _fence(text, 1)
    padding = " " if len(fence) > 1 else ""
    return f"{fence}{padding}{' '.join(text.split())}{padding}{fence}"


def _fenced(text: str, limit: int = 1500) -> str:
    text = text if len(text) <= limit else text[:limit] + " […]"
    fence = _fence(text, 3)
    return f"{fence}text\n{text}\n{fence}"


# The figures as pictures: functions of the report alone.


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # Figure alone needs neither pyplot nor a display

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def _png(figure: Any, title: str, caption: str) -> bytes:
    title = textwrap.fill(title, int(8 * figure.get_figwidth()), max_lines=2, placeholder=" …")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color="#57606a")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _short(text: str, limit: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8c959f")
    axes.tick_params(colors="#424a53", labelsize=8.5)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)


def _curves(report: dict[str, Any]) -> bytes:
    """Pass@k by k with bands and greedy levels; beside it the reward by training step, where there is one."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    reward, summaries = report["reward"], report["evaluations"]
    figure = _figure(10.5 if reward else 6.6, 4.3)
    left = figure.subplots(1, 2 if reward else 1, width_ratios=[1.15, 1] if reward else None, squeeze=False)[0, 0]
    _clean(left)
    colours = _COLOURS if len(summaries) > 1 else _COLOURS[1:]
    labels, bounds = [], []
    for i, summary in enumerate(summaries):
        colour, rows = colours[i % len(colours)], summary["pass_at_k"]
        k, mean, low, high = ([row[field] for row in rows] for field in ("k", "mean", "low", "high"))
        left.fill_between(k, low, high, color=colour, alpha=0.18, linewidth=0)
        left.plot(k, mean, color=colour, linewidth=2, marker="o", markersize=4.5)
        late = [(row["k"], row["mean"]) for row in rows if summary["n"] < 2 * row["k"]]
        if late:
            left.plot(*zip(*late, strict=True), "o", color="white", markeredgecolor=colour, markersize=4.5)
        above = mean[0] >= max(other["pass_at_k"][0]["mean"] for other in summaries)
        left.annotate(
            _percent(mean[0]),
            (k[0], high[0] if above else low[0]),
            xytext=(0, 4 if above else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color=colour,
            fontsize=9,
            fontweight="bold",
        )
        labels.append((mean[-1], f"{_short(summary['name'])}, {_percent(mean[-1])}", colour, "bold"))
        bounds += [low[0], high[0], low[-1], high[-1]]
        if summary["greedy"]:
            level = summary["greedy"]["mean"]
            left.axhline(level, color=colour, linestyle=":", linewidth=1.3)
            labels.append((level, f"{_short(summary['name'])} greedy, {_percent(level)}", colour, "normal"))
            bounds.append(level)
    bottom = max(0.0, math.floor(10 * min(bounds) - 0.5) / 10)
    top = min(1.0, math.ceil(10 * max(bounds) + 0.1) / 10)
    left.set_ylim(bottom, top + 0.02 * (top - bottom))
    ks = [row["k"] for row in summaries[0]["pass_at_k"]]
    left.set_xscale("log", base=2)
    left.set_xlim(ks[0] / 1.25, ks[-1] * 1.12)
    left.set_xticks(ks, [str(k) for k in ks])
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    left.set_xlabel("k, samples a problem", fontsize=9)
    left.set_title("Pass@k", loc="left", fontsize=10)
    for y, (_, text, colour, weight) in zip(_apart(labels, 0.055 * (top - bottom)), labels, strict=True):
        left.annotate(
            text,
            (1.02, min(y, top)),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=9,
            fontweight=weight,
            annotation_clip=False,
        )
    if reward:
        _reward_panel(figure.axes[1], reward)
    unit = summaries[0]["resampled"]
    caption = f"n = {report['n']} samples × P = {report['num_problems']:,} problems. Bands: 95 %, over {unit}."
    caption += " Dotted: greedy." if any(summary["greedy"] for summary in summaries) else ""
    caption += " Hollow: n < 2k." if report["n"] < 2 * ks[-1] else ""
    if len(report["comparisons"]) == 1:
        delta = report["comparisons"][0]["pass_at_k"][0]
        spread = f"{_points(delta['low'])} to {_points(delta['high'])}"
        caption += f"\nPaired change of pass@1: {_points(delta['mean'])} points, 95 % CI {spread}."
    partial = "  (partial records)" if report["partial"] else ""
    return _png(figure, report["title"] + partial, caption)


def _apart(labels: list[tuple[float, str, str, str]], gap: float) -> list[float]:
    """Heights for labels: at their levels, moved down just enough to stand `gap` apart, then centred as a whole."""
    order = sorted(range(len(labels)), key=lambda i: -labels[i][0])
    heights = [0.0] * len(labels)
    for above, i in zip([None, *order], order, strict=False):
        heights[i] = labels[i][0] if above is None else min(labels[i][0], heights[above] - gap)
    shift = sum(label[0] - height for label, height in zip(labels, heights, strict=True)) / len(labels)
    return [height + shift for height in heights]


def _reward_panel(axes: Any, reward: dict[str, Any]) -> None:
    step, value = np.array(reward["step"]), np.array(reward["reward"])
    width = max(1, len(value) // 20)
    _clean(axes)
    if width > 1:
        totals = np.cumsum(np.insert(value, 0, 0.0))
        smooth = (totals[width:] - totals[:-width]) / width
        axes.plot(step, value, color=_COLOURS[1], linewidth=0.8, alpha=0.35)
        axes.plot(step[width - 1 :], smooth, color=_COLOURS[1], linewidth=2)
    else:
        axes.plot(step, value, color=_COLOURS[1], linewidth=2, marker="o", markersize=3)
    axes.set_xlabel("training step", fontsize=9)
    note = f" (bold: mean of {width} steps)" if width > 1 else ""
    axes.set_title(f"Reward{note}", loc="left", fontsize=10)


def _scatter(report: dict[str, Any]) -> bytes:
    """One point a problem: its share of correct samples in a (x) and in b (y), for every comparison."""
    from matplotlib.ticker import PercentFormatter

    pairs, by_name = report["comparisons"], {summary["name"]: summary for summary in report["evaluations"]}
    figure = _figure(4.8 * len(pairs), 5.0)
    for i, (axes, pair) in enumerate(zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True)):
        a, b = (by_name[pair[side]]["problems"] for side in "ab")
        points = Counter(
            zip(
                (c / n for c, n in zip(a["num_correct"], a["num_samples"], strict=True)),
                (c / n for c, n in zip(b["num_correct"], b["num_samples"], strict=True)),
                strict=True,
            )
        )
        x, y = zip(*points, strict=True)
        area = [12 * count for count in points.values()]
        _clean(axes)
        axes.plot([0, 1], [0, 1], color="#8c959f", linewidth=0.8)
        axes.scatter(x, y, s=area, color=_COLOURS[(i + 1) % len(_COLOURS)], alpha=0.55, linewidths=0, clip_on=False)
        axes.set_aspect("equal")
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.set_xlabel(f"{_short(pair['a'])}: correct samples", fontsize=9)
        axes.set_ylabel(f"{_short(pair['b'])}: correct samples", fontsize=9)
        values = pair["pass_at_k"][0]
        split = f"{values['gained']} better, {values['lost']} worse, {values['tied']} equal"
        axes.set_title(split, loc="left", fontsize=10)
    return _png(figure, "Problem by problem", "Area: number of problems at a point. Above the line: better.")
