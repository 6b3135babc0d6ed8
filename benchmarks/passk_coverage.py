"""How often the 95 % intervals hold the truth, and how long a report takes.

    python benchmarks/passk_coverage.py [--repeats 1000] [--problems 300] [--samples 32]

Problems are drawn from a population whose chance of a correct sample is Beta(0.6, 0.9), then samples from problems, so
an interval must answer for both. The second model of a pair is the first with its log-odds raised by 0.7 on average
(sd 0.5 a problem). The family rows give 5 problems one difficulty. The naive row takes all samples for independent.
"""

import argparse
import math
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from rl_soft.evaluation import records, report
from rl_soft.evaluation.passk import bootstrap, paired_bootstrap, pass_at_k

KS = (1, 4, 16)
FAMILY = 5


def population(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(2, size) chances of a correct sample, of both models."""
    a = np.clip(rng.beta(0.6, 0.9, size), 1e-6, 1 - 1e-6)
    odds = np.log(a / (1 - a)) + rng.normal(0.7, 0.5, size)
    return a, 1 / (1 + np.exp(-odds))


def coverage(repeats: int, num_problems: int, n: int, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    many = population(rng, 2_000_000)
    truth = {k: [float(np.mean(1 - (1 - chance) ** k)) for chance in many] for k in KS}
    hits: dict[str, int] = {}

    def count(name: str, low: float, high: float, value: float) -> None:
        hits[name] = hits.get(name, 0) + (low <= value <= high)

    families = np.repeat(np.arange(num_problems // FAMILY), FAMILY).tolist()
    for _ in range(repeats):
        correct_a, correct_b = (rng.binomial(n, chance) for chance in population(rng, num_problems))
        of_families = rng.binomial(n, population(rng, len(families) // FAMILY)[0][families])
        for k in KS:
            a, b = pass_at_k(np.full(num_problems, n), correct_a, k), pass_at_k(np.full(num_problems, n), correct_b, k)
            interval, difference = bootstrap(a, num_resamples=2000), paired_bootstrap(a, b, num_resamples=2000)
            count(f"pass@{k}", interval.low, interval.high, truth[k][0])
            count(f"paired pass@{k}", difference.low, difference.high, truth[k][1] - truth[k][0])
            values = pass_at_k(np.full(len(families), n), of_families, k)
            interval = bootstrap(values, families, num_resamples=2000)
            count(f"pass@{k}, families", interval.low, interval.high, truth[k][0])
        rate = correct_a.sum() / (n * num_problems)
        half = 1.96 * math.sqrt(rate * (1 - rate) / (n * num_problems))
        count("pass@1, naive", rate - half, rate + half, truth[1][0])
    return {name: hit / repeats for name, hit in hits.items()}


def report_seconds(num_problems: int = 1000, n: int = 64) -> tuple[float, float, float, float]:
    """(seconds of build, its processor seconds, MB of records.jsonl, MB of report.html); 500 letters a completion."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        header = {"name": "x", "model": "m", "dataset": "d", "split": "test", "decoder": {}, "seed": 0}
        records.write_header(folder, {**header, "n": n, "num_problems": num_problems})
        rows = []
        for i, chance in enumerate(rng.beta(0.6, 0.9, num_problems)):
            for sample in range(records.GREEDY, n):
                right = rng.random() < chance
                answer = str(i if right else int(rng.integers(1, 50)) + i)
                fixed = {"question_hash": str(i), "question": "Why? " * 30, "gold": str(i), "family": None, "seed": 0}
                rows.append(
                    {
                        **fixed,
                        "problem_id": f"p{i:04d}",
                        "sample": sample,
                        "outcome": "correct" if right else "wrong",
                        "prediction": answer,
                        "text": "Then add the two and carry the one. " * 14 + answer,
                        "thoughts": 6,
                        "answer_tokens": 120,
                        "truncated": False,
                    }
                )
        with records.Writer(Path(folder) / "records.jsonl") as writer:
            writer.append(*rows)
        start, busy = time.perf_counter(), time.process_time()
        report.build(folder)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        sizes = [(Path(folder) / name).stat().st_size / 1e6 for name in ("records.jsonl", "report.html")]
    return seconds, busy, sizes[0], sizes[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # n < 2k is deliberate here
    seconds, busy, read, written = report_seconds()
    print(f"report from 1,000 problems x 64 samples ({read:.0f} MB): {seconds:.1f} s, of the processor {busy:.1f} s")
    print(f"its report.html: {written:.1f} MB")
    shares = coverage(arguments.repeats, arguments.problems, arguments.samples)
    error = 100 * math.sqrt(0.95 * 0.05 / arguments.repeats)
    print(
        f"coverage of 95 % intervals, P = {arguments.problems}, n = {arguments.samples}, standard error {error:.1f}:"
    )
    for name, share in shares.items():
        print(f"  {name:20} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
