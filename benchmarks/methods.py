"""CODI, its ablations and what it is compared with, on one embedded task: one run an arm and seed, then one table.

    python benchmarks/methods.py [--task modular] [--arms NAME ...] [--seeds 1 2 3] [--jobs 2] [--out runs/methods]

Tasks: `modular`, chains of three digits under +, - and * modulo ten, `7*3-4=`, where an approximate result is worth
nothing; `modular4`, of four digits; `sums`, chains of five digits, `7-9+4-1+8=`, where it is worth something. The
model is the 0.65 M-parameter Llama of the recipes. In the place of a pretrained model, every arm starts from
the same model of its seed (`base`), trained on worked solutions (for `sums` of chains of four digits), and then trains
equally many steps of 32 rows by its own method. Controls are evaluations of a trained model with its thoughts set to
zero, exchanged between problems, or all equal to the first.

Each arm is a recipe with a few overrides. Runs and evaluations that are finished are not repeated, so the command
resumes. Reported: greedy accuracy on held-out problems with 95 % intervals (bootstrap over problems, each with its
answers on all seeds) and by seed, the difference from CoT and from No-CoT problem by problem, how long the reasoning
is (tokens before the end marker, or thoughts with <bot> and <eot>), after how many steps the student's loss stays
below 0.1 for three logged means of 20 steps, and the teacher's loss in the last 20. Writes docs/methods.json and
docs/methods.png, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rl_soft.evaluation import passk
from rl_soft.evaluation.records import GREEDY, read

PROBLEMS = 500


@dataclass(frozen=True)
class Task:
    dataset: str
    options: dict[str, Any]
    base_options: dict[str, Any]  # of the problems that the base is trained on
    train_size: int
    base_steps: int
    steps: int
    chain: int  # tokens of a long worked solution
    thoughts: int  # Coconut: two a stage, and after the last stage no text is left

    @property
    def epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.train_size // 32)


def sums(terms: int) -> dict[str, Any]:
    return {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": 1, "compact": True}


TASKS = {
    "modular": Task("chain_mod", {"terms": 3}, {"terms": 3}, 7000, 400, 2000, 12, 4),
    "modular4": Task("chain_mod", {"terms": 4}, {"terms": 4}, 20000, 600, 2000, 18, 4),
    "sums": Task("chain_sum", sums(5), sums(4), 20000, 600, 2000, 32, 6),
}


def arms(task: Task) -> dict[str, dict[str, Any]]:
    """Each arm's recipe and overrides, `base` first."""
    common: dict[str, Any] = {
        "dataset": task.dataset,
        "dataset_options": task.options,
        "train_size": task.train_size,
        "eval_problems": 0,
        "validation_problems": 0,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "lr_scheduler_type": "cosine",
        "save_steps": 10**6,
        "logging_steps": 20,
        "disable_tqdm": True,
    }
    start = common | {"max_steps": task.steps, "model_config": None, "vocabulary": None, "model_name_or_path": BASE}
    text = {"num_thoughts": 48}  # the most tokens that a model writes before its answer
    sft = start | text | {"recipe": "recipes/sft_cot.yaml"}
    latent = start | {"num_thoughts": task.thoughts}
    codi = latent | {
        "recipe": "recipes/codi.yaml", "stop_at_accuracy": None, "thought": "hidden", "drop_last_step": True,
        "kd_loss": "smooth_l1",
    }  # fmt: skip
    # Tuned on seed 1 of `sums`, in the favour of iCoT and Coconut: no resets of the optimizer, and this schedule.
    removal = task.chain * task.epoch / (0.3 * task.steps)  # tokens an epoch: all gone after 30 % of the steps
    stage = task.steps / (task.thoughts // 2 + 2) / task.epoch  # epochs: the last stage takes as long as two others
    return {
        "base": common | text | {
            "recipe": "recipes/sft_cot.yaml", "max_steps": task.base_steps, "vocabulary": "0123456789+-*=;#",
            "dataset_options": task.base_options,
        },
        "CoT": sft,
        "No-CoT": sft | {"worked_steps": False},
        "iCoT": start | text | {"recipe": "recipes/icot.yaml", "cot_epochs": 0, "remove_per_epoch": removal,
                                "reset_optimizer": False},
        "Coconut": latent | {"recipe": "recipes/coconut.yaml", "cot_epochs": 0, "epochs_per_stage": stage,
                             "reset_optimizer": False},
        "CODI hidden": codi,
        "CODI soft": codi | {"thought": "soft", "thought_k": 0},
        "CODI gumbel": codi | {"thought": "gumbel"},
        "CODI hybrid": codi | {"thought": "hybrid"},
        "CODI hidden, no KD": codi | {"beta": 0},
        "CODI hidden, KD times 10": codi | {"beta": 10},
        "CODI hidden, KD by l1": codi | {"kd_loss": "l1"},
        "CODI hidden, no projection": codi | {"use_projector": False},
        # The arm CoT is the teacher; it answers after all of its steps, so its twin is the arm below.
        "CODI hidden, static teacher": codi | {"teacher": TEACHER, "drop_last_step": False},
        "CODI hidden, last step kept": codi | {"drop_last_step": False},
    }  # fmt: skip


MODEL_OF = {"BASE": "base", "TEACHER": "CoT"}  # value of a key -> the arm of the same seed whose model is meant
BASE, TEACHER = MODEL_OF
ARMS = [name for name in arms(TASKS["modular"]) if name != "base"]
CONTROLS = {  # row -> the arm whose model is evaluated, and what is done to its thoughts
    "CODI hidden, thoughts zero": ("CODI hidden", "zero"),
    "CODI hidden, thoughts shuffled": ("CODI hidden", "shuffle"),
    "CODI hidden, first thought repeated": ("CODI hidden", "repeat"),
}
WRITES = {"base", "CoT", "No-CoT", "iCoT"}  # whose reasoning is text
LEARNT = 0.1  # nats: the loss on the student's answers from which an arm of CODI counts as having got there


def folder(out: Path, arm: str, seed: int) -> Path:
    return out / f"{'_'.join(arm.replace(',', '').lower().split())}-seed{seed}"


def command(words: list[str], log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "rl_soft", *words], stdout=file, stderr=file, env=environment
        ).returncode


