"""The keys of 4-bit weights: what they need, and what they do not go with."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from rl_soft.config.arguments import ModelArguments
from rl_soft.keys import fields

if TYPE_CHECKING:
    from rl_soft.config.recipe import Recipe

READ_WITH_4BIT = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "use_bnb_nested_quant")


def check_quantised(recipe: Recipe) -> None:
    """Raises ValueError for 4-bit weights without an adapter, with vLLM, or without their package; and for their keys
    without them."""
    model = recipe.model
    if not model.load_in_4bit:
        for name in READ_WITH_4BIT:
            if getattr(model, name) != fields(ModelArguments)[name].default:
                raise ValueError(f"{name} is read with load_in_4bit true; set it, or take {name} out")
        return
    if not model.use_peft:
        raise ValueError("load_in_4bit: weights of 4 bits are not trained themselves; set use_peft true")
    if recipe.values.get("use_vllm"):
        raise ValueError("load_in_4bit: vLLM would make rollouts with whole weights; set use_vllm false")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes; pip install 'rl-soft[quantised]'")
