"""Keys of TRL's and open-r1's scripts in a recipe: what they become here, and what is a mistake.

pytest tests/config/test_theirs.py
"""

import pytest
import trl
import yaml
from conftest import ROOT

from rl_soft.config.recipe import batch_plan, load_recipe, make_recipe
from rl_soft.config.theirs import answer_share

BASE = {"method": "grpo", "output_dir": "runs/x", "dataset": "chain_sum", "model_name_or_path": "m"}
THEIRS = {
    "model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_name": "me/mine", "reward_funcs": ["accuracy_reward"],
    "thought": "gumbel",
}  # fmt: skip
EXPLICIT = {"phase": "explicit", "end_of_thinking": "####"}


def make(tmp_path, processes=1, base=BASE, **values):
    return make_recipe(tmp_path / "r.yaml", {**base, **values}, processes)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 8},
        {"steps_per_generation": 4},
        {"gradient_accumulation_steps": 2, "generation_batch_size": 96},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_batch_keys_make_trl_s_batches(tmp_path, monkeypatch, keys, world):
    """TRL's own configuration, given the same keys, takes the batches that ours hands to it."""
    monkeypatch.setattr(trl.GRPOConfig, "world_size", world)
    sizes = {"per_device_train_batch_size": 8, "num_generations": 8, **keys}
    theirs = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **sizes)
    recipe = make(tmp_path, world, **sizes)
    plan = batch_plan(recipe, world)
    assert {name: getattr(theirs, name) for name in plan} == plan
    rows = recipe.extra.prompts_per_step * theirs.num_generations
    assert rows == theirs.generation_batch_size
    assert not {"gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"} & recipe.values.keys()


def test_one_line_says_what_came_out(tmp_path, caplog):
    with caplog.at_level("INFO", logger="rl_soft"):
        make(tmp_path, 2, gradient_accumulation_steps=4, per_device_train_batch_size=4, torch_dtype="float32")
    (batch,) = [line for line in caplog.messages if "prompts_per_step" in line]
    assert batch.startswith("gradient_accumulation_steps -> prompts_per_step 4, updates_per_rollout 1 (32 completions")
    assert "read as: torch_dtype -> dtype 'float32'" in caplog.messages


@pytest.mark.parametrize(
    ("values", "thoughts", "answer"),
    [
        ({**EXPLICIT, "max_completion_length": 300, "max_answer_tokens": 12}, 288, 12),
        ({**EXPLICIT, "max_completion_length": 300, "num_thoughts": 200}, 200, 100),
        ({**EXPLICIT, "max_completion_length": 300, "num_thoughts": 200, "max_answer_tokens": 100}, 200, 100),
        ({**EXPLICIT, "max_completion_length": 2048}, 1792, 256),
        ({"max_completion_length": 40}, 6, 34),  # latent thoughts are counted, not capped
    ],
)
def test_max_completion_length_is_thoughts_and_answer(tmp_path, values, thoughts, answer):
    thinking = make(tmp_path, **values).thinking
    assert (thinking.num_thoughts, thinking.max_answer_tokens) == (thoughts, answer)
    assert thoughts + answer == values["max_completion_length"]


