"""The Triton kernels against float64 and against the passes in torch that they stand for.

On a GPU they run compiled. Without one they run in Triton's interpreter, in a process of its own:

    TRITON_INTERPRET=1 pytest tests/model/test_head_triton.py
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from rl_soft.model import head
from rl_soft.model import head_triton as kernels
from rl_soft.thoughts import densities

triton = pytest.importorskip(
    "triton", reason="triton is not installed; it comes with torch for GPUs, and takes 1 GB by itself"
)

INF = float("inf")
C, V = 5, 211  # four blocks, the last one of 19
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = kernels.usable(torch.empty(1, device=DEVICE))
BF16 = 2**-7 if kernels.INTERPRETED else 2**-8  # the interpreter truncates, a GPU rounds to the nearest
skip = pytest.mark.skipif(not RUNS, reason="no GPU, and not in Triton's interpreter (TRITON_INTERPRET=1)")


def needs_kernels(test):
    """On a GPU, by `pytest -m gpu`; or in the interpreter."""
    return pytest.mark.gpu(skip(test))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 64)


def problem(k, dtype, peak=0.0, seed=0):
    """(raw logits, support, temperature): the first id of each row stands out by `peak`, slots are absent, row 4 is
    padding."""
    generator = torch.Generator().manual_seed(seed)
    raw = 3 * torch.randn(C, V, generator=generator)
    support = torch.stack([torch.randperm(V, generator=generator)[:k] for _ in range(C)])
    raw.scatter_add_(-1, support[:, :1], torch.full((C, 1), peak))
    if 1 < k < V:
        support[2, k // 2 :] = -1
        support[3, 1:] = -1
        support[4] = -1
    temperature = torch.linspace(0.7, 1.3, C).unsqueeze(-1)
    return raw.to(DEVICE, dtype), support.to(DEVICE), temperature.to(DEVICE)


def gradients(k, which, seed=1):
    """Of the three statistics; None where one is not asked for."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((C, k), (C,), (C,))]
    return [g if wanted else None for g, wanted in zip(made, which, strict=True)]


def exact(raw, support, temperature, softcap, grads):
    """The statistics and the gradient to the raw logits, in float64 by autograd."""
    raw = raw.double().requires_grad_()
    x = raw if softcap is None else softcap * (raw / softcap).tanh()
    x = x / temperature.double()
    stats = (*densities.gather_statistics(x, support, support >= 0), densities.entropy(x))
    loss = sum((s.masked_fill(s == -INF, 0) * g).sum() for s, g in zip(stats, grads, strict=True) if g is not None)
    return [s.detach() for s in stats], torch.autograd.grad(loss, raw)[0]


def ours(raw, support, temperature, softcap, grads):
    """The same by `head`: by the kernels where they are usable, else by its passes in torch."""
    ids, present = densities.fill_absent(support, support >= 0)
    fused = kernels.usable(raw)
    logits = raw.clone() if fused else head.tempered(raw.float(), temperature, softcap)
    before = logits.clone()
    args = (logits, ids, present, temperature, softcap)
    stats = head._statistics(*args)
    assert logits.equal(before)
    kept = head._grad_logits(*args, stats, grads, raw.dtype, keep_logits=True)
    assert logits.equal(before)
    d = head._grad_logits(*args, stats, grads, raw.dtype)
    assert d.equal(kept)
    if fused:
        assert d.data_ptr() == logits.data_ptr() and d.dtype == raw.dtype
    return stats[:3], d


def assert_close(ours, theirs, support, rtol, rounding=0.0):
    """Statistics elementwise; gradients by row, apart on the support and off it, since one can hide the other."""
    (stats, d), (expected, grad) = ours, theirs
    for a, b in zip(stats, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)
    on = torch.zeros_like(grad, dtype=torch.bool).scatter_(-1, densities.fill_absent(support, support >= 0)[0], True)
    for part in (on, ~on):
        a, b = d.double() * part, grad * part
        assert ((a - b).norm(dim=-1) <= (5 * rtol + rounding) * b.norm(dim=-1) + rounding**2).all()


@needs_kernels
@pytest.mark.parametrize("which", [(1, 1, 1), (1, 1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 1)])
@pytest.mark.parametrize(("k", "softcap"), [(1, None), (6, None), (6, 8.0), (64, 8.0), (64, None)])
def test_equals_float64(k, softcap, which):
    args = (*problem(k, torch.float32), softcap, gradients(k, which))
    assert_close(ours(*args), exact(*args), args[1], 2e-5)


@needs_kernels
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_nothing_outside(softcap):
    """K = V: no mass outside, and its gradients do not reach the logits."""
    raw, support, temperature = problem(V, torch.float32)
    args = (raw, support, temperature, softcap, gradients(V, (1, 0, 1)))
    stats, d = ours(*args)
    assert (stats[1] == -INF).all()
    assert_close((stats, d), exact(*args), support, 2e-5)
    with_outside = ours(*args[:-1], gradients(V, (1, 1, 1)))[1]
    assert with_outside.isfinite().all()


