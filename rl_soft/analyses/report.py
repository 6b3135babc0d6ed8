"""The report of `rl-soft analyze all`: one HTML file that a person reads from top to bottom. No network, no script.

For each analysis: the question, the picture, what it says here, what the paper found, and whether they agree. Model
output is data: every text is escaped.
"""

from __future__ import annotations

import base64
import difflib
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rl_soft.analyses import traces
from rl_soft.analyses.findings import Claim, number
from rl_soft.analyses.rouge import rouge_l
from rl_soft.analyses.run import ANALYSES, Finding
from rl_soft.config.commands import AnalysisArguments
from rl_soft.data.sources import Row
from rl_soft.evaluation import html, render, report
from rl_soft.evaluation.provenance import versions
from rl_soft.files import write_atomic
from rl_soft.thoughts.layout import Layout

EXAMPLES = 3  # problems whose traces are shown
BALANCED = 12  # thoughts, the most balanced ones
CONTEXT = 10  # ids before a thought
PAPER = "LLMs are Single-threaded Reasoners, arXiv 2508.03440"
WORDS = {"yes": "holds", "no": "does not hold", "in part": "holds in part", "undecided": "undecided"}
PASSK = (
    "On MATH-500, with Qwen2.5 models of 0.5B to 7B, the Pass@k curve of stochastic soft thinking lies above that of "
    "discrete sampling. Averaged over eight benchmarks, plain soft thinking is about as good as greedy decoding, and "
    "Gumbel-Softmax noise recovers what sampling has."
)
NOTES = {  # below a picture: how to read it
    "traces": "Bands and bars: 95 % intervals over prompts. Entropy and what is left out are of the distribution that "
    "the next thought is made from.",
    "branching": "Left and middle: how often a distance occurs. Right: the same by how balanced the soft token is.",
    "lens": "Solid: what the mixture holds of each path. Dotted: what the other path alone holds of it, which is what "
    "the two have in common.",
    "plane": "Each point is the average over thoughts and draws at one tau or gamma. Up: random. Right: soft.",
}


def write(
    findings: Sequence[Finding],
    layout: Layout,
    rows: Sequence[Row],
    arguments: AnalysisArguments,
    evals: Sequence[str],
) -> Path:
    """Write report.html into the output directory, from the findings and from evaluations of any decoders.

    Raises:
        ValueError, FileNotFoundError: evaluations that cannot be read or compared.
    """
    out = Path(str(arguments.output_dir))
    passk = _passk(evals, out) if evals else ""
    by_name = {finding.name: finding for finding in findings}
    extras = {"traces": _examples(by_name["traces"], layout, rows), "branching": _steps(by_name["branching"], layout)}
    sections = [_section(finding, extras.get(finding.name, "")) for finding in findings]
    model, claims = arguments.model_name_or_path, [claim for finding in findings for claim in finding.claims]
    title = f"How soft thoughts work in {Path(model).name}"
    few = f"<p class='warn'>{len(rows)} prompts are few; the intervals are rough.</p>" * (len(rows) < report.MIN_UNITS)
    body = [
        f"<header><p class='kicker'>The analyses of {escape(PAPER)}</p><h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(_lead(claims))}</p><p>{escape(_setting(layout, rows, arguments))}</p>{few}</header>",
        _overview(findings, bool(passk)),
        *sections,
        passk,
        _method(layout, arguments),
    ]
    write_atomic(out / "report.html", html.document(title, "".join(body), STYLE))
    return out / "report.html"


def _lead(claims: Sequence[Claim]) -> str:
    counts = Counter(claim.holds for claim in claims)
    words = {"yes": "hold", "no": "do not", "in part": "in part", "undecided": "undecided"}
    parts = [f"{counts[key]} {word}" for key, word in words.items() if counts[key]]
    return f"{len(claims)} findings of the paper were tested on this model: {', '.join(parts)}."


def _setting(layout: Layout, rows: Sequence[Row], arguments: AnalysisArguments) -> str:
    thinking = layout.thinking
    k = thinking.thought_k or "all"
    return (
        f"{len(rows)} prompts of {arguments.dataset} ({arguments.split}); up to {thinking.num_thoughts} thoughts; "
        f"soft tokens of the K = {k} most probable ids, temperature {thinking.thought_temperature:g}; gumbel at tau "
        f"{thinking.thought_tau:g}, dirichlet at gamma {thinking.thought_gamma:g}."
    )


def _overview(findings: Sequence[Finding], passk: bool) -> str:
    lines = []
    for finding in findings:
        for claim in finding.claims:
            lines.append(
                f"<tr><td>{_chip(claim.holds)}</td><td><a href='#{finding.name}'>{escape(claim.text)}</a></td>"
                f"<td>{escape(claim.here)}</td></tr>"
            )
    more = "<p><a href='#passk'>Pass@k of the decoders</a></p>" if passk else ""
    return (
        "<section><table class='claims'><thead><tr><th></th><th>the paper's finding</th><th>here, with 95 % interval"
        f"</th></tr></thead><tbody>{''.join(lines)}</tbody></table>{more}</section>"
    )


