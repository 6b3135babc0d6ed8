"""Rules and records in one kernel: a whole rollout by it is that of PyTorch's operations.

On a GPU (`pytest -m gpu`) it runs compiled. Without one it runs in Triton's interpreter, in a process of its own:

    TRITON_INTERPRET=1 pytest tests/rollouts/test_gpu_rules.py
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_engine import EXPLICIT, LATENT, arguments, assert_same, make

from rl_soft.model import head_triton as kernels
from rl_soft.rollouts import engine
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import gpu_rules, gpu_sampling

triton = pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = kernels.usable(torch.empty(1, device=DEVICE))
skip = pytest.mark.skipif(not RUNS, reason="no GPU, and not in Triton's interpreter (TRITON_INTERPRET=1)")


def needs_kernels(test):
    """On a GPU, by `pytest -m gpu`; or in the interpreter."""
    return pytest.mark.gpu(skip(test))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if kernels.INTERPRETED:
        monkeypatch.setattr(gpu_sampling, "_BLOCK", 16)
    monkeypatch.setattr(engine, "GRAIN", {})


@pytest.fixture
def calls(monkeypatch):
    made, inner = [], gpu_rules.sample
    monkeypatch.setattr(gpu_rules, "sample", lambda *args: made.append(1) or inner(*args))
    return made


def few(made, layout):
    """Arguments of a rollout of three rows."""
    model, layout, prompts, seeds, *more = arguments(made, layout, samples=1)
    return [model, layout, prompts[:3], seeds[:3], *more]


def by_operations(given):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_rules, "takes", lambda rules, logits: False)
        return rollout(*given)


SHORT = replace(EXPLICIT, num_thoughts=5, max_answer_tokens=3)
CASES = {
    "explicit": SHORT,
    "one slot": replace(SHORT, thought_k=1),
    "seven slots": replace(SHORT, thought_k=7, thought_tau=0.2),
    "token": replace(SHORT, thought="token"),
    "an answer prompt": replace(SHORT, answer_prompt="=#", thought_temperature=0.6),
    "latent": replace(LATENT, thought_temperature=1.3),
    "no thoughts": replace(LATENT, num_thoughts=0),
}


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_a_rollout_is_that_of_the_operations(calls, case):
    made, layout = make("llama", CASES[case])
    made.model.to(DEVICE)
    given = few(made, layout)
    expected = by_operations(given)
    assert not calls
    assert_same(rollout(*given), expected, atol=1e-4)
    assert len(calls) > 2


@needs_kernels
def test_rows_that_are_not_finite_stop(calls):
    made, layout = make("llama", SHORT)
    head = made.model.to(DEVICE).get_output_embeddings()
    with torch.no_grad():
        head.weight[7] = torch.nan
    given = few(made, layout)
    expected, found = by_operations(given), rollout(*given)
    assert calls and found.failed.all()
    assert_same(found, expected)


@needs_kernels
def test_the_logits_may_rule_slots_out(calls):
    """Fewer ids are left than there are slots: the others are absent."""
    made, layout = make("llama", replace(SHORT, thought_k=6))
    head = made.model.to(DEVICE).get_output_embeddings()
    keep = torch.tensor([6, 7, 8], device=DEVICE)
    hook = head.register_forward_hook(
        lambda _, args, out: torch.full_like(out, -torch.inf).index_copy(-1, keep, out.index_select(-1, keep))
    )
    given = few(made, layout)
    expected, found = by_operations(given), rollout(*given)
    hook.remove()
    assert calls and (found.log_weights[found.thought_mask] == -torch.inf).any()
    assert_same(found, expected, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("how", ["fails", "differs"])
def test_a_kernel_that_fails_or_differs_is_not_taken(monkeypatch, caplog, how):
    monkeypatch.setattr(gpu_rules, "_judged", {})
    made, layout = make("llama", SHORT)
    made.model.to(DEVICE)
    given = few(made, layout)
    expected, inner = by_operations(given), gpu_rules.sample

    def sample(rules, out, live, logits, T):
        if how == "fails":
            raise RuntimeError("no resources")
        inner(rules, out, live, logits, T)
        out.log_probs += 1

    monkeypatch.setattr(gpu_rules, "sample", sample)
    assert_same(rollout(*given), expected)
    assert list(gpu_rules._judged.values()) == [False]
    assert ("no resources" if how == "fails" else "gives other results") in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="the kernel runs in this process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/rollouts/test_gpu_rules.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, timeout=900, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


TYPES = {  # of Qwen2.5-1.5B, by the kernel's arguments; int64 and int32 numbers, and constants
    "*i64": "ids stages ts thoughtss feds answereds cappeds saids rows live_support completion_ids support_ forced "
            "forced_length eos",
    "*i16": "end_table",
    "*i1": "is_thoughts mask_ action_mask thought_mask finished failed",
    "fp32": "mixing_tau tau log_tau",
    "i32": "stride pad bot num_thoughts max_answer T",
}  # fmt: skip
CONSTANTS = {
    "V": 151936, "K": 8, "WIDE": 8, "BLOCK": 4096, "BLOCKS": 38, "BLOCKS_WIDE": 64, "F": 4, "E": 2, "END": 4,
    "TABLE_WIDTH": 151936, "EXPLICIT": True,
}  # fmt: skip


@pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("logits", ["*bf16", "*fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_outside_kernel", "_rules_kernel"])
def test_compiles(name, capability, logits):
    """For an A100 and an H100, without either."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(gpu_rules, name)
    types = {argument: kind for kind, names in TYPES.items() for argument in names.split()} | {"logits": logits}
    constants = {n: CONSTANTS[n] for n in kernel.arg_names if n in CONSTANTS}
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert f".target sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]
