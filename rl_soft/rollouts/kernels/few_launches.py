"""Decoder layers of a GPU in fewer operations of PyTorch: 14 launches in place of 40, and no kernel of our own.

At 64 rows most kernels of a decode step take less time than their launch, so what counts is how many there are.

    norm 1    q, k and v 1    rotation 3    cache 2    attention 1    o and residual 1
    norm 1    gate and up 1   silu, product 2          down and residual 1

That q, k and v are one product, and gate and up, takes a copy of these weights, made for a rollout where there is room
for it. Layers with adapters beside their weights, or with biases in other places, keep their own products. A layer is
taken this way only after its first prompt came out the same both ways (`layers`). Not run on a GPU yet; on a CPU the
operations are the same, and tests run them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from rl_soft.model.adapters import merged_for_now
from rl_soft.rollouts.cache import free_memory
from rl_soft.rollouts.kernels.layers import Layer, Parts, parts_of, patched

SHARE = 0.2  # of the free memory, that copies of weights may take


class Rotation:
    """sin with the signs of its halves, made once per step for all layers."""

    def __init__(self) -> None:
        self._sin: Tensor | None = None
        self._signed: Any = None

    def signed(self, sin: Tensor) -> Tensor:
        if self._sin is not sin:
            half = sin.shape[-1] // 2
            self._sin, self._signed = sin, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        return self._signed


class FewLaunches(Layer):
    """A layer in fewer operations.

    Args:
        joint: whether its plain products are joined, which copies their weights.
    """

    def __init__(self, module: Any, parts: Parts, rotation: Rotation, joint: bool) -> None:
        super().__init__(module, parts)
        p, self.rotation, self.D = parts, rotation, parts.attention.head_dim
        self.Q, self.A = p.q.out_features // self.D, p.k.out_features // self.D
        self.plain_o, self.plain_down = (_is_plain(m) and m.bias is None for m in (p.o, p.down))
        self.qkv = _joined([p.q, p.k, p.v]) if joint and p.q_norm is None else None
        self.gate_up = _joined([p.gate, p.up]) if joint else None

    def takes(self, x: Tensor, cos: Tensor) -> bool:
        return x.dtype == cos.dtype == self.key[1] and x.device.type == self.key[0] and cos.shape[-1] == self.D

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, D, (n, T, _) = self.parts, self.D, x.shape
        h, signed = _norm(p.first_norm, x), self.rotation.signed(sin)
        cos, signed = cos[:, :, None], signed[:, :, None]  # (n or 1, T, 1, D)
        if self.qkv is not None:
            whole = F.linear(h, *self.qkv).view(n, T, -1, D)
            rotated = _rotated(whole[:, :, : self.Q + self.A], cos, signed)
            return rotated[:, :, : self.Q], rotated[:, :, self.Q :], whole[:, :, self.Q + self.A :]
        q, k, v = (module(h).view(n, T, -1, D) for module in (p.q, p.k, p.v))
        q, k = (a if norm is None else _norm(norm, a) for norm, a in ((p.q_norm, q), (p.k_norm, k)))
        return _rotated(q, cos, signed), _rotated(k, cos, signed), v

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        p = self.parts
        if self.plain_o and x.shape[1] == 1:  # of a step nobody reads the input again
            y = x.flatten(0, 1).addmm_(read.flatten(2).flatten(0, 1), p.o.weight.T).view_as(x)
        else:
            y = p.o(read.flatten(2)) + x
        h = _norm(p.second_norm, y)
        gate, up = (p.gate(h), p.up(h)) if self.gate_up is None else F.linear(h, *self.gate_up).chunk(2, dim=-1)
        h = F.silu(gate).mul_(up)
        if not self.plain_down:
            return y + p.down(h)
        return y.flatten(0, 1).addmm_(h.flatten(0, 1), p.down.weight.T).view_as(x)  # on y's own storage


@contextmanager
def few_launches(model: nn.Module, device: str = "cuda") -> Iterator[None]:
    """While on, known layers on `device` take fewer operations in steps and prompts of a rollout. Adapters in float32
    are merged for as long, where there is room for the weights that they are put into."""
    if not any(p.device.type == device for p in model.parameters()):
        yield
        return
    adapted: list[Any] = [m.get_base_layer().weight for m in model.modules() if isinstance(m, Linear)]
    with merged_for_now(model) if adapted and _fits(adapted) else nullcontext():
        found = {m: p for m in model.modules() if (p := parts_of(m)) is not None and _on(p, device)}
        if not found:
            yield
            return
        with patched(_forwards(found), _same_attention):  # whose copies of weights end with it
            yield


def _fits(copied: list[Tensor]) -> bool:
    """Whether copies of these may be made."""
    free = free_memory(copied[0].device)
    return free is None or sum(w.nbytes for w in copied) <= SHARE * free


def _forwards(found: dict[nn.Module, Parts]) -> dict[Any, Any]:
    copied = [m.weight for p in found.values() for m in (p.q, p.k, p.v, p.gate, p.up) if _is_plain(m)]
    joint, rotation = bool(copied) and _fits(copied), Rotation()
    return {module: FewLaunches(module, parts, rotation, joint) for module, parts in found.items()}


def _on(parts: Parts, device: str) -> bool:
    """Whether the weights are there, whole and of one dtype (ZeRO-3 may hold them apart)."""
    weights = [m.weight for m in (*parts.norms, *parts.linears)]
    one = len({w.dtype for w in weights}) == 1 and weights[0].is_floating_point()
    return one and all(w.device.type == device and w.numel() for w in weights)


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def _joined(modules: list[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Weights and biases of products of one input, one below the other; None where one is no plain `nn.Linear`."""
    if not all(map(_is_plain, modules)) or len({m.bias is None for m in modules}) > 1:
        return None
    bias = None if modules[0].bias is None else torch.cat([m.bias for m in modules])
    return torch.cat([m.weight for m in modules]), bias


def _norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, for x (n, T, heads, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed)


def _same_attention(sdpa: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return sdpa(*args, **kwargs)
