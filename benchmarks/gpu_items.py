"""The items of `benchmarks/gpu.py`: each takes a `Bench` and returns what it measured."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from rl_soft.evaluation.provenance import git_commit, versions
from rl_soft.model import devices, head_triton
from rl_soft.model.head import soft_log_prob
from rl_soft.model.policy import character_tokenizer
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.rollouts import cuda_graphs
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.kernels import gpu_sampling
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

ROOT = Path(__file__).parents[1]
QWEN = {  # Qwen2.5-1.5B
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = QWEN | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip
SIZES = {
    False: {"config": QWEN, "rows": 64, "prompt": 256, "steps": 64, "positions": 8192, "copy": 2**30, "matmul": 8192,
            "small_steps": 20, "large_steps": 4, "completion": 128},
    True: {"config": TINY, "rows": 4, "prompt": 8, "steps": 6, "positions": 64, "copy": 2**20, "matmul": 128,
           "small_steps": 3, "large_steps": 2, "completion": 8},
}  # fmt: skip


NEVER = ";" * 8  # which random weights do not spell: thinking ends at its cap


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        sync()
        start = time.perf_counter()
        function()
        sync()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak(function: Callable[[], Any]) -> float | None:
    """GiB that a call takes beyond what is held; None without a GPU."""
    if not torch.cuda.is_available():
        function()
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


class Bench:
    def __init__(self, quick: bool) -> None:
        self.quick, self.device = quick, devices.device()
        if quick:
            torch.set_num_threads(1)  # of a machine that may be busy
        self.done: dict[str, Any] = {}  # by item: ok, result or error, seconds
        self.size: dict[str, Any] = SIZES[quick]
        self.dtype = torch.bfloat16 if devices.has_bfloat16() else torch.float32
        self.tokenizer = character_tokenizer("0123456789+-=;#")

    def model(self, dtype: torch.dtype | None = None) -> Any:
        config = AutoConfig.for_model(**self.size["config"])
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype or self.dtype).eval()

    def layout(self, thought: str = "gumbel", k: int = 8, answer: int = 2) -> Layout:
        thinking = Thinking(
            thought=thought, thought_k=k, phase="explicit", num_thoughts=self.size["steps"], end_of_thinking=NEVER,
            max_answer_tokens=answer,
        )  # fmt: skip
        return Layout(thinking, self.tokenizer)

    def rollout(self, model: Any, layout: Layout, rows: int | None = None) -> Any:
        """Rows of one prompt each; none ends before its cap."""
        rows, P = rows or self.size["rows"], self.size["prompt"]
        prompts = [[5 + (i + j) % 10 for j in range(P)] for i in range(rows)]
        return rollout(model, layout, prompts, torch.arange(rows), eos_ids=[-1])

    def step_ms(self, model: Any, layout: Layout) -> float:
        took = seconds(lambda: self.rollout(model, layout), 2)
        return 1000 * took / self.size["steps"]


# ---------------------------------------------------------------------------------------------------------------------
# Items


def environment(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {"commit": git_commit(), "versions": versions(), "device": bench.device}
    if bench.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= {"name": p.name, "gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    x = torch.zeros(1, device=bench.device)
    found |= {"bfloat16": devices.has_bfloat16(), "cudnn_attention": devices.has_cudnn_attention()}
    found |= {"head_kernels": head_triton.usable(x), "sampling_kernels": gpu_sampling.usable(x)}
    return found


def ceilings(bench: Bench) -> dict[str, float]:
    """Bytes per second of a copy (read and written), products per second, and what a small kernel takes in a graph."""
    n, x = bench.size["matmul"], torch.ones(bench.size["copy"], dtype=torch.uint8, device=bench.device)
    y, a = torch.empty_like(x), torch.ones(n, n, dtype=bench.dtype, device=bench.device)
    small = torch.ones(64, 1536, dtype=bench.dtype, device=bench.device)

    def many() -> None:
        for _ in range(200):
            small.mul_(1)

    run: Callable[[], Any] = many
    if bench.device == "cuda":
        many()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        run = graph.replay
    return {
        "copy_gb_per_s": 2 * x.numel() / seconds(lambda: y.copy_(x)) / 1e9,
        "tflop_per_s": 2 * n**3 / seconds(lambda: a @ a) / 1e12,
        "launch_us": seconds(run) / 200 * 1e6,
    }


def nan_probe(bench: Bench) -> dict[str, Any]:
    """Gradients that are not finite, by length and by whether cuDNN's attention may be taken."""
    found: dict[str, Any] = {}
    for allowed in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        for L in (64, 192, 704, 128, 130) if not bench.quick else (64, 130):
            generator = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(1, 1, L, 64, generator=generator).to(bench.device, bench.dtype) for _ in range(3))
            q, k = q * 0.1, k * 0.1
            q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            mask = torch.ones(L, L, dtype=torch.bool, device=bench.device).tril()[None, None]
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float().square().sum().backward()
            bad = sum(int((~x.grad.isfinite()).sum()) for x in (q, k, v) if x.grad is not None)
            found[f"length {L}, cudnn {'on' if allowed else 'off'}"] = bad
    devices.avoid_cudnn_attention()
    assert not any(n for name, n in found.items() if name.endswith("off")), found
    return found


