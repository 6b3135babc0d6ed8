"""Programs as answers: found in a completion, and right if they pass their tests (`sandbox` runs them).

The same three outcomes as for other answers: `unparsed` where a completion holds no program, `wrong` where one fails,
does not compile or exceeds a limit. Nothing here asks whether programs may be run: the caller must have been told so.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rewards import sandbox
from rewards.answers import Judgement

MAX_PROGRAM = 100_000  # characters
WORKERS = min(4, os.cpu_count() or 1)

_FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_TOP_LEVEL = re.compile(r"^[^\s)\]}]", re.MULTILINE)


def extract_program(text: str, prompt: str = "", entry_point: str = "") -> str | None:
    """The program that a completion gives, or None.

    Nothing before the last `</think>` is looked at. A fenced block counts before the text around it: the last one that
    defines the entry point, else the last. With a prompt (the head of a function, which the model goes on with) the
    program is prompt and completion; a completion that defines the entry point anew is run after the prompt too,
    whose imports it may need. An unfenced continuation ends where the function does.

    Args:
        prompt: source text that the completion continues; empty where the question is in words.
        entry_point: the name of the function that the tests call.
    """
    text = text.rpartition("</think>")[2]
    blocks = _FENCE.findall(text)
    defined = re.compile(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE) if entry_point else None
    if blocks:
        code = next((block for block in reversed(blocks) if defined and defined.search(block)), blocks[-1])
    else:
        code = text
    if prompt and not (defined and defined.search(code)) and not blocks:
        end = _TOP_LEVEL.search(code)
        code = code[: end.start()] if end else code
    if not code.strip() or len(code) > MAX_PROGRAM:
        return None
    return f"{prompt}\n{code}" if prompt and defined and defined.search(code) else prompt + code


def readable_tests(tests: str) -> bool:
    """Whether the tests of a data set are Python at all."""
    try:
        ast.parse(tests)
    except (SyntaxError, ValueError):
        return False
    return tests.strip() != ""


def judge_programs(
    texts: Sequence[str], tests: Sequence[str], metadata: Sequence[Mapping[str, str]]
) -> list[Judgement]:
    """Runs the programs of completions against their tests, a few at a time.

    Args:
        texts: completions.
        tests: source text that raises unless the program is right.
        metadata: for each `prompt` and `entry_point`, see `extract_program`; either may be missing.
    """

    def judge(text: str, test: str, given: Mapping[str, str]) -> Judgement:
        program = extract_program(text, given.get("prompt", ""), given.get("entry_point", ""))
        if program is None:
            return Judgement("unparsed", None)
        return Judgement("correct" if sandbox.passes(program, test) else "wrong", program)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="rewards-code") as threads:
        return list(threads.map(judge, texts, tests, metadata))
