"""n sampled completions and a greedy one per problem -> records.jsonl; stops and resumes without repeating a sample.

Problems are shared out over the processes in fixed order; rank 0 gathers and appends each chunk, so that several
processes write the same records as one, in the same order. The noise of a sample is addressed by (seed, problem,
sample index).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from rl_soft.config.recipe import key_defaults
from rl_soft.data.sources import Row, question_hash
from rl_soft.evaluation.judging import judge_rows
from rl_soft.evaluation.provenance import git_commit, versions
from rl_soft.evaluation.records import GREEDY, MAX_THOUGHTS, MAX_TOKENS, Writer, check_header, write_header
from rl_soft.model.policy import evaluation_mode
from rl_soft.rollouts.engine import Rollout, rollout
from rl_soft.rollouts.engines import Roll
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

FREE_KEYS = ("output_dir", "like", "eval_batch_size", "eval_k", "confirm_run_unsafe_code")  # they change no record


def completion_text(layout: Layout, out: Rollout, i: int) -> str:
    """The text of one completion: in the latent phase the answer, in the explicit phase the strongest ids too."""
    ids = out.completion_ids[i][out.mask[i]].tolist()
    return str(layout.tokenizer.decode(ids, skip_special_tokens=True))


def thought_tokens(layout: Layout, out: Rollout) -> list[list[list[list[Any]]]] | None:
    """For each completion and each of its first thoughts the strongest tokens, as [text, weight].

    None where the thoughts are tokens that the text of the completion shows already.
    """
    if not layout.thinking.kind.mixes and layout.thinking.phase == "explicit":
        return None
    K = min(MAX_TOKENS, out.support.shape[-1])
    weights = out.log_weights.exp().topk(K, dim=-1)  # (B, T, K)
    ids = out.support.gather(-1, weights.indices)
    first = out.thought_mask & (out.thought_mask.cumsum(-1) <= MAX_THOUGHTS)  # (B, T)
    distinct = ids[first].unique().tolist()
    text_of = {i: str(layout.tokenizer.decode([i])) for i in distinct}
    return [
        [
            [[text_of[token], round(weight, 3)] for token, weight in zip(*thought, strict=True) if weight >= 5e-4]
            for thought in zip(row_ids[mask].tolist(), row_weights[mask].tolist(), strict=True)
        ]
        for row_ids, row_weights, mask in zip(ids, weights.values, first, strict=True)
    ]


def sample_records(
    model: PreTrainedModel,
    layout: Layout,
    tasks: Sequence[tuple[Row, int]],
    seed: int,
    run_code: bool = False,
    control: str = "none",
    decoding: Decoding | None = None,
    roll: Roll = rollout,
) -> list[dict[str, Any]]:
    """Completions, judged: see `complete` and `judge`."""
    out = complete(model, layout, tasks, seed, control, decoding, roll)
    return judge(out, layout, tasks, run_code)


def complete(
    model: PreTrainedModel,
    layout: Layout,
    tasks: Sequence[tuple[Row, int]],
    seed: int,
    control: str = "none",
    decoding: Decoding | None = None,
    roll: Roll = rollout,
) -> Rollout:
    """A completion for each (row, sample); sample GREEDY decodes without noise. Greedy and sampled ones do not mix.

    `control` disturbs the thoughts (`think.disturb`); `decoding` cuts the distributions (`decoding.Decoding`);
    `roll` makes the rollout.
    """
    greedy = tasks[0][1] == GREEDY
    seeds = None if greedy else torch.tensor([address(seed, row.id, sample) for row, sample in tasks])
    prompts = [layout.prompt_ids(row.question) for row, _ in tasks]
    return roll(model, layout, prompts, seeds, control=control, decoding=decoding)


def judge(
    out: Rollout, layout: Layout, tasks: Sequence[tuple[Row, int]], run_code: bool = False
) -> list[dict[str, Any]]:
    """A record for each completion."""
    seeds = out.seeds.tolist()  # 0 where there is no noise
    thoughts = out.thought_mask.sum(-1).tolist()
    answers = (out.action_mask & ~out.thought_mask).sum(-1).tolist()
    finished = out.finished.tolist()
    tokens = thought_tokens(layout, out)
    texts = [completion_text(layout, out, i) for i in range(len(tasks))]
    judged = [layout.answer_text(out.completion_ids[i][out.mask[i]].tolist()) for i in range(len(tasks))]
    judgements = judge_rows(judged, [row for row, _ in tasks], run_code)
    records = []
    for i, (row, sample) in enumerate(tasks):
        records.append(
            {
                "problem_id": row.id,
                "sample": sample,
                "question_hash": question_hash(row.question),
                "question": row.question,
                "gold": row.answer,
                "family": row.family,
                "outcome": str(judgements[i].outcome),
                "prediction": judgements[i].prediction,
                "text": texts[i],
                "thoughts": thoughts[i],
                "answer_tokens": answers[i],
                "truncated": not finished[i],
                "seed": seeds[i],
                **({} if tokens is None else {"thought_tokens": tokens[i]}),
            }
        )
    return records


def accuracy(model: PreTrainedModel, layout: Layout, rows: Sequence[Row], seed: int, batch_size: int) -> float:
    """Share of correct answers, one sampled completion per row, over all processes."""
    state = PartialState()
    tasks = [(row, 0) for row in rows][state.process_index :: state.num_processes]
    correct = 0
    with evaluation_mode(model):
        for start in range(0, len(tasks), batch_size):
            records = sample_records(model, layout, tasks[start : start + batch_size], seed)
            correct += sum(r["outcome"] == "correct" for r in records)
    return sum(gather_object([correct])) / len(rows)


def evaluate(
    model: PreTrainedModel,
    layout: Layout,
    rows: Sequence[Row],
    out_dir: str | Path,
    *,
    samples: int = 32,
    seed: int = 7,
    batch_size: int = 64,
    name: str | None = None,
    model_name: str | None = None,
    dataset: str | None = None,
    split: str = "evaluation",
    config: dict[str, Any] | None = None,
    run_code: bool = False,
    control: str = "none",
    decoding: Decoding | None = None,
    roll: Roll = rollout,
) -> None:
    """Write eval.json and records.jsonl; samples already there are not drawn again. `report.build` reports on them.

    Args:
        model: the causal LM on its device, possibly in a PEFT wrapper; decoded in evaluation mode, left as it was.
        layout: the tokenizer, and what a thought is.
        rows: P problems of different ids, such as `load_rows` gives.
        out_dir: of the files; made if it is missing.
        samples: n >= 1, sampled completions per problem; a greedy one is added.
        seed: of the noise, with the problem's id and the number of the sample (`noise.address`).
        batch_size: completions decoded together on a process; changes no record.
        name: of the evaluation in reports; by default that of out_dir.
        model_name: written down; by default what the model was loaded from.
        dataset: written down; by default the source of the rows.
        split: written down.
        config: flat; with what else the evaluation is identified by. The same in every process.
        run_code: run the programs that answer rows of type `code`.
        control: what is done to the thoughts that are fed, see `think.disturb`.
        decoding: how distributions are cut before positions are drawn; part of the header.
        roll: makes the rollouts (`rollouts.engines`).

    Raises:
        ValueError: no rows, or fewer than one sample; the directory holds another evaluation, or records of other
            problems; control `shuffle` and batches of which one has a single completion.
    """
    if not rows or samples < 1 or batch_size < 1:
        raise ValueError(
            f"rows, samples and batch_size must be at least 1, got {len(rows)} rows, samples {samples}, batch_size "
            f"{batch_size}"
        )
    state, out_dir = PartialState(), Path(out_dir)
    name, dataset = name or out_dir.resolve().name, dataset or rows[0].source
    model_name = model_name or getattr(model.config, "name_or_path", "") or type(model).__name__
    together = [_shares(n, batch_size, state.num_processes) for n in (len(rows), len(rows) * samples)]
    if control == "shuffle" and any(1 in shares for shares in together):
        raise ValueError(
            "control shuffle feeds a completion the thoughts of another problem decoded with it, and a batch here "
            f"would have one alone: {len(rows)} problems in batches of {batch_size} on {state.num_processes} "
            "processes; choose another eval_batch_size"
        )
    header = header_of(layout.thinking, len(rows), name, model_name, dataset, split, samples, seed, config, decoding)
    check_header(out_dir, header, FREE_KEYS, key_defaults(header["config"].get("method")))
    path = out_dir / "records.jsonl"
    writer: Writer | None = None
    if state.is_main_process:
        out_dir.mkdir(parents=True, exist_ok=True)
        writer = Writer(path, {row.id: question_hash(row.question) for row in rows})
        write_header(out_dir, header)
    done: list[Any] = [writer.done.copy() if writer is not None else None]
    broadcast_object_list(done)
    tasks = {  # greedy and sampled completions are not decoded in one batch
        "greedy": [(row, GREEDY) for row in rows],
        "sampled": [(row, sample) for row in rows for sample in range(samples)],
    }
    total = sum(map(len, tasks.values()))
    bar = tqdm(
        total=total,
        initial=len(done[0]),
        desc=name,
        unit="answer",
        disable=not state.is_main_process or len(done[0]) == total,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file gets a line now and then
    )
    chunk = batch_size * state.num_processes
    with evaluation_mode(model), bar, writer or nullcontext():
        for kind, all_of_kind in tasks.items():
            missing = [(row, sample) for row, sample in all_of_kind if (row.id, sample) not in done[0]]
            bar.set_postfix_str(kind, refresh=False)
            for start in range(0, len(missing), chunk):
                part = missing[start : start + chunk]
                share = -(-len(part) // state.num_processes)
                mine = part[state.process_index * share : (state.process_index + 1) * share]
                made = sample_records(model, layout, mine, seed, run_code, control, decoding, roll) if mine else []
                records = gather_object(made)
                if writer is not None:
                    writer.append(*records)
                bar.update(len(part))
    state.wait_for_everyone()


def _shares(n: int, batch_size: int, processes: int) -> set[int]:
    """How many of n tasks are decoded together on some process, as `evaluate` cuts them."""
    shares, chunk = set(), batch_size * processes
    for start in range(0, n, chunk):
        part = min(chunk, n - start)
        share = -(-part // processes)
        shares |= {max(0, min(share, part - i * share)) for i in range(processes)}
    return shares


def header_of(
    thinking: Thinking,
    num_problems: int,
    name: str,
    model_name: str,
    dataset: str,
    split: str,
    samples: int,
    seed: int,
    config: dict[str, Any] | None,
    decoding: Decoding | None = None,
) -> dict[str, Any]:
    """What eval.json holds; a decoding that does nothing is left out, as it was when there was none."""
    changed = {} if decoding in (None, Decoding()) else decoding.to_dict()
    return {
        "name": name,
        "model": model_name,
        "dataset": dataset,
        "split": split,
        "decoder": {**thinking.to_dict(), **changed},
        "n": samples,
        "seed": seed,
        "num_problems": num_problems,
        "versions": versions(),
        "git_commit": git_commit(),
        "config": config or {},
    }
