"""vLLM's CPU wheel, with Model Runner V2 by Triton's interpreter: exact and slow, for tests and for a first look.

Triton decides when it is imported, so this module imports nothing that would import it.
"""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreter"
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "RL_SOFT_VLLM_ON_CPU": "1",  # our own kernels stay off: what is exact without them is faster than interpreted
    "TORCH_COMPILE_DISABLE": "1",  # inductor asks Triton for a GPU
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def installed() -> bool:
    """Whether vLLM is its CPU wheel."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def prepare() -> None:
    """Make this process and those that it starts ready for vLLM's CPU wheel; nothing where it is another.

    Raises:
        ValueError: Triton has been imported, and is not interpreted.
    """
    if not installed() or "RL_SOFT_VLLM_ON_CPU" in os.environ:
        return
    if "triton" in sys.modules:
        raise ValueError(f"vLLM is its CPU wheel, and Triton is loaded already; start Python with PYTHONPATH={FOLDER}")
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), *paths])
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    runpy.run_path(str(FOLDER / "sitecustomize.py"))
