"""The records of an analysis: one JSON object a line, a line a problem, appended as problems are finished.

The first line says what the records depend on. A run that is stopped goes on with the problems that have no line yet;
records that depend on something else are refused. A process that is killed leaves at most its last line unfinished,
and that line is cut off. Standard library only.
"""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger(__name__)


class Journal:
    """Appends records, and knows which problems are there. A context manager, and the file's only writer.

    Args:
        path: of the file; made, with its folder, if missing.
        identity: what the records depend on: names to JSON values.
        questions: problem id -> question hash, of the problems that are asked for.

    Attributes:
        records: problem id -> record, of the problems asked for; other problems in the file are left alone.

    Raises:
        ValueError: a path that cannot be written; another process writes to the file, it depends on something else
            (named), holds a line that is no record, or asks another question under one of the ids. The file is left
            as it is then.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], questions: Mapping[str, str]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another process; wait for its end, or end it") from None
            except OSError:  # a file system without locks
                pass
            ours = json.loads(json.dumps(identity))  # as it is read back
            (first, *rest), unfinished = self._read(ours)
            for key in sorted(ours.keys() | first.keys()):
                if first.get(key) != ours.get(key):
                    raise ValueError(
                        f"{path} holds records with {key} = {first.get(key)!r}, these have {ours.get(key)!r}; choose "
                        "another output_dir to keep both"
                    )
            self.records: dict[str, dict[str, Any]] = {}
            for number, record in enumerate(rest, start=2):
                name, asked = record.get("problem_id"), record.get("question_hash")
                if name is None or asked is None:
                    raise ValueError(f"{path}, line {number}: not a record")
                if questions.get(name, asked) != asked:
                    raise ValueError(f"{path} holds problem {name} with another question; choose another output_dir")
                if name in questions:
                    self.records[name] = record
            if unfinished:
                os.truncate(path, path.stat().st_size - unfinished)
            if not path.stat().st_size:
                self._write(ours)
        except BaseException:
            self._file.close()
            raise

    def append(self, *records: dict[str, Any]) -> None:
        """Append records and return when they are on the disk."""
        self._write(*records)
        self.records.update((record["problem_id"], record) for record in records)

    def _write(self, *values: dict[str, Any]) -> None:
        self._file.write(b"".join(json.dumps(v, allow_nan=False).encode() + b"\n" for v in values))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, ours: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """The objects of the lines, `ours` if there is none yet, and the length of an unfinished line after them."""
        *lines, last = self.path.read_bytes().split(b"\n")
        if not lines and not json.dumps(ours).encode().startswith(last):
            raise ValueError(f"{self.path} is not a file of this analysis; choose another output_dir")
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"{self.path}, line {number}: not a JSON object") from None
        return found or [ours], len(last)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
    os.replace(temporary, path)
