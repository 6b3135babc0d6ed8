"""The records of an analysis: one JSON object a line, a line a problem, appended as problems are finished.

The first line says what the records depend on. A run that is stopped goes on with the problems that have no line yet;
records that depend on something else are refused. A process that is killed leaves at most its last line unfinished,
and that line is cut off. Standard library only.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class Journal:
    """Appends records, and knows which problems are there. A context manager, and the file's only writer.

    Args:
        path: of the file; made, with its folder, if missing.
        identity: what the records depend on: names to JSON values.
        questions: problem id -> question hash, of the problems that are asked for.

    Attributes:
        records: problem id -> record, of the problems asked for; other problems in the file are left alone.

    Raises:
        ValueError: another process writes to the file, it depends on something else (named), holds a line that is not
            JSON, or asks another question under one of the ids.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], questions: Mapping[str, str]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another process; wait for its end, or end it") from None
            except OSError:  # a file system without locks
                pass
            first, *rest = self._read() or [None]
            ours = json.loads(json.dumps(identity))  # as it is read back
            if first is None:
                self._write(ours)
            for key in sorted(ours.keys() | (first or ours).keys()):
                before = (first or ours).get(key)
                if before != ours.get(key):
                    raise ValueError(
                        f"{path} holds records with {key} = {before!r}, these have {ours.get(key)!r}; choose another "
                        "output_dir to keep both"
                    )
            self.records: dict[str, dict[str, Any]] = {}
            for record in rest:
                name = record["problem_id"]
                if questions.get(name, record["question_hash"]) != record["question_hash"]:
                    raise ValueError(f"{path} holds problem {name} with another question; choose another output_dir")
                if name in questions:
                    self.records[name] = record
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

    def _read(self) -> list[Any]:
        lines = self.path.read_bytes().split(b"\n")
        if lines.pop():  # unfinished
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{self.path}, line {number}: not JSON") from None
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
