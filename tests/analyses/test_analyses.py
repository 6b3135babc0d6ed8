"""Branching, lens, traces and plane: what is measured is what the model does when it is really fed that.

pytest tests/analyses/test_analyses.py
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, VOCABULARY, rows, tiny_policy

from rl_soft.analyses import branching, lens, plane, traces
from rl_soft.analyses.branching import jensen_shannon
from rl_soft.analyses.rouge import rouge_l
from rl_soft.model import policy
from rl_soft.model.policy import eos_token_ids
from rl_soft.model.think import mix_embeddings
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "gemma3_text"]
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
THINKING = Thinking(
    thought="soft", phase="explicit", num_thoughts=5, thought_k=4, thought_temperature=0.6, end_of_thinking="=#;",
    max_answer_tokens=1,
)  # fmt: skip


def made(model_type="llama", tied=True, **changes):
    if model_type == "window":  # shorter than the traces
        config = {**TINY, **WINDOW, "model_type": "gemma3_text", "tie_word_embeddings": tied}
        found = policy.make(config, VOCABULARY, 0)
    else:
        found = tiny_policy(model_type, tied)
    return found.model.eval(), Layout(replace(THINKING, **changes), found.tokenizer)


def soft_rollout(model, layout, some):
    prompts = [layout.prompt_ids(row.question) for row in some]
    return prompts, rollout(model, layout, prompts, None, eos_token_ids(model, layout.tokenizer))


@torch.no_grad()
def after(model, prompt, out, i, t, last, states=False):
    """The model's output at the end of prompt, thoughts before t, and `last` (H), without any cache or padding."""
    embedding = model.get_input_embeddings()
    thoughts = mix_embeddings(embedding, out.support[i, :t], out.log_weights[i, :t])
    inputs = torch.cat([embedding(torch.tensor(prompt)), thoughts, last[None]])
    return model(inputs_embeds=inputs[None], use_cache=False, output_hidden_states=states)


# -- branching -----------------------------------------------------------------------------------------------------


def test_the_divergence_of_known_distributions():
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.0, 0.5, 0.5]).log()
    assert jensen_shannon(p, q).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    apart = torch.eye(2).log()
    assert jensen_shannon(apart[0], apart[1]).item() == pytest.approx(math.log(2), abs=1e-6)
    some = torch.randn(2, 50, 30).mul(3).log_softmax(-1)
    assert torch.equal(jensen_shannon(some[0], some[1]), jensen_shannon(some[1], some[0]))
    assert (jensen_shannon(some[0], some[0]) < 1e-7).all() and (jensen_shannon(some[0], some[1]) <= math.log(2)).all()


