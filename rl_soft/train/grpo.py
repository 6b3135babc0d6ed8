"""SoftGRPOTrainer: TRL's GRPOTrainer with soft rollouts and their exact log-density, and nothing else.

One step of GRPO, and where each line is written:

    rows       = sampler(dataset)                            train/sampler.py           the same order after a resume
    rollout    = rollout(model, layout, prompts, seeds)      rollouts/engine.py        G completions per prompt
    batch      = SoftBatch.from_rollout(rollout)             train/soft_batch.py       what was drawn, and its density
    rewards    = reward_functions(completions, columns)      rewards/                  called by TRL
    advantages = (reward - group mean) / group std           TRL
    old        = log-densities before the first update       model/scored_forward.py   where TRL needs them
    log_probs  = model(soft=batch.inputs(...)).log_probs     model/scored_forward.py   recomputed with gradients
    ratio      = exp(log_probs - old)                        TRL
    loss       = -min(ratio advantage, clip(ratio) advantage)    TRL; all its loss types
    loss      += beta KL(policy, reference)                  model/kl.py for K > 1, else TRL

TRL keeps the loop. Seven of its methods are overridden, each thinly (tests/train/test_grpo.py holds their signatures
and that K = 1 equals TRL). For K > 1, TRL's one-sample estimate of the KL overflows off policy; there the KL is that
of the two categoricals, over the whole vocabulary, at every sampled position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rl_soft.config.refusals import training_cuts
from rl_soft.model.devices import avoid_cudnn_attention
from rl_soft.model.gate import KeepsGate, add_gate
from rl_soft.model.projector import KeepsProjector, add_projector, beside_adapter
from rl_soft.model.quantised import in_float32, trained_values
from rl_soft.model.scored_forward import add_soft_forward
from rl_soft.model.side_modules import language_model
from rl_soft.rollouts import cuda_graphs
from rl_soft.rollouts.engine import Rollout, rollout
from rl_soft.thoughts.kinds import KINDS, RATIOS
from rl_soft.thoughts.layout import Layout, check_texts
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import vllm_rollouts
from rl_soft.train.checks import check_config, check_model, check_prompts
from rl_soft.train.evaluations import EvaluatesPassAtK
from rl_soft.train.groups import FiltersGroups
from rl_soft.train.metrics import density_gap, ratio_metrics, rollout_metrics
from rl_soft.train.normaliser import aggregate
from rl_soft.train.reference import Reference, check_reference
from rl_soft.train.runtime.clock import StepClock, peak_gib
from rl_soft.train.runtime.completions import show_completions
from rl_soft.train.runtime.guards import Guarded, check_density_gap
from rl_soft.train.runtime.sharded import prepare_fsdp, whole_model
from rl_soft.train.sampler import EpochSampler
from rl_soft.train.soft_batch import Generated, Pass, SoftBatch, parts, rows_in_loss, with_second_factor
from rl_soft.train.start import fitting, folder_name, policy_of, row_id, settle, with_template


class SoftGRPOTrainer(EvaluatesPassAtK, KeepsGate, KeepsProjector, FiltersGroups, Guarded, GRPOTrainer):
    """GRPO over soft rollouts.

    Args:
        model: a hub id, a folder (of this package, of transformers, or a PEFT adapter), or a causal LM.
        reward_funcs: as in TRL: functions of (prompts, completions, columns) that return one number or None per
            completion.
        args: `trl.GRPOConfig`. Its max_completion_length, temperature and disable_dropout are set from `thinking`.
        train_dataset, eval_dataset: rows with a column `prompt` (the question, or chat messages) and what the rewards
            read. `id` addresses the noise of a row; without it the prompt's hash does.
        processing_class: the tokenizer; loaded from the model's folder or id where it is None.
        thinking: what a thought is. None: what a folder of this package was trained for.
        ratio: what stands in the policy ratio of a thought, a name of `rl_soft.thoughts.kinds.RATIOS`; None takes the
            one that docs/grpo.md recommends for the kind of thought.
        rest_weight: ratio factored: weight of the second factor in the loss.
        thought_epsilon: clip range of the ratio of thoughts, both ways; None takes that of the answer tokens.
        filter_groups: the reward by which groups are judged, `accuracy` or its name: a group in which it has one value
            leaves the loss (docs/groups.md). None keeps all.
        resample: put other problems into the places of such groups.
        max_resamples: extra rollouts at most, per rollout.
        chunk_size: positions whose (chunk, V) logits are alive at once in the training pass; None sizes it by memory.
        order: of the cuts (args.top_k, args.top_p, args.min_p) and the draw, see `rl_soft.Decoding`.
        peft_config: an adapter to train, as in TRL.
        **kwargs: other arguments of `trl.GRPOTrainer`.

    Raises:
        ValueError: no thinking; a feature that soft rollouts cannot have or never read (tools, a rollout function,
            cuts of the distribution, images); a thought kind without a density; a ratio that is not made for the kind,
            or not for the phase; gradient checkpointing where thoughts are fed one by one; a hybrid thought without
            its projector; thought_epsilon where a sequence has one ratio; a reference that cannot be made; a data set
            without prompts; temperature beside another one in `thinking`; use_vllm without a vLLM that fits.

    Source: GRPO, arXiv 2402.03300; soft thoughts with Gumbel-Softmax noise, arXiv 2508.03440; docs/grpo.md.
    """

    _tag_names = ["trl", "grpo", "rl_soft"]  # noqa: RUF012 (TRL's own declaration)
    _name = "Soft GRPO"
    _config_class: type[GRPOConfig] = GRPOConfig
    model: Any
    args: Any
    epsilon_low: Any
    epsilon_high: Any
    pad_to_multiple_of: Any
    max_completion_length: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Callable | list[Callable] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        thinking: Thinking | None = None,
        ratio: str | None = None,
        rest_weight: float = 1.0,
        thought_epsilon: float | None = None,
        filter_groups: str | None = None,
        resample: bool = False,
        max_resamples: int = 3,
        chunk_size: int | None = None,
        order: str = "exact",
        peft_config: Any = None,
        **kwargs: Any,
    ):
        avoid_cudnn_attention()
        prepare_fsdp()
        args = args or self._config_class(output_dir=f"{folder_name(model)}-RL")
        quantization = kwargs.pop("quantization_config", None)
        policy = policy_of(model, args, processing_class, peft_config is not None, quantization)
        thinking = with_template(fitting(thinking, policy), args)
        ratio = ratio or next(iter(KINDS[thinking.thought].ratios), "joint")
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, **kwargs}
        check_config(args, thinking, ratio, thought_epsilon, given)  # before TRL makes anything
        self.decoding = training_cuts(vars(args), thinking, ratio, order, args.use_vllm)
        check_model(policy.model, args, thinking, ratio, peft_config)
        check_reference(policy.model, args, peft_config)
        kind = KINDS[thinking.thought]
        peft_config = beside_adapter(peft_config) if kind.reads_hidden else peft_config
        self.layout = Layout(thinking, policy.tokenizer)
        self.ratio, self.rest_weight, self.thought_epsilon = ratio, rest_weight, thought_epsilon
        if args.use_vllm:
            vllm_rollouts.check(args, ratio)
        check_texts(self.layout)
        check_prompts(train_dataset, self.layout, policy.model)
        settle(args, self.layout)
        use_vllm, args.use_vllm = args.use_vllm, False  # TRL would make an engine for tokens
        exact = trained_values(policy.model)
        of_trl: Any = policy.model, reward_funcs, args, train_dataset, eval_dataset, policy.tokenizer
        super().__init__(*of_trl, peft_config=peft_config, **kwargs)
        wrapped = self.accelerator.unwrap_model(self.model)
        in_float32(wrapped, exact)
        add_soft_forward(wrapped.get_base_model() if is_peft_model(wrapped) else wrapped, chunk_size)
        self._filter_groups(filter_groups, resample, max_resamples)
        self._reference = Reference(self, chunk_size)
        if kind.reads_hidden:
            add_projector(language_model(wrapped), gated=kind.mixes)  # it is there, and may be frozen
        if thinking.switch == "gate":  # ZeRO-3 partitions parameters of one dtype only
            add_gate(language_model(wrapped), wrapped.dtype if self._dist.is_zero3 else torch.float32)
        self._clock = StepClock()
        self.add_callback(self._clock)
        self.full_kl_beta = 0.0  # weight of our KL; TRL's own is then off and makes no reference pass
        if thinking.support_size(wrapped.config.get_text_config().vocab_size) > 1:
            self.full_kl_beta, self.beta = self.beta, 0.0
        self.num_completions_to_print = 0  # TRL's table has every row and every word; `log` shows a few
        self._density_gap = 0.0  # the largest since the last log
        self._first_step: int | None = None  # of this process's life, whose gap may end the run
        # What TRL's methods hand to each other around us: the batch that it works on, and what the first pass over it
        # found. A pass of the reference comes later and is not kept.
        self._soft: SoftBatch
        self._pass: Pass | None = None
        self._rows_in_loss: Tensor | None = None  # None: all, or no loss is being computed
        self.use_vllm = args.use_vllm = use_vllm
        self._pushed_step = -1  # whose weights vLLM has
        if use_vllm:
            self.vllm_generation = self._vllm = vllm_rollouts.SoftVLLM(self)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout, its rewards and advantages, as the dict that TRL buffers, shuffles and splits."""
        self._soft, self._pass = self._roll_out(inputs), None
        filtered = self._filter if self.model.training else None
        with self._clock.section("scoring"):
            if filtered and filtered.attempts:
                inputs = self._resampled(inputs)
            output = super()._generate_and_score_completions(inputs)
            if filtered:
                output = self._without_equal_groups(output)
            if self.full_kl_beta:
                self._soft.ref_states = self._reference.states(self._soft, output)
            return output | self._soft.to_dict()

    def _roll_out(self, rows: list[dict[str, Any]], places: list[int] | None = None) -> SoftBatch:
        """`places`: where, among the rows of this process, these rows stand in for others."""
        prompts, seeds = [self.layout.prompt_ids(row["prompt"]) for row in rows], self._seeds(rows, places)
        with self._clock.section("rollout"):
            made = self._roll_out_by_vllm(prompts, seeds) if self.use_vllm else self._roll_out_here(prompts, seeds)
            metrics, positions = rollout_metrics(made, self.accelerator)
        self._clock.count("rollout", positions)
        if places is None:
            self._log_all(metrics)
        return SoftBatch.from_rollout(made, self.ratio, self._tokenizer.pad_token_id, self.pad_to_multiple_of)

    def _roll_out_here(self, prompts: list[list[int]], seeds: Tensor) -> Rollout:
        with whole_model(self) as model:
            return rollout(model, self.layout, prompts, seeds, self.eos_token_ids, decoding=self.decoding, keep=True)

    def _roll_out_by_vllm(self, prompts: list[list[int]], seeds: Tensor) -> Rollout:
        if self._pushed_step != self.state.global_step:
            self._vllm.sync_weights()
            self._pushed_step = self.state.global_step
        return self._vllm.rollout(prompts, seeds)

    def _seeds(self, rows: list[dict[str, Any]], places: list[int] | None = None) -> Tensor:
        """(B,) addresses of the noise: (run seed, problem id, sample index, step), and never the order of rows."""
        G = self.num_generations if self.model.training else self.num_generations_eval
        here = len(rows) if places is None else self.args.per_device_train_batch_size * self.args.steps_per_generation
        first = self.accelerator.process_index * here  # groups may straddle processes
        step, numbers = self.state.global_step, range(len(rows)) if places is None else places
        return torch.tensor(
            [address(self.args.seed, row_id(row), (first + i) % G, step) for i, row in zip(numbers, rows, strict=True)]
        )

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return [self.layout.prompt_ids(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple[list, list]:
        soft = self._soft
        return soft.rows_of(soft.completion_ids), soft.rows_of(soft.sampled_log_probs)

    def _generate(self, prompts: list) -> tuple:
        """Positions that were fed and not sampled are outside the loss. Rewards may read how many thoughts there were,
        and the text of the answer alone."""
        soft, made = self._soft, Generated(*super()._generate(prompts))
        return made._replace(
            tool_mask=soft.rows_of(soft.action_mask.int()),
            extra_fields={
                **made.extra_fields,
                "thoughts": soft.thought_mask.sum(-1).tolist(),
                "answer_text": [self.layout.answer_text(ids) for ids in made.completion_ids],
            },
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock.section("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    # -- density and loss ---------------------------------------------------------------------------------------------

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
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-densities of the recorded actions under `model`: policy, old policy or reference.

        (B, C); with a second factor (B, 2C), the second half holding log p(S, x) - log p(i*) of each thought. Then
        the entropies, of the same shape; and the load-balancing loss (), the mean over the passes as TRL takes it.
        """
        prompts = input_ids[:, : input_ids.shape[1] - logits_to_keep]  # (B, P)
        soft, rows = self._soft, self._rows_in_loss
        if rows is None or compute_aux_loss:  # experts are balanced over all rows
            found = self._passed(model, soft, prompts, attention_mask, batch_size, compute_aux_loss)
        else:
            found = self._passed(model, soft.rows(rows), prompts[rows], attention_mask[rows], batch_size)
            found = found.spread(rows, self._known_log_probs)
        self._pass = self._pass or found
        aux_loss = None if found.aux_loss is None else found.aux_loss.mean()
        return found.log_probs, found.entropy if compute_entropy else None, aux_loss

    def _passed(
        self,
        model: Any,
        soft: SoftBatch,
        prompt_ids: Tensor,
        attention_mask: Tensor,
        batch_size: int | None,
        aux_loss: bool = False,
    ) -> Pass:
        """A pass over recorded actions, `batch_size` rows at a time."""
        ref_head = None if soft.ref_states is None else self._reference.head()
        mask = attention_mask[:, : prompt_ids.shape[1] + soft.support.shape[1]]  # (B, P+C)
        found = []
        for rows in parts(len(prompt_ids), batch_size):
            inputs = soft.take(rows).inputs(
                prompt_ids[rows],
                self.layout.thinking,
                self.ratio,
                entropy_grad=self._entropy_bonus_enabled,
                ref_head=ref_head,
                aux_loss=aux_loss,
            )
            with self.accelerator.autocast():
                out = model(attention_mask=mask[rows], soft=inputs)
            second = [] if out.rest is None else [out.rest]
            log_probs = torch.cat([out.log_probs, *second], dim=1)
            entropy = torch.cat([out.entropy, *map(torch.zeros_like, second)], dim=1)
            aux = None if out.aux_loss is None else out.aux_loss.reshape(1)
            found.append(Pass(log_probs, entropy, out.kl, out.value_preds, aux))
        return Pass.joined(found)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._soft, self._pass = SoftBatch.from_dict(inputs), None
        two, thoughts = RATIOS[self.ratio].second_factor, self._soft.thought_mask
        given = inputs
        if self._filter:
            self._rows_in_loss = rows_in_loss(inputs)
            self._known_log_probs = inputs.get("old_per_token_logps", self._soft.sampled_log_probs)
        if two:
            given = with_second_factor(inputs, thoughts, self.rest_weight, self._tokenizer.pad_token_id)
        clip_range = self.epsilon_low, self.epsilon_high
        if self.thought_epsilon is not None:  # TRL's clamps take a tensor (B, C) as well as a number
            where = torch.cat([thoughts, thoughts], dim=1) if two else thoughts
            self.epsilon_low, self.epsilon_high = (torch.where(where, self.thought_epsilon, e) for e in clip_range)
        try:
            loss = super()._compute_loss(model, given)
            assert self._pass is not None
            if self._pass.kl is not None:
                loss = loss + self.full_kl_beta * aggregate(self, self._pass.kl, inputs)
            self._log_ratios(self._pass, inputs)
        finally:
            self.epsilon_low, self.epsilon_high = clip_range
            self._rows_in_loss = None
        return loss

    # -- metrics ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _log_ratios(self, found: Pass, inputs: dict[str, Any]) -> None:
        soft, C = self._soft, inputs["completion_ids"].shape[1]

        def whole(log_probs: Tensor) -> Tensor:
            """(B, C): two factors are added."""
            return log_probs[:, :C] + log_probs[:, C:] if log_probs.shape[1] > C else log_probs

        now, old = whole(found.log_probs), inputs.get("old_per_token_logps")
        old = None if old is None else whole(old)
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        first = now if old is None else old
        gap = density_gap(soft, first, mask, self.accelerator)
        as_pushed = self.use_vllm and (old is not None or self._pushed_step == self.state.global_step)
        if self._first_step is None:
            self._first_step = self.state.global_step
        if self._first_step == self.state.global_step or as_pushed:
            owner, precision = self.accelerator.unwrap_model(self.model), self.accelerator.mixed_precision
            check_density_gap(gap, soft, first, mask, owner, self.layout.thinking, precision, self.use_vllm)
        self._density_gap = max(self._density_gap, gap)
        kl = found.kl
        if self.beta:  # TRL's, of which it logs the mean over all positions
            d = whole(inputs["ref_per_token_logps"]) - now
            kl = d.exp() - d - 1
            if self.args.use_bias_correction_kl and old is not None:
                kl = kl * (now - old).exp()
        low, high = (e[:, :C] if isinstance(e, Tensor) else e for e in (self.epsilon_low, self.epsilon_high))
        metrics, kl_sum, count = ratio_metrics(
            soft, now, old, kl, inputs["advantages"], (low, high), mask, self.accelerator
        )
        self._log_all(metrics)
        if found.kl is not None:
            self._log_all({"kl": kl_sum / max(count, 1.0)})
        if self.model.training:
            self._clock.count("update", count)

    def _log_all(self, metrics: dict[str, float]) -> None:
        """Add to TRL's lists of the current mode, whose means are logged."""
        lists = self._metrics["train" if self.model.training else "eval"]
        for name, value in metrics.items():
            lists[name].append(value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds seconds per section, tokens per second, the density gap and the memory held at most."""
        if self.model.training and "loss" in logs:
            logs |= self._clock.take()
            logs["rollout/density_gap"] = self._density_gap
            self._density_gap = 0.0
            logs["memory/peak_gib"] = peak_gib()
            if self.args.device.type == "cuda":
                logs["rollout/graphs_recorded"] = cuda_graphs.recorded
        training = "loss" in logs  # the summary at the end of a run shows no completions again
        super().log(logs, *args, **kwargs)
        if self.log_completions and training and self.accelerator.is_main_process:
            made: dict[str, Any] = dict(self._logs)
            numbers = {**made["rewards"], "advantage": made["advantages"]}
            shown = self.args.num_completions_to_print
            show_completions(self.state.global_step, made["prompt"], made["completion"], numbers, shown)
