"""Where the time of a training step goes: seconds and tokens per second of each section; and the most memory held."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

SECTIONS = (
    "rollout",  # sampling
    "reward",  # reward functions
    "scoring",  # log-densities of the old policy and of the reference, advantages
    "update",  # loss, gradients, optimizer
)


class StepClock(TrainerCallback):
    """A stack of sections; time counts for the innermost alone, so that the sections of a step add up to the step.

    As a callback it opens and closes `update` around each optimizer step. On a GPU every change of section waits
    for the device, a few times per step, since a section would otherwise be charged for work that an earlier one has
    queued.
    """

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._since = 0.0
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        self._tokens = {"rollout": 0.0, "update": 0.0}

    def _switch(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def count(self, section: str, tokens: float) -> None:
        """Positions that the section worked on, over all processes."""
        self._tokens[section] += tokens

    def take(self) -> dict[str, float]:
        """Metrics since the last call: `seconds/SECTION` of all, `tokens_per_second/SECTION` of those that ran."""
        self._switch()
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = dict.fromkeys(seconds, 0.0), dict.fromkeys(tokens, 0.0)
        speeds = {f"tokens_per_second/{k}": n / max(seconds[k], 1e-9) for k, n in tokens.items() if n}
        return {f"seconds/{k}": v for k, v in seconds.items()} | speeds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._switch()
        self._stack = ["update"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._switch()
        self._stack = []


def peak_gib() -> float:
    """The most memory that this process has held since its start, GiB: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
