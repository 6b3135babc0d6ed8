"""Several processes: the run of one, whatever the ZeRO stage; and when one of them fails, all end.

pytest tests/invariants/test_parallel.py            ZeRO-3, a dead process, a reward that fails on one process
pytest tests/invariants/test_parallel.py -m slow    other stages, supervised methods, kill and resume of two processes
This file is also the program that the launcher starts: `test_parallel.py ACTION RECIPE`.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, TINY
from safetensors.torch import load_file
from transformers import TrainerCallback

from rl_soft.cli import main
from rl_soft.config.recipe import load_recipe
from rl_soft.train import pipeline as train

TASK = {
    "dataset": "chain_sum",
    "dataset_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True},
    "train_size": 64, "num_thoughts": 2, "thought_k": 3, "answer_prompt": "#", "step_separator": ";",
    "max_answer_tokens": 3, "learning_rate": 1e-2, "disable_tqdm": True, "eval_problems": 0,
}  # fmt: skip
CODI = TASK | {
    "method": "codi", "model_config": {**TINY, "model_type": "llama", "tie_word_embeddings": True},
    "vocabulary": "0123456789+-=;#", "max_steps": 3, "per_device_train_batch_size": 8, "validation_every": 2,
    "validation_problems": 8,
}  # fmt: skip
RL = TASK | {"method": "grpo", "prompts_per_step": 2, "num_generations": 8, "max_steps": 5, "max_grad_norm": 0.5,
             "rewards": ["test_parallel.digit_sum"]}  # fmt: skip
SPOILED = 6  # the step whose loss is not finite on process 1
WITHIN = 60  # seconds for a job to end after one of its processes died


# ---------------------------------------------------------------------------------------------------------------------
# What a process does when the launcher starts it


class Watch(TrainerCallback):
    """A digest of weights and optimizer state after every step, as this process holds them."""

    def __init__(self, trainer, path):
        self.trainer, self.path = trainer, path

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, then DeepSpeed's
            optimizer = optimizer.optimizer
        weights = [getattr(p, "ds_tensor", p) for p in self.trainer.model.parameters()]
        moments = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        digests = [hashlib.sha256(b"".join(bytes_of(t) for t in ts)).hexdigest() for ts in (weights, moments)]
        line = {"step": state.global_step, "weights": digests[0], "moments": digests[1], "gathers": Gathers.count}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def bytes_of(tensor):
    part = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
    return part.detach().float().contiguous().numpy().tobytes()


class Gathers:
    """Counts how often all parameters are gathered."""

    count = 0

    @classmethod
    def watch(cls):
        import deepspeed

        enter = deepspeed.zero.GatheredParameters.__enter__

        def counted(self):
            cls.count += len(self.params) > 10 if getattr(self, "enabled", True) else 0
            return enter(self)

        deepspeed.zero.GatheredParameters.__enter__ = counted


def watched(recipe):
    """Train, with digests; the loss of step SPOILED is not finite on process 1."""
    from rl_soft.train.grpo import SoftGRPOTrainer

    fit, compute_loss = train.fit, SoftGRPOTrainer._compute_loss
    rank = int(os.environ["RANK"])

    def spoiled(self, model, inputs):
        loss = compute_loss(self, model, inputs)
        bad = self.state.global_step + 1 == SPOILED and rank == 1
        return loss * torch.inf if bad else loss

    def with_digests(trainer, recipe, *args):
        trainer.add_callback(Watch(trainer, recipe.output_dir / f"digests-{rank}.jsonl"))
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            Gathers.watch()
        fit(trainer, recipe, *args)

    SoftGRPOTrainer._compute_loss = spoiled
    train.fit = with_digests
    main(["train", recipe])


def dying(recipe, step=3, busy=0):
    """Train; process 1 kills itself in the middle of a step. The other waits for its gradients, or is `busy` for so
    many seconds and hears of nothing, as a process does that waits within NCCL."""
    from rl_soft.train.grpo import SoftGRPOTrainer

    compute_loss = SoftGRPOTrainer._compute_loss

    def dies(self, model, inputs):
        if self.state.global_step + 1 == step:
            if os.environ["RANK"] == "1":
                Path(recipe).with_name("died").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(busy)
        return compute_loss(self, model, inputs)

    SoftGRPOTrainer._compute_loss = dies
    main(["train", recipe])


def digit_sum(completions, **kwargs):
    """A reward function that a random model's completions tell apart."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def fails_on_process_1(completions, **kwargs):
    return [float("nan") if os.environ.get("RANK") == "1" and i == 2 else 0.5 for i in range(len(completions))]


# ---------------------------------------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codi")
    (folder / "codi.yaml").write_text(yaml.safe_dump({**CODI, "output_dir": str(folder / "codi")}))
    train.run(load_recipe(folder / "codi.yaml"))
    return folder / "codi.yaml"


def write(folder, warm_start, **values):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rl.yaml"
    values = {**RL, "warm_start": str(warm_start), "output_dir": str(folder / "rl"), **values}
    path.write_text(yaml.safe_dump(values))
    return path


