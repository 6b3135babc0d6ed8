"""`eval --like RUN`: the data, the thinking and the noise of another evaluation, so that the two can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rl_soft.config.commands import EvaluationArguments
from rl_soft.keys import fields
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.thinking import Thinking

# What an evaluation of its own decides, whatever it is like.
OWN = {"like", "model_name_or_path", "output_dir", "thoughts", "eval_batch_size", "confirm_run_unsafe_code"}
# What another data set has of its own.
OF_DATA = {"dataset", "split", "dataset_options", "dataset_columns", "eval_problems", "data_seed_eval"}


def settings_like(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `rl-soft eval` that repeat the evaluation of a run, under those that are given.

    Args:
        name: a run's folder (its config.yaml says how it is evaluated), or an evaluation's (eval.json).
        given: values by the names of the keys; with `thoughts` the kind of thought is theirs.

    Raises:
        ValueError: the folder is neither; or the run was made without an evaluation and the number of problems is not
            given.
    """
    folder = Path(name)
    if (folder / "eval.json").is_file():
        header = json.loads((folder / "eval.json").read_text())
        found = {**_of_run(header["config"]), **header["decoder"], "split": header["split"]}
        found |= {"eval_samples": header["n"], "eval_seed": header["seed"], "dataset": header["dataset"]}
        found |= {"eval_problems": header["num_problems"]}
    elif (folder / "config.yaml").is_file():
        found = _of_run(yaml.safe_load((folder / "config.yaml").read_text()))
    else:
        raise ValueError(f"like {name}: neither a run (config.yaml) nor an evaluation (eval.json) is there")
    if given.get("dataset", found["dataset"]) != found["dataset"]:
        found = {key: value for key, value in found.items() if key not in OF_DATA}
    if found.get("eval_problems") == 0 and "eval_problems" not in given:
        raise ValueError(f"like {name}: that run has eval_problems 0; say how many: --eval_problems N")
    known = {key for part in (EvaluationArguments, Thinking, Decoding) for key in fields(part)} - OWN
    if given.get("thoughts"):
        known.discard("thought")
    return {**{key: value for key, value in found.items() if key in known}, **given}


def _of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's keys of its held-out problems, under the names that `eval` has for them."""
    top_p = config.get("top_p")
    cuts = Decoding.of_training(
        config.get("top_k"), 1.0 if top_p is None else top_p, config.get("min_p"), config.get("order", "exact")
    )
    config = {key: value for key, value in config.items() if key not in fields(Decoding)}
    config |= {} if cuts is None else cuts.to_dict()
    if not config.get("eval_dataset"):
        return config
    held_out = {key: config.get(f"eval_{key}") for key in ("dataset", "dataset_options", "dataset_columns")}
    return {**config, **held_out}
