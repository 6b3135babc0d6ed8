"""Every decoder that transformers can make from a config: is a soft rollout exact, and does training recompute it?

    python benchmarks/architectures.py [MODEL_TYPE ...]     # of all it writes docs/models.md

Each model is tiny, with random weights. Four distances are measured, each the largest over all positions of ten rows
of different lengths, in nats:

    rollout        the recorded log-densities, from those of a plain forward of each row by itself: without padding,
                   without a cache, with positions as the model counts them, by float64 densities of its logits
    training       the training pass over the padded batch, from the rollout
    alone = batch  the rollout of each row by itself, from that of all rows together
    waiting        a rollout with three places for ten rows, from that of all rows at once

A model is right where all four are below BOUND, or is refused by name. Anything else is an error, and the exit code 1.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import logging
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rl_soft.model import policy
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.models import check_rollout_model
from rl_soft.rollouts.recording import Rollout
from rl_soft.thoughts.densities import GumbelTopK, SoftToken
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

BOUND = 1e-5  # nats
PAGE = Path(__file__).parents[1] / "docs/models.md"
MOST_PARAMETERS = 2_000_000  # of a model that is run; a larger one has sizes that the tables below do not know
VOCABULARY = "0123456789+-=;#"
THINKING = Thinking(
    phase="explicit", end_of_thinking="=", num_thoughts=10, thought_k=3, thought_tau=1.0, max_answer_tokens=6
)
QUESTIONS = ["12+3", "4", "5+6+7+8+9+1+2+3", "7-2", "1+2+3+4+5+6", "31+4", "9", "8+8+8+8", "6-5+4", "2+2+2+2+2+2+2"]

# Sizes by the names that configs have for them; each config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "d_inner", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "mlp_dim", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 7),
}
# What a type needs beside them, or what makes it differ: scales, caps, windows. A name with a colon is a variant.
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0 + i / 10 for i in range(8)],
            "long_factor": [2.0 + 1.5 * i for i in range(8)]}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "bert:is_decoder": {"is_decoder": True},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64}},
    "electra:is_decoder": {"is_decoder": True},
    "falcon:alibi": {"alibi": True},
    "gemma2": {"final_logit_softcapping": 5.0},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 20,
                     "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 20},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "granitemoe": {"logits_scaling": 2.0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"logits_scaling": 2.0, "shared_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "llama:dynamic": {"max_position_embeddings": 20, "rope_parameters": {**ROPE, "rope_type": "dynamic"}},
    "llama:dynamic, short rows": {"rope_parameters": {**ROPE, "rope_type": "dynamic"}},
    "llama:yarn": {"rope_parameters": {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 20}},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mimo_v2_flash": {"head_dim": 24, "num_attention_heads": 4},
    "minicpm3": {"dim_model_base": 8},
    "opt:projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi3:longrope": {"original_max_position_embeddings": 20, "rope_parameters": LONGROPE},
    "phi3:longrope, short rows": {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    "reformer": {"is_decoder": True},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "roberta:is_decoder": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Sizes that a type has a name for and does not take.
UNTAKEN = {
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu", "falcon"), ("head_dim",)),
    **dict.fromkeys(("zamba", "zamba2"), ("num_hidden_layers",)),
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
    "xlstm": ("v_head_dim",),
}


def all_types() -> list[str]:
    """The model types of transformers' causal language models, and the variants."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SPECIAL})


def config_of(name: str) -> dict[str, Any]:
    """A tiny `model_config` of a type or a variant."""
    model_type = name.partition(":")[0]
    default = CONFIG_MAPPING[model_type]()
    known = {key: value for key, value in SIZES.items() if key in default.to_dict() or hasattr(default, key)}
    for key in UNTAKEN.get(model_type, ()):
        known.pop(key, None)
    for key in list(known):  # two names of one size: attribute_map
        other = default.attribute_map.get(key)
        if other in known:
            del known[key]
    for key in ("sliding_window", "q_lora_rank"):  # off by default in some
        if key in known and getattr(default, key) is None and model_type not in ("mistral", "gpt_oss"):
            del known[key]
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2}
    return {"model_type": model_type, **ids, **known, **SPECIAL.get(model_type, {}), **SPECIAL.get(name, {})}


class NotMade(Exception):
    """A type that has no tiny model."""


