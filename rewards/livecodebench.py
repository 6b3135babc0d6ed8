"""Problems of LiveCodeBench (arXiv 2403.07974): tests read, the program of a completion found, its outputs judged.

A problem has tests for standard input or for a function. The public ones are JSON. The private ones are base64 of zlib
of a pickle of JSON text: a text is all that is read of that pickle, by an interpreter of the few opcodes that a text
takes, so nothing in it is ever called, and what it unpacks to is bounded.

The rules are those of the benchmark's own code (github.com/LiveCodeBench/LiveCodeBench): the last fenced block is the
program; a line of output is right if it is the same text without the white space around it, or the same numbers;
a result of a function is right if it equals the JSON value, a tuple for a list.
"""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from rewards import sandbox
from rewards.answers import Judgement

COLUMNS = ("public_test_cases", "private_test_cases")
MAX_BYTES = 1 << 28  # of a problem's private tests, unpacked
MAX_PROGRAM = 100_000  # characters
SECONDS = 6.0  # of CPU per test
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_NOTHING = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}


class Cases(NamedTuple):
    """Inputs and right outputs; `function` is what is called, empty for standard input and output."""

    function: str
    inputs: list[str]
    outputs: list[str]


def is_problem(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a row are the columns of a problem of LiveCodeBench."""
    return any(column in metadata for column in COLUMNS)


def cases_of(problem: Mapping[str, str]) -> Cases:
    """All tests of a problem, the public ones first.

    Args:
        problem: the columns `public_test_cases`, `private_test_cases` and `metadata` as they are published, all texts.

    Raises:
        ValueError: a column that cannot be read, no test, tests of both kinds, a function without its name.
    """
    cases = [*_cases(problem, "public_test_cases"), *_cases(problem, "private_test_cases")]
    if not cases:
        raise ValueError("has no tests")
    kinds = {case["testtype"] for case in cases}
    if len(kinds) > 1 or not kinds <= {"stdin", "functional"}:
        raise ValueError(f"has tests of type {', '.join(sorted(map(str, kinds)))}; one of stdin, functional is read")
    function: Any = ""
    if kinds == {"functional"}:
        given = _json(problem.get("metadata") or "{}", "metadata")
        function = given.get("func_name") if isinstance(given, dict) else ""
        if not isinstance(function, str) or not function:
            raise ValueError("has tests of a function, and no func_name in its metadata")
    return Cases(function, [case["input"] for case in cases], [case["output"] for case in cases])


def _cases(problem: Mapping[str, str], column: str) -> list[dict[str, Any]]:
    text = problem.get(column) or "[]"
    cases = _json(text, column) if text.lstrip()[:1] == "[" else _json(unpack(text, column), column)
    if not isinstance(cases, list):
        raise ValueError(f"{column} must be a list of tests")
    for case in cases:
        if not isinstance(case, dict) or not all(
            isinstance(case.get(k), str) for k in ("input", "output", "testtype")
        ):
            raise ValueError(f"{column}: a test must have the texts input, output and testtype")
    return cases


def _json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{column} is not JSON: {error}") from None


def unpack(text: str, column: str = "private_test_cases") -> str:
    """The text in base64 of zlib of a pickle of one text.

    Raises:
        ValueError: another content, or one over MAX_BYTES.
    """
    try:
        packed = base64.b64decode(text, validate=True)
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed, MAX_BYTES)
    except (ValueError, zlib.error) as error:  # base64's is a ValueError
        raise ValueError(f"{column} is neither JSON nor base64 of zlib: {error}") from None
    if unpacker.unconsumed_tail or not unpacker.eof:
        over = f"unpacks to more than {MAX_BYTES >> 20} MiB" if unpacker.unconsumed_tail else "is cut"
        raise ValueError(f"{column} {over}")
    return _pickled_text(data, column)


def _pickled_text(data: bytes, column: str) -> str:
    found: str | None = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXT and found is None:
                found = argument
            elif opcode.name == "STOP" and found is not None:
                return found
            elif opcode.name not in _NOTHING:
                raise ValueError(f"holds {opcode.name}, and a pickle of one text is all that is read")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{column}: its pickle {error}") from None
    raise ValueError(f"{column}: its pickle holds no text")


def extract_program(text: str) -> str | None:
    """What stands between the last two lines with ``` of a completion, after the last `</think>`; or None."""
    lines = text.rpartition("</think>")[2].split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    program = "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""
    return program if program.strip() and len(program) <= MAX_PROGRAM else None


def judge(text: str, problem: Mapping[str, str]) -> Judgement:
    """Runs the program of a completion against all tests of a problem.

    Raises:
        ValueError: see `cases_of`.
        RuntimeError: see `sandbox.outputs`.
    """
    program = extract_program(text)
    if program is None:
        return Judgement("unparsed", None)
    tests = cases_of(problem)
    most = sandbox.FILE_BYTES + 2 * sum(map(len, tests.outputs))
    found = sandbox.outputs(program, tests.inputs, tests.function, SECONDS, most)
    same = same_result if tests.function else same_output
    right = len(found) == len(tests.inputs) and all(map(same, found, tests.outputs))
    return Judgement("correct" if right else "wrong", program)


def same_result(found: str, gold: str) -> bool:
    """Whether two texts of JSON are the same value."""
    try:
        return bool(json.loads(found) == json.loads(gold))
    except (ValueError, RecursionError):
        return False


def same_output(found: str, gold: str) -> bool:
    """Whether two outputs have the same lines, white space around them apart: the same text, or the same numbers."""
    a, b = ([line.strip() for line in text.strip().split("\n")] for text in (found, gold))
    return len(a) == len(b) and all(x == y or _same_numbers(x, y) for x, y in zip(a, b, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except (InvalidOperation, ValueError):
        return False
