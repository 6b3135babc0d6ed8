"""One think step: from the logits and the hidden state at a position to what is fed at the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rl_soft.model.head import LogProb
from rl_soft.thoughts.densities import Dirichlet, SoftToken, dirichlet_log_prob, gumbel_topk_log_prob
from rl_soft.thoughts.noise import gumbel
from rl_soft.thoughts.thinking import CONTROLS, Thinking


def next_thought(logits: Tensor, thinking: Thinking, seeds: Tensor | None = None, position: Any = 0) -> SoftToken:
    """The thought that follows `logits` (B, V); differentiable with respect to them, a drawn dirichlet one apart.

    Args:
        logits: raw logits, any float dtype.
        seeds: (B,) int64 row seeds of the noise; None draws no noise (greedy decoding).
        position: index in the completion, the second coordinate of the noise; an int or (B,) int64.

    Returns:
        SoftToken of support (B, K) int64 and log-weights (B, K) float32, the strongest weight first. Without noise, a
        gumbel thought has the weights softmax_S(phi / tau) of the K most probable ids; a soft thought softmax_S(phi),
        and so has a dirichlet one, whose mean they are. A hybrid thought is a gumbel one here; a hidden thought is
        the strongest id, for the record alone, and draws no noise.
    """
    k = thinking.support_size(logits.shape[-1])
    kind = thinking.kind
    if seeds is not None and kind.has_dirichlet_noise:
        d = Dirichlet(logits, k, thinking.thought_gamma, thinking.thought_temperature)
        return d.sample(seeds=seeds.to(logits.device), position=position)
    z = torch.log_softmax(logits.float() / thinking.thought_temperature, dim=-1)  # (B, V)
    if seeds is not None and kind.has_gumbel_noise:
        z = z + gumbel(seeds.to(z.device), position, z.shape[-1])
    values, support = z.topk(k, dim=-1)  # (B, K)
    return SoftToken(support, torch.log_softmax(values / thinking.mixing_tau, dim=-1))


def density_of(thinking: Thinking) -> tuple[LogProb, float]:
    """The log-density of a thought, as a function of gathered statistics, and its parameter (tau or gamma).

    Positions of tokens are the caller's: only for `gumbel_topk_log_prob` is a one-slot thought a token.
    """
    if thinking.kind.has_dirichlet_noise:
        return dirichlet_log_prob, thinking.thought_gamma
    return gumbel_topk_log_prob, thinking.thought_tau


def mix_embeddings(embedding: nn.Module, support: Tensor, log_weights: Tensor) -> Tensor:
    """Weighted sum of K embeddings per position: (..., K), (..., K) -> (..., H).

    The ids go through the embedding *module*, one slot at a time: its hooks (ZeRO-3 gathering, PEFT's input-gradient
    hook, Gemma's scaling) fire, and backward keeps indices rather than K copies of (..., H). Sums are float32.
    """
    weights = log_weights.exp()
    mixture: Tensor | None = None
    for j in range(support.shape[-1]):
        row = embedding(support[..., j])  # (..., H)
        dtype, row = row.dtype, row * weights[..., j, None]  # float32 or wider
        mixture = row if mixture is None else mixture + row
    assert mixture is not None
    return mixture.to(dtype)


def mix_few(embedding: nn.Module, support: Tensor, log_weights: Tensor) -> Tensor:
    """As `mix_embeddings` of (m, K), in five launches whatever K is: of a decode step, where (m, K, H) is small."""
    rows = embedding(support)  # (m, K, H)
    wide = torch.promote_types(rows.dtype, log_weights.dtype)
    return torch.bmm(log_weights.exp().to(wide)[:, None], rows.to(wide))[:, 0].to(rows.dtype)


def thought_input(
    model: Any, thinking: Thinking, support: Tensor, log_weights: Tensor, hidden: Tensor | None
) -> Tensor:
    """What is fed for a thought; gradients flow to all that it is made of.

    Args:
        model: the causal LM, possibly in a PEFT wrapper.
        support, log_weights: (..., K) int64 and float32, the thought.
        hidden: (..., H), what the LM head read at the position before (after the final norm); read by kinds hidden
            and hybrid.

    Returns:
        (..., H): the mixture of embeddings; the projected hidden state, or that state itself where the model has no
        projector (hidden: Coconut's thought); their gated sum (hybrid).

    Raises:
        ValueError: a hybrid thought and no projector.
    """
    if not thinking.kind.reads_hidden:
        return mix_embeddings(model.get_input_embeddings(), support, log_weights)
    assert hidden is not None
    check_projector(model, thinking)
    projector = getattr(model, "projector", None)
    if projector is None:
        return hidden
    mixture = mix_embeddings(model.get_input_embeddings(), support, log_weights) if thinking.kind.mixes else None
    return projector(hidden, mixture)


def check_projector(model: Any, thinking: Thinking) -> None:
    """Raises ValueError for a hybrid thought and a model without a projector."""
    if thinking.kind.needs_projector and getattr(model, "projector", None) is None:
        raise ValueError(
            f"thought {thinking.thought} needs a model with a projector; start from a CODI run with hidden or hybrid"
        )


def disturb(fed: Tensor, control: str, first: Tensor) -> Tensor:
    """Controls of an analysis: what is fed for a thought, with its content taken away.

    Args:
        fed: (B, H), what would be fed at this position to rows that all have a thought here.
        control: none; zero: a vector of zeros; shuffle: the thought of the row before (the last row's for the first),
            so rows must be different problems; repeat: the row's first thought again.
        first: (B, H), what was fed for the rows' first thoughts; `fed` itself at the first.

    Raises:
        ValueError: an unknown control.
    """
    if control == "none":
        return fed
    if control == "zero":
        return torch.zeros_like(fed)
    if control == "shuffle":
        return fed.roll(1, dims=0)
    if control == "repeat":
        return first
    raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}")


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, T) int64: how many tokens of the mask (B, T) stand before each."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_state(output: Any) -> Tensor | None:
    """(B, H), what the LM head read at the last position; None where the forward was not asked for hidden states."""
    return output.hidden_states[-1][:, -1] if output.hidden_states else None


def think(
    forward: Any,
    model: Any,
    logits: Tensor,
    hidden: Tensor | None,
    cache: Any,
    mask: Tensor,
    thinking: Thinking,
    seeds: Tensor | None,
    first_position: int = 0,
    control: str = "none",
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """n thoughts on a cache, differentiable from the first to the last.

    Args:
        forward: called with `inputs_embeds`; must return logits, and hidden states when asked: `model` or a wrapper.
        model: whose embeddings and projector make what is fed.
        logits, hidden: (B, V) and (B, H) after the prompt, from which the first thought is made; see `last_state`.
        mask: (B, P) attention mask of what the cache holds.
        seeds, first_position: address of the first thought's noise, see `next_thought`.
        control: what is done to the thoughts fed, see `disturb`.
        keep_logits: whether the logits are wanted. In training they would be held for nothing.

    Returns:
        mask (B, P + n), the position (B, 1) of the next input, and, where they are kept, the n + 1 logits (B, V) seen
        at <bot> and at each thought. The last thought's predict a fed position.
    """
    position = mask.sum(-1, keepdim=True)  # (B, 1)
    seen = [logits] if keep_logits else []
    first: Tensor | None = None
    for t in range(thinking.num_thoughts):
        thought = next_thought(logits, thinking, seeds, first_position + t)  # (B, K)
        fed = thought_input(model, thinking, thought.support, thought.log_weights, hidden)  # (B, H)
        first = fed if first is None else first
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = forward(
            inputs_embeds=disturb(fed, control, first)[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=thinking.kind.reads_hidden,
        )
        logits, hidden = out.logits[:, -1], last_state(out)
        if keep_logits:
            seen.append(logits)
        position = position + 1
    return mask, position, seen
