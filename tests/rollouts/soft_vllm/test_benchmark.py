"""benchmarks/rollout.py on vLLM, as small as it gets: every row has the length that it was given (asserted there)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_a_measurement():
    job = {
        "side": "vllm-gumbel", "model": "random:tiny", "dtype": "float32", "prompts": 2, "group": 2, "prompt": 20,
        "shortest": 2, "longest": 6, "skewed": False, "k": 4, "batch": 4, "plain": False,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks/rollout.py"), "--job", json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.strip().splitlines()[-1])["seconds"] > 0
