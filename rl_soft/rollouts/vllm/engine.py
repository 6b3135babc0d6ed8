"""A rollout by an engine of vLLM in this process: the same records as `rollouts.engine.rollout` makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rl_soft.rollouts.recording import Rollout, Walk
from rl_soft.rollouts.vllm import request
from rl_soft.rollouts.vllm.options import check_length, check_limits, limits
from rl_soft.rollouts.vllm.request import Recorded, decode, record_width, to_arguments
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout


def rollout(
    llm: Any,
    layout: Layout,
    prompt_ids: Sequence[Sequence[int]],
    seeds: Tensor | None,
    eos_ids: Sequence[int],
    decoding: Decoding | None = None,
    device: torch.device | str = "cpu",
) -> Rollout:
    """One completion for each prompt.

    Args:
        llm: a `vllm.LLM` made with `options.engine_options`.
        layout, prompt_ids, seeds, eos_ids, decoding: as in `rollouts.engine.rollout`.
        device: where the records are to be.

    Raises:
        ValueError: the engine's context is too short; thoughts that it was not made for.
    """
    T, longest = layout.max_completion_length, max(map(len, prompt_ids))
    check_length(llm.llm_engine.model_config.max_model_len, longest, T)
    V = llm.llm_engine.model_config.get_vocab_size()
    check_limits(layout.thinking, V, *limits(llm.llm_engine.vllm_config.additional_config))
    params = [
        sampling_params(layout, V, eos_ids, decoding, seed)
        for seed in (seeds.tolist() if seeds is not None else [None] * len(prompt_ids))
    ]
    prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    rows = [list(positions_of(output.outputs[0].logprobs, V)) for output in outputs]
    return assemble(layout, V, prompt_ids, seeds, eos_ids, rows, torch.device(device))


def sampling_params(
    layout: Layout, vocab_size: int, eos_ids: Sequence[int], decoding: Decoding | None, seed: int | None
) -> Any:
    """What vLLM is asked for a row."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=layout.max_completion_length + 1,  # one more than it takes, to say that it is done
        ignore_eos=True,
        stop_token_ids=list(eos_ids),
        detokenize=False,
        logprobs=record_width(layout.thinking.support_size(vocab_size)) - 1,
        flat_logprobs=True,
        extra_args=to_arguments(layout.thinking, decoding, eos_ids, seed),
    )


def positions_of(flat: Any, vocab_size: int) -> Iterable[Recorded]:
    """The positions of a row from the flat logprobs of its completion."""
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        yield decode(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True), vocab_size)


def assemble(
    layout: Layout,
    vocab_size: int,
    prompt_ids: Sequence[Sequence[int]],
    seeds: Tensor | None,
    eos_ids: Sequence[int],
    rows: Sequence[Sequence[Recorded]],
    device: torch.device,
) -> Rollout:
    """The records of a rollout from the positions of its rows, those behind the end left out."""
    cpu = torch.device("cpu")
    walk = Walk(layout, vocab_size, len(rows), None if seeds is None else seeds.to(cpu), eos_ids, cpu)
    out, latent = walk.out, layout.thinking.phase == "latent"
    for i, row in enumerate(rows):
        for t, p in enumerate(row[: walk.T]):
            if p.code == request.DONE:
                break
            out.mask[i, t] = True
            out.failed[i] |= p.code == request.FAILED
            if p.code == request.FAILED:
                break
            thought = p.code in (request.THOUGHT, request.LAST_THOUGHT)
            n = len(p.ids)
            out.completion_ids[i, t] = layout.bot_id if thought and latent else p.ids[0]
            out.action_mask[i, t], out.thought_mask[i, t] = p.code != request.FED, thought
            out.support[i, t, :n] = torch.tensor(p.ids)
            out.log_weights[i, t, :n] = torch.tensor(p.log_weights)
            out.support_log_probs[i, t, :n] = torch.tensor(p.log_probs)
            out.log_probs[i, t], out.entropy[i, t], out.outside[i, t] = p.log_prob, p.entropy, p.outside
            out.finished[i] |= p.code in (request.LAST_TOKEN, request.LAST_THOUGHT)
    return walk.result([list(ids) for ids in prompt_ids]).to(device)
