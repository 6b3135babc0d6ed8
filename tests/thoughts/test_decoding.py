"""Cuts and the cold stop: what is kept is what transformers' own warpers keep, and the limits are what they should be.

pytest tests/thoughts/test_decoding.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, VOCABULARY, rows, tiny_policy
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rl_soft.model import policy
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.model.think import mix_embeddings
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.densities import Dirichlet
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

INF = float("inf")
THINKING = Thinking(
    phase="explicit", end_of_thinking="=", num_thoughts=9, thought_k=3, thought_temperature=1.3, max_answer_tokens=5
)
FAMILIES = {
    "llama": {"num_key_value_heads": 1},
    "gpt2": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"head_dim": 16, "attn_implementation": "eager", "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16},
}


def make(kind: str = "llama") -> policy.Policy:
    if kind in ("llama", "gpt2"):
        made = tiny_policy(kind)
    else:
        made = policy.make({**TINY, "model_type": kind, **FAMILIES[kind]}, VOCABULARY, 0)
        with torch.no_grad():
            made.model.get_input_embeddings().weight.mul_(200 if kind == "gemma3_text" else 4)
    made.model.eval()
    return made


def run(made, thinking=THINKING, decoding=None, samples=3, greedy=False, **kwargs):
    layout = Layout(thinking, made.tokenizer)
    prompts = [layout.prompt_ids(r.question) for r in rows(6) for _ in range(samples)]
    seeds = torch.tensor([address(0, r.id, s) for r in rows(6) for s in range(samples)])
    ends = [made.tokenizer.eos_token_id]
    return rollout(made.model, layout, prompts, None if greedy else seeds, ends, decoding=decoding, **kwargs)


def logits_before(made, out, row: int, position: int) -> Tensor:
    """(V,) what the model says at a position, by one whole forward over what was fed before it."""
    embedding = made.model.get_input_embeddings()
    fed = mix_embeddings(embedding, out.support[row, :position], out.log_weights[row, :position])
    embeds = torch.cat([embedding(torch.tensor(out.prompt_ids[row])), fed])
    with torch.no_grad():
        return made.model(inputs_embeds=embeds[None]).logits[0, -1].float()


def warped(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """transformers' order, on scores (m, V) already divided by the temperature."""
    for warper in (
        TopKLogitsWarper(top_k) if top_k else None,
        TopPLogitsWarper(top_p) if top_p < 1 else None,
        MinPLogitsWarper(min_p) if min_p else None,
    ):
        scores = warper(None, scores) if warper else scores
    return scores


# Cuts


@pytest.mark.parametrize("top_k", [0, 1, 5, 60])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.05])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_what_is_kept_is_what_transformers_keeps(top_k, top_p, min_p):
    """Rows that think and rows that do not have settings of their own, in one call."""
    scores = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 2
    is_thought = torch.arange(40) % 2 == 0
    decoding = Decoding(top_k, top_p, min_p, after_top_k=7, after_top_p=0.9, after_min_p=0.02)
    left = decoding.cut(scores.log_softmax(-1), is_thought, THINKING)
    expected = torch.where(
        is_thought[:, None], warped(scores, top_k, top_p, min_p), warped(scores, 7, 0.9, 0.02)
    ).log_softmax(-1)
    assert torch.equal(left.isneginf(), expected.isneginf())
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=0)
    inherited = Decoding(top_k, top_p, min_p)
    left = inherited.cut(scores.log_softmax(-1), is_thought, THINKING)
    assert torch.equal(left.isneginf(), warped(scores, top_k, top_p, min_p).isneginf())


