"""The keys of an adapter: DoRA, rank-stabilised LoRA, modules that are trained whole.

pytest tests/train/test_adapter_keys.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_pipeline import GRPO, metrics, write
from test_start import grpo, trained_by_codi
from transformers import AutoModelForCausalLM

from rl_soft.config.recipe import load_recipe, warm_start_of
from rl_soft.model import policy
from rl_soft.model.adapters import merged_for_now
from rl_soft.train import pipeline as train
from rl_soft.train.start import lora_config, starting_policy

IDS = torch.arange(5, 19)[None]  # (1, 14)
WRITTEN = {"phase": "explicit", "end_of_thinking": "#", "answer_prompt": "", "eval_problems": 0}
KEYS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "head": {"lora_modules_to_save": ["lm_head"]},
    "both ends": {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
    "norms, dora": {"lora_modules_to_save": ["norm", "input_layernorm"], "use_dora": True},
}


def recipe(folder: Path, tied: bool = False, **values):
    made = tiny_policy(tied=tied)
    if not (folder / "base").exists():
        made.model.save_pretrained(folder / "base")
        made.tokenizer.save_pretrained(folder / "base")
    given = {**GRPO, **WRITTEN, "model_name_or_path": str(folder / "base"), "output_dir": str(folder / "rl")}
    given |= {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "rewards": ["test_parallel.digit_sum"], **values}
    return load_recipe(write(folder / "rl.yaml", given))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits  # (1, 14, V)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_an_adapter_is_trained_saved_resumed_and_loaded_by_plain_peft(tmp_path, kind, tied):
    made = recipe(tmp_path, tied, save_steps=2, **KEYS[kind])
    train.run(made)
    run = tmp_path / "rl"
    logged = [line for line in metrics(run) if "rollout/density_gap" in line]
    assert max(line["rollout/density_gap"] for line in logged) < 2e-5
    assert all(line["grad_norm"] > 0 for line in logged)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run / "model")
    trained, config = logits(plain), plain.peft_config["default"]
    assert (config.use_dora, config.use_rslora) == (made.model.use_dora, made.model.use_rslora)
    assert sorted(config.modules_to_save or []) == sorted(made.model.lora_modules_to_save or [])
    assert (trained - logits(policy.load_policy(str(run / "model")).model)).abs().max() < 1e-5
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 1e-2
    for name in ("model", "checkpoint-4"):  # as if it had ended after two steps
        shutil.rmtree(run / name)
    train.run(made)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run / "model")
    assert torch.equal(logits(plain), trained)


@pytest.mark.filterwarnings("ignore")
def test_a_dora_adapter_is_merged_for_a_rollout_and_taken_out_again(tmp_path):
    made = recipe(tmp_path, use_dora=True)
    model = get_peft_model(policy.load_policy(str(tmp_path / "base")).model, lora_config(made))
    generator = torch.Generator().manual_seed(0)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    with torch.no_grad(), merged_for_now(model):
        assert (logits(model) - expected).abs().max() < 1e-5
        moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if "base_layer" in name]
        assert moved and all(moved), "merged"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_codi_trains_ends_of_the_model_whole_and_rl_goes_on(tmp_path, whole, tied):
    """In place of the rows of <bot> and <eot> alone."""
    keys = {"lora_modules_to_save": whole, "use_dora": True}
    if tied and whole == ["lm_head"]:
        with pytest.raises(ValueError, match=r"lm_head is one matrix with embed_tokens, .*; name embed_tokens too"):
            trained_by_codi(tmp_path, tied, **keys)
        return
    codi = trained_by_codi(tmp_path, tied, **keys)
    train.run(grpo(codi, tmp_path, beta=0.1, **keys))
    assert max(m["rollout/density_gap"] for m in metrics(tmp_path / "rl") if "rollout/density_gap" in m) < 2e-5
    saved = load_file(tmp_path / "rl/model/adapter_model.safetensors")
    assert all(any(name in key and key.endswith(f"{name}.weight") for key in saved) for name in whole)
    with pytest.raises(ValueError, match=r"use_dora is False .*, but the adapter .* has True"):
        starting_policy(grpo(codi, tmp_path, lora_modules_to_save=whole), warm_start_of(grpo(codi, tmp_path)))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"lora_modules_to_save": "lm_head"}, "lora_modules_to_save must be a list of texts, not empty, or null, got"),
        ({"lora_modules_to_save": []}, "lora_modules_to_save must be a list of texts, not empty, or null, got"),
        ({"use_dora": True, "use_peft": False}, "use_dora belongs to an adapter: set use_peft true"),
        ({"lora_modules_to_save": ["norm"], "use_peft": False}, "lora_modules_to_save belongs to an adapter"),
        (
            {"lora_modules_to_save": ["q_proj"], "lora_target_modules": ["q_proj", "o_proj"]},
            "lora_modules_to_save: q_proj is in lora_target_modules too",
        ),
        (
            {"modules_to_save": ["norm"], "use_peft": False},
            "lora_modules_to_save belongs to an adapter",
        ),  # PEFT's name
    ],
)
def test_a_mistake_in_a_key_is_one_line(tmp_path, values, line):
    with pytest.raises(ValueError, match=line) as error:
        recipe(tmp_path, **values)
    assert len(str(error.value).splitlines()) == 1


def test_a_module_that_the_model_has_not_is_named(tmp_path):
    with pytest.raises(ValueError, match="the model has no module 'lm_heat'; did you mean lm_head"):
        train.run(recipe(tmp_path, lora_modules_to_save=["lm_heat"]))
