"""Pass@k while a run trains: `eval_during/step-N` holds the records of the model after N optimizer steps.

Problems, samples and noise are those of the evaluations before and after the run, so the points of the curve are
paired. An evaluation draws addressed noise alone and leaves the model as it was: a run with evaluations is the run
without them. What is recorded is not drawn again, so a run that is killed and resumed goes on with its evaluation.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import GRPOTrainer

from rl_soft.evaluation.curve import DURING, METRICS, figures_of
from rl_soft.files import write_atomic
from rl_soft.train.runtime.sharded import whole_model

logger = logging.getLogger("rl_soft")


class Curve:
    """What the `evaluate` of a trainer does: figures of the model as it is, once per step.

    Args:
        trainer: a GRPO trainer of ours.
        evaluate: writes the records of a model into a folder, by all processes together.
        run: the run directory.
        ks: the k of Pass@k.
    """

    def __init__(self, trainer: Any, evaluate: Callable[[Path, Any], None], run: Path, ks: list[int]) -> None:
        self.trainer, self.evaluate, self.run, self.ks = trainer, evaluate, run, ks
        self.began, self.spent = time.perf_counter(), 0.0

    def __call__(self) -> dict[str, float]:
        """`eval_NAME` -> value; the same in every process."""
        folder = self.run / DURING / f"step-{self.trainer.state.global_step}"
        file, main = folder / METRICS, PartialState().is_main_process
        found: list[Any] = [json.loads(file.read_text()) if main and file.exists() else None]
        broadcast_object_list(found)
        if found[0] is None:
            found = [self._measure(folder)]
            if main:
                write_atomic(file, json.dumps(found[0], indent=1) + "\n")
        return {f"eval_{name}": value for name, value in found[0].items()}

    def _measure(self, folder: Path) -> dict[str, float]:
        trainer, start = self.trainer, time.perf_counter()
        with whole_model(trainer) as model:
            self.evaluate(folder, model)
        figures: list[Any] = [None]
        if PartialState().is_main_process:
            now = time.perf_counter()
            self.spent += now - start
            share = self.spent / (now - self.began)  # of this process's life in training
            figures = [figures_of(folder, self.ks) | {"seconds": now - start, "share_of_time": share}]
        broadcast_object_list(figures)
        made: dict[str, float] = figures[0]
        return made


class EvaluatesPassAtK:
    """Mixin before TRL's GRPOTrainer: with a `curve` an evaluation is ours, without one it is TRL's."""

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _load_from_checkpoint: Any
    curve: Curve | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.curve is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc,no-any-return]
        metrics = self.curve()
        # TRL would take this for the log of a training step, and empty what the step has gathered.
        super(GRPOTrainer, self).log(dict(metrics))  # type: ignore[misc]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_best_model(self) -> None:
        """With what stands beside the weights: a projector, a value head."""
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()  # type: ignore[misc]
        else:
            self._load_from_checkpoint(best)
        if PartialState().is_main_process:
            name = str(self.args.metric_for_best_model).removeprefix("eval_")
            logger.info("best %s: %.4g, in %s, which is the model now", name, self.state.best_metric, best)
