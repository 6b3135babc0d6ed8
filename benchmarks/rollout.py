"""The rollout engine beside transformers' `generate` and vLLM: tokens a second, peak memory, share of the limit.

    python benchmarks/rollout.py                  # SmolLM2-135M, 8 prompts x 8 rollouts: about ten minutes on 2 cores
    python benchmarks/rollout.py --sweep          # over prompt, group, spread, K, model; docs/rollout.png
    python benchmarks/rollout.py --quick          # two rows, to see that everything runs
    python benchmarks/rollout.py --model random:1.5b --dtype bfloat16 --prompts 8 --group 8 --longest 1024   # a GPU
    python benchmarks/rollout.py --engines ours,vllm,generate [--model ...]    # where vLLM is installed (docs/vllm.md)

Both sides take the same model, prompts, rollouts a prompt and lengths, which are forced: row i of a fixed shuffle ends
after `shortest` to `longest` positions, evenly spread; `generate` gets a stopping criterion a row. `generate` samples
ids from the whole softmax; ours samples ids (`token`) and soft tokens (`gumbel`, K slots), with all records; vLLM
makes the same two through the plugin, and its time holds the records, not the loading. Each side takes the batch size
that is fastest of `--batches`. Each measurement is a process of its own, after a short warm-up.
Sides take turns, `--rounds` times; the fastest counts. Memory is measured in runs of their own, in which the allocator
gives every page back at once: the largest resident set (GPU: allocated) less that of the loaded model.

The limit is that of the work that has to be done, each prompt once and each row to its own end: the sum over the steps
of the slower of two times, that of reading weights and cache once, at the bandwidth measured here, and that of the
multiplications, at the speed measured here on a large product, by PyTorch or by our kernels, whichever is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = {"generate": ("generate",), "ours": ("token", "gumbel"), "vllm": ("vllm-token", "vllm-gumbel")}
RANDOM = {  # shapes of Qwen2.5-1.5B, of SmolLM2-135M, and a small one
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "20m": (256, 768, 12, 4, 2, 16384),
    "tiny": (128, 256, 2, 4, 2, 512),
}


# ---------------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own


def load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer; `random:SIZE` has random weights and the character tokenizer, whose ids are made up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rl_soft.model import policy

    if not name.startswith("random:"):
        loaded = policy.load_policy(name, dtype)
        return loaded.model.to(device).eval(), loaded.tokenizer
    H, F, L, A, kv, V = RANDOM[name.removeprefix("random:")]
    config = AutoConfig.for_model(
        "llama", vocab_size=V, hidden_size=H, intermediate_size=F, num_hidden_layers=L, num_attention_heads=A,
        num_key_value_heads=kv, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval(), policy.character_tokenizer("0123456789+-=")


def caps_of(args: argparse.Namespace) -> list[int]:
    """The length of each row: evenly spread (on a log scale with --skewed), in a fixed shuffle."""
    B, low, high = args.prompts * args.group, args.shortest, args.longest
    share = [i / max(B - 1, 1) for i in range(B)]
    caps = [round(low * (high / low) ** s) if args.skewed else round(low + (high - low) * s) for s in share]
    random.Random(0).shuffle(caps)
    return caps


def memory(device: str, field: str) -> int:
    """Bytes in use now (VmRSS), or the most since `forget_peak` (VmHWM)."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds, and bytes beyond the loaded model, of one side."""
    if args.side.startswith("vllm"):
        return measure_vllm(args)
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from rl_soft.rollouts.engine import Engine
    from rl_soft.rollouts.kernels import cpu as cpu_kernels
    from rl_soft.rollouts.recording import Live, Walk
    from rl_soft.rollouts.state_machine import DONE
    from rl_soft.thoughts.layout import Layout
    from rl_soft.thoughts.thinking import Thinking

    if args.plain:
        cpu_kernels.library = lambda: None  # type: ignore[assignment]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(args.model, args.dtype, device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(model.config.vocab_size, 16000)
    ids = torch.randint(100 if vocabulary > 200 else 5, vocabulary, (args.prompts, args.prompt), generator=generator)
    caps = caps_of(args)

    def ours(rows: int, longest: int) -> None:
        thinking = Thinking(
            thought="token" if args.side == "token" else "gumbel", phase="explicit", num_thoughts=longest,
            thought_k=args.k, end_of_thinking="=", max_answer_tokens=1,
        )  # fmt: skip
        layout = Layout(thinking, tokenizer)
        layout.end, layout.forced_after_cap, layout.forced_after_end = None, [], []  # every position is sampled
        limits = torch.tensor([min(c, longest) for c in caps[:rows]], device=device)

        class Capped(Walk):
            def sample(self, live: Live, logits: Any, hidden: Any) -> None:
                super().sample(live, logits, hidden)
                live.stage[:] = torch.where(live.t >= limits[live.row], DONE, live.stage)
                live.t[:] = torch.where(live.stage == DONE, self.T, live.t)

        prompts = [p for p in ids.tolist() for _ in range(args.group)][:rows]
        budget = args.batch * (args.prompt + longest + 1)
        engine = Engine(model, layout, prompts, torch.arange(rows), [-1], budget, "none")
        engine.walk.__class__ = Capped
        out = engine.run()
        assert out.lengths.tolist() == limits.tolist()

    def generate(rows: int, longest: int) -> None:
        all_ids = ids.to(device).repeat_interleave(args.group, 0)[:rows]
        limits = torch.tensor([min(c, longest) for c in caps[:rows]], device=device)
        for start in range(0, rows, args.batch):
            part = slice(start, start + args.batch)

            class Stop(StoppingCriteria):
                def __call__(self, input_ids: Any, scores: Any, part: slice = part, **kwargs: Any) -> Any:
                    return limits[part] <= input_ids.shape[1] - args.prompt

            model.generate(
                all_ids[part], attention_mask=torch.ones_like(all_ids[part]), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=longest, eos_token_id=None, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Stop()]),
            )  # fmt: skip

    run = generate if args.side == "generate" else ours
    with torch.no_grad():
        run(2, 3)  # threads, lazily made buffers
        before = memory(device, "VmRSS")
        forget_peak(device)
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run(len(caps), args.longest)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": memory(device, "VmHWM") - before}


