"""ROUGE-L of two sequences (Lin 2004), with the definition of the package `rouge-score`: the F-measure of the longest
common subsequence, 2 P R / (P + R) with P = L / |candidate| and R = L / |reference|, which is 2 L / (|a| + |b|).

Sequences are compared id by id, so a text's ids stand for its words. The table of `rouge-score` is quadratic in memory
and filled cell by cell in Python, which chains of ten thousand ids do not allow; here a row is one numpy pass.
"""

from collections.abc import Sequence

import numpy as np


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence.

    One row of the table from the one above: L[i, j] = max(L[i-1, j], L[i, j-1], L[i-1, j-1] + [a_i = b_j]), in which
    L[i, j-1] is the running maximum of the rest.
    """
    other = np.asarray(b)
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for item in a:
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + (other == item)))
    return int(row[-1])


def rouge_l(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """In [0, 1]; 0 where either is empty."""
    if not len(reference) or not len(candidate):
        return 0.0
    return 2 * common_length(reference, candidate) / (len(reference) + len(candidate))
