"""`rl-soft analyze`: what thoughts hold (probe), and what they cost against written reasoning (cost)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rl_soft import cost, probe
from rl_soft.config import AnalysisArguments, load_evaluation
from rl_soft.data import Row
from rl_soft.eval_command import check_lengths, load_policy, load_rows, thinking_of
from rl_soft.evaluate import check_golds, sample_records
from rl_soft.layout import Layout
from rl_soft.records import GREEDY
from rl_soft.supervised import context_length
from rl_soft.train import prepare_devices

logger = logging.getLogger("rl_soft")


def run(kind: str, model: str, overrides: dict[str, Any]) -> str:
    """One analysis; returns its report in Markdown.

    Args:
        kind: probe or cost.
        model: a folder of ours.
        overrides: fields of `AnalysisArguments`, and of `Thinking` to change the model's own.

    Raises:
        ValueError: an unknown kind, and arguments, data set and model that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"analyze must be one of {', '.join(KINDS)}, got {kind!r}")
    arguments, changes = load_evaluation(model, overrides, AnalysisArguments, f"analyze {kind}")
    if kind == "cost" and not arguments.against:
        raise ValueError("against is missing: rl-soft analyze cost MODEL --against COT_MODEL --dataset NAME")
    rows = load_rows(arguments)
    check_golds(rows, arguments.dataset)
    prepare_devices()
    return KINDS[kind](arguments, changes, rows)


def load(name: str, arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> tuple[Any, Layout]:
    """A model on its device, in evaluation mode, and its layout."""
    loaded = load_policy(name, arguments)
    layout = Layout(thinking_of(name, changes), loaded.tokenizer)
    check_lengths(rows, layout, context_length(loaded.model), arguments.dataset)
    return loaded.model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), layout


def run_probe(arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> str:
    model, layout = load(arguments.model_name_or_path, arguments, changes, rows)
    correct = []
    for start in range(0, len(rows), arguments.eval_batch_size):
        tasks = [(row, GREEDY) for row in rows[start : start + arguments.eval_batch_size]]
        correct += [record["outcome"] == "correct" for record in sample_records(model, layout, tasks, seed=0)]
    probed = probe.probe(model, layout, rows, correct, arguments.top_k, arguments.eval_batch_size)
    return probe.report(probed, layout, arguments.top_k, Path(arguments.output_dir) if arguments.output_dir else None)


def run_cost(arguments: AnalysisArguments, changes: dict[str, Any], rows: list[Row]) -> str:
    names = [arguments.model_name_or_path, str(arguments.against)]
    models = [load(names[0], arguments, changes, rows), load(names[1], arguments, {}, rows)]
    costs = cost.measure(models, rows)
    return cost.report(names, costs, Path(arguments.output_dir) if arguments.output_dir else None)


KINDS: dict[str, Callable[[AnalysisArguments, dict[str, Any], list[Row]], str]] = {
    "probe": run_probe,
    "cost": run_cost,
}