def measure_vllm(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a rollout by vLLM, which takes the share of the memory that it is told."""
    from rl_soft.rollouts.vllm import cpu
    from rl_soft.rollouts.vllm.options import check_vllm, engine_options

    check_vllm()
    import torch
    from vllm import LLM

    from rl_soft.rollouts.vllm.engine import assemble, positions_of, sampling_params
    from rl_soft.thoughts.layout import Layout
    from rl_soft.thoughts.thinking import Thinking

    model, tokenizer = load(args.model, args.dtype, "cpu")
    V, caps, folder = model.config.vocab_size, caps_of(args), args.model
    if folder.startswith("random:"):
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model
    # Every position is sampled: no row thinks to its cap, and none says this.
    thinking = Thinking(
        thought=args.side.removeprefix("vllm-"), phase="explicit", num_thoughts=args.longest + 1, thought_k=args.k,
        end_of_thinking="=-" * 8, max_answer_tokens=1,
    )  # fmt: skip
    layout, slots = Layout(thinking, tokenizer), thinking.support_size(V)
    llm = LLM(
        folder, dtype=args.dtype, max_model_len=args.prompt + args.longest + 2, max_num_seqs=args.batch,
        enforce_eager=cpu.installed(), **engine_options(folder, slots, args.longest + 1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(V, 16000), (args.prompts, args.prompt), generator=generator).tolist()

    def run(rows: int, longest: int) -> None:
        prompts = [p for p in ids for _ in range(args.group)][:rows]
        params = [sampling_params(layout, V, [V], None, seed) for seed in range(rows)]  # no id ends a row
        for wish, cap in zip(params, caps, strict=False):
            wish.max_tokens, wish.stop_token_ids = min(cap, longest), []
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        found = [list(positions_of(output.outputs[0].logprobs, V)) for output in outputs]
        out = assemble(layout, V, prompts, torch.arange(rows), [V], found, torch.device("cpu"))
        assert out.lengths.tolist() == [min(cap, longest) for cap in caps[:rows]]

    run(2, 3)
    llm.reset_prefix_cache()
    started = time.perf_counter()
    run(len(caps), args.longest)
    return {"seconds": time.perf_counter() - started, "bytes": float("nan")}


def limits(args: argparse.Namespace) -> dict[str, float]:
    """Bytes and multiply-adds a second that this machine reaches, and the shape of the model."""
    import torch

    from rl_soft.cli.estimate import measure_speeds
    from rl_soft.rollouts.kernels.cpu import library

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    n = 8192 if device == "cuda" else 2048
    products, read, _ = measure_speeds(dtype, n=n, repeats=7)
    if device == "cpu" and dtype == torch.float32 and (kernels := library()):
        x, y, best = torch.ones(n, n), torch.empty(n, n), float("inf")
        for _ in range(8):
            started = time.perf_counter()
            kernels.product(x.data_ptr(), x.data_ptr(), y.data_ptr(), n, n, n)
            best = min(best, time.perf_counter() - started)
        products = max(products, n**3 / best)
    model, _ = load(args.model, args.dtype, device)
    embedding = model.get_input_embeddings().weight
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    body = sum(p.numel() for p in model.parameters()) - embedding.numel()
    if not config.tie_word_embeddings:
        body -= embedding.numel()
    return {
        "bandwidth": read, "products": products, "body": body, "head": embedding.numel(), "size": dtype.itemsize,
        "cache": 2 * config.num_hidden_layers * config.num_key_value_heads * head,
        "attention": 2 * config.num_hidden_layers * config.num_attention_heads * head,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The table


def call(args: argparse.Namespace, env: dict[str, str] | None = None, **changes: Any) -> dict[str, float]:
    """`measure` (or `limits`) in a process of its own."""
    values = {**vars(args), **changes}
    command = [sys.executable, __file__, "--job", json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if done.returncode:
        raise SystemExit(f"{values['side']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak(args: argparse.Namespace, side: str) -> float:
    """MiB beyond the loaded model at the first of the batch sizes; glibc gives back what is freed."""
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return call(args, exact, side=side, batch=args.batches[0])["bytes"] / 2**20


def limit_seconds(args: argparse.Namespace, hardware: dict[str, float]) -> float:
    """The least time of the work that has to be done: each prompt once, then each row's own positions."""

    def seconds(rows: int, columns: float, products: float) -> float:
        read = (hardware["body"] + hardware["head"] + rows * columns * hardware["cache"]) * hardware["size"]
        return max(read / hardware["bandwidth"], products / hardware["products"])

    caps, P = caps_of(args), args.prompt
    prefill = args.prompts * (P * hardware["body"] + hardware["head"] + P * P / 2 * hardware["attention"])
    total = seconds(0, 0, prefill)
    for t in range(1, max(caps)):
        rows = sum(c > t for c in caps)
        total += seconds(rows, P + t, rows * (hardware["body"] + hardware["head"] + (P + t) * hardware["attention"]))
    return total


def compare(args: argparse.Namespace, hardware: dict[str, float]) -> dict[str, Any]:
    """The fastest time of each side, over its batch sizes and rounds; prints a line a side."""
    tokens, best = sum(caps_of(args)), {}
    for _ in range(args.rounds):
        for side in sides_of(args.engines):
            for batch in args.batches:
                found = {**call(args, side=side, batch=min(batch, args.prompts * args.group)), "batch": batch}
                if side not in best or found["seconds"] < best[side]["seconds"]:
                    best[side] = found
    least = limit_seconds(args, hardware)
    for side, found in best.items():
        print(
            f"  {side:11s} {tokens / found['seconds']:8.1f} tokens/s {found['seconds']:7.2f} s, "
            f"batch {found['batch']:3d}, {least / found['seconds']:4.0%} of the limit",
            flush=True,
        )
    return best


def sides_of(engines: str) -> list[str]:
    """What is measured of engines, given as `ours,vllm`."""
    unknown = [name for name in engines.split(",") if name not in ENGINES]
    if unknown:
        raise SystemExit(f"--engines must be of {','.join(ENGINES)}, got {engines}")
    return [side for name in engines.split(",") for side in ENGINES[name]]


def with_(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **changes})


