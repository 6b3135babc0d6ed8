"""Completions of one prompt share its pass; nothing but the time depends on it.

pytest tests/model/test_scored_forward.py
"""

import pytest
import torch
from conftest import tiny_policy
from transformers import MistralConfig, MistralForCausalLM

from rl_soft.model import scored_forward
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.thoughts.thinking import Thinking

P, C, K, G = 6, 5, 3, 4
THINKING = Thinking(phase="explicit", num_thoughts=3, thought_k=K, end_of_thinking="#", max_answer_tokens=2)


def batch(prompts: int) -> tuple[torch.Tensor, SoftInputs]:
    """G completions of each prompt, in no order; prompts and completions are padded."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 15, (prompts, P), generator=draw).repeat_interleave(G, 0)
    mask = torch.ones(prompts * G, P + C, dtype=torch.long)
    for i in range(prompts):
        mask[i * G : (i + 1) * G, : i % 3] = 0
    ids[mask[:, :P] == 0] = 0
    mask[1::3, P + C - 2 :] = 0
    order = torch.randperm(prompts * G, generator=draw)
    support = torch.randint(5, 15, (prompts * G, C, K), generator=draw)
    weights = torch.randn(prompts * G, C, K, generator=draw).log_softmax(-1)
    action, thought = mask[:, P:].bool(), torch.arange(C).expand(prompts * G, C) < 3
    return mask[order], SoftInputs(ids[order], support, weights, action[order], thought & action[order], THINKING)


def passed(model, mask, soft):
    """Log-densities and the gradient of their weighted sum."""
    model.zero_grad()
    log_probs = model(attention_mask=mask, soft=soft).log_probs
    (log_probs * torch.linspace(-1, 1, len(mask))[:, None]).sum().backward()
    return log_probs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_shared_prompt_changes_no_density_and_no_gradient(monkeypatch, model_type):
    model = tiny_policy(model_type).model
    add_soft_forward(model)
    mask, soft = batch(3)
    lengths = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    shared = passed(model, mask, soft)
    assert lengths == [(3, P), (3 * G, C - 1)]
    monkeypatch.setattr(scored_forward, "_can_share_prompts", lambda *args: False)
    for ours, plain in zip(shared, passed(model, mask, soft), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert lengths[2:] == [(3 * G, P + C)]


def test_where_a_prompt_cannot_be_shared_all_goes_through_at_once():
    """Prompts that differ; checkpointing, which drops the cache; windows, whose cache has not all positions."""
    model = tiny_policy().model
    _, soft = batch(3)
    assert scored_forward._can_share_prompts(model, soft.prompt_ids)
    model.gradient_checkpointing_enable()
    assert not scored_forward._can_share_prompts(model, soft.prompt_ids)
    config = MistralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                           num_key_value_heads=1, sliding_window=4, vocab_size=16)  # fmt: skip
    assert not scored_forward._can_share_prompts(MistralForCausalLM(config), soft.prompt_ids)
