"""Rollouts on a CPU: the products and the attention of a decode step by the kernels in `cpu_kernels.c`.

PyTorch's products are made for hundreds of rows, and a step of a rollout has 1 to 64. The kernels are compiled once,
into the user's cache, by the C compiler that is there, and run on PyTorch's own threads. Where they cannot be had
(another instruction set, no compiler), PyTorch's are taken.

Results differ from PyTorch's by the rounding of another order of sums, as PyTorch's do between batch sizes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
# Without default libraries, the names of OpenMP are those of the library that PyTorch has loaded: one pool of threads.
FLAGS = ("-O3", "-mavx2", "-mfma", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-nodefaultlibs")
ROWS = 64  # of a product; PyTorch's are as fast from there on
LARGE = 2**16  # numbers of a matrix; a smaller one stays in the cache of a core, where little is to be won
WIDEST = 256  # head size


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":  # not measured on others
        return None
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_soft"
        file = folder / f"cpu_kernels-{digest}.so"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                out = Path(made) / file.name
                command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-o", str(out), str(SOURCE)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                out.replace(file)  # several processes may do this at once
        loaded = ctypes.CDLL(str(file))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody's home
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        logger.info("rollout: steps take PyTorch's products, our CPU kernels cannot be compiled (%s)", reason)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.product.argtypes = [pointer] * 3 + [number] * 3
    loaded.attend.argtypes = [pointer] * 5 + [number] * 7 + [ctypes.c_float]
    loaded.product.restype = loaded.attend.restype = None
    return loaded


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """While on, steps without gradients take the kernels, in large float32 `nn.Linear` and in attention `sdpa`."""
    on = not torch.is_autocast_enabled("cpu")
    linears = [m for m in model.modules() if type(m) is nn.Linear and _takes(m)] if on else []
    kernels = library() if linears else None
    if kernels is None:
        yield
        return
    for module in linears:
        module.forward = functools.partial(_linear, kernels, module)  # type: ignore[method-assign]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(_attention, kernels, ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        for module in linears:
            del module.forward


def _takes(module: nn.Linear) -> bool:
    w = module.weight
    plain = type(w) is nn.Parameter and w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous()
    return plain and w.numel() >= LARGE and w.shape[1] % 8 == 0 and "forward" not in vars(module)


def _linear(kernels: Any, module: nn.Linear, x: Tensor) -> Tensor:
    """The product (..., N) of x (..., K) with the weight (N, K), and the bias."""
    w, bias, rows = module.weight, module.bias, x.numel() // x.shape[-1]
    if rows > ROWS or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.linear(x, w, bias)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(w))
    kernels.product(x.data_ptr(), w.data_ptr(), y.data_ptr(), rows, *w.shape)
    return y if bias is None else y.add_(bias)


def _attention(
    kernels: Any,
    sdpa: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(n, H, 1, D) queries, (n, A, C, D) keys and values, (n, 1, 1, C) bool mask -> (n, 1, H, D)."""
    n, H, T, D = query.shape
    A, C = key.shape[1:3]
    seen = attention_mask
    if (
        (T > 1 or D % 16 or D > WIDEST or {query.dtype, key.dtype, value.dtype} != {torch.float32})
        or (key.shape != value.shape or key.stride() != value.stride() or key.stride()[2:] != (D, 1))
        or (seen is not None and (seen.dtype != torch.bool or seen.shape != (n, 1, 1, C)))
        or (dropout or kwargs.get("position_bias") is not None or torch.is_grad_enabled())
    ):
        return sdpa(module, query, key, value, seen, dropout=dropout, scaling=scaling, **kwargs)
    query, seen = query.contiguous(), None if seen is None else seen.contiguous()
    out = query.new_empty(n, 1, H, D)
    kernels.attend(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if seen is None else seen.data_ptr(), out.data_ptr(),
        n, A, H // A, C, D, *key.stride()[:2], D**-0.5 if scaling is None else scaling,
    )  # fmt: skip
    return out, None
