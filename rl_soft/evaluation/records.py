"""The files of an evaluation: `eval.json`, its header, and `records.jsonl`, a line for each (problem, sample).

`records.jsonl` is append-only and the ground truth: every report is rebuilt from it. A process that is killed can
leave at most its last line unfinished: `read` leaves it out, and `Writer` goes on from what is there. Standard library
only.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from rl_soft.files import JsonLines, parse_object, read_lines, write_atomic

Record = dict[str, Any]

SCHEMA = 1
GREEDY = -1  # the sample number of the greedy answer
OUTCOMES = ("correct", "wrong", "unparsed")
WHAT = "a record of an evaluation (a JSON object)"  # a line
MAX_THOUGHTS = 64  # of a completion, whose content is recorded and shown
MAX_TOKENS = 4  # of a thought

_FIELDS: dict[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "sample": (int,),
    "question_hash": (str,),
    "question": (str,),
    "gold": (str,),
    "family": (str, NoneType),
    "outcome": (str,),
    "prediction": (str, NoneType),
    "text": (str,),
    "thoughts": (int,),
    "answer_tokens": (int,),
    "truncated": (bool,),
    "seed": (int,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "thought_tokens": (list,),  # for each of the first thoughts, pairs [token, weight] of its strongest tokens
}
_HEADER: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "model": (str,),
    "dataset": (str,),
    "split": (str,),
    "decoder": (dict,),
    "n": (int,),
    "seed": (int,),
    "num_problems": (int,),
}
_IDENTITY = ("dataset", "split", "n", "seed", "num_problems")


class Writer(JsonLines):
    """Appends records and knows which are there already; see `JsonLines`.

    Args:
        questions: problem id -> question hash; records of other questions are refused.

    Attributes:
        done: every (problem_id, sample) in the file, so that a resumed evaluation skips them.

    Raises:
        ValueError: what `JsonLines`, `read` or `questions` refuse.
    """

    def __init__(self, path: str | Path, questions: Mapping[str, str] | None = None) -> None:
        self.done: set[tuple[str, int]] = set()

        def check(existing: list[Record]) -> None:
            _check_all(existing, path)
            for record in existing:
                if questions is not None and questions.get(record["problem_id"]) != record["question_hash"]:
                    raise ValueError(
                        f"{path} holds problem {record['problem_id']}, which is not in this data set or asks another "
                        "question there; choose another directory to keep both"
                    )
            self.done.update((record["problem_id"], record["sample"]) for record in existing)

        super().__init__(path, WHAT, check)

    def append(self, *records: Record) -> None:
        """Append records and return when they are on the disk; a batch costs one fsync.

        Raises:
            ValueError: a record lacks a field, has one of the wrong type, or is there already; nothing is written.
        """
        keys = [(record.get("problem_id"), record.get("sample")) for record in records]
        for record in records:
            _check(record, _fields(record), "record")
        again = [key for key, count in Counter(keys).items() if count > 1 or key in self.done]
        if again:
            raise ValueError(f"{self.path} holds {_name(again)} already")
        super().append(*records)
        self.done.update(keys)  # type: ignore[arg-type]  # _check has seen to the types


def read(path: str | Path) -> list[Record]:
    """All records of a file, in its order. A last line that is unfinished is left out, with a warning.

    Raises:
        ValueError: any other line that is not a valid record (names the line), or a (problem, sample) found twice.
    """
    found, _ = read_lines(Path(path), WHAT)
    _check_all(found, path)
    return found


def _check_all(found: list[Record], path: str | Path) -> None:
    for number, record in enumerate(found, start=1):
        _check(record, _fields(record), f"{path}, line {number}")
    counts = Counter((record["problem_id"], record["sample"]) for record in found)
    again = [key for key, count in counts.items() if count > 1]
    if again:
        raise ValueError(f"{path} holds {_name(again)} more than once")


def read_header(eval_dir: str | Path) -> dict[str, Any]:
    """The header of an evaluation directory.

    Raises:
        FileNotFoundError: there is no eval.json.
        ValueError: it is not JSON, of another schema, or lacks a field.
    """
    path = Path(eval_dir) / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{eval_dir} is not an evaluation: it has no eval.json")
    header = parse_object(path.read_bytes())
    if header is None:
        raise ValueError(f"{path}: not a JSON object")
    if header.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {header.get('schema')!r}, but this version reads schema {SCHEMA}")
    _check(header, _HEADER, str(path))
    return header


def write_header(eval_dir: str | Path, header: dict[str, Any]) -> None:
    """Write eval.json, whole or not at all; `schema` is filled in.

    Raises:
        ValueError: the header lacks a field or has one of the wrong type.
    """
    path = Path(eval_dir) / "eval.json"
    _check(header, _HEADER, str(path))
    write_atomic(path, json.dumps({"schema": SCHEMA, **header}, indent=2) + "\n")


def check_header(
    eval_dir: str | Path, header: dict[str, Any], free: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> bool:
    """Whether the directory holds this evaluation already, to be gone on with.

    Args:
        header: of the evaluation that is about to start.
        free: keys of its `config` that may differ.
        defaults: what a key had, in effect, that did not exist when the evaluation in the directory was made.

    Raises:
        ValueError: it holds another one; names the first key that differs, of `config` or else of the header.
    """
    if not (Path(eval_dir) / "eval.json").exists():
        return False
    before = read_header(eval_dir)
    ours = json.loads(json.dumps(header))  # as it would be read back
    for part in ("config", "decoder", None):
        old, new = (h.get(part, {}) if part else {k: h[k] for k in _IDENTITY} for h in (before, ours))
        old = {key: value for key, value in (defaults or {}).items() if part and key in new} | old
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and key not in free:
                raise ValueError(
                    f"{eval_dir} holds an evaluation with {key} = {old.get(key)!r}, this one has {new.get(key)!r}; "
                    "choose another directory to keep both"
                )
    return True


def _fields(record: Record) -> dict[str, tuple[type, ...]]:
    return _FIELDS if "thought_tokens" not in record else {**_FIELDS, **_OPTIONAL}


def _check(value: dict[str, Any], fields: dict[str, tuple[type, ...]], where: str) -> None:
    for field, types in fields.items():
        if field not in value:
            raise ValueError(f"{where}: no field {field!r}")
        if type(value[field]) not in types:  # isinstance would take True for an int
            expected = " or ".join("null" if t is NoneType else t.__name__ for t in types)
            raise ValueError(f"{where}: {field} must be {expected}, not {value[field]!r:.80}")
    if value.get("outcome", "wrong") not in OUTCOMES:
        raise ValueError(f"{where}: outcome must be one of {', '.join(OUTCOMES)}, not {value['outcome']!r}")
    if value.get("sample", GREEDY) < GREEDY:
        raise ValueError(f"{where}: sample must be {GREEDY} (greedy) or more, not {value['sample']}")


def _name(keys: list[Any]) -> str:
    """Names for an error: 'problem p1 sample 3, problem p2 sample 0 and 5 more'."""
    names = ", ".join(f"problem {problem} sample {sample}" for problem, sample in keys[:5])
    return names + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
