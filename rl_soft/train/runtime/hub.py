"""`push_to_hub`: a run's model to a repository of the hub, at each checkpoint and at the end. Nothing is sent unasked.

transformers' own pushing sends the run's whole folder, records and a pickle with it, and copies weights about in it.
Here it is the model's files, by the same keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger("rl_soft")

# What a checkpoint holds besides its model.
STATE = ["*.pt", "*.pth", "*.bin", "trainer_state.json", "complete.json", "global_step*", "latest", "zero_to_fp32.py"]


class Hub(TrainerCallback):
    """Sends the model's files of a run; one process does it, and waits until they are there.

    Args:
        training: the recipe's values by the names of `TrainingArguments`: hub_model_id (the run's folder if absent),
            hub_strategy (every_save, checkpoint, all_checkpoints or end), hub_private_repo, hub_revision.
        run: the run's folder.

    Raises:
        ValueError: the repository cannot be made or written to, so that nothing is trained in vain.
    """

    def __init__(self, training: dict[str, Any], run: Path) -> None:
        from huggingface_hub import HfApi

        self.api, self.run = HfApi(), run
        self.strategy = str(training.get("hub_strategy") or "every_save")
        self.revision = training.get("hub_revision")
        name = str(training.get("hub_model_id") or run.name)

        def open_repository() -> None:
            made = self.api.create_repo(name, private=training.get("hub_private_repo"), exist_ok=True)
            self.name = made.repo_id
            if self.revision not in (None, "main"):
                self.api.create_branch(self.name, branch=str(self.revision), exist_ok=True)

        if reason := _failure(open_repository):
            raise ValueError(f"push_to_hub: {name} cannot be opened: {reason}; log in (hf auth login) or set HF_TOKEN")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint is whole: its model, and with some strategies all of it."""
        folder = self.run / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or self.strategy == "end" or not folder.is_dir():
            return
        said = f"step {state.global_step}"
        self._send(folder, said, ignore_patterns=STATE)
        if self.strategy != "every_save":
            place = "last-checkpoint" if self.strategy == "checkpoint" else folder.name
            self._send(folder, f"{said}, checkpoint", path_in_repo=place, ignore_patterns=["training_args.bin"])

    def finish(self) -> None:
        """The finished model. Raises ValueError if it cannot be sent; the same command tries again."""
        folder = self.run / "model"
        if reason := self._send(folder, "end of training"):
            raise ValueError(
                f"push_to_hub: {reason}; the model is in {folder}, and the same command sends it (or hf upload "
                f"{self.name} {folder})"
            )

    def _send(self, folder: Path, said: str, **chosen: Any) -> str | None:
        """Upload a folder; returns why it failed. A run goes on without it."""

        def send() -> None:
            self.api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=said, revision=self.revision, **chosen
            )

        reason = _failure(send)
        if reason is None:
            logger.info("sent to the hub: %s (%s)", self.name, said)
        else:
            logger.warning("push_to_hub: %s was not sent: %s", folder, reason)
        return reason


def _failure(act: Callable[[], None]) -> str | None:
    """The first line of what `act` raised: the hub, the network and the disk have errors of many classes."""
    try:
        act()
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
