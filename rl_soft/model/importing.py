"""Published checkpoints of CODI, SIM-CoT and Coconut, made folders of ours: `rl-soft eval` then runs them.

What a checkpoint is, its names say (as the released code writes them):

    CODI       codi.base_model.model.* (LoRA) or codi.*, prj.1, prj.3, prj.ln; three rows: pad, bot, eot
    Coconut    base_causallm.*; three rows: <|start-latent|>, <|end-latent|>, <|latent|>
    SIM-CoT    one of these two, and a decoder that reads steps out of thoughts in training alone: decoder.*, pj_in.*,
               pj_out.* (CODI), expainable_llm.* (Coconut). It is left out, as its authors do for inference

A checkpoint holds neither the configuration nor the tokenizer of its base, nor the number of thoughts, nor lora_alpha:
these are asked for, or are those of the published scripts.

Sources: github.com/zhenyi4/codi, github.com/facebookresearch/coconut, github.com/InternLM/SIM-CoT.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from rl_soft.files import new_folder
from rl_soft.model.folder import model_folder, write_thinking
from rl_soft.model.projector import PROJECTOR
from rl_soft.model.side_modules import save_module
from rl_soft.model.tokenizer import load_tokenizer
from rl_soft.thoughts.layout import BOT, EOT
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")

State = dict[str, Tensor]
FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder; or NAME.index.json of several
PROJECTION = {"1": "inner", "3": "outer", "ln": "norm"}  # its modules in `prj` -> in `Projector`
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")  # of older transformers; made anew
NUM_THOUGHTS, LORA_ALPHA = 6, 32  # of the published scripts


@dataclass(frozen=True)
class Source:
    """What is true of a layout of checkpoints."""

    prefix: str  # of the names of the causal LM
    left_out: tuple[str, ...]  # prefixes: the decoder of SIM-CoT; a second name of the embeddings
    question_template: str
    max_answer_tokens: int


SOURCES = {
    "CODI": Source("codi.", ("decoder.", "pj_in.", "pj_out."), "{question}", 256),
    "Coconut": Source("base_causallm.", ("expainable_llm.", "embedding."), "{question}\n", 64),
}


def import_checkpoint(
    checkpoint: str,
    folder: Path,
    base: str,
    num_thoughts: int = NUM_THOUGHTS,
    lora_alpha: int = LORA_ALPHA,
    dtype: str = "float32",
) -> Thinking:
    """Write a checkpoint as a model folder of ours, whole or not at all; LoRA is merged, in float32.

    Args:
        checkpoint: a file of safetensors or of `torch.save`, which is read as weights alone; or a folder with one.
        folder: which must not exist.
        base: folder or hub id of the model that it was trained from: its configuration and its tokenizer.
        num_thoughts: n, of the training; for Coconut thoughts per step times stages.
        lora_alpha: of the training; unused without LoRA.
        dtype: of the weights that are written.

    Returns:
        How the model thinks: hidden states, through the projector where there is one.

    Raises:
        ValueError: a file that is none of these, that lacks weights, or that was trained from another base.
    """
    base = model_folder(base)
    state = read_state(Path(checkpoint))
    name, source = source_of(state, checkpoint)
    with new_folder(folder) as temporary:
        tokenizer = load_tokenizer(base)
        config = AutoConfig.from_pretrained(base)
        weights = {key.removeprefix(source.prefix): w for key, w in state.items() if key.startswith(source.prefix)}
        move_rows(weights, tokenizer, config, name, base)
        model = load_weights(weights, config, lora_alpha, f"{checkpoint} ({name})")
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        model.to(getattr(torch, dtype)).save_pretrained(temporary)
        if projection := projection_of(state, checkpoint):
            save_module(temporary, PROJECTOR, projection)
        tokenizer.save_pretrained(temporary)
        thinking = Thinking(
            thought="hidden",
            num_thoughts=num_thoughts,
            question_template=source.question_template,
            max_answer_tokens=source.max_answer_tokens,
        )
        write_thinking(temporary, thinking)
    decoder = any(key.startswith(source.left_out) and not key.startswith("embedding.") for key in state)
    logger.info(
        "%s%s; thought hidden%s, %d thoughts",
        "SIM-CoT on " if decoder else "",
        name,
        " through a projector" if projection else "",
        num_thoughts,
    )
    return thinking


def read_state(path: Path) -> State:
    """The state dict of a file, or of the file or files of a folder.

    Raises:
        ValueError: there is none, or it holds something else than weights by their names.
    """
    if path.is_dir():
        for name in FILES:
            index = path / f"{name}.index.json"
            if index.exists():
                parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                return {key: weight for part in parts for key, weight in read_state(path / part).items()}
            if (path / name).exists():
                return read_state(path / name)
        raise ValueError(f"{path} holds no checkpoint: neither {' nor '.join(FILES)}; name the file")
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights alone: {first:.200}") from None
    if not isinstance(state, dict) or not state or not all(isinstance(w, Tensor) for w in state.values()):
        raise ValueError(f"{path} holds no weights by their names, as state_dict() gives them")
    for prefix in ("module.", "_orig_mod."):  # of DDP and of torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): weight for key, weight in state.items()}
    return state


def source_of(state: State, checkpoint: str) -> tuple[str, Source]:
    """The layout that the names are of.

    Raises:
        ValueError: none, or names that it does not have.
    """
    found = [(name, s) for name, s in SOURCES.items() if any(key.startswith(s.prefix) for key in state)]
    if not found:
        known = ", ".join(f"{s.prefix}* ({name})" for name, s in SOURCES.items())
        raise ValueError(f"{checkpoint}: its names ({min(state)}, ...) are of none of the known layouts: {known}")
    name, source = found[0]
    allowed = (source.prefix, *source.left_out, *(["prj."] if name == "CODI" else []))
    if strange := [key for key in state if not key.startswith(allowed)]:
        raise ValueError(f"{checkpoint} ({name}) has {len(strange)} weights of unknown use: {strange[0]}, ...")
    return name, source


def move_rows(weights: State, tokenizer: Any, config: Any, name: str, base: str) -> None:
    """Put the marks into the tokenizer as <bot> and <eot>, and their rows where it numbers them.

    The three new rows stand behind the base's. Where a base has more rows than its tokenizer has ids, CODI's marks
    have no id, and the first rows that are free become theirs.

    Raises:
        ValueError: another number of rows than the base leads to.
    """
    text = config.get_text_config()
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        tokenizer.bos_token = None  # it was not put before the questions (GPT-2)
    before = text.vocab_size if name == "CODI" else len(tokenizer)
    ends = [key for key in weights if re.search(r"(^|\.)(wte|embed_tokens|embed_in|lm_head|embed_out)\.weight$", key)]
    rows = {weights[key].shape[0] for key in ends}
    if rows != {before + 3}:
        raise ValueError(
            f"the checkpoint has {', '.join(map(str, sorted(rows))) or 'no'} rows of embeddings, and {base} with the "
            f"3 of {name} leads to {before + 3}: name the model that it was trained from as --base"
        )
    free = len(tokenizer)
    if name == "CODI":  # pad, bot, eot
        marks = {before + 1: BOT, before + 2: EOT}
        if free == before:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    else:
        marks = {before: BOT, before + 1: EOT}
    tokenizer.add_special_tokens({"additional_special_tokens": [BOT, EOT]}, replace_extra_special_tokens=False)
    for key in ends:
        old = weights[key]
        weights[key] = old.clone()
        for row, token in marks.items():
            weights[key][tokenizer.convert_tokens_to_ids(token)] = old[row]
    text.vocab_size = before + 3


def load_weights(weights: State, config: Any, lora_alpha: int, what: str) -> Any:
    """The causal LM in float32, with LoRA merged by PEFT.

    Raises:
        ValueError: weights that are missing or left over.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wrapped = {key.removeprefix("base_model.model."): w for key, w in weights.items() if not BUFFERS.search(key)}
    lora_A = {key.removesuffix(".lora_A.default.weight"): w for key, w in wrapped.items() if ".lora_A." in key}
    if lora_A:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=next(iter(lora_A.values())).shape[0],
            lora_alpha=lora_alpha,
            target_modules=list(lora_A),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT sets it for GPT-2 itself
            model = get_peft_model(model, adapter)
        wrapped = {f"base_model.model.{key}": w for key, w in wrapped.items()}
    try:
        missing, left = model.load_state_dict(wrapped, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(f"{what} does not fit its base: {str(error).strip().splitlines()[1].strip()}") from None
    tied = config.get_text_config().tie_word_embeddings
    missing = [key for key in missing if not (tied and key.endswith(("lm_head.weight", "embed_out.weight")))]
    if missing or left:
        wrong = f"lacks {missing[0]}" if missing else f"has {left[0]}, which its base has not"
        raise ValueError(f"{what} {wrong}: name the model that it was trained from as --base")
    return model.merge_and_unload() if lora_A else model


def projection_of(state: State, checkpoint: str) -> State:
    """The weights of our `Projector`; {} where states are fed as they are.

    Raises:
        ValueError: a projection of another form.
    """
    given = {key.removeprefix("prj."): weight for key, weight in state.items() if key.startswith("prj.")}
    ours = {
        f"{PROJECTION[module]}.{kind}": weight.float()
        for key, weight in given.items()
        for module, _, kind in [key.partition(".")]
        if module in PROJECTION
    }
    if given and len(ours) != 2 * len(PROJECTION):
        raise ValueError(
            f"{checkpoint}: its projection has {', '.join(sorted(given))}, and ours is linear, GELU, linear and "
            "LayerNorm; one trained with prj_no_ln has no place here"
        )
    return ours
