"""`rl-soft convert` on ten public recipes: what it writes loads, says what it left out, and runs.

pytest tests/config/test_convert.py                    one of them runs
pytest -m slow tests/config/test_convert.py            all ten: two steps each on a tiny model
"""

import json
import math
import sys

import pytest
import yaml
from conftest import ROOT
from test_recipe import CHATML, tiny_pretrained
from transformers.utils import logging

from rl_soft.cli import main
from rl_soft.config.convert import convert
from rl_soft.config.recipe import load_recipe, make_recipe

sys.path.insert(0, str(ROOT / "tests/cases"))
from public_recipes import LEFT_OUT, RECIPES

DEFAULT = "open-r1: recipes/Qwen2.5-1.5B-Instruct/grpo/config_demo.yaml"


def written(tmp_path, name, **values):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(RECIPES[name] | values))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_public_recipe_converts_and_says_what_it_left_out(tmp_path, name):
    text = convert(written(tmp_path, name))
    values = yaml.safe_load(text)
    recipe = make_recipe(tmp_path / "ours.yaml", values | {"report_to": "none"}, processes=1)
    assert (recipe.method, recipe.thinking.thought, recipe.thinking.phase) == ("grpo", "gumbel", "explicit")
    assert recipe.values | values | {"report_to": "none"} == recipe.values, "nothing is left to translate"
    left = text.partition("\n# left out\n")[2].partition("\n\n")[0].splitlines()
    dropped = {key for key in LEFT_OUT.get(name, ()) if any(line.startswith(f"# {key}") for line in left)}
    assert dropped == LEFT_OUT.get(name, set()) and len(left) == len(dropped)
    assert all(": " in line and len(line.rpartition(": ")[2]) > 10 for line in left), "each with its reason"


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in LEFT_OUT])
def test_where_nothing_is_left_out_one_key_is_enough(tmp_path, name):
    """The YAML as it is, with `thought: gumbel` added, is the recipe that convert writes."""
    path = written(tmp_path, name)
    processes = RECIPES[name].get("num_processes", 1)
    converted = make_recipe(tmp_path / "x.yaml", yaml.safe_load(convert(path)) | {"report_to": "none"}, 1)
    loaded = load_recipe(path, {"thought": "gumbel", "report_to": "none"}, processes)
    assert loaded.resolved == converted.resolved


def test_the_command_prints_or_writes_and_never_overwrites(tmp_path, capsys):
    path = written(tmp_path, DEFAULT)
    main(["convert", str(path), "--max_steps", "7"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["max_steps"] == 7
    out = tmp_path / "ours.yaml"
    main(["convert", str(path), "-o", str(out), "--max_steps=7"])
    assert out.read_text() == printed
    with pytest.raises(SystemExit):
        main(["convert", str(path), "-o", str(out)])
    assert f"{out} exists; choose another" in capsys.readouterr().err
    main(["convert", str(path), "--nproc", "8"])
    assert yaml.safe_load(capsys.readouterr().out)["prompts_per_step"] == 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward_funcs": ["code"], "reward_weights": [1.0]}, "reward_funcs: code is not available"),
        ({"lerning_rate": 1, "dataset_name": None}, "dataset is missing"),
        ({"learning_rate": "high"}, "learning_rate must be a number, got 'high'"),
    ],
)
def test_what_keeps_a_recipe_from_running_is_told(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        convert(written(tmp_path, DEFAULT, **values))


def test_a_key_that_nobody_knows_is_left_out_with_a_line(tmp_path):
    text = convert(written(tmp_path, DEFAULT, lerning_rate=1, lora_dropout=0.05, load_in_4bit=False))
    left = text.partition("\n# left out\n")[2]
    assert "# lerning_rate 1: neither this package nor TRL has such a key" in left
    assert "# lora_dropout 0.05: with dropout on" in left and "load_in_4bit" not in left


def test_a_recipe_of_another_method_is_none_of_grpo(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "a/b", "packing": True}))
    with pytest.raises(ValueError, match="names no rewards and no key of GRPO alone"):
        convert(path)


RUNS = [pytest.param(name, marks=() if name == DEFAULT else pytest.mark.slow) for name in RECIPES]


@pytest.fixture
def same_verbosity():
    """A recipe may set transformers' log level, which is that of the process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_runs(tmp_path, name, same_verbosity):
    """Two steps on a tiny model: the recipe as it is, but for model, data, sizes, lengths, and what is sent."""
    from rl_soft.train import pipeline as train

    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tiny_pretrained(tmp_path / "model", "qwen2", CHATML, special, ["<think>", "</think>"])
    path = tmp_path / "ours.yaml"
    path.write_text(convert(written(tmp_path, name)))
    values = yaml.safe_load(path.read_text())
    columns = values["dataset_columns"]
    rows = [{columns["question"]: f"{a} + {b}?", columns["answer"]: f"${a + b}$"} for a in range(4) for b in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    smaller = {
        "model_name_or_path": str(tmp_path / "model"), "dataset": str(tmp_path / "rows.jsonl"),
        "dataset_options": {"answer_type": "expression"}, "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "prompts_per_step": 2 * values["updates_per_rollout"], "num_generations": 4, "per_device_train_batch_size": 4,
        "num_thoughts": 6, "max_answer_tokens": 4, "report_to": "none", "push_to_hub": False, "dtype": "float32",
        "attn_implementation": "sdpa", "use_vllm": False, "model_revision": None,
        **{key: None for key in values if key.startswith("vllm_")},
    }  # fmt: skip
    recipe = load_recipe(path, smaller)
    train.run(recipe)
    run = tmp_path / "run"
    logs = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert logs[-1]["step"] == 2
    assert all(math.isfinite(value) for line in logs for value in line.values() if isinstance(value, float))
    assert json.loads((run / "model/rl_soft.json").read_text())["thinking"]["system_prompt"] == values.get(
        "system_prompt"
    )
    if "chat_template" in values:
        assert (run / "model/chat_template.jinja").read_text() == values["chat_template"]
