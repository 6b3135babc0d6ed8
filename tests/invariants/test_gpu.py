"""What a GPU must not change. Every test here runs on the CPU too, so that it is known to run at all.

pytest -m gpu             on a GPU: this file, and the kernels of sampling and head, compiled
pytest tests/invariants/test_gpu.py
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_engine import EXPLICIT, LATENT, arguments, assert_same, make
from torch.nn import functional as F

from rl_soft.model import devices
from rl_soft.model import head_triton as kernels
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.rollouts import cuda_graphs
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import gpu_sampling


def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no GPU, or hidden: run with -m gpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        _cuda()
        devices.set_up()
    return request.param


def placed(device, dtype=torch.float32, kind="qwen2", thinking=EXPLICIT, samples=3):
    """Arguments of a rollout on a device, and its layout."""
    made, layout = make(kind, thinking)
    made.model.to(device, dtype)
    return arguments(made, layout, samples=samples), layout


@pytest.mark.parametrize("thinking", [EXPLICIT, replace(LATENT, thought="token"), LATENT])
def test_a_rollout_with_graphs_is_that_without(device, monkeypatch, thinking):
    given, _ = placed(device, thinking=thinking)
    with monkeypatch.context() as patch:
        inner = cuda_graphs.Replay.__init__
        patch.setattr(cuda_graphs.Replay, "__init__", lambda self, *a: inner(self, *a) or setattr(self, "on", False))
        plain = rollout(*given)
    assert_same(rollout(*given), plain, atol=1e-4)


def test_a_rollout_with_kernels_is_that_without(device, monkeypatch):
    given, _ = placed(device)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_sampling, "usable", lambda logits: False)
        patch.setattr(kernels, "usable", lambda logits: False)
        plain = rollout(*given)
    assert_same(rollout(*given), plain, atol=1e-4)


def score(model, layout, made, dtype, device):
    """(B, T) log-densities of recorded completions, by one pass of the model."""
    P, pad = max(map(len, made.prompt_ids)), layout.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (P - len(p)) + list(p) for p in made.prompt_ids], device=device)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in made.prompt_ids], device=device)
    recorded = (x.to(device) for x in (made.support, made.log_weights, made.action_mask, made.thought_mask))
    model = copy.deepcopy(model).to(device, dtype)
    add_soft_forward(model)
    mask = torch.cat([mask, made.mask.to(device).long()], dim=1)
    return model(attention_mask=mask, soft=SoftInputs(ids, *recorded, layout.thinking))


def test_log_densities_of_a_bfloat16_rollout_are_float64_s_up_to_rounding(device):
    """All of it: prefill, cache, graphs, kernels, head; the reference is float64 on a CPU, on the same thoughts."""
    given, layout = placed(device, torch.bfloat16)
    made = rollout(*given)
    assert not made.failed.any()
    with torch.no_grad():
        exact = score(given[0], layout, made, torch.float64, "cpu").log_probs
    off = (made.log_probs.cpu() - exact)[made.action_mask.cpu()].abs()
    assert off.mean() < 0.15 and off.max() < 1.5


LENGTHS = (64, 192, 320, 704, 128, 130)  # 64 above a multiple of 128, where cuDNN's gradients were NaN; and others


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_with_a_mask_has_finite_gradients(device, length):
    """Scores of about -120, so that the logsumexp of all rows is below -88.7; the first positions see nothing."""
    if device == "cpu" and length > 200:
        pytest.skip("the CPU takes the same way at all lengths")
    generator, D = torch.Generator().manual_seed(0), 64
    q, k, v = (torch.randn(1, 1, length, D, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(D)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None].clone()
    mask[..., :8] = False  # left padding: rows 0 .. 7 see nothing
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out[:, :, 8:].float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("completion", [3, 51])  # 13 + 51 = 64 positions
def test_a_training_pass_over_padded_rows_has_finite_gradients(device, completion):
    made, layout = make("qwen2", EXPLICIT)
    model = made.model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    add_soft_forward(model)
    B, P, K = 2, 13, 3
    generator = torch.Generator().manual_seed(0)
    support = torch.stack([torch.randperm(12, generator=generator)[:K] for _ in range(B * completion)])
    on = torch.ones(B, completion, dtype=torch.bool)
    mask = torch.ones(B, P + completion, dtype=torch.int64)
    mask[0, : P - 2] = 0
    values = (support.view(B, completion, K), torch.full((B, completion, K), -math.log(K)), on, on)
    soft = SoftInputs(torch.ones(B, P, dtype=torch.int64).to(device), *(x.to(device) for x in values), layout.thinking)
    model(attention_mask=mask.to(device), soft=soft).log_probs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [("gpu", True), ("slow or gpu", True), ("not slow", False), ("not gpu", False), ("", False)],
)
def test_only_a_run_that_asks_for_gpus_sees_them(expression, wanted):
    from conftest import wants_gpu

    assert wants_gpu(expression) is wanted


def test_this_run_sees_no_gpu(request):
    from conftest import wants_gpu

    if not wants_gpu(request.config.option.markexpr):
        assert not torch.cuda.is_available()
