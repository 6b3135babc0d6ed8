"""`rl-soft analyze`: what thoughts hold (probe), what they cost against written reasoning (cost), and how soft
thoughts work in anyone's model (branching, lens, traces, plane, or all of them with a report)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rl_soft.analyses import cost, probe, traces
from rl_soft.analyses import report as analysis_report
from rl_soft.analyses import run as analysis_run
from rl_soft.cli.opening import choose_roll, load_policy, with_dtype
from rl_soft.cli.opening import place as put
from rl_soft.cli.plans import check_folder, load_rows, thinking_of
from rl_soft.config.commands import AnalysisArguments
from rl_soft.config.recipe import load_command
from rl_soft.data.sources import Row
from rl_soft.evaluation.generation import layout_for
from rl_soft.evaluation.judging import check_golds
from rl_soft.evaluation.records import GREEDY, read_header
from rl_soft.evaluation.samples import sample_records
from rl_soft.model.adapters import merged
from rl_soft.model.devices import device
from rl_soft.model.folder import model_folder, read_thinking
from rl_soft.model.policy import Policy, context_length
from rl_soft.thoughts.fit import check_lengths
from rl_soft.thoughts.layout import Layout, tell_template
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.runtime.processes import prepare_devices

logger = logging.getLogger("rl_soft")


def run(kind: str, model: str, overrides: dict[str, Any]) -> str:
    """One analysis; returns its report in Markdown.

    Args:
        kind: a key of `RUNS`.
        model: a folder of ours; for analyses of traces also a transformers or PEFT folder, or a hub id.
        overrides: fields of `AnalysisArguments`, and of `Thinking` to change the model's own.

    Raises:
        ValueError: arguments, data set and model that do not fit.
    """
    arguments, changes, _ = load_command("analyze", model_folder(model), overrides)
    arguments = with_dtype(arguments)
    if kind == "cost" and not arguments.against:
        raise ValueError("against is missing: rl-soft analyze cost MODEL --against COT_MODEL --dataset NAME")
    if kind in TRACES and not arguments.output_dir:
        raise ValueError(f"output_dir is missing: rl-soft analyze {kind} MODEL --dataset NAME --output_dir DIR")
    if arguments.evals and kind != "all":
        raise ValueError(f"evals is for the report of rl-soft analyze all, not for {kind}")
    if arguments.engine != "ours" and not (kind in analysis_run.ANALYSES and analysis_run.ANALYSES[kind].rolls):
        raise ValueError(f"analyze {kind} reads the model's own states; it needs engine ours, got {arguments.engine}")
    if arguments.output_dir:
        check_folder(arguments.output_dir)
    for folder in evaluations(arguments):
        read_header(folder)
    rows = load_rows(arguments)
    if kind not in TRACES:
        check_golds(rows, arguments.dataset)
    elif len(rows) < 2:
        raise ValueError(f"eval_problems must be at least 2 for analyze {kind}: intervals are over prompts; got 1")
    prepare_devices()
    return RUNS[kind](arguments, changes, rows)


def place(loaded: Policy, thinking: Thinking, rows: list[Row], dataset: str) -> tuple[Any, Layout]:
    """A model on its device, in evaluation mode, and its layout, which the rows fit."""
    layout = layout_for(loaded.model, loaded.tokenizer, thinking)
    check_lengths(rows, layout, context_length(loaded.model), dataset)
    return put(loaded.model, device()).eval(), layout


def load(name: str, arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> tuple[Any, Layout]:
    return place(load_policy(name, arguments), thinking_of(name, changes), rows, arguments.dataset)


def run_probe(arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> str:
    model, layout = load(arguments.model_name_or_path, arguments, changes, rows)
    probe.check(layout, rows)  # before anything is decoded
    correct = []
    for start in range(0, len(rows), arguments.eval_batch_size):
        tasks = [(row, GREEDY) for row in rows[start : start + arguments.eval_batch_size]]
        correct += [record["outcome"] == "correct" for record in sample_records(model, layout, tasks, seed=0)]
    probed = probe.probe(model, layout, rows, correct, arguments.top_k, arguments.eval_batch_size)
    return probe.report(probed, layout, arguments.top_k, Path(arguments.output_dir) if arguments.output_dir else None)


def run_cost(arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> str:
    names = [arguments.model_name_or_path, str(arguments.against)]
    models = [load(names[0], arguments, changes, rows), load(names[1], arguments, {}, rows)]
    # In bfloat16 too, where `load_policy` leaves adapters beside the weights: here time counts, not the last digit.
    models = [(merged(m), layout) for m, layout in models]
    costs = cost.measure(models, rows)
    return cost.report(names, costs, Path(arguments.output_dir) if arguments.output_dir else None)


def run_traces(kind: str, arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> str:
    """An analysis of traces, or all; a stopped one goes on with the problems that are missing."""
    name = arguments.model_name_or_path
    if read_thinking(Path(name)) is None:
        changes = {**analysis_run.DEFAULTS, **changes}
    thinking = thinking_of(name, changes)
    loaded = load_policy(name, arguments)
    vocab_size = loaded.model.config.get_text_config().vocab_size
    thinking = analysis_run.check_thinking(thinking, vocab_size, changes)
    model, layout = place(loaded, thinking, rows, arguments.dataset)
    tell_template(layout)
    kinds = [replace(thinking, thought=kind) for kind in traces.TRACES.values()]
    layouts = [Layout(one, layout.tokenizer) for one in kinds]
    roll = choose_roll(name, arguments, layouts, (row.question for row in rows))
    names = list(analysis_run.ANALYSES) if kind == "all" else [kind]
    try:
        findings = [analysis_run.run(name, model, layout, rows, arguments, roll) for name in names]
    except KeyboardInterrupt:
        logger.info("stopped; the same command goes on with what is missing")
        raise SystemExit(130) from None
    text = analysis_run.markdown(findings)
    if kind == "all":
        path = analysis_report.write(findings, layout, rows, arguments, evaluations(arguments))
        text += f"report: {path}\n"
    return text


def evaluations(arguments: AnalysisArguments) -> list[str]:
    return [arguments.evals] if isinstance(arguments.evals, str) else list(arguments.evals or [])


TRACES = (*analysis_run.ANALYSES, "all")
RUNS: dict[str, Callable[[AnalysisArguments, dict[str, Any], list[Row]], str]] = {
    "probe": run_probe,
    "cost": run_cost,
    **{kind: partial(run_traces, kind) for kind in TRACES},
}
