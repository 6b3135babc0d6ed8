"""The rows of the engine: where they stand, what they are fed next, and the records that they leave.

Shapes: B rows in all, S places for live rows, m rows that are drawn together, T positions, K slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rl_soft.rollouts.kernels import gpu_rules
from rl_soft.rollouts.state_machine import COUNTERS, DONE, Rules, State, token_log_weights
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout


@dataclass(frozen=True)
class Rollout:
    """B completions, right-padded to the longest, T positions of K slots. Tensors live on the model's device.

    Entropies are those of the whole distribution at its temperature, also where it was cut (`decoding`) before a
    position was drawn from it. So are log-densities and outside mass, unless `kept` says what the cut left: then they
    are those of the distribution on it, which was drawn from.
    """

    prompt_ids: list[list[int]]
    completion_ids: Tensor  # (B, T) int64; latent thoughts hold <bot>, explicit ones their strongest id
    mask: Tensor  # (B, T) bool, the positions that exist
    action_mask: Tensor  # (B, T) bool, of those the sampled ones (thoughts and answer tokens)
    thought_mask: Tensor  # (B, T) bool, of those the thoughts
    support: Tensor  # (B, T, K) int64, the strongest weight first
    log_weights: Tensor  # (B, T, K) float32, logsumexp 0; -inf at absent slots; a token is [0, -inf, ...]
    log_probs: Tensor  # (B, T) float32: log-density of thoughts, log-probability of answer tokens, else 0
    support_log_probs: Tensor  # (B, T, K) float32: ln pi of the slots' ids; 0 where there is none, or no action
    entropy: Tensor  # (B, T) float32, nats
    outside: Tensor  # (B, T) float32, probability mass outside the support
    finished: Tensor  # (B,) bool, ended by an end-of-sequence token
    failed: Tensor  # (B,) bool, stopped by logits that are not finite; all of action_mask is off there
    seeds: Tensor  # (B,) int64
    mode_log_probs: Tensor | None = None  # (B, T) float32, ln p of the mode, in log_probs too; where a gate switches
    kept: Tensor | None = None  # (B, T, W) int32, ids that a cut kept beside the support, -1 absent; None: no record

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: positions that each completion has."""
        return self.mask.sum(-1)

    def to(self, device: torch.device | str) -> Rollout:
        """On another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


@dataclass
class Live(State):
    """What is known of the rows in S places. Of rows that are done, `t` is T."""

    row: Tensor  # (S,) int64, its number in the rollout
    position: Tensor  # (S,) int64, of the next input, in the sequence
    is_thought: Tensor  # (S,) bool, whether the next input is a thought
    support: Tensor  # (S, K) int64, the next input
    log_weights: Tensor  # (S, K) float32, its log-weights
    hidden: Tensor | None = None  # (S, H), what the LM head has read; kept where a thought is made of it
    first: Tensor | None = None  # (S, H), the first thought; kept for control `repeat`

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def part(self, places: slice) -> Live:
        """Views of some places."""
        return Live(**{name: x[places] for name, x in self.tensors().items()})

    def move(self, to: Tensor, place: Tensor) -> None:
        for x in self.tensors().values():
            x[to] = x[place]


class Walk:
    """The rules of one rollout and the records of its rows.

    Args:
        vocab_size: V.
        B: rows; the records have one position more than a completion can have, which rows that are done write to.
        seeds: (B,) int64; None decodes greedily.
        eos_ids: ids that end a completion.
        decoding: cuts and the cold stop; None for neither.
        keep: whether what a cut kept is recorded.
        gate: (m, H) -> (m,) logits, where a gate switches thoughts.
    """

    def __init__(
        self,
        layout: Layout,
        vocab_size: int,
        B: int,
        seeds: Tensor | None,
        eos_ids: Sequence[int],
        device: torch.device,
        decoding: Decoding | None = None,
        keep: bool = False,
        gate: Any = None,
    ) -> None:
        self.gate = gate
        keep = keep and decoding is not None and decoding.cuts
        self.rules = Rules(layout, vocab_size, eos_ids, seeds is None, device, decoding, keep)
        self.device, self.T, K, pad_id = device, layout.max_completion_length, self.rules.K, self.rules.pad_id
        T = self.T

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(B, *shape, dtype=dtype, device=device)

        self.out = Rollout(
            prompt_ids=[],
            completion_ids=torch.full((B, T + 1), pad_id, device=device),
            mask=zeros(T + 1, dtype=torch.bool),
            action_mask=zeros(T + 1, dtype=torch.bool),
            thought_mask=zeros(T + 1, dtype=torch.bool),
            support=torch.full((B, T + 1, K), pad_id, device=device),
            log_weights=token_log_weights(zeros(T + 1, K)),
            log_probs=zeros(T + 1),
            support_log_probs=zeros(T + 1, K),
            entropy=zeros(T + 1),
            outside=zeros(T + 1),
            finished=zeros(dtype=torch.bool),
            failed=zeros(dtype=torch.bool),
            seeds=zeros(dtype=torch.int64) if seeds is None else seeds.to(device),
        )
        if keep:
            W = min(self.rules.decoding.top_k, vocab_size)
            kept = torch.full((B, T + 1, W), -1, dtype=torch.int32, device=device)
            self.out = replace(self.out, kept=kept)
        if gate is not None:
            self.out = replace(self.out, mode_log_probs=zeros(T + 1))

    def places(self, S: int, hidden: Tensor | None, first: Tensor | None) -> Live:
        """S free places; `hidden` and `first` (., H) are examples of what is to be kept."""
        zeros = {
            name: torch.zeros(S, dtype=torch.int64, device=self.device) for name in (*COUNTERS, "row", "position")
        }
        return Live(
            **zeros,
            is_thought=torch.zeros(S, dtype=torch.bool, device=self.device),
            support=torch.zeros(S, self.rules.K, dtype=torch.int64, device=self.device),
            log_weights=torch.zeros(S, self.rules.K, device=self.device),
            hidden=None if hidden is None else hidden.new_zeros(S, hidden.shape[-1]),
            first=None if first is None else first.new_zeros(S, first.shape[-1]),
        )

    def start(self, live: Live, row: Tensor, position: Tensor) -> None:
        """Put rows (m,), which stand at `position` (m,), in the places of `live`."""
        live.write(row=row, seed=self.out.seeds[row], position=position, **self.rules.start())

    def forget(self, row: Tensor) -> None:
        """As if these rows had not begun."""
        out = self.out
        for x in (out.mask, out.action_mask, out.thought_mask, out.finished, out.failed):
            x[row] = False

    def result(self, prompt_ids: list[list[int]]) -> Rollout:
        """The records, cut to the longest completion; a row that failed has no actions, so nothing learns from it."""
        self.out.action_mask[self.out.failed] = False
        T = int(self.out.mask[:, : self.T].sum(-1).max())
        cut: dict[str, Any] = {name: x[:, :T].clone() for name, x in vars(self.out).items() if name in POSITIONS}
        if self.out.mode_log_probs is not None:
            cut["mode_log_probs"] = self.out.mode_log_probs[:, :T].clone()
        if self.out.kept is not None:
            kept = self.out.kept[:, :T]
            cut["kept"] = kept[..., : int((kept >= 0).sum(-1).max())].clone()
        return replace(self.out, prompt_ids=prompt_ids, **cut)

    def sample(self, live: Live, logits: Tensor, hidden: Tensor | None) -> None:
        """Draw the next position of m rows, write it down, and find out what comes after it.

        Args:
            logits: (m, V), any float dtype; hidden: (m, H), what they were made from, where it is kept.
        """
        if not gpu_rules.sampled(self.rules, self.out, live, logits, self.T):
            gate = None if self.gate is None else self.gate(hidden)
            drawn = self.rules.draw(live, logits, gate)
            for name, value in drawn.recorded().items():
                record = getattr(self.out, name)
                record[live.row, live.t] = value.to(record.dtype)
            self.out.finished[live.row] |= self.rules.advance(live, drawn)
            self.out.failed[live.row] |= drawn.bad
            live.t.masked_fill_(live.stage == DONE, self.T)
            live.write(is_thought=drawn.thought_mask, support=drawn.support, log_weights=drawn.log_weights)
        if live.hidden is not None:
            live.write(hidden=hidden)


POSITIONS = (  # of `Rollout`, what has a value per position
    "completion_ids", "mask", "action_mask", "thought_mask", "support", "log_weights", "log_probs",
    "support_log_probs", "entropy", "outside",
)  # fmt: skip
