"""Soft rollouts: prefill, think, answer on one KV cache.

Each row walks through the phases THINK -> FORCED -> ANSWER -> DONE. A gumbel thought is a Gumbel top-K sample of the
next-token distribution; an answer token is the strongest id of the same sample (the Gumbel-max trick), so one draw
of noise and one top-K serve both. Other kinds draw their answer tokens apart. FORCED positions (<eot>, the answer
prompt) are fed, not sampled: they have no density and stay out of the loss.

Prompts that repeat are prefilled once and share their cache rows; rows that are done leave the batch. The noise of a
row depends on its seed and position only (`noise`), so a rollout does not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rl_soft.densities import GumbelTopK, SoftToken
from rl_soft.layout import Layout, Thinking
from rl_soft.policy import density_of, mix_embeddings, next_thought, position_ids

THINK, FORCED, ANSWER, DONE = 0, 1, 2, 3


@dataclass(frozen=True)
class Rollout:
    """B completions, right-padded to the longest, T positions of K slots. Tensors live on the model's device."""

    prompt_ids: list[list[int]]
    completion_ids: Tensor  # (B, T) int64; latent thoughts hold <bot>, explicit ones their strongest id
    mask: Tensor  # (B, T) bool, the positions that exist
    action_mask: Tensor  # (B, T) bool, of those the sampled ones (thoughts and answer tokens)
    thought_mask: Tensor  # (B, T) bool, of those the thoughts
    support: Tensor  # (B, T, K) int64, the strongest weight first
    log_weights: Tensor  # (B, T, K) float32, logsumexp 0; -inf at absent slots; a token is [0, -inf, ...]
    log_probs: Tensor  # (B, T) float32: density at thoughts, probability at answer tokens, 0 elsewhere
    support_log_probs: Tensor  # (B, T, K) float32: ln pi of the slots' ids, 0 where nothing was sampled
    entropy: Tensor  # (B, T) float32, nats, of the categorical that the action was drawn from
    outside: Tensor  # (B, T) float32, probability mass outside the support
    finished: Tensor  # (B,) bool, ended by an end-of-sequence token
    seeds: Tensor  # (B,) int64

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)  # (B,)


