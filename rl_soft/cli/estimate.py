"""What a recipe needs, before anything is loaded: memory of each part and seconds per step, from the model's shape.

The model is made on torch's meta device, where tensors have shapes and no data: parameters, adapters and what autograd
keeps for the backward pass are counted there, not guessed. Speeds are measured on this machine, in a second.

Left out: the allocator's fragmentation, buffers of the communication library, what the data set takes, and the memory
of the CUDA context, about half a GiB.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from rl_soft.config.arguments import EstimateArguments
from rl_soft.config.recipe import RL_METHODS, Recipe, batch_plan, warm_start_of
from rl_soft.model.policy import character_tokenizer
from rl_soft.rollouts.engine import PREFILL_TOKENS
from rl_soft.train.precision import settled
from rl_soft.train.start import lora_config

GIB = 2**30
FLOAT32 = 4
PASSES = 3  # forward, and twice as much backward; one more with gradient checkpointing


@dataclass
class Estimate:
    """Bytes per process; seconds per step."""

    model: str
    dtype: str
    parameters: int
    trained: int
    asked: EstimateArguments
    completion_tokens: int
    rows: int  # completions of one process: of its rollout, or of one forward pass where there is none
    always: dict[str, float] = field(default_factory=dict)
    rollout: dict[str, float] = field(default_factory=dict)
    update: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        """The larger of the two phases, which do not overlap."""
        return sum(self.always.values()) + max(sum(self.rollout.values()), sum(self.update.values()))


def estimate(recipe: Recipe, asked: EstimateArguments, speeds: tuple[float, float, float] | None = None) -> Estimate:
    """What one process needs for a step of a recipe whose completions all have their full length.

    Args:
        speeds: see `measure_speeds`; None measures them.

    Raises:
        ValueError: a batch that does not divide over the processes; a model that is not there.
    """
    if asked.fsdp and asked.zero:
        raise ValueError(f"fsdp true and zero {asked.zero} both divide a model; take one of them")
    recipe = settled(recipe, asked.zero > 0)
    model = meta_model(recipe)
    config, size, rl = model.config.get_text_config(), model.dtype.itemsize, recipe.method in RL_METHODS
    V, T, processes = config.vocab_size, completion_length(recipe), asked.processes
    stage = 3 if asked.fsdp else asked.zero  # of what is divided
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = batch_size(recipe)
    rows = batch_plan(recipe, processes)["steps_per_generation"] * batch if rl else batch
    made = Estimate(type(model).__name__, str(recipe.model.dtype), total, trained, asked, T, rows)

    trained_size = FLOAT32 if recipe.model.use_peft else size  # adapters are float32
    weights = (total - trained) * size + trained * trained_size - saved_by_4bit(recipe, model, size)
    made.always["weights"] = weights / (processes if stage == 3 else 1)
    made.always["gradients"] = trained * trained_size / (processes if stage >= 2 else 1)
    master = FLOAT32 if asked.zero and trained_size < FLOAT32 else 0
    moments = 2 * (FLOAT32 if asked.zero else trained_size)
    made.always["optimizer (AdamW)"] = trained * (master + moments) / (processes if stage else 1)
    if float(recipe.training.get("beta") or 0) and rl and not recipe.model.use_peft:
        made.always["reference model"] = total * size / (processes if stage == 3 else 1)

    length = asked.prompt_tokens + T
    checkpointing = bool(recipe.training.get("gradient_checkpointing", False))
    made.update["activations"] = saved_bytes(model, batch, length, checkpointing)
    chunk = getattr(recipe.extra, "chunk_size", None)
    lean = (512 if torch.cuda.is_available() else 32) * 2**20
    logits = chunk * V * FLOAT32 if chunk else min(lean, batch * T * V * FLOAT32)
    made.update["logits"] = 3 * (logits if rl else batch * length * V * FLOAT32)
    if stage == 3:
        made.rollout["weights, gathered"] = weights * (1 - 1 / processes)
    if rl:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * head_size * size
        at_once = PREFILL_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]
        prompts = max(1, min(rows // group_size(recipe), at_once // asked.prompt_tokens))
        made.rollout["cache"] = (rows * length + prompts * asked.prompt_tokens) * token
        made.rollout["logits"] = 5 * rows * V * FLOAT32
        if float(recipe.training.get("beta") or 0):
            made.always["reference's states"] = rows * T * config.hidden_size * size
        made.rollout["records"] = rows * T * (16 * recipe.thinking.support_size(V) + 40)
    made.seconds = step_seconds(recipe, made, model, speeds or measure_speeds(model.dtype))
    return made


def saved_by_4bit(recipe: Recipe, model: Any, size: int) -> float:
    """Bytes by which weights of 4 bits are smaller: of the linear layers, without head and adapter. A block of 64 has
    a float32 scale, or with nested scales one byte and its part of theirs."""
    if not recipe.model.load_in_4bit:
        return 0.0
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]
    scale = (1 + FLOAT32 / 256) / 64 if recipe.model.use_bnb_nested_quant else FLOAT32 / 64
    return sum(m.weight.numel() for m in linears) * (size - 0.5 - scale)


def batch_size(recipe: Recipe) -> int:
    return int(recipe.training.get("per_device_train_batch_size", 8))


def group_size(recipe: Recipe) -> int:
    return int(recipe.training.get("num_generations", 8))


def completion_length(recipe: Recipe) -> int:
    """The most positions of a completion; an explicit end of thinking and an answer prompt are counted by letters."""
    t = recipe.thinking
    return t.num_thoughts + len(t.end_of_thinking) + len(t.answer_prompt) + 1 + t.max_answer_tokens


def meta_model(recipe: Recipe) -> Any:
    """The recipe's model, with its adapter, on the meta device; of a warm start, the model that it starts from."""
    m = recipe.model
    warm_start = warm_start_of(recipe)
    source = warm_start.model if warm_start is not None and not m.model_config else m
    attention = m.attn_implementation if m.attn_implementation != "float64" else "eager"
    if source.model_config:
        values = dict(source.model_config)
        tokens = len(character_tokenizer(source.vocabulary or ""))
        config = AutoConfig.for_model(values.pop("model_type"), vocab_size=tokens, **values)
    else:
        config = AutoConfig.from_pretrained(str(source.model_name_or_path), revision=source.model_revision)
    if attention and "flash" not in attention:  # which is not there for a device without data
        config._attn_implementation = attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, m.dtype or "float32"))
        if (adapter := lora_config(recipe)) is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter).base_model.model
    return model


