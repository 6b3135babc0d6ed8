"""E[ratio] and the sd of the log-ratio, for this package's densities and the public alternatives; draws
docs/density.png.

    python benchmarks/density.py [--samples 10000] [--updates 20] [--out docs/density.png]

A policy over V = 200 ids (logits of sd 2) is updated at random (sd 0.05 on every logit). For samples of the old
policy, the ratio new / old of any density has expectation 1; its log should vary no more than the action itself
demands. Compared on the same noise:

    (S, x)          `GumbelTopK`: the exact density of the support and its weights
    all-V product   one Gumbel density for every id of the vocabulary
    K terms         the Gumbel densities of the K largest alone, without the event that the others are smaller
    filtered        `GumbelTopK` over the K most probable ids alone: exact given the kept set

Ratios stand last.
"""

from __future__ import annotations

import argparse
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from rl_soft.thoughts import noise
from rl_soft.thoughts.densities import GumbelTopK, SoftToken

V, SPREAD, SD = 200, 2.0, 0.05  # vocabulary, sd of the logits, sd of their update
KS, TAUS = (1, 2, 3, 5, 8, 16, 32, 64, 128, 200), (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
K, TAU = 5, 0.1
NAMES = ("(S, x)", "all-V product", "K terms", "filtered")


def gumbel_terms(log_probs: Tensor, z: Tensor) -> Tensor:
    """ln of the Gumbel densities of z at location log_probs, elementwise."""
    return log_probs - z - (log_probs - z).exp()


def log_ratios(old: Tensor, new: Tensor, z: Tensor, k: int, tau: float) -> dict[str, Tensor]:
    """ln new / old by each density, (n,) each; old, new (n, V) log-probabilities, z = old + Gumbel noise (n, V)."""
    top, support = z.topk(k, -1)
    thought = SoftToken(support, (top / tau).log_softmax(-1))
    terms = gumbel_terms(new, z) - gumbel_terms(old, z)
    ids = old.topk(k, -1).indices  # of the kept set, which then counts as all there is
    kept_old, kept_new = (GumbelTopK(x.gather(-1, ids), k, tau) for x in (old, new))
    kept_thought = kept_old.sample(seeds=torch.arange(len(z)), position=10**6)
    return {
        "(S, x)": GumbelTopK(new, k, tau).log_prob(thought) - GumbelTopK(old, k, tau).log_prob(thought),
        "all-V product": terms.sum(-1),
        "K terms": terms.gather(-1, support).sum(-1),
        "filtered": kept_new.log_prob(kept_thought) - kept_old.log_prob(kept_thought),
    }


def summarise(log_ratio: Tensor) -> tuple[float, float, float]:
    """E[ratio], its standard error, and the sd of the log-ratio."""
    ratio = log_ratio.double().exp()
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(len(ratio)), float(log_ratio.double().std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--out", default="docs/density.png")
    args = parser.parse_args()

    grid = [(k, TAU) for k in KS] + [(K, tau) for tau in TAUS if tau != TAU]
    results: dict[tuple[int, float], dict[str, list]] = {cell: {name: [] for name in NAMES} for cell in grid}
    for update in range(args.updates):
        generator = torch.Generator().manual_seed(update)
        logits = SPREAD * torch.randn(V, generator=generator)
        old = logits.log_softmax(-1).expand(args.samples, V)
        new = (logits + SD * torch.randn(V, generator=generator)).log_softmax(-1).expand(args.samples, V)
        z = old + noise.gumbel(torch.arange(args.samples), update, V)
        for cell, by_name in results.items():
            for name, log_ratio in log_ratios(old, new, z, *cell).items():
                by_name[name].append(summarise(log_ratio))

    table = {}  # (cell, name) -> (lowest, mean, highest E[ratio]; median |E - 1| / se; median sd)
    for cell, by_name in results.items():
        for name, rows in by_name.items():
            e, se, sd = torch.tensor(rows, dtype=torch.float64).unbind(-1)
            z_score = ((e - 1).abs() / se.clamp(min=1e-12)).median()
            table[cell, name] = [float(x) for x in (e.min(), e.mean(), e.max(), z_score, sd.median())]

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex="col", sharey="row")
    styles = dict(zip(NAMES, (("C0", "o"), ("C1", "s"), ("C3", "^"), ("C2", "d")), strict=True))
    columns = [([(k, TAU) for k in KS], KS, f"K  (tau = {TAU})"), ([(K, t) for t in TAUS], TAUS, f"tau  (K = {K})")]
    for column, (cells, xs, label) in enumerate(columns):
        for i, name in enumerate(NAMES):
            color, marker = styles[name]
            shown = [(x, table[cell, name]) for cell, x in zip(cells, xs, strict=True)]
            if name == "filtered":
                shown = [(x, row) for x, row in shown if row[4] > 0]  # one kept id: certain
            at = [x * 1.07 ** (i - 1.5) for x, _ in shown]  # side by side
            low, mean, high, _, sd = zip(*(row for _, row in shown), strict=True)
            spread = [
                [m - a for m, a in zip(mean, low, strict=True)],
                [b - m for m, b in zip(mean, high, strict=True)],
            ]
            axes[0, column].errorbar(
                at, mean, spread, color=color, marker=marker, ms=4, lw=0, elinewidth=1.2, capsize=2.5, label=name
            )
            axes[1, column].plot([x for x, _ in shown], sd, color=color, marker=marker, ms=4, lw=1)
        axes[0, column].axhline(1, color="k", lw=0.5)
        axes[1, column].set(xlabel=label, xscale="log", yscale="log", xticks=xs)
        axes[1, column].set_xticks([], minor=True)
        axes[1, column].set_xticklabels([f"{x:g}" for x in xs])
    axes[0, 0].set_ylabel(f"E[ratio]: mean and range\nover {args.updates} random updates")
    axes[1, 0].set_ylabel("sd of the log-ratio\n(median over updates)")
    axes[0, 0].set_yscale("log")
    ticks = {0: (0.2, 0.5, 1, 2, 5, 10), 1: (0.02, 0.05, 0.1, 0.2, 0.5, 1)}
    for row, values in ticks.items():
        axes[row, 0].set_yticks([], minor=True)
        axes[row, 0].set_yticks(values, [f"{y:g}" for y in values])
    axes[0, 1].legend(frameon=False, loc="upper left")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Importance ratios of a random update (sd {SD} on {V} logits of sd {SPREAD:g})")
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)

    print(
        f"V {V}, logits of sd {SPREAD}, update sd {SD}, {args.updates} updates of {args.samples} samples; {args.out}"
    )
    print(f"{'K':>4} {'tau':>5}  {'density':<14} {'E[ratio]':<20} {'median |E-1|/se':>16} {'sd of log-ratio':>16}")
    for (cell, name), (low, _, high, z_score, sd) in table.items():
        print(f"{cell[0]:>4} {cell[1]:>5}  {name:<14} {low:.4f} .. {high:.4f}     {z_score:>16.1f} {sd:>16.4f}")
    print()
    for k in (1, K, 16, 64, V):
        ours, product = table[(k, TAU), NAMES[0]][4], table[(k, TAU), NAMES[1]][4]
        print(f"K {k}: sd of the log-ratio, all-V product / (S, x): {product / ours:.2f}")
    for name in NAMES:
        low, _, high, *_ = table[(K, TAU), name]
        print(f"K {K}, tau {TAU}: E[ratio] by {name}: {low:.4f} .. {high:.4f}")


if __name__ == "__main__":
    main()
