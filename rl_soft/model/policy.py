"""The policy: a causal LM, its tokenizer and its `Thinking`; make, load and save.

The model stays a plain transformers model, apart from one more keyword of its forward (`scored_forward`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from rl_soft.model.adapters import load_adapter
from rl_soft.model.float64_attention import float64_attention
from rl_soft.model.folder import check_revision, is_adapter, model_folder, read_thinking, write_thinking
from rl_soft.model.gate import GATE, load_gate
from rl_soft.model.projector import PROJECTOR, Projector, load_projector
from rl_soft.model.quantised import loading, settle_loaded, stored_with
from rl_soft.model.side_modules import language_model, module_file
from rl_soft.model.tokenizer import check_tokenizer, load_tokenizer
from rl_soft.thoughts.layout import BOT, EOT, PAD
from rl_soft.thoughts.thinking import Thinking


@dataclass
class Policy:
    """A model that thinks, and what it takes to use it."""

    model: Any  # a transformers causal LM, possibly in a PEFT wrapper
    tokenizer: Any
    thinking: Thinking | None  # None: a plain language model, not trained to think by this package


AttentionInterface.register("float64", float64_attention)
AttentionMaskInterface.register("float64", eager_mask)


def character_tokenizer(vocabulary: str) -> PreTrainedTokenizerFast:
    """One token per character, with <pad>, <eos>, <bot> and <eot> in the vocabulary from the start."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = list(dict.fromkeys(vocabulary))
    tokens = [PAD, "<unk>", "<eos>", BOT, EOT, *characters]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[BOT, EOT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make(
    model_config: dict[str, Any],
    vocabulary: str,
    seed: int,
    dtype: str = "float32",
    attn_implementation: str | None = None,
) -> Policy:
    """A model with random weights and a character tokenizer, from a recipe's `model_config` and `vocabulary`.

    Raises:
        ValueError: no model_type; ids, which the vocabulary decides; values that the type's configuration refuses.
    """
    tokenizer = character_tokenizer(vocabulary)
    values = dict(model_config)
    if "model_type" not in values:
        raise ValueError("model_config needs model_type, for example llama")
    eos = tokenizer.eos_token_id
    ours = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos}
    if given := [key for key in (*ours, "bos_token_id") if key in values]:
        raise ValueError(f"model_config may not hold {', '.join(given)}: the vocabulary decides that")
    model_type, values = values.pop("model_type"), values | ours
    try:
        config = AutoConfig.for_model(model_type, bos_token_id=None, **values)
    except StrictDataclassError as error:
        if "bos_token_id" not in str(error):
            raise ValueError(f"model_config of {model_type}: {' '.join(str(error).split())}") from error
        config = AutoConfig.for_model(model_type, bos_token_id=eos, **values)  # it has to have one
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **kwargs)
    return Policy(model, tokenizer, None)


def load_policy(
    name_or_path: str,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trainable: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    whole: bool = False,
    revision: str | None = None,
) -> Policy:
    """A policy from a folder of ours, a run, a plain transformers folder, a PEFT adapter folder, or a hub id.

    Args:
        name_or_path: the folder or the id.
        dtype: of the weights: float32, bfloat16 or float16.
        attn_implementation: as transformers names it, or `float64` (small models); None: transformers' choice.
        trainable: whether the weights of an adapter take gradients.
        quantization: loads the weights (under an adapter: its base's) in 4 bits, see `quantised.four_bits`; None: as
            the folder of an adapter says that it was trained.
        whole: makes the weights of 4 bits under an adapter whole again, the same numbers in `dtype`.
        revision: branch, tag or commit of a hub id; None: its main one.

    Returns:
        The policy on the CPU (one of 4 bits on the GPU, if there is one), its projector loaded where the folder has
        one; `thinking` is None for a model that is not ours. A tokenizer without a padding token takes its end of text
        for it.

    Raises:
        ValueError: what `model_folder` and `check_revision` refuse; a tokenizer that is missing or does not fit; an
            adapter whose base is missing, or of a kind that soft tokens cannot have.
        OSError: transformers', for a name that is neither a folder nor to be had from the hub.
    """
    name_or_path = model_folder(name_or_path)
    check_revision(name_or_path, revision)
    path = Path(name_or_path)
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation:
        kwargs["attn_implementation"] = attn_implementation
    kwargs |= loading(quantization or stored_with(path))
    tokenizer = load_tokenizer(name_or_path, revision)
    if is_adapter(path):
        model = load_adapter(path, tokenizer, trainable, whole, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, revision=revision or "main", **kwargs)
    check_tokenizer(tokenizer, model, name_or_path)
    settle_loaded(model)
    align(model)
    if module_file(path, PROJECTOR).exists():
        load_projector(language_model(model), path)
    if module_file(path, GATE).exists():
        load_gate(language_model(model), path)
    return Policy(model, tokenizer, read_thinking(path))


