"""A rollout of vLLM is a rollout of ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from soft_models import EXPLICIT, LATENT, Job, assert_same, together

from rl_soft.thoughts.decoding import Decoding

KINDS = [("token", 1), ("gumbel", 1), ("gumbel", 4), ("gumbel", 8), ("dirichlet", 4), ("soft", 4)]
FIVE = ["llama", "qwen2", "qwen3", "gemma2", "gpt2"]
MORE = ["mistral", "gemma3", "phi3", "olmo2", "smollm3", "granite"]


@pytest.mark.parametrize("name", [*FIVE, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_kind_in_one_batch(engines, name):
    """Latent and explicit, all kinds, rows of all settings side by side."""
    made, llm = engines(name)
    jobs = [
        Job(made, replace(base, thought=kind, thought_k=k))
        for base in (LATENT, EXPLICIT)
        for kind, k in KINDS
    ]  # fmt: skip
    total = torch.zeros(3)
    for job, theirs in zip(jobs, together(llm, jobs), strict=True):
        total += torch.tensor(assert_same(theirs, job.ours()))
    compared, equal, left = total.tolist()
    assert left <= 1 and equal + left == compared > 700  # before the first near-tie, all


def test_controls_of_decoding_and_greedy(engines):
    made, llm = engines("llama")
    cut = Decoding(top_k=9, top_p=0.9, after_top_p=0.8, cold_stop_entropy=2.0, cold_stop_length=2)
    paper = Decoding(order="paper", top_p=0.95)
    jobs = [
        Job(made, EXPLICIT, decoding=cut),
        Job(made, replace(EXPLICIT, thought="dirichlet"), decoding=paper),
        Job(made, LATENT, decoding=paper),
        Job(made, EXPLICIT, greedy=True),
        Job(made, replace(EXPLICIT, switch="entropy", switch_window=1)),
        Job(made, replace(EXPLICIT, thought="soft", switch="entropy", switch_window=0), decoding=cut),
        Job(made, replace(LATENT, thought_temperature=0.7, temperature=0.5, thought_tau=0.2)),
    ]
    for job, theirs in zip(jobs, together(llm, jobs), strict=True):
        assert_same(theirs, job.ours())
