"""How random and how soft are randomised weights? Dirichlet and Gumbel over their parameters (arXiv 2508.03440).

On distributions p that soft traces meet, cut to the K most probable ids and renormalised, weights w are drawn:

    gumbel      w = softmax((ln p + g) / tau), g standard Gumbel
    dirichlet   w ~ Dirichlet(gamma p)

    softness     the entropy of w, in nats: 0 for a single word
    randomness   JS(w, p), in nats: how far the draw is from p

Averages over draws and steps are points of a plane; a parameter draws a curve. Each trace gives at most `STEPS` evenly
spaced steps; steps whose second id weighs at least `branch_weight` are also averaged alone. Noise is addressed by
(seed, problem, draw) and the position, and is the same for all values of a parameter.

The test. The paper searched tau over 0.3 to 0.9 and gamma over 1 to 10. Gumbel *keeps its randomness* if nowhere
between tau = 0.3 and 1 it is below half of that at tau = 1; dirichlet, if nowhere up to gamma = 10 it is below half of
that at gamma = 1. A kind *holds both* at a parameter if its randomness and its softness are at least half of those of
gumbel at tau = 1. And where dirichlet is as soft as gumbel at tau = 0.5, the paper's choice, is it as random?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_soft.analyses.branching import jensen_shannon
from rl_soft.analyses.findings import Claim, above, compact, number, resampled, shown
from rl_soft.data.sources import Row
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.densities import Dirichlet, GumbelTopK, entropy
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address

QUESTION = "Which noise keeps thoughts both random and soft?"
PAPER = (
    "Dirichlet weights are near one word where gamma is small (random, not soft) and near p itself where it is large "
    "(soft, not random). Gumbel-Softmax keeps its randomness while tau changes the softness."
)
GRID = {
    "gumbel": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0),
    "dirichlet": (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0),
}
DRAWS = {"gumbel": GumbelTopK, "dirichlet": Dirichlet}
PARAMETER = {"gumbel": "tau", "dirichlet": "gamma"}
SEARCHED = {"gumbel": (0.3, 0.9), "dirichlet": (1.0, 10.0)}
REFERENCE = GRID["gumbel"].index(1.0)
HALF = 0.5
STEPS = 32  # of a trace
SETS = ("all", "branching")
TINY = 1e-12  # nats; resampled prompts without any randomness divide by no less


def randomise(log_p: Tensor, kind: str, parameter: float, seeds: Tensor, position: Tensor) -> Tensor:
    """Log-weights (N, K) drawn from log-probabilities (N, K), in the same order.

    Args:
        kind: a key of `DRAWS`; `parameter` is its tau or gamma.
        seeds, position: (N,) int64, address of the noise.
    """
    K = log_p.shape[-1]
    thought = DRAWS[kind](log_p, K, parameter).sample(seeds=seeds, position=position)
    drawn = torch.full((len(log_p), K + 1), -torch.inf, device=log_p.device)
    return drawn.scatter_(-1, thought.support.masked_fill(~thought.present, K), thought.log_weights)[:, :K]


def coordinates(log_p: Tensor, kind: str, parameter: float, seeds: Tensor, position: Tensor) -> Tensor:
    """Softness and randomness (N, 2) of one draw per row; arguments as in `randomise`."""
    log_weights = randomise(log_p, kind, parameter, seeds, position)
    return torch.stack([entropy(log_weights), jensen_shannon(log_weights, log_p)], dim=-1)


@torch.no_grad()
def measure(
    model: Any, layout: Layout, rows: Sequence[Row], seed: int, draws: int, branch_weight: float
) -> list[dict[str, Any]]:
    """One record per row, from one soft trace each.

    Args:
        layout: of a `Thinking` with thought `soft` and two slots or more.
        draws: of the weights, at each step and for each parameter.

    Returns:
        For each row {"steps": [all, branching], "gumbel" and "dirichlet": for each parameter of `GRID` the means
        [softness, randomness] over all steps and over the branching ones, 0 where there is none}.
    """
    prompts = [layout.prompt_ids(row.question) for row in rows]
    out = rollout(model, layout, prompts)
    records = []
    for i, row in enumerate(rows):
        positions = out.thought_mask[i].nonzero()[:, 0]
        keep = torch.linspace(0, len(positions) - 1, min(STEPS, len(positions))).round().long()
        positions = positions[keep.to(positions.device)]
        log_p = out.log_weights[i, positions]  # (n, K)
        branching = (log_p[:, 1].exp() >= branch_weight).float()  # (n,)
        share = torch.stack([torch.ones_like(branching), branching])  # (2, n)
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        seeds = torch.tensor([address(seed, row.id, d) for d in range(draws)], device=log_p.device)
        n = len(positions)
        record: dict[str, Any] = {"steps": [n, int(branching.sum())]}
        for kind, grid in GRID.items():
            address_of = (seeds.repeat(n), positions.repeat_interleave(draws))
            many = log_p.repeat_interleave(draws, dim=0)  # (n draws, K)
            points = [coordinates(many, kind, parameter, *address_of).view(n, draws, 2).mean(1) for parameter in grid]
            record[kind] = compact([(share @ point).tolist() for point in points])
        records.append(record)
    return records


def summarise(records: Sequence[dict[str, Any]], branch_weight: float) -> dict[str, Any]:
    """Both curves over all steps and over the branching ones, and the test; prompts weigh by their steps.

    Raises:
        ValueError: no thought was fed, or those of one prompt alone; or each was one id almost surely, so that there
            is nothing to randomise.
    """
    summary: dict[str, Any] = {"prompts": len(records), "branch_weight": branch_weight, "grid": GRID}
    for s, name in enumerate(SETS):
        some = [r for r in records if r["steps"][s]]
        if not some and s == 0:
            raise ValueError("plane: no thought was fed; the traces ended at their first position")
        summary[name] = _of(some, s) if len(some) > 1 or s == 0 else None
    return summary


def _of(records: Sequence[dict[str, Any]], s: int) -> dict[str, Any]:
    lengths = {kind: len(grid) for kind, grid in GRID.items()}
    rows = []  # a prompt's steps, then softness and randomness by kind and parameter, times the steps
    for r in records:
        points = np.array([r[kind][j][s] for kind in GRID for j in range(lengths[kind])])  # (parameters, 2)
        rows.append(np.concatenate([[r["steps"][s]], points.ravel() * r["steps"][s]])[None])

    def curves(x: Any) -> dict[str, Any]:
        mean = (x[:, 1:].sum(0) / x[:, 0].sum()).reshape(-1, 2)
        return {"gumbel": mean[: lengths["gumbel"]], "dirichlet": mean[lengths["gumbel"] :]}

    def relative(x: Any, kind: str) -> Any:
        found = curves(x)
        return found[kind] / np.maximum(found["gumbel"][REFERENCE], TINY)  # (parameters, 2)

    def lowest(x: Any) -> float:
        kept = [j for j, tau in enumerate(GRID["gumbel"]) if 0.3 <= tau < 1]
        return float(relative(x, "gumbel")[kept, 1].min())

    def fallen(x: Any) -> float:
        """Randomness of dirichlet at gamma 10 or wherever it is lowest up to there, over that at gamma 1."""
        random = curves(x)["dirichlet"][:, 1]
        kept = [j for j, gamma in enumerate(GRID["dirichlet"]) if 1 <= gamma <= 10]
        return float(random[kept].min() / max(random[kept[0]], TINY))

    def best(x: Any) -> float:
        """Of dirichlet over the searched gammas: the largest smaller one of its two shares of the reference."""
        low, high = SEARCHED["dirichlet"]
        kept = [j for j, gamma in enumerate(GRID["dirichlet"]) if low <= gamma <= high]
        return float(relative(x, "dirichlet")[kept].min(-1).max())

    def beside(x: Any) -> float:
        """Randomness of dirichlet, over that of gumbel at tau 0.5, where it is as soft as that."""
        found = curves(x)
        soft, random = found["gumbel"][GRID["gumbel"].index(0.5)]
        other = np.interp(soft, found["dirichlet"][:, 0], found["dirichlet"][:, 1])
        return float(other / max(random, TINY))

    both = {}
    every = np.concatenate(rows)
    if (curves(every)["gumbel"][REFERENCE] < TINY).any():
        raise ValueError(
            "plane: each thought is one id almost surely, which no noise makes random; raise thought_temperature"
        )
    for kind, grid in GRID.items():
        low, high = SEARCHED[kind]
        holds = (relative(every, kind) >= HALF).all(-1)
        both[kind] = {
            "searched": [p for p in grid if low <= p <= high],
            "holds": [p for p, h in zip(grid, holds, strict=True) if h and low <= p <= high],
            "anywhere": [p for p, h in zip(grid, holds, strict=True) if h],
        }
    return {
        "prompts": len(records),
        "steps": int(every[:, 0].sum()),
        **{kind: resampled(rows, lambda x, kind=kind: curves(x)[kind]) for kind in GRID},  # type: ignore[misc]
        "relative": {kind: relative(every, kind).tolist() for kind in GRID},
        "gumbel_lowest": resampled(rows, lowest),
        "dirichlet_lowest": resampled(rows, fallen),
        "dirichlet_best": resampled(rows, best),
        "dirichlet_beside_gumbel": resampled(rows, beside),
        "both": both,
    }


def table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows of figures, the first their head."""
    head = ["steps", "kind", "parameter", "softness", "low", "high", "randomness", "low", "high", "holds both"]
    rows: list[list[Any]] = [head]
    for name in SETS:
        if summary[name] is None:
            continue
        for kind, grid in GRID.items():
            for j, parameter in enumerate(grid):
                cells = [summary[name][kind][end][j][c] for c in (0, 1) for end in ("value", "low", "high")]
                holds = "yes" if parameter in summary[name]["both"][kind]["anywhere"] else "no"
                rows.append([name, kind, parameter, *cells, holds])
    return rows


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"