def test_a_share_is_held_by_as_many_ids_as_it_takes_and_rows_do_not_depend_on_others():
    """Sharp rows are cut after few ids, flat ones after most of a vocabulary that is looked at part by part."""
    width = torch.tensor([8.0, 3.0, 1.5, 0.1, 0.0]).repeat(4)[:, None]
    scores = torch.randn(20, 9000, generator=torch.Generator().manual_seed(1)) * width
    phi, is_thought = scores.log_softmax(-1), torch.arange(20) % 3 > 0
    for decoding in (Decoding(top_p=0.9), Decoding(top_p=0.99, after_top_k=40), Decoding(40, 0.7, after_top_k=0)):
        left = decoding.cut(phi, is_thought, THINKING)
        (k, p, _), (after_k, after_p, _) = (decoding.top_k, decoding.top_p, 0), decoding.after
        expected = torch.where(is_thought[:, None], warped(scores, k, p, 0), warped(scores, after_k, after_p, 0))
        count, wanted = (~left.isneginf()).sum(-1), (~expected.isneginf()).sum(-1)
        assert count.max() > 5000 > 300 > count.min()
        flat = (width[:, 0] == 0) & (wanted > 40)  # where all are equal, all are kept
        assert (count[flat] == 9000).all() and ((count - wanted)[~flat].abs() <= 2).all()  # sums are rounded
        alone = [decoding.cut(phi[i : i + 1], is_thought[i : i + 1], THINKING) for i in range(20)]
        assert torch.equal(torch.cat(alone), left)


def test_equal_probabilities_are_kept_together_and_one_id_always_is():
    tied = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]]).log()
    think = torch.tensor([True])
    assert Decoding(top_k=2).cut(tied, think, THINKING).exp()[0].tolist() == pytest.approx(
        [3 / 9, 2 / 9, 2 / 9, 2 / 9, 0]
    )
    assert Decoding(top_p=0.4).cut(tied, think, THINKING).isneginf()[0].tolist() == [False] * 4 + [True]
    for tight in (Decoding(top_p=1e-9), Decoding(min_p=1.0), Decoding(top_k=1)):
        assert tight.cut(tied, think, THINKING).exp()[0].tolist() == [1, 0, 0, 0, 0]
    for logits in ([float("nan")] * 5, [INF, 0.0, 0.0, 0.0, 0.0]):  # the engine stops such a row by its entropy
        assert Decoding(3, 0.5, 0.1).cut(torch.tensor([logits]).log_softmax(-1), think, THINKING).isnan().all()


@pytest.mark.parametrize("thought", ["token", "soft", "gumbel", "dirichlet"])
def test_a_cut_that_keeps_everything_changes_nothing(thought):
    made, thinking = make(), replace(THINKING, thought=thought)
    plain, cut = run(made, thinking), run(made, thinking, Decoding(top_k=len(made.tokenizer), after_top_p=1 - 1e-7))
    for name in ("completion_ids", "support", "mask", "thought_mask", "finished"):
        assert torch.equal(getattr(plain, name), getattr(cut, name)), name
    for name in ("log_weights", "log_probs", "entropy", "outside"):
        torch.testing.assert_close(getattr(plain, name), getattr(cut, name), atol=3e-5, rtol=1e-5)


def test_the_defaults_are_bit_by_bit_the_rollout_without_them(monkeypatch):
    made = make()
    plain = run(made)
    monkeypatch.setattr(Decoding, "cut", lambda *_: pytest.fail("a default decoding must not touch the distribution"))
    same = run(made, decoding=Decoding())
    assert all(torch.equal(x, getattr(same, name)) for name, x in vars(plain).items() if isinstance(x, Tensor))


@pytest.mark.parametrize("order", ["exact", "paper"])
@pytest.mark.parametrize("thought", ["soft", "gumbel", "dirichlet"])
def test_thoughts_and_answers_stay_within_their_own_cuts(thought, order):
    made, thinking = make(), replace(THINKING, thought=thought, thought_k=4, temperature=1.7)
    decoding = Decoding(top_k=6, top_p=0.6, after_top_k=3, after_min_p=0.2, after_top_p=1.0, order=order)
    out = run(made, thinking, decoding)
    seen = {"thought": 0, "answer": 0, "absent": 0}
    for row in range(0, 18, 2):
        for t in range(int(out.lengths[row])):
            if not out.action_mask[row, t]:
                continue
            scores, thinks = logits_before(made, out, row, t)[None], bool(out.thought_mask[row, t])
            T, cut = (1.3, (6, 0.6, 0.0)) if thinks else (1.7, (3, 1.0, 0.2))
            kept = warped(scores / T, *cut)[0]
            present = ~out.log_weights[row, t].isneginf()
            ids = out.support[row, t][present]
            assert not kept[ids].isneginf().any()
            assert len(ids) == (min(4, int((~kept.isneginf()).sum())) if thinks else 1)
            assert out.log_weights[row, t].logsumexp(-1).abs() < 1e-5
            if thinks and (thought == "soft" or (order == "paper" and thought == "gumbel")):
                assert set(ids.tolist()) == set(kept.topk(len(ids)).indices.tolist())
            phi = (scores[0] / T).log_softmax(-1)
            torch.testing.assert_close(out.entropy[row, t], -(phi.exp() * phi).sum(), atol=1e-4, rtol=0)
            torch.testing.assert_close(out.outside[row, t], 1 - phi[ids].exp().sum(), atol=1e-4, rtol=0)
            seen["thought" if thinks else "answer"] += 1
            seen["absent"] += int(thinks and len(ids) < 4)
    assert min(seen.values()) > 0, seen


