"""Tables and picture of benchmarks/smollm2.py, from its small result files alone: no checkpoints, no torch.

    python benchmarks/smollm2_report.py [--results docs/results/smollm2]

Writes RESULTS.json and RESULTS.png beside the folder, and prints Markdown. What is missing is named: a table counts
the seeds that it has. Intervals are 95 %, by bootstrap over problems, each with all its seeds. Differences are paired
by problem and by the noise of the samples.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_equations import FIGURES

from rl_soft.evaluation import passk
from rl_soft.evaluation.figures import COLOURS, canvas, clean, png
from rl_soft.files import write_atomic

ROOT = Path(__file__).parents[1]
COUNTS = ("correct", "greedy")  # of each problem: right answers among the samples, and of the greedy one
METRICS = {  # ours -> the trainer's
    "accuracy": "groups/accuracy",  # before others take the places of groups that are alike
    "groups alike": "groups/equal",
    "groups tried": "groups/resampled",
    "length": "completions/mean_length",
    "thoughts": "thoughts/count",
    "entropy": "thoughts/entropy",
    "softness": "thoughts/softness",
    "density gap": "rollout/density_gap",
    "gradient": "grad_norm",
    "rollout": "seconds/rollout",
    "rewards": "seconds/reward",
    "scoring": "seconds/scoring",
    "update": "seconds/update",
}
SECONDS = ("rollout", "rewards", "scoring", "update")
MEASURES = ("greedy", "pass@1", "pass@4", "pass@16")
# arm -> how it thinks in each half of its steps; the warm start that it is compared with thinks as it does in the end
ARMS = {
    "token": ("token", "token"),
    "soft": ("soft", "soft"),
    "soft then token": ("soft", "token"),
    "softer": ("softer", "softer"),
}
CODI = ("codi", "cot", "codi_rl")
SPLITS = {"unseen": "families that RL did not meet", "seen": "other problems of families in RL"}
COLOUR = dict(zip(ARMS, COLOURS, strict=False))


def entry_of(kinds: tuple[str, ...], seed: int) -> str:
    """What a run of one half is called, by the kinds of thoughts of the halves up to it."""
    return f"{'+'.join(kinds)}-seed{seed}"


def last_kinds(arms: Iterable[str]) -> list[str]:
    """The kinds of thoughts that these arms end with; first tokens, which all are compared with."""
    return list(dict.fromkeys(["token", *(ARMS[arm][-1] for arm in arms)]))


class Results:
    """The result files of a folder.

    Attributes:
        files: name of an entry -> its content.
        curves: arm -> seed -> figures by step, of the halves that are there.
        evaluated: arm -> seed -> evaluations by how the arm thinks in it.
        written: arm, or warm start -> what its completions compute, of the seeds that are there.
    """

    def __init__(self, folder: Path, seeds: tuple[int, ...]) -> None:
        self.files = files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        self.curves: dict[str, dict[int, dict[str, list[float]]]] = {arm: {} for arm in ARMS}
        self.evaluated: dict[str, dict[int, Any]] = {arm: {} for arm in ARMS}
        for arm, kinds in ARMS.items():
            for seed in seeds:
                halves = [entry_of(kinds[:half], seed) for half in (1, 2)]
                there = [files[name]["curve"] for name in halves if name in files]
                if len(there) == 2 or (there and kinds[0] == kinds[1]):  # else all that is there is another arm's
                    self.curves[arm][seed] = {m: [x for half in there for x in half[m]] for m in METRICS}
                if f"{halves[1]}-eval" in files:
                    self.evaluated[arm][seed] = files[f"{halves[1]}-eval"]["evaluations"]
        names = [entry_of(kinds[:half], s) for s in seeds for half in (1, 2) for kinds in ARMS.values()]
        before = [f"warm-{kind}-eval" for kind in last_kinds(ARMS)]
        names += [f"{entry_of(kinds, s)}-eval" for s in seeds for kinds in ARMS.values()]
        runs = {f"before RL, {kind}": [f"warm-{kind}"] for kind in last_kinds(ARMS)}
        runs |= {arm: [entry_of(kinds, s) for s in seeds] for arm, kinds in ARMS.items()}
        there = {how: [f"{r}-equations" for r in some if f"{r}-equations" in files] for how, some in runs.items()}
        self.written = {how: [files[name] for name in some] for how, some in there.items() if some}
        wrote = [f"{r}-equations" for some in runs.values() for r in some]
        self.missing = [
            n for n in dict.fromkeys(["warm", *before, *names, *wrote, "gradients", *CODI]) if n not in files
        ]
        self.problems = {s: files.get("problems", {}).get(s, []) for s in SPLITS}
        self.families = {s: files.get("problems", {}).get(f"families of {s}", []) for s in SPLITS}

    def before(self, kind: str, split: str, measure: str) -> np.ndarray:
        return solved(self.files[f"warm-{kind}-eval"]["evaluations"]["own"], split, measure)

    def after(self, arm: str, split: str, measure: str, seeds: list[int], how: str = "own") -> np.ndarray:
        """(seeds * problems,)"""
        return np.concatenate([solved(self.evaluated[arm][s][how], split, measure) for s in seeds])

    def interval(self, split: str, values: np.ndarray, against: np.ndarray | None = None) -> dict[str, Any]:
        """Of the mean of some seeds' values, or of their mean difference from others; problems are resampled.

        `families`: the bounds where whole families of problems are, which holds for problems of other families, too.
        """
        found = {}
        for name, labels in (("problems", self.problems[split]), ("families", self.families[split])):
            every = labels * (len(values) // len(labels))
            if against is None:
                found[name] = passk.bootstrap(values, every)
            else:
                found[name] = passk.paired_bootstrap(against, values, every)
        problems, families = found["problems"], found["families"]
        bounds = {"low": problems.low, "high": problems.high, "families": [families.low, families.high]}
        return {"mean": problems.mean} | bounds


def solved(evaluation: dict[str, Any], split: str, measure: str) -> np.ndarray:
    """How much of each problem is solved, (P,): pass@k, or whether the greedy answer is right."""
    if measure == "greedy":
        return np.array(evaluation[split]["greedy"], dtype=float)
    k = int(measure.removeprefix("pass@"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # n = k
        return np.asarray(passk.pass_at_k(evaluation["samples"], np.array(evaluation[split]["correct"]), k))


def summarise(results: Results) -> dict[str, Any]:
    """All figures of the tables; `seeds` says what each is made of."""
    parts = "before", "before, minus token", "arms", "minus token", "other thoughts", "latent", "training", "agreement"
    found: dict[str, Any] = {part: {} for part in parts}
    found["training"] = {arm: training(list(by.values())) for arm, by in results.curves.items() if by}
    found["gradients"] = results.files.get("gradients")
    found["equations"] = equations(results.written)
    if "warm-token-eval" not in results.files:
        return found
    samples = results.files["warm-token-eval"]["evaluations"]["own"]["samples"]
    measures = [m for m in MEASURES if m == "greedy" or int(m.removeprefix("pass@")) <= samples]

    def intervals(values: Callable[[str, str], np.ndarray], *against: Callable[[str, str], np.ndarray]) -> Any:
        """By split and measure."""
        return {
            s: {m: results.interval(s, values(s, m), *(other(s, m) for other in against)) for m in measures}
            for s in SPLITS
        }

    before = {k: partial(results.before, k) for k in last_kinds(ARMS) if f"warm-{k}-eval" in results.files}
    for kind, values in before.items():
        found["before"][kind] = intervals(values)
        if kind != "token":
            found["before, minus token"][kind] = intervals(values, before["token"])
            found["agreement"][f"before RL, {kind}"] = results.files[f"warm-{kind}-eval"]["agreement"]
    for arm, by_seed in results.evaluated.items():
        if not by_seed or ARMS[arm][-1] not in before:
            continue
        seeds = sorted(by_seed)

        def after(split: str, measure: str, arm: str = arm, seeds: Any = seeds, how: str = "own") -> np.ndarray:
            return results.after(arm, split, measure, seeds, how)

        def start(split: str, measure: str, arm: str = arm, seeds: Any = seeds) -> np.ndarray:
            return np.tile(before[ARMS[arm][-1]](split, measure), len(seeds))

        gains = {
            s: {m: (after(s, m) - start(s, m)).reshape(len(seeds), -1).mean(1).tolist() for m in measures}
            for s in SPLITS
        }
        found["arms"][arm] = {
            "seeds": seeds, "after": intervals(after), "gain": intervals(after, start), "gain by seed": gains
        }  # fmt: skip
        both = sorted(by_seed.keys() & results.evaluated["token"].keys())
        if both and arm != "token":
            tokens = partial(after, arm="token", seeds=both)
            found["minus token"][arm] = {"seeds": both} | intervals(partial(after, seeds=both), tokens)
        other = sorted({kind for evaluations in by_seed.values() for kind in evaluations} - {"own"})
        for kind in other:
            some = [seed for seed in seeds if kind in by_seed[seed]]
            how = f"{arm}, with {kind} thoughts"
            pair = partial(after, seeds=some, how=kind), partial(after, seeds=some)
            found["other thoughts"][how] = {"seeds": some} | intervals(*pair)
            texts = [results.files[f"{entry_of(ARMS[arm], seed)}-eval"]["agreement"] for seed in some]
            found["agreement"][arm] = {name: float(np.mean([t[name] for t in texts])) for name in texts[0]}
    there = {n: results.files[n]["evaluations"]["own"] for n in CODI if n in results.files}
    found["latent"] = {name: intervals(partial(solved, own)) for name, own in there.items()}
    for ours, theirs in (("codi", "cot"), ("codi_rl", "codi")):
        if ours in there and theirs in there:
            pair = partial(solved, there[ours]), partial(solved, there[theirs])
            found["latent"][f"{ours} minus {theirs}"] = intervals(*pair)
    return found


def equations(by_arm: dict[str, list[Any]]) -> dict[str, Any]:
    """What was written, by arm: shares by operation, the mean of its seeds, and those of all problems."""
    means: dict[str, Any] = {}
    for arm, seeds in by_arm.items():
        means[arm] = {
            kind: {name: float(np.mean([found[kind][name] for found in seeds])) for name in row}
            for kind, row in seeds[0].items()
        }
        weights = [row["problems"] for row in means[arm].values()]
        means[arm]["all"] = {
            name: float(np.average([row[name] for row in means[arm].values()], weights=weights)) for name in FIGURES
        } | {"problems": sum(weights)}
    return means


def training(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Means over the steps of all seeds, and over the first and last fifth of the steps that all of them have."""
    steps = min(len(run["accuracy"]) for run in runs)
    curves = {name: np.array([run[name][:steps] for run in runs]) for name in METRICS}  # (seeds, steps)
    fifth = max(1, steps // 5)
    ends = {name: [float(c[:, :fifth].mean()), float(c[:, -fifth:].mean())] for name, c in curves.items()}
    return {
        "seeds": len(runs),
        "steps": steps,
        "mixed groups": float(1 - curves["groups alike"].mean()),
        "positions of an answer": ends["length"],
        "groups tried in their places": float(curves["groups tried"].mean()),
        "accuracy": ends["accuracy"],
        "entropy": ends["entropy"],
        "softness": ends["softness"],
        "largest density gap": float(curves["density gap"].max()),
        "seconds": {name: float(np.median(curves[name])) for name in SECONDS},
    }


def show(found: dict[str, Any], missing: list[str]) -> str:
    """The tables in Markdown, as docs/results.md and docs/smollm2.md have them."""
    lines = [f"Not there yet: {', '.join(missing)}."] if missing else []
    for split, title in SPLITS.items():
        lines += table(f"{title}, %", ["seeds", *MEASURES], rows_of(found, split))
    for split, title in SPLITS.items():
        rows = [(name, cells(row[split], signed=" minus " in name)) for name, row in found["latent"].items()]
        lines += table(f"CODI, {title}, %", MEASURES, rows)
    names = ["seeds", "steps", "mixed groups", "others tried per step", "accuracy, first and last fifth", "positions"]
    names += ["entropy of thoughts, nats", "softness", "largest density gap", "seconds per step"]
    rows = []
    for arm, row in found["training"].items():
        ends = [f"{a:.3g}, {b:.3g}" for a, b in (row[name] for name in
                ("accuracy", "positions of an answer", "entropy", "softness"))]  # fmt: skip
        seconds = ", ".join(f"{name} {row['seconds'][name]:.0f}" for name in ("rollout", "update"))
        tried = f"{row['groups tried in their places']:.1f}"
        mixed, gap = f"{row['mixed groups']:.0%}", f"{row['largest density gap']:.1e}"
        rows.append((arm, [str(row["seeds"]), str(row["steps"]), mixed, tried, *ends, gap, seconds]))
    lines += table("training", names, rows)
    lines += table(
        "one model, one noise, two kinds of thoughts",
        ["texts that are those of tokens", "share of a text before they part"],
        [
            (kind, [f"{row['same text']:.0%}", f"{row['share of the text before they part']:.0%}"])
            for kind, row in found["agreement"].items()
        ],
    )
    rows, kinds = [], [kind for kind in next(iter(found["equations"].values()), {}) if kind != "all"]
    for arm, row in found["equations"].items():
        shares = [row["all"][name] for name in FIGURES[1:]] + [row[k]["answer"] for k in kinds]
        rows.append((arm, [f"{100 * x:.1f}" for x in shares]))
    names = ["right operations", "and their numbers", "equations that hold", "answers that follow"]
    names += [f"right answers: {k} ({next(iter(found['equations'].values()))[k]['problems']:.0f})" for k in kinds]
    lines += table("written, %", names, rows)
    rows = [
        (f"{kind}, {name}", [f"{r['second']:.2f}", f"{r['alignment']:.2f}"])
        for kind, figures in (found["gradients"] or {}).items()
        for name, r in figures.items()
        if isinstance(r, dict)
    ]
    lines += table("gradient at the warm start", ["mean square, top1 = 1", "cosine with its mean"], rows)
    return "\n".join(lines)


def rows_of(found: dict[str, Any], split: str) -> list[tuple[str, list[str]]]:
    """Of one split: before, after, and the differences."""
    rows = [(f"before RL, {kind}", ["", *cells(row[split])]) for kind, row in found["before"].items()]
    rows += [(arm, [seeds_of(row), *cells(row["after"][split])]) for arm, row in found["arms"].items()]
    signed = partial(cells, signed=True)
    for arm, row in found["arms"].items():
        rows.append((f"**{arm}, after minus before**", [seeds_of(row), *signed(row["gain"][split])]))
    for kind, row in found["before, minus token"].items():
        rows.append((f"**before RL, {kind} minus token**", ["", *signed(row[split])]))
    for arm, row in found["minus token"].items():
        rows.append((f"**{arm} minus token**", [seeds_of(row), *signed(row[split])]))
    for how, row in found["other thoughts"].items():
        rows.append((f"**{how}, minus as trained**", [seeds_of(row), *signed(row[split])]))
    return rows


def table(corner: str, names: Iterable[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    """Lines of a Markdown table behind an empty line; none without rows."""
    columns = [corner, *names]
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return ["", *head, *(f"| {' | '.join([name, *values])} |" for name, values in rows)] if rows else []


def seeds_of(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row["seeds"]))


def cells(row: dict[str, Any], signed: bool = False) -> list[str]:
    """Shares, or `signed` differences, in per cent, with their intervals over problems."""
    sign = "+" if signed else ""
    figures = [[f"{100 * x[name]:{sign}.1f}" for name in ("mean", "low", "high")] for x in row.values()]
    return [f"{mean} ({low} to {high})" for mean, low, high in figures]


def draw(results: Results, found: dict[str, Any]) -> bytes:
    """Reward by step, and what each arm gained on families that RL did not meet."""
    figure = canvas(10.5, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for axes in (left, right):
        clean(axes)
    half = results.files["sizes"]["steps"]
    for arm, by_seed in results.curves.items():
        curves = [np.array(curve["accuracy"]) for curve in by_seed.values()]
        width = min(10, *map(len, curves)) if curves else 1
        smooth = [100 * np.convolve(curve, np.ones(width) / width, "valid") for curve in curves]
        begin = max(0, half - width) if ARMS[arm][0] != ARMS[arm][1] else 0  # before it, the curve is another arm's
        shortest = min(map(len, smooth), default=0)
        steps = np.arange(begin, shortest) + width
        for curve in smooth:
            left.plot(steps, curve[begin:shortest], color=COLOUR[arm], alpha=0.25, linewidth=0.9)
        if smooth:
            mean = np.mean([curve[begin:shortest] for curve in smooth], axis=0)
            left.plot(steps, mean, color=COLOUR[arm], linewidth=2, label=arm)
    left.axvline(half, color="#8c959f", linewidth=1, linestyle=":")
    left.set(xlabel="step; other problems behind the dotted line", ylabel="right answers, %, mean of ten steps")
    measures = list(next(iter(found["arms"].values()), {"after": {"unseen": {}}})["after"]["unseen"])
    for i, (arm, row) in enumerate(found["arms"].items()):
        for j, name in enumerate(measures):
            gain, y = row["gain"]["unseen"][name], -j - 0.17 * i
            right.plot([100 * gain["low"], 100 * gain["high"]], [y, y], color=COLOUR[arm], linewidth=2)
            right.plot(100 * gain["mean"], y, "o", color=COLOUR[arm], markersize=5)
    right.axvline(0, color="#8c959f", linewidth=1)
    right.set_yticks([-j - 0.25 for j in range(len(measures))], measures)
    right.set(xlabel="gained on families that RL did not meet, points, 95 %")
    if any(results.curves.values()):
        left.legend(frameon=False, fontsize=9)
    seeds = ", ".join(f"{arm}: {len(by_seed)}" for arm, by_seed in results.evaluated.items())
    return png(figure, "SmolLM2-135M: RL with tokens and with soft thoughts", f"Evaluated seeds of each arm: {seeds}.")


def report(folder: Path, wanted: tuple[int, ...] = (1, 2, 3)) -> None:
    """Write the tables' figures and the picture beside `folder`, and print the tables."""
    there = {int(file.stem.rpartition("-seed")[2]) for file in folder.glob("*-seed*[0-9].json")}
    results = Results(folder, tuple(sorted({*wanted, *there})))
    found = summarise(results) | {"missing": results.missing, "sizes": results.files.get("sizes")}
    write_atomic(folder.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
    if found["training"]:
        folder.with_suffix(".png").write_bytes(draw(results, found))
    print(show(found, results.missing), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "smollm2")
    report(parser.parse_args().results)
