"""Evaluations while training: they change nothing, are paired and exact after a kill, choose the best checkpoint, and
say what they cost.

pytest tests/train/test_evaluations.py
"""

import json

import pytest
import torch
import yaml
from conftest import TINY, VOCABULARY, tiny_policy
from peft import LoraConfig
from safetensors.torch import load_file
from test_grpo import THINKING, config, dataset, odd_reward
from test_parallel import launch
from test_resume import TIMES, finish, kill_in_step, start

from rl_soft.config.evaluations import metric_names
from rl_soft.config.recipe import load_recipe
from rl_soft.evaluation import records
from rl_soft.evaluation.curve import curve_of, report_run
from rl_soft.train import pipeline
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.ppo import SoftPPOTrainer

RECIPE = {
    "method": "grpo", "model_config": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "vocabulary": VOCABULARY, "phase": "explicit", "end_of_thinking": "#", "answer_prompt": "", "num_thoughts": 3,
    "thought_k": 3, "max_answer_tokens": 3, "dataset": "chain_sum", "train_size": 32,
    "dataset_options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "compact": True},
    "prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 8, "num_iterations": 2, "max_steps": 6,
    "learning_rate": 1e-2, "disable_tqdm": True, "rewards": ["test_evaluations.short"], "save_steps": 2,
    "eval_problems": 8, "eval_samples": 4, "eval_k": [2], "eval_batch_size": 16,
}  # fmt: skip
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def short(completions, **columns):
    """A reward that a random model's completions tell apart."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def recipe(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rl.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "rl"), **values}))
    return folder / "rl.yaml"


def lines_of(folder):
    return [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]


def steps_of(folder):
    """The last line of each step, without wall times."""
    return {
        line["step"]: {k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines_of(folder)
        if "loss" in line
    }  # fmt: skip


def evaluations_of(folder):
    """Step -> the figures of its last line, without what they cost."""
    cost = ("eval_seconds", "eval_share_of_time")
    return {line["step"]: {k: v for k, v in line.items() if k not in cost} for line in lines_of(folder)
            if "eval_pass@1" in line}  # fmt: skip


def weights(folder):
    return load_file(folder / "rl/model/model.safetensors")


def same_weights(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    pipeline.run(load_recipe(recipe(folder, **EVALUATED)))
    return folder


def test_a_run_with_evaluations_is_the_run_without(evaluated, tmp_path):
    pipeline.run(load_recipe(recipe(tmp_path)))
    assert same_weights(evaluated, tmp_path)
    assert steps_of(evaluated) == steps_of(tmp_path) and sorted(steps_of(tmp_path)) == [1, 2, 3, 4, 5, 6]
    one, other = ((folder / "rl/eval_after/records.jsonl").read_text() for folder in (evaluated, tmp_path))
    assert sorted(one.splitlines()) == sorted(other.splitlines()), "the last evaluation is the one after training"


def test_the_figures_are_logged_and_paired(evaluated):
    found = evaluations_of(evaluated)
    assert sorted(found) == [2, 4, 6] and len({json.dumps(f) for f in found.values()}) == 3
    names = {f"eval_{name}" for name in metric_names([2])} - {"eval_seconds", "eval_share_of_time"}
    assert all(figures.keys() - {"step", "epoch"} == names for figures in found.values())
    for figures in found.values():
        for k in (1, 2):
            low, mean, high = (figures[f"eval_pass@{k}{end}"] for end in ("_low", "", "_high"))
            assert 0 <= low <= mean <= high <= 1
    costs = [line for line in lines_of(evaluated) if "eval_pass@1" in line]
    assert all(line["eval_seconds"] > 0 and 0 < line["eval_share_of_time"] < 1 for line in costs)
    run = evaluated / "rl"
    noise = [
        {(r["problem_id"], r["sample"]): r["seed"] for r in records.read(run / name / "records.jsonl")}
        for name in ("eval_before", "eval_during/step-2", "eval_during/step-6", "eval_after")
    ]
    assert noise[0] == noise[1] == noise[2] == noise[3] and len(noise[0]) == 8 * 5


def test_the_report_has_the_curve_and_what_it_cost(evaluated):
    run = evaluated / "rl"
    curve = json.loads((run / "report.json").read_text())["curve"]
    figures = evaluations_of(evaluated)
    assert [point["step"] for point in curve["points"]] == [0, 2, 4, 6]
    for point in curve["points"][1:]:
        assert point["pass_at_k"][0]["mean"] == figures[point["step"]]["eval_pass@1"]
        first = curve["points"][0]["pass_at_k"][0]["mean"]
        assert point["change"]["mean"] == pytest.approx(point["pass_at_k"][0]["mean"] - first)
    best = max((2, 4, 6), key=lambda step: figures[step]["eval_pass@1"])
    assert curve["best_step"] == best and 0 < curve["share"] < 1
    text = (run / "report.md").read_text()
    assert "![Pass@k by step](training.png)" in text and f"{best} (best)" in text and "3 evaluations of 8" in text
    assert (run / "training.png").stat().st_size > 1000 and "While training" in (run / "report.html").read_text()
    before = {path.name: path.read_bytes() for path in run.glob("report.*")}
    report_run(run)  # as `rl-soft report RUN` does
    assert {path.name: path.read_bytes() for path in run.glob("report.*")} == before


def test_a_killed_run_goes_on_with_its_evaluation(evaluated, tmp_path):
    """Killed within an evaluation at step 4, of which some records are there, and in step 6: nothing is drawn twice,
    nothing differs."""
    path = recipe(tmp_path, **EVALUATED, save_steps=4)
    finish(start(path, kill_within_evaluation, 4), killed=True)
    part = records.read(tmp_path / "rl/eval_during/step-4/records.jsonl")
    assert 0 < len(part) < 40 and not (tmp_path / "rl/eval_during/step-4/metrics.json").exists()
    finish(start(path, kill_in_step, 6), killed=True)
    done = (tmp_path / "rl/eval_during/step-4/metrics.json").read_text()
    finish(start(path))
    assert (tmp_path / "rl/eval_during/step-4/metrics.json").read_text() == done
    assert steps_of(tmp_path) == steps_of(evaluated) and same_weights(tmp_path, evaluated)
    assert evaluations_of(tmp_path) == evaluations_of(evaluated)
    for step in (2, 4, 6):
        one, other = ((folder / f"rl/eval_during/step-{step}/records.jsonl").read_text().splitlines()
                      for folder in (tmp_path, evaluated))  # fmt: skip
        assert sorted(one) == sorted(other)


def kill_within_evaluation(step):
    """Dies in the evaluation at this step, when some of its records are written."""
    from test_resume import kill_me

    from rl_soft.evaluation.records import Writer

    append = Writer.append

    def dying(self, *made):
        append(self, *made)
        if f"step-{step}" in str(self.path):
            kill_me()

    Writer.append = dying


def test_the_best_checkpoint_is_kept_and_becomes_the_model(evaluated, tmp_path):
    """Of equal ones the first; by any metric, in either direction."""
    figures = {step: f["eval_answer_tokens"] for step, f in evaluations_of(evaluated).items()}
    values = {**EVALUATED, "metric_for_best_model": "answer_tokens", "load_best_model_at_end": True,
              "save_total_limit": 1}  # fmt: skip
    assert len(set(figures.values())) >= 2
    for greater in (True, False):
        folder = tmp_path / str(greater)
        pipeline.run(load_recipe(recipe(folder, **values, greater_is_better=greater)))
        best = (max if greater else min)(figures, key=lambda step: figures[step])
        kept = {path.name for path in (folder / "rl").glob("checkpoint-*")}
        assert kept == {f"checkpoint-{best}", "checkpoint-6"}
        held = load_file(folder / f"rl/checkpoint-{best}/model.safetensors")
        assert all(torch.equal(weights(folder)[k], held[k]) for k in held)
        curve = curve_of(folder / "rl")
        assert curve["best_step"] == best and curve["loaded"]
        one, other = ((folder / f"rl/{name}/records.jsonl").read_text()
                      for name in ("eval_after", f"eval_during/step-{best}"))  # fmt: skip
        assert one == other


def test_an_evaluation_waits_for_the_end_of_its_rollout(tmp_path):
    pipeline.run(load_recipe(recipe(tmp_path, eval_strategy="steps", eval_steps=3, report_to="none")))
    assert sorted(evaluations_of(tmp_path)) == [4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3, "fsdp2"])
def test_two_processes_make_the_same_curve(evaluated, tmp_path, stage):
    """And load the best model, under ZeRO and FSDP2 too."""
    if stage in (2, 3):
        pytest.importorskip("deepspeed")
    values = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "answer_tokens",
              "greater_is_better": False}  # fmt: skip
    error = launch(tmp_path, stage, "-m", "rl_soft", recipe(tmp_path, **values)).communicate(timeout=240)[1]
    assert (tmp_path / "rl/model/config.json").exists(), error[-3000:]
    one, two = evaluations_of(evaluated), evaluations_of(tmp_path)
    assert one.keys() == two.keys()
    for step in one:
        assert one[step] == pytest.approx(two[step], abs=1e-4), step
    for a, b in zip(steps_of(evaluated).values(), steps_of(tmp_path).values(), strict=True):
        assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in ("loss", "grad_norm") if k in a)
    best = curve_of(tmp_path / "rl")["best_step"]
    held = load_file(tmp_path / f"rl/checkpoint-{best}/model.safetensors")
    assert best < 6 and all(torch.equal(weights(tmp_path)[name], held[name]) for name in held)


@pytest.mark.parametrize(
    "values", [{"method": "ppo"}, {"eval_strategy": "epoch", "eval_steps": None, "max_steps": 16}]
)
def test_other_methods_and_epochs(tmp_path, values):
    values = {**EVALUATED, "metric_for_best_model": "pass@2", **values}
    pipeline.run(load_recipe(recipe(tmp_path, **values)))
    assert sorted(evaluations_of(tmp_path)) == (
        [16] if "eval_steps" in values and not values["eval_steps"] else [2, 4, 6]
    )


@pytest.mark.parametrize(
    "values,message",
    [
        ({"eval_strategy": "step"}, "eval_strategy must be one of no, steps, epoch, got 'step'; did you mean steps?"),
        ({"eval_strategy": "steps"}, "eval_steps is missing: eval_strategy steps evaluates every so many"),
        ({"eval_strategy": "steps", "eval_steps": "ten"}, "eval_steps must be a number, got 'ten'"),
        ({"eval_strategy": "steps", "eval_steps": 2.5}, "eval_steps must be a whole number of steps, or a share"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, "eval_steps 5 is read with eval_strategy steps"),
        ({"eval_steps": 5}, "eval_steps has no effect without evaluations; write eval_strategy: steps"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end has no effect without evaluations"),
        ({**EVALUATED, "load_best_model_at_end": 1}, "load_best_model_at_end must be true or false, got 1"),
        ({**EVALUATED, "eval_problems": 0}, "eval_strategy steps needs eval_problems, held-out problems"),
        ({**EVALUATED, "eval_on_start": True}, "eval_on_start is not available: eval_before is that evaluation"),
        ({**EVALUATED, "metric_for_best_model": "pass@3"}, r"got 'pass@3'; did you mean pass@2\?"),
        ({**EVALUATED, "metric_for_best_model": "reward"}, "metric_for_best_model must be one of pass@1, "),
        ({**EVALUATED, "save_steps": 3, "load_best_model_at_end": True}, "3 is no multiple of eval_steps 2"),
        ({**EVALUATED, "save_strategy": "no", "load_best_model_at_end": True}, "save_strategy is no, eval_"),
        ({**EVALUATED, "save_strategy": "best"}, "save_strategy best is not available: a run that is stopped"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as told:
        load_recipe(recipe(tmp_path, **values))
    assert "\n" not in str(told.value)


def test_a_bare_no_is_no_and_a_supervised_method_has_its_own_key(tmp_path):
    path = recipe(tmp_path)
    path.write_text(path.read_text() + "eval_strategy: no\n")
    assert load_recipe(path).values["eval_strategy"] == "no"
    (tmp_path / "codi.yaml").write_text(
        yaml.safe_dump({"method": "codi", "dataset": "chain_sum", "train_size": 8, "output_dir": "x", **EVALUATED,
                        "model_config": RECIPE["model_config"], "vocabulary": VOCABULARY})
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="eval_strategy is not available: method codi looks at held-out rows by valid"
    ):
        load_recipe(tmp_path / "codi.yaml")


def trainer(folder, kind, **values):
    made = tiny_policy()
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return (SoftPPOTrainer if kind == "ppo" else SoftGRPOTrainer)(
        made.model, reward_funcs=odd_reward, processing_class=made.tokenizer, thinking=THINKING, ratio="joint",
        args=config(folder, **{"save_strategy": "steps", "save_steps": 1, **values}), train_dataset=dataset(),
        eval_dataset=dataset(), peft_config=lora if kind == "lora" else None,
    )  # fmt: skip


def state_of(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["plain", "lora", "ppo"])
def test_the_best_model_comes_back_whole(tmp_path, kind):
    """An adapter and a value head too."""
    first = trainer(tmp_path / "one", kind, max_steps=1)
    first.train()
    made = trainer(tmp_path / "two", kind, max_steps=2)
    made.train()
    expected, before = state_of(first), state_of(made)
    made.state.best_model_checkpoint = str(tmp_path / "two/checkpoint-1")
    made.state.best_metric = 0.5
    made._load_best_model()
    found = state_of(made)
    assert found.keys() == expected.keys() and (kind != "ppo" or any("value_head" in name for name in found))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_in_python_an_eval_dataset_is_evaluated_by_trl(tmp_path):
    made = trainer(tmp_path, "plain", max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no")
    made.train()
    logs = [log for log in made.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in logs] == [1, 2] and all("eval_reward" in log for log in logs)
