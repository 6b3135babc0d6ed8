"""The sampler of a soft model in vLLM: soft rows follow our rules, all others vLLM's sampler.

Rows of one `Settings` are drawn together. A row whose prompt is not yet read to its end draws nothing.

Shapes: n requests of a step, m soft rows of one settings, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from rl_soft.rollouts.state_machine import DONE
from rl_soft.rollouts.vllm.request import ENTROPY, FAILED, OUTSIDE, Settings, encode, record_width
from rl_soft.rollouts.vllm.state import SoftModelState
from rl_soft.thoughts.thinking import Thinking

COPIES = 5  # of the logits, in float32, that a draw holds (tests/invariants/test_fake_cuda.py)


class SoftSampler:
    """In the place of vLLM's sampler, which it keeps."""

    def __init__(self, sampler: Any, state: SoftModelState) -> None:
        self.sampler, self.state = sampler, state
        self.measured = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        state, n = self.state, input_batch.num_reqs
        slots = input_batch.idx_mapping_np.tolist()
        soft = [i for i in range(n) if slots[i] in state.requests]
        if not self.measured:  # vLLM's own first step, which tells it how much memory is left for the cache
            torch.empty(COPIES, *logits.shape, dtype=torch.float32, device=logits.device)
            self.measured = True
        if len(soft) < n:
            out = self.sampler(logits, input_batch)
            if not soft:
                return out
        else:
            out = self._empty(logits, input_batch)
        groups = self._groups(soft, slots, input_batch)
        record = out.logprobs_tensors
        width = max(record_width(state.slots), 0 if record is None else record.logprobs.shape[1])
        ids = out.sampled_token_ids.new_zeros(n, width)  # (n, W)
        values = logits.new_zeros(n, width, dtype=torch.float32)
        ranks = ids.new_zeros(n)
        if record is not None:
            ids[:, : record.logprobs.shape[1]] = record.logprob_token_ids
            values[:, : record.logprobs.shape[1]] = record.logprobs
            ranks = record.selected_token_ranks
        for settings, index in groups.items():
            at, row, t = torch.from_numpy(index).to(state.device, non_blocking=True).unbind()  # (m,)
            rows = logits if len(at) == n else logits[at]  # all of them stand in order
            thinks = bool((index[2] < settings.thinking.num_thoughts).any())
            reported, recorded, numbers = self._draw(settings, rows, at, row, t, thinks)
            ids[at, : recorded.shape[1]], values[at, : recorded.shape[1]] = recorded, numbers
            out.sampled_token_ids[at, 0] = reported.to(out.sampled_token_ids.dtype)
        refused = [i for i in soft if state.requests[slots[i]].refused]
        if refused:
            self._refuse(refused, slots, out, ids, values)
        out.logprobs_tensors = LogprobsTensors(ids.to(torch.int32), values, ranks)
        return out

    def _groups(self, soft: list[int], slots: list[int], input_batch: Any) -> dict[Settings, np.ndarray]:
        """Settings -> (3, m): place in the step, row, position of the rows that draw."""
        groups: dict[Settings, list[tuple[int, int, int]]] = {}
        length = input_batch.num_computed_tokens_np[: len(slots)] + input_batch.num_scheduled_tokens
        for i in soft:
            request = self.state.requests[slots[i]]
            if not request.refused and length[i] >= input_batch.prefill_len_np[i]:
                place = i, request.row, int(length[i]) - request.prompt_length
                groups.setdefault(request.settings, []).append(place)
        return {settings: np.array(rows, dtype=np.int64).T.copy() for settings, rows in groups.items()}

    def _draw(
        self, settings: Settings, logits: Tensor, at: Tensor, row: Tensor, t: Tensor, thinks: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ids that vLLM is told (m,), and the record (m, W); thinks: whether any of the rows may."""
        state, thinking, rules = self.state, settings.thinking, self.state.rules(settings)
        where = state.read_states(row, t)
        where.stage.masked_fill_(where.t != t, DONE)  # a state that is no longer kept: the row ends without an answer
        drawn = rules.draw(where, logits)
        stops = rules.advance(where, drawn)
        where.t.copy_(t + 1)
        state.write_states(row, t, where)
        if thinks:
            fed = self._fed(thinking, drawn, at) if thinking.kind.reads_hidden else None
            state.keep(row, t, thinking, drawn, fed)
        # An end id, whatever was drawn, tells vLLM that the row is done.
        reported = torch.where(~drawn.mask | drawn.bad, state.end_ids(settings)[0], drawn.completion_ids)
        return reported, *encode(drawn, reported, stops, state.vocab_size)

    def _refuse(self, index: list[int], slots: list[int], out: SamplerOutput, ids: Tensor, values: Tensor) -> None:
        """Rows that cannot be served end at once, and say that they failed."""
        V = self.state.vocab_size
        for i in index:
            end = self.state.end_ids(self.state.requests[slots[i]].settings)[0]
            entries = [end, 2 * V + FAILED, 2 * V + ENTROPY, 2 * V + OUTSIDE]
            out.sampled_token_ids[i, 0] = end
            ids[i, : len(entries)] = torch.tensor(entries)
            values[i] = 0.0

    def _fed(self, thinking: Thinking, drawn: Any, at: Tensor) -> Tensor:
        """(m, H): what is fed for thoughts that are made from hidden states."""
        model = self.state.model
        hidden = model.soft_hidden[at]
        if model.projector is None:
            return hidden
        mixture = None
        if thinking.kind.mixes:
            mixture = self.state.mix(drawn.support, drawn.log_weights.exp())
        return model.projector.to(hidden.device)(hidden, mixture)

    def _empty(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        """Of a step without ordinary rows."""
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=torch.zeros(input_batch.num_reqs, 1, dtype=torch.int64, device=logits.device),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
