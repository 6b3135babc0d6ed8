"""Bias and variance of the policy-gradient estimators of a soft thought, at a CODI warm start.

    python benchmarks/ratio_gradients.py MODEL [MODEL ...] [--batches 80] [--k 1 2 4 8] [--tau 0.1 0.5 1.0]

For each model, K and tau, batches of on-policy rollouts (32 prompts x 8) of the embedded task are drawn. Of each batch
the gradient is formed in parts, at ratio 1, with GRPO's advantages: the answer tokens, the strongest id of each
thought, the rest given the strongest id, and so on. An estimator is a sum of parts. Reported, with g the gradient of
one batch and G = E[joint] (unbiased):

    length       |E g| / |G|
    cosine       of E g with G: below 1 the estimator is biased
    noise        sqrt(tr Cov g) / |G|
    alignment    E<g, G> / (|G| sqrt(E|g|^2)): the cosine of one batch's gradient with the truth, what learning runs on

Inner products of expectations are taken between different batches, so that noise does not enter them. The last lines
give the weight on the rest that has the best alignment.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from rewards.answers import judge
from rl_soft.data import sources as data
from rl_soft.model import policy
from rl_soft.model import scored_forward as scored
from rl_soft.model.policy import eos_token_ids
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts import noise
from rl_soft.thoughts.densities import gather_statistics, gumbel_topk_log_prob
from rl_soft.thoughts.layout import Layout

TASK = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True}
PROMPTS, G = 32, 8
PARTS = ("answer", "top", "rest", "rest | peers", "all-V product", "K terms", "pathwise", "conditional")
ESTIMATORS = {
    "joint": {"answer": 1.0, "top": 1.0, "rest": 1.0},
    "factored, rest x 0.25": {"answer": 1.0, "top": 1.0, "rest": 0.25},
    "top1": {"answer": 1.0, "top": 1.0},
    "joint, rest | peers": {"answer": 1.0, "top": 1.0, "rest | peers": 1.0},
    "pathwise": {"pathwise": 1.0},
    "conditional": {"conditional": 1.0},
    "all-V product": {"answer": 1.0, "all-V product": 1.0},
    "K terms": {"answer": 1.0, "K terms": 1.0},
}


def peer_advantages(advantages: Tensor, top: Tensor) -> Tensor:
    """A minus the mean A of those of the group with the same strongest ids so far: (P, G), (P, G, n) -> (P, G, n).

    Given the strongest ids the score of the rest has mean 0, so any function of them, and of other samples, may be
    subtracted. A row without such peers keeps its A.
    """
    same = (top[:, :, None] == top[:, None, :]).int().cumprod(-1)  # (P, G, G, n)
    same = same * (1 - torch.eye(top.shape[1], dtype=same.dtype))[..., None]
    mean = (same * advantages[:, None, :, None]).sum(2) / same.sum(2).clamp(min=1)
    return advantages[..., None] - mean


def parts_of(model, layout: Layout, rows: list[data.Row], step: int) -> tuple[dict[str, Tensor], float]:
    """The gradient of each part for one batch, flat, and the mean reward."""
    repeated = [row for row in rows for _ in range(G)]
    seeds = torch.tensor([noise.address(0, row.id, i % G, step) for i, row in enumerate(repeated)])
    prompts = [layout.prompt_ids(row.question) for row in repeated]
    model.eval()
    out = rollout(model, layout, prompts, seeds, eos_token_ids(model, layout.tokenizer))
    texts = [layout.answer_text(ids[mask].tolist()) for ids, mask in zip(out.completion_ids, out.mask, strict=True)]
    correct = [judge(t, r.answer, r.answer_type)[0] == "correct" for t, r in zip(texts, repeated, strict=True)]
    rewards = torch.tensor(correct).float().view(-1, G)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    A = advantages.reshape(-1, 1)  # (B, 1)

    P = max(map(len, prompts))
    pad = layout.tokenizer.pad_token_id
    prompt_ids = torch.tensor([[pad] * (P - len(p)) + p for p in prompts])
    attention = torch.cat([torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts]), out.mask.long()], dim=1)
    thinking = layout.thinking
    thoughts, answers = out.thought_mask, out.action_mask & ~out.thought_mask
    soft = scored.SoftInputs(
        prompt_ids,
        out.support,
        out.log_weights,
        out.action_mask,
        thoughts,
        thinking,
        seeds=out.seeds,
        support_log_probs=out.support_log_probs,
    )
    n = out.action_mask.sum()

    hidden = scored._recorded_states(scored.Causal(model, model.forward, scored.LogitMap()), soft, attention)
    logits = model.get_output_embeddings()(hidden).float()  # (B, C, V): V is 20 here
    phi = logits.log_softmax(-1)
    support = out.support.masked_fill(out.log_weights.isneginf(), -1)
    log_probs, log_outside = (
        x.view(*thoughts.shape, -1) for x in gather_statistics(logits.flatten(0, 1), support.flatten(0, 1))
    )
    joint = gumbel_topk_log_prob(log_probs, log_outside.squeeze(-1), out.log_weights, thinking.thought_tau)
    top = log_probs[..., 0]
    gumbels = torch.stack([noise.gumbel(seeds, t, phi.shape[-1]) for t in range(phi.shape[1])], dim=1)
    z = phi.detach() + gumbels
    terms = phi - z - (phi - z).exp()  # (B, C, V)
    peers = peer_advantages(advantages, out.support[:, : thinking.num_thoughts, 0].reshape(len(rows), G, -1))
    peers = torch.nn.functional.pad(peers.flatten(0, 1), (0, thoughts.shape[1] - thinking.num_thoughts))  # (B, C)
    losses = {
        "answer": (A * top * answers).sum() / n,
        "top": (A * top * thoughts).sum() / n,
        "rest": (A * (joint - top) * thoughts).sum() / n,
        "rest | peers": (peers * (joint - top) * thoughts).sum() / n,
        "all-V product": (A * terms.sum(-1) * thoughts).sum() / n,
        "K terms": (A * terms.gather(-1, out.support).sum(-1) * thoughts).sum() / n,
    }
    again = model(attention_mask=attention, soft=replace(soft, ratio="pathwise"))
    losses["pathwise"] = (A * again.log_probs * answers).sum() / n
    given = model(attention_mask=attention, soft=replace(soft, ratio="conditional"))
    gap = ((given.log_probs - top) * out.action_mask).abs().max()
    assert gap < 1e-2, gap  # the same thoughts again
    losses["conditional"] = (A * given.log_probs).sum() / n
    parameters = list(model.parameters())
    flat = {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        flat[name] = torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
        )
    return flat, float(rewards.mean())


class Moments:
    """Sums of the parts and of their inner products, by block of batches; combinations of parts come out of them."""

    def __init__(self, blocks: int):
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
        self.grams = torch.zeros(blocks, len(PARTS), len(PARTS), dtype=torch.float64)
        self.counts = torch.zeros(blocks)

    def add(self, block: int, parts: dict[str, Tensor]) -> None:
        stacked = torch.stack([parts[name] for name in PARTS])  # (parts, D)
        self.grams[block] += (stacked @ stacked.T).double()
        self.sums[block] = stacked if not len(self.sums[block]) else self.sums[block] + stacked  # type: ignore
        self.counts[block] += 1

    def figures(self, blocks: list[int], estimators: dict[str, dict[str, float]]) -> dict[str, tuple[float, ...]]:
        n = float(self.counts[blocks].sum())
        total = sum(self.sums[b] for b in blocks)
        squares = self.grams[blocks].sum(0)
        between = ((total @ total.T).double() - squares) / (n * (n - 1))  # <E a, E b>
        within = squares / n  # E<a, b>
        truth = self._weights({"answer": 1, "top": 1, "rest": 1})
        size = float(truth @ between @ truth) ** 0.5
        out = {}
        for name, weights in estimators.items():
            w = self._weights(weights)
            mean_square, second = float(w @ between @ w), float(w @ within @ w)
            along = float(w @ between @ truth)
            out[name] = (
                max(mean_square, 0.0) ** 0.5 / size,
                along / (size * max(mean_square, 1e-30) ** 0.5),
                max(second - mean_square, 0.0) ** 0.5 / size,
                along / (size * second**0.5),
            )
        return out

    @staticmethod
    def _weights(weights: dict[str, float]) -> Tensor:
        return torch.tensor([float(weights.get(name, 0)) for name in PARTS], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batches", type=int, default=80)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tau", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    args = parser.parse_args()
    rows = data.load_rows("chain_sum", "train", 3000, 1, TASK, None)
    cells = [(k, 0.5) for k in args.k] + [(4, tau) for tau in args.tau if tau != 0.5]
    for cell in cells:
        k, tau = cell
        moments = Moments(len(args.models) * 4)
        reward = 0.0
        for m, path in enumerate(args.models):
            start = policy.load_policy(path, attn_implementation="sdpa")
            scored.add_soft_forward(start.model)
            layout = Layout(replace(start.thinking, thought_k=k, thought_tau=tau), start.tokenizer)
            for b in range(args.batches):
                at = (b * PROMPTS) % (len(rows) - PROMPTS)
                parts, mean_reward = parts_of(start.model, layout, rows[at : at + PROMPTS], b)
                moments.add(m * 4 + b % 4, parts)
                reward += mean_reward / (args.batches * len(args.models))
        print(f"\nK {k}, tau {tau}: reward {reward:.3f}, {args.batches} batches of {PROMPTS} x {G} a model")
        print(f"{'estimator':<24}{'length':>9}{'cosine':>9}{'noise':>9}{'alignment':>11}  range over models")
        by_model = [moments.figures(list(range(m * 4, m * 4 + 4)), ESTIMATORS) for m in range(len(args.models))]
        for name in ESTIMATORS:
            figures = torch.tensor([f[name] for f in by_model])
            mean, low, high = figures.mean(0).tolist(), figures[:, 3].min(), figures[:, 3].max()
            print(f"{name:<24}{mean[0]:>9.3f}{mean[1]:>9.3f}{mean[2]:>9.2f}{mean[3]:>11.4f}  {low:.4f} .. {high:.4f}")
        grid = [0, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0]
        for part in ("rest", "rest | peers"):
            combos = {str(w): {"answer": 1.0, "top": 1.0, part: w} for w in grid}
            scores = torch.tensor(
                [
                    [f[3] for f in moments.figures(list(range(m * 4, m * 4 + 4)), combos).values()]
                    for m in range(len(args.models))
                ]
            )
            print(
                f"best weight on {part}: {grid[int(scores.mean(0).argmax())]}; alignment by weight "
                + " ".join(f"{w}:{s:.4f}" for w, s in zip(grid, scores.mean(0).tolist(), strict=True)),
                flush=True,
            )


if __name__ == "__main__":
    main()
