"""The weights that a command on a model works with."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from rl_soft.config.arguments import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.model import devices, policy
from rl_soft.model.adapters import merged

Asked = TypeVar("Asked", EvaluationArguments, GenerateArguments, AnalysisArguments)


def with_dtype(arguments: Asked) -> Asked:
    """The arguments with a dtype: the machine's, where none is given."""
    return dataclasses.replace(arguments, dtype=arguments.dtype or devices.default_dtype())  # type: ignore[type-var]


def load_policy(model: str, arguments: EvaluationArguments | GenerateArguments | AnalysisArguments) -> policy.Policy:
    """An adapter in float32 is added into its weights where it can be: faster, and the same up to rounding."""
    devices.set_up()
    dtype = arguments.dtype or devices.default_dtype()
    try:
        loaded = policy.load_policy(model, dtype, arguments.attn_implementation)
    except OSError as error:  # transformers' for a name that is neither a folder nor on the hub
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder here nor to be had from the hub: {first}") from None
    if loaded.model.dtype == torch.float32:
        loaded.model = merged(loaded.model)
    return loaded
