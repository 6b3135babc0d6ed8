"""Supervised fine-tuning on TRL's SFTTrainer: CoT on worked solutions, No-CoT on answers alone.

    CoT       question steps end_of_thinking answer_prompt answer     cross-entropy on what follows the question
    No-CoT    question       end_of_thinking answer_prompt answer

Both are evaluated in the explicit phase with thought `token`: the model writes until it has said end_of_thinking, then
answers. What it writes are its thoughts, and they are counted; a No-CoT model writes end_of_thinking alone. The paper
of CODI (arXiv 2502.21074) calls the two CoT-SFT and No-CoT-SFT.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from rl_soft.config.recipe import Recipe
from rl_soft.data.row import Row
from rl_soft.model.policy import Policy
from rl_soft.model.quantised import in_float32
from rl_soft.thoughts.layout import Layout
from rl_soft.train.start import lora_config
from rl_soft.train.supervised import IGNORE


def example(layout: Layout, row: Row, worked_steps: bool) -> dict[str, list[int]]:
    """Token ids and labels of a row."""
    question = layout.question_ids(row.question)
    steps = layout.steps_ids(row, drop_last_step=False) if worked_steps else []
    completion = [*steps, *layout.forced_after_cap, *layout.answer_ids(row.answer)]
    return {"input_ids": question + completion, "labels": [IGNORE] * len(question) + completion}


def sft_trainer(recipe: Recipe, start: Policy, args: Any, layout: Layout, rows: list[Row]) -> SFTTrainer:
    """TRL's trainer over ids that the layout made, so that training and evaluation agree on them.

    Args:
        args: trl.SFTConfig; its dataset preparation is switched off.
    """
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    args.max_length = None
    trainer = SFTTrainer(
        start.model,
        args,
        train_dataset=Dataset.from_list([example(layout, row, recipe.extra.worked_steps) for row in rows]),
        processing_class=layout.tokenizer,
        peft_config=lora_config(recipe),
    )
    in_float32(trainer.model, {})
    trainer.create_model_card = lambda *args, **kwargs: None  # type: ignore[method-assign]  # the pipeline writes one
    return trainer
