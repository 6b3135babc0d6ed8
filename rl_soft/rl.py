"""SoftGRPOTrainer: TRL's GRPOTrainer with soft rollouts and their exact log-density, and nothing else.

TRL keeps the loop: prompts, groups, rewards, advantages, buffering, clipping, loss types, KL, logging. Five of its
methods are overridden, each thinly (tests/test_rl.py holds their signatures and the K = 1 equality with stock TRL):

    _tokenize_prompts                       the layout's prompt ids instead of the tokenizer's
    _generate_single_turn                   the soft rollout; keeps its tensors in self._rollout
    _generate                               marks positions that were fed, not sampled, as outside the loss
    _generate_and_score_completions         adds support and log-weights to the batch, which TRL shuffles and splits
    _get_per_token_logps_and_entropies      the exact log-density, recomputed on the recorded actions
    _compute_loss                           hands a slice's soft tensors to the method above
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from rl_soft.layout import Layout
from rl_soft.noise import address
from rl_soft.policy import SoftInputs, add_soft_forward
from rl_soft.rollout import Rollout, rollout

SOFT_KEYS = ("support", "log_weights", "action_mask", "thought_mask", "sampled_log_probs")


class SoftGRPOTrainer(GRPOTrainer):
    """GRPO over soft rollouts.

    Args:
        layout: how prompts and completions become ids, and what a thought is.
        chunk_size: positions whose (chunk, V) logits are alive at once in the training pass.
        *args, **kwargs: as for `trl.GRPOTrainer`. The training set needs the columns prompt (the question) and id.

    Raises:
        ValueError: a feature that soft rollouts cannot have (vLLM, tools, a rollout function, images), or a thought
            kind without a density.
    """

    _tag_names = ["trl", "grpo", "rl_soft"]  # noqa: RUF012 (TRL's own declaration)
    _name = "Soft GRPO"

    def __init__(self, *args: Any, layout: Layout, chunk_size: int = 1024, **kwargs: Any):
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name} cannot be used with soft rollouts: they have a single turn")
        if layout.thinking.thought == "soft":
            raise ValueError("thought soft is a point mass and has no density; use gumbel or token for RL")
        self.layout = layout
        super().__init__(*args, **kwargs)
        if self.args.use_vllm:
            raise ValueError("use_vllm: vLLM takes embeddings for prompts only, so soft thoughts cannot go through it")
        model = self.accelerator.unwrap_model(self.model)
        add_soft_forward(model.get_base_model() if is_peft_model(model) else model, chunk_size)
        if self.ref_model is not None:
            add_soft_forward(self.accelerator.unwrap_model(self.ref_model), chunk_size)
        self._rows: list[dict[str, Any]] = []  # the inputs of the rollout under way
        self._rollout: Rollout | None = None  # the rollout just made, until it is in the batch
        self._slice: dict[str, Tensor] | None = None  # the soft tensors that the density method reads
        self._log_probs = torch.zeros(0)  # (B, C), what the density method returned last
        self._density_gap = 0.0  # the largest since the last log

    # -- rollout ------------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return [self.layout.prompt_ids(prompt) for prompt in prompts], None, {}

    def _row_seeds(self) -> Tensor:
        """Noise addresses of this process's rows: (run seed, problem id, sample index, step); never their order."""
        mode = "train" if self.model.training else "eval"
        G = self.num_generations if mode == "train" else self.num_generations_eval
        first = self.accelerator.process_index * len(self._rows)  # groups may straddle processes
        return torch.tensor(
            [
                address(self.args.seed, row["id"], (first + i) % G, self.state.global_step)
                for i, row in enumerate(self._rows)
            ]
        )

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, list]:
        started = time.perf_counter()
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            out = rollout(model, self.layout, prompt_ids, self._row_seeds(), self.eos_token_ids)
        self._rollout = out
        lengths = out.lengths.tolist()
        self._log_rollout(out, time.perf_counter() - started)
        completions = [ids[:n] for ids, n in zip(out.completion_ids.tolist(), lengths, strict=True)]
        log_probs = [values[:n] for values, n in zip(out.log_probs.tolist(), lengths, strict=True)]
        return completions, log_probs

    def _generate(self, prompts: list) -> tuple:
        out = list(super()._generate(prompts))
        assert self._rollout is not None
        lengths = self._rollout.lengths.tolist()
        actions = self._rollout.action_mask.int().tolist()
        out[2] = [mask[:n] for mask, n in zip(actions, lengths, strict=True)]  # TRL's tool mask: 1 = model's own
        return tuple(out)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions(inputs)
        self._slice = None  # set by _soft_tensors for the old and reference passes
        output.update(self._soft_tensors())
        self._rollout = None
        return output

    def _soft_tensors(self) -> dict[str, Tensor]:
        """The rollout's recorded actions, padded exactly as TRL pads completion ids."""
        out = self._rollout
        assert out is not None
        values = (out.support, out.log_weights, out.action_mask, out.thought_mask, out.log_probs)
        fills = (self._tokenizer.pad_token_id, float("-inf"), 0, 0, 0)
        return {
            name: pad(list(v), padding_value=fill, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
            for name, v, fill in zip(SOFT_KEYS, values, fills, strict=True)
        }

    # -- density ------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Exact log-densities (B, C) of the recorded actions under `model`: policy, old policy or reference."""
        soft = self._slice if self._slice is not None else self._soft_tensors()
        thinking, prompt_ids = self.layout.thinking, input_ids[:, :-logits_to_keep]
        log_probs, entropies = [], []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with self.accelerator.autocast():
                out = model(
                    attention_mask=attention_mask[part],
                    soft=SoftInputs(
                        prompt_ids=prompt_ids[part],
                        support=soft["support"][part],
                        log_weights=soft["log_weights"][part],
                        action_mask=soft["action_mask"][part].bool(),
                        thought_mask=soft["thought_mask"][part].bool(),
                        tau=thinking.thought_tau,
                        thought_temperature=thinking.thought_temperature,
                        temperature=thinking.temperature,
                    ),
                )
            log_probs.append(out.log_probs)
            entropies.append(out.entropy)
        self._log_probs = torch.cat(log_probs)
        return self._log_probs, torch.cat(entropies) if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._slice = {key: inputs[key] for key in SOFT_KEYS}
        try:
            loss = super()._compute_loss(model, inputs)
            self._log_ratios(inputs)
            return loss
        finally:
            self._slice = None

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _log_rollout(self, out: Rollout, seconds: float) -> None:
        """Softness, entropy and outside mass of the thoughts; sums and counts over all processes, then the ratio."""
        thoughts, answers = out.thought_mask, out.action_mask & ~out.thought_mask
        weights = out.log_weights.exp()
        softness = -(weights * out.log_weights.clamp(min=-1e4)).sum(-1)  # (B, T) nats, entropy of the mixing weights
        sums = torch.stack(
            [
                (softness * thoughts).sum(),
                (out.outside * thoughts).sum(),
                (out.entropy * thoughts).sum(),
                (out.entropy * answers).sum(),
                thoughts.sum(),
                answers.sum(),
                torch.tensor(float(len(thoughts)), device=thoughts.device),
            ]
        )
        softness_sum, outside, entropy_t, entropy_a, n_t, n_a, rows = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in {
            "thoughts/softness": softness_sum / max(n_t, 1),
            "thoughts/outside_mass": outside / max(n_t, 1),
            "thoughts/entropy": entropy_t / max(n_t, 1),
            "thoughts/count": n_t / rows,
            "answer/entropy": entropy_a / max(n_a, 1),
            "rollout/seconds": seconds,
            "rollout/tokens_per_second": (n_t + n_a) / max(seconds, 1e-9),
        }.items():
            metrics[name].append(value)

    @torch.no_grad()
    def _log_ratios(self, inputs: dict[str, Any]) -> None:
        """Ratio statistics of thoughts and answer tokens apart, and the live check of the claim of exactness: the largest
        distance between a rollout's log-density and the one recomputed by the training pass before any update."""
        now, old = self._log_probs.detach(), inputs.get("old_per_token_logps")
        first = now if old is None else old
        actions, thoughts = inputs["action_mask"].bool(), inputs["thought_mask"].bool()
        real = actions & inputs["completion_mask"].bool()
        gap = ((first - inputs["sampled_log_probs"]).abs() * real).max()
        self._density_gap = max(self._density_gap, self.accelerator.gather(gap).max().item())
        log_ratio = torch.zeros_like(now) if old is None else now - old  # (B, C)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        ratio = log_ratio.exp()
        clipped = ((ratio < 1 - self.epsilon_low) & (advantages < 0)) | ((ratio > 1 + self.epsilon_high) & (advantages > 0))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, mask in (("thoughts", real & thoughts), ("answer", real & ~thoughts)):
            sums = torch.stack([mask.sum(), *((x * mask).sum() for x in (ratio, log_ratio, log_ratio**2, clipped))])
            n, ratios, first_moment, second_moment, clips = self.accelerator.reduce(sums, "sum").tolist()
            n = max(n, 1.0)
            metrics[f"{name}/ratio"].append(ratios / n)
            metrics[f"{name}/log_ratio_std"].append(max(second_moment / n - (first_moment / n) ** 2, 0.0) ** 0.5)
            metrics[f"{name}/clip_fraction"].append(clips / n)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training:
            logs["rollout/density_gap"] = self._density_gap
            self._density_gap = 0.0
        super().log(logs, *args, **kwargs)
