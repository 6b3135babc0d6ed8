"""SoftPPOTrainer: SoftGRPOTrainer with per-position advantages from a value head, and nothing else.

Rollouts, densities, policy ratios, loss types, clipping and KL are GRPO's; only the advantages differ. A linear head
on the policy's trunk estimates V(s_t), the reward still to come, from the hidden state that predicts position t (the
state that the density of a_t is read from: one forward gives both). Actions are the sampled positions, thoughts and
answer tokens alike; fed positions (<eot>, the answer prompt) are not actions and are skipped. Formulas: docs/ppo.md.

The value loss reaches the trunk: the hidden states are trained to carry the value, as in PPO with shared parameters
(Schulman et al., arXiv 1707.06347, Eq. 9; Ziegler et al., arXiv 1909.08593). The head starts at zero, so the first
update's value gradient moves the head alone; its offset is the mean reward of the first rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing

from rl_soft.config.arguments import refuse_pathwise
from rl_soft.model.side_modules import language_model, save_module, split_module, taken_out
from rl_soft.model.value_head import VALUE_HEAD, add_value_head, load_value_head
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.soft_batch import SoftBatch


@dataclass
class SoftPPOConfig(GRPOConfig):
    """GRPOConfig that takes `num_generations: 1`, which has no group and so is refused by GRPO.

    Raises:
        ValueError: num_generations 1 with a rollout of one completion per process.
    """

    def __post_init__(self) -> None:
        asked = self.num_generations
        if asked == 1:  # any divisor of the rollout above 1 passes TRL's checks; nothing else is derived from it
            self.num_generations = max(
                self.per_device_train_batch_size, self.steps_per_generation or self.gradient_accumulation_steps
            )
            if self.num_generations == 1:
                raise ValueError("num_generations 1 needs a rollout of at least 2 completions per process")
            self.num_generations_eval = self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations = asked


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438) over the actions of each row.

    With the actions of a row numbered 1 .. n in their order, whatever lies between them, and V_{n+1} = 0,

        delta_k = r_k + gamma V_{k+1} - V_k,    A_k = delta_k + gamma lam A_{k+1},    r_n = reward, other r_k = 0

    Args:
        rewards: (B,) float32, paid at a row's last action.
        values: (B, T) float32.
        mask: (B, T) bool, the actions.

    Returns:
        (B, T) float32 advantages, 0 where mask is off.
    """
    advantages = torch.zeros_like(values)
    reward, next_value, next_advantage = rewards, torch.zeros_like(rewards), torch.zeros_like(rewards)  # (B,)
    for t in reversed(range(values.shape[1])):
        here, value = mask[:, t], values[:, t]
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
        reward = torch.where(here, 0.0, reward)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """max((V - R)^2, (V_clip - R)^2) / 2 a position, V_clip within `clip` of the rollout's value; same shape."""
    loss = (values - returns) ** 2
    if clip is not None:
        nearby = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (nearby - returns) ** 2)
    return loss / 2


