r"""Fuzzes math_accuracy and measures its throughput.

    python benchmarks/fuzz_rewards.py [--completions 100000] [--seed 0]

The completions: deep nesting, 100 kB of braces, 9**9**9 and towers of powers, null bytes, broken unicode, echoes of
the prompt, many boxed answers, hedges. The checks: no exception, one reward for each completion, only 0, 1 and None,
no hedge rewarded, and no call over its limit. The last lines are the figures.
"""

import argparse
import random
import time

from rewards import math_accuracy, symbolic

BATCH = 64
LIMIT = symbolic.BATCH_SECONDS + symbolic.WALL_SECONDS + 10  # for one call, symbolic answers included
FRAGMENTS = [
    *(
        "{",
        "}",
        "\\",
        "$",
        "####",
        "\\boxed{",
        "\\boxed{3}",
        "\\frac{",
        "\\frac12",
        "\\text{",
        "\\(",
        "\\)",
        "\\[",
        "\n",
        " ",
    ),
    *(
        "The answer is ",
        "Answer: ",
        "so ",
        " or ",
        " and ",
        ", ",
        "=",
        "-",
        "−",
        "+",
        "/",
        "%",
        "1,234",
        "12",
        "0.5",
        "1e400",
    ),
    *(
        "½",
        "\u2009",
        "\x00",
        "\ud800",
        "\udfff",
        "\U0001f600",
        "\u202e",
        "é",
        "９",
        "<think>",
        "</think>",
        "A",
        "(B)",
        "yes",
    ),
    *(
        "9**9**9",
        "9^{9^{9}}",
        "1/0",
        "1e999999999",
        "π",
        "√",
        "x",
        "^",
        "_",
        "|",
        "\\pm",
        "\\infty",
        "\\begin{pmatrix}",
    ),
    # what a sentence says, units, words, tags: the rest of the grammar
    *(
        "not ",
        "isn't ",
        "at least ",
        " or more",
        "half of ",
        " squared",
        " minus ",
        "negative ",
        " if ",
        "No wait, it's ",
    ),
    *(
        " of the ",
        " which is ",
        "- ",
        "— ",
        " km/h",
        " cm²",
        " theta",
        " dozen",
        "K",
        "€",
        "USD ",
        "'",
        "_2",
        "!",
        "¢",
        "…",
    ),
    *(
        "<answer>",
        "</answer>",
        "<|im_end|>",
        "twelve",
        "forty-two ",
        "1.234,56",
        "12 345",
        "1'234",
        "0.\\overline{3}",
        "(3)",
    ),
    *(
        "\\cup",
        "\\in",
        "\\{",
        "\\}",
        " < x \\le ",
        "[0,1)",
        "]0,1[",
        "\\pmod{7}",
        "\\emptyset",
        "{1 \\over 3}",
        "\\mathrm{m}",
        "\\frac{m}{s}",
    ),
    *(
        "(C) ",
        "rules out ",
        " vitamin C",
        "选B",
        "option b",
        "is wrong",
        "no doubt",
        "true",
        "¬",
        "10⁻³",
        "∛2",
        "Guess 2: ",
        "Mr. ",
    ),
]
HEDGES = [
    *(
        "The answer is {} or {}.",
        "\\boxed{{{}}}, \\boxed{{{}}}",
        "\\boxed{{{}, {}}}",
        "#### {} or {}",
        "#### {}\n#### {}",
    ),
    *(
        "It is either {} or {}.",
        "{}, {}",
        "{} or \\boxed{{{}}}",
        "The answer is {}. The answer is {}.",
        "$\\boxed{{{}}}$ or ${}$",
    ),
]
LARGE = [
    "{",
    "}",
    "{}",
    "\\boxed{",
    "\\boxed{1}",
    "9",
    "9**",
    "1,11,",
    "the answer is ",
    "3 or ",
    "$1",
    "\\(",
    "####",
    "\x00",
    "not 5, ",
    "5 or more ",
    "half of 5 ",
    "1 000 ",
    "1'000",
    "5 km/h ",
    "twenty ",
    "no wait, it's ",
    "<answer>",
    "- 5\n",
    "5 apples ",
    "(5 ",
    "x^{2}",
    "\\text{m}",
    "\\cup",
    "5 of the ",
    "A is wrong, ",
    "— 5 ",
    "~1/2",
    "\\over",
    "guess 2",
]
GOLDS = [
    "3",
    "1234",
    "0.5",
    "-7",
    "1/3",
    "50%",
    "(1, 2)",
    "3, 4",
    "Evelyn",
    "5 km",
    "1010_2",
    "0.3333333333",
    "12 eggs",
]
EXPRESSIONS = [
    "\\sqrt{2}",
    "x+1",
    "[0, 1)",
    "10!",
    "\\{1, 2\\}",
    "x > 3",
    "ab",
]  # golds for which answers go to math-verify
ATTACKS = ["9^{9^{9^9}}", "10!!!!", "9^{9^9}", "\\sqrt{10^{10^{6}}+1}", "10^{-10^{9}}"]
PROMPT = "How many apples are 1 + 2 apples? Put the answer in \\boxed{}, or after ####, as in #### 5."


