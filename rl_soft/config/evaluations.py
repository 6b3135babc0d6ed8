"""The keys of evaluations while a run trains, which are transformers' own, and what they need of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rl_soft.keys import Gathered, Mistakes, nearest
from rl_soft.thoughts.kinds import RL as RL_METHODS

if TYPE_CHECKING:
    from rl_soft.config.recipe import Recipe

STRATEGIES = ("no", "steps", "epoch")
KEYS = ("eval_steps", "metric_for_best_model", "load_best_model_at_end", "greater_is_better")
SAVE_STEPS = 100  # our default
OTHERS = ("greedy", "maj@n", "wrong", "unparsed", "truncated", "thoughts", "answer_tokens", "seconds", "share_of_time")


def metric_names(eval_k: list[int]) -> list[str]:
    """What an evaluation while training logs, each behind `eval_`."""
    return [*(f"pass@{k}{end}" for k in sorted({1, *eval_k}) for end in ("", "_low", "_high")), *OTHERS]


def check_evaluations(recipe: Recipe) -> None:
    """Raises Mistakes for evaluations that the method does not make, or that lack a key."""
    values, gathered = recipe.values, Gathered()
    strategy = values.get("eval_strategy") or "no"
    if strategy not in STRATEGIES:
        hint = nearest(strategy, STRATEGIES)
        raise Mistakes([f"eval_strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}{hint}"])
    for key in (*KEYS, *(["eval_strategy"] if strategy != "no" else [])):
        if values.get(key) in (None, False):
            continue
        if recipe.method not in RL_METHODS:
            gathered.lines.append(
                f"{key} is not available: method {recipe.method} looks at held-out rows by validation_every and "
                "stop_at_accuracy"
            )
        elif strategy == "no":
            gathered.lines.append(
                f"{key} has no effect without evaluations; write eval_strategy: steps and eval_steps: N"
            )
    if values.get("save_strategy") == "best":
        gathered.lines.append(
            "save_strategy best is not available: a run that is stopped would have no checkpoint to go on from; write "
            "load_best_model_at_end: true, which keeps the best one"
        )
    if strategy != "no" and recipe.method in RL_METHODS:
        gathered.lines += _about(recipe, strategy)
    gathered.tell()


def _about(recipe: Recipe, strategy: str) -> Iterator[str]:
    values = recipe.values
    given, known = values.get("eval_steps"), metric_names(recipe.eval.eval_k)
    every = float(given) if isinstance(given, int | float) and not isinstance(given, bool) else None
    if strategy == "steps" and given is None:
        yield "eval_steps is missing: eval_strategy steps evaluates every so many optimizer steps"
    elif strategy == "epoch" and given is not None:
        yield f"eval_steps {given} is read with eval_strategy steps; got eval_strategy epoch"
    elif every is not None and (every <= 0 or (every > 1 and every != int(every))):
        yield f"eval_steps must be a whole number of steps, or a share of all steps below 1, got {given}"
    if not recipe.data.eval_problems:
        yield f"eval_strategy {strategy} needs eval_problems, held-out problems to evaluate on, got 0"
    if values.get("eval_on_start"):
        yield "eval_on_start is not available: eval_before is that evaluation, and step 0 of the curve"
    metric = values.get("metric_for_best_model")
    if isinstance(metric, str) and metric.removeprefix("eval_") not in known:
        hint = nearest(metric.removeprefix("eval_"), known)
        yield f"metric_for_best_model must be one of {', '.join(known)}, got {metric!r}{hint}"
    if values.get("load_best_model_at_end") is True:
        saving, steps = values.get("save_strategy", "steps"), values.get("save_steps", SAVE_STEPS)
        lead = "load_best_model_at_end needs a checkpoint where there is an evaluation"
        if saving != strategy:
            yield f"{lead}: save_strategy is {saving}, eval_strategy {strategy}; make them equal"
        elif strategy == "steps" and every is not None and min(every, steps) >= 1 and steps % every:
            yield f"{lead}: save_steps {steps} is no multiple of eval_steps {given}; write save_steps: {given}"
