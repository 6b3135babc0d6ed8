"""Models that rollouts cannot be exact with are refused by name; ALiBi and rotary lengths are right or refused.

pytest tests/rollouts/test_models.py; -m slow: ten architectures that differ, by benchmarks/architectures.py
"""

import importlib.util

import pytest
import torch
from conftest import ROOT, TINY, VOCABULARY, tiny_policy

from rl_soft.model import policy
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.models import check_reading, check_rollout_model, has_alibi
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

THINKING = Thinking(phase="explicit", end_of_thinking="=", num_thoughts=10, thought_k=3, max_answer_tokens=6)
QUESTIONS = ["12+3", "4", "5+6+7+8+9+1+2+3", "7-2", "1+2+3+4+5+6", "31+4", "9", "8+8+8+8"]


def made(model_type, **values):
    found = policy.make({**TINY, "model_type": model_type, **values}, VOCABULARY, 0)
    with torch.no_grad():
        found.model.get_input_embeddings().weight.mul_(4)
    found.model.eval()
    return found


def rolled(found, budget=None):
    layout = Layout(THINKING, found.tokenizer)
    prompts = [layout.prompt_ids(q) for q in QUESTIONS]
    return rollout(found.model, layout, prompts, torch.arange(len(prompts)), token_budget=budget)


@pytest.mark.parametrize(
    "model_type,values,message",
    [
        ("rwkv", {"attention_hidden_size": 32}, "RwkvForCausalLM keeps no cache of keys and values"),
        ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "OpenAIGPTLMHeadModel keeps no cache"),
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}, "XLNetLMHeadModel keeps no cache"),
        ("llama4_text", {"head_dim": 16, "intermediate_size_mlp": 64}, "Llama4ForCausalLM has layers of chunked"),
        ("mamba", {"state_size": 4}, "MambaForCausalLM keeps no cache"),
        ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16}, "has a layer with Linear"),
        ("bart", {"d_model": 32, "decoder_layers": 2}, "BartForCausalLM reads padded embeddings otherwise"),
        ("bert", {}, "BertLMHeadModel reads padded embeddings otherwise"),  # it sees later tokens
        ("roberta", {"is_decoder": True}, "RobertaForCausalLM reads padded embeddings otherwise"),  # counts from 2
    ],
)
def test_a_model_that_rollouts_do_not_know_is_refused_by_name(model_type, values, message):
    sizes = {} if model_type in ("openai-gpt", "xlnet", "bart") else TINY
    found = policy.make({**sizes, "model_type": model_type, **values}, VOCABULARY, 0)
    found.model.eval()
    with pytest.raises(ValueError, match=message):
        rolled(found)


def test_a_type_that_must_have_a_bos_is_made_and_bad_sizes_are_one_line():
    assert made("cwm", head_dim=16).model.config.bos_token_id == 2
    with pytest.raises(ValueError, match=r"model_config of llama: .*hidden_size"):
        made("llama", hidden_size="large")
    with pytest.raises(ValueError, match="model_config may not hold vocab_size"):
        made("llama", vocab_size=1000)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bfloat16"])
def test_a_decoder_is_read_as_it_is_fed(model_type):
    found = tiny_policy("gpt2" if model_type == "gpt2" else "llama")
    found.model.to(torch.bfloat16 if model_type == "bfloat16" else torch.float32).train()
    check_rollout_model(found.model)
    check_reading(found.model)
    assert found.model.training


@pytest.mark.parametrize("model_type,values", [("bloom", {"n_layer": 2, "n_head": 2}), ("falcon", {"alibi": True})])
def test_alibi_does_not_change_where_rows_wait_for_places(model_type, values):
    """Its positions are made of the mask, which has to lose the columns that the keys have lost."""
    found = made(model_type, **values)
    assert has_alibi(found.model)
    out, waited = rolled(found), rolled(found, budget=90)
    assert len(set(out.lengths.tolist())) > 3
    assert torch.equal(out.completion_ids, waited.completion_ids)
    torch.testing.assert_close(out.log_probs, waited.log_probs, atol=1e-4, rtol=0)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    "model_type,values,positions",
    [
        ("llama", {"max_position_embeddings": 20, "rope_parameters": DYNAMIC}, 20),
        ("phi3", {"original_max_position_embeddings": 24, "rope_parameters": LONG}, 24),
    ],
)
def test_rows_beyond_the_length_that_rope_starts_from_are_refused(model_type, values, positions):
    found = made(model_type, **values)
    assert policy.context_length(found.model) == positions
    with pytest.raises(ValueError, match=f"{found.model.__class__.__name__} has rope_type .* beyond {positions} posi"):
        rolled(found)
    short = made(model_type, **(values | {next(iter(values)): 64}))
    assert policy.context_length(short.model) == 64
    rolled(short)
    assert policy.context_length(made("llama").model) == 128


DIFFERENT = [
    "granite",  # divides its logits
    "cohere2",  # multiplies them; windows in some layers
    "gemma2",  # caps them
    "minicpm3",  # divides its states; latent attention
    "bloom",  # ALiBi, no position ids
    "gpt2",  # learned positions
    "opt",  # a decoder inside its trunk
    "gpt_oss",  # experts, sinks, windows
    "phi3:longrope, short rows",  # rotary embeddings by length
    "falcon:alibi",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_architectures_that_differ_are_exact(name):
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks/architectures.py")
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    found = architectures.measure(name)
    assert architectures.verdict(found) == "right", found