@pytest.mark.parametrize("whole", [2, 3, 16, 31, 32, 256, 8192])
def test_each_part_of_a_length_has_positions(whole):
    assert 1 <= answer_share(whole) <= whole - 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts_per_step": 32, "gradient_accumulation_steps": 4},
         "gradient_accumulation_steps 4 makes prompts_per_step 4, and prompts_per_step is 32; give one of them"),
        ({"generation_batch_size": 64, "steps_per_generation": 4},
         "generation_batch_size 64 and steps_per_generation 4 say the same; give one of them"),
        ({"generation_batch_size": 60}, "generation_batch_size 60 must be a multiple of per_device_train_batch_siz"),
        ({"gradient_accumulation_steps": 2, "num_generations": 6},
         "num_generations 6 does not divide it; 3 processes would do"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 3}, "does not divide into steps of"),
        ({"dataset_name": ["a"], "dataset": None}, "dataset must be a text, got \\['a'\\]"),
        ({"gradient_accumulation_steps": "4"}, "gradient_accumulation_steps must be a whole number, at least 1, got"),
        ({"num_processes": 4}, "num_processes is 4, and 1 run; start it with ./launch.sh RECIPE --nproc 4"),
        ({**EXPLICIT, "max_completion_length": 300, "num_thoughts": 100, "max_answer_tokens": 100},
         "max_completion_length 300 is not num_thoughts 100 \\+ max_answer_tokens 100"),
        ({"max_completion_length": 4}, "max_completion_length 4 leaves num_thoughts 6 and max_answer_tokens -2"),
        ({"max_completion_length": "long"}, "max_completion_length must be a whole number, at least 1, got 'long'"),
        ({"torch_dtype": "float16", "dtype": "float32"},
         "torch_dtype 'float16' and dtype 'float32' are one key, called dtype here; give one of them"),
        ({"dataset_name": "a/b"}, "dataset_name 'a/b' and dataset 'chain_sum' are one key, called dataset here"),
        ({"dataset_config": "x", "dataset_options": {"config": "y"}}, "dataset_config 'x' and config 'y' of dataset_"),
        ({"warmup_ratio": 2}, "warmup_ratio must be a number, at least 0 and below 1, got 2"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio 0.1 makes warmup_steps 0.1, and warmup_steps is 5"),
        ({"reward_funcs": ["code", "format"], "reward_weights": [1, 0.1]},
         "reward_funcs: code is not available: it runs programs on a server"),
        ({"reward_funcs": ["format"], "rewards": ["math_accuracy"]}, "are one key, called rewards here"),
        ({"model_revision": "v1", "beta": 0.1}, "model_revision 'v1' with beta 0.1: the reference is loaded again"),
        ({"model_revision": 1}, "model_revision must be a text, or null, got 1"),
        ({"wandb_project": 3}, "wandb_project must be a text, or null, got 3"),
        ({"lora_bias": "all"}, "unknown key 'lora_bias' in .*whole layers"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_contradiction_shows_both_in_one_line(tmp_path, values, message):
    base = {key: value for key, value in BASE.items() if key != "rewards"}
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, base=base, **values)
    assert len(error.value.lines) == 1


def test_a_recipe_of_trl_starts_with_one_key_added(tmp_path):
    path = tmp_path / "trl.yaml"
    path.write_text(yaml.safe_dump(THEIRS))
    recipe = load_recipe(path)
    assert recipe.method == "grpo" and recipe.output_dir.name == "trainer_output"
    thinking, data = recipe.thinking, recipe.data
    assert (thinking.phase, thinking.end_of_thinking, thinking.thought) == ("explicit", "</think>", "gumbel")
    assert thinking.num_thoughts + thinking.max_answer_tokens == trl.GRPOConfig.max_completion_length
    assert batch_plan(recipe, 1) == {"steps_per_generation": 1, "gradient_accumulation_steps": 1}
    assert data.dataset == "me/mine" and data.dataset_columns == {"question": "prompt", "answer": "solution"}
    assert recipe.extra.rewards == ["math_accuracy"] and recipe.extra.ratio == "top1" and data.eval_problems == 0
    for key in ("learning_rate", "lr_scheduler_type", "gradient_checkpointing", "beta", "num_iterations"):
        assert recipe.resolved.get(key, getattr(trl.GRPOConfig, key)) == getattr(trl.GRPOConfig, key), key
    with_method = load_recipe(path, {"method": "grpo"})
    assert with_method.resolved == recipe.resolved
    with pytest.raises(ValueError, match=r"method is missing in .*; add thought: gumbel to TRL's keys"):
        load_recipe(path, {"thought": None})


@pytest.mark.parametrize(
    ("values", "end", "asked"),
    [
        ({}, "</think>", False),  # Qwen3 writes it
        ({"model_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}, "</think>", False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "####", True),
        ({"model_name_or_path": "Qwen/Qwen2.5-0.5B"}, "####", True),
        ({"model_name_or_path": "m", "system_prompt": "Answer after ####."}, "####", False),
        ({"model_name_or_path": "m", "system_prompt": "<think>...</think>"}, "</think>", False),
        ({"model_name_or_path": "m", "reward_funcs": ["think_format_reward"]}, "</think>", False),
        ({"model_name_or_path": "m", "end_of_thinking": "Answer:"}, "Answer:", False),
    ],
)
def test_thinking_ends_with_what_the_model_writes_or_is_asked_for(tmp_path, values, end, asked):
    """Without its end a completion has no answer, and would never be rewarded."""
    thinking = make(tmp_path, base={**THEIRS, **values}).thinking
    assert thinking.end_of_thinking == end and ("####" in thinking.question_template) is asked


def test_a_recipe_of_ours_with_a_word_of_theirs_keeps_our_defaults(tmp_path):
    ours = {"method": "grpo", "output_dir": "x", "model_name_or_path": "m", **EXPLICIT, "num_thoughts": 9}
    recipe = make(tmp_path, base=ours, dataset_name="gsm8k", reward_funcs=["accuracy"])
    plain = make(tmp_path, base=ours, dataset="gsm8k", rewards=["math_accuracy"])
    assert recipe.resolved == plain.resolved


def test_what_is_stored_is_in_our_words(tmp_path, monkeypatch):
    """config.yaml of such a run, started again, is the same run on as many processes as it was made for."""
    from rl_soft.config.recipe import write_config

    values = {**THEIRS, "output_dir": str(tmp_path / "run"), "gradient_accumulation_steps": 4, "warmup_ratio": 0.1}
    first = make(tmp_path, 2, base=values)
    write_config(first)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_recipe(tmp_path / "run/config.yaml").resolved == first.resolved


def test_parameters_of_open_r1_s_rewards_reach_ours(tmp_path):
    recipe = make(
        tmp_path, reward_funcs=["cosine", "repetition_penalty", "soft_overlong_punishment", "code_format", "my.own"],
        cosine_max_len=50, cosine_min_value_wrong=-2.0, repetition_n_grams=2, max_completion_len=90,
        soft_punish_cache=30, code_language="cpp",
    )  # fmt: skip
    assert recipe.extra.rewards == [
        {"CosineScaled": {"min_value_wrong": -2.0, "max_value_wrong": -0.5, "max_length": 50}},
        {"Repetition": {"ngram_size": 2}},
        {"Overlong": {"max_length": 90, "buffer": 30}},
        {"CodeFormat": {"language": "cpp"}},
        "my.own",
    ]


def test_every_reward_of_theirs_is_one_of_ours_with_its_parameters():
    from rl_soft.config.their_rewards import REWARDS, read_rewards
    from rl_soft.train.reward_functions import reward_functions

    needs = {"get_cosine_scaled": {"max_len": 10}}
    entries = [{name: needs[name]} if name in needs else name for name in REWARDS]
    assert all(map(callable, reward_functions(read_rewards(entries, {}))))
    assert read_rewards("trl.rewards.think_format_reward", {}) == ["think_format"]


def test_several_rollouts_per_step_are_one(tmp_path):
    """TRL may draw several times between two optimizer steps, by the same policy."""
    recipe = make(tmp_path, gradient_accumulation_steps=32, steps_per_generation=8, per_device_train_batch_size=4)
    assert (recipe.extra.prompts_per_step, recipe.extra.updates_per_rollout) == (16, 1)
    assert batch_plan(recipe, 1)["gradient_accumulation_steps"] == 32


def test_the_command_line_beats_what_a_file_says_by_another_name(tmp_path):
    path = tmp_path / "trl.yaml"
    lengths = {"max_completion_length": 300, "generation_batch_size": 64, "torch_dtype": "float16"}
    path.write_text(yaml.safe_dump({**THEIRS, **lengths, "dataset_config": "x", "warmup_ratio": 0.5}))
    given = {
        "num_thoughts": 7, "max_answer_tokens": 5, "prompts_per_step": 3, "dtype": "float32", "dataset": "gsm8k",
        "dataset_options": {"revision": "y"}, "warmup_steps": 3, "rewards": ["my.own"],
    }  # fmt: skip
    values = load_recipe(path, given).values
    assert {key: values[key] for key in given if key != "dataset_options"} == {
        key: value for key, value in given.items() if key != "dataset_options"
    }
    assert values["dataset_options"]["revision"] == "y" and "config" not in values["dataset_options"]
    assert load_recipe(path, {"max_completion_length": 30}).thinking.num_thoughts == 15


def test_the_example_of_the_page_is_read_as_the_page_says(tmp_path, caplog):
    page = (ROOT / "docs/from_trl.md").read_text()
    (tmp_path / "mine.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    said = [line.strip() for line in page.splitlines() if line.startswith("    ") and " -> " in line]
    with caplog.at_level("INFO", logger="rl_soft"):
        load_recipe(tmp_path / "mine.yaml")
    assert len(said) == 3
    for line in said:
        assert any(message.startswith(line.partition(" (32")[0]) for message in caplog.messages), line


def test_the_page_names_every_reward_of_theirs():
    from rl_soft.config.their_rewards import NONE, REWARDS

    page = (ROOT / "docs/from_trl.md").read_text()
    shown = {"get_soft_overlong_punishment": "get_soft_overlong_punishment", "think_format": "think_format_reward"}
    shown |= {"get_cosine_scaled": "get_cosine_scaled_reward", "reasoning_accuracy": "reasoning_accuracy_reward"}
    shown |= {"get_repetition_penalty": "get_repetition_penalty_reward"}
    names = [shown.get(name, name) for name in (*REWARDS, *NONE) if name != "len"]
    assert [name for name in names if f"`{name}`" not in page] == []
