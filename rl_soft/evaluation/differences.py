"""What tells the evaluations of a comparison apart: their names, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def names_of(dirs: Sequence[Path], given: Sequence[str]) -> list[str]:
    """One name per evaluation: those that they have, or, where two are equal, the parts of the paths that differ."""
    if len(set(given)) == len(given):
        return list(given)
    paths = [path.resolve().parts for path in dirs]
    depth = max(map(len, paths))
    aligned = [(*[""] * (depth - len(parts)), *parts) for parts in paths]  # the last parts stand below each other
    differ = [i for i in range(depth) if len({parts[i] for parts in aligned}) > 1]
    return ["/".join(parts[i] for i in differ if parts[i]) for parts in aligned]


def settings(header: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation that its figures depend on besides the model, by the names of their keys."""
    config = header.get("config", {})
    named = {name: header.get(name) for name in ("dataset", "split", "n", "seed")}
    named |= {name: config[name] for name in ("dataset_options", "data_seed_eval") if name in config}
    return {**named, **header["decoder"]}


def differences(names: Sequence[str], headers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per evaluation whose settings differ from those of the first."""
    first, found = settings(headers[0]), []
    for name, header in zip(names[1:], headers[1:], strict=True):
        other = settings(header)
        differ = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differ:
            words = ", ".join(f"{key} {other.get(key)!r} against {first.get(key)!r}" for key in differ)
            found.append(f"{name} was not evaluated as {names[0]}: {words}.")
    return found
