"""A model as plain transformers, vLLM and lm-eval load it: one folder of whole weights, an adapter merged into them.

The folder keeps rl_soft.json, so that this package still knows how the model thinks.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig

from rl_soft.files import new_folder
from rl_soft.model.folder import base_of, is_adapter, model_folder, read_thinking, write_thinking
from rl_soft.model.gate import GATE
from rl_soft.model.policy import load_policy
from rl_soft.model.projector import PROJECTOR
from rl_soft.model.side_modules import module_file, taken_out
from rl_soft.model.value_head import VALUE_HEAD
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")

BESIDE = {  # modules without which the model cannot think
    PROJECTOR: "thoughts of this model go through a projector",
    GATE: "a gate switches the thoughts of this model",
}


def export(source: str, folder: Path, dtype: str | None = None, card: str | None = None) -> Thinking | None:
    """Write the model of `source` into a new folder, whole or not at all.

    Args:
        source: what `load_policy` takes: a run, its model, one of its checkpoints, a PEFT folder, a whole model.
        folder: which must not exist.
        dtype: of the weights that are written: float32, bfloat16 or float16; None: that of the (base) model. An
            adapter is always merged in float32 and rounded afterwards.
        card: text of the README.md, if any.

    Returns:
        How the model thinks; None for one that is not ours.

    Raises:
        ValueError: what `load_policy` and `new_folder` refuse; an adapter that has no place in plain weights.
    """
    path = Path(model_folder(source))
    thinking = thinking_at(path)
    with new_folder(folder) as temporary:
        loaded = load_policy(str(path), whole=True)
        model = whole(loaded.model, str(path))
        given = dtype or dtype_of(path)
        if given != "float32":
            model = model.to(getattr(torch, given))
            if loaded.model is not model:
                logger.info("the merged weights are rounded to %s; --dtype float32 keeps them", given)
        with ExitStack() as aside:
            for name in BESIDE:
                if hasattr(model, name):
                    aside.enter_context(taken_out(model, name))
            model.save_pretrained(temporary)
        for name, what in BESIDE.items():
            if (file := module_file(path, name)).exists():
                shutil.copyfile(file, temporary / file.name)
                logger.warning(
                    "%s, which no plain folder holds: %s stands beside the weights for rl-soft; transformers leaves "
                    "it out and writes text, and vLLM needs this package's plugin",
                    what,
                    file.name,
                )
        if module_file(path, VALUE_HEAD).exists():
            logger.warning("the value head is left out: it is for PPO alone, which goes on from %s", path)
        loaded.tokenizer.save_pretrained(temporary)
        if thinking is not None:
            write_thinking(temporary, thinking)
        if card is not None:
            (temporary / "README.md").write_text(card)
    return thinking


def thinking_at(path: Path) -> Thinking | None:
    """The thinking of a model folder, of a checkpoint that of its run."""
    recipe = path.parent / "config.yaml"
    if (thinking := read_thinking(path)) is None and recipe.exists():
        thinking = Thinking.from_dict(yaml.safe_load(recipe.read_text()))
    return thinking


def dtype_of(path: Path) -> str:
    """The dtype of the weights of a folder, of an adapter that of its base, by their configuration."""
    config = AutoConfig.from_pretrained(base_of(path) if is_adapter(path) else str(path))
    return str(config.dtype or torch.float32).removeprefix("torch.")


def whole(model: Any, name: str) -> Any:
    """The plain model, with its adapter merged by PEFT.

    Where the head is the matrix of the embeddings and the adapter changes one of them, they part: the folder has two
    matrices then.

    Raises:
        ValueError: an adapter that PEFT cannot merge.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        return model
    if any(getattr(config, "lora_bias", False) for config in model.peft_config.values()):
        raise ValueError(f"{name}: an adapter with lora_bias has no place in layers without a bias; use it with PEFT")
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        layers: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
        if layers[0].weight is layers[1].weight:
            layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # they are parted above
        merge: Any = model.merge_and_unload
        plain = merge(safe_merge=True)
    if left := [key for key, module in plain.named_modules() if type(module).__module__.startswith("peft.")]:
        raise ValueError(f"{name}: PEFT cannot merge what its adapter does to {left[0]}; use the adapter as it is")
    config = plain.config.get_text_config()
    parted = plain.get_input_embeddings().weight is not plain.get_output_embeddings().weight
    if config.tie_word_embeddings and parted:
        config.tie_word_embeddings = plain.config.tie_word_embeddings = False
    return plain
