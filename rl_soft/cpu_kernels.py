"""Rollouts on a CPU: products, attention and decoder layers of a step by the kernels in `cpu_kernels.c`.

PyTorch's products are made for hundreds of rows, and a step of a rollout has 1 to 64; between them it calls thirty
operations a layer, each longer to start than to do. The kernels are compiled once, into the user's cache, by the C
compiler that is there, and run on PyTorch's own threads. Where they cannot be had (another instruction set, no
compiler), PyTorch's are taken. A whole layer is taken where it has the parts of Llama's, Qwen's or Mistral's, and only
after its first prompt has been taken both ways, with one result.

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
import weakref
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
FLAGS = ("-O3", "-mfma", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-nodefaultlibs")
SETS = {"AVX2": ["-mavx2"], "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]}  # names as PyTorch's
LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # floats of a vector
ROWS = 512 if LANES == 16 else 192  # of a product; from there on PyTorch's are as fast
LARGE = 2**16  # numbers of a matrix; a smaller one stays in the cache of a core, where little is to be won
WIDEST = 256  # head size
AGREE, ROUNDING = 1e-4, 1e-6  # of a layer's change, and of its input: what its two ways may differ by

_judged: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # layers, and whether they agreed


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
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                out = Path(made) / file.name
                command = [*shlex.split(os.environ.get("CC", "cc")), *flags, "-o", str(out), str(SOURCE)]
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
    loaded.before_attention.argtypes = [pointer] * 16 + [number] * 5 + [ctypes.c_float] * 2
    loaded.after_attention.argtypes = [pointer] * 11 + [number] * 4 + [ctypes.c_float]
    loaded.draw.argtypes = [pointer] * 10 + [number] * 3
    loaded.mass_outside.argtypes = [pointer] * 5 + [number] * 3
    for name in ("product", "attend", "before_attention", "after_attention", "draw", "mass_outside"):
        getattr(loaded, name).restype = None
    return loaded


@contextmanager
def cpu_kernels(model: nn.Module) -> Iterator[None]:
    """While on, steps without gradients take the kernels: in layers, large `nn.Linear`, and attention `sdpa`."""
    on = not torch.is_autocast_enabled("cpu")
    linears: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and _takes(m)] if on else []
    kernels = library() if linears else None
    if kernels is None:
        yield
        return
    for module in linears:
        module.forward = functools.partial(_linear, kernels, module)
    layers: list[Any] = [m for m in model.modules() if _is_layer(m) and _judged.get(m, True)]
    for module in layers:
        module.forward = Layer(kernels, module)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = functools.partial(_attention, kernels, ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        for module in linears + layers:
            del module.forward


def _takes(module: nn.Linear) -> bool:
    w = module.weight
    return _fits(w) and w.numel() >= LARGE and w.shape[1] % LANES == 0 and "forward" not in vars(module)


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
        (T > 1 or D % (2 * LANES) or D > WIDEST or {query.dtype, key.dtype, value.dtype} != {torch.float32})
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


def _is_layer(module: Any) -> bool:
    """A decoder layer with exactly the parts that the kernels know, all of them float32 on a CPU."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if attention is None or mlp is None or "forward" in vars(module):
        return False
    head_norms = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    known = (
        (module, ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]),
        (attention, ["q_proj", "k_proj", "v_proj", "o_proj", *head_norms]),
        (mlp, ["gate_proj", "up_proj", "down_proj", "act_fn"]),
    )
    if len(head_norms) == 1 or any({n for n, _ in m.named_children()} != set(names) for m, names in known):
        return False
    inner = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, *inner]
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, name) for name in head_norms]
    return (
        all(
            type(m) is nn.Linear and _fits(m.weight) and m.weight.numel() for m in linears
        )  # ZeRO-3 may hold them apart
        and not any(n % LANES for m in linears for n in m.weight.shape)
        and all(m.bias is None for m in inner)
        and all(hasattr(m, "variance_epsilon") and _fits(m.weight) for m in norms)
        and attention.config._attn_implementation == "sdpa"
        and getattr(attention, "head_dim", 1) % (2 * LANES) == 0
        and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module)
    )


class Layer:
    """`forward` of a decoder layer: the kernels for prompts and steps of a rollout, what was there for all else."""

    def __init__(self, kernels: Any, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        first, second = module.input_layernorm, module.post_attention_layernorm
        self.kernels, self.module, self.plain, self.attention = kernels, module, module.forward, attention
        self.H, self.D, self.F = q.in_features, attention.head_dim, mlp.gate_proj.out_features
        self.Q, self.A = q.out_features // self.D, k.out_features // self.D
        self.eps = first.variance_epsilon, 0.0 if q_norm is None else q_norm.variance_epsilon
        self.eps_second = second.variance_epsilon
        weights = (first.weight, q.weight, q.bias, q_norm, k.weight, k.bias, k_norm, v.weight, v.bias)
        self.before = [_address(w) for w in weights]
        inner = (attention.o_proj, second, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.after = [_address(m) for m in inner]
        self.agreed = _judged.get(module)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, cache, mask = hidden_states, kwargs.get("past_key_values"), kwargs.get("attention_mask")
        cos, sin = kwargs.get("position_embeddings") or (x, None)
        if (self.agreed is False or args or cache is None or sin is None or torch.is_grad_enabled()) or (
            x.dtype != torch.float32 or cos.dtype != torch.float32 or cos.shape[-1] != self.D
        ):
            return self.plain(x, *args, **kwargs)
        if self.agreed is None and x.shape[1] > 1 and not cache.get_seq_length(self.attention.layer_idx):
            self.judge(x, cos, sin, mask, kwargs)
        return self.step(x, cos, sin, cache, mask) if self.agreed else self.plain(x, **kwargs)

    def judge(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Take a prompt both ways, without its cache, and compare them position by position."""
        expected = self.plain(x, **{**kwargs, "past_key_values": None})
        found = self.step(x, cos, sin, None, mask)
        if expected.isfinite().all():
            off, change, size = (a.abs().amax(-1) for a in (found - expected, expected - x, x))  # (n, T)
            self.agreed = _judged[self.module] = bool((off <= AGREE * change + ROUNDING * size).all())

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """The layer's output (n, T, H) of x (n, T, H); cos, sin (n or 1, T, D). Without a cache, x is all there is."""
        (n, T, _), x = x.shape, x.contiguous()
        cos, sin = (a.expand(n, T, self.D).contiguous() for a in (cos, sin))
        h, y = torch.empty_like(x), torch.empty_like(x)
        q, (k, v) = x.new_empty(n, T, self.Q, self.D), x.new_empty(2, n, T, self.A, self.D)
        self.kernels.before_attention(
            x.data_ptr(), *self.before, *(a.data_ptr() for a in (cos, sin, h, q, k, v)),
            n * T, self.H, self.Q, self.A, self.D, *self.eps,
        )  # fmt: skip
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (n, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.attention.layer_idx)
        read, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self.attention, q, k, v, mask, scaling=self.attention.scaling)
        read = read.contiguous()
        gate, up = x.new_empty(2, n * T, self.F)
        self.kernels.after_attention(
            x.data_ptr(), read.data_ptr(), *self.after, *(a.data_ptr() for a in (h, gate, up, y)),
            n * T, self.H, self.Q * self.D, self.F, self.eps_second,
        )  # fmt: skip
        return y


def _fits(w: Tensor) -> bool:
    return type(w) is nn.Parameter and w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous()


def _address(part: Any) -> int | None:
    """Of a tensor, or of a module's weight; None for None."""
    return None if part is None else getattr(part, "weight", part).data_ptr()
