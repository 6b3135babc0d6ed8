"""Rollouts on a CPU: products, attention and decoder layers of a step by the kernels in `cpu.c`.

PyTorch's products are made for hundreds of rows, and a step of a rollout has 1 to 64; between them it calls thirty
operations per layer, each longer to start than to do. The kernels are compiled once, into the user's cache, by the C
compiler that is there, and run on PyTorch's own threads. Where they cannot be had (another instruction set, no
compiler), PyTorch's are taken. Which layers are taken whole: `layers`.

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

from rl_soft.model.adapters import merged_for_now
from rl_soft.rollouts.kernels.layers import Layer, Parts, casts, is_step, parts_of, patched

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
# OpenMP's library is asked for by the name of the one that PyTorch has loaded, so there is one pool of threads.
FLAGS = ("-O3", "-mfma", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-nodefaultlibs")
SETS = {"AVX2": ["-mavx2"], "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]}  # names as PyTorch's
LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # floats of a vector
ROWS = 512 if LANES == 16 else 192  # of a product; from there on PyTorch's are as fast
LARGE = 2**16  # numbers of a matrix; a smaller one stays in the cache of a core, where little is to be won
WIDEST = 256  # head size


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had."""
    instructions = SETS.get(torch.backends.cpu.get_cpu_capability())
    if instructions is None:
        return None
    flags = (*FLAGS, *instructions)
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_soft"
        file = folder / f"cpu_kernels-{digest}.so"
        if file.exists():
            loaded = ctypes.CDLL(str(file))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                out = Path(made) / file.name
                command = [*shlex.split(os.environ.get("CC", "cc")), *flags, "-o", str(out), str(SOURCE)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                loaded = ctypes.CDLL(str(out))  # before it is kept: what cannot be loaded is made anew the next time
                out.replace(file)  # several processes may do this at once
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:  # no home; a CC in half quotes
        reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        logger.info("rollout: steps take PyTorch's products, our CPU kernels cannot be compiled (%s)", reason)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.product.argtypes = [pointer] * 3 + [number] * 3
    loaded.attend.argtypes = [pointer] * 5 + [number] * 7 + [ctypes.c_float]
    loaded.before_attention.argtypes = [pointer] * 16 + [number] * 5 + [ctypes.c_float] * 2
    loaded.after_attention.argtypes = [pointer] * 11 + [number] * 4 + [ctypes.c_float]
    loaded.draw.argtypes = [pointer] * 10 + [number] * 3
    loaded.mass_outside.argtypes = [pointer] * 5 + [number] * 3
    for name in ("product", "attend", "before_attention", "after_attention", "draw", "mass_outside"):
        getattr(loaded, name).restype = None
    return loaded


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """While on, steps without gradients take the kernels: in layers, large `nn.Linear`, and attention `sdpa`. Adapters
    are merged for as long."""
    linears = [m for m in model.modules() if type(m) is nn.Linear and _takes(m)]
    kernels = library() if linears else None
    if kernels is None:
        yield
        return
    with merged_for_now(model):
        forwards: dict[Any, Any] = {}
        for module in model.modules():
            if (parts := parts_of(module)) is not None and _takes_layer(parts):
                forwards[module] = CpuLayer(kernels, module, parts)
        forwards |= {module: functools.partial(_linear, kernels, module) for module in linears}
        with patched(forwards, functools.partial(_attention, kernels)):
            yield


def _takes(module: nn.Linear) -> bool:
    w = module.weight
    return _fits(w) and w.numel() >= LARGE and w.shape[1] % LANES == 0 and "forward" not in vars(module)


def _linear(kernels: Any, module: nn.Linear, x: Tensor) -> Tensor:
    """The product (..., N) of x (..., K) with the weight (N, K), and the bias."""
    w, bias, rows = module.weight, module.bias, x.numel() // x.shape[-1]
    if rows > ROWS or x.dtype != torch.float32 or torch.is_grad_enabled() or casts(x):
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
    (n, H, _, D), (A, C), seen = query.shape, key.shape[1:3], attention_mask
    known = query.dtype == torch.float32 and D <= WIDEST and D % (2 * LANES) == 0
    if not (known and is_step(query, key, value, seen, dropout, kwargs)):
        return sdpa(module, query, key, value, seen, dropout=dropout, scaling=scaling, **kwargs)
    query, seen = query.contiguous(), None if seen is None else seen.contiguous()
    out = query.new_empty(n, 1, H, D)
    kernels.attend(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if seen is None else seen.data_ptr(), out.data_ptr(),
        n, A, H // A, C, D, *key.stride()[:2], D**-0.5 if scaling is None else scaling,
    )  # fmt: skip
    return out, None


class CpuLayer(Layer):
    """A layer with large float32 `nn.Linear`s, by two calls of the kernels."""

    def __init__(self, kernels: Any, module: Any, parts: Parts) -> None:
        super().__init__(module, parts)
        p, self.kernels = parts, kernels
        self.H, self.D, self.F = p.q.in_features, p.attention.head_dim, p.gate.out_features
        self.Q, self.A = p.q.out_features // self.D, p.k.out_features // self.D
        self.eps = p.first_norm.variance_epsilon, 0.0 if p.q_norm is None else p.q_norm.variance_epsilon
        before = (p.first_norm, p.q, p.q.bias, p.q_norm, p.k, p.k.bias, p.k_norm, p.v, p.v.bias)
        self.addresses_before = [_address(m) for m in before]
        self.addresses_after = [_address(m) for m in (p.o, p.second_norm, p.gate, p.up, p.down)]

    def takes(self, x: Tensor, cos: Tensor) -> bool:
        return x.dtype == torch.float32 and cos.dtype == torch.float32 and cos.shape[-1] == self.D

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (n, T, _), x = x.shape, x.contiguous()
        cos, sin = (a.expand(n, T, self.D).contiguous() for a in (cos, sin))
        h = torch.empty_like(x)
        q, (k, v) = x.new_empty(n, T, self.Q, self.D), x.new_empty(2, n, T, self.A, self.D)
        self.kernels.before_attention(
            x.data_ptr(), *self.addresses_before, *(a.data_ptr() for a in (cos, sin, h, q, k, v)),
            n * T, self.H, self.Q, self.A, self.D, *self.eps,
        )  # fmt: skip
        return q, k, v

    def after(self, x: Tensor, read: Tensor) -> Tensor:
        x, read, rows = x.contiguous(), read.contiguous(), x.shape[0] * x.shape[1]
        h, y, (gate, up) = torch.empty_like(x), torch.empty_like(x), x.new_empty(2, rows, self.F)
        self.kernels.after_attention(
            x.data_ptr(), read.data_ptr(), *self.addresses_after, *(a.data_ptr() for a in (h, gate, up, y)),
            rows, self.H, self.Q * self.D, self.F, self.parts.second_norm.variance_epsilon,
        )  # fmt: skip
        return y


def _takes_layer(parts: Parts) -> bool:
    p = parts
    return (
        # ZeRO-3 may hold them apart: then they have no numbers here
        all(type(m) is nn.Linear and _fits(m.weight) and m.weight.numel() for m in p.linears)
        and not any(n % LANES for m in p.linears for n in m.weight.shape)
        and all(m.bias is None for m in (p.o, p.gate, p.up, p.down))
        and all(m.bias is None or _fits(m.bias) for m in (p.q, p.k, p.v))
        and all(_fits(m.weight) for m in p.norms)
        and p.attention.head_dim % (2 * LANES) == 0
        and p.k.weight.shape == p.v.weight.shape
        and p.o.in_features == p.q.out_features
        and p.gate.weight.shape == p.up.weight.shape == p.down.weight.shape[::-1]
    )


def _fits(w: Tensor) -> bool:
    return type(w) is nn.Parameter and w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous()


def _address(part: Any) -> int | None:
    """Of a tensor, or of a module's weight; None for None."""
    return None if part is None else getattr(part, "weight", part).data_ptr()
