"""Processes and their devices: before models are loaded, whether the launcher had its way, around evaluations."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from rl_soft.model import devices

logger = logging.getLogger("rl_soft")


def prepare_devices() -> None:
    """CPU processes share the cores; DeepSpeed's shared-memory op is optional and would be compiled at start-up.

    Raises:
        ValueError: see `devices.set_up`.
    """
    devices.set_up()
    disable_progress_bar()  # of the shards of a checkpoint; ours stays
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, ours // world))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def uses_fsdp() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def refuse_fsdp(what: str) -> None:
    """Raises ValueError under FSDP, for what sends gradients from a thought to those before it."""
    if uses_fsdp():
        raise ValueError(
            f"{what} is not available under FSDP2: gradients reach a layer through the cache, where FSDP2 does not "
            "gather its weights; use --zero 0 to 3"
        )


def start_processes() -> PartialState:
    """Join the processes that the launcher started; each would work alone otherwise, without a word."""
    state = PartialState(cpu=not torch.cuda.is_available())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != world:
        raise ValueError(f"launched {world} processes, but {state.num_processes} found each other")
    logger.info("%d process(es), %s, device %s", world, state.distributed_type.value, state.device)
    return state


def check_processes(args: Any) -> None:
    """The launcher's wishes must have come true: on a CPU a wrong setting makes N independent runs without a word."""
    if args.n_gpu > 1:  # transformers would spread this process's batches over them (DataParallel)
        args._n_gpu = 1
        logger.info("one process takes one GPU; --nproc N takes more")
    state = args.distributed_state
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = "DEEPSPEED" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None
    actual = "DEEPSPEED" if args.deepspeed_plugin is not None else state.distributed_type.value
    if uses_fsdp() and world == 1:
        raise ValueError("--fsdp divides a model over processes, and there is one; leave --fsdp out, or take more")
    if state.num_processes != world or (kind and actual != kind):
        raise ValueError(
            f"launched {world} processes ({kind or 'no DeepSpeed'}); the trainer sees {state.num_processes} ({actual})"
        )
    accumulate_in_float32(args)
    if args.process_index == 0:
        stage = f" ZeRO-{args.deepspeed_plugin.zero_stage}" if args.deepspeed_plugin is not None else ""
        stage = " FSDP2" if uses_fsdp() else stage
        logger.info("%d process(es), %s%s, device %s", world, actual, stage, args.device)


def accumulate_in_float32(args: Any) -> None:
    """DeepSpeed adds the gradients of micro-batches up in the dtype of its weights otherwise; in bfloat16 those that
    are small beside the sum are lost."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage and args.bf16:
        plugin.deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def gathered(model: Any) -> Any:
    """Whole weights on every process, where ZeRO-3 has partitioned them while they were loaded."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


@contextmanager
def as_trained(model: Any, args: Any) -> Iterator[None]:
    """Calls of the model go through the autocast that the trainer puts around its own, if it does (`bf16`): a model
    not yet in a trainer's hands, or loaded again, then rounds as the trained one does."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    if dtype is None:
        yield
        return
    before, inner = vars(model).get("forward"), model.forward

    def forward(*values: Any, **named: Any) -> Any:
        with torch.autocast(args.device.type, dtype):
            return inner(*values, **named)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


@contextmanager
def lost_processes() -> Iterator[None]:
    """Ends this process with one line when a collective fails because another process of the job died."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, torch.distributed.DistError) or "Connection closed by peer" in text or "gloo" in text
        if PartialState().num_processes == 1 or not lost or os.environ.get("RL_SOFT_DEBUG"):
            raise
        logger.error(
            "process %d: another process of this job has died (%s); the launcher's report below names it. The same "
            "command resumes from the last checkpoint",
            PartialState().process_index,
            " ".join(text.split())[:200],
        )
        raise SystemExit(1) from None
