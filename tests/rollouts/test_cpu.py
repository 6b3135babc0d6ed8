"""The CPU kernels against float64 and against PyTorch's; a rollout is the same with them.

pytest tests/rollouts/test_cpu.py
"""

import collections
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY, VOCABULARY, rows
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_soft.model import policy
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import cpu as ours
from rl_soft.rollouts.kernels import sampling
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address, gumbel
from rl_soft.thoughts.thinking import Thinking

KERNELS = ours.library()
compiled = pytest.mark.skipif(KERNELS is None, reason="needs a CPU with AVX2 or AVX-512, and a C compiler")
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def large_policy(**changes):
    made = policy.make({**TINY, **LARGE, "model_type": "llama", **changes}, VOCABULARY, 0)
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(4)
    made.model.eval()
    return made


def roll(made, **thinking):
    layout = Layout(Thinking(thought_k=3, num_thoughts=6, answer_prompt="#", **thinking), made.tokenizer)
    prompts = [layout.prompt_ids(r.question) for r in rows(5) for _ in range(3)]
    seeds = torch.tensor([address(0, r.id, s) for r in rows(5) for s in range(3)])
    return rollout(made.model, layout, prompts, seeds, [made.tokenizer.eos_token_id], token_budget=300)


def assert_drawn(drawn, logits, temperature, K, seeds, step):
    """A draw is that of `noise.gumbel`, its figures those of float64; returns ids of its support."""
    V = logits.shape[1]
    phi = (logits.double() / temperature[:, None]).log_softmax(-1)
    values, support = (phi + gumbel(seeds, step, V)).topk(K)
    real = values.isfinite()
    assert torch.equal(drawn.support[real], support[real]) and drawn.support.max() < V
    shift = (drawn.values - values)[:, :1]
    torch.testing.assert_close((drawn.values - shift)[real], values[real], check_dtype=False, atol=1e-5, rtol=1e-6)
    entropy = -(phi.exp() * phi.clamp(min=-1e4)).sum(-1)
    torch.testing.assert_close(drawn.entropy, entropy, check_dtype=False, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(
        drawn.support_log_probs(support), phi.gather(-1, support), check_dtype=False, atol=1e-5, rtol=0
    )
    ids = support[:, : max(1, min(K, V // 4))].clone()
    ids[:, -1] = ids[:, 0]  # absent slots name the first again
    outside = phi.scatter(-1, ids, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(drawn.log_outside(ids), outside, check_dtype=False, atol=1e-5, rtol=1e-5)
    return ids


@pytest.fixture
def calls(monkeypatch):
    """Calls of the kernels by name."""
    counts = collections.Counter()

    class Counted:
        def __getattr__(self, name):
            counts[name] += 1
            return getattr(KERNELS, name)

    monkeypatch.setattr(ours, "library", Counted)
    return counts


@compiled
@pytest.mark.parametrize("M", [1, 2, 3, 8, 63, 130])
@pytest.mark.parametrize(("N", "K"), [(6, 8), (7, 72), (12, 576), (17, 1544), (1, 16)])
@torch.no_grad()
def test_product(M, N, K):
    torch.manual_seed(M * N)
    K *= ours.LANES // 8
    module, x = nn.Linear(K, N), torch.randn(2, M, K)[:, ::1].transpose(0, 1)  # not contiguous
    y = ours._linear(KERNELS, module, x[:, :1])
    exact = F.linear(x[:, :1].double(), module.weight.double(), module.bias.double())
    scale = x.abs().max() * module.weight.abs().max() * K
    assert (y - exact).abs().max() < 1e-7 * scale
    alone = torch.cat([ours._linear(KERNELS, module, row[:1]) for row in x])
    assert torch.equal(y[:, 0], alone)  # what a row becomes does not depend on the others


@compiled
@pytest.mark.parametrize("columns", [1, 7, 64, 65, 200])
@pytest.mark.parametrize(("A", "groups", "D"), [(1, 1, 16), (2, 3, 64), (3, 2, 128), (1, 9, 32), (2, 4, 256)])
@torch.no_grad()
def test_attention(columns, A, groups, D):
    """Left-padded rows, holes, and views of a larger buffer."""
    torch.manual_seed(columns)
    n, H, D = 5, A * groups, min(256, D * ours.LANES // 8)
    buffers = torch.randn(2, n, A, columns + 9, D)
    buffers[:, :, :, columns:] = torch.nan  # what is not seen is not read
    k, v = buffers[:, :, :, :columns]
    q = torch.randn(n, 1, H, D).transpose(1, 2)
    seen = torch.rand(n, 1, 1, columns) > 0.2
    seen[:, :, :, : columns // 3], seen[..., -1] = False, True
    refuse, scale = pytest.fail, D**-0.5
    for mask in (seen, None):
        out, _ = ours._attention(KERNELS, refuse, nn.Module(), q, k, v, mask, scaling=scale)
        q64, k64, v64 = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
        exact = F.scaled_dot_product_attention(q64, k64, v64, attn_mask=mask, scale=scale)
        assert (out.transpose(1, 2) - exact).abs().max() < 2e-6
        for i in range(n):
            one = slice(i, i + 1)
            alone, _ = ours._attention(
                KERNELS,
                refuse,
                nn.Module(),
                q[one],
                k[one],
                v[one],
                None if mask is None else mask[one],
                scaling=scale,
            )
            assert torch.equal(out[one], alone)


@compiled
@torch.no_grad()
def test_attention_of_large_scores():
    """Scores of up to 1e5, where the softmax is a maximum, of either sign, in blocks before and after it."""
    D = 2 * ours.LANES
    q, k, v = torch.ones(1, 1, 1, D), torch.zeros(1, 1, 200, D), torch.randn(1, 1, 200, D)
    for at in (0, 63, 64, 199):
        for low, high in ((-1e5, -1e4), (1e4, 1e5), (-1e5, 1e5), (0.0, 200.0)):
            k[:] = low / D
            k[:, :, at] = high / D
            out, _ = ours._attention(KERNELS, pytest.fail, nn.Module(), q, k, v, None, scaling=1.0)
            assert torch.equal(out[0, 0], v[0, :, at])


@compiled
@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        (True, {}),
        (True, {"sliding_window": 5, "model_type": "mistral"}),
        (True, {"model_type": "qwen2"}),  # biases
        (True, {"model_type": "qwen3", "head_dim": 32}),  # norms of the heads
        (False, {"attention_bias": True}),  # one where the kernels know none
        (False, {"hidden_act": "gelu"}),
        (False, {"model_type": "granite", "residual_multiplier": 0.5}),
    ],
)
def test_a_rollout_is_the_same_with_them(layers, changes, calls, monkeypatch):
    made = large_policy(**changes)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1) if "norm" in name or "bias" in name else None
    with_kernels = roll(made)
    assert calls["product"] > 5 and calls["attend"] > 10 and calls["draw"] > 5
    tried, depth = calls["after_attention"], len([m for m in made.model.modules() if hasattr(m, "mlp")])
    assert tried > 5 * depth if layers else tried == 0
    roll(made)
    assert calls["after_attention"] == (2 * tried - depth if layers else 0)  # the first prompt is taken once more
    monkeypatch.setattr(ours, "library", lambda: None)
    without = roll(made)
    assert torch.equal(with_kernels.support, without.support)
    assert torch.equal(with_kernels.completion_ids, without.completion_ids)
    torch.testing.assert_close(with_kernels.log_probs, without.log_probs, atol=1e-4, rtol=1e-5)


@compiled
def test_what_nobody_wrote_is_not_read(monkeypatch):
    """New buffers hold whatever was in memory: NaN here."""
    made, plain = large_policy(), torch.Tensor.new_empty
    expected = roll(made)

    def new_empty(*args, **kwargs):
        new = plain(*args, **kwargs)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: new_empty(x, x.shape))
    out = roll(made)
    assert torch.equal(out.support, expected.support) and torch.equal(out.log_probs, expected.log_probs)


@compiled
@pytest.mark.parametrize(("m", "V", "K"), [(1, 8, 8), (3, 61, 1), (5, 4096, 8), (2, 50257, 100)])
def test_a_draw(m, V, K):
    """Noise and top-K are those of `noise.gumbel`, the distribution's figures those of float64, row by row."""
    torch.manual_seed(V)
    logits, temperature = torch.randn(m, V) * 5, torch.rand(m) + 0.5
    logits[0, : V // 2] = -torch.inf
    before, seeds, step = logits.clone(), torch.arange(m) * 7, torch.arange(m)
    drawn = sampling.draw(logits, temperature, K, seeds, step)
    ids = assert_drawn(drawn, before, temperature, K, seeds, step)
    assert torch.equal(drawn.logits[:, :V], before)
    for i in range(m):
        alone = sampling.draw(logits[i : i + 1], temperature[i : i + 1], K, seeds[i : i + 1], step[i : i + 1])
        assert torch.equal(alone.values[0], drawn.values[i]) and torch.equal(alone.entropy[0], drawn.entropy[i])
        assert torch.equal(alone.log_outside(ids[i : i + 1])[0], drawn.log_outside(ids)[i])


@compiled
def test_the_noise_of_a_draw():
    """On flat logits, all ids of many addresses: the values are the noise."""
    seeds, V = torch.arange(4096), 128
    drawn = sampling.draw(torch.zeros(len(seeds), V), torch.ones(len(seeds)), V, seeds, 3)
    noise = gumbel(seeds, 3, V)
    assert (drawn.values.gather(-1, drawn.support.argsort()) - noise).abs().max() < 4e-6
    assert ((drawn.values.gather(-1, drawn.support.argsort()) - noise).abs() / noise.abs().clamp(min=1)).max() < 1e-6


@compiled
def test_a_draw_from_peaks_and_from_what_is_not_finite():
    logits = torch.zeros(5, 16)
    logits[0, 3] = 200.0  # nothing is left outside in float32
    logits[1, 3], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    drawn = sampling.draw(logits, torch.ones(5), 2, torch.arange(5), 0)
    assert drawn.entropy[[0, 4]].isfinite().all() and drawn.entropy[1:4].isnan().all()
    outside = drawn.log_outside(torch.full((5, 1), 3))
    assert outside[0] == pytest.approx(-200 + math.log(15), rel=1e-6)
    assert outside[4] == pytest.approx(math.log(15 / 16), rel=1e-6)


@compiled
def test_nothing_is_left_behind(calls):
    made = large_policy()
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), ours.cpu_kernels(made.model):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    assert not [m for m in made.model.modules() if "forward" in vars(m)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.functools, "partial", lambda *args: pytest.fail("x"))
        with pytest.raises(pytest.fail.Exception), ours.cpu_kernels(made.model):
            pass
    assert not [m for m in made.model.modules() if "forward" in vars(m)]


@compiled
def test_training_and_other_dtypes_take_pytorchs_products(calls):
    made, ids = large_policy(), torch.tensor([[5, 6, 7]])
    with ours.cpu_kernels(made.model):
        made.model(ids).logits.sum().backward()
    assert made.model.lm_head.weight.grad is not None
    for model in (made.model.bfloat16(), policy.make({**TINY, "model_type": "llama"}, VOCABULARY, 0).model):
        with ours.cpu_kernels(model):
            assert not [m for m in model.modules() if "forward" in vars(m)]
    assert not calls


@compiled
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_takes_pytorchs_operations(inside, calls):
    """Also where it is put around the model's own forward, as accelerate does, and so is off when a rollout begins."""
    made, autocast = large_policy(), torch.autocast("cpu", torch.bfloat16)
    if inside:
        made.model.forward = autocast(made.model.forward)
        roll(made)
    else:
        with autocast:
            roll(made)
    assert set(calls) <= {"draw", "mass_outside"}
    if inside:
        del made.model.forward
    roll(made)
    assert calls["after_attention"]


@compiled
def test_a_layer_that_does_not_agree_keeps_its_operations(calls, monkeypatch):
    made = large_policy()
    with monkeypatch.context() as patch:
        patch.setattr(ours, "library", lambda: None)
        expected = roll(made)
    inner = ours.CpuLayer.after
    monkeypatch.setattr(ours.CpuLayer, "after", lambda self, x, read: 1.1 * inner(self, x, read))
    out, tried = roll(made), calls["after_attention"]
    assert torch.equal(out.support, expected.support) and tried == 2
    roll(made)
    assert calls["after_attention"] == tried


@compiled
def test_only_what_does_nothing_may_be_in_a_layer(calls):
    made = large_policy()
    made.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)  # leaves hooks of transformers' behind
    roll(made)
    assert calls["after_attention"]
    calls.clear()
    seen, mlp = [], made.model.model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda *args: seen.append(1))
    roll(made)
    in_one = calls["after_attention"]
    assert seen and in_one
    hook.remove()
    mlp.forward = type(mlp).forward.__get__(mlp)
    roll(made)
    assert calls["after_attention"] == 2 * in_one
    del mlp.forward
    roll(made)
    assert calls["after_attention"] == 4 * in_one


@compiled
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_merged_for_as_long_as_a_rollout_takes(calls, merged):
    """Layers are taken whole, the rollout is that of the adapted model, and its weights are what they were."""
    made = large_policy()
    made.model = get_peft_model(made.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, p in made.model.named_parameters():
        p.data += 0.1 * torch.randn_like(p) if "lora_B" in name else 0
    if merged:
        made.model.merge_adapter()
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    ids = torch.arange(4, 12)[None]
    expected = made.model(input_ids=ids).logits
    out = roll(made)
    assert calls["after_attention"]
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert torch.equal(made.model(input_ids=ids).logits, expected)
    made.model = made.model.merge_and_unload()
    assert torch.equal(roll(made).completion_ids, out.completion_ids)


@compiled
def test_the_weights_are_back_after_a_rollout_that_fails(monkeypatch):
    made = large_policy()
    made.model = get_peft_model(made.model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    with pytest.raises(KeyError), ours.cpu_kernels(made.model):
        assert any(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_a_line_says_so(compiler, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(ours, "library", ours.library.__wrapped__)
    with caplog.at_level(logging.INFO, "rl_soft"):
        out = roll(large_policy())
    assert out.mask.any() and compiler in caplog.text
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_loaded_weights_begin_at_cache_lines(tmp_path):
    made = large_policy()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded = policy.load_policy(str(tmp_path)).model
    assert not [name for name, p in loaded.named_parameters() if p.data_ptr() % 64]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight or not loaded.config.tie_word_embeddings
    for p, q in zip(loaded.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
@compiled
@pytest.mark.skipif(ours.LANES == 8, reason="this is what has just run")
def test_the_other_instruction_set():
    """On a CPU with AVX-512, this file with AVX2."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert ", 1 skipped" in done.stdout  # this one alone
