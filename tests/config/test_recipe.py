"""Recipes: valid YAML and valid Python at once, strict keys, one clear line for every mistake.

pytest tests/config/test_recipe.py
"""

import ast
import json
import math
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, TINY

from rl_soft.cli import main
from rl_soft.config.reading import parse_overrides
from rl_soft.config.recipe import batch_plan, load_recipe
from rl_soft.train.ready import describe

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
        ({"thought_k": -1}, "thought_k must be at least 0, got -1"),
        ({"thought_tau": 0}, "thought_tau must be above 0"),
        ({"thought_tau": "hot"}, "thought_tau must be a number, above 0, got 'hot'"),
        ({"thought_k": True}, "thought_k must be a whole number, at least 0, got True"),
        ({"thought": "soft"}, "thought soft has no density"),
        ({"lora_dropout": 0.1}, "lora_dropout must be 0, got 0.1: with dropout on"),
        ({"thought": "gumble"}, "thought must be one of token, soft, gumbel, dirichlet, hidden, hybrid, got 'gumble'"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation must be true"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"dataset": None}, "dataset is missing"),
        ({"model_name_or_path": None}, "must name one of warm_start, model_name_or_path and model_config"),
        ({"warm_start": "x.yaml"}, "not warm_start and model_name_or_path"),
        ({"method": "gpro"}, "method must be one of"),
        ({"method": None}, "method is missing in .*; it is one of codi"),
        ({"learning_rate": "abc"}, "learning_rate must be a number, got 'abc'"),
        ({"reward_weights": [1.0, 0.2]}, r"reward_weights must hold one number .* 1 rewards \(math_accuracy\), got"),
        ({"eval_k": [0, 2]}, r"eval_k must be at least 1 each, got \[0, 2\]"),
        ({"phase": "explicit"}, "end_of_thinking must be a text"),
        # keys that would have no effect
        ({"top_p": 1.2}, "top_p must be above 0 and at most 1, got 1.2"),
        ({"top_k": 30, "use_vllm": True}, "top_k 30 with use_vllm: vLLM does not return the ids that a cut kept"),
        ({"min_p": 0.1, "ratio": "pathwise"}, "min_p 0.1: ratio pathwise makes thoughts again"),
        ({"order": "papers"}, "order must be one of exact, paper, got 'papers'"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not available"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs is not available"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs .*enable_thinking.* needs a chat template, and phase latent takes none; leave it",
        ),
        ({"chat_template_kwargs": "no"}, "chat_template_kwargs must be a mapping, or null, got 'no'"),
        ({"method": "codi", "chat_template": "{{ x }}"}, "chat_template .* method codi trains questions as they are"),
        ({"cache_implementation": "static"}, "cache_implementation is not available"),
        ({"use_transformers_paged": True}, "use_transformers_paged is not available"),
        ({"vllm_mode": "server"}, "vllm_mode is not available: it is read with use_vllm true"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs is not available: .*use dtype"),
        ({"disable_dropout": False}, "disable_dropout must be true: with dropout on"),
        ({"eval_dataset_options": {"path": "x"}}, "eval_dataset_options: .* names no eval_dataset"),
        ({"system_prompt": "Hi"}, "system_prompt 'Hi' needs a chat template, and phase latent takes none"),
        (
            {"method": "codi", "system_prompt": "Hi"},
            "system_prompt 'Hi' .* method codi .*question_template",
        ),
        ({"method": "codi", "eval_samples": 8}, "eval_samples is not available: .*use rl-soft eval MODEL"),
        ({"method": "codi", "eval_k": [1, 2]}, "eval_k is not available: .*use rl-soft eval MODEL"),
        ({"dtype": "bf16"}, "dtype must be one of float32, bfloat16, float16, or null, got 'bf16'; did you mean bfl"),
        ({"hub_strategy": "every_sav"}, "hub_strategy must be one of .*, got 'every_sav'; did you mean every_save?"),
        ({"hub_token": "hf_x"}, "hub_token is not available: config.yaml .*HF_TOKEN"),
        ({"push_to_hub": "yes"}, "push_to_hub must be true or false, got 'yes'"),
        ({"dtype": "half"}, "dtype must be one of float32, bfloat16, float16, or null, got 'half'$"),
    ],
)
def test_a_mistake_names_the_field_and_the_way_out(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, **values))


