"""How often a model writes its end of thinking in other tokens than the end alone has.

    python benchmarks/end_of_thinking.py [MODEL] [--problems 64] [--samples 2]

Word problems behind three worked examples, whose solutions end with ` #### ANSWER`; the default model is the one that
`rl-soft fetch smollm2` makes. Of the completions whose thoughts hold the text `####` it prints the share that ended
there, and the share of ends that a comparison of ids (the end's own tokens) would have missed.
"""

from __future__ import annotations

import argparse

from rl_soft import Layout, Thinking, generate, load_policy, load_rows

END = "####"
EXAMPLES = [
    ("One pen costs 2 dollars. What do 3 pens cost?", "3 * 2 = 6", 6),
    ("Tom has 4 apples and buys 5. How many has he now?", "4 + 5 = 9", 9),
    ("A box has 3 rows of 5 eggs. How many eggs are in it?", "3 * 5 = 15", 15),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/smollm2-135m-instruct")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2)
    asked = parser.parse_args()
    policy = load_policy(asked.model)
    policy.tokenizer.chat_template = None
    shots = "".join(f"Question: {q}\nAnswer: {steps} {END} {answer}\n\n" for q, steps, answer in EXAMPLES)
    rows = load_rows("gsm_symbolic", "evaluation", asked.problems)
    prompts = [f"{shots}Question: {row.question}\nAnswer:" for row in rows]
    thinking = Thinking(
        thought="token", phase="explicit", end_of_thinking=END, num_thoughts=96, max_answer_tokens=8, temperature=0.7,
        thought_temperature=0.7,
    )  # fmt: skip
    layout = Layout(thinking, policy.tokenizer)
    made = generate(policy.model, policy.tokenizer, prompts, thinking=thinking, samples=asked.samples)
    written = heard = missed = 0
    for completion in (c for samples in made for c in samples):
        ids = completion.ids[: len(completion.thoughts)]
        if END in policy.tokenizer.decode(ids):
            written += 1
            heard += completion.thinking_end == "end"
            missed += ids[-len(layout.end_ids) :] != layout.end_ids
    print(f"{len(rows) * asked.samples} completions, {written} wrote {END!r} in their thoughts")
    print(f"heard: {heard / max(written, 1):.1%}; missed where ids are compared: {missed / max(written, 1):.1%}")


if __name__ == "__main__":
    main()
