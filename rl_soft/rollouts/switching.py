"""Which thoughts of a row are soft and which are tokens (`Thinking.switch`); its *mode* says which.

    entropy   a row begins soft. It takes tokens as soon as the entropy is below what it was at the last switch, and is
              soft again once it is above, after at least `switch_window` tokens (SwiReasoning, arXiv 2510.05069; the
              number of switches has no cap here). Given the past the mode is certain.
    gate      the mode is drawn, with the probability that a learned gate gives to soft (`model.gate`)

Shapes: m rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_soft.model.gate import mode_log_prob
from rl_soft.thoughts.noise import uniform
from rl_soft.thoughts.thinking import Thinking

STREAM = 64  # of the noise that draws a mode; those below are a thought's
PER_NAT = 10**6  # a state holds whole numbers


def soft_mode(
    state: Any, is_thought: Tensor, thinking: Thinking, entropy: Tensor | None, gate: Tensor | None, seeds: Any
) -> Tensor:
    """(m,) bool, the thoughts that are soft.

    Args:
        state: a `state_machine.State`.
        entropy: (m,) nats, of the position that is drawn; read by `entropy`.
        gate: (m,) logits of the gate; read by `gate`.
        seeds: (m,) int64, or None for rows without noise, which take the likelier mode.
    """
    if thinking.switch == "gate":
        assert gate is not None
        threshold = torch.full_like(gate, 0.5) if seeds is None else uniform(seeds, state.t, 1, STREAM)[:, 0]
        return is_thought & (threshold < gate.sigmoid())
    if thinking.switch == "entropy":
        assert entropy is not None
        now, was_soft = _whole(entropy), state.mode == 1
        to_token = was_soft & (now < state.reference)
        to_soft = ~was_soft & (now > state.reference) & (state.dwell >= thinking.switch_window)
        return is_thought & ((state.thoughts == 0) | (was_soft & ~to_token) | to_soft)
    return is_thought


def switched(state: Any, is_thought: Tensor, is_soft: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """What a state (m,) holds after a position: the mode, for how many thoughts, and the entropy at the switch."""
    changed = is_thought & ((state.thoughts == 0) | (is_soft != (state.mode == 1)))
    return {
        "mode": torch.where(is_thought, is_soft.long(), state.mode),
        "dwell": torch.where(changed, 0, state.dwell + is_thought),
        "reference": torch.where(changed, _whole(entropy), state.reference),
    }


def log_prob_of_mode(is_thought: Tensor, is_soft: Tensor, gate: Tensor) -> Tensor:
    """(m,) ln p of the mode that the gate gave; 0 off thoughts."""
    return torch.where(is_thought, mode_log_prob(gate, is_soft), 0.0)


def _whole(entropy: Tensor) -> Tensor:
    return (entropy.nan_to_num(0.0) * PER_NAT).round().long()
