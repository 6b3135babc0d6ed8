"""dtype and autocast of a run where its recipe leaves them to the machine.

pytest tests/train/test_precision.py
"""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT, tiny_policy
from test_grpo import soft_trainer

from rl_soft.cli.opening import with_dtype
from rl_soft.config.recipe import load_command, load_recipe, write_config
from rl_soft.model import devices
from rl_soft.train import precision
from rl_soft.train.precision import settled


def recipe(**values):
    return load_recipe(ROOT / "recipes/smollm2/grpo_gumbel.yaml", {"output_dir": "runs/none", **values})


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with bfloat16, or without one."""

    def there(has):
        for module in (devices, precision):
            monkeypatch.setattr(module, "has_bfloat16", lambda: has)

    there(True)
    return there


ADAPTER, WHOLE = {"use_peft": True}, {"use_peft": False}
FLOAT32, BFLOAT16, MASTERS = ("float32", False), ("bfloat16", True), ("float32", True)


@pytest.mark.parametrize(
    ("values", "deepspeed", "expected"),
    [
        (ADAPTER, False, BFLOAT16),
        (ADAPTER, True, BFLOAT16),
        (WHOLE, True, BFLOAT16),
        (WHOLE, False, MASTERS),
        *(({**kind, **said}, deepspeed, FLOAT32)
          for kind in (ADAPTER, WHOLE) for deepspeed in (False, True)
          for said in ({"dtype": "float32"}, {"bf16": False}, {"dtype": "float32", "bf16": False})),
        ({**WHOLE, "dtype": "bfloat16"}, True, BFLOAT16),
        ({**ADAPTER, "dtype": "bfloat16", "bf16": False}, False, ("bfloat16", False)),
        ({**WHOLE, "dtype": "float32", "bf16": True}, False, MASTERS),
        ({**ADAPTER, "fp16": True}, False, FLOAT32),
    ],
)  # fmt: skip
def test_on_a_gpu(gpu, values, deepspeed, expected):
    made = settled(recipe(**values), deepspeed)
    assert (made.model.dtype, made.training.get("bf16", False)) == expected
    assert settled(made, deepspeed).resolved == made.resolved, "what is settled stays so"
    assert settled(load_recipe(ROOT / "recipes/smollm2/grpo_gumbel.yaml", made.values), deepspeed).model == made.model


@pytest.mark.parametrize("values", [ADAPTER, WHOLE])
@pytest.mark.parametrize("deepspeed", [False, True])
def test_elsewhere_it_is_float32(gpu, values, deepspeed):
    gpu(False)
    made = settled(recipe(**values), deepspeed)
    assert made.model.dtype == "float32" and "bf16" not in made.training
    assert made.resolved["dtype"] == "float32"


def test_a_run_that_has_begun_keeps_its_precision(gpu, tmp_path):
    gpu(False)
    first = settled(recipe(output_dir=str(tmp_path / "run")), False)
    write_config(first)
    gpu(True)
    assert settled(recipe(output_dir=str(tmp_path / "run")), False).resolved == first.resolved
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**first.resolved, "dtype": "bfloat16", "bf16": True}))
    again = settled(recipe(output_dir=str(tmp_path / "run")), False)
    assert (again.model.dtype, again.training["bf16"]) == BFLOAT16


@pytest.mark.parametrize("dtype", precision.HALF)
def test_weights_without_masters_are_refused(gpu, tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"^dtype {dtype} with all weights trained and without .*--zero 1"):
        settled(recipe(**WHOLE, dtype=dtype), False)
    made = tiny_policy()
    made.model.to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=f"^dtype {dtype} with all weights trained"):
        soft_trainer(tmp_path, made=made)


def test_deepspeed_does_not_make_float32_bfloat16_without_a_word(gpu):
    with pytest.raises(ValueError, match=r"^bf16 true with dtype float32: DeepSpeed makes all weights bfloat16"):
        settled(recipe(**WHOLE, dtype="float32", bf16=True), True)


def test_commands_on_a_model_take_the_machine_s(gpu):
    for command, given in {"eval": {"output_dir": "x"}, "generate": {}, "analyze": {}}.items():
        arguments = load_command(command, "m", {"dataset": "gsm8k", **given})[0]
        assert with_dtype(arguments).dtype == "bfloat16"
        assert with_dtype(replace(arguments, dtype="float32")).dtype == "float32"
        gpu(False)
        assert with_dtype(arguments).dtype == "float32"
        gpu(True)


ACCUMULATION = """
import os, sys, types, torch
port, stage, accumulates = sys.argv[1:]
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from rl_soft.train.runtime import processes
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model, n = torch.nn.Linear(4, 4, bias=False), 64
config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": n, "bf16": {"enabled": True},
          "gradient_clipping": 0.0, "zero_optimization": {"stage": int(stage)}, "zero_allow_untested_optimizer": True}
plugin = types.SimpleNamespace(deepspeed_config=config, zero_stage=int(stage))
if accumulates == "ours":
    processes.accumulate_in_float32(types.SimpleNamespace(deepspeed_plugin=plugin, bf16=True))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=True)
before = safe_get_full_fp32_param(model.weight).clone()
for i in range(n):
    x = torch.full((1, 4), 1.0 if i == 0 else 2**-10, dtype=torch.bfloat16)
    engine.backward(engine(x).sum().float() * n)  # which is divided by n
    engine.step()
print("moved by", float((before - safe_get_full_fp32_param(model.weight))[0, 0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_adds_gradients_up_in_float32(stage):
    """One large gradient and 63 that are below its rounding in bfloat16, each by itself. Stage 1 rounds the sum."""
    pytest.importorskip("deepspeed")
    moved = {}
    for accumulates in ("theirs", "ours"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-c", ACCUMULATION, port, str(stage), accumulates], cwd=ROOT, capture_output=True,
            text=True, timeout=300, env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        moved[accumulates] = float(run.stdout.split("moved by")[1].split()[0])
    assert moved["theirs"] == 1.0 < moved["ours"] == pytest.approx(1 + 63 / 2**10, abs=2**-10)
