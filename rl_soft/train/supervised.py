"""What the methods that learn from worked solutions share: which rows they take, padding, the loss on tokens, and the
trainer of those that change what they teach as training goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from rl_soft.data.sources import Row
from rl_soft.thoughts.layout import Layout

logger = logging.getLogger("rl_soft")
IGNORE = -100


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled positions; logits (B, T, V) at t predict labels (B, T) at t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def row_length(layout: Layout, row: Row, with_steps: bool = True) -> int:
    """Positions of a row with its steps and its thoughts: no method feeds more."""
    thoughts = layout.thinking.num_thoughts if layout.thinking.phase == "latent" else 0
    steps = len(layout.steps_ids(row, False)) if with_steps else 0
    fixed = len(layout.prompt_ids(row.question)) + len(layout.forced_after_cap) + len(layout.answer_ids(row.answer))
    return fixed + thoughts + steps


def usable_rows(
    rows: list[Row],
    layout: Layout,
    context: int | None,
    limit: int | None,
    with_steps: bool,
    dataset: str,
    drop_last_step: bool = False,
) -> list[Row]:
    """The rows to train on. What is unusual about them is counted in the log; none is left out without a word.

    Args:
        context: positions that the model has; None if it names none.
        limit: `max_row_tokens`; longer rows are left out.
        with_steps: whether the method reads the steps; drop_last_step: all but the last.

    Raises:
        ValueError: a row is longer than the model and no limit is given; no row has steps; no row is left.
    """
    kept: list[Row] = []
    left_out: list[tuple[Row, int]] = []
    for row in rows:
        length = row_length(layout, row, with_steps)
        if limit is not None and length > limit:
            left_out.append((row, length))
            continue
        if context is not None and length > context:
            raise ValueError(
                f"dataset {dataset}, row {row.id}: {length} tokens with its steps and thoughts, and the model has "
                f"{context} positions; leave such rows out with max_row_tokens: {context}"
            )
        kept.append(row)
    if left_out:
        first, length = left_out[0]
        logger.info(
            "%d of %d rows are longer than max_row_tokens %d and are left out; the first is %s with %d",
            *(len(left_out), len(rows), limit, first.id, length),
        )
    if not kept:
        raise ValueError(f"dataset {dataset}: no row has at most max_row_tokens = {limit} tokens")
    without = [row for row in kept if not row.steps]
    if with_steps and len(without) == len(kept):
        raise ValueError(f"dataset {dataset} has no worked steps, which this method learns from")
    if with_steps and without:
        logger.info(
            "%d of %d rows have no steps and train the answer alone; the first is %s",
            *(len(without), len(kept), without[0].id),
        )
    emptied = [row for row in kept if len(row.steps) == 1] if drop_last_step else []
    if emptied:
        logger.info(
            "%d of %d rows have one step, which drop_last_step leaves out, so their teacher has none; the first is %s",
            *(len(emptied), len(kept), emptied[0].id),
        )
    return kept


class WholeStep:
    """Mixin before transformers' Trainer: a loss is a mean over all micro-batches and processes of an optimizer step.

    The mean of a micro-batch, times `share(...)`, adds up to that: 16 rows at once and 4 x 4 make the same step, also
    where answers differ in length.
    """

    accelerator: Any
    loss_is_scaled_for_ga: Any = True  # transformers then leaves the accumulated losses as they are

    def counts(self, batch: dict[str, Any]) -> list[int]:
        """How many terms each mean of a micro-batch has."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """The counts of a step, per process: gradients are means over processes."""
        counted = torch.tensor([self.counts(batch) for batch in batch_samples], dtype=torch.float32, device=device)
        return self.accelerator.reduce(counted.sum(0), "mean")

    def share(self, batch: dict[str, Any], of_step: Tensor | None) -> list[float] | Tensor:
        """What the means of this micro-batch count for in the step; 1 outside of training."""
        here = self.counts(batch)
        return [1.0] * len(here) if of_step is None else torch.tensor(here, device=of_step.device) / of_step


def reset_optimizer(optimizer: Any) -> None:
    """Set all optimizer state to zero, in place: for Adam's moments and step counts that is a fresh optimizer.

    In place, since DeepSpeed keeps other references to the same tensors.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float) and not isinstance(value, bool):
                state[name] = 0


class ScheduledTrainer(WholeStep, Trainer):
    """transformers' Trainer over rows, where a schedule says what an optimizer step teaches (iCoT, Coconut).

    The schedule is logged at every step. Where it advances, the optimizer's state starts afresh, if
    `arguments.reset_optimizer`: its moments belong to another loss. The step alone decides, so a resume repeats it.

    Args:
        arguments: the method's own keys.
        seed: of the noise of rows, see `noise.address`.
    """

    model: Any
    schedule: Callable[[int], int]  # of the optimizer step; never falls
    logged_as: str

    def __init__(self, model: Any, args: Any, *, layout: Layout, arguments: Any, rows: list[Row], seed: int):
        super().__init__(model, args, data_collator=lambda rows: {"rows": rows}, train_dataset=rows)
        self.layout, self.arguments, self.seed = layout, arguments, seed
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.schedule = self.make_schedule(rows, math.ceil(len(rows) / batch))
        self._fresh_since = 0  # the step that last began with a fresh optimizer

    def make_schedule(self, rows: list[Row], steps_per_epoch: int) -> Callable[[int], int]:
        raise NotImplementedError

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        step = self.state.global_step
        if self.arguments.reset_optimizer and 0 < step != self._fresh_since:  # once, at its first micro-batch
            if self.schedule(step) > self.schedule(step - 1):
                reset_optimizer(self.optimizer)
            self._fresh_since = step
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs[self.logged_as] = self.schedule(self.state.global_step - 1)
        super().log(logs, *args, **kwargs)
