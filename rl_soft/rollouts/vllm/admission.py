"""vLLM asks this class whether a request may enter; in the process that answers users, before a worker sees it."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from rl_soft.rollouts.vllm.request import from_arguments


class Admission(LogitsProcessor):
    """Changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        soft = from_arguments(sampling_params.extra_args)
        if soft is not None and sampling_params.logprobs is not None:
            # The ids of a record are above the vocabulary; vLLM would spell each of them for its logprobs.
            sampling_params.detokenize = False

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        return logits
