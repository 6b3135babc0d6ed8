"""What a row does in a rollout: sample a position, write it down, find out what comes next.

Each row walks through the stages THINK -> FORCED -> ANSWER -> DONE. A gumbel thought is a Gumbel top-K sample of the
next-token distribution; an answer token is the strongest id of the same sample (the Gumbel-max trick), so one draw
of noise and one top-K serve both. Other kinds draw their answer tokens apart. FORCED positions (<eot>, the answer
prompt) are fed, not sampled: they have no density and stay out of the loss.

Everything stays on the device, and the CPU reads no number of it: rows in different stages, at different positions,
are sampled together (`engine` moves them). The noise of a row depends on its seed and position only.

Shapes: B rows in all, S places for live rows, m rows that are sampled together, T positions, K slots, V vocabulary, H
hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rl_soft.model.think import density_of, next_thought
from rl_soft.rollouts.kernels import sampling
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.densities import GumbelTopK, SoftToken, fill_absent, is_present
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import gumbel
from rl_soft.thoughts.thinking import Thinking

THINK, FORCED, ANSWER, DONE = 0, 1, 2, 3


@dataclass(frozen=True)
class Rollout:
    """B completions, right-padded to the longest, T positions of K slots. Tensors live on the model's device.

    Log-densities, entropy and outside mass are those of the whole distribution at its temperature, also where it was
    cut (`decoding`) before a position was drawn from it.
    """

    prompt_ids: list[list[int]]
    completion_ids: Tensor  # (B, T) int64; latent thoughts hold <bot>, explicit ones their strongest id
    mask: Tensor  # (B, T) bool, the positions that exist
    action_mask: Tensor  # (B, T) bool, of those the sampled ones (thoughts and answer tokens)
    thought_mask: Tensor  # (B, T) bool, of those the thoughts
    support: Tensor  # (B, T, K) int64, the strongest weight first
    log_weights: Tensor  # (B, T, K) float32, logsumexp 0; -inf at absent slots; a token is [0, -inf, ...]
    log_probs: Tensor  # (B, T) float32: density at thoughts, probability at answer tokens, 0 elsewhere
    support_log_probs: Tensor  # (B, T, K) float32: ln pi of the slots' ids, 0 where nothing was sampled
    entropy: Tensor  # (B, T) float32, nats
    outside: Tensor  # (B, T) float32, probability mass outside the support
    finished: Tensor  # (B,) bool, ended by an end-of-sequence token
    failed: Tensor  # (B,) bool, stopped by logits that are not finite; all of action_mask is off there
    seeds: Tensor  # (B,) int64

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)  # (B,)


@dataclass
class Live:
    """What is known of the rows in S places."""

    row: Tensor  # (S,) int64, its number in the rollout
    seed: Tensor  # (S,) int64
    t: Tensor  # (S,) int64, the position in the completion that is sampled next; T once the row is done
    stage: Tensor  # (S,) int64, of that position: THINK, FORCED, ANSWER or DONE
    position: Tensor  # (S,) int64, of the next input, in the sequence
    thoughts: Tensor  # (S,) int64, positions in stage THINK so far
    fed: Tensor  # (S,) int64, in stage FORCED
    answered: Tensor  # (S,) int64, in stage ANSWER
    capped: Tensor  # (S,) int64, how the thoughts end: 0 on their own, 1 at the cap
    recent: Tensor  # (S, E) int64, the last strongest ids of the thoughts, as many as the end text has
    is_thought: Tensor  # (S,) bool, whether the next input is a thought
    support: Tensor  # (S, K) int64, the next input
    log_weights: Tensor  # (S, K) float32, its log-weights
    hidden: Tensor | None = None  # (S, H), what the LM head has read; kept where a thought is made of it
    first: Tensor | None = None  # (S, H), the first thought; kept for control `repeat`
    cold: Tensor | None = None  # (S,) int64, the last thoughts in a row that were cold; kept for the cold stop

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def part(self, places: slice) -> Live:
        """Views of some places."""
        return Live(**{name: x[places] for name, x in self.tensors().items()})

    def move(self, to: Tensor, place: Tensor) -> None:
        for x in self.tensors().values():
            x[to] = x[place]

    def write(self, **values: Any) -> None:
        """In place; numbers or tensors."""
        for name, value in values.items():
            getattr(self, name)[:] = value


class Walk:
    """The rules of one rollout and the records of its rows.

    Args:
        vocab_size: V.
        B: rows; the records have one position more than a completion can have, which rows that are done write to.
        seeds: (B,) int64; None decodes greedily.
        eos_ids: ids that end a completion.
        decoding: cuts and the cold stop; None for neither.
    """

    def __init__(
        self,
        layout: Layout,
        vocab_size: int,
        B: int,
        seeds: Tensor | None,
        eos_ids: Sequence[int],
        device: torch.device,
        decoding: Decoding | None = None,
    ) -> None:
        self.decoding = decoding or Decoding()
        self.layout, self.thinking, self.greedy, self.device = layout, layout.thinking, seeds is None, device
        self.pad_id = pad_id = layout.tokenizer.pad_token_id
        self.T = T = layout.max_completion_length
        self.K = K = layout.thinking.support_size(vocab_size)
        self.eos, self.end = (torch.tensor(list(ids), device=device) for ids in (eos_ids, layout.end_ids))
        forced = [layout.forced_after_end, layout.forced_after_cap]  # rows as `Live.capped` numbers them
        self.forced_length = torch.tensor([len(f) for f in forced], device=device)  # (2,)
        width = max(1, *map(len, forced))
        self.forced_ids = torch.tensor([f + [pad_id] * (width - len(f)) for f in forced], device=device)  # (2, F)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(B, *shape, dtype=dtype, device=device)

        self.out = Rollout(
            prompt_ids=[],
            completion_ids=torch.full((B, T + 1), pad_id, device=device),
            mask=zeros(T + 1, dtype=torch.bool),
            action_mask=zeros(T + 1, dtype=torch.bool),
            thought_mask=zeros(T + 1, dtype=torch.bool),
            support=torch.full((B, T + 1, K), pad_id, device=device),
            log_weights=_token_log_weights(zeros(T + 1, K)),
            log_probs=zeros(T + 1),
            support_log_probs=zeros(T + 1, K),
            entropy=zeros(T + 1),
            outside=zeros(T + 1),
            finished=zeros(dtype=torch.bool),
            failed=zeros(dtype=torch.bool),
            seeds=zeros(dtype=torch.int64) if seeds is None else seeds.to(device),
        )

    def places(self, S: int, hidden: Tensor | None, first: Tensor | None) -> Live:
        """S free places; `hidden` and `first` (., H) are examples of what is to be kept."""
        counters = ("row", "seed", "t", "stage", "position", "thoughts", "fed", "answered", "capped")
        zeros = {name: torch.zeros(S, dtype=torch.int64, device=self.device) for name in counters}
        return Live(
            **zeros,
            recent=torch.zeros(S, max(1, len(self.end)), dtype=torch.int64, device=self.device),
            is_thought=torch.zeros(S, dtype=torch.bool, device=self.device),
            support=torch.zeros(S, self.K, dtype=torch.int64, device=self.device),
            log_weights=torch.zeros(S, self.K, device=self.device),
            hidden=None if hidden is None else hidden.new_zeros(S, hidden.shape[-1]),
            first=None if first is None else first.new_zeros(S, first.shape[-1]),
            cold=torch.zeros(S, dtype=torch.int64, device=self.device) if self.decoding.cold_stop_entropy else None,
        )

    def start(self, live: Live, row: Tensor, position: Tensor) -> None:
        """Put rows (m,), which stand at `position` (m,), in the places of `live`."""
        stage = THINK if self.thinking.num_thoughts else FORCED
        live.write(row=row, seed=self.out.seeds[row], t=0, stage=stage, position=position)
        live.write(thoughts=0, fed=0, answered=0, capped=1, recent=-1)
        if live.cold is not None:
            live.write(cold=0)

    def forget(self, row: Tensor) -> None:
        """As if these rows had not begun."""
        out = self.out
        for x in (out.mask, out.action_mask, out.thought_mask, out.finished, out.failed):
            x[row] = False

    def result(self, prompt_ids: list[list[int]]) -> Rollout:
        """The records, cut to the longest completion; a row that failed has no actions, so nothing learns from it."""
        self.out.action_mask[self.out.failed] = False
        T = int(self.out.mask[:, : self.T].sum(-1).max())
        cut: dict[str, Any] = {name: x[:, :T].clone() for name, x in vars(self.out).items() if name in POSITIONS}
        return replace(self.out, prompt_ids=prompt_ids, **cut)

    def sample(self, live: Live, logits: Tensor, hidden: Tensor | None) -> None:
        """Draw the next position of m rows, write it down, and find out what comes after it.

        Args:
            logits: (m, V), any float dtype; hidden: (m, H), what they were made from, where it is kept.
        """
        thinking, out = self.thinking, self.out
        is_thought, is_forced, is_answer = live.stage == THINK, live.stage == FORCED, live.stage == ANSWER
        exists = live.stage != DONE
        temperature = torch.where(is_thought, thinking.thought_temperature, thinking.temperature)
        seeds, fused = None if self.greedy else live.seed, None
        if seeds is not None and thinking.kind.has_gumbel_noise and not self.decoding.cuts:
            fused = sampling.draw(logits, temperature, self.K, seeds, live.t)
        if fused is not None:
            action = SoftToken(fused.support, torch.log_softmax(fused.values / thinking.mixing_tau, dim=-1))
        else:
            scaled = logits.float() / temperature[:, None]  # (m, V)
            phi = torch.log_softmax(scaled, dim=-1)
            if self.decoding.cuts:
                action = self._draw_cut(phi, is_thought, seeds, live.t)
            else:
                action = draw(scaled, phi, is_thought, thinking, seeds, live.t)
        top = action.support[:, 0]

        forced = self.forced_ids[live.capped, live.fed.clamp(max=self.forced_ids.shape[1] - 1)]
        ids = torch.where(is_forced, forced, top)
        support = torch.where(is_thought[:, None], action.support, self.pad_id)  # (m, K)
        support[:, 0] = ids
        log_weights = torch.where(is_thought[:, None], action.log_weights, _token_log_weights(action.log_weights))

        inside, _ = fill_absent(support, is_present(log_weights))
        if fused is not None:
            support_log_probs, entropy = fused.support_log_probs(support), fused.entropy
            log_outside = fused.log_outside(inside)
        else:
            support_log_probs = phi.gather(-1, support)  # (m, K)
            phi.clamp_(min=-1e4)  # p ln p is 0 at p = 0
            p = phi.exp()
            entropy = -torch.linalg.vecdot(p, phi)
            log_outside = _log_outside(p, phi, inside)
        log_prob, parameter = density_of(thinking)
        density = log_prob(support_log_probs, log_outside, log_weights, parameter)
        density = torch.where(is_thought, density, support_log_probs[:, 0])

        # A row whose logits are not finite stops here; the position stays, without an action.
        bad = exists & ~entropy.isfinite()
        sampled, thought = (is_thought | is_answer) & ~bad, is_thought & ~bad
        ids = torch.where(bad, self.pad_id, ids)
        support = torch.where(bad[:, None], self.pad_id, support)
        log_weights = torch.where(bad[:, None], _token_log_weights(log_weights), log_weights)
        self._record(
            live,
            completion_ids=torch.where(is_thought, self.layout.bot_id, ids) if thinking.phase == "latent" else ids,
            mask=exists,
            action_mask=sampled,
            thought_mask=thought,
            support=support,
            log_weights=log_weights,
            log_probs=torch.where(sampled, density, 0.0),
            support_log_probs=torch.where(sampled[:, None], support_log_probs, 0.0),
            entropy=torch.where(sampled, entropy, 0.0),
            outside=torch.where(sampled, log_outside.exp(), 0.0),
        )

        # Which stage the next position of each row is in.
        thoughts, fed, answered = live.thoughts + is_thought, live.fed + is_forced, live.answered + is_answer
        recent = torch.where(is_thought[:, None], torch.cat([live.recent[:, 1:], top[:, None]], dim=1), live.recent)
        said_end = is_thought & (recent == self.end).all(-1) if len(self.end) else torch.zeros_like(is_thought)
        at_cap = is_thought & ~said_end & (thoughts >= thinking.num_thoughts)
        if live.cold is not None:  # what the last of too many cold thoughts ends is ended as at the cap
            is_cold = is_thought & (entropy < self.decoding.cold_stop_entropy)
            live.write(cold=torch.where(is_cold, live.cold + 1, 0))
            at_cap = at_cap | (is_thought & ~said_end & (live.cold >= self.decoding.cold_stop_length))
        capped = torch.where(said_end, 0, live.capped)
        ready = torch.where(capped == 0, self.forced_length[0], self.forced_length[1])
        stage = torch.where(said_end | at_cap, torch.where(ready > 0, FORCED, ANSWER), live.stage)
        stage = torch.where(is_forced & (fed >= ready), ANSWER, stage)
        may_stop = is_answer | is_thought if thinking.phase == "explicit" else is_answer
        stops = may_stop & ~bad & (top[:, None] == self.eos).any(-1)
        stage = torch.where(stops | bad | (is_answer & (answered >= thinking.max_answer_tokens)), DONE, stage)
        out.finished[live.row] |= stops
        out.failed[live.row] |= bad
        t = torch.where(stage == DONE, self.T, live.t + 1)
        live.write(stage=stage, t=t, thoughts=thoughts, fed=fed, answered=answered, capped=capped, recent=recent)
        live.write(is_thought=thought, support=support, log_weights=log_weights)
        if live.hidden is not None:
            live.write(hidden=hidden)

    def _draw_cut(self, phi: Tensor, is_thought: Tensor, seeds: Tensor | None, position: Tensor) -> SoftToken:
        """`draw` from what is left of phi (m, V); where fewer than K ids are, the other slots are absent."""
        left = self.decoding.cut(phi, is_thought, self.thinking)
        slots = min(self.decoding.slots_drawn(self.thinking, self.K), phi.shape[-1])
        wide = replace(self.thinking, thought_k=slots)
        support, log_weights = draw(left, left, is_thought, wide, seeds, position)
        log_weights = log_weights[:, : self.K].log_softmax(-1)
        return SoftToken(support[:, : self.K].masked_fill(~is_present(log_weights), self.pad_id), log_weights)

    def _record(self, live: Live, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self.out, name)[live.row, live.t] = value


POSITIONS = (  # of `Rollout`, what has a value per position
    "completion_ids", "mask", "action_mask", "thought_mask", "support", "log_weights", "log_probs",
    "support_log_probs", "entropy", "outside",
)  # fmt: skip


def draw(
    scaled: Tensor, phi: Tensor, is_thought: Tensor, thinking: Thinking, seeds: Tensor | None, position: Any
) -> SoftToken:
    """A thought or a token per row; slot 0 is the token. What `think.next_thought` makes, with one softmax for all.

    Args:
        scaled: (m, V) float32 logits, already divided by each row's temperature; phi: (m, V), their log-softmax.
    """
    kind = thinking.kind
    if seeds is None or kind.has_dirichlet_noise:
        action = next_thought(scaled, replace(thinking, thought_temperature=1.0), seeds, position)
    else:
        z = gumbel(seeds, position, phi.shape[-1]).add_(phi) if kind.has_gumbel_noise else phi
        values, support = z.topk(thinking.support_size(phi.shape[-1]), dim=-1)  # (m, K)
        action = SoftToken(support, torch.log_softmax(values / thinking.mixing_tau, dim=-1))
    if seeds is not None and not kind.has_gumbel_noise:  # tokens have noise of their own
        token = GumbelTopK(scaled, 1, 1.0).sample(seeds=seeds, position=position).support
        action.support[:, :1] = torch.where(is_thought[:, None], action.support[:, :1], token)
    return action


def _log_outside(p: Tensor, phi: Tensor, ids: Tensor) -> Tensor:
    """(m,) ln of the mass outside `ids` (m, K), summed over the complement; writes into p and phi, both (m, V)."""
    mass = p.scatter_(-1, ids, 0.0).sum(-1)
    if mass.device.type == "cpu" and bool((mass > 1e-30).all()):
        return mass.log()
    return phi.scatter_(-1, ids, -torch.inf).logsumexp(-1)  # nothing underflows; a GPU takes this way, and no look


def _token_log_weights(like: Tensor) -> Tensor:
    """Log-weights (..., K) of a token: [0, -inf, ...]."""
    log_weights = torch.full_like(like, -torch.inf)
    log_weights[..., 0] = 0.0
    return log_weights
