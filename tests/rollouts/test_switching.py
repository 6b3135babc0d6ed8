"""Thoughts that switch between soft and token: the rule, the density of the mode, what is trained, saved and fed.

pytest tests/rollouts/test_switching.py
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import rows, tiny_policy
from peft import LoraConfig, PeftModel
from test_decoding import logits_before, run
from test_grpo import soft_trainer, train
from test_pipeline import GRPO, write
from transformers import AutoModelForCausalLM

from rl_soft.config.recipe import load_recipe
from rl_soft.model import policy
from rl_soft.model.gate import add_gate
from rl_soft.model.think import mix_embeddings
from rl_soft.rollouts.switching import STREAM
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.densities import GumbelTopK, SoftToken
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import uniform
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import pipeline

ENTROPY = Thinking(
    phase="explicit", end_of_thinking="=", num_thoughts=12, thought_k=3, max_answer_tokens=4, switch="entropy",
    switch_window=2,
)  # fmt: skip
GATE = replace(ENTROPY, switch="gate")


def gated(bias=0.0, scale=0.3):
    made = tiny_policy()
    add_gate(made.model)
    with torch.no_grad():
        gate = made.model.switch_gate
        gate.weight.normal_(std=scale, generator=torch.Generator().manual_seed(1))
        gate.bias.fill_(bias)
    made.model.eval()
    return made


def is_soft(out):
    return out.thought_mask & ~out.log_weights[..., 1].isneginf()


@pytest.mark.parametrize("thought", ["gumbel", "soft"])
@pytest.mark.parametrize("decoding", [None, Decoding(top_k=8)], ids=["whole", "cut"])
def test_modes_follow_the_published_rule(thought, decoding):
    """Replayed from the recorded entropies, a row at a time."""
    made = tiny_policy()
    made.model.eval()
    thinking = replace(
        ENTROPY, thought=thought, num_thoughts=20, end_of_thinking="==", switch_window=1, thought_temperature=0.3
    )
    out = run(made, thinking, decoding)
    changes = 0
    for i in range(len(out.seeds)):
        soft, reference, dwell = True, None, 0
        for t in out.thought_mask[i].nonzero()[:, 0].tolist():
            now = round(float(out.entropy[i, t]), 6)
            switch = reference is not None and (now < reference if soft else now > reference and dwell >= 1)
            if switch:
                soft, changes = not soft, changes + 1
            reference, dwell = (now, 0) if switch or reference is None else (reference, dwell + 1)
            assert bool(is_soft(out)[i, t]) == soft, (i, t)
    assert changes > 5


def test_a_thought_that_is_a_token_has_a_tokens_density_and_is_fed_as_one():
    made = tiny_policy()
    made.model.eval()
    out = run(made, ENTROPY)
    tokens = (out.thought_mask & ~is_soft(out)).nonzero().tolist()
    assert tokens
    for row, t in tokens[:20]:
        phi = logits_before(made, out, row, t).log_softmax(-1)
        torch.testing.assert_close(out.log_probs[row, t], phi[out.support[row, t, 0]], atol=1e-4, rtol=1e-4)
        embedding = made.model.get_input_embeddings()
        fed = mix_embeddings(embedding, out.support[row, t], out.log_weights[row, t])
        assert torch.equal(fed, embedding(out.support[row, t, 0]))


def test_a_gate_draws_modes_by_their_probability_and_says_it():
    made = gated()
    out = run(made, GATE, samples=20)
    states = []
    hook = made.model.base_model.register_forward_hook(lambda *a: states.append(a[2].last_hidden_state))
    seen = 0
    for row in range(0, 120, 11):
        for t in out.thought_mask[row].nonzero()[:, 0].tolist():
            scores = logits_before(made, out, row, t)
            p = made.model.switch_gate(states[-1][0, -1]).sigmoid()
            soft = bool(is_soft(out)[row, t])
            drawn = uniform(out.seeds[row : row + 1], t, 1, STREAM)[0, 0]
            assert soft == bool(drawn < p)
            of_mode = (p if soft else 1 - p).log()
            torch.testing.assert_close(out.mode_log_probs[row, t], of_mode, atol=1e-4, rtol=1e-4)
            k = 3 if soft else 1
            thought = SoftToken(out.support[row, t][:k], out.log_weights[row, t][:k])
            density = GumbelTopK(scores, k, GATE.thought_tau).log_prob(thought) + of_mode
            torch.testing.assert_close(out.log_probs[row, t], density, atol=1e-3, rtol=1e-4)
            seen += 1
    hook.remove()
    share = is_soft(out).sum() / out.thought_mask.sum()
    assert seen > 30 and 0.2 < share < 0.8
    for bias, expected in ((30.0, 1.0), (-30.0, 0.0)):
        sure = run(gated(bias, 0.0), GATE)
        assert is_soft(sure).sum() / sure.thought_mask.sum() == expected
        assert sure.mode_log_probs.abs().max() < 1e-6


def test_a_gate_that_is_sure_of_soft_is_no_gate():
    plain = run(gated(), replace(GATE, switch="none"))
    sure = run(gated(30.0, 0.0), GATE)
    for name in ("support", "log_weights", "completion_ids"):
        assert torch.equal(getattr(plain, name), getattr(sure, name))


@pytest.mark.parametrize("switch", ["entropy", "gate"])
@pytest.mark.parametrize("ratio", ["top1", "joint", "factored"])
def test_switching_thoughts_are_recomputed_and_train(tmp_path, switch, ratio):
    thinking = replace(ENTROPY, switch=switch)
    logs = train(soft_trainer(tmp_path, thinking, ratio=ratio, num_iterations=2, max_steps=4))
    assert all(log["rollout/density_gap"] < 1e-4 for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)
    assert all(0 < log["thoughts/soft_share"] < 1 for log in logs[::2])  # of the steps that roll out
    assert logs[0]["thoughts/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(logs[1]["thoughts/ratio"] - 1) > 1e-4


def test_soft_share_shows_a_gate_that_learns_to_take_tokens(tmp_path):
    """The reward is for thoughts that are tokens alone: more text and less of everything else cannot earn it."""
    made = gated(scale=0.0)
    trainer = soft_trainer(
        tmp_path, replace(GATE, num_thoughts=4), made, ratio="top1", max_steps=25, learning_rate=0.05,
        per_device_train_batch_size=16, num_generations=16,
    )  # fmt: skip
    for name, p in made.model.named_parameters():
        p.requires_grad_("switch_gate" in name)

    def tokens(completions, **kwargs):
        soft = trainer._soft
        chosen = soft.thought_mask & soft.log_weights[..., 1].isneginf()
        return (chosen.sum(-1) / soft.thought_mask.sum(-1).clamp(min=1)).tolist()

    trainer.reward_funcs[0] = tokens
    logs = train(trainer)
    assert logs[0]["thoughts/soft_share"] > 0.35 and logs[-1]["thoughts/soft_share"] < 0.15


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_gate_is_saved_beside_the_weights_resumed_and_loaded(tmp_path, lora):
    base = tmp_path / "base"
    made = tiny_policy()
    policy.save(base, made.model.save_pretrained, made.tokenizer, GATE, True)

    def trainer(folder, **values):
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        loaded = policy.load_policy(str(base))
        return soft_trainer(tmp_path / folder, GATE, loaded, ratio="top1", peft_config=peft, save_strategy="steps",
                            save_steps=2, **values)  # fmt: skip

    whole = trainer("whole", max_steps=4)
    logs = train(whole)
    trainer("parts", max_steps=2).train()
    rest = train(trainer("parts", max_steps=4), resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2"))
    assert [log["loss"] for log in rest] == [log["loss"] for log in logs[2:]]
    folder = tmp_path / "whole/checkpoint-4"
    assert (folder / "switch_gate.safetensors").exists()
    assert not any("switch_gate" in key for key in keys_of(folder))
    if lora:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        AutoModelForCausalLM.from_pretrained(folder)
    policy.save(tmp_path / "model", whole.save_model, made.tokenizer, GATE, True)
    loaded = policy.load_policy(str(tmp_path / "model"))
    gate = policy.language_model(loaded.model).switch_gate
    trained = policy.language_model(whole.model).switch_gate
    assert trained.weight.abs().max() > 0
    assert torch.equal(gate.weight, trained.weight) and torch.equal(gate.bias, trained.bias)
    again = soft_trainer(tmp_path / "again", GATE, loaded, ratio="top1", max_steps=1)
    assert torch.equal(policy.language_model(again.model).switch_gate.weight, trained.weight)


def keys_of(folder):
    from safetensors import safe_open

    for file in folder.glob("*model*.safetensors"):
        with safe_open(file, "pt") as opened:
            yield from opened.keys()


@pytest.mark.parametrize(
    "values,message",
    [
        ({"phase": "latent"}, "switch must be none when phase is latent"),
        ({"thought": "token"}, "switch must be none for thought token; thought soft or gumbel can be a token too"),
        ({"thought": "dirichlet"}, "switch must be none for thought dirichlet"),
        ({"thought_k": 1}, "switch must be none when thought_k is 1"),
        ({"switch": "entropie"}, "switch must be one of none, entropy, gate, got 'entropie'"),
    ],
)
def test_what_cannot_switch_is_told(values, message):
    with pytest.raises(ValueError, match=message):
        replace(ENTROPY, **values)


def test_what_a_gate_needs_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"switch gate needs a model with a gate \(switch_gate.safetensors\)"):
        run(tiny_policy(), GATE)
    with pytest.raises(ValueError, match=r"top_p 0\.9: a thought of one id hides its mode"):
        soft_trainer(tmp_path, GATE, ratio="top1", top_p=0.9)
    made = tiny_policy()
    from rl_soft.rollouts.engines import roll_of

    with pytest.raises(ValueError, match="switch gate is not available with engine vllm; use engine ours"):
        roll_of("vllm", None, "m", "float32", [Layout(GATE, made.tokenizer)], [rows(1)[0].question])


def test_a_recipe_with_a_gate_is_evaluated_before_and_after(tmp_path):
    """Before RL the gate is new; the folder of the result has it, and `eval` of that folder uses it."""
    made = tiny_policy()
    policy.save(tmp_path / "base", made.model.save_pretrained, made.tokenizer, GATE, True)
    keys = {
        **GRPO, "thought_k": 3, "phase": "explicit", "end_of_thinking": "=", "num_thoughts": 6, "switch": "gate",
        "model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "rl"), "ratio": "top1",
        "num_iterations": 1, "max_steps": 2, "eval_problems": 4, "answer_prompt": "",
        "vocabulary": None,
    }  # fmt: skip
    pipeline.run(load_recipe(write(tmp_path / "rl.yaml", keys)))
    for folder in ("eval_before", "eval_after"):
        assert json.loads((tmp_path / "rl" / folder / "eval.json").read_text())["decoder"]["switch"] == "gate"
    loaded = policy.load_policy(str(tmp_path / "rl/model"))
    assert loaded.thinking.switch == "gate" and loaded.model.switch_gate.weight.shape == (32,)
