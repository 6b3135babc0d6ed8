"""Pass@k, maj@n and their intervals. Numpy only.

Shapes: P problems, n samples of each, F families of problems, R resamples.

`pass_at_k` is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374). Intervals resample problems, not draws:
samples of one problem are not independent evidence about the data set (Miller 2024, arXiv 2411.00640). They are
bias-corrected and accelerated (BCa; Efron 1987, JASA 82): for skewed values plain percentiles cover too little.

Where we differ: binomials are exact integers, so equal rates are equal floats.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over problems, its interval, and its standard error (the sd of the resampled means)."""

    mean: float
    low: float
    high: float
    se: float


@dataclass(frozen=True)
class PairedInterval(Interval):
    """The mean of b - a over the same problems.

    share_not_positive: share of the resampled differences that are <= 0.
    gained, lost, tied: problems whose value rose, fell, stayed.
    """

    share_not_positive: float
    gained: int
    lost: int
    tied: int


def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: int) -> float | Floats:
    """The chance that at least one of k samples, drawn without replacement, is correct: 1 - C(n-c, k) / C(n, k).

    Args:
        num_samples: n, an integer or (P,) integers.
        num_correct: c, an integer or (P,) integers, 0 <= c <= n.
        k: the number of tries, 1 <= k <= every n.

    Returns:
        A float for two integers, else (P,) float64, one estimate for each problem; unbiased for every n >= k.

    Raises:
        ValueError: k > n, k < 1, or c outside 0..n.

    Warns:
        UserWarning: n < 2k for some problem. The estimate is still unbiased, but near k = n it rests on few subsets.
    """
    n, c = np.broadcast_arrays(np.asarray(num_samples), np.asarray(num_correct))
    if n.size == 0:
        raise ValueError(f"pass@{k} of no problems: num_samples is empty")
    if n.dtype.kind not in "iu" or c.dtype.kind not in "iu":
        raise ValueError(f"num_samples and num_correct must be integers, not {n.dtype} and {c.dtype}")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if k > n.min():
        raise ValueError(f"pass@{k} needs {k} samples of every problem; one has {n.min()}. Choose k <= {n.min()}")
    if (c < 0).any() or (c > n).any():
        raise ValueError("num_correct must lie between 0 and num_samples")
    if n.min() < 2 * k:
        warnings.warn(f"pass@{k} from n = {n.min()} samples: draw n >= {2 * k} for a steady estimate", stacklevel=2)
    estimate = np.array([_pass_at_k(*pair, k) for pair in zip(n.flat, c.flat, strict=True)]).reshape(n.shape)
    return estimate if n.ndim else float(estimate)


@lru_cache(maxsize=1 << 16)
def _pass_at_k(n: int, c: int, k: int) -> float:
    n, c = int(n), int(c)
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets


def maj_at_n(num_samples: int, num_correct: int, wrong_votes: Sequence[int]) -> float:
    """The chance that the plurality of all n samples is the right answer: 1, or 0, or 1 / (1 + t) at a tie with t.

    Ties are broken by a fair draw among the leaders. Samples without an answer, n - c - sum(wrong_votes), abstain; if
    all abstain the vote is lost.

    Args:
        num_samples: n.
        num_correct: c, samples with the right answer.
        wrong_votes: how many samples gave each distinct wrong answer.

    Raises:
        ValueError: more votes than samples, or an answer without votes.
    """
    if num_correct < 0 or min(wrong_votes, default=1) < 1 or num_correct + sum(wrong_votes) > num_samples:
        raise ValueError(f"{num_correct} right and {list(wrong_votes)} wrong votes do not fit {num_samples} samples")
    tied = sum(votes == num_correct for votes in wrong_votes)
    return 1 / (1 + tied) if num_correct and num_correct >= max(wrong_votes, default=0) else 0.0