def describe_policy(name_or_path: str, dtype: str = "float32") -> Policy:
    """A policy whose weights are not here, for rollouts that are made elsewhere: the model is on the meta device.

    Args:
        name_or_path: the folder of a whole model, or a hub id.

    Raises:
        ValueError, OSError: as `load_policy`.
    """
    name = model_folder(name_or_path)
    path, tokenizer = Path(name), load_tokenizer(name)
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        if module_file(path, PROJECTOR).exists():
            model.projector = Projector(1, 1)  # it says that there is one
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(name)
    check_tokenizer(tokenizer, model, name)
    return Policy(model, tokenizer, read_thinking(path))


def align(model: nn.Module) -> None:
    """Put weights on a CPU at the beginning of cache lines. A safetensors file is mapped, so its weights lie wherever
    its header ends, and every other vector that a product reads is cut in two (benchmarks/cpu_kernels.py)."""
    for p in model.parameters():
        if p.device.type == "cpu" and p.is_floating_point() and p.data_ptr() % 64:
            p.data = p.data.clone()


def add_thought_tokens(policy: Policy) -> None:
    """Put <bot> and <eot> into a pretrained tokenizer and model; their rows start as copies of <eos> plus noise."""
    missing = [t for t in (BOT, EOT) if t not in policy.tokenizer.get_vocab()]
    if not missing:
        return
    policy.tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    embedding = policy.model.get_input_embeddings()
    if len(policy.tokenizer) > embedding.weight.shape[0]:
        policy.model.resize_token_embeddings(len(policy.tokenizer), mean_resizing=False)
        embedding = policy.model.get_input_embeddings()
    weight = embedding.weight.data
    noise = torch.Generator().manual_seed(0)
    for token in missing:
        row = weight[policy.tokenizer.eos_token_id]
        jitter = torch.randn(row.shape, generator=noise) * row.float().std().cpu()
        weight[policy.tokenizer.convert_tokens_to_ids(token)] = row + 0.5 * jitter.to(row)


def save(
    folder: Path,
    save_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    thinking: Thinking,
    main: bool,
    also: dict[str, Any] | None = None,
) -> None:
    """Write a complete model folder under a temporary name, then rename it, so that a folder is whole or absent.

    Args:
        save_model: called with the temporary folder on every rank (ZeRO needs all of them), e.g. `trainer.save_model`.
        main: whether this process writes the side files and renames.
        also: what else rl_soft.json says, by key.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    if main and temporary.exists():
        shutil.rmtree(temporary)
    save_model(str(temporary))
    if main:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
        tokenizer.save_pretrained(temporary)
        write_thinking(temporary, thinking, also)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout; then as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class RopeLimit(NamedTuple):
    """Positions up to which rotary embeddings are the same for all lengths."""

    rope_type: str
    positions: int


def rope_limit(model: Any) -> RopeLimit | None:
    """The limit of a model with rope_type dynamic or longrope; None for any other.

    Beyond it transformers takes the frequencies from the longest row of a batch, and keys in a cache keep older ones.
    """
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    limits = []
    for parameters in (given, *given.values()):  # of all layers, or by the type of a layer
        kind = str(parameters.get("rope_type")) if isinstance(parameters, dict) else ""
        if "dynamic" in kind:
            limits.append(RopeLimit(kind, config.max_position_embeddings))
        elif kind == "longrope":
            limits.append(RopeLimit(kind, parameters["original_max_position_embeddings"]))
    return min(limits, key=lambda limit: limit.positions, default=None)


def context_length(model: Any) -> int | None:
    """Positions that a model has, by its configuration; up to `rope_limit`, where it has one."""
    length, limit = getattr(model.config.get_text_config(), "max_position_embeddings", None), rope_limit(model)
    return length if limit is None else min(limit.positions, length or limit.positions)


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the generation config."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    own = tokenizer.eos_token_id
    return list(dict.fromkeys([*([] if own is None else [own]), *ids]))
