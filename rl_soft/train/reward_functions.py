"""The `rewards` of a recipe, as the functions that TRL calls.

rewards: [math_accuracy]                        a name of the package `rewards`
rewards: [my_module.my_reward]                  a dotted path
rewards: [{math_accuracy: {strict: true}}]      with parameters: of a function, or of a class such as ThoughtCost
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from rl_soft.keys import nearest

logger = logging.getLogger("rl_soft")

# What TRL or our rollout passes by keyword at each call: no parameters of a recipe.
PASSED = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
    "thoughts", "answer_text", "id", "answer", "answer_type", "source",
}  # fmt: skip


def reward_functions(entries: list[str | dict[str, Any]]) -> list[Callable]:
    """The functions, in the order of the entries; one with parameters is logged under its own name (`own_names`).

    Raises:
        ValueError: an entry that is neither a name nor one name with a mapping, a name that is not found, or a
            parameter that the reward does not have (with those that it has).
    """
    return [_reward(entry) for entry in entries]


def own_names(names: Sequence[str]) -> list[str]:
    """The names that rewards are logged under: TRL's, which are those of the functions, and `NAME_2` for a second one
    of a name, whose metrics would be mixed with those of the first."""
    own: list[str] = []
    for i, name in enumerate(names):
        taken = {*own, *names[i + 1 :]} if name in own else set()
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        own.append(next(other for other in numbered if other not in taken) if taken else name)
        if own[-1] != name:
            logger.info("reward %d is logged as %s: another one is called %s too", i + 1, own[-1], name)
    return own


def _reward(entry: Any) -> Callable:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"rewards: an entry is a name or {{name: {{parameter: value}}}}, got {entry!r}")
    name, parameters = next(iter(entry.items()))
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise ValueError(f"rewards: {name} takes its parameters as {{parameter: value}}, got {parameters!r}")
    function = _find(name)
    if parameters:
        _check_parameters(name, function, parameters)
    if not isinstance(function, type):
        return functools.partial(function, **parameters) if parameters else function
    try:
        return function(**parameters)
    except TypeError as error:
        raise ValueError(f"rewards: {name} {parameters}: {error}") from None


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module or "rewards"), attribute)
    except (ImportError, AttributeError):
        import rewards

        hint = nearest(name, rewards.__all__) or f"; known: {', '.join(rewards.__all__)}, or a dotted path"
        raise ValueError(f"rewards: cannot find {name!r}{hint}") from None


def _check_parameters(name: str, function: Any, parameters: dict[str, Any]) -> None:
    """A function's `**columns` takes whatever TRL passes, and names nothing that a recipe may set."""
    found = inspect.signature(function).parameters.values()
    if isinstance(function, type) and any(p.kind is p.VAR_KEYWORD for p in found):
        return
    known = [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not isinstance(function, type):
        known = [parameter for parameter in known if parameter not in PASSED]
    for key in parameters:
        if key not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"rewards: {name} has no parameter {key!r}; it has {has}{nearest(key, known)}")
