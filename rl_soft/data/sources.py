"""Every data set as one row type.

Three kinds of source, told apart by their name:

* generated (`generated.py`): a reasoning-gym task (`chain_sum`, `gsm_symbolic`, any other by name) or our `chain_mod`.
  The hash of a question decides whether it is for training or for evaluation, so the two never overlap, whatever the
  seeds.
* a local `.jsonl`, `.json`, `.csv` or `.parquet` file (`readers.py`; its values: `values.py`).
* the hub: a name of `CATALOGUE` (`gsm8k`, `svamp`, ...), whose fields and splits are known, or any `owner/name` id.

`docs/data.md` lists the options of each. Where we differ from CODI's loaders: negative and decimal answers are kept,
and a row that cannot be used is refused by its number, never dropped.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_soft.data import generated, stored
from rl_soft.data.readers import READERS
from rl_soft.data.row import Row as Row
from rl_soft.data.row import question_hash as question_hash
from rl_soft.keys import nearest

AT_HAND = 20_000_000  # bytes of a file that is read before a run is started


def load_rows(
    source: str,
    split: str,
    size: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    size_key: str = "size",
) -> list[Row]:
    """Returns the rows of one split; the same arguments always give the same rows.

    Args:
        source: a reasoning-gym task, a file, a name of `CATALOGUE` or a hub id.
        split: `train` or `evaluation`; for a hub set also any split it has. A file is one split, whichever is asked,
            unless the option `holdout` divides it.
        size: how many rows: generated, or drawn at random (a larger draw contains the smaller). None takes all.
        seed: of the generation or of the draw.
        options: passed to the generator, apart from those listed in `docs/data.md`.
        columns: our name -> the file's, for `question`, `answer`, `steps`, `id`, `answer_type`, `family`.
        size_key: what a user calls `size`, for messages.

    Raises:
        ValueError: an unknown source (the nearest known is named), split, option or column; fewer rows than `size`; a
            row that cannot be used, by its number.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    options = dict(options or {})
    if source not in stored.CATALOGUE and source not in generated.OWN_TASKS:
        _check_path(source)
    if source in stored.CATALOGUE or "/" in source or Path(source).suffix in READERS:
        rows = stored.read(source, split, options, columns or {})
        return rows if size is None else _draw(rows, size, seed, f"{source} ({split})", size_key)
    if columns:
        raise ValueError(f"columns are for stored rows; {source!r} is generated")
    if source not in generated.tasks():
        hint = nearest(source.lower(), [*stored.CATALOGUE, *generated.tasks()]) or "."
        raise ValueError(
            f"unknown data source {source!r}{hint} A source is one of "
            f"{', '.join((*stored.CATALOGUE, *generated.OWN_TASKS))}; a reasoning-gym task; a file "
            f"({', '.join(READERS)}); or a hub id owner/name"
        )
    return generated.generate(source, split, size, seed, options)


def is_at_hand(source: str, options: Mapping[str, Any] | None) -> bool:
    """Whether the rows can be read in a second or so: they are in a local file that is not large."""
    path = Path(str((options or {}).get("path", source)))
    return path.suffix in READERS and (not path.is_file() or path.stat().st_size <= AT_HAND)


def is_of_hub(source: str) -> bool:
    return source in stored.CATALOGUE or "/" in source


def assert_disjoint(train: Sequence[Row], evaluation: Sequence[Row]) -> None:
    """Raises ValueError if a question stands in both, whatever its case and white space."""
    seen = {question_hash(row.question): row for row in train}
    shared = [row for row in evaluation if question_hash(row.question) in seen]
    if shared:
        first = shared[0]
        twin = seen[question_hash(first.question)]
        raise ValueError(
            f"{len(shared)} evaluation questions are also training questions, "
            f"the first being {first.id} = {twin.id}: {first.question!r}"
        )


def _check_path(source: str) -> None:
    """A path that is no data file would be looked up on the hub, which has no such name."""
    path, endings = Path(source), ", ".join(READERS)
    if path.is_dir():
        raise ValueError(f"data source {source} is a folder; name a file in it ({endings})")
    looks_local = path.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1
    if path.suffix not in READERS and (path.is_file() or looks_local):
        raise ValueError(f"data source {source}: a data file ends in {endings}")


def _draw(rows: list[Row], size: int, seed: int, name: str, size_key: str) -> list[Row]:
    if size > len(rows):
        raise ValueError(f"{size_key} is {size}, and {name} has {len(rows)} rows; give at most that")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:size]
