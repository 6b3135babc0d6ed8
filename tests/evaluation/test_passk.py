"""The estimators against brute force, and the intervals against what must hold of them.

pytest tests/evaluation/test_passk.py
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from rl_soft.evaluation.passk import bootstrap, maj_at_n, paired_bootstrap, pass_at_k

SMALL = [(n, c, k) for n in range(1, 9) for c in range(n + 1) for k in range(1, n + 1)]


@pytest.mark.filterwarnings("ignore:pass@")
def test_pass_at_k_is_the_mean_over_all_subsets():
    for n, c, k in SMALL:
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == sum(map(any, subsets)) / len(subsets)


def partitions(total: int, largest: int) -> list[list[int]]:
    """All ways to hand out at most `total` wrong votes; what is left abstains."""
    ways = [[]]
    for first in range(1, min(total, largest) + 1):
        ways += [[first, *rest] for rest in partitions(total - first, first)]
    return ways


def test_maj_at_n_is_the_plurality():
    for n, c in {(n, c) for n, c, _ in SMALL}:
        for wrong in partitions(n - c, n):
            votes = Counter({"right": c, **dict(enumerate(wrong))})
            leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
            assert maj_at_n(n, c, wrong) == (("right" in leaders) / len(leaders) if c else 0)


def test_pass_at_k_of_arrays_and_integers():
    values = pass_at_k(np.array([8, 16]), np.array([4, 8]), 1)
    assert values.shape == (2,)
    assert values[0] == values[1] == 0.5  # equal rates are equal floats: they count as tied
    assert isinstance(pass_at_k(4, 2, 1), float)
    assert pass_at_k(10_000, 5_000, 5_000) == 1.0
    assert pass_at_k(200, 1, 100) == 0.5


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 2, 5, "pass@5 needs 5 samples"),
        ([8, 4], [1, 1], 5, "one has 4"),
        (4, 2, 0, "at least 1"),
        (4, 5, 1, "between 0 and num_samples"),
        (4, -1, 1, "between 0 and num_samples"),
        (4.0, 2, 1, "integers"),
        (np.array([], int), np.array([], int), 1, "no problems"),
        ([], [], 1, "no problems"),
    ],
)
def test_pass_at_k_refuses(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


def test_pass_at_k_warns_where_the_estimate_is_unsteady():
    with pytest.warns(UserWarning, match="draw n >= 16"):
        pass_at_k(15, 3, 8)


def test_pass_at_k_is_silent_where_n_is_enough(recwarn):
    pass_at_k(16, 3, 8)
    assert not recwarn


@pytest.mark.parametrize("arguments", [(4, 5, []), (4, 2, [3]), (4, -1, []), (4, 2, [0])])
def test_maj_at_n_refuses(arguments):
    with pytest.raises(ValueError):
        maj_at_n(*arguments)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).random(2000)
    interval = bootstrap(values)
    se = values.std() / math.sqrt(len(values))
    assert interval.mean == values.mean()
    assert interval.se == pytest.approx(se, rel=0.03)
    assert interval.low == pytest.approx(values.mean() - 1.96 * se, abs=0.1 * se)
    assert interval.high == pytest.approx(values.mean() + 1.96 * se, abs=0.1 * se)
    assert bootstrap(values) == interval
    assert bootstrap(values, seed=1) != interval


@pytest.mark.parametrize("resamples", [-1, 0, 1])
def test_an_interval_needs_two_resamples(resamples):
    for made in (lambda: bootstrap([0.0, 1.0], num_resamples=resamples),
                 lambda: paired_bootstrap([0.0, 1.0], [1.0, 1.0], num_resamples=resamples)):  # fmt: skip
        with pytest.raises(ValueError, match=f"num_resamples must be at least 2 .* not {resamples}"):
            made()


def test_families_are_resampled_whole():
    rng = np.random.default_rng(0)
    families = np.repeat(np.arange(100), 5)
    values = rng.random(100)[families]  # five copies of each: no more evidence than one
    alone, clustered = bootstrap(values), bootstrap(values, families.tolist())
    assert clustered.se == pytest.approx(math.sqrt(5) * alone.se, rel=0.05)
    assert clustered.mean == alone.mean
    each = bootstrap(values, [str(i) for i in range(500)])
    assert each.se == pytest.approx(alone.se, rel=1e-12)


def test_families_of_unequal_size_weigh_by_their_problems():
    interval = bootstrap([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"])
    assert interval.mean == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_paired_bootstrap_is_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 17, (2, 300)) / 16
    for families in (None, [i // 3 for i in range(300)]):
        forth, back = paired_bootstrap(a, b, families), paired_bootstrap(b, a, families)
        assert back.mean == pytest.approx(-forth.mean, abs=1e-15)
        assert back.low == pytest.approx(-forth.high, abs=1e-12)
        assert back.high == pytest.approx(-forth.low, abs=1e-12)
        assert back.se == pytest.approx(forth.se, abs=1e-12)
        assert (back.gained, back.lost, back.tied) == (forth.lost, forth.gained, forth.tied)
        assert 1 - 0.01 < forth.share_not_positive + back.share_not_positive < 1 + 0.01


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    a = rng.beta(0.4, 0.4, 400)
    b = np.clip(a + rng.normal(0.05, 0.05, 400), 0, 1)
    unpaired = math.hypot(bootstrap(a).se, bootstrap(b).se)
    assert paired_bootstrap(a, b).se < 0.2 * unpaired
    assert paired_bootstrap(a, b).share_not_positive == 0
    assert paired_bootstrap(a, a).share_not_positive == 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"families": ["f"]}, "1 families for 2 values"),
        ({"level": 1.0}, "between 0 and 1"),
        ({"b": [1.0]}, "cannot pair 2 problems with 1"),
        ({"b": [1.0, math.nan]}, "number 1 is not"),
        ({"b": [[1.0, 1.0]]}, "shape"),
    ],
)
def test_paired_bootstrap_refuses(keywords, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{"a": [0.0, 1.0], "b": [1.0, 1.0], **keywords})
