"""What rewards may read: every column of a file, and of a puzzle what its own scorer needs.

pytest tests/train/test_columns.py
"""

import json
import string

import pytest
import yaml
from conftest import TINY

from rewards import puzzle_accuracy
from rl_soft.config.recipe import load_recipe
from rl_soft.data.sources import Row, load_rows
from rl_soft.evaluation.judging import judge_rows
from rl_soft.train import pipeline as train
from rl_soft.train.columns import as_dataset

RL = {
    "method": "grpo", "model_config": {**TINY, "model_type": "llama", "max_position_embeddings": 256},
    "vocabulary": string.printable, "thought": "gumbel", "thought_k": 3, "phase": "explicit", "end_of_thinking": "#",
    "num_thoughts": 3, "max_answer_tokens": 3, "answer_prompt": "", "prompts_per_step": 2, "num_generations": 2,
    "per_device_train_batch_size": 4, "max_steps": 1, "save_strategy": "no", "eval_problems": 0, "disable_tqdm": True,
}  # fmt: skip
SEEN = {}


def sees(completions, **columns):
    """A reward that keeps what it was given."""
    SEEN.update({name: values for name, values in columns.items() if isinstance(values, list)})
    return [float(len(text)) for text in completions]


def run(folder, **values):
    SEEN.clear()
    path = folder / "rl.yaml"
    path.write_text(yaml.safe_dump({**RL, "output_dir": str(folder / "rl"), **values}))
    train.run(load_recipe(path))
    return [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]


def test_a_puzzle_is_trained_by_its_own_scorer(tmp_path):
    lines = run(
        tmp_path, dataset="count_bits", dataset_options={"min_n": 1, "max_n": 1000}, train_size=8,
        rewards=["puzzle_accuracy", "test_columns.sees"],
    )  # fmt: skip
    assert all(json.loads(held)["source_dataset"] == "count_bits" for held in SEEN["metadata"])
    assert lines[0]["rewards/puzzle_accuracy/mean"] is not None
    rows = {row.id: row for row in load_rows("count_bits", "train", 8, 1, {"min_n": 1, "max_n": 1000})}
    assert [json.loads(rows[i].metadata) for i in SEEN["id"]] == [json.loads(held) for held in SEEN["metadata"]]


@pytest.mark.parametrize("task", ["countdown", "count_bits", "n_queens"])
def test_the_reward_of_a_puzzle_is_the_judgement_of_an_evaluation(task):
    rows = [row for row in load_rows(task, "train", 3) for _ in range(3)]
    texts = [text for row in rows[::3] for text in (f"so <answer>{row.answer}</answer>", "<answer>7</answer>", " ")]
    data = as_dataset(rows)
    rewards = puzzle_accuracy(
        data["prompt"], texts, data["metadata"], data["answer"], source=data["source"], answer_text=texts
    )
    assert rewards == [float(judged.outcome == "correct") for judged in judge_rows(texts, rows)]
    assert rewards[::3] == [1.0, 1.0, 1.0] and rewards[2] == 0.0


def test_rows_that_are_no_puzzles_have_no_such_reward():
    named = {"source_dataset": "count_bits"}
    given = [None, "", {"difficulty": 3}, {**named, "source_dataset": "arc_agi"}, json.dumps(named)]
    texts = ["1"] * len(given)
    assert puzzle_accuracy(texts, texts, given, texts) == [None, None, None, None, 1.0]
    assert puzzle_accuracy(texts, texts) == [None] * 5
    with pytest.raises(ValueError, match=r"metadata must be a mapping or the JSON of one, got '\[1\]'"):
        puzzle_accuracy(["?"], ["1"], ["[1]"])


def test_every_column_of_a_file_reaches_the_reward(tmp_path):
    """Of messages as of texts; also columns that some rows lack, and those with values of several types."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+1="}], "solution": f"{i + 1}.0", "level": i / 4,
         "tests": [{"in": i}] if i % 2 else {"out": "x"}, "completion": "not ours", "images": ["a.png"]}
        for i in range(4)
    ]  # fmt: skip
    rows[3]["note"] = "late"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        tmp_path, dataset=str(tmp_path / "rows.jsonl"), dataset_columns={"question": "prompt", "answer": "solution"},
        prompts_per_step=4, per_device_train_batch_size=8, rewards=["test_columns.sees"],
    )  # fmt: skip
    seen = {i: {name: SEEN[name][at] for name in SEEN} for at, i in enumerate(SEEN["id"])}
    assert sorted(seen) == [f"rows/{i}" for i in range(4)]
    for i, row in enumerate(rows):
        got = seen[f"rows/{i}"]
        assert got["prompts"] == f"{i}+1=" and got["answer"] == str(i + 1)
        for name in ("solution", "level", "tests"):
            assert got[name] == row[name], name
        assert got["note"] == row.get("note")
        assert "images" not in got and "completion" not in got


def test_a_column_that_cannot_be_stored_is_left_out_with_a_line(caplog):
    rows = [Row(str(i), "1+1=", (), "2", "number", "f", None, columns={"big": 10**30, "ok": i}) for i in range(2)]
    assert as_dataset(rows)["ok"][:] == [0, 1] and "big" not in as_dataset(rows).column_names
    assert "column big does not reach the rewards" in caplog.text
