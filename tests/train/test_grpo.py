"""The seam with TRL: K = 1 is stock GRPO to the last digits, recorded densities are recomputed, runs resume exactly.

pytest tests/train/test_grpo.py
"""

import functools
import inspect
import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, VOCABULARY, rows, tiny_policy
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl_soft.model import policy
from rl_soft.model.logit_map import LogitMap
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.grpo import SoftGRPOTrainer

THINKING = Thinking(thought_k=3, num_thoughts=3, answer_prompt="#", max_answer_tokens=4)
# A discrete policy whose completions are answer tokens alone: what stock TRL can score too.
TOKENS = replace(THINKING, thought="token", thought_k=1, num_thoughts=0, answer_prompt="")


def config(tmp_path, kind=GRPOConfig, **values):
    return kind(
        **{
            "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
            "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3, "learning_rate": 1e-2,
            "gradient_checkpointing": False, "disable_dropout": True, "save_strategy": "no", "disable_tqdm": True,
            "seed": 0, "lr_scheduler_type": "constant", "max_completion_length": 16, **values,
        }
    )  # fmt: skip


def odd_reward(completions, **kwargs):
    """Varies within a group and needs no ability: the parity of the completion's digits, plus its length."""
    return [sum(ord(c) for c in text) % 5 + 0.1 * len(text) for text in completions]


def dataset():
    return Dataset.from_list([{"prompt": r.question, "id": r.id, "answer": r.answer} for r in rows(8)])


class Keep(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))


def train(trainer, **kwargs):
    keep = Keep()
    trainer.add_callback(keep)
    trainer.train(**kwargs)
    return keep.logs


def soft_trainer(tmp_path, thinking=THINKING, made=None, **values):
    peft = values.pop("peft_config", None)
    own = {k: values.pop(k) for k in ("ratio", "rest_weight", "thought_epsilon", "order") if k in values}
    own.setdefault("ratio", "joint")
    made = made or tiny_policy()
    return SoftGRPOTrainer(
        made.model, reward_funcs=odd_reward, args=config(tmp_path, **values), train_dataset=dataset(),
        processing_class=made.tokenizer, peft_config=peft, thinking=thinking, **own,
    )  # fmt: skip


class Replayed(GRPOTrainer):
    """Stock TRL, given our prompts' ids and the completions that our trainer sampled."""

    def __init__(self, *args, layout, completions, **kwargs):
        self.layout, self.completions = layout, list(completions)
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts):
        return [self.layout.prompt_ids(p) for p in prompts], None, {}

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return self.completions.pop(0), None

    def _generate(self, prompts):
        out = list(super()._generate(prompts))
        out[2] = [[0, *[1] * (len(ids) - 1)] for ids in out[1]]  # <eot> is fed, not sampled
        return tuple(out)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss_type": "grpo", "num_iterations": 2, "beta": 0.1, "max_steps": 4},
        {"loss_type": "bnpo", "epsilon_high": 0.28},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
        {"loss_type": "sapo"},
        {"importance_sampling_level": "sequence", "num_iterations": 2},
        {"temperature": 0.7, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) or "default",
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_slot_is_stock_grpo(tmp_path, values, lora):
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    values = {**values, "beta": values.get("beta", 0.0) if lora else 0.0}
    one_slot_is_stock(tmp_path, tiny_policy, peft if lora else None, **values)


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}


def policy_like(model_type, **values):
    """A random model whose densities differ visibly between positions, and whose routers have preferences."""
    made = policy.make({**TINY, "model_type": model_type, **values}, VOCABULARY, 0)
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(4)
        for name, weight in made.model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                weight.mul_(30)
    return made