@needs_kernels
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, BF16), (torch.float16, 2**-11)])
@pytest.mark.parametrize("softcap", [None, 8.0])
def test_half_precision_is_read_without_further_rounding(dtype, rounding, softcap):
    """Statistics are float32's of the same rounded logits; only the gradient is rounded, once."""
    args = (*problem(6, dtype), softcap, gradients(6, (1, 1, 1)))
    assert_close(ours(*args), exact(*args), args[1], 2e-5, rounding)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [25.0, 60.0, 160.0])  # all but 1e-7 of the mass on one id, and much more
def test_a_peaked_policy_keeps_q(peak, dtype):
    """Off the support the gradient hangs on q alone, whose scale the peak must not touch."""
    args = (*problem(6, dtype, peak), None, gradients(6, (1, 1, 0)))
    stats, grad = exact(*args)
    assert (1 - stats[0][0, 0].exp()) < 1e-7 and grad[0].abs().amax() > 0.01
    rounding = BF16 if dtype == torch.bfloat16 else 0.0
    assert_close(ours(*args), (stats, grad), args[1], 1e-6 * peak + 1e-5, rounding)


@needs_kernels
def test_equals_the_passes_in_torch(monkeypatch):
    for dtype, k, softcap in itertools.product([torch.float32, torch.bfloat16], [1, 6, V], [None, 8.0]):
        args = (*problem(k, dtype), softcap, gradients(k, (1, k < V, 1)))
        fused = ours(*args)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "usable", lambda logits: False)
            stats, d = ours(*args)
        assert_close(fused, ([s.double() for s in stats], d.double()), args[1], 1e-5, BF16 * (dtype != torch.float32))


@needs_kernels
@pytest.mark.parametrize("block", [16, 256])
def test_blocks_change_nothing(block, monkeypatch):
    args = (*problem(6, torch.float32), 8.0, gradients(6, (1, 1, 1)))
    expected = ours(*args)
    monkeypatch.setattr(kernels, "_BLOCK", block)
    stats, d = ours(*args)
    for a, b in zip((*stats, d), (*expected[0], expected[1]), strict=True):
        torch.testing.assert_close(a, b)


@needs_kernels
def test_logits_of_minus_infinity_have_no_mass_and_no_gradient():
    """Also where they fill the first block, before there is a largest logit."""
    raw, support, temperature = problem(6, torch.float32)
    raw[:, :70] = -INF
    raw.scatter_(-1, densities.fill_absent(support, support >= 0)[0], 1.0)
    grads = gradients(6, (1, 1, 0))
    for softcap in (None, 8.0):
        stats, d = ours(raw, support, temperature, softcap, gradients(6, (1, 1, 1)))
        assert stats[1].isfinite().all() and stats[2].isfinite().all()
        assert d.isfinite().all() and (d[raw == -INF] == 0).all()
    (log_probs, log_outside, _), d = ours(raw, support, temperature, None, grads)
    (*expected, _), grad = exact(raw, support, temperature, None, grads)
    assert_close(((log_probs, log_outside), d), (expected, grad), support, 2e-5)


@needs_kernels
@pytest.mark.parametrize("trained", [False, True])
def test_a_bfloat16_head_is_that_of_the_passes_in_torch(trained, monkeypatch):
    """Log-densities, entropies and gradients, by chunks of two rows."""
    torch.manual_seed(0)
    lm_head = nn.Linear(16, V, bias=True).to(DEVICE, torch.bfloat16).requires_grad_(trained)
    hidden = (3 * torch.randn(C, 16)).to(DEVICE, torch.bfloat16).requires_grad_()
    support = problem(6, torch.bfloat16)[1]
    log_weights = (
        torch.zeros(C, 6, device=DEVICE).masked_fill(support < 0, -INF).log_softmax(-1).nan_to_num(-INF, neginf=-INF)
    )
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(kernels, "usable", lambda logits: False)
        hidden.grad = lm_head.weight.grad = lm_head.bias.grad = None
        temperature = torch.tensor(0.8, device=DEVICE)
        log_prob, entropy = head.soft_log_prob(
            hidden, lm_head, support, log_weights, 0.5, temperature, chunk_size=2, softcap=20.0
        )
        (log_prob.sum() + entropy[:4].sum()).backward()
        grads = [hidden.grad, lm_head.weight.grad, lm_head.bias.grad]
        results.append([log_prob.detach(), entropy.detach(), *(g for g in grads if g is not None)])
    torch.testing.assert_close(results[0][:2], results[1][:2])
    for a, b in zip(*(r[2:] for r in results), strict=True):
        assert (a - b).norm() <= BF16 * b.norm()


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
@pytest.mark.parametrize("file", ["test_head_triton.py", pytest.param("test_head.py", marks=pytest.mark.slow)])
def test_in_the_interpreter(file):
    """All of this file, and `test_head.py` with the kernels underneath."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/model/{file}"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=900, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("logits", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability, logits):
    """For an A100 and an H100, without either."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"logits": logits, "out": logits, "stride": "i32", "out_stride": "i32", "softcap": "fp32"}
    constants = {"V": 151936, "HAS_SOFTCAP": True, "BLOCK": 4096}
    for kernel in (kernels._complement_kernel, kernels._gradient_kernel):
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