def _chip(holds: str) -> str:
    return f"<span class='chip {holds.replace(' ', '-')}'>{WORDS[holds]}</span>"


def _picture(png: bytes, alt: str) -> str:
    return f"<img alt='{escape(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _section(finding: Finding, extra: str) -> str:
    module = ANALYSES[finding.name].module
    said = "".join(f"<p>{escape(text)}</p>" for text in finding.says)
    chips = "".join(
        f"<li>{_chip(claim.holds)} {escape(claim.text)}: {escape(claim.here)}</li>" for claim in finding.claims
    )
    cells = [
        [str(c) if not isinstance(c, float) else f"{c:.4g}" for c in row] for row in module.table(finding.summary)
    ]
    return (
        f"<section id='{finding.name}'><p class='kicker'>{finding.name}</p><h2>{escape(module.QUESTION)}</h2>"
        f"<figure>{_picture(finding.picture, module.QUESTION)}<figcaption>{escape(NOTES[finding.name])}</figcaption>"
        f"</figure><div class='two'><div><h3>What it says here</h3>{said}<ul class='chips'>{chips}</ul></div>"
        f"<aside><h3>What the paper found</h3><p>{escape(module.PAPER)}</p></aside></div>{extra}"
        f"<details><summary>All figures ({len(cells) - 1} rows, also in {finding.name}.csv)</summary>"
        f"<div class='tall'>{html.table(cells)}</div></details></section>"
    )


# -- what one can look at ---------------------------------------------------------------------------------------------


