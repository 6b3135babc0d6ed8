"""Files that are whole or absent, and append-only files of JSON objects with one writer. Standard library only."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger(__name__)

Object = dict[str, Any]

LOCK_SECONDS = 5.0  # what is left of a launch that was killed may hold the lock for a moment


class JsonLines:
    """A file of JSON objects, one per line, that is only ever appended to. A context manager; the file's only writer.

    A process that is killed leaves at most its last line unfinished. That line is cut off, with a warning, when the
    file is opened again; if only its line end is missing, that is added.

    Args:
        path: of the file; made, with its folder, if missing.
        what: what a line holds, in words; an error says that a line is not this.
        check: is given the objects that are there, in order; raises ValueError for those that are not of this writer.
        begins: how a line can begin (by default as any object does); an unfinished one that begins otherwise is of
            someone else.

    Raises:
        ValueError: a path that cannot be written, another process that writes to the file (a lock on it, which ends
            with its process), a line that is no JSON object, or what `check` refuses. The file is left as it is then.
    """

    def __init__(self, path: str | Path, what: str, check: Callable[[list[Object]], None], *begins: bytes) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            objects, size = read_lines(self.path, what, *begins)
            check(objects)
            self._file.truncate(size)
            if size and (self._file.seek(size - 1), self._file.read())[1] != b"\n":
                self._write(b"\n")
        except BaseException:
            self._file.close()
            raise

    def append(self, *objects: Object) -> None:
        """Append objects and return when they are on the disk; a batch costs one fsync."""
        self._write(b"".join(json.dumps(o, allow_nan=False).encode() + b"\n" for o in objects))

    def _write(self, lines: bytes) -> None:
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"{self.path} is being written by another process; wait for its end, or end it"
                    raise ValueError(message) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path, what: str, *begins: bytes) -> tuple[list[Object], int]:
    """The objects of a file of `JsonLines`, and the length in bytes of its lines without an unfinished one at the end.

    Args:
        what, begins: see `JsonLines`.

    Raises:
        ValueError: any other line that is no JSON object, with its number.
    """
    data = path.read_bytes()
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    found: list[Object] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        value = parse_object(line)
        if value is None:
            begun = line.rstrip(b"\0")  # a file may have grown before it was written to
            ours = any(b.startswith(begun[: len(b)]) for b in begins or (b"{",))
            if number < len(lines) or not ours:
                raise ValueError(f"{path}, line {number}: not {what}")
            logger.warning("%s: line %d is unfinished; leaving it out", path, number)
            break
        found.append(value)
        size += len(line) + 1
    return found, min(size, len(data))


def parse_object(text: bytes) -> Object | None:
    """The JSON object in a text, or None."""
    try:
        value = json.loads(text.decode())  # of bytes it would look for the encoding first
    except ValueError:  # JSON and Unicode errors alike
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` in the end: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` in the end: that is whole or absent, and nothing is ever overwritten.

    Raises:
        ValueError: something is there already, or the folder above cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; nothing is overwritten: name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all; what is no Unicode character becomes `?`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
