"""What fails is named and kept, and costs nothing that is not lost: rewards, non-finite steps, known failures.

pytest tests/train/test_guards.py
"""

import asyncio
import copy
import json
import logging
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import rows, tiny_policy
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig

from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.runtime import guards
from rl_soft.train.runtime.callbacks import KnownFailures
from rl_soft.train.runtime.checkpoints import COMPLETE, check_resumable, last_checkpoint, set_aside_unfinished
from rl_soft.train.runtime.guards import Guarded, RewardWatch


def parity(completions, **kwargs):
    return [sum(ord(c) for c in text) % 5 + 0.1 * len(text) for text in completions]


class Keep(TrainerCallback):
    """The logs, and a copy of weights and optimizer state after every step."""

    def __init__(self):
        self.logs, self.states = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"])))


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def trainer(tmp_path, trainer_class=SoftGRPOTrainer, reward=parity, **values):
    made = tiny_policy()
    thinking = Thinking(thought_k=3, num_thoughts=3, answer_prompt="#", max_answer_tokens=4)
    args = GRPOConfig(
        **{
            "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 4,
            "learning_rate": 1e-2, "weight_decay": 0.1, "gradient_checkpointing": False, "save_strategy": "no",
            "disable_tqdm": True, "seed": 0, "max_completion_length": 16, **values,
        }
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": r.question, "id": r.id, "answer": r.answer} for r in rows(8)])
    made_trainer = trainer_class(
        made.model, reward_funcs=reward, args=args, train_dataset=data, processing_class=made.tokenizer,
        thinking=thinking,
    )  # fmt: skip
    made_trainer.keep = Keep()
    made_trainer.add_callback(made_trainer.keep)
    return made_trainer


# -- rewards ----------------------------------------------------------------------------------------------------------


def broken(change):
    def some_reward(completions, **kwargs):
        return change([0.5] * len(completions))

    return some_reward


def boom(values):
    raise RuntimeError("no\nanswer key")


@pytest.mark.parametrize(
    "change,index,message",
    [
        (
            boom,
            [0],
            r"^reward some_reward raised RuntimeError: no answer key for completion 0 of 8 \(.*test_guards.py, "
            r"line \d+\); saved in .*json$",
        ),
        (lambda v: str(v)["content"], [0], "completions are text here: write completion for completion"),
        (lambda v: v[:-1], [*range(8)], "^reward some_reward returned 7 rewards for 8 completions; saved in"),
        (lambda v: 0.5, [*range(8)], "returned float 0.5; it must return a list of 8 numbers"),
        (lambda v: None, [*range(8)], "returned NoneType None; it must return a list"),
        (lambda v: "00000000", [*range(8)], "returned str '00000000'; it must return a list"),
        (lambda v: [*v[:3], math.nan, *v[4:]], [3], "float nan for completion 3 of 8; it must be a finite number"),
        (lambda v: [*v[:3], math.inf, *v[4:]], [3], "returned float inf for completion 3 of 8"),
        (lambda v: [*v[:3], "1.0", *v[4:]], [3], "returned str '1.0' for completion 3 of 8"),
        (lambda v: [*v[:3], [1.0, 2.0], *v[4:]], [3], r"returned list \[1.0, 2.0\] for completion 3 of 8"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_completion_saved(tmp_path, change, index, message):
    t = trainer(tmp_path, reward=broken(change))
    with pytest.raises(ValueError, match=message) as error:
        t.train()
    assert "\n" not in str(error.value)
    assert not t.keep.states, "nothing was trained on it"
    saved = json.loads((tmp_path / "failed_reward.json").read_text())
    assert [row["index"] for row in saved["rows"]] == index
    known = {r.question: r.answer for r in rows(8)}
    for row in saved["rows"]:
        assert known[row["prompts"]] == row["answer"] and isinstance(row["completions"], str)


def test_the_completion_that_makes_a_reward_raise_is_found(tmp_path):
    def some_reward(completions, answer, **kwargs):
        return [1 / (int(a) - int(rows(8)[2].answer)) for a in answer]

    watch = RewardWatch(tmp_path / "failed_reward.json")
    values = watch.wrap(some_reward, "some_reward")(
        prompts=list("abcdefgh"), completions=list("ABCDEFGH"), answer=[r.answer for r in rows(8)], trainer_state=None
    )
    assert values == [0.0] * 8
    assert "raised ZeroDivisionError: division by zero for completion 2 of 8" in watch.failure
    row = json.loads((tmp_path / "failed_reward.json").read_text())["rows"]
    assert row == [{"index": 2, "prompts": "c", "completions": "C", "answer": rows(8)[2].answer}]


def test_good_rewards_pass_unchanged_sync_and_async(tmp_path):
    good = [1, 0.25, None, True, np.float32(0.5), torch.tensor(2.0)]
    batch = {"prompts": ["p"] * 6, "completions": ["c"] * 6}

    async def later(**kwargs):
        return good

    watch = RewardWatch(tmp_path / "failed_reward.json")
    assert watch.wrap(lambda **kwargs: good, "good")(**batch) == good
    assert asyncio.run(watch.wrap(later, "later")(**batch)) == good
    assert watch.failure is None and not list(tmp_path.iterdir())


def test_an_async_reward_trains_and_fails_like_any_other(tmp_path):
    async def fine(completions, **kwargs):
        return parity(completions)

    async def some_reward(completions, **kwargs):
        raise KeyError("answer")

    t = trainer(tmp_path / "a", reward=fine, max_steps=1)
    t.train()
    assert t.keep.logs[0]["rewards/fine/std"] > 0
    with pytest.raises(ValueError, match=r"reward some_reward raised KeyError: 'answer' .*line [0-9]+.; saved in"):
        trainer(tmp_path / "b", reward=some_reward).train()


def never(completions, **kwargs):
    return [None] * len(completions)


def test_a_reward_that_never_applies_ends_the_run(tmp_path):
    t = trainer(tmp_path / "alone", reward=never)
    with pytest.raises(
        ValueError, match=r"^reward never was None for every completion of 1 rollout, so there is nothing"
    ):
        t.train()
    assert not t.keep.states, "nothing was trained on it"
    t = trainer(tmp_path / "beside", reward=[never, parity], max_steps=8)
    with pytest.raises(ValueError, match="reward never was None for every completion of 5 rollouts"):
        t.train()


def test_none_means_that_a_reward_does_not_apply(tmp_path):
    def sometimes(completions, **kwargs):
        return [None if i % 2 else v for i, v in enumerate(parity(completions))]

    t = trainer(tmp_path, reward=[sometimes, parity], max_steps=1)
    t.train()
    assert math.isfinite(t.keep.logs[0]["loss"]) and t.keep.logs[0]["grad_norm"] > 0


# -- steps that are not finite ----------------------------------------------------------------------------------------


def spoiled(steps, what):
    """A trainer class whose loss or gradient is not finite at some steps (1, 2, ...), in their last micro-batch."""

    class Spoiled(SoftGRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            if self.state.global_step + 1 not in steps or not self.accelerator.sync_gradients:
                return loss
            if what == "gradient":
                loss.register_hook(lambda grad: grad * math.inf)
                return loss
            return loss * 0 + (math.nan if what == "nan" else math.inf)

    return Spoiled


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_that_is_not_finite_changes_nothing_and_is_kept(tmp_path, what, clip):
    t = trainer(tmp_path, spoiled({2, 4}, what), max_steps=5, max_grad_norm=clip)
    t.train()
    assert [log["skipped_steps"] for log in t.keep.logs] == [0, 1, 0, 1, 0]
    assert all(math.isfinite(log["loss"]) for log in t.keep.logs)
    for before, after in ((0, 1), (2, 3)):
        (weights, moments), (new_weights, new_moments) = t.keep.states[before], t.keep.states[after]
        assert all(torch.equal(weights[k], new_weights[k]) for k in weights)
        assert moments.keys() == new_moments.keys()
        assert all(torch.equal(m[k], new_moments[i][k]) for i, m in moments.items() for k in m)
    assert any(not torch.equal(t.keep.states[1][0][k], t.keep.states[2][0][k]) for k in t.keep.states[1][0])
    tensors = load_file(tmp_path / "nonfinite/step-2.safetensors")
    assert tensors["0.prompt_ids"].shape[0] == 4 and tensors["1.log_weights"].shape[-1] == 3
    text = json.loads((tmp_path / "nonfinite/step-2.json").read_text())
    assert len(text["rows"]) == 8 and {row["prompt"] for row in text["rows"]} <= {r.question for r in rows(8)}
    losses = {row["micro_batch"]: row["loss"] for row in text["rows"]}
    assert math.isfinite(float(losses[0])) and losses[1] == {"gradient": losses[1], "nan": "nan", "inf": "inf"}[what]
    assert not list(tmp_path.glob("nonfinite/*.tmp"))


def test_three_in_a_row_end_the_run(tmp_path):
    t = trainer(tmp_path, spoiled({1, 2, 4, 5, 6, 7}, "nan"), max_steps=8)
    with pytest.raises(ValueError, match=r"^step 6: loss or gradient was not finite in 3 steps in a row; .*nonfinite"):
        t.train()
    assert sorted(p.name for p in tmp_path.glob("nonfinite/*.json")) == [f"step-{n}.json" for n in (1, 2, 4, 5, 6)]


def test_a_step_that_is_not_finite_names_cudnn_s_attention_where_it_is_on(tmp_path, monkeypatch, caplog):
    t = trainer(tmp_path, spoiled({1, 3, 4, 5}, "nan"), max_steps=6)
    with caplog.at_level(logging.WARNING, "rl_soft"), pytest.raises(ValueError, match=r"enable_cudnn_sdp\(False\)"):
        t.add_callback(At(2, lambda: monkeypatch.setattr(guards, "has_cudnn_attention", lambda: True)))
        t.train()
    first, second, *_ = caplog.messages
    assert "step 1 skipped" in first and "cuDNN" not in first
    assert "step 3 skipped" in second and "cuDNN's attention is on" in second


def test_a_good_run_is_the_run_without_the_guard_bit_by_bit(tmp_path, monkeypatch):
    guarded = trainer(tmp_path / "a")
    guarded.train()
    for name in ("compute_loss", "_get_grad_norm", "_calculate_rewards"):
        monkeypatch.delattr(Guarded, name)
    bare = trainer(tmp_path / "b")
    bare.train()
    for (weights, moments), (bare_weights, bare_moments) in zip(guarded.keep.states, bare.keep.states, strict=True):
        assert all(torch.equal(weights[k], bare_weights[k]) for k in weights)
        assert all(torch.equal(m[k], bare_moments[i][k]) for i, m in moments.items() for k in m)
    for a, b in zip(guarded.keep.logs, bare.keep.logs, strict=True):
        assert all(a[k] == b[k] for k in ("loss", "grad_norm", "reward"))


# -- known failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logs,healthy,steps,message",
    [
        ({"frac_reward_zero_std": 1.0}, {"frac_reward_zero_std": 0.9}, 5, "nothing to learn from"),
        ({"completions/clipped_ratio": 0.8}, {"completions/clipped_ratio": 0.5}, 5, "80% .* raise max_answer_tokens"),
        ({"rollout/density_gap": 2e-3}, {"rollout/density_gap": 9e-4}, 1, "differ by 0.002, more than 1e-3"),
        ({"math_accuracy/unparsed_rate": 0.7}, {"math_accuracy/unparsed_rate": 0.4}, 5, "unparsed_rate is 70%"),
        ({"entropy": 0.02}, {"entropy": 1.0}, 5, r"fell from 1 to 0.02 nats"),
    ],
)
def test_a_known_failure_is_said_once_in_words(caplog, logs, healthy, steps, message):
    def run(series, main=True):
        caplog.clear()
        watch = KnownFailures()
        with caplog.at_level(logging.WARNING, "rl_soft"):
            for one in series:
                watch.on_log(None, SimpleNamespace(is_world_process_zero=main), None, logs=one)
        return [record.getMessage() for record in caplog.records]

    assert not run([healthy] * 20)
    assert not run([healthy, *[*[logs] * (steps - 1), healthy] * 4]), "the streak starts anew"
    said = run([healthy, *[logs] * 20])
    assert len(said) == 1 and re.search(message, said[0])
    assert not run([healthy, *[logs] * 20], main=False)
    between = {"loss": 0.1}  # a step that reuses a rollout logs no reward
    assert len(run([healthy, *[logs, between] * steps])) == 1
    assert not run([dict.fromkeys(logs)] * 20)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_only_whole_checkpoints_count(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step, complete in ((9, True), (10, True), (11, False), (100, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{")
        if complete:
            (folder / COMPLETE).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "unfinished-checkpoint-11").mkdir()
    set_aside_unfinished(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-9", "unfinished-checkpoint-100", "unfinished-checkpoint-11"]


def test_a_checkpoint_of_another_stage_or_size_is_refused(tmp_path, caplog):
    def check(stage, **mark):
        (tmp_path / COMPLETE).write_text(json.dumps({"step": 2, "processes": 1, "zero": 0, **mark}))
        plugin = SimpleNamespace(zero_stage=stage) if stage else None
        check_resumable(tmp_path, SimpleNamespace(deepspeed_plugin=plugin))

    check(0)
    check(2, zero=2)
    with pytest.raises(ValueError, match="written under ZeRO stage 2 and cannot be read under ZeRO stage 0"):
        check(0, zero=2)
    with pytest.raises(ValueError, match="written by 4 processes and cannot be read by 1"):
        check(3, zero=3, processes=4)
    assert not caplog.records
    check(0, processes=4)
    assert "written by 4 processes and is read by 1" in caplog.text
