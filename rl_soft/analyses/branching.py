"""Does a soft token keep several threads alive? How far what the model says next is from each (arXiv 2508.03440).

Along a trace of soft thoughts (the softmax mixture of the K most probable ids), three inputs are fed on the same
prefix: the mixture, its strongest id alone, its second id alone. With P, P_1 and P_2 the next-token distributions,
over the whole vocabulary and at the temperature of the thoughts, two Jensen-Shannon divergences are taken, in nats,
at most ln 2:

    JS(P, P_1)   near 0 where the mixture is read as its strongest id
    JS(P, P_2)   near 0 where it is read as its second

A soft token that is one id almost surely says little, so thoughts whose second id weighs at least `branch_weight` are
also reported alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_soft.analyses.alternatives import Alternatives
from rl_soft.analyses.findings import Claim, above, compact, enough, number, percent, resampled, shown
from rl_soft.data.sources import Row
from rl_soft.rollouts.recording import Live
from rl_soft.thoughts.layout import Layout

QUESTION = "Does the model read a soft token as several words at once, or as its strongest one?"
PAPER = (
    "On QwQ-32B, over about a million soft tokens, the distance to the strongest token alone piles up near 0 and the "
    "distance to the second alone lies mostly above 0.6 of at most 0.693: the model follows one thread, the strongest."
)
BINS = np.linspace(0, math.log(2), 36)  # of the histograms
WEIGHT_BINS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # of the second id


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS divergence in nats of two distributions given as log-probabilities (..., V), -inf allowed -> (...)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = [torch.where(x.isneginf(), 0.0, x.exp() * (x - log_m)) for x in (log_p, log_q)]
    return (sum(terms).sum(-1) / 2).clamp(0, math.log(2))  # type: ignore[union-attr]


class Branching(Alternatives):
    """After the run, `distances` (B, T + 1, 2): JS(P, P_1) and JS(P, P_2) at each thought that was fed, else NaN."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shape = (len(self.prompts), self.walk.T + 1, 2)
        self.distances = torch.full(shape, torch.nan, device=self.device)

    def others(self, live: Live, at: Tensor) -> list[Tensor]:
        return [self.embedding(live.support[:, j]) for j in (0, 1)]

    def record(self, live: Live, at: Tensor, outputs: list[Any]) -> None:
        first, second, mixed = (self.next_log_probs(out) for out in outputs)  # (n, V) each
        pairs = [jensen_shannon(mixed, first), jensen_shannon(mixed, second)]
        self.distances[live.row, at] = torch.stack(pairs, dim=-1).float()

    def next_log_probs(self, output: Any) -> Tensor:
        """(n, V) float64: between distributions that are nearly equal, float32 gives its own rounding, 1e-7."""
        return torch.log_softmax(output.logits[:, -1].double() / self.thinking.thought_temperature, dim=-1)


