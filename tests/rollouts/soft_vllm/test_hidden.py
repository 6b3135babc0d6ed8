"""Thoughts that are made from hidden states: read where the LM head reads them, projected by the pushed projector."""

from __future__ import annotations

from dataclasses import replace

import pytest
from soft_models import LATENT, Job, assert_same, build, state_of, together
from test_training import trainer

from rl_soft.model import policy
from rl_soft.model.projector import PROJECTOR, add_projector
from rl_soft.model.side_modules import save_module

HYBRID = replace(LATENT, thought="hybrid")


@pytest.fixture(scope="module")
def projected(tmp_path_factory):
    """A folder with a projector beside the model."""
    made, folder = build("llama", tmp_path_factory.mktemp("hidden") / "model", spread=1.5)
    add_projector(made.model, gated=True, size=48)
    made.model.projector.gate.data.fill_(0.7)
    save_module(folder, PROJECTOR, made.model.projector.state_dict())
    (folder / "rl_soft.json").unlink()
    return folder


def test_hidden_and_hybrid_beside_gumbel(projected):
    from vllm import LLM

    from rl_soft.rollouts.vllm.options import engine_options

    made = policy.load_policy(str(projected))
    made.model.eval()
    options = engine_options(str(projected), slots=8, thoughts=12)
    # Few blocks, so that rows are thrown out and read again with what was fed.
    few = {"block_size": 32, "num_gpu_blocks_override": 10, "enable_prefix_caching": False}
    llm = LLM(str(projected), dtype="float32", enforce_eager=True, max_model_len=96, max_num_seqs=4, **few, **options)
    long = ["12+34=?abcdefgh" * 3 + "12+34=?abcde"]
    jobs = [
        Job(made, replace(LATENT, thought="hidden"), questions=long),
        Job(made, replace(HYBRID, num_thoughts=8), questions=long, samples=3),
        Job(made, LATENT),
    ]
    for job, theirs in zip(jobs, together(llm, jobs), strict=True):
        assert_same(theirs, job.ours())
    assert state_of(llm).fed is not None


def test_a_hybrid_policy_learns(projected, tmp_path):
    """The projector is pushed with the weights."""
    run, keep = trainer(projected, tmp_path, HYBRID, max_steps=3)
    before = run.model.projector.inner.weight.clone()
    run.train()
    assert (run.model.projector.inner.weight - before).abs().max() > 1e-4
    assert max(log["rollout/density_gap"] for log in keep.logs) < 1e-4
