"""How a distribution is cut before a position is drawn from it, and what else only decoding without training has.

Soft thinking was published with cuts (arXiv 2505.15778, 2508.03440). The order of operations, for thoughts and for
the tokens after them alike, each with settings of its own:

    logits / T -> softmax -> top-k -> top-p -> min-p, each renormalised -> the draw

    order exact   noise on all that is left, then the K strongest by it: the policy whose density RL trains, when
                  nothing is cut (`densities.GumbelTopK`)
    order paper   gumbel: the K most probable are kept first, and noise orders and weighs these alone;
                  dirichlet: weights are drawn for all that is left first, and the K largest are kept

RL records what was kept, and both sides of a ratio are renormalised on it (`of_training`). Without the record, a set
that moves with the weights makes ratios of 0 or infinity (docs/density.md).

Shapes: m rows that draw together, V vocabulary, W ids that can be left. Nothing here imports torch: `config` reads it.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rl_soft.keys import Number, OneOf, key, keys

if TYPE_CHECKING:
    from torch import Tensor

    from rl_soft.thoughts.thinking import Thinking

ORDERS = ("exact", "paper")
FEW = 256  # ids that are looked at first where a share of the mass is to be held
MOST_KEPT = 256  # ids that a cut keeps in RL, where each position records them, unless top_k says otherwise


@keys(frozen=True)
class Decoding:
    """Cuts and the cold stop; the defaults cut nothing and never stop."""

    top_k: int = key("Thoughts: keep the top_k most probable ids; 0 = all.", default=0, ge=0)
    top_p: Number = key("Thoughts: then the fewest ids with this share of the probability.", default=1.0, gt=0, le=1)
    min_p: Number = key("Thoughts: then ids of at least min_p times the largest probability.", default=0.0, ge=0, le=1)
    after_top_k: int | None = key("top_k after the thoughts; as in thinking if absent.", default=None, ge=0)
    after_top_p: Number | None = key("top_p after the thoughts.", default=None, gt=0, le=1)
    after_min_p: Number | None = key("min_p after the thoughts.", default=None, ge=0, le=1)
    order: Annotated[str, OneOf(ORDERS)] = key(
        "exact: noise on all that is left, then the K strongest. paper: gumbel noise on the K most "
        "probable alone, dirichlet weights before the K largest are kept.",
        default="exact",
    )
    cold_stop_entropy: Number = key("A thought of entropy, in nats, below this is cold; 0: none.", default=0.0, ge=0)
    cold_stop_length: int = key("So many cold thoughts in a row end the thinking, as its cap does.", default=256, ge=1)

    @property
    def after(self) -> tuple[int, float, float]:
        """top_k, top_p and min_p after the thoughts."""
        return (
            self.top_k if self.after_top_k is None else self.after_top_k,
            self.top_p if self.after_top_p is None else self.after_top_p,
            self.min_p if self.after_min_p is None else self.after_min_p,
        )

    @property
    def cuts(self) -> bool:
        """Whether anything is drawn otherwise than without this."""
        whole = (0, 1.0, 0.0)
        return self.order == "paper" or (self.top_k, self.top_p, self.min_p) != whole or self.after != whole

    @classmethod
    def of_training(cls, top_k: int | None, top_p: float, min_p: float | None, order: str) -> Decoding | None:
        """The cuts of a policy in RL, from TRL's values; None where nothing is cut.

        The kept ids of each position are recorded, and both sides of a ratio are renormalised on them. So that a
        record is short, a cut without top_k keeps the MOST_KEPT most probable ids at most.
        """
        top_k, min_p = max(top_k or 0, 0), min_p or 0.0  # -1 is none, too
        if not cls(top_k, top_p, min_p, order=order).cuts:
            return None
        return cls(top_k or MOST_KEPT, top_p, min_p, order=order)

    def slots_drawn(self, thinking: Thinking, support_size: int) -> int:
        """Slots that a thought has when it is drawn, before the K largest weights are kept; 0 = the vocabulary."""
        if thinking.kind.has_dirichlet_noise and self.order == "paper":
            return max(self.top_k, support_size) if self.top_k else 0
        return support_size

    def to_dict(self) -> dict[str, Any]:
        """Name -> value, as JSON can hold them."""
        return asdict(self)

    def cut(self, phi: Tensor, is_thought: Tensor, thinking: Thinking) -> Tensor:
        """What is left of a distribution, renormalised.

        Each cut keeps the ids above some probability, so the three are one threshold per row; ids that tie with the
        last one kept are kept too.

        Args:
            phi: (m, V) float32 log-probabilities at the temperature of each row.
            is_thought: (m,) bool; other rows draw a token after the thoughts.
            thinking: kind and K, for order paper.

        Returns:
            (m, V) log-probabilities, -inf where an id was cut; the most probable one never is.
        """
        V = phi.shape[-1]
        after_top_k, after_top_p, after_min_p = self.after
        top_k, after_top_k = (k if k < V else 0 for k in (self.top_k, after_top_k))
        min_p = _each(is_thought, self.min_p, after_min_p, phi)  # (m, 1)
        threshold = phi.amax(-1, keepdim=True) + min_p.log()  # renormalising changes no ratio
        if top_k or after_top_k or min(self.top_p, after_top_p) < 1:
            alone = [p for k, p in ((top_k, self.top_p), (after_top_k, after_top_p)) if p < 1 and not k]
            largest = _largest(phi, max(top_k, after_top_k, 1), max(alone, default=0.0))  # (m, W + 1)
            all_of = largest.shape[-1]  # its last is -inf: rows without a top-k keep all
            rank = _each(is_thought, top_k or all_of, after_top_k or all_of, phi).long()
            last = largest.gather(-1, rank - 1)
            p = largest.masked_fill(largest < last, -math.inf).exp()
            total = p.cumsum(-1)[:, -1:].masked_fill(last.isneginf(), 1.0)  # in order, so that W does not matter
            before = p.roll(1, dims=-1).cumsum(-1)  # the mass of the more probable ids; that of -inf, 0, comes first
            enough = _each(is_thought, _or_infinite(self.top_p), _or_infinite(after_top_p), phi) * total
            count = (before < enough).sum(-1, keepdim=True).clamp(min=1)
            threshold = threshold.maximum(last).maximum(largest.gather(-1, count - 1))
        kind = thinking.kind
        if self.order == "paper" and kind.has_gumbel_noise and kind.mixes and thinking.thought_k:
            kept = phi.topk(thinking.thought_k, dim=-1).values[:, -1:]  # (m, 1)
            threshold = threshold.maximum(kept.masked_fill(~is_thought[:, None], -math.inf))
        return phi.masked_fill(phi < threshold, -math.inf).log_softmax(-1)

    def keep(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """The ids that a cut kept, at most top_k: ids that tie with the last one are not kept in RL.

        Args:
            left: (m, V), of `cut`.

        Returns:
            (m, V) as `left`, -inf off these ids, renormalised; (m, W) int64 the ids, the most probable first, -1 where
            there are fewer than W = min(top_k, V).
        """
        values, ids = left.topk(min(self.top_k, left.shape[-1]), dim=-1)
        kept = left.new_full(left.shape, -math.inf).scatter_(-1, ids, values).log_softmax(-1)
        return kept, ids.masked_fill(values.isneginf(), -1)


def _largest(phi: Tensor, width: int, share: float) -> Tensor:
    """(m, W + 1): the W largest of each row and then -inf; W is at least `width`, and they hold `share` of the mass.

    Few ids hold most of the mass, and to sort the vocabulary may take longer than the model: on a CPU W grows until it
    is enough. The CPU reads nothing from a GPU (`state_machine`), which sorts instead.
    """
    V = phi.shape[-1]
    W = width if not share else max(width, FEW) if phi.device.type == "cpu" else V
    while True:
        W = min(W, V)
        values = phi.topk(W, dim=-1).values
        if W == V or not share or bool((values.exp().cumsum(-1)[:, -1] >= share).all()):
            break
        W *= 8
    largest = phi.new_full((len(phi), W + 1), -math.inf)
    largest[:, :W] = values
    return largest


def _or_infinite(top_p: float) -> float:
    """A sum that should be 1 may be rounded to more, and 1 is to keep all."""
    return top_p if top_p < 1 else math.inf


def _each(is_thought: Tensor, thought: float, after: float, like: Tensor) -> Tensor:
    """(m, 1): one number for rows that think and one for the others."""
    chosen = like.new_full((len(like), 1), after)
    return chosen.masked_fill(is_thought[:, None], thought)
