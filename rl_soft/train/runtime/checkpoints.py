"""A checkpoint counts once every process has written its part of it; which one a run goes on from."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from rl_soft.files import write_atomic
from rl_soft.train.runtime.processes import uses_fsdp

logger = logging.getLogger("rl_soft")


COMPLETE = "complete.json"  # the mark of a checkpoint that all processes have finished


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete when every process has written its part, and only then deletes older ones.

    transformers writes a checkpoint file by file into its final folder and deletes the oldest before other processes
    are done; a kill in between would leave half a checkpoint as the newest, or none. The best one is never deleted.
    """

    def __init__(self, args: Any):
        self.keep, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes = PartialState()
        processes.wait_for_everyone()
        if args.should_save:
            content = {"step": state.global_step, "processes": processes.num_processes, "zero": divided(args)}
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "README.md").unlink(missing_ok=True)  # an empty form of PEFT's
            write_atomic(folder / COMPLETE, json.dumps(content) + "\n")
            rotate_checkpoints(args.output_dir, self.keep, state.best_model_checkpoint)
        processes.wait_for_everyone()


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = {int(mark.parent.name.rpartition("-")[2]): mark.parent for mark in run.glob(f"checkpoint-*/{COMPLETE}")}
    return complete[max(complete)] if complete else None


def check_resumable(checkpoint: Path, args: Any) -> None:
    """A checkpoint can be read only by the stage (or FSDP2), and where states are divided by the number of processes,
    that wrote it.

    Raises:
        ValueError: they differ; transformers would leave the optimizer's state out without a word, DeepSpeed fail.
    """
    mark = json.loads((checkpoint / COMPLETE).read_text())
    processes, stage = PartialState().num_processes, divided(args)
    if mark["zero"] != stage:
        raise ValueError(
            f"{checkpoint} was written under {_named(mark['zero'])} and cannot be read under {_named(stage)}"
        )
    if mark["processes"] != processes and stage:
        raise ValueError(
            f"{checkpoint} was written by {mark['processes']} processes and cannot be read by {processes}"
        )
    if mark["processes"] != processes and PartialState().is_main_process:
        logger.warning(
            "%s was written by %d processes and is read by %d: the run goes on with another order of completions",
            *(checkpoint, mark["processes"], processes),
        )


def divided(args: Any) -> int | str:
    """By what a run's states are divided over its processes: a stage of ZeRO, or `fsdp2`; 0 for nothing."""
    if uses_fsdp():
        return "fsdp2"
    return 0 if args.deepspeed_plugin is None else int(args.deepspeed_plugin.zero_stage)


def _named(stage: int | str) -> str:
    return "FSDP2" if stage == "fsdp2" else f"ZeRO stage {stage}"


def set_aside_unfinished(run: Path) -> None:
    """Rename checkpoints without the mark, so that nothing takes them for whole ones. For one process to call."""
    for folder in run.glob("checkpoint-*"):
        if not (folder / COMPLETE).exists():
            aside = run / f"unfinished-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            logger.warning("%s was not finished; it is now %s and is not used", folder, aside.name)
