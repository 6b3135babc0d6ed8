"""A step of fixed shapes, recorded once as a CUDA graph and replayed: its few thousand kernels then cost one launch.

Not run on a GPU yet. The step that is recorded is the very one that runs without graphs, on tensors that stay where
they are; on a CPU it is only ever called.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)

recorded = 0  # graphs, in the life of this process
_pools: dict[int, Any] = {}  # of memory for graphs, by device; kept for the next rollout
LOOKS = 3  # steps that may make the CPU wait; the first may have to, for what is made once and kept


class Replay:
    """Runs a step; on a GPU, from the second time that a key is met, as a graph.

    A recording that fails halfway leaves streams and allocator in a bad state, so a step is not recorded on trial: it
    runs under torch's watch for synchronisations first, and those are what a recording fails at.

    Args:
        device: of the step's tensors; anything but the current CUDA device, which is where torch records, switches
            graphs off.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda" and (device.index is None or device.index == torch.cuda.current_device())
        self._device = device.index or 0
        self._warm: set[Hashable] = set()  # shapes that were met and run as they are
        self._graphs: dict[Hashable, Any] = {}
        self._version = 0
        self._looks = 0

    def run(self, key: Hashable, step: Callable[[], None], version: int = 0) -> None:
        """Run `step` once.

        Args:
            key: of all shapes that the step depends on.
            step: reads and writes tensors in place; the CPU never waits, nothing else that it changes.
            version: of the addresses of its tensors; graphs of another one are of no use any more.
        """
        if version != self._version:
            self._graphs.clear()
            self._version = version
        graph = None
        if self.on and key in self._warm:
            graph = self._graphs.get(key) or self._record(key, step)
        if graph is not None:
            graph.replay()
        elif self.on:
            self._watch(key, step)
        else:
            step()

    def _watch(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step as it is; it may be recorded the next time, if the CPU did not have to wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        looks = [w for w in caught if "synchroniz" in str(w.message)]
        for warning in caught:
            if warning not in looks:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if any("called a synchronizing" in str(w.message) for w in looks):
            self._looks += 1
            if self._looks == LOOKS:
                self._stop(f"it makes the CPU wait, at {looks[-1].filename}:{looks[-1].lineno}")
        else:
            self._warm.add(key)

    def _record(self, key: Hashable, step: Callable[[], None]) -> Any:
        """The graph of a step, which recording does not run; None, and none from then on, where it cannot be had."""
        global recorded
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.cuda.synchronize()
        try:
            if self._device not in _pools:
                _pools[self._device] = torch.cuda.MemPool()
            # thread_local: other threads (NCCL's watchdog, a data loader's) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=_pools[self._device].id, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            self.clear()
            raise
        except RuntimeError as error:
            self._stop(str(error).splitlines()[0])
            return None
        finally:
            torch.cuda.set_stream(stream)  # a recording that failed leaves its own one current
        self._graphs[key] = graph
        recorded += 1
        return graph

    def _stop(self, reason: str) -> None:
        logger.info("rollout: the decode step runs without a CUDA graph (%s)", reason)
        self.on = False
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and give back their memory."""
        self._graphs.clear()
        _pools.pop(self._device, None)
