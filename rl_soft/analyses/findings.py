"""What the analyses share: figures with intervals over prompts, and claims held against them. Numpy only.

Thoughts of one trace are not independent evidence about a model, so prompts are resampled, each with all of its own.
Intervals are 95 % percentiles of the resampled figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2_000


@dataclass(frozen=True)
class Claim:
    """A finding of the paper and what these records say about it.

    holds: yes, no, in part, or undecided where the interval holds both.
    """

    text: str
    holds: str
    here: str


def resampled(
    groups: Sequence[Floats], statistic: Callable[[Floats], Any], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """A statistic of all rows of all groups, with its interval: {"value", "low", "high"}, floats or lists of them.

    Args:
        groups: for each prompt its rows, (n_i, ...); prompts without rows count for nothing. See `enough`.
        statistic: (N, ...) rows of several groups -> a float or (F,).
        seed: the interval is a function of the arguments alone.

    Raises:
        ValueError: fewer than two prompts with rows: an interval of one prompt would be that prompt, and look certain.
    """
    filled = [group for group in groups if len(group)]
    if not enough(groups):
        raise ValueError(f"an interval over prompts needs at least two that have thoughts, got {len(filled)}")
    rng = np.random.default_rng(seed)
    found = [
        statistic(np.concatenate([filled[i] for i in rng.integers(len(filled), size=len(filled))]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(np.array(found, dtype=np.float64), (0.025, 0.975), axis=0)
    value = np.asarray(statistic(np.concatenate(filled)), dtype=np.float64)
    return {"value": value.tolist(), "low": low.tolist(), "high": high.tolist()}


def enough(groups: Sequence[Floats], rows: int = 1) -> bool:
    """Whether there is something to resample: two prompts with rows, and so many rows in all."""
    return sum(len(group) > 0 for group in groups) >= 2 and sum(map(len, groups)) >= rows


def above(figure: dict[str, Any], level: float) -> str:
    """Whether a figure is above a level: yes or no where its whole interval is on one side, else undecided."""
    return "yes" if figure["low"] > level else "no" if figure["high"] < level else "undecided"


def shown(figure: dict[str, Any], digits: int = 3) -> str:
    """`0.12 (0.10 to 0.14)`, to so many significant digits."""
    value, low, high = (number(figure[key], digits) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def percent(figure: dict[str, Any], digits: int = 3) -> str:
    """A share: `12 % (10 to 14)`."""
    value, low, high = (number(100 * figure[key], digits) for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def number(value: float, digits: int = 3) -> str:
    """To so many significant digits, without an exponent where it is large."""
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in text else text.replace("-", "−")


def compact(values: Any, digits: int = 6) -> Any:
    """Floats of nested lists to so many significant digits: shorter records, and equal ones after a resume."""
    if isinstance(values, float):
        return float(f"{values:.{digits}g}")
    return [compact(value, digits) for value in values] if isinstance(values, list) else values
