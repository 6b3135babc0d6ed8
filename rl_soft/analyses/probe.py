"""What thoughts hold, read through the LM head: `rl-soft analyze probe` (CODI, arXiv 2502.21074, 5.1).

The probed states are the last hidden states at <bot> (position 0, from which the first thought is made) and at each of
the n thoughts; the LM head turns each into a distribution over tokens, before any projection.

The rule. The intermediate results of a problem are the numbers after the last `=` of its steps, the last step left
out, since its result is the answer. A result is held if at some of the n + 1 positions one of the k strongest tokens
is its first token, as the tokenizer writes the number alone or after a space. Two rates are reported over all problems
with as many steps: the share of results held, and the share of problems all of whose results are held. Both are given
for problems answered correctly and for all.

By chance: the same with the results of another problem with as many of them, the next one in order, where there is
another. A result of several tokens is judged by its first alone, and small vocabularies are hit by accident; only the
distance to chance counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rl_soft.data.sources import Row
from rl_soft.files import write_atomic
from rl_soft.model.think import last_state, position_ids, think
from rl_soft.thoughts.layout import Layout, pad

_RESULT = re.compile(r"=\s*[$£€]?\s*(-?[\d.,]*\d)[^=]*$")


def intermediate_results(row: Row) -> list[str]:
    """The numbers after the last `=` of each step but the last; steps without one have none."""
    found = [_RESULT.search(step) for step in row.steps[:-1]]
    return [match.group(1).replace(",", "") for match in found if match]


def first_tokens(layout: Layout, number: str) -> set[int]:
    """The ids that a number can begin with: alone, or after a space where that is not a token of its own."""
    spaced = layout.encode(" " + number)
    kept = [i for i in spaced if str(layout.tokenizer.decode([i])).strip()]
    return {layout.encode(number)[0], *kept[:1]}


@torch.no_grad()
def thought_logits(model: Any, layout: Layout, rows: Sequence[Row], control: str = "none") -> Tensor:
    """Logits of the LM head at <bot> and at each thought, without noise: (B, n + 1, V) float32."""
    thinking, device = layout.thinking, model.get_input_embeddings().weight.device
    prompts = [layout.prompt_ids(row.question) for row in rows]
    mask = pad([[1] * len(p) for p in prompts], 0, left=True).to(device)
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=pad(prompts, layout.tokenizer.pad_token_id, left=True).to(device),
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        output_hidden_states=thinking.kind.reads_hidden,
    )
    start = out.logits[:, -1], last_state(out)
    seen = think(model, model, *start, cache, mask, thinking, None, control=control, keep_logits=True)[2]
    return torch.stack(seen, dim=1).float()


@dataclass(frozen=True)
class Probed:
    """One problem: its results, the strongest ids per position, whether each result is held, and by chance."""

    row: Row
    results: list[str]
    top: list[list[int]]  # (n + 1) x k
    held: list[bool]
    by_chance: list[bool] | None  # of another problem's results; None where there is none with as many
    correct: bool


def check(layout: Layout, rows: Sequence[Row]) -> None:
    """Refuse what cannot be probed.

    Raises:
        ValueError: the model does not think in the latent phase, or no row has an intermediate result.
    """
    if layout.thinking.phase != "latent" or not layout.thinking.num_thoughts:
        raise ValueError("probe reads latent thoughts; this model has none (phase latent with num_thoughts above 0)")
    if not any(intermediate_results(row) for row in rows):
        raise ValueError("no step of these rows but the last holds `= NUMBER`: there are no intermediate results")


def probe(
    model: Any, layout: Layout, rows: Sequence[Row], correct: Sequence[bool], top_k: int, batch_size: int
) -> list[Probed]:
    """Apply the rule to every row.

    Args:
        correct: whether the model answers each row right.

    Raises:
        ValueError: what `check` refuses.
    """
    check(layout, rows)
    results = [intermediate_results(row) for row in rows]
    top: list[list[list[int]]] = []
    for start in range(0, len(rows), batch_size):
        logits = thought_logits(model, layout, rows[start : start + batch_size])
        top += logits.topk(min(top_k, logits.shape[-1]), dim=-1).indices.tolist()

    by_count: dict[int, list[int]] = {}
    for i, found in enumerate(results):
        by_count.setdefault(len(found), []).append(i)
    other = {i: same[(at + 1) % len(same)] for same in by_count.values() for at, i in enumerate(same) if len(same) > 1}

    def held(i: int, whose: int) -> list[bool]:
        tokens = {token for position in top[i] for token in position}
        return [bool(first_tokens(layout, number) & tokens) for number in results[whose]]

    return [
        Probed(row, results[i], top[i], held(i, i), held(i, other[i]) if i in other else None, bool(correct[i]))
        for i, row in enumerate(rows)
    ]


def rates(probed: Sequence[Probed]) -> dict[str, dict[str, float | None]]:
    """By the number of intermediate results: how many problems, the share of results held and of problems all held.

    None stands for a chance rate that no other problem gives.
    """
    table = {}
    for count in sorted({len(p.results) for p in probed} - {0}):
        some = [p for p in probed if len(p.results) == count]
        row: dict[str, float | None] = {"problems": len(some)}
        chance = [p.by_chance for p in some if p.by_chance is not None]
        for name, values in (("", [p.held for p in some]), ("_by_chance", chance)):
            row[f"results_held{name}"] = sum(map(sum, values)) / (count * len(values)) if values else None
            row[f"all_held{name}"] = sum(map(all, values)) / len(values) if values else None
        table[str(count)] = row
    return table


def report(probed: Sequence[Probed], layout: Layout, top_k: int, out: Path | None, shown: int = 5) -> str:
    """Markdown: the rates, and the tokens of the first problems. Also written to `out`, with probe.json."""
    correct = [p for p in probed if p.correct]
    figures = {
        "top_k": top_k,
        "problems": len(probed),
        "correct": len(correct),
        "correct_only": rates(correct),
        "all": rates(probed),
    }
    lines = [
        f"# What the thoughts hold: top {top_k} tokens at <bot> and {layout.thinking.num_thoughts} thoughts",
        "",
        f"{len(probed)} problems, {len(correct)} answered correctly. A result is held if its first token is among the "
        "top tokens of some position; by chance: the results of another problem.",
        "",
        "| | results | problems | results held | by chance | all held | by chance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, table in (("correct", figures["correct_only"]), ("all", figures["all"])):
        for count, row in table.items():  # type: ignore[attr-defined]
            cells = ["–" if row[key] is None else f"{row[key]:.1%}" for key in _COLUMNS]
            lines.append(f"| {name} | {count} | {row['problems']} | {' | '.join(cells)} |")
    lines += ["", "Top tokens at <bot> and at each thought, the strongest first:", ""]
    for p in list(correct or probed)[:shown]:
        words = [" ".join(repr(layout.tokenizer.decode([i]))[1:-1] for i in position) for position in p.top]
        lines += [f"- `{p.row.question}` results {', '.join(p.results)}, answer {p.row.answer}: {' | '.join(words)}"]
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "probe.json", json.dumps(figures, indent=1) + "\n")
        write_atomic(out / "probe.md", text)
    return text


_COLUMNS = ("results_held", "results_held_by_chance", "all_held", "all_held_by_chance")