def _prefill(model: Any, prompt_ids: Sequence[Sequence[int]], pad_id: int):
    """Run every distinct prompt once. Returns last logits (B, V), cache, mask (B, P) and lengths (B,), per row."""
    device = model.get_input_embeddings().weight.device
    distinct: dict[tuple[int, ...], int] = {}
    row_to_prompt = torch.tensor([distinct.setdefault(tuple(p), len(distinct)) for p in prompt_ids], device=device)
    P = max(map(len, distinct))
    ids = torch.tensor([[pad_id] * (P - len(p)) + list(p) for p in distinct], device=device)  # (U, P)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in distinct], device=device)
    cache = DynamicCache(config=model.config)
    out = model(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_select_indices(row_to_prompt)
    mask = mask[row_to_prompt]
    return out.logits[row_to_prompt, -1], cache, mask, mask.sum(-1)


@torch.no_grad()
def rollout(
    model: Any,
    layout: Layout,
    prompt_ids: Sequence[Sequence[int]],
    seeds: Tensor | None,
    eos_ids: Sequence[int],
    compact_every: int = 8,
) -> Rollout:
    """One completion for each prompt.

    Args:
        model: the causal LM (with its adapter, if any), in eval-like state; called with `inputs_embeds`.
        prompt_ids: B prompts; equal ones share a prefill.
        seeds: (B,) int64, see `noise.address`; None decodes greedily (no noise at all).
        eos_ids: ids that end a completion.
        compact_every: steps between looks at which rows are done (each look synchronises the device).

    Returns:
        `Rollout`; log-densities are of the policy at the temperatures in `layout.thinking`.
    """
    thinking, pad_id = layout.thinking, layout.tokenizer.pad_token_id
    logits, cache, attention_mask, next_position = _prefill(model, prompt_ids, pad_id)
    device, B = logits.device, len(prompt_ids)
    K, T = thinking.support_size(logits.shape[-1]), layout.max_completion_length
    embedding = model.get_input_embeddings()
    log_prob, parameter = density_of(thinking)
    eos = torch.tensor(list(eos_ids), device=device)
    end = torch.tensor(layout.end_ids, device=device)
    placeholder = layout.bot_id if thinking.phase == "latent" else None

    # What is fed after the thoughts: row 0 when they ended on their own, row 1 when they hit the cap.
    forced = [layout.forced_after_end, layout.forced_after_cap]
    forced_length = torch.tensor([len(f) for f in forced], device=device)  # (2,)
    width = max(1, *map(len, forced))
    forced_ids = torch.tensor([f + [pad_id] * (width - len(f)) for f in forced], device=device)  # (2, F)

    completion_ids = torch.full((B, T), pad_id, device=device)
    mask, action_mask, thought_mask = (torch.zeros(B, T, dtype=torch.bool, device=device) for _ in range(3))
    support = torch.full((B, T, K), pad_id, device=device)
    log_weights = torch.full((B, T, K), -torch.inf, device=device)
    log_weights[..., 0] = 0.0
    support_log_probs = torch.zeros(B, T, K, device=device)
    log_probs, entropy, outside = (torch.zeros(B, T, device=device) for _ in range(3))
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    all_seeds = torch.zeros(B, dtype=torch.int64, device=device) if seeds is None else seeds.to(device)

    rows = torch.arange(B, device=device)  # the rows still in the batch
    phase = torch.full((B,), THINK if thinking.num_thoughts else FORCED, device=device)
    capped = torch.ones(B, dtype=torch.int64, device=device)  # which row of `forced`
    fed, thoughts, answered = (torch.zeros(B, dtype=torch.int64, device=device) for _ in range(3))
    recent = torch.full((B, max(1, len(layout.end_ids))), -1, device=device)  # last strongest ids of the thoughts

    for t in range(T):
        is_thought, is_forced, is_answer = phase == THINK, phase == FORCED, phase == ANSWER
        live = phase != DONE
        temperature = torch.where(is_thought, thinking.thought_temperature, thinking.temperature)
        scaled = logits.float() / temperature[:, None]  # (L, V)
        action = _draw(scaled, is_thought, thinking, None if seeds is None else all_seeds[rows], t)
        top = action.support[:, 0]

        ids = torch.where(is_forced, forced_ids[capped, fed.clamp(max=width - 1)], top)
        slots = torch.where(is_thought[:, None], action.support, pad_id)  # (L, K)
        slots[:, 0] = ids
        weights = torch.full_like(action.log_weights, -torch.inf)
        weights[:, 0] = 0.0
        weights = torch.where(is_thought[:, None], action.log_weights, weights)

        phi = torch.log_softmax(scaled, dim=-1)
        sampled = is_thought | is_answer
        phi_support = phi.gather(-1, slots)
        absent = weights.isneginf()
        log_outside = phi.scatter(-1, torch.where(absent, slots[:, :1], slots), -torch.inf).logsumexp(-1)
        density = torch.where(is_thought, log_prob(phi_support, log_outside, weights, parameter), phi_support[:, 0])

        shown = ids if placeholder is None else torch.where(is_thought, placeholder, ids)
        completion_ids[rows, t] = torch.where(live, shown, pad_id)
        mask[rows, t], action_mask[rows, t], thought_mask[rows, t] = live, sampled, is_thought
        support[rows, t] = torch.where(live[:, None], slots, pad_id)
        log_weights[rows, t] = weights
        log_probs[rows, t] = torch.where(sampled, density, 0.0)
        support_log_probs[rows, t] = torch.where(sampled[:, None], phi_support, 0.0)
        entropy[rows, t] = torch.where(sampled, -(phi.exp() * phi.clamp(min=-1e4)).sum(-1), 0.0)
        outside[rows, t] = torch.where(sampled, log_outside.exp(), 0.0)

        # Which phase the next position of each row is in.
        thoughts, fed, answered = thoughts + is_thought, fed + is_forced, answered + is_answer
        recent = torch.where(is_thought[:, None], torch.cat([recent[:, 1:], top[:, None]], dim=1), recent)
        said_end = is_thought & (recent == end).all(-1) if len(end) else torch.zeros_like(is_thought)
        at_cap = is_thought & ~said_end & (thoughts >= thinking.num_thoughts)
        is_eos = torch.isin(top, eos)
        capped = torch.where(said_end, 0, capped)
        ready = torch.where(capped == 0, forced_length[0], forced_length[1])
        phase = torch.where(said_end | at_cap, torch.where(ready > 0, FORCED, ANSWER), phase)
        phase = torch.where(is_forced & (fed >= ready), ANSWER, phase)
        stops = is_answer & is_eos
        if thinking.phase == "explicit":
            stops = stops | (is_thought & is_eos)
        phase = torch.where(stops | (is_answer & (answered >= thinking.max_answer_tokens)), DONE, phase)
        finished[rows] |= stops

        if t == T - 1:
            break
        if t % compact_every == compact_every - 1 or t + 1 >= T - thinking.max_answer_tokens:
            keep = (phase != DONE).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) <= 0.75 * len(rows):
                rows, phase, capped, fed, thoughts, answered, recent, slots, weights, attention_mask, next_position = (
                    x[keep]
                    for x in (
                        rows, phase, capped, fed, thoughts, answered, recent, slots, weights, attention_mask,
                        next_position,
                    )
                )  # fmt: skip
                cache.batch_select_indices(keep)

        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
        logits = model(
            inputs_embeds=mix_embeddings(embedding, slots, weights)[:, None],  # (L, 1, H)
            attention_mask=attention_mask,
            position_ids=next_position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        next_position = next_position + 1

    T = int(mask.sum(-1).max())
    return Rollout(
        prompt_ids=[list(p) for p in prompt_ids],
        completion_ids=completion_ids[:, :T],
        mask=mask[:, :T],
        action_mask=action_mask[:, :T],
        thought_mask=thought_mask[:, :T],
        support=support[:, :T],
        log_weights=log_weights[:, :T],
        log_probs=log_probs[:, :T],
        support_log_probs=support_log_probs[:, :T],
        entropy=entropy[:, :T],
        outside=outside[:, :T],
        finished=finished,
        seeds=all_seeds,
    )


def _draw(scaled: Tensor, is_thought: Tensor, thinking: Thinking, seeds: Tensor | None, step: int) -> SoftToken:
    """A thought or a token a row, from logits already divided by each row's temperature; slot 0 is the token."""
    action = next_thought(scaled, replace(thinking, thought_temperature=1.0), seeds, step)
    if thinking.thought in ("soft", "dirichlet") and seeds is not None:  # an answer token has Gumbel noise of its own
        token = GumbelTopK(scaled, 1, 1.0).sample(seeds=seeds, step=step).support
        action.support[:, :1] = torch.where(is_thought[:, None], action.support[:, :1], token)
    return action