def train(out: Path, task: Task, arm: str, seed: int) -> str:
    """Train one arm on one seed, or what is left of it, and evaluate it."""
    run = folder(out, arm, seed)
    started, log = time.time(), Path(f"{run}.log")
    if not (run / "model").exists():
        values: dict[str, Any] = {"output_dir": str(run), "seed": seed} | arms(task)[arm]
        recipe = values.pop("recipe")
        given = []
        for key, value in values.items():
            if isinstance(value, str) and value in MODEL_OF:
                value = str(folder(out, MODEL_OF[value], seed) / "model")
            given.append(f"--{key}={value if isinstance(value, str | float) else json.dumps(value)}")
        if code := command([recipe, *given], log):
            return f"{arm}, seed {seed}: exit {code}, see {log}"
    seconds = time.time() - started
    if code := evaluate(out, task, arm, seed, run / "model", "none"):
        return f"{arm}, seed {seed}: evaluation exit {code}, see {log}"
    for row, (source, control) in CONTROLS.items():
        if source == arm and (code := evaluate(out, task, row, seed, run / "model", control)):
            return f"{row}, seed {seed}: evaluation exit {code}, see {log}"
    return f"{arm}, seed {seed}: {seconds:.0f} s"


def evaluate(out: Path, task: Task, row: str, seed: int, model: Path, control: str) -> int:
    """One greedy answer a problem (and one sample, which is not read); all arms meet the same problems."""
    run = folder(out, row, seed)
    if (run / "eval" / "report.json").exists():
        return 0
    values = {
        "dataset": task.dataset,
        "dataset_options": json.dumps(task.options),
        "eval_problems": PROBLEMS,
        "control": control,
    }
    values |= {"eval_samples": 1, "eval_batch_size": PROBLEMS, "output_dir": run / "eval"}
    return command(["eval", str(model), *(f"--{key}={value}" for key, value in values.items())], Path(f"{run}.log"))


def greedy(run: Path) -> dict[str, dict[str, Any]]:
    """problem -> its greedy record."""
    return {r["problem_id"]: r for r in read(run / "eval" / "records.jsonl") if r["sample"] == GREEDY}


def losses(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, mean of the last 20 steps); empty where the run has no such loss."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if run.exists() else []
    return [(line["step"], line[name]) for line in lines if name in line]


def learnt_after(run: Path) -> int | None:
    """The step from which the student's loss is below LEARNT three times in a row; None: never, or no such loss."""
    logged = losses(run, "loss_student")
    below = [(step, all(loss < LEARNT for _, loss in logged[i : i + 3])) for i, (step, _) in enumerate(logged)]
    return next((step for step, holds in below if holds), None)


