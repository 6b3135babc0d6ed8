"""The rules and records of a step on a GPU, in one Triton kernel: 5 launches in place of 170.

What `Rules.draw`, `Rules.advance` and the writing of the records are in PyTorch, for tokens and Gumbel thoughts that
are drawn by `gpu_sampling`. Each of their operations is on a few numbers per row, so they cost their launches alone.
Not run on a GPU yet: in Triton's interpreter a whole rollout by this kernel is that of PyTorch's operations
(tests/rollouts/test_gpu_rules.py).

Shapes: m rows, V vocabulary, K slots, T positions.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rl_soft.model.head_triton import jit, tempered, tl, triton
from rl_soft.rollouts.kernels import gpu_sampling

logger = logging.getLogger(__name__)

_judged: dict[Any, bool] = {}  # by device, dtype and K
ENDS = ("finished", "failed")
STATE = ("stage", "t", "thoughts", "fed", "answered", "capped", "said")
RECORDS = (
    "completion_ids", "mask", "action_mask", "thought_mask", "support", "log_weights", "log_probs",
    "support_log_probs", "entropy", "outside",
)  # fmt: skip


def takes(rules: Any, logits: Tensor) -> bool:
    """Whether the kernel knows these rules, and runs where these logits are."""
    kind, decoding = rules.thinking.kind, rules.decoding
    return (
        not (rules.greedy or decoding.cuts or decoding.cold_stop_entropy)
        and rules.thinking.switch == "none"
        and kind.has_gumbel_noise
        and not kind.has_dirichlet_noise
        and 0 < rules.K <= min(logits.shape[-1], gpu_sampling.SLOTS)
        and gpu_sampling.usable(logits)
    )


def sampled(rules: Any, out: Any, live: Any, logits: Tensor, T: int) -> bool:
    """Whether `sample` was called: where the kernel takes this, and agreed with PyTorch's operations at first."""
    if not takes(rules, logits):
        return False
    key = logits.device, logits.dtype, rules.K
    if key not in _judged:
        _judged[key] = _agrees(rules, out, live, logits, T)
    if _judged[key]:
        sample(rules, out, live, logits, T)
    return _judged[key]


def _agrees(rules: Any, out: Any, live: Any, logits: Tensor, T: int) -> bool:
    """Both ways, on copies."""
    m, close = len(logits), partial(torch.allclose, rtol=1e-3, atol=1e-3, equal_nan=True)
    own = SimpleNamespace(**{n: (x := getattr(out, n)).new_zeros(m, *x.shape[1:]) for n in (*RECORDS, *ENDS)})
    mine, theirs = (type(live)(**{n: x.clone() for n, x in live.tensors().items()}) for _ in range(2))
    mine.row = torch.arange(m, device=logits.device)
    try:
        sample(rules, own, mine, logits, T)
        drawn = rules.draw(live, logits)
        rules.advance(theirs, drawn)
        theirs.t.masked_fill_(theirs.stage == 3, T)
        same = all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in STATE)
        for name, value in drawn.recorded().items():
            same &= close(getattr(own, name)[mine.row, live.t].float(), value.float())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton has exceptions of many kinds: for resources, for compilers, for drivers
        logger.warning("rollout: rules take PyTorch's operations, Triton's kernel fails (%s)", str(error)[:200])
        return False
    if not same:
        logger.warning("rollout: rules take PyTorch's operations, Triton's kernel gives other results")
    return same


def sample(rules: Any, out: Any, live: Any, logits: Tensor, T: int) -> None:
    """Draw the next position of m rows, write it into `out`, and what comes after it into `live`.

    Args:
        rules, out, live: a `Rules`, a `Rollout` with T + 1 positions, and views of m places of a `Live`.
        logits: (m, V), any float dtype, rows contiguous.
    """
    m, thinking, K = len(logits), rules.thinking, rules.K
    temperature = rules.temperatures[live.stage]
    ids, values, top, mass, dot = gpu_sampling.draw(logits, temperature, K, live.seed, live.t)
    blocks = triton.cdiv(logits.shape[1], gpu_sampling._BLOCK)
    parts = logits.new_empty(m, blocks, dtype=torch.float32)
    forced, table = rules.forced_ids, rules.end_table
    with torch.cuda.device_of(logits):
        _outside_kernel[(m, blocks)](
            logits, logits.stride(0), temperature, ids, live.stage, live.capped, live.fed, forced, parts,
            V=logits.shape[1], K=K, F=forced.shape[1], BLOCK=gpu_sampling._BLOCK, num_warps=8,
        )  # fmt: skip
        _rules_kernel[(m,)](
            logits, logits.stride(0), temperature, ids, values, top, mass, dot, parts,
            *(getattr(live, name) for name in STATE), live.row, live.is_thought, live.support, live.log_weights,
            *(getattr(out, name) for name in RECORDS), out.finished, out.failed,
            forced, rules.forced_length, rules.eos, ids if table is None else table,
            rules.pad_id, rules.layout.bot_id if thinking.phase == "latent" else -1,
            thinking.num_thoughts, thinking.max_answer_tokens, thinking.mixing_tau, thinking.thought_tau,
            math.log(thinking.thought_tau), T,
            K=K, WIDE=triton.next_power_of_2(K), BLOCKS=blocks, BLOCKS_WIDE=triton.next_power_of_2(blocks),
            F=forced.shape[1], E=len(rules.eos), END=0 if table is None else len(table) - 1,
            TABLE_WIDTH=1 if table is None else table.shape[1], EXPLICIT=thinking.phase == "explicit", num_warps=1,
        )  # fmt: skip