def make(name: str, dtype: torch.dtype = torch.float32) -> policy.Policy:
    """A model of the type, sharp enough that densities differ between positions, whose biases and norms matter too.

    Raises:
        ValueError: a model that rollouts refuse; told before it is built, since some have no small config.
        NotMade: no small config.
    """
    tokenizer = policy.character_tokenizer(VOCABULARY)
    try:
        values = config_of(name)
        config = AutoConfig.for_model(values.pop("model_type"), vocab_size=len(tokenizer), **values)
        with torch.device("meta"):
            hollow = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise NotMade(f"transformers makes none of these sizes: {first_line(error)}") from error
    with contextlib.suppress(RuntimeError):  # what has to be computed
        check_rollout_model(hollow)
    size = sum(p.numel() for p in hollow.parameters())
    if size > MOST_PARAMETERS:
        raise NotMade(f"no small config: {size:.2g} parameters")
    config._experts_implementation = "eager"  # the other products are float32's
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise * (0.12 if p is embedding else 0.06) if p.dim() > 1 else p + 0.08 * noise)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return policy.Policy(model.eval(), tokenizer, None)


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class Case:
    """A model and the rows that it is tried on."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        made = make(name, dtype)
        self.model, self.layout = made.model, Layout(THINKING, made.tokenizer)
        self.prompts = [self.layout.prompt_ids(q) for q in QUESTIONS]
        self.seeds = torch.tensor([address(0, f"row/{i}", 0) for i in range(len(QUESTIONS))])

    def rolled(self, rows: list[int], places: int | None = None) -> Rollout:
        budget = None if places is None else places * (max(map(len, self.prompts)) + self.layout.max_completion_length)
        prompts = [self.prompts[i] for i in rows]
        return rollout(self.model, self.layout, prompts, self.seeds[rows], token_budget=budget)

    @torch.no_grad()
    def plain(self, out: Rollout, i: int) -> float:
        """Distance of row i from a forward of it alone; tokens are given as ids where nothing but tokens is fed."""
        embedding, n = self.model.get_input_embeddings(), int(out.lengths[i])
        prompt = torch.tensor([out.prompt_ids[i]])
        by_ids = self.model(input_ids=prompt, use_cache=False).logits[0, -1].double()
        support, log_weights = out.support[i, :n], out.log_weights[i, :n]
        mixtures = (embedding(support) * log_weights.exp()[..., None]).sum(-2)
        fed = torch.cat([embedding(prompt)[0], mixtures])[None]
        logits = self.model(inputs_embeds=fed, use_cache=False).logits[0, len(prompt[0]) - 1 : -1].double()
        worst = float((logits[0].log_softmax(-1) - by_ids.log_softmax(-1)).abs().max())
        for t in out.action_mask[i].nonzero()[:, 0].tolist():
            if out.thought_mask[i, t]:
                law = GumbelTopK(logits[t], THINKING.thought_k, THINKING.thought_tau, THINKING.thought_temperature)
                found = law.log_prob(SoftToken(support[t], log_weights[t]))
            else:
                found = (logits[t] / THINKING.temperature).log_softmax(-1)[support[t, 0]]
            worst = max(worst, abs(float(found - out.log_probs[i, t])))
        return worst

    @torch.no_grad()
    def training(self, out: Rollout) -> float:
        add_soft_forward(self.model, chunk_size=7)
        P, pad = max(map(len, self.prompts)), self.layout.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (P - len(p)) + p for p in self.prompts])
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in self.prompts])
        soft = SoftInputs(ids, out.support, out.log_weights, out.action_mask, out.thought_mask, THINKING)
        scored = self.model(attention_mask=torch.cat([mask, out.mask.long()], dim=1), soft=soft)
        return largest(scored.log_probs - out.log_probs)


def largest(difference: Tensor) -> float:
    """The largest absolute value; inf where there is a NaN."""
    return float(difference.abs().nan_to_num(torch.inf).max())


def apart(out: Rollout, i: int, other: Rollout, j: int) -> float:
    """Distance of a row from the same row in another rollout; inf where they drew different ids."""
    n = int(out.lengths[i])
    if int(other.lengths[j]) != n or not torch.equal(out.completion_ids[i, :n], other.completion_ids[j, :n]):
        return torch.inf
    return largest(out.log_probs[i, :n] - other.log_probs[j, :n])


def measure(name: str) -> dict[str, float | str]:
    """The four distances of a model type or variant; a text in place of one, or `refused` alone, says why not.

    In float64 rounding neither hides an error nor looks like one. Where layers of transformers are float32's alone, or
    masks of its eager attention overflow, weights are float32.
    """
    try:
        return measured(name, torch.float64)
    except (RuntimeError, TypeError):
        return measured(name, torch.float32)


def measured(name: str, dtype: torch.dtype) -> dict[str, float | str]:
    try:
        case, rows = Case(name, dtype), list(range(len(QUESTIONS)))
        out = case.rolled(rows)
    except NotMade as error:
        return {"not made": str(error)}
    except ValueError as error:
        return {"refused": first_line(error)}
    if out.failed.any():
        raise RuntimeError("logits that are not finite")
    found: dict[str, float | str] = {"weights": str(dtype).removeprefix("torch.")}
    found["rollout"] = max(case.plain(out, i) for i in rows)
    found["alone = batch"] = max(apart(out, i, case.rolled([i]), 0) for i in rows)
    waited = case.rolled(rows, places=3)
    found["waiting"] = max(apart(out, i, waited, i) for i in rows)
    try:
        found["training"] = case.training(out)
    except ValueError as error:
        found["training"] = f"refused: {first_line(error)}"
    return found


COLUMNS = ("weights", "rollout", "training", "alone = batch", "waiting")
REASONS = ("refused", "not made", "error")


def verdict(found: dict[str, float | str]) -> str:
    """right, refused, refused in training, not made, or WRONG."""
    if "refused" in found or "not made" in found:
        return "refused" if "refused" in found else "not made"
    if "error" in found or any(isinstance(v, float) and not v < BOUND for v in found.values()):
        return "WRONG"
    return "right" if isinstance(found["training"], float) else "refused in training"


def cells(found: dict[str, float | str]) -> list[str]:
    """The row of the table after the model type; what names one model is taken out of a reason."""
    for key in REASONS:
        if key in found:
            return [f"{key}: {general(str(found[key]))}"]
    return [f"{v:.0e}" if isinstance(v, float) else general(str(v)) for v in (found[c] for c in COLUMNS)]


def general(reason: str) -> str:
    reason = re.sub(r"model \w+( \(model_type \S+\))?:? ", "", reason)
    return re.sub(r" \((its logits move|off) by [^)]*\)", "", reason)


def page(rows: dict[str, list[str]], counts: dict[str, int], command: str) -> str:
    """docs/models.md; types that are refused for one reason share a row."""
    shared: dict[str, list[str]] = {}
    for name, row in rows.items():
        if len(row) == 1:
            shared.setdefault(row[0], []).append(name)
    head = ["model type", *COLUMNS]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    table += [f"| {name} | {' | '.join(row)} |" for name, row in rows.items() if len(row) > 1]
    reasons = ["| what | model types |", "|---|---|"]
    reasons += [f"| {reason} | {'; '.join(names)} |" for reason, names in sorted(shared.items(), reverse=True)]
    numbers = ", ".join(f"{n} {name}" for name, n in counts.items())
    return TEXT.format(command=command, numbers=numbers, table="\n".join(table), reasons="\n".join(reasons))


TEXT = """# Models

