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

from rl_soft.thoughts import noise
from rl_soft.train import pipeline
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.soft_batch import SoftBatch


class PublicDensity(SoftGRPOTrainer):
    over: str = ""
    perturbed: Tensor | None = None  # (B, C, V) z of the batch at hand

    def _log_policy(self, model: Any, soft: SoftBatch, prompt_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, C, V) log-probabilities that the recorded actions were drawn from."""
        inputs = soft.inputs(prompt_ids, self.layout.thinking, self.ratio, states_only=True)
        states = model(attention_mask=mask, soft=inputs).states
        return self.accelerator.unwrap_model(model).get_output_embeddings()(states).float().log_softmax(-1)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        soft = self._soft
        with torch.no_grad():
            log_policy = self._log_policy(self.model, soft, output["prompt_ids"], mask)
        z = torch.stack([noise.gumbel(soft.seeds, t, log_policy.shape[-1]) for t in range(log_policy.shape[1])], dim=1)
        output["perturbed"] = z = log_policy + z
        # what the ratio is taken against
        output["old_per_token_logps"] = self._with_terms(output["old_per_token_logps"], z, log_policy, soft)
        return output

    def _with_terms(self, log_probs: Tensor, z: Tensor, log_policy: Tensor, soft: SoftBatch) -> Tensor:
        terms = log_policy - z - (log_policy - z).exp()  # (B, C, V)
        if self.over == "terms":
            terms = terms.gather(-1, soft.support)
        return torch.where(soft.thought_mask, terms.sum(-1), log_probs)

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple:
        log_probs, *rest = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self.perturbed is not None:
            log_policy = self._log_policy(model, self._soft, input_ids[:, :-logits_to_keep], attention_mask)
            log_probs = self._with_terms(log_probs, self.perturbed, log_policy, self._soft)
            assert self._pass is not None
            self._pass = self._pass._replace(log_probs=log_probs)
        return log_probs, *rest

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
    pipeline.SoftGRPOTrainer = PublicDensity  # type: ignore[misc]
    os.environ["RL_SOFT_DEBUG"] = "1"
    from rl_soft.cli import main as run

    run(["train", *sys.argv[2:]])


if __name__ == "__main__":
    main()
