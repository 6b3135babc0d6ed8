"""The model state of a soft model in vLLM: what rows have drawn, and what is fed for it.

Each soft request has a *row* of its own in the buffers here. It keeps the row when it is preempted, so that its
thoughts are mixed again at the second prefill; rows are given out again in the order in which they were left.

The CPU knows at which position each row stands (a step feeds and draws one position per row), so indices are made
there and the device is never waited for. What a row has drawn it does not know.

Shapes: R rows, S slots of a thought (the most that a request may ask for), N thoughts (likewise), n tokens of a step.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from rl_soft.rollouts.state_machine import COUNTERS, Position, Rules, State
from rl_soft.rollouts.vllm.options import check_limits, limits
from rl_soft.rollouts.vllm.request import Settings, from_arguments
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger(__name__)

# States that are kept of a row, by position: vLLM may draw again what was on its way when it preempted the row.
VERSIONS = 4


@dataclass
class Request:
    """A soft request, on the CPU."""

    row: int
    prompt_length: int
    settings: Settings
    seed: int
    refused: str | None = None  # why it cannot be served; it ends at once


class SoftModelState(DefaultModelState):
    """Mixtures in the place of embeddings."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        check_config(vllm_config)
        self.slots, self.thoughts = limits(vllm_config.additional_config)
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        R, N, S = 2 * self.max_num_reqs, self.thoughts, self.slots
        self.requests: dict[int, Request] = {}  # by vLLM's slot
        self.slot_of: dict[str, int] = {}  # by request id
        self.rows: OrderedDict[str, int] = (
            OrderedDict()
        )  # by request id: rows that are still its own, the oldest first
        self.free = list(range(R))
        self.left: OrderedDict[str, None] = (
            OrderedDict()
        )  # request ids that gave up their slot, the first to leave first
        self.states = torch.zeros(R * VERSIONS, len(COUNTERS), dtype=torch.int64, device=device)
        # The last position takes what is drawn behind the thoughts, and is never read.
        self.is_thought = torch.zeros(R, N + 1, dtype=torch.bool, device=device)
        self.support = torch.zeros(R, N + 1, S, dtype=torch.int32, device=device)
        self.weights = torch.zeros(R, N + 1, S, dtype=torch.float32, device=device)
        self.fed: Tensor | None = None  # (R, N, H), of kinds that read the hidden state

    # -- requests -----------------------------------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self.requests.pop(req_index, None)
        params, request_id = new_req_data.sampling_params, new_req_data.req_id
        asked = from_arguments(params.extra_args) if params is not None else None
        if asked is None:
            return
        settings, seed = asked
        start, prompt_length = len(new_req_data.prefill_token_ids), new_req_data.prompt_len
        request = Request(self._row(request_id), prompt_length, settings, seed, self._refusal(settings))
        if start > prompt_length and request_id not in self.left:
            request.refused = "it was preempted, and its place was given away"
        self.left.pop(request_id, None)
        self.requests[req_index], self.slot_of[request_id] = request, req_index
        if request.refused:
            logger.error("soft request %s: %s", request_id, request.refused)
        elif start == prompt_length:
            first = self.rules(settings).start() | {"seed": seed}
            at = request.row * VERSIONS
            self.states[at] = torch.tensor([first[name] for name in COUNTERS], dtype=torch.int64, device="cpu")
            self.is_thought[request.row] = False

    def remove_request(self, req_id: str) -> None:
        """Finished, aborted or preempted: which one is not told."""
        super().remove_request(req_id)
        slot = self.slot_of.pop(req_id, None)
        if slot is not None:
            self.requests.pop(slot, None)
            self.left[req_id] = None

    def _row(self, request_id: str) -> int:
        """Its own if it had one; else a free one, or that of the request that left first."""
        if request_id not in self.rows:
            if not self.free:
                gone, _ = self.left.popitem(last=False)
                self.free.append(self.rows.pop(gone))
            self.rows[request_id] = self.free.pop()
        return self.rows[request_id]

    def _refusal(self, settings: Settings) -> str | None:
        thinking = settings.thinking
        if thinking.kind.needs_projector and self.model.projector is None:
            return f"thought {thinking.thought} needs a model with a projector"
        if "vllm" not in thinking.engines:
            return f"switch {thinking.switch} is not available with engine vllm"
        try:
            check_limits(thinking, self.vocab_size, self.slots, self.thoughts)
            forced = self.rules(settings).forced_ids.tolist()
        except ValueError as error:
            return str(error)
        if not {*forced[0], *forced[1]}.isdisjoint(self.end_ids(settings)):
            return "answer_prompt or end_of_thinking holds an id that ends a completion"
        return None

    def end_ids(self, settings: Settings) -> tuple[int, ...]:
        """Ids that end a completion; vLLM is told the first where a row is done."""
        return settings.eos_ids or self._eos_ids()

    @lru_cache(maxsize=64)  # noqa: B019 (one state per engine); whoever asks a server makes settings
    def rules(self, settings: Settings) -> Rules:
        layout = Layout(settings.thinking, self._tokenizer())
        return Rules(layout, self.vocab_size, self.end_ids(settings), settings.greedy, self.device, settings.decoding)

    @lru_cache(maxsize=1)  # noqa: B019
    def _tokenizer(self) -> Any:
        from rl_soft.model.tokenizer import load_tokenizer

        config = self.model_config
        tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _eos_ids(self) -> tuple[int, ...]:
        ids = self.model_config.try_get_generation_config().get("eos_token_id", self._tokenizer().eos_token_id)
        return tuple(ids) if isinstance(ids, list) else (ids,)

    # -- what is fed --------------------------------------------------------------------------------------------------

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> Tensor:
        embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        at, row, t = self._thoughts_of(input_batch)
        if len(at):
            index = torch.from_numpy(np.stack([at, row, t])).to(self.device, non_blocking=True)  # (3, n)
            self.feed(embeds, *index.unbind())
        return embeds

    def _thoughts_of(self, input_batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the tokens of this step those that may be thoughts: place in the step, row, position in completion."""
        places, rows, positions = [], [], []
        starts = input_batch.query_start_loc_np
        computed, count = input_batch.num_computed_tokens_np, input_batch.num_scheduled_tokens
        for i, slot in enumerate(input_batch.idx_mapping_np.tolist()):
            request = self.requests.get(slot)
            if request is None or request.refused:
                continue
            first = int(computed[i]) - request.prompt_length  # position of the first token that is fed
            low, high = max(first, 0), min(first + int(count[i]), request.settings.thinking.num_thoughts)
            if low < high:
                t = np.arange(low, high)
                places.append(starts[i] + t - first)
                rows.append(np.full(high - low, request.row))
                positions.append(t)
        if not places:
            return (np.empty(0, dtype=np.int64),) * 3
        return tuple(np.concatenate(x).astype(np.int64) for x in (places, rows, positions))  # type: ignore[return-value]

    def feed(self, embeds: Tensor, at: Tensor, row: Tensor, t: Tensor) -> None:
        """Write into embeds (., H), at places (n,), the thoughts that rows (n,) have drawn at positions t (n,)."""
        support, weights = self.support[row, t].long(), self.weights[row, t]  # (n, S)
        mixture = self.mix(support, weights)  # (n, H)
        if self.fed is not None:
            kept = self.fed[row, t.clamp(max=self.fed.shape[1] - 1)]  # (n, H)
            mixture = torch.where(kept[:, :1].isnan(), mixture, kept)  # rows of other kinds have none
        embeds[at] = torch.where(self.is_thought[row, t][:, None], mixture.to(embeds.dtype), embeds[at])

    def mix(self, support: Tensor, weights: Tensor) -> Tensor:
        """(n, S) ids and weights, 0 at absent slots -> (n, H)."""
        embedded = self.model.embed_input_ids(support.flatten()).view(*support.shape, -1)  # (n, S, H)
        return torch.einsum("ns,nsh->nh", weights.to(embedded.dtype), embedded)

    # -- what was drawn -----------------------------------------------------------------------------------------------

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        from rl_soft.rollouts.vllm.sampler import SoftSampler

        return SoftSampler(sampler, self), None

    def read_states(self, row: Tensor, t: Tensor) -> State:
        """Of rows (m,) that are to draw position t (m,), as copies; one that is no longer kept has another `t`."""
        return State(*self.states[row * VERSIONS + t % VERSIONS].unbind(1))

    def write_states(self, row: Tensor, t: Tensor, state: State) -> None:
        """Of rows (m,) that have drawn position t (m,)."""
        self.states[row * VERSIONS + (t + 1) % VERSIONS] = torch.stack([getattr(state, n) for n in COUNTERS], dim=1)

    def keep(self, row: Tensor, t: Tensor, thinking: Thinking, drawn: Position, fed: Tensor | None) -> None:
        """What rows (m,) have drawn at positions t (m,), where it may be a thought; fed: (m, H), of kinds that read
        the hidden state."""
        K = drawn.support.shape[1]
        t = t.masked_fill(t >= thinking.num_thoughts, self.thoughts)
        self.is_thought[row, t] = drawn.thought_mask
        self.support[row, t, :K] = drawn.support.int()
        self.weights[row, t] = F.pad(drawn.log_weights.exp(), (0, self.slots - K))
        if fed is not None and (self.fed is None or self.fed.shape[1] <= thinking.num_thoughts):
            more = fed.new_full((len(self.states) // VERSIONS, thinking.num_thoughts + 1, fed.shape[-1]), torch.nan)
            if self.fed is not None:
                more[:, : self.fed.shape[1] - 1] = self.fed[:, :-1]
            self.fed = more
        if self.fed is not None:
            self.fed[row, t.clamp(max=self.fed.shape[1] - 1)] = torch.nan if fed is None else fed


def check_config(vllm_config: Any) -> None:
    """Raises ValueError for what soft rows cannot have."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("pipeline_parallel_size must be 1: what is drawn on the last stage is fed on the first")
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config must be absent: a draft is made of tokens, and thoughts are none")
    if vllm_config.model_config.is_hybrid or vllm_config.model_config.is_attention_free:
        raise ValueError(
            f"model {vllm_config.model_config.model} has layers without attention, which soft rows cannot have"
        )
    if not vllm_config.model_config.enable_prompt_embeds:
        raise ValueError("enable_prompt_embeds must be on: thoughts are fed as embeddings")
