"""Decoder layers that a rollout takes by kernels of its own: which they are, and whether the kernels agree with them.

A layer is taken where it is one of transformers' own for Llama, Mistral, Qwen 2 or Qwen 3, nobody has put hooks or
other parts into it, and its first prompt has been taken both ways with one result. One prompt alone would not show
what depends on position or on size: a layer of another name is left alone, however like one of these it is.

`cpu` says how a layer is taken.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger(__name__)

LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
# transformers leaves hooks behind where hidden states were once asked for; while nobody asks they do nothing.
IDLE_HOOKS = "transformers.utils.output_capturing"
# What two ways may differ by, as a share of what a layer changes; its rounding may be that of its input besides.
AGREE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}

# Layers, and whether they agreed, by the device and dtype of their weights.
_judged: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


class Parts(NamedTuple):
    """Modules of a decoder layer, in the order in which it calls them; norms of heads may be None. An adapter that is
    merged is left out, since its module then only calls the one below."""

    attention: Any
    first_norm: Any
    q: Any
    q_norm: Any
    k: Any
    k_norm: Any
    v: Any
    o: Any
    second_norm: Any
    gate: Any
    up: Any
    down: Any

    @property
    def linears(self) -> list[Any]:
        return [self.q, self.k, self.v, self.o, self.gate, self.up, self.down]

    @property
    def norms(self) -> list[Any]:
        return [m for m in (self.first_norm, self.q_norm, self.k_norm, self.second_norm) if m is not None]


def parts_of(module: Any) -> Parts | None:
    """The parts of a layer in which kernels may stand for the operations between them; None where it is another."""
    known_class = type(module).__name__ in LAYERS and type(module).__module__.startswith("transformers.models.")
    if not known_class:
        return None
    attention, mlp = module.self_attn, module.mlp
    head_norms = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    known = (
        (module, ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]),
        (attention, ["q_proj", "k_proj", "v_proj", "o_proj", *head_norms]),
        (mlp, ["gate_proj", "up_proj", "down_proj", "act_fn"]),
    )
    if any({n for n, _ in m.named_children()} != set(names) for m, names in known):
        return None
    if attention.config._attn_implementation != "sdpa" or attention.config.hidden_act not in ("silu", "swish"):
        return None
    for inner in module.modules():
        hooks = [*inner._forward_hooks.values(), *inner._forward_pre_hooks.values()] if inner is not module else []
        if "forward" in vars(inner) or any(hook.__module__ != IDLE_HOOKS for hook in hooks):
            return None
    q, k, v, o = (_below(getattr(attention, f"{name}_proj")) for name in "qkvo")
    gate, up, down = (_below(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    first, second = module.input_layernorm, module.post_attention_layernorm
    parts = Parts(attention, first, q, q_norm, k, k_norm, v, o, second, gate, up, down)
    return parts if all("variance_epsilon" in vars(norm) for norm in parts.norms) else None


def _below(linear: Any) -> Any:
    merged = isinstance(linear, BaseTunerLayer) and getattr(linear, "merged", False)
    return linear.get_base_layer() if merged else linear


def casts(x: Tensor) -> bool:
    """Whether an autocast is on that would take x to another dtype. It may be put around the forward of the model, and
    so come on only after the kernels did."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


def is_step(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, dropout: float, more: Any) -> bool:
    """Whether this is attention of one position per row, without gradients, laid out as the kernels of both devices
    read it: (n, AG, 1, D) queries, (n, A, C, D) keys and values with contiguous columns, (n, 1, 1, C) bool mask."""
    (n, _, T, D), C = query.shape, key.shape[2]
    return (
        T == 1
        and query.dtype == key.dtype == value.dtype
        and (key.shape == value.shape and key.stride() == value.stride() and key.stride()[2:] == (D, 1))
        and (seen is None or (seen.dtype == torch.bool and seen.shape == (n, 1, 1, C)))
        and not (dropout or more.get("position_bias") is not None or torch.is_grad_enabled() or casts(query))
    )


@contextmanager
def patched(forwards: dict[Any, Any], attention: Callable[..., Any]) -> Iterator[None]:
    """While on, these modules have these forwards, and `sdpa` is `attention(sdpa, ...)`; then all is as it was."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        for module, forward in forwards.items():
            module.forward = forward
        ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(attention, sdpa)
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
        for module in forwards:
            vars(module).pop("forward", None)


class Layer:
    """`forward` of a decoder layer: the kernels for prompts and steps of a rollout, what was there for all else.

    A subclass says in `takes` which inputs its kernels know; in `before` and `after`, what they do around attention.
    """

    def __init__(self, module: Any, parts: Parts) -> None:
        self.module, self.parts, self.plain, self.attention = module, parts, module.forward, parts.attention
        weight = parts.first_norm.weight
        self.key = weight.device.type, weight.dtype
        self.agreed = _judged.get(module, {}).get(self.key)

    def takes(self, x: Tensor, cos: Tensor) -> bool:
        """Whether the kernels take inputs x (n, T, H), rotated by cos (n or 1, T, D)."""
        raise NotImplementedError

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, T, Q, D), keys and values (n, T, A, D) of inputs x (n, T, H)."""
        raise NotImplementedError

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        """The layer's output (n, T, H), of its input and of what attention read (n, T, Q, D)."""
        raise NotImplementedError

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, cache, mask = hidden_states, kwargs.get("past_key_values"), kwargs.get("attention_mask")
        cos, sin = kwargs.get("position_embeddings") or (x, None)
        if (
            (self.agreed is False or args or cache is None or sin is None)
            or (torch.is_grad_enabled() or casts(x) or not self.takes(x, cos))
        ):  # fmt: skip
            return self.plain(x, *args, **kwargs)
        if self.agreed is None and x.shape[1] > 1 and not cache.get_seq_length(self.attention.layer_idx):
            self.judge(x, cos, sin, mask, kwargs)
        return self.step(x, cos, sin, cache, mask) if self.agreed else self.plain(x, **kwargs)

    def judge(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Take a prompt both ways, without its cache, and compare them position by position.

        A position that sees nothing, such as padding, need not be finite. Where the last is not, there is no verdict:
        this rollout keeps the layer's operations, and the next one asks again.
        """
        expected = self.plain(x, **{**kwargs, "past_key_values": None}).float()
        found = self.step(x, cos, sin, None, mask).float()
        finite = expected.isfinite().all(-1)  # (n, T)
        off, change, size = (a.abs().amax(-1) for a in (found - expected, expected - x, x.float()))  # (n, T)
        close = off <= AGREE[x.dtype] * change + 8 * torch.finfo(x.dtype).eps * size
        self.agreed = bool((close | ~finite).all() and finite[:, -1].all())
        if finite[:, -1].all():
            _judged.setdefault(self.module, {})[self.key] = self.agreed
            if not self.agreed:
                name = type(self.module).__name__
                logger.info("rollout: a %s keeps its own operations; by the kernels it is off by %g", name, off.max())

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """The layer's output (n, T, H) of x (n, T, H); cos, sin (n or 1, T, D). Without a cache, x is all there is."""
        q, k, v = (a.transpose(1, 2) for a in self.before(x, cos, sin))  # (n, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        read, _ = attend(self.attention, q, k, v, mask, scaling=self.attention.scaling)  # (n, T, Q, D)
        return self.after(x, read)
