"""In which layer does a soft token become one word? The logit lens on balanced mixtures (arXiv 2508.03440).

Along a trace of soft thoughts, at those of each prompt whose second id weighs most, three inputs are fed on the
same prefix: the two strongest ids alone (path 1 and path 2), and their mixture .6 / .4. The logit lens turns the state
after each layer, at that position, into logits by the model's own final norm and LM head; layer 0 is the embedding.

The rule. A path is held at a layer to the share of its own five strongest lens ids that are among the ten strongest of
the mixture. Shares are averaged over thoughts. The top-1 share is path 1's part of both, held_1 / (held_1 + held_2)
with the averages. For comparison: how much of each path the *other path alone* holds, by the same rule. What the
mixture holds of path 2 says something only as far as it is above what path 1 alone holds of it; of these excesses,
too, path 1's part of both is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rl_soft.analyses.alternatives import Alternatives
from rl_soft.analyses.findings import Claim, above, compact, number, resampled, shown
from rl_soft.data.sources import Row
from rl_soft.model.think import mix_embeddings
from rl_soft.rollouts.recording import Live
from rl_soft.thoughts.layout import Layout

QUESTION = "In which layer does a balanced soft token become one word?"
PAPER = (
    "On hand-built .6/.4 mixtures at branching points both paths rise in the first two or three layers; then the "
    "stronger path's share goes to about 1 and the weaker is suppressed."
)
MIXTURE = (0.6, 0.4)
MIXED, SINGLE = 10, 5  # strongest lens ids that are looked at
LAST = 3  # layers that "the last layers" means
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the LM head.

    Raises:
        ValueError: the model has none under a name that is known.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = getattr(causal, causal.base_model_prefix, causal)
    for part in (trunk, getattr(trunk, "decoder", None)):
        for name in NORMS:
            if isinstance(found := getattr(part, name, None), nn.Module):
                return found
    raise ValueError(f"model {type(causal).__name__} has no final norm named one of {', '.join(NORMS)}")


def lens_logits(model: Any, states: Tensor) -> Tensor:
    """The logit lens: (..., L + 1, H), `hidden_states` of transformers -> (..., L + 1, V).

    The last of them has been through the final norm already. Soft-capping and scaling of logits, which change no
    order, are left out.
    """
    normed = torch.cat([final_norm(model)(states[..., :-1, :]), states[..., -1:, :]], dim=-2)
    return model.get_output_embeddings()(normed)


class Lens(Alternatives):
    """After the run, of each row's `branches` thoughts with the heaviest second id: position, weight and states.

    Attributes:
        weight: (B, branches) float32, -1 where the row has fewer thoughts.
        at: (B, branches) int64, positions.
        states: (B, branches, 3, L + 1, H): path 1, path 2, mixture.
    """

    with_states = True

    def __init__(self, *args: Any, branches: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        B, config = len(self.prompts), self.model.config.get_text_config()
        self.weight = torch.full((B, branches), -1.0, device=self.device)
        self.at = torch.full((B, branches), -1, device=self.device)
        shape = (B, branches, 3, config.num_hidden_layers + 1, config.hidden_size)
        self.states = torch.zeros(shape, dtype=self.embedding.weight.dtype, device=self.device)
        self.says = torch.full((B, branches), -1, device=self.device)  # the model's strongest id after the mixture

    def others(self, live: Live, at: Tensor) -> list[Tensor]:
        self.better = self.improves(live, at)
        if not bool(self.better.any()):
            return []
        pair = live.support[:, :2]  # (n, 2)
        log_weights = torch.tensor(MIXTURE, device=self.device).log().expand(pair.shape)
        return [*(self.embedding(pair[:, j]) for j in (0, 1)), mix_embeddings(self.embedding, pair, log_weights)]

    def improves(self, live: Live, at: Tensor) -> Tensor:
        """(n,) bool: rows whose thought is to be kept; one that is kept already, of a row that began anew, is not."""
        heavier = live.log_weights[:, 1].exp() > self.weight[live.row].amin(-1)
        return heavier & (at < self.walk.T) & (self.at[live.row] != at[:, None]).all(-1)

    def record(self, live: Live, at: Tensor, outputs: list[Any]) -> None:
        rows = live.row[self.better]  # (m,)
        place = self.weight[rows].argmin(-1)
        self.weight[rows, place] = live.log_weights[self.better, 1].exp()
        self.at[rows, place] = at[self.better]
        self.says[rows, place] = outputs[2].logits[self.better, -1].argmax(-1)
        paths = [torch.stack([h[:, -1] for h in out.hidden_states], dim=1) for out in outputs[:3]]  # (n, L + 1, H)
        self.states[rows, place] = torch.stack(paths, dim=1)[self.better]


@torch.no_grad()
def measure(model: Any, layout: Layout, rows: Sequence[Row], branches: int) -> list[dict[str, Any]]:
    """One record per row, of its m <= `branches` thoughts, in order.

    Args:
        layout: of a `Thinking` with thought `soft` and two slots or more.

    Returns:
        For each row {"at", "weights": m positions and weights of the second id, "ids": m pairs, "held": m x 4 x
        (L + 1) counts, 0 to 5: path 1 and path 2 in the mixture, path 1 in path 2, path 2 in path 1}.

    Raises:
        ValueError: a model whose lens cannot be read: its last layer's is not the model's own distribution.
    """
    prompts = [layout.prompt_ids(row.question) for row in rows]
    engine = Lens(model, layout, prompts, branches=branches)
    out = engine.run()
    found, agreed, asked = [], 0, 0
    for i in range(len(rows)):
        order = [j for j in engine.at[i].argsort().tolist() if engine.at[i, j] >= 0]
        at = engine.at[i, order]
        logits = [lens_logits(model, engine.states[i, j]) for j in order]  # (3, L + 1, V) each
        last = [int(x[2, -1].argmax()) for x in logits]
        agreed, asked = agreed + sum(map(int.__eq__, last, engine.says[i, order].tolist())), asked + len(order)
        found.append(
            {
                "at": at.tolist(),
                "weights": compact(engine.weight[i, order].tolist()),
                "ids": out.support[i, at, :2].tolist(),
                "held": [held(x).tolist() for x in logits],
            }
        )
    if 2 * agreed < asked:
        raise ValueError(f"the lens of the last layer of {type(model).__name__} is not what the model says itself")
    return found


def held(logits: Tensor) -> Tensor:
    """Logits of path 1, path 2 and mixture (3, L + 1, V) -> (4, L + 1) int64 counts, see `measure`."""
    ids = logits.topk(min(MIXED, logits.shape[-1]), dim=-1).indices  # (3, L + 1, 10)

    def count(path: int, among: int) -> Tensor:
        return (ids[path, :, :SINGLE, None] == ids[among, :, None, :]).any(-1).sum(-1)

    return torch.stack([count(0, 2), count(1, 2), count(0, 1), count(1, 0)])


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares by layer with intervals: {"shares": {...: (4, L + 1)}, "top1": {...: (L + 1)}, ...}.

    Raises:
        ValueError: no thought at all, or those of one prompt alone.
    """
    groups = [np.array(r["held"], dtype=float) / SINGLE for r in records if r["held"]]  # (m, 4, L + 1)
    if not groups:
        raise ValueError("lens: no thought was fed; the traces ended at their first position")
    weights = [w for r in records for w in r["weights"]]

    def top1(x: Any) -> Any:
        path1, path2 = x.mean(0)[:2]
        return np.divide(path1, path1 + path2, out=np.full_like(path1, 0.5), where=path1 + path2 > 0)

    def own(x: Any) -> float:
        excess = np.maximum((x.mean(0)[:2] - x.mean(0)[2:])[:, -last:].mean(-1), 0)  # (2,)
        return float(excess[0] / excess.sum()) if excess.any() else 0.5

    last = min(LAST, groups[0].shape[-1])
    return {
        "prompts": len(groups),
        "steps": len(weights),
        "median_weight": float(np.median(weights)),
        "layers": groups[0].shape[-1] - 1,
        "shares": resampled(groups, lambda x: x.mean(0)),
        "top1": resampled(groups, top1),
        "last_top1": resampled(groups, lambda x: top1(x)[-last:].mean()),
        "last_path1": resampled(groups, lambda x: x.mean(0)[0, -last:].mean()),
        "last_path2": resampled(groups, lambda x: x.mean(0)[1, -last:].mean()),
        "last_path2_in_path1": resampled(groups, lambda x: x.mean(0)[3, -last:].mean()),
        "last_excess": resampled(groups, lambda x: (x.mean(0)[1] - x.mean(0)[3])[-last:].mean()),
        "last_own_top1": resampled(groups, own),
    }