@torch.no_grad()
def measure(model: Any, layout: Layout, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record per row, of the thoughts that were fed, n of them.

    Args:
        layout: of a `Thinking` with thought `soft` and two slots or more.

    Returns:
        For each row {"ids": n pairs of the two strongest ids, "weights": n pairs, "distances": n pairs
        [JS(P, P_1), JS(P, P_2)]}.
    """
    prompts = [layout.prompt_ids(row.question) for row in rows]
    engine = Branching(model, layout, prompts)
    out = engine.run()
    distances = engine.distances[:, : out.mask.shape[1]]
    fed = ~distances[..., 0].isnan()
    return [
        {
            "ids": out.support[i, :, :2][fed[i]].tolist(),
            "weights": compact(out.log_weights[i, :, :2][fed[i]].exp().tolist()),
            "distances": compact(distances[i][fed[i]].tolist()),
        }
        for i in range(len(rows))
    ]


def summarise(records: Sequence[dict[str, Any]], branch_weight: float) -> dict[str, Any]:
    """Medians with intervals, histograms, and medians by the weight of the second id.

    Raises:
        ValueError: no thought was fed, or those of one prompt alone.
    """
    groups = [np.array([[*d, w[1]] for d, w in zip(r["distances"], r["weights"], strict=True)]) for r in records]
    groups = [group.reshape(-1, 3) for group in groups]  # JS to the first, to the second, weight of the second
    every = np.concatenate(groups)
    if not len(every):
        raise ValueError("branching: no thought was fed; the traces ended at their first position")
    kept = [group[group[:, 2] >= branch_weight] for group in groups]
    by_weight = []
    for low, high in pairwise(WEIGHT_BINS):
        inside = [g[(g[:, 2] >= low) & ((g[:, 2] < high) | (high == WEIGHT_BINS[-1]))] for g in groups]
        if enough(inside, 10):
            medians = resampled(inside, lambda x: np.median(x[:, :2], axis=0), 500)
            by_weight.append({"from": low, "to": high, "steps": sum(map(len, inside)), "medians": medians})
    return {
        "prompts": len(records),
        "branch_weight": branch_weight,
        "all": _of(groups),
        "branching": _of(kept) if enough(kept, 10) else None,
        "by_weight": by_weight,
    }


def _of(groups: list[Any]) -> dict[str, Any]:
    every = np.concatenate(groups)
    medians = resampled(groups, lambda x: np.median(x[:, :2], axis=0))
    ratio = resampled(groups, lambda x: np.median(x[:, 1]) / max(np.median(x[:, 0]), 1e-12))
    closer = resampled(groups, lambda x: (x[:, 0] < x[:, 1]).mean())
    pick = {key: [value[j] for value in medians.values()] for j, key in enumerate(("first", "second"))}
    return {
        "steps": len(every),
        **{key: dict(zip(("value", "low", "high"), values, strict=True)) for key, values in pick.items()},
        "ratio": ratio,
        "closer_to_first": closer,
        "histogram": [np.histogram(every[:, j], BINS)[0].tolist() for j in (0, 1)],
    }


def table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows of figures, the first their head."""
    rows: list[list[Any]] = [["steps", "n", "figure", "value", "low", "high"]]
    names = {"all": "all", "branching": f"second id >= {summary['branch_weight']}"}
    for key, name in names.items():
        if summary[key] is None:
            continue
        for figure in ("first", "second", "ratio", "closer_to_first"):
            values = summary[key][figure]
            label = {"first": "median JS to the first id", "second": "median JS to the second id"}.get(figure, figure)
            rows.append([name, summary[key]["steps"], label, values["value"], values["low"], values["high"]])
    for part in summary["by_weight"]:
        for j, label in enumerate(("median JS to the first id", "median JS to the second id")):
            values = [part["medians"][end][j] for end in ("value", "low", "high")]
            rows.append([f"second id {part['from']} to {part['to']}", part["steps"], label, *values])
    return rows


def says(summary: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    every, some = summary["all"], summary["branching"]
    said = [
        f"Over {every['steps']:,} soft thoughts of {summary['prompts']} prompts, the median distance is "
        f"{shown(every['first'])} to the strongest token alone and {shown(every['second'])} to the second alone; "
        f"{percent(every['closer_to_first'])} of the thoughts are closer to the strongest."
    ]
    if some is None:
        return [*said, f"Hardly any thought has a second token of weight {summary['branch_weight']} or more."]
    share = some["steps"] / every["steps"]
    said.append(
        f"In {some['steps']:,} of them ({number(100 * share)} %) the second token weighs at least "
        f"{summary['branch_weight']}. There the medians are {shown(some['first'])} and {shown(some['second'])}, "
        f"a ratio of {shown(some['ratio'])}."
    )
    if len(summary["by_weight"]) > 1:
        last = summary["by_weight"][-1]
        first, second = last["medians"]["value"]
        said.append(
            f"Where the two are nearly balanced (second token between {last['from']} and {last['to']}), they are "
            f"{number(first)} and {number(second)}."
        )
    return said


def claims(summary: dict[str, Any]) -> list[Claim]:
    """The paper's findings, held against the figures."""
    made = []
    for key, where in (("all", "all thoughts"), ("branching", f"second token ≥ {summary['branch_weight']}")):
        part = summary[key]
        if part is not None:
            text = f"Median JS to the strongest token is at least ten times below that to the second ({where})"
            made.append(Claim(text, above(part["ratio"], 10), f"ratio {shown(part['ratio'])}"))
    return made
