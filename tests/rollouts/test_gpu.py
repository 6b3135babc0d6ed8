"""The kernels of a rollout on a GPU against float64 and transformers' operations; a rollout is the same with them.

On a GPU they run compiled. Without one they run in Triton's interpreter, in a process of its own:

    TRITON_INTERPRET=1 pytest tests/rollouts/test_gpu.py
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, VOCABULARY
from peft import LoraConfig, get_peft_model
from test_cpu import assert_drawn
from test_engine import EXPLICIT, LATENT, arguments, assert_same, make
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from rl_soft.model import head_triton as kernels
from rl_soft.model import policy
from rl_soft.rollouts import cache
from rl_soft.rollouts import engine as engine
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import gpu as gpu_kernels
from rl_soft.rollouts.kernels import gpu_sampling, layers, sampling
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import gumbel

triton = pytest.importorskip(
    "triton", reason="triton is not installed; it comes with torch for GPUs, and takes 1 GB by itself"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = kernels.usable(torch.empty(1, device=DEVICE))
needs_kernels = pytest.mark.skipif(not RUNS, reason="no GPU, and not in Triton's interpreter (TRITON_INTERPRET=1)")
# Of a number: the interpreter cuts bfloat16 off, a GPU rounds to the nearest.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-6 if kernels.INTERPRETED else 2**-8}
DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """In the interpreter, so that tiny tensors have several. On a GPU no graphs, which replay without calling us."""
    if kernels.INTERPRETED:
        monkeypatch.setattr(gpu_sampling, "_BLOCK", 64)
        monkeypatch.setattr(gpu_kernels, "_SPLIT", 32)
        monkeypatch.setattr(gpu_kernels, "_COLUMNS", 16)
    monkeypatch.setattr(engine, "GRAIN", {})
    monkeypatch.setattr(layers, "_judged", type(layers._judged)())


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found, expected, dtype, roundings=1) -> None:
    assert found.dtype == dtype
    scale = expected.double().abs().amax()
    assert (found.double() - expected.double()).abs().amax() <= roundings * ROUNDING[dtype] * scale


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a layer


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [16, 24, 100])
@torch.no_grad()
def test_rms_norm(H, dtype):
    norm = Qwen3RMSNorm(H, eps=1e-5).to(DEVICE, dtype)
    norm.weight.copy_(random(H, seed=3))
    x, residual = random(3, 2, H, dtype=dtype), random(3, 2, H, dtype=dtype, seed=1)
    y, same = gpu_kernels.rms_norm(x, norm)
    close(y, norm(x), dtype)
    assert same is x
    y, total = gpu_kernels.rms_norm(x, norm, residual)
    close(total, x + residual, dtype)
    close(y, norm(total), dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("Q", "A", "D"), [(1, 1, 8), (6, 2, 16), (3, 3, 24)])
@torch.no_grad()
def test_heads(Q, A, D, normed, dtype):
    q, k = random(2, 3, Q, D, dtype=dtype), random(2, 3, A, D, dtype=dtype, seed=1)
    angle = 5 * random(1, 3, D // 2, seed=2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = [Qwen3RMSNorm(D, eps=1e-6).to(DEVICE, dtype) if normed else None for _ in range(2)]
    for i, norm in enumerate(norms):
        None if norm is None else norm.weight.copy_(random(D, seed=i))
    found = gpu_kernels.finish_heads(q, k, *norms, cos, sin)
    turned = [(x if norm is None else norm(x)).transpose(1, 2) for x, norm in zip((q, k), norms, strict=True)]
    for ours, theirs in zip(found, apply_rotary_pos_emb(*turned, cos, sin), strict=True):
        close(ours, theirs.transpose(1, 2), dtype, roundings=3)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype):
    gate, up = 30 * random(3, 1, 700, dtype=dtype), random(3, 1, 700, dtype=dtype, seed=1)
    gate[0, 0, :2] = torch.tensor([-1e4, 1e4])
    close(gpu_kernels.gated(gate, up), F.silu(gate) * up, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 33, 100, *([1000] * (not kernels.INTERPRETED))])
@pytest.mark.parametrize(("A", "G", "D"), [(1, 1, 16), (2, 3, 24), (3, 20, 8), (2, 6, 128), (1, 4, 256)])
@torch.no_grad()
def test_attention(columns, A, G, D, dtype):
    """Left-padded rows, holes, whole stretches that are not seen, and views of a larger buffer."""
    n, H = 3, A * G
    buffers = random(2, n, A, columns + 9, D, dtype=dtype)
    buffers[:, :, :, columns:] = torch.nan
    k, v = buffers[:, :, :, :columns]
    q = random(n, 1, H, D, dtype=dtype, seed=1).transpose(1, 2)
    seen = random(n, 1, 1, columns) > -1
    seen[0, ..., : columns // 2], seen[1, ..., : columns - 1], seen[..., -1] = False, False, True
    k[0, :, : columns // 2], v[0, :, : columns // 2] = torch.nan, torch.nan  # what is not seen is not read
    refuse = pytest.fail
    for mask, rows in ((seen, slice(0, 3)), (None, slice(1, 3))):
        q_, k_, v_, mask_ = q[rows], k[rows], v[rows], None if mask is None else mask[rows]
        out, _ = gpu_kernels._attention(refuse, nn.Module(), q_, k_, v_, mask_, scaling=0.3)
        k64, v64 = (x.double().nan_to_num().repeat_interleave(G, 1) for x in (k_, v_))
        exact = F.scaled_dot_product_attention(q_.double(), k64, v64, attn_mask=mask_, scale=0.3)
        close(out, exact.transpose(1, 2), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "V", "K"),
    [(1, 8, 8), (3, 61, 1), (4, 300, 8), (2, 130, 64), *([(64, 151936, 8)] * (not kernels.INTERPRETED))],
)
def test_a_draw(m, V, K, dtype):
    """Noise and top-K are those of `noise.gumbel`, the distribution's figures those of float64."""
    logits = 5 * random(m, V, dtype=dtype)
    logits[0, : V // 2] = -torch.inf
    before, seeds, step = logits.clone(), torch.arange(m, device=DEVICE) * 7, torch.arange(m, device=DEVICE)
    temperature = torch.linspace(0.6, 1.4, m, device=DEVICE)
    drawn = sampling.draw(logits, temperature, K, seeds, step)
    assert_drawn(drawn, before, temperature, K, seeds, step)
    assert all(len(set(ids)) == K for ids in drawn.support.tolist())  # also where nothing is left to draw
    assert torch.equal(logits, before)


@needs_kernels
def test_the_noise_of_a_draw():
    """On flat logits, all ids of some addresses: the values are the noise."""
    n, V = (512 if torch.cuda.is_available() else 8), 64
    seeds = torch.arange(n, device=DEVICE)
    drawn = sampling.draw(torch.zeros(n, V, device=DEVICE), torch.ones(n, device=DEVICE), V, seeds, 3)
    noise = gumbel(seeds, 3, V)
    off = (drawn.values.gather(-1, drawn.support.argsort()) - noise).abs()
    assert (off / noise.abs().clamp(min=1)).max() < 1e-6


@needs_kernels
def test_a_draw_from_peaks_and_from_what_is_not_finite():
    logits = torch.zeros(5, 80, device=DEVICE)
    logits[0, 3] = 200.0  # nothing is left outside in float32
    logits[1, 3], logits[2, 75], logits[3] = torch.nan, torch.inf, -torch.inf
    drawn = sampling.draw(logits, torch.ones(5, device=DEVICE), 2, torch.arange(5, device=DEVICE), 0)
    assert drawn.entropy[[0, 4]].isfinite().all() and drawn.entropy[1:4].isnan().all()
    outside = drawn.log_outside(torch.full((5, 1), 3, device=DEVICE))[0]
    assert outside.item() == pytest.approx(-200 + torch.tensor(79.0).log().item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


def counted(monkeypatch) -> dict[str, int]:
    """How often each of the kernels' callers is called."""
    calls: dict[str, int] = {}
    for name in ("rms_norm", "finish_heads", "gated", "_attention", "draw"):
        module = gpu_sampling if name == "draw" else gpu_kernels
        inner = getattr(module, name)

        def call(*args, name=name, inner=inner, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
    return calls


def without(monkeypatch, given):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", lambda logits: False)
        patch.setattr(sampling, "draw", lambda *args: None)
        return rollout(*given)


@needs_kernels
@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True),
        ("gpt2", False), ("granite", False), ("gemma2", False),
    ],
)  # fmt: skip
def test_a_rollout_is_the_same_with_them(kind, taken, monkeypatch):
    thinking = replace(EXPLICIT, num_thoughts=4, max_answer_tokens=1)
    if kind == "qwen3":
        made = policy.make({**TINY, "model_type": kind, "head_dim": 24, "num_key_value_heads": 1}, VOCABULARY, 0)
        made.model.eval().get_input_embeddings().weight.data.mul_(4)
        layout = Layout(thinking, made.tokenizer)
    else:
        made, layout = make(kind, thinking)
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            p.add_(torch.randn_like(p) * 0.1) if "norm" in name or "bias" in name else None
    made.model.to(DEVICE)
    given = arguments(made, layout, samples=1)
    calls = counted(monkeypatch)
    assert_same(rollout(*given, token_budget=60), without(monkeypatch, given), atol=1e-4)
    assert calls["draw"] > 3
    assert (calls.get("rms_norm", 0) > 20) == taken
    assert not [m for m in made.model.modules() if "forward" in vars(m)]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_called(dtype, monkeypatch):
    """A float32 adapter, whatever the model."""
    made, layout = make("llama", LATENT)
    made.model.to(dtype)
    made.model = get_peft_model(made.model, LoraConfig(r=4, target_modules="all-linear")).to(DEVICE).eval()
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            p.add_(torch.randn_like(p) * 0.05) if "lora_B" in name else None
    given, calls = arguments(made, layout, samples=1), counted(monkeypatch)
    found, expected = rollout(*given), without(monkeypatch, given)
    assert calls["gated"] > 10
    if dtype == torch.float32:
        assert_same(found, expected, atol=1e-4)
    else:  # of the first position, before rounding has changed what is sampled
        assert (found.entropy - expected.entropy)[:, 0].abs().max() < 0.05