def test_all_mistakes_of_a_recipe_are_told_at_once(tmp_path, capsys):
    wrong = {"thought_kay": 1, "load_in_8bit": True, "learning_rate": "abc", "thought_tau": 0,
             "repetition_penalty": 0.9, "lora_r": 0, "dataset": None,
             "output_dir": None, "reward_weights": [1, 2]}  # fmt: skip
    with pytest.raises(SystemExit):
        main(["check", str(write(tmp_path, **wrong))])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wrong) and all(line.startswith("rl_soft: error: ") for line in lines)
    for key in wrong:
        assert sum(key in line.split(": ", 2)[2] for line in lines) == 1, key


def test_an_eval_k_above_the_samples_is_cut_with_a_line(tmp_path, caplog):
    with caplog.at_level("INFO", logger="rl_soft"):
        recipe = load_recipe(write(tmp_path, eval_samples=8, eval_k=[1, 4, 64]))
    assert recipe.eval.eval_k == recipe.values["eval_k"] == [1, 4, 8]
    assert "eval_k [1, 4, 64]: eval_samples is 8, so it becomes [1, 4, 8]" in caplog.text


def test_a_key_that_says_what_is_so_anyway_is_no_mistake(tmp_path):
    same = {"top_p": 1, "top_k": 0, "min_p": None, "use_vllm": False, "cache_implementation": None}
    assert load_recipe(write(tmp_path, **same, disable_dropout=True, vllm_mode="colocate")).method == "grpo"
    assert load_recipe(write(tmp_path, method="codi", eval_samples=32)).method == "codi"


@pytest.mark.parametrize("method", ["codi", "grpo"])
def test_a_stored_recipe_is_a_recipe(tmp_path, method):
    """config.yaml, run again elsewhere, is the same run."""
    from rl_soft.config.recipe import write_config

    first = load_recipe(write(tmp_path, method=method))
    write_config(first)
    again = load_recipe(tmp_path / "run/config.yaml")
    assert again.resolved == first.resolved


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_the_resolved_recipe_names_our_defaults_of_the_trainer(tmp_path, method):
    from rl_soft.config.recipe import check_output_dir, write_config
    from rl_soft.train import pipeline as train

    values = {"method": method, "output_dir": str(tmp_path / "run")}
    if method == "sft":
        values |= {"phase": "explicit", "thought": "token", "end_of_thinking": "#"}
    recipe = load_recipe(write(tmp_path, **values))
    shown = yaml.safe_load(describe(recipe))
    used = train.training_values(recipe)
    assert all(shown[key] == value for key, value in used.items() if key in shown)
    assert used.keys() - shown.keys() == {"use_cpu", "bf16"}, "which the machine decides"
    assert (shown["save_steps"], shown["lr_scheduler_type"]) == (100, "constant")
    assert shown.get("disable_dropout", False) is (method == "ppo")
    write_config(recipe)
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds a run with save_steps = 100, this one has 50"):
        check_output_dir(load_recipe(write(tmp_path, **values, save_steps=50)))
    assert check_output_dir(load_recipe(write(tmp_path, **values, save_steps=100)))


def test_a_run_made_before_a_key_was_resolved_or_refused_is_still_that_run(tmp_path):
    recipe = load_recipe(write(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**recipe.values, "repetition_penalty": 0.9}))
    from rl_soft.config.recipe import check_output_dir

    assert check_output_dir(recipe)
    recipe = load_recipe(write(tmp_path, method="codi"))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**recipe.values, "eval_samples": 8}))
    assert check_output_dir(recipe)


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
    from rl_soft.config.recipe import check_output_dir, write_config

    first = load_recipe(write(tmp_path, seed=1))
    assert check_output_dir(first) is False
    write_config(first)
    assert check_output_dir(first) is True
    corrected = load_recipe(write(tmp_path, seed=2))
    assert check_output_dir(corrected) is False, "nothing was trained, so a start that failed may be corrected"
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds a run with seed = 1, this one has 2"):
        check_output_dir(corrected)
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


@pytest.mark.parametrize(("visible", "count"), [(None, "4"), ("0,2", "2"), ("GPU-8f2e", "1"), ("", "0"), ("-1", "0")])
def test_launch_sh_counts_the_gpus_that_it_may_use(tmp_path, visible, count):
    """A process for each of the others would find no device."""
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA H200 (UUID: GPU-$i)"; done\n')
    command.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    script = f"set -euo pipefail; eval \"$(sed -n '/^gpus()/,/^}}/p' {ROOT / 'launch.sh'})\"; gpus"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=env, check=True)
    assert run.stdout.strip() == count


def test_a_recipe_is_a_program():
    """`python recipes/x.yaml --key value`, which is what `accelerate launch recipes/x.yaml` runs."""
    run = subprocess.run(
        [sys.executable, "recipes/codi.yaml", "--thought_tauu", "1"],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ},
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].endswith("did you mean thought_tau?")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_passes_the_check(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("rl_soft.train.ready.model_folder", str)  # a clone has no models yet
    main(["check", str(path), "--output_dir", str(tmp_path / "run")])
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    assert {k for k in given.keys() - shown.keys() if k != "_"} == set()


# -- recipes of models that a test cannot load: the same recipe on a tiny random model of the same architecture -----

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
R1 = "{{ bos_token }}{% for m in messages %}<|User|>{{ m.content }}{% endfor %}<|Assistant|><think>\n"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LARGE = {  # folder of recipes -> architecture, chat template, special tokens, other tokens, its training data
    "r1_distill_qwen1.5b": ("qwen2", R1, {"bos_token": "<|begin|>", "eos_token": "<|end|>"}, ["<think>", "</think>"],
                            {"problem": "{a} + {b}?", "solution": "Add.", "answer": "{c}"}),
    "llama3.2_3b": ("llama", LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, [],
                    {"problem": "{a} + {b}?", "solution": "Add.", "answer": "{c}"}),
    "qwen2.5_0.5b": ("qwen2", CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, [],
                     {"question": "{a} + {b}?", "answer": "{a} + {b} = {c}\n#### {c}"}),
}  # fmt: skip


def tiny_pretrained(folder, model_type, template, special, others):
    """A folder such as the hub has: a random model, a byte-level tokenizer and its chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(["####"] * 9, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokens.add_tokens(others)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=template, **special)
    config = AutoConfig.for_model(
        **{**TINY, "model_type": model_type, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 1024,
           "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("folder", LARGE)
def test_a_large_model_s_recipe_runs_on_a_tiny_one(folder, tmp_path):
    """The recipe as it is, but for the model, the data's place, sizes and lengths: evaluation, two steps, report."""
    from rl_soft.train import pipeline as train

    model_type, template, special, others, columns = LARGE[folder]
    tiny_pretrained(tmp_path / "model", model_type, template, special, others)
    for name, first in (("train", 10), ("evaluation", 50)):
        pairs = [(a, b) for a in range(first, first + 8) for b in range(8)]
        rows = [{k: v.format(a=a, b=b, c=a + b) for k, v in columns.items()} for a, b in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = ROOT / f"recipes/{folder}/grpo_gumbel.yaml"
    before = load_recipe(path)
    smaller = {
        "output_dir": str(tmp_path / "run"), "model_name_or_path": str(tmp_path / "model"), "max_steps": 2,
        "dataset_options": {"path": str(tmp_path / "train.jsonl")}, "eval_problems": 2, "num_thoughts": 6,
        "eval_dataset": before.data.eval_dataset or before.data.dataset,
        "eval_dataset_options": {"path": str(tmp_path / "evaluation.jsonl")},
        "prompts_per_step": 4, "max_answer_tokens": 4,
    }  # fmt: skip
    recipe = load_recipe(path, smaller)
    changed = {k for k in recipe.values if recipe.values[k] != before.values[k]}
    assert changed <= smaller.keys(), "everything else is the recipe's own"
    train.run(recipe)
    run = tmp_path / "run"
    logs = [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in m]
    assert [m["step"] for m in logs] == [1, 2]
    assert all(m["thoughts/count"] > 0 for m in logs if "thoughts/count" in m)
    assert all(math.isfinite(v) for m in logs for v in m.values() if isinstance(v, float))
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == model_type
    weights = "adapter_model.safetensors" if recipe.model.use_peft else "model.safetensors"
    for name in (f"model/{weights}", "eval_before/records.jsonl", "eval_after/records.jsonl", "report.md"):
        assert (run / name).stat().st_size > 0, name


@pytest.mark.parametrize(
    "word,value",
    [
        ("{question}", "{question}"),
        ("{a: 1}", {"a": 1}),
        ("{compact: false}", {"compact": False}),
        ("{}", {}),
        ("Answer: ", "Answer: "),
        ("####", "####"),
    ],
)
def test_a_place_in_a_text_is_a_text_on_the_command_line(word, value):
    assert parse_overrides(["--key", word]) == {"key": value}
