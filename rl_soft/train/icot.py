"""iCoT: internalise a chain of thought by removing it, token by token from the left (arXiv 2405.14838).

    question  step tokens r+1 .. m  end_of_thinking answer_prompt answer     cross-entropy on what follows the question

r grows by one every `steps_per_epoch / remove_per_epoch` optimizer steps, until nothing of the chain is left. Three
things keep training stable:

    smoothing    a row loses o more tokens, P(o) = (1 - e^-lambda) e^(-lambda o), so that the next removal is not new
    reset        the optimizer's state starts afresh at each removal, since its moments belong to another loss
    remove all   beyond `remove_all_beyond` tokens the rest of the chain goes at once

Evaluation is that of a CoT model in the explicit phase: it writes what it still writes, greedily, then the answer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from rl_soft.config.arguments import ICoTArguments
from rl_soft.config.recipe import Recipe
from rl_soft.data import sources as data
from rl_soft.data.sources import Row
from rl_soft.model import policy
from rl_soft.thoughts.layout import Layout, pad
from rl_soft.thoughts.noise import address, exponential
from rl_soft.train.start import lora_config
from rl_soft.train.supervised import IGNORE, ScheduledTrainer, token_cross_entropy

logger = logging.getLogger("rl_soft")

MOST_EXTRA = 100  # tokens that smoothing removes at most


@dataclass(frozen=True)
class Removal:
    """r, the tokens removed from the left of every chain, as a function of the optimizer step."""

    arguments: ICoTArguments
    steps_per_epoch: int
    longest: int  # tokens of the longest chain: once as many are removed, nothing is left to remove

    def __call__(self, step: int) -> int:
        a = self.arguments
        steps_per_token = max(1, round(self.steps_per_epoch / a.remove_per_epoch))
        removed = max(0, step - self.start) // steps_per_token
        if a.remove_all_beyond is not None and removed >= a.remove_all_beyond:
            return self.longest
        return min(removed, self.longest)

    @property
    def start(self) -> int:
        """The step at which the chain begins to shrink."""
        return round(self.arguments.cot_epochs * self.steps_per_epoch)


class ICoTTrainer(ScheduledTrainer):
    """transformers' Trainer on chains of thought that get shorter."""

    arguments: ICoTArguments
    schedule: Removal
    logged_as = "removed_tokens"

    def make_schedule(self, rows: list[Row], steps_per_epoch: int) -> Removal:
        longest = max(len(self.layout.steps_ids(row, drop_last_step=False)) for row in rows)
        return Removal(self.arguments, steps_per_epoch, longest)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = self.batch(inputs["rows"], self.state.global_step)
        labels = batch.pop("labels")
        out = model(**batch, use_cache=False)
        (share,) = self.share(inputs, num_items_in_batch)
        loss = token_cross_entropy(out.logits, labels) * share
        return (loss, out) if return_outputs else loss

    def counts(self, batch: dict[str, Any]) -> Tensor:
        texts = self.texts(batch["rows"], self.state.global_step)
        return torch.tensor([sum(len(completion) for _, completion in texts)])

    def texts(self, rows: list[Row], step: int) -> list[tuple[list[int], list[int]]]:
        """Ids of the question and of what follows it, of each row at an optimizer step."""
        layout, made = self.layout, []
        for row, extra in zip(rows, self.extra_removal(rows, step), strict=True):
            chain = layout.steps_ids(row, drop_last_step=False)[self.schedule(step) + extra :]
            completion = [*chain, *layout.forced_after_cap, *layout.answer_ids(row.answer)]
            made.append((layout.question_ids(row.question), completion))
        return made

    def batch(self, rows: list[Row], step: int) -> dict[str, Tensor]:
        """Right-padded ids, mask and labels (B, T) of the rows at an optimizer step."""
        texts = self.texts(rows, step)
        ids = [question + completion for question, completion in texts]
        labels = [[IGNORE] * len(question) + completion for question, completion in texts]
        device = self.args.device
        return {
            "input_ids": pad(ids, self.layout.tokenizer.pad_token_id).to(device),
            "attention_mask": pad([[1] * len(row) for row in ids], 0).to(device),
            "labels": pad(labels, IGNORE).to(device),
        }

    def extra_removal(self, rows: list[Row], step: int) -> list[int]:
        """o of each row: floor(E / lambda) with E standard exponential has the distribution above."""
        smoothing = self.arguments.removal_smoothing
        if smoothing is None or step < self.schedule.start:
            return [0] * len(rows)
        seeds = torch.tensor([address(self.seed, row.id, 0) for row in rows])
        extra = (exponential(seeds, step, 1)[:, 0] / smoothing).floor()
        return [int(o) for o in extra.clamp(max=MOST_EXTRA)]


def icot_trainer(recipe: Recipe, start: policy.Policy, args: Any, layout: Layout, rows: list[data.Row]) -> Any:
    adapter = lora_config(recipe)
    model = start.model if adapter is None else get_peft_model(start.model, adapter)
    return ICoTTrainer(model, args, layout=layout, arguments=recipe.extra, rows=rows, seed=recipe.seed)
