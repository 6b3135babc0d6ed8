"""A killed run, started again with the same command, is the run: weights and metrics equal an uninterrupted one's.

pytest tests/invariants/test_resume.py            about a minute
pytest tests/invariants/test_resume.py -m slow    ten kills at random moments; two processes under ZeRO
"""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
import yaml
from conftest import TINY
from safetensors.torch import load_file
from transformers import Trainer

from rl_soft.cli import main
from rl_soft.config.recipe import check_output_dir, load_recipe
from rl_soft.train import pipeline as train
from rl_soft.train.runtime.callbacks import MetricsFile
from rl_soft.train.runtime.checkpoints import COMPLETE

VOCABULARY = "0123456789+-=;#"
TASK = {
    "dataset": "chain_sum",
    "dataset_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True},
    "train_size": 64, "num_thoughts": 2, "thought_k": 3, "answer_prompt": "#", "step_separator": ";",
    "max_answer_tokens": 3, "learning_rate": 1e-2, "disable_tqdm": True,
}  # fmt: skip
CODI = TASK | {
    "method": "codi", "model_config": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "vocabulary": VOCABULARY, "max_steps": 3, "per_device_train_batch_size": 8, "validation_every": 2,
    "validation_problems": 8, "eval_problems": 0,
}  # fmt: skip
RL = TASK | {
    "method": "grpo", "prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 8,
    "num_iterations": 2, "lr_scheduler_type": "linear", "warmup_steps": 2, "save_steps": 2, "save_total_limit": 1,
}  # fmt: skip
TIMES = ("seconds/", "tokens_per_second/", "step_time", "memory/")  # what a second run may take


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codi")
    (folder / "codi.yaml").write_text(yaml.safe_dump({**CODI, "output_dir": str(folder / "codi")}))
    train.run(load_recipe(folder / "codi.yaml"))
    return folder / "codi.yaml"


def digit_sum(completions, **kwargs):
    """A reward function that a random model's completions tell apart."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def recipe(folder, warm_start, **values):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rl.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **RL, "warm_start": str(warm_start), "output_dir": str(folder / "rl"), "eval_problems": 0,
                "rewards": ["test_resume.digit_sum"], **values,
            }
        )
    )  # fmt: skip
    return path


def start(path, killer=None, *arguments):
    """The run in a process of its own, forked from a server that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rl_soft.train.pipeline", "rl_soft.train.grpo", "rl_soft.train.codi", "datasets", "reasoning_gym"]
    )
    process = context.Process(target=run_in_process, args=(str(path), killer, arguments))
    process.start()
    return process


def run_in_process(path, killer, arguments):
    torch.set_num_threads(1)
    if killer is not None:
        killer(*arguments)
    main(["train", path])


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(step):
    """Dies in the middle of the optimizer step with this number."""
    clip = Trainer._clip_grad_norm

    def dying(self, *args):
        if self.state.global_step + 1 == step:
            kill_me()
        return clip(self, *args)

    Trainer._clip_grad_norm = dying


def kill_while_saving(method, step):
    """Dies within the checkpoint of this step, when the host is about to write the part that `method` writes."""
    write = getattr(Trainer, method)

    def dying(self, *args, **kwargs):
        if self.state.global_step == step:
            kill_me()
        return write(self, *args, **kwargs)

    setattr(Trainer, method, dying)


def kill_before_model():
    """Dies when training is over and the model is about to be saved."""
    train.policy.save = lambda *args: kill_me()


def finish(process, killed=False):
    process.join(timeout=240)
    assert process.exitcode == (-signal.SIGKILL if killed else 0)


def metrics(folder):
    """The last line of each step, without wall times."""
    lines = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    return {m["step"]: {k: v for k, v in m.items() if not k.startswith(TIMES)} for m in lines if "loss" in m}


