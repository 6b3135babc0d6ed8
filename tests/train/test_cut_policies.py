"""Top-k, top-p and min-p in RL: what a cut kept is recorded, and both sides of a ratio are renormalised on it.

pytest tests/train/test_cut_policies.py
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy
from peft import LoraConfig
from test_decoding import logits_before
from test_grpo import THINKING, TOKENS, soft_trainer, train
from test_pipeline import recipes
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rl_soft.config.like import settings_like
from rl_soft.config.recipe import load_recipe
from rl_soft.model.head import soft_log_prob
from rl_soft.model.scored_forward import add_soft_forward
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.decoding import MOST_KEPT, Decoding
from rl_soft.thoughts.densities import GumbelTopK, SoftToken
from rl_soft.thoughts.layout import Layout
from rl_soft.train import pipeline
from rl_soft.train.soft_batch import SoftBatch

CUT = Decoding.of_training(top_k=9, top_p=0.9, min_p=0.01, order="exact")
SOFT = replace(THINKING, thought_temperature=1.4, temperature=0.8)


def rolled(made, thinking, decoding, rows=12, **kwargs):
    layout = Layout(thinking, made.tokenizer)
    prompts = [layout.prompt_ids("1+2=") for _ in range(rows)]
    made.model.eval()
    return rollout(made.model, layout, prompts, torch.arange(rows), decoding=decoding, keep=True, **kwargs)


def kept_by(out, row, t):
    """The ids that a position was drawn from."""
    present = ~out.log_weights[row, t].isneginf()
    beside = out.kept[row, t]
    return out.support[row, t][present].tolist(), beside[beside >= 0].tolist()


@pytest.mark.parametrize("order", ["exact", "paper"])
def test_a_recorded_density_is_that_of_the_distribution_on_what_was_kept(order):
    """Against transformers' own warpers, position by position, and the distribution's class on what they leave."""
    made, decoding = tiny_policy(), replace(CUT, order=order)
    out = rolled(made, SOFT, decoding)
    warp = LogitsProcessorList([TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)])
    thoughts = 0
    for row, t in out.action_mask.nonzero().tolist():
        thinks = bool(out.thought_mask[row, t])
        scores = logits_before(made, out, row, t)[None] / (1.4 if thinks else 0.8)
        left = warp(None, scores)[0]
        if thinks and order == "paper":
            left = left.masked_fill(left < left.topk(3).values[-1], -torch.inf)
        support, beside = kept_by(out, row, t)
        assert sorted([*support, *beside]) == (~left.isneginf()).nonzero()[:, 0].tolist()
        k = 3 if thinks else 1
        thought = SoftToken(out.support[row, t][:k], out.log_weights[row, t][:k])
        expected = GumbelTopK(left, k, SOFT.thought_tau).log_prob(thought)
        torch.testing.assert_close(out.log_probs[row, t], expected, atol=1e-4, rtol=1e-4)
        thoughts += thinks
    assert thoughts and (out.kept >= 0).any() == (order == "exact" or bool((~out.thought_mask).any()))


def test_the_probabilities_of_what_can_be_drawn_add_up_to_one():
    """K = 1: of all ids that a cut kept, whichever of them was drawn."""
    made = tiny_policy()
    out = rolled(made, replace(TOKENS, max_answer_tokens=3), CUT)
    some = 0
    for row, t in out.action_mask.nonzero().tolist():
        support, beside = kept_by(out, row, t)
        phi = (logits_before(made, out, row, t) / TOKENS.temperature).log_softmax(-1)
        of_kept = phi[[*support, *beside]]
        torch.testing.assert_close(out.log_probs[row, t].exp(), of_kept.exp()[0] / of_kept.exp().sum())
        some += bool(beside)
    assert some


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_the_head_scores_on_what_was_kept_with_its_gradient(frozen):
    """Against autograd through a distribution over the kept ids alone, in float64."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 8, dtype=torch.float64, requires_grad=not frozen)
    support = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [9, 0, 0]])
    log_weights = torch.tensor([[3.0, 2, 1], [0.5, 0, -1], [1, 0, -torch.inf], [0, -torch.inf, -torch.inf]])
    log_weights = log_weights.double().log_softmax(-1)
    kept = torch.tensor([[10, 11, -1], [-1, -1, -1], [12, 13, 14], [1, 2, -1]])
    got, _ = soft_log_prob(hidden, weight, support, log_weights, 0.5, kept=kept, chunk_size=3)
    expected = []
    for i in range(4):
        there = ~log_weights[i].isneginf()
        ids = torch.cat([support[i][there], kept[i][kept[i] >= 0]])
        logits = (hidden[i] @ weight.T)[ids]
        n = int(there.sum())
        expected.append(GumbelTopK(logits, n, 0.5).log_prob(SoftToken(torch.arange(n), log_weights[i][:n])))
    torch.testing.assert_close(got, torch.stack(expected).to(got.dtype), atol=1e-6, rtol=1e-6)
    inputs = [hidden] if frozen else [hidden, weight]
    ours = torch.autograd.grad(got.sum(), inputs)
    theirs = torch.autograd.grad(torch.stack(expected).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_expected_ratio_of_a_cut_policy_is_one():
    """E[p_new / p_old] under p_old is 1 for densities on one set; without the record it would be the mass kept."""
    made, other = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    thinking = replace(SOFT, num_thoughts=1, max_answer_tokens=1, answer_prompt="")
    out = rolled(made, thinking, Decoding.of_training(4, 1.0, None, "exact"), rows=4096)
    add_soft_forward(other.model.eval())
    prompt = torch.tensor(out.prompt_ids)
    for ratio in ("joint", "top1"):
        batch = SoftBatch.from_rollout(out, ratio, other.tokenizer.pad_token_id, None)
        mask = torch.cat([torch.ones_like(prompt), out.mask.long()], dim=1)
        with torch.no_grad():
            now = other.model(attention_mask=mask, soft=batch.inputs(prompt, thinking, ratio)).log_probs
        r = (now - batch.sampled_log_probs)[:, 0].exp()  # of the thoughts
        assert r.std() > 0.05
        assert abs(float(r.mean()) - 1) < 4 * float(r.std()) / 64, ratio


@pytest.mark.parametrize("ratio", ["top1", "joint", "factored"])
@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_k": 5, "min_p": 0.02}], ids=["top_p", "top_k"])
def test_a_cut_policy_is_recomputed_and_trains(tmp_path, ratio, values):
    logs = train(soft_trainer(tmp_path, SOFT, ratio=ratio, num_iterations=2, max_steps=4, **values))
    assert all(log["rollout/density_gap"] < 1e-4 for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)
    assert logs[0]["thoughts/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(logs[1]["thoughts/ratio"] - 1) > 1e-4


def test_the_papers_order_trains_and_a_reference_is_cut_as_well(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    values = {"order": "paper", "top_k": 6, "beta": 0.05, "peft_config": lora}
    logs = train(soft_trainer(tmp_path, SOFT, ratio="joint", max_steps=3, **values))
    assert all(log["rollout/density_gap"] < 1e-4 and log["kl"] >= -1e-6 for log in logs)


def test_what_does_not_go_with_a_cut_is_told(tmp_path):
    explicit = replace(THINKING, thought="dirichlet")
    for thinking, values, message in (
        (THINKING, {"ratio": "pathwise", "top_p": 0.9}, "top_p 0.9: ratio pathwise makes thoughts again"),
        (explicit, {"order": "paper"}, "order paper: the law of a dirichlet thought has no closed form"),
        (THINKING, {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_trainer(tmp_path, thinking, **values)


def test_values_that_cut_nothing_are_no_cut():
    assert Decoding.of_training(0, 1.0, None, "exact") is Decoding.of_training(-1, 1, 0.0, "exact") is None
    assert Decoding.of_training(None, 0.9, None, "exact").top_k == MOST_KEPT


def test_a_run_is_evaluated_as_it_is_trained(tmp_path):
    """The records before and after RL are of the cut policy, and `like` repeats it."""
    recipe = recipes(tmp_path, top_p=0.8, order="paper", num_iterations=1, max_steps=2)
    pipeline.run(load_recipe(recipe))
    for folder in ("eval_before", "eval_after"):
        decoder = json.loads((tmp_path / "rl" / folder / "eval.json").read_text())["decoder"]
        assert (decoder["top_k"], decoder["top_p"], decoder["order"]) == (MOST_KEPT, 0.8, "paper")
    like = settings_like(str(tmp_path / "rl"), {})
    assert (like["top_k"], like["top_p"], like["min_p"], like["order"]) == (MOST_KEPT, 0.8, 0.0, "paper")
    plain = settings_like(str(tmp_path / "rl/eval_after"), {})
    assert (plain["top_k"], plain["top_p"], plain["order"]) == (MOST_KEPT, 0.8, "paper")
