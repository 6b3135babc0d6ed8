"""A report as text: report.md, passk.csv, and the tables that the model card and report.html show too.

Functions of the report alone, so that everything can be written again from report.json.
"""

import csv
import io
import re
from collections.abc import Mapping
from typing import Any


def passk_csv(report: dict[str, Any]) -> str:
    """passk.csv: one line per evaluation, metric and k."""
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


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    summaries, pairs = report["evaluations"], report["comparisons"]
    lines = [f"**Partial records.** {'; '.join(report['partial'])}.", ""] if report["partial"] else []
    lines += [f"# {report['title']}", ""]
    lines += [f"{provenance(summary)}  " for summary in summaries]
    lines += ["", "![Pass@k](passk.png)", "", *markdown_table(table(report))]
    if pairs:
        lines += ["", *markdown_table(splits(report))]
    lines += ["", method(report), ""]
    for summary in summaries:
        shares = ", ".join(f"{outcome} {percent(share, 1)}" for outcome, share in summary["outcomes"].items())
        lines.append(
            f"- {summary['name']}: {shares}; truncated {percent(summary['truncated'], 1)}; "
            f"{summary['distinct_answers']:.1f} distinct answers per problem, {summary['mean_thoughts']:.1f} thoughts "
            f"and {summary['mean_answer_tokens']:.1f} answer tokens per sample."
        )
    if curve := report["curve"]:
        lines += ["", "## While training", "", "![Pass@k by step](training.png)", "", *markdown_table(steps(curve))]
        lines += ["", cost(curve)]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {note}" for note in report["warnings"])]
    if pairs:
        lines += ["", "## Problems gained and lost", "", "![One point per problem](problems.png)"]
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
            lines += ["", f"`{example['id']}`, gold {code(example['gold'])}, sample {example['sample']} "]
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
            low, high = (percent(values[end], 1) for end in ("low", "high")) if values else ("", "")
            cells += [percent(values["mean"], 1), f"{low} – {high}"] if values else ["", ""]
        for values in of_pairs:
            low, high = (points(values[end]) for end in ("low", "high")) if values else ("", "")
            cells += [points(values["mean"]), f"{low} to {high}"] if values else ["", ""]
        return cells

    rows = [["", *(head for name in names for head in (name, "95 % CI"))]]
    if any(summary["greedy"] for summary in summaries):
        rows.append(row("greedy", [s["greedy"] for s in summaries], [p["greedy"] for p in pairs]))
    for i, values in enumerate(summaries[0]["pass_at_k"]):
        label = f"pass@{values['k']}"
        rows.append(row(label, [s["pass_at_k"][i] for s in summaries], [p["pass_at_k"][i] for p in pairs]))
    rows.append(row("maj@n", [s["maj_at_n"] for s in summaries], [None] * len(pairs)))
    return rows


def splits(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the first their head: how many problems rose and fell, for every comparison."""
    rows = [["", "", "problems gained / lost / tied", "share of resamples ≤ 0"]]
    for pair in report["comparisons"]:
        values = [("greedy", pair["greedy"])] if pair["greedy"] else []
        values += [(f"pass@{row['k']}", row) for row in pair["pass_at_k"]]
        for label, row in values:
            split = f"{row['gained']} / {row['lost']} / {row['tied']}"
            rows.append([f"{pair['b']} − {pair['a']}", label, split, f"{row['share_not_positive']:.4f}"])
    return rows


def steps(curve: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the first their head: one for each evaluation of a run, by its optimizer step."""
    ends = curve["points"][0]["pass_at_k"]
    shown = [0] if len(ends) == 1 else [0, len(ends) - 1]
    head = ["step", *(cell for i in shown for cell in (f"pass@{ends[i]['k']}", "95 % CI")), "Δ points of pass@1"]
    rows = [[*head, "95 % CI", "greedy", "seconds"]]
    for point in curve["points"]:
        cells = [f"{point['step']}{' (best)' if point['step'] == curve['best_step'] else ''}"]
        for values in (point["pass_at_k"][i] for i in shown):
            cells += [percent(values["mean"], 1), f"{percent(values['low'], 1)} – {percent(values['high'], 1)}"]
        change = point["change"]
        cells += (
            [points(change["mean"]), f"{points(change['low'])} to {points(change['high'])}"] if change else ["", ""]
        )
        cells += ["" if point["greedy"] is None else percent(point["greedy"], 1)]
        rows.append([*cells, "" if point["seconds"] is None else f"{point['seconds']:.1f}"])
    return rows


def cost(curve: Mapping[str, Any]) -> str:
    """A paragraph: what was evaluated at each step, what it cost, and which step was the best."""
    share = "" if curve["share"] is None else f", {percent(curve['share'])} of the time of training"
    where = "it is the model" if curve["loaded"] else f"in checkpoint-{curve['best_step']}, if that step was saved"
    return (
        f"While training: {len(curve['points']) - 1} evaluations of {curve['num_problems']:,} problems × n = "
        f"{curve['n']}, with the same problems and noise at each step, so differences are paired with step 0. They "
        f"took {curve['seconds']:.1f} s{share}. Best by {curve['metric']}: step {curve['best_step']} ({where})."
    )


def markdown_table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def provenance(summary: dict[str, Any]) -> str:
    """One line: what was evaluated, how, and with which code."""
    header = summary["header"]
    values = {key: value for key, value in header["decoder"].items() if value not in (None, "")}
    if values.get("switch") == "none":
        values = {key: value for key, value in values.items() if not key.startswith("switch")}
    decoder = ", ".join(f"{key} {value!r}" for key, value in values.items())
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


def method(report: Mapping[str, Any]) -> str:
    """One line: how the figures were estimated."""
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


def percent(share: float, digits: int = 0) -> str:
    """A share in percent; with a digit more where it would be rounded to none or all."""
    if digits == 0 and 0 < share < 1 and round(100 * share) in (0, 100):  # 99.5 % is not all
        digits = 1
    return f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _fence(text: str, shortest: int) -> str:
    """Backticks enough to enclose a text that may itself hold backticks."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


def code(text: str) -> str:
    fence = _fence(text, 1)
    padding = " " if len(fence) > 1 else ""
    return f"{fence}{padding}{' '.join(text.split())}{padding}{fence}"


def _fenced(text: str, limit: int = 1500) -> str:
    text = text if len(text) <= limit else text[:limit] + " […]"
    fence = _fence(text, 3)
    return f"{fence}text\n{text}\n{fence}"