def launch(folder, stage, *program):
    """Two processes under the launcher, as launch.sh starts them; ZeRO-3 with parameters small enough to be cut."""
    name = stage if stage == "fsdp2" else f"zero{stage}" if stage else "ddp"
    config = yaml.safe_load((ROOT / f"recipes/accelerate/{name}.yaml").read_text())
    if stage == 3:
        file = folder / "zero3.json"
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        file.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": "auto", **batch}))
        config["deepspeed_config"] = {"deepspeed_config_file": str(file), "zero3_init_flag": True}
        del config["mixed_precision"]  # accelerate wants such keys in one place
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    folders = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "tests/invariants", "tests/train"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": folders}
    return subprocess.Popen(
        [*launcher, "--num_processes", "2", "--main_process_port", "0", *map(str, program)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "rl/metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "loss" in m]


def close(a, b):
    for key in ("reward", "loss", "grad_norm", "entropy", "rollout/density_gap"):
        if key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, warm_start):
    """Five steps, 16 completions at once."""
    folder = tmp_path_factory.mktemp("one")
    train.run(load_recipe(write(folder, warm_start, per_device_train_batch_size=16)))
    logs = metrics(folder)
    assert len(logs) == 5 and len({round(log["grad_norm"], 6) for log in logs}) == 5
    return logs


def test_accumulation_changes_nothing(tmp_path, warm_start, one_process):
    """16 micro-batches of one completion are one batch of 16."""
    train.run(load_recipe(write(tmp_path, warm_start, per_device_train_batch_size=1)))
    for a, b in zip(metrics(tmp_path), one_process, strict=True):
        close(a, b)


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 2)), 3, "fsdp2"])
def test_two_processes_are_one_and_skip_a_step_together(tmp_path, warm_start, one_process, stage):
    """Eight micro-batches of one completion on each of two processes: the losses and gradient norms of one process.
    Then process 1 has a loss that is not finite: weights and optimizer state of both stay as they are."""
    if stage in (1, 2, 3):
        pytest.importorskip("deepspeed")
    path = write(tmp_path, warm_start, per_device_train_batch_size=1, max_steps=SPOILED + 1)
    process = launch(tmp_path, stage, __file__, "watched", path)
    error = process.communicate(timeout=400)[1]
    assert (tmp_path / "rl/model/config.json").exists(), error[-3000:]
    logs = metrics(tmp_path)
    for a, b in zip(logs[:5], one_process, strict=True):
        close(a, b)
    assert [log["skipped_steps"] for log in logs] == [0, 0, 0, 0, 0, 1, 0]
    assert logs[5]["grad_norm"] is None and logs[6]["grad_norm"] > 0
    for rank in (0, 1):
        digests = [json.loads(line) for line in (tmp_path / f"rl/digests-{rank}.jsonl").read_text().splitlines()]
        changed = [[a[k] != b[k] for a, b in itertools.pairwise(digests)] for k in ("weights", "moments")]
        assert changed == [[True, True, True, True, False, True]] * 2, "only step 6 leaves all as it is"
        if stage == 3:
            assert [d["gathers"] for d in digests] == [1, 2, 3, 4, 5, 6, 7], "once a rollout, not once a token"
        batch = load_file(tmp_path / f"rl/nonfinite/step-6-process-{rank}.safetensors")
        assert batch["7.prompt_ids"].shape[0] == 1 and "8.prompt_ids" not in batch
        rows = json.loads((tmp_path / f"rl/nonfinite/step-6-process-{rank}.json").read_text())["rows"]
        assert [row["loss"] in ("inf", "-inf", "nan") for row in rows] == [rank == 1] * 8


