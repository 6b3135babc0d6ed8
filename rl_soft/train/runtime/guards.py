"""When something fails, a run says so in one line, keeps what is needed to look into it, and loses nothing.

Guarded            mixin of a GRPO trainer: a reward that fails, or never applies, ends the run on all processes; a
                   step whose loss or gradient is not finite is skipped, counted and saved, three in a row end the run
check_density_gap  ends a run in float32 whose rollout and training pass score two different models
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rl_soft.files import replacing, write_atomic
from rl_soft.model.devices import has_cudnn_attention
from rl_soft.model.quantised import compute_dtypes
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.reward_functions import own_names
from rl_soft.train.soft_batch import SoftBatch

logger = logging.getLogger("rl_soft")

MAX_SKIPPED_IN_A_ROW = 3
MAX_ABSENT_IN_A_ROW = 5  # rollouts, a reward that others stand beside
MAX_SAVED_STEPS = 5  # files in nonfinite/, a process
CUDNN = (
    "cuDNN's attention is on, whose gradients are NaN at some padded lengths: "
    "torch.backends.cuda.enable_cudnn_sdp(False) switches it off"
)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


class RewardWatch:
    """Checks what reward functions return. A failure is kept in `failure`, and written with the completions it is
    about to `path`; the caller raises it when all processes know of it, so that none is left waiting."""

    def __init__(self, path: Path):
        self.path = path
        self.failure: str | None = None

    def wrap(self, function: Callable, name: str) -> Callable:
        """`function` with the same calling convention (async if it is), which returns finite numbers and None only."""
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

            async def watched_async(**batch: Any) -> list[float | None]:
                try:
                    values = await function(**batch)
                except Exception as error:
                    return self._fail(
                        f"reward {name} raised {_words(error)}{_hint(error, function, batch)}", None, batch
                    )
                return self._checked(name, values, batch)

            return watched_async

        def watched(**batch: Any) -> list[float | None]:
            try:
                values = function(**batch)
            except Exception as error:
                index = _first_that_raises(function, batch)
                where = "" if index is None else f" for completion {index} of {len(batch['completions'])}"
                hint = _hint(error, function, batch)
                return self._fail(f"reward {name} raised {_words(error)}{where}{hint}", index, batch)
            return self._checked(name, values, batch)

        return watched

    def _checked(self, name: str, values: Any, batch: dict[str, Any]) -> list[float | None]:
        n = len(batch["completions"])
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            return self._fail(
                f"reward {name} returned {_shown(values)}; it must return a list of {n} numbers, one per completion",
                None,
                batch,
            )
        values = list(values)
        if len(values) != n:
            return self._fail(f"reward {name} returned {len(values)} rewards for {n} completions", None, batch)
        for i, value in enumerate(values):
            if not _is_reward(value):
                return self._fail(
                    f"reward {name} returned {_shown(value)} for completion {i} of {n}; it must be a finite number, "
                    "or None where the reward does not apply",
                    i,
                    batch,
                )
        return values

    def _fail(self, line: str, index: int | None, batch: dict[str, Any]) -> list[float | None]:
        """Keep the first failure; the zeros returned in place of rewards are never used."""
        n = len(batch["completions"])
        if self.failure is None:
            self.failure = f"{line}; saved in {self.path}"
            rows = range(n) if index is None else [index]
            columns = {
                key: values
                for key, values in batch.items()
                if isinstance(values, list) and len(values) == n and key != "completion_ids"
            }
            content = {
                "error": line,
                "rows": [{"index": i, **{key: values[i] for key, values in columns.items()}} for i in rows],
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(content, indent=1, default=repr) + "\n")
        return [0.0] * n


def _is_reward(value: Any) -> bool:
    """None, or what float() takes and finds finite; a text is none, even one that reads as a number."""
    if value is None:
        return True
    try:
        return not isinstance(value, str | bytes) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def _first_that_raises(function: Callable, batch: dict[str, Any]) -> int | None:
    """Index of the first completion for which the function raises when called with it alone."""
    n = len(batch["completions"])
    for i in range(n):
        row = {key: [v[i]] if isinstance(v, list) and len(v) == n else v for key, v in batch.items()}
        try:
            function(**row)
        except Exception:
            return i
    return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _hint(error: Exception, function: Any, batch: dict[str, Any]) -> str:
    """The file and line of the function that an error came from; and what a completion is, where it was taken for chat
    messages."""
    while isinstance(function, functools.partial):
        function = function.func
    own = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    hint = f" ({own}, line {lines[-1]})" if lines else ""
    if isinstance(error, TypeError) and "indices" in str(error) and isinstance(batch["completions"][0], str):
        hint += "; completions are text here: write completion for completion[0]['content']"
    return hint


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {' '.join(repr(value).split())[:80]}"


# ---------------------------------------------------------------------------------------------------------------------
# Exactness

MAX_DENSITY_GAP = 1e-2  # nats, at the first step of a run in float32


def check_density_gap(
    gap: float,
    batch: SoftBatch,
    first: Tensor,
    mask: Tensor,
    model: Any,
    thinking: Thinking,
    mixed_precision: str,
    by_vllm: bool = False,
) -> None:
    """Ends a run whose rollout and training pass score two different models.

    In lower precision, or with TF32 products, a gap of this size may be rounding, and nothing is done. A Dirichlet's
    log-density is up to gamma times as steep as its log-probabilities, so its bound is gamma times as large.

    Args:
        gap: over all processes; batch, first and mask are this process's, as in `metrics.density_gap`.
        mixed_precision: accelerate's; "no" is none.
        by_vllm: the rollout was made by an engine that the weights were pushed to.

    Raises:
        ValueError: the gap is above the bound; names the model and the position that differs most.
    """
    bound = MAX_DENSITY_GAP * (max(1.0, thinking.thought_gamma) if thinking.kind.has_dirichlet_noise else 1.0)
    exact = torch.get_float32_matmul_precision() == "highest" and mixed_precision == "no"
    if gap <= bound or not exact or compute_dtypes(model) != {torch.float32}:
        return
    found = (first - batch.sampled_log_probs).abs() * mask
    row, column = divmod(int(found.nan_to_num(0.0).argmax()), found.shape[1])
    what = "a thought" if batch.thought_mask[row, column] else "an answer token"
    if by_vllm:
        raise ValueError(
            f"rollout/density_gap is {gap:.2g} right after the weights were pushed to vLLM, above {bound:g} in "
            f"float32: for {what} vLLM recorded a log-density of {batch.sampled_log_probs[row, column]:.5g} and the "
            f"training pass found {first[row, column]:.5g}. vLLM holds other weights than the trainer, or its model "
            f"of type {model.config.model_type} differs; docs/vllm.md"
        )
    raise ValueError(
        f"rollout/density_gap is {gap:.2g} at the first step, above {bound:g} in float32: for {what} the rollout "
        f"recorded a log-density of {batch.sampled_log_probs[row, column]:.5g} and the training pass found "
        f"{first[row, column]:.5g}, so the two see different models (model_type {model.config.model_type}); "
        "docs/grpo.md, 'How small the density gap is'"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


class Guarded:
    """Mixin to stand before TRL's GRPOTrainer in a class's bases.

    Rewards: each function is watched; the first failure is raised as a ValueError on every process after the rewards
    of a rollout, for which the processes exchange one number.

    Steps: a loss that is not finite makes its gradient NaN, so that one look at the gradient's norm, which every
    process holds after the reduction, tells of both and all processes agree without a word. A step with such a norm
    is skipped. With plain optimizers, alone or under DDP, the gradients are dropped, so that weights and optimizer
    state stay as they are bit by bit and the learning-rate schedule goes on. DeepSpeed's ZeRO optimizers look at the
    norm themselves and skip likewise; their schedule waits for the next good step. With fp16 the loss scaler's skips
    are routine and are left to it.
    """

    args: Any
    model: Any
    state: Any
    accelerator: Any
    processing_class: Any
    reward_funcs: list
    reward_func_names: list

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._output = Path(self.args.output_dir)
        self._watch = RewardWatch(self._output / "failed_reward.json")
        self.reward_func_names = own_names(self.reward_func_names)
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else self._watch.wrap(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        self._absent = [0] * len(self.reward_funcs)  # rollouts in a row in which a reward was None for all
        self._micro_batches: list[tuple[Tensor, dict[str, Any]]] = []  # (loss, inputs) since the last optimizer step
        self._skipped_in_a_row = 0
        self._skipped = 0  # since the last log

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        failure = self._watch.failure
        if self.accelerator.num_processes > 1:
            failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
            if self.accelerator.reduce(failed, "sum") > 0:
                failure = next(line for line in gather_object([failure]) if line is not None)
        if failure is not None:
            raise ValueError(failure)
        self._refuse_absent(rewards)
        return rewards

    def _refuse_absent(self, rewards: Tensor) -> None:
        """Raises ValueError for a reward that was None for every completion: at once where there is no other reward,
        and after some rollouts where another one may have been meant for them.

        Args:
            rewards: (completions of all processes, reward functions), NaN for None.
        """
        absent = rewards.isnan().all(0).tolist()  # of each function
        self._absent = [n + 1 if never else 0 for n, never in zip(self._absent, absent, strict=True)]
        for name, n in zip(self.reward_func_names, self._absent, strict=True):
            if n == MAX_ABSENT_IN_A_ROW or (n and all(absent)):
                raise ValueError(
                    f"reward {name} was None for every completion of {n} rollout{'s' * (n > 1)}, so there is nothing "
                    "to learn from it: None means that a reward does not apply to a row. Look at the columns that it "
                    "reads; the trainer passes answer, answer_type, source, id, thoughts, answer_text and the other "
                    "columns of the rows"
                )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, where it can name the base model; the pipeline writes one of its own."""
        if not Path(getattr(self.accelerator.unwrap_model(self.model).config, "name_or_path", "") or ".").exists():
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not self.model.training:
            return loss
        self._micro_batches.append((loss.detach(), inputs))
        return loss * torch.where(loss.isfinite(), loss.new_ones(()), torch.nan)  # times 1 changes no bit

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # under FSDP2, of all parts
        micro_batches, self._micro_batches = self._micro_batches, []
        if self.args.fp16 or norm is None or math.isfinite(float(norm)):  # the one synchronisation of a step
            self._skipped_in_a_row = 0
            return norm
        step = self.state.global_step + 1
        self._skipped += 1
        self._skipped_in_a_row += 1
        folder = self._output / "nonfinite"
        cause = CUDNN if has_cudnn_attention() else None
        save_step(folder, step, float(norm), micro_batches, self.processing_class)
        if self.args.deepspeed_plugin is not None and not self.accelerator.optimizer_step_was_skipped:
            raise ValueError(
                f"step {step}: the gradient is not finite and DeepSpeed has applied it; the batch is in {folder}. The "
                "same command resumes from the last checkpoint; use ZeRO stage 1, 2 or 3, which skip such a step"
            )
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"step {step}: loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; the batches "
                f"are in {folder}. {cause or 'A smaller learning_rate or max_grad_norm, or dtype float32, may help'}"
            )
        if PartialState().is_main_process:
            why = f". {cause}" if cause else ""
            logger.warning("step %d skipped: loss or gradient is not finite; the batch is in %s%s", step, folder, why)
        model.zero_grad()  # an optimizer passes over parameters without a gradient
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and "loss" in logs:
            logs["skipped_steps"] = self._skipped
            self._skipped = 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def save_step(
    folder: Path, step: int, norm: float, micro_batches: Sequence[tuple[Tensor, dict[str, Any]]], tokenizer: Any
) -> None:
    """This process's micro-batches of a step: `step-N.safetensors` holds the tensors, named `i.name` for the i-th
    micro-batch, and `step-N.json` losses and texts. Beyond MAX_SAVED_STEPS nothing more is written."""
    state = PartialState()
    suffix = f"-process-{state.process_index}" if state.num_processes > 1 else ""
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob(f"step-*{suffix}.safetensors"))) >= MAX_SAVED_STEPS:
        return
    tensors, rows = {}, []
    for i, (loss, inputs) in enumerate(micro_batches):
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value.detach().cpu().contiguous().clone()
        texts = zip(
            tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True),
            tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True),
            strict=True,
        )
        rows += [
            {"micro_batch": i, "loss": repr(loss.item()), "prompt": prompt, "completion": completion}
            for prompt, completion in texts
        ]
    path = folder / f"step-{step}{suffix}.safetensors"
    with replacing(path) as temporary:
        save_file(tensors, temporary)
    content = {"step": step, "process": state.process_index, "grad_norm": repr(norm), "rows": rows}
    write_atomic(path.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
