"""Weights of 4 bits under an adapter (QLoRA, arXiv 2305.14314): made by bitsandbytes when a model is loaded.

Its linear layers hold blocks of 64 weights as 4-bit numbers and a scale; each product makes them whole again, for one
matrix at a time. They are frozen, so a rollout and the training pass multiply by the same numbers. Embeddings, norms
and the head keep the dtype of the model.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import BitsAndBytesConfig

from rl_soft.model.folder import SIDE_FILE, is_adapter

MISSING = "load_in_4bit needs bitsandbytes; pip install 'rl-soft[quantised]'"
IN_FILE = "base_in_4bit"  # the key in a model folder's rl_soft.json
STORED = ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant")


def four_bits(quant_type: str, compute_dtype: str, nested: bool) -> BitsAndBytesConfig:
    """How a model is loaded in 4 bits.

    Args:
        quant_type: nf4 or fp4.
        compute_dtype: of the products: float32, bfloat16 or float16.
        nested: whether the scales are quantised too.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        bnb_4bit_use_double_quant=nested,
    )


def loading(config: BitsAndBytesConfig | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for it, {} without.

    Raises:
        ValueError: 8 bits; bitsandbytes is not installed.
    """
    if config is None:
        return {}
    if not config.load_in_4bit:
        raise ValueError(
            "quantization_config: 8-bit products round the states too, in other ways in a rollout and in the training "
            "pass; use load_in_4bit"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(MISSING)
    place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"  # this process's own
    return {"quantization_config": config, "device_map": {"": place}}


def in_4bit(model: Any) -> bool:
    """Whether a model, possibly in a PEFT wrapper, has weights of 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def dequantised(model: Any) -> Any:
    """The same numbers as plain weights, in the dtype of the model; a model without 4 bits is returned as it is."""
    if not in_4bit(model):
        return model
    plain = model.dequantize()
    plain.is_loaded_in_4bit = False
    return plain


def settle_loaded(model: Any) -> None:
    """On a CPU bitsandbytes would lay weights out anew at the first product without gradients, and round that product
    to bfloat16: a rollout would be made by another model than is trained."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The dtypes in which a model computes: of its weights, and of products with weights of 4 bits."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    products: list[Any] = [getattr(module, "compute_dtype", None) for module in model.modules()]
    return {*dtypes, *(dtype for dtype in products if isinstance(dtype, torch.dtype))}


def trained_values(model: Any) -> dict[str, torch.Tensor]:
    """The values of a quantised model's trained weights, for `in_float32`; {} of any other model."""
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad} if in_4bit(model) else {}


def in_float32(model: Any, before: dict[str, torch.Tensor]) -> None:
    """Adapters of a quantised model are float32 again. TRL makes them bfloat16, whose 8 bits lose updates of 1e-6.

    Args:
        before: values that they had before TRL rounded them, by name; new adapters have none.
    """
    if in_4bit(model):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data = before.get(name, p.data).float()


def stored_with(folder: Path) -> BitsAndBytesConfig | None:
    """How the base of an adapter was quantised when the adapter was trained, by its folder; of a checkpoint, by its
    run."""
    file, recipe = folder / SIDE_FILE, folder.parent / "config.yaml"
    if file.exists():
        values = json.loads(file.read_text()).get(IN_FILE)
        return None if values is None else four_bits(*(values[name] for name in STORED))
    if not (is_adapter(folder) and recipe.exists()):
        return None
    run = yaml.safe_load(recipe.read_text())
    if not run.get("load_in_4bit"):
        return None
    dtype = run["bnb_4bit_compute_dtype"] or run["dtype"] or "float32"
    return four_bits(run["bnb_4bit_quant_type"], dtype, run["use_bnb_nested_quant"])


def to_store(model: Any) -> dict[str, Any]:
    """What a model folder's rl_soft.json says of the quantisation, by its key; {} where there is none."""
    if not in_4bit(model):
        return {}
    values = model.config.quantization_config.to_dict()
    return {IN_FILE: {name: values[name] for name in STORED}}


def check_divided(model: Any, stage: int | str) -> None:
    """Raises ValueError for weights of 4 bits that would be divided over processes.

    Args:
        stage: a stage of ZeRO, or fsdp2.
    """
    if in_4bit(model) and stage in (3, "fsdp2"):
        name = "FSDP2" if stage == "fsdp2" else "ZeRO-3"
        raise ValueError(
            f"load_in_4bit: {name} cannot divide weights of 4 bits; use --zero 0, where each process holds them whole"
        )
