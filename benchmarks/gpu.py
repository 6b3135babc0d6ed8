"""What this package does on a GPU, measured in one process and eight minutes.

    python benchmarks/gpu.py [--out docs/results/gpu.json]     on a GPU; a 1.5B model with random weights
    python benchmarks/gpu.py --quick                           anywhere; tiny models: that the script runs
    python benchmarks/gpu.py --only rollout head               some items

Each item has a deadline and stands by itself: what fails or is late is written down as that, and the next one begins.
The file is written after each item, and items that it holds are not measured again. Ratios, and the share of the
bandwidth's limit, are printed last. docs/gpu.md says how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_items as items
import torch

from rl_soft.files import write_atomic
from rl_soft.model import devices


class Late(Exception):
    pass


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


ITEMS: dict[str, tuple[int, Callable[[items.Bench], dict[str, Any]]]] = {  # seconds that it may take; 480 in all
    "environment": (20, items.environment), "ceilings": (20, items.ceilings), "nan_probe": (20, items.nan_probe),
    "rollout": (110, items.rollouts), "lora": (30, items.lora), "gaps": (30, items.gaps), "head": (40, items.head),
    "grpo_small": (30, items.grpo_small), "grpo_large": (90, items.grpo_large), "profile": (20, items.profile),
    "tests": (70, items.gpu_tests),
}  # fmt: skip


def ratios(done: dict[str, Any]) -> list[str]:
    """What the figures say; those that are missing are left out."""
    result = {name: item["result"] for name, item in done.items() if item.get("ok")}
    lines = []

    def line(text: str, over: Any, under: Any) -> None:
        if over and under:
            lines.append(f"{text}: {over / under:.2f}")

    r, h, g = result.get("rollout", {}), result.get("head", {}), result.get("grpo_large", {})
    line("decode step, graphs off / on", r.get("K=8, graphs off ms"), r.get("K=8 ms"))
    line("decode step, kernels off / on", r.get("K=8, kernels off ms"), r.get("K=8 ms"))
    line("decode step, K = 8 / token", r.get("K=8 ms"), r.get("token ms"))
    line("decode step, generate / ours (token)", r.get("generate ms"), r.get("token ms"))
    line("decode step, adapter / none", result.get("lora", {}).get("K=8 ms"), r.get("K=8 ms"))
    for name in ("lean, chunk x4", "plain", "trl, token"):
        if isinstance(h.get(name), dict):
            line(f"head, {name} / lean, time", h[name]["seconds"], h["lean"]["seconds"])
    for name in ("lora", "full"):
        line(f"GRPO step of {name}, ours / TRL's", g.get(f"{name}, gumbel s"), g.get(f"{name}, stock s"))
    line("share of the bandwidth's limit, K = 8", r.get("limit ms"), r.get("K=8 ms"))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="what is there is not measured again")
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), default=list(ITEMS), metavar="ITEM")
    args = parser.parse_args()
    devices.set_up()
    bench = items.Bench(args.quick)
    done = bench.done
    if args.out.exists():
        done.update(json.loads(args.out.read_text())["items"])
    for name in args.only:
        if done.get(name, {}).get("ok"):
            continue
        limit, item = ITEMS[name]
        start = time.perf_counter()
        try:
            with deadline(limit):
                done[name] = {"ok": True, "result": item(bench)}
        except Exception as error:  # whatever it is, the next item begins
            done[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        done[name]["seconds"] = round(time.perf_counter() - start, 1)
        write_atomic(args.out, json.dumps({"quick": args.quick, "items": done}, indent=1) + "\n")
        shown = done[name].get("result", done[name].get("error"))
        state = "ok" if done[name]["ok"] else "FAILED"
        print(f"{name}: {state}, {done[name]['seconds']} s; {str(shown)[:600]}", flush=True)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(ratios(done)))
    failed = [name for name in args.only if not done[name]["ok"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