def test_settings_after_the_thoughts_are_applied_and_are_those_of_thinking_if_absent():
    """Without thoughts all positions are answers, so that `after_` alone decides."""
    made = make()
    no_thoughts = Thinking(num_thoughts=0, max_answer_tokens=8, answer_prompt="#")
    greedy, sampled = run(made, no_thoughts, greedy=True), run(made, no_thoughts)
    assert not torch.equal(greedy.completion_ids[:, 2:7], sampled.completion_ids[:, 2:7])
    for one in (Decoding(after_top_k=1), Decoding(top_k=1), Decoding(after_min_p=1.0), Decoding(top_p=1e-6)):
        assert torch.equal(run(made, no_thoughts, one).completion_ids, greedy.completion_ids)
    whole = Decoding(top_k=1, after_top_k=0, top_p=0.1, after_top_p=1.0, min_p=1.0, after_min_p=0.0)
    assert torch.equal(run(made, no_thoughts, whole).completion_ids, sampled.completion_ids)


def test_the_papers_dirichlet_is_drawn_before_the_largest_are_kept():
    made, decoding = make(), Decoding(top_k=7, order="paper")
    thinking = replace(THINKING, thought="dirichlet", thought_gamma=2.0)
    out = run(made, thinking, decoding)
    exact = run(made, thinking, replace(decoding, order="exact"))
    beyond = 0
    for row in range(18):
        kept = warped(logits_before(made, out, row, 0)[None] / 1.3, 7, 1.0, 0.0)
        drawn = Dirichlet(kept, 7, 2.0).sample(seeds=out.seeds[row : row + 1], position=0)
        assert drawn.support[0, :3].tolist() == out.support[row, 0].tolist()
        expected = drawn.log_weights[0, :3].log_softmax(-1)
        torch.testing.assert_close(out.log_weights[row, 0], expected, atol=2e-4, rtol=1e-4)
        beyond += not set(out.support[row, 0].tolist()) <= set(kept[0].topk(3).indices.tolist())
        assert set(exact.support[row, 0].tolist()) == set(kept[0].topk(3).indices.tolist())
    assert beyond > 0, "an id that is not among the K most probable"
    few = run(made, thinking, Decoding(top_k=20, order="paper"))
    assert torch.equal(few.support, run(made, thinking, Decoding(top_k=50, order="paper")).support), "all 20 ids"
    one_k = replace(thinking, thought_k=7)
    assert torch.equal(run(made, one_k, decoding).support, run(made, one_k, replace(decoding, order="exact")).support)


def test_log_densities_stay_those_of_the_whole_distribution():
    """So the training pass, which knows of no cut, recomputes them."""
    made, thinking = make(), replace(THINKING, temperature=0.7)
    out = run(made, thinking, Decoding(top_k=2, after_top_k=4))
    assert out.log_weights[out.thought_mask].isneginf().any(), "two ids for three slots"
    add_soft_forward(made.model)
    P, pad_id = max(map(len, out.prompt_ids)), made.tokenizer.pad_token_id
    prompt_ids = torch.tensor([[pad_id] * (P - len(p)) + p for p in out.prompt_ids])
    prompt_mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in out.prompt_ids])
    recorded = (prompt_ids, out.support, out.log_weights, out.action_mask, out.thought_mask, thinking)
    scored = made.model(attention_mask=torch.cat([prompt_mask, out.mask.long()], dim=1), soft=SoftInputs(*recorded))
    torch.testing.assert_close(scored.log_probs, out.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.entropy, out.entropy, atol=1e-4, rtol=0)


