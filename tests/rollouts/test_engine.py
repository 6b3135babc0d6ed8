"""The rollout engine: every row is what a plain loop over one row makes, however rows share the cache.

pytest tests/rollouts/test_engine.py
"""

import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, VOCABULARY, rows, tiny_policy
from torch import Tensor

from rl_soft.model import policy
from rl_soft.model.think import mix_embeddings, next_thought
from rl_soft.rollouts import engine as engine
from rl_soft.rollouts import state_machine as walk
from rl_soft.rollouts.cuda_graphs import Replay
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.state_machine import _log_outside
from rl_soft.thoughts.densities import Dirichlet, GumbelTopK, entropy
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

LATENT = Thinking(thought_k=3, num_thoughts=4, answer_prompt="#", max_answer_tokens=12)
EXPLICIT = Thinking(
    phase="explicit", end_of_thinking="=", num_thoughts=20, thought_k=3, thought_temperature=1.5, max_answer_tokens=5
)
SLIDING = {"sliding_window": 7, "max_window_layers": 0, "use_sliding_window": True, "head_dim": 16}
MODELS = {
    "llama": {"num_key_value_heads": 1},
    "gpt2": {},
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"], **SLIDING},
    "mistral": {"sliding_window": 7},
    "gemma2": {**SLIDING, "attn_implementation": "eager", "final_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], **SLIDING},
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 2.0},
}


def make(kind: str = "llama", thinking: Thinking = LATENT) -> tuple[policy.Policy, Layout]:
    if kind == "gpt2":
        made = tiny_policy("gpt2")
    else:
        made = policy.make({**TINY, "model_type": kind, **MODELS[kind]}, VOCABULARY, 0)
        with torch.no_grad():
            made.model.get_input_embeddings().weight.mul_(200 if kind == "gemma3_text" else 4)
    made.model.eval()
    return made, Layout(thinking, made.tokenizer)


def arguments(made, layout: Layout, samples: int = 3):
    prompts = [layout.prompt_ids(r.question) for r in rows(6) for _ in range(samples)]
    seeds = torch.tensor([address(0, r.id, s) for r in rows(6) for s in range(samples)])
    return made.model, layout, prompts, seeds, [made.tokenizer.eos_token_id]


@torch.no_grad()
def plain_loop(model, layout: Layout, prompt: list[int], seed: Tensor, eos: int) -> list[dict[str, Tensor]]:
    """One row, by the whole forward of the whole sequence for each position."""
    t, embedding = layout.thinking, model.get_input_embeddings()
    embeds, steps, phase, forced = embedding(torch.tensor([prompt])), [], "think", []
    ids: list[int] = []
    while phase != "done":
        logits = model(inputs_embeds=embeds).logits[:, -1].float()
        T = t.thought_temperature if phase == "think" else t.temperature
        step = len(steps)
        if forced:
            action, density = (torch.tensor([[forced.pop(0)]]), torch.zeros(1, 1)), None
            phase = phase if forced else "answer"
        elif phase == "think":
            action = next_thought(logits, t, seed[None], step)
            if t.thought == "dirichlet":
                density = Dirichlet(logits, 3, t.thought_gamma, T).log_prob(action)
            else:
                density = GumbelTopK(logits, 3, t.thought_tau, T).log_prob(action)
            ids.append(int(action[0][0, 0]))
            n = len(layout.end_ids)
            if n and ids[-n:] == layout.end_ids:
                forced, phase = list(layout.forced_after_end), "forced"
            elif len(ids) == t.num_thoughts:
                forced, phase = list(layout.forced_after_cap), "forced"
            if phase == "forced" and not forced:
                phase = "answer"
            phase = "done" if t.phase == "explicit" and ids[-1] == eos else phase
        else:
            token = GumbelTopK(logits, 1, 1.0, T).sample(seeds=seed[None], position=step).support
            action, density = (token, torch.zeros(1, 1)), torch.log_softmax(logits / T, -1)[0, token[0]]
            answered = sum(s["kind"] == "answer" for s in steps) + 1
            phase = "done" if token.item() == eos or answered == t.max_answer_tokens else phase
        kind = "fed" if density is None else "thought" if action[0].shape[1] == 3 else "answer"
        steps.append(
            {"kind": kind, "support": action[0][0], "weights": action[1][0], "entropy": entropy(logits / T)[0]}
            | ({} if density is None else {"log_prob": density[0]})
        )
        embeds = torch.cat([embeds, mix_embeddings(embedding, action[0], action[1])[:, None]], dim=1)
    return steps


