"""Attention that does not depend on how many keys are masked: `attn_implementation: float64`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def float64_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in float64, rounded once: (B, A, T, D) queries, (B, A', L, D) keys and values -> (B, T, A, D).

    A decode step and a full pass see different numbers of keys, and float32 kernels then add in another order, while
    products over features are the same in both. A sharp model with K slots multiplies that rounding by up to 2K in
    its log-density; `attn_implementation: float64` takes it away where attention is cheap, in small models.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    return (scores.softmax(-1) @ value).to(query.dtype).transpose(1, 2).contiguous(), None
