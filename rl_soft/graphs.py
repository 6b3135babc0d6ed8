"""A step of fixed shapes, recorded once as a CUDA graph and replayed: its few thousand kernels then cost one launch.

Not run on a GPU yet. The step that is recorded is the very one that runs without graphs, on tensors that stay where
they are; on a CPU it is only ever called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class Replay:
    """Runs a step; on a GPU, from the second time that a key is met, as a graph.

    Args:
        device: of the step's tensors; anything but CUDA switches graphs off.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self._graphs: dict[Hashable, Any] = {}  # None: met once, and run as it is, which warms it up
        self._pool: Any = None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run `step` once.

        Args:
            key: of all that the step depends on besides the contents of its tensors: shapes and addresses.
            step: reads and writes tensors in place; no host synchronisation, nothing else that it changes.
        """
        graph = None
        if self.on and key in self._graphs:
            graph = self._graphs[key] or self._record(key, step)
        elif self.on:
            self._graphs[key] = None
        if graph is None:
            step()
        else:
            graph.replay()

    def _record(self, key: Hashable, step: Callable[[], None]) -> Any:
        """The graph of a step, which recording does not run; None, and none from then on, where it cannot be had."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        except torch.OutOfMemoryError:
            self.clear()
            raise
        except RuntimeError as error:
            logger.info("rollout: the decode step runs without a CUDA graph (%s)", str(error).splitlines()[0])
            self.on = False
            self.clear()
            return None
        self._graphs[key] = graph
        return graph

    def clear(self) -> None:
        """Forget all graphs, and give back their memory."""
        self._graphs.clear()
        self._pool = None
