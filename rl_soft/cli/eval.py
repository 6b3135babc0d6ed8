"""`rl-soft eval`: one evaluation from start to end: problems, model, records, report.

What can be refused is refused before the weights are read. Every process loads whole weights, under ZeRO-3 too: no
optimizer state comes with them, and decoding from partitioned ones would gather them at every step.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from rl_soft.config.arguments import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.config.recipe import load_decoder
from rl_soft.data import sources as data
from rl_soft.evaluation.generation import layout_for, tell_template
from rl_soft.evaluation.records import check_header
from rl_soft.evaluation.report import build, compare
from rl_soft.evaluation.samples import FREE_KEYS, check_golds, evaluate, header_of
from rl_soft.model import policy
from rl_soft.model.policy import context_length
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.runtime.processes import gathered, prepare_devices, start_processes

logger = logging.getLogger("rl_soft")


def run(model: str, overrides: dict[str, Any]) -> Path:
    """Evaluate a model, or go on where an evaluation was stopped; returns the directory.

    Args:
        model: a folder of ours, a transformers or PEFT folder, or a hub id.
        overrides: fields of `EvaluationArguments`, of `Thinking` to change the model's own, and of `Decoding`. With
            `thoughts` there is an evaluation a kind, on the same problems with the same noise, and their comparison.

    Raises:
        ValueError: arguments, data set and model that do not fit, or a directory that holds another evaluation.
    """
    arguments, changes, decoding = load_decoder(model, overrides)
    if arguments.control == "shuffle" and arguments.eval_samples > 1:
        raise ValueError(
            "control shuffle feeds a completion the thoughts of the one before it, which must be another problem's: "
            f"eval_samples must be 1, got {arguments.eval_samples}"
        )
    check_folder(arguments.output_dir)
    thinkings = thinkings_of(model, changes, arguments)
    rows = load_rows(arguments)
    check_golds(rows, arguments.dataset, arguments.confirm_run_unsafe_code)
    out = Path(arguments.output_dir)
    plans = [
        (thinking, folder, _describe(model, arguments, thinking, decoding, folder)) for folder, thinking in thinkings
    ]
    resuming = [
        check_header(folder, header_of(thinking, len(rows), decoding=decoding, **described), FREE_KEYS)
        for thinking, folder, described in plans
    ]
    if arguments.thoughts and (out / "eval.json").exists():
        raise ValueError(f"output_dir {out} holds an evaluation of one kind of thought; choose another for several")
    for taken in {out, *(folder for _, folder, _ in plans)}:
        known = any(resuming) if taken == out else (taken / "eval.json").exists()
        if not known and taken.exists() and any(taken.iterdir()):
            raise ValueError(f"output_dir {taken} is not empty and holds no evaluation; choose another")

    prepare_devices()
    state = start_processes()
    loaded = load_policy(model, arguments)
    layouts = [layout_for(loaded.model, loaded.tokenizer, thinking) for thinking, _, _ in plans]
    tell_template(layouts[0])
    for layout in layouts:
        check_lengths(rows, layout, context_length(loaded.model), arguments.dataset)
    loaded.model.to(state.device)
    try:
        with gathered(loaded.model):
            for layout, (_, folder, described) in zip(layouts, plans, strict=True):
                logger.info("%d problems x (%d samples + greedy) into %s", len(rows), arguments.eval_samples, folder)
                evaluate(
                    loaded.model,
                    layout,
                    rows,
                    folder,
                    batch_size=arguments.eval_batch_size,
                    run_code=arguments.confirm_run_unsafe_code,
                    control=arguments.control,
                    decoding=decoding,
                    **described,
                )
    except KeyboardInterrupt:
        logger.info("stopped; the same command goes on with what is missing")
        raise SystemExit(130) from None
    if state.is_main_process:
        figures = {}
        for _, folder, _ in plans:
            figures = build(folder, arguments.eval_k)
        if arguments.thoughts:
            figures = compare([folder for _, folder, _ in plans], out, names=arguments.thoughts, ks=arguments.eval_k)
        logger.info("%s; report: %s", figures["title"], out / "report.md")
    return out


def thinkings_of(model: str, changes: dict[str, Any], arguments: EvaluationArguments) -> list[tuple[Path, Thinking]]:
    """What is evaluated into which folder: one thinking, or one for each of `thoughts`.

    Raises:
        ValueError: `thought` beside `thoughts`, or a kind that the other settings do not allow.
    """
    out, thinking = Path(arguments.output_dir), thinking_of(model, changes)
    if not arguments.thoughts:
        return [(out, thinking)]
    if "thought" in changes:
        raise ValueError(f"thought {changes['thought']} and thoughts {','.join(arguments.thoughts)}: give one of them")
    return [(out / kind, dataclasses.replace(thinking, thought=kind)) for kind in arguments.thoughts]


def _describe(
    model: str, arguments: EvaluationArguments, thinking: Thinking, decoding: Decoding, folder: Path
) -> dict[str, Any]:
    """What `evaluate` writes down of one evaluation: the same, whether it is one of several or not."""
    alone = dataclasses.replace(arguments, output_dir=str(folder), thoughts=None)
    changed = {} if decoding == Decoding() else decoding.to_dict()
    return {
        "name": folder.name,
        "model_name": model,
        "dataset": arguments.dataset,
        "split": arguments.split,
        "samples": arguments.eval_samples,
        "seed": arguments.eval_seed,
        "config": {**dataclasses.asdict(alone), **thinking.to_dict(), **changed},
    }


def describe(model: str, overrides: dict[str, Any]) -> str:
    """What would be evaluated, as YAML, for --dry-run."""
    arguments, changes, decoding = load_decoder(model, overrides)
    _, thinking = thinkings_of(model, changes, arguments)[0]
    values = {**dataclasses.asdict(arguments), **thinking.to_dict(), **decoding.to_dict()}
    if arguments.thoughts:
        values.pop("thought")
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


def check_folder(name: str) -> None:
    """Raises ValueError for an output_dir that is a file, or is to lie in one."""
    path = Path(name)
    there = next((part for part in (path, *path.parents) if part.exists()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"output_dir {name}: {there} is a file; choose another")


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


def load_rows(arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> list[data.Row]:
    return data.load(
        arguments.dataset,
        arguments.split,
        arguments.eval_problems,
        arguments.data_seed_eval,
        arguments.dataset_options,
        arguments.dataset_columns,
    )


def load_policy(model: str, arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> policy.Policy:
    """An adapter in float32 is added into its weights, which is faster, and the same up to rounding."""
    try:
        loaded = policy.load(model, arguments.dtype, arguments.attn_implementation)
    except OSError as error:  # transformers' for a name that is neither a folder nor on the hub
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder here nor to be had from the hub: {first}") from None
    if isinstance(loaded.model, PeftModel) and loaded.model.dtype == torch.float32:
        loaded.model = loaded.model.merge_and_unload()
    return loaded
