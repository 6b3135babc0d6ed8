"""Decoder layers in fewer operations: the same rollout, on a CPU, where the operations are those of a GPU.

pytest tests/rollouts/test_few_launches.py
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engine import EXPLICIT, MODELS, arguments, assert_same, make

from rl_soft.rollouts import engine
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import few_launches as few
from rl_soft.rollouts.kernels import layers


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The layers that took it, by how often; and switched off by `off`."""
    taken = []
    step = few.FewLaunches.step
    monkeypatch.setattr(few.FewLaunches, "step", lambda self, *args: taken.append(self) or step(self, *args))
    monkeypatch.setattr(engine, "few_launches", lambda model: few.few_launches(model, "cpu"))
    monkeypatch.setattr("rl_soft.rollouts.kernels.cpu.library", lambda: None)
    return taken


def plain(given, **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "few_launches", lambda model: few.few_launches(model, "nowhere"))
        return rollout(*given, **more)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("joint", [True, False])
def test_a_rollout_is_the_same(on_a_cpu, monkeypatch, kind, joint):
    monkeypatch.setattr(few, "SHARE", 1.0 if joint else 0.0)
    monkeypatch.setitem(MODELS, "qwen3", {"head_dim": 16})
    made, layout = make(kind, EXPLICIT)
    given = arguments(made, layout)
    expected = plain(given)
    assert not on_a_cpu
    assert_same(rollout(*given), expected, atol=1e-4)
    assert len(on_a_cpu) > 20 and all((layer.gate_up is not None) == joint for layer in on_a_cpu)


def test_an_adapter_in_float32_is_merged_for_as_long(on_a_cpu):
    made, layout = make("qwen2", EXPLICIT)
    made.model = get_peft_model(
        made.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    given = arguments(made, layout)
    assert_same(rollout(*given), plain(given), atol=1e-4)
    assert on_a_cpu and all(layer.qkv is not None and layer.plain_down for layer in on_a_cpu)
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert not any(m.merged for m in made.model.modules() if isinstance(m, few.Linear))


@pytest.mark.parametrize("init", [True, False])
def test_with_an_adapter_the_products_are_its_own(on_a_cpu, init):
    made, layout = make("qwen2", EXPLICIT)
    made.model = get_peft_model(
        made.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    ).eval()
    given = arguments(made, layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "merged_for_now", lambda model: nullcontext())  # as in bfloat16
        assert_same(rollout(*given), plain(given), atol=1e-4)
    assert on_a_cpu and all(layer.qkv is None and not layer.plain_down for layer in on_a_cpu)


def test_weights_and_modules_are_as_they_were(on_a_cpu):
    made, layout = make("llama", EXPLICIT)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    rollout(*arguments(made, layout))
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert not any("forward" in vars(m) for m in made.model.modules() if layers.parts_of(m) is not None)


def test_a_layer_that_comes_out_otherwise_keeps_its_operations(on_a_cpu, monkeypatch, caplog):
    made, layout = make("llama", replace(EXPLICIT, num_thoughts=4))
    given = arguments(made, layout)
    expected = plain(given)
    monkeypatch.setattr(few, "_rotated", lambda x, cos, signed: x * cos)
    assert_same(rollout(*given), expected, atol=1e-4)
    assert len(on_a_cpu) == 2, "each of two layers was tried once"
