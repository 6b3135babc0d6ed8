"""`SoftBatch`: the recorded actions of a batch of completions, from the rollout to the loss.

TRL buffers a dict of tensors, shuffles its rows and splits it into micro-batches. `to_dict` and `from_dict` put the
batch in and take a micro-batch out, by field name, so every field has one row per completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_soft.model.scored_forward import SoftInputs
from rl_soft.rollouts.recording import Rollout
from rl_soft.thoughts.kinds import RATIOS
from rl_soft.thoughts.thinking import Thinking


@dataclass
class SoftBatch:
    """B completions of up to C positions, right-padded as TRL pads completion ids; K slots per position."""

    completion_ids: Tensor  # (B, C) int64
    lengths: Tensor  # (B,) int64, positions of each completion
    support: Tensor  # (B, C, K) int64
    log_weights: Tensor  # (B, C, K) float32, -inf at absent slots
    action_mask: Tensor  # (B, C) bool, positions that were sampled
    thought_mask: Tensor  # (B, C) bool, of those the thoughts
    sampled_log_probs: Tensor  # (B, C) float32, the rollout's log-densities of what the ratio scores; 0 elsewhere
    support_log_probs: Tensor  # (B, C, K) float32, ln pi of the slots at the rollout
    seeds: Tensor  # (B,) int64, of the noise
    kept: Tensor | None = None  # (B, C, W) int32, of a cut distribution: what it kept beside the support; -1 absent
    ref_states: Tensor | None = None  # (B, C, H), what the reference's head reads; with a KL for K > 1
    rewards: Tensor | None = None  # (B,) float32, NaN where no reward applies; PPO

    @classmethod
    def from_rollout(cls, rollout: Rollout, ratio: str, pad_id: int, pad_to_multiple_of: int | None) -> SoftBatch:
        """The actions of a rollout, and of their log-densities those that `ratio` compares."""
        compared, sampled = RATIOS[ratio], rollout.log_probs
        if compared.scores == "strongest" and not compared.second_factor:
            sampled = rollout.support_log_probs[..., 0]
            if rollout.mode_log_probs is not None:
                sampled = sampled + rollout.mode_log_probs
        elif compared.scores is None:
            sampled = rollout.log_probs * ~rollout.thought_mask

        def padded(x: Tensor, value: float = 0) -> Tensor:
            return fitted(x, x.shape[1] + -x.shape[1] % (pad_to_multiple_of or 1), value)

        return cls(
            completion_ids=padded(rollout.completion_ids, pad_id),
            lengths=rollout.lengths,
            support=padded(rollout.support, pad_id),
            log_weights=padded(rollout.log_weights, -torch.inf),
            action_mask=padded(rollout.action_mask),
            thought_mask=padded(rollout.thought_mask),
            sampled_log_probs=padded(sampled),
            support_log_probs=padded(rollout.support_log_probs),
            seeds=rollout.seeds,
            kept=None if rollout.kept is None else padded(rollout.kept, -1),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SoftBatch:
        """From the dict of a micro-batch; other keys of TRL's are left alone."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def take(self, rows: slice) -> SoftBatch:
        return SoftBatch(**{name: x[rows] for name, x in self.to_dict().items()})

    def rows(self, numbers: list[int] | Tensor) -> SoftBatch:
        return SoftBatch(**{name: x[numbers] for name, x in self.to_dict().items()})

    def replaced(self, places: list[int], other: SoftBatch, pad_id: int, pad_to_multiple_of: int | None) -> SoftBatch:
        """With the rows of `other`, in their order, at `places`; as many positions as the longest completion has."""
        if not places:
            return self
        padding = {"completion_ids": pad_id, "support": pad_id, "log_weights": -torch.inf, "kept": -1}
        lengths = self.lengths.clone()
        lengths[places] = other.lengths
        C = int(lengths.max())
        C += -C % (pad_to_multiple_of or 1)
        made = {}
        for name, x in self.to_dict().items():
            x, new = x.clone(), getattr(other, name)
            if x.dim() > 1:
                widest = max(x.shape[-1], new.shape[-1]) if x.dim() > 2 else None  # what cuts kept may be more or less
                x, new = (fitted(y, C, padding.get(name, 0), widest) for y in (x, new))
            x[places] = new
            made[name] = x
        return SoftBatch(**made)

    def inputs(self, prompt_ids: Tensor, thinking: Thinking, ratio: str, **more: Any) -> SoftInputs:
        """What the model's forward takes as `soft`; prompt_ids (B, P), and fields of `SoftInputs` in `more`."""
        return SoftInputs(
            prompt_ids=prompt_ids,
            support=self.support,
            log_weights=self.log_weights,
            action_mask=self.action_mask,
            thought_mask=self.thought_mask,
            thinking=thinking,
            ratio=ratio,
            seeds=self.seeds,
            support_log_probs=self.support_log_probs,
            kept=self.kept,
            ref_states=self.ref_states,
            **more,
        )

    def rows_of(self, values: Tensor) -> list[list[Any]]:
        """(B, C) values as a list per completion, without the padding."""
        return [row[:n] for row, n in zip(values.tolist(), self.lengths.tolist(), strict=True)]