def says(summary: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    said = []
    for name in SETS:
        part = summary[name]
        if part is None:
            continue
        where = "all steps" if name == "all" else f"steps whose second token weighs {summary['branch_weight']} or more"
        at = {tau: part["gumbel"]["value"][GRID["gumbel"].index(tau)] for tau in (0.3, 1.0)}
        ratios = [part["relative"]["gumbel"][GRID["gumbel"].index(0.3)][c] for c in (0, 1)]
        said.append(
            f"Over {where} ({part['steps']:,} of {part['prompts']} prompts): from tau = 1 to 0.3 gumbel's randomness "
            f"goes from {number(at[1.0][1])} to {number(at[0.3][1])} nats, {number(ratios[1])} of it (lowest between "
            f"them {shown(part['gumbel_lowest'])}), and its softness from {number(at[1.0][0])} to "
            f"{number(at[0.3][0])}, {number(ratios[0])} of it. From gamma = 1 to 10 dirichlet keeps "
            f"{shown(part['dirichlet_lowest'])} of its randomness."
        )
        both = part["both"]
        said.append(
            f"At least half of both, of gumbel's at tau = 1, have: gumbel, of tau 0.3 to 0.9, at "
            f"{_list(both['gumbel']['holds'])}; dirichlet, of gamma 1 to 10, at {_list(both['dirichlet']['holds'])}. "
            f"Where dirichlet is as soft as gumbel at tau = 0.5, it is {shown(part['dirichlet_beside_gumbel'])} times "
            f"as random."
        )
    return said


def claims(summary: dict[str, Any]) -> list[Claim]:
    part = summary["all"]
    found, lost = part["both"]["dirichlet"], {"yes": "no", "no": "yes"}
    both = lost.get(above(part["dirichlet_best"], HALF), "undecided")
    some = 0 < len(found["holds"]) < len(found["searched"])
    return [
        Claim(
            "Gumbel keeps its randomness above half of that at tau = 1 down to tau = 0.3",
            above(part["gumbel_lowest"], HALF),
            f"lowest share {shown(part['gumbel_lowest'])}",
        ),
        Claim(
            "Dirichlet loses more than half of its randomness from gamma = 1 to 10",
            lost.get(above(part["dirichlet_lowest"], HALF), "undecided"),
            f"share kept {shown(part['dirichlet_lowest'])}",
        ),
        Claim(
            "At no gamma from 1 to 10 does dirichlet have half of both, of gumbel's at tau = 1",
            "in part" if both == "no" and some else both,
            f"has at gamma {_list(found['holds'])}; best smaller share {shown(part['dirichlet_best'])}",
        ),
        Claim(
            "Where it is as soft as gumbel at tau = 0.5, dirichlet is less random",
            lost.get(above(part["dirichlet_beside_gumbel"], 1), "undecided"),
            f"{shown(part['dirichlet_beside_gumbel'])} times as random",
        ),
    ]
