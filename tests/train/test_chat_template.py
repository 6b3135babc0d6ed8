"""What a chat template is told in a recipe: the same in training, and in evaluations and generation of its model.

pytest tests/train/test_chat_template.py
"""

import json

import pytest
from conftest import tiny_policy
from test_recipe import tiny_pretrained
from trl import GRPOConfig

from rl_soft import SoftGRPOTrainer, Thinking
from rl_soft.cli import main
from rl_soft.config.recipe import load_recipe
from rl_soft.model.folder import read_thinking
from rl_soft.thoughts.layout import Layout
from rl_soft.train import pipeline as train

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)
OFF = {"enable_thinking": False}


@pytest.fixture
def prompts(monkeypatch):
    """The texts of the prompts that are made, as they are made."""
    seen, made = [], Layout.prompt_ids

    def watched(self, question):
        ids = made(self, question)
        seen.append(self.tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(Layout, "prompt_ids", watched)
    return seen


def test_training_evaluation_and_generation_ask_alike(tmp_path, prompts, capsys):
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tiny_pretrained(tmp_path / "base", "qwen2", TEMPLATE, special, ["<think>", "</think>"])
    rows = [json.dumps({"question": f"{a} + {b}?", "answer": a + b}) for a in range(4) for b in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    values = {
        "method": "grpo", "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"),
        "dataset": str(tmp_path / "rows.jsonl"), "eval_problems": 0, "phase": "explicit", "end_of_thinking": "####",
        "num_thoughts": 4, "max_answer_tokens": 2, "prompts_per_step": 2, "num_generations": 2,
        "per_device_train_batch_size": 4, "max_steps": 1, "chat_template_kwargs": OFF, "disable_tqdm": True,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    train.run(load_recipe(tmp_path / "r.yaml"))
    assert read_thinking(tmp_path / "run/model").chat_template_kwargs == OFF
    model = str(tmp_path / "run")
    main(["eval", model, "--dataset", values["dataset"], "--eval_problems", "2", "--eval_samples", "1",
          "--output_dir", str(tmp_path / "eval")])  # fmt: skip
    main(["generate", model, "--prompt", "1 + 1?", "--show", "0"])
    assert prompts and all(text.endswith("<think></think>") for text in prompts)
    prompts.clear()
    main(["generate", model, "--prompt", "1 + 1?", "--show", "0", "--chat_template_kwargs", "{enable_thinking: true}"])
    assert prompts and not any("<think>" in text for text in prompts)


def trainer(tmp_path, told, thinking):
    made = tiny_policy()
    made.tokenizer.chat_template = TEMPLATE.replace("<|im_start|>", "").replace("<|im_end|>", "")
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=2,
        per_device_train_batch_size=2, chat_template_kwargs=told,
    )  # fmt: skip
    rows = [{"prompt": "1+1="}, {"prompt": "1+2="}]
    return SoftGRPOTrainer(
        made.model, lambda completions, **_: [0.0] * len(completions), args, _dataset(rows),
        processing_class=made.tokenizer, thinking=thinking,
    )  # fmt: skip


def _dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_in_python_trl_s_argument_is_taken(tmp_path):
    thinking = Thinking(phase="explicit", end_of_thinking="#", num_thoughts=2, max_answer_tokens=2)
    assert trainer(tmp_path, OFF, thinking).layout.thinking.chat_template_kwargs == OFF
    told = Thinking(**{**thinking.to_dict(), "chat_template_kwargs": {"enable_thinking": True}})
    with pytest.raises(ValueError, match=r"chat_template_kwargs is .*False.* in args and .*True.* in thinking"):
        trainer(tmp_path, OFF, told)
