"""Names of rewards in TRL's and open-r1's scripts, as rewards of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ELSEWHERE = "it runs programs on a server ({}), and none is started here; write one of your own (docs/own_rewards.md)"
REWARDS: dict[str, str | dict[str, dict[str, Any]]] = {  # name of theirs, without _reward -> ours
    "accuracy": "math_accuracy",
    "reasoning_accuracy": "math_accuracy",  # in phase explicit the answer alone is judged
    "think_format": "think_format",
    "format": "answer_format",
    "tag_count": "tag_count",
    "reasoning_steps": "reasoning_steps",
    "code_format": {"CodeFormat": {}},
    "cosine": {"CosineScaled": {"min_value_wrong": 0.0, "max_value_wrong": -0.5, "max_length": 1000}},
    "get_cosine_scaled": {"CosineScaled": {}},
    "repetition_penalty": {"Repetition": {}},
    "get_repetition_penalty": {"Repetition": {}},
    "length": "relative_length",
    "len": "relative_length",
    "soft_overlong_punishment": {"Overlong": {"max_length": 16384, "buffer": 4096}},  # open-r1's values
    "get_soft_overlong_punishment": {"Overlong": {"max_length": 1280, "buffer": 256}},  # those of trl grpo
}
NONE = {  # name of theirs, without _reward -> why there is nothing like it
    "code": ELSEWHERE.format("E2B or MorphCloud"),
    "binary_code": ELSEWHERE.format("E2B or MorphCloud"),
    "ioi_code": ELSEWHERE.format("Piston"),
    "cf_code": ELSEWHERE.format("Piston"),
}
PARAMETERS = {  # key of open-r1 -> reward and parameter of ours
    "cosine_min_value_wrong": ("CosineScaled", "min_value_wrong"),
    "cosine_max_value_wrong": ("CosineScaled", "max_value_wrong"),
    "cosine_min_value_correct": ("CosineScaled", "min_value_correct"),
    "cosine_max_value_correct": ("CosineScaled", "max_value_correct"),
    "cosine_max_len": ("CosineScaled", "max_length"),
    "repetition_n_grams": ("Repetition", "ngram_size"),
    "repetition_max_penalty": ("Repetition", "max_penalty"),
    "code_language": ("CodeFormat", "language"),
    "max_completion_len": ("Overlong", "max_length"),
    "soft_punish_cache": ("Overlong", "buffer"),
}
OURS = {
    "max_completion_len": "max_length",
    "soft_punish_cache": "buffer",
    "max_len": "max_length",
}  # parameters of TRL's functions


def plain_name(name: str) -> str:
    """A name of theirs without the module that it is in and without `_reward`; a dotted path of others as it is."""
    for module in ("trl.rewards.", "open_r1.rewards."):
        name = name.removeprefix(module)
    return name.removesuffix("_reward")


def read_rewards(names: Any, parameters: Mapping[str, Any]) -> list[Any]:
    """The entries of `rewards` that a `reward_funcs` means; what is no name of theirs stays as it is.

    Args:
        names: a name or a list of names, dotted paths or {name: {parameter: value}}.
        parameters: values by the keys of `PARAMETERS`.

    Raises:
        ValueError: a reward that there is no counterpart of.
    """
    return [_read(entry, parameters) for entry in (names if isinstance(names, list) else [names])]


def _read(entry: Any, parameters: Mapping[str, Any]) -> Any:
    name, given = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
    if not isinstance(given, dict | None):
        return entry  # told where rewards are made
    plain = plain_name(str(name))
    if plain in NONE:
        raise ValueError(f"reward_funcs: {name} is not available: {NONE[plain]}")
    if plain not in REWARDS:
        return entry
    ours = REWARDS[plain]
    if isinstance(ours, str):
        return {ours: given} if given else ours
    ((reward, usual),) = ours.items()
    values: dict[Any, Any] = dict(usual)
    values |= {key: parameters[name] for name, (of, key) in PARAMETERS.items() if of == reward and name in parameters}
    values |= {OURS.get(key, key): value for key, value in (given or {}).items()}
    return {reward: values} if values else reward