def sweep(args: argparse.Namespace, hardware: dict[str, float]) -> None:
    """One thing changed at a time, at smaller sizes; and cost against work, drawn."""
    small = with_(args, prompts=4, group=8, shortest=8, longest=32, batches=[32], rounds=1)
    settings: dict[str, list[dict[str, Any]]] = {
        "prompt length": [{"prompt": p} for p in (35, 140, 280)],
        "rollouts a prompt": [{"prompts": 16, "group": 2}, {"prompts": 4, "group": 8}, {"prompts": 2, "group": 16}],
        "length spread": [{"shortest": 32}, {"shortest": 8}, {"shortest": 8, "skewed": True}],
        "slots K": [{"k": k} for k in (1, 8, 32)],
        "model": [{"model": "random:20m"}, {"model": args.model}],
    }
    for name, changes in settings.items():
        for change in changes:
            changed = with_(small, **change)
            print(f"{name}: {change}")
            best = compare(changed, call(changed, side="limits") if "model" in change else hardware)
            print(f"    generate / token {best['generate']['seconds'] / best['token']['seconds']:.2f}", end=", ")
            print(f"gumbel / token {best['gumbel']['seconds'] / best['token']['seconds']:.3f}")
    work = [with_(small, prompts=2, shortest=n, longest=n, batches=[16]) for n in (16, 32, 64, 128, 256)]
    lengths = {side: [call(w, side=side, batch=16) for w in work] for side in ("generate", "gumbel")}
    many = [with_(small, prompts=n // 8, shortest=32, longest=32, batches=[n]) for n in (8, 16, 32, 64)]
    rows = {side: [peak(w, side) for w in many] for side in ("generate", "gumbel")}
    draw(work, lengths, many, rows)


def draw(work: list, lengths: dict, many: list, rows: dict) -> None:
    """docs/rollout.png: seconds against positions generated, memory against live rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for side, name in (("generate", "transformers generate"), ("gumbel", "rl_soft, K = 8")):
        left.plot([sum(caps_of(w)) for w in work], [m["seconds"] for m in lengths[side]], marker="o", label=name)
        right.plot([w.batches[0] for w in many], rows[side], marker="o", label=name)
        print(f"{side}: seconds at 16 rows of 16 to 256: {[round(m['seconds'], 2) for m in lengths[side]]}")
        print(f"{side}: MiB at 8 to 64 rows of 32: {[round(mib) for mib in rows[side]]}")
    left.set(xlabel="positions generated, 16 rows", ylabel="seconds", xlim=0, ylim=0)
    right.set(xlabel="live rows", ylabel="memory beyond the model, MiB", xlim=0, ylim=0)
    left.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "rollout.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="`rl-soft fetch smollm2` makes it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=140, help="tokens of a prompt")
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--skewed", action="store_true", help="lengths evenly spread on a log scale: many short ones")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 32], help="batch sizes tried, on every side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="ours without the CPU kernels")
    parser.add_argument("--engines", default="generate,ours", help="of generate, ours and vllm, with commas between")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = argparse.Namespace(**json.loads(args.job))
        print(json.dumps(limits(job) if job.side == "limits" else measure(job)))
        return
    if args.quick:
        args = with_(args, prompts=2, group=2, prompt=20, shortest=2, longest=6, batches=[4])
    hardware = call(args, side="limits")
    print(f"this machine: {hardware['bandwidth'] / 1e9:.1f} GB/s read, {2 * hardware['products'] / 1e9:.0f} GFLOP/s")
    if args.sweep:
        sweep(args, hardware)
        return
    print(
        f"{args.prompts} prompts of {args.prompt} x {args.group} rollouts of {args.shortest} to {args.longest}"
        f"{', many short' if args.skewed else ''}; {args.model}"
    )
    best = compare(args, hardware)
    peaks = {side: peak(args, side) for side in best if not side.startswith("vllm")}
    print(
        f"peak memory at batch {args.batches[0]}: {', '.join(f'{side} {mib:.0f} MiB' for side, mib in peaks.items())}"
    )
    if {"gumbel", "generate"} <= peaks.keys():
        print(f"peak memory gumbel / generate: {peaks['gumbel'] / peaks['generate']:.2f}")
    ratios = [("generate", "token"), ("generate", "gumbel"), ("gumbel", "token")]
    for slow, fast in [*ratios, ("token", "vllm-token"), ("gumbel", "vllm-gumbel"), ("vllm-gumbel", "vllm-token")]:
        if slow in best and fast in best:
            print(f"{slow} / {fast} (K = {args.k}): {best[slow]['seconds'] / best[fast]['seconds']:.3f}")


if __name__ == "__main__":
    main()