def fitted(x: Tensor, positions: int, value: float, width: int | None = None) -> Tensor:
    """(B, C, ...) with so many positions: padded on the right with `value`, or cut; `width`: of W in (B, C, W)."""
    x = x if width is None else F.pad(x, (0, width - x.shape[-1]), value=value)
    extra = positions - x.shape[1]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra), value=value) if extra > 0 else x[:, :positions]


class Pass(NamedTuple):
    """What a pass over the recorded actions found, (B, C) float32 each."""

    log_probs: Tensor  # (B, 2C) where the ratio has a second factor: its log-density is the second half
    entropy: Tensor  # as log_probs; 0 in the second half
    kl: Tensor | None  # to the reference's categoricals; None where TRL takes the KL, or nobody does
    values: Tensor | None  # None for a model without a value head
    aux_loss: Tensor | None = None  # (passes,), the load-balancing loss of each pass; None where none was asked for

    @classmethod
    def joined(cls, passes: list[Pass]) -> Pass:
        joined: list[Any] = [None if c[0] is None else torch.cat(c) for c in zip(*passes, strict=True)]
        return cls(*joined)

    def spread(self, rows: Tensor, known: Tensor) -> Pass:
        """This pass over `rows` as one over the whole batch: elsewhere log-densities are `known`, the rest is 0."""
        B, width = len(known), self.log_probs.shape[1]

        def placed(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.new_zeros(B, *x.shape[1:]).index_copy(0, rows, x)

        log_probs = F.pad(known, (0, width - known.shape[1])).index_copy(0, rows, self.log_probs)
        entropy = placed(self.entropy)
        assert entropy is not None
        return Pass(log_probs, entropy, placed(self.kl), placed(self.values))


def rows_in_loss(inputs: dict[str, Any]) -> Tensor:
    """Which rows of TRL's micro-batch have a position in the loss; the first if none has: a pass needs one."""
    rows = (inputs["completion_mask"] * inputs["tool_mask"]).any(dim=1).nonzero().flatten()
    return rows if len(rows) else rows.new_zeros(1)


def parts(rows: int, batch_size: int | None) -> Iterator[slice]:
    """The rows of a batch, `batch_size` at a time."""
    for start in range(0, rows, batch_size or rows):
        yield slice(start, min(start + (batch_size or rows), rows))


def with_second_factor(inputs: dict[str, Any], thought_mask: Tensor, weight: float, pad_id: int) -> dict[str, Any]:
    """TRL's micro-batch with C more columns, one per thought for its second factor, p(S, x) / p(i*).

    TRL's masks multiply the loss, so they carry the factor's weight.
    """
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]  # (B, C)
    advantages, sampled = inputs["advantages"], inputs["tool_mask"].float()
    return {
        **inputs,
        "completion_ids": torch.cat([ids, torch.full_like(ids, pad_id)], dim=1),
        "completion_mask": torch.cat([mask, mask], dim=1),
        "tool_mask": torch.cat([sampled, sampled * thought_mask * weight], dim=1),
        "advantages": advantages if advantages.dim() == 1 else advantages.repeat(1, 2),
    }


class Generated(NamedTuple):
    """What TRL's `_generate` returns, slot by slot."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None  # 1: in the loss
    completions: list[Any]
    log_probs: list[list[float]] | None
    extra_fields: dict[str, list[Any]]  # further columns of the reward functions
    images: Any
    tool_images: Any
