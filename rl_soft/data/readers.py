"""Files as lists of records, one reader per suffix. A file that is not what its suffix says is refused by its name."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def read_records(path: Path) -> Records:
    """The records of a file, in its order: column -> value. A number with a decimal point of JSON is a `Decimal`.

    Raises:
        ValueError: a folder, a missing file, another suffix, another encoding than UTF-8, a cut or broken file, a
            column that is named twice, a row with more fields than the file has columns.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it ({', '.join(READERS)})")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a data file ends in {', '.join(READERS)}")
    if path.suffix == ".gz" and not path.name.endswith(".jsonl.gz"):
        raise ValueError(f"{path}: of packed files only .jsonl.gz is read; unpack it")
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        return READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 (byte 0x{error.object[error.start]:02x} is no character of it); save it in UTF-8"
        ) from None


def _read_jsonl(path: Path) -> Records:
    with path.open(encoding="utf-8-sig") as file:
        return _lines(file, path)


def _read_packed(path: Path) -> Records:
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            return _lines(file, path)
    except gzip.BadGzipFile as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is cut or broken: {error}") from None


def _lines(file: Any, path: Path) -> Records:
    lines = [(line, f"{path}, line {i}") for i, line in enumerate(file, 1) if line.strip()]
    return [_object(_parse(line, where), where) for line, where in lines]


def _read_json(path: Path) -> Records:
    records = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of objects; for one object per line use .jsonl")
    return [_object(record, f"{path}, row {i}") for i, record in enumerate(records, 1)]


def _parse(text: str, where: str) -> Any:
    """Numbers as they are written: a float would round `0.1000000000000000001`, and `1e400` would be infinite."""
    try:
        return json.loads(text, parse_float=Decimal, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_names([name for name, _ in pairs])
    return dict(pairs)


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object")
    return record


def _read_csv(path: Path) -> Records:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        reader = csv.reader(file, strict=True)  # strict: an open quotation mark would swallow the rows behind it
        try:
            header = next(reader, [])
            _check_names(header, f"{path}: ")
            return [_record(header, fields, f"{path}, row {i}") for i, fields in enumerate(filter(None, reader), 1)]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _record(header: list[str], fields: list[str], where: str) -> dict[str, Any]:
    if len(fields) > len(header):
        raise ValueError(
            f"{where} has {len(fields)} fields, and the file has {len(header)} columns; a field with a comma needs "
            'quotation marks: "3, 5"'
        )
    return dict(zip(header, [*fields, *[None] * (len(header) - len(fields))], strict=True))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Python's csv reads fields of up to 131,072 characters; a worked solution may be longer."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Records:
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:  # `read_table` would make columns of folders named a=b
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from None
    _check_names(table.column_names, f"{path}: ")
    records = table.to_pylist()
    for column in table.schema:
        if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):  # 0.1 would be 0.10000000149011612
            short = np.float32 if pa.types.is_float32(column.type) else np.float16
            for record in records:
                if record[column.name] is not None:
                    record[column.name] = float(str(short(record[column.name])))
    return records


def _check_names(names: Sequence[str], where: str = "") -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{where}two columns are named {twice!r}")


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".gz": _read_packed,
}
