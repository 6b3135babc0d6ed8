"""Whole runs: warm start, RL and report; interrupted and resumed; one process and two.

pytest tests/train/test_pipeline.py
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_soft.config.recipe import load_recipe, warm_start_of, write_config
from rl_soft.evaluation import records
from rl_soft.model import policy
from rl_soft.model.scored_forward import add_soft_forward
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import pipeline as train
from rl_soft.train import start
from rl_soft.train.precision import settled
from rl_soft.train.runtime import processes

CODI = {
    "method": "codi", "model_config": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "vocabulary": "0123456789+-=;#", "dataset": "chain_sum",
    "dataset_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True},
    "train_size": 64, "num_thoughts": 2, "thought_k": 3, "answer_prompt": "#", "step_separator": ";",
    "max_answer_tokens": 3, "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 8,
    "validation_every": 2, "validation_problems": 8, "eval_problems": 8, "disable_tqdm": True,
}  # fmt: skip
GRPO = {k: CODI[k] for k in (
    "dataset", "dataset_options", "train_size", "num_thoughts", "thought_k", "answer_prompt", "step_separator",
    "max_answer_tokens", "eval_problems", "learning_rate", "disable_tqdm",
)} | {
    "method": "grpo", "eval_samples": 4, "eval_k": [1, 2], "eval_batch_size": 16, "prompts_per_step": 4,
    "num_generations": 4, "num_iterations": 2, "per_device_train_batch_size": 8, "max_steps": 4,
}  # fmt: skip


def write(path, values):
    import yaml

    path.write_text(yaml.safe_dump(values))
    return path


def recipes(folder, **overrides):
    codi = write(folder / "codi.yaml", {**CODI, "output_dir": str(folder / "codi")})
    grpo = {**GRPO, "warm_start": str(codi), "output_dir": str(folder / "rl"), **overrides}
    return write(folder / "rl.yaml", grpo)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A warm start and an RL run, from one recipe."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(recipes(folder))
    train.run(recipe)
    return folder


def test_a_model_with_random_weights_has_the_recipe_s_attention(tmp_path):
    recipes(tmp_path)
    for name in ("float64", "eager"):
        codi = load_recipe(tmp_path / "codi.yaml", {"attn_implementation": name})
        assert start.starting_policy(codi, None).model.config._attn_implementation == name


def test_a_finished_model_is_evaluated_with_the_recipe_s_attention(tmp_path, monkeypatch):
    made = tiny_policy()
    recipe = load_recipe(recipes(tmp_path, attn_implementation="float64"))
    for name in ("codi", "rl"):  # both are there: what is left is the evaluation
        policy.save(tmp_path / f"{name}/model", made.model.save_pretrained, made.tokenizer, recipe.thinking, True)
    for stored in (recipe, warm_start_of(recipe)):
        write_config(settled(stored, False))
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda model, *args, **more: seen.append(model.config._attn_implementation))
    monkeypatch.setattr(train, "report", lambda recipe: None)
    train.run(recipe)
    assert seen == ["float64"]


def test_a_system_prompt_without_a_chat_template_is_refused_before_training(tmp_path):
    made = tiny_policy()
    plain = Thinking(phase="explicit", thought="token", thought_k=1, end_of_thinking="#")
    policy.save(tmp_path / "m", made.model.save_pretrained, made.tokenizer, plain, True)
    given = {
        "warm_start": None, "model_name_or_path": str(tmp_path / "m"), "phase": "explicit", "end_of_thinking": "#",
        "thought": "token", "answer_prompt": "", "num_thoughts": 6, "system_prompt": "Think",
    }  # fmt: skip
    with pytest.raises(ValueError, match="system_prompt 'Think' needs a chat template, and the tokenizer has none"):
        train.run(load_recipe(recipes(tmp_path), given))
    assert not (tmp_path / "rl/eval_before").exists()


def cards(folder):
    return {path: path.read_text() for path in folder.rglob("README.md")}


def test_the_only_cards_are_those_of_the_models_and_they_are_filled_in(finished):
    found = cards(finished)
    assert {path.parent for path in found} == {finished / "codi/model", finished / "rl/model"}
    assert not any("More Information" in text or "None" in text for text in found.values())
    assert "| pass@1 |" in found[finished / "rl/model/README.md"]


def test_an_explicit_adapter_is_gone_on_with_under_another_cap_and_each_has_its_card(tmp_path, caplog):
    made = tiny_policy()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    given = {"model_name_or_path": str(tmp_path / "base"), "warm_start": None, "phase": "explicit", "max_steps": 2,
             "end_of_thinking": "=", "answer_prompt": "", "use_peft": True, "eval_problems": 0, "num_thoughts": 6,
             "save_steps": 2, "ratio": "top1", "log_completions": True}  # fmt: skip
    with caplog.at_level("INFO", logger="rl_soft"):
        train.run(load_recipe(recipes(tmp_path, **given)))
    assert caplog.messages[-1] == f"model: {tmp_path / 'rl/model'}"
    more = {"model_name_or_path": str(tmp_path / "rl"), "num_thoughts": 9, "output_dir": str(tmp_path / "more")}
    train.run(load_recipe(tmp_path / "rl.yaml", more))
    found = cards(tmp_path)
    assert {path.parent for path in found} == {tmp_path / "rl/model", tmp_path / "more/model"}
    for text in found.values():
        assert "LoRA adapter" in text and "More Information" not in text and "None" not in text


def test_one_recipe_ends_in_a_report(finished):
    run = finished / "rl"
    for name in (
        "report.md",
        "report.json",
        "passk.csv",
        "passk.png",
        "config.yaml",
        "model/rl_soft.json",
        "model/README.md",
    ):
        assert (run / name).stat().st_size > 0, name
    for name in ("eval_before", "eval_after"):
        lines = (run / name / "records.jsonl").read_text().splitlines()
        keys = {(r["problem_id"], r["sample"]) for r in map(json.loads, lines)}
        assert len(keys) == len(lines) == 8 * (4 + 1)
    steps = [m for m in metrics(run) if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    assert all(m["rollout/density_gap"] <= 1e-4 for m in steps)


def test_the_warm_start_has_given_its_memory_back_when_rl_begins(tmp_path, monkeypatch):
    """Its trainer holds the model, and the model's hooks and callbacks the trainer."""
    models, alive, inner = [], [], train.starting_policy

    def starting_policy(*args):
        made = inner(*args)
        models.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(train, "starting_policy", starting_policy)
    monkeypatch.setattr(train, "train_rl", lambda *_: alive.extend(ref() is not None for ref in models))
    gc.collect()
    gc.disable()
    try:
        train.run(load_recipe(recipes(tmp_path)))
    finally:
        gc.enable()
    assert alive == [False]