@pytest.mark.parametrize("model_type", [*FAMILIES, "window"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_alternatives_are_what_the_model_says_when_it_is_really_fed_them(model_type, tied, monkeypatch):
    """Token ids and the mixture in full passes without a cache: the model scales its embeddings itself, or not."""
    if model_type == "gpt2" and not tied:
        pytest.skip("tiny_policy ties its head")
    model, layout = made(model_type, tied)
    seen = {}

    def record(self, live, at, outputs):
        for row, t, *said in zip(live.row.tolist(), at.tolist(), *map(self.next_log_probs, outputs), strict=True):
            seen[row, t] = said

    monkeypatch.setattr(branching.Branching, "record", record)
    some = rows(5)
    branching.measure(model, layout, some)
    prompts, out = soft_rollout(model, layout, some)
    embedding = model.get_input_embeddings()
    asked = [key for key in seen if key[1] < out.mask.shape[1]]
    assert len(asked) >= 5
    for i, t in asked[:15]:
        mixture = mix_embeddings(embedding, out.support[i, t], out.log_weights[i, t])
        for fed, said in zip((*embedding(out.support[i, t, :2]), mixture), seen[i, t], strict=True):
            expected = (after(model, prompts[i], out, i, t, fed).logits[0, -1].double() / 0.6).log_softmax(-1)
            torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
    ids = [*prompts[0], int(out.support[0, 0, 0])]  # and by ids, as anyone would feed a token
    with torch.no_grad():
        plain = (model(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / 0.6).log_softmax(-1)
    torch.testing.assert_close(seen[0, 0][0], plain, atol=1e-5, rtol=1e-5)


def test_small_distances_are_not_rounding():
    """Two distributions that differ by 1e-3 in their logits are about var / 8 apart, whatever the vocabulary."""
    model, layout = made()
    engine = branching.Branching(model, layout, [[5]], None, [], None, "none")
    logits = torch.randn(40, 1, 20_000, generator=torch.Generator().manual_seed(0)) * 6
    moved = logits + 6e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    p, q = (engine.next_log_probs(SimpleNamespace(logits=x)) for x in (logits, moved))
    difference = (moved.double() - logits)[:, 0] / 0.6
    variance = (p.exp() * difference**2).sum(-1) - (p.exp() * difference).sum(-1) ** 2
    torch.testing.assert_close(jensen_shannon(p, q), variance / 8, atol=1e-13, rtol=0.01)


def test_asking_leaves_the_trace_as_it_is():
    model, layout = made()
    some = rows(6)
    _, out = soft_rollout(model, layout, some)
    for record, ids in zip(branching.measure(model, layout, some), out.support, strict=True):
        n = len(record["ids"])
        assert record["ids"] == ids[:n, :2].tolist() and n >= 4
    for record, ids in zip(lens.measure(model, layout, some, 2), out.support, strict=True):
        assert record["ids"] == ids[record["at"], :2].tolist()


def test_a_thought_of_one_id_is_that_id():
    """Without temperature the strongest id has all the weight: the mixture is its first token, exactly."""
    model, layout = made(thought_temperature=1e-4)
    for record in branching.measure(model, layout, rows(4)):
        weights, distances = np.array(record["weights"]), np.array(record["distances"])
        assert (weights[:, 1] < 1e-6).all() and (distances[:, 0] < 1e-6).all()


def close(a, b):
    """Records of the same problems, up to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize(
    "measure",
    [
        branching.measure,
        lambda *a: lens.measure(*a, branches=2),
        lambda *a: traces.measure(*a, seed=7, samples=2),
        lambda *a: plane.measure(*a, seed=7, draws=3, branch_weight=0.1),
    ],
    ids=["branching", "lens", "traces", "plane"],
)
def test_a_problem_gets_the_same_record_alone_and_among_others(measure):
    model, layout = made()
    some = rows(8)
    together = measure(model, layout, some)
    alone = [record for row in some for record in measure(model, layout, [row])]
    assert close(together, alone)


# -- lens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_lens_of_the_last_layer_is_the_models_own_and_of_others_a_truncated_model(model_type):
    """At the last layer the model's logits, up to a soft cap; at layer 1 those of the model cut off after it."""
    model, layout = made(model_type)
    ids = torch.tensor([layout.prompt_ids("1+2-3=")])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        lensed = lens.lens_logits(model, torch.stack(out.hidden_states, dim=2))[0]  # (T, L + 1, V)
        cap = getattr(model.config, "final_logit_softcapping", None)
        own = torch.atanh(out.logits[0] / cap) * cap if cap else out.logits[0]
        torch.testing.assert_close(lensed[:, -1], own, atol=1e-4, rtol=1e-4)
        trunk = model.base_model
        setattr(
            trunk, "h" if model_type == "gpt2" else "layers", (trunk.h if model_type == "gpt2" else trunk.layers)[:1]
        )
        model.config.num_hidden_layers = 1
        cut = model(ids, use_cache=False).logits[0]
        torch.testing.assert_close(lensed[:, 1], torch.atanh(cut / cap) * cap if cap else cut, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma"])
def test_the_lens_reads_the_steps_with_the_heaviest_second_id(model_type, monkeypatch):
    model, layout = made(model_type)
    some, kept = rows(5), []
    run = lens.Lens.run
    monkeypatch.setattr(lens.Lens, "run", lambda self: (kept.append(self), run(self))[1])
    records = lens.measure(model, layout, some, 2)
    prompts, out = soft_rollout(model, layout, some)
    embedding = model.get_input_embeddings()
    for i, record in enumerate(records):
        fed = branching.measure(model, layout, some[i : i + 1])[0]["weights"]
        heaviest = sorted(range(len(fed)), key=lambda t: -fed[t][1])[:2]
        assert record["at"] == sorted(heaviest)
        for j, t in enumerate(kept[0].at[i].tolist()):
            pair = out.support[i, t, :2]
            first, second = embedding(pair).detach()
            for path, x in enumerate((first, second, 0.6 * first + 0.4 * second)):
                states = after(model, prompts[i], out, i, t, x, states=True).hidden_states
                states = torch.stack([h[0, -1] for h in states])
                torch.testing.assert_close(kept[0].states[i, j, path], states, atol=1e-4, rtol=1e-4)


def test_what_is_held_is_counted_by_the_rule():
    logits = torch.zeros(3, 2, 40)
    logits[0, :, :5] = 9.0  # path 1 says 0 .. 4
    logits[1, :, 20:25] = 9.0  # path 2 says 20 .. 24
    logits[2, 0, [0, 1, 2, 3, 4, 20, 21, 30, 31, 32]] = 9.0  # the mixture, at layer 0
    logits[2, 1, :10] = 9.0
    assert lens.held(logits)[:2].tolist() == [[5, 5], [2, 0]]
    records = [{"held": [lens.held(logits).tolist()], "weights": [0.4], "at": [0], "ids": [[0, 20]]}] * 3
    found = lens.summarise(records)
    assert found["top1"]["value"] == pytest.approx([5 / 7, 1])
    assert found["shares"]["value"][1] == pytest.approx([0.4, 0])


def test_a_model_whose_lens_cannot_be_read_is_refused(monkeypatch):
    model, layout = made()
    del model.model._modules["norm"]
    with pytest.raises(ValueError, match="model LlamaForCausalLM has no final norm named one of norm, ln_f"):
        lens.final_norm(model)
    model, layout = made()
    monkeypatch.setattr(lens, "lens_logits", lambda model, states: -model.lm_head(states))
    with pytest.raises(ValueError, match="the lens of the last layer of LlamaForCausalLM is not what the model says"):
        lens.measure(model, layout, rows(4), 2)


# -- traces --------------------------------------------------------------------------------------------------------


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Words:
        def tokenize(self, text):
            return text.split()

    theirs = scorer.RougeScorer(["rougeL"], tokenizer=Words())
    draw = np.random.default_rng(0)
    for n, m, words in [(12, 9, 3), (30, 30, 5), (1, 20, 4), (40, 25, 50), (0, 5, 3)]:
        a, b = draw.integers(words, size=n).tolist(), draw.integers(words, size=m).tolist()
        expected = theirs.score(" ".join(map(str, a)), " ".join(map(str, b)))["rougeL"].fmeasure
        assert rouge_l(a, b) == pytest.approx(expected)
    assert rouge_l([3, 1, 2], [3, 1, 2]) == 1 and rouge_l([3, 1, 2], [4]) == 0


def test_traces_are_those_of_the_decoders():
    model, layout = made()
    some = rows(4)
    records = traces.measure(model, layout, some, seed=7, samples=2)
    ends = eos_token_ids(model, layout.tokenizer)
    prompts = [layout.prompt_ids(row.question) for row in some]
    for kind in ("gumbel", "dirichlet", "sampled"):
        of_kind = Layout(replace(layout.thinking, thought=traces.TRACES[kind]), layout.tokenizer)
        out = rollout(model, of_kind, prompts, torch.tensor([address(7, row.id, 1) for row in some]), ends)
        for record, thoughts, support in zip(records, out.thought_mask, out.support, strict=True):
            assert record[kind][1]["ids"] == support[thoughts, 0].tolist()
            assert len(record[kind][1]["entropy"]) == int(thoughts.sum()) == len(record[kind][1]["outside"])
    found = traces.summarise([{**record, "soft": record["greedy"]} for record in records])
    assert found["rouge_l"]["soft"]["value"] == 1 == found["identical"]["soft"]["value"]
    sampled = np.mean([np.mean([rouge_l(r["greedy"][0]["ids"], t["ids"]) for t in r["sampled"]]) for r in records])
    assert found["rouge_l"]["sampled"]["value"] == pytest.approx(sampled)
    assert found["soft_minus"]["sampled"]["value"] == pytest.approx(1 - sampled)


def test_traces_without_thoughts_are_no_agreement():
    none = {kind: [{"ids": [], "entropy": [], "outside": []}] for kind in traces.TRACES}
    with pytest.raises(ValueError, match="traces: no thought was fed"):
        traces.summarise([none, none])


def test_curves_average_over_the_prompts_that_still_think():
    found = traces._curve([[[1.0, 2.0], [3.0]], [[5.0, 6.0, 9.0]]], fewest=2)
    assert found["value"] == [3.5, 4.0] and found["prompts"] == [2, 2], "the third has one prompt only"
    assert found["low"][0] < 3.5 < found["high"][0]


# -- plane ---------------------------------------------------------------------------------------------------------


def address_of(n, draws=1):
    return torch.arange(n * draws), torch.arange(n).repeat_interleave(draws)


def test_the_corners_of_the_plane():
    log_p = torch.randn(200, 6).log_softmax(-1)
    soft, random = plane.coordinates(log_p, "gumbel", 1e-4, *address_of(200)).mean(0)
    assert soft < 0.01 and random > 0.1, "one word, drawn"
    soft, random = plane.coordinates(log_p, "dirichlet", 1e7, *address_of(200)).mean(0)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert random < 1e-5 and soft.item() == pytest.approx(entropy.item(), abs=1e-3), "p itself"
    soft, random = plane.coordinates(log_p, "gumbel", 1e5, *address_of(200)).mean(0)
    assert soft.item() == pytest.approx(math.log(6), abs=1e-3), "all alike"


def test_two_words_have_known_averages():
    """p = (1/2, 1/2), gumbel at tau 1 and dirichlet at gamma 2: both weights are uniform over [0, 1].

    So softness is 1/2, the mean entropy of (u, 1 - u); randomness is found by quadrature.
    """
    log_p = torch.full((40_000, 2), math.log(0.5))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    pairs = torch.stack([u, 1 - u], dim=-1)
    expected = jensen_shannon(pairs.log(), torch.full_like(pairs, 0.5).log()).mean().item()
    for kind, parameter in (("gumbel", 1.0), ("dirichlet", 2.0)):
        soft, random = plane.coordinates(log_p, kind, parameter, *address_of(40_000)).mean(0).tolist()
        assert soft == pytest.approx(0.5, abs=5e-3) and random == pytest.approx(expected, abs=2e-3)


def test_random_weights_keep_the_order_of_the_ids():
    """The mean of dirichlet weights is p, and gumbel's strongest id is id i with probability p_i: Luce's axiom."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    log_p = p.log().expand(20_000, 4)
    weights = plane.randomise(log_p, "dirichlet", 3.0, *address_of(20_000)).exp()
    torch.testing.assert_close(weights.mean(0), p, atol=0.01, rtol=0)
    strongest = plane.randomise(log_p, "gumbel", 0.7, *address_of(20_000)).argmax(-1)
    torch.testing.assert_close(strongest.bincount(minlength=4) / 20_000, p, atol=0.012, rtol=0)


def test_the_test_of_the_plane_reads_its_curves():
    """Records whose dirichlet falls from gamma 1 on, and whose gumbel stays: what the paper says."""
    gumbel = [[[tau, 0.2]] * 2 for tau in plane.GRID["gumbel"]]
    dirichlet = [[[min(1.0, g / 40), 0.2 / (1 + g)]] * 2 for g in plane.GRID["dirichlet"]]
    record = {"steps": [5, 0], "gumbel": gumbel, "dirichlet": dirichlet}
    with pytest.raises(ValueError, match="needs at least two that have thoughts, got 1"):
        plane.summarise([record], 0.1)
    certain = {"steps": [5, 0]} | {kind: [[[0.0, 0.0]] * 2 for _ in grid] for kind, grid in plane.GRID.items()}
    with pytest.raises(ValueError, match=r"each thought is one id almost surely, .*; raise thought_temperature"):
        plane.summarise([certain, certain], 0.1)
    assert math.isfinite(plane.summarise([record, certain], 0.1)["all"]["gumbel_lowest"]["low"])
    found = plane.summarise([record, record, record], 0.1)
    assert found["branching"] is None and found["all"]["gumbel_lowest"]["value"] == pytest.approx(1)
    assert found["all"]["both"]["dirichlet"]["holds"] == []
    assert found["all"]["both"]["gumbel"]["holds"] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert [claim.holds for claim in plane.claims(found)] == ["yes"] * 4
