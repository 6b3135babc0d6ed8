"""What a run starts from: its warm start, its weights, its adapter, and whether they fit together."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from rl_soft.config.recipe import RL_METHODS, Recipe
from rl_soft.config.refusals import IN_MEMORY, check_reference_revision
from rl_soft.data.row import question_hash
from rl_soft.model import policy
from rl_soft.model.adapters import check_whole
from rl_soft.model.folder import is_adapter, read_thinking
from rl_soft.model.projector import beside_adapter
from rl_soft.model.quantised import four_bits, in_4bit
from rl_soft.model.tokenizer import check_tokenizer, load_tokenizer
from rl_soft.thoughts.kinds import KINDS
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.precision import default_dtype

logger = logging.getLogger("rl_soft")

OF_ADAPTER = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}  # PEFT's


def with_adapter(model: Any, layout: Layout, peft_config: Any) -> Any:
    """`model` in a PEFT wrapper whose adapter holds the rows of <bot> and <eot> too, if it does not hold all rows."""
    from peft import get_peft_model

    if not model.name_or_path:
        raise ValueError(f"use_peft: {IN_MEMORY}")
    rows = [layout.bot_id, layout.eot_id]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    ends = [model.get_input_embeddings(), *([] if tied else [model.get_output_embeddings()])]
    whole = {name.rpartition(".")[2] for name in peft_config.modules_to_save or []}
    embeddings, head = (names.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    if tied and head in whole and embeddings not in whole:
        raise ValueError(
            f"lora_modules_to_save: {head} is one matrix with {embeddings}, whose rows of <bot> and <eot> are "
            f"trained; name {embeddings} too"
        )
    in_part = {names[id(module)]: rows for module in ends if names[id(module)] not in whole}
    peft_config.trainable_token_indices = in_part or None
    adapted: Any = get_peft_model(model, beside_adapter(peft_config) if hasattr(model, "projector") else peft_config)
    # A longer vocabulary makes peft save both embedding matrices whole; only these rows differ from the base's.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def starting_policy(recipe: Recipe, warm_start: Recipe | None) -> policy.Policy:
    """What a recipe starts from: random weights, the result of its warm start, or a named model."""
    m = recipe.model
    dtype = m.dtype or "float32"
    if m.model_config:
        return policy.make(m.model_config, m.vocabulary or "", recipe.seed, dtype, m.attn_implementation)
    source = str(warm_start.output_dir / "model") if warm_start is not None else str(m.model_name_or_path)
    wanted = None
    if m.load_in_4bit:
        wanted = four_bits(m.bnb_4bit_quant_type, m.bnb_4bit_compute_dtype or dtype, m.use_bnb_nested_quant)
    start = policy.load_policy(
        source, dtype, m.attn_implementation, trainable=True, quantization=wanted, revision=m.model_revision
    )
    if in_4bit(start.model) and not m.load_in_4bit:
        raise ValueError(f"model {source} has weights of 4 bits: set load_in_4bit true")
    if hasattr(start.model, "peft_config"):
        check_adapter(recipe, source, start.model.peft_config["default"])
    else:
        check_whole(start.model, m.lora_modules_to_save)
    if recipe.thinking.phase == "latent" and recipe.method not in RL_METHODS:
        policy.add_thought_tokens(start)
    return start


def policy_of(model: Any, args: Any, tokenizer: Any, adapter: bool = False, quantization: Any = None) -> policy.Policy:
    """What a trainer is given to start from, in Python: a hub id or a folder, which is loaded, or a model.

    Args:
        args: the trainer's; `model_init_kwargs` may hold dtype, attn_implementation and revision for a model that is
            loaded.
        tokenizer: None loads the one beside the model.
        adapter: whether the trainer puts an adapter on it.
        quantization: a BitsAndBytesConfig of 4 bits for a model that is loaded.

    Raises:
        ValueError: other model_init_kwargs; a model that was made in memory, without a tokenizer.
    """
    if isinstance(model, str | Path):
        asked = dict(args.model_init_kwargs or {})
        args.model_init_kwargs = None  # TRL is given the model
        own = default_dtype(adapter or is_adapter(Path(model)), args.deepspeed_plugin is not None, args.bf16)
        dtype = str(asked.pop("dtype", own)).removeprefix("torch.")
        attention, revision = asked.pop("attn_implementation", None), asked.pop("revision", None)
        check_reference_revision(revision, args.beta, adapter)
        if asked:
            raise ValueError(
                f"model_init_kwargs may hold dtype, attn_implementation and revision here, not {', '.join(asked)}; "
                "load the model yourself and give it as `model`"
            )
        loaded = policy.load_policy(
            str(model), dtype, attention, trainable=True, quantization=quantization, revision=revision
        )
        if tokenizer is not None:
            check_tokenizer(tokenizer, loaded.model, "processing_class")
        return policy.Policy(loaded.model, tokenizer or loaded.tokenizer, loaded.thinking)
    source = getattr(model, "name_or_path", "")
    if tokenizer is None and not source:
        raise ValueError("processing_class is missing: this model was made in memory and has no tokenizer beside it")
    trained = read_thinking(Path(source)) if source and not hasattr(model, "peft_config") else None
    name = "processing_class" if tokenizer else source
    tokenizer = tokenizer or load_tokenizer(source)
    check_tokenizer(tokenizer, model, name)
    return policy.Policy(model, tokenizer, trained)


def fitting(thinking: Thinking | None, start: policy.Policy) -> Thinking:
    """The thinking that a trainer was given, or else the one that its model was trained for.

    Raises:
        ValueError: neither; or another layout of the thoughts than the model was trained for.
    """
    if thinking is None:
        if start.thinking is None:
            raise ValueError(
                "thinking is missing: the model was not trained by this package, so say how it is to think, for "
                'example Thinking(thought="gumbel", phase="explicit", num_thoughts=256, end_of_thinking="####")'
            )
        return start.thinking
    if start.thinking is not None:
        check_thinking(thinking, start.thinking, "thinking")
    return thinking


def with_template(thinking: Thinking, args: Any) -> Thinking:
    """`thinking` with the chat_template_kwargs of a `trl.GRPOConfig`. Raises ValueError where it has others."""
    given = args.chat_template_kwargs
    if not given:
        return thinking
    if thinking.chat_template_kwargs not in (None, given):
        raise ValueError(
            f"chat_template_kwargs is {given!r} in args and {thinking.chat_template_kwargs!r} in thinking; set it once"
        )
    return dataclasses.replace(thinking, chat_template_kwargs=given)


def settle(args: Any, layout: Layout) -> None:
    """Set what `thinking` decides, or exactness asks for, in a `trl.GRPOConfig`."""
    args.max_completion_length = layout.max_completion_length
    args.temperature = layout.thinking.temperature
    args.disable_dropout = True  # with dropout on, the recomputed density is that of another model than the rollout's
    if args.device.type == "cpu" and args.mixed_precision == "bf16":
        logger.info("bf16 is off on a CPU, where rollouts are in float32: autocast would make the density another one")
        args.bf16, args.mixed_precision = False, "no"


def folder_name(model: Any) -> str:
    return Path(str(model if isinstance(model, str | Path) else model.name_or_path or "model")).name


def row_id(row: dict[str, Any]) -> Any:
    """The id that addresses the noise of a row: its own, or the hash of its prompt."""
    if row.get("id") is not None:
        return row["id"]
    prompt = row["prompt"]
    return question_hash(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))


def check_adapter(recipe: Recipe, source: str, adapter: Any) -> None:
    """RL goes on with the adapter that it starts from. Refuse a recipe that asks for another one."""
    m = recipe.model
    if recipe.method not in RL_METHODS:
        raise ValueError(
            f"model {source} is an adapter, and method {recipe.method} makes a new one; start from its base, "
            f"{adapter.base_model_name_or_path}, or from a folder in which the two are merged"
        )
    if not m.use_peft:
        raise ValueError(f"model {source} is an adapter, and training goes on with it: set use_peft true")
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    if kind != "LORA":
        raise ValueError(
            f"model {source} is an adapter of the kind {kind}, and a recipe describes a LoRA one (lora_r, lora_alpha);"
            " train it in Python, with SoftGRPOTrainer"
        )
    whole = sorted(adapter.modules_to_save or []) or None
    given = sorted(m.lora_modules_to_save or []) or None
    pairs = [(name, getattr(m, name), getattr(adapter, theirs)) for name, theirs in OF_ADAPTER.items()]
    for name, ours, theirs in [*pairs, ("lora_modules_to_save", given, whole)]:
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours} in {recipe.path}, but the adapter {source}, with which training goes on, has "
                f"{theirs}"
            )


def check_thinking(thinking: Thinking, trained: Thinking | None, where: str) -> None:
    """Refuse a checkpoint that was trained for another layout of its thoughts.

    Args:
        trained: None for a model that was not trained by this package.
        where: what names `thinking`, for the message.
    """
    if trained is None:
        if thinking.phase == "latent":
            raise ValueError("phase latent needs a model trained for it; name a CODI recipe in warm_start")
        return
    shared = ["phase", "answer_prompt", "question_template"]
    if thinking.phase == "latent":  # in phase explicit it is a cap
        shared.insert(1, "num_thoughts")
    for name in shared:
        ours, theirs = getattr(thinking, name), getattr(trained, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r} in {where}, but the checkpoint was trained with {theirs!r}")
    # In phase explicit soft thoughts go on from a model that writes its reasoning: with all weight on one id a soft
    # token is that token.
    if thinking.phase == "latent" and trained.thought != thinking.thought and KINDS[trained.thought].discrete:
        raise ValueError(
            f"thought {thinking.thought} does not fit a checkpoint trained with thought {trained.thought}"
        )


def lora_config(recipe: Recipe) -> Any:
    """The adapter that the recipe asks for, or None."""
    m = recipe.model
    if not m.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=m.lora_r,
        lora_alpha=m.lora_alpha,
        lora_dropout=m.lora_dropout,
        target_modules=m.lora_target_modules,
        modules_to_save=m.lora_modules_to_save,
        use_dora=m.use_dora,
        use_rslora=m.use_rslora,
        task_type="CAUSAL_LM",
        revision=m.model_revision,  # of the base that the adapter is for
    )
