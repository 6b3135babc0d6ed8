"""The recipes of the papers' settings, on tiny random models of the same architectures.

pytest tests/config/test_paper_recipes.py
"""

import json
import math

import pytest
from conftest import ROOT
from test_recipe import LLAMA, tiny_pretrained

from rl_soft.config.recipe import load_recipe
from rl_soft.data.sources import load_rows as load
from rl_soft.evaluation.records import GREEDY
from rl_soft.evaluation.samples import sample_records
from rl_soft.model import policy
from rl_soft.thoughts.layout import Layout
from rl_soft.train import pipeline as train

PAPERS = ("codi", "sft_cot", "sft_nocot", "icot", "coconut")
MODELS = {  # folder of recipes -> architecture, chat template, special tokens
    "gpt2_gsm8k": ("gpt2", None, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}),
    "llama1b_gsm8k": ("llama", LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
}
FREE = {"output_dir", "model_name_or_path", "max_steps", "dataset_options", "num_thoughts", "validation_problems",
        "max_row_tokens", "validation_every"}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def place(request, tmp_path_factory):
    """A tiny model of the architecture, and rows in the format of GSM8k-Aug."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_pretrained(folder / "model", *MODELS[request.param], [])
    rows = [
        {"question": f"A farm has {a} hens and {b} cows, and buys {a} hens. How many animals?",
         "cot": f"<<{a}+{b}={a + b}>> <<{a + b}+{a}={2 * a + b}>>", "answer": str(2 * a + b)}
        for a in range(2, 10) for b in range(2, 10)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return request.param, folder


@pytest.mark.parametrize("name", PAPERS)
def test_the_recipe_runs_on_a_tiny_model(place, name):
    """The recipe as it is, but for the model, the data's place, sizes and lengths: two steps, saved, loaded, asked."""
    which, folder = place
    path = ROOT / f"recipes/{which}/{name}.yaml"
    before = load_recipe(path)
    smaller = {
        "output_dir": str(folder / name), "model_name_or_path": str(folder / "model"), "max_steps": 2,
        "dataset_options": {"path": str(folder / "rows.jsonl")}, "validation_problems": 4, "validation_every": 2,
        "max_row_tokens": 400,
    }  # fmt: skip
    if before.thinking.phase == "explicit":
        smaller["num_thoughts"] = 8  # the most tokens that an untrained model may write
    recipe = load_recipe(path, smaller)
    assert {k for k in recipe.values if recipe.values[k] != before.values.get(k)} <= FREE
    train.run(recipe)
    logs = [m for m in map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines()) if "loss" in m]
    assert [m["step"] for m in logs] == [1, 2]
    assert all(math.isfinite(v) for m in logs for v in m.values() if isinstance(v, float))
    made = policy.load_policy(str(folder / name / "model"))
    assert made.thinking == recipe.thinking and not made.tokenizer.chat_template, "it was trained without one"
    problems = load("gsm8k-aug", "train", 3, 0, {"path": str(folder / "rows.jsonl")})
    layout = Layout(made.thinking, made.tokenizer)
    records = sample_records(made.model.eval(), layout, [(row, GREEDY) for row in problems], seed=0)
    assert len(records) == 3 and all(r["gold"] == p.answer for r, p in zip(records, problems, strict=True))


@pytest.mark.parametrize("which", MODELS)
def test_the_budget_of_a_twin_is_codi_s(which):
    """What CoT-SFT and No-CoT-SFT share with CODI is the same key for key."""
    codi, *twins = (load_recipe(ROOT / f"recipes/{which}/{name}.yaml") for name in ("codi", "sft_cot", "sft_nocot"))
    for twin in twins:
        shared = {k: v for k, v in codi.training.items() if k not in ("output_dir", "gamma")}
        assert {k: twin.training[k] for k in shared} == shared and twin.model == codi.model
    rows_a_step = codi.training["per_device_train_batch_size"] * codi.training["gradient_accumulation_steps"]
    assert rows_a_step == 128