def assert_the_same_run(one, other):
    a, b = (load_file(folder / "rl/model/model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(one) == metrics(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, warm_start):
    """Four steps: two rollouts, each used twice."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(recipe(folder, warm_start, max_steps=4)))
    assert sorted(metrics(folder)) == [1, 2, 3, 4]
    assert all(m["grad_norm"] > 0 for m in metrics(folder).values())
    return folder


def test_four_steps_are_two_and_a_kill_and_two(tmp_path, warm_start, uninterrupted):
    path = recipe(tmp_path, warm_start, max_steps=4)
    finish(start(path, kill_in_step, 3), killed=True)
    assert (tmp_path / f"rl/checkpoint-2/{COMPLETE}").exists() and not (tmp_path / "rl/model").exists()
    finish(start(path))
    assert_the_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("method,step", [("_save_optimizer_and_scheduler", 2), ("_save_rng_state", 4), ("_save", 2)])
def test_a_kill_within_a_checkpoint_leaves_the_one_before(tmp_path, warm_start, uninterrupted, method, step):
    path = recipe(tmp_path, warm_start, max_steps=4)
    finish(start(path, kill_while_saving, method, step), killed=True)
    whole = [mark.parent.name for mark in (tmp_path / "rl").glob(f"checkpoint-*/{COMPLETE}")]
    assert whole == ([] if step == 2 else ["checkpoint-2"])
    finish(start(path))
    assert_the_same_run(tmp_path, uninterrupted)
    assert [p.name for p in (tmp_path / "rl").glob("checkpoint-*")] == ["checkpoint-4"], "save_total_limit 1"


def test_a_kill_after_the_last_step_trains_no_further(tmp_path, warm_start, uninterrupted):
    path = recipe(tmp_path, warm_start, max_steps=4)
    finish(start(path, kill_before_model), killed=True)
    assert (tmp_path / f"rl/checkpoint-4/{COMPLETE}").exists() and not (tmp_path / "rl/model").exists()
    finish(start(path))
    assert_the_same_run(tmp_path, uninterrupted)


def test_a_checkpoint_waits_for_the_end_of_its_rollout(tmp_path, warm_start):
    """save_steps 3 where a rollout serves 2 steps: what is due at 3 is saved at 4, and a resumed run is the run."""
    values = {"max_steps": 6, "save_steps": 3, "save_total_limit": 9}
    finish(start(recipe(tmp_path / "whole", warm_start, **values)))
    assert {p.name for p in (tmp_path / "whole/rl").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    path = recipe(tmp_path / "killed", warm_start, **values)
    finish(start(path, kill_in_step, 6), killed=True)
    finish(start(path))
    assert_the_same_run(tmp_path / "killed", tmp_path / "whole")


def test_half_a_line_of_metrics_is_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    state = type("State", (), {"is_world_process_zero": True, "global_step": 2})
    file = MetricsFile(path)
    file.on_train_begin(None, state, None)
    file.on_log(None, state, None, logs={"loss": 0.25, "grad_norm": float("nan"), "reward": None})
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": 2, "loss": 0.25, "grad_norm": None, "reward": None}
    assert len(lines) == 3


def test_a_kill_before_the_first_file_does_not_block_the_folder(tmp_path, warm_start):
    one = load_recipe(recipe(tmp_path, warm_start, max_steps=4))
    one.output_dir.mkdir()
    (one.output_dir / "config.tmp").write_text("method: gr")
    assert check_output_dir(one) is False


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_nothing(tmp_path, warm_start):
    """Each kill comes a random while after a random number of new steps; some come before the first of them."""
    values = {"max_steps": 80, "eval_problems": 8, "eval_samples": 4, "eval_k": [1, 2]}
    finish(start(recipe(tmp_path / "whole", warm_start, **values)))
    path = recipe(tmp_path / "killed", warm_start, **values)
    run, draw = tmp_path / "killed/rl", random.Random(0)

    def steps_logged():
        return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0

    reached = []
    for _ in range(10):
        before, wanted = steps_logged(), draw.randint(0, 5)
        process = start(path)
        while process.is_alive() and steps_logged() < before + wanted:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2 if wanted else 5))
        process.kill()
        finish(process, killed=True)
        reached.append(max([int(p.parent.name[11:]) for p in run.glob(f"checkpoint-*/{COMPLETE}")], default=0))
    assert reached == sorted(reached), f"a checkpoint was lost: {reached}"
    assert len(set(reached)) >= 5 and reached[-1] < 80, f"the kills did not fall into training: {reached}"
    finish(start(path))
    assert_the_same_run(tmp_path / "killed", tmp_path / "whole")
    for name in ("eval_before", "eval_after"):
        one, other = ((tmp_path / f"{f}/rl/{name}/records.jsonl").read_text() for f in ("killed", "whole"))
        assert sorted(one.splitlines()) == sorted(other.splitlines())
