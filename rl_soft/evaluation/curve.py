"""The evaluations of a run by its optimizer steps: before it, while it trains, and what they cost.

A run directory holds `eval_before`, `eval_during/step-N` and `eval_after`. The curve is made of their records; the
report of the run shows it. Neither torch nor a GPU is needed.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rl_soft.evaluation import report as reports
from rl_soft.evaluation.passk import bootstrap, paired_bootstrap
from rl_soft.evaluation.records import OUTCOMES
from rl_soft.evaluation.report import Evaluation

DURING = "eval_during"  # in a run directory, with a folder step-N for each evaluation
METRICS = "metrics.json"  # in such a folder, once it is complete


def figures_of(folder: Path, ks: list[int]) -> dict[str, float]:
    """Name -> value of one evaluation: `config.evaluations.metric_names` but its cost. Intervals as in a report."""
    evaluation = Evaluation.load(folder)
    figures: dict[str, float] = {}
    for k in sorted({1, *ks}):
        interval = bootstrap(evaluation.pass_at(k), evaluation.families)
        figures |= {f"pass@{k}": interval.mean, f"pass@{k}_low": interval.low, f"pass@{k}_high": interval.high}
    problems = evaluation.problems
    samples = [record for problem in problems for record in problem.samples]
    if evaluation.greedy_P is not None:
        figures["greedy"] = float(evaluation.greedy_P.mean())
    figures["maj@n"] = sum(problem.majority for problem in problems) / len(problems)
    for outcome in OUTCOMES[1:]:
        figures[outcome] = sum(record["outcome"] == outcome for record in samples) / len(samples)
    for name, field in (("truncated", "truncated"), ("thoughts", "thoughts"), ("answer_tokens", "answer_tokens")):
        figures[name] = sum(record[field] for record in samples) / len(samples)
    return figures


def curve_of(run: Path) -> dict[str, Any] | None:
    """The curve of a run, as plain figures; None where nothing was evaluated while it trained.

    Returns:
        points, by step, the first of them before RL: `step`, `pass_at_k` (k, mean, low, high, se), `greedy`, `seconds`
        and `change`, the paired difference of pass@1 to the first. metric, best_step, loaded: by what the best one was
        chosen, where it is, and whether it became the model. seconds: of all evaluations while training; share: of
        these and of the training steps together, None where nothing was logged.
    """
    done = {int(file.parent.name.rpartition("-")[2]): file for file in (run / DURING).glob(f"step-*/{METRICS}")}
    if not done:
        return None
    config = yaml.safe_load((run / "config.yaml").read_text())
    ks = sorted({1, *config.get("eval_k", [])})
    folders = {0: run / "eval_before"} | {step: done[step].parent for step in sorted(done)}
    figures = {step: json.loads(file.read_text()) for step, file in done.items()}
    first, points = Evaluation.load(folders[0]), []
    for step, folder in folders.items():
        evaluation = Evaluation.load(folder) if step else first
        change = asdict(paired_bootstrap(first.pass_at(1), evaluation.pass_at(1), first.families)) if step else None
        greedy = None if evaluation.greedy_P is None else float(evaluation.greedy_P.mean())
        intervals = [{"k": k, **asdict(bootstrap(evaluation.pass_at(k), evaluation.families))} for k in ks]
        seconds = figures[step]["seconds"] if step else None
        points.append({"step": step, "pass_at_k": intervals, "greedy": greedy, "change": change, "seconds": seconds})
    metric = str(config.get("metric_for_best_model") or "pass@1").removeprefix("eval_")
    higher = config.get("greater_is_better")
    sign = -1 if higher is False else 1
    best = max(sorted(done), key=lambda step: sign * figures[step][metric])
    seconds = sum(held["seconds"] for held in figures.values())
    trained = _seconds_of_steps(run / "metrics.jsonl")
    return {
        "points": points,
        "n": first.n,
        "num_problems": len(first.problems),
        "metric": metric,
        "best_step": best,
        "loaded": bool(config.get("load_best_model_at_end")),
        "seconds": seconds,
        "share": seconds / (seconds + trained) if trained else None,
    }


def _seconds_of_steps(path: Path) -> float:
    """What the optimizer steps of a metrics.jsonl took; of a step that was logged twice, the later line."""
    by_step: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            by_step[row["step"]] = sum(v for k, v in row.items() if k.startswith("seconds/") and v is not None)
    return sum(by_step.values())


def report_run(run: Path) -> dict[str, Any]:
    """Write the report of a run into its directory: before against after, with the reward and the curve by step.

    Returns:
        What report.json holds.

    Raises:
        FileNotFoundError, ValueError: see `report.compare`.
    """
    config = yaml.safe_load((run / "config.yaml").read_text())
    return reports.compare(
        [run / "eval_before", run / "eval_after"],
        out=run,
        names=["before RL", "after RL"],
        metrics=run / "metrics.jsonl",
        ks=config.get("eval_k"),
        curve=curve_of(run),
    )
