"""Which models soft rollouts can be made with; others are refused by name, in a line."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rl_soft.model.policy import rope_limit
from rl_soft.model.side_modules import language_model

# What a step gives to a model: mixtures of embeddings, and the keys and values of what came before.
TAKEN = {"inputs_embeds": "takes no embeddings", "past_key_values": "keeps no cache of keys and values"}

# Standard deviations of the logits: rounding stays below, positions that are one off do not.
MISREAD = {True: 0.002, False: 0.3}  # in float32 or better, or not
_READ_WELL: weakref.WeakSet[Any] = weakref.WeakSet()


def check_rollout_model(model: Any) -> None:
    """Refuse, by name, a model that soft rollouts cannot be made with.

    Args:
        model: a causal LM, possibly in a PEFT wrapper.

    Raises:
        ValueError: an encoder-decoder; a model that takes images or sound; one that takes no embeddings or keeps no
            cache of keys and values; one whose layers are not full or sliding attention; one that takes more than one
            embedding from an id.
    """
    causal = language_model(model)
    name = type(causal).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model {name} is an encoder-decoder; soft rollouts need a decoder-only language model")
    for part in ("vision_config", "audio_config", "audio_encoder_config"):
        if getattr(model.config, part, None) is not None:
            raise ValueError(f"model {name} has {part}; load its language model alone, an AutoModelForCausalLM")
    for argument, what in TAKEN.items():
        if not _takes(causal, argument):
            raise ValueError(f"model {name} {what} ({argument} is no argument of its forward); rollouts need that")
    attention_windows(causal)
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise ValueError(
            f"model {name} takes more than one embedding from an id (hidden_size_per_layer_input), and a mixture of "
            "ids has no other"
        )


def has_alibi(model: Any) -> bool:
    """Whether a model makes its positions of the attention mask, which must then be as wide as the keys are many."""
    causal = language_model(model)
    return not _takes(causal, "position_ids") or bool(getattr(causal.config.get_text_config(), "alibi", False))


def attention_windows(model: Any) -> list[int | None]:
    """The sliding window of each layer, as transformers has read it from the config; None for full attention.

    Raises:
        ValueError: a layer that is neither.
    """
    config = model.config.get_text_config()
    name = type(language_model(model)).__name__
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"model {name} has layers of chunked attention; rollouts know full and sliding attention")
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError as error:
        raise ValueError(f"model {name}: transformers makes no cache of its config ({error})") from error
    windows: list[int | None] = []
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            kind = type(layer).__name__
            raise ValueError(f"model {name} has a layer with {kind}; rollouts know full and sliding attention")
    return windows


def check_rope(model: Any, prompts: Sequence[Sequence[int]], steps: int) -> None:
    """Refuse lengths at which the rotary frequencies of every row depend on the longest row of the batch.

    Args:
        prompts: ids of the prompts.
        steps: the most positions that a completion may have.

    Raises:
        ValueError: dynamic or longrope embeddings, and a row that may be longer than the length that they start from.
    """
    limit, longest = rope_limit(model), max(map(len, prompts), default=0) + steps
    if limit is not None and longest > limit.positions:
        raise ValueError(
            f"model {type(language_model(model)).__name__} has rope_type {limit.rope_type}, which changes beyond "
            f"{limit.positions} positions for all rows of a batch at once, and prompt and completion may take "
            f"{longest}: lower num_thoughts or max_answer_tokens, or leave long questions out"
        )


@torch.no_grad()
def check_reading(model: Any) -> None:
    """Run a model twice on a few ids, once in its life: read plainly, and as the embeddings that a rollout feeds, with
    padding before them and another input behind.

    Weights that ZeRO-3 has partitioned are not run, and logits that are not finite are not judged (rollouts count
    them).

    Raises:
        ValueError: the logits differ by more than rounding.
    """
    model = language_model(model)
    config, embedding = model.config.get_text_config(), model.get_input_embeddings()
    device = embedding.weight.device
    if model in _READ_WELL or not embedding.weight.numel():
        return
    special = {config.pad_token_id, config.eos_token_id} if isinstance(config.eos_token_id, int | None) else set()
    ids = [i for i in range(config.vocab_size - 1, -1, -1) if i not in special][:4]
    plain, later = torch.tensor([ids[:-1]], device=device), ids[-1]
    padded = torch.tensor([[later, later, *ids]], device=device)
    mask = torch.tensor([[0, 0] + [1] * len(ids)], device=device)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if _takes(model, "position_ids") else {}
    was_training = model.training
    model.eval()
    try:
        read = model(input_ids=plain, use_cache=False).logits[0, -1]
        fed = model(inputs_embeds=embedding(padded), attention_mask=mask, use_cache=False, **positions).logits[0, -2]
    finally:
        model.train(was_training)
    exact = read.dtype in (torch.float32, torch.float64)
    distance = float((read.float() - fed.float()).abs().max() / read.float().std().clamp(min=1e-12))
    if distance > MISREAD[exact]:
        raise ValueError(
            f"model {type(model).__name__} reads padded embeddings otherwise than ids (its logits move by "
            f"{distance:.2g} of their standard deviation): it sees later tokens, or counts positions in another way "
            "than rollouts do"
        )
    _READ_WELL.add(model)


def _takes(model: Any, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters
