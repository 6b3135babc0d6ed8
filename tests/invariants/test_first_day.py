"""docs/first_day.md, block by block, in a fresh clone: no command fails, and all of it takes minutes.

pytest -m slow tests/invariants/test_first_day.py -s        needs models/smollm2-135m-instruct, or the network
"""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

PAGE = ROOT / "docs/first_day.md"
MINUTES = 15  # on two idle cores


def blocks():
    """Language and text of each fenced block of the page."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/.rl_soft").exists(), reason="launch.sh would install first")
def test_the_day_can_be_replayed(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    (clone / ".venv").symlink_to(ROOT / ".venv")
    model = ROOT / "models/smollm2-135m-instruct"
    if model.exists():
        shutil.copytree(model, clone / "models" / model.name)
    venv = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(clone)}
    start = time.monotonic()
    for language, text in blocks():
        command = ["bash", "-euxc", text] if language == "bash" else [sys.executable, "-c", text]
        began = time.monotonic()
        run = subprocess.run(command, cwd=clone, env=venv, capture_output=True, text=True)
        sys.stdout.write(f"{time.monotonic() - began:6.1f} s  {text.splitlines()[0][:100]}\n")
        assert run.returncode == 0, f"{text}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        assert "Traceback" not in run.stderr
    sys.stdout.write(f"{time.monotonic() - start:6.1f} s  all of it\n")
    assert (clone / "runs/day-compared/report.html").exists()
    assert time.monotonic() - start < 60 * MINUTES
