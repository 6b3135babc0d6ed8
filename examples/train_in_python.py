"""GRPO over soft thoughts from Python, cell by cell.

    python examples/train_in_python.py [MODEL] [STEPS]

MODEL is a hub id or a folder; the default is the one that `rl-soft fetch smollm2` makes.
"""

# %% Problems: any rows with a column `prompt` (text, or chat messages) and what the reward reads, here `answer`.
import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from trl import GRPOConfig

from rewards.accuracy import math_accuracy
from rl_soft import Layout, SoftGRPOTrainer, Thinking, generate, load_rows

model = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 3
out = Path("runs/train_in_python")
out.mkdir(parents=True, exist_ok=True)

rows = load_rows("chain_sum", "train", 64, 1, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
with open(out / "problems.jsonl", "w") as file:
    for row in rows:
        file.write(json.dumps({"prompt": row.question, "answer": row.answer}) + "\n")

# %% What a thought is: a mixture of 4 token ids with Gumbel-Softmax noise, until the model has said "####".
thinking = Thinking(
    thought="gumbel",
    phase="explicit",
    num_thoughts=16,
    thought_k=4,
    thought_tau=0.5,
    end_of_thinking="####",
    max_answer_tokens=6,
)

# %% The trainer is TRL's, with one more argument.
trainer = SoftGRPOTrainer(
    model=model,
    reward_funcs=math_accuracy,
    args=GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=8,
        num_generations=4,
        learning_rate=1e-5,
        max_steps=steps,
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=str(out / "problems.jsonl"), split="train"),
    thinking=thinking,
)
trainer.train()
trainer.save_model(str(out / "model"))

# %% What it logged: `rollout/density_gap` says how exact the log-densities of this run were.
for line in trainer.state.log_history:
    if "reward" in line:
        print({key: round(line[key], 6) for key in ("reward", "thoughts/count", "rollout/density_gap")})

# %% How it thinks now: the strongest id of each thought, and the answer.
layout: Layout = trainer.layout
for samples in generate(trainer.model, layout.tokenizer, [rows[0].question], thinking=thinking, samples=2):
    for completion in samples:
        print(repr(completion.thought_text), "->", repr(completion.answer))
