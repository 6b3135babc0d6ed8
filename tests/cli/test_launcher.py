"""Several processes under one command: their own words are the last, they are waited for, and none outlives it.

pytest tests/cli/test_launcher.py
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

PROGRAM = """
import os, pathlib, signal, sys, time
from rl_soft.cli.launcher import end_with_launcher
end_with_launcher(every=0.1)
folder, action, rank = pathlib.Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
if action == "mistake":
    print("rl_soft: error: a mistake", file=sys.stderr) if rank == "0" else time.sleep(60)
    sys.exit(2)
if action == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
def save(number, frame):
    time.sleep(1.0)  # the rest of a step
    (folder / f"saved-{rank}").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
(folder / f"ready-{rank}").touch()
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    made = []

    def launch(action):
        (tmp_path / "program.py").write_text(PROGRAM)
        config = ROOT / "recipes/accelerate/ddp.yaml"
        words = [
            "-m",
            "rl_soft.cli.launcher",
            "--config_file",
            config,
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        process = subprocess.Popen(
            [sys.executable, *words, tmp_path / "program.py", tmp_path, action],
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        made.append(process)
        return process

    yield launch
    for process in made:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        ("mistake", 2, "rl_soft: error: a mistake\n"),
        ("killed", 137, "rl_soft: error: process 1 died of SIGKILL; the machine may have run out of memory; the "
         "same command resumes from the last checkpoint\n"),
    ],
)  # fmt: skip
def test_the_last_line_is_the_reason_and_the_exit_code_is_the_process_s(start, action, code, said):
    process = start(action)
    assert (process.communicate(timeout=120)[1], process.returncode) == (said, code)


def test_launch_sh_tells_mistakes_before_it_starts_anything(tmp_path):
    if not (ROOT / ".venv/.rl_soft").exists():
        pytest.skip("launch.sh would install first")
    words = [
        "recipes/codi.yaml",
        "--learning_rate",
        "abc",
        "--thought_kay",
        "5",
        "--output_dir",
        tmp_path / "run",
    ]
    run = subprocess.run([ROOT / "launch.sh", *words], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.splitlines() == [
        "rl_soft: error: learning_rate must be a number, got 'abc' (default 5e-05)",
        "rl_soft: error: unknown key 'thought_kay' in recipes/codi.yaml; did you mean thought_k?",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_are_waited_for_and_none_outlives_the_launcher(start, tmp_path, number):
    process = start("wait")
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(timeout=60) == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert process.stderr.read() == ""
        assert list(tmp_path.glob("saved-*")), "they were waited for"
    wait_for(lambda: all(not child.is_running() or child.status() == "zombie" for child in children), 20)
