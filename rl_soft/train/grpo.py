"""SoftGRPOTrainer: TRL's GRPOTrainer with soft rollouts and their exact log-density, and nothing else.

TRL keeps the loop: prompts, groups, rewards, advantages, buffering, clipping, loss types, KL, logging. Seven of its
methods are overridden, each thinly (tests/train/test_grpo.py holds their signatures and the K = 1 equality with TRL):

    _get_train_sampler                      rows in an order that a resumed run finds again in any epoch
    _tokenize_prompts                       the layout's prompt ids instead of the tokenizer's
    _generate_single_turn                   the soft rollout; keeps its tensors in self._rollout
    _generate                               marks positions that were fed, not sampled, as outside the loss
    _generate_and_score_completions         adds support and log-weights to the batch, which TRL shuffles and splits
    _get_per_token_logps_and_entropies      the exact log-density, recomputed on the recorded actions
    _compute_loss                           hands a slice's soft tensors to the method above; adds the KL for K > 1

For K > 1, TRL's one-sample KL (k3) of a K-dimensional density overflows off policy. There the KL to the reference is
that of the two categoricals, over the whole vocabulary, at every sampled position; K = 1 keeps k3 (docs/grpo.md).

The policy ratio of a thought (S, x), with i* its strongest id (`ratio`; formulas and bias in docs/grpo.md):

    joint     p(S, x)                                   the exact density, the default
    factored  p(i*) and p(S, x) / p(i*), clipped apart   same gradient at ratio 1; `rest_weight` scales the second
    top1      p(i*) = pi_{i*}                           exact as a marginal, biased as a gradient
    conditional  p(i*), and the weights are made again from their noise given i*: gradients flow through them too
    pathwise  none: thoughts are made again from their recorded noise, and the answer's gradient flows through them
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler, pad, use_adapter

from rl_soft.model.projector import KeepsProjector, add_projector
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.model.side_modules import language_model
from rl_soft.rollouts.engine import Rollout, rollout
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.train.checks import check_given
from rl_soft.train.reference import _prepare_reference, add_reference_projector, copy_reference_rows, reference_head
from rl_soft.train.runtime.clock import PhaseClock, peak_gib
from rl_soft.train.runtime.guards import Guarded

SOFT_KEYS = (
    "support", "log_weights", "action_mask", "thought_mask", "sampled_log_probs", "support_log_probs", "seeds",
)  # fmt: skip


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that is a function of (seed, epoch). TRL's own draws each epoch's order from a
    generator that goes on, which a resumed run starts from the beginning: after the first epoch it would see other
    rows. The first epoch's order is the same."""

    def set_epoch(self, epoch: int) -> None:  # the host calls it before each epoch, a resumed one included
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