@needs_kernels
def test_half_precision(monkeypatch):
    """Log-densities are as near to float32's as with transformers' operations."""
    made, layout = make("llama", replace(LATENT, num_thoughts=1, max_answer_tokens=1))
    made.model.to(DEVICE)
    exact = without(monkeypatch, arguments(made, layout))
    made.model.bfloat16()
    given, calls = arguments(made, layout), counted(monkeypatch)
    found, plain = rollout(*given), without(monkeypatch, given)
    assert calls["gated"] > 1
    same = (found.support == exact.support).all(-1) & (plain.support == exact.support).all(-1) & exact.thought_mask
    assert same.sum() > 6
    off, off_plain = ((x.log_probs - exact.log_probs)[same].abs().mean() for x in (found, plain))
    assert off < 2 * off_plain + 1e-3


@needs_kernels
def test_a_layer_that_does_not_agree_keeps_its_operations(monkeypatch):
    made, layout = make("llama", LATENT)
    made.model.to(DEVICE)
    given = arguments(made, layout, samples=1)
    expected, inner = without(monkeypatch, given), gpu_kernels.gated
    monkeypatch.setattr(gpu_kernels, "gated", lambda gate, up: 1.1 * inner(gate, up))
    assert_same(rollout(*given), expected, atol=1e-4)
    assert [list(of.values()) for of in layers._judged.values()] == [[False]] * 2


