"""What a model does between the states of its trunk and its logits, found by asking it.

The training pass multiplies states with the head's weight itself, chunk by chunk (`head`), so it must know what else
the model does there: Granite divides its logits by a number, Cohere multiplies them, MiniCPM divides the states, Gemma
2 caps them. A list of such models would be out of date with the next release. So the model's own forward is run once
with random states in place of its trunk's, and its logits are compared with the head's of the same states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from rl_soft.model.side_modules import trunk_of

ROWS, COLUMNS = 2, 8  # of random states; each gives a logit per id of the vocabulary
SPREAD = 4.0  # standard deviation of the head's output: a cap, or anything else that is not linear, then shows
ROUNDING = 4e-6  # of the largest logit, that two ways to the same float32 logits may differ by


class LogitMap(NamedTuple):
    """logits = cap(scale * head(states)), where cap(l) = softcap * tanh(l / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def temperature(self, temperature: Any) -> Any:
        """T for passes over the head's raw output, where the scale belongs to the temperature: exact in float32."""
        return temperature if self.scale == 1 else temperature / self.scale

    @property
    def raw_softcap(self) -> float | None:
        """The cap of the head's raw output: s * head / T capped at c is head / (T / s) capped at c / s."""
        return None if self.softcap is None else self.softcap / self.scale


@torch.no_grad()
def logit_map(model: Any) -> LogitMap:
    """The map of a causal LM, checked to rounding.

    The scale is a number of the configuration (or its inverse) where one fits, so that it is exact in bfloat16 too;
    else the factor that fits best.

    Args:
        model: a causal LM of transformers, without its PEFT wrapper, before any other wrapper. Weights that ZeRO-3 has
            partitioned are gathered, those of the trunk apart.

    Raises:
        ValueError: logits that are no such map of the head's output, with the model type and the distance.
    """
    config, head, trunk = model.config.get_text_config(), model.get_output_embeddings(), trunk_of(model)
    if head is None or trunk is model:
        raise _refused(model, "it has no output embeddings that read the states of a trunk")
    softcap = getattr(config, "final_logit_softcapping", None)
    with _gathered(model, trunk, head):
        weight = next(head.parameters())
        size = getattr(head, "in_features", config.hidden_size)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(ROWS, COLUMNS, size, generator=generator).to(weight.device)
        dtype = weight.dtype if weight.is_floating_point() else model.dtype
        spread = head(states.to(dtype)).float().std()
        states = (states * (SPREAD / spread)).to(dtype) if 0 < spread < torch.inf else states.to(dtype)
        raw = head(states).double()
        with _in_place_of(trunk, states):
            ids = torch.zeros(ROWS, COLUMNS, dtype=torch.int64, device=weight.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.double()
    if logits.shape != raw.shape:
        raise _refused(
            model, f"its head gives {raw.shape[-1]} numbers per position, and its logits are {logits.shape[-1]}"
        )

    def distance(scale: float) -> float:
        ours = raw * scale if softcap is None else softcap * (raw * (scale / softcap)).tanh()
        return float((ours - logits).abs().max() / logits.abs().max().clamp(min=1e-12))

    allowed = max(ROUNDING, 4 * torch.finfo(dtype).eps)
    best = min(_numbers(config), key=distance)
    if distance(best) > allowed:
        fitted = float((raw * logits).sum() / (raw * raw).sum().clamp(min=1e-12))
        best = fitted if fitted > 0 and distance(fitted) < distance(best) else best
    if not distance(best) <= allowed:
        raise _refused(
            model,
            f"its logits are not those of its head times a factor (off by {distance(best):.2g} of the largest, and "
            f"rounding is {allowed:.1g})",
        )
    return LogitMap(best, softcap)


def _refused(model: Any, reason: str) -> ValueError:
    name = f"{type(model).__name__} (model_type {model.config.get_text_config().model_type})"
    return ValueError(f"model {name} cannot be trained with soft rollouts: {reason}")


def _numbers(config: Any) -> list[float]:
    """1, then the positive numbers of the configuration and their inverses."""
    values = [v for v in config.to_dict().values() if isinstance(v, int | float) and not isinstance(v, bool)]
    return [1.0, *(float(x) for v in values if 0 < v < 1e6 for x in (v, 1 / v))]


class _TrunkOutput(BaseModelOutputWithPast):
    """States, and None for whatever else a model takes from its trunk's output."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _in_place_of(trunk: Any, states: Tensor) -> Iterator[None]:
    """The trunk returns these states, whatever it is called with."""
    own = vars(trunk).get("forward")
    trunk.forward = lambda *args, **kwargs: _TrunkOutput(last_hidden_state=states)
    try:
        yield
    finally:
        del trunk.forward
        if own is not None:
            trunk.forward = own


def _gathered(model: Any, trunk: Any, head: Any) -> Any:
    """Whole weights of the head, and of what lies outside of the trunk, where ZeRO-3 has partitioned them."""
    inside = {id(p) for p in trunk.parameters()} - {id(p) for p in head.parameters()}
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id") and id(p) not in inside]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)
