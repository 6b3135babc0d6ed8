"""Soft rollouts on one KV cache: rows enter when there is room, move on together, and leave when they are done.

    enter    waiting rows take free places: their prompts are prefilled, each distinct one once
    step     a decode step: feed what was sampled, sample what comes next (`state_machine`); all stays on the device
    leave    every few decode steps: which rows are done? The others move up, so that the first n places are taken

What a row becomes depends neither on the rows beside it nor on when it entered, since its noise is a function of its
seed and position (`noise`). So a row that loses its place for want of memory starts again, and becomes the same.

Shapes: B rows in all, S places, n rows that are live, m rows that enter, U distinct prompts, V vocabulary, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rl_soft.model.gate import gate_of
from rl_soft.model.head_product import float32_logits
from rl_soft.model.policy import eos_token_ids
from rl_soft.model.side_modules import language_model, trunk_of
from rl_soft.model.think import disturb, mix_embeddings, mix_few, position_ids, thought_input
from rl_soft.rollouts.cache import RowCache, bytes_per_token, free_memory, is_out_of_memory
from rl_soft.rollouts.cuda_graphs import Replay
from rl_soft.rollouts.kernels.cpu import cpu_kernels
from rl_soft.rollouts.kernels.few_launches import few_launches
from rl_soft.rollouts.models import attention_windows, check_reading, check_rollout_model, check_rope, has_alibi
from rl_soft.rollouts.recording import Live, Walk
from rl_soft.rollouts.recording import Rollout as Rollout
from rl_soft.rollouts.state_machine import DONE
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout

logger = logging.getLogger(__name__)

# Of distinct prompts, padding included, that go through the model at once. A CPU's caches hold no more.
PREFILL_TOKENS = {"cuda": 4096, "cpu": 512}
MEMORY_SHARE = 0.6  # of the free memory, that the cache may take where no budget is given
LOOK_EVERY = {"cuda": 8, "cpu": 1}  # steps between looks at which rows are done; a look makes the CPU wait
IDLE = {"cuda": 0.5, "cpu": 0.0}  # share of the rows that may be done before others move up: a new shape, a new graph
ROW_SIZES = {"cuda": 8}  # of how many sizes the number of rows is, counted in graphs, too
GRAIN = {"cuda": 1024, "cpu": 1}  # columns that shapes are rounded up to, so that a graph serves many steps
CHUNK = {"cuda": 1024, "cpu": 64}  # columns that the cache grows by
FEW = 64  # slots whose embeddings a GPU looks up together

# Is shown the records as they stand, one position wider than in the end, and which rows (B,) are done.
Watch = Callable[[Rollout, Tensor], None]


@torch.no_grad()
def rollout(
    model: Any,
    layout: Layout,
    prompt_ids: Sequence[Sequence[int]],
    seeds: Tensor | None = None,
    eos_ids: Sequence[int] | None = None,
    token_budget: int | None = None,
    control: str = "none",
    decoding: Decoding | None = None,
    watch: Watch | None = None,
    keep: bool = False,
) -> Rollout:
    """One completion for each prompt.

    Args:
        model: the causal LM on its device (with its adapter, if any), in evaluation mode; called with
            `inputs_embeds`.
        layout: the tokenizer, and what a thought is; a model without a projector cannot make hybrid thoughts.
        prompt_ids: B prompts, such as `layout.prompt_ids(question)`; equal ones share a prefill.
        seeds: (B,) int64, see `noise.address`; None decodes greedily (no noise at all).
        eos_ids: ids that end a completion; None: those of tokenizer and generation config.
        token_budget: positions that the cache may hold, live rows times the longest that a row can get; other rows
            wait for a place. None: what MEMORY_SHARE of the free memory holds.
        control: what is done to the thoughts fed, see `think.disturb`; `shuffle` needs all rows to be live at once.
        decoding: how distributions are cut before positions are drawn, and the cold stop; None does neither.
        watch: called every few steps, and at the end, with the records so far; changes nothing.
        keep: record which ids a cut kept, as RL needs it; `decoding` then has a top_k.

    Returns:
        `Rollout` on the model's device; log-densities are of the policy at the temperatures in `layout.thinking`.

    Raises:
        ValueError: a model that rollouts cannot be made with (`models`); rows so long that its rotary embeddings would
            depend on the longest of them; control `shuffle` of a single row, or with a budget that does not hold all
            rows.
    """
    check_rollout_model(model)
    check_reading(model)
    if control == "shuffle" and len(prompt_ids) == 1:
        raise ValueError("control shuffle needs at least 2 rows: it feeds each the thoughts of another")
    return Engine(model, layout, prompt_ids, seeds, eos_ids, token_budget, control, decoding, watch, keep).run()


@dataclass
class Prefill:
    """U prompts that went through the model together."""

    number: dict[tuple[int, ...], int]  # which is which
    cache: DynamicCache
    logits: Tensor  # (U, V)
    hidden: Tensor | None  # (U, H)


class Engine:
    """One rollout under way; arguments as in `rollout`."""

    cache: RowCache  # and `live`, made when the first prefill has shown what a row takes
    live: Live

    def __init__(
        self,
        model: Any,
        layout: Layout,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor | None = None,
        eos_ids: Sequence[int] | None = None,
        token_budget: int | None = None,
        control: str = "none",
        decoding: Decoding | None = None,
        watch: Watch | None = None,
        keep: bool = False,
    ) -> None:
        self.model, self.thinking, self.pad_id = model, layout.thinking, layout.tokenizer.pad_token_id
        self.embedding = model.get_input_embeddings()
        self.device = self.embedding.weight.device
        self.prompts = [tuple(p) for p in prompt_ids]
        eos_ids = eos_token_ids(model, layout.tokenizer) if eos_ids is None else eos_ids
        B, V = len(self.prompts), model.config.get_text_config().vocab_size
        gate = gate_of(model, layout.thinking)
        self.walk = Walk(layout, V, B, seeds, eos_ids, self.device, decoding, keep, gate)
        check_rope(model, self.prompts, self.walk.T)
        self.token_budget, self.control, self.watch = token_budget, control, watch
        self.windows = attention_windows(model)
        # Long prompts first: those that are prefilled together need little padding, and the width falls with time.
        order = sorted(range(B), key=lambda i: (-len(self.prompts[i]), self.prompts[i]))
        self.turn = {row: i for i, row in enumerate(order)}
        self.waiting = order
        self.n = 0  # live rows; they are in the first n places
        self.limit = B  # the most that may be live
        self.prefill_tokens = PREFILL_TOKENS.get(self.device.type, 4096)
        self.prefilled: Prefill | None = None  # the last one, as long as rows that wait need it
        self.read: Tensor | None = None  # (., ., H), the trunk's last states, where thoughts are made of them
        self.replay = Replay(self.device)

    def run(self) -> Rollout:
        # The kernels are for a CPU, fewer launches for a GPU.
        with cpu_kernels(self.model), few_launches(self.model), float32_logits(self.model):
            self._run()
        failed = int(self.walk.out.failed.sum())
        if failed:
            logger.warning("rollout: %d of %d rows stopped at logits that are not finite", failed, len(self.prompts))
        return self.walk.result([list(p) for p in self.prompts])

    def _run(self) -> None:
        looks, hook = LOOK_EVERY.get(self.device.type, 1), None
        if self.thinking.kind.reads_hidden or self.walk.gate is not None:
            trunk = trunk_of(language_model(self.model))
            hook = trunk.register_forward_hook(lambda _, args, out: setattr(self, "read", out.last_hidden_state))
        try:
            while self.n or self.waiting:
                try:
                    self.enter()
                    self.leave()
                    for _ in range(looks if self.n else 0):
                        self.step()
                    if self.watch is not None:
                        self.watch(self.walk.out, self.done())
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error) or self._wanted() <= 1:
                        raise
                self.give_way()  # outside of the handler, whose traceback holds on to tensors
        finally:
            if hook is not None:
                hook.remove()

    # -- enter --------------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Waiting rows take the free places, as soon as a quarter of all places is free."""
        if self.n and 4 * (self.limit - self.n) < self.limit:
            return
        while self.waiting and self.n < self.limit:
            if self.prefilled is None or self.prompts[self.waiting[0]] not in self.prefilled.number:
                self.prefilled = None
                self.prefilled = self.prefill([self.prompts[i] for i in self.waiting[: self.limit - self.n]])
                if not hasattr(self, "cache"):
                    self.allocate(self.prefilled)
            group, rows = self.prefilled, []
            for i in self.waiting[: self.limit - self.n]:
                if self.prompts[i] not in group.number:
                    break
                rows.append(i)
            numbers = [group.number[self.prompts[i]] for i in rows]
            which = torch.tensor(numbers, device=self.device)  # (m,)
            lengths = torch.tensor([len(self.prompts[i]) for i in rows], device=self.device)
            live = self.live.part(slice(self.n, self.n + len(rows)))
            self.walk.start(live, torch.tensor(rows, device=self.device), lengths)
            self.cache.enter(group.cache, numbers, lengths, len(self.prompts[rows[0]]), self.walk.T)
            hidden = None if group.hidden is None else group.hidden[which]
            self.walk.sample(live, group.logits[which], hidden)
            self.n, self.waiting = self.n + len(rows), self.waiting[len(rows) :]
        if self.prefilled and not (self.waiting and self.prompts[self.waiting[0]] in self.prefilled.number):
            self.prefilled = None

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> Prefill:
        """Run the first distinct ones of `prompts`, sorted by falling length: as many as may go at once, or one."""
        P, number = len(prompts[0]), {prompts[0]: 0}
        for prompt in prompts:
            if (len(number) + 1) * P <= self.prefill_tokens:
                number.setdefault(prompt, len(number))
        ids = torch.tensor([[self.pad_id] * (P - len(p)) + list(p) for p in number], device=self.device)  # (U, P)
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in number], device=self.device)
        cache = DynamicCache(config=self.model.config)
        out = self.model(
            inputs_embeds=self.embedding(ids),
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return Prefill(number, cache, out.logits[:, -1], None if self.read is None else self.read[:, -1])

    def allocate(self, group: Prefill) -> None:
        """Places within the budget."""
        B, kind, longest = len(self.prompts), self.device.type, len(self.prompts[self.waiting[0]]) + self.walk.T
        budget = self.token_budget
        if budget is None:
            free = free_memory(self.device)
            budget = B * longest if free is None else int(MEMORY_SHARE * free) // bytes_per_token(group.cache)
        self.limit = max(1, min(self.limit, budget // longest))
        if budget < B * longest:
            message = "rollout: %d rows of up to %d positions are over the budget of %d positions; %d rows at a time"
            logger.info(message, B, longest, budget, self.limit)
        if self.control == "shuffle" and self.limit < B:
            raise ValueError(f"control shuffle needs all {B} rows at once, and memory is for {self.limit}")
        flash = "flash" in str(self.model.config._attn_implementation)  # it reads the mask as lengths
        grain = 1 if flash else GRAIN.get(kind, 1)
        self.replay.on &= grain > 1 and self.control == "none"
        renumber = 1 if has_alibi(self.model) else None
        sdpa = self.model.config._attn_implementation == "sdpa"
        self.one_mask = grain > 1 and sdpa and renumber is None and set(self.windows) == {None}
        self.cache = RowCache(self.windows, self.limit, grain, CHUNK.get(kind, 64), self.device, renumber)
        first = self.embedding.weight[:1] if self.control == "repeat" else None
        hidden = group.hidden if self.thinking.kind.reads_hidden else None
        self.live = self.walk.places(self.limit, hidden, first)

    # -- step ---------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Feed what was sampled, sample what comes next, for all live rows."""
        self.cache.reserve()
        self.replay.run(self.cache.shapes(), self._step, self.cache.version)
        self.cache.end += 1

    def _step(self) -> None:
        """Reads and writes tensors in place, and looks at none of them, so that it can be replayed."""
        live = self.live.part(slice(0, self.n))
        out = self.model(
            inputs_embeds=self.next_input(live)[:, None],  # (n, 1, H)
            attention_mask=self.cache.whole_mask() if self.one_mask else self.cache.attention_mask(),
            position_ids=live.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.walk.sample(live, out.logits[:, -1], None if self.read is None else self.read[:, -1])
        # Last, so that a step that runs out of memory can be taken again; rows that are done and still in their places
        # stay at their position, beyond which a model may have none.
        live.position += live.stage != DONE
        self.cache.at += 1

    def next_input(self, live: Live) -> Tensor:
        """(n, H): embeddings of tokens and of what is forced; of a thought, what its kind makes of it."""
        few = self.device.type == "cuda" and live.support.shape[-1] <= FEW
        token = (mix_few if few else mix_embeddings)(self.embedding, live.support, live.log_weights)
        if not self.thinking.kind.reads_hidden and self.control == "none":
            return token  # a mixture, if it is a thought
        thought = thought_input(self.model, self.thinking, live.support, live.log_weights, live.hidden)
        if self.control == "shuffle":  # among those that think
            now = live.is_thought.nonzero()[:, 0]
            thought[now] = disturb(thought[now], self.control, thought[now])
        elif live.first is not None:
            live.first[:] = torch.where((live.thoughts == 1)[:, None], thought, live.first)
            thought = disturb(thought, self.control, live.first)
        else:
            thought = disturb(thought, self.control, thought)
        return torch.where(live.is_thought[:, None], thought, token)

    # -- leave --------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Rows that are done leave, and those in the last places move into the gaps. Here alone the CPU reads from the
        device."""
        on = self.live.stage[: self.n] != DONE
        keep = on.nonzero()[:, 0]
        n, idle = len(keep), IDLE.get(self.device.type, 0.0) * (0.5 if self.waiting else 1.0)
        if n == self.n or n > (1 - idle) * self.n:
            return
        sizes = ROW_SIZES.get(self.device.type)
        if sizes:  # some rows that are done stay, in the places of those that move up
            size = max(1, self.limit // sizes)
            n = min(self.n, -(-n // size) * size)
        if n == self.n:
            return
        movers = keep[keep >= n]
        gaps = (~on[:n]).nonzero()[: len(movers), 0]
        self.live.move(gaps, movers)
        self.cache.leave(gaps, movers, n)
        self.n = n
        if not self.waiting:
            self.cache.places = max(1, n)  # from the next time that the buffers grow

    def done(self) -> Tensor:
        """(B,) bool: the rows that take no further step."""
        done = torch.ones(len(self.prompts), dtype=torch.bool, device=self.device)
        done[self.waiting] = False
        done[self.live.row[: self.n]] = self.live.stage[: self.n] == DONE
        return done

    def _wanted(self) -> int:
        """Rows that are live or would enter now."""
        return max(self.n, min(self.limit, len(self.waiting)))

    def give_way(self) -> None:
        """Memory ran out: half of the rows go on, the others start again when there is a place."""
        self.limit, self.prefill_tokens = self._wanted() // 2, self.prefill_tokens // 2
        self.prefilled = None
        self.replay.clear()
        if hasattr(self, "cache"):
            lost = self.live.row[self.limit : self.n]
            self.walk.forget(lost)
            self.waiting = sorted([*lost.tolist(), *self.waiting], key=self.turn.__getitem__)
            self.n = min(self.n, self.limit)
            self.cache.shrink(self.limit, self.n)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("rollout: out of memory; it goes on with %d rows at a time", self.limit)