@needs_kernels
def test_a_layer_whose_kernels_fail_keeps_its_operations(monkeypatch, caplog):
    made, layout = make("llama", replace(LATENT, num_thoughts=1, max_answer_tokens=1))
    made.model.to(DEVICE)
    given = arguments(made, layout, samples=1)
    expected = without(monkeypatch, given)
    monkeypatch.setattr(gpu_kernels, "_gated_kernel", None)
    with caplog.at_level("WARNING", "rl_soft"):
        assert_same(rollout(*given), expected, atol=1e-4)
    assert "a layer keeps its own operations, Triton's kernels fail" in caplog.text


@needs_kernels
def test_kernels_that_fail_or_are_wrong_are_not_taken(monkeypatch, caplog):
    gpu_kernels._works.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "rl_soft"):
        patch.setattr(gpu_kernels, "_merge_kernel", None)
        assert not gpu_kernels.usable(torch.zeros(1, device=DEVICE)) and "Triton's kernels fail" in caplog.text
        made, layout = make("llama", LATENT)
        made.model.to(DEVICE)
        given, calls = arguments(made, layout, samples=1), counted(patch)
        assert_same(rollout(*given), without(patch, given), atol=1e-4)
        assert set(calls) <= {"_attention"}  # which hands on
    gpu_kernels._works.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "rl_soft"):
        patch.setattr(gpu_kernels.noise, "gumbel", lambda *args: gumbel(*args).flip(-1))
        assert not gpu_kernels.usable(torch.zeros(1, device=DEVICE)) and "give other results" in caplog.text
    gpu_kernels._works.cache_clear()
    assert gpu_kernels.usable(torch.zeros(1, device=DEVICE))
    assert not gpu_kernels.usable(torch.zeros(1, device=DEVICE, dtype=torch.float64))


