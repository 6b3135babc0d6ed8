"""Weights of 4 bits under an adapter: what is rolled out is what is trained, saved and evaluated.

pytest tests/train/test_quantised.py            one process
pytest tests/train/test_quantised.py -m slow    two processes are one
"""

import importlib.util
import json
import shutil

import pytest
import torch
from conftest import tiny_policy
from peft import PeftModel
from safetensors.torch import load_file
from test_adapter_keys import logits, recipe
from test_kl import soft_trainer
from test_parallel import launch
from test_pipeline import metrics
from test_start import grpo, trained_by_codi
from transformers import AutoModelForCausalLM

from rl_soft.cli.opening import load_policy as open_policy
from rl_soft.config.commands import EvaluationArguments
from rl_soft.model import policy
from rl_soft.model.export import export
from rl_soft.model.quantised import check_divided, four_bits, in_4bit, settle_loaded
from rl_soft.train import pipeline as train

pytest.importorskip("bitsandbytes")
NF4 = four_bits("nf4", "float32", False)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "values",
    [
        {"tied": False},
        {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "beta": 0.1},
        {"use_dora": True, "tied": False},
    ],
)
def test_qlora_is_trained_saved_resumed_and_loaded_by_plain_peft(tmp_path, values):
    made = recipe(tmp_path, **{"tied": True, **values}, load_in_4bit=True, save_steps=2)
    train.run(made)
    run = tmp_path / "rl"
    config = four_bits(made.model.bnb_4bit_quant_type, "float32", made.model.use_bnb_nested_quant)
    logged = [line for line in metrics(run) if "rollout/density_gap" in line]
    assert max(line["rollout/density_gap"] for line in logged) < 2e-5
    assert all(line["grad_norm"] > 0 for line in logged)
    adapter = load_file(run / "model/adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}, "TRL would round it to bfloat16"
    assert not any("base_layer" in name for name in adapter)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    settle_loaded(base)  # bitsandbytes' bfloat16 product for a CPU wants rows of 64 weights, and this model has 32
    assert {m.weight.dtype for n, m in base.named_modules() if n.endswith("_proj")} == {torch.uint8}
    trained = logits(PeftModel.from_pretrained(base, run / "model"))
    ours = policy.load_policy(str(run / "model"))
    assert in_4bit(ours.model), "rl_soft.json says so"
    assert torch.equal(trained, logits(ours.model))
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run / "model")
    assert (trained - logits(whole)).abs().max() > 2e-3, "4 bits are another model"

    for name in ("model", "checkpoint-4"):  # as if it had ended after two steps
        shutil.rmtree(run / name)
    train.run(made)
    resumed = load_file(run / "model/adapter_model.safetensors")
    assert all(torch.equal(adapter[name], resumed[name]) for name in adapter)


def test_an_evaluation_opens_what_was_trained(tmp_path):
    train.run(recipe(tmp_path, load_in_4bit=True, max_steps=2, save_steps=2))
    folder = str(tmp_path / "rl/model")
    opened = open_policy(folder, EvaluationArguments(model_name_or_path="x", output_dir="o", dataset="d")).model
    assert isinstance(opened, PeftModel), "not merged: the sum would be rounded to 4 bits"
    trained = logits(opened)
    assert torch.equal(trained, logits(policy.load_policy(folder).model))
    for source, name in ((folder, "whole"), (str(tmp_path / "rl/checkpoint-2"), "of a checkpoint")):
        export(source, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
        assert (logits(plain) - trained).abs().max() < 1e-5


def test_rl_goes_on_with_a_quantised_codi_run_and_refuses_to_without_its_4_bits(tmp_path):
    codi = trained_by_codi(tmp_path, load_in_4bit=True)
    train.run(grpo(codi, tmp_path, load_in_4bit=True, beta=0.1))
    logged = [line for line in metrics(tmp_path / "rl") if "rollout/density_gap" in line]
    assert max(line["rollout/density_gap"] for line in logged) < 2e-5 and abs(logged[0]["kl"]) < 1e-6
    assert json.loads((tmp_path / "rl/model/rl_soft.json").read_text())["base_in_4bit"]["bnb_4bit_quant_type"] == "nf4"
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match="has weights of 4 bits: set load_in_4bit true"):
        train.run(grpo(codi, tmp_path / "again"))


def test_a_model_without_4_bits_says_nothing_of_them(tmp_path):
    train.run(recipe(tmp_path, max_steps=1))
    assert set(json.loads((tmp_path / "rl/model/rl_soft.json").read_text())) == {"format", "thinking"}


def test_training_all_weights_of_a_quantised_model_is_refused(tmp_path):
    made = tiny_policy()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    quantised = policy.load_policy(str(tmp_path / "base"), quantization=NF4)
    with pytest.raises(ValueError, match="weights of 4 bits, which are not trained themselves; train an adapter"):
        soft_trainer(tmp_path / "run", made=quantised)
    for stage, name in ((3, "ZeRO-3"), ("fsdp2", "FSDP2")):
        with pytest.raises(ValueError, match=f"load_in_4bit: {name} cannot divide weights of 4 bits; use --zero 0"):
            check_divided(quantised.model, stage)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"load_in_4bit": "yes"}, "load_in_4bit must be true or false, got 'yes'"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
            "bnb_4bit_quant_type must be one of nf4, fp4, got 'nf5'",
        ),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype must be one of float32, b"),
        (
            {"load_in_4bit": True, "use_peft": False},
            "load_in_4bit: weights of 4 bits are not trained .* use_peft true",
        ),
        ({"load_in_4bit": True, "use_vllm": True}, "load_in_4bit: vLLM would make rollouts with whole weights"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is read with load_in_4bit true"),
        ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant is read with load_in_4bit true"),
        ({"load_in_8bit": True}, "unknown key 'load_in_8bit' .*: 8-bit products round the states, too"),
        ({"bnb_4bit_use_double_quant": True}, "use_bnb_nested_quant is read with load_in_4bit true"),  # its other name
        ({"quantization_config": {}}, "write load_in_4bit: true"),
    ],
)
def test_a_mistake_in_a_key_is_one_line(tmp_path, values, line):
    with pytest.raises(ValueError, match=line) as error:
        recipe(tmp_path, **values)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    recipe(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    for load in (
        lambda: recipe(tmp_path, load_in_4bit=True),
        lambda: policy.load_policy(str(tmp_path / "base"), quantization=NF4),
    ):
        with pytest.raises(ValueError, match=r"^load_in_4bit needs bitsandbytes; pip install 'rl-soft\[quantised\]'$"):
            load()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """DDP: each holds the weights whole, and the same 4 bits."""
    values = {"load_in_4bit": True, "max_steps": 3, "prompts_per_step": 2, "num_generations": 8, "num_iterations": 1}
    for name, batch in (("one", 8), ("two", 4)):
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, **values, per_device_train_batch_size=batch)
        if name == "one":
            train.run(made)
    error = launch(tmp_path, 0, "-m", "rl_soft", tmp_path / "two/rl.yaml").communicate(timeout=400)[1]
    assert (tmp_path / "two/rl/model").exists(), error[-3000:]
    one, two = ([m for m in metrics(tmp_path / name / "rl") if "loss" in m] for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(two, one, strict=True):
        for key in ("reward", "loss", "grad_norm", "rollout/density_gap"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