def table(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows of figures, the first their head."""
    names = ("path 1 in mixture", "path 2 in mixture", "path 1 in path 2", "path 2 in path 1")
    rows: list[list[Any]] = [["layer", "figure", "value", "low", "high"]]
    for layer in range(summary["layers"] + 1):
        for j, name in enumerate(names):
            rows.append([layer, name, *(summary["shares"][end][j][layer] for end in ("value", "low", "high"))])
        rows.append([layer, "top-1 share", *(summary["top1"][end][layer] for end in ("value", "low", "high"))])
    return rows


def says(summary: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences."""
    top1 = summary["top1"]["value"]
    peak = int(np.argmax(top1))
    return [
        f"{summary['steps']} thoughts of {summary['prompts']} prompts, where the second token weighed most (median "
        f"{number(summary['median_weight'])}), were replaced by a .6/.4 mixture. In the last {LAST} layers it holds "
        f"{shown(summary['last_path1'])} of the stronger path and {shown(summary['last_path2'])} of the weaker: "
        f"a top-1 share of {shown(summary['last_top1'])}.",
        f"The stronger path alone already holds {shown(summary['last_path2_in_path1'])} of the weaker there, since "
        f"both often continue alike; the mixture holds {shown(summary['last_excess'])} more than that. Of what each "
        f"path has to itself, {shown(summary['last_own_top1'])} of what is held is the stronger's.",
        f"The top-1 share is largest at layer {peak} of {summary['layers']}, with {number(top1[peak])}; at layer 1 "
        f"it is {number(top1[1])}.",
    ]


def claims(summary: dict[str, Any]) -> list[Claim]:
    """The paper's findings, held against the figures."""
    return [
        Claim(
            f"The top-1 share is above 0.9 in the last {LAST} layers",
            above(summary["last_top1"], 0.9),
            shown(summary["last_top1"]),
        ),
        Claim(
            f"The stronger path is held to more than 0.9 in the last {LAST} layers",
            above(summary["last_path1"], 0.9),
            shown(summary["last_path1"]),
        ),
        Claim(
            "Of the weaker path nothing is left beyond what both share (less than 0.05)",
            {"yes": "no", "no": "yes"}.get(above(summary["last_excess"], 0.05), "undecided"),
            shown(summary["last_excess"]),
        ),
    ]
