"""What stands between a model's states and its logits is found, and the training pass scores the model's own logits.

pytest tests/model/test_logit_map.py
"""

import pytest
import torch
from conftest import TINY, VOCABULARY

from rl_soft.model import policy
from rl_soft.model.logit_map import LogitMap, logit_map
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.thoughts.densities import GumbelTopK, SoftToken
from rl_soft.thoughts.thinking import Thinking

MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
MADE = {
    "llama": ({}, LogitMap()),
    "granite": ({"logits_scaling": 0.3}, LogitMap(1 / 0.3)),
    "granitemoe": ({"logits_scaling": 7.0, "num_local_experts": 2, "num_experts_per_tok": 1}, LogitMap(1 / 7)),
    "cohere": ({"logit_scale": 0.0625}, LogitMap(0.0625)),
    "cohere2": ({"logit_scale": 3.0}, LogitMap(3.0)),
    "hyperclovax": ({"logits_scaling": 0.4}, LogitMap(0.4)),
    "minicpm3": ({"dim_model_base": 12, **MLA}, LogitMap(12 / 32)),  # in no config: a quotient of two of its numbers
    "gemma2": ({"final_logit_softcapping": 5.0, "head_dim": 16}, LogitMap(1.0, 5.0)),
}


def made(model_type, **values):
    return policy.make(
        {**TINY, "model_type": model_type, **MADE.get(model_type, ({},))[0], **values}, VOCABULARY, 0
    ).model


@pytest.mark.parametrize("model_type", MADE)
def test_the_map_is_the_models_own(model_type):
    model = made(model_type).eval()
    before = vars(model.base_model).get("forward")
    found = logit_map(model)
    assert found.softcap == MADE[model_type][1].softcap
    assert found.scale == pytest.approx(MADE[model_type][1].scale, rel=1e-6)
    assert vars(model.base_model).get("forward") is before
    with torch.no_grad():  # of a real forward, which has another spread
        out = model(input_ids=torch.arange(4, 14)[None], output_hidden_states=True)
        raw = model.get_output_embeddings()(model.base_model(input_ids=torch.arange(4, 14)[None]).last_hidden_state)
    logits = raw / found.temperature(1.0)
    if found.softcap:
        logits = found.raw_softcap * torch.tanh(raw / found.raw_softcap) / found.temperature(1.0)
    torch.testing.assert_close(logits, out.logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "granite", "cohere", "hyperclovax"])
def test_in_bfloat16_the_scale_is_the_configs_to_the_last_bit(model_type):
    assert logit_map(made(model_type).to(torch.bfloat16)).scale == pytest.approx(MADE[model_type][1].scale, rel=1e-12)


def test_what_is_no_factor_is_refused_by_name():
    bert = made("bert", is_decoder=True)
    with pytest.raises(ValueError, match=r"BertLMHeadModel \(model_type bert\) cannot be trained .*off by"):
        logit_map(bert)
    model = made("llama")
    inner = model.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = out.logits + 0.01 * torch.arange(out.logits.shape[-1])
        return out

    model.forward = forward
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(model_type llama\) cannot be trained"):
        logit_map(model)


@pytest.mark.parametrize("model_type", ["llama", "granite", "cohere", "minicpm3", "gemma2"])
@pytest.mark.parametrize("trained_head", [True, False])
def test_densities_entropies_kl_and_gradients_are_those_of_the_models_logits(model_type, trained_head):
    """Against autograd through the model's own logits, for thoughts of three ids and for tokens."""
    thinking = Thinking(thought_k=3, thought_temperature=0.8, temperature=1.3)
    model, C, P = made(model_type, tie_word_embeddings=False).eval(), 5, 4
    for p in model.get_output_embeddings().parameters():
        p.requires_grad_(trained_head)
    generator = torch.Generator().manual_seed(0)
    V = model.config.vocab_size
    prompt = torch.randint(4, V, (2, P), generator=generator)
    thought = GumbelTopK(torch.randn(2, C, V, generator=generator), 3, 0.5).sample(generator)
    token = torch.arange(C)[None].expand(2, C) >= 3  # the last two positions
    log_weights = torch.where(token[..., None], torch.tensor([0.0, -torch.inf, -torch.inf]), thought.log_weights)
    on = torch.ones(2, C, dtype=torch.bool)
    other = torch.randn(2, C, 32, generator=generator)
    weights = model.get_input_embeddings()
    fed = torch.cat([weights(prompt), (weights(thought.support) * log_weights.exp()[..., None]).sum(-2)], dim=1)

    logits = model(inputs_embeds=fed).logits[:, P - 1 : -1]
    tempered = logits / torch.where(token, thinking.temperature, thinking.thought_temperature)[..., None]
    law = GumbelTopK(logits, 3, thinking.thought_tau, thinking.thought_temperature)
    tokens = tempered.log_softmax(-1).gather(-1, thought.support[..., :1])[..., 0]
    expected = torch.where(token, tokens, law.log_prob(SoftToken(*thought)))
    entropy = -(tempered.log_softmax(-1) * tempered.softmax(-1)).sum(-1)
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(expected.sum() + entropy.sum(), wanted, allow_unused=True)

    add_soft_forward(model, chunk_size=3)
    soft = SoftInputs(
        prompt, thought.support, log_weights, on, ~token, thinking, entropy_grad=True, ref_states=other,
        ref_head=model.get_output_embeddings(),
    )  # fmt: skip
    out = model(attention_mask=torch.ones(2, P + C, dtype=torch.int64), soft=soft)
    torch.testing.assert_close(out.log_probs, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy, entropy, atol=2e-5, rtol=1e-5)
    ours = torch.autograd.grad(out.log_probs.sum() + out.entropy.sum(), wanted, allow_unused=True, retain_graph=True)
    for a, b in zip(ours, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)

    found, raw = logit_map(model), model.get_output_embeddings()(other)
    if found.softcap:
        raw = found.softcap * torch.tanh(raw * found.scale / found.softcap) / found.scale
    reference = raw * found.scale / torch.where(token, thinking.temperature, thinking.thought_temperature)[..., None]
    log_p, log_q = tempered.log_softmax(-1), reference.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(out.kl, kl, atol=2e-5, rtol=1e-5)
