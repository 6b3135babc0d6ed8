"""Which sides benchmarks/rollout.py measures.

pytest tests/benchmarks/test_benchmark_engines.py
"""

import subprocess
import sys

from conftest import ROOT

SIDES = "import sys; sys.path.insert(0, 'benchmarks'); import rollout; print(rollout.sides_of({!r}))"


def test_engines_are_measured_in_the_order_that_they_are_given():
    def sides(engines):
        code = SIDES.format(engines)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)

    assert sides("vllm,generate").stdout.strip() == "['vllm-token', 'vllm-gumbel', 'generate']"
    assert "--engines must be of generate,ours,vllm, got ours,vlm" in sides("ours,vlm").stderr
