"""math-verify in worker processes: answers that are no plain numbers, within limits of time, memory and length.

math-verify stops runaway work with SIGALRM, which works in a main thread only, replaces the caller's own alarm and
cannot interrupt one long C call. Here it runs in processes of its own, started at the first symbolic pair and then
reused. The kernel kills a worker that spends more than `CPU_SECONDS` on one pair (CPU time, so a grade does not depend
on how busy the machine is); the parent kills one that has not replied after `WALL_SECONDS`. Either way the pair is a
counted failure and the next pair gets a new worker. A worker ends when its standard input closes, so it does not
outlive its parent.

This file is two programs: imported, it is the pool; run as a script, it is the worker, which imports nothing of this
package. POSIX only.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, cast

# The last two: math-verify cannot read the prediction, or the gold answer.
Failure = Literal["timeout", "memory", "crash", "prediction", "gold"]
Verdict = bool | Failure

CPU_SECONDS = 3.0  # for one pair
WALL_SECONDS = 12.0  # for one pair
BATCH_SECONDS = 60.0  # for one call; pairs not begun by then time out
START_SECONDS = 120.0  # importing sympy on a busy machine
MEMORY_BYTES = 2 << 30  # address space, not resident memory
MAX_WORKERS = min(4, os.cpu_count() or 1)


class Worker:
    """One process; `ask` sends it `[prediction, gold]` as a line of JSON and returns its one-word reply.

    Another `script` may take other questions; it is called with the same two limits and gives the same replies.
    """

    def __init__(self, script: str = __file__) -> None:
        # -P: the folder of this file is not on the worker's path, so nothing in it can shadow another module
        command = [sys.executable, "-P", script, str(CPU_SECONDS), str(MEMORY_BYTES)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=environment, bufsize=0)
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        if self._reply(START_SECONDS) != b"ready":
            self.stop()
            package = "math_verify" if script == __file__ else "reasoning_gym"
            raise RuntimeError(f"no worker for answers starts; try {sys.executable} -c 'import {package}'")

    def ask(self, *question: str) -> Verdict:
        try:
            self._send(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            return "crash"
        match self._reply(WALL_SECONDS):
            case b"true" | b"false" as reply:
                return reply == b"true"
            case b"memory" | b"prediction" | b"gold" as reply:
                return cast(Failure, reply.decode())
            case b"":  # it is gone
                return "timeout" if self.process.wait() == -signal.SIGPROF else "crash"
        return "timeout"

    def _send(self, line: bytes) -> None:
        """Unbuffered writes to a pipe may be short."""
        view = memoryview(line)
        while view:
            view = view[self.stdin.write(view) :]

    def _reply(self, seconds: float) -> bytes | None:
        """The next reply, empty if the worker is gone, None if it said nothing in time."""
        poll = select.poll()
        poll.register(self.stdout, select.POLLIN | select.POLLHUP)
        # A reply is one short write to a pipe, so one read returns it whole.
        return os.read(self.stdout.fileno(), 64) if poll.poll(seconds * 1000) else None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class Pool:
    """Workers that take questions, such as pairs of answers, in parallel; safe to call from any thread."""

    def __init__(self, workers: int = MAX_WORKERS, start: Callable[[], Worker] | None = None) -> None:
        self.start = start
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="rewards-symbolic")
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def verify(self, pairs: Sequence[tuple[str, ...]]) -> list[Verdict]:
        deadline = time.monotonic() + BATCH_SECONDS
        unique = list(dict.fromkeys(pairs))  # a group of rollouts repeats its answers
        found = self.threads.map(lambda pair: self._verify(pair, deadline), unique)
        verdicts = dict(zip(unique, found, strict=True))
        return [verdicts[pair] for pair in pairs]

    def _verify(self, pair: tuple[str, ...], deadline: float) -> Verdict:
        verdict: Verdict = "timeout"
        for _ in range(2):  # a worker may have died while idle: only a second crash is the fault of the pair
            if time.monotonic() > deadline:
                return "timeout"
            try:
                worker = self.idle.get_nowait()
            except queue.Empty:
                worker = self.start() if self.start else Worker()
            verdict = worker.ask(*pair)
            if verdict in ("timeout", "memory", "crash"):
                worker.stop()
            else:
                self.idle.put(worker)
            if verdict != "crash":
                break
        return verdict

    def close(self) -> None:
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().stop()


_pool = Pool()  # costs nothing until it is used


def verify(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Whether each (prediction, gold) is the same mathematical object, or why that could not be found out.

    Raises RuntimeError when workers cannot be started at all, since that says nothing about the answers.
    """
    return _pool.verify(pairs)


def _replace_pool() -> Pool:
    global _pool
    old, _pool = _pool, Pool()
    return old


@atexit.register
def close() -> None:
    """Stops the workers; the next call of `verify` starts new ones."""
    _replace_pool().close()


# In a forked child the threads of the pool do not exist, and its pipes belong to the parent.
os.register_at_fork(after_in_child=_replace_pool)


def serve(cpu_seconds: float, memory_bytes: int) -> None:
    """The worker's loop: reads pairs from standard input until it closes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere RLIMIT_AS is refused
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing that a library prints can be taken for a reply
    # Not ExprExtractionConfig: it ends in sympy's parse_expr, which is an eval. Without its list of units, in which
    # `hr` is one, so that `\pi hr` would be read as `\pi`: nothing unknown is dropped.
    form = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=form)]

    def read(answer: str) -> list:
        # Without timeouts of its own: the alarm below does their work.
        return parse(f"${answer}$", latex, "no_fallback", parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]

    def close(gold: sympy.Expr, prediction: sympy.Expr) -> bool | None:
        """Whether two numbers are equal, however small; None if they are no numbers.

        math-verify rounds to places after the point, where 10^-30 and 10^-31 are one. Exact forms have to be equal; a
        decimal may differ from a gold that cannot be written out by a relative 1e-6.
        """
        if not all(isinstance(x, sympy.Expr) and not x.free_symbols and x.is_number for x in (gold, prediction)):
            return None
        decimal = prediction.has(sympy.Float)
        exact = [x.replace(lambda e: e.is_Float, lambda e: sympy.Rational(str(e))).doit() for x in (gold, prediction)]
        difference = exact[0] - exact[1]
        if difference == 0:
            return True
        if difference.is_Rational and exact[0].is_Rational:
            rest = exact[0].q
            for prime in (2, 5):
                while rest % prime == 0:
                    rest //= prime
            if rest == 1 or not decimal:
                return False
        distance, size = abs(difference.evalf(30)), abs(exact[0].evalf(30))
        return bool(distance <= size * sympy.Rational(1, 10 ** (6 if decimal else 15)))

    def grade(prediction: str, gold: str) -> bytes:
        reply = b"gold"
        try:
            if golds := read(gold):
                reply = b"prediction"
                if predictions := read(prediction):
                    reply = b"false"  # and so is what sympy cannot compare
                    verdict = None if "%" in gold + prediction else close(golds[0], predictions[0])
                    if verdict is None:
                        verdict = verify(golds, predictions, timeout_seconds=None, raise_on_error=True)
                    if verdict:
                        reply = b"true"
        except MemoryError:
            return b"memory"
        except Exception:
            pass
        return reply

    grade(r"\frac{1}{2}", "x = 0.5")  # builds the parser's tables
    os.write(replies, b"ready")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # no handler: SIGPROF ends the process, whatever it does
        reply = grade(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, reply)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
