"""The tables of docs/results.md, from the reports of finished runs.

    for s in 1 2 3; do ./launch.sh recipes/grpo_gumbel.yaml --seed $s; done
    python benchmarks/results.py                # runs/grpo_gumbel-seed*; prints Markdown
    python benchmarks/results.py --against "runs/joint-seed{seed}"    # also pass@1 after RL against that of other runs

Differences are paired by problem and sample address; over all seeds, whole problems are resampled, with the draws of
every seed. Copies each run's figures (report.json without its lists of problems) to docs/results/, so that the page's
numbers have a committed source.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from rl_soft.evaluation import passk
from rl_soft.evaluation.records import GREEDY, read

ROOT = Path(__file__).parents[1]


def percent(row: dict) -> str:
    return f"{100 * row['mean']:.1f} % ({100 * row['low']:.1f} – {100 * row['high']:.1f})"


def points(row: dict) -> str:
    return f"{100 * row['mean']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def solved(run: Path) -> dict[str, float]:
    """problem -> share of its samples that are correct, after RL."""
    found: dict[str, list[bool]] = {}
    for record in read(run / "eval_after" / "records.jsonl"):
        if record["sample"] != GREEDY:
            found.setdefault(record["problem_id"], []).append(record["outcome"] == "correct")
    return {problem: float(np.mean(outcomes)) for problem, outcomes in sorted(found.items())}


def compare(runs: list[Path], pattern: str) -> None:
    """pass@1 of `runs` less that of the runs of the same seeds that `pattern` names."""
    ours, theirs = [], []
    print(f"\nseed: pass@1, against {pattern}, difference in points")
    for run in runs:
        seed = run.name.removeprefix("grpo_gumbel-seed")
        a, b = solved(ROOT / pattern.format(seed=seed)), solved(run)
        ours.append([b[problem] for problem in a])
        theirs.append(list(a.values()))
        difference = points(vars(passk.paired_bootstrap(theirs[-1], ours[-1])))
        print(f"{seed}: {100 * np.mean(ours[-1]):.1f}, {100 * np.mean(theirs[-1]):.1f}, {difference}")
    problems = [i for row in ours for i in range(len(row))]
    pooled = passk.paired_bootstrap(np.ravel(theirs), np.ravel(ours), problems)
    print(f"all: {points(vars(pooled))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PATTERN", help="other runs, {seed} standing for the seed")
    args = parser.parse_args()
    runs = sorted((ROOT / "runs").glob("grpo_gumbel-seed*"))
    out = ROOT / "docs" / "results"
    out.mkdir(exist_ok=True)
    print("| seed | | before RL | after RL | paired difference, points |")
    print("|---|---|---:|---:|---:|")
    for run in runs:
        report = json.loads((run / "report.json").read_text())
        before, after = report["evaluations"]
        change = report["comparisons"][0]
        seed = run.name.removeprefix("grpo_gumbel-seed")
        for name, a, b, d in [
            ("greedy", before["greedy"], after["greedy"], change["greedy"]),
            *(
                (f"pass@{x['k']}", x, y, z)
                for x, y, z in zip(before["pass_at_k"], after["pass_at_k"], change["pass_at_k"], strict=True)
                if x["k"] in (1, 4, 16)
            ),
        ]:
            print(f"| {seed} | {name} | {percent(a)} | {percent(b)} | {points(d)} |")
        for evaluation in report["evaluations"]:
            for key in ("problems", "solved_once", "never_solved"):
                evaluation.pop(key, None)
        for key in ("gained", "lost"):
            change.pop(key, None)
        (out / f"{run.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n| seed | warm start, steps | largest density gap | thoughts clipped | answer tokens clipped |")
    print("|---|---:|---:|---:|---:|")
    for run in runs:
        seed = run.name.removeprefix("grpo_gumbel-seed")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "rollout/density_gap" in line and "loss" in line]
        second = [line for line in steps if "reward" not in line]  # the passes whose ratio is not 1
        warm = (ROOT / "runs" / f"codi-seed{seed}" / "metrics.jsonl").read_text().splitlines()
        print(
            f"| {seed} | {max(json.loads(line)['step'] for line in warm)} "
            f"| {max(line['rollout/density_gap'] for line in steps):.1e} "
            f"| {sum(line['thoughts/clip_fraction'] for line in second) / len(second):.1%} "
            f"| {sum(line['answer/clip_fraction'] for line in second) / len(second):.1%} |"
        )
    if args.against:
        compare(runs, args.against)


if __name__ == "__main__":
    main()
