"""The kernels of the KL divergence against float64 and PyTorch's operations.

On a GPU (`pytest -m gpu`) they run compiled. Without one they run in Triton's interpreter, in a process of its own:

    TRITON_INTERPRET=1 pytest tests/model/test_kl_triton.py
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from rl_soft.model import head_triton as kernels
from rl_soft.model import kl_triton
from rl_soft.model.kl import categorical_kl

triton = pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = kernels.usable(torch.empty(1, device=DEVICE))
skip = pytest.mark.skipif(not RUNS, reason="no GPU, and not in Triton's interpreter (TRITON_INTERPRET=1)")
N, H, V = 5, 16, 211


def needs_kernels(test):
    """On a GPU, by `pytest -m gpu`; or in the interpreter."""
    return pytest.mark.gpu(skip(test))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if kernels.INTERPRETED:
        monkeypatch.setattr(kernels, "_BLOCK", 64)


def exact(logits, ref_logits, temperature, softcap):
    """KL and its gradient to the raw logits, in float64 by autograd."""
    logits = logits.double().requires_grad_()

    def log_softmax(x):
        x = x if softcap is None else softcap * (x / softcap).tanh()
        return (x / temperature.double()).log_softmax(-1)

    log_p = log_softmax(logits)
    kl = (log_p.exp() * (log_p - log_softmax(ref_logits.double()))).sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum(), logits)[0]


@needs_kernels
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("apart", [1e-4, 0.03, 1.0, 20.0])
def test_equals_float64(softcap, apart):
    """Also of policies that have hardly moved, whose divergence is far below float32's rounding of its terms."""
    generator = torch.Generator().manual_seed(0)
    ref = 3 * torch.randn(N, V, generator=generator).to(DEVICE)
    logits = ref + apart * torch.randn(N, V, generator=generator).to(DEVICE)
    temperature = torch.linspace(0.6, 1.4, N, device=DEVICE)[:, None]
    kl, grad = exact(logits, ref, temperature, softcap)
    found = kl_triton.divergence(logits, ref, temperature, softcap)
    torch.testing.assert_close(found[0].double(), kl, rtol=1e-3 if apart < 1e-2 else 1e-4, atol=1e-11)
    scale = torch.linspace(0.5, 2, N, device=DEVICE)
    ours = kl_triton.gradient(logits.clone(), ref, temperature, softcap, found, scale, torch.float32)
    expected = grad * scale[:, None]
    rounding = 2e-5 / apart + 1e-4  # a logit of 10 is rounded to 1e-6, and the gradient is of the size of `apart`
    small = 1e-4 * (apart >= 1)  # rows whose policy is certain have next to no gradient
    assert ((ours - expected).norm(dim=-1) <= rounding * expected.norm(dim=-1) + small).all()


@needs_kernels
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_of_heads_is_that_of_the_operations(monkeypatch, trained, dtype):
    torch.manual_seed(0)
    head, ref = (nn.Linear(H, V).to(DEVICE, dtype).requires_grad_(trained) for _ in range(2))
    hidden, ref_hidden = (3 * torch.randn(N, H).to(DEVICE, dtype) for _ in range(2))
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(kernels, "usable", lambda logits: False)
        states = hidden.clone().requires_grad_()
        head.weight.grad = None
        kl = categorical_kl(states, head, ref_hidden, ref, 0.8, chunk_size=2, softcap=20.0)
        (kl * torch.arange(1, N + 1, device=DEVICE)).sum().backward()
        results.append((kl.detach(), states.grad, head.weight.grad))
    for a, b in zip(*results, strict=True):
        if a is not None:
            assert (a - b).float().norm() <= (1e-5 if dtype == torch.float32 else 2**-7) * b.float().norm()


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/model/test_kl_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, timeout=900, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_divergence_kernel", "_gradient_kernel"])
def test_compiles(name, capability):
    """For an A100 and an H100, without either."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = getattr(kl_triton, name), {"V": 151936, "HAS_SOFTCAP": True, "BLOCK": 4096}
    types = {"stride": "i32", "ref_stride": "i32", "out_stride": "i32", "softcap": "fp32", "out": "*bf16"}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
