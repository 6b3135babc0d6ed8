"""A report as pictures: the curves of Pass@k with their bands, the reward by step, the per-problem scatter.

Functions of the report alone. Drawn on matplotlib's Figure, which needs neither pyplot nor a display.
"""

import io
import math
import textwrap
from collections import Counter
from typing import Any

import numpy as np

from rl_soft.evaluation.render import percent, points

COLOURS = ("#6e7781", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # grey, then Okabe and Ito's


def draw(report: dict[str, Any]) -> dict[str, bytes]:
    """File name -> PNG; a comparison has the scatter too."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a $ in a name is a dollar
        pictures = {"passk.png": curves(report)}
        if report["curve"]:
            pictures["training.png"] = by_step(report["curve"])
        if report["comparisons"]:
            pictures["problems.png"] = scatter(report)
    return pictures


def canvas(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # Figure alone needs neither pyplot nor a display

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def png(figure: Any, title: str, caption: str) -> bytes:
    """The figure with a title above and a caption below."""
    title = textwrap.fill(title, int(8 * figure.get_figwidth()), max_lines=2, placeholder=" …")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color="#57606a")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _short(text: str, limit: int = 24) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def clean(axes: Any) -> None:
    """The look of axes that all pictures share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8c959f")
    axes.tick_params(colors="#424a53", labelsize=8.5)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)


def curves(report: dict[str, Any]) -> bytes:
    """Pass@k by k with bands and greedy levels; beside it the reward by training step, where there is one."""
    partial = "  (partial records)" if report["partial"] else ""
    return png(curves_figure(report), report["title"] + partial, _caption(report))