def saved_bytes(model: Any, batch: int, length: int, checkpointing: bool) -> float:
    """What autograd keeps of one pass over (batch, length); with checkpointing, each layer's input and one layer."""
    config = model.config.get_text_config()
    one, two = (_saved(model, batch, n) for n in (64, 128))
    quadratic = max(0.0, (two - 2 * one) / (128**2 - 2 * 64**2))  # the scores, which only eager attention keeps
    linear = (one - quadratic * 64**2) / 64
    if config._attn_implementation != "eager":
        quadratic = 0.0
    total = linear * length + quadratic * length**2
    if not checkpointing:
        return total
    inputs = config.num_hidden_layers * batch * length * config.hidden_size * model.dtype.itemsize
    return inputs + total / config.num_hidden_layers


def _saved(model: Any, batch: int, length: int) -> float:
    """Bytes that autograd keeps of the backbone, counted on the meta device: each storage once, no parameters."""
    seen: dict[int, Tensor] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in parameters:
            seen[x.untyped_storage()._cdata] = x  # held, so that the key stays its own
        return x

    H = model.config.get_text_config().hidden_size
    embeds = torch.zeros(batch, length, H, dtype=model.dtype, device="meta", requires_grad=True)
    mask = torch.zeros(batch, 1, length, length, dtype=model.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    return float(sum(x.untyped_storage().nbytes() for x in seen.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Time


def measure_speeds(dtype: torch.dtype, n: int | None = None, repeats: int = 3) -> tuple[float, float, float]:
    """Multiply-adds per second of a product of two (n, n), bytes read per second, seconds of a small operation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = n or (8192 if device == "cuda" else 1024)

    def best(function: Any) -> float:
        times = []
        for _ in range(repeats + 1):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    x, flat = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n * n * 16, dtype=dtype, device=device)
    small = torch.ones(64, 64, dtype=dtype, device=device)
    products, read = n**3 / best(lambda: x @ x), flat.numel() * flat.element_size() / best(lambda: flat.sum())
    return products, read, best(lambda: [small.mul(2) for _ in range(100)]) / 100


def step_seconds(recipe: Recipe, made: Estimate, model: Any, speeds: tuple[float, float, float]) -> dict[str, float]:
    """Rollout and update of one rollout's worth of completions, at full length."""
    products, read, small = speeds
    config = model.config.get_text_config()
    L, size, rl = config.num_hidden_layers, model.dtype.itemsize, recipe.method in RL_METHODS
    head = config.hidden_size * config.vocab_size
    body = made.parameters - head * (1 if config.tie_word_embeddings else 2)
    P, T, rows = made.asked.prompt_tokens, made.completion_tokens, made.rows
    operations = 50 * L  # small operations of one pass
    seconds: dict[str, float] = {}
    if rl:
        token = made.rollout["cache"] / (rows * (P + T))
        step = max(((body + head) * size + rows * (P + T / 2) * token) / read, rows * (body + head) / products)
        prefill = rows / group_size(recipe) * P * body / products
        seconds["rollout"] = prefill + T * (step + (operations + 100) * small)
    passes = PASSES + (1 if recipe.training.get("gradient_checkpointing") else 0)
    work = rows * ((P + T) * body + T * head) * passes / products
    iterations = int(recipe.training.get("num_iterations", 1)) if rl else 1
    seconds["update"] = iterations * (work + passes * operations * small * max(1, rows // batch_size(recipe)))
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# Text


def describe(recipe: Recipe, made: Estimate, memory: float | None) -> str:
    """The table that `rl-soft estimate` prints; `memory` in GiB."""
    asked = made.asked
    divided = "FSDP2" if asked.fsdp else f"ZeRO {asked.zero}"
    lines = [
        f"{recipe.path}: {made.model}, {made.dtype}, {made.parameters / 1e6:,.2f} M parameters, "
        f"{made.trained / 1e6:,.2f} M trained",
        f"{asked.processes} process(es), {divided}; prompts of {asked.prompt_tokens} and completions of "
        f"{made.completion_tokens} tokens at most",
        "",
        "GiB per process",
    ]
    for phase, parts in (("always", made.always), ("rollout", made.rollout), ("update", made.update)):
        lines += [f"  {phase:8s} {name:22s} {value / GIB:9.3f}" for name, value in parts.items()]
    lines += [f"  {'peak':31s} {made.peak / GIB:9.3f}", ""]
    lines += [f"seconds per step, {name:8s} {value:12.2f}" for name, value in made.seconds.items()]
    if memory is not None:
        fits = made.peak <= memory * GIB
        lines += ["", f"{'fits in' if fits else 'does NOT fit in'} {memory:g} GiB"]
        lines += [] if fits else ["  " + text for text in advice(recipe, made)]
    return "\n".join(lines) + "\n"


def advice(recipe: Recipe, made: Estimate) -> list[str]:
    """What would make the largest part smaller."""
    phase = made.rollout if sum(made.rollout.values()) > sum(made.update.values()) else made.update
    parts = {**made.always, **phase}
    largest = max(parts, key=lambda name: parts[name])
    hints = {
        "weights": "dtype bfloat16, load_in_4bit with use_peft, or ZeRO 3 or FSDP2 on more processes",
        "gradients": "use_peft true, or ZeRO 2 on more processes",
        "optimizer (AdamW)": "use_peft true, or ZeRO 1 on more processes",
        "reference model": "beta 0, or use_peft true, which needs no copy",
        "activations": f"gradient_checkpointing true, or per_device_train_batch_size below {batch_size(recipe)}",
        "logits": "a smaller chunk_size, or a smaller per_device_train_batch_size",
        "cache": "more processes or fewer prompts_per_step; a rollout over the free memory also splits by itself",
        "weights, gathered": "ZeRO 2, if the weights fit",
    }
    return [f"largest: {largest}, {parts[largest] / GIB:.2f} GiB; {hints.get(largest, 'fewer prompts_per_step')}"]