class SoftGRPOTrainer(KeepsProjector, Guarded, GRPOTrainer):
    """GRPO over soft rollouts.

    Args:
        layout: how prompts and completions become ids, and what a thought is.
        ratio: what stands in the policy ratio of a thought, see above.
        rest_weight: ratio factored: weight of the second factor in the loss.
        thought_epsilon: clip range of the ratio of thoughts, both ways; None takes that of the answer tokens.
        chunk_size: positions whose (chunk, V) logits are alive at once in the training pass; None sizes it by memory.
        *args, **kwargs: as for `trl.GRPOTrainer`. The training set needs the columns prompt (the question) and id.

    Raises:
        ValueError: a feature that soft rollouts cannot have or never read (vLLM, tools, a rollout function, cuts of
            the distribution, columns of images, dropout); a thought kind without a density; a ratio that is not made
            for the thought kind; ratio pathwise or conditional in phase explicit or with gradient checkpointing; a
            hybrid thought without its projector, or with gradient checkpointing; thought_epsilon where a sequence has
            one ratio; a reference that cannot be made (`_prepare_reference`).
    """

    _tag_names = ["trl", "grpo", "rl_soft"]  # noqa: RUF012 (TRL's own declaration)
    _name = "Soft GRPO"
    model: Any
    args: Any
    epsilon_low: Any
    epsilon_high: Any
    pad_to_multiple_of: Any
    max_completion_length: Any

    def __init__(
        self,
        *args: Any,
        layout: Layout,
        ratio: str = "joint",
        rest_weight: float = 1.0,
        thought_epsilon: float | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ):
        given = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        check_given(given, layout, ratio, thought_epsilon)  # before TRL makes anything, an engine of vLLM's for one
        _prepare_reference(given.get("model"), given.get("args"), given.get("peft_config"))
        self.layout, self.ratio, self.rest_weight = layout, ratio, rest_weight
        self.thought_epsilon = thought_epsilon
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        add_soft_forward(model.get_base_model() if is_peft_model(model) else model, chunk_size)
        copy_reference_rows(model)
        if self.ref_model is not None:
            add_soft_forward(self.accelerator.unwrap_model(self.ref_model), chunk_size)
        if layout.thinking.thought == "hybrid":
            add_projector(language_model(model), gated=True)  # it is there, and may be frozen
            if self.ref_model is not None:
                add_reference_projector(self.accelerator.unwrap_model(self.ref_model))
        self._clock = PhaseClock()
        self.add_callback(self._clock)
        self._rows: list[dict[str, Any]] = []  # the inputs of the rollout under way
        self._rollout: Rollout | None = None  # the rollout just made, until it is in the batch
        self._slice: dict[str, Tensor] | None = None  # the soft tensors that the density method reads
        self._log_probs = torch.zeros(0)  # (B, C), what the density method returned last
        self._kl: Tensor | None = None  # (B, C), the KL to the reference of that pass, where it is ours
        self.full_kl_beta = 0.0  # weight of our KL; TRL's own is then off and makes no reference pass
        if layout.thinking.support_size(model.config.get_text_config().vocab_size) > 1:
            self.full_kl_beta, self.beta = self.beta, 0.0
        self._density_gap = 0.0  # the largest since the last log

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        assert self.num_generations is not None
        dataset = self.train_dataset if dataset is None else dataset
        return EpochSampler(
            data_source=dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
        )

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
        with (
            self._clock.phase("rollout"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
        ):
            out = rollout(model, self.layout, prompt_ids, self._row_seeds(), self.eos_token_ids)
        self._rollout = out
        lengths = out.lengths.tolist()
        self._log_rollout(out)
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
        with self._clock.phase("scoring"):
            output = super()._generate_and_score_completions(inputs)
            self._slice = None  # set by _soft_tensors for the old and reference passes
            output.update(self._soft_tensors())
            self._rollout = None
            if self.full_kl_beta:
                output["ref_states"] = self._reference_states(output)
            return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock.phase("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _soft_tensors(self) -> dict[str, Tensor]:
        """The rollout's recorded actions, padded exactly as TRL pads completion ids."""
        out = self._rollout
        assert out is not None
        top = out.support_log_probs[..., 0]
        sampled = {"top1": top, "conditional": top, "pathwise": out.log_probs * ~out.thought_mask}.get(
            self.ratio, out.log_probs
        )
        values = (out.support, out.log_weights, out.action_mask, out.thought_mask, sampled, out.support_log_probs)
        fills = (self._tokenizer.pad_token_id, float("-inf"), 0, 0, 0, 0)
        tensors = {
            name: pad(list(v), padding_value=fill, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
            for name, v, fill in zip(SOFT_KEYS, values, fills, strict=False)
        }
        return tensors | {"seeds": out.seeds}

    # -- reference ----------------------------------------------------------------------------------------------------

    def _reference_head(self) -> Any:
        model = self.model if self.ref_model is None else self.ref_model
        return reference_head(self.accelerator.unwrap_model(model))

    @torch.no_grad()
    def _reference_states(self, batch: dict[str, Any]) -> Tensor:
        """(B, C, H) states that the reference's head reads on the recorded actions: all its loss terms need of it."""
        soft = {key: batch[key] for key in SOFT_KEYS}
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        training = self.model.training
        batch_size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        model = self.ref_model
        switched: Any = nullcontext()
        if model is None:  # the adapter switched off, or the copy that it started from
            model, peft = self.model, self.accelerator.unwrap_model(self.model)
            switched = use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None)
        states = []
        with switched, disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for part in _parts(len(input_ids), batch_size):
                with self.accelerator.autocast():
                    inputs = self._soft_inputs(soft, input_ids, part, states_only=True)
                    states.append(model(attention_mask=mask[part], soft=inputs).states)
        return torch.cat(states)

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
        reference: dict[str, Any] = {"ref_head": self._reference_head()} if "ref_states" in soft else {}
        log_probs, entropies, kl = [], [], []
        for part in _parts(len(input_ids), batch_size):
            if reference:
                reference["ref_states"] = soft["ref_states"][part]
            with self.accelerator.autocast():
                out = model(
                    attention_mask=attention_mask[part, : P + C],
                    soft=self._soft_inputs(soft, input_ids[:, : P + C], part, **reference),
                )
            if out.kl is not None:
                kl.append(out.kl)
            rest = [] if out.rest is None else [out.rest]
            log_probs.append(torch.cat([out.log_probs, *rest], dim=1))
            entropies.append(torch.cat([out.entropy, *(torch.zeros_like(r) for r in rest)], dim=1))
        self._log_probs = torch.cat(log_probs)
        self._kl = torch.cat(kl) if kl else None
        return self._log_probs, torch.cat(entropies) if compute_entropy else None, None

    def _soft_inputs(self, soft: dict[str, Tensor], input_ids: Tensor, part: slice, **more: Any) -> SoftInputs:
        """The rows `part` of recorded actions; input_ids (B, P+C)."""
        return SoftInputs(
            prompt_ids=input_ids[part, : -soft["support"].shape[1]],
            support=soft["support"][part],
            log_weights=soft["log_weights"][part],
            action_mask=soft["action_mask"][part].bool(),
            thought_mask=soft["thought_mask"][part].bool(),
            thinking=self.layout.thinking,
            ratio=self.ratio,
            seeds=soft["seeds"][part],
            support_log_probs=soft["support_log_probs"][part],
            entropy_grad=self._entropy_bonus_enabled,
            **more,
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._slice = {key: inputs[key] for key in (*SOFT_KEYS, "ref_states") if key in inputs}
        epsilons: Any = self.epsilon_low, self.epsilon_high
        if self.thought_epsilon is not None:  # the host's clamps take a tensor (B, C) as well as a number
            thoughts = inputs["thought_mask"].bool()
            thoughts = torch.cat([thoughts, thoughts], dim=1) if self.ratio == "factored" else thoughts
            self.epsilon_low, self.epsilon_high = (torch.where(thoughts, self.thought_epsilon, e) for e in epsilons)
        try:
            loss = super()._compute_loss(model, self._with_rest(inputs) if self.ratio == "factored" else inputs)
            if self._kl is not None:
                loss = loss + self.full_kl_beta * self._aggregate(self._kl, inputs)
            self._log_ratios(inputs)
            return loss
        finally:
            self._slice = None
            self.epsilon_low, self.epsilon_high = epsilons

    def _with_rest(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """C more columns, one a thought for its second factor; TRL's masks multiply the loss and carry its weight."""
        ids, rest = inputs["completion_ids"], inputs["thought_mask"].float() * self.rest_weight  # (B, C)
        return {
            **inputs,
            "completion_ids": torch.cat([ids, torch.full_like(ids, self._tokenizer.pad_token_id)], dim=1),
            "completion_mask": torch.cat([inputs["completion_mask"], inputs["completion_mask"]], dim=1),
            "tool_mask": torch.cat([inputs["tool_mask"].float(), rest], dim=1),
        }

    def _aggregate(self, per_token: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What TRL makes of a term (B, C) of its per-token loss, with the normaliser of each loss type."""
        mask = inputs["completion_mask"] * inputs["tool_mask"]  # (B, C)
        train = self.model.training
        accumulation = self.current_gradient_accumulation_steps if train else 1.0
        masked = per_token * mask
        if self.loss_type in ("cispo", "dapo", "vespo"):
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if train:  # num_items_in_batch spans the rollout; one optimizer step takes its share
                items = items * accumulation / self.args.steps_per_generation
            return masked.sum() / items
        if self.loss_type in ("grpo", "sapo"):
            value = (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        elif self.loss_type == "bnpo":
            value = masked.sum() / mask.sum().clamp(min=1.0)
        elif self.loss_type == "dr_grpo":
            value = masked.sum() / (len(mask) * self.max_completion_length)
        else:
            assert self.loss_type == "luspo"  # TRL has refused all others
            value = masked.sum(-1).mean()
        return value / accumulation

    # -- metrics ------------------------------------------------------------------------------------------------------

    def _log_rollout(self, out: Rollout) -> None:
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
                out.failed.sum(),
                torch.tensor(float(len(thoughts)), device=thoughts.device),
            ]
        )
        sums = self.accelerator.reduce(sums, "sum").tolist()
        softness_sum, outside, entropy_t, entropy_a, n_t, n_a, failed, rows = sums
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in {
            "thoughts/softness": softness_sum / max(n_t, 1),
            "thoughts/outside_mass": outside / max(n_t, 1),
            "thoughts/entropy": entropy_t / max(n_t, 1),
            "thoughts/count": n_t / rows,
            "answer/entropy": entropy_a / max(n_a, 1),
            "rollout/failed": failed / rows,
        }.items():
            metrics[name].append(value)
        self._clock.count("rollout", n_t + n_a)

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
        low, high = (e[:, :C] if isinstance(e, Tensor) else e for e in (self.epsilon_low, self.epsilon_high))
        too_low, too_high = ratio < 1 - low, ratio > 1 + high
        clipped = (too_low & (advantages < 0)) | (too_high & (advantages > 0))
        kl = self._kl
        if self.beta:  # TRL's, of which it logs the mean over all positions
            d = joint(inputs["ref_per_token_logps"]) - now
            kl = (d.exp() - d - 1) * (ratio if self.args.use_bias_correction_kl else 1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        kl_sum, count = 0.0, 0.0
        for name, mask in (("thoughts", real & thoughts), ("answer", real & ~thoughts)):
            terms = (ratio, log_ratio, log_ratio**2, clipped, torch.zeros_like(ratio) if kl is None else kl)
            sums = torch.stack([mask.sum(), *((x * mask).sum() for x in terms)])
            n, ratios, first_moment, second_moment, clips, kls = self.accelerator.reduce(sums, "sum").tolist()
            kl_sum, count, n = kl_sum + kls, count + n, max(n, 1.0)
            if kl is not None:
                metrics[f"{name}/kl"].append(kls / n)
            metrics[f"{name}/ratio"].append(ratios / n)
            metrics[f"{name}/log_ratio_std"].append(max(second_moment / n - (first_moment / n) ** 2, 0.0) ** 0.5)
            metrics[f"{name}/clip_fraction"].append(clips / n)
        if self._kl is not None:
            metrics["kl"].append(kl_sum / max(count, 1.0))
        if self.model.training:
            self._clock.count("update", count)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and "loss" in logs:
            logs |= self._clock.take()
            logs["rollout/density_gap"] = self._density_gap
            self._density_gap = 0.0
            logs["memory/peak_gib"] = peak_gib()
        super().log(logs, *args, **kwargs)


def _parts(rows: int, batch_size: int | None) -> Iterator[slice]:
    for start in range(0, rows, batch_size or rows):
        yield slice(start, min(start + (batch_size or rows), rows))
