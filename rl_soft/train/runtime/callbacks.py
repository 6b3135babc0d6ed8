"""What every run of ours does around its training steps.

MetricsFile   callback: every log as a line of metrics.jsonl
Progress      callback: one line with steps, time left and the few numbers worth watching
Interrupt     callback: Ctrl-C leaves a checkpoint and stops all processes
Validate      callback: accuracy on held-out problems every few steps; stops a run where that is asked for
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback

logger = logging.getLogger("rl_soft")


class MetricsFile(TrainerCallback):
    """Append every log to metrics.jsonl, the ground truth; after a resume the last line of a step counts."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a killed run left half a line

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **finite}) + "\n")


class Progress(TrainerCallback):
    """One line on rank 0: steps, time left, and the few numbers worth watching."""

    def __init__(self, name: str, shown: dict[str, str]):
        self.name, self.shown = name, shown
        self.values: dict[str, str] = {}
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name,
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file gets a line now and then
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs:
            present = {short: logs[key] for key, short in self.shown.items() if logs.get(key) is not None}
            self.values |= {short: f"{value:.3g}" for short, value in present.items()}
            self.bar.set_postfix(self.values, refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.close()


class Finished(Exception):
    """A checkpoint of the last step was loaded: there is nothing left to train."""


class Interrupt(TrainerCallback):
    """SIGINT or SIGTERM on any process: all of them save at the next rollout boundary and stop.

    A buffered rollout is not part of a checkpoint, so every checkpoint waits for such a boundary, and an evaluation
    with it: the best one must have a checkpoint.
    """

    def __init__(self, boundary: int):
        self.boundary, self.asked, self.stopped = boundary, False, False
        self.owed = self.owed_evaluation = False  # what waits for the boundary
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # transformers would train one step more before it looks
            raise Finished

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.boundary and not control.should_training_stop:
            self.owed |= control.should_save
            self.owed_evaluation |= control.should_evaluate
            control.should_save = control.should_evaluate = False
            return control
        control.should_save |= self.owed
        control.should_evaluate |= self.owed_evaluation
        self.owed = self.owed_evaluation = False
        asked = torch.tensor(float(self.asked), device=args.device)
        processes = PartialState()
        if processes.num_processes > 1:
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked > 0:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


class Validate(TrainerCallback):
    """Accuracy on held-out problems every few steps, logged as validation_accuracy. With `stop_at` a warm start ends
    before it saturates: RL needs something left to learn."""

    trainer: Any = None  # set once the trainer, which needs its callbacks first, is there

    def __init__(self, validate: Callable[[], float], every: int, stop_at: float | None):
        self.validate, self.every, self.stop_at = validate, every, stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.every:
            return control
        accuracy, due = self.validate(), control.should_log
        self.trainer.log({"validation_accuracy": accuracy})
        control.should_log = due  # transformers takes any log for the step's own
        if self.stop_at is not None and accuracy >= self.stop_at:
            control.should_training_stop = True
        return control


PATIENCE = 5  # logged steps in a row that make a failure a known one


class KnownFailures(TrainerCallback):
    """One line, once a run, when the logs show a failure that others met before."""

    # pattern of the metric, what is wrong with it, for how many logged steps in a row, what to say
    RULES: tuple[tuple[str, Callable[[float], bool], int, str], ...] = (
        (
            "frac_reward_zero_std",
            lambda share: share >= 1,
            PATIENCE,
            "in {n} logged rollouts in a row all completions of every prompt got the same reward, so there is nothing "
            "to learn from: the problems are too hard or too easy, the temperature is too low, or the reward is "
            "constant",
        ),
        (
            "groups/left_out",
            lambda share: share >= 1,
            PATIENCE,
            "in {n} logged rollouts in a row no group was left to learn from (filter_groups): the problems are too "
            "hard or too easy; take others, more num_generations, or resample true with a larger max_resamples",
        ),
        (
            "completions/clipped_ratio",
            lambda share: share > 0.5,
            PATIENCE,
            "{value:.0%} of the completions were cut off before they ended, more than half for {n} logged rollouts: "
            "raise max_answer_tokens, or check that the model ends its answers with an end-of-sequence token",
        ),
        (
            "*/unparsed_rate",
            lambda share: share > 0.5,
            PATIENCE,
            "{name} is {value:.0%}, above half for {n} logged rollouts: most completions hold no readable answer; "
            "tell the model its form (question_template, system_prompt), or raise max_answer_tokens",
        ),
        (
            "rollout/density_gap",
            lambda gap: gap > 1e-3,
            1,
            "the rollout's log-densities and the training pass's differ by {value:.2g}, more than 1e-3: in bfloat16 "
            "or with a small thought_tau this is rounding (docs/grpo.md); otherwise the two passes see another model",
        ),
    )
    ENTROPY = ("entropy", 0.05, "the entropy fell from {first:.2g} to {value:.2g} nats: the policy hardly explores "
               "any more; a smaller learning_rate, a larger epsilon_high or beta above 0 slow this down")  # fmt: skip

    def __init__(self) -> None:
        self._streak: dict[str, int] = {}
        self._said: set[str] = set()
        self._first_entropy: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs):
            return
        for pattern, is_bad, patience, text in self.RULES:
            for name in fnmatch.filter(logs, pattern):
                if logs[name] is not None:
                    self._look(name, logs[name], is_bad(logs[name]), patience, text)
        name, share, text = self.ENTROPY
        value = logs.get(name)
        if value is not None:
            self._first_entropy = value if self._first_entropy is None else self._first_entropy
            text = text.replace("{first:.2g}", f"{self._first_entropy:.2g}")
            self._look(name, value, value < share * self._first_entropy, PATIENCE, text)

    def _look(self, name: str, value: float, bad: bool, patience: int, text: str) -> None:
        self._streak[name] = self._streak.get(name, 0) + 1 if bad else 0
        if self._streak[name] >= patience and name not in self._said:
            self._said.add(name)
            logger.warning("warning: " + text.format(name=name, value=value, n=patience))