@pytest.mark.parametrize(
    "model_type,values",
    [
        ("granite", {"logits_scaling": 0.25, "embedding_multiplier": 2.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("minicpm3", {"dim_model_base": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                      "qk_nope_head_dim": 8, "v_head_dim": 16}),  # the states are scaled, not the logits
    ],
)  # fmt: skip
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_model_that_scales_its_logits_is_stock_grpo_too(tmp_path, model_type, values, lora):
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    made = functools.partial(policy_like, model_type, **values)
    one_slot_is_stock(tmp_path, made, peft if lora else None, beta=0.1 if lora else 0.0, num_iterations=2)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_the_load_balancing_loss_is_that_of_stock_grpo(tmp_path, model_type):
    sizes = {"moe_intermediate_size": 32, "head_dim": 16} if model_type != "olmoe" else {}
    made = functools.partial(policy_like, model_type, **sizes, **EXPERTS)
    logs = one_slot_is_stock(tmp_path, made, None, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert all(log["aux_loss"] > 0.5 for log in logs)


def one_slot_is_stock(tmp_path, make, peft, **values):
    """Trains `make()` with our trainer, replays its completions with stock TRL, and compares; returns our logs."""
    values |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}  # weights then differ as gradients do
    thinking = replace(TOKENS, temperature=values.get("temperature", 1.0))
    torch.manual_seed(0)
    ours = soft_trainer(tmp_path / "a", thinking, make(), peft_config=peft, **values)
    completions = []
    generate = ours._generate_single_turn

    def remember(*args, **kwargs):
        ids, log_probs = generate(*args, **kwargs)
        completions.append([list(c) for c in ids])
        return ids, log_probs

    ours._generate_single_turn = remember
    ours_logs = train(ours)

    made, length = make(), ours.args.max_completion_length  # which thinking decides
    torch.manual_seed(0)
    stock = Replayed(
        made.model, reward_funcs=odd_reward, args=config(tmp_path / "b", **values, max_completion_length=length),
        train_dataset=dataset(), processing_class=made.tokenizer, peft_config=peft,
        layout=Layout(thinking, made.tokenizer), completions=completions,
    )  # fmt: skip
    stock_logs = train(stock)
    assert len(ours_logs) == len(stock_logs) >= 2
    assert any(log["grad_norm"] > 1e-3 for log in ours_logs)
    for a, b in zip(ours_logs, stock_logs, strict=True):
        compared = ("loss", "grad_norm", "entropy", "kl", "reward", "aux_loss")
        keys = [k for k in b if k in compared or k.startswith("clip")]
        assert {k: a[k] for k in keys} == pytest.approx({k: b[k] for k in keys}, abs=1e-5, rel=1e-5)
    for (name, p), q in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)  # gradients within 1e-5
    return ours_logs


@pytest.mark.parametrize("thought_k,tau", [(1, 0.5), (3, 0.1), (20, 1.0)])
def test_the_density_is_recomputed_and_learning_moves_it(tmp_path, thought_k, tau):
    thinking = replace(THINKING, thought_k=thought_k, thought_tau=tau)
    logs = train(soft_trainer(tmp_path, thinking, num_iterations=2, max_steps=4))
    assert all(log["rollout/density_gap"] < 1e-4 for log in logs)
    assert logs[0]["thoughts/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(logs[1]["thoughts/ratio"] - 1) > 1e-4, "the second iteration is off-policy"
    assert all(log["grad_norm"] > 0 for log in logs)
    assert all(torch.tensor(v).isfinite() for log in logs for v in log.values() if isinstance(v, float))


@pytest.mark.parametrize("ratio", ["joint", "factored", "top1", "conditional", "pathwise"])
def test_every_ratio_is_recomputed_and_trains(tmp_path, ratio):
    logs = train(soft_trainer(tmp_path, ratio=ratio, num_iterations=2, max_steps=4))
    assert all(log["rollout/density_gap"] < 1e-4 for log in logs)
    assert all(log["grad_norm"] > 0 for log in logs)


@pytest.mark.parametrize("ratio", ["conditional", "pathwise"])
def test_experts_and_thoughts_fed_one_by_one_are_refused_in_a_line(tmp_path, ratio):
    made = policy_like("mixtral", **EXPERTS)
    with pytest.raises(ValueError, match=f"router_aux_loss_coef is 0.5, and ratio {ratio} feeds thoughts one by one"):
        soft_trainer(tmp_path, made=made, ratio=ratio)
    logs = train(soft_trainer(tmp_path, made=made, ratio=ratio, router_aux_loss_coef=0.0, max_steps=1))
    assert logs[0]["rollout/density_gap"] < 1e-4 and "aux_loss" not in logs[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_pass_of_another_model_ends_the_run_in_float32(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("rl_soft.model.scored_forward.logit_map", lambda model: LogitMap(0.5))
    made = tiny_policy()
    made.model.to(dtype)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if dtype != torch.float32 else None
    trainer = soft_trainer(tmp_path, made=made, max_steps=1, peft_config=adapter)
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=r"rollout/density_gap is \S+ at the first step, above 0.01 .*type llama"):
            trainer.train()
    else:
        assert train(trainer)[0]["rollout/density_gap"] > 0.1  # a warning alone: it may be rounding


def test_factored_has_the_joint_gradient_on_policy(tmp_path):
    """At ratio 1 the two factors' gradients add up to the joint's; with weight 0 only the strongest id's is left."""
    norms = {}
    for name, values in {
        "joint": {}, "factored": {"ratio": "factored"}, "alone": {"ratio": "factored", "rest_weight": 0.0},
        "top1": {"ratio": "top1"},
    }.items():  # fmt: skip
        norms[name] = train(soft_trainer(tmp_path / name, max_steps=1, **values))[0]["grad_norm"]
    assert norms["factored"] == pytest.approx(norms["joint"], rel=1e-4)
    assert norms["alone"] == pytest.approx(norms["top1"], rel=1e-4)
    assert norms["top1"] != pytest.approx(norms["joint"], rel=1e-2)


@pytest.mark.parametrize("ratio", ["top1", "conditional", "pathwise"])
def test_with_one_slot_every_score_is_the_tokens(tmp_path, ratio):
    """At K = 1 there is nothing but the strongest id; pathwise alone has no score of it, and no path to it either."""
    thinking = replace(THINKING, thought_k=1)
    joint, other = (
        train(soft_trainer(tmp_path / r, thinking, ratio=r, max_steps=1))[0]["grad_norm"] for r in ("joint", ratio)
    )
    assert (other == pytest.approx(joint, rel=1e-4)) == (ratio != "pathwise")


def test_gradients_flow_through_the_weights(tmp_path):
    """Ratio conditional is top1 plus a path through the weights, which closes as tau falls and they become one-hot."""
    norms = {}
    for tau in (1e-4, 1.0):
        thinking = replace(THINKING, thought_k=0, thought_tau=tau)
        for ratio in ("top1", "conditional"):
            logs = train(soft_trainer(tmp_path / f"{ratio}{tau}", thinking, ratio=ratio, max_steps=1))
            norms[ratio, tau] = logs[0]["grad_norm"]
    assert norms["conditional", 1.0] != pytest.approx(norms["top1", 1.0], rel=1e-3)
    assert norms["conditional", 1e-4] == pytest.approx(norms["top1", 1e-4], rel=1e-3)


def test_thoughts_have_a_clip_range_of_their_own(tmp_path):
    """With a vanishing range on thoughts, the second pass over a rollout clips about every thought that moved."""
    logs = {}
    for name, values in {"same": {}, "narrow": {"thought_epsilon": 1e-9}, "wide": {"thought_epsilon": 1e9}}.items():
        logs[name] = train(soft_trainer(tmp_path / name, num_iterations=2, max_steps=2, **values))[1]
    assert logs["narrow"]["thoughts/clip_fraction"] > logs["same"]["thoughts/clip_fraction"] >= 0
    assert logs["wide"]["thoughts/clip_fraction"] == 0
    assert logs["narrow"]["answer/clip_fraction"] == logs["same"]["answer/clip_fraction"]


def test_noise_is_addressed_not_ordered(tmp_path):
    """Whatever the micro-batch, the same rows meet the same noise, so the runs agree."""
    one = train(soft_trainer(tmp_path / "a", per_device_train_batch_size=8))
    many = train(soft_trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4))
    for a, b in zip(one, many, strict=True):
        for key in ("reward", "loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-4)


@pytest.mark.parametrize(
    "values,saved",
    [
        ({}, 2),
        ({"num_iterations": 2}, 2),
        ({"num_generations": 2, "max_steps": 6}, 2),  # 2 steps an epoch: the checkpoint is at its end
        ({"num_generations": 2, "max_steps": 6}, 4),
        ({"num_generations": 2, "max_steps": 6, "save_steps": 3}, 3),  # in the middle of the second epoch
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v),
)
def test_steps_are_some_and_resume_and_the_others(tmp_path, values, saved):
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **values}
    whole = soft_trainer(tmp_path / "a", **values)
    whole_logs = train(whole)
    resumed = soft_trainer(tmp_path / "b", **values)
    logs = train(resumed, resume_from_checkpoint=str(tmp_path / f"a/checkpoint-{saved}"))
    for a, b in zip(whole_logs[saved:], logs, strict=True):
        assert all(a.get(k) == b.get(k) for k in ("loss", "grad_norm", "reward"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    state = json.loads((tmp_path / f"a/checkpoint-{saved}/trainer_state.json").read_text())
    assert state["global_step"] == saved


def test_adapter_opens_with_peft_alone(tmp_path):
    from peft import PeftModel

    trainer = soft_trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    train(trainer)
    trainer.save_model(str(tmp_path / "model"))
    plain = PeftModel.from_pretrained(tiny_policy().model, tmp_path / "model")
    ids = torch.arange(4)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert any(p.abs().max() > 0 for p in moved)


@pytest.mark.parametrize(
    "thinking,values,message",
    [
        (replace(THINKING, thought="soft"), {}, "point mass"),
        (THINKING, {"tools": [print]}, "tools cannot be used"),
        (THINKING, {"rollout_func": print}, "rollout_func cannot be used"),
        (replace(THINKING, phase="explicit", end_of_thinking="#"), {"ratio": "conditional"}, "needs phase latent"),
        (THINKING, {"train_dataset": dataset().add_column("image", ["x"] * 8)}, "train_dataset has a column image"),
        (THINKING, {"args": {"vllm_max_model_length": 9}}, "it is read with use_vllm true"),
        (THINKING, {"args": {"top_p": 0.9}, "ratio": "conditional"}, "top_p 0.9: ratio conditional makes thoughts"),
        (THINKING, {"args": {"use_transformers_paged": True}}, "continuous batching takes token ids only"),
        (THINKING, {"args": {"gradient_checkpointing": True}, "ratio": "pathwise"}, "gradient_checkpointing"),
        (THINKING, {"args": {"importance_sampling_level": "sequence"}, "thought_epsilon": 0.1}, "thought_epsilon: "),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path, monkeypatch, thinking, values, message):
    """Before TRL makes anything: with vLLM it would start an engine."""
    made = tiny_policy()
    given = {"train_dataset": dataset(), **values, "args": config(tmp_path, **values.get("args", {}))}
    monkeypatch.setattr(GRPOTrainer, "__init__", refuse_to_start(GRPOTrainer.__init__))
    given |= {"processing_class": made.tokenizer, "thinking": thinking}
    with pytest.raises(ValueError, match=message):
        SoftGRPOTrainer(made.model, reward_funcs=odd_reward, **given)
    args = given.pop("args")
    with pytest.raises(ValueError, match=message):  # by position too
        SoftGRPOTrainer(made.model, odd_reward, args, **given)


@pytest.mark.parametrize("asked", [False, True])
def test_dropout_is_switched_off(tmp_path, asked):
    made = tiny_policy("gpt2")
    made.model.transformer.drop.p = 0.1
    assert soft_trainer(tmp_path, made=made, disable_dropout=asked).model.transformer.drop.p == 0


def refuse_to_start(init):
    @functools.wraps(init)
    def started(*args, **kwargs):
        pytest.fail("TRL's trainer was started")

    return started


def test_the_methods_we_override_still_exist_as_we_know_them():
    expected = {
        "_tokenize_prompts": ["self", "prompts"],
        "_generate": ["self", "prompts"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters
    assert list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)[:2] == ["self", "prompt_ids"]
    density = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    ours = list(inspect.signature(SoftGRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert density[:8] == ours[:8]
