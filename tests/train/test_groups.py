"""Groups that teach: what leaves the loss, what takes its place, and that neither depends on processes or on a resume.

pytest tests/train/test_groups.py
"""

import math

import pandas
import pytest
import torch
import yaml
from conftest import TINY, VOCABULARY, rows, tiny_policy
from datasets import Dataset
from test_grpo import THINKING, config, train
from test_parallel import launch
from test_pipeline import metrics

from rl_soft.config.recipe import load_recipe
from rl_soft.train import pipeline
from rl_soft.train.groups import equal_groups
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.ppo import SoftPPOTrainer
from rl_soft.train.ready import check_ready

CALLS = []


def digits(text):
    return sum(map(ord, text))


def some_accuracy(completions, **columns):
    """Right or wrong by the completion alone; so for a random model about half of the groups of 4 have both."""
    CALLS.append([columns["id"][i] for i in range(0, len(completions), 4)])
    return [float(digits(text) % 6 == 0) for text in completions]


def form(completions, log_extra=None, **columns):
    log_extra("length", [len(text) for text in completions])
    return [digits(text) % 5 / 5 for text in completions]


def never_accuracy(completions, **columns):
    return [0.0] * len(completions)


def data(n=24):
    return Dataset.from_list([{"prompt": r.question, "id": r.id, "answer": r.answer} for r in rows(n)])


def trainer(tmp_path, rewards=(some_accuracy, form), n=24, **values):
    own = {k: values.pop(k) for k in ("filter_groups", "resample", "max_resamples", "ratio") if k in values}
    made = tiny_policy()
    values = {"per_device_train_batch_size": 16, "max_steps": 2, "reward_weights": [1.0, 0.2], **values}
    CALLS.clear()
    return SoftGRPOTrainer(
        made.model, reward_funcs=list(rewards), args=config(tmp_path, **values), train_dataset=data(n),
        processing_class=made.tokenizer, thinking=THINKING, **{"ratio": "joint", **own},
    )  # fmt: skip


def batches(made):
    """The batches that `made` trains on, and the rewards of each."""
    kept, inner = [], made._generate_and_score_completions

    def keep(inputs):
        output = inner(inputs)
        kept.append((output, made._rewards.clone(), inputs))
        return output

    made._generate_and_score_completions = keep
    return kept


def test_a_group_is_equal_if_no_two_of_its_completions_differ():
    nan = math.nan
    values = torch.tensor([[1.0, 1.0], [0.0, 1.0], [nan, 1.0], [nan, nan], [0.25, 0.5]]).flatten()
    assert equal_groups(values, 2).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["joint", "factored"])
def test_equal_groups_are_out_of_the_loss(tmp_path, loss_type, ratio):
    """The gradient is that of the other groups alone: with a denominator of their tokens where the loss counts tokens,
    of all completions where it counts those."""
    made = trainer(tmp_path, filter_groups="accuracy", loss_type=loss_type, ratio=ratio, max_steps=1, beta=0.0)
    seen = batches(made)
    losses, inner = [], made._compute_loss

    def compute(model, inputs):
        loss = inner(model, inputs)
        left = inputs["tool_mask"].sum(-1) > 0
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).float()
        two = made.ratio == "factored"
        weight = mask if not two else torch.cat([mask, mask * made._soft.thought_mask], 1)
        per_row = (-inputs["advantages"][:, None] * weight).sum(-1)  # on policy the ratio is 1
        rows_ = {
            "dapo": per_row.sum() / mask.sum(), "bnpo": per_row.sum() / weight.sum(),
            "grpo": (per_row / weight.sum(-1).clamp(min=1)).mean(),
            "dr_grpo": per_row.sum() / (len(mask) * made.max_completion_length),
        }  # fmt: skip
        losses.append((loss.item(), rows_[loss_type].item(), left.float().mean().item()))
        return loss

    made._compute_loss = compute
    logs = train(made)
    (output, rewards, _), *_ = seen
    equal = equal_groups(rewards[:, 0], 4)
    assert 0 < equal.sum() < 4, "some groups are equal, some are not"
    ((found, expected, left),) = losses
    assert found == pytest.approx(expected, abs=1e-6) and left == pytest.approx(1 - equal.float().mean().item())
    assert output["num_items_in_batch"] == (output["completion_mask"] * output["tool_mask"]).sum()
    assert logs[0]["groups/left_out"] == logs[0]["groups/equal"] == equal.float().mean().item()
    assert logs[0]["groups/accuracy"] == pytest.approx(rewards[:, 0].mean().item())
    assert len(made._logs["advantages"]) == 16