def gpu_tests(bench: Bench) -> dict[str, Any]:
    what = ["tests/model/test_devices.py"] if bench.quick else ["-m", "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *what]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env={**os.environ})
    lines = run.stdout.strip().splitlines()
    assert run.returncode == 0, "\n".join(lines[-15:])
    return {"last_line": lines[-1] if lines else ""}


@contextlib.contextmanager
def without(graphs: bool, kernels: bool) -> Iterator[None]:
    """Switch graphs or sampling kernels off."""
    init, usable = cuda_graphs.Replay.__init__, gpu_sampling.usable
    if graphs:

        def off(self: Any, *args: Any) -> None:
            init(self, *args)
            self.on = False

        cuda_graphs.Replay.__init__ = off  # type: ignore[method-assign]
    if kernels:
        gpu_sampling.usable = lambda x: False  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda_graphs.Replay.__init__, gpu_sampling.usable = init, usable  # type: ignore[method-assign]


def rollouts(bench: Bench) -> dict[str, Any]:
    """Milliseconds per decode step, prefill included, of `rows` rows."""
    model, size = bench.model(), bench.size
    found: dict[str, Any] = {"rows": size["rows"], "prompt": size["prompt"], "steps": size["steps"]}
    before = cuda_graphs.recorded
    for name, layout in {"token": bench.layout("token", 1), "K=4": bench.layout(k=4), "K=8": bench.layout()}.items():
        found[f"{name} ms"] = bench.step_ms(model, layout)
    found["graphs recorded"] = cuda_graphs.recorded - before
    for name, off in {"graphs off": (True, False), "kernels off": (False, True), "both off": (True, True)}.items():
        with without(*off):
            found[f"K=8, {name} ms"] = bench.step_ms(model, bench.layout())
    P, steps = size["prompt"], size["steps"]
    ids = torch.full((size["rows"], P), 5, device=bench.device)
    new = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    found["generate ms"] = 1000 * seconds(lambda: model.generate(ids, **new), 1) / steps
    found["limit ms"] = limit_ms(bench, model)
    return found


def limit_ms(bench: Bench, model: Any) -> float | None:
    """What reading the weights and the keys and values once takes; None before `ceilings`."""
    if not bench.done.get("ceilings", {}).get("ok"):
        return None
    config, itemsize = model.config, bench.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * itemsize
    head = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head * itemsize
    keys = bench.size["rows"] * (bench.size["prompt"] + bench.size["steps"] / 2) * token
    return 1e3 * (weights + keys) / (bench.done["ceilings"]["result"]["copy_gb_per_s"] * 1e9)


def lora(bench: Bench) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bench.model(), LoraConfig(r=32, target_modules="all-linear")).eval()
    return {"K=8 ms": bench.step_ms(model, bench.layout())}


def gaps(bench: Bench) -> dict[str, dict[str, float]]:
    """Recorded log-densities less those of the training pass, nats: mean and largest."""
    found, layout = {}, bench.layout()
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}.items():
        model = bench.model(dtype)
        with torch.no_grad(), torch.autocast(bench.device, torch.bfloat16, enabled=name == "autocast"):
            made = bench.rollout(model, layout, rows=min(8, bench.size["rows"]))
            add_soft_forward(model)
            ids = torch.tensor(made.prompt_ids, device=bench.device)
            mask = torch.cat([torch.ones_like(ids), made.mask.long()], dim=1)
            recorded = made.support, made.log_weights, made.action_mask, made.thought_mask
            again = model(attention_mask=mask, soft=SoftInputs(ids, *recorded, layout.thinking)).log_probs
        off = (made.log_probs - again)[made.action_mask].abs()
        found[name] = {"mean": float(off.mean()), "largest": float(off.max())}
    return found


