"""What a soft request says, and how what was drawn travels back. Both ends of the wire read this file.

A request is soft when its extra arguments (`SamplingParams.extra_args`, over HTTP `vllm_xargs`) have `thought`. They
are fields of `Thinking` and `Decoding` by name, each with its default, and

    seed      int64, the address of the row's noise; absent: greedy decoding
    eos_ids   ids that end the completion; absent: those of the model's generation config

The record comes through the ordinary logprobs channel, 2K + 4 entries (id, value) per position, all ids different:

    the reported id; 2V + a code of what the position is, with the log-density; 2V + ENTROPY; 2V + OUTSIDE;
    the K ids of the support with their ln pi; the same ids + V with their log-weights
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_soft.keys import fields, nearest
from rl_soft.rollouts.state_machine import Position
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.thinking import Thinking

OWN = ("seed", "eos_ids")
# What a position is. A row that is done reports an end id once more, so that vLLM ends the request.
FED, TOKEN, THOUGHT, FAILED, DONE, LAST_TOKEN, LAST_THOUGHT = range(7)
ENTROPY, OUTSIDE, ABSENT = 7, 8, 9  # behind 2V; ABSENT + j: slot j has no id


def record_width(slots: int) -> int:
    """Entries per position of the logprobs channel; `SamplingParams.logprobs` is one less."""
    return 2 * slots + 4


@dataclass(frozen=True)
class Settings:
    """What rows that take their steps together have in common."""

    thinking: Thinking
    decoding: Decoding
    eos_ids: tuple[int, ...] | None
    greedy: bool


def to_arguments(
    thinking: Thinking, decoding: Decoding | None, eos_ids: Sequence[int], seed: int | None
) -> dict[str, Any]:
    """The extra arguments of a row; what HTTP cannot carry (None) is a default."""
    values: dict[str, Any] = {**thinking.to_dict(), **(decoding or Decoding()).to_dict(), "eos_ids": list(eos_ids)}
    if seed is not None:
        values["seed"] = seed
    return {name: value for name, value in values.items() if value is not None}


def from_arguments(values: dict[str, Any] | None) -> tuple[Settings, int] | None:
    """The settings and the seed (0 for greedy rows) of a request; None for one that is not soft.

    Raises:
        ValueError: a name that is none; a value that is not allowed.
    """
    if not values or "thought" not in values:
        return None
    known = (*fields(Thinking), *fields(Decoding), *OWN)
    for name in values:
        if name not in known:
            raise ValueError(f"soft request: {name} is no key" + nearest(name, known))
    seed, eos_ids = values.get("seed"), values.get("eos_ids")
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**63):
        raise ValueError(f"soft request: seed must be a whole number of 64 bits, got {seed!r}")
    if eos_ids is not None and not all(type(i) is int and i >= 0 for i in eos_ids):
        raise ValueError(f"soft request: eos_ids must be token ids, got {eos_ids!r}")
    thinking = Thinking(**{name: values[name] for name in fields(Thinking) if name in values})
    decoding = Decoding(**{name: values[name] for name in fields(Decoding) if name in values})
    return Settings(thinking, decoding, None if eos_ids is None else tuple(eos_ids), seed is None), seed or 0


def encode(drawn: Position, reported: Tensor, stops: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(m, 2K + 4) ids, int64, and values, float32, of the positions of m rows.

    Args:
        reported: (m,) int64, the ids that vLLM is told; stops: (m,) bool, rows that an end id ended.
    """
    V, K = vocab_size, drawn.support.shape[1]
    code = drawn.action_mask.long() * TOKEN + drawn.thought_mask * (THOUGHT - TOKEN)
    code = torch.where(stops, code + (LAST_TOKEN - TOKEN), code)
    code = torch.where(drawn.bad, FAILED, torch.where(drawn.mask, code, DONE))
    there = drawn.log_weights > -torch.inf  # (m, K)
    slot = torch.arange(K, device=code.device)
    ids = [torch.where(there, x, 2 * V + absent + slot) for x, absent in
           ((drawn.support, ABSENT), (drawn.support + V, ABSENT + K))]  # fmt: skip
    numbers = 2 * V + torch.stack([code, *(torch.full_like(code, n) for n in (ENTROPY, OUTSIDE))], dim=1)
    values = [
        drawn.support_log_probs[:, :1],
        torch.stack([drawn.log_probs, drawn.entropy, drawn.outside], dim=1),
        drawn.support_log_probs.where(there, 0.0),
        drawn.log_weights.where(there, 0.0),
    ]
    return torch.cat([reported[:, None], numbers, *ids], dim=1), torch.cat(values, dim=1)


@dataclass
class Recorded:
    """One position, as it came back."""

    code: int
    reported: int
    ids: list[int]  # of the support, the strongest weight first
    log_probs: list[float]  # ln pi of each
    log_weights: list[float]
    log_prob: float
    entropy: float
    outside: float


def decode(entries: Iterable[tuple[int, float]], vocab_size: int) -> Recorded:
    """The entries of one position, in any order but for the first; equal ids may have been merged."""
    V = vocab_size
    items = list(entries)
    slots, weights = {i: x for i, x in items[1:] if i < V}, {i - V: x for i, x in items if V <= i < 2 * V}
    last = {i - 2 * V: x for i, x in items if i >= 2 * V}
    if items[0][0] in weights:  # merged with the first entry
        slots.setdefault(items[0][0], items[0][1])
    ids = sorted(weights, key=weights.__getitem__, reverse=True)
    code = next(c for c in last if c < ENTROPY)
    return Recorded(
        code=code,
        reported=items[0][0],
        ids=ids,
        log_probs=[slots[i] for i in ids],
        log_weights=[weights[i] for i in ids],
        log_prob=last[code],
        entropy=last[ENTROPY],
        outside=last[OUTSIDE],
    )
