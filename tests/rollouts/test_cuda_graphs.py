"""What a GPU asks of a rollout beyond a CPU: steps that can be replayed, rows that stay after they are done, memory.

pytest tests/rollouts/test_cuda_graphs.py
"""

import gc
import logging
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_engine import EXPLICIT, LATENT, arguments, assert_same, make
from test_hybrid import gated
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl_soft.model import head_triton as kernels
from rl_soft.rollouts import cache, cuda_graphs
from rl_soft.rollouts import engine as engine
from rl_soft.rollouts import state_machine as walk
from rl_soft.rollouts.cuda_graphs import LOOKS, Replay
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.layout import Layout


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Shapes in grains, columns as numbers on the device, looks and moves now and then; columns renumbered early."""
    for name, value in {"GRAIN": 4, "CHUNK": 16, "LOOK_EVERY": 5, "IDLE": 0.5, "ROW_SIZES": 4}.items():
        monkeypatch.setattr(engine, name, {"cpu": value})
    monkeypatch.setattr(cache, "RENUMBER", 4)
    monkeypatch.setattr(walk.sampling, "draw", lambda *args: None)
    monkeypatch.setattr(walk, "_log_outside", lambda p, phi, ids: phi.scatter_(-1, ids, -torch.inf).logsumexp(-1))


class Operations(TorchDispatchMode):
    """All operations of a step, each with the places and shapes of what it reads, and its numbers: what a graph keeps.

    A tensor made in the step is named by its turn, any other by its address.
    """

    def __init__(self):
        super().__init__()
        self.list: list[tuple] = []
        self.made: dict[int, int] = {}
        self.kept: list = []  # so that no storage is made in another's place

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = tree_leaves((args, kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:  # a number in the program
            self.list.append((str(func), args[0].item()))
            held = set()
        else:
            self.list.append((str(func), *map(self.describe, inputs)))
            held = {x.untyped_storage()._cdata for x in inputs if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (place := x.untyped_storage()._cdata) not in held:
                self.made.setdefault(place, len(self.made))
                self.kept.append(x)
        return out

    def describe(self, x):
        if not isinstance(x, torch.Tensor):
            return repr(x)
        storage = x.untyped_storage()
        place = self.made.get(storage._cdata, f"at {storage.data_ptr()}")
        return place, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


class Compared:
    """In the place of `Replay`: takes every step, and compares it with the one that a graph would replay."""

    def __init__(self, device):
        self.on, self.known, self.replayed = True, {}, 0

    def run(self, key, step, version):
        with Operations() as operations:
            step()
        known = self.known.setdefault((key, version), operations.list)
        for recorded, now in zip(known, operations.list, strict=True):
            assert recorded == now, key
        self.replayed += known is not operations.list

    def clear(self):
        self.known.clear()


@pytest.mark.parametrize("budget", [None, 80])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "hybrid"])
def test_what_a_step_does_depends_on_its_key_alone(kind, budget, as_on_a_gpu, monkeypatch):
    """Otherwise a graph would read and write places that are no longer the right ones."""
    if kind == "hybrid":
        made = gated()
        layout = Layout(replace(LATENT, thought="hybrid", num_thoughts=14), made.tokenizer)
    else:
        made, layout = make(kind, EXPLICIT)
    replays = []
    monkeypatch.setattr(engine, "Replay", lambda device: replays.append(Compared(device)) or replays[-1])
    rollout(*arguments(made, layout, samples=2), token_budget=budget)
    assert replays[0].replayed > 5


def test_rows_that_are_done_take_no_further_position(as_on_a_gpu, monkeypatch):
    """They stay in their places for a while, and a model with learned positions has none beyond its last."""
    made, layout = make("gpt2", EXPLICIT)
    given = arguments(made, layout)
    expected = rollout(*given)
    monkeypatch.setattr(engine, "LOOK_EVERY", {"cpu": 40})
    positions = made.model.transformer.wpe
    longest = max(len(p) + int(n) for p, n in zip(given[2], expected.lengths, strict=True))
    monkeypatch.setattr(positions, "weight", torch.nn.Parameter(positions.weight[:longest].detach()))
    assert_same(rollout(*given), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_that_runs_out_of_memory_while_it_samples_is_taken_again(kind, monkeypatch):
    """The rows that go on have fed their input, and feed it once more, at the same position."""
    monkeypatch.setattr(walk.sampling, "draw", lambda *args: None)
    made, layout = make(kind, EXPLICIT)
    given = arguments(made, layout)
    expected = rollout(*given)
    inner, calls = walk.gumbel, []

    def gumbel(*args):
        calls.append(1)
        if len(calls) in (1, 6, 13):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args)

    monkeypatch.setattr(walk, "gumbel", gumbel)
    assert_same(rollout(*given), expected)
    assert len(calls) > 13


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_counts_as_out_of_memory(text, memory):
    """Errors of libraries whose memory is not torch's; as they word them."""
    assert cache.is_out_of_memory(RuntimeError(text)) == memory


