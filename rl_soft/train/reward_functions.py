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
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rl_soft.keys import nearest

logger = logging.getLogger("rl_soft")

# What TRL or our rollout passes by keyword at each call: no parameters of a recipe.
PASSED = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
    "thoughts", "answer_text", "id", "answer", "answer_type", "source", "metadata",
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


def filtered_reward(name: str, names: Sequence[str]) -> int:
    """The number of the reward that `filter_groups` names: its logged name, or `accuracy` for the one that ends so.

    Raises:
        ValueError: no such reward, or several that end in accuracy.
    """
    if name in names:
        return names.index(name)
    found = [i for i, other in enumerate(names) if other.endswith("accuracy")] if name == "accuracy" else []
    if len(found) == 1:
        return found[0]
    known = ", ".join(names)
    if found:
        raise ValueError(f"filter_groups accuracy: {len(found)} rewards end in accuracy; name one of {known}")
    if name == "accuracy":
        raise ValueError(f"filter_groups accuracy: no reward's name ends in accuracy; name one of {known}")
    raise ValueError(
        f"filter_groups must be accuracy or the name of a reward ({known}), got {name!r}{nearest(name, names)}"
    )


def logged_names(functions: Sequence[Callable]) -> list[str]:
    """The names of reward functions as TRL takes them, each its own."""
    names = []
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        names.append(getattr(function, "__name__", type(function).__name__))
    return own_names(names)


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
    """What a name stands for: of the package `rewards`, or by its dotted path from the current folder on.

    Raises:
        ValueError: no such module, one that cannot be imported (with its file and line), or no such name in it.
    """
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:  # `rl-soft` is a program in another folder
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module or "rewards")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"rewards: {name}: no module {error.name!r} is in {os.getcwd()} or installed; known without a module: "
                f"{', '.join(_known())}"
            ) from None
        frames = traceback.extract_tb(error.__traceback__)
        raise ValueError(
            f"rewards: {name}: importing {module} failed in {frames[-1].filename}, line {frames[-1].lineno}: "
            f"{type(error).__name__}: {error}"
        ) from None
    function = getattr(found, attribute, None)
    if callable(function):
        return function
    if function is not None:
        raise ValueError(f"rewards: {name} is no function, it is {function!r:.60}")
    if not module:
        hint = nearest(name, _known()) or f"; known: {', '.join(_known())}, or a dotted path: my_rewards.{name}"
        raise ValueError(f"rewards: cannot find {name!r}{hint}")
    own = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
    hint = nearest(attribute, own) or f"; it has {', '.join(own) or 'no function'}"
    raise ValueError(f"rewards: module {module} ({found.__file__}) has no {attribute!r}{hint}")


def _known() -> list[str]:
    import rewards

    return list(rewards.__all__)


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
