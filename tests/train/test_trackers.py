"""Where metrics go: the clock's phases add up, and a tracker mirrors metrics.jsonl.

pytest tests/train/test_trackers.py
"""

import importlib.util
import json
import os
import time

import pytest
import yaml
from test_resume import RL, warm_start  # noqa: F401 (a fixture)

from rl_soft.config.recipe import load_recipe
from rl_soft.config.trackers import trackers
from rl_soft.train import pipeline as train
from rl_soft.train.runtime.clock import SECTIONS, StepClock


def test_nested_sections_add_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock()

    def work(seconds):
        now[0] += seconds

    work(7)  # before a step: nobody's
    clock.on_step_begin(None, None, None)
    work(1)
    with clock.section("scoring"):
        work(2)
        with clock.section("rollout"):
            work(4)
            clock.count("rollout", 20)
        with pytest.raises(ValueError), clock.section("reward"):
            work(8)
            raise ValueError
        work(16)
    work(32)
    clock.on_step_end(None, None, None)
    work(64)
    assert clock.take() == {
        "seconds/rollout": 4, "seconds/reward": 8, "seconds/scoring": 18, "seconds/update": 33,
        "tokens_per_second/rollout": 5,
    }  # fmt: skip
    assert clock.take() == dict.fromkeys((f"seconds/{name}" for name in SECTIONS), 0.0)


def test_tensorboard_mirrors_the_metrics_file(tmp_path, warm_start):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "rl.yaml"
    values = {**RL, "output_dir": str(tmp_path / "rl"), "warm_start": str(warm_start), "max_steps": 4}
    path.write_text(yaml.safe_dump({**values, "report_to": "tensorboard"}))
    started = time.perf_counter()
    train.run(load_recipe(path))
    took = time.perf_counter() - started
    lines = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    (events,) = (tmp_path / "rl").rglob("events.out.tfevents*")
    tracked = EventAccumulator(str(events)).Reload()
    for name in ("reward", "thoughts/ratio", "answer/entropy", "seconds/rollout", "tokens_per_second/update"):
        file = {line["step"]: line[name] for line in lines if name in line}
        assert {e.step: e.value for e in tracked.Scalars(f"train/{name}")} == pytest.approx(file), name
        assert len(file) >= 2
    # rollouts at steps 1 and 3, updates at every step; all of it within the run
    assert [line["seconds/rollout"] > 0 for line in lines] == [True, False, True, False]
    assert all(line["seconds/update"] > 0 for line in lines)
    assert sum(line[f"seconds/{name}"] for line in lines for name in SECTIONS) < took


def test_every_tracker_of_transformers_is_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(trackers()) == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize(
    "value,word",
    [
        ("tensorbord", "did you mean tensorboard"),
        ("wandb", "wandb is not installed; pip install wandb"),
        ("azure_ml", "pip install azureml-core"),
        ("dagshub", "pip install dagshub"),
        ("tensorboard", "pip install tensorboard"),
        ("kubeflow", "KUBEFLOW_TRAINER_SERVER_URL"),
        (["none", "x"], "'x'"),
        (3, "report_to must be a text or a list of texts, got 3"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_early(tmp_path, monkeypatch, value, word):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: real(name) if name in ("transformers", "trl") else None
    )
    path = tmp_path / "rl.yaml"
    path.write_text(yaml.safe_dump({**RL, "output_dir": "x", "warm_start": "recipes/codi.yaml", "report_to": value}))
    with pytest.raises(ValueError, match=word):
        load_recipe(path)


def test_wandb_s_keys_of_a_recipe_are_where_wandb_reads_them(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP"):
        monkeypatch.setenv(name, "of the shell")
    path = tmp_path / "rl.yaml"
    given = {**RL, "output_dir": str(tmp_path / "run"), "warm_start": "recipes/codi.yaml", "wandb_project": "mine"}
    path.write_text(yaml.safe_dump(given))
    train.begin(load_recipe(path))
    assert (os.environ["WANDB_PROJECT"], os.environ["WANDB_ENTITY"]) == ("mine", "of the shell")
