"""`python -m rl_soft.cli.launcher`, with the arguments of `accelerate launch`: several processes, and one voice.

What differs from `accelerate launch`: no traceback of the launcher stands below what a process said of its own end;
Ctrl-C waits until the processes have written their checkpoint; the exit code is theirs. A process ends by itself when
this one is killed (`end_with_launcher`).
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

LAUNCHER = "RL_SOFT_LAUNCHER"  # holds the id of this process
TOLD = (2, 130)  # exit codes of a process that has said in one line why it ends


def main(argv: list[str]) -> None:
    """Start the processes, wait for them, and end with the exit code of the first that failed."""
    import psutil
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(argv)
    arguments.signals_to_handle = "SIGQUIT"  # of torchrun, which would kill its processes 30 s after a SIGINT
    os.environ[LAUNCHER] = str(os.getpid())
    debug = bool(os.environ.get("RL_SOFT_DEBUG"))
    if not debug:
        logging.disable(logging.CRITICAL)  # in this process alone
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        """SIGINT and SIGTERM are for the processes, which stop at the end of a step; a second one is for all."""
        asked.append(number)
        if len(asked) > 1:
            raise SignalException("stopped twice", sigval=signal.Signals(number))
        if number == signal.SIGINT and in_foreground():
            return  # the terminal has sent it to all of them
        for process in psutil.Process().children():
            with suppress(psutil.Error):
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        if debug:
            raise
        rank, failure = error.get_first_failure()
        end(rank, failure.exitcode, bool(asked))
    except subprocess.CalledProcessError as error:  # of a single process
        end(0, error.returncode, bool(asked))
    except SignalException:
        raise SystemExit(130) from None


def in_foreground() -> bool:
    """Whether Ctrl-C in a terminal reaches this process and its children."""
    with suppress(OSError, ValueError):
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    return False


def end(rank: int, code: int, asked: bool) -> None:
    """Raises SystemExit with the exit code of a process, after a line for an end that it has not told itself."""
    if asked:
        raise SystemExit(130)
    if code < 0:
        name = signal.Signals(-code).name
        why = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
        print(
            f"rl_soft: error: process {rank} died of {name}{why}; the same command resumes from the last checkpoint",
            file=sys.stderr,
        )
    elif code not in TOLD:
        print(f"rl_soft: error: process {rank} ended with exit code {code}; what it said is above", file=sys.stderr)
    raise SystemExit(code if code > 0 else 128 - code)


def end_with_launcher(every: float = 1.0) -> None:
    """In a process that the launcher started: SIGTERM to itself once the launcher is gone, killed for example."""
    launcher = os.environ.get(LAUNCHER)
    if not launcher or int(launcher) != os.getppid():
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