`{command}` makes this page. It tries every causal language model of transformers, and some
variants, with tiny sizes and random weights: {numbers}.
A model is right if it is exact to rounding (1e-5 nats) in all of these:

- **rollout**: the recorded log-densities are those of a plain forward of the row by itself, without padding or cache;
- **training**: the training pass over a padded batch finds the same log-densities;
- **alone = batch**: a row becomes the same by itself and beside others;
- **waiting**: and the same where rows wait for a place.

Each number is the largest distance over all positions of ten rows, in nats. Weights are float64, so that rounding
neither hides an error nor looks like one; they are float32 where transformers' layers take nothing else.

## Tried

{table}

## Refused, or not tried

A refusal is one line that names the model, before anything is trained. *Not made* are types that have no tiny model
here: they are neither known to be right nor refused, and `rollout/density_gap` watches over them in training
([grpo](grpo.md#how-small-the-density-gap-is)).

{reasons}
"""


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start, rows, verdicts = time.time(), {}, []
    for name in names or all_types():
        try:
            found = measure(name)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {first_line(error)}"}
        verdicts.append(verdict(found))
        rows[name.replace(":", ", ")] = cells(found)
        print(f"{verdicts[-1]:20}", name, *cells(found), sep=" | ", flush=True)
    counts = {v: verdicts.count(v) for v in sorted(set(verdicts), key=verdicts.count, reverse=True)}
    print(counts, f"{time.time() - start:.0f} s")
    if not names:
        PAGE.write_text(page(rows, counts, "python benchmarks/architectures.py"))
    return int("WRONG" in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
