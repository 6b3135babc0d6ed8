"""The analyses as pictures: a PNG from each summary. Drawn as those of `figures` are."""

from typing import Any

import numpy as np

from rl_soft.analyses.branching import BINS
from rl_soft.analyses.findings import number
from rl_soft.analyses.plane import GRID, PARAMETER, SETS
from rl_soft.evaluation.figures import COLOURS, canvas, clean, png

GREY, BLUE, RED, GREEN, PINK, YELLOW = COLOURS
OF_KIND = {"greedy": GREY, "soft": BLUE, "gumbel": RED, "dirichlet": GREEN, "sampled": PINK}


def draw(name: str, summary: dict[str, Any]) -> bytes:
    """The picture of an analysis, by its name."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a $ in a name is a dollar
        return {"branching": branching, "lens": lens, "traces": traces, "plane": plane}[name](summary)


def branching(summary: dict[str, Any]) -> bytes:
    """Histograms of both distances, and their medians by the weight of the second id."""
    parts = [("All steps", summary["all"])]
    if summary["branching"]:
        parts.append((f"Second token weighs {summary['branch_weight']} or more", summary["branching"]))
    figure = canvas(4.0 * (len(parts) + 1), 3.9)
    *panels, last = figure.subplots(1, len(parts) + 1)
    middle = (BINS[1:] + BINS[:-1]) / 2
    for axes, (title, part) in zip(panels, parts, strict=True):
        clean(axes)
        for j, (name, colour) in enumerate((("strongest", BLUE), ("second", RED))):
            share = np.array(part["histogram"][j]) / part["steps"]
            axes.bar(middle, share, width=BINS[1] - BINS[0], color=colour, alpha=0.6, linewidth=0)
            median = part[("first", "second")[j]]["value"]
            axes.axvline(median, color=colour, linewidth=1.2, linestyle="--")
            at = (0.97, 0.93 - 0.09 * j)
            text = f"to the {name} alone, median {number(median)}"
            axes.annotate(
                text, at, xycoords="axes fraction", ha="right", color=colour, fontsize=8.5, fontweight="bold"
            )
        axes.set_title(f"{title}: {part['steps']:,}", loc="left", fontsize=10)
        axes.set_xlabel("JS divergence, nats", fontsize=9)
        axes.set_ylabel("share of steps", fontsize=9)
    clean(last)
    x = [(part["from"] + part["to"]) / 2 for part in summary["by_weight"]]
    for j, (name, colour) in enumerate((("strongest", BLUE), ("second", RED))):
        value, low, high = ([p["medians"][end][j] for p in summary["by_weight"]] for end in ("value", "low", "high"))
        last.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        last.plot(x, value, color=colour, linewidth=2, marker="o", markersize=4, label=f"to the {name} alone")
    last.set_ylim(bottom=0)
    last.set_xlabel("weight of the second token", fontsize=9)
    last.set_title("Median by how balanced the step is", loc="left", fontsize=10)
    last.legend(frameon=False, fontsize=8.5)
    title = "After a soft token, the model goes on as after ..."
    return png(figure, title, f"{summary['prompts']} prompts. Bands: 95 %, over prompts. At most ln 2 = 0.693.")


def lens(summary: dict[str, Any]) -> bytes:
    """Shares of both paths by layer, and the top-1 share."""
    figure = canvas(10.5, 4.1)
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    layers = range(summary["layers"] + 1)
    lines = (
        (0, BLUE, "-", "stronger path, in the mixture"),
        (2, BLUE, ":", "stronger path, in the weaker alone"),
        (1, RED, "-", "weaker path, in the mixture"),
        (3, RED, ":", "weaker path, in the stronger alone"),
    )
    for axes in (left, right):
        clean(axes)
        axes.set_xlabel("layer (0: embedding)", fontsize=9)
        axes.set_ylim(0, 1.03)
    for j, colour, style, label in lines:
        value, low, high = (summary["shares"][end][j] for end in ("value", "low", "high"))
        left.fill_between(layers, low, high, color=colour, alpha=0.15 if style == "-" else 0.07, linewidth=0)
        left.plot(layers, value, color=colour, linestyle=style, linewidth=2 if style == "-" else 1.4, label=label)
    left.legend(frameon=False, fontsize=8.5, loc="best")
    left.set_title("Share of a path's five strongest words that is held", loc="left", fontsize=10)
    value, low, high = (summary["top1"][end] for end in ("value", "low", "high"))
    right.fill_between(layers, low, high, color=BLUE, alpha=0.18, linewidth=0)
    right.plot(layers, value, color=BLUE, linewidth=2)
    for level, text, x, side, below in (
        (0.9, "0.9: one thread", 0, "left", False),
        (0.5, "0.5: both alike", summary["layers"], "right", True),
    ):
        right.axhline(level, color=GREY, linewidth=0.9, linestyle="--")
        where = {"xytext": (0, -3 if below else 3), "textcoords": "offset points", "va": "top" if below else "bottom"}
        right.annotate(text, (x, level), ha=side, fontsize=8, color=GREY, **where)
    right.set_title("Top-1 share: stronger / (stronger + weaker)", loc="left", fontsize=10)
    caption = f"{summary['steps']} mixtures .6/.4 at branching steps of {summary['prompts']} prompts. Bands: 95 %."
    return png(figure, "What the layers see in a balanced soft token", caption)


def traces(summary: dict[str, Any]) -> bytes:
    """ROUGE-L with the greedy trace by kind; entropy and mass left out by position."""
    figure = canvas(12.5, 4.1)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.25, 1.25])
    clean(left)
    left.grid(axis="y", visible=False)
    left.grid(axis="x", color="#d0d7de", linewidth=0.6)
    kinds = sorted(summary["rouge_l"], key=lambda kind: summary["rouge_l"][kind]["value"])
    for y, kind in enumerate(kinds):
        values = summary["rouge_l"][kind]
        left.plot([values["low"], values["high"]], [y, y], color=OF_KIND[kind], linewidth=5, alpha=0.3)
        left.plot(values["value"], y, "o", color=OF_KIND[kind], markersize=7)
        where = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        left.annotate(number(values["value"], 2), (values["value"], y), color=OF_KIND[kind], **where)
    left.set_yticks(range(len(kinds)), kinds)
    left.set_ylim(-0.6, len(kinds) - 0.4)
    left.set_xlim(0, 1.02)
    left.set_title("ROUGE-L with the greedy trace", loc="left", fontsize=10)
    for axes, figure_of, title in (
        (middle, "entropy", "Entropy of the next token, nats"),
        (right, "outside", "Probability outside what is fed"),
    ):
        clean(axes)
        for kind, curve in summary[figure_of].items():
            x = np.arange(1, len(curve["value"]) + 1)
            axes.fill_between(x, curve["low"], curve["high"], color=OF_KIND[kind], alpha=0.12, linewidth=0)
            alone = "o" if len(x) == 1 else None
            axes.plot(x, curve["value"], color=OF_KIND[kind], linewidth=1.5, marker=alone, label=kind)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("thought", fontsize=9)
        axes.set_title(title, loc="left", fontsize=10)
    middle.legend(frameon=False, fontsize=8.5, ncols=2)
    caption = (
        f"{summary['prompts']} prompts, n = {summary['samples']} for the random kinds. Bands: 95 %, over prompts."
    )
    return png(figure, "Which way do the traces go?", caption)


def plane(summary: dict[str, Any]) -> bytes:
    """Randomness over softness, one curve per kind, with the parameter written beside it."""
    names = [name for name in SETS if summary[name]]
    figure = canvas(5.6 * len(names), 4.6)
    titles = {"all": "All steps", "branching": f"Second token weighs {summary['branch_weight']} or more"}
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        clean(axes)
        part = summary[name]
        for kind, grid in GRID.items():
            points = np.array(part[kind]["value"])
            axes.plot(
                points[:, 0], points[:, 1], color=OF_KIND[kind], linewidth=1.8, marker="o", markersize=4, label=kind
            )
            labelled = {"gumbel": (0.1, 0.3, 0.5, 1.0, 2.0), "dirichlet": (0.1, 1.0, 4.0, 10.0, 100.0)}[kind]
            side = 1 if kind == "gumbel" else -1
            for parameter in labelled:
                axes.annotate(
                    f"{PARAMETER[kind]} {parameter:g}",
                    points[grid.index(parameter)],
                    xytext=(6 * side, 5 * side),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="bottom" if side > 0 else "top",
                    fontsize=8,
                    color=OF_KIND[kind],
                )
        soft, random = part["gumbel"]["value"][GRID["gumbel"].index(1.0)]
        axes.axhline(random / 2, color=GREY, linewidth=0.9, linestyle="--")
        axes.axvline(soft / 2, color=GREY, linewidth=0.9, linestyle="--")
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])  # room for the labels of the lowest points
        axes.set_xlabel("softness: entropy of the weights, nats", fontsize=9)
        axes.set_ylabel("randomness: JS to the original weights, nats", fontsize=9)
        axes.set_title(f"{titles[name]}: {part['steps']:,}", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8.5)
    caption = f"{summary['prompts']} prompts. Dashed: half of gumbel's softness and randomness at tau = 1."
    return png(figure, "Random and soft at once?", caption)
