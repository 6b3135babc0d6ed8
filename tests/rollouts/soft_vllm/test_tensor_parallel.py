"""Two ranks draw the same: the noise has an address."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path


def test_two_ranks_make_what_our_engine_makes(tmp_path):
    """In a process of its own, since an engine of several ranks starts workers."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    command = [sys.executable, __file__, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all equal" in done.stdout


def main(folder: str) -> None:
    from soft_models import EXPLICIT, LATENT, Job, assert_same, build, together
    from vllm import LLM

    from rl_soft.rollouts.vllm.options import engine_options

    made, _ = build("llama", Path(folder))
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8}
    llm = LLM(folder, tensor_parallel_size=2, **options, **engine_options(folder, slots=8, thoughts=12))
    jobs = [Job(made, LATENT), Job(made, EXPLICIT), Job(made, replace(LATENT, thought="dirichlet"))]
    for job, theirs in zip(jobs, together(llm, jobs), strict=True):
        compared, equal, left = assert_same(theirs, job.ours())
        assert compared == equal + left and left <= 1
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    root = Path(__file__).parents[3]
    sys.path[:0] = [str(root), str(Path(__file__).parent)]
    main(sys.argv[1])
