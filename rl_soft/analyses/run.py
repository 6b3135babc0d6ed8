"""One analysis of traces from start to end, on disk: records, which are resumed; then figures, table and picture.

    NAME.jsonl   what it depends on, then a line per problem (`Journal`)
    NAME.json    the figures with their intervals; NAME.csv the same as a table; NAME.png the picture

Everything but the first is a function of the records, and is written again by every run.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from rl_soft.analyses import branching, lens, plane, traces
from rl_soft.analyses import figures as analysis_figures
from rl_soft.analyses.findings import Claim
from rl_soft.config.commands import AnalysisArguments
from rl_soft.data.sources import Row, question_hash
from rl_soft.files import JsonLines, write_atomic
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.engines import Roll
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")

DEFAULTS = {  # of `Thinking`, for models that were not trained to think by this package: the paper's T, K, tau, gamma
    "thought_temperature": 0.6,
    "thought_k": 10,
    "thought_tau": 0.5,
    "thought_gamma": 4.0,
    "num_thoughts": 256,
    "end_of_thinking": "</think>",
}


@dataclass(frozen=True)
class Analysis:
    """An analysis: its module, and which arguments its records and its figures depend on.

    Attributes:
        module: has `measure(model, layout, rows, ...)`, `summarise(records, ...)`, `table`, `says`, `claims`,
            `QUESTION` and `PAPER`.
        rolls: its records come of rollouts alone, so that any engine can make them; `measure` takes `roll`.
        measured, summarised: names of those functions' further arguments -> fields of `AnalysisArguments`.
    """

    module: ModuleType
    measured: dict[str, str]
    summarised: dict[str, str]
    rolls: bool = False


WEIGHT = {"branch_weight": "branch_weight"}
ANALYSES = {  # in the order of the report
    "traces": Analysis(traces, {"seed": "eval_seed", "samples": "eval_samples"}, {}, rolls=True),
    "branching": Analysis(branching, {}, WEIGHT),
    "lens": Analysis(lens, {"branches": "branches"}, {}),
    "plane": Analysis(plane, {"seed": "eval_seed", "draws": "draws", **WEIGHT}, WEIGHT),
}


@dataclass(frozen=True)
class Finding:
    """What came out of one analysis."""

    name: str
    summary: dict[str, Any]
    records: list[dict[str, Any]]  # in the order of the problems
    says: list[str]
    claims: list[Claim]
    picture: bytes


class Journal(JsonLines):
    """The records of an analysis: a first line that says what they depend on, then one line per problem.

    A run that is stopped goes on with the problems that have no line yet; records that depend on something else are
    refused. See `JsonLines`.

    Args:
        identity: what the records depend on: names to JSON values.
        questions: problem id -> question hash, of the problems that are asked for.

    Attributes:
        records: problem id -> record, of the problems asked for; other problems in the file are left alone.

    Raises:
        ValueError: what `JsonLines` refuses; a file that depends on something else (named), holds a line that is no
            record, or asks another question under one of the ids.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], questions: Mapping[str, str]) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        ours = json.loads(json.dumps(identity))  # as it is read back
        what = "a record of an analysis; choose another output_dir"
        empty = True

        def check(found: list[dict[str, Any]]) -> None:
            nonlocal empty
            empty = not found
            first = found[0] if found else ours
            for key in sorted(ours.keys() | first.keys()):
                if first.get(key) != ours.get(key):
                    raise ValueError(
                        f"{path} holds records with {key} = {first.get(key)!r}, these have {ours.get(key)!r}; choose "
                        "another output_dir to keep both"
                    )
            for number, record in enumerate(found[1:], start=2):
                name, asked = record.get("problem_id"), record.get("question_hash")
                if name is None or asked is None:
                    raise ValueError(f"{path}, line {number}: not {what}")
                if questions.get(name, asked) != asked:
                    raise ValueError(f"{path} holds problem {name} with another question; choose another output_dir")
                if name in questions:
                    self.records[name] = record

        super().__init__(path, what, check, json.dumps(ours).encode(), b'{"problem_id": ')
        if empty:
            super().append(ours)

    def append(self, *records: dict[str, Any]) -> None:
        """Append records and return when they are on the disk."""
        super().append(*records)
        self.records.update((record["problem_id"], record) for record in records)


