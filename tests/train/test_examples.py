"""The example that a user of TRL starts from runs as it stands, from the README's names alone.

pytest tests/train/test_examples.py
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_policy
from datasets import Dataset
from trl import GRPOConfig

from rewards.accuracy import math_accuracy
from rl_soft import SoftGRPOTrainer, Thinking
from rl_soft.train.start import row_id

CHAT = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """A model folder of plain transformers, with a chat template."""
    made = tiny_policy()
    made.tokenizer.chat_template = CHAT
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_example_trains_and_generates(tmp_path, folder):
    command = [sys.executable, str(ROOT / "examples/train_in_python.py"), str(folder), "2"]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if "rollout/density_gap" in line and "'reward'" in line]
    assert len(lines) >= 2 and (tmp_path / "runs/train_in_python/model/model.safetensors").exists()
    assert sum(" -> " in line for line in run.stdout.splitlines()) >= 2


def trainer(folder, tmp_path, prompts, **more):
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"), num_generations=2, per_device_train_batch_size=4, max_steps=1,
        report_to="none", use_cpu=True, logging_steps=1, gradient_checkpointing=False, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    thinking = Thinking(phase="explicit", num_thoughts=3, thought_k=3, end_of_thinking="#", max_answer_tokens=2)
    data = Dataset.from_list([{"prompt": p, "answer": "3"} for p in prompts])
    given = {"model": str(folder), "reward_funcs": math_accuracy, "args": args, "train_dataset": data}
    return SoftGRPOTrainer(**{**given, "thinking": thinking, **more})


@pytest.mark.parametrize("chat", [False, True])
def test_questions_are_text_or_chat_messages(folder, tmp_path, chat):
    """A question in a message of its own is the same prompt, and rewards get messages where they were given some."""
    texts = ["1+2=", "2+1=", "3+0=", "0+3="]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(str(c))) for c in completions]

    made = trainer(folder, tmp_path, prompts, reward_funcs=reward)
    assert made.layout.prompt_ids(prompts[0]) == made.layout.prompt_ids(texts[0])
    made.train()
    assert all(isinstance(c, list) == chat for c in seen) and len(seen) == 4
    assert made.state.log_history[0]["rollout/density_gap"] < 1e-3


def test_a_row_without_an_id_is_addressed_by_its_prompt():
    message = [{"role": "user", "content": "1+2="}]
    assert row_id({"prompt": "1+2="}) == row_id({"prompt": "1+2="}) != row_id({"prompt": "2+2="})
    assert row_id({"prompt": message}) == row_id({"prompt": json.loads(json.dumps(message))})
    assert row_id({"prompt": "1+2=", "id": "a"}) == "a"


@pytest.mark.parametrize(
    "more,message",
    [
        ({"thinking": None}, "thinking is missing"),
        ({"train_dataset": Dataset.from_list([{"question": "1+2="}])}, "train_dataset has no column prompt"),
        ({"train_dataset": Dataset.from_list([{"prompt": "1+" * i} for i in (1, 9, 90)])}, "train_dataset, row 2: "),
        (
            {"thinking": Thinking(phase="explicit", end_of_thinking="done")},
            "end_of_thinking 'done' cannot be",
        ),
    ],
)
def test_what_is_missing_is_named(folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        trainer(folder, tmp_path, ["1+2=", "2+1="], **more)


def test_temperature_stands_in_one_place(folder, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), temperature=0.7, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"temperature is 0\.7 in args and 1\.0 in thinking"):
        trainer(folder, tmp_path, ["1+2="], args=args)
