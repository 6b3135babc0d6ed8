"""`rl-soft convert TRL.yaml`: a recipe of TRL's or open-r1's scripts as a recipe here, key by key.

What is written runs as it is. A key that is left out stands in a comment, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rl_soft.config.elsewhere import ABSENT, BECOMES, CALLED, IGNORED, READ
from rl_soft.config.recipe import RL_METHODS, find_recipe, known_keys, make_recipe, read_yaml
from rl_soft.config.refusals import MUST_BE_TRUE, SECRET, unavailable
from rl_soft.config.their_rewards import NONE, PARAMETERS, plain_name
from rl_soft.config.theirs import BATCHES, Note, over, read_theirs
from rl_soft.config.trainers import trainer_fields
from rl_soft.keys import Mistakes

MOST_PROCESSES = 64  # that batch sizes of theirs are tried on


def convert(path: str | Path, overrides: Mapping[str, Any] | None = None, processes: int | None = None) -> str:
    """The recipe, as YAML with comments.

    Args:
        path: a YAML of theirs.
        overrides: values that beat the file's, by their names or ours.
        processes: that the recipe was made for, on which its batch sizes depend; if absent its num_processes, or the
            least on which they divide.

    Raises:
        ValueError: the file is missing, or no recipe of GRPO.
        Mistakes: what it lacks to be run, a line each.
    """
    found = find_recipe(path)
    values = over(read_yaml(found), overrides or {})
    method = str(values.get("method") or "grpo")
    only_grpo = trainer_fields("grpo").keys() - trainer_fields("sft").keys()
    if method not in RL_METHODS or not (values.keys() & {"reward_funcs", "rewards", *only_grpo}):
        raise ValueError(f"{path} names no rewards and no key of GRPO alone; convert reads recipes of trl grpo")
    values.setdefault("thought", "gumbel")
    dropped = dict(_dropped(values, method))
    kept = {key: value for key, value in values.items() if key not in dropped}
    _drop_rewards(kept, dropped)
    if processes is None:
        processes = values.get("num_processes")
    kept.pop("num_processes", None)
    known = known_keys(method)
    made, notes, wrong = read_theirs(kept, known, method, processes, True)
    tried = iter(range(2, MOST_PROCESSES + 1))
    while wrong and processes is None and any(key in kept for key in BATCHES):
        number = next(tried, None)
        if number is None:
            break
        again = read_theirs(kept, known, method, number, True)
        if len(again[2]) < len(wrong):
            made, notes, wrong = again
            break
    if wrong:
        raise Mistakes(wrong)
    made = {"method": method, **made}
    make_recipe(found, {**made, "report_to": "none"}, 1)  # a tracker has to be there where it is run
    return "\n".join(_lines(str(path), values, made, notes, dropped)) + "\n"


def _dropped(values: Mapping[str, Any], method: str) -> Iterator[tuple[str, str]]:
    """Keys that soft rollouts cannot have, or that nobody knows, each with the reason."""
    for line in unavailable(values, method):
        key, _, why = line.partition(" is not available: ")
        if key not in ("use_liger_kernel", *IGNORED) and (key != "model_init_kwargs" or not _readable(values[key])):
            yield key, why
    for key, value in values.items():
        if key in MUST_BE_TRUE and not value:
            yield key, MUST_BE_TRUE[key]
        elif key == "hub_token":
            yield key, SECRET
        elif key == "lora_dropout" and value:
            yield key, MUST_BE_TRUE["disable_dropout"]
        elif value and (key in ABSENT or key in BECOMES):
            yield key, ABSENT.get(key) or BECOMES[key]
        elif key not in {*known_keys(method), *CALLED, *READ, *IGNORED, *ABSENT, *BECOMES}:
            yield key, "neither this package nor TRL has such a key"


def _readable(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= {"dtype", "torch_dtype", "attn_implementation", "revision"}


def _drop_rewards(values: dict[str, Any], dropped: dict[str, str]) -> None:
    """Take rewards that there is nothing like out of `reward_funcs`, and their weights with them."""
    names = values.get("reward_funcs")
    if not isinstance(names, list):
        return
    plain = [plain_name(str(next(iter(name)) if isinstance(name, dict) else name)) for name in names]
    left = [i for i, name in enumerate(plain) if name not in NONE]
    if len(left) == len(names) or not left:
        return
    for i, name in enumerate(plain):
        if name in NONE:
            dropped[f"reward_funcs: {names[i]}"] = NONE[name]
    values["reward_funcs"] = [names[i] for i in left]
    weights = values.get("reward_weights")
    if isinstance(weights, list) and len(weights) == len(names):
        values["reward_weights"] = [weights[i] for i in left]
    for key, (reward, _) in PARAMETERS.items():
        if key in values and reward == "CodeFormat" and "code_format" not in plain:
            del values[key]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as they stand, so that they can be read."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _lines(
    path: str, values: Mapping[str, Any], made: dict[str, Any], notes: list[Note], dropped: Mapping[str, str]
) -> Iterator[str]:
    yield f"# {path}, by rl-soft convert: what each key is here, what was added, and what was left out."
    of = {key: note for note in notes if note.kind in ("renamed", "derived") for key in note.keys}
    added = {key for note in notes if note.kind == "default" for key in note.made} - values.keys()
    written: set[str] = set()

    def written_as(key: str, why: str) -> Iterator[str]:
        if key in made and key not in written:
            written.add(key)
            first, *rest = yaml.dump({key: made[key]}, Dumper=_Dumper, allow_unicode=True, width=10**6).splitlines()
            yield f"{first:<40}  # {why}" if why else first
            yield from rest

    yield from written_as("method", "" if "method" in values else "TRL's script is trl grpo")
    for key in values:
        if key in of:
            note = of[key]
            why = ", ".join(note.keys) + (f": {note.why}" if note.why else "")
            for i, ours in enumerate(note.made):
                yield from written_as(ours, "so too" if i else why)
        elif key not in added:
            yield from written_as(key, "")
    if rest := [key for key in made if key not in written]:
        yield from ("", "# added")
        for key in rest:
            why = next((n.why for n in notes if n.kind in ("default", "derived") and key in n.made), "")
            yield from written_as(key, why)
    ignored = {key: note.why for note in notes if note.kind == "ignored" for key in note.keys}
    for title, keys in (("left out", dropped), ("of no effect here", ignored)):
        if keys:
            yield from ("", f"# {title}")
            for key, why in keys.items():
                shown = f"{key} {values[key]!r:.60}" if key in values else key
                yield f"# {' '.join(shown.split())}: {why}"