def check_thinking(thinking: Thinking, vocab_size: int, changes: dict[str, Any]) -> Thinking:
    """The thinking that traces are made with; the answer after it is not looked at.

    Raises:
        ValueError: `thought` or `max_answer_tokens` among the changes, fewer than two slots, or no thoughts.
    """
    for key, why in (
        ("thought", "each analysis sets the kinds it follows"),
        ("max_answer_tokens", "no answer is read"),
    ):
        if key in changes:
            raise ValueError(f"{key} is not an argument of this analysis: {why}; leave it out")
    thinking = replace(thinking, thought="soft", max_answer_tokens=1)
    if thinking.support_size(vocab_size) < 2:
        raise ValueError(f"thought_k must be 0 or at least 2 for this analysis, got {thinking.thought_k}")
    if thinking.num_thoughts < 1:
        raise ValueError(f"num_thoughts must be at least 1 for this analysis, got {thinking.num_thoughts}")
    return thinking


def run(
    name: str, model: Any, layout: Layout, rows: Sequence[Row], arguments: AnalysisArguments, roll: Roll = rollout
) -> Finding:
    """Measure what is not measured yet, `eval_batch_size` problems at a time, and write the files.

    Args:
        name: a key of `ANALYSES`.
        model: on its device, in evaluation mode.
        roll: makes the rollouts, of an analysis that `rolls`.

    Raises:
        ValueError: output_dir holds records of something else.
    """
    analysis, out = ANALYSES[name], Path(str(arguments.output_dir))
    values = asdict(arguments)
    of_records = {key: values[field] for key, field in analysis.measured.items()}
    names = ("dataset", "dataset_options", "dataset_columns", "split", "data_seed_eval", "dtype")
    identity = {"analysis": name, "model": arguments.model_name_or_path, **{key: values[key] for key in names}}
    if arguments.engine != "ours":  # the only one once
        identity["engine"] = arguments.engine
    identity |= {**layout.thinking.to_dict(), **of_records}
    by = {"roll": roll} if analysis.rolls else {}
    with Journal(out / f"{name}.jsonl", identity, {r.id: question_hash(r.question) for r in rows}) as journal:
        missing = [row for row in rows if row.id not in journal.records]
        bar = tqdm(
            total=len(rows),
            initial=len(rows) - len(missing),
            desc=name,
            unit="problem",
            disable=not missing,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )
        with bar:
            for start in range(0, len(missing), arguments.eval_batch_size):
                part = missing[start : start + arguments.eval_batch_size]
                found = analysis.module.measure(model, layout, part, **of_records, **by)
                ids = [{"problem_id": r.id, "question_hash": question_hash(r.question)} for r in part]
                journal.append(*({**i, **record} for i, record in zip(ids, found, strict=True)))
                bar.update(len(part))
        records = [journal.records[row.id] for row in rows]
    summary = analysis.module.summarise(records, **{k: values[field] for k, field in analysis.summarised.items()})
    picture = analysis_figures.draw(name, summary)
    said, claims = analysis.module.says(summary), analysis.module.claims(summary)
    figures = {"model": arguments.model_name_or_path, "dataset": arguments.dataset, **identity, "figures": summary}
    figures |= {"says": said, "claims": [asdict(claim) for claim in claims]}
    write_atomic(out / f"{name}.json", json.dumps(figures, indent=1) + "\n")
    write_atomic(out / f"{name}.csv", _csv(analysis.module.table(summary)))
    write_atomic(out / f"{name}.png", picture)
    return Finding(name, summary, records, said, claims, picture)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    return file.getvalue()


def markdown(findings: Sequence[Finding]) -> str:
    """Question, sentences and claims of some analyses, for a terminal."""
    lines = []
    for finding in findings:
        lines += [f"## {finding.name}: {ANALYSES[finding.name].module.QUESTION}", "", *finding.says, ""]
        lines += [f"- {claim.holds}: {claim.text}: {claim.here}" for claim in finding.claims] + [""]
    return "\n".join(lines)
