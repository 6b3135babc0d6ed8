"""Learning on the embedded task: one run an arm and seed, then one table and one picture.

    python benchmarks/learning.py [--arms NAME ...] [--seeds 1 2 3] [--jobs 2] [--out runs/learning]

Every run is a recipe with a few overrides, on the warm start of its seed, which must be there; docs/grpo.md has the
ratios; `all-V product` and `K terms` are what public code puts there. Runs that are finished are not repeated, so the
command resumes. Reported for each arm: optimizer steps until the mean reward of 10 steps reaches 0.80, the mean reward
of the last 40 steps, pass@1 and pass@16 on held-out problems with 95 % intervals (bootstrap over the problems of all
seeds), and the difference of pass@1 from K = 1 of the same method at its best learning rate, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rl_soft.evaluation import passk
from rl_soft.evaluation.records import read

TARGET, WINDOW, LAST = 0.80, 10, 40
REWARD = "rewards/math_accuracy/mean"
COLORS = {"token": "k", "top1": "C0", "conditional": "C2", "joint": "C3"}  # the others are grey
CURVES = ("token lr=3e-4", "top1 K=4 lr=3e-4", "conditional K=V lr=3e-4", "joint K=4 lr=3e-4", "joint K=4")
COMMON: dict[str, Any] = {
    "prompts_per_step": 32,
    "max_steps": 160,
    "per_device_train_batch_size": 256,
    "learning_rate": 1.5e-4,
    "eval_problems": 128,
    "eval_samples": 16,
    "save_steps": 160,
}
TOKEN, TOP1, CONDITIONAL = {"thought": "token"}, {"ratio": "top1"}, {"ratio": "conditional"}
JOINT, FACTORED, PATHWISE = {"ratio": "joint"}, {"ratio": "factored", "rest_weight": 0.25}, {"ratio": "pathwise"}
PPO = {"recipe": "recipes/ppo_gumbel.yaml", "prompts_per_step": 256}
FAST = {"learning_rate": 3e-4}
ARMS: dict[str, dict[str, Any]] = {
    "token": TOKEN,
    "token lr=3e-4": TOKEN | FAST,
    "joint K=4": JOINT,
    "joint K=4 lr=3e-4": JOINT | FAST,
    "top1 K=4": TOP1,
    "top1 K=4 lr=3e-4": TOP1 | FAST,
    "conditional K=V": CONDITIONAL | {"thought_k": 0},
    "conditional K=V lr=3e-4": CONDITIONAL | {"thought_k": 0} | FAST,
    "conditional K=4": CONDITIONAL,
    "joint K=2": JOINT | {"thought_k": 2},
    "joint K=8": JOINT | {"thought_k": 8},
    "factored x.25 K=4": FACTORED,
    "pathwise K=V": PATHWISE | {"thought_k": 0},
    "joint K=4 clip=.4": JOINT | {"thought_epsilon": 0.4},
    "top1 K=2 lr=3e-4": TOP1 | {"thought_k": 2} | FAST,
    "top1 K=8 lr=3e-4": TOP1 | {"thought_k": 8} | FAST,
    "top1 K=4 tau=.1 lr=3e-4": TOP1 | {"thought_tau": 0.1} | FAST,
    "top1 K=4 tau=1 lr=3e-4": TOP1 | {"thought_tau": 1.0} | FAST,
    "dirichlet K=4": JOINT | {"thought": "dirichlet"},
    "all-V product K=4": JOINT | {"public": "product"},
    "K terms K=4": JOINT | {"public": "terms"},
    "ppo token lr=3e-4": PPO | TOKEN | FAST,
    "ppo joint K=4": PPO | JOINT,
    "ppo top1 K=4 lr=3e-4": PPO | TOP1 | FAST,
    "ppo top1 K=2 lr=3e-4": PPO | TOP1 | {"thought_k": 2} | FAST,
    "ppo top1 K=8 lr=3e-4": PPO | TOP1 | {"thought_k": 8} | FAST,
    "ppo top1 K=4 tau=.1 lr=3e-4": PPO | TOP1 | {"thought_tau": 0.1} | FAST,
    "ppo top1 K=4 tau=1 lr=3e-4": PPO | TOP1 | {"thought_tau": 1.0} | FAST,
}


def folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{''.join(c if c.isalnum() or c in '.=' else '_' for c in arm)}-seed{seed}"


def train(out: Path, arm: str, seed: int) -> str:
    """Run one arm on one seed, or what is left of it."""
    run = folder(out, arm, seed)
    if (run / "report.md").exists():
        return f"{arm}, seed {seed}: was there"
    overrides = {"output_dir": run, "seed": seed} | COMMON | ARMS[arm]
    recipe, public = overrides.pop("recipe", "recipes/grpo_gumbel.yaml"), overrides.pop("public", None)
    words = [f"--{key}={json.dumps(v) if isinstance(v, list | dict) else v}" for key, v in overrides.items()]
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with open(f"{run}.log", "a") as log:
        program = ["benchmarks/public_densities.py", public] if public else ["-m", "rl_soft"]
        command = [sys.executable, *program, recipe, *words]
        code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    return f"{arm}, seed {seed}: {f'exit {code}, see {run}.log' if code else f'{time.time() - started:.0f} s'}"


def baseline(arm: str) -> str:
    return "ppo token lr=3e-4" if arm.startswith("ppo") else "token lr=3e-4"


def rewards_by_step(run: Path) -> np.ndarray:
    """Mean reward of each rollout, in order; after a resume the last line of a step counts."""
    by_step = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "reward" in values:
            by_step[values["step"]] = values[REWARD] if REWARD in values else values["reward"]
    return np.array([by_step[step] for step in sorted(by_step)])


def steps_to(rewards: np.ndarray, steps_per_rollout: int) -> float | None:
    """Optimizer steps until the mean reward of WINDOW steps has reached TARGET; None if it never does."""
    width = max(1, WINDOW // steps_per_rollout)
    smooth = np.convolve(rewards, np.ones(width) / width, "valid")
    reached = np.flatnonzero(smooth >= TARGET)
    return float((reached[0] + width) * steps_per_rollout) if len(reached) else None


def solved(run: Path, k: int) -> dict[str, float]:
    """pass@k of each held-out problem."""
    counts: dict[str, list[int]] = {}
    for record in read(run / "eval_after" / "records.jsonl"):
        if record["sample"] >= 0:
            n_c = counts.setdefault(record["problem_id"], [0, 0])
            n_c[0] += 1
            n_c[1] += record["outcome"] == "correct"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # n = k
        return {problem: float(passk.pass_at_k(n, c, k)) for problem, (n, c) in sorted(counts.items())}


def summarise(out: Path, arms: list[str], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Figures of the arms of which every seed is done."""
    table: dict[str, dict[str, Any]] = {}
    per_problem: dict[str, np.ndarray] = {}
    for arm in arms:
        runs = [folder(out, arm, seed) for seed in seeds]
        if not all((run / "report.md").exists() for run in runs):
            continue
        curves = [rewards_by_step(run) for run in runs]
        steps = COMMON["max_steps"] // len(curves[0])
        last = [float(curve[-LAST // steps :].mean()) for curve in curves]
        per_problem[arm] = np.array([value for run in runs for value in solved(run, 1).values()])
        sixteen = np.array([value for run in runs for value in solved(run, 16).values()])
        table[arm] = {
            "curves": [curve.tolist() for curve in curves],
            "steps_per_rollout": steps,
            "steps_to_target": [steps_to(curve, steps) for curve in curves],
            "last": last,
            "pass@1": vars(passk.bootstrap(per_problem[arm])),
            "pass@16": vars(passk.bootstrap(sixteen)),
        }
    for arm, row in table.items():
        if baseline(arm) in per_problem and arm != baseline(arm):
            row["paired"] = vars(passk.paired_bootstrap(per_problem[baseline(arm)], per_problem[arm]))
    return table


def show(table: dict[str, dict[str, Any]], seeds: list[int]) -> None:
    def interval(row: dict[str, float], sign: str = "") -> str:
        return f"{100 * row['mean']:{sign}.1f} ({100 * row['low']:{sign}.1f} to {100 * row['high']:{sign}.1f})"

    print(
        f"\n| arm | steps to {TARGET} (seeds) | reward, last {LAST} steps (seeds) | pass@1, % | pass@16, % "
        f"| against {baseline('')} (ppo: {baseline('ppo')}), points |"
    )
    print("|---|---|---|---|---|---|")
    for arm, row in sorted(table.items(), key=lambda item: -item[1]["pass@1"]["mean"]):
        steps = ", ".join("not reached" if s is None else f"{s:.0f}" for s in row["steps_to_target"])
        last = f"{np.mean(row['last']):.3f} ({', '.join(f'{x:.3f}' for x in row['last'])})"
        paired = interval(row["paired"], "+") if "paired" in row else ""
        print(f"| {arm} | {steps} | {last} | {interval(row['pass@1'])} | {interval(row['pass@16'])} | {paired} |")


def color_of(arm: str) -> str:
    return COLORS.get(arm.removeprefix("ppo ").split()[0], "C7")


def draw(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Final pass@1 with its interval, and the reward curves of the main arms; PPO's are open and dashed."""
    order = sorted(table, key=lambda arm: table[arm]["pass@1"]["mean"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.6, 0.27 * len(order) + 1)), width_ratios=[1, 1.1])
    for y, arm in enumerate(order):
        row = table[arm]["pass@1"]
        color = color_of(arm)
        left.plot([100 * row["low"], 100 * row["high"]], [y, y], color=color, lw=1.5)
        left.plot(100 * row["mean"], y, "o", color=color, ms=4, mfc="w" if arm.startswith("ppo") else color)
    left.set_yticks(range(len(order)), order, fontsize=8)
    left.set_xlabel("held-out pass@1, %, with 95 % intervals")
    for arm in (a for a in order[::-1] if a.removeprefix("ppo ") in CURVES):
        curves = np.array(table[arm]["curves"]).mean(0)
        width = 5
        smooth = np.convolve(curves, np.ones(width) / width, "valid")
        x = (np.arange(len(smooth)) + width / 2) * table[arm]["steps_per_rollout"]
        ppo = arm.startswith("ppo")
        right.plot(x, smooth, label=arm, color=color_of(arm), lw=1.3, ls="--" if ppo else "-")
    right.set(xlabel="optimizer step", ylabel="reward, mean of the seeds")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--figure", type=Path, default=Path("docs/learning.png"))
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in pool.map(lambda job: train(args.out, *job), [(arm, s) for arm in args.arms for s in args.seeds]):
            print(line, flush=True)
    table = summarise(args.out, args.arms, args.seeds)
    show(table, args.seeds)
    draw(table, args.figure)
    for row in table.values():
        row["curves"] = [[round(x, 4) for x in curve] for curve in row["curves"]]
    args.figure.with_suffix(".json").write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
