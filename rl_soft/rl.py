"""SoftGRPOTrainer: TRL's GRPOTrainer with soft rollouts and their exact log-density, and nothing else.

TRL keeps the loop: prompts, groups, rewards, advantages, buffering, clipping, loss types, KL, logging. Six of its
methods are overridden, each thinly (tests/test_rl.py holds their signatures and the K = 1 equality with stock TRL):

    _tokenize_prompts                       the layout's prompt ids instead of the tokenizer's
    _generate_single_turn                   the soft rollout; keeps its tensors in self._rollout
    _generate                               marks positions that were fed, not sampled, as outside the loss
    _generate_and_score_completions         adds support and log-weights to the batch, which TRL shuffles and splits
    _get_per_token_logps_and_entropies      the exact log-density, recomputed on the recorded actions
    _compute_loss                           hands a slice's soft tensors to the method above

The policy ratio of a thought (S, x), with i* its strongest id (`ratio`; formulas and bias in docs/grpo.md):

    joint     p(S, x)                                   the exact density, the default
    factored  p(i*) and p(S, x) / p(i*), clipped apart   same gradient at ratio 1; `rest_weight` scales the second
    top1      p(i*) = pi_{i*}                           exact as a marginal, biased as a gradient
    pathwise  none: thoughts are made again from their recorded noise, and the answer's gradient flows through them
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

SOFT_KEYS = ("support", "log_weights", "action_mask", "thought_mask", "sampled_log_probs", "seeds")


class SoftGRPOTrainer(GRPOTrainer):
    """GRPO over soft rollouts.

    Args:
        layout: how prompts and completions become ids, and what a thought is.
        ratio: what stands in the policy ratio of a thought, see above.
        rest_weight: ratio factored: weight of the second factor in the loss.
        chunk_size: positions whose (chunk, V) logits are alive at once in the training pass; None sizes it by memory.
        *args, **kwargs: as for `trl.GRPOTrainer`. The training set needs the columns prompt (the question) and id.

    Raises:
        ValueError: a feature that soft rollouts cannot have (vLLM, tools, a rollout function, images), or a thought
            kind without a density.
    """

    _tag_names = ["trl", "grpo", "rl_soft"]  # noqa: RUF012 (TRL's own declaration)
    _name = "Soft GRPO"
    model: Any
    args: Any
    pad_to_multiple_of: Any

    def __init__(
        self,
        *args: Any,
        layout: Layout,
        ratio: str = "joint",
        rest_weight: float = 1.0,
        chunk_size: int | None = None,
        **kwargs: Any,
    ):
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name} cannot be used with soft rollouts: they have a single turn")
        if layout.thinking.thought == "soft":
            raise ValueError("thought soft is a point mass and has no density; use gumbel or token for RL")
        if ratio == "pathwise" and layout.thinking.phase != "latent":
            raise ValueError("ratio pathwise needs phase latent, where every row has its thoughts first; use joint")
        self.layout, self.ratio, self.rest_weight = layout, ratio, rest_weight
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
        out[5] = {**out[5], "thoughts": self._rollout.thought_mask.sum(-1).tolist()}  # a column for reward functions
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
        sampled = {"top1": out.top_log_probs, "pathwise": out.log_probs * ~out.thought_mask}.get(
            self.ratio, out.log_probs
        )
        values = (out.support, out.log_weights, out.action_mask, out.thought_mask, sampled)
        fills = (self._tokenizer.pad_token_id, float("-inf"), 0, 0, 0)
        tensors = {
            name: pad(list(v), padding_value=fill, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
            for name, v, fill in zip(SOFT_KEYS, values, fills, strict=False)
        }
        return tensors | {"seeds": out.seeds}

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
        """Log-densities of the recorded actions under `model`: policy, old policy or reference.

        (B, C); with ratio factored (B, 2C), the second half holding log p(rest | strongest id) of each thought.
        """
        soft = self._slice if self._slice is not None else self._soft_tensors()
        P, C = input_ids.shape[1] - logits_to_keep, soft["support"].shape[1]
        log_probs, entropies = [], []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with self.accelerator.autocast():
                out = model(
                    attention_mask=attention_mask[part, : P + C],
                    soft=SoftInputs(
                        prompt_ids=input_ids[part, :P],
                        support=soft["support"][part],
                        log_weights=soft["log_weights"][part],
                        action_mask=soft["action_mask"][part].bool(),
                        thought_mask=soft["thought_mask"][part].bool(),
                        thinking=self.layout.thinking,
                        ratio=self.ratio,
                        seeds=soft["seeds"][part],
                        entropy_grad=self._entropy_bonus_enabled,
                    ),
                )
            rest = [] if out.rest is None else [out.rest]
            log_probs.append(torch.cat([out.log_probs, *rest], dim=1))
            entropies.append(torch.cat([out.entropy, *(torch.zeros_like(r) for r in rest)], dim=1))
        self._log_probs = torch.cat(log_probs)
        return self._log_probs, torch.cat(entropies) if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._slice = {key: inputs[key] for key in SOFT_KEYS}
        try:
            loss = super()._compute_loss(model, self._with_rest(inputs) if self.ratio == "factored" else inputs)
            self._log_ratios(inputs)
            return loss
        finally:
            self._slice = None

    def _with_rest(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """C more columns, one a thought for its second factor; TRL's masks multiply the loss and carry its weight."""
        ids, rest = inputs["completion_ids"], inputs["thought_mask"].float() * self.rest_weight  # (B, C)
        return {
            **inputs,
            "completion_ids": torch.cat([ids, torch.full_like(ids, self._tokenizer.pad_token_id)], dim=1),
            "completion_mask": torch.cat([inputs["completion_mask"], inputs["completion_mask"]], dim=1),
            "tool_mask": torch.cat([inputs["tool_mask"].float(), rest], dim=1),
        }

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
        """Ratio statistics of thoughts and answer tokens apart, and the live check of the claim of exactness: the
        largest distance between a rollout's log-density and the training pass's before any update."""
        C = inputs["completion_ids"].shape[1]

        def joint(log_probs: Tensor) -> Tensor:
            return log_probs[:, :C] + (log_probs[:, C:] if self.ratio == "factored" else 0)

        now, old = joint(self._log_probs.detach()), inputs.get("old_per_token_logps")
        old = None if old is None else joint(old)
        first = now if old is None else old
        actions, thoughts = inputs["action_mask"].bool(), inputs["thought_mask"].bool()
        real = actions & inputs["completion_mask"].bool()
        gap = ((first - inputs["sampled_log_probs"]).abs() * real).max()
        self._density_gap = max(self._density_gap, self.accelerator.gather(gap).max().item())
        log_ratio = torch.zeros_like(now) if old is None else now - old  # (B, C)
        advantages = inputs["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        ratio = log_ratio.exp()
        too_low, too_high = ratio < 1 - self.epsilon_low, ratio > 1 + self.epsilon_high
        clipped = (too_low & (advantages < 0)) | (too_high & (advantages > 0))
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
