"""The key-value cache of a rollout: preallocated, written in place, for rows that come and go.

Rows are aligned at their newest input. What is fed at one step goes to one common *column*, `end`, whatever the row's
length is, so a step is one strided write per layer, and a row that enters has its prompt put just left of `end`:

    columns     0 1 2 3 4 5 6 7 8      row 0: a prompt of 4, three inputs since
    row 0       . . p p p p x x x      row 1: entered one step ago with a prompt of 2
    row 1       . . . . . . p p x      end = 9: where the next step writes; start = 2: the oldest column in use

Distances between columns are distances between positions, so causal and sliding-window masks need no change; positions
themselves are given to the model by the caller. A layer that slides keeps its window alone. Buffers grow by whole
chunks, one layer after the other, and drop on the way what no row needs any more.

Shapes: S places of which the first n are taken, A key-value heads, C columns of a buffer, D head size.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

LARGE_PAGE = 2**21  # bytes
RENUMBER = 1024  # columns; masks stay short


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, two buffers (S, A, C, D); column c of the cache is column c - base of them.

    Args:
        cache: the cache that the layer belongs to.
        window: sliding window, None where the layer sees everything.
    """

    def __init__(self, cache: RowCache, window: int | None) -> None:
        super().__init__()
        # Not a reference: the two would form a cycle, and the keys stay on the device until Python looks for such.
        self.cache: RowCache = weakref.proxy(cache)
        self.window, self.base = window, 0
        self.is_sliding = window is not None
        self.is_compileable = cache.grain > 1  # then transformers makes the mask without looking at its values

    def span(self) -> tuple[int, int]:
        """First and one past the last column that the step at `end` sees, rounded outwards to whole grains."""
        c = self.cache
        first = c.start if self.window is None else max(c.start, c.end - self.window + 1)
        return first // c.grain * c.grain, -(-(c.end + 1) // c.grain) * c.grain

    def reserve(self, prompts: Any = None) -> None:
        """Room for the step at `end` and what is seen from there; the first buffers take after a layer of prompts."""
        lo, hi = self.span()
        held = self.keys
        if held is not None and lo >= self.base and hi <= self.base + held.shape[2] and len(held) >= self.cache.places:
            return
        chunk = max(self.cache.grain, min(self.cache.chunk, self.cache.last + 1 - hi))
        columns = hi - lo + chunk
        old: Any = self if self.keys is not None else prompts
        keys, values = self._grown(old.keys, columns, lo), self._grown(old.values, columns, lo)
        self.keys, self.values, self.base = keys, values, lo  # all or nothing, where memory runs out
        self.is_initialized = True
        self.cache.version += 1

    def _grown(self, old: Tensor, columns: int, base: int) -> Tensor:
        """A buffer (S, A, columns, D) from column `base` on, with what `old` holds of the rows."""
        new = old.new_empty(self.cache.places, old.shape[1], columns, old.shape[3])
        _in_large_pages(new)
        first, end, n = max(base, self.base), self.cache.end, self.cache.n
        if self.keys is not None and n and end > first:
            new[:n, :, first - base : end - base] = old[:n, :, first - self.base : end - self.base]
        # What is seen and masked must be finite, since 0 times it must be 0: older columns of these rows, and, where
        # spans are rounded outwards, later ones of all. What a place has left of its prompt is cleared in `place`.
        new[:n, :, : max(0, first - base)].zero_()
        if self.cache.grain > 1:
            new[:, :, max(0, end - base) :].zero_()
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one step's (n, A, 1, D) keys and values; returns views (n, A, columns seen, D)."""
        assert self.keys is not None and self.values is not None and key_states.shape[2] == 1
        c = self.cache
        lo, hi = (column - self.base for column in self.span())
        at = c.column(self.base) if c.grain > 1 else None  # a number on the device, so that the step can be replayed
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if at is None:
                buffer[: c.n, :, c.end - self.base] = new[:, :, 0]
            else:
                buffer[: c.n].index_copy_(2, at, new)
        return self.keys[: c.n, :, lo:hi], self.values[: c.n, :, lo:hi]

    def place(self, first: int, keys: Tensor, values: Tensor, which: Sequence[int]) -> None:
        """Put prompts (U, A, P, D), right-aligned, just left of `end`; which (m,) is the prompt of each place."""
        assert self.keys is not None and self.values is not None
        at = self.cache.end - self.base
        for buffer, new in ((self.keys, keys), (self.values, values)):
            P = min(new.shape[2], at)
            buffer[first : first + len(which), :, : at - P].zero_()  # whoever was here before may have left a NaN
            place = first
            for prompt, rows in itertools.groupby(which):  # equal prompts are side by side: one copy for all of them
                m = len(list(rows))
                buffer[place : place + m, :, at - P : at] = new[prompt, :, new.shape[2] - P :]
                place += m

    def move(self, to: Tensor, place: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        lo, end = max(self.span()[0] - self.base, 0), self.cache.end - self.base
        for buffer in (self.keys, self.values):
            buffer[to, :, lo:end] = buffer[place, :, lo:end]

    def get_seq_length(self) -> Any:
        return self.cache.end if self.cache.grain == 1 else self.cache.at[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        lo, hi = self.span()
        return hi - lo, lo

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a rollout's cache is filled by `RowCache.enter`")


class RowCache(Cache):
    """The layers, and the columns that they share.

    Args:
        windows: sliding window of each layer, None for full attention; see `models.attention_windows`.
        places: S, rows at a time.
        grain: shapes are rounded up to so many columns; 1 is exact. Above 1 the CPU reads no number at a step.
        chunk: columns that a buffer grows by.
        renumber: columns that no row needs any more, after which the columns are numbered anew; None: RENUMBER. 1
            keeps the mask as wide as what is seen, for models that make their positions of the mask (ALiBi).
    """

    layers: Any

    def __init__(
        self,
        windows: Sequence[int | None],
        places: int,
        grain: int,
        chunk: int,
        device: Any,
        renumber: int | None = None,
    ) -> None:
        self.renumber = RENUMBER if renumber is None else renumber
        self.grain, self.chunk, self.places = grain, chunk, places
        self.n = self.start = self.end = self.last = self.version = 0
        self._columns: dict[int, Tensor] = {}
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # `end`, on the device
        self.first = torch.zeros(places, dtype=torch.int64, device=device)  # (S,) the column of each row's first input
        super().__init__(layers=[RowLayer(self, window) for window in windows])

    def column(self, base: int) -> Tensor:
        """(1,) int64 on the device, where this step writes in buffers that start at `base`; made once per step."""
        if base not in self._columns:
            self._columns[base] = self.at - base if base else self.at
        return self._columns[base]

    def attention_mask(self) -> Tensor:
        """(n, columns up to the last one seen) bool, True from each row's first input on."""
        self._columns = {}
        hi = -(-(self.end + 1) // self.grain) * self.grain
        return torch.arange(hi, device=self.first.device) >= self.first[: self.n, None]

    def whole_mask(self) -> Tensor:
        """(n, 1, 1, columns seen) bool, as attention takes it, where all layers see the same columns."""
        self._columns = {}
        lo, hi = self.layers[0].span()
        columns = torch.arange(lo, hi, device=self.first.device)
        return ((columns >= self.first[: self.n, None]) & (columns <= self.at))[:, None, None]

    def reserve(self) -> None:
        """Room for the next step, in all layers."""
        for layer in self.layers:
            layer.reserve()

    def shapes(self) -> tuple[Any, ...]:
        """What a recorded step depends on besides the buffers (`version`): rows, columns seen."""
        return (self.n, frozenset(layer.span() for layer in self.layers))

    def enter(self, prompts: Any, which: Sequence[int], lengths: Tensor, longest: int, steps: int) -> None:
        """Rows n .. n + m - 1 start from prefilled prompts.

        Args:
            prompts: of U prompts, padded on the left.
            which: (m,) numbers, the prompt of each new row.
            lengths: (m,) int64, of their prompts; `longest` is the largest.
            steps: the most inputs that a row is fed.
        """
        m = len(which)
        if not self.n:
            self.start = self.end = max(self.end, longest)
        self.start, self.last = min(self.start, self.end - longest), self.end + steps
        if self.start < 0:
            self._shift(self.start // self.grain * self.grain)
        self._shorten()
        places = slice(self.n, self.n + m)
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            layer.reserve(prompt)
            layer.place(self.n, prompt.keys, prompt.values, which)
        self.first[places] = self.end - lengths
        self.at.fill_(self.end)
        self.n += m

    def _shorten(self) -> None:
        """Drop the columns that no row needs any more, where they are many."""
        unused = self.start // self.grain * self.grain
        if unused >= self.renumber:
            self._shift(unused)

    def _shift(self, columns: int) -> None:
        """Number the columns from `columns` on; the same numbers now mean other places in the buffers."""
        self.version += 1
        self.start, self.end, self.last = self.start - columns, self.end - columns, self.last - columns
        self.first -= columns
        for layer in self.layers:
            layer.base -= columns

    def leave(self, to: Tensor, place: Tensor, n: int) -> None:
        """Rows `place` move to `to`; the first n stay."""
        if len(to):
            self.first[to] = self.first[place]
            for layer in self.layers:
                layer.move(to, place)
        self.n = n
        self.start = int(self.first[:n].min()) if n else self.end
        if n and self.renumber == 1:
            self._shorten()
            self.at.fill_(self.end)

    def shrink(self, places: int, n: int) -> None:
        """Give back the memory of all places but the first ones, layer by layer; n of them stay taken."""
        self.places, self.n = places, n
        self.version += 1
        for layer in self.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys[:places].clone(), layer.values[:places].clone()


def _in_large_pages(buffer: Tensor) -> None:
    """Ask Linux for pages of 2 MiB: the first touch of each page is what filling a new buffer takes on a CPU."""
    if buffer.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    first, end = -(-first // LARGE_PAGE) * LARGE_PAGE, end // LARGE_PAGE * LARGE_PAGE
    if end > first:  # where it is refused, nothing is lost
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_HUGEPAGE)


def bytes_per_token(prompts: Any) -> int:
    """Bytes of keys and values that one position of one row takes, over all layers."""
    total = 0
    for layer in prompts.layers:
        for x in (layer.keys, layer.values):
            total += x.shape[1] * x.shape[3] * x.element_size()
    return total


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be had on the device now; None where nobody says."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# What errors say that are no OutOfMemoryError: of a CPU, of cuBLAS and cuDNN, whose handles and workspaces are not
# torch's, and of the driver, whose line NCCL passes on.
NO_MEMORY = ("DefaultCPUAllocator", "_STATUS_ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)
