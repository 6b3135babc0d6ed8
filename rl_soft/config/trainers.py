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


def trainer_class(method: str) -> type:
    """The configuration class of the method's trainer, imported."""
    package, name = CLASSES[method]
    return getattr(importlib.import_module(package), name)


def trainer_fields(method: str) -> dict[str, Any]:
    """Name -> default of the fields of `trainer_class(method)`; None for a default that is no literal."""
    return _fields(CLASSES[method][1])


@functools.cache
def _fields(name: str) -> dict[str, Any]:
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
                fields[node.target.id] = _literal(given.get("default", None if given else node.value))
    return fields


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