def completion(rng: random.Random, kind: float) -> tuple[str, str, bool]:
    """(text, gold, whether it hedges)"""
    gold = rng.choice(GOLDS if rng.random() < 0.98 else EXPRESSIONS)
    number = str(rng.randint(-999, 9999))
    if kind < 0.60:
        return "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 40))), gold, False
    if kind < 0.75:
        other = str(rng.randint(10_000, 99_999))
        return rng.choice(HEDGES).format(*rng.sample([number, other], 2)), number, True
    if kind < 0.85:
        return PROMPT + rng.choice(["", " ", PROMPT, number, f"\\boxed{{{number}}}"]), gold, False
    if kind < 0.95:
        return " ".join(f"\\boxed{{{rng.randint(0, 9)}}}" for _ in range(rng.randint(2, 50))), gold, False
    if kind < 0.985:
        depth = rng.randint(10, 2000)
        return "\\boxed{" + "{" * depth + number + "}" * rng.choice([depth, depth - 1, depth + 1]) + "}", gold, False
    if kind < 0.9998:
        return bytes(rng.randrange(256) for _ in range(200)).decode("utf-8", "surrogateescape"), gold, False
    return f"\\boxed{{{rng.choice(ATTACKS)}}}", "2\\pi", False


def fuzz(completions: int, large: int, seed: int) -> None:
    rng = random.Random(seed)
    size = 100_000
    texts = [completion(rng, rng.random()) for _ in range(completions - large)]
    for i in range(large):
        unit = LARGE[i % len(LARGE)]
        texts.insert(rng.randrange(len(texts)), ((unit * (size // len(unit) + 1))[:size], rng.choice(GOLDS), False))
    counts: dict[float | None, int] = {}
    metrics: dict[str, float] = {}
    slowest, rewarded_hedges, start = 0.0, 0, time.perf_counter()

    def log_metric(name: str, value: float) -> None:
        metrics[name] = metrics.get(name, 0.0) + value

    for first in range(0, len(texts), BATCH):
        batch, golds, hedges = zip(*texts[first : first + BATCH], strict=True)
        began = time.perf_counter()
        rewards = math_accuracy([PROMPT] * len(batch), list(batch), list(golds), log_metric=log_metric)
        slowest = max(slowest, time.perf_counter() - began)
        assert len(rewards) == len(batch), "a misaligned list"
        assert set(rewards) <= {0.0, 1.0, None}, rewards
        rewarded_hedges += sum(bool(reward and hedge) for reward, hedge in zip(rewards, hedges, strict=True))
        for reward in rewards:
            counts[reward] = counts.get(reward, 0) + 1
    seconds = time.perf_counter() - start
    assert slowest < LIMIT, f"a call took {slowest:.1f} s, over its limit of {LIMIT:.0f} s"
    assert rewarded_hedges == 0, f"{rewarded_hedges} hedges were rewarded"
    print(f"fuzzed {len(texts)} completions ({large} of 100 kB) in {seconds:.0f} s: no exception, no misaligned list")
    print(f"rewards {counts}; hedges rewarded: {rewarded_hedges}")
    print(f"grader failures {metrics['math_accuracy/grader_failures']:.0f}; slowest call of {BATCH}: {slowest:.1f} s")


def throughput(completions: int) -> None:
    """Plain numeric answers, each different, in every form; process time, so one core."""
    forms = ["{}", "#### {}", "\\boxed{{{}}}", "The answer is {}.", "so she has 3 + 4 = {} apples"]
    work = "First there are {0} and then 3 more, so {0} + 3 = {1}.\n"
    for form in forms:
        golds = [str(i) for i in range(completions)]
        texts = [("" if form == "{}" else work.format(i - 3, i)) + form.format(i) for i in range(completions)]
        start = time.process_time()
        rewards = math_accuracy([""] * completions, texts, golds)
        rate = completions / (time.process_time() - start)
        assert rewards == [1.0] * completions
        print(f"{rate:8,.0f} completions/s a core: {form!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=100_000, help="fuzzed completions")
    parser.add_argument("--large", type=int, default=280, help="of these, completions of 100 kB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fuzz(args.completions, args.large, args.seed)
    throughput(20_000)
