"""Noise of one batch's gradient at the warm start of benchmarks/smollm2.py, by what stands in the policy ratio.

Batches of on-policy rollouts are drawn as GRPO draws them. Of each, the gradient of an adapter that has not been
trained yet is formed in parts: answer tokens, the strongest id of each thought, the rest of the thought given that id.
An estimator is a sum of parts. ratio_gradients.py does the same, with more estimators, on the embedded task.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from rewards.answers import judge
from rl_soft.data.sources import Row, load_rows
from rl_soft.model import policy
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts import noise
from rl_soft.thoughts.layout import Layout, pad

PARTS = ("answer", "top", "rest")
ESTIMATORS = {
    "joint": {"answer": 1.0, "top": 1.0, "rest": 1.0},
    "factored, rest x 0.25": {"answer": 1.0, "top": 1.0, "rest": 0.25},
    "top1": {"answer": 1.0, "top": 1.0},
    "answer tokens alone": {"answer": 1.0},
}


def parts_of(model: Any, layout: Layout, rows: list[Row], G: int, step: int) -> tuple[dict[str, torch.Tensor], Any]:
    """The gradient of each part for one batch, (D,) each, and the rewards (P, G)."""
    repeated = [row for row in rows for _ in range(G)]
    seeds = torch.tensor([noise.address(0, row.id, i % G, step) for i, row in enumerate(repeated)])
    prompts = [layout.prompt_ids(row.question) for row in repeated]
    out = rollout(model, layout, prompts, seeds)
    texts = [layout.answer_text(ids[mask].tolist()) for ids, mask in zip(out.completion_ids, out.mask, strict=True)]
    correct = [judge(t, r.answer, r.answer_type)[0] == "correct" for t, r in zip(texts, repeated, strict=True)]
    rewards = torch.tensor(correct).float().view(-1, G)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    A, thoughts = advantages.reshape(-1, 1), out.thought_mask  # (B, 1), (B, C)
    ids = pad(prompts, layout.tokenizer.pad_token_id, left=True)
    ones = pad([[1] * len(p) for p in prompts], 0, left=True)
    soft = SoftInputs(
        ids, out.support, out.log_weights, out.action_mask, thoughts, layout.thinking, ratio="factored", seeds=seeds,
        support_log_probs=out.support_log_probs,
    )  # fmt: skip
    scored = model(attention_mask=torch.cat([ones, out.mask.long()], dim=1), soft=soft)
    top = {"answer": scored.log_probs * ~thoughts, "top": scored.log_probs * thoughts, "rest": scored.rest}
    weights, n = [p for p in model.parameters() if p.requires_grad], out.action_mask.sum()
    found = {}
    for name in PARTS:
        grads = torch.autograd.grad((A * top[name]).sum() / n, weights, retain_graph=True, allow_unused=True)
        flat = [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(weights, grads, strict=True)]
        found[name] = torch.cat(flat)
    return found, rewards


def measure(start: Path, problems: Path, kind: dict[str, Any], file: Path, sizes: Any) -> dict[str, Any]:
    """Figures of all estimators at the model `start`, over sizes.gradient_batches batches.

    Args:
        kind: fields of `Thinking` that say what a thought is.
        file: sums over the batches so far, so that no batch is drawn twice.
    """
    made = policy.load_policy(str(start))
    assert made.thinking is not None
    config = LoraConfig(
        r=sizes.lora_r, lora_alpha=2 * sizes.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(made.model, config).eval()
    add_soft_forward(model.get_base_model())  # type: ignore[arg-type]
    layout, P = Layout(replace(made.thinking, **kind), made.tokenizer), sizes.prompts
    rows = load_rows(str(problems), "train")[: P * sizes.gradient_batches]
    none = {"n": 0, "sum": torch.zeros(()), "gram": torch.zeros(len(PARTS), len(PARTS)), "mixed": 0.0, "reward": 0.0}
    state = torch.load(file) if file.exists() else none
    for step in range(state["n"], len(rows) // P):
        found, rewards = parts_of(model, layout, rows[step * P : (step + 1) * P], sizes.completions, step)
        g = torch.stack([found[name] for name in PARTS])  # (parts, D)
        state = {
            "n": step + 1,
            "sum": state["sum"] + g,
            "gram": state["gram"] + g @ g.T,
            "mixed": state["mixed"] + float((rewards.std(1) > 0).float().mean()),
            "reward": state["reward"] + float(rewards.mean()),
        }
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    n = state["n"]
    return figures(state["sum"], state["gram"], n) | {k: state[k] / n for k in ("mixed", "reward")}


def figures(total: torch.Tensor, gram: torch.Tensor, n: int) -> dict[str, Any]:
    """By estimator, from sums over n batches, (parts, D) and (parts, parts).

    square: |E g|^2, from products of different batches, so it may be below 0; second: E |g|^2; alignment: the cosine
    of one batch's gradient with its own expectation, sqrt(square / second); with joint: <E g, E joint>. One unit is
    E |g|^2 of top1.
    """
    between, within = ((total @ total.T - gram) / (n * (n - 1))).double(), (gram / n).double()
    found: dict[str, Any] = {"batches": n}
    weights = {name: torch.tensor([parts.get(p, 0.0) for p in PARTS]).double() for name, parts in ESTIMATORS.items()}
    unit = float(weights["top1"] @ within @ weights["top1"])
    if not unit:
        return found  # all groups were alike
    for name, w in weights.items():
        square, second = float(w @ between @ w), float(w @ within @ w)
        found[name] = {
            "square": square / unit,
            "second": second / unit,
            "alignment": (max(square, 0.0) / second) ** 0.5,
            "with joint": float(w @ between @ weights["joint"]) / unit,
        }
    return found
