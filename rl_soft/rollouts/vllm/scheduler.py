"""vLLM's scheduler with one difference: a block of the cache that holds thoughts has a hash of its own.

Prefix caching finds blocks by the hash of their token ids. Those of the prompt are shared as ever. Behind the prompt a
soft row's ids do not tell what was fed, so its hashes take a random salt: no other row finds these blocks, and the row
itself does, after it was preempted.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from rl_soft.rollouts.vllm.request import from_arguments


class SaltedBlocks:
    """Before a scheduler of vLLM's."""

    def add_request(self, request: Any) -> None:
        params, inner = request.sampling_params, request._block_hasher
        if inner is not None and params is not None and from_arguments(params.extra_args):
            salt = os.urandom(16)
            # Full blocks of the prompt have their hashes already.
            request._block_hasher = lambda r: [hashlib.sha256(salt + h).digest() for h in inner(r)]
        super().add_request(request)  # type: ignore[misc]


class SoftScheduler(SaltedBlocks, Scheduler):
    pass


class SoftAsyncScheduler(SaltedBlocks, AsyncScheduler):
    pass


def soft_scheduler(vllm_config: Any, **arguments: Any) -> Scheduler:
    """The scheduler that vLLM would have made."""
    cls = SoftAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SoftScheduler
    return cls(vllm_config=vllm_config, **arguments)
