"""The report as one HTML file: figures, tables, and a browser of problems. No network, no libraries.

Model output is data, never markup: it travels as JSON in a data block, the script shows it through `textContent`
alone, and a content security policy admits no script but the one below, by its hash. The page holds a bounded part of
the records and says so.

The state of the browser is the URL's fragment, so that a view can be linked: #filter=gained-1&search=apples.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rl_soft.evaluation.records import GREEDY, MAX_THOUGHTS, MAX_TOKENS, Record

MAX_PROBLEMS = 2_000
MAX_COMPLETIONS = 6  # of a problem in an evaluation
MAX_CHARACTERS = 1_200  # of a completion: its start and its end


def page(
    report: Mapping[str, Any],
    tables: Sequence[Sequence[Sequence[str]]],
    notes: Sequence[str],
    pictures: Sequence[bytes],
    problems: Sequence[Mapping[str, list[Record]]],
) -> str:
    """The page.

    Args:
        report: what report.json holds.
        tables: each a list of rows of text, the first row its head.
        notes: paragraphs of text below the title.
        pictures: PNG files.
        problems: for each evaluation the records of every problem, by problem id.
    """
    partial = f"Partial records. {'; '.join(report['partial'])}." if report["partial"] else ""
    banner = f'<p class="warn">{escape(partial)}</p>' if partial else ""
    images = "".join(
        f'<img alt="figure {i}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for i, png in enumerate(pictures, start=1)
    )
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in report["warnings"])
    names = [summary["name"] for summary in report["evaluations"]]
    data = json.dumps({"names": names, "problems": _held(problems)}, ensure_ascii=False, separators=(",", ":"))
    body = (
        banner
        + f"<h1>{escape(report['title'])}</h1>"
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + (f'<h2>Warnings</h2><ul class="warn">{warnings}</ul>' if warnings else "")
        + f'<div class="figures">{images}</div>'
        + "".join(map(table, tables))
        + f"<h2>Problems</h2><p>{escape(_limits(problems))}</p>"
        + _BROWSER
        + f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>'
    )
    return document(report["title"], body, script=_SCRIPT)


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page of markup, to which its content security policy admits nothing from outside.

    Args:
        title: text.
        body, style, script: markup, more CSS, and JavaScript, admitted by its hash.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        script = f"<script>{script}</script>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{body}</main>{script}</body></html>\n"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first their head, as markup."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _limits(problems: Sequence[Mapping[str, list[Record]]]) -> str:
    total = len(problems[0])
    most = max(len(rows) for evaluation in problems for rows in evaluation.values())
    held = f"{min(total, MAX_PROBLEMS):,} of {total:,} problems"
    held += f", at most {MAX_COMPLETIONS} of {most} completions each" if most > MAX_COMPLETIONS else ""
    held += f", cut to {MAX_CHARACTERS:,} characters"
    return f"This page holds {held}. Counts are over all samples; the rest is in records.jsonl."


def _held(problems: Sequence[Mapping[str, list[Record]]]) -> list[dict[str, Any]]:
    """The problems that the page holds, with their completions: the data block's keys are the script's."""
    held = []
    for problem_id, rows in list(problems[0].items())[:MAX_PROBLEMS]:
        first = rows[0]
        evaluations = []
        for evaluation in problems:
            samples = [row for row in evaluation[problem_id] if row["sample"] != GREEDY]
            evaluations.append(
                {
                    "samples": len(samples),
                    "correct": sum(row["outcome"] == "correct" for row in samples),
                    "unparsed": sum(row["outcome"] == "unparsed" for row in samples),
                    "truncated": sum(row["truncated"] for row in samples),
                    "completions": [_completion(row) for row in _chosen(evaluation[problem_id])],
                }
            )
        held.append(
            {"id": problem_id, "question": first["question"], "gold": first["gold"], "evaluations": evaluations}
        )
    return held


def _chosen(rows: list[Record]) -> list[Record]:
    """The greedy answer, the first of each kind (outcome, truncated), then the first ones; `rows` are in order."""
    kinds = {(row["sample"] == GREEDY, row["outcome"], row["truncated"]): row["sample"] for row in reversed(rows)}
    first = sorted(kinds.values())
    numbers = list(dict.fromkeys([*first, *(row["sample"] for row in rows)]))[:MAX_COMPLETIONS]
    return [row for row in rows if row["sample"] in numbers]


def _completion(row: Record) -> dict[str, Any]:
    text = row["text"]
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
    completion = {field: row[field] for field in ("sample", "outcome", "prediction", "truncated", "thoughts")}
    thoughts = row.get("thought_tokens") or []
    completion["tokens"] = [
        [[str(token), round(float(weight), 3)] for token, weight in thought[:MAX_TOKENS]]
        for thought in thoughts[:MAX_THOUGHTS]
    ]
    return {**completion, "text": text}


_BROWSER = """
<div class="controls">
<label>Show <select id="filter"></select></label>
<label>Search <input id="search" type="search" placeholder="id, question, answer, completion"></label>
<output id="count"></output>
</div>
<div class="browser"><div id="list"></div><article id="problem"></article></div>
"""

STYLE = """
:root { color-scheme: light; --line: #d0d7de; --soft: #f6f8fa; --text: #1f2328; --quiet: #57606a; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: #fff; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 80px; }
h1 { font-size: 26px; margin: 0 0 8px; } h2 { font-size: 18px; margin: 32px 0 8px; }
p { margin: 4px 0; color: var(--quiet); overflow-wrap: anywhere; }
.warn { background: #fff4e5; border-left: 4px solid #d55e00; padding: 8px 12px; color: var(--text); list-style: none; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; margin: 16px 0; }
.figures img { max-width: 100%; max-height: 430px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 3px 12px; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.controls { display: flex; flex-wrap: wrap; gap: 12px 20px; align-items: center; margin: 12px 0; }
select, input { font: inherit; padding: 4px 8px; border: 1px solid #8c959f; border-radius: 6px; background: #fff; }
input { width: 280px; }
.browser { display: grid; grid-template-columns: minmax(260px, 1fr) minmax(0, 2fr); gap: 20px; align-items: start; }
.browser > * { min-width: 0; } /* a strip of thoughts scrolls, and the page does not */
#list { max-height: 75vh; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px; }
#list button { display: block; width: 100%; padding: 7px 12px; border: 0; border-bottom: 1px solid var(--line);
  background: #fff; font: inherit; text-align: left; cursor: pointer; color: inherit; }
#list button:hover { background: var(--soft); }
#list button[aria-current=true] { background: #e3f0f8; box-shadow: inset 4px 0 var(--accent); }
#list small { display: block; color: var(--quiet); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
pre { margin: 6px 0; padding: 10px 12px; background: var(--soft); border-radius: 6px; font-size: 13px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 0 0 6px; overflow-wrap: anywhere; } h4 { margin: 18px 0 4px; }
.completion { border-top: 1px solid var(--line); padding: 8px 0; }
.mark { display: inline-block; padding: 0 8px; margin-right: 8px; border-radius: 10px; font-size: 13px;
  border: 1px solid currentColor; }
.correct { color: #00674a; } .wrong { color: #a84300; } .unparsed, .truncated { color: #57606a; }
.thoughts { display: flex; gap: 6px; overflow-x: auto; padding: 4px 0; }
.thought { flex: none; border: 1px solid var(--line); border-radius: 6px; padding: 2px 6px; font: 12px/1.5 monospace; }
.thought div { display: flex; justify-content: space-between; gap: 10px; white-space: pre; padding: 0 4px; }
@media (max-width: 760px) { .browser { grid-template-columns: minmax(0, 1fr); } #list { max-height: 40vh; } }
"""

_SCRIPT = """
'use strict';
const { names, problems } = JSON.parse(document.getElementById('data').textContent);
const byId = id => document.getElementById(id);
const ROWS = 300;

function element(tag, text = '', className = '') {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = className;
  return node;
}

const solved = (problem, i) => problem.evaluations[i].correct > 0;
const last = names.length - 1;
const filters = new Map([['all', ['all problems', () => true]]]);
for (let i = 1; i < names.length; i++) {
  filters.set('gained-' + i, [`solved by ${names[i]}, not by ${names[0]}`, p => solved(p, i) && !solved(p, 0)]);
  filters.set('lost-' + i, [`solved by ${names[0]}, not by ${names[i]}`, p => solved(p, 0) && !solved(p, i)]);
}
filters.set('never', ['never solved', p => p.evaluations.every(e => e.correct === 0)]);
filters.set('once', [`solved once by ${names[last]}`, p => p.evaluations[last].correct === 1]);
filters.set('unparsed', ['with unparsed samples', p => p.evaluations.some(e => e.unparsed > 0)]);
filters.set('truncated', ['with truncated samples', p => p.evaluations.some(e => e.truncated > 0)]);
for (const [key, [label]] of filters) {
  const option = element('option', label);
  option.value = key;
  byId('filter').append(option);
}
for (const problem of problems) {
  const texts = problem.evaluations.flatMap(e => e.completions.map(c => c.text));
  problem.searched = [problem.id, problem.question, problem.gold, ...texts].join('\\n').toLowerCase();
}

function state() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const filter = filters.has(fragment.get('filter')) ? fragment.get('filter') : 'all';
  return { filter, search: fragment.get('search') || '', problem: fragment.get('problem') || '' };
}

function go(change) {
  const next = { ...state(), ...change };
  history.replaceState(null, '', '#' + new URLSearchParams(next));
  show();
}

function score(evaluation) { return `${evaluation.correct}/${evaluation.samples}`; }

function thoughts(completion) {
  const row = element('div', '', 'thoughts');
  for (const tokens of completion.tokens) {
    const thought = element('div', '', 'thought');
    for (const [token, weight] of tokens) {
      const line = element('div');
      line.style.background = `rgb(0 114 178 / ${Math.min(1, Math.max(0, weight)) * 0.4})`;
      const name = token.replaceAll('\\n', '\\u21b5') || '\\u2205';
      line.append(element('span', name), element('span', weight.toFixed(2)));
      thought.append(line);
    }
    row.append(thought);
  }
  return row;
}

function completionNode(completion) {
  const node = element('div', '', 'completion');
  node.append(element('span', completion.outcome, 'mark ' + completion.outcome));
  if (completion.truncated) node.append(element('span', 'truncated', 'mark truncated'));
  const name = completion.sample < 0 ? 'greedy' : 'sample ' + completion.sample;
  const answer = completion.prediction === null ? 'no answer' : 'answer ' + completion.prediction;
  node.append(element('span', `${name}, ${answer}, ${completion.thoughts} thoughts`));
  if (completion.tokens.length) node.append(thoughts(completion));
  if (completion.tokens.length && completion.tokens.length < completion.thoughts)
    node.append(element('p', `the first ${completion.tokens.length} of ${completion.thoughts} thoughts`));
  node.append(element('pre', completion.text));
  return node;
}

function problemNodes(problem) {
  const nodes = [element('h3', problem.id), element('pre', problem.question), element('p', 'Gold: ' + problem.gold)];
  problem.evaluations.forEach((evaluation, i) => {
    const parts = [`${names[i]}: ${score(evaluation)} correct`];
    if (evaluation.unparsed) parts.push(`${evaluation.unparsed} unparsed`);
    if (evaluation.truncated) parts.push(`${evaluation.truncated} truncated`);
    nodes.push(element('h4', parts.join(', ')), ...evaluation.completions.map(completionNode));
  });
  return nodes;
}

function show() {
  const { filter, search, problem } = state();
  byId('filter').value = filter;
  if (byId('search').value !== search) byId('search').value = search;
  const test = filters.get(filter)[1], needle = search.toLowerCase();
  const found = problems.filter(p => test(p) && p.searched.includes(needle));
  const shown = found.find(p => p.id === problem) || found[0];
  const more = found.length > ROWS ? `, the first ${ROWS} listed` : '';
  byId('count').textContent = `${found.length} of ${problems.length} problems${more}`;
  byId('list').replaceChildren(...found.slice(0, ROWS).map(p => {
    const button = element('button');
    button.append(element('span', p.id), element('small', p.question),
      element('small', p.evaluations.map((e, i) => `${names[i]} ${score(e)}`).join(' \\u00b7 ')));
    button.setAttribute('aria-current', p === shown);
    button.onclick = () => go({ problem: p.id });
    return button;
  }));
  byId('problem').replaceChildren(...(shown ? problemNodes(shown) : [element('p', 'No problem matches.')]));
}

byId('filter').onchange = event => go({ filter: event.target.value });
byId('search').oninput = event => go({ search: event.target.value });
window.onhashchange = show;
show();
"""
