"""FSDP2 on two processes: the run of one, for models and adapters of every kind.

pytest tests/invariants/test_fsdp.py            an adapter
pytest tests/invariants/test_fsdp.py -m slow    the other kinds; test_parallel.py has weights, resume and failures
"""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_policy
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from test_parallel import RL, launch, metrics
from transformers import AutoModelForCausalLM

from rl_soft.config.recipe import load_recipe
from rl_soft.model import policy
from rl_soft.train import pipeline as train
from rl_soft.train.runtime.sharded import check_fsdp

EXPLICIT = {"phase": "explicit", "end_of_thinking": "#", "answer_prompt": "", "max_steps": 3}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
KINDS = {
    "untied, reference": {"tied": False, "beta": 0.1},
    "tied, reference": {"beta": 0.1},
    "untied, checkpointed": {"tied": False, "gradient_checkpointing": True},
    "untied, several chunks": {"tied": False, "chunk_size": 3},
    "ppo": {"method": "ppo"},
    "gpt2": {"model_type": "gpt2"},
    "qwen3": {"model_type": "qwen3", "tied": False},
    "lora, tied": LORA,
    "lora, untied": {**LORA, "tied": False, "beta": 0.1},
    "lora, untied, several chunks": {**LORA, "tied": False, "chunk_size": 3},
    "dora": {**LORA, "use_dora": True},
    "whole head": {**LORA, "lora_modules_to_save": ["lm_head"], "tied": False, "beta": 0.1},
}


def recipe(folder: Path, tied: bool = True, model_type: str = "llama", **values) -> Path:
    made = tiny_policy(model_type, tied)
    folder.mkdir(exist_ok=True)
    made.model.save_pretrained(folder / "base")
    made.tokenizer.save_pretrained(folder / "base")
    given = {**RL, **EXPLICIT, "model_name_or_path": str(folder / "base"), "output_dir": str(folder / "rl"), **values}
    (folder / "rl.yaml").write_text(yaml.safe_dump(given))
    return folder / "rl.yaml"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(5, 19)[None]).logits  # (1, 14, V)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_two_sharded_processes_are_one(tmp_path, kind):
    values = KINDS[kind]
    train.run(load_recipe(recipe(tmp_path / "one", **values, per_device_train_batch_size=8)))
    path = recipe(tmp_path / "two", **values, per_device_train_batch_size=4)
    error = launch(tmp_path, "fsdp2", "-m", "rl_soft", path).communicate(timeout=400)[1]
    assert (tmp_path / "two/rl/metrics.jsonl").exists(), error[-3000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3, error[-3000:]
    for a, b in zip(two, one, strict=True):
        for key in ("reward", "loss", "grad_norm", "rollout/density_gap"):  # others are means of micro-batches' means
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
        assert b["grad_norm"] > 1e-3
    kind = AutoPeftModelForCausalLM if "use_peft" in values else AutoModelForCausalLM
    a, b = (logits(kind.from_pretrained(tmp_path / name / "rl/model")) for name in ("one", "two"))
    assert (a - b).abs().max() < 1e-3
    assert torch.equal(b, logits(policy.load_policy(str(tmp_path / "two/rl/model")).model))


@pytest.mark.slow
def test_a_sharded_adapter_resumes_exactly(tmp_path):
    path = recipe(tmp_path, **LORA, tied=False, per_device_train_batch_size=8, max_steps=4, save_steps=2)
    weights = []
    for _ in range(2):
        error = launch(tmp_path, "fsdp2", "-m", "rl_soft", path).communicate(timeout=400)[1]
        assert (tmp_path / "rl/model/adapter_config.json").exists(), error[-3000:]
        weights.append(load_file(tmp_path / "rl/model/adapter_model.safetensors"))
        for name in ("model", "checkpoint-4"):  # as if it had ended after two steps
            shutil.rmtree(tmp_path / "rl" / name)
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 3, 4]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"method": "codi", "phase": "latent", "end_of_thinking": ""},
         r"method codi \(.*\) is not available under FSDP2: .*; use --zero 0 to 3"),
        ({"load_in_4bit": True, **LORA}, "load_in_4bit: FSDP2 cannot divide weights of 4 bits; use --zero 0"),
        ({"phase": "latent", "end_of_thinking": "", "answer_prompt": "#", "ratio": "pathwise"},
         "ratio pathwise is not available under FSDP2"),
        ({}, "--fsdp divides a model over processes, and there is one; leave --fsdp out"),
    ],
)  # fmt: skip
def test_what_fsdp_cannot_have_is_one_line(tmp_path, monkeypatch, values, line):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    if values.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr(train, "check_processes", lambda args: None)
    if values.get("method") == "codi":
        own = ("num_generations", "prompts_per_step", "rewards")
        path = recipe(tmp_path, **values)
        given = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in own}
        path.write_text(yaml.safe_dump(given))
    else:
        path = recipe(tmp_path, **values)
    with pytest.raises(ValueError, match=line):
        train.run(load_recipe(path))


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("FSDP_VERSION", "1", "fsdp_version is 1 in the accelerate settings, and FSDP here takes 2; use recipes/acc"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type is SHARDED_STATE_DICT in the accelerate"),
        (
            "FSDP_CPU_RAM_EFFICIENT_LOADING",
            "true",
            "fsdp_cpu_ram_efficient_loading is true in the accelerate settings",
        ),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is true in the accelerate settings"),
    ],
)
def test_settings_of_accelerate_that_would_not_do_are_named(monkeypatch, name, value, line):
    for key, wanted in {**FSDP, name: value}.items():
        monkeypatch.setenv(key, wanted)
    with pytest.raises(ValueError, match=line):
        check_fsdp()
