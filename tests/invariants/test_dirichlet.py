"""Dirichlet thoughts, from the rollout to the loss: their noise, their density, and what they refuse.

pytest tests/invariants/test_dirichlet.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, rows, tiny_policy
from test_grpo import soft_trainer, train
from test_rollout import check_batch_of_any_size, make, run

from rl_soft.config.recipe import check_output_dir, load_recipe, write_config
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.model.think import density_of, mix_embeddings, next_thought
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.densities import Dirichlet, SoftToken
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.start import check_thinking

LATENT = Thinking(
    thought="dirichlet", thought_k=4, num_thoughts=3, thought_gamma=3.0, answer_prompt="#", max_answer_tokens=5
)
EXPLICIT = replace(LATENT, phase="explicit", end_of_thinking="=", num_thoughts=9, answer_prompt="")
BOTH = pytest.mark.parametrize("thinking", [LATENT, EXPLICIT], ids=["latent", "explicit"])


@BOTH
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_sample_does_not_depend_on_its_batch(model_type, thinking):
    check_batch_of_any_size(*make(model_type, thinking), atol=5e-5)


@BOTH
@pytest.mark.parametrize("k", [2, 4, 0])
@pytest.mark.parametrize("tied", [True, False])
def test_training_pass_recomputes_the_rollouts_density(tied, k, thinking):
    made = tiny_policy(tied=tied)
    layout = Layout(replace(thinking, thought_k=k, thought_temperature=0.8, temperature=1.3), made.tokenizer)
    out = run(made, layout, rows(8), samples=4)
    add_soft_forward(made.model, chunk_size=7)
    P = max(map(len, out.prompt_ids))
    prompt_ids = torch.tensor([[made.tokenizer.pad_token_id] * (P - len(p)) + p for p in out.prompt_ids])
    prompt_mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in out.prompt_ids])
    recorded = (prompt_ids, out.support, out.log_weights, out.action_mask, out.thought_mask, layout.thinking)
    mask = torch.cat([prompt_mask, out.mask.long()], dim=1)
    scored = made.model(attention_mask=mask, soft=SoftInputs(*recorded))
    assert (out.log_probs[out.action_mask] != 0).all() and out.log_probs.isfinite().all()
    assert (scored.log_probs - out.log_probs).abs().max() < 1e-4
    torch.testing.assert_close(scored.entropy, out.entropy, atol=1e-4, rtol=0)
    scored.log_probs.sum().backward()
    gradient = made.model.get_output_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-3


def test_the_recorded_density_is_the_distributions():
    """Replay one row by hand, one position at a time, without a cache."""
    made = tiny_policy()
    t = replace(LATENT, thought_temperature=0.8, temperature=1.3)
    layout = Layout(t, made.tokenizer)
    out = run(made, layout, rows(1))
    embedding = made.model.get_input_embeddings()
    embeds = embedding(torch.tensor(out.prompt_ids[:1]))
    for i in range(int(out.lengths[0])):
        logits = made.model(inputs_embeds=embeds).logits[:, -1]
        if out.thought_mask[0, i]:
            d = Dirichlet(logits, 4, t.thought_gamma, t.thought_temperature)
            thought = SoftToken(out.support[:1, i], out.log_weights[:1, i])
            torch.testing.assert_close(out.log_probs[:1, i], d.log_prob(thought), atol=1e-4, rtol=0)
            concentration = 3.0 * (logits / 0.8).gather(-1, thought.support).softmax(-1)
            reference = torch.distributions.Dirichlet(concentration.double())  # with respect to the weights
            expected = reference.log_prob(thought.log_weights.double().exp()) + thought.log_weights.double().sum(-1)
            torch.testing.assert_close(out.log_probs[:1, i].double(), expected, atol=1e-3, rtol=0)
            assert set(thought.support[0].tolist()) == set(logits[0].topk(4).indices.tolist())
        elif out.action_mask[0, i]:
            expected = torch.log_softmax(logits / t.temperature, -1)[0, out.completion_ids[0, i]]
            torch.testing.assert_close(out.log_probs[0, i], expected, atol=1e-4, rtol=0)
        embeds = torch.cat([embeds, mix_embeddings(embedding, out.support[:1, i], out.log_weights[:1, i])[:, None]], 1)


@pytest.mark.parametrize("gamma", [0.5, 4.0, 20.0])
def test_drawn_weights_have_the_moments_of_the_dirichlet(gamma):
    n, thinking = 40_000, replace(LATENT, thought_gamma=gamma, thought_temperature=0.7)
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    thought = next_thought(logits.expand(n, -1), thinking, torch.arange(n) * 7919 + 5, position=3)
    assert (thought.log_weights[:, :-1] >= thought.log_weights[:, 1:]).all(), "the strongest weight first"
    kept = logits.topk(4).indices
    weights = torch.zeros(n, 20).scatter(-1, thought.support, thought.log_weights.exp())[:, kept].double()
    expected = torch.distributions.Dirichlet(gamma * (logits[kept] / 0.7).softmax(-1).double())
    error = (expected.variance / n).sqrt()
    assert ((weights.mean(0) - expected.mean).abs() < 4.5 * error).all()
    assert ((weights.var(0) / expected.variance - 1).abs() < 0.05).all()
    other = next_thought(logits.expand(n, -1), thinking, torch.arange(n) * 7919 + 5, position=4)
    first = [torch.zeros(n, 20).scatter(-1, t.support, t.log_weights.exp())[:, kept[0]] for t in (thought, other)]
    assert abs(torch.corrcoef(torch.stack(first))[0, 1]) < 4.5 / n**0.5, "another step, another draw"


def test_greedy_feeds_the_mean_and_repeats():
    made = tiny_policy()
    layout = Layout(LATENT, made.tokenizer)
    prompts = [layout.prompt_ids(r.question) for r in rows(6)]
    eos = [made.tokenizer.eos_token_id]
    first, second = (rollout(made.model, layout, prompts, None, eos) for _ in range(2))
    assert torch.equal(first.support, second.support) and torch.equal(first.completion_ids, second.completion_ids)
    logits = made.model(input_ids=torch.tensor(prompts[:1])).logits[:, -1]
    log_weights, ids = logits[0].topk(4)
    assert torch.equal(first.support[0, 0], ids)
    torch.testing.assert_close(first.log_weights[0, 0], log_weights.log_softmax(-1), atol=1e-5, rtol=1e-5)
    many = Layout(replace(LATENT, thought_gamma=1e7), made.tokenizer)  # a sure draw is the mean
    drawn = run(made, many, rows(6)[:1])
    drawn = torch.zeros(20).scatter(-1, drawn.support[0, 0], drawn.log_weights[0, 0].exp())
    mean = torch.zeros(20).scatter(-1, ids, log_weights.softmax(-1))
    torch.testing.assert_close(drawn, mean, atol=2e-3, rtol=0)


def test_answer_tokens_are_drawn_from_the_categorical():
    """The thoughts take gamma noise; the answers must not be left without noise of their own."""
    made = tiny_policy()
    layout = Layout(replace(LATENT, num_thoughts=0, temperature=1.2), made.tokenizer)
    n = 4000
    prompts = [layout.prompt_ids(rows(1)[0].question)] * n
    out = rollout(made.model, layout, prompts, torch.arange(n), [made.tokenizer.eos_token_id])
    at = int(out.action_mask[0].int().argmax())  # the first answer token
    ids = torch.tensor([[*prompts[0], *out.completion_ids[0, :at].tolist()]])
    probs = (made.model(input_ids=ids).logits[0, -1] / 1.2).softmax(-1)
    counts = torch.bincount(out.completion_ids[:, at], minlength=20)
    expected = n * probs
    common = expected > 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < 5 * common.sum(), chi_square


@pytest.mark.parametrize("k,gamma", [(2, 1.0), (4, 4.0), (20, 50.0)])
def test_trains_with_its_exact_density(tmp_path, k, gamma):
    thinking = replace(LATENT, thought_k=k, thought_gamma=gamma, max_answer_tokens=4)
    logs = train(soft_trainer(tmp_path, thinking, num_iterations=2, max_steps=4))
    assert all(log["rollout/density_gap"] < 1e-4 for log in logs), [log["rollout/density_gap"] for log in logs]
    assert logs[0]["thoughts/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(logs[1]["thoughts/ratio"] - 1) > 1e-4, "the second iteration is off-policy"
    assert logs[0]["thoughts/softness"] > 0
    assert all(log["grad_norm"] > 0 for log in logs)
    assert all(torch.tensor(v).isfinite() for log in logs for v in log.values() if isinstance(v, float))


def test_the_ratio_is_unbiased():
    """E[p_new / p_old] = 1 over thoughts of the old policy, the kept set frozen from the rollout."""
    n, generator = 100_000, torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20, generator=generator)
    log_prob, gamma = density_of(LATENT)
    thought = next_thought(logits.expand(n, -1), LATENT, torch.arange(n))
    for _ in range(5):
        moved = logits + 0.1 * torch.randn(20, generator=generator)
        new, old = (
            log_prob(x.log_softmax(-1)[thought.support], torch.zeros(n), thought.log_weights, gamma)
            for x in (moved, logits)
        )
        ratio = (new - old).exp()
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / n**0.5


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("ratio", ["factored", "top1", "pathwise"])
def test_other_ratios_are_refused_by_name(tmp_path, ratio):
    message = f"ratio {ratio} is not made for thought dirichlet, which takes joint"
    with pytest.raises(ValueError, match=message):
        soft_trainer(tmp_path, LATENT, ratio=ratio)
    with pytest.raises(ValueError, match=message):
        load_recipe(ROOT / "recipes/grpo_gumbel.yaml", {"thought": "dirichlet", "ratio": ratio})


def test_codi_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"method codi trains phase latent with thought soft, gumbel, .*, which grpo or ppo can train"
    ):
        load_recipe(ROOT / "recipes/codi.yaml", {"thought": "dirichlet"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thought_gamma": 0.0}, "thought_gamma must be above 0, got 0.0"),
        ({"thought_k": 1}, "thought_k must be 0 or at least 2 for thought dirichlet"),
        (
            {"thought": "dirichlett"},
            "thought must be one of .*dirichlet, hidden, hybrid, got 'dirichlett'",
        ),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LATENT, **changes)


def test_a_run_made_before_the_field_existed_is_still_that_run(tmp_path):
    values = {"output_dir": str(tmp_path / "run")}
    recipe = load_recipe(ROOT / "recipes/codi.yaml", values)
    write_config(recipe)
    file = tmp_path / "run/config.yaml"
    file.write_text("".join(x for x in file.read_text().splitlines(True) if not x.startswith("thought_gamma")))
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    assert check_output_dir(recipe)
    with pytest.raises(ValueError, match=r"holds a run with thought_gamma = 4.0, this one has 5.0"):
        check_output_dir(load_recipe(ROOT / "recipes/codi.yaml", {**values, "thought_gamma": 5.0}))


def test_a_gumbel_warm_start_is_accepted():
    changes = {"thought": "dirichlet", "thought_gamma": 4, "ratio": "joint"}
    recipe = load_recipe(ROOT / "recipes/grpo_gumbel.yaml", changes)
    warm = load_recipe(ROOT / "recipes/codi.yaml")
    assert warm.thinking.thought == "gumbel" and recipe.thinking.thought_gamma == 4.0
    check_thinking(recipe.thinking, warm.thinking, "the recipe")
    with pytest.raises(ValueError, match="thought dirichlet does not fit a checkpoint trained with thought token"):
        check_thinking(recipe.thinking, replace(warm.thinking, thought="token"), "the recipe")
