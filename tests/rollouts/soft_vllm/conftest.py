"""Tiny models in an engine of vLLM in this process, one after the other."""

from __future__ import annotations

import gc
import importlib.util
import os

import pytest

HERE = os.path.dirname(__file__)


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.fspath).startswith(HERE):
            item.add_marker(pytest.mark.vllm)


if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from rl_soft.rollouts.vllm import cpu

    cpu.prepare()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in the test's process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """name, options -> (the policy, its `vllm.LLM`); the one before is shut down."""
    made, policies = {}, {}

    def close():
        from vllm.distributed import cleanup_dist_env_and_memory

        made.clear()
        gc.collect()
        cleanup_dist_env_and_memory()

    def engine(name, slots=8, thoughts=12, **options):
        from soft_models import build
        from vllm import LLM

        from rl_soft.rollouts.vllm.models import leave_alone
        from rl_soft.rollouts.vllm.options import engine_options

        if name not in policies:
            policies[name] = build(name, tmp_path_factory.mktemp(name) / "model")
        policy, folder = policies[name]
        key = name, slots, thoughts, *sorted(options.items())
        if key not in made:
            close()
            given = {"dtype": "float32", "enforce_eager": True, "max_model_len": 96, "max_num_seqs": 64} | options
            made[key] = LLM(str(folder), **given, **engine_options(str(folder), slots, thoughts))
            leave_alone(policy.model)
        return policy, made[key]

    yield engine
    close()