TEXT = {"thought": "token", "phase": "explicit", "num_thoughts": 16, "end_of_thinking": "#", "answer_prompt": ""}
# Chains modulo ten: all rows have as many tokens, so means over the halves of a batch have the batch's mean. For the
# same reason no KD, whose scale is the standard deviation within a micro-batch.
SUPERVISED = {
    "codi": {"thought": "hidden", "beta": 0},
    "sft": TEXT,
    "icot": {**TEXT, "remove_per_epoch": 8, "removal_smoothing": None},
    "coconut": {"thought": "hidden", "epochs_per_stage": 0.25, "thoughts_per_step": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"), [*itertools.product(SUPERVISED, [0, 2, 3]), ("sft", "fsdp2"), ("icot", "fsdp2")]
)
def test_a_supervised_method_on_two_processes_is_that_on_one(tmp_path, warm_start, method, stage):
    """Losses and gradient norms; iCoT and Coconut reset the optimizer on the way. Both models open and are equal."""
    if stage in (1, 2, 3):
        pytest.importorskip("deepspeed")
    base = {k: v for k, v in CODI.items() if k not in ("model_config", "vocabulary")}
    options = {**base["dataset_options"], "min_terms": 3, "max_terms": 3}
    values = {**base, "dataset_options": options, **SUPERVISED[method], "method": method}
    values |= {"model_name_or_path": str(warm_start.with_suffix("") / "model"), "max_steps": 6, "learning_rate": 1e-3}
    values |= {"validation_problems": 0, "output_dir": str(tmp_path / "rl"), "max_grad_norm": 0.5, "logging_steps": 1}
    one = {**values, "per_device_train_batch_size": 8, "output_dir": str(tmp_path / "one")}
    for name, recipe in (("two", {**values, "per_device_train_batch_size": 4}), ("one", one)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    train.run(load_recipe(tmp_path / "one.yaml"))
    error = launch(tmp_path, stage, "-m", "rl_soft", tmp_path / "two.yaml").communicate(timeout=400)[1]
    assert (tmp_path / "rl/model/config.json").exists(), error[-3000:]
    two, one = ([m for m in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in m]
                for name in ("rl", "one"))  # fmt: skip
    assert len(one) == 6
    for a, b in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "removed_tokens", "stage"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4), key
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in ("rl", "one"))
    assert a.keys() ^ b.keys() <= {"lm_head.weight"}  # tied; ZeRO-2 writes it too
    moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in b])
    # A reset optimizer divides a gradient by its own size: where that is 1e-8, rounding moves a weight by a share of
    # the learning rate, 1e-3.
    assert moved.max() < 1e-4 and moved.mean() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_coconut_may_have_other_stages_on_each_process(tmp_path, stage):
    """So processes make different numbers of forward passes in a step."""
    if stage in (1, 2, 3):
        pytest.importorskip("deepspeed")
    values = {**CODI, "thought": "hidden", "method": "coconut", "uniform_prob": 0.7, "thoughts_per_step": 1}
    values |= {"max_steps": 4, "validation_problems": 0, "per_device_train_batch_size": 3, "logging_steps": 1}
    values |= {"output_dir": str(tmp_path / "rl")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    error = launch(tmp_path, stage, "-m", "rl_soft", tmp_path / "two.yaml").communicate(timeout=180)[1]
    assert (tmp_path / "rl/model/config.json").exists(), error[-3000:]


@pytest.mark.parametrize(
    "stage,busy", [(0, 0), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(0, 300, marks=pytest.mark.slow)]
)
def test_a_dead_process_ends_the_job(tmp_path, warm_start, stage, busy):
    if stage in (1, 2, 3):
        pytest.importorskip("deepspeed")
    path = write(tmp_path, warm_start, per_device_train_batch_size=8)
    process = launch(tmp_path, stage, __file__, "dying", path, 3, busy)
    error = process.communicate(timeout=400)[1]
    took = time.time() - float((tmp_path / "died").read_text())
    assert process.returncode != 0
    assert took < WITHIN, f"{took:.0f} s"
    sys.stdout.write(f"ended {took:.1f} s after the death\n")
    assert "Signal 9 (SIGKILL)" in error, error[-3000:]
    if not busy:
        assert error.count("rl_soft] process 0: another process of this job has died") == 1, error[-3000:]
        assert "Traceback" not in error.split("another process of this job has died")[0]
    assert len(metrics(tmp_path)) == 2


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path, warm_start):
    path = write(tmp_path, warm_start, per_device_train_batch_size=8, rewards=["test_parallel.fails_on_process_1"])
    process = launch(tmp_path, 0, "-m", "rl_soft", path)
    error = process.communicate(timeout=400)[1]
    assert process.returncode != 0
    line = "rl_soft: error: reward fails_on_process_1 returned float nan for completion 2 of 8; it must be"
    assert error.count(line) == 1, error[-3000:]
    assert json.loads((tmp_path / "rl/failed_reward.json").read_text())["rows"][0]["index"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3, "fsdp2"])
def test_a_killed_job_goes_on_as_if_nothing_had_been(tmp_path, warm_start, stage):
    """One process dies in step 5; the same command resumes from the checkpoint of step 4, on both."""
    if stage in (1, 2, 3):
        pytest.importorskip("deepspeed")
    values = {"per_device_train_batch_size": 4, "num_iterations": 2, "save_steps": 2, "max_steps": 6}
    (tmp_path / "whole").mkdir()
    whole = write(tmp_path / "whole", warm_start, **values)
    error = launch(tmp_path / "whole", stage, "-m", "rl_soft", whole).communicate(timeout=400)[1]
    assert (tmp_path / "whole/rl/model/config.json").exists(), error[-3000:]
    path = write(tmp_path / "killed", warm_start, **values)
    process = launch(tmp_path / "killed", stage, __file__, "dying", path, "5")
    process.communicate(timeout=400)
    assert process.returncode != 0 and not (tmp_path / "killed/rl/model").exists()
    error = launch(tmp_path / "killed", stage, "-m", "rl_soft", path).communicate(timeout=400)[1]
    assert (tmp_path / "killed/rl/model/config.json").exists(), error[-3000:]
    a, b = (load_file(tmp_path / f"{name}/rl/model/model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = {m["step"]: (m["loss"], m["grad_norm"]) for m in metrics(tmp_path / "killed")}
    assert logs == {m["step"]: (m["loss"], m["grad_norm"]) for m in metrics(tmp_path / "whole")}


if __name__ == "__main__":
    actions = {"watched": watched, "dying": dying}
    actions[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
