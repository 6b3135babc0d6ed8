"""Runs a program and its tests in a process with limits.

Two programs in one file, like `symbolic`: imported, it starts the process; run as a script, it is the process, which
imports nothing of this package.

The process has an empty environment, a temporary folder, and limits on CPU time, memory, file size, open files and
processes (none but itself); the parent kills its whole group after `WALL_SECONDS`. Started by root it becomes an
unprivileged user first. Where the kernel allows it, it has no network.

A program with tests proves that each passed by sending back a token which it reads only then, so that a program that
exits early, prints, or raises proves nothing. These limits are a guard against accidents and cheap tricks and no jail:
a program that takes the interpreter apart can still read what its user can read, and find the token. POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CPU_SECONDS = 5
WALL_SECONDS = 20.0
TOTAL_SECONDS = 60  # of CPU, of all inputs of one program
MEMORY_BYTES = 1 << 30  # address space, not resident memory
FILE_BYTES = 1 << 20
OPEN_FILES = 64
UNPRIVILEGED = 65534  # the user and group that root becomes

_READY = b"ready"
# Sets are in the same order every time; libraries start no threads, which they could not.
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def passes(program: str, tests: str) -> bool:
    """Whether the tests, run after the program and in its namespace, end without an exception.

    Raises:
        RuntimeError: the process cannot be started, which says nothing about the program.
    """
    token = secrets.token_hex(16).encode()
    return _reply("tests", [program.encode(errors="replace"), tests.encode(errors="replace")], token) == token


def outputs(
    program: str, inputs: Sequence[str], function: str = "", seconds: float = 6.0, most: int = FILE_BYTES
) -> list[str]:
    """What a program says to each input: run once per input as a script, or one of its functions called.

    The right outputs are never in the process: what a program finds there, and what it sends back itself, proves
    nothing. The first input that ends in an exception, or takes too long, is the last.

    Args:
        inputs: standard input of each run; or the arguments of each call, a line of JSON per argument.
        function: what is called, a method of the class `Solution` where the program has one; empty for a script.
        seconds: of CPU per input. All of them have TOTAL_SECONDS at most.
        most: bytes that all outputs may have together.

    Returns:
        As many texts as inputs that were answered: what was written to standard output, or the result as JSON.

    Raises:
        RuntimeError: the process cannot be started, which says nothing about the program.
    """
    asked = {"function": function, "count": len(inputs), "seconds": seconds}
    cpu = min(int(seconds * len(inputs)) + 1, TOTAL_SECONDS)
    files = {f"in-{i}": text.encode(errors="replace") for i, text in enumerate(inputs)}
    sources = [program.encode(errors="replace"), json.dumps(asked).encode()]
    said = _reply("outputs", sources, b"", cpu, most + 8 * len(inputs) + 100, files)
    found: list[str] = []
    while len(said) >= 8 and len(found) < len(inputs):
        size = int.from_bytes(said[:8], "little")
        if len(said) < 8 + size:
            break
        found.append(said[8 : 8 + size].decode(errors="replace"))
        said = said[8 + size :]
    return found


def _reply(
    mode: str,
    sources: Sequence[bytes],
    token: bytes,
    cpu_seconds: int = CPU_SECONDS,
    file_bytes: int = FILE_BYTES,
    files: Mapping[str, bytes] | None = None,
) -> bytes:
    """What the process writes back behind its first word; `files` lie in its folder, by their names."""
    request = b"".join(len(source).to_bytes(8, "little") + source for source in sources) + token
    with (
        tempfile.TemporaryDirectory(prefix="rl_soft-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as reply,  # a file and not a pipe: the limit on file size holds for it
    ):
        for name, content in (files or {}).items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
            os.chmod(file.name, 0o444)
        if os.geteuid() == 0:
            os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        process = subprocess.Popen(
            # -P: the folder of this file is not on the path; -s: nor is that of the user
            [sys.executable, "-P", "-s", __file__, mode, str(cpu_seconds), str(file_bytes)],
            cwd=folder,
            env={**_ENVIRONMENT, "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=reply,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(request, timeout=WALL_SECONDS + max(0, cpu_seconds - CPU_SECONDS))
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        reply.seek(0)
        said = reply.read(file_bytes + 100)
    if not said.startswith(_READY):
        raise RuntimeError(f"no process for programs starts; try {sys.executable} -P -s {__file__} < /dev/null")
    return said[len(_READY) :]


def _end(process: subprocess.Popen) -> None:
    """Kill the group, with whatever it may have started; the process is its leader until it is waited for."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _serve(mode: str, cpu_seconds: int, file_bytes: int) -> None:
    """The process: reads what it is to run, and runs it within limits."""
    import resource

    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def take(size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (part := os.read(requests, size - len(data))):
            data += part
        return bytes(data)

    program, other = (take(int.from_bytes(take(8), "little")).decode() for _ in range(2))
    _confine(resource, cpu_seconds, file_bytes)
    os.write(replies, _READY)
    if mode == "tests":
        _run_tests(program, other)
        os.write(replies, take(32))
    else:
        asked = json.loads(other)
        for output in (_call if asked["function"] else _run_script)(program, asked):
            os.write(replies, len(output).to_bytes(8, "little") + output)
    os._exit(0)  # what the program left to run at exit does not count


def _run_tests(program: str, tests: str) -> None:
    module = type(sys)("program")  # a module, since dataclasses and pickle look up where a class was made
    sys.modules["program"] = module
    exec(compile(program, "program", "exec", dont_inherit=True), vars(module))
    exec(compile(tests, "tests", "exec", dont_inherit=True), vars(module))


def _run_script(program: str, asked: dict[str, Any]) -> Iterator[bytes]:
    """What a script writes for each input. Its streams are files: it may read and write them by descriptor too."""
    _threads_in_turn()
    code = compile(program, "program", "exec", dont_inherit=True)
    null = os.dup(0)
    for i in range(asked["count"]):
        for number, name, flags in ((0, f"in-{i}", os.O_RDONLY), (1, "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)):
            os.dup2(null, number)  # the run before may have closed it
            descriptor = os.open(name, flags)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = written = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(_PREAMBLE, names)
        with _timed(asked["seconds"]), contextlib.suppress(SystemExit):
            exec(code, names)
        with contextlib.suppress(ValueError):  # it may have been closed
            written.flush()
        os.lseek(1, 0, os.SEEK_SET)
        with open(1, "rb", closefd=False) as file:
            yield file.read()


def _call(program: str, asked: dict[str, Any]) -> Iterator[bytes]:
    """The result of a function for each input, as JSON."""
    _threads_in_turn()
    names: dict[str, Any] = {"__name__": "program"}
    exec(_PREAMBLE, names)
    with _timed(asked["seconds"]):
        exec(compile(program, "program", "exec", dont_inherit=True), names)
        solution = names.get("Solution")
        called = getattr(solution(), asked["function"]) if isinstance(solution, type) else names[asked["function"]]
    for i in range(asked["count"]):
        with open(f"in-{i}", encoding="utf-8") as file:
            arguments = [json.loads(line) for line in file.read().split("\n")]
        with _timed(asked["seconds"]):
            result = called(*arguments)
        yield json.dumps(result).encode()


@contextlib.contextmanager
def _timed(seconds: float) -> Iterator[None]:
    """SIGPROF ends the process after so much CPU time: a program cannot catch that as an exception."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _threads_in_turn() -> None:
    """No thread can be started here; scripts that run `main` in one, for a larger stack, run it where they are."""
    import threading

    threading.Thread.start = threading.Thread.run  # type: ignore[method-assign]
    threading.Thread.join = lambda self, timeout=None: None  # type: ignore[method-assign]


def _confine(resource: object, cpu_seconds: int, file_bytes: int) -> None:
    set_limit = resource.setrlimit  # type: ignore[attr-defined]
    limits = {"CORE": 0, "CPU": cpu_seconds, "FSIZE": file_bytes, "NOFILE": OPEN_FILES, "NPROC": 0}
    if sys.platform == "linux":  # elsewhere RLIMIT_AS is refused
        limits["AS"] = MEMORY_BYTES
        _leave_network()
    if os.geteuid() == 0:
        # The limit on processes does not hold for root. Its interpreter may stand where no one else can read.
        for module in _COMMON:
            __import__(module)
        os.setgroups([])
        os.setgid(UNPRIVILEGED)
        os.setuid(UNPRIVILEGED)
    for name, limit in limits.items():
        set_limit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    os.kill = os.killpg = None  # type: ignore[assignment]  # the parent is of the same user, unless it is root


def _leave_network() -> None:
    """A network namespace of its own holds no interface; where that is not allowed, the network stays."""
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    ctypes.CDLL(None).unshare(new_network if os.geteuid() == 0 else new_user | new_network)


_COMMON = [
    "abc", "argparse", "array", "ast", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy",
    "csv", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "graphlib", "hashlib",
    "heapq", "inspect", "io", "itertools", "json", "keyword", "locale", "logging", "math", "numbers", "operator",
    "pprint", "queue", "random", "re", "secrets", "socket", "statistics", "string", "struct", "textwrap",
    "threading", "time", "timeit", "traceback", "types", "typing", "unicodedata", "uuid", "zlib",
]  # fmt: skip

# What programs of LiveCodeBench may take for imported, in the order of its own checker: later names win.
_STARS = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_PREAMBLE = "\n".join(
    [*(f"from {name} import *" for name in _STARS), f"import {', '.join(_STARS)}", "sys.setrecursionlimit(50000)"]
)

if __name__ == "__main__":
    _mode, *_limits = sys.argv[1:] or ["tests", str(CPU_SECONDS), str(FILE_BYTES)]
    _serve(_mode, *map(int, _limits))
