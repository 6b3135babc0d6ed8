"""Recipes as files and as words of a command line; values are YAML. Nothing here knows what a key means."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from rl_soft.keys import nearest

BUNDLED = (Path(__file__).parents[1] / "recipes").resolve()  # of the installed package; recipes/ of a clone


class Loader(yaml.SafeLoader):
    """YAML with 1e-4 read as a number (YAML 1.1 asks for a dot) and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ValueError(f"key {key_node.value!r} appears twice (line {key_node.start_mark.line + 1})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package: `grpo_gumbel`, `smollm2/grpo_gumbel`, ..."""
    paths = sorted(BUNDLED.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    names = {path.relative_to(BUNDLED).with_suffix("").as_posix(): path for path in paths}
    return {name: path for name, path in names.items() if not name.startswith("accelerate/")}


def find_recipe(name: str | Path, beside: Path | None = None) -> Path:
    """The file of a recipe.

    Args:
        name: a path; or the name of a bundled recipe, with or without `recipes/` and `.yaml`. A path that exists wins.
        beside: another recipe, whose folder `name` may be relative to.

    Raises:
        ValueError: there is no such file; with the nearest name.
    """
    path = Path(name)
    bundled = bundled_recipes()
    for place in (path, *([beside.parent / path] if beside else [])):
        if place.is_file():
            return place
    known = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if known in bundled:
        return bundled[known]
    neighbours = [str(p) for p in path.parent.glob("*.yaml")]
    raise ValueError(f"recipe {path} does not exist{nearest(path, neighbours) or nearest(known, bundled)}")


def first_sentence(path: Path) -> str:
    """What the first comment of a recipe says the recipe is."""
    comment = re.search(r"(?:^#.*\n)+", path.read_text(), re.MULTILINE)
    text = " ".join(line.strip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's keys. Raises ValueError naming the file when it is no YAML, or not a mapping."""
    try:
        values = yaml.load(path.read_text(), Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold `key: value` lines")
    values.pop("_", None)  # the line that makes a recipe a Python program too
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Values


def parse_overrides(arguments: list[str], texts: Collection[str] = ()) -> dict[str, Any]:
    """`--key value` or `--key=value` pairs; values are read as YAML, those of the keys in `texts` as they stand."""
    values: dict[str, Any] = {}
    i = 0
    while i < len(arguments):
        word = arguments[i]
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if i + 1 == len(arguments) or (arguments[i + 1].startswith("--") and len(arguments[i + 1]) > 2):
                text = "true"  # a bare flag
            else:
                i += 1
                text = arguments[i]
        key = key.replace("-", "_")
        values[key] = text if key in texts else _read_value(text)
        i += 1
    return values


def _read_value(text: str) -> Any:
    """A value as YAML; what YAML cannot read, or takes for a comment (`=`, `####`) or a key (`Answer: `), is the text
    that it is."""
    try:
        value = yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and (not text.startswith("{") or (value and all(x is None for x in value.values()))):
        return text  # {question} is a place in a text
    return text if value is None and text.startswith("#") else value
