"""What a row does in a rollout: draw a position, find out what comes next. One set of rules for both engines.

Each row walks through the stages THINK -> FORCED -> ANSWER -> DONE. A gumbel thought is a Gumbel top-K sample of the
next-token distribution; an answer token is the strongest id of the same sample (the Gumbel-max trick), so one draw
of noise and one top-K serve both. Other kinds draw their answer tokens apart. FORCED positions (<eot>, the answer
prompt) are fed, not sampled: they have no density and stay out of the loss.

    draw      a position of each row, from its logits: changes nothing
    advance   the state of each row, by what was drawn
    record    what was drawn (`recording`)

Everything stays on the device, and the CPU reads no number of it: rows in different stages, at different positions,
are drawn together (`engine` moves them). The noise of a row depends on its seed and position only.

Shapes: S places for rows, m rows that are drawn together, K slots, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_soft.model.think import density_of, next_thought
from rl_soft.rollouts.kernels import sampling
from rl_soft.rollouts.switching import log_prob_of_mode, soft_mode, switched
from rl_soft.thoughts import densities
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.densities import GumbelTopK, SoftToken, fill_absent, is_present
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import gumbel
from rl_soft.thoughts.thinking import Thinking

THINK, FORCED, ANSWER, DONE = 0, 1, 2, 3


@dataclass
class State:
    """Where S rows stand."""

    seed: Tensor  # (S,) int64
    t: Tensor  # (S,) int64, the position in the completion that is drawn next; that of the last one once it is done
    stage: Tensor  # (S,) int64, of that position: THINK, FORCED, ANSWER or DONE
    thoughts: Tensor  # (S,) int64, positions in stage THINK so far
    fed: Tensor  # (S,) int64, in stage FORCED
    answered: Tensor  # (S,) int64, in stage ANSWER
    capped: Tensor  # (S,) int64, how the thoughts end: 0 on their own, 1 at the cap
    said: Tensor  # (S,) int64, characters of the end of thinking that the thoughts have said, see `EndOfThinking`
    cold: Tensor  # (S,) int64, the last thoughts in a row that were cold
    mode: Tensor  # (S,) int64, 1 where the last thought was soft, 0 where it was a token (`switching`)
    dwell: Tensor  # (S,) int64, thoughts since the mode changed
    reference: Tensor  # (S,) int64, the entropy at that change, in millionths of a nat

    def write(self, **values: Any) -> None:
        """In place; numbers or tensors."""
        for name, value in values.items():
            getattr(self, name)[:] = value


COUNTERS = tuple(f.name for f in fields(State))


@dataclass
class Position:
    """What was drawn for m rows; what each field means stands at `recording.Rollout`."""

    completion_ids: Tensor  # (m,) int64
    mask: Tensor  # (m,) bool
    action_mask: Tensor  # (m,) bool
    thought_mask: Tensor  # (m,) bool
    support: Tensor  # (m, K) int64
    log_weights: Tensor  # (m, K) float32
    log_probs: Tensor  # (m,) float32
    support_log_probs: Tensor  # (m, K) float32
    entropy: Tensor  # (m,) float32
    outside: Tensor  # (m,) float32
    strongest: Tensor  # (m,) int64, the id that was drawn, also where another one is fed
    bad: Tensor  # (m,) bool, logits that are not finite
    kept: Tensor | None = None  # (m, W) int64
    mode_log_probs: Tensor | None = None  # (m,) float32
    is_soft: Tensor | None = None  # (m,) bool, where thoughts switch

    def recorded(self) -> dict[str, Tensor]:
        """What is written down, by name."""
        names = [f.name for f in fields(self) if f.name not in ("strongest", "bad", "is_soft")]
        return {name: x for name in names if (x := getattr(self, name)) is not None}


class Rules:
    """What rows of one `Thinking` do.

    Args:
        vocab_size: V.
        eos_ids: ids that end a completion.
        greedy: no noise at all.
        decoding: cuts and the cold stop; None for neither.
        keep: whether what a cut kept is recorded, and densities are those of the distribution on it.
    """

    def __init__(
        self,
        layout: Layout,
        vocab_size: int,
        eos_ids: Sequence[int],
        greedy: bool,
        device: torch.device,
        decoding: Decoding | None = None,
        keep: bool = False,
    ) -> None:
        self.decoding, self.keep = decoding or Decoding(), keep
        self.layout, self.thinking, self.greedy = layout, layout.thinking, greedy
        self.pad_id = pad_id = layout.tokenizer.pad_token_id
        self.K = layout.thinking.support_size(vocab_size)
        self.eos = torch.tensor(list(eos_ids), device=device)
        self.end_table: Tensor | None = None  # (L + 1, V) int16
        if layout.end is not None:
            beyond = max(0, vocab_size - layout.end.table.shape[1])  # ids of the model that the tokenizer has not
            self.end_table = F.pad(layout.end.table, (0, beyond)).to(device)
        forced = [layout.forced_after_end, layout.forced_after_cap]  # rows as `State.capped` numbers them
        by_stage = [layout.thinking.thought_temperature, *[layout.thinking.temperature] * 3]
        self.temperatures = torch.tensor(by_stage, device=device)  # (4,) float32
        self.forced_length = torch.tensor([len(f) for f in forced], device=device)  # (2,)
        width = max(1, *map(len, forced))
        self.forced_ids = torch.tensor([f + [pad_id] * (width - len(f)) for f in forced], device=device)  # (2, F)

    def start(self) -> dict[str, int]:
        """The state of a row that begins, but for its seed."""
        return dict.fromkeys(COUNTERS[1:], 0) | {
            "stage": THINK if self.thinking.num_thoughts else FORCED, "capped": 1, "mode": 1
        }  # fmt: skip

    def draw(self, state: State, logits: Tensor, gate: Tensor | None = None) -> Position:
        """The next position of m rows, from logits (m, V) of any float dtype; gate: (m,) logits, if one switches."""
        thinking = self.thinking
        is_thought, is_forced, is_answer = state.stage == THINK, state.stage == FORCED, state.stage == ANSWER
        exists = state.stage != DONE
        temperature = torch.where(is_thought, thinking.thought_temperature, thinking.temperature)
        seeds, fused, kept = None if self.greedy else state.seed, None, None
        if seeds is not None and thinking.kind.has_gumbel_noise and not self.decoding.cuts:
            fused = sampling.draw(logits, temperature, self.K, seeds, state.t)
        if fused is not None:
            action = SoftToken(fused.support, torch.log_softmax(fused.values / thinking.mixing_tau, dim=-1))
            is_soft = soft_mode(state, is_thought, thinking, fused.entropy, gate, seeds)
        else:
            scaled = logits.float() / temperature[:, None]  # (m, V)
            phi = torch.log_softmax(scaled, dim=-1)
            before = densities.entropy(scaled) if thinking.switch == "entropy" else None
            is_soft = soft_mode(state, is_thought, thinking, before, gate, seeds)
            if self.decoding.cuts:
                left = self.decoding.cut(phi, is_thought, thinking)
                if self.keep:
                    left, kept = self.decoding.keep(left)
                action = self._draw_cut(left, is_soft, seeds, state.t)
            else:
                action = draw(scaled, phi, is_soft, thinking, seeds, state.t)
        top = action.support[:, 0]

        forced = self.forced_ids[state.capped, state.fed.clamp(max=self.forced_ids.shape[1] - 1)]
        ids = torch.where(is_forced, forced, top)
        support = torch.where(is_soft[:, None], action.support, self.pad_id)  # (m, K)
        support[:, 0] = ids
        log_weights = torch.where(is_soft[:, None], action.log_weights, token_log_weights(action.log_weights))

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
            if kept is not None:
                support_log_probs = left.gather(-1, support)
                log_outside = left.scatter(-1, inside, -torch.inf).logsumexp(-1)
                kept = _beside(kept, inside)
        log_prob, parameter = density_of(thinking)
        density = log_prob(support_log_probs, log_outside, log_weights, parameter)
        density = torch.where(is_thought, density, support_log_probs[:, 0])
        of_mode = None
        if gate is not None:
            of_mode = log_prob_of_mode(is_thought, is_soft, gate)
            density = density + of_mode

        # A row whose logits are not finite stops here; the position stays, without an action.
        bad = exists & ~entropy.isfinite()
        sampled, thought = (is_thought | is_answer) & ~bad, is_thought & ~bad
        ids = torch.where(bad, self.pad_id, ids)
        support = torch.where(bad[:, None], self.pad_id, support)
        log_weights = torch.where(bad[:, None], token_log_weights(log_weights), log_weights)
        return Position(
            completion_ids=torch.where(is_thought, self.layout.bot_id, ids) if thinking.phase == "latent" else ids,
            mask=exists,
            action_mask=sampled,
            thought_mask=thought,
            support=support,
            log_weights=log_weights,
            log_probs=torch.where(sampled, density, 0.0),
            support_log_probs=torch.where(sampled[:, None] & is_present(log_weights), support_log_probs, 0.0),
            entropy=torch.where(sampled, entropy, 0.0),
            outside=torch.where(sampled, log_outside.exp(), 0.0),
            strongest=top,
            bad=bad,
            kept=kept,
            mode_log_probs=None if of_mode is None else torch.where(sampled, of_mode, 0.0),
            is_soft=None if thinking.switch == "none" else is_soft,
        )

    def advance(self, state: State, drawn: Position) -> Tensor:
        """The stage of the position after `drawn`, and what leads to it, written into `state`.

        Returns:
            (m,) bool: rows that an end-of-sequence token ended.
        """
        thinking, top, bad = self.thinking, drawn.strongest, drawn.bad
        is_thought, is_forced, is_answer = state.stage == THINK, state.stage == FORCED, state.stage == ANSWER
        thoughts, fed, answered = state.thoughts + is_thought, state.fed + is_forced, state.answered + is_answer
        said, said_end = state.said, torch.zeros_like(is_thought)
        if self.end_table is not None:
            said = torch.where(is_thought, self.end_table[said, top].long(), said)
            said_end = is_thought & (said == len(self.end_table) - 1)
        at_cap = is_thought & ~said_end & (thoughts >= thinking.num_thoughts)
        if self.decoding.cold_stop_entropy:  # what the last of too many cold thoughts ends is ended as at the cap
            is_cold = is_thought & (drawn.entropy < self.decoding.cold_stop_entropy) & ~bad
            state.write(cold=torch.where(is_cold, state.cold + 1, 0))
            at_cap = at_cap | (is_thought & ~said_end & (state.cold >= self.decoding.cold_stop_length))
        if drawn.is_soft is not None:
            state.write(**switched(state, is_thought, drawn.is_soft, drawn.entropy))
        capped = torch.where(said_end, 0, state.capped)
        ready = torch.where(capped == 0, self.forced_length[0], self.forced_length[1])
        stage = torch.where(said_end | at_cap, torch.where(ready > 0, FORCED, ANSWER), state.stage)
        stage = torch.where(is_forced & (fed >= ready), ANSWER, stage)
        may_stop = is_answer | is_thought if thinking.phase == "explicit" else is_answer
        stops = may_stop & ~bad & (top[:, None] == self.eos).any(-1)
        stage = torch.where(stops | bad | (is_answer & (answered >= thinking.max_answer_tokens)), DONE, stage)
        t = state.t + (stage != DONE)
        state.write(stage=stage, t=t, thoughts=thoughts, fed=fed, answered=answered, capped=capped, said=said)
        return stops

    def _draw_cut(self, left: Tensor, is_soft: Tensor, seeds: Tensor | None, position: Tensor) -> SoftToken:
        """`draw` from what is left (m, V); where fewer than K ids are, the other slots are absent."""
        slots = min(self.decoding.slots_drawn(self.thinking, self.K), left.shape[-1])
        wide = replace(self.thinking, thought_k=slots)
        support, log_weights = draw(left, left, is_soft, wide, seeds, position)
        log_weights = log_weights[:, : self.K].log_softmax(-1)
        return SoftToken(support[:, : self.K].masked_fill(~is_present(log_weights), self.pad_id), log_weights)


def draw(
    scaled: Tensor, phi: Tensor, is_soft: Tensor, thinking: Thinking, seeds: Tensor | None, position: Any
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
        action.support[:, :1] = torch.where(is_soft[:, None], action.support[:, :1], token)
    return action


def _log_outside(p: Tensor, phi: Tensor, ids: Tensor) -> Tensor:
    """(m,) ln of the mass outside `ids` (m, K), summed over the complement; writes into p and phi, both (m, V)."""
    mass = p.scatter_(-1, ids, 0.0).sum(-1)
    if mass.device.type == "cpu" and bool((mass > 1e-30).all()):
        return mass.log()
    return phi.scatter_(-1, ids, -torch.inf).logsumexp(-1)  # nothing underflows; a GPU takes this way, and no look


def _beside(kept: Tensor, support: Tensor) -> Tensor:
    """(m, W): the kept ids that are not in the support (m, K), in their order, then -1."""
    kept = kept.masked_fill((kept[:, :, None] == support[:, None]).any(-1), -1)
    return kept.gather(-1, (kept < 0).long().argsort(dim=-1, stable=True))


def token_log_weights(like: Tensor) -> Tensor:
    """Log-weights (..., K) of a token: [0, -inf, ...]."""
    log_weights = torch.full_like(like, -torch.inf)
    log_weights[..., 0] = 0.0
    return log_weights
