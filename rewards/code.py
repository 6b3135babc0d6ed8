"""Programs as answers: found in a completion by parsing it, and right if they pass their tests (`sandbox` runs them).

The same three outcomes as for other answers: `unparsed` where a completion holds no program, `wrong` where one fails,
does not compile or exceeds a limit. Nothing here asks whether programs may be run: the caller must have been told so.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rewards import livecodebench, sandbox
from rewards.answers import Judgement

MAX_PROGRAM = 100_000  # characters
WORKERS = min(4, os.cpu_count() or 1)
_MAX_PARSES = 30  # of one text

_OPENING = re.compile(r"^(?P<before>[^`~\n]*)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_QUOTED = re.compile(r"^> ?(?:```|~~~)", re.MULTILINE)
_CLOSING = re.compile(r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*$")
_STARTS = re.compile(r"(?:from\s+[\w.]+\s+import|import|def|async\s+def|class|@)\b|@")


def parse(code: str) -> ast.Module | SyntaxError | None:
    """The syntax tree, the error, or None where the parser gives up."""
    try:
        return ast.parse(code)
    except SyntaxError as error:
        return error
    except (ValueError, MemoryError, RecursionError):
        return None


def defines(code: str, name: str) -> bool:
    """Whether code has a function or value of that name at its top level; any function where the name is empty."""
    return isinstance(tree := parse(code), ast.Module) and any(_is_named(node, name) for node in tree.body)


def _is_named(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name or not name
    targets = node.targets if isinstance(node, ast.Assign) and name else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def blocks(text: str, prompt: str = "") -> list[str]:
    """The fenced blocks of a text, without their indentation; one that is never closed ends with the code in it.

    A fence of three or more backticks or tildes may stand behind words and carry attributes. A line that looks like
    its end is none where the code up to it is unfinished, as within a docstring, and a later one finishes it.
    """
    found: list[str] = []
    lines = text.split("\n")
    i, parses = 0, _MAX_PARSES
    while i < len(lines):
        opening = _OPENING.match(lines[i])
        i += 1
        if opening is None:
            continue
        first = end = None
        for j in range(i, len(lines)):
            if (closing := _CLOSING.match(lines[j])) and closing["fence"].startswith(opening["fence"]):
                first = j if first is None else first
                parses -= 1
                if parses < 0 or _complete(_dedented(lines[i:j]), prompt):
                    end = j if parses >= 0 else first
                    break
        if first is None:
            code = _dedented(lines[i:])
            found.append(_longest(code) or code)
            break
        end = first if end is None else end
        found.append(_dedented(lines[i:end]))
        i = end + 1
    return [block for block in found if block.strip()]


def _complete(code: str, prompt: str) -> bool:
    return isinstance(parse(prompt + code if prompt and code[:1].isspace() else code), ast.Module)


def _dedented(lines: Sequence[str]) -> str:
    """Lines without the indentation of their fence; the inside of a function keeps its own."""
    code = "".join(f"{line}\n" for line in lines)
    first = next((line for line in lines if line.strip()), "")
    indentation = first[: len(first) - len(first.lstrip())]
    if indentation and _STARTS.match(first.lstrip()):
        return "".join(f"{line.removeprefix(indentation)}\n" for line in lines)
    return code


def _longest(code: str, before: str = "") -> str:
    """The longest part of code, from its beginning to a line at column 0, that parses behind `before`; maybe empty."""
    lines = code.splitlines(keepends=True)
    offset = before.count("\n")
    cut = len(lines)
    for _ in range(_MAX_PARSES):  # each ends before the error of the one before
        tree = parse(before + "".join(lines[:cut]))
        if isinstance(tree, ast.Module):
            return "".join(lines[:cut])
        line = (tree.lineno or 1) - 1 - offset if isinstance(tree, SyntaxError) else cut - 1
        cut = min(cut - 1, max(line, 0))
        while cut > 0 and (lines[cut][:1].isspace() or not lines[cut].strip()):
            cut -= 1
        if cut <= 0:
            break
    return ""


def _continuation(code: str, prompt: str) -> str | None:
    """What goes on with the function that a prompt begins, up to the next statement at the top level, and what it uses
    of the functions that follow."""
    for body in (code, textwrap.indent(textwrap.dedent(code), "    ")):
        taken = _longest(body, prompt)
        if not taken or not isinstance(tree := parse(prompt + taken), ast.Module):
            continue
        lines = (prompt + taken).splitlines(keepends=True)
        begun = [i for i, node in enumerate(tree.body) if node.lineno <= prompt.count("\n")]
        end = (
            _first_line(following[0]) - 1 if (following := tree.body[begun[-1] + 1 if begun else 0 :]) else len(lines)
        )
        function, rest = "".join(lines[:end]), "".join(lines[end:])
        if function[len(prompt) :].strip():
            return function[len(prompt) :] + (_needed(function, [rest]) if following else "")
    return None


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _unfenced(text: str, name: str) -> str | None:
    """The whole program in a text without fences, from the first line that begins one."""
    definition = re.compile(
        rf"^[ \t]*(?:(?:async\s+)?def|class)\s+{name}\b" + (rf"|^{name}\s*[:=]" if name else ""), re.MULTILINE
    )
    if not definition.search(text):
        return None
    lines = textwrap.dedent(text).splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if _STARTS.match(line) or (name and line.startswith(name))]
    for start in starts[:8]:
        code = _longest("".join(lines[start:]))
        if defines(code, name):
            return code
    return None


def _needed(main: str, others: Sequence[str]) -> str:
    """The imports, functions, classes and constants of other blocks that a program uses and lacks, in their order."""
    provided: list[tuple[set[str], str, set[str]]] = []  # names, source, names that it uses
    for code in others:
        if not isinstance(tree := parse(code), ast.Module):
            continue
        lines = code.splitlines(keepends=True)
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = {node.name}
            elif isinstance(node, ast.Assign):
                names = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            else:
                continue
            source = "".join(lines[_first_line(node) - 1 : node.end_lineno])
            provided.append((names, source if source.endswith("\n") else source + "\n", _used(node)))
    tree = parse(main)
    wanted = _used(tree) if isinstance(tree, ast.Module) else set()
    chosen: set[int] = set()
    while more := [
        i for i, (names, _, _) in enumerate(provided) if i not in chosen and (names & wanted or "*" in names)
    ]:
        chosen.update(more)
        wanted.update(*(provided[i][2] for i in more))
    return "".join(provided[i][1] for i in sorted(chosen))


def _used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _future_first(program: str) -> str:
    """The program with its `from __future__ import` lines where Python wants them."""
    if "__future__" not in program:
        return program
    found = re.findall(r"^from __future__ import .*\n?", program, re.MULTILINE)
    return "".join(dict.fromkeys(found)) + re.sub(r"^from __future__ import .*\n?", "", program, flags=re.MULTILINE)


def extract_program(text: str, prompt: str = "", entry_point: str = "") -> str | None:
    """The program that a completion gives, or None.

    Nothing before the last `</think>` is looked at. The program is the last fenced block that defines the entry point,
    with the imports, helpers and constants of the other blocks before it; without fences the part of the text that
    parses and defines it. Where the completion goes on with a prompt (the head of a function), the program is prompt
    and completion, up to the end of that function; a completion that defines the entry point anew is run after the
    prompt too, whose imports it may need.

    Args:
        prompt: source text that the completion continues; empty where the question is in words.
        entry_point: the name of the function that the tests call.
    """
    text = text.rpartition("</think>")[2].replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip() or len(text) > MAX_PROGRAM:
        return None
    if _QUOTED.search(text):
        text = re.sub(r"^> ?", "", text, flags=re.MULTILINE)
    lead = text[: fence.start()] if (fence := _FENCE.search(text)) else ""
    if (prompt and lead.strip() and lead.lstrip("\n")[:1].isspace()) or (entry_point and _unfenced(lead, entry_point)):
        text = lead  # the fence was opened by the prompt
    fenced = blocks(text, prompt)
    whole: str | None = None
    if fenced:
        main = next((i for i in reversed(range(len(fenced))) if defines(fenced[i], entry_point)), None)
        if main is not None:
            whole = _needed(fenced[main], fenced[:main] + fenced[main + 1 :]) + fenced[main]
    elif entry_point or not prompt:
        whole = _unfenced(text, entry_point)
    if whole is not None:
        head = prompt if not prompt or isinstance(parse(prompt), ast.Module) else f"{prompt.rstrip()}\n    pass\n"
        program = f"{head}\n{whole}" if prompt else whole
    elif prompt:
        bodies = [body for block in reversed(fenced or [text]) if (body := _continuation(block, prompt)) is not None]
        if not bodies and not fenced:
            return None
        program = prompt + (bodies[0] if bodies else fenced[-1])
    else:
        program = fenced[-1] if fenced else text
    return None if not program.strip() or len(program) > MAX_PROGRAM else _future_first(program)


def readable_tests(tests: str) -> bool:
    """Whether the tests of a data set are Python at all."""
    return isinstance(parse(tests), ast.Module) and tests.strip() != ""


def _called(tests: str) -> str:
    """The first name that tests use and do not define, which is what they test; empty if there is none."""
    if not isinstance(tree := parse(tests), ast.Module):
        return ""
    known, used = set(dir(builtins)), []
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.append((node.lineno, node.col_offset, name))
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                known.add(name)
            case ast.alias(name=name, asname=asname):
                known.add(asname or name.partition(".")[0])
    return next((name for _, _, name in sorted(used) if name not in known), "")


def judge_programs(
    texts: Sequence[str], tests: Sequence[str], metadata: Sequence[Mapping[str, str]]
) -> list[Judgement]:
    """Runs the programs of completions against their tests, a few at a time.

    Args:
        texts: completions.
        tests: source text that raises unless the program is right.
        metadata: for each `prompt` and `entry_point`, see `extract_program`; either may be missing. Where the entry
            point is, the first name that the tests use and do not define takes its place. Or the columns of a problem
            of LiveCodeBench, which has tests of its own form.
    """

    def judge(text: str, test: str, given: Mapping[str, str]) -> Judgement:
        if livecodebench.is_problem(given):
            return livecodebench.judge(text, given)
        program = extract_program(text, given.get("prompt", ""), given.get("entry_point") or _called(test))
        if program is None:
            return Judgement("unparsed", None)
        return Judgement("correct" if sandbox.passes(program, test) else "wrong", program)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="rewards-code") as threads:
        return list(threads.map(judge, texts, tests, metadata))
