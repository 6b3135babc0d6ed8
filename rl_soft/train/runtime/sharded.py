"""FSDP2: weights, gradients and optimizer states lie in parts on the processes (torch's `fully_shard`, by accelerate).

training pass    torch gathers a layer, uses it and frees it; the head is read where its group is whole
rollout          all weights are gathered once, and the model is then a plain one (`model.sharded`)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl.models import unwrap_model_for_generation

from rl_soft.config.recipe import RL_METHODS, Recipe
from rl_soft.model.sharded import is_sharded, whole_weights
from rl_soft.thoughts.kinds import RATIOS
from rl_soft.train.runtime.processes import as_trained, refuse_fsdp, uses_fsdp

WANTED = {  # accelerate's settings, as its launcher hands them on -> what a run of ours needs
    "FSDP_VERSION": ("2", "fsdp_version"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "fsdp_state_dict_type"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "fsdp_cpu_ram_efficient_loading"),
    "FSDP_OFFLOAD_PARAMS": ("false", "fsdp_offload_params"),
}


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError under FSDP for a recipe that sends gradients from a thought to those before it."""
    if recipe.method in ("codi", "coconut"):
        refuse_fsdp(f"method {recipe.method} ({recipe.path})")
    elif recipe.method in RL_METHODS and recipe.thinking.kind.reads_hidden:
        refuse_fsdp(f"thought {recipe.thinking.thought}")
    elif recipe.method in RL_METHODS and RATIOS[recipe.extra.ratio].one_by_one:
        refuse_fsdp(f"ratio {recipe.extra.ratio}")
    if uses_fsdp() and recipe.thinking.switch == "gate":
        raise ValueError("switch gate is not available under FSDP2, which cannot divide its bias; use --zero 0 to 3")


def check_fsdp() -> None:
    """Raises ValueError for settings of FSDP under which a run could not be right, or not be saved."""
    for name, (wanted, key) in WANTED.items():
        found = os.environ.get(name, wanted)
        if found.lower() != wanted.lower():
            raise ValueError(
                f"{key} is {found} in the accelerate settings, and FSDP here takes {wanted}; "
                "use recipes/accelerate/fsdp2.yaml (./launch.sh RECIPE --fsdp)"
            )


def prepare_fsdp() -> None:
    """What accelerate leaves open, before its state is made: call it before a trainer.

    On a CPU accelerate does not shard but runs DDP, without a word; torch can. In half precision it would round what
    the forward returns, and gradients where they are added up over the processes; log-densities are float32 here.
    """
    if not uses_fsdp() or hasattr(AcceleratorState.__init__, "prepared"):
        return
    check_fsdp()
    made = AcceleratorState.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        if fsdp_plugin is not None and (precision := kwargs.get("mixed_precision")) in ("bf16", "fp16"):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float16
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            fsdp_plugin.mixed_precision_policy = policy
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type  # as it does on a GPU

    init.prepared = True  # type: ignore[attr-defined]
    AcceleratorState.__init__ = init  # type: ignore[method-assign]


@contextmanager
def whole_model(trainer: Any) -> Iterator[Any]:
    """The trainer's model with all its weights on every process, for rollouts and evaluations."""
    kwargs = {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs}
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **kwargs) as model:
        if not is_sharded(model):
            yield model
            return
        policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
        with whole_weights(model, None if policy is None else policy.param_dtype), as_trained(model, trainer.args):
            yield model
