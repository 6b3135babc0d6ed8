"""n sampled completions and a greedy one a problem -> records.jsonl; stops and resumes without repeating a sample.

Problems are shared out over the processes in fixed order; rank 0 gathers and appends each chunk, so that several
processes write the same records as one. The noise of a sample is addressed by (seed, problem, sample index).
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rewards.answers import judge
from rl_soft.data import Row, question_hash
from rl_soft.layout import Layout
from rl_soft.noise import address
from rl_soft.records import GREEDY, Writer, read, write_header
from rl_soft.rollout import Rollout, rollout


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the generation config."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return list(dict.fromkeys([tokenizer.eos_token_id, *ids]))


def completion_text(layout: Layout, out: Rollout, i: int) -> str:
    """The text of one completion: in the latent phase the answer, in the explicit phase the strongest ids too."""
    ids = out.completion_ids[i][out.mask[i]].tolist()
    return str(layout.tokenizer.decode(ids, skip_special_tokens=True))


def sample_records(
    model: PreTrainedModel, layout: Layout, tasks: Sequence[tuple[Row, int]], seed: int
) -> list[dict[str, Any]]:
    """One record for each (row, sample); sample GREEDY decodes without noise. Greedy and sampled ones do not mix."""
    seeds = [address(seed, row.id, sample) for row, sample in tasks]
    greedy = tasks[0][1] == GREEDY
    prompts = [layout.prompt_ids(row.question) for row, _ in tasks]
    out = rollout(
        model, layout, prompts, None if greedy else torch.tensor(seeds), eos_token_ids(model, layout.tokenizer)
    )
    thoughts = out.thought_mask.sum(-1).tolist()
    answers = (out.action_mask & ~out.thought_mask).sum(-1).tolist()
    finished = out.finished.tolist()
    records = []
    for i, (row, sample) in enumerate(tasks):
        text = completion_text(layout, out, i)
        outcome, prediction = judge(text, row.answer, row.answer_type)
        records.append(
            {
                "problem_id": row.id,
                "sample": sample,
                "question_hash": question_hash(row.question),
                "question": row.question,
                "gold": row.answer,
                "family": row.family,
                "outcome": str(outcome),
                "prediction": prediction,
                "text": text,
                "thoughts": thoughts[i],
                "answer_tokens": answers[i],
                "truncated": not finished[i],
                "seed": 0 if greedy else seeds[i],
            }
        )
    return records


def accuracy(
    model: PreTrainedModel, layout: Layout, rows: Sequence[Row], seed: int, batch_size: int, greedy: bool = False
) -> float:
    """Share of correct answers, one completion a row, over all processes."""
    state = PartialState()
    tasks = [(row, GREEDY if greedy else 0) for row in rows][state.process_index :: state.num_processes]
    correct = 0
    was_training = model.training
    model.eval()
    for start in range(0, len(tasks), batch_size):
        records = sample_records(model, layout, tasks[start : start + batch_size], seed)
        correct += sum(r["outcome"] == "correct" for r in records)
    model.train(was_training)
    return sum(gather_object([correct])) / len(rows)


def evaluate(
    model: PreTrainedModel,
    layout: Layout,
    rows: Sequence[Row],
    out_dir: Path,
    *,
    name: str,
    model_name: str,
    dataset: str,
    samples: int,
    seed: int,
    batch_size: int,
    config: dict[str, Any] | None = None,
) -> None:
    """Write eval.json and records.jsonl; samples already there are not drawn again.

    Args:
        samples: n, sampled completions a problem; a greedy one is added.
        batch_size: completions decoded together on a process.
    """
    state = PartialState()
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "records.jsonl"
    done: list[Any] = [None]
    if state.is_main_process:
        header = {
            "name": name,
            "model": model_name,
            "dataset": dataset,
            "split": "evaluation",
            "decoder": layout.thinking.to_dict(),
            "n": samples,
            "seed": seed,
            "num_problems": len(rows),
            "versions": versions(),
            "git_commit": git_commit(),
            "config": config or {},
        }
        write_header(out_dir, header)
        done = [{(r["problem_id"], r["sample"]) for r in read(path)} if path.exists() else set()]
    broadcast_object_list(done)
    was_training = model.training
    model.eval()
    writer = Writer(path) if state.is_main_process else None
    for kind, numbers in (("greedy", [GREEDY]), ("sampled", list(range(samples)))):
        tasks = [(row, s) for row in rows for s in numbers if (row.id, s) not in done[0]]
        chunk = batch_size * state.num_processes
        bar = tqdm(
            total=len(tasks), desc=f"{name}: {kind}", unit="answer", disable=not state.is_main_process or not tasks
        )
        for start in range(0, len(tasks), chunk):
            part = tasks[start : start + chunk]
            share = -(-len(part) // state.num_processes)
            mine = part[state.process_index * share : (state.process_index + 1) * share]
            records = gather_object(sample_records(model, layout, mine, seed) if mine else [])
            if writer is not None:
                writer.append(*records)
            bar.update(len(part))
        bar.close()
    if writer is not None:
        writer.close()
    model.train(was_training)
    state.wait_for_everyone()


def versions() -> dict[str, str]:
    names = ("rl-soft", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")
    found = {}
    for package in names:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working folder, None outside a repository."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None
