"""The sampling kernels of a GPU against float64 and PyTorch's operations; a rollout is the same with them.

On a GPU they run compiled. Without one they run in Triton's interpreter, in a process of its own:

    TRITON_INTERPRET=1 pytest tests/rollouts/test_gpu_sampling.py
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_cpu import assert_drawn
from test_engine import EXPLICIT, LATENT, arguments, assert_same, make

from rl_soft.model import head_triton as kernels
from rl_soft.rollouts import cache
from rl_soft.rollouts import engine as engine
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import gpu_sampling, sampling
from rl_soft.thoughts.noise import gumbel

triton = pytest.importorskip(
    "triton", reason="triton is not installed; it comes with torch for GPUs, and takes 1 GB by itself"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = kernels.usable(torch.empty(1, device=DEVICE))
skip = pytest.mark.skipif(not RUNS, reason="no GPU, and not in Triton's interpreter (TRITON_INTERPRET=1)")


def needs_kernels(test):
    """On a GPU, by `pytest -m gpu`; or in the interpreter."""
    return pytest.mark.gpu(skip(test))


# Of a number: the interpreter cuts bfloat16 off, a GPU rounds to the nearest.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-6 if kernels.INTERPRETED else 2**-8}
DTYPES = list(ROUNDING)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """In the interpreter, so that tiny tensors have several. On a GPU no graphs, which replay without calling us."""
    if kernels.INTERPRETED:
        monkeypatch.setattr(gpu_sampling, "_BLOCK", 64)
    monkeypatch.setattr(engine, "GRAIN", {})


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a layer


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


def counted(monkeypatch) -> list[int]:
    """One entry per call of the kernel that draws."""
    calls, inner = [], gpu_sampling.draw

    def call(*args):
        calls.append(1)
        return inner(*args)

    monkeypatch.setattr(gpu_sampling, "draw", call)
    return calls


def without(monkeypatch, given):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", lambda logits: False)
        patch.setattr(sampling, "draw", lambda *args: None)
        return rollout(*given)


@needs_kernels
@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite", "gemma2"])
def test_a_rollout_is_the_same_with_them(kind, monkeypatch):
    made, layout = make(kind, replace(EXPLICIT, num_thoughts=4, max_answer_tokens=1))
    made.model.to(DEVICE)
    given = arguments(made, layout, samples=1)
    calls = counted(monkeypatch)
    assert_same(rollout(*given, token_budget=60), without(monkeypatch, given), atol=1e-4)
    assert len(calls) > 3


@needs_kernels
def test_kernels_that_fail_or_are_wrong_are_not_taken(monkeypatch, caplog):
    logits = torch.zeros(1, device=DEVICE)
    gpu_sampling._works.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "rl_soft"):
        patch.setattr(gpu_sampling, "_best_kernel", None)
        assert not gpu_sampling.usable(logits) and "Triton's kernels fail" in caplog.text
        made, layout = make("llama", LATENT)
        made.model.to(DEVICE)
        given, calls = arguments(made, layout, samples=1), counted(patch)
        assert_same(rollout(*given), without(patch, given), atol=1e-4)
        assert not calls
    gpu_sampling._works.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "rl_soft"):
        patch.setattr(gpu_sampling.noise, "gumbel", lambda *args: gumbel(*args).flip(-1))
        assert not gpu_sampling.usable(logits) and "give other results" in caplog.text
    gpu_sampling._works.cache_clear()
    assert gpu_sampling.usable(logits)


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


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/rollouts/test_gpu_sampling.py"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=900, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


KERNELS = {  # of Qwen2.5-1.5B: constants, and what is no pointer to the logits' dtype
    "_draw_kernel": (
        {"V": 151936, "K": 8, "BLOCK": 4096},
        {"stride": "i32", "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "hashes": "*i32",
         "values": "*fp32", "ids": "*i32", "sums": "*fp32", "count": "i32"},
    ),
    "_outside_kernel": (
        {"V": 151936, "K": 8, "BLOCK": 4096},
        {"stride": "i32", "temperatures": "*fp32", "ids": "*i64", "parts": "*fp32"},
    ),
    "_best_kernel": (
        {"K": 8, "COUNT": 304, "BLOCKS": 38, "WIDE": 512, "BLOCKS_WIDE": 64},
        {"stride": "i32", "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "hashes": "*i32",
         "values": "*fp32", "ids": "*i32", "sums": "*fp32", "count": "i32", "found": "*fp32", "support": "*i64",
         "tops": "*fp32", "totals": "*fp32", "dots": "*fp32"},
    ),
}  # fmt: skip


@pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, capability, dtype):
    """For an A100 and an H100, without either, as they are launched (and within a smaller card's memory)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (constants, types) = getattr(gpu_sampling, name), KERNELS[name]
    signature = {n: "constexpr" if n in constants else types.get(n, dtype) for n in kernel.arg_names}
    options = {"num_warps": 8 if name in ("_draw_kernel", "_outside_kernel") else 4}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024  # bytes, of which a program may have so many on sm_86 and sm_89