# Limits


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_hot_soft_thoughts_are_tokens(kind):
    """tau to 0 with K = V, and K = 1: the ids of `token` under the same noise. T to 0: greedy, whatever the kind."""
    made, T = make(kind), 40.0 if kind == "gemma3_text" else 1.3  # its logits are that much wider
    thinking = replace(THINKING, thought_temperature=T, temperature=T)
    token = run(made, replace(thinking, thought="token"))
    assert token.thought_mask.sum() > 60 and len({tuple(row) for row in token.completion_ids.tolist()}) > 6
    for soft in ({"thought_k": 0, "thought_tau": 1e-6}, {"thought_k": 1}):
        out = run(made, replace(thinking, **soft))
        assert torch.equal(out.completion_ids, token.completion_ids)
        assert torch.equal(out.finished, token.finished)
    greedy = run(made, replace(thinking, thought="token"), greedy=True)
    cold = {"thought_temperature": 1e-7, "temperature": 1e-7}
    for thought in ("token", "soft", "gumbel", "dirichlet"):
        for order in ("exact", "paper"):
            out = run(made, replace(thinking, thought=thought, **cold), Decoding(order=order))
            assert torch.equal(out.completion_ids, greedy.completion_ids), (thought, order)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_one_slot_thought_is_what_the_model_gets_for_the_id(kind):
    """Embeddings that a model scales (Gemma) are scaled once, by the embedding module or by the model."""
    made = make(kind)
    ids = torch.tensor([[5, 9, 12, 7]])
    one_hot = torch.full((1, 4, 3), -INF)
    one_hot[..., 0] = 0.0
    fed = mix_embeddings(made.model.get_input_embeddings(), ids[..., None].expand(1, 4, 3), one_hot)
    with torch.no_grad():
        expected, ours = made.model(input_ids=ids).logits, made.model(inputs_embeds=fed).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# Cold stop


def reference_stop(entropy: list[float], threshold: float, length: int) -> int:
    """Thoughts until `length` cold ones in a row; all of them if there are none."""
    count = 0
    for i, value in enumerate(entropy):
        count = count + 1 if value < threshold else 0
        if count == length:
            return i + 1
    return len(entropy)


@pytest.mark.parametrize("budget", [None, 40], ids=["all at once", "a few at a time"])
@pytest.mark.parametrize("phase", ["explicit", "latent"])
def test_the_cold_stop_ends_the_thinking_where_a_count_says(phase, budget):
    made, thinking = make(), replace(THINKING, phase=phase, num_thoughts=14, answer_prompt="#")
    plain = run(made, thinking)
    threshold = float(plain.entropy[plain.thought_mask].quantile(0.6))
    out = run(made, thinking, Decoding(cold_stop_entropy=threshold, cold_stop_length=3), token_budget=budget)
    layout, stopped = Layout(thinking, made.tokenizer), 0
    for row in range(18):
        n = int(plain.thought_mask[row].sum())
        expected = reference_stop(plain.entropy[row, :n].tolist(), threshold, 3)
        assert int(out.thought_mask[row].sum()) == expected
        assert torch.equal(out.support[row, :expected], plain.support[row, :expected]), "as without it until there"
        ids = out.completion_ids[row].tolist()
        if expected < n:
            stopped += 1
            forced = layout.forced_after_cap
            assert ids[expected : expected + len(forced)] == forced
            assert not out.action_mask[row, expected : expected + len(forced)].any()
            assert out.action_mask[row, expected + len(forced)] and not out.thought_mask[row, expected + len(forced)]
    assert 3 < stopped < 18


# Refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": -1}, r"top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": float("nan")}, "top_p must be a number, above 0"),
        ({"min_p": 1.5}, "min_p must be between"),
        ({"after_top_k": -3}, "after_top_k must be"),
        ({"after_top_p": 2.0}, "after_top_p must be"),
        ({"after_min_p": -0.1}, "after_min_p must be"),
        ({"order": "papre"}, "order must be one of exact, paper, got 'papre'"),
        ({"cold_stop_entropy": -1.0}, "cold_stop_entropy must be at least 0"),
        ({"cold_stop_length": 0}, "cold_stop_length must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**values)
