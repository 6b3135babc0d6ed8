"""Runs a program and its tests in a process with limits.

Two programs in one file, like `symbolic`: imported, it starts the process; run as a script, it is the process, which
imports nothing of this package.

The process has an empty environment, a temporary folder, and limits on CPU time, memory, file size, open files and
processes (none but itself); the parent kills its whole group after `WALL_SECONDS`. Started by root it becomes an
unprivileged user first. Where the kernel allows it, it has no network.

It proves that every test passed by sending back a token which it reads only then, so that a program that exits early,
prints, or raises proves nothing. These limits are a guard against accidents and cheap tricks and no jail: a program
that takes the interpreter apart can still read what its user can read, and find the token. POSIX only.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile

CPU_SECONDS = 5
WALL_SECONDS = 20.0
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
    sources = [source.encode(errors="replace") for source in (program, tests)]
    request = b"".join(len(source).to_bytes(8, "little") + source for source in sources) + token
    with (
        tempfile.TemporaryDirectory(prefix="rl_soft-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as reply,  # a file and not a pipe: the limit on file size holds for it
    ):
        if os.geteuid() == 0:
            os.chown(folder, UNPRIVILEGED, UNPRIVILEGED)
        process = subprocess.Popen(
            # -P: the folder of this file is not on the path; -s: nor is that of the user
            [sys.executable, "-P", "-s", __file__],
            cwd=folder,
            env={**_ENVIRONMENT, "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=reply,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(request, timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
        reply.seek(0)
        said = reply.read(100)
    if not said.startswith(_READY):
        raise RuntimeError(f"no process for programs starts; try {sys.executable} -P -s {__file__} < /dev/null")
    return said == _READY + token


def _end(process: subprocess.Popen) -> None:
    """Kill the group, with whatever it may have started; the process is its leader until it is waited for."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _serve() -> None:
    """The process: reads program and tests, runs them, and passes the token on."""
    import resource

    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def take(size: int) -> bytes:
        data = b""
        while len(data) < size and (part := os.read(requests, size - len(data))):
            data += part
        return data

    program, tests = (take(int.from_bytes(take(8), "little")).decode() for _ in range(2))
    _confine(resource)
    os.write(replies, _READY)
    module = type(sys)("program")  # a module, since dataclasses and pickle look up where a class was made
    sys.modules["program"] = module
    exec(compile(program, "program", "exec", dont_inherit=True), vars(module))
    exec(compile(tests, "tests", "exec", dont_inherit=True), vars(module))
    os.write(replies, take(32))
    os._exit(0)  # what the program left to run at exit does not count


def _confine(resource: object) -> None:
    set_limit = resource.setrlimit  # type: ignore[attr-defined]
    limits = {"CORE": 0, "CPU": CPU_SECONDS, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "NPROC": 0}
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

if __name__ == "__main__":
    _serve()
