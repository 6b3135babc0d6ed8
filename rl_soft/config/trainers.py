"""The configuration classes of TRL and transformers, whose fields a recipe may name beside our own keys.

To import them takes seconds, and a mistake in a recipe is told before that: names and defaults are read from their
source.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from rl_soft.keys import NAMES

CLASSES = {  # method -> the package and the class of its trainer's configuration
    "codi": ("transformers", "TrainingArguments"),
    "sft": ("trl", "SFTConfig"),
    "icot": ("transformers", "TrainingArguments"),
    "coconut": ("transformers", "TrainingArguments"),
    "grpo": ("trl", "GRPOConfig"),
    "ppo": ("trl", "GRPOConfig"),
}
SOURCES = {  # class -> its file in the package, and its base
    "TrainingArguments": ("transformers", "training_args.py", None),
    "_BaseConfig": ("trl", "trainer/base_config.py", "TrainingArguments"),
    "SFTConfig": ("trl", "trainer/sft_config.py", "_BaseConfig"),
    "GRPOConfig": ("trl", "trainer/grpo_config.py", "_BaseConfig"),
}
TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}


def trainer_class(method: str) -> type:
    """The configuration class of the method's trainer, imported."""
    package, name = CLASSES[method]
    return getattr(importlib.import_module(package), name)


def trainer_fields(method: str) -> dict[str, Any]:
    """Name -> default of the fields of `trainer_class(method)`; None for a default that is no literal."""
    return {key: default for key, (default, _) in _fields(CLASSES[method][1]).items()}


def check_type(method: str, key: str, value: Any) -> None:
    """Raises ValueError for a value of another type than the field `key` of `trainer_class(method)` has.

    Fields of other types than numbers, texts and truth values are left to the class.
    """
    default, annotation = _fields(CLASSES[method][1])[key]
    kinds = [part.strip() for part in annotation.split("|")]
    if value is None or not set(kinds) <= {*TYPES, "None"}:
        return
    allowed = tuple(kind for name in kinds if name != "None" for kind in TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        words = " or ".join(dict.fromkeys(NAMES[TYPES[name][0]] for name in kinds if name != "None"))
        shown = "" if default is None else f" (default {default!r})"
        raise ValueError(f"{key} must be {words}, got {value!r}{shown}")


@functools.cache
def _fields(name: str) -> dict[str, tuple[Any, str]]:
    """Name of each field -> its default and its annotation."""
    package, file, base = SOURCES[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"{package} is not installed")
    tree = ast.parse((Path(found.origin).parent / file).read_text(encoding="utf-8"))
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = dict(_fields(base)) if base else {}
    for node in made.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            given = {k.arg: k.value for k in node.value.keywords} if isinstance(node.value, ast.Call) else {}
            if _literal(given.get("init")) is not False:
                default = _literal(given.get("default", None if given else node.value))
                fields[node.target.id] = default, ast.unparse(node.annotation).strip("'\"")
    return fields


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