def curves_figure(report: dict[str, Any]) -> Any:
    """The figure of `curves`, without title and caption."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    reward, summaries = report["reward"], report["evaluations"]
    figure = canvas(10.5 if reward else 6.6, 4.3)
    left = figure.subplots(1, 2 if reward else 1, width_ratios=[1.15, 1] if reward else None, squeeze=False)[0, 0]
    clean(left)
    colours = COLOURS if len(summaries) > 1 else COLOURS[1:]
    starts, ends, bounds = [], [], []  # (level, text, colour, weight) left and right of the curves
    for i, summary in enumerate(summaries):
        colour, rows = colours[i % len(colours)], summary["pass_at_k"]
        k, mean, low, high = ([row[field] for row in rows] for field in ("k", "mean", "low", "high"))
        left.fill_between(k, low, high, color=colour, alpha=0.18, linewidth=0)
        left.plot(k, mean, color=colour, linewidth=2, marker="o", markersize=4.5)
        late = [(row["k"], row["mean"]) for row in rows if summary["n"] < 2 * row["k"]]
        if late:
            left.plot(*zip(*late, strict=True), "o", color="white", markeredgecolor=colour, markersize=4.5)
        starts.append((mean[0], percent(mean[0]), colour, "bold"))
        ends.append((mean[-1], f"{_short(summary['name'])}, {percent(mean[-1])}", colour, "bold"))
        bounds += [low[0], high[0], low[-1], high[-1]]
        if summary["greedy"]:
            level = summary["greedy"]["mean"]
            left.axhline(level, color=colour, linestyle=":", linewidth=1.3)
            ends.append((level, f"{_short(summary['name'])} greedy, {percent(level)}", colour, "normal"))
            bounds.append(level)
    bottom = max(0.0, math.floor(10 * min(bounds) - 0.5) / 10)
    top = min(1.0, math.ceil(10 * max(bounds) + 0.1) / 10)
    left.set_ylim(bottom, top + 0.02 * (top - bottom))
    ks = [row["k"] for row in summaries[0]["pass_at_k"]]
    left.set_xscale("log", base=2)
    octaves = max(1.0, math.log2(ks[-1] / ks[0]))
    left.set_xlim(ks[0] / 2 ** (0.2 * octaves), ks[-1] * 2 ** (0.04 * octaves))
    left.set_xticks(ks, [str(k) for k in ks])
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    left.set_xlabel("k, samples per problem", fontsize=9)
    left.set_title("Pass@k", loc="left", fontsize=10)
    for labels, x in ((starts, 0.02), (ends, 1.02)):
        heights = _apart(labels, 0.06 * (top - bottom), bottom + 0.03 * (top - bottom), top)
        for y, (_, text, colour, weight) in zip(heights, labels, strict=True):
            left.annotate(
                text,
                (x, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=colour,
                fontsize=9,
                fontweight=weight,
                annotation_clip=False,
            )
    if reward:
        _reward_panel(figure.axes[1], reward)
    return figure


def _caption(report: dict[str, Any]) -> str:
    summaries = report["evaluations"]
    unit, ks = summaries[0]["resampled"], [row["k"] for row in summaries[0]["pass_at_k"]]
    caption = f"n = {report['n']} samples × P = {report['num_problems']:,} problems. Bands: 95 %, over {unit}."
    caption += " Dotted: greedy." if any(summary["greedy"] for summary in summaries) else ""
    caption += " Hollow: n < 2k." if report["n"] < 2 * ks[-1] else ""
    if len(report["comparisons"]) == 1:
        delta = report["comparisons"][0]["pass_at_k"][0]
        spread = f"{points(delta['low'])} to {points(delta['high'])}"
        caption += f"\nPaired change of pass@1: {points(delta['mean'])} points, 95 % CI {spread}."
    return caption


def _apart(labels: list[tuple[float, str, str, str]], gap: float, bottom: float, top: float) -> list[float]:
    """Heights for labels: at their levels, moved down just enough to stand `gap` apart, then centred above `bottom`,
    or below `top` where there is no room for both."""
    order = sorted(range(len(labels)), key=lambda i: -labels[i][0])
    heights = [0.0] * len(labels)
    for above, i in zip([None, *order], order, strict=False):
        heights[i] = labels[i][0] if above is None else min(labels[i][0], heights[above] - gap)
    shift = sum(label[0] - height for label, height in zip(labels, heights, strict=True)) / len(labels)
    shift += max(0.0, bottom - (min(heights) + shift))
    shift -= max(0.0, max(heights) + shift - top)
    return [height + shift for height in heights]


def by_step(curve: dict[str, Any]) -> bytes:
    """Pass@1 and Pass@k for the largest k by optimizer step, with their bands; greedy dotted, the best step marked."""
    from matplotlib.ticker import PercentFormatter

    figure = canvas(6.6, 4.0)
    axes = figure.subplots()
    clean(axes)
    points_, last = curve["points"], len(curve["points"][0]["pass_at_k"]) - 1
    step = [point["step"] for point in points_]
    for i, colour in ((last, COLOURS[2]), (0, COLOURS[1]))[0 if last else 1 :]:
        rows = [point["pass_at_k"][i] for point in points_]
        mean, low, high = ([row[field] for row in rows] for field in ("mean", "low", "high"))
        axes.fill_between(step, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(step, mean, color=colour, linewidth=2, marker="o", markersize=4.5, label=f"pass@{rows[0]['k']}")
    greedy = [point["greedy"] for point in points_]
    if None not in greedy:
        axes.plot(step, greedy, color=COLOURS[1], linestyle=":", linewidth=1.3, label="greedy")
    axes.axvline(curve["best_step"], color=COLOURS[0], linewidth=0.8, label=f"best {curve['metric']}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlabel("training step", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8.5)
    share = "" if curve["share"] is None else f", {percent(curve['share'])} of the time"
    caption = f"n = {curve['n']} samples × P = {curve['num_problems']:,} problems, the same at each step. Bands: 95 %."
    return png(figure, "Pass@k while training", f"{caption}\n{curve['seconds']:.0f} s{share}.")


def _reward_panel(axes: Any, reward: dict[str, Any]) -> None:
    step, value = np.array(reward["step"]), np.array(reward["reward"])
    width = max(1, len(value) // 20)
    clean(axes)
    if width > 1:
        totals = np.cumsum(np.insert(value, 0, 0.0))
        smooth = (totals[width:] - totals[:-width]) / width
        axes.plot(step, value, color=COLOURS[1], linewidth=0.8, alpha=0.35)
        axes.plot(step[width - 1 :], smooth, color=COLOURS[1], linewidth=2)
    else:
        axes.plot(step, value, color=COLOURS[1], linewidth=2, marker="o", markersize=3)
    axes.set_xlabel("training step", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    note = f" (bold: mean of {width} steps)" if width > 1 else ""
    axes.set_title(f"Reward{note}", loc="left", fontsize=10)


def scatter(report: dict[str, Any]) -> bytes:
    """One point per problem: its share of correct samples in a (x) and in b (y), for every comparison."""
    from matplotlib.ticker import PercentFormatter

    pairs, by_name = report["comparisons"], {summary["name"]: summary for summary in report["evaluations"]}
    figure = canvas(4.8 * len(pairs), 5.0)
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
        clean(axes)
        axes.plot([0, 1], [0, 1], color="#8c959f", linewidth=0.8)
        axes.scatter(x, y, s=area, color=COLOURS[(i + 1) % len(COLOURS)], alpha=0.55, linewidths=0, clip_on=False)
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
    return png(figure, "Problem by problem", "Area: number of problems at a point. Above the line: better.")
