"""The CPU kernels of a rollout's step beside PyTorch's: all products of one step, and attention of one position a row.

    python benchmarks/cpu_kernels.py        # one minute on 2 cores

Shapes of SmolLM2-135M in float32, every layer with weights of its own, so that they come from memory as in a rollout.
Sides take turns, `--rounds` times; the fastest counts. The last column has the weights where a mapped safetensors file
may have them, 40 bytes into a cache line, and not at its beginning (`policy.align`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rl_soft.rollouts.kernels import cpu as cpu_kernels

LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
SHAPES = LAYER * 30 + ((49152, 576),)
HEADS, KV_HEADS, HEAD = 9, 3, 64


def fastest(rounds: int, *sides: Callable[[], object]) -> list[float]:
    """Seconds of each side."""
    best = [float("inf")] * len(sides)
    for _ in range(rounds + 1):
        for i, side in enumerate(sides):
            started = time.perf_counter()
            side()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def linears(offset: int) -> list[nn.Linear]:
    """The products of a step; weights begin `offset` numbers into a cache line."""
    made = []
    for N, K in SHAPES:
        module = nn.Linear(1, 1, bias=False)
        block = torch.randn(N * K + 32)
        start = offset + (-block.data_ptr() % 64) // 4
        module.weight = nn.Parameter(block[start : start + N * K].view(N, K), requires_grad=False)
        made.append(module)
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--columns", type=int, default=200, help="positions that attention sees")
    args = parser.parse_args()
    kernels = cpu_kernels.library()
    if kernels is None:
        raise SystemExit("the kernels need a CPU with AVX2 or AVX-512, and a C compiler")
    aligned, shifted = linears(0), linears(10)

    def products(x: dict[int, Tensor], modules: list[nn.Linear], ours: bool) -> Callable[[], None]:
        def run() -> None:
            for m in modules:
                row = x[m.weight.shape[1]]
                cpu_kernels._linear(kernels, m, row) if ours else F.linear(row, m.weight)

        return run

    print("rows | products of a step, ms: PyTorch, ours, ratio | attention of a layer: the same | shifted, ours = 1")
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        x = {K: torch.randn(rows, K) for K in (576, 1536)}
        q = torch.randn(rows, HEADS, 1, HEAD)
        k, v = torch.randn(2, rows, KV_HEADS, args.columns, HEAD)
        module = nn.Module()

        def theirs(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            for _ in range(30):
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, module: nn.Module = module) -> None:
            for _ in range(30):
                cpu_kernels._attention(kernels, theirs, module, q, k, v)

        torch_s, ours_s, shifted_s = fastest(
            args.rounds, products(x, aligned, False), products(x, aligned, True), products(x, shifted, True)
        )
        torch_a, ours_a = fastest(args.rounds, theirs, ours)
        print(
            f"{rows:4d} | {torch_s * 1e3:6.1f} {ours_s * 1e3:6.1f} {torch_s / ours_s:5.2f} | "
            f"{torch_a / 30 * 1e3:6.3f} {ours_a / 30 * 1e3:6.3f} {torch_a / ours_a:5.2f} | {shifted_s / ours_s:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
