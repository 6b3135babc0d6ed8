"""Rollouts: a sample does not depend on its batch, and what was recorded is what was fed and what has the density.

pytest tests/rollouts/test_rollout.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import rows, tiny_policy

from rl_soft.model.scored_forward import SoftInputs, add_soft_forward, conditional_log_weights
from rl_soft.model.think import mix_embeddings
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.densities import GumbelTopK, SoftToken
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

EXPLICIT = Thinking(
    phase="explicit", end_of_thinking="=", num_thoughts=9, thought_k=3, answer_prompt="", max_answer_tokens=5
)


def make(model_type="llama", thinking=None, tied=True):
    made = tiny_policy(model_type, tied)
    thinking = thinking or Thinking(thought_k=3, num_thoughts=3, answer_prompt="#", max_answer_tokens=5)
    return made, Layout(thinking, made.tokenizer)


def run(made, layout, problems, samples=1, **kwargs):
    prompts = [layout.prompt_ids(r.question) for r in problems for _ in range(samples)]
    seeds = torch.tensor([address(0, r.id, s) for r in problems for s in range(samples)])
    return rollout(made.model, layout, prompts, seeds, [made.tokenizer.eos_token_id], **kwargs)


def check_batch_of_any_size(made, layout, atol):
    """A sample is the same in a batch of 24 rows and among those of its problem alone."""
    together = run(made, layout, rows(8), samples=3)
    for i in range(8):
        alone = run(made, layout, rows(8)[i : i + 1], samples=3)
        for j in range(3):
            n = int(alone.lengths[j])
            assert int(together.lengths[3 * i + j]) == n
            assert torch.equal(together.support[3 * i + j, :n], alone.support[j, :n])
            assert torch.equal(together.completion_ids[3 * i + j, :n], alone.completion_ids[j, :n])
            torch.testing.assert_close(together.log_probs[3 * i + j, :n], alone.log_probs[j, :n], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("thinking", [None, EXPLICIT], ids=["latent", "explicit"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_a_sample_does_not_depend_on_its_batch(model_type, thinking):
    check_batch_of_any_size(*make(model_type, thinking), atol=2e-5)


@pytest.mark.parametrize("thinking", [None, EXPLICIT], ids=["latent", "explicit"])
@pytest.mark.parametrize("model_type,tied", [("llama", True), ("llama", False), ("gpt2", True), ("qwen3", True)])
def test_training_pass_recomputes_the_rollouts_density(model_type, tied, thinking):
    made, layout = make(model_type, thinking, tied)
    out = run(made, layout, rows(8), samples=2)
    add_soft_forward(made.model, chunk_size=7)
    P = max(map(len, out.prompt_ids))
    pad_id = made.tokenizer.pad_token_id
    prompt_ids = torch.tensor([[pad_id] * (P - len(p)) + p for p in out.prompt_ids])
    prompt_mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in out.prompt_ids])
    attention_mask = torch.cat([prompt_mask, out.mask.long()], dim=1)
    recorded = (prompt_ids, out.support, out.log_weights, out.action_mask, out.thought_mask, layout.thinking)
    scored = made.model(attention_mask=attention_mask, soft=SoftInputs(*recorded))
    assert out.action_mask.any()
    assert (out.log_probs[out.action_mask] != 0).all()
    torch.testing.assert_close(scored.log_probs, out.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.entropy, out.entropy, atol=1e-4, rtol=0)
    factored = made.model(attention_mask=attention_mask, soft=SoftInputs(*recorded, ratio="factored"))
    torch.testing.assert_close(factored.log_probs, out.support_log_probs[..., 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(factored.log_probs + factored.rest, out.log_probs, atol=1e-4, rtol=0)
    if layout.thinking.phase == "latent":  # the same noise makes the same thoughts, so the answers score alike
        pathwise = made.model(
            attention_mask=attention_mask, soft=SoftInputs(*recorded, ratio="pathwise", seeds=out.seeds)
        )
        torch.testing.assert_close(pathwise.log_probs, out.log_probs * ~out.thought_mask, atol=1e-4, rtol=0)
        given = SoftInputs(*recorded, ratio="conditional", support_log_probs=out.support_log_probs)
        conditional = made.model(attention_mask=attention_mask, soft=given)
        torch.testing.assert_close(conditional.log_probs, out.support_log_probs[..., 0], atol=1e-4, rtol=0)


def gap(attention, scale):
    """Largest distance between rollout and training pass for a model whose logits are `scale` times as sharp."""
    made, layout = make(thinking=Thinking(thought_k=4, num_thoughts=4, answer_prompt="#", max_answer_tokens=5))
    made.model.set_attn_implementation(attention)
    with torch.no_grad():
        made.model.model.norm.weight.mul_(scale)
    out = run(made, layout, rows(8), samples=32)
    add_soft_forward(made.model)
    P = max(map(len, out.prompt_ids))
    prompt_ids = torch.tensor([[0] * (P - len(p)) + p for p in out.prompt_ids])
    prompt_mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in out.prompt_ids])
    recorded = (prompt_ids, out.support, out.log_weights, out.action_mask, out.thought_mask, layout.thinking)
    scored = made.model(attention_mask=torch.cat([prompt_mask, out.mask.long()], dim=1), soft=SoftInputs(*recorded))
    return (scored.log_probs - out.log_probs).abs().max().item()


def test_float64_attention_is_attention_and_closes_the_gap():
    made, _ = make()
    ids = torch.arange(8)[None]
    expected = made.model(input_ids=ids).logits
    made.model.set_attn_implementation("float64")
    torch.testing.assert_close(made.model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert gap("float64", 8.0) < 2e-5


def test_the_recorded_density_is_the_distributions(tiny):
    """Replay one row by hand, one position at a time, without a cache."""
    made, layout = tiny
    t = replace(layout.thinking, thought_temperature=0.8, temperature=1.3)
    layout = Layout(t, made.tokenizer)
    out = run(made, layout, rows(1))
    embedding = made.model.get_input_embeddings()
    embeds = embedding(torch.tensor(out.prompt_ids[:1]))
    for i in range(int(out.lengths[0])):
        logits = made.model(inputs_embeds=embeds).logits[:, -1]
        if out.thought_mask[0, i]:
            d = GumbelTopK(logits, 3, t.thought_tau, t.thought_temperature)
            expected = d.log_prob(SoftToken(out.support[:1, i], out.log_weights[:1, i]))
            torch.testing.assert_close(out.log_probs[:1, i], expected, atol=1e-4, rtol=0)
        elif out.action_mask[0, i]:
            expected = torch.log_softmax(logits / t.temperature, -1)[0, out.completion_ids[0, i]]
            torch.testing.assert_close(out.log_probs[0, i], expected, atol=1e-4, rtol=0)
        embeds = torch.cat([embeds, mix_embeddings(embedding, out.support[:1, i], out.log_weights[:1, i])[:, None]], 1)


def test_latent_layout_is_thoughts_then_what_is_fed_then_answer(tiny):
    made, layout = tiny
    out = run(made, layout, rows(4), samples=2)
    n = layout.thinking.num_thoughts
    fed = [layout.eot_id, *layout.answer_prompt_ids]
    assert out.thought_mask[:, :n].all() and not out.thought_mask[:, n:].any()
    assert out.completion_ids[:, n : n + len(fed)].tolist() == [fed] * 8
    assert not out.action_mask[:, n : n + len(fed)].any()
    assert (out.log_weights[out.thought_mask].logsumexp(-1).abs() < 1e-5).all()
    assert (out.completion_ids[:, :n] == layout.bot_id).all()
    answer_ends = out.lengths - 1
    last = out.completion_ids.gather(1, answer_ends[:, None])[:, 0]
    assert torch.equal(last == made.tokenizer.eos_token_id, out.finished)


def test_explicit_thinking_ends_by_its_text_or_its_cap():
    made, layout = make(thinking=replace(EXPLICIT, thought_temperature=3.0))
    out = run(made, layout, rows(8), samples=8)
    end = layout.end_ids[0]
    kinds = set()
    for i in range(64):
        ids, thought = out.completion_ids[i].tolist(), out.thought_mask[i].tolist()
        n = sum(thought)
        assert thought[:n] == [True] * n, "thoughts come first"
        if n < 9:
            assert ids[n - 1] in (end, made.tokenizer.eos_token_id)
            kinds.add("end" if ids[n - 1] == end else "eos")
        elif ids[n - 1] != end and ids[n - 1] != made.tokenizer.eos_token_id:
            assert ids[n] == end and not out.action_mask[i, n], "the end text is fed after the cap"
            kinds.add("cap")
    assert {"end", "cap"} <= kinds


def test_greedy_is_the_limit_of_low_temperature_and_repeats():
    made, layout = make()
    prompts = [layout.prompt_ids(r.question) for r in rows(6)]
    eos = [made.tokenizer.eos_token_id]
    first, second = (rollout(made.model, layout, prompts, None, eos) for _ in range(2))
    assert torch.equal(first.support, second.support)
    cold_thinking = replace(layout.thinking, temperature=1e-4)
    greedy_answers = rollout(made.model, Layout(cold_thinking, made.tokenizer), prompts, None, eos)
    assert torch.equal(first.completion_ids, greedy_answers.completion_ids)


def test_more_slots_than_the_vocabulary_are_refused(tiny):
    made, layout = tiny
    wide = Layout(replace(layout.thinking, thought_k=99), made.tokenizer)
    with pytest.raises(ValueError, match="thought_k must be at most the vocabulary size 20, got 99"):
        run(made, wide, rows(1))


def test_conditional_log_weights_follow_the_noise():
    """Given the strongest id, the weights under a changed policy are those that the same noise makes: with noise of
    the largest value M and cut-off Gumbels below it, drawn here directly, all K = V slots."""
    torch.manual_seed(0)
    old, new = (torch.randn(500, 6, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    tau, top = 0.5, torch.randint(6, (500, 1))
    M = -torch.log(-torch.log(torch.rand(500, 1, dtype=torch.float64)))
    g = -torch.log(-torch.log(torch.rand(500, 6, dtype=torch.float64)))

    def thought(phi):
        z = (-torch.logaddexp(-M, -(phi + g))).scatter(-1, top, M)  # (500, 6)
        return (z / tau).log_softmax(-1)

    order = thought(old).argsort(-1, descending=True)
    assert torch.equal(order[:, :1], top)
    x_old, x_new = thought(old).gather(-1, order), thought(new).gather(-1, order)
    made = conditional_log_weights(x_old, (new - old).gather(-1, order), tau)
    torch.testing.assert_close(made, x_new, atol=1e-9, rtol=0)
