"""What `check` tells of a recipe besides its keys: at once, without torch, and all of it.

pytest tests/train/test_ready.py
"""

import json
import resource
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from rl_soft.config.recipe import check_output_dir, load_recipe, warm_start_of, write_config
from rl_soft.keys import Mistakes
from rl_soft.train.ready import check_ready


@pytest.fixture
def recipe(tmp_path):
    """A recipe over two files of problems, and the model of a folder that has what is looked at."""
    for name, numbers in (("train", range(40)), ("test", range(40, 60))):
        rows = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "m").mkdir()
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / "m" / file).write_text("{}")

    def made(**values):
        base = {"method": "grpo", "output_dir": str(tmp_path / "run"), "model_name_or_path": str(tmp_path / "m"),
                "dataset": str(tmp_path / "train.jsonl"), "eval_dataset": str(tmp_path / "test.jsonl"),
                "eval_problems": 20, "thought": "gumbel", "phase": "explicit", "end_of_thinking": "####"}  # fmt: skip
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**base, **values}.items() if v is not None}))
        return path

    return made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_problems": 100}, r"eval_problems is 100, and .*test.jsonl \(evaluation\) has 20 rows"),
        ({"train_size": 500}, r"train_size is 500, and .*train.jsonl \(train\) has 40 rows"),
        ({"prompts_per_step": 64}, "prompts_per_step 64 is more than the 40 training rows"),
        ({"eval_dataset": "nowhere.jsonl"}, "no such file: nowhere.jsonl"),
        ({"dataset_columns": {"question": "prompt"}}, "prompt"),
        ({"eval_dataset": None}, "evaluation questions are also training questions"),
        ({"dataset": "chain_sun", "eval_problems": 0}, "unknown data source 'chain_sun'; did you mean chain_sum"),
        ({"warm_start": "nothing.yaml", "model_name_or_path": None}, "recipe nothing.yaml does not exist"),
        ({"model_name_or_path": "models/none"}, "model folder models/none does not exist"),
        ({"rewards": ["math_acuracy"]}, "math_acuracy.*did you mean math_accuracy"),
        ({"per_device_train_batch_size": 7}, "per_device_train_batch_size must divide"),
    ],
)
def test_a_run_that_could_not_start_is_told_by_what_the_user_typed(recipe, values, message):
    check_ready(load_recipe(recipe()))
    with pytest.raises(ValueError, match=message):
        check_ready(load_recipe(recipe(**values)))


def test_all_of_it_is_told_at_once(recipe):
    wrong = {"eval_problems": 100, "model_name_or_path": "models/none", "rewards": ["nothing"],
             "per_device_train_batch_size": 7}  # fmt: skip
    with pytest.raises(Mistakes) as error:
        check_ready(load_recipe(recipe(**wrong)))
    assert len(error.value.lines) == len(wrong)


def test_runs_share_a_warm_start_by_its_folder(recipe, tmp_path):
    """By a recipe, each seed has a warm start of its own; by the folder of a run, all have that one."""
    codi = tmp_path / "codi.yaml"
    values = {"method": "codi", "output_dir": str(tmp_path / "codi-{seed}"), "dataset": "chain_sum",
              "model_name_or_path": "m", "learning_rate": 1e-3}  # fmt: skip
    codi.write_text(yaml.safe_dump(values))
    write_config(load_recipe(codi, {"seed": 1}))
    by_recipe = load_recipe(recipe(warm_start=str(codi), model_name_or_path=None, seed=2))
    assert warm_start_of(by_recipe).output_dir == tmp_path / "codi-2"
    moved = (tmp_path / "codi-1").rename(tmp_path / "moved")
    shared = warm_start_of(load_recipe(recipe(warm_start=str(moved), model_name_or_path=None, seed=2)))
    assert (shared.output_dir, shared.seed, shared.training["learning_rate"]) == (moved, 1, 1e-3)
    assert check_output_dir(shared), "it is that run"


def test_a_mistake_is_told_in_less_than_two_seconds(recipe):
    """Of processor time, which does not depend on what else the machine does."""
    for values in ({"learning_rate": "abc"}, {"eval_problems": 100}, {"rewards": ["nothing.here"]}):
        path = recipe(**values)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(
            [sys.executable, "-m", "rl_soft", "check", path], cwd=ROOT, capture_output=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == 2
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_it_needs_no_torch(recipe):
    code = f"import sys; sys.modules['torch'] = None; from rl_soft.cli import main; main(['check', {str(recipe())!r}])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "eval_problems: 20" in run.stdout
