"""Soft rows in the life of an engine: places, chunks, preemption, cached prefixes, abort, and ordinary requests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from soft_models import EOS, EXPLICIT, LATENT, Job, assert_same, state_of, together
from torch.utils._python_dispatch import TorchDispatchMode

from rl_soft.rollouts.vllm import engine as soft_vllm

LONG = "12+34=?abcdefgh" * 4  # 60 ids
DRAWS, FEEDS = 225, 8  # operations of a step: docs/vllm.md, "What soft rows cost"
# Thoughts of one strongest id and many weights: what a hash of ids could mistake.
SHARP = replace(EXPLICIT, num_thoughts=12, thought_temperature=0.3, thought_tau=1.0)


def assert_all_same(llm, jobs):
    for job, theirs in zip(jobs, together(llm, jobs), strict=True):
        assert_same(theirs, job.ours())


def test_ordinary_requests_beside_soft_ones(engines):
    from vllm import SamplingParams

    made, llm = engines("llama")
    V = llm.llm_engine.model_config.get_vocab_size()
    plain = [{"prompt_token_ids": ids} for ids in ([5, 6, 7], [9, 8, 7, 6, 5])]
    wishes = [
        SamplingParams(temperature=0, max_tokens=6, logprobs=2, detokenize=False),
        SamplingParams(temperature=1, seed=3, max_tokens=4, detokenize=False),
    ]
    alone = [o.outputs[0] for o in llm.generate(plain, wishes, use_tqdm=False)]
    job = Job(made, LATENT)
    prompts, params = job.requests(V)
    outputs = llm.generate([plain[0], *prompts, plain[1]], [wishes[0], *params, wishes[1]], use_tqdm=False)
    for before, after in zip(alone, (outputs[0].outputs[0], outputs[-1].outputs[0]), strict=True):
        assert list(before.token_ids) == list(after.token_ids)
        assert (before.logprobs is None) == (after.logprobs is None)
    for before, after in zip(alone[0].logprobs, outputs[0].outputs[0].logprobs, strict=True):
        assert before.keys() == after.keys()
        assert all(abs(before[i].logprob - after[i].logprob) < 1e-4 for i in before)
    assert_same(job.assemble(outputs[1:-1], V), job.ours())


def test_places_are_used_again_and_prompts_are_read_in_chunks(engines):
    """14 rows through 4 places; prompts of up to 60 ids in chunks of at most 16."""
    made, llm = engines("llama", max_num_seqs=4, max_num_batched_tokens=16)
    jobs = [Job(made, t, questions=["1+1=?", LONG]) for t in (LATENT, EXPLICIT)]
    jobs += [Job(made, replace(LATENT, thought="dirichlet"), questions=[LONG], samples=3)]
    jobs += [Job(made, replace(LATENT, thought="token"), questions=["7"], samples=3)]
    assert_all_same(llm, jobs)
    assert len(state_of(llm).requests) <= 4


def test_blocks_of_thoughts_are_never_taken_for_others(engines):
    """A group shares the blocks of its prompt; of what is behind the prompt, none."""
    made, llm = engines("llama", block_size=32, max_num_seqs=4)
    jobs = [
        Job(made, SHARP, samples=6, questions=[LONG]),
        Job(made, replace(SHARP, thought="token"), questions=[LONG]),
    ]
    for _ in range(2):  # the second time, all blocks of the first are in the cache
        assert_all_same(llm, jobs)
    V = llm.llm_engine.model_config.get_vocab_size()
    prompts, params = jobs[0].requests(V)
    first, *others = llm.generate(prompts, params, use_tqdm=False)
    assert {o.num_cached_tokens for o in (first, *others)} == {len(prompts[0]["prompt_token_ids"]) // 32 * 32}
    # The completion of a row as a prompt: its ids are known, and the blocks that hold thoughts are not found.
    ids = [*prompts[0]["prompt_token_ids"], *first.outputs[0].token_ids]
    again = llm.generate([{"prompt_token_ids": ids}], params[:1], use_tqdm=False)[0]
    assert again.num_cached_tokens <= len(prompts[0]["prompt_token_ids"])


def test_preempted_rows_become_the_same(engines):
    """A cache of few blocks: rows are thrown out and read again, thoughts and all."""
    made, llm = engines(
        "llama", block_size=32, num_gpu_blocks_override=10, max_num_seqs=4, enable_prefix_caching=False
    )
    scheduler, preempted = llm.llm_engine.engine_core.engine_core.scheduler, []
    inner = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (
        preempted.append(request.num_output_tokens), inner(request, *args, **kwargs)
    )[1]  # fmt: skip
    jobs = [
        Job(made, SHARP, samples=3, questions=[LONG[:57]]),
        Job(made, replace(LATENT, num_thoughts=12, max_answer_tokens=12), samples=3, questions=[LONG[:57]]),
    ]
    assert_all_same(llm, jobs)
    assert preempted and max(preempted) > 4, preempted


def test_an_abort_leaves_the_others_alone(engines):
    made, llm = engines("llama", max_num_seqs=4)
    V = llm.llm_engine.model_config.get_vocab_size()
    job = Job(made, LATENT, samples=4, questions=["1+1=?"])
    prompts, params = job.requests(V)
    engine = llm.llm_engine
    for i, (prompt, wish) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(f"row{i}", prompt, wish)
    done, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        steps += 1
        if steps == 3:
            engine.abort_request(["row1"])
    assert sorted(done) == ["row0", "row2", "row3"]
    ours = job.ours()
    rows = [0, 2, 3]
    kept = Job(made, LATENT, samples=3, questions=["1+1=?"])
    kept.seeds = job.seeds[rows]
    theirs = kept.assemble([done[f"row{i}"] for i in rows], V)
    assert torch.equal(theirs.completion_ids, ours.completion_ids[rows][:, : theirs.completion_ids.shape[1]])
    assert_all_same(llm, [job])  # and the place is used again


@pytest.mark.parametrize("thinking, words", [
    (replace(EXPLICIT, num_thoughts=13), "num_thoughts 13 is above the 12"),
    (replace(LATENT, thought="hybrid"), "needs a model with a projector"),
    (replace(EXPLICIT, switch="gate"), "switch gate is not available with engine vllm"),
])  # fmt: skip
def test_what_an_engine_was_not_made_for_ends_at_once(engines, caplog, thinking, words):
    made, llm = engines("llama")
    bad, good = Job(made, thinking), Job(made, LATENT)
    refused, served = together(llm, [bad, good])
    assert refused.failed.all() and not refused.action_mask.any()
    assert_same(served, good.ours())
    assert words in caplog.text


def test_admission(engines):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    _, llm = engines("llama")
    for arguments, words in [
        ({"thought": "gumbel", "thougt_k": 3}, "did you mean thought_k"),
        ({"thought": "gumbel", "thought_tau": 0}, "thought_tau"),
        ({"thought": "gumble"}, "thought"),
        ({"thought": "gumbel", "seed": 1.5}, "seed"),
    ]:
        with pytest.raises(VLLMValidationError, match=words):
            llm.generate([{"prompt_token_ids": [5]}], SamplingParams(extra_args=arguments), use_tqdm=False)


def test_no_sync_in_a_step(engines, monkeypatch):
    """The step looks at no number of a tensor, where it is taken as on a GPU."""
    from rl_soft.rollouts import state_machine
    from rl_soft.rollouts.vllm import sampler as ours

    made, llm = engines("llama")
    looks = []
    inner = ours.SoftSampler.__call__

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__,
                        torch.Tensor.nonzero, torch.Tensor.cpu, torch.Tensor.numpy):  # fmt: skip
                looks.append(func)
            return func(*args, **(kwargs or {}))

    def watched(self, logits, input_batch):
        with Watched():
            return inner(self, logits, input_batch)

    job = Job(made, LATENT)
    together(llm, [job])  # rules are made at the first request
    monkeypatch.setattr(ours.SoftSampler, "__call__", watched)
    monkeypatch.setattr(state_machine.sampling, "draw", lambda *args: None)
    monkeypatch.setattr(
        state_machine, "_log_outside", lambda p, phi, ids: phi.scatter_(-1, ids, -torch.inf).logsumexp(-1)
    )
    together(llm, [job])
    assert not looks, looks


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch: operations that are neither views nor memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        self.count += not (func.is_view or "empty" in name or name in ("set_", "detach", "lift_fresh"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("thought", ["gumbel", "token"])
def test_operations_of_a_step(engines, monkeypatch, thought):
    """What soft rows add to a step, whatever their number."""
    from rl_soft.rollouts.vllm import sampler, state

    made, llm = engines("llama")
    counts = {"draw": [], "feed": []}

    def counted(owner, name, part):
        inner = getattr(owner, name)

        def count(*args):
            with Operations() as mode:
                out = inner(*args)
            counts[part].append(mode.count)
            return out

        monkeypatch.setattr(owner, name, count)

    job = Job(made, replace(LATENT, thought=thought, thought_k=8))
    together(llm, [job])
    counted(sampler.SoftSampler, "__call__", "draw")
    counted(state.SoftModelState, "feed", "feed")
    together(llm, [job])
    assert max(counts["draw"]) <= DRAWS and max(counts["feed"]) <= FEEDS, {k: max(v) for k, v in counts.items()}


def test_eos_of_the_model_where_none_is_given(engines):
    from vllm import SamplingParams

    made, llm = engines("llama")
    job = Job(made, EXPLICIT, samples=1)
    V = llm.llm_engine.model_config.get_vocab_size()
    prompts, params = job.requests(V)
    arguments = {k: v for k, v in params[0].extra_args.items() if k != "eos_ids"}
    wish = SamplingParams(max_tokens=30, detokenize=False, logprobs=11, flat_logprobs=True, extra_args=arguments)
    output = llm.generate(prompts[:1], wish, use_tqdm=False)[0].outputs[0]
    theirs = llm.generate(prompts[:1], params[:1], use_tqdm=False)[0].outputs[0]
    assert [made.tokenizer.eos_token_id] == EOS and list(output.token_ids) == list(theirs.token_ids)


def test_more_slots_than_an_engine_has(engines):
    made, llm = engines("llama")
    job = Job(made, replace(LATENT, thought_k=9))
    with pytest.raises(ValueError, match="thought_k 9 is above the 8 slots"):
        soft_vllm.rollout(llm, job.layout, job.prompts, job.seeds, EOS)
    with pytest.raises(ValueError, match="num_thoughts 13 is above the 12"):
        thinking = replace(EXPLICIT, num_thoughts=13)
        soft_vllm.rollout(llm, Job(made, thinking).layout, job.prompts, job.seeds, EOS)
    with pytest.raises(ValueError, match="max_model_len of vLLM is 96"):
        soft_vllm.rollout(llm, Job(made, EXPLICIT).layout, [[5] * 90], job.seeds[:1], EOS)
