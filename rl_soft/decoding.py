"""How a distribution is cut before a position is drawn from it, and what else only decoding without training has.

Soft thinking was published with cuts (arXiv 2505.15778, 2508.03440). The order of operations, for thoughts and for
the tokens after them alike, each with settings of its own:

    logits / T -> softmax -> top-k -> top-p -> min-p, each renormalised -> the draw

    order exact   noise on all that is left, then the K strongest by it: the policy whose density RL trains, when
                  nothing is cut (`densities.GumbelTopK`)
    order paper   gumbel: the K most probable are kept first, and noise orders and weighs these alone;
                  dirichlet: weights are drawn for all that is left first, and the K largest are kept

Training has none of this: a set that moves with the weights makes ratios of 0 or infinity (docs/density.md).

Shapes: m rows of one step, V vocabulary, W ids that can be left. Nothing here imports torch: `config` reads it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rl_soft.layout import Thinking

ORDERS = ("exact", "paper")


@dataclass(frozen=True)
class Decoding:
    """Cuts and the cold stop; the defaults cut nothing and never stop."""

    top_k: int = field(default=0, metadata={"help": "Thoughts: keep the top_k most probable ids; 0 = all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Thoughts: then the fewest ids that hold this share of the probability."}
    )
    min_p: float = field(
        default=0.0, metadata={"help": "Thoughts: then ids of at least min_p times the largest probability."}
    )
    after_top_k: int | None = field(
        default=None, metadata={"help": "top_k of the tokens after the thoughts; as in thinking if absent."}
    )
    after_top_p: float | None = field(default=None, metadata={"help": "top_p after the thoughts."})
    after_min_p: float | None = field(default=None, metadata={"help": "min_p after the thoughts."})
    order: str = field(
        default="exact",
        metadata={
            "help": "exact: noise on all that is left, then the K strongest. paper: gumbel noise on the K most "
            "probable alone, dirichlet weights before the K largest are kept."
        },
    )
    cold_stop_entropy: float = field(
        default=0.0, metadata={"help": "A thought whose entropy, in nats, is below this is cold; 0 never stops."}
    )
    cold_stop_length: int = field(
        default=256, metadata={"help": "So many cold thoughts in a row end the thinking, as its cap does."}
    )

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        for name in ("top_k", "after_top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                refuse(name, "0 (all) or at least 1")
        for name in ("top_p", "after_top_p"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= 1:
                refuse(name, "above 0 and at most 1 (all)")
        for name in ("min_p", "after_min_p"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                refuse(name, "between 0 (all) and 1")
        if self.order not in ORDERS:
            refuse("order", f"one of {', '.join(ORDERS)}")
        if not 0 <= self.cold_stop_entropy < math.inf:
            refuse("cold_stop_entropy", "0 (off) or above, in nats")
        if self.cold_stop_length < 1:
            refuse("cold_stop_length", "at least 1")

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

    def slots_drawn(self, thinking: Thinking, support_size: int) -> int:
        """Slots that a thought has when it is drawn, before the K largest weights are kept; 0 = the vocabulary."""
        if thinking.thought == "dirichlet" and self.order == "paper":
            return max(self.top_k, support_size) if self.top_k else 0
        return support_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cut(self, phi: Tensor, is_thought: Tensor, thinking: Thinking) -> Tensor:
        """What is left of a distribution, renormalised.

        Each cut keeps the ids above some probability, so the three are one threshold a row; ids that tie with the
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
        top_k, after_top_k = min(self.top_k or V, V), min(after_top_k or V, V)
        min_p = _each(is_thought, self.min_p, after_min_p, phi)  # (m, 1)
        threshold = phi.amax(-1, keepdim=True) + min_p.log()  # renormalising changes no ratio
        if min(top_k, after_top_k) < V or min(self.top_p, after_top_p) < 1:
            largest = phi.topk(max(top_k, after_top_k), dim=-1).values  # (m, W)
            last = largest.gather(-1, _each(is_thought, top_k - 1, after_top_k - 1, phi).long())
            p = largest.masked_fill(largest < last, -math.inf).softmax(-1)
            before = p.cumsum(-1) - p  # the mass of the more probable ids
            enough = _each(is_thought, _or_infinite(self.top_p), _or_infinite(after_top_p), phi)
            count = (before < enough).sum(-1, keepdim=True).clamp(min=1)
            threshold = threshold.maximum(last).maximum(largest.gather(-1, count - 1))
        if self.order == "paper" and thinking.thought in ("gumbel", "hybrid") and thinking.thought_k:
            kept = phi.topk(thinking.thought_k, dim=-1).values[:, -1:]  # (m, 1)
            threshold = threshold.maximum(kept.masked_fill(~is_thought[:, None], -math.inf))
        return phi.masked_fill(phi < threshold, -math.inf).log_softmax(-1)


def _or_infinite(top_p: float) -> float:
    """A sum that should be 1 may be rounded to more, and 1 is to keep all."""
    return top_p if top_p < 1 else math.inf


def _each(is_thought: Tensor, thought: float, after: float, like: Tensor) -> Tensor:
    """(m, 1): one number for rows that think and one for the others."""
    chosen = like.new_full((len(like), 1), after)
    return chosen.masked_fill(is_thought[:, None], thought)
