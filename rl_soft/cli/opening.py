"""The weights that a command on a model works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch

from rl_soft.config.arguments import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.model import devices, policy
from rl_soft.model.adapters import merged
from rl_soft.rollouts.engines import Roll, check_engine, roll_of
from rl_soft.rollouts.vllm.server import Server
from rl_soft.thoughts.layout import Layout

Asked = TypeVar("Asked", EvaluationArguments, GenerateArguments, AnalysisArguments)


def with_dtype(arguments: Asked) -> Asked:
    """The arguments with a dtype: where none is given the server's, or this machine's."""
    dtype = arguments.dtype
    if dtype is None:
        dtype = devices.default_dtype() if arguments.server is None else Server(arguments.server).about["dtype"]
    return dataclasses.replace(arguments, dtype=dtype)  # type: ignore[type-var]


def load_policy(model: str, arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> policy.Policy:
    """An adapter in float32 is added into its weights where it can be: faster, and the same up to rounding.

    Where another engine than ours makes the rollouts, no weights are loaded here.
    """
    devices.set_up()
    try:
        if arguments.engine != "ours":
            check_engine(arguments.engine, arguments.server, model, str(arguments.dtype))
            return policy.describe_policy(model, str(arguments.dtype))
        dtype = arguments.dtype or devices.default_dtype()
        loaded = policy.load_policy(model, dtype, arguments.attn_implementation, revision=arguments.model_revision)
    except OSError as error:  # transformers' for a name that is neither a folder nor on the hub
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder here nor to be had from the hub: {first}") from None
    if loaded.model.dtype == torch.float32:
        loaded.model = merged(loaded.model)
    return loaded


def place(model: Any, device: torch.device | str) -> Any:
    """The model on its device, if its weights are here."""
    return model if model.device.type == "meta" else model.to(device)


def choose_roll(
    model: str,
    arguments: EvaluationArguments | GenerateArguments | AnalysisArguments,
    layouts: Sequence[Layout],
    questions: Iterable[str],
) -> Roll:
    """What makes the rollouts of a command; see `roll_of`."""
    return roll_of(arguments.engine, arguments.server, model, str(arguments.dtype), layouts, list(questions))