def head(bench: Bench) -> dict[str, Any]:
    """Forward and backward of the head over `positions` positions: seconds, and GiB beyond its inputs."""
    config, N, K = bench.size["config"], bench.size["positions"], 8
    V, H = config["vocab_size"], config["hidden_size"]
    generator = torch.Generator(bench.device).manual_seed(0)
    weight = torch.randn(V, H, generator=generator, device=bench.device).mul_(H**-0.5).to(bench.dtype)
    hidden = torch.randn(N, H, generator=generator, device=bench.device).to(bench.dtype).requires_grad_()
    support = torch.randint(V // K, (N, K), generator=generator, device=bench.device)
    support = support + torch.arange(K, device=bench.device) * (V // K)
    log_weights = torch.full((N, K), -math.log(K), device=bench.device)
    chunk = max(1, 2**27 // V)

    def lean(size: int) -> None:
        args = (hidden, weight, support, log_weights, 0.5, 0.8)
        soft_log_prob(*args, chunk_size=size, entropy_grad=False)[0].mean().backward()

    def plain() -> None:
        log_probs = ((hidden @ weight.T).float() / 0.8).log_softmax(-1)
        log_probs.gather(-1, support).sum(-1).mean().backward()

    def trl() -> None:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

        args = (hidden, weight, None, support[:, 0], 0.8, width, None, 1.0, ("log_probs", "entropy"))
        ChunkedLogProbFunction.apply(*args)[0].mean().backward()

    found: dict[str, Any] = {"positions": N, "chunk": chunk}
    sides = {"lean": lambda: lean(chunk), "lean, chunk x4": lambda: lean(4 * chunk), "plain": plain, "trl, token": trl}
    for name, side in sides.items():
        try:
            found[name] = {"seconds": seconds(side, 2), "gib": peak(side)}
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
    return found


def training(bench: Bench, model: Any, side: str, steps: int, adapter: bool) -> float:
    """Seconds per step of GRPO, the first left out; `side` stock is TRL's trainer with discrete tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rl_soft.train.grpo import SoftGRPOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            sync()
            times.append(time.perf_counter())

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    length, data = bench.size["completion"], [{"prompt": f"{i}+{i + 1}="} for i in range(4 * (steps + 2))]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, use_cpu=bench.device == "cpu", bf16=devices.has_bfloat16(), save_strategy="no",
            per_device_train_batch_size=8, gradient_accumulation_steps=4, num_generations=8, max_steps=steps + 1,
            max_completion_length=length, gradient_checkpointing=False, disable_dropout=True, report_to="none",
            disable_tqdm=True, logging_steps=100,
            generation_kwargs={"min_new_tokens": length} if side == "stock" else None,
        )  # fmt: skip
        peft = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
        given = (reward, args, Dataset.from_list(data), None, bench.tokenizer)
        trainer: Any
        if side == "stock":
            trainer = GRPOTrainer(model, *given, peft_config=peft)
        else:
            thinking = Thinking(
                thought=side, thought_k=1 if side == "token" else 8, phase="explicit", num_thoughts=length - 2,
                end_of_thinking=NEVER, max_answer_tokens=2,
            )  # fmt: skip
            trainer = SoftGRPOTrainer(model, *given, thinking=thinking, ratio="joint", peft_config=peft)
            trainer.eos_token_ids = [-1]
        trainer.add_callback(Clock())
        trainer.train()
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def grpo_small(bench: Bench) -> dict[str, float]:
    config = AutoConfig.for_model(**TINY | {"vocab_size": len(bench.tokenizer)})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return {"gumbel s": training(bench, model, "gumbel", bench.size["small_steps"], False)}


def grpo_large(bench: Bench) -> dict[str, float]:
    """Full weights (float32 masters) and LoRA (bfloat16), each beside TRL's own step."""
    found = {}
    for name, adapter in {"lora": True, "full": False}.items():
        for side in ("gumbel", "stock"):
            model = bench.model(None if adapter else torch.float32)
            model.config._name_or_path = model.name_or_path or "random"
            found[f"{name}, {side} s"] = training(bench, model, side, bench.size["large_steps"], adapter)
            del model
            if bench.device == "cuda":
                torch.cuda.empty_cache()
    return found


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of some decode steps goes: the kernels that take most of it, and how many there are."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    model, layout = bench.model(), bench.layout()
    layout.thinking = copy.copy(layout.thinking)
    bench.rollout(model, layout)
    on_gpu = bench.device == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as taken:
        bench.rollout(model, layout)
        sync()
    key = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    events = sorted(taken.key_averages(), key=key, reverse=True)
    top = [{"name": e.key[:80], "ms": key(e) / 1e3, "calls": e.count} for e in events[:25]]
    return {"kernels per step": sum(e.count for e in events) / bench.size["steps"], "top": top}
