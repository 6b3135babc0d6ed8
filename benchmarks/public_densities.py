"""Run a recipe with a log-density of public code in the policy ratio instead of ours, for `benchmarks/learning.py`.

    python benchmarks/public_densities.py product|terms RECIPE [--key value ...]

    product   sum over the vocabulary of Gumbel log-densities of the perturbed log-probabilities (SofT-GRPO's paper)
    terms     the same sum over the K kept ids alone, without the event that the others are smaller: no density

Small vocabularies only: it holds (B, C, V) tensors.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

import rl_soft.train.grpo
from rl_soft.thoughts import noise


class PublicDensity(rl_soft.train.grpo.SoftGRPOTrainer):
    over: str = ""
    perturbed: Tensor | None = None  # (B, C, V) z of the batch at hand

    def _log_policy(self, model: Any, soft: dict[str, Tensor], input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, C, V) log-probabilities that the recorded actions were drawn from."""
        inputs = self._soft_inputs(soft, input_ids, slice(None), states_only=True)
        states = model(attention_mask=mask, soft=inputs).states
        return self.accelerator.unwrap_model(model).get_output_embeddings()(states).float().log_softmax(-1)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad():
            z = self._log_policy(self.model, output, ids, mask)
            z += torch.stack([noise.gumbel(output["seeds"], t, z.shape[-1]) for t in range(z.shape[1])], dim=1)
        output["perturbed"] = z
        # what the ratio is taken against
        output["old_per_token_logps"] = self._with_terms(
            output["old_per_token_logps"], z, self._log_policy_no_grad(output, ids, mask), output
        )
        return output

    @torch.no_grad()
    def _log_policy_no_grad(self, soft: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        return self._log_policy(self.model, soft, ids, mask)

    def _with_terms(self, log_probs: Tensor, z: Tensor, log_policy: Tensor, soft: dict[str, Tensor]) -> Tensor:
        terms = log_policy - z - (log_policy - z).exp()  # (B, C, V)
        if self.over == "terms":
            terms = terms.gather(-1, soft["support"])
        return torch.where(soft["thought_mask"].bool(), terms.sum(-1), log_probs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args, **kwargs
    ):  # type: ignore[override]
        out = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        if self.perturbed is None:
            return out
        log_policy = self._log_policy(model, self._slice, input_ids, attention_mask)
        self._log_probs = self._with_terms(out[0], self.perturbed, log_policy, self._slice)
        return (self._log_probs, *out[1:])

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.perturbed = inputs["perturbed"]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.perturbed = None


def main() -> None:
    PublicDensity.over = sys.argv[1]
    if PublicDensity.over not in ("product", "terms"):
        raise SystemExit(f"expected product or terms, got {PublicDensity.over!r}")
    rl_soft.train.grpo.SoftGRPOTrainer = PublicDensity  # type: ignore[misc]
    os.environ["RL_SOFT_DEBUG"] = "1"
    from rl_soft.cli import main as run

    run(["train", *sys.argv[2:]])


if __name__ == "__main__":
    main()