def _pieces(layout: Layout, ids: Sequence[int], marks: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of ids in runs of equal marks; joined they are the decoded text, spaces included.

    A character of several ids belongs to the run of its last.
    """
    ends = [i for i in range(1, len(ids)) if marks[i] != marks[i - 1]] + [len(ids)] * bool(ids)
    pieces, before = [], ""
    for end in ends:
        text = str(layout.tokenizer.decode(list(ids[:end])))
        text = text if end == len(ids) else text.rstrip("\ufffd")
        pieces.append((text[len(before) :], marks[end - 1]))
        before = text
    return pieces


def _examples(finding: Finding, layout: Layout, rows: Sequence[Row]) -> str:
    """The chains of the first problems; what is not in the greedy chain, in order, is marked."""
    blocks = []
    for row, record in list(zip(rows, finding.records, strict=True))[:EXAMPLES]:
        greedy = record[traces.REFERENCE][0]["ids"]
        lines = []
        for kind in traces.TRACES:
            ids = record[kind][0]["ids"]
            marks = [kind != traces.REFERENCE] * len(ids)
            for match in difflib.SequenceMatcher(None, greedy, ids, autojunk=False).get_matching_blocks():
                marks[match.b : match.b + match.size] = [False] * match.size
            text = "".join(
                f"<mark>{escape(piece)}</mark>" if mark else escape(piece)
                for piece, mark in _pieces(layout, ids, marks)
            )
            lines.append(f"<dt>{kind}<small>{rouge_l(greedy, ids):.2f}</small></dt><dd>{text}</dd>")
        blocks.append(f"<p class='asked'>{escape(row.question)}</p><dl class='chains'>{''.join(lines)}</dl>")
    return (
        f"<details open><summary>Look at {min(EXAMPLES, len(rows))} of them: marked is what greedy decoding does not "
        f"say, in order; the number is ROUGE-L</summary>{''.join(blocks)}</details>"
    )


def _steps(finding: Finding, layout: Layout) -> str:
    """The most balanced thoughts, at most one per problem: what was said before, both tokens, both distances."""
    best = []
    for record in finding.records:
        if record["weights"]:
            t = max(range(len(record["weights"])), key=lambda i: record["weights"][i][1])
            best.append((record["weights"][t][1], t, record))
    best.sort(key=lambda entry: -entry[0])

    def text(ids: Sequence[int]) -> str:
        decoded = str(layout.tokenizer.decode(list(ids)))
        return decoded.replace(" ", "␣") if decoded.isspace() and "\n" not in decoded else repr(decoded)[1:-1]

    lines = []
    for _, t, record in best[:BALANCED]:
        before = text([ids[0] for ids in record["ids"][max(0, t - CONTEXT) : t]])
        cells = [f"<td class='before'>{'' if t <= CONTEXT else '… '}{escape(before)}</td>"]
        for j in (0, 1):
            weight = record["weights"][t][j]
            cells.append(f"<td><b>{escape(text([record['ids'][t][j]]))}</b> {weight:.2f}</td>")
        cells += [f"<td>{number(record['distances'][t][j], 2)}</td>" for j in (0, 1)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<details open><summary>The {len(lines)} most balanced thoughts, one per problem</summary><div class='wide'>"
        "<table class='steps'><thead><tr><th>before</th><th>strongest</th><th>second</th><th>JS to strongest</th>"
        f"<th>JS to second</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _passk(evals: Sequence[str], out: Path) -> str:
    """Pass@k of evaluations made by `rl-soft eval`, and their paired differences to the first."""
    if len(evals) > 1:
        figures = report.compare(evals, out / "passk")
        folder = out / "passk"
    else:
        figures, folder = report.build(evals[0]), Path(evals[0])
    notes = [*(render.provenance(summary) for summary in figures["evaluations"]), render.method(figures)]
    warnings = "".join(f"<li>{escape(note)}</li>" for note in figures["warnings"])
    return (
        "<section id='passk'><p class='kicker'>Pass@k</p><h2>Does the noise pay off in answers?</h2><figure>"
        f"{_picture((folder / 'passk.png').read_bytes(), 'Pass@k by k')}</figure><div class='two'><div>"
        f"<h3>What it says here</h3>{html.table(render.table(figures))}"
        + (f"<ul class='warn'>{warnings}</ul>" if warnings else "")
        + f"</div><aside><h3>What the paper found</h3><p>{escape(PASSK)}</p></aside></div><details><summary>What was "
        f"evaluated</summary>{''.join(f'<p>{escape(note)}</p>' for note in notes)}</details></section>"
    )


def _method(layout: Layout, arguments: AnalysisArguments) -> str:
    decoder = ", ".join(f"{k} {v!r}" for k, v in layout.thinking.to_dict().items() if v not in (None, ""))
    what = [
        f"Model {arguments.model_name_or_path}, {arguments.dtype}. Thinking: {decoder}.",
        "Intervals are at 95 % and resample prompts: thoughts of one trace are not independent. A finding holds, or "
        "does not, where its whole interval is on one side; else it is undecided. Several findings are tested and "
        "their intervals are not adjusted for that.",
        "Gumbel noise in traces is over the whole vocabulary, and the K largest are kept; the paper draws it inside "
        "the K most probable, as the plane does. Top-k, top-p and min-p cuts are not made.",
        "Rules and definitions: docs/analyses.md. Beside this file: NAME.jsonl, the records; NAME.json and NAME.csv, "
        "the figures.",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]
    return f"<section><h2>How it was made</h2>{''.join(f'<p>{escape(text)}</p>' for text in what)}</section>"


STYLE = """
main { max-width: 1060px; }
header { padding: 28px 0 4px; } h1 { font-size: 34px; letter-spacing: -.02em; line-height: 1.15; }
h2 { font-size: 25px; letter-spacing: -.01em; margin: 2px 0 14px; line-height: 1.25; } h3 { margin-top: 4px; }
.lead { font-size: 19px; color: var(--text); margin: 10px 0; }
.kicker { text-transform: uppercase; letter-spacing: .08em; font-size: 12px; font-weight: 600; color: var(--accent); }
section { border-top: 1px solid var(--line); margin-top: 40px; padding-top: 26px; }
section p { color: var(--text); margin: 0 0 10px; } section .kicker { color: var(--accent); margin: 0; }
figure { margin: 0 0 18px; } figure img { width: 100%; display: block; }
figcaption { color: var(--quiet); font-size: 13.5px; margin-top: 6px; }
.two { display: grid; grid-template-columns: 1.7fr 1fr; gap: 32px; align-items: start; }
aside { background: var(--soft); border-left: 4px solid var(--accent); padding: 12px 16px 6px; }
.chips { list-style: none; padding: 0; } .chips li { margin: 6px 0; }
.chip { display: inline-block; white-space: nowrap; font-size: 12.5px; font-weight: 600; padding: 1px 9px;
  border-radius: 10px; margin-right: 4px; color: #fff; background: #57606a; }
.chip.yes { background: #00674a; } .chip.no { background: #a84300; } .chip.in-part { background: #8a6100; }
.claims { white-space: normal; width: 100%; } .claims th, .claims td { text-align: left; vertical-align: top; }
.claims td:last-child { min-width: 240px; color: var(--quiet); } .claims a { color: inherit; }
details { margin: 14px 0; } summary { cursor: pointer; color: var(--accent); font-weight: 600; }
.tall { max-height: 420px; overflow: auto; }
section .asked { background: var(--soft); padding: 8px 12px; border-radius: 6px; margin: 14px 0 4px; }
section .asked { white-space: pre-wrap; }
.chains { display: grid; grid-template-columns: 96px 1fr; gap: 6px 12px; margin: 8px 0 22px; font-size: 14px; }
.chains dt { font-weight: 600; } .chains dt small { display: block; font-weight: 400; color: var(--quiet); }
.chains dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: #ffe2cc; color: inherit; border-radius: 3px; }
.steps td { font-size: 13.5px; } .steps .before { color: var(--quiet); white-space: normal; min-width: 300px; }
@media (max-width: 760px) { .two { grid-template-columns: 1fr; } .chains { grid-template-columns: 1fr; } }
"""
