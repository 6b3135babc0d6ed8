"""Tests run on a CPU, offline, without telemetry, on tiny random models; `-m gpu` runs those that need a GPU.

Any other run hides the GPUs of the machine, so that it is the same everywhere.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
from pathlib import Path

import pytest
import torch

from rl_soft.data.sources import Row
from rl_soft.model import policy
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

ROOT = Path(__file__).parents[1]
VOCABULARY = "0123456789+-=;#"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tiny_policy(model_type: str = "llama", tied: bool = True, seed: int = 0) -> policy.Policy:
    """A random model sharp enough that its densities differ visibly between positions."""
    if model_type == "gpt2":
        config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "model_type": "gpt2"}
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        config = {**TINY, "model_type": model_type, "tie_word_embeddings": tied}
    made = policy.make(config, VOCABULARY, seed)
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(4)
    return made


def wants_gpu(expression: str) -> bool:
    """Whether the expression after -m asks for tests that need a GPU."""
    return re.search(r"(?<!not )\bgpu\b", expression or "") is not None


def pytest_configure(config) -> None:
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def thinking() -> Thinking:
    return Thinking(thought_k=3, num_thoughts=3, answer_prompt="#", step_separator=";", max_answer_tokens=4)


@pytest.fixture
def tiny(thinking: Thinking) -> tuple[policy.Policy, Layout]:
    made = tiny_policy()
    return made, Layout(thinking, made.tokenizer)


def rows(n: int = 8) -> list[Row]:
    """Sums of different lengths, so that batches are padded."""
    made = []
    for i in range(n):
        terms = [(3 * i + j * j) % 10 for j in range(2 + i % 4)]
        total, steps = terms[0], []
        for term in terms[1:]:
            steps.append(f"{total}+{term}={total + term}")
            total += term
        question = "+".join(map(str, terms)) + "="
        made.append(Row(f"sum/{i}", question, tuple(steps), str(total), "number", "test", None))
    return made