class SoftPPOTrainer(SoftGRPOTrainer):
    """PPO over soft rollouts.

    Args:
        gamma: discount from one action to the next.
        lam: lambda of GAE; 1 takes whole returns, 0 one-step differences.
        vf_coef: weight of the value loss.
        value_clip: how far V may move from the rollout's value before its loss stops pulling; None does not clip.
        value_learning_rate: of the value head; follows the same schedule. The trunk keeps `args.learning_rate`.
        *args, **kwargs: as for `SoftGRPOTrainer`; `args` is a `SoftPPOConfig` where num_generations is 1.

    A value_head.safetensors beside the starting weights is loaded; otherwise the head starts at zero.

    Raises:
        ValueError: ratio pathwise, rewards aggregated by group, or an optimizer from a DeepSpeed file.
    """

    _tag_names = ["trl", "ppo", "rl_soft"]  # noqa: RUF012 (TRL's own declaration)
    _name = "Soft PPO"
    _config_class = SoftPPOConfig
    _logs: Any

    def __init__(
        self,
        *args: Any,
        gamma: float = 1.0,
        lam: float = 0.95,
        vf_coef: float = 0.1,
        value_clip: float | None = 0.2,
        value_learning_rate: float = 1e-4,
        **kwargs: Any,
    ):
        refuse_pathwise(kwargs.get("ratio"))
        if kwargs.get("filter_groups") is not None:
            raise ValueError("filter_groups: PPO has no groups to leave out; use SoftGRPOTrainer")
        self.gamma, self.lam, self.vf_coef, self.value_clip = gamma, lam, vf_coef, value_clip
        self.value_learning_rate = value_learning_rate
        super().__init__(*args, **kwargs)
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation {self.multi_objective_aggregation} normalises each reward in its group; "
                "PPO takes their weighted sum: use sum_then_normalize"
            )
        plugin = self.args.deepspeed_plugin
        if plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError("optimizer in the DeepSpeed file has one learning rate; leave it out to have the head's")
        model = self._language_model()
        # ZeRO-3 partitions parameters of one dtype only.
        add_value_head(model, model.dtype if self._dist.is_zero3 else torch.float32)

    def _language_model(self) -> Any:
        """The causal LM under any wrapper, where the value head sits."""
        return language_model(self.accelerator.unwrap_model(self.model))

    # -- advantages ---------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of each row of this process goes into its batch; NaN where no reward applies."""
        per_function = super()._calculate_rewards(*args, **kwargs)  # (N, F), over all processes
        weighted = per_function * self.reward_weights.to(per_function)
        rewards = weighted.nansum(dim=1).masked_fill(weighted.isnan().all(dim=1), torch.nan)  # (N,)
        first = self.accelerator.process_index * len(self._soft.lengths)
        self._soft.rewards = rewards[first : first + len(self._soft.lengths)]
        return per_function

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """GRPO's batch with its advantages replaced, and what the value loss needs."""
        output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in output:  # TRL's pass for the old densities came first
            assert self._pass is not None and self._pass.values is not None
            values = self._pass.values  # (B, C)
        else:
            with self._clock.section("scoring"):
                values = self._values_of(output)
        rewards = self._soft.rewards
        assert rewards is not None
        offset = self._language_model().value_head.offset
        if self.model.training and offset.isnan():
            of_all = self.accelerator.gather(rewards)
            if (scored := ~of_all.isnan()).any():
                offset.fill_(of_all[scored].mean())
                values = values + offset
        in_loss = output["completion_mask"].bool() & output["tool_mask"].bool()
        mask = in_loss & ~rewards.isnan()[:, None]  # (B, C)
        rewards = rewards.nan_to_num(0.0)

        advantages = gae(rewards, values, mask, self.gamma, self.lam)
        returns = (advantages + values) * mask
        self._log_values(rewards, values, returns, mask)
        output["advantages"] = self._whiten(advantages, mask)
        output |= {"old_values": values, "returns": returns, "value_mask": mask}
        self._show_advantages(output["advantages"].sum(-1) / mask.sum(-1).clamp(min=1))
        return output

    def _show_advantages(self, advantages: Tensor) -> None:
        """Put these (B,) into the completions table, where TRL has just put its own."""
        shown, table = gather_object(advantages.tolist()), self._logs["advantages"]
        for _ in range(min(len(shown), len(table))):
            table.pop()
        table.extend(shown)

    @torch.no_grad()
    def _values_of(self, batch: dict[str, Any]) -> Tensor:
        """(B, C) values of a batch under the current weights, `per_device_train_batch_size` rows at a time."""
        args = self.args
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)  # (B, P+C)
        soft = SoftBatch.from_dict(batch)
        with disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            values = self._passed(self.model, soft, batch["prompt_ids"], mask, batch_size).values
        assert values is not None
        return values

    def _whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the actions of all processes; 0 off the mask."""
        total, count = self._sum(advantages * mask, mask)
        centred = (advantages - total / count.clamp(min=1)) * mask
        variance = self._sum(centred**2)[0] / count.clamp(min=1)
        return centred * torch.rsqrt(variance + 1e-8)

    def _sum(self, *tensors: Tensor) -> Tensor:
        """The sum of each tensor over all processes."""
        return self.accelerator.reduce(torch.stack([x.float().sum() for x in tensors]), "sum")

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        assert self._pass is not None and self._pass.values is not None  # of the same forward as the densities
        return loss + self.vf_coef * self._value_loss(self._pass.values, inputs)

    def _value_loss(self, values: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Mean over the actions of an optimizer step on all processes, as TRL's dapo loss takes it."""
        mask, old_values, returns = inputs["value_mask"].bool(), inputs["old_values"], inputs["returns"]
        loss = clipped_value_loss(values, old_values, returns, self.value_clip) * mask  # (B, C)
        stopped = mask & (loss > (values - returns) ** 2 / 2)
        actions, accumulation = inputs["num_items_in_batch"].clamp(min=1.0), 1  # of all processes
        if self.model.training:  # num_items_in_batch spans the rollout; a micro-batch has its share
            actions = actions / self.args.steps_per_generation
            accumulation = self.current_gradient_accumulation_steps
        total, clipped = (self._sum(loss.detach(), stopped) / actions).tolist()
        self._log_all({"value/loss": total, "value/clip_fraction": clipped})
        return loss.sum() * self.accelerator.num_processes / (actions * accumulation)

    def _log_values(self, rewards: Tensor, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Means of values and returns, and the share of the variance of the observed return that V explained."""
        remaining = mask.flip(-1).cumsum(-1).flip(-1) - 1  # (B, C), actions after this one
        observed = rewards[:, None] * self.gamma ** remaining.clamp(min=0)
        error = observed - values
        sums = self._sum(mask, values * mask, returns * mask, observed * mask, error * mask)
        count = sums[0].clamp(min=1)
        _, value, mean_return, mean_observed, mean_error = (sums / count).tolist()
        variances = self._sum(((error - mean_error) * mask) ** 2, ((observed - mean_observed) * mask) ** 2)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["value/mean"].append(value)
        metrics["value/returns"].append(mean_return)
        unexplained, variance = variances.tolist()
        # All returns equal: there is nothing to explain. NaN is left out of TRL's means.
        metrics["value/explained_variance"].append(1 - unexplained / variance if variance > 0 else float("nan"))
        if self.num_generations == 1:
            metrics.pop("frac_reward_zero_std", None)  # of groups, and there are none

    # -- optimizer and files ------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The head in a parameter group of its own, with `value_learning_rate` and without weight decay."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made:
            head = list(self._language_model().value_head.parameters())
            ids = {id(p) for p in head}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group({"params": head, "lr": self.value_learning_rate, "weight_decay": 0.0})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A plain model or adapter folder, and the head in a file beside it. DeepSpeed hands a gathered state in."""
        state, head = split_module(self.model.state_dict() if state_dict is None else state_dict, VALUE_HEAD)
        super()._save(output_dir, state)
        if self.args.should_save:
            save_module(Path(output_dir or self.args.output_dir), VALUE_HEAD, head)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        owner = self._language_model()
        with taken_out(owner, VALUE_HEAD):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_value_head(owner, Path(resume_from_checkpoint))