@pytest.mark.parametrize(
    "more", [{"ratio": "joint"}, {"ratio": "factored", "num_iterations": 2}, {"entropy_coef": 0.01}]
)
def test_what_is_left_out_costs_no_pass(tmp_path, monkeypatch, more):
    """Training passes hold the rows in the loss alone, and every figure is that of passes over all rows."""

    def count(passed):
        def hook(model, args, given):
            if torch.is_grad_enabled():
                passed.append(len(given["soft"].support))

        return hook

    def run(name):
        made, passed = trainer(tmp_path / name, filter_groups="accuracy", **{"beta": 0.0, **more}), []
        made.model.register_forward_pre_hook(count(passed), with_kwargs=True)
        return train(made), passed, torch.cat([p.detach().flatten() for p in made.model.parameters()])

    logs, passed, weights = run("some")
    monkeypatch.setattr("rl_soft.train.grpo.rows_in_loss", lambda inputs: torch.arange(len(inputs["tool_mask"])))
    logs_of_all, passed_of_all, weights_of_all = run("all")
    assert set(passed_of_all) == {16}
    iterations = more.get("num_iterations", 1)
    left = [round(16 * (1 - log["groups/left_out"])) for log in logs[::iterations] for _ in range(iterations)]
    assert passed == [max(n, 1) for n in left]
    assert any(n < 16 for n in passed)
    torch.testing.assert_close(weights, weights_of_all, atol=1e-6, rtol=0)
    for one, other in zip(logs, logs_of_all, strict=True):
        names = [k for k in one if k.split("/")[0] not in ("seconds", "tokens_per_second", "memory", "step_time")]
        assert {k: one[k] for k in names} == pytest.approx({k: other[k] for k in names}, abs=2e-5)


def test_form_without_a_right_answer_moves_nothing(tmp_path):
    """The phantom gradient: nobody is right, and the form differs."""
    values = {"rewards": (never_accuracy, form), "max_steps": 1}
    assert train(trainer(tmp_path / "a", **values))[0]["grad_norm"] > 0
    logs = train(trainer(tmp_path / "b", filter_groups="accuracy", **values))
    assert logs[0]["grad_norm"] == 0 and logs[0]["groups/left_out"] == 1 and logs[0]["rewards/form/std"] > 0


def test_with_no_equal_group_the_filter_changes_nothing(tmp_path):
    plain = train(trainer(tmp_path / "a", rewards=(form,), reward_weights=None))
    filtered = train(trainer(tmp_path / "b", rewards=(form,), reward_weights=None, filter_groups="form",
                             resample=True))  # fmt: skip
    assert all(log["groups/equal"] == 0 for log in filtered)
    for a, b in zip(plain, filtered, strict=True):
        same = a.keys() - {k for k in a if "/" in k and k.split("/")[0] in ("seconds", "tokens_per_second", "memory")}
        assert {k: a[k] for k in same - {"step_time"}} == {k: b[k] for k in same - {"step_time"}}


@pytest.mark.parametrize("cut", [{}, {"top_k": 6, "top_p": 0.8}], ids=["whole", "cut"])
def test_other_problems_take_the_places_of_equal_groups(tmp_path, cut):
    made = trainer(tmp_path, filter_groups="accuracy", resample=True, max_resamples=4, num_iterations=2, max_steps=4,
                   log_completions=True, **cut)  # fmt: skip
    seen = batches(made)
    logs = train(made)
    assert len(seen) == 2
    for log, (output, rewards, inputs) in zip(logs[::2], seen, strict=True):
        assert log["groups/left_out"] < log["groups/equal"], "some were replaced"
        assert log["groups/resampled"] > 0 and log["rollout/density_gap"] < 1e-4
        assert output["completion_ids"].shape == output["support"].shape[:2]
        assert equal_groups(rewards[:, 0], 4).float().mean() == log["groups/left_out"]
        assert len(inputs) == 16
    for calls in CALLS:
        assert len(set(calls)) == len(calls)
    table = made._logs
    assert list(table["extra"]["length"]) == [len(text) for text in table["completion"]]
    per_rollout = sum(map(len, CALLS)) - 2 * 4
    assert per_rollout == sum(log["groups/resampled"] for log in logs[::2]), "each completion is scored once"


def test_the_bound_holds_and_a_problem_is_tried_once(tmp_path):
    made = trainer(tmp_path, rewards=(never_accuracy, some_accuracy), filter_groups="never_accuracy", resample=True,
                   max_resamples=2, max_steps=1)  # fmt: skip
    log = train(made)[0]
    assert [len(call) for call in CALLS] == [4, 4, 4] and len({i for call in CALLS for i in call}) == 12
    assert log["groups/resampled"] == 8 and log["groups/left_out"] == 1 and log["grad_norm"] == 0
    made = trainer(tmp_path, rewards=(never_accuracy, some_accuracy), filter_groups="never_accuracy", resample=True,
                   max_steps=1, n=6)  # fmt: skip
    assert train(made)[0]["groups/resampled"] == 2, "there are no others"