def assert_equals_plain_loop(out, model, layout, prompts, seeds, eos, which) -> None:
    for i in which:
        steps = plain_loop(model, layout, prompts[i], seeds[i], eos[0])
        n = len(steps)
        assert int(out.lengths[i]) == n
        kinds = [
            "thought" if thought else "answer" if action else "fed"
            for action, thought in zip(out.action_mask[i, :n].tolist(), out.thought_mask[i, :n].tolist(), strict=True)
        ]
        assert kinds == [s["kind"] for s in steps]
        for j, step in enumerate(steps):
            k = len(step["support"])
            assert torch.equal(out.support[i, j, :k], step["support"]), (i, j)
            torch.testing.assert_close(out.log_weights[i, j, :k], step["weights"], atol=2e-4, rtol=0)
            assert out.log_weights[i, j, k:].isneginf().all()
            if step["kind"] != "fed":
                torch.testing.assert_close(out.log_probs[i, j], step["log_prob"], atol=2e-4, rtol=0)
                torch.testing.assert_close(out.entropy[i, j], step["entropy"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("budget", [None, 150], ids=["all at once", "a few at a time"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_row_is_what_a_plain_loop_makes(kind, budget):
    made, layout = make(kind)
    given = arguments(made, layout)
    out = rollout(*given, token_budget=budget)
    assert_equals_plain_loop(out, *given, (0, 8, 17))


@pytest.mark.parametrize("thought", ["gumbel", "dirichlet"])
def test_explicit_thinking_is_what_a_plain_loop_makes(thought):
    made, layout = make("llama", replace(EXPLICIT, thought=thought))
    given = arguments(made, layout)
    out = rollout(*given, token_budget=200)
    assert len(set(out.lengths.tolist())) > 4
    assert_equals_plain_loop(out, *given, (0, 7, 13))


def assert_same(a, b, atol=3e-5) -> None:
    assert torch.equal(a.lengths, b.lengths)
    for name in ("completion_ids", "mask", "action_mask", "thought_mask", "support", "finished", "failed"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("log_weights", "log_probs", "support_log_probs", "entropy", "outside"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=1e-5)


@pytest.mark.parametrize(("kind", "attention"), [("gpt2", "sdpa"), ("qwen2", "eager"), ("mistral", "float64")])
def test_budget_refill_and_growth_change_nothing(kind, attention, monkeypatch, caplog):
    """Rows that wait, buffers that grow by a column, columns numbered anew, prompts prefilled one by one."""
    made, layout = make(kind, EXPLICIT)
    made.model.set_attn_implementation(attention)
    given = arguments(made, layout, samples=2)
    expected = rollout(*given)
    monkeypatch.setattr(engine, "CHUNK", {"cpu": 1})
    monkeypatch.setattr(engine, "PREFILL_TOKENS", {"cpu": 1})
    monkeypatch.setattr("rl_soft.rollouts.cache.RENUMBER", 8)
    with caplog.at_level(logging.INFO):
        for budget in (100, 190):
            assert_same(rollout(*given, token_budget=budget), expected)
    lines = [r.message for r in caplog.records if "rollout" in r.message]
    assert len(lines) == 2 and "12 rows of up to 36 positions are over the budget of 100 positions; 2 rows" in lines[0]


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2"])
def test_the_step_for_graphs_is_the_step(kind, monkeypatch):
    """What a GPU runs: shapes in grains, columns as numbers on the device, looks and moves now and then."""
    made, layout = make(kind, EXPLICIT)
    given = arguments(made, layout)
    expected = rollout(*given)
    monkeypatch.setattr(walk.sampling, "draw", lambda *args: None)
    for name, value in {"GRAIN": 16, "CHUNK": 32, "LOOK_EVERY": 5, "IDLE": 0.5}.items():
        monkeypatch.setattr(engine, name, {"cpu": value})
    for budget in (None, 200):
        assert_same(rollout(*given, token_budget=budget), expected)


@pytest.mark.parametrize("grain", [1, 16])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_nobody_wrote_is_not_read(kind, grain, monkeypatch):
    """New buffers hold whatever was in memory: NaN here."""
    made, layout = make(kind, EXPLICIT)
    given = arguments(made, layout)
    expected = rollout(*given)
    plain = Tensor.new_empty

    def new_empty(*args, **kwargs):
        made = plain(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    for name, value in {"GRAIN": grain, "CHUNK": 4, "LOOK_EVERY": 3}.items():
        monkeypatch.setattr(engine, name, {"cpu": value})
    for budget in (None, 200):
        assert_same(rollout(*given, token_budget=budget), expected)


def test_the_order_of_the_rows_changes_nothing():
    made, layout = make("llama", EXPLICIT)
    model, _, prompts, seeds, eos = arguments(made, layout)
    expected = rollout(model, layout, prompts, seeds, eos)
    shuffled = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    out = rollout(model, layout, [prompts[i] for i in shuffled], seeds[shuffled], eos, token_budget=150)
    for name in ("completion_ids", "support", "mask", "finished"):
        assert torch.equal(getattr(out, name), getattr(expected, name)[shuffled])
    again = rollout(model, layout, prompts, seeds + 1, eos)
    assert not torch.equal(again.completion_ids[:, :5], expected.completion_ids[:, :5])


class Memory:
    """A device that holds `rows` rows of one step, and runs out at a larger one."""

    def __init__(self, model, rows: int, monkeypatch) -> None:
        self.failures, inner = 0, model.forward

        def forward(*args, **kwargs):
            out = inner(*args, **kwargs)
            if kwargs["inputs_embeds"].shape[1] == 1 and len(kwargs["inputs_embeds"]) > rows:
                self.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return out

        monkeypatch.setattr(model, "forward", forward)


@pytest.mark.parametrize("rows_at_once", [1, 5])
def test_out_of_memory_halves_the_rows_and_loses_nothing(rows_at_once, monkeypatch, caplog):
    made, layout = make("qwen2", EXPLICIT)
    given = arguments(made, layout)
    expected = rollout(*given)
    memory = Memory(made.model, rows_at_once, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert_same(rollout(*given), expected)
    lines = [r.message for r in caplog.records]
    assert memory.failures == len(lines) and lines[0] == "rollout: out of memory; it goes on with 9 rows at a time"
    monkeypatch.undo()
    memory = Memory(made.model, 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        rollout(*given)


def test_out_of_memory_late_and_in_a_prefill(monkeypatch):
    made, layout = make("llama", EXPLICIT)
    given = arguments(made, layout)
    expected = rollout(*given)
    inner, calls = made.model.forward, []

    def forward(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) in (1, 9, 14):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return inner(*args, **kwargs)

    monkeypatch.setattr(made.model, "forward", forward)
    assert_same(rollout(*given, token_budget=500), expected)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    made, layout = make()
    monkeypatch.setattr(made.model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        rollout(*arguments(made, layout))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_their_row_alone(bad, monkeypatch, caplog):
    """One id's row of the embedding is spoilt: the rows that are fed it fail at the next position, others do not."""
    made, layout = make("llama", replace(EXPLICIT, thought="token"))
    given = arguments(made, layout)
    expected = rollout(*given)
    spoilt = int(expected.completion_ids[0, 2])
    has = ((expected.completion_ids == spoilt) & expected.mask)[:, :-1].any(-1)
    assert has.any() and not has.all()
    inner = made.model.forward

    def forward(*args, **kwargs):
        out = inner(*args, **kwargs)
        if kwargs["inputs_embeds"].shape[1] == 1:
            hit = (kwargs["inputs_embeds"][:, 0] == made.model.get_input_embeddings().weight[spoilt]).all(-1)
            out.logits[hit, :, 3] = bad
        return out

    monkeypatch.setattr(made.model, "forward", forward)
    with caplog.at_level(logging.WARNING):
        out = rollout(*given, token_budget=150)
    at = ((expected.completion_ids == spoilt) & expected.mask).int().argmax(-1)  # the first time
    failed = out.failed.nonzero()[:, 0].tolist()
    assert f"{len(failed)} of 18 rows stopped at logits that are not finite" in caplog.text
    for i in range(18):
        if i in failed:
            assert has[i] and int(out.lengths[i]) == int(at[i]) + 2 and not out.finished[i]
            assert not out.action_mask[i].any()
        else:
            n = int(expected.lengths[i])
            assert int(out.lengths[i]) == n and torch.equal(out.completion_ids[i, :n], expected.completion_ids[i, :n])
            assert not has[i] or int(at[i]) == n - 1
    for x in (out.log_probs, out.entropy, out.support_log_probs, out.outside):
        assert x.isfinite().all()


def test_a_nan_in_the_cache_does_not_reach_the_next_row(monkeypatch):
    """A row whose keys and values become NaN leaves its place to others, which attend to none of it."""
    made, layout = make("llama", replace(EXPLICIT, thought="token"))
    model, _, prompts, seeds, eos = arguments(made, layout)
    expected = rollout(model, layout, prompts, seeds, eos)
    first = max(range(18), key=lambda i: len(prompts[i]))  # enters first
    inner, calls = engine.mix_embeddings, []

    def spoil(embedding, support, log_weights):
        calls.append(1)
        fed = inner(embedding, support, log_weights)
        if len(calls) == 1:
            fed[0] = float("nan")
        return fed

    monkeypatch.setattr(engine, "mix_embeddings", spoil)
    out = rollout(model, layout, prompts, seeds, eos, token_budget=80)
    assert out.failed.tolist() == [i == first for i in range(18)]
    others = [i for i in range(18) if i != first]
    width = out.completion_ids.shape[1]
    assert torch.equal(out.completion_ids[others], expected.completion_ids[others, :width])


def test_adapters_unmerged_and_merged():
    from peft import LoraConfig, get_peft_model

    made, layout = make()
    plain = rollout(*arguments(made, layout))
    torch.manual_seed(0)
    model = get_peft_model(made.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    model, _, prompts, seeds, eos = arguments(policy.Policy(model, made.tokenizer, None), layout)
    out = rollout(model, layout, prompts, seeds, eos)
    assert not torch.equal(out.log_probs, plain.log_probs)
    assert_equals_plain_loop(out, model, layout, prompts, seeds, eos, [0, 7])
    model.merge_adapter()
    assert_same(rollout(model, layout, prompts, seeds, eos), out, atol=2e-4)


def test_models_that_cannot_think_in_soft_tokens_are_refused_by_name():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

    _, layout = make()
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        rollout(t5, layout, [[1]], None, [2])
    made, _ = make()
    made.model.config.vision_config = {"patch_size": 14}
    with pytest.raises(ValueError, match="LlamaForCausalLM has vision_config"):
        rollout(made.model, layout, [[1]], None, [2])
    mamba = AutoConfig.for_model(
        "jamba", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
        num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="rollouts know full and sliding attention"):
        rollout(AutoModelForCausalLM.from_config(mamba), layout, [[6, 7, 8]], None, [2])


def test_the_mass_outside_is_right_where_it_underflows():
    phi = torch.tensor([[0.0, -1.0, -2.0, -3.0], [0.0, -150.0, -160.0, -170.0]]).double().log_softmax(-1)
    ids = torch.tensor([[0, 2], [0, 1]])
    for rows_ in (slice(0, 1), slice(0, 2)):  # alone, the first takes the short way
        own = phi[rows_].float()
        expected = phi[rows_].scatter(-1, ids[rows_], -torch.inf).logsumexp(-1).float()
        torch.testing.assert_close(_log_outside(own.exp(), own.clone(), ids[rows_]), expected, atol=1e-5, rtol=1e-6)
    everything = torch.arange(4).expand(2, 4)
    own = phi.float()
    assert _log_outside(own.exp(), own.clone(), everything).isneginf().all()


@pytest.mark.parametrize("control", ["zero", "shuffle", "repeat"])
def test_controls_change_what_is_fed_and_not_what_is_recorded_of_the_first_thought(control):
    made, layout = make()
    model, _, prompts, seeds, eos = arguments(made, layout, samples=1)
    plain = rollout(model, layout, prompts, seeds, eos)
    out = rollout(model, layout, prompts, seeds, eos, control=control)
    assert torch.equal(out.support[:, 0], plain.support[:, 0])
    same = 1 if control == "repeat" else 0  # the second thought follows the first, fed as it is
    torch.testing.assert_close(out.log_probs[:, : same + 1], plain.log_probs[:, : same + 1], atol=2e-5, rtol=0)
    assert not torch.equal(out.log_probs[:, same + 1], plain.log_probs[:, same + 1])
    if control == "shuffle":
        with pytest.raises(ValueError, match="control shuffle needs all 6 rows at once"):
            rollout(model, layout, prompts, seeds, eos, control=control, token_budget=100)


def test_graphs_are_recorded_the_second_time_and_given_up_where_they_fail(monkeypatch, caplog):
    """The bookkeeping of `Replay`, with a stand-in for CUDA: recording runs the step's Python and none of its work."""
    ran: list[str] = []

    class Graph:
        def replay(self):
            ran.append("replayed")

    @contextmanager
    def recording(graph, pool, capture_error_mode):
        ran.append("recording")
        yield
        ran.pop()  # what the step appended while it was recorded did not happen

    for name, value in {
        "CUDAGraph": Graph,
        "graph": recording,
        "synchronize": int,
        "MemPool": lambda: SimpleNamespace(id=(0, 1)),
        "get_sync_debug_mode": int,
        "set_sync_debug_mode": id,
        "current_stream": int,
        "set_stream": id,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = Replay(torch.device("cuda"))
    for key in ("a", "a", "b", "a", "a"):
        replay.run(key, lambda: ran.append("ran"))
    assert ran == ["ran", "recording", "replayed", "ran", "replayed", "replayed"]

    @contextmanager
    def refused(graph, pool, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    ran.clear()
    monkeypatch.setattr(torch.cuda, "graph", refused)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            replay.run("b", lambda: ran.append("ran"))
    assert ran == ["ran"] * 3 and not replay.on
    assert "without a CUDA graph (operation not permitted" in caplog.text
    on_cpu = Replay(torch.device("cpu"))
    for _ in range(3):
        on_cpu.run("a", lambda: ran.append("ran"))
    assert ran == ["ran"] * 6
