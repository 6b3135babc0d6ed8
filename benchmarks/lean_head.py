"""Memory and time of the lean head pass (`rl_soft.head.soft_log_prob`) against plain materialised logits.

    python benchmarks/lean_head.py [--n 4096 --v 49152 --h 576 --k 8 --rounds 3 --threads 2]

Each measurement is a process of its own, plain and lean in turn. It builds the inputs, runs a small warm-up, and then
a forward and a backward: extra memory is the high-water mark of the resident set less what was resident before, time
the shortest of the rounds. Both sides return the log-density and the entropy of `GumbelTopK`, and are timed with the
entropy detached (a metric) and with its gradient (a bonus). The plain side is the usual one: logits, log_softmax,
gather, and a logsumexp over the complement. Values and gradients are compared, with each other and with float64, on an
eighth of the rows. Ratios, lean / plain, stand last.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import subprocess
import sys
import time

import torch
from torch import Tensor, nn

from rl_soft import densities, head

TAU, TEMPERATURE = 0.5, 0.8


def plain(hidden: Tensor, lm_head: nn.Linear, support: Tensor, log_weights: Tensor, entropy_grad: bool):
    logits = lm_head(hidden) / TEMPERATURE  # (N, V)
    log_probs = logits.log_softmax(-1)
    outside = log_probs.scatter(-1, support, -torch.inf).logsumexp(-1)
    with torch.set_grad_enabled(entropy_grad):
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = log_probs.gather(-1, support)
    return densities.gumbel_topk_log_prob(chosen, outside, log_weights, TAU), entropy


def lean(hidden: Tensor, lm_head: nn.Linear, support: Tensor, log_weights: Tensor, entropy_grad: bool):
    return head.soft_log_prob(hidden, lm_head, support, log_weights, TAU, TEMPERATURE, entropy_grad=entropy_grad)


def inputs(n: int, args: argparse.Namespace, trained: bool):
    torch.manual_seed(0)
    lm_head = nn.Linear(args.h, args.v, bias=False).requires_grad_(trained)
    nn.init.normal_(lm_head.weight, std=args.h**-0.5)
    hidden = torch.randn(n, args.h).mul_(3).requires_grad_()
    support = (torch.randint(args.v, (n, 1)) + torch.arange(args.k) * (args.v // args.k)) % args.v  # distinct
    log_weights = torch.randn(n, args.k).log_softmax(-1)
    return hidden, lm_head, support, log_weights


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


def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    side, trained, entropy_grad = json.loads(args.child)
    if side == "compare":
        data = inputs(args.n // 8, args, trained)
        exact = (data[0].detach().double().requires_grad_(), copy.deepcopy(data[1]).double(), *data[2:])
        a, b, c = (step(f, d, entropy_grad) for f, d in ((lean, data), (plain, data), (plain, exact)))
        pairs = {"lean to plain": (a, b), "lean to float64": (a, c), "plain to float64": (b, c)}
        print(json.dumps({name: max(map(distance, *pair)) for name, pair in pairs.items()}))
        return
    data = inputs(args.n, args, trained)
    tiny = argparse.Namespace(v=64, h=8, k=args.k)
    step(globals()[side], inputs(4, tiny, trained), entropy_grad)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts again from here
    before = memory("VmRSS")
    start = time.perf_counter()
    step(globals()[side], data, entropy_grad)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 4096), ("v", 49152), ("h", 576), ("k", 8), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)

    def measure(*variant):
        command = [sys.executable, *sys.argv, "--child", json.dumps(variant)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    print(
        f"N {args.n}, V {args.v}, H {args.h}, K {args.k}, float32, {args.threads} threads, torch {torch.__version__}"
    )
    ratios = []
    for trained, entropy_grad in itertools.product((True, False), (False, True)):
        name = f"{'trained' if trained else 'frozen'} head, entropy {'with gradient' if entropy_grad else 'detached'}"
        runs: dict[str, list[dict]] = {"plain": [], "lean": []}
        for _ in range(args.rounds):
            for side in runs:
                runs[side].append(measure(side, trained, entropy_grad))
        best = {side: {key: min(r[key] for r in rs) for key in ("seconds", "bytes")} for side, rs in runs.items()}
        for side, b in best.items():
            print(f"{name}: {side} {b['seconds']:.2f} s, {b['bytes'] / 2**20:.0f} MiB")
        errors = ", ".join(f"{key} {value:.1e}" for key, value in measure("compare", trained, entropy_grad).items())
        ratio = {key: best["lean"][key] / best["plain"][key] for key in ("seconds", "bytes")}
        print(f"{name}: largest relative difference of values and gradients: {errors}")
        ratios.append(f"{name}: time {ratio['seconds']:.2f}, memory 1/{1 / ratio['bytes']:.1f}")
    print("\n".join(["", *ratios]))


if __name__ == "__main__":
    main()
