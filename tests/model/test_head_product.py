"""Products of the LM head: float32 from bfloat16 operands, in rollouts and training alike.

pytest tests/model/test_head_product.py
"""

import pytest
import torch
from conftest import tiny_policy
from torch.nn import functional as F

from rl_soft.model import head_product
from rl_soft.model.head_product import add_weight_gradient, float32_logits, logits_of, through
from rl_soft.model.scored_forward import add_soft_forward

N, V, H = 7, 300, 64


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, H), (V, H), (V,), (N, V)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [64, 8192])
def test_nothing_but_the_operands_is_rounded(monkeypatch, dtype, block):
    monkeypatch.setattr(head_product, "BLOCK", block)
    hidden, weight, bias, grad = operands(dtype)
    exact = F.linear(hidden.double(), weight.double(), bias.double())
    logits = logits_of(hidden, weight, bias)
    assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-4
    total, before = torch.ones(V, H), grad.double().T @ hidden.double()
    add_weight_gradient(total, grad, hidden)
    assert (total - 1 - before).abs().max() < 1e-4
    assert through(grad.float(), weight).dtype == dtype


@pytest.mark.parametrize("autocast", [False, True])
def test_a_rollout_s_logits_are_those_of_training(autocast):
    """The model's own forward, with weights in bfloat16 or under autocast; then it is as it was."""
    model = tiny_policy(tied=False).model.eval()
    model = model if autocast else model.bfloat16()
    ids, head = torch.tensor([[5, 6, 7, 8]]), model.get_output_embeddings()
    seen = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = model(input_ids=ids).logits
        hook.remove()
        with float32_logits(model):
            logits = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    exact = seen[0].bfloat16().double() @ head.weight.bfloat16().double().T
    assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-5 * exact.abs().max()
    assert (rounded - exact).abs().max() > 1e-3 * exact.abs().max() and torch.equal(again, rounded)
    assert "forward" not in vars(head)


def test_flags_are_as_they_were():
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(torch.backends.cuda.matmul, name) for name in names]
    with head_product._whole_reductions():
        assert not any(getattr(torch.backends.cuda.matmul, name) for name in names)
    assert [getattr(torch.backends.cuda.matmul, name) for name in names] == before


def test_a_head_that_is_no_plain_one_is_left_alone():
    model = tiny_policy().model.bfloat16()
    add_soft_forward(model)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *args: None)
    inner = head.forward
    with float32_logits(model):
        assert head.forward == inner
