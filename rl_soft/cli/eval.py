"""`rl-soft eval`: one evaluation from start to end: problems, model, records, report.

What can be refused is refused before the weights are read. Every process loads whole weights, under ZeRO-3 too: no
optimizer state comes with them, and decoding from partitioned ones would gather them at every step.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rl_soft.cli.opening import choose_roll, load_policy, place, with_dtype
from rl_soft.cli.plans import Plan, check_control, check_folder, load_rows, plans_of
from rl_soft.config.recipe import key_defaults, load_command
from rl_soft.evaluation.generation import layout_for
from rl_soft.evaluation.judging import check_golds
from rl_soft.evaluation.records import check_header
from rl_soft.evaluation.report import build, compare
from rl_soft.evaluation.samples import FREE_KEYS, evaluate, header_of
from rl_soft.model.folder import model_folder
from rl_soft.model.policy import context_length
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.fit import check_lengths
from rl_soft.thoughts.layout import tell_template
from rl_soft.train.runtime.processes import gathered, prepare_devices, start_processes

logger = logging.getLogger("rl_soft")


def run(model: str, overrides: dict[str, Any]) -> Path:
    """Evaluate a model, or go on where an evaluation was stopped; returns the directory.

    Args:
        model: a folder of ours, a run, a transformers or PEFT folder, or a hub id.
        overrides: fields of `EvaluationArguments`, of `Thinking` to change the model's own, and of `Decoding`. With
            `thoughts` there is one evaluation per kind, on the same problems and noise, and their comparison.

    Raises:
        ValueError: arguments, data set and model that do not fit, or a directory that holds another evaluation.
    """
    model = model_folder(model)
    arguments, changes, decoding = load_command("eval", model, overrides)
    arguments = with_dtype(arguments)
    check_control(arguments)
    check_folder(arguments.output_dir)
    plans = plans_of(arguments, changes, decoding)
    rows = load_rows(arguments)
    check_golds(rows, arguments.dataset, arguments.confirm_run_unsafe_code)
    out = Path(arguments.output_dir)
    check_folders(out, plans, len(rows), decoding)

    prepare_devices()
    state = start_processes()
    loaded = load_policy(model, arguments)
    layouts = [layout_for(loaded.model, loaded.tokenizer, plan.thinking) for plan in plans]
    tell_template(layouts[0])
    for layout in layouts:
        check_lengths(rows, layout, context_length(loaded.model), arguments.dataset)
    roll = choose_roll(model, arguments, layouts, (row.question for row in rows))
    place(loaded.model, state.device)
    try:
        with gathered(loaded.model):
            for layout, plan in zip(layouts, plans, strict=True):
                samples = arguments.eval_samples
                logger.info("%d problems x (%d samples + greedy) into %s", len(rows), samples, plan.folder)
                evaluate(
                    loaded.model,
                    layout,
                    rows,
                    plan.folder,
                    batch_size=arguments.eval_batch_size,
                    run_code=arguments.confirm_run_unsafe_code,
                    control=arguments.control,
                    decoding=decoding,
                    roll=roll,
                    **plan.described,
                )
    except KeyboardInterrupt:
        logger.info("stopped; the same command goes on with what is missing")
        raise SystemExit(130) from None
    if state.is_main_process:
        figures = {}
        for plan in plans:
            figures = build(plan.folder, arguments.eval_k)
        if arguments.thoughts:
            figures = compare([plan.folder for plan in plans], out, names=arguments.thoughts, ks=arguments.eval_k)
        logger.info("%s; report: %s", figures["title"], out / "report.md")
    return out


def check_folders(out: Path, plans: list[Plan], problems: int, decoding: Decoding) -> None:
    """Raises ValueError for folders that hold something else than these evaluations, or a part of them."""
    headers = [header_of(plan.thinking, problems, decoding=decoding, **plan.described) for plan in plans]
    defaults = key_defaults()
    resuming = [check_header(p.folder, h, FREE_KEYS, defaults) for p, h in zip(plans, headers, strict=True)]
    if [plan.folder for plan in plans] != [out] and (out / "eval.json").exists():
        raise ValueError(f"output_dir {out} holds an evaluation of one kind of thought; choose another for several")
    for taken in {out, *(plan.folder for plan in plans)}:
        known = any(resuming) if taken == out else (taken / "eval.json").exists()
        if not known and taken.exists() and any(taken.iterdir()):
            raise ValueError(f"output_dir {taken} is not empty and holds no evaluation; choose another")
