"""What a step logs of its thoughts: sums and counts over all processes, then their quotient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_soft.rollouts.recording import Rollout
from rl_soft.thoughts.densities import is_present
from rl_soft.train.soft_batch import SoftBatch


def rollout_metrics(out: Rollout, accelerator: Any) -> tuple[dict[str, float], float]:
    """Softness, entropy and outside mass of the thoughts of a rollout; and how many positions were sampled.

    Softness is the entropy of the mixing weights, in nats; a thought is soft that mixes two ids or more.
    """
    thoughts, answers = out.thought_mask, out.action_mask & ~out.thought_mask  # (B, T)
    softness = -(out.log_weights.exp() * out.log_weights.clamp(min=-1e4)).sum(-1)  # (B, T)
    terms = {
        "softness": (softness * thoughts).sum(),
        "soft": (is_present(out.log_weights[..., 1:2]).any(-1) & thoughts).sum(),
        "outside": (out.outside * thoughts).sum(),
        "thought entropy": (out.entropy * thoughts).sum(),
        "answer entropy": (out.entropy * answers).sum(),
        "thoughts": thoughts.sum(),
        "answers": answers.sum(),
        "failed": out.failed.sum(),
        "rows": torch.tensor(float(len(thoughts)), device=thoughts.device),
    }
    summed = accelerator.reduce(torch.stack(list(terms.values())), "sum").tolist()
    total = dict(zip(terms, summed, strict=True))
    thoughts_in_all, answers_in_all = max(total["thoughts"], 1), max(total["answers"], 1)
    metrics = {
        "thoughts/soft_share": total["soft"] / thoughts_in_all,
        "thoughts/softness": total["softness"] / thoughts_in_all,
        "thoughts/outside_mass": total["outside"] / thoughts_in_all,
        "thoughts/entropy": total["thought entropy"] / thoughts_in_all,
        "thoughts/count": total["thoughts"] / total["rows"],
        "answer/entropy": total["answer entropy"] / answers_in_all,
        "rollout/failed": total["failed"] / total["rows"],
    }
    return metrics, total["thoughts"] + total["answers"]


def density_gap(batch: SoftBatch, first: Tensor, mask: Tensor, accelerator: Any) -> float:
    """The live check of exactness: the largest distance, over all processes, between a rollout's log-density and the
    training pass's before any update.

    Args:
        first: (B, C) log-densities of the pass, before the first update on this rollout.
        mask: (B, C) bool, the actions in the loss.
    """
    gap = ((first - batch.sampled_log_probs).abs() * mask).max()
    return float(accelerator.gather(gap).max().item())


def ratio_metrics(
    batch: SoftBatch,
    now: Tensor,
    old: Tensor | None,
    kl: Tensor | None,
    advantages: Tensor,
    clip_range: tuple[Any, Any],
    mask: Tensor,
    accelerator: Any,
) -> tuple[dict[str, float], float, float]:
    """Ratio statistics of thoughts and of answer tokens apart.

    Args:
        now, old: (B, C) log-densities under the policy and under the one that the rollout was scored with; None: the
            same.
        kl: (B, C) nats to the reference, where there is one.
        advantages: (B,) or (B, C).
        clip_range: how far the ratio may fall below 1 and rise above it, numbers or (B, C).
        mask: (B, C) bool, the actions in the loss.

    Returns:
        The metrics; the sum of the KL; and the number of actions.
    """
    log_ratio = torch.zeros_like(now) if old is None else now - old  # (B, C)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = log_ratio.exp()
    low, high = clip_range
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    terms = (ratio, log_ratio, log_ratio**2, clipped, torch.zeros_like(ratio) if kl is None else kl)
    metrics, kl_sum, count = {}, 0.0, 0.0
    for name, part in (("thoughts", mask & batch.thought_mask), ("answer", mask & ~batch.thought_mask)):
        sums = torch.stack([part.sum(), *((x * part).sum() for x in terms)])
        n, ratios, first_moment, second_moment, clips, kls = accelerator.reduce(sums, "sum").tolist()
        kl_sum, count, n = kl_sum + kls, count + n, max(n, 1.0)
        if kl is not None:
            metrics[f"{name}/kl"] = kls / n
        metrics[f"{name}/ratio"] = ratios / n
        metrics[f"{name}/log_ratio_std"] = max(second_moment / n - (first_moment / n) ** 2, 0.0) ** 0.5
        metrics[f"{name}/clip_fraction"] = clips / n
    return metrics, kl_sum, count
