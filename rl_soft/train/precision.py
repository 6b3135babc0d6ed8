"""The precision of a run where its recipe leaves it to the machine.

On a GPU that has bfloat16:

    trained           DeepSpeed     dtype        computed in
    an adapter        with or none  bfloat16     bfloat16; the adapter is float32
    all weights       with          bfloat16     bfloat16; DeepSpeed keeps float32 copies, which learn (masters)
    all weights       none          float32      bfloat16 (autocast); the weights are the masters

Anywhere else, and where a recipe says `dtype: float32` or `bf16: false` and no more, everything is float32: weights
and products, under every stage of DeepSpeed, in training and in both evaluations.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import yaml

from rl_soft.config.recipe import Recipe
from rl_soft.model.devices import has_bfloat16

HALF = ("bfloat16", "float16")


def uses_deepspeed() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def default_dtype(adapter: bool, deepspeed: bool, bf16: bool | None = None) -> str:
    """dtype of the weights of a model that is trained.

    Args:
        adapter: whether an adapter is trained, and not the weights.
        bf16: whether the trainer computes in bfloat16; None: as the machine does best.
    """
    return "bfloat16" if has_bfloat16() and bf16 is not False and (adapter or deepspeed) else "float32"


def settled(recipe: Recipe, deepspeed: bool) -> Recipe:
    """The recipe with its `dtype`, and with `bf16` where that is true; a run that has begun keeps its own.

    Raises:
        ValueError: see `check_masters`; float32 weights that DeepSpeed would make bfloat16.
    """
    dtype, bf16 = recipe.model.dtype, recipe.training.get("bf16")
    stored = recipe.output_dir / "config.yaml"
    if dtype is None and stored.exists():
        before = yaml.safe_load(stored.read_text())
        dtype, bf16 = before.get("dtype"), before.get("bf16", False) if bf16 is None else bf16
    if dtype is None:
        if bf16 is None:
            bf16 = has_bfloat16() and not recipe.training.get("fp16")
        dtype = default_dtype(recipe.model.use_peft, deepspeed, bf16)
    elif bf16 is None:
        bf16 = has_bfloat16() and dtype == "bfloat16"
    if not recipe.model.use_peft:
        check_masters(dtype, deepspeed)
    if deepspeed and dtype == "float32" and bf16:
        raise ValueError(
            "bf16 true with dtype float32: DeepSpeed makes all weights bfloat16 then; set dtype bfloat16 (it keeps "
            "float32 copies, which learn) or bf16 false"
        )
    own: dict[str, Any] = {"bf16": bf16} if bf16 or "bf16" in recipe.training else {}
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, dtype=dtype),
        training=recipe.training | own,
        values=recipe.values | own | {"dtype": dtype},
    )


def check_masters(dtype: str, deepspeed: bool) -> None:
    """Raises ValueError for weights that are trained in half precision and have no float32 masters.

    bfloat16 has 8 bits: a change below 1/512 of a weight is rounded away, and at a learning rate of 1e-6 all are.
    """
    if dtype in HALF and not deepspeed:
        raise ValueError(
            f"dtype {dtype} with all weights trained and without DeepSpeed: updates at a learning rate such as 1e-6 "
            "are rounded away; leave dtype out (float32 weights, computed in bfloat16), take DeepSpeed (--zero 1, 2 "
            "or 3), which keeps float32 copies, or train an adapter (use_peft true)"
        )
