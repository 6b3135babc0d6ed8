"""PPO: advantages equal their definition, GRPO is a special case, the value head learns, is saved and resumed.

pytest tests/train/test_ppo.py
"""

from dataclasses import replace

import pytest
import test_grpo
import torch
import yaml
from conftest import tiny_policy
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_grpo import dataset, odd_reward
from test_grpo import train as fit
from test_parallel import launch
from test_pipeline import metrics
from transformers import AutoModelForCausalLM

from rl_soft.config.recipe import load_recipe
from rl_soft.model import policy
from rl_soft.model.value_head import load_value_head
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import pipeline as train
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.ppo import SoftPPOConfig, SoftPPOTrainer, clipped_value_loss, gae

THINKING = Thinking(thought_k=4, num_thoughts=3, answer_prompt="#", max_answer_tokens=4)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def config(tmp_path, **values):
    return test_grpo.config(tmp_path, SoftPPOConfig, **{"num_generations": 2, **values})


OWN = ("ratio", "rest_weight", "gamma", "lam", "vf_coef", "value_clip", "value_learning_rate")


def make(tmp_path, kind=SoftPPOTrainer, thinking=THINKING, reward=odd_reward, made=None, peft=None, **values):
    own = {k: values.pop(k) for k in OWN if k in values}
    made = made or tiny_policy()
    torch.manual_seed(0)  # of the adapter's weights
    return kind(
        made.model, reward_funcs=reward, args=config(tmp_path, **values), processing_class=made.tokenizer,
        train_dataset=dataset(), peft_config=peft, thinking=thinking, **{"ratio": "joint", **own},
    )  # fmt: skip


def head_of(trainer):
    return trainer._language_model().value_head


def trunk_of(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "value_head" not in n}


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma,lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.0, 1.0)])
def test_gae_is_the_sum_that_defines_it(gamma, lam):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(6, generator=g), torch.randn(6, 9, generator=g)
    mask = torch.rand(6, 9, generator=g) < 0.6
    mask[0], mask[1], mask[2, :3] = True, False, False  # all actions, none, none at the start
    advantages = gae(rewards, values, mask, gamma, lam)
    assert not advantages[~mask].any()
    for b in range(6):
        v = [*values[b][mask[b]].tolist(), 0.0]  # the fed positions taken out
        n = len(v) - 1
        delta = [(rewards[b].item() if k == n - 1 else 0) + gamma * v[k + 1] - v[k] for k in range(n)]
        expected = [sum((gamma * lam) ** (i - k) * delta[i] for i in range(k, n)) for k in range(n)]
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_value_is_pulled_to_its_return_until_it_has_moved_by_the_clip():
    values = torch.tensor([0.1, 1.0, -1.0, 3.0], requires_grad=True)
    old, returns = torch.zeros(4), torch.full((4,), 2.0)
    loss = clipped_value_loss(values, old, returns, 0.2)
    # within the clip; beyond it on the way to the return; beyond it on the way from it; far beyond the return
    assert loss.tolist() == pytest.approx([1.9**2 / 2, 1.8**2 / 2, 3.0**2 / 2, 1.8**2 / 2])
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-1.9, 0.0, -3.0, 0.0])
    assert clipped_value_loss(values, old, returns, None).tolist() == pytest.approx([1.9**2 / 2, 0.5, 4.5, 0.5])


# -- the loss ---------------------------------------------------------------------------------------------------------


class RawGRPO(SoftGRPOTrainer):
    """GRPO whose advantage is the reward itself."""

    def _calculate_rewards(self, *args, **kwargs):
        self.raw = super()._calculate_rewards(*args, **kwargs)
        return self.raw

    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(inputs) | {"advantages": self.raw.sum(-1)}


