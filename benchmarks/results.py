"""The tables of docs/results.md, from the reports of finished runs.

    for s in 1 2 3; do ./launch.sh recipes/grpo_gumbel.yaml --seed $s; done
    python benchmarks/results.py                # runs/grpo_gumbel-seed*; prints Markdown

Copies each run's figures (report.json without its lists of problems) to docs/results/, so that the page's numbers have
a committed source.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def percent(row: dict) -> str:
    return f"{100 * row['mean']:.1f} % ({100 * row['low']:.1f} – {100 * row['high']:.1f})"


def points(row: dict) -> str:
    return f"{100 * row['mean']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def main() -> None:
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


if __name__ == "__main__":
    main()
