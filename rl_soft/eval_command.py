"""`rl-soft eval`: one evaluation from start to end: problems, model, records, report.

What can be refused is refused before the weights are read. Every process loads whole weights, under ZeRO-3 too: no
optimizer state comes with them, and decoding from partitioned ones would gather them at every step.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from rl_soft import data, policy
from rl_soft.config import AnalysisArguments, EvaluationArguments, load_evaluation
from rl_soft.evaluate import FREE_KEYS, check_golds, evaluate, header_of
from rl_soft.layout import Layout, Thinking
from rl_soft.records import check_header
from rl_soft.report import build
from rl_soft.supervised import context_length
from rl_soft.train import gathered, prepare_devices

logger = logging.getLogger("rl_soft")


def run(model: str, overrides: dict[str, Any]) -> Path:
    """Evaluate a model, or go on where an evaluation was stopped; returns the directory.

    Args:
        model: a folder of ours, a transformers or PEFT folder, or a hub id.
        overrides: fields of `EvaluationArguments`, and of `Thinking` to change the model's own.

    Raises:
        ValueError: arguments, data set and model that do not fit, or a directory that holds another evaluation.
    """
    arguments, changes = load_evaluation(model, overrides)
    thinking = thinking_of(model, changes)
    rows = load_rows(arguments)
    check_golds(rows, arguments.dataset, arguments.confirm_run_unsafe_code)
    out = Path(arguments.output_dir)
    config = {**dataclasses.asdict(arguments), **thinking.to_dict()}
    described: dict[str, Any] = {
        "name": out.name,
        "model_name": model,
        "dataset": arguments.dataset,
        "split": arguments.split,
        "samples": arguments.eval_samples,
        "seed": arguments.eval_seed,
        "config": config,
    }
    resuming = check_header(out, header_of(thinking, len(rows), **described), FREE_KEYS)
    if not resuming and out.exists() and any(out.iterdir()):
        raise ValueError(f"output_dir {out} is not empty and holds no evaluation; choose another")

    prepare_devices()
    state = start_processes()
    loaded = load_policy(model, arguments)
    thinking.support_size(loaded.model.config.vocab_size)
    layout = Layout(thinking, loaded.tokenizer)
    check_lengths(rows, layout, context_length(loaded.model), arguments.dataset)
    loaded.model.to(state.device)
    logger.info("%d problems x (%d samples + greedy) into %s", len(rows), arguments.eval_samples, out)
    try:
        with gathered(loaded.model):
            evaluate(
                loaded.model,
                layout,
                rows,
                out,
                batch_size=arguments.eval_batch_size,
                run_code=arguments.confirm_run_unsafe_code,
                control=arguments.control,
                **described,
            )
    except KeyboardInterrupt:
        logger.info("stopped; the same command goes on with what is missing")
        raise SystemExit(130) from None
    if state.is_main_process:
        figures = build(out, arguments.eval_k)
        logger.info("%s; report: %s", figures["title"], out / "report.md")
    return out


def describe(model: str, overrides: dict[str, Any]) -> str:
    """What would be evaluated, as YAML, for --dry-run."""
    arguments, changes = load_evaluation(model, overrides)
    values = {**dataclasses.asdict(arguments), **thinking_of(model, changes).to_dict()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def thinking_of(model: str, changes: dict[str, Any]) -> Thinking:
    """The thinking that the model was trained for, with changes; explicit for a model that is not ours."""
    trained = policy.read_thinking(Path(model))
    if trained is not None:
        return dataclasses.replace(trained, **changes)
    if not Path(model).exists() and "end_of_thinking" not in changes:
        raise ValueError(
            f"no folder {model!r} is here; if it is meant for the hub, say where its thoughts end: --end_of_thinking"
        )
    return Thinking(**{"phase": "explicit", **changes})


def check_lengths(rows: list[data.Row], layout: Layout, context: int | None, dataset: str) -> None:
    """Refuse, by name, questions that leave a model without positions for thoughts and answer."""
    if context is None:
        return
    lengths = {row.id: len(layout.prompt_ids(row.question)) + layout.max_completion_length for row in rows}
    long = [name for name, length in lengths.items() if length > context]
    if long:
        raise ValueError(
            f"dataset {dataset}, row {long[0]}: question, thoughts and answer may take {lengths[long[0]]} tokens, and "
            f"the model has {context} positions; so may {len(long) - 1} more rows: lower num_thoughts or "
            f"max_answer_tokens, or leave them out with dataset_options: {{drop: [{', '.join(long[:20])}]}}"
        )


def load_rows(arguments: EvaluationArguments | AnalysisArguments) -> list[data.Row]:
    return data.load(
        arguments.dataset,
        arguments.split,
        arguments.eval_problems,
        arguments.data_seed_eval,
        arguments.dataset_options,
        arguments.dataset_columns,
    )


def load_policy(model: str, arguments: EvaluationArguments | AnalysisArguments) -> policy.Policy:
    try:
        return policy.load(model, arguments.dtype, arguments.attn_implementation)
    except OSError as error:  # transformers' for a name that is neither a folder nor on the hub
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder here nor to be had from the hub: {first}") from None


def start_processes() -> PartialState:
    """Join the processes that the launcher started; each would work alone otherwise, without a word."""
    state = PartialState(cpu=not torch.cuda.is_available())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != world:
        raise ValueError(f"launched {world} processes, but {state.num_processes} found each other")
    logger.info("%d process(es), %s, device %s", world, state.distributed_type.value, state.device)
    return state
