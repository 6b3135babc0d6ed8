"""What a recipe of TRL's scripts means where it says nothing, and what soft thoughts need beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rl_soft.config.trainers import trainer_fields

LORA = {"lora_r": 16, "lora_alpha": 32}  # of trl.ModelConfig
ANSWER_COLUMNS = {"open-r1/OpenR1-Math-220k": "answer"}  # beside a column solution, which holds the working too
HASHES = "####"
ASKS_FOR_HASHES = "{question}\n\nThink step by step. Write the final answer after ####."
# models that write <think> ... </think> unasked
THINKS = re.compile(
    r"qwen3(?!.*(?:base|instruct|coder))|smollm3(?!.*base)|qwq|\br1\b|thinking|magistral", re.IGNORECASE
)


def defaults_of(values: Mapping[str, Any], method: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Values of our keys, each with the rule that it follows from.

    Args:
        values: of the recipe, into which each default is taken before the next one is asked for. One that is there
            already is none, but for a mapping, which comes with what was in it.
    """
    yield {"phase": "explicit", "end_of_thinking": end_of_thinking(values)}, "thinking is text until its end is said"
    if values.get("end_of_thinking") == HASHES and HASHES not in _prompts(values):
        yield {"question_template": ASKS_FOR_HASHES}, "the end has to be asked for"
    if values.get("thought", "gumbel") == "gumbel":
        yield {"thought_k": 5, "thought_tau": 0.1, "ratio": "top1"}, "docs/grpo.md"
    if values.get("temperature") is not None:
        yield {"thought_temperature": values["temperature"]}, "temperature of the recipe"
    dataset = str(values.get("dataset"))
    if "/" in dataset or Path(dataset).suffix:  # a hub id or a file; sets that are known have columns of their own
        answer = ANSWER_COLUMNS.get(dataset, "solution")
        for key, usual, why in (
            ("dataset_columns", {"question": "prompt", "answer": answer}, "what TRL's scripts and rewards read"),
            ("dataset_options", {"answer_type": "expression"}, "an answer may be a formula"),
        ):
            given = values.get(key) or {}
            if isinstance(given, dict) and not usual.keys() <= given.keys():
                yield {key: usual | given}, why
    if values.get("eval_strategy") in (None, "no", False) and not values.get("eval_dataset"):
        yield {"eval_problems": 0}, "TRL's recipe evaluates nothing"
    usual = trainer_fields(method)
    of_trl: dict[str, Any] = {key: usual[key] for key in ("lr_scheduler_type", "gradient_checkpointing")}
    of_trl["output_dir"] = "trainer_output"
    if values.get("use_peft"):
        of_trl |= LORA
    if values.get("num_thoughts") is None:
        of_trl["max_completion_length"] = usual["max_completion_length"]
    if values.get("prompts_per_step") is None:
        of_trl["gradient_accumulation_steps"] = usual["gradient_accumulation_steps"]
    yield of_trl, "TRL's"


def end_of_thinking(values: Mapping[str, Any]) -> str:
    """What ends the thinking: what the prompts or rewards of a recipe speak of, or its model writes.

    Thinking that is never ended has no answer, so any other model is asked for `####`.
    """
    prompts, rewards = _prompts(values), values.get("rewards") or ()
    if "</think>" in prompts or {"think_format", "answer_format", "tag_count"} & {str(name) for name in rewards}:
        return "</think>"
    told = values.get("chat_template_kwargs")
    off = isinstance(told, dict) and told.get("enable_thinking") is False
    writes = THINKS.search(str(values.get("model_name_or_path"))) is not None and not off
    return "</think>" if writes and HASHES not in prompts else HASHES


def _prompts(values: Mapping[str, Any]) -> str:
    return " ".join(str(values.get(key) or "") for key in ("system_prompt", "question_template", "chat_template"))
