"""Wall time of a GRPO step, soft against discrete: this package's trainer beside stock TRL's, in one run.

    python benchmarks/grpo_step.py [--model models/smollm2-135m-instruct] [--prompts 4] [--group 8] [--length 64]

A step is rollout, reward and update. Both sides take the same model and LoRA adapter, prompts, group size and
micro-batches, and both make completions of exactly `length` positions (none ends early). Stock TRL decodes
with transformers' `generate`. Each side and round is a process of its own, in turn; the first step of a process
is a warm-up. Ratios, ours / stock, stand last: `token` is this package with discrete thoughts, `gumbel` with K slots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

SIDES = ("stock", "token", "gumbel")


def step_times(side: str, args: argparse.Namespace) -> list[float]:
    """Seconds of each step of one process, the first left out."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rl_soft.data import sources as data
    from rl_soft.model import policy
    from rl_soft.thoughts.layout import Layout
    from rl_soft.thoughts.thinking import Thinking
    from rl_soft.train.grpo import SoftGRPOTrainer

    torch.manual_seed(0)
    start = policy.load_policy(args.model)
    start.model.generation_config.eos_token_id = None
    thinking = Thinking(
        thought="token" if side != "gumbel" else "gumbel",
        phase="explicit",
        num_thoughts=args.length - args.answer,
        thought_k=args.k,
        end_of_thinking="\x00",  # never spelt by the model: the cap ends the thinking
        max_answer_tokens=args.answer,
    )
    layout = Layout(thinking, start.tokenizer)
    layout.forced_after_cap = layout.forced_after_end = []  # every position is sampled, as on the other side
    rows = data.load_rows("gsm_symbolic", "train", args.prompts * (args.steps + 1), 1, {}, None)
    dataset = Dataset.from_list([{"prompt": r.question, "id": r.id} for r in rows])
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(sum(ids) % 7) for ids in completion_ids]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: object, **__: object) -> None:
            self.times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=args.group,
            gradient_accumulation_steps=args.prompts,
            num_generations=args.group,
            max_completion_length=args.length,
            max_steps=args.steps + 1,
            generation_kwargs={"min_new_tokens": args.length} if side == "stock" else None,
            gradient_checkpointing=False,
            disable_dropout=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        kwargs = {
            "reward_funcs": reward,
            "args": config,
            "train_dataset": dataset,
            "processing_class": start.tokenizer,
            "peft_config": LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        }
        trainer: GRPOTrainer
        if side == "stock":
            trainer = GRPOTrainer(start.model, **kwargs)
        else:
            trainer = SoftGRPOTrainer(start.model, thinking=layout.thinking, ratio="joint", **kwargs)
            trainer.layout = layout
            trainer.eos_token_ids = [-1]  # no id ends a completion
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    if set(lengths) != {args.length}:
        raise SystemExit(f"{side}: completions of {min(lengths)} to {max(lengths)} positions, wanted {args.length}")
    return [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="`rl-soft fetch smollm2` makes it")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--answer", type=int, default=8, help="of them answer tokens")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(step_times(args.side, args)))
        return
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            times[side] += json.loads(out.strip().splitlines()[-1])
            print(f"{side}: {' '.join(f'{t:.1f}' for t in times[side])} s a step", flush=True)
    best = {side: min(values) for side, values in times.items()}
    steps = len(times["stock"])
    print(f"{args.prompts} prompts x {args.group} completions of {args.length} positions, shortest of {steps} steps")
    for side in SIDES[1:]:
        middle = statistics.median(times[side]) / statistics.median(times["stock"])
        print(f"{side} / stock: {best[side] / best['stock']:.2f} (medians {middle:.2f})")


if __name__ == "__main__":
    main()
