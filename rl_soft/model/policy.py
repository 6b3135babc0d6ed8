"""The policy: a causal LM, its tokenizer and its `Thinking`; one think step; load and save.

The model stays a plain transformers model, apart from one more keyword of its forward (`scored.py`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from rl_soft.model.head import LogProb
from rl_soft.model.projector import PROJECTOR, load_projector
from rl_soft.model.projector import Projector as Projector
from rl_soft.model.projector import add_projector as add_projector
from rl_soft.model.side_modules import language_model, module_file
from rl_soft.thoughts.densities import Dirichlet, SoftToken, dirichlet_log_prob, gumbel_topk_log_prob
from rl_soft.thoughts.layout import BOT, EOT, PAD
from rl_soft.thoughts.noise import gumbel
from rl_soft.thoughts.thinking import CONTROLS, Thinking

logger = logging.getLogger("rl_soft")

SIDE_FILE = "rl_soft.json"


@dataclass
class Policy:
    model: Any  # a transformers causal LM, possibly in a PEFT wrapper
    tokenizer: Any
    thinking: Thinking | None  # None: a plain language model, not trained to think by this package


# ---------------------------------------------------------------------------------------------------------------------
# One think step


def next_thought(logits: Tensor, thinking: Thinking, seeds: Tensor | None = None, step: int = 0) -> SoftToken:
    """The thought that follows `logits` (B, V); differentiable with respect to them, a drawn dirichlet one apart.

    Args:
        logits: raw logits, any float dtype.
        seeds: (B,) int64 row seeds of the noise; None draws no noise (greedy decoding).
        step: position in the completion, the second coordinate of the noise.

    Returns:
        SoftToken of support (B, K) int64 and log-weights (B, K) float32, the strongest weight first. Without noise, a
        gumbel thought has the weights softmax_S(phi / tau) of the K most probable ids; a soft thought softmax_S(phi),
        and so has a dirichlet one, whose mean they are. A hybrid thought is a gumbel one here; a hidden thought is
        the strongest id, for the record alone, and draws no noise.
    """
    k = thinking.support_size(logits.shape[-1])
    if seeds is not None and thinking.thought == "dirichlet":
        d = Dirichlet(logits, k, thinking.thought_gamma, thinking.thought_temperature)
        return d.sample(seeds=seeds.to(logits.device), step=step)
    z = torch.log_softmax(logits.float() / thinking.thought_temperature, dim=-1)  # (B, V)
    if seeds is not None and thinking.thought not in ("soft", "hidden"):
        z = z + gumbel(seeds.to(z.device), step, z.shape[-1])
    values, support = z.topk(k, dim=-1)  # (B, K)
    tau = thinking.thought_tau if thinking.thought in ("gumbel", "hybrid") else 1.0
    return SoftToken(support, torch.log_softmax(values / tau, dim=-1))


def density_of(thinking: Thinking) -> tuple[LogProb, float]:
    """The log-density of a thought, as a function of gathered statistics, and its parameter (tau or gamma).

    Positions of tokens are the caller's: only for `gumbel_topk_log_prob` is a one-slot thought a token.
    """
    if thinking.thought == "dirichlet":
        return dirichlet_log_prob, thinking.thought_gamma
    return gumbel_topk_log_prob, thinking.thought_tau


def mix_embeddings(embedding: nn.Module, support: Tensor, log_weights: Tensor) -> Tensor:
    """Weighted sum of K embeddings a position: (..., K), (..., K) -> (..., H).

    The ids go through the embedding *module*, one slot at a time: its hooks (ZeRO-3 gathering, PEFT's input-gradient
    hook, Gemma's scaling) fire, and backward keeps indices rather than K copies of (..., H).
    """
    weights = log_weights.exp()
    mixture: Tensor | None = None
    for j in range(support.shape[-1]):
        row = embedding(support[..., j])  # (..., H)
        row = row * weights[..., j, None].to(row.dtype)
        mixture = row if mixture is None else mixture + row
    assert mixture is not None
    return mixture


def reads_hidden(thinking: Thinking) -> bool:
    """Whether what is fed as a thought depends on the last hidden state itself, and not only on its logits."""
    return thinking.thought in ("hidden", "hybrid")


def thought_input(model: Any, thinking: Thinking, slots: Tensor, log_weights: Tensor, hidden: Tensor | None) -> Tensor:
    """What is fed for a thought; gradients flow to all that it is made of.

    Args:
        model: the causal LM, possibly in a PEFT wrapper.
        slots, log_weights: (..., K) int64 and float32, the thought.
        hidden: (..., H), what the LM head read at the position before (after the final norm); read by kinds hidden
            and hybrid.

    Returns:
        (..., H): the mixture of embeddings; the projected hidden state, or that state itself where the model has no
        projector (hidden: Coconut's thought); their gated sum (hybrid).

    Raises:
        ValueError: a hybrid thought and no projector.
    """
    if not reads_hidden(thinking):
        return mix_embeddings(model.get_input_embeddings(), slots, log_weights)
    assert hidden is not None
    projector = getattr(model, "projector", None)
    if thinking.thought == "hidden":
        return hidden if projector is None else projector(hidden)
    if projector is None:
        raise ValueError("thought hybrid needs a model with a projector; start from a CODI run with hidden or hybrid")
    return projector(hidden, mix_embeddings(model.get_input_embeddings(), slots, log_weights))


def disturb(fed: Tensor, control: str, first: Tensor) -> Tensor:
    """Controls of an analysis: what is fed for a thought, with its content taken away.

    Args:
        fed: (B, H), what would be fed at this step to rows that all have a thought here.
        control: none; zero: a vector of zeros; shuffle: the thought of the row before (the last row's for the first),
            so rows must be different problems; repeat: the row's first thought again.
        first: (B, H), what was fed for the rows' first thoughts; `fed` itself at the first.

    Raises:
        ValueError: an unknown control.
    """
    if control == "none":
        return fed
    if control == "zero":
        return torch.zeros_like(fed)
    if control == "shuffle":
        return fed.roll(1, dims=0)
    if control == "repeat":
        return first
    raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}")


def position_ids(attention_mask: Tensor) -> Tensor:
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_state(output: Any) -> Tensor | None:
    """(B, H), what the LM head read at the last position; None where the forward was not asked for hidden states."""
    return output.hidden_states[-1][:, -1] if output.hidden_states else None


def think(
    forward: Any,
    model: Any,
    logits: Tensor,
    hidden: Tensor | None,
    cache: Any,
    mask: Tensor,
    thinking: Thinking,
    seeds: Tensor | None,
    step: int = 0,
    control: str = "none",
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """n thoughts on a cache, differentiable from the first to the last.

    Args:
        forward: called with `inputs_embeds`; must return logits, and hidden states when asked: `model` or a wrapper.
        model: whose embeddings and projector make what is fed.
        logits, hidden: (B, V) and (B, H) after the prompt, from which the first thought is made; see `last_state`.
        mask: (B, P) attention mask of what the cache holds.
        seeds, step: address of the noise, see `next_thought`.
        control: what is done to the thoughts fed, see `disturb`.
        keep_logits: whether the logits are wanted. In training they would be held for nothing.

    Returns:
        mask (B, P + n), the position (B, 1) of the next input, and, where they are kept, the n + 1 logits (B, V) seen
        at <bot> and at each thought. The last thought's predict a fed position.
    """
    position = mask.sum(-1, keepdim=True)  # (B, 1)
    seen = [logits] if keep_logits else []
    first: Tensor | None = None
    for t in range(thinking.num_thoughts):
        thought = next_thought(logits, thinking, seeds, step + t)  # (B, K)
        fed = thought_input(model, thinking, thought.support, thought.log_weights, hidden)  # (B, H)
        first = fed if first is None else first
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = forward(
            inputs_embeds=disturb(fed, control, first)[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=reads_hidden(thinking),
        )
        logits, hidden = out.logits[:, -1], last_state(out)
        if keep_logits:
            seen.append(logits)
        position = position + 1
    return mask, position, seen


# ---------------------------------------------------------------------------------------------------------------------
# Attention that does not depend on how many keys are masked


def float64_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in float64, rounded once: (B, A, T, D) queries, (B, A', L, D) keys and values -> (B, T, A, D).

    A decode step and a full pass see different numbers of keys, and float32 kernels then add in another order, while
    products over features are the same in both. A sharp model with K slots multiplies that rounding by up to 2K in
    its log-density; `attn_implementation: float64` takes it away where attention is cheap, in small models.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    return (scores.softmax(-1) @ value).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("float64", float64_attention)
AttentionMaskInterface.register("float64", eager_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Load, make, save


def character_tokenizer(vocabulary: str) -> PreTrainedTokenizerFast:
    """One token a character, with <pad>, <eos>, <bot> and <eot> in the vocabulary from the start."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = list(dict.fromkeys(vocabulary))
    tokens = [PAD, "<unk>", "<eos>", BOT, EOT, *characters]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=[BOT, EOT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make(
    model_config: dict[str, Any],
    vocabulary: str,
    seed: int,
    dtype: str = "float32",
    attn_implementation: str | None = None,
) -> Policy:
    """A model with random weights and a character tokenizer, from a recipe's `model_config` and `vocabulary`."""
    tokenizer = character_tokenizer(vocabulary)
    values = dict(model_config)
    if "model_type" not in values:
        raise ValueError("model_config needs model_type, for example llama")
    config = AutoConfig.for_model(
        values.pop("model_type"),
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **values,
    )
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation else {}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **kwargs)
    return Policy(model, tokenizer, None)


def load(
    name_or_path: str, dtype: str = "float32", attn_implementation: str | None = None, trainable: bool = False
) -> Policy:
    """A policy from a folder of ours, a plain transformers folder, a PEFT adapter folder, or a hub id.

    Args:
        trainable: whether the weights of an adapter take gradients.

    Raises:
        ValueError: the path looks like a folder and does not exist.
    """
    path = Path(name_or_path)
    looks_local = path.is_absolute() or name_or_path.startswith((".", "models/", "runs/"))
    if looks_local and not path.exists():
        hint = "; run `rl-soft fetch smollm2` first" if "smollm2" in name_or_path else ""
        raise ValueError(f"model folder {name_or_path} does not exist{hint}")
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attn_implementation:
        kwargs["attn_implementation"] = attn_implementation
    if (path / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        with warnings.catch_warnings():  # the projector, which the adapter leaves out, comes after it
            warnings.filterwarnings("ignore", message=".*exclude_modules.* but no modules were excluded")
            model = AutoPeftModelForCausalLM.from_pretrained(name_or_path, is_trainable=trainable, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    align(model)
    if module_file(path, PROJECTOR).exists():
        load_projector(language_model(model), path)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Policy(model, tokenizer, read_thinking(path))


def align(model: nn.Module) -> None:
    """Put weights on a CPU at the beginning of cache lines. A safetensors file is mapped, so its weights lie wherever
    its header ends, and every other vector that a product reads is cut in two (benchmarks/cpu_kernels.py)."""
    for p in model.parameters():
        if p.device.type == "cpu" and p.data_ptr() % 64:
            p.data = p.data.clone()


def read_thinking(path: Path) -> Thinking | None:
    """The `Thinking` that a folder was trained for; None when it is not one of ours."""
    file = path / SIDE_FILE
    return Thinking.from_dict(json.loads(file.read_text())["thinking"]) if file.exists() else None


def add_thought_tokens(policy: Policy) -> None:
    """Put <bot> and <eot> into a pretrained tokenizer and model; their rows start as copies of <eos> plus noise."""
    missing = [t for t in (BOT, EOT) if t not in policy.tokenizer.get_vocab()]
    if not missing:
        return
    policy.tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    embedding = policy.model.get_input_embeddings()
    if len(policy.tokenizer) > embedding.weight.shape[0]:
        policy.model.resize_token_embeddings(len(policy.tokenizer), mean_resizing=False)
        embedding = policy.model.get_input_embeddings()
    weight = embedding.weight.data
    noise = torch.Generator().manual_seed(0)
    for token in missing:
        row = weight[policy.tokenizer.eos_token_id]
        jitter = torch.randn(row.shape, generator=noise) * row.float().std().cpu()
        weight[policy.tokenizer.convert_tokens_to_ids(token)] = row + 0.5 * jitter.to(row)


def write_side_file(folder: Path, thinking: Thinking) -> None:
    temporary = folder / (SIDE_FILE + ".tmp")
    temporary.write_text(json.dumps({"format": 1, "thinking": thinking.to_dict()}, indent=2) + "\n")
    temporary.replace(folder / SIDE_FILE)


def save(folder: Path, save_model: Any, tokenizer: PreTrainedTokenizerBase, thinking: Thinking, main: bool) -> None:
    """Write a complete model folder under a temporary name, then rename it, so that a folder is whole or absent.

    Args:
        save_model: called with the temporary folder on every rank (ZeRO needs all of them), e.g. `trainer.save_model`.
        main: whether this process writes the side files and renames.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    if main and temporary.exists():
        shutil.rmtree(temporary)
    save_model(str(temporary))
    if main:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
        tokenizer.save_pretrained(temporary)
        write_side_file(temporary, thinking)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)


def context_length(model: Any) -> int | None:
    """Positions that a model has, by its configuration."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
