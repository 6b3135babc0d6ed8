"""RL goes on with the LoRA adapter of a CODI run.

pytest tests/train/test_start.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from test_pipeline import CODI, GRPO, metrics, write

from rl_soft.config.recipe import load_recipe, warm_start_of
from rl_soft.model import policy
from rl_soft.model.side_modules import language_model
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import pipeline as train
from rl_soft.train.start import check_thinking, starting_policy

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


def trained_by_codi(folder: Path, tied: bool = True, **values) -> Path:
    made = tiny_policy(tied=tied)
    made.model.save_pretrained(folder / "base")
    made.tokenizer.save_pretrained(folder / "base")
    given = {"model_config": None, "vocabulary": None, "model_name_or_path": str(folder / "base"), **LORA, **values}
    write(folder / "codi.yaml", {**CODI, **given, "output_dir": str(folder / "codi")})
    train.run(load_recipe(folder / "codi.yaml"))
    return folder


@pytest.fixture(scope="module")
def codi(tmp_path_factory):
    """A CODI run that trained an adapter, beside its base; the folder of both."""
    return trained_by_codi(tmp_path_factory.mktemp("adapter"))


def grpo(codi: Path, folder: Path, **values):
    given = {**GRPO, "warm_start": str(codi / "codi.yaml"), "output_dir": str(folder / "rl"), **LORA, **values}
    return load_recipe(write(folder / "rl.yaml", given))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rl_trains_the_adapter_of_codi_and_resumes(codi, tmp_path, beta):
    recipe = grpo(codi, tmp_path, beta=beta, save_steps=2)
    train.run(recipe)
    run = tmp_path / "rl"
    start, trained = adapter(codi / "codi/model"), adapter(run / "model")
    assert start.keys() == trained.keys(), "the same adapter, rows of <bot> and <eot> included"
    assert all(not torch.equal(start[name], trained[name]) for name in start if "lora_B" in name)
    logged = metrics(run)
    assert all(line["rollout/density_gap"] < 1e-4 for line in logged if "rollout/density_gap" in line)
    if beta:
        kl = [line["kl"] for line in logged if "kl" in line]
        assert abs(kl[0]) < 1e-6 < kl[-1], "the reference is the adapter that CODI trained"
    for name in ("model", "eval_after", "checkpoint-4"):  # as if it had ended after two steps
        shutil.rmtree(run / name)
    train.run(recipe)
    resumed = adapter(run / "model")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)


def test_a_head_that_is_not_tied_has_rows_of_its_own(tmp_path):
    codi = trained_by_codi(tmp_path, tied=False)
    train.run(grpo(codi, tmp_path, beta=0.1, rewards=["test_parallel.digit_sum"]))
    start, trained = adapter(codi / "codi/model"), adapter(tmp_path / "rl/model")
    assert start.keys() == trained.keys() and sum("trainable_tokens" in name for name in start) == 2
    logged = metrics(tmp_path / "rl")
    assert all(line["rollout/density_gap"] < 1e-4 for line in logged if "rollout/density_gap" in line)
    kl = [line["kl"] for line in logged if "kl" in line]
    assert abs(kl[0]) < 1e-6 < kl[-1]


def test_rl_starts_from_what_codi_saved(codi, tmp_path):
    recipe = grpo(codi, tmp_path)
    start = starting_policy(recipe, warm_start_of(recipe))
    saved = policy.load_policy(str(codi / "codi/model")).model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in start.model.state_dict().items())
    takes = [name for name, p in start.model.named_parameters() if p.requires_grad]
    assert takes and all("lora_" in name or "trainable_tokens" in name for name in takes)


def test_hidden_thoughts_of_an_adapter_go_on_as_hybrid(tmp_path):
    """The paper's CODI on a language model, and RL after it: adapter and projector are trained, and saved."""
    codi = trained_by_codi(tmp_path, thought="hidden")
    train.run(grpo(codi, tmp_path, thought="hybrid"))
    start, end = (language_model(policy.load_policy(str(tmp_path / name / "model")).model) for name in ("codi", "rl"))
    for (name, before), after in zip(start.projector.named_parameters(), end.projector.parameters(), strict=True):
        assert not torch.equal(before, after), name
    start, end = (adapter(tmp_path / name / "model") for name in ("codi", "rl"))
    assert start.keys() == end.keys() and all(not torch.equal(start[k], end[k]) for k in start if "lora_B" in k)


def test_the_trained_adapter_opens_beside_its_base(codi, tmp_path):
    train.run(grpo(codi, tmp_path, max_steps=1))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "rl/model")
    assert sorted(model.peft_config) == ["default"]
    assert json.loads((tmp_path / "rl/model/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        codi / "base"
    )
    base = policy.load_policy(str(codi / "base")).model.state_dict()
    inside = model.get_base_model().state_dict()
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(inside[f"{name}.base_layer.weight"], base[f"{name}.weight"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_r": 16}, "lora_r is 16 .*, but the adapter .* has 4"),
        ({"lora_alpha": 32}, "lora_alpha is 32 .*, but the adapter .* has 8"),
        ({"use_peft": False}, "is an adapter, and training goes on with it: set use_peft true"),
    ],
)
def test_another_adapter_than_that_of_codi_is_refused(codi, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        train.run(grpo(codi, tmp_path, **values))


def test_supervised_methods_refuse_to_start_from_an_adapter(codi, tmp_path):
    given = {"model_config": None, "vocabulary": None, "model_name_or_path": str(codi / "codi/model"), **LORA}
    path = write(tmp_path / "again.yaml", {**CODI, **given, "output_dir": str(tmp_path / "again")})
    with pytest.raises(ValueError, match="is an adapter, and method codi makes a new one"):
        train.run(load_recipe(path))


def test_a_recipe_does_not_describe_an_adapter_of_another_kind(codi, tmp_path):
    from peft import IA3Config, get_peft_model

    base = policy.load_policy(str(codi / "base"))
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    get_peft_model(base.model, config).save_pretrained(tmp_path / "ia3")
    values = {"warm_start": None, "model_name_or_path": str(tmp_path / "ia3"), "phase": "explicit"}
    with pytest.raises(ValueError, match=r"ia3 is an adapter of the kind IA3, and a recipe describes a LoRA one"):
        starting_policy(grpo(codi, tmp_path, end_of_thinking="#", **values), None)


def test_soft_thoughts_go_on_from_written_reasoning_but_not_between_bot_and_eot():
    written = Thinking(thought="token", phase="explicit", end_of_thinking="#")
    check_thinking(replace(written, thought="gumbel"), written, "the recipe")
    latent = Thinking(thought="token")
    with pytest.raises(ValueError, match="thought gumbel does not fit a checkpoint trained with thought token"):
        check_thinking(replace(latent, thought="gumbel"), latent, "the recipe")
