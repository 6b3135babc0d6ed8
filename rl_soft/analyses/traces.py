"""Where do soft traces go? ROUGE-L with the greedy trace, entropy and mass left out, by kind (arXiv 2508.03440).

For each prompt one greedy trace, one of soft thoughts, and n of gumbel and dirichlet thoughts and of sampled tokens,
all at the temperature of the thoughts. A trace's chain is the strongest id of each of its thoughts. Chains are
compared with the greedy one by ROUGE-L (`rouge`) over ids; the figure of a prompt is its mean over samples, and
intervals and paired differences are over prompts. The random kinds meet the same noise, addressed by (seed, problem,
sample).

Entropy is that of the next-token distribution, in nats, at the temperature of the thoughts. The mass left out is the
probability outside what is fed: of a token 1 - p, of a mixture what its K ids do not cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rl_soft.analyses.findings import Claim, above, compact, number, percent, shown
from rl_soft.analyses.rouge import rouge_l
from rl_soft.data.sources import Row
from rl_soft.evaluation.passk import bootstrap, paired_bootstrap
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.engines import Roll
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address

QUESTION = "Does a soft trace explore, or does it retrace greedy decoding?"
PAPER = (
    "The strongest ids of a plain soft trace overlap with the greedy trace far more than sampled traces do: plain "
    "soft thinking is greedy decoding in disguise. Gumbel noise brings the diversity of sampling back."
)
TRACES = {"greedy": "token", "soft": "soft", "gumbel": "gumbel", "dirichlet": "dirichlet", "sampled": "token"}
RANDOM = ("gumbel", "dirichlet", "sampled")
REFERENCE, COMPARED = "greedy", "soft"  # overlaps are with the first; differences are of the second to the others
RESAMPLES = 1_000  # of the bands


@torch.no_grad()
def measure(
    model: Any,
    layout: Layout,
    rows: Sequence[Row],
    seed: int,
    samples: int,
    kinds: Sequence[str] = tuple(TRACES),
    roll: Roll = rollout,
) -> list[dict[str, Any]]:
    """One record per row.

    Args:
        layout: of a `Thinking` whose thought kind is replaced by each of `kinds`; its K, T, tau and gamma hold.
        samples: n, traces of each random kind.
        roll: makes the rollouts.

    Returns:
        For each row {kind: one trace or, for random kinds, n of them}, each {"ids": the chain, "entropy", "outside"}.
    """
    records: list[dict[str, Any]] = [{kind: [] for kind in kinds} for _ in rows]
    for kind in kinds:
        of_kind = Layout(replace(layout.thinking, thought=TRACES[kind]), layout.tokenizer)
        tasks = [(i, sample) for i in range(len(rows)) for sample in range(samples if kind in RANDOM else 1)]
        prompts = [of_kind.prompt_ids(rows[i].question) for i, _ in tasks]
        seeds = torch.tensor([address(seed, rows[i].id, sample) for i, sample in tasks]) if kind in RANDOM else None
        out = roll(model, of_kind, prompts, seeds)
        for at, (i, _) in enumerate(tasks):
            thoughts = out.thought_mask[at]
            trace = {
                "ids": out.support[at, thoughts, 0].tolist(),
                "entropy": compact(out.entropy[at, thoughts].tolist(), 5),
                "outside": compact(out.outside[at, thoughts].tolist(), 5),
            }
            records[i][kind].append(trace)
    return records


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """ROUGE-L by kind with intervals, paired differences to soft, and curves by position.

    Raises:
        ValueError: fewer than two prompts, or no thought in any greedy trace.
    """
    if len(records) < 2:
        raise ValueError(f"traces: intervals need at least two prompts, got {len(records)}")
    if not any(r[REFERENCE][0]["ids"] for r in records):
        raise ValueError("traces: no thought was fed; the traces ended at their first position")
    kinds = [kind for kind in TRACES if kind in records[0]]
    overlap = {
        kind: [float(np.mean([rouge_l(r[REFERENCE][0]["ids"], t["ids"]) for t in r[kind]])) for r in records]
        for kind in kinds
        if kind != REFERENCE
    }
    same = {k: [float(np.mean([t["ids"] == r[REFERENCE][0]["ids"] for t in r[k]])) for r in records] for k in overlap}
    lengths = {k: [float(np.mean([len(t["ids"]) for t in r[k]])) for r in records] for k in kinds}
    differences = {}
    for kind in overlap:
        if kind != COMPARED:
            found = paired_bootstrap(overlap[kind], overlap[COMPARED])
            differences[kind] = {"value": found.mean, "low": found.low, "high": found.high}
    return {
        "prompts": len(records),
        "samples": max(len(r[kind]) for r in records for kind in kinds),
        "rouge_l": {kind: _mean(values) for kind, values in overlap.items()},
        "soft_minus": differences,
        "identical": {kind: _mean(values) for kind, values in same.items()},
        "length": {kind: _mean(values) for kind, values in lengths.items()},
        "entropy": {kind: _curve([[t["entropy"] for t in r[kind]] for r in records]) for kind in kinds},
        "outside": {kind: _curve([[t["outside"] for t in r[kind]] for r in records]) for kind in kinds},
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    found = bootstrap(values)
    return {"value": found.mean, "low": found.low, "high": found.high}


def _curve(traces: Sequence[Sequence[Sequence[float]]], fewest: int = 5) -> dict[str, Any]:
    """Means over prompts by position, with bands from resampled prompts, as far as `fewest` prompts still think.

    Also the mean over all positions of a prompt, and then over prompts.

    Args:
        traces: for each prompt, for each of its samples, one value per position.
    """
    longest = max((len(t) for samples in traces for t in samples), default=0)
    total, count = np.zeros((len(traces), longest)), np.zeros((len(traces), longest))
    for i, samples in enumerate(traces):
        for trace in samples:
            total[i, : len(trace)] += trace
            count[i, : len(trace)] += 1
    present = count > 0
    per_prompt = np.divide(total, count, out=np.zeros_like(total), where=present)  # (P, T)
    T = int((present.sum(0) >= min(fewest, len(traces))).sum())
    picks = np.random.default_rng(0).multinomial(len(traces), [1 / len(traces)] * len(traces), size=RESAMPLES)
    alive = picks @ present[:, :T]
    sums = picks @ per_prompt[:, :T]
    means = np.divide(sums, alive, out=np.full_like(sums, np.nan), where=alive > 0)
    low, high = np.nanquantile(means, (0.025, 0.975), axis=0) if T else (np.zeros(0), np.zeros(0))
    value = per_prompt[:, :T].sum(0) / np.maximum(present[:, :T].sum(0), 1)
    of_prompt = [float(total[i].sum() / count[i].sum()) for i in range(len(traces)) if count[i].sum()]
    return {
        "value": value.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "prompts": present[:, :T].sum(0).tolist(),
        "mean": _mean(of_prompt) if of_prompt else None,
    }


def table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows of figures, the first their head."""
    rows: list[list[Any]] = [["figure", "kind", "position", "value", "low", "high"]]

    def row(figure: str, kind: str, position: Any, values: dict[str, Any]) -> None:
        rows.append([figure, kind, position, *(values[end] for end in ("value", "low", "high"))])

    labels = {"rouge_l": "ROUGE-L with greedy", "identical": "identical to greedy", "length": "length"}
    for figure, label in labels.items():
        for kind, values in summary[figure].items():
            row(label, kind, "", values)
    for kind, values in summary["soft_minus"].items():
        row("ROUGE-L, soft minus", kind, "", values)
    for figure in ("entropy", "outside"):
        for kind, curve in summary[figure].items():
            if curve["mean"]:
                row(f"{figure}, mean", kind, "", curve["mean"])
            for t in range(len(curve["value"])):
                row(figure, kind, t, {end: curve[end][t] for end in ("value", "low", "high")})
    return rows


