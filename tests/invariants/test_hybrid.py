"""Thought hybrid: the density is the gumbel thought's; the training pass feeds the projected states that rollouts fed.

pytest tests/invariants/test_hybrid.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import rows, tiny_policy
from peft import LoraConfig, get_peft_model
from test_codi import batch_of, make
from test_grpo import THINKING, soft_trainer, train
from test_ppo import make as ppo_trainer

from rl_soft.model import policy
from rl_soft.model.projector import add_projector, beside_adapter
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.model.side_modules import language_model
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address

HYBRID = replace(THINKING, thought="hybrid")


def gated(model_type="llama", gate=0.5):
    """A tiny model whose projected states weigh about as much as its embeddings."""
    made = tiny_policy(model_type)
    add_projector(made.model, gated=True)
    scale = made.model.get_input_embeddings().weight.std()
    with torch.no_grad():
        made.model.projector.norm.weight.mul_(scale)
        made.model.projector.gate.fill_(gate)
    return made


def saved(made, folder, thinking):
    """The folder of a policy with a projector, as CODI leaves it."""
    trainer = make(folder / "run", made=made, thought=thinking.thought)
    policy.save(folder / "model", trainer.save_model, made.tokenizer, thinking, True)
    return str(folder / "model")


def run(made, thinking, problems, samples=1, noise=True, **kwargs):
    layout = Layout(thinking, made.tokenizer)
    prompts = [layout.prompt_ids(r.question) for r in problems for _ in range(samples)]
    seeds = torch.tensor([address(0, r.id, s) for r in problems for s in range(samples)]) if noise else None
    return rollout(made.model, layout, prompts, seeds, [made.tokenizer.eos_token_id], **kwargs)


def recorded(made, out, thinking, **values):
    """What the training pass is given of a rollout."""
    P, pad_id = max(map(len, out.prompt_ids)), made.tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (P - len(p)) + p for p in out.prompt_ids])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in out.prompt_ids])
    soft = SoftInputs(ids, out.support, out.log_weights, out.action_mask, out.thought_mask, thinking, **values)
    return {"attention_mask": torch.cat([mask, out.mask.long()], dim=1), "soft": soft}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_the_training_pass_recomputes_the_rollouts_density(model_type, lora):
    made = gated(model_type)
    add_soft_forward(made.model, chunk_size=7)
    if lora:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        made.model = get_peft_model(made.model, beside_adapter(config))
    out = run(made, HYBRID, rows(8), samples=2)
    scored = made.model(**recorded(made, out, HYBRID))
    torch.testing.assert_close(scored.log_probs, out.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.entropy, out.entropy, atol=1e-4, rtol=0)
    factored = made.model(**recorded(made, out, HYBRID, ratio="factored"))
    torch.testing.assert_close(factored.log_probs, out.support_log_probs[..., 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(factored.log_probs + factored.rest, out.log_probs, atol=1e-4, rtol=0)
    # Both parts of what is fed count: without the state, or without the mixture, the densities are others.
    gumbel = made.model(**recorded(made, out, replace(HYBRID, thought="gumbel"))).log_probs
    made.model.projector.gate.data.zero_()
    alone = made.model(**recorded(made, out, HYBRID)).log_probs
    assert (gumbel - out.log_probs).abs().max() > 0.01 < (alone - out.log_probs).abs().max()


def test_its_gradient_is_that_of_the_density():
    """Also through the states that are made again: by central differences, in float64 but for the density itself."""
    made = gated()
    out = run(made, HYBRID, rows(4))
    made.model.double()
    add_soft_forward(made.model)
    inputs = recorded(made, out, HYBRID)

    def total():
        return made.model(**inputs).log_probs[out.thought_mask].sum()

    projector, embedding = made.model.projector, made.model.get_input_embeddings().weight
    parameters = [projector.gate, projector.norm.bias, projector.inner.weight, embedding]
    for parameter, gradient in zip(parameters, torch.autograd.grad(total(), parameters), strict=True):
        torch.manual_seed(0)
        direction = torch.randn_like(parameter)
        if parameter is embedding:
            direction[made.tokenizer.pad_token_id] = 0  # nn.Embedding gives its padding row no gradient
        direction, values = direction / direction.norm(), []
        for move in (0.02, -0.04):
            parameter.data.add_(direction, alpha=move)
            values.append(total().item())
        parameter.data.add_(direction, alpha=0.02)
        expected = (gradient * direction).sum().item()
        assert (values[0] - values[1]) / 0.04 == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("thought", ["hidden", "hybrid"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_answer_does_not_depend_on_its_batch(model_type, thought):
    made, thinking = gated(model_type), replace(THINKING, thought=thought, max_answer_tokens=6)
    for noise in (False, True):
        together = run(made, thinking, rows(64), noise=noise)
        for i in range(0, 64, 16):
            alone = run(made, thinking, rows(64)[i : i + 1], noise=noise)
            n = int(alone.lengths[0])
            assert torch.equal(together.completion_ids[i, :n], alone.completion_ids[0])
            torch.testing.assert_close(together.log_probs[i, :n], alone.log_probs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("thought", ["hidden", "hybrid", "gumbel", "soft"])
def test_decoding_feeds_what_codi_trains(tmp_path, thought):
    """The rollout's greedy answers are those of the trainer's student pass, teacher-forced on them."""
    trainer = make(tmp_path, thought=thought, train_noise=False)
    layout, model = trainer.layout, trainer.model.eval()
    made = policy.Policy(model, layout.tokenizer, layout.thinking)
    out = run(made, layout.thinking, rows(8), noise=False)
    batch, n = batch_of(trainer, 8), layout.thinking.num_thoughts
    batch["student_ids"] = out.completion_ids[:, n:]
    with torch.no_grad():
        logits = trainer.student(model, batch)[0]
    at = len(layout.forced_after_cap) - 1
    answers = out.completion_ids[:, n + at + 1 :]
    real = out.mask[:, n + at + 1 :]
    assert real.any() and torch.equal(logits[:, at:-1].argmax(-1)[real], answers[real])


@pytest.mark.parametrize("ratio", ["joint", "factored", "top1"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains_the_projector_and_the_densities_stay_exact(tmp_path, ratio, lora):
    made = gated()
    before = {k: v.clone() for k, v in made.model.projector.state_dict().items()}
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = soft_trainer(tmp_path, HYBRID, made, ratio=ratio, num_iterations=2, max_steps=4, peft_config=peft)
    logs = train(trainer)
    assert all(log["rollout/density_gap"] < 1e-4 for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)
    after = made.model.projector.state_dict()
    assert set(after) == set(before) and all(not torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_hidden_checkpoint_goes_on_as_hybrid_and_resumes(tmp_path, lora):
    """It gains a gate, of a size that fits; the checkpoint's projector is read back, so two steps and two are four."""
    made = tiny_policy()
    add_projector(made.model, gated=False)
    folder = saved(made, tmp_path, replace(THINKING, thought="hidden"))
    weights = []
    for resume in (None, str(tmp_path / "rl" / "checkpoint-2")):
        start = policy.load_policy(folder)
        assert start.thinking.thought == "hidden"
        gate = start.model.projector.gate.item()
        peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        trainer = soft_trainer(
            tmp_path / "rl", HYBRID, start, max_steps=4, save_strategy="steps", save_steps=2,
            beta=0.0 if lora else 0.1, peft_config=peft,
        )  # fmt: skip
        assert start.model.projector.gate.item() == gate > 0
        logs = train(trainer, resume_from_checkpoint=resume)
        weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        if resume is None and not lora:
            assert logs[0]["kl"] == pytest.approx(0, abs=1e-5) and logs[-1]["kl"] > 1e-4  # the reference has it too
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    again = policy.load_policy(str(tmp_path / "rl" / "checkpoint-4"))
    inside = language_model(again.model).projector.state_dict()
    end = {k.partition("projector.")[2]: v for k, v in weights[0].items() if "projector." in k}
    assert set(inside) == set(end) and all(torch.equal(value, end[name]) for name, value in inside.items())