@jit
def _outside_kernel(
    logits, stride, temperatures, ids, stages, cappeds, feds, forced, parts,
    V: tl.constexpr, K: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and block: ln of its sum without the slots of a thought, or without a token's one id."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits + row * stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    x = tempered(raw, 1 / tl.load(temperatures + row), 1.0, False)
    stage, fed = tl.load(stages + row), tl.minimum(tl.load(feds + row), F - 1)
    first = tl.load(ids + row * K)
    first = tl.where(stage == 1, tl.load(forced + tl.load(cappeds + row) * F + fed), first)
    for k in range(K):
        slot = tl.where(stage == 0, tl.load(ids + row * K + k), first)
        x = tl.where(columns == slot, float("-inf"), x)
    top = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - tl.where(top > float("-inf"), top, 0.0)), axis=0)
    tl.store(parts + row * tl.num_programs(1) + block, top + tl.log(total))


@jit
def _lgamma_of_whole(n, K: tl.constexpr):
    """ln (n - 1)! of whole n, at most K."""
    total = n.to(tl.float32) * 0.0
    for i in range(2, K):
        total += tl.where(i < n, tl.log(i * 1.0), 0.0)
    return total


@jit
def _rules_kernel(
    logits, stride, temperatures, ids, values, tops, masses, dots, parts,
    stages, ts, thoughtss, feds, answereds, cappeds, saids, rows, is_thoughts, live_support, live_log_weights,
    completion_ids, mask_, action_mask, thought_mask, support_, log_weights_, log_probs_, support_log_probs_,
    entropy_, outside_, finished, failed,
    forced, forced_length, eos, end_table,
    pad, bot, num_thoughts, max_answer, mixing_tau, tau, log_tau, T,
    K: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_WIDE: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, END: tl.constexpr, TABLE_WIDTH: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """One program per row; the names are those of `Rules` and `Rollout`."""
    r = tl.program_id(0).to(tl.int64)
    infinite = float("inf")
    stage, t, capped = tl.load(stages + r), tl.load(ts + r), tl.load(cappeds + r)
    thoughts, fed, answered = tl.load(thoughtss + r), tl.load(feds + r), tl.load(answereds + r)
    said = tl.load(saids + r)
    is_thought, is_forced, is_answer, exists = stage == 0, stage == 1, stage == 2, stage != 3

    # What was drawn.
    ks = tl.arange(0, WIDE)
    inside = ks < K
    top_id = tl.load(ids + r * K)
    first = tl.where(is_forced, tl.load(forced + capped * F + tl.minimum(fed, F - 1)), top_id)
    slots = tl.load(ids + r * K + ks, mask=inside, other=0)
    slots = tl.where(is_thought, slots, tl.where(ks == 0, first, pad))
    z = tl.load(values + r * K + ks, mask=inside, other=-infinite) / mixing_tau
    best = tl.max(z, axis=0)
    best = tl.where(best > -infinite, best, 0.0)
    x = z - best - tl.log(tl.sum(tl.exp(z - best), axis=0))
    x = tl.where(is_thought, x, tl.where(ks == 0, 0.0, -infinite))
    x = tl.where(inside, x, -infinite)
    present = x > -infinite

    # Its distribution.
    temperature, top, mass = tl.load(temperatures + r), tl.load(tops + r), tl.load(masses + r)
    log_mass = tl.log(mass)
    entropy = log_mass - tl.load(dots + r) / mass
    raw = tl.load(logits + r * stride + slots, mask=inside, other=0.0).to(tl.float32)
    phi = raw / temperature - top - log_mass
    blocks = tl.arange(0, BLOCKS_WIDE)
    part = tl.load(parts + r * BLOCKS + blocks, mask=blocks < BLOCKS, other=-infinite)
    peak = tl.max(part, axis=0)
    peak = tl.where(peak > -infinite, peak, 0.0)
    log_outside = peak + tl.log(tl.sum(tl.exp(part - peak), axis=0)) - top - log_mass

    # The log-density of a thought (`densities.gumbel_topk_log_prob`), the log-probability of a token.
    count = tl.sum(present.to(tl.int32), axis=0)
    x_min = tl.min(tl.where(present, x, infinite), axis=0)
    x_min = tl.where(count > 0, x_min, 0.0)
    score = tl.where(present, phi - tau * x, -infinite)
    rest = log_outside - tau * x_min
    peak = tl.maximum(tl.max(score, axis=0), rest)
    peak = tl.where(peak > -infinite, peak, 0.0)
    log_sum = peak + tl.log(tl.sum(tl.exp(score - peak), axis=0) + tl.exp(rest - peak))
    size = tl.maximum(count, 1)
    density = tl.sum(tl.where(present, score - log_sum, 0.0), axis=0) + _lgamma_of_whole(size, K)
    density += (size - 1).to(tl.float32) * log_tau
    density = tl.where(is_thought, density, tl.sum(tl.where(ks == 0, phi, 0.0), axis=0))

    # A row whose logits are not finite stops here; the position stays, without an action.
    bad = exists & ~(tl.abs(entropy) < infinite)
    sampled, thought = (is_thought | is_answer) & ~bad, is_thought & ~bad
    slots = tl.where(bad, pad, slots)
    x = tl.where(bad, tl.where(ks == 0, 0.0, -infinite), x)
    first = tl.where(bad, pad, first)

    # Records.
    row = tl.load(rows + r)
    at = row * (T + 1) + t
    tl.store(completion_ids + at, tl.where(is_thought & (bot >= 0), bot, first))
    tl.store(mask_ + at, exists)
    tl.store(action_mask + at, sampled)
    tl.store(thought_mask + at, thought)
    tl.store(support_ + at * K + ks, slots, mask=inside)
    tl.store(log_weights_ + at * K + ks, x, mask=inside)
    tl.store(log_probs_ + at, tl.where(sampled, density, 0.0))
    tl.store(support_log_probs_ + at * K + ks, tl.where(sampled & (x > -infinite), phi, 0.0), mask=inside)
    tl.store(entropy_ + at, tl.where(sampled, entropy, 0.0))
    tl.store(outside_ + at, tl.where(sampled, tl.exp(log_outside), 0.0))
    tl.store(live_support + r * K + ks, slots, mask=inside)
    tl.store(live_log_weights + r * K + ks, x, mask=inside)
    tl.store(is_thoughts + r, thought)

    # Which stage the next position is in.
    thoughts += is_thought.to(tl.int64)
    fed += is_forced.to(tl.int64)
    answered += is_answer.to(tl.int64)
    said_end = is_thought & (stage < 0)  # never, without an end of thinking
    if END > 0:
        said = tl.where(is_thought, tl.load(end_table + said * TABLE_WIDTH + top_id).to(tl.int64), said)
        said_end = is_thought & (said == END)
    at_cap = is_thought & ~said_end & (thoughts >= num_thoughts)
    capped = tl.where(said_end, 0, capped)
    ready = tl.load(forced_length + tl.where(capped == 0, 0, 1))
    new = tl.where(said_end | at_cap, tl.where(ready > 0, 1, 2), stage)
    new = tl.where(is_forced & (fed >= ready), 2, new)
    may_stop = is_answer
    if EXPLICIT:
        may_stop = is_answer | is_thought
    is_end = top_id < 0
    for i in range(E):
        is_end = is_end | (top_id == tl.load(eos + i))
    stops = may_stop & ~bad & is_end
    new = tl.where(stops | bad | (is_answer & (answered >= max_answer)), 3, new)
    tl.store(stages + r, new)
    tl.store(ts + r, tl.where(new == 3, T, t + 1))
    tl.store(thoughtss + r, thoughts)
    tl.store(feds + r, fed)
    tl.store(answereds + r, answered)
    tl.store(cappeds + r, capped)
    tl.store(saids + r, said)
    tl.store(finished + row, (tl.load(finished + row) != 0) | stops)
    tl.store(failed + row, (tl.load(failed + row) != 0) | bad)
