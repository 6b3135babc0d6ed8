"""Tiny models of several architectures, and rollouts of both engines beside each other."""

from __future__ import annotations

from dataclasses import replace

import torch

from rl_soft.model import policy
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.vllm import engine as soft_vllm
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

CHARACTERS = "0123456789+-=? abcdefgh#"
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
}  # fmt: skip
MODELS = {
    "llama": {**SIZES, "model_type": "llama"},
    "mistral": {**SIZES, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**SIZES, "model_type": "qwen2", "hidden_size": 128},
    "qwen3": {**SIZES, "model_type": "qwen3"},
    "gemma2": {**SIZES, "model_type": "gemma2", "sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3": {**SIZES, "model_type": "gemma3_text", "sliding_window": 64, "query_pre_attn_scalar": 32},
    "phi3": {**SIZES, "model_type": "phi3", "hidden_size": 128},
    "olmo2": {**SIZES, "model_type": "olmo2", "hidden_size": 128},
    "smollm3": {**SIZES, "model_type": "smollm3", "hidden_size": 128},
    "granite": {**SIZES, "model_type": "granite", "hidden_size": 128},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96},
}
LATENT = Thinking(num_thoughts=4, thought_k=4, answer_prompt="=", max_answer_tokens=5)
EXPLICIT = replace(LATENT, phase="explicit", num_thoughts=9, end_of_thinking="#")
EOS = [2]
QUESTIONS = ["1+1=?", "a+12-34=?bc", "7"]


def build(name, folder, spread=2.0, **more):
    """A random policy, and the folder that it was saved to; `spread` makes its distributions less even."""
    made = policy.make(MODELS[name] | more, CHARACTERS, seed=0)
    made.tokenizer.chat_template = None
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    policy.save(folder, made.model.save_pretrained, made.tokenizer, LATENT, main=True)
    loaded = policy.load_policy(str(folder))
    loaded.model.eval()
    return loaded, folder


class Job:
    """Rows of one `Thinking`: each question `samples` times."""

    def __init__(self, made, thinking, samples=2, decoding=None, greedy=False, questions=QUESTIONS, first_seed=11):
        self.layout, self.decoding = Layout(thinking, made.tokenizer), decoding
        self.prompts = [self.layout.prompt_ids(q) for q in questions for _ in range(samples)]
        self.seeds = None if greedy else torch.arange(len(self.prompts)) * 7919 + first_seed
        self.made = made

    def ours(self):
        return rollout(self.made.model, self.layout, self.prompts, self.seeds, EOS, 10**6, decoding=self.decoding)

    def requests(self, vocab_size):
        seeds = [None] * len(self.prompts) if self.seeds is None else self.seeds.tolist()
        params = [soft_vllm.sampling_params(self.layout, vocab_size, EOS, self.decoding, seed) for seed in seeds]
        return [{"prompt_token_ids": ids} for ids in self.prompts], params

    def assemble(self, outputs, vocab_size):
        rows = [list(soft_vllm.positions_of(o.outputs[0].logprobs, vocab_size)) for o in outputs]
        cpu = torch.device("cpu")
        return soft_vllm.assemble(self.layout, vocab_size, self.prompts, self.seeds, EOS, rows, cpu)


def state_of(llm):
    """Our model state in an engine of this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state


def together(llm, jobs):
    """All jobs in one batch of vLLM's: a rollout per job."""
    V = llm.llm_engine.model_config.get_vocab_size()
    asked = [job.requests(V) for job in jobs]
    prompts, params = ([x for part in parts for x in part] for parts in zip(*asked, strict=True))
    outputs = iter(llm.generate(prompts, params, use_tqdm=False))
    return [job.assemble([next(outputs) for _ in job.prompts], V) for job in jobs]


def assert_same(theirs, ours, gap=1e-3, near_tie=2e-3):
    """Equal ids, supports and log-densities of each row, up to a position where two logits nearly tie.

    Returns:
        positions compared, positions equal, rows left at a near-tie.
    """
    T = max(theirs.mask.shape[1], ours.mask.shape[1])
    compared = equal = left = 0
    for i in range(len(ours.mask)):
        for t in range(T):
            there = [t < r.mask.shape[1] and bool(r.mask[i, t]) for r in (theirs, ours)]
            if not any(there):
                break
            assert all(there), (i, t, there)
            compared += 1
            names = ("completion_ids", "action_mask", "thought_mask", "support")
            if all(torch.equal(getattr(theirs, n)[i, t], getattr(ours, n)[i, t]) for n in names):
                equal += 1
                for n in ("log_probs", "entropy", "outside", "support_log_probs", "log_weights"):
                    x, y = (getattr(r, n)[i, t].nan_to_num(0, 0, 0) for r in (theirs, ours))
                    assert (x - y).abs().max() < gap, (n, i, t, x, y)
                continue
            x, y = (r.log_weights[i, t] for r in (theirs, ours))
            close = x.isfinite() & y.isfinite()
            assert (x - y)[close].abs().max() < near_tie, (i, t, theirs.support[i, t], ours.support[i, t], x, y)
            left += 1
            break
        else:
            continue
    return compared, equal, left