def bootstrap(
    values: ArrayLike,
    families: Sequence[object] | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of one value per problem, with its BCa bootstrap interval.

    Args:
        values: (P,) one number for each problem, such as `pass_at_k`.
        families: (P,) labels of groups of dependent problems; whole families are resampled. None: each problem alone.
        level: coverage of the interval, 0 < level < 1.
        num_resamples: R, at least 2.
        seed: the interval is a function of the arguments alone.

    Values that are all equal give an interval without width: the bootstrap cannot see what did not happen.

    Raises:
        ValueError: no values, a value that is not finite, families of another length, level outside (0, 1), or
            num_resamples below 2.
    """
    values_P = _per_problem(values)
    means_R, influence_F = _resample(values_P, families, num_resamples, seed)
    return Interval(float(values_P.mean()), *_spread(means_R, values_P.mean(), influence_F, level))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    families: Sequence[object] | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedInterval:
    """The mean of b - a over the same problems in the same order, resampling problems (or families).

    Args:
        a, b: (P,) one number for each problem.
        families, level, num_resamples, seed: as in `bootstrap`.

    Raises:
        ValueError: different lengths, or what `bootstrap` refuses.
    """
    a_P, b_P = _per_problem(a), _per_problem(b)
    if len(a_P) != len(b_P):
        raise ValueError(f"cannot pair {len(a_P)} problems with {len(b_P)}")
    delta_P = b_P - a_P
    means_R, influence_F = _resample(delta_P, families, num_resamples, seed)
    return PairedInterval(
        float(delta_P.mean()),
        *_spread(means_R, delta_P.mean(), influence_F, level),
        share_not_positive=float((means_R <= 1e-12).mean()),  # a sum of floats that should be 0 may not be
        gained=int((delta_P > 0).sum()),
        lost=int((delta_P < 0).sum()),
        tied=int((delta_P == 0).sum()),
    )


def _per_problem(values: ArrayLike) -> Floats:
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1 or values_P.size == 0:
        raise ValueError(f"need one value for each problem, shape (P,), not {values_P.shape}")
    if not np.isfinite(values_P).all():
        raise ValueError(f"values must be finite; number {np.flatnonzero(~np.isfinite(values_P))[0]} is not")
    return values_P


def _resample(
    values_P: Floats, families: Sequence[object] | None, num_resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Means over problems of F families drawn with replacement (R,), and each family's pull on the mean (F,).

    Without families each problem is its own.
    """
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be at least 2 to have a spread, not {num_resamples}")
    sums_F: Floats = values_P
    sizes_F: Floats | None = None
    if families is not None:
        if len(families) != len(values_P):
            raise ValueError(f"{len(families)} families for {len(values_P)} values")
        index = {family: i for i, family in enumerate(dict.fromkeys(families))}
        family_P = np.array([index[family] for family in families])
        sums_F = np.bincount(family_P, weights=values_P).astype(np.float64)
        sizes_F = np.bincount(family_P).astype(np.float64)
    rng = np.random.default_rng(seed)
    means_R = np.empty(num_resamples)
    rows = max(1, (1 << 20) // len(sums_F))  # bounds the memory, not the result
    for start in range(0, num_resamples, rows):
        drawn = rng.integers(len(sums_F), size=(min(rows, num_resamples - start), len(sums_F)))
        problems = len(sums_F) if sizes_F is None else sizes_F[drawn].sum(axis=1)
        means_R[start : start + rows] = sums_F[drawn].sum(axis=1) / problems
    return means_R, sums_F - values_P.mean() * (1 if sizes_F is None else sizes_F)


def _spread(means_R: Floats, mean: float, influence_F: Floats, level: float) -> tuple[float, float, float]:
    """(low, high, se): the BCa interval of the resampled means, and their standard deviation."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    normal = NormalDist()
    below = ((means_R < mean).mean() + (means_R <= mean).mean()) / 2
    bias = normal.inv_cdf(min(max(below, 1 / len(means_R)), 1 - 1 / len(means_R)))
    variance = float((influence_F**2).sum())
    acceleration = float((influence_F**3).sum()) / (6 * variance**1.5) if variance > 1e-18 else 0.0
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(share)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means_R, ends)
    return float(low), float(high), float(means_R.std())
