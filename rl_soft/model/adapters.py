"""PEFT adapters: which are taken, and when they may be merged into their base."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rl_soft.keys import nearest
from rl_soft.model.folder import base_of
from rl_soft.model.quantised import dequantised, in_4bit


def base_missing(folder: Path, base: str, error: OSError) -> ValueError:
    return ValueError(f"adapter {folder}: its base {base} cannot be loaded: {str(error).strip().splitlines()[0]}")


def load_adapter(folder: Path, tokenizer: Any, trainable: bool, whole: bool = False, **kwargs: Any) -> Any:
    """The base of an adapter in a PEFT wrapper with it, on the CPU.

    Args:
        tokenizer: what is read with; a base with fewer rows than its tokens gets more, which the adapter fills.
        trainable: whether the weights of the adapter take gradients.
        whole: makes weights of 4 bits whole again.
        kwargs: of the base's `from_pretrained`.

    Raises:
        ValueError: a kind of adapter that soft tokens cannot have; a base that is missing or does not fit.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    check_kind(config, str(folder))
    base = base_of(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, revision=config.revision, **kwargs)
    except OSError as error:
        raise base_missing(folder, base, error) from None
    model = dequantised(model) if whole else model
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0] and (folder / "tokenizer_config.json").exists():
        model.resize_token_embeddings(len(tokenizer))
    config.base_model_name_or_path = base  # what is trained on from here is saved elsewhere
    with warnings.catch_warnings():  # the projector, which the adapter leaves out, comes after it
        warnings.filterwarnings("ignore", message=".*exclude_modules.* but no modules were excluded")
        try:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(
                f"adapter {folder} does not fit its base {base}: {lines[min(1, len(lines) - 1)]}"
            ) from None


def check_kind(config: Any, name: str) -> None:
    """Raises ValueError for an adapter that is not in the model's own layers.

    Prompt and prefix tuning put vectors before the input ids in the wrapper's forward, and some others read the input
    ids there. Soft tokens are embeddings, which go through the model itself.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = getattr(config.peft_type, "value", config.peft_type)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    in_layers = isinstance(tuner, type) and issubclass(tuner, BaseTuner) and not config.is_prompt_learning
    if not in_layers or kind in ("POLY", "XLORA") or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{name} is a {kind} adapter, which does not change the model's layers alone; soft tokens take those that "
            "do, such as LORA and IA3"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"{name} is an adapter for the task {config.task_type}, not for CAUSAL_LM")


def merged(model: Any) -> Any:
    """The plain model with its adapter added into the weights, or the same wrapper where that would be another model.

    A head that is tied to the embeddings shares their matrix: adding an adapter of one of them changes both. A bias of
    an adapter has no place in a layer that has none. And a sum with weights of 4 bits would be rounded to 4 bits.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel) or in_4bit(model):
        return model
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = {id(p) for p in ends[0].parameters()} & {id(p) for p in ends[1].parameters()}  # whatever wraps them
    adapted = any(isinstance(end, BaseTunerLayer) for end in ends)
    if (tied and adapted) or any(getattr(config, "lora_bias", False) for config in model.peft_config.values()):
        return model
    return model.merge_and_unload()


def check_whole(model: nn.Module, names: list[str] | None) -> None:
    """Raises ValueError for a name of lora_modules_to_save that no module of the model has."""
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()} - {""}
    for name in names or []:
        if name.rpartition(".")[2] not in known:
            words = nearest(name, known) or f"; it has {', '.join(sorted(n for n in known if not n.isdigit()))}"
            raise ValueError(f"lora_modules_to_save: the model has no module {name!r}{words}")


@contextmanager
def merged_for_now(model: nn.Module) -> Iterator[None]:
    """LoRA and DoRA adapters in float32 are added into the weights of their `nn.Linear`s; then the weights are back,
    bit by bit.

    A rollout reads every weight once per position, so one product in place of three is what counts there. It takes the
    memory of the adapted weights once more. An adapter in lower precision is left as it is: the sum would be rounded,
    and the model another one than that which is trained. So is one of a matrix that another module shares.
    """
    from peft.tuners.lora import Linear

    shared = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    kept: list[tuple[Any, Any, torch.Tensor]] = []
    try:
        for module in model.modules():
            if isinstance(module, Linear) and _mergeable(module) and shared[id(module.get_base_layer().weight)] == 1:
                base: Any = module.get_base_layer()
                kept.append((base, module, base.weight.data))
                base.weight.data = base.weight.data.clone()
                module.merge()
        yield
    finally:
        for base, module, weight in kept:
            base.weight.data = weight
            module.merged_adapters.clear()


def _mergeable(module: Any) -> bool:
    base = module.get_base_layer()
    names = [name for name in module.active_adapters if name in module.lora_A]
    variants = {type(variant).__name__ for variant in module.lora_variant.values()}
    return (
        (
            type(base) is nn.Linear
            and (len(names) == 1 if variants else bool(names))
            and not module.merged
            and not module.disable_adapters
        )
        and not (
            variants - {"DoraLinearVariant"} or any(module.lora_bias.values()) or hasattr(base.weight, "ds_id")
        )  # ZeRO-3
        and all(w.dtype == torch.float32 for w in module.parameters())
    )
