"""What thoughts cost against written reasoning: `rl-soft analyze cost MODEL --against COT_MODEL`.

Both answer the same questions greedily, one at a time, in turns, so that a slow moment of the machine meets both.

    compression   tokens of reasoning that the CoT model writes / (thoughts + 2), <bot> and <eot> included
    speed-up      seconds per question of the CoT model / those of the model
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_soft.data.sources import Row
from rl_soft.evaluation.passk import bootstrap
from rl_soft.evaluation.records import GREEDY
from rl_soft.evaluation.samples import complete, judge
from rl_soft.files import write_atomic
from rl_soft.thoughts.layout import Layout

RESAMPLES = 10_000


@dataclass(frozen=True)
class Cost:
    """Of Q questions, in order; reasoning counts the markers around latent thoughts, and none around written ones."""

    correct: np.ndarray  # (Q,) bool
    reasoning: np.ndarray  # (Q,) tokens or thoughts before the answer
    answer: np.ndarray  # (Q,) tokens
    seconds: np.ndarray  # (Q,)

    @property
    def tokens(self) -> np.ndarray:
        return self.reasoning + self.answer


def reasoning_length(layout: Layout, thoughts: Sequence[int]) -> int:
    """Latent: the thoughts with <bot> and <eot>. Explicit: what was written before the end of thinking.

    Args:
        thoughts: their ids.
    """
    if layout.thinking.phase == "latent":
        return len(thoughts) + 2 if thoughts else 0
    end = layout.end_ids
    return len(thoughts) - (len(end) if list(thoughts[-len(end) :]) == end else 0)


def measure(models: Sequence[tuple[Any, Layout]], rows: Sequence[Row], warm_up: int = 3) -> list[Cost]:
    """The cost of each model at batch 1; the first `warm_up` questions are answered once before the clock runs."""
    found: list[list[tuple[bool, int, int, float]]] = [[] for _ in models]
    first = rows[:warm_up]
    for turn, row in enumerate([*first, *rows]):
        for i, (model, layout) in enumerate(models):
            _synchronise()
            started = time.perf_counter()
            out = complete(model, layout, [(row, GREEDY)], seed=0)
            _synchronise()
            seconds = time.perf_counter() - started
            if turn >= len(first):
                record = judge(out, layout, [(row, GREEDY)])[0]  # which may take longer than the answer
                length = reasoning_length(layout, out.completion_ids[0][out.thought_mask[0]].tolist())
                found[i].append((record["outcome"] == "correct", length, record["answer_tokens"], seconds))
    return [Cost(*(np.array(column) for column in zip(*each, strict=True))) for each in found]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio_interval(above: np.ndarray, below: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Ratio of the means over the same questions, with a 95 % percentile interval by resampling questions."""
    draws = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    values = above[draws].mean(1) / below[draws].mean(1)
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(above.mean() / below.mean()), "low": float(low), "high": float(high)}


def report(names: Sequence[str], costs: Sequence[Cost], out: Path | None) -> str:
    """Markdown of the model and of the CoT model; also written to `out`, with cost.json."""
    ours, theirs = costs
    figures: dict[str, Any] = {
        "models": [
            {
                "name": name,
                "questions": len(cost.seconds),
                "accuracy": vars(bootstrap(cost.correct.astype(float))),
                "reasoning": float(cost.reasoning.mean()),
                "tokens": float(cost.tokens.mean()),
                "milliseconds": 1000 * float(cost.seconds.mean()),
            }
            for name, cost in zip(names, costs, strict=True)
        ],
        "compression": ratio_interval(theirs.reasoning, ours.reasoning) if ours.reasoning.any() else None,
        "speed_up": ratio_interval(theirs.seconds, ours.seconds),
    }
    lines = ["| | accuracy | reasoning | with the answer | ms per question |", "|---|---:|---:|---:|---:|"]
    for m in figures["models"]:
        a = m["accuracy"]
        accuracy = f"{100 * a['mean']:.1f} % ({100 * a['low']:.1f} – {100 * a['high']:.1f})"
        lines.append(
            f"| {m['name']} | {accuracy} | {m['reasoning']:.1f} | {m['tokens']:.1f} | {m['milliseconds']:.1f} |"
        )
    for name, key in (("compression", "compression"), ("speed-up at batch 1", "speed_up")):
        value = figures[key]
        if value is None:  # a model that does not reason
            continue
        lines += ["", f"{name}: {value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"]
    text = "\n".join(lines) + "\n"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "cost.json", json.dumps(figures, indent=1) + "\n")
        write_atomic(out / "cost.md", text)
    return text
