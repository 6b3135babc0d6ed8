"""Coconut: replace the steps of a worked solution, stage by stage, by continuous thoughts (arXiv 2412.06769).

    stage s   question <bot> z_1 .. z_(s c) <eot>  steps s+1 .. m  answer_prompt answer

A thought is the model's last hidden state (after the final norm) at the position before, fed as it is. The loss is
the cross-entropy on what follows <eot>: nothing tells a thought what to hold. Stages: `cot_epochs` of stage 0, where
all is text, then `epochs_per_stage` of each stage; there are num_thoughts / c, and after the last the thoughts stay n
and no text is left, however many steps a row has. A stage has the same number of thoughts for every row.

With probability `uniform_prob` a row is trained at a random stage of its own instead, so that earlier stages are not
forgotten. The optimizer's state starts afresh at each stage. Evaluation is the latent rollout: n thoughts, then the
answer, on one cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rl_soft.config.arguments import CoconutArguments
from rl_soft.config.recipe import Recipe
from rl_soft.config.refusals import refuse_checkpointing
from rl_soft.data import sources as data
from rl_soft.data.sources import Row
from rl_soft.model import policy
from rl_soft.model.think import position_ids
from rl_soft.thoughts.layout import Layout, pad
from rl_soft.thoughts.noise import address, uniform
from rl_soft.train.runtime.checkpoints import divided
from rl_soft.train.start import lora_config, with_adapter
from rl_soft.train.supervised import IGNORE, ScheduledTrainer

logger = logging.getLogger("rl_soft")


@dataclass(frozen=True)
class Curriculum:
    """The stage as a function of the optimizer step: 0 .. last, and last + 1 where no text is left."""

    arguments: CoconutArguments
    steps_per_epoch: int
    last: int  # the number of stages whose thoughts grow

    def __call__(self, step: int) -> int:
        a = self.arguments
        beyond = step - round(a.cot_epochs * self.steps_per_epoch)
        if beyond < 0:
            return 0
        return min(1 + beyond // max(1, round(a.epochs_per_stage * self.steps_per_epoch)), self.last + 1)


class CoconutTrainer(ScheduledTrainer):
    """transformers' Trainer with thoughts in the place of the first steps.

    Args:
        model, args, arguments, **kwargs: as for `ScheduledTrainer`.

    Raises:
        ValueError: gradient checkpointing, or uniform_prob under ZeRO-3.
    """

    arguments: CoconutArguments
    schedule: Curriculum
    logged_as = "stage"

    def __init__(self, model: Any, args: Any, *, arguments: CoconutArguments, **kwargs: Any):
        refuse_checkpointing(
            args,
            "gradient_checkpointing is not available for coconut:",
            "lower per_device_train_batch_size instead",
        )
        if arguments.uniform_prob and divided(args) == 3:
            raise ValueError(
                "uniform_prob must be 0 under ZeRO-3: stages differ between processes, and so would their forward "
                "passes, for which ZeRO-3 gathers weights; use ZeRO-2"
            )
        # DDP would send the model's buffers around at each forward pass, and processes may make different numbers.
        args.ddp_broadcast_buffers = False
        super().__init__(model, args, arguments=arguments, **kwargs)

    def make_schedule(self, rows: list[Row], steps_per_epoch: int) -> Curriculum:
        stages = self.layout.thinking.num_thoughts // self.arguments.thoughts_per_step
        return Curriculum(self.arguments, steps_per_epoch, stages)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the labelled tokens of the batch. Rows of one stage go through the model together."""
        groups: dict[int, list[Row]] = {}
        rows = inputs["rows"]
        for row, stage in zip(rows, self.stages(rows, self.state.global_step), strict=True):
            groups.setdefault(stage, []).append(row)
        sums, counts, logits = [], [], None
        for stage, group in sorted(groups.items()):
            logits, labels = self.forward(model, group, stage)
            labels = labels[:, 1:].flatten()  # logits at t predict the label at t + 1
            predictions = logits[:, :-1].flatten(0, 1).float()
            sums.append(F.cross_entropy(predictions, labels, ignore_index=IGNORE, reduction="sum"))
            counts.append((labels != IGNORE).sum())
        (share,) = self.share(inputs, num_items_in_batch)
        loss = torch.stack(sums).sum() / torch.stack(counts).sum() * share
        return (loss, {"logits": logits}) if return_outputs else loss

    def counts(self, batch: dict[str, Any]) -> Tensor:
        rows = batch["rows"]
        stages = self.stages(rows, self.state.global_step)
        return torch.tensor([sum(len(self.text_of(row, stage)) for row, stage in zip(rows, stages, strict=True))])

    def text_of(self, row: Row, stage: int) -> list[int]:
        """Ids of what follows the thoughts and <eot>."""
        layout, left = self.layout, row.steps[stage:] if stage <= self.schedule.last else ()
        return [
            *layout.encode("".join(step + layout.thinking.step_separator for step in left)),
            *layout.answer_prompt_ids,
            *layout.answer_ids(row.answer),
        ]

    def stages(self, rows: list[Row], step: int) -> list[int]:
        """The stage of each row: the scheduled one, or one of 0 .. number of its steps."""
        scheduled, p = self.schedule(step), self.arguments.uniform_prob
        if p == 0:
            return [scheduled] * len(rows)
        seeds = torch.tensor([address(self.seed, row.id, 0) for row in rows])
        draws = uniform(seeds, step, 2).tolist()
        return [
            min(int(u * (len(row.steps) + 1)), len(row.steps)) if drawn < p else scheduled
            for row, (drawn, u) in zip(rows, draws, strict=True)
        ]

    def forward(self, model: Any, rows: list[Row], stage: int) -> tuple[Tensor, Tensor]:
        """Question, thoughts, text: logits (B, S, V) and labels (B, S) of what follows the thoughts.

        Full backpropagation through all thoughts: 1 + s c + 1 forward passes on one cache.
        """
        layout, device, pad_id = self.layout, self.args.device, self.layout.tokenizer.pad_token_id
        prompts = [layout.prompt_ids(row.question) for row in rows]
        ids, mask = (x.to(device) for x in (pad(prompts, pad_id, True), pad([[1] * len(p) for p in prompts], 0, True)))
        cache = DynamicCache(config=self.model.config)
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "output_hidden_states": True}
        out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), logits_to_keep=1, **given)
        position = mask.sum(-1, keepdim=True)  # (B, 1)
        for _ in range(min(stage, self.schedule.last) * self.arguments.thoughts_per_step):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            thought = out.hidden_states[-1][:, -1:]  # (B, 1, H), after the final norm
            out = model(inputs_embeds=thought, attention_mask=mask, position_ids=position, logits_to_keep=1, **given)
            position = position + 1

        texts, labels = [], []
        for row in rows:
            text = self.text_of(row, stage)
            texts.append([layout.eot_id, *text])
            labels.append([IGNORE, *text])
        text_ids = pad(texts, pad_id).to(device)  # (B, S)
        S = text_ids.shape[1]
        out = model(
            input_ids=text_ids,
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), S)], dim=1),
            position_ids=position + torch.arange(S, device=device),
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, pad(labels, IGNORE).to(device)


def coconut_trainer(recipe: Recipe, start: policy.Policy, args: Any, layout: Layout, rows: list[data.Row]) -> Any:
    adapter = lora_config(recipe)
    model = start.model if adapter is None else with_adapter(start.model, layout, adapter)
    return CoconutTrainer(model, args, layout=layout, arguments=recipe.extra, rows=rows, seed=recipe.seed)
