"""Memory and time of the lean head pass (`rl_soft.model.head.soft_log_prob`) against plain materialised logits.

    python benchmarks/lean_head.py [--n 4096 --v 49152 --h 576 --k 8 --rounds 3 --threads 2]

Each measurement is a process of its own, plain and lean in turn. It builds the inputs, runs a small warm-up, and then
a forward and a backward: extra memory is the high-water mark of the resident set less what was resident before, time
the shortest of the rounds. Both sides return the log-density and the entropy of `GumbelTopK`, and are timed with the
entropy detached (a metric) and with its gradient (a bonus). The plain side is the usual one: logits, log_softmax,
gather, and a logsumexp over the complement. Values and gradients are compared, with each other and with float64, on an
eighth of the rows. Ratios, lean / plain, stand last.

With a GPU (--device cuda, the default where there is one): N 16,384, V 151,936, H 1,536 and bfloat16 unless given. The
warm-up is a whole step, time is between CUDA events, extra memory the allocator's peak. Two more sides: "unfused", the
lean pass with the passes over a chunk in torch instead of `rl_soft.model.head_triton`, and "trl", at K = 1, the
chunked head that TRL's trainers use for discrete tokens (`trl.kernels.ChunkedLogProbFunction`).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from rl_soft.model import head
from rl_soft.model import head_triton as kernels
from rl_soft.thoughts import densities

TAU, TEMPERATURE = 0.5, 0.8
SIZES = {"cpu": {"n": 4096, "v": 49152, "h": 576, "k": 8}, "cuda": {"n": 16384, "v": 151936, "h": 1536, "k": 8}}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def plain(hidden: Tensor, lm_head: nn.Linear, support: Tensor, log_weights: Tensor, entropy_grad: bool):
    logits = lm_head(hidden)  # (N, V)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    logits = logits / TEMPERATURE
    log_probs = logits.log_softmax(-1)
    outside = log_probs.scatter(-1, support, -torch.inf).logsumexp(-1)
    with torch.set_grad_enabled(entropy_grad):
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = log_probs.gather(-1, support)
    return densities.gumbel_topk_log_prob(chosen, outside, log_weights, TAU), entropy


def lean(hidden: Tensor, lm_head: nn.Linear, support: Tensor, log_weights: Tensor, entropy_grad: bool):
    return head.soft_log_prob(hidden, lm_head, support, log_weights, TAU, TEMPERATURE, entropy_grad=entropy_grad)


def unfused(*args):
    kernels.usable = lambda logits: False
    return lean(*args)


def trl(hidden: Tensor, lm_head: nn.Linear, support: Tensor, log_weights: Tensor, entropy_grad: bool):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    outputs = ("log_probs", "entropy")
    args = (hidden, lm_head.weight, None, support[:, 0], TEMPERATURE, width, None, 1.0, outputs)
    log_prob, entropy, *_ = ChunkedLogProbFunction.apply(*args)
    return log_prob, entropy if entropy_grad else entropy.detach()


def inputs(n: int, args: argparse.Namespace, trained: bool, k: int):
    torch.manual_seed(0)
    lm_head = nn.Linear(args.h, args.v, bias=False).requires_grad_(trained)
    nn.init.normal_(lm_head.weight, std=args.h**-0.5)
    hidden = torch.randn(n, args.h).mul_(3)
    support = (torch.randint(args.v, (n, 1)) + torch.arange(k) * (args.v // k)) % args.v  # distinct
    log_weights = torch.randn(n, k).log_softmax(-1)
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    return hidden.to(**to).requires_grad_(), lm_head.to(**to), support.to(args.device), log_weights.to(args.device)


def step(side, data, entropy_grad: bool) -> list[Tensor]:
    hidden, lm_head, *_ = data
    hidden.grad = lm_head.weight.grad = None
    log_prob, entropy = side(*data, entropy_grad)
    (log_prob.mean() + (0.1 * entropy.mean() if entropy_grad else 0)).backward()
    return [log_prob.detach(), entropy.detach(), hidden.grad, lm_head.weight.grad]


def distance(x: Tensor | None, y: Tensor | None) -> float:
    return 0.0 if x is None or y is None else float((x - y).norm() / y.norm())


def memory(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def measure_on_cpu(side, args: argparse.Namespace, trained: bool, entropy_grad: bool, k: int) -> dict[str, float]:
    data = inputs(args.n, args, trained, k)
    tiny = argparse.Namespace(v=64, h=8, device=args.device, dtype=args.dtype)
    step(side, inputs(4, tiny, trained, k), entropy_grad)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts again from here
    before = memory("VmRSS")
    start = time.perf_counter()
    step(side, data, entropy_grad)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory("VmHWM") - before}


def measure_on_gpu(side, args: argparse.Namespace, trained: bool, entropy_grad: bool, k: int) -> dict[str, float]:
    data = inputs(args.n, args, trained, k)
    before = torch.cuda.memory_allocated()  # the inputs; gradients count as extra
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        step(side, data, entropy_grad)  # compiles the kernels
        data[0].grad = data[1].weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start.record()
        step(side, data, entropy_grad)
        end.record()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"seconds": math.inf, "bytes": math.inf}
    return {"seconds": start.elapsed_time(end) / 1000, "bytes": torch.cuda.max_memory_allocated() - before}


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    names, trained, entropy_grad, k = json.loads(args.child)
    sides = [globals()[name] for name in names]
    if len(sides) == 1:
        measure = measure_on_cpu if args.device == "cpu" else measure_on_gpu
        print(json.dumps(measure(sides[0], args, trained, entropy_grad, k)))
        return
    data = inputs(args.n // 8, args, trained, k)
    exact = (data[0].detach().double().requires_grad_(), copy.deepcopy(data[1]).double(), *data[2:])
    a, b, c = (step(f, d, entropy_grad) for f, d in ((sides[0], data), (sides[1], data), (plain, exact)))
    pairs = {f"{names[0]} to {names[1]}": (a, b), f"{names[0]} to float64": (a, c), f"{names[1]} to float64": (b, c)}
    print(json.dumps({name: max(map(distance, *pair)) for name, pair in pairs.items()}))


def shown(best: dict[str, float], device: str) -> str:
    if best["seconds"] == math.inf:
        return "out of memory"
    duration = f"{best['seconds']:.2f} s" if device == "cpu" else f"{1e3 * best['seconds']:.1f} ms"
    return f"{duration}, {best['bytes'] / 2**20:.0f} MiB"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name}", type=int)
    for name, default in (("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=list(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, default in {**SIZES[args.device], "dtype": DTYPES[args.device]}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def main() -> None:
    args = arguments()
    if args.child:
        return child(args)

    def measure(*variant):
        command = [sys.executable, *sys.argv, "--child", json.dumps(variant)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    on_gpu = args.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{args.threads} threads"
    print(f"N {args.n}, V {args.v}, H {args.h}, K {args.k}, {args.dtype}, {where}, torch {torch.__version__}")
    if on_gpu and not kernels.usable(torch.empty(0, device="cuda")):
        print("Triton is not installed: lean runs without its kernels")
    groups = [(["plain", "lean"], args.k)]
    if on_gpu:
        groups = [(["plain", "unfused", "lean"], args.k), (["trl", "lean"], 1)]
    ratios = []
    for trained, entropy_grad, (sides, k) in itertools.product((True, False), (False, True), groups):
        name = f"{'trained' if trained else 'frozen'} head, entropy {'with gradient' if entropy_grad else 'detached'}"
        name += f", K {k}" if on_gpu else ""
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                runs[side].append(measure([side], trained, entropy_grad, k))
        best = {side: {key: min(r[key] for r in rs) for key in ("seconds", "bytes")} for side, rs in runs.items()}
        for side in sides:
            print(f"{name}: {side} {shown(best[side], args.device)}")
        errors = measure(["lean", sides[0]], trained, entropy_grad, k)
        errors = ", ".join(f"{key} {value:.1e}" for key, value in errors.items())
        print(f"{name}: largest relative difference of values and gradients: {errors}")
        for other in sides[:-1]:
            if best[other]["seconds"] == math.inf:
                continue
            time_ratio = best["lean"]["seconds"] / best[other]["seconds"]
            memory_ratio = best[other]["bytes"] / best["lean"]["bytes"]
            pair = f"{name}, lean / {other}" if on_gpu else name
            ratios.append(f"{pair}: time {time_ratio:.2f}, memory 1/{memory_ratio:.1f}")
    print("\n".join(["", *ratios]))


if __name__ == "__main__":
    main()