def test_micro_batches_change_nothing(tmp_path):
    values = {"filter_groups": "accuracy", "resample": True}
    one = train(trainer(tmp_path / "a", **values))
    many = train(trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=8, **values))
    for a, b in zip(one, many, strict=True):
        for key in ("reward", "loss", "grad_norm", "groups/left_out", "groups/resampled"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


def test_a_resumed_run_draws_the_same_problems(tmp_path):
    values = {"filter_groups": "accuracy", "resample": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(tmp_path / "a", **values)
    logs = train(whole)
    resumed = trainer(tmp_path / "b", **values)
    again = train(resumed, resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    keys = ("loss", "grad_norm", "reward", "groups/left_out", "groups/resampled")
    assert sum(log["groups/resampled"] for log in again) > 0
    for a, b in zip(logs[2:], again, strict=True):
        assert all(a[k] == b[k] for k in keys)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


RECIPE = {
    "method": "grpo", "model_config": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "vocabulary": VOCABULARY, "phase": "explicit", "end_of_thinking": "#", "answer_prompt": "", "num_thoughts": 3,
    "thought_k": 3, "max_answer_tokens": 4, "dataset": "chain_sum", "train_size": 64, "eval_problems": 0,
    "dataset_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True},
    "prompts_per_step": 3, "num_generations": 4, "max_steps": 3, "learning_rate": 1e-2, "disable_tqdm": True,
    "filter_groups": "accuracy", "resample": True, "save_strategy": "no", "log_completions": True,
    "rewards": ["test_groups.some_accuracy", "test_groups.form"], "reward_weights": [1.0, 0.2],
}  # fmt: skip


def recipe(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rl.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "rl"), **values}))
    return folder / "rl.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_draw_the_same_problems(tmp_path, stage):
    """Six completions on each of two processes: the second of three groups has two on either."""
    pipeline.run(load_recipe(recipe(tmp_path / "one", per_device_train_batch_size=12)))
    path = recipe(tmp_path / "two", per_device_train_batch_size=6)
    error = launch(tmp_path / "two", stage, "-m", "rl_soft", path).communicate(timeout=240)[1]
    assert (tmp_path / "two/rl/model/config.json").exists(), error[-3000:]
    one, two = (metrics(tmp_path / name / "rl") for name in ("one", "two"))
    assert len(one) == len(two) and sum(log.get("groups/resampled", 0) for log in one) > 0
    assert any(log["groups/left_out"] < log["groups/equal"] for log in one if "loss" in log), "groups were replaced"
    for a, b in zip(one, two, strict=True):
        for key in a.keys() & {"reward", "loss", "grad_norm", "entropy", "groups/equal", "groups/left_out",
                               "groups/resampled", "groups/accuracy", "rewards/form/std"}:  # fmt: skip
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
    tables = [
        pandas.read_parquet(tmp_path / name / "rl/completions/completions_00001.parquet") for name in ("one", "two")
    ]
    assert tables[0]["completion"].tolist() == tables[1]["completion"].tolist()
    assert tables[0]["length"].tolist() == tables[1]["length"].tolist()


@pytest.mark.parametrize(
    "values,message",
    [
        ({"filter_groups": 3}, "filter_groups must be a text, or null, got 3"),
        ({"filter_groups": "acuracy"}, "filter_groups must be accuracy or the name of a reward"),
        ({"resample": "yes"}, "resample must be true or false, got 'yes'"),
        ({"max_resamples": 0}, "max_resamples must be a whole number, at least 1, got 0|must be at least 1, got 0"),
        ({"filter_groups": None}, "resample true needs filter_groups"),
        ({"max_resamples": 2.5}, "max_resamples must be a whole number, at least 1, got 2.5"),
        ({"method": "ppo"}, "filter_groups is not available: PPO has no groups"),
    ],
)
def test_a_recipe_s_mistake_is_one_line(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as told:
        check_ready(load_recipe(recipe(tmp_path, **values)))
    assert "unknown key" not in str(told.value)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"filter_groups": "correct"}, "or the name of a reward .some_accuracy, form.,"),
        ({"filter_groups": "some_acuracy"}, "did you mean some_accuracy"),
        ({"filter_groups": "accuracy", "rewards": (some_accuracy, never_accuracy)}, "2 rewards end in acc"),
        ({"filter_groups": "accuracy", "rewards": (form, form)}, "no reward.s name ends in accuracy"),
        ({"resample": True}, "resample needs filter_groups"),
        ({"filter_groups": "form", "resample": True, "max_resamples": 0}, "max_resamples must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_filter_that_makes_no_sense_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **values)


def test_ppo_has_no_groups(tmp_path):
    made = tiny_policy()
    with pytest.raises(ValueError, match="filter_groups: PPO has no groups"):
        SoftPPOTrainer(made.model, reward_funcs=form, args=config(tmp_path), train_dataset=data(),
                       processing_class=made.tokenizer, thinking=THINKING, filter_groups="form")  # fmt: skip