def summarise(out: Path, rows: list[str], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Figures of the rows of which every seed is done."""
    table: dict[str, dict[str, Any]] = {}
    correct: dict[str, np.ndarray] = {}
    problems: list[int] = []  # of each value: seeds share their problems, and a problem is resampled with all of them
    for row in rows:
        runs = [folder(out, row, seed) for seed in seeds]
        if not all((run / "eval" / "report.json").exists() for run in runs):
            continue
        records = [[r for _, r in sorted(greedy(run).items())] for run in runs]
        each = np.array([[r["outcome"] == "correct" for r in some] for some in records], dtype=float)  # (seeds, P)
        correct[row], problems = each.ravel(), list(range(each.shape[1])) * len(each)
        thoughts = np.mean([r["thoughts"] for some in records for r in some])
        table[row] = {
            "accuracy": vars(passk.bootstrap(correct[row], problems)),
            "seeds": each.mean(1).tolist(),
            "reasoning": float(thoughts - 1 if row in WRITES else thoughts + 2),
            "learnt_after": [None if row in CONTROLS else learnt_after(run) for run in runs],
            "loss_teacher": []
            if row in CONTROLS
            else [loss for run in runs for _, loss in losses(run, "loss_teacher")[-1:]],
            "unparsed": float(np.mean([r["outcome"] == "unparsed" for some in records for r in some])),
        }
    for row in table:
        for other in ("CoT", "No-CoT"):
            if other in correct and row != other:
                table[row][f"against {other}"] = vars(passk.paired_bootstrap(correct[other], correct[row], problems))
    return table


def show(table: dict[str, dict[str, Any]]) -> None:
    def interval(row: dict[str, float] | None, sign: str = "") -> str:
        if row is None:
            return ""
        return f"{100 * row['mean']:{sign}.1f} ({100 * row['low']:{sign}.1f} to {100 * row['high']:{sign}.1f})"

    print("\n| | accuracy, % | by seed | learnt after | teacher's loss | reasoning | against CoT | against No-CoT |")
    print("|---|---|---|---|---|---:|---|---|")
    for name, row in table.items():
        seeds = ", ".join(f"{100 * value:.1f}" for value in row["seeds"])
        pairs = [interval(row.get(f"against {other}"), "+") for other in ("CoT", "No-CoT")]
        steps = ", ".join(str(step or "–") for step in row["learnt_after"]) if any(row["learnt_after"]) else ""
        teacher = ", ".join(f"{loss:.3f}" for loss in row["loss_teacher"])
        figures = f"{interval(row['accuracy'])} | {seeds} | {steps} | {teacher} | {row['reasoning']:.1f}"
        print(f"| {name} | {figures} | {' | '.join(pairs)} |")
    kinds = [name for name in table if name in ("CODI hidden", "CODI soft", "CODI gumbel", "CODI hybrid")]
    if kinds and "CoT" in table:
        best = max(kinds, key=lambda name: table[name]["accuracy"]["mean"])
        share = table[best]["accuracy"]["mean"] / table["CoT"]["accuracy"]["mean"]
        shorter = table["CoT"]["reasoning"] / table[best]["reasoning"]
        print(f"\nbest kind: {best}, {share:.1%} of CoT's accuracy, reasoning {shorter:.2f} times shorter")


def draw(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy with its interval, a row each, and a dot a seed."""
    order = list(table)[::-1]
    figure, axis = plt.subplots(figsize=(7.5, 0.3 * len(order) + 1))
    for y, name in enumerate(order):
        row = table[name]
        color = "C3" if name in CONTROLS else "C0" if name.startswith("CODI") else "k"
        a = row["accuracy"]
        axis.plot([100 * a["low"], 100 * a["high"]], [y, y], color=color, lw=2)
        axis.plot(100 * a["mean"], y, "o", color=color, ms=5)
        axis.plot([100 * value for value in row["seeds"]], [y] * len(row["seeds"]), "|", color=color, ms=7)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set(xlabel="held-out accuracy, greedy, %, with 95 % intervals; a tick a seed", xlim=(-2, 102))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, metavar="NAME")
    parser.add_argument("--task", choices=list(TASKS), default="modular")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="runs of a task are in OUT/TASK")
    parser.add_argument("--figure", type=Path, default=Path("docs/methods.png"))
    args = parser.parse_args()
    out, task = args.out / args.task, TASKS[args.task]
    with ThreadPoolExecutor(args.jobs) as pool:
        for arms in (["base"], ["CoT"], [arm for arm in args.arms if arm != "CoT"]):  # the others need these models
            jobs = [(arm, seed) for seed in args.seeds for arm in arms]
            for line in pool.map(lambda job: train(out, task, *job), jobs):
                print(line, flush=True)
    table = summarise(out, ["base", *ARMS, *CONTROLS], args.seeds)
    show(table)
    if table:
        draw(table, args.figure)
        args.figure.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