def test_the_cache_is_given_back_when_a_rollout_ends(monkeypatch):
    """And not when Python next looks for cycles: the training pass needs the memory at once."""
    made, layout = make("qwen2", EXPLICIT)
    layers: list[weakref.ref] = []
    inner = cache.RowLayer.__init__
    monkeypatch.setattr(
        cache.RowLayer, "__init__", lambda self, *args: inner(self, *args) or layers.append(weakref.ref(self))
    )
    gc.collect()
    gc.disable()
    try:
        rollout(*arguments(made, layout))
        assert layers and all(layer() is None for layer in layers)
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# `Replay`, with a stand-in for CUDA


@pytest.fixture
def cuda(monkeypatch):
    """What was asked of CUDA; `fails` is what recording raises."""

    class Fake:
        said: list[str] = []  # noqa: RUF012
        mode, stream, fails = 0, "default", None

        @contextmanager
        def graph(self, graph, pool, capture_error_mode):
            self.stream = "recording"
            self.said.append(f"recorded, {capture_error_mode}")
            yield
            if self.fails is not None:
                raise self.fails
            self.stream = "default"

        def CUDAGraph(self):
            return self

        def replay(self):
            self.said.append("replayed")

        def set_mode(self, mode):
            self.mode = mode

        def set_stream(self, stream):
            self.stream = stream

    fake = Fake()
    fake.said = []
    for name, value in {
        "CUDAGraph": fake.CUDAGraph, "graph": fake.graph, "synchronize": int,
        "MemPool": lambda: SimpleNamespace(id=(0, 1)),
        "get_sync_debug_mode": lambda: fake.mode, "set_sync_debug_mode": fake.set_mode,
        "current_stream": lambda: fake.stream, "set_stream": fake.set_stream,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_a_step_that_makes_the_cpu_wait_is_never_recorded(cuda, caplog):
    replay, taken = Replay(torch.device("cuda")), []

    def step():
        taken.append(1)
        if cuda.mode == "warn":  # what torch does then
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(LOOKS + 2):
            replay.run("key", step)
    assert len(taken) == LOOKS + 2 and not cuda.said and not replay.on and cuda.mode == 0
    assert "it makes the CPU wait, at " in caplog.text


def test_what_only_the_first_step_waits_for_does_no_harm(cuda):
    replay, taken = Replay(torch.device("cuda")), []

    def step():
        taken.append(1)
        if len(taken) == 1:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    with pytest.warns(UserWarning, match="something else") as shown:
        for _ in range(4):
            replay.run("key", step)
    assert len(shown) == 1 and cuda.said == ["recorded, thread_local", "replayed", "replayed"]


def test_nothing_is_recorded_on_another_device_than_the_current_one(cuda, monkeypatch):
    """torch would record the current device's idle stream, and replay nothing."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert Replay(torch.device("cuda:1")).on and not Replay(torch.device("cuda:0")).on


def test_graphs_of_old_addresses_are_dropped_and_the_memory_is_kept(cuda):
    """Shapes that were met before are recorded at once; the pool outlives the rollout."""
    before, first = cuda_graphs.recorded, Replay(torch.device("cuda"))
    for version in (1, 1, 1, 2, 2):
        first.run("key", int, version)
    assert (
        cuda.said == ["recorded, thread_local", "replayed", "replayed"] + ["recorded, thread_local"] + ["replayed"] * 2
    )
    assert cuda_graphs.recorded == before + 2 and len(first._graphs) == 1
    pool = cuda_graphs._pools[0]
    second = Replay(torch.device("cuda"))
    for _ in range(2):
        second.run("key", int, 1)
    assert cuda_graphs._pools[0] is pool
    second.clear()
    assert not cuda_graphs._pools


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out"), RuntimeError("not permitted")])
def test_a_recording_that_fails_leaves_the_stream_as_it_was(cuda, error):
    replay = Replay(torch.device("cuda"))
    replay.run("key", int)
    cuda.fails = error
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            replay.run("key", int)
        assert replay.on
    else:
        replay.run("key", int)
        assert not replay.on
    assert cuda.stream == "default"


def test_without_a_compiler_the_head_does_without_its_kernels(monkeypatch, caplog):
    """Triton compiles its launcher on the machine; the passes in torch give the same numbers."""
    asked = []

    def no_compiler():
        asked.append(1)
        raise RuntimeError("Failed to find C compiler")

    for start, usable in ((no_compiler, False), (object, True)):
        driver = SimpleNamespace(active=SimpleNamespace(get_current_target=start))
        monkeypatch.setattr(kernels, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        kernels._starts.cache_clear()
        for logits, on_a_gpu in ((SimpleNamespace(is_cuda=True), True), (SimpleNamespace(is_cuda=False), False)):
            assert kernels.usable(logits) == kernels.usable(logits) == (usable and on_a_gpu)
    kernels._starts.cache_clear()
    assert len(asked) == 1 and caplog.text.count("Triton does not start (Failed to find C compiler)") == 1
