"""A soft rollout that asks, wherever it feeds a thought, what the model would make of something else in its place.

The rollout's cache writes what is fed to one common column, and the column moves on only after the decode step. So
alternatives are fed one after the other into the thought's own place, on the thought's own prefix, and the thought
itself comes last and overwrites them: they leave no trace, whatever kinds of attention the model has.

Shapes: n live rows, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_soft.rollouts.engine import Engine
from rl_soft.rollouts.recording import Live
from rl_soft.rollouts.state_machine import DONE


class Alternatives(Engine):
    """Arguments as `rollout.Engine`; `run` returns the rollout as if nothing had been asked.

    The thoughts must be mixtures of two ids or more (`thought_k`).
    """

    with_states = False  # whether outputs have hidden states, one per layer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replay.on = False

    def others(self, live: Live, at: Tensor) -> list[Tensor]:
        """What is fed in the place of the next inputs: (n, H) each; an empty list asks nothing here.

        Args:
            at: (n,) int64, the thought's position in the completion; `walk.T` where the next input is no thought.
        """
        raise NotImplementedError

    def record(self, live: Live, at: Tensor, outputs: list[Any]) -> None:
        """The model's outputs for what `others` returned, and last for the thoughts; what is not one goes to T."""
        raise NotImplementedError

    def _step(self) -> None:
        live = self.live.part(slice(0, self.n))
        thinks = live.is_thought & (live.stage != DONE)
        at = torch.where(thinks, live.t - 1, self.walk.T)
        fed = self.others(live, at) if bool(thinks.any()) else []
        outputs = [self.feed(live, x, self.with_states) for x in fed]
        outputs.append(self.feed(live, self.next_input(live), False))
        if fed:
            self.record(live, at, outputs)
        live.position += 1
        self.walk.sample(live, outputs[-1].logits[:, -1], None)
        self.cache.at += 1

    def feed(self, live: Live, inputs: Tensor, with_states: bool) -> Any:
        """One input (n, H) per row; it is written into the column that is next."""
        return self.model(
            inputs_embeds=inputs[:, None],
            attention_mask=self.cache.attention_mask(),
            position_ids=live.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=with_states,
        )
