"""benchmarks/gpu.py runs from start to end without a GPU, and goes on where it was stopped.

pytest tests/benchmarks/test_gpu_benchmark.py -m slow
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(out, *more):
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--out", str(out), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_an_item_that_failed_is_measured_again_and_others_are_kept(tmp_path):
    out = tmp_path / "gpu.json"
    kept = {"ok": True, "result": {"copy_gb_per_s": 7.0}, "seconds": 1.0}
    out.write_text(json.dumps({"items": {"environment": {"ok": False, "error": "Late"}, "ceilings": kept}}))
    made = run(out, "--only", "environment", "ceilings")
    assert made.returncode == 0, made.stderr[-2000:]
    items = json.loads(out.read_text())["items"]
    assert items["environment"]["ok"] and items["environment"]["result"]["device"] == "cpu"
    assert items["ceilings"] == kept


@pytest.mark.slow
def test_every_item_passes_within_four_minutes(tmp_path):
    made = run(tmp_path / "gpu.json")
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    items = json.loads((tmp_path / "gpu.json").read_text())["items"]
    assert len(items) == 11 and all(item["ok"] for item in items.values())
    assert sum(item["seconds"] for item in items.values()) < 240
    assert "decode step, graphs off / on" in made.stdout
