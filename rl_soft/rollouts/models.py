"""Which models soft rollouts can be made with; others are refused by name, in a line."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rl_soft.model.policy import rope_limit
from rl_soft.model.side_modules import language_model

# What a step gives to a model: mixtures of embeddings, and the keys and values of what came before.
TAKEN = {"inputs_embeds": "takes no embeddings", "past_key_values": "keeps no cache of keys and values"}


def check_rollout_model(model: Any) -> None:
    """Refuse, by name, a model that soft rollouts cannot be made with.

    Args:
        model: a causal LM, possibly in a PEFT wrapper.

    Raises:
        ValueError: an encoder-decoder; a model that takes images or sound; one that takes no embeddings or keeps no
            cache of keys and values; one whose layers are not full or sliding attention; one whose positions count
            padding.
    """
    causal = language_model(model)
    name = type(causal).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model {name} is an encoder-decoder; soft rollouts need a decoder-only language model")
    for part in ("vision_config", "audio_config"):
        if getattr(model.config, part, None) is not None:
            raise ValueError(f"model {name} has a {part}; load its language model alone, an AutoModelForCausalLM")
    taken = inspect.signature(type(causal).forward).parameters
    for argument, what in TAKEN.items():
        if argument not in taken:
            raise ValueError(f"model {name} {what} ({argument} is no argument of its forward); rollouts need that")
    attention_windows(causal)
    if "position_ids" not in taken and _counts_padding(causal):
        raise ValueError(
            f"model {name} counts padding as positions, and its forward takes no position_ids: a completion would "
            "depend on the length of the others in its batch"
        )


def attention_windows(model: Any) -> list[int | None]:
    """The sliding window of each layer, as transformers has read it from the config; None for full attention.

    Raises:
        ValueError: a layer that is neither.
    """
    config = model.config.get_text_config()
    name = type(language_model(model)).__name__
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"model {name} has layers of chunked attention; rollouts know full and sliding attention")
    windows: list[int | None] = []
    for layer in DynamicCache(config=model.config).layers:
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
            f"rope_type {limit.rope_type} of model {type(language_model(model)).__name__} changes beyond "
            f"{limit.positions} positions, for all rows of a batch at once, and prompt and completion may take "
            f"{longest}: lower num_thoughts or max_answer_tokens, or leave long questions out"
        )


@torch.no_grad()
def _counts_padding(model: Any) -> bool:
    """Whether an input's logits change when padding is put on its left."""
    embeds = model.get_input_embeddings()(torch.arange(4, device=model.device)[None])  # (1, 4, H)
    mask = torch.tensor([[0, 0, 1, 1]], device=model.device)
    was_training = model.training
    model.eval()
    alone = model(inputs_embeds=embeds[:, 2:], attention_mask=mask[:, 2:], use_cache=False).logits[:, -1].float()
    padded = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1].float()
    model.train(was_training)
    allowed = max(1e-5, 8 * torch.finfo(model.dtype).eps)
    return bool((alone - padded).abs().max() > allowed * alone.abs().max())