def test_an_evaluation_rounds_as_training_does():
    made = tiny_policy()
    args = SimpleNamespace(mixed_precision="bf16", device=torch.device("cpu"))
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = made.model(inputs_embeds=embeds).logits
        with torch.autocast("cpu", torch.bfloat16):
            expected = made.model(inputs_embeds=embeds).logits
        for _ in range(2):  # around a forward of the class, then around one of the model's own
            with processes.as_trained(made.model, args):
                assert torch.equal(made.model(inputs_embeds=embeds).logits, expected)
            assert torch.equal(made.model(inputs_embeds=embeds).logits, plain)
            add_soft_forward(made.model)
        args.mixed_precision = "no"
        with processes.as_trained(made.model, args):
            assert torch.equal(made.model(inputs_embeds=embeds).logits, plain)
    assert not torch.equal(plain, expected.float())


def test_one_process_takes_one_gpu(monkeypatch):
    """transformers would spread each batch over all that it sees, in a model of several replicas."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    state = SimpleNamespace(num_processes=1, distributed_type=SimpleNamespace(value="NO"))
    args = SimpleNamespace(
        n_gpu=8, _n_gpu=8, distributed_state=state, deepspeed_plugin=None, process_index=0, device="cuda:0"
    )
    processes.check_processes(args)
    assert args._n_gpu == 1


def test_before_and_after_meet_the_same_problems_and_noise(finished):
    before, after = (
        {(r["problem_id"], r["sample"]): r["seed"] for r in records.read(finished / f"rl/{name}/records.jsonl")}
        for name in ("eval_before", "eval_after")
    )
    assert before == after


def test_the_model_folder_is_a_plain_one(finished):
    folder = finished / "rl/model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("1+2-3=#0", add_special_tokens=False)) == "1+2-3=#0"
    assert tokenizer.convert_tokens_to_ids("<bot>") != tokenizer.unk_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    again = policy.load_policy(str(folder))
    for p, q in zip(model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert again.thinking is not None and again.thinking.num_thoughts == 2
    assert not list(folder.glob("*.bin")), "safetensors only"


def test_the_same_command_again_trains_nothing(finished):
    before = (finished / "rl/metrics.jsonl").read_text()
    train.run(load_recipe(finished / "rl.yaml"))
    assert (finished / "rl/metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"num_thoughts": 5}, "num_thoughts is 5 .* trained with 2"),
        ({"phase": "explicit", "end_of_thinking": "="}, "phase is 'explicit' .* trained with 'latent'"),
        ({"thought_k": 1000}, "thought_k must be at most the vocabulary size"),
        ({"per_device_train_batch_size": 5}, "got 5, nearest valid 4"),
        ({"rewards": ["maths_accuracy"]}, "cannot find 'maths_accuracy'; did you mean math_accuracy"),
        ({"rewards": [{"ThoughtCost": {"prize": 1}}]}, "ThoughtCost.*prize"),
        ({"warm_start": "missing.yaml"}, "recipe missing.yaml does not exist"),
        ({"dataset": "chian_sum", "dataset_options": None}, "chain_sum"),
    ],
)
def test_what_does_not_fit_is_refused(finished, tmp_path, overrides, message):
    values = {**GRPO, "warm_start": str(finished / "codi.yaml"), "output_dir": str(tmp_path / "rl"), **overrides}
    with pytest.raises(ValueError, match=message):
        train.run(load_recipe(write(tmp_path / "r.yaml", values)))


def test_a_row_without_an_answer_is_named(finished, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n{"question": "1+2=", "answer": ""}\n')
    values = {
        **GRPO, "warm_start": str(finished / "codi.yaml"), "output_dir": str(tmp_path / "rl"), "train_size": None,
        "dataset": str(tmp_path / "rows.jsonl"), "dataset_options": None, "eval_problems": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"rows.jsonl.*2"):
        train.run(load_recipe(write(tmp_path / "r.yaml", values)))


def command(recipe, *overrides, launcher=()):
    return [sys.executable, *launcher, "-m", "rl_soft", str(recipe), *overrides]


def environment(**values):
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **values}


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(finished, tmp_path):
    shutil.copytree(finished / "codi", tmp_path / "codi")
    recipe = recipes(tmp_path, max_steps=12, eval_problems=0, save_steps=100)
    process = subprocess.Popen(command(recipe), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    log = tmp_path / "rl/metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    stopped = int(error.rsplit("stopped at step ", 1)[1].split()[0])
    assert stopped % 2 == 0, "at a rollout boundary"
    assert (tmp_path / f"rl/checkpoint-{stopped}").exists() and not (tmp_path / "rl/model").exists()
    train.run(load_recipe(recipe))
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copytree(finished / "codi", whole / "codi")
    train.run(load_recipe(recipes(whole, max_steps=12, eval_problems=0, save_steps=100)))
    one, other = (policy.load_policy(str(f / "rl/model")).model for f in (tmp_path, whole))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), "an interrupted run is the run"


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_two_processes_are_one(finished, tmp_path, stage):
    """The same rollouts, losses and gradient norms, under DDP and under ZeRO-2; micro-batches differ too."""
    if stage:
        pytest.importorskip("deepspeed")
    names = {0: "ddp", 2: "zero2"}
    logs = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        shutil.copytree(finished / "codi", folder / "codi")
        recipe = recipes(folder, eval_problems=0)
        if world == 1:
            train.run(load_recipe(recipe))
        else:
            config = ROOT / f"recipes/accelerate/{names[stage]}.yaml"
            launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2")
            run = subprocess.run(
                command(recipe, launcher=(*launcher, "--main_process_port", "0")),
                cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240,
            )  # fmt: skip
            assert (folder / "rl/model/config.json").exists(), run.stderr[-2000:]
            kind = "DEEPSPEED ZeRO-2" if stage else "MULTI_CPU"
            assert f"2 process(es), {kind}" in run.stderr
        logs.append([m for m in metrics(folder / "rl") if "loss" in m])
    assert len(logs[0]) == len(logs[1]) == 4
    for a, b in zip(*logs, strict=True):
        for key in ("reward", "loss", "grad_norm", "entropy", "rollout/density_gap"):
            if key in a:
                assert a[key] == pytest.approx(b[key], abs=1e-4), key