@pytest.mark.parametrize(
    "k,values",
    [
        (1, {}),
        (4, {}),
        (4, {"num_iterations": 2, "max_steps": 4, "loss_type": "grpo"}),
        (4, {"ratio": "factored", "rest_weight": 0.5, "num_iterations": 2}),
        (4, {"ratio": "top1", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        (4, {"ratio": "conditional", "num_iterations": 2}),
    ],
)
def test_without_a_critic_it_is_grpo_on_raw_rewards(tmp_path, k, values):
    """Zero values, gamma = lambda = 1, no whitening: every action's advantage is the reward."""
    thinking = replace(THINKING, thought_k=k)
    ours = make(tmp_path / "a", thinking=thinking, gamma=1.0, lam=1.0, vf_coef=0.0, **values)
    ours._whiten = lambda advantages, mask: advantages
    head_of(ours).offset.zero_()
    ours_logs = fit(ours)
    grpo = make(tmp_path / "b", RawGRPO, thinking, **values)
    logs = fit(grpo)
    assert len(logs) == len(ours_logs) >= 3
    for a, b in zip(ours_logs, logs, strict=True):
        for key in ("loss", "grad_norm", "entropy", "clip_ratio/region_mean"):
            assert a[key] == pytest.approx(b[key], abs=1e-6, rel=1e-5), key
        assert b["grad_norm"] > 1e-3
    theirs = dict(grpo.model.named_parameters())
    for name, p in trunk_of(ours).items():
        torch.testing.assert_close(p, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    assert not head_of(ours).weight.any(), "no value loss, no value"


def test_advantages_are_whitened_over_the_actions(tmp_path):
    trainer = make(tmp_path, lam=0.9)
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(generate(inputs)) or seen[-1]
    fit(trainer, resume_from_checkpoint=None)
    for batch in seen:
        mask = batch["value_mask"]
        assert torch.equal(mask, batch["action_mask"].bool()), "thoughts and answer tokens; <eot> and # are fed"
        assert mask[:, :3].all() and not mask[:, 3:5].any() and mask[:, 5].all()
        advantages = batch["advantages"][mask]
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.var(correction=0).item() == pytest.approx(1, abs=1e-4)
        assert not batch["advantages"][~mask].any()
    first, offset = seen[0]["old_values"], head_of(trainer).offset
    assert torch.equal(first, torch.full_like(first, offset.item())), "the head starts as a constant"
    assert offset.item() == pytest.approx(trainer.state.log_history[0]["reward"]), "the first rollout's mean reward"
    assert seen[-1]["old_values"].std() > 0


def test_the_value_loss_reaches_the_trunk(tmp_path):
    for vf_coef in (0.0, 1.0):
        trainer = make(tmp_path / str(vf_coef), vf_coef=vf_coef, max_steps=1)
        trainer._whiten = lambda advantages, mask: torch.zeros_like(advantages)  # no policy gradient
        with torch.no_grad():
            head_of(trainer).weight.fill_(0.1)
        before = trunk_of(trainer)
        fit(trainer)
        moved = [name for name, p in trunk_of(trainer).items() if not torch.equal(p, before[name])]
        assert bool(moved) == (vf_coef > 0)


def test_micro_batches_make_no_difference(tmp_path):
    one = fit(make(tmp_path / "a", num_iterations=2, max_steps=4))
    many = fit(
        make(
            tmp_path / "b", num_iterations=2, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=4
        )
    )
    for a, b in zip(one, many, strict=True):
        for key in ("reward", "loss", "grad_norm", "value/mean", "value/explained_variance"):
            assert a.get(key) == (None if key not in b else pytest.approx(b[key], abs=1e-4)), key


def test_a_mixture_of_experts_adds_its_load_balancing_loss(tmp_path):
    """By its coefficient, whatever the advantages are: the loss of two coefficients differs by that times the term."""
    logs = {}
    for coefficient in (0.0, 0.5):
        made = test_grpo.policy_like("olmoe", **test_grpo.EXPERTS | {"router_aux_loss_coef": coefficient})
        logs[coefficient] = fit(make(tmp_path / str(coefficient), made=made, max_steps=1))[0]
    assert "aux_loss" not in logs[0.0]
    expected = logs[0.0]["loss"] + 0.5 * logs[0.5]["aux_loss"]
    assert logs[0.5]["loss"] == pytest.approx(expected, abs=1e-4)


# -- the critic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_head_learns_a_constant_reward_with_its_own_learning_rate(tmp_path, gamma):
    """The trunk stands still, so what is learnt is learnt by the head. Discounted, the value depends on the number of
    actions left, which the states after <bot> and after the answer prompt tell."""
    trainer = make(
        tmp_path, reward=lambda completions, **kwargs: [2.0] * len(completions), gamma=gamma, lam=1.0,
        thinking=replace(THINKING, max_answer_tokens=1), learning_rate=0.0, value_learning_rate=3e-2, value_clip=None,
        num_generations=1, num_iterations=4, max_steps=40,
    )  # fmt: skip
    head_of(trainer).offset.zero_()  # all of it is the weights' to learn
    before = trunk_of(trainer)
    logs = fit(trainer)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0, 0.0, 3e-2]
    assert all(torch.equal(p, before[name]) for name, p in trunk_of(trainer).items())
    rollouts = [log for log in logs if "value/mean" in log]
    assert len(rollouts) == 10 and rollouts[0]["value/mean"] == 0
    if gamma == 1:
        assert rollouts[-1]["value/mean"] == pytest.approx(2, abs=0.2)
        assert all(log["value/returns"] == pytest.approx(2, abs=1e-4) for log in rollouts)
        assert logs[-1]["value/loss"] < 0.1 * logs[0]["value/loss"]
        assert all(log["value/explained_variance"] is None for log in rollouts), "no variance to explain"
    else:
        assert rollouts[0]["value/explained_variance"] == pytest.approx(0, abs=1e-5)
        assert rollouts[-1]["value/explained_variance"] > 0.4
        assert logs[-1]["value/loss"] < 0.5 * logs[0]["value/loss"]
    assert all("frac_reward_zero_std" not in log for log in logs), "there are no groups"


def test_a_head_without_a_learning_rate_stays(tmp_path):
    trainer = make(tmp_path, value_learning_rate=0.0)
    before = trunk_of(trainer)
    fit(trainer)
    assert not head_of(trainer).weight.any()
    assert any(not torch.equal(p, before[name]) for name, p in trunk_of(trainer).items())


def test_values_stop_at_the_clip(tmp_path):
    """Many passes over one rollout: with a small clip most values are stopped on their way."""
    fractions = {}
    for clip in (1e-4, None):
        logs = fit(
            make(tmp_path / str(clip), value_clip=clip, value_learning_rate=1e-2, num_iterations=4, max_steps=4)
        )
        assert logs[0]["value/clip_fraction"] == 0, "nothing has moved at the first pass"
        fractions[clip] = logs[-1]["value/clip_fraction"]
    assert fractions[None] == 0 and fractions[1e-4] > 0.5


def test_what_grpo_leaves_out_is_left_out(tmp_path):
    """Truncated completions, and those that no reward function could score, teach neither policy nor critic."""

    def sometimes(completions, **kwargs):
        return [None if i % 3 == 0 else 1.0 + i for i in range(len(completions))]

    trainer = make(tmp_path, reward=sometimes, mask_truncated_completions=True, max_steps=1)
    seen = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: seen.append(generate(inputs)) or seen[-1]
    fit(trainer)
    batch = seen[0]
    finished = batch["completion_mask"].any(-1)
    scored = torch.tensor([i % 3 != 0 for i in range(8)])
    assert 0 < (finished & scored).sum() < 8 and not finished.all()
    assert torch.equal(batch["value_mask"].any(-1), finished & scored)
    for name in ("advantages", "returns"):
        assert not batch[name][~(finished & scored)].any()


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_four_steps_are_two_and_resume_and_two(tmp_path, iterations, peft):
    values = {
        "num_iterations": iterations, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "peft": peft,
        "num_generations": 4,
    }  # fmt: skip
    whole = make(tmp_path / "a", value_learning_rate=1e-2, **values)
    logs = fit(whole)
    resumed = make(tmp_path / "b", value_learning_rate=1e-2, **values)
    again = fit(resumed, resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for a, b in zip(logs[2:], again, strict=True):
        for key in ("loss", "grad_norm", "reward", "value/loss", "value/mean"):
            assert a.get(key) == b.get(key), key
    assert head_of(whole).weight.any()
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [1e-2, 1e-2, 1e-2]


def test_the_folder_is_a_plain_one_with_a_file_beside(tmp_path):
    trainer = make(tmp_path)
    fit(trainer)
    folder = tmp_path / "model"
    policy.save(folder, trainer.save_model, trainer.processing_class, THINKING, main=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trunk = trunk_of(trainer)
    for name, p in model.named_parameters():
        assert torch.equal(p, trunk[name]), name
    head = load_file(folder / "value_head.safetensors")
    assert torch.equal(head["weight"], head_of(trainer).weight) and head["weight"].any()
    assert torch.equal(head["offset"], head_of(trainer).offset) and head["offset"].isfinite()
    loaded = policy.load_policy(str(folder))
    assert not hasattr(loaded.model, "value_head"), "a policy has no use for it"
    assert torch.equal(head_of(make(tmp_path / "next", made=loaded)).weight, head["weight"]), "PPO goes on with it"
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.bin"))


@pytest.mark.parametrize("k", [1, 4])  # the two kinds of KL
def test_lora_trains_the_head_and_keeps_the_reference(tmp_path, k):
    """The head is trained beside the adapter; the recorded values are the adapted policy's, not the reference's."""
    trainer = make(
        tmp_path, thinking=replace(THINKING, thought_k=k), peft=LORA, beta=0.1, num_iterations=2, max_steps=4
    )
    with torch.no_grad():
        head_of(trainer).weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    gaps = []
    value_loss = trainer._value_loss

    def compare(values, inputs):
        gaps.append(((values - inputs["old_values"]).abs() * inputs["value_mask"]).max().item())
        return value_loss(values, inputs)

    trainer._value_loss = compare
    logs = fit(trainer)
    assert logs[0]["kl"] > 0
    assert gaps[0] < 1e-5 and gaps[2] < 1e-5, "recorded by the weights that made the rollout"
    assert gaps[1] > 1e-4 and gaps[3] > 1e-4, "and moved by the first update"
    trainer.save_model(str(tmp_path / "model"))
    assert not any("value_head" in key for key in load_file(tmp_path / "model/adapter_model.safetensors"))
    assert torch.equal(load_file(tmp_path / "model/value_head.safetensors")["weight"], head_of(trainer).weight)
    plain = PeftModel.from_pretrained(tiny_policy().model, tmp_path / "model")
    ids = torch.arange(4)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


# -- whole runs -------------------------------------------------------------------------------------------------------

RECIPE = {
    "method": "ppo", "dataset": "chain_sum", "train_size": 64, "eval_problems": 0, "num_thoughts": 2, "thought_k": 3,
    "answer_prompt": "#", "step_separator": ";", "max_answer_tokens": 3, "prompts_per_step": 16, "num_generations": 1,
    "num_iterations": 2, "per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2,
    "value_learning_rate": 1e-2, "disable_tqdm": True, "rewards": ["test_ppo.odd_reward"],
    "dataset_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True},
}  # fmt: skip


def recipe(folder, **values):
    made, thinking = tiny_policy(), Thinking(num_thoughts=2, thought_k=3, answer_prompt="#", max_answer_tokens=3)
    policy.save(folder / "start", made.model.save_pretrained, made.tokenizer, thinking, main=True)
    start = {"model_name_or_path": str(folder / "start"), "output_dir": str(folder / "rl")}
    path = folder / "ppo.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **start, **values}))
    return path


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train.run(load_recipe(recipe(folder)))
    return folder / "rl"


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_processes_are_one(one_process, tmp_path, stage):
    if stage:
        pytest.importorskip("deepspeed")
    error = launch(tmp_path, stage, "-m", "rl_soft", recipe(tmp_path)).communicate(timeout=400)[1]
    assert (tmp_path / "rl/model/config.json").exists(), error[-3000:]
    one, two = ([m for m in metrics(folder) if "loss" in m] for folder in (one_process, tmp_path / "rl"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for key in ("reward", "loss", "grad_norm", "value/loss", "value/mean", "value/explained_variance"):
            assert a.get(key) == (None if key not in b else pytest.approx(b[key], abs=1e-4)), key
    heads = [load_file(folder / "model/value_head.safetensors") for folder in (one_process, tmp_path / "rl")]
    torch.testing.assert_close(*heads, atol=1e-4, rtol=1e-3)
    assert heads[0]["weight"].any()
    models = [AutoModelForCausalLM.from_pretrained(f / "model") for f in (one_process, tmp_path / "rl")]
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-2)


def test_a_recipe_without_groups_ends_in_a_policy_folder(one_process):
    steps = [m for m in metrics(one_process) if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    assert all("frac_reward_zero_std" not in m and m["rollout/density_gap"] < 1e-4 for m in steps)
    loaded = policy.load_policy(str(one_process / "model"))
    assert loaded.thinking is not None and loaded.thinking.num_thoughts == 2
    assert load_file(one_process / "model/value_head.safetensors")["weight"].shape == (1, 32)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"ratio": "pathwise"}, "ratio pathwise: thoughts are then not actions"),
        ({"gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
        ({"lam": -0.1}, "lam must be between 0 and 1, got -0.1"),
        ({"value_clip": 0}, "value_clip must be above 0, or null"),
        ({"vf_coef": -1}, "vf_coef must be at least 0, got -1"),
        ({"scale_rewards": "batch"}, "scale_rewards is not available: PPO has no groups"),
        ({"thought": "soft"}, "thought soft has no density"),
        ({"value_learning_rat": 1}, "unknown key 'value_learning_rat'.*did you mean value_learning_rate"),
        ({"generation_batch_size": 7}, "generation_batch_size"),
        ({"method": "grpo", "lam": 0.9}, "unknown key 'lam'"),
    ],
)
def test_what_ppo_cannot_do_is_refused_by_name(tmp_path, values, message):
    path = tmp_path / "r.yaml"
    base = {k: v for k, v in RECIPE.items() if not (values.get("method") == "grpo" and k.startswith("value_"))}
    path.write_text(yaml.safe_dump({**base, "model_name_or_path": "m", "output_dir": "o", **values}))
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_what_the_trainer_cannot_do_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="ratio pathwise"):
        make(tmp_path, ratio="pathwise")
    with pytest.raises(ValueError, match="multi_objective_aggregation normalize_then_sum"):
        make(tmp_path, multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match="num_generations 1 needs a rollout of at least 2"):
        config(tmp_path, num_generations=1, per_device_train_batch_size=1)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=r"has no value_head\.safetensors"):
        load_value_head(None, tmp_path / "checkpoint-1")