@pytest.mark.parametrize(
    "values,message",
    [
        ({"ratio": "pathwise"}, "ratio pathwise is not made for thought hybrid, which takes top1, joint or factored"),
        ({"ratio": "conditional"}, "ratio conditional is not made for thought hybrid"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: with thought hybrid"),
        ({"beta": 0.1, "peft_config": LoraConfig(task_type="CAUSAL_LM")}, "beta 0.1: the reference is the adapter"),
    ],
)
def test_what_hybrid_cannot_do_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        soft_trainer(tmp_path, HYBRID, gated(), **values)


def test_rl_needs_a_density_and_a_projector(tmp_path):
    with pytest.raises(ValueError, match=r"thought hidden has no density .* use hybrid"):
        soft_trainer(tmp_path, replace(THINKING, thought="hidden"), gated())
    with pytest.raises(ValueError, match="thought hybrid needs a model with a projector"):
        soft_trainer(tmp_path, HYBRID)


def test_ppo_keeps_head_and_projector_apart(tmp_path):
    made = gated()
    trainer = ppo_trainer(tmp_path / "run", thinking=HYBRID, made=made, max_steps=2)
    assert all(log["rollout/density_gap"] < 1e-4 for log in train(trainer))
    policy.save(tmp_path / "model", trainer.save_model, made.tokenizer, HYBRID, True)
    again = policy.load_policy(str(tmp_path / "model")).model.state_dict()
    expected = {k: v for k, v in made.model.state_dict().items() if "value_head" not in k}
    assert set(again) == set(expected) and all(torch.equal(v, again[k]) for k, v in expected.items())
    assert (tmp_path / "model" / "value_head.safetensors").exists()
