"""Recipes: valid YAML and valid Python at once, strict keys, one clear line for every mistake.

pytest tests/test_recipes.py
"""

import ast
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from rl_soft.cli import main
from rl_soft.config import batch_plan, load_recipe, parse_overrides

RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "accelerate")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_is_yaml_and_python_and_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    ast.parse(text)
    assert "'''" not in "\n".join(text.splitlines()[1:-1])
    assert load_recipe(path).output_dir


def write(tmp_path, **values):
    base = {
        "method": "grpo", "output_dir": str(tmp_path / "run"), "dataset": "chain_sum", "model_name_or_path": "m",
    }  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**base, **values}.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    "values,message",
    [
        ({"num_generation": 4}, "unknown key 'num_generation'.*did you mean num_generations"),
        ({"thought_kay": 4}, "unknown key 'thought_kay'.*did you mean thought_k"),
        ({"thought_k": -1}, "thought_k must be 0 .* got -1"),
        ({"thought_tau": 0}, "thought_tau must be above 0"),
        ({"thought_tau": "hot"}, "thought_tau must be float, got 'hot'"),
        ({"thought_k": True}, "thought_k must be int, got True"),
        ({"thought": "soft"}, "thought soft has no density"),
        ({"thought": "gumble"}, "thought must be one of token, soft, gumbel, got 'gumble'"),
        ({"use_vllm": True}, "use_vllm is not available"),
        ({"max_completion_length": 64}, "max_completion_length is derived from"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"dataset": None}, "dataset is missing"),
        ({"model_name_or_path": None}, "must name one of warm_start, model_name_or_path and model_config"),
        ({"warm_start": "x.yaml"}, "not warm_start and model_name_or_path"),
        ({"method": "gpro"}, "method must be one of"),
        ({"eval_k": [64]}, "eval_k must be at most eval_samples"),
        ({"phase": "explicit"}, "end_of_thinking must be a text"),
    ],
)
def test_a_mistake_names_the_field_and_the_way_out(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, **values))


def test_a_missing_recipe_names_its_neighbour():
    with pytest.raises(ValueError, match=r"grpo_gumble.yaml does not exist; did you mean .*grpo_gumbel.yaml"):
        load_recipe(ROOT / "recipes/grpo_gumble.yaml")


def test_the_command_line_beats_the_file_and_numbers_are_numbers(tmp_path):
    path = write(tmp_path, learning_rate="1e-5", seed=3, output_dir="runs/x-{seed}")
    recipe = load_recipe(path, parse_overrides(["--learning_rate", "2e-6", "--thought-k=7", "--seed", "5"]))
    assert recipe.training["learning_rate"] == 2e-6
    assert recipe.thinking.thought_k == 7
    assert str(recipe.output_dir) == "runs/x-5"
    assert load_recipe(write(tmp_path, learning_rate=1e-5)).training["learning_rate"] == 1e-5


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("method: grpo\nseed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="key 'seed' appears twice"):
        load_recipe(path)


@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_derived_or_refused_with_the_nearest_valid(tmp_path, world):
    def recipe(**values):
        return load_recipe(write(tmp_path, prompts_per_step=6, num_generations=4, **values))

    plan = batch_plan(recipe(per_device_train_batch_size=6), world)
    assert plan == {"steps_per_generation": 4 // world, "gradient_accumulation_steps": 4 // world}
    plan = batch_plan(recipe(per_device_train_batch_size=6, updates_per_rollout=2), world)
    assert plan["steps_per_generation"] == 2 * plan["gradient_accumulation_steps"]
    with pytest.raises(ValueError, match=r"got 5, nearest valid (4|6)"):
        batch_plan(recipe(per_device_train_batch_size=5), world)


def test_the_cli_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", str(write(tmp_path, lerning_rate=1))])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "did you mean learning_rate" in error


def test_an_output_folder_is_never_overwritten(tmp_path, monkeypatch):
    from rl_soft.config import check_output_dir, write_config

    first = load_recipe(write(tmp_path, seed=1))
    assert check_output_dir(first) is False
    write_config(first)
    assert check_output_dir(first) is True
    with pytest.raises(ValueError, match="holds a run with seed = 1, this one has 2"):
        check_output_dir(load_recipe(write(tmp_path, seed=2)))
    (tmp_path / "run/config.yaml").unlink()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_output_dir(first)


def test_launch_sh_answers_help_and_refuses_a_bad_stage():
    def launch(*arguments):
        return subprocess.run([ROOT / "launch.sh", *arguments], capture_output=True, text=True, timeout=60)

    assert "usage: ./launch.sh RECIPE" in launch("--help").stdout
    bad = launch("recipes/codi.yaml", "--zero", "9")
    assert bad.returncode == 2 and "--zero must be 0, 1, 2 or 3" in bad.stderr


def test_a_recipe_is_a_program():
    """`python recipes/x.yaml --key value`, which is what `accelerate launch recipes/x.yaml` runs."""
    run = subprocess.run(
        [sys.executable, "recipes/codi.yaml", "--thought_tauu", "1"],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ},
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].endswith("did you mean thought_tau?")