def says(summary: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    overlap = summary["rouge_l"]
    order = sorted(overlap, key=lambda kind: -overlap[kind]["value"])
    said = [
        f"ROUGE-L with the greedy trace, {summary['prompts']} prompts: "
        + ", ".join(f"{kind} {shown(overlap[kind])}" for kind in order)
        + "."
    ]
    if summary["soft_minus"]:
        pairs = ", ".join(f"{kind} {shown(values)}" for kind, values in summary["soft_minus"].items())
        said.append(f"Paired by prompt, soft minus the others: {pairs}.")
    same = [f"{kind} {percent(values)}" for kind, values in summary["identical"].items()]
    said.append(f"Chains that are the greedy chain, id by id, to their end: {', '.join(same)}.")
    means = {kind: curve["mean"] for kind, curve in summary["entropy"].items() if curve["mean"]}
    left = {kind: curve["mean"] for kind, curve in summary["outside"].items() if curve["mean"]}
    said.append(
        "Mean entropy along the trace, in nats: "
        + ", ".join(f"{kind} {number(values['value'])}" for kind, values in means.items())
        + "; mass outside what is fed: "
        + ", ".join(f"{kind} {number(values['value'])}" for kind, values in left.items())
        + "."
    )
    return said


def claims(summary: dict[str, Any]) -> list[Claim]:
    """The paper's findings, held against the figures."""
    made = []
    for kind in ("gumbel", "sampled"):
        if kind in summary["soft_minus"]:
            values = summary["soft_minus"][kind]
            text = f"Soft traces overlap more with the greedy trace than {kind} ones"
            made.append(Claim(text, above(values, 0), f"difference of ROUGE-L {shown(values)}"))
    return made
