"""What a recipe needs besides its keys: its rows, its rewards, what it starts from, its folder.

Nothing here imports torch: `rl-soft check`, which `launch.sh` runs before its processes, answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import yaml

from rl_soft.config.recipe import RL_METHODS, Recipe, batch_plan, check_output_dir, warm_start_of
from rl_soft.config.theirs import world_size as world_size
from rl_soft.data import sources as data
from rl_soft.evaluation.judging import check_golds
from rl_soft.keys import Gathered
from rl_soft.model.folder import check_revision, model_folder
from rl_soft.train.reward_functions import filtered_reward, logged_names, reward_functions


class Rows(NamedTuple):
    train: list[data.Row]
    test: list[data.Row]  # held out; empty where nothing is evaluated


def load_rows(recipe: Recipe) -> Rows:
    """Training and held-out problems, which never overlap (asserted by question hash); their golds can be read.

    Raises:
        ValueError: rows that cannot be had or used, or fewer than a rollout takes.
    """
    d = recipe.data
    options, columns = d.dataset_options or {}, d.dataset_columns
    train = data.load_rows(d.dataset, "train", d.train_size, d.data_seed_train, options, columns, "train_size")
    check_golds(train, d.dataset)
    if recipe.method in RL_METHODS and len(train) < recipe.extra.prompts_per_step:
        raise ValueError(
            f"prompts_per_step {recipe.extra.prompts_per_step} is more than the {len(train)} training rows of dataset "
            f"{d.dataset}: a rollout takes each prompt once; lower it, or take more rows"
        )
    if not d.eval_problems:
        return Rows(train, [])
    test = data.load_rows(
        d.eval_dataset or d.dataset,
        "evaluation",
        d.eval_problems,
        d.data_seed_eval,
        (d.eval_dataset_options or {}) if d.eval_dataset else options,
        d.eval_dataset_columns if d.eval_dataset else columns,
        "eval_problems",
    )
    check_golds(test, d.eval_dataset or d.dataset)
    data.assert_disjoint(train, test)
    return Rows(train, test)


def check_rl(recipe: Recipe) -> list[Callable]:
    """The reward functions of a recipe, whose batches divide over the processes."""
    batch_plan(recipe, world_size())
    return rewards_of(recipe)


def rewards_of(recipe: Recipe) -> list[Callable]:
    """Raises ValueError for a reward that cannot be found, and for a filter_groups that names none."""
    functions = reward_functions(recipe.extra.rewards)
    name = getattr(recipe.extra, "filter_groups", None)
    if name is not None:
        filtered_reward(name, logged_names(functions))
    return functions


def check_ready(recipe: Recipe) -> None:
    """Raises Mistakes for what a run of the recipe would end with before it has loaded a model.

    Rows are read where that is quick: of files, and one of a generator; those of the hub are left to the run.
    """
    gathered = Gathered()
    with gathered:
        check_output_dir(recipe)
    with gathered:
        warm_start_of(recipe)
    with gathered:
        if recipe.model.model_name_or_path:
            check_revision(model_folder(recipe.model.model_name_or_path), recipe.model.model_revision)
    if recipe.method in RL_METHODS:
        with gathered:
            batch_plan(recipe, world_size())
        with gathered:
            rewards_of(recipe)
    with gathered:
        _check_rows(recipe, quickly=bool(gathered.lines))
    gathered.tell()


def _check_rows(recipe: Recipe, quickly: bool) -> None:
    """`quickly`: without the generators, whose import takes a second."""
    d = recipe.data
    sources = [(d.dataset, d.dataset_options, d.dataset_columns)]
    if d.eval_problems and d.eval_dataset:
        sources.append((d.eval_dataset, d.eval_dataset_options, d.eval_dataset_columns))
    if all(data.is_at_hand(source, options) for source, options, _ in sources):
        load_rows(recipe)
        return
    for source, options, columns in sources:
        if data.is_at_hand(source, options):
            data.load_rows(source, "train", None, 0, options, columns)
        elif not (quickly or data.is_of_hub(source)):
            data.load_rows(source, "train", 1, 0, options, columns)


def describe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, for `rl-soft check`, once it is sure that it can start."""
    check_ready(recipe)
    return yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)