@needs_kernels
@pytest.mark.parametrize("budget", [None, 80])
def test_shapes_of_a_gpu_change_nothing(budget, monkeypatch):
    """Columns in grains, rows that stay after they are done, columns renumbered early."""
    for name, value in {"GRAIN": 16, "CHUNK": 32, "LOOK_EVERY": 5, "IDLE": 0.5}.items():
        monkeypatch.setattr(engine, name, {DEVICE: value})
    monkeypatch.setattr(cache, "RENUMBER", 16)
    made, layout = make("llama", replace(EXPLICIT, num_thoughts=8))
    made.model.to(DEVICE)
    given = arguments(made, layout, samples=1)
    assert_same(rollout(*given, token_budget=budget), without(monkeypatch, given), atol=1e-4)


@needs_kernels
def test_training_and_autocast_take_pytorchs_operations(monkeypatch):
    made, _ = make("llama", LATENT)
    made.model.to(DEVICE)
    calls, sdpa = counted(monkeypatch), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with gpu_kernels.gpu_kernels(made.model):
        made.model(torch.tensor([[5, 6, 7]], device=DEVICE)).logits.sum().backward()
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad(), gpu_kernels.gpu_kernels(made.model):
        past = made.model(torch.tensor([[5, 6, 7]], device=DEVICE), use_cache=True).past_key_values
        made.model(torch.tensor([[8]], device=DEVICE), past_key_values=past)
    with pytest.raises(KeyError), gpu_kernels.gpu_kernels(made.model):
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa
    assert set(calls) <= {"_attention"}  # which hands on what has gradients


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/rollouts/test_gpu.py"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=900, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


KERNELS = {  # of Qwen2.5-1.5B: constants, and what is no pointer to the logits' dtype
    "_rms_norm_kernel": ({"H": 1536, "ADD": True, "BLOCK": 2048}, {"eps": "fp32"}),
    "_heads_kernel": (
        {"Q": 12, "A": 2, "HALF": 64, "NORMED": True, "Q_BLOCK": 16, "A_BLOCK": 2, "HALF_BLOCK": 64},
        {"q_eps": "fp32", "k_eps": "fp32"},
    ),
    "_gated_kernel": ({"BLOCK": 1024}, {"count": "i32"}),
    "_attend_kernel": (
        {"A": 2, "G": 6, "D": 128, "MASKED": True, "G_BLOCK": 16, "D_BLOCK": 128, "SPLIT": 256, "COLUMNS": 32,
         "INTERPRETED": False},
        {"seen": "*i1", "means": "*fp32", "masses": "*fp32", "C": "i32", "row_stride": "i32", "head_stride": "i32",
         "scale": "fp32"},
    ),
    "_merge_kernel": (
        {"D": 128, "D_BLOCK": 128, "SPLITS": 8}, {"means": "*fp32", "masses": "*fp32", "splits": "i32"}
    ),
    "_draw_kernel": (
        {"V": 151936, "K": 8, "BLOCK": 4096},
        {"stride": "i32", "temperatures": "*fp32", "seeds": "*i64", "steps": "*i64", "hashes": "*i32",
         "values": "*fp32", "ids": "*i32", "sums": "*fp32", "count": "i32"},
    ),
    "_outside_kernel": (
        {"V": 151936, "K": 8, "BLOCK": 4096},
        {"stride": "i32", "temperatures": "*fp32", "ids": "*i64", "parts": "*fp32"},
    ),
    "_best_kernel": (
        {"K": 8, "COUNT": 304, "BLOCKS": 38, "WIDE": 512, "BLOCKS_WIDE": 64},
        {"stride": "i32", "temperatures": "*fp32", "seeds": "*i64", "steps": "*i64", "hashes": "*i32",
         "values": "*fp32", "ids": "*i32", "sums": "*fp32", "count": "i32", "found": "*fp32", "support": "*i64",
         "tops": "*fp32", "totals": "*fp32", "dots": "*fp32"},
    ),
}  # fmt: skip


@pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, capability, dtype):
    """For an A100 and an H100, without either, as they are launched; the widest heads fit a smaller card, too."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (constants, types) = getattr(gpu_kernels, name, None) or getattr(gpu_sampling, name), KERNELS[name]
    signature = {n: "constexpr" if n in constants else types.get(n, dtype) for n in kernel.arg_names}
    options = {"num_warps": 8 if name in ("_rms_norm_kernel", "_draw_kernel", "_outside_kernel") else 4}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    if name == "_attend_kernel":
        options["num_stages"] = 2
    for more in ({}, {"D": 256, "D_BLOCK": 256}, {"D": 64, "D_BLOCK": 64}) if "G" in constants else ({},):
        source = ASTSource(kernel, signature, constexprs=constants | more, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024  # bytes, of which a program may have so many on sm_86 and sm_89
