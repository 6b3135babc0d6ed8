"""Groups that teach: a group in which every completion is equally right leaves the loss, and may be replaced.

    rewards  = of all completions of the rollout                     TRL
    equal    = groups in which the named reward has one value        equal_groups
    others   = rollouts of other problems in their place             FiltersGroups._resampled, max_resamples at most
    loss     = without the groups that are still equal               FiltersGroups._without_equal_groups

Never by the weighted sum: where nobody is right, a bonus for form alone would be a whole advantage. DAPO's dynamic
sampling, arXiv 2503.14476, section 3.2. Where we differ: extra rollouts hold the places of equal groups alone, and
which problem stands in for which is a function of (run seed, its id, step, attempt), so that a resumed run, or one
on other processes, draws the same ones.

Shapes: N completions of all processes, B of this one, G of a group, F reward functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rl_soft.thoughts.noise import address
from rl_soft.train.reward_functions import filtered_reward
from rl_soft.train.soft_batch import Generated, SoftBatch
from rl_soft.train.start import row_id

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Filter:
    """Which reward says whether a group teaches, and how many extra rollouts there may be per rollout."""

    reward: int
    attempts: int


def equal_groups(values: Tensor, group_size: int) -> Tensor:
    """(N / G,) bool: the groups in which a reward (N,), NaN where it does not apply, has one value or none."""
    grouped = values.view(-1, group_size)
    low, high = grouped.nan_to_num(nan=torch.inf).amin(1), grouped.nan_to_num(nan=-torch.inf).amax(1)
    return ~(high > low)


def other_row(dataset: Any, start: int, used: set[Any]) -> dict[str, Any] | None:
    """The first row from number `start` on, around the end, whose id is not in `used`; None where all are."""
    for i in range(len(dataset)):
        row: dict[str, Any] = dataset[(start + i) % len(dataset)]
        if row_id(row) not in used:
            return dict(row)
    return None


class FiltersGroups:
    """Mixin before TRL's GRPOTrainer, for a trainer that rolls out by `_roll_out`."""

    args: Any
    state: Any
    accelerator: Any
    num_generations: Any
    pad_to_multiple_of: Any
    reward_func_names: list[str]
    train_dataset: Any
    _generate: Any
    _logs: Any
    _metrics: Any
    _pending_extra_logs: Any
    _pending_metrics: Any
    _roll_out: Any
    _soft: SoftBatch
    _tokenizer: Any
    _filter: Filter | None = None
    _scored: Tensor | None = None  # (N, F), known before TRL asks for them
    _rewards: Tensor  # (N, F), of the last rollout
    _seen: tuple[Tensor, int]  # of the sampler's own groups: (N,) the filter's reward; and how many others were tried

    def _filter_groups(self, name: str | None, resample: bool, max_resamples: int) -> None:
        """Once TRL's trainer is made.

        Raises:
            ValueError: resampling without a filter, or from a stream; what `filtered_reward` refuses.
        """
        if name is None:
            if resample:
                raise ValueError("resample needs filter_groups, which says which groups are replaced: accuracy")
            return
        if resample and not hasattr(self.train_dataset, "__getitem__"):
            raise ValueError("resample draws rows by their number: give train_dataset as a datasets.Dataset")
        if resample and max_resamples < 1:
            raise ValueError(f"max_resamples must be at least 1, got {max_resamples}")
        self._filter = Filter(filtered_reward(name, self.reward_func_names), max_resamples if resample else 0)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._scored is not None:
            self._rewards, self._scored = self._scored, None
        else:
            self._rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self._rewards

    # -- the loss -----------------------------------------------------------------------------------------------------

    def _without_equal_groups(self, output: dict[str, Any]) -> dict[str, Any]:
        """TRL's batch in which equal groups have advantage 0 and no position in the loss."""
        assert self._filter is not None
        G, B = self.num_generations, len(output["advantages"])
        values = self._rewards[:, self._filter.reward]
        equal = equal_groups(values, G)
        gone_of_all = equal.repeat_interleave(G)  # (N,)
        first = self.accelerator.process_index * B
        gone = gone_of_all[first : first + B]
        output["advantages"] = output["advantages"].masked_fill(gone, 0.0)
        output["tool_mask"] = output["tool_mask"] * ~gone[:, None]
        items = (output["completion_mask"] * output["tool_mask"]).sum()
        output["num_items_in_batch"] = self.accelerator.gather(items).sum()
        shown = self._logs["advantages"]  # of the completions table
        for i in gone_of_all.nonzero().flatten().tolist():
            shown[len(shown) - len(values) + i] = 0.0
        own, tried = self._seen if self._filter.attempts else (values, 0)
        metrics = {
            "groups/equal": equal_groups(own, G).float().mean().item(),
            "groups/left_out": equal.float().mean().item(),
            "groups/accuracy": own.nanmean().item(),
        }
        for name, value in (metrics | ({"groups/resampled": tried} if self._filter.attempts else {})).items():
            self._metrics["train"][name].append(value)
        return output

    # -- other problems -----------------------------------------------------------------------------------------------

    def _resampled(self, inputs: Rows) -> Rows:
        """The rows of this process, those of equal groups replaced where another problem teaches; `_soft` likewise."""
        assert self._filter is not None
        G, B, process = self.num_generations, len(inputs), self.accelerator.process_index
        column, rows, tried, pad_id = self._filter.reward, list(inputs), 0, self._tokenizer.pad_token_id
        soft, rewards = self._soft, self._score(rows)
        own, pending, extras = rewards[:, column].clone(), self._pending(), self._taken_extras()
        ids = gather_object([row_id(row) for row in inputs])[::G]
        used = set(ids)
        for attempt in range(self._filter.attempts):
            others = self._others(equal_groups(rewards[:, column], G), ids, used, attempt)
            if not others:
                break
            tried += len(others)
            placed = [[i for i in range(p * B, p * B + B) if i // G in others] for p in range(len(rewards) // B)]
            width = max(map(len, placed))
            places = [i - process * B for i in placed[process]]
            # Every process rolls out as many rows, so that they meet; what fills them up is thrown away.
            padding = [0] * (width - len(places))
            new = [dict(others[(process * B + i) // G]) for i in places] + [dict(inputs[0]) for _ in padding]
            self._soft = self._roll_out(new, places + padding)
            found = self._score(new)  # (processes x width, F)
            made = rewards.clone()
            for p, numbers in enumerate(placed):
                made[numbers] = found[p * width : p * width + len(numbers)]
            better = ~equal_groups(made[:, column], G)
            teaches = {group for group in others if better[group]}
            for group in teaches:
                rewards[group * G : group * G + G] = made[group * G : group * G + G]
            kept = [j for j, i in enumerate(places) if (process * B + i) // G in teaches]
            soft = soft.replaced([places[j] for j in kept], self._soft.rows(kept), pad_id, self.pad_to_multiple_of)
            new_extras = self._taken_extras()
            for j in kept:
                rows[places[j]] = new[j]
            for name in (extras.keys() | new_extras.keys()) if kept else ():
                column_of = extras.setdefault(name, [None] * B)
                for j in kept:
                    column_of[places[j]] = new_extras[name][j] if name in new_extras else None
        self._soft, self._scored, self._seen = soft, rewards, (own, tried)
        self._put_back(pending, extras)
        return rows

    def _others(self, equal: Tensor, ids: list[Any], used: set[Any], attempt: int) -> dict[int, dict[str, Any]]:
        """Group -> the row tried in its place; fewer where the data set has no other problems. Adds to `used`."""
        others = {}
        for group in equal.nonzero().flatten().tolist():
            name = f"in place of {ids[group]}, attempt {attempt}"
            start = address(self.args.seed, name, 0, self.state.global_step) % len(self.train_dataset)
            row = other_row(self.train_dataset, start, used)
            if row is None:
                break
            used.add(row_id(row))
            others[group] = row
        return others

    def _score(self, rows: Rows) -> Tensor:
        """(N, F) rewards of the completions in `_soft`, one for each of these rows."""
        prompts = [row["prompt"] for row in rows]
        with self._unlogged():
            made = Generated(*self._generate(prompts))
        for i, row in enumerate(rows):
            row |= {name: values[i] for name, values in made.extra_fields.items()}
        return self._calculate_rewards(rows, prompts, made.completions, made.completion_ids)

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """TRL counts and logs a batch when it takes it up, which it does once more."""
        metrics, tokens = self._metrics["train"], self.state.num_input_tokens_seen
        self._metrics["train"] = defaultdict(list)
        try:
            yield
        finally:
            self._metrics["train"], self.state.num_input_tokens_seen = metrics, tokens

    # What the reward functions logged: metrics are those of the sampler's own problems, columns of the completions
    # table those of the completions that stay.

    def _pending(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._pending_metrics.items()}

    def _taken_extras(self) -> dict[str, list[Any]]:
        taken = {name: list(values) for name, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        return taken

    def _put_back(self, metrics: dict[str, list[float]], extras: dict[str, list[Any]]) -> None:
        for held, values in ((self._pending_metrics, metrics), (self._pending_extra_logs, extras)):
            held.clear()
            held.update(values)
