"""How well one list of numbers orders another: Spearman's correlation and the weighted Kendall tau.

On the host in float64.  Few items (a pool of models) or, for Spearman, many (pairs of a dissimilarity matrix).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def average_ranks(values: Any) -> np.ndarray:
    """Ranks from 1, ``[n]``, smallest first; equal values share the mean of their ranks."""
    _, group, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation, ties by average ranks; NaN if one of the lists is constant.

    Raises:
      ValueError: different lengths, fewer than two values, or values that are not finite.
    """
    x, y = _columns(x, y)
    a, b = average_ranks(x), average_ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(a @ b / scale) if scale > 0 else float("nan")


def weighted_kendall_tau(x: Any, y: Any) -> float:
    """Kendall's tau with hyperbolic weights, ``scipy.stats.weightedtau``'s default (Vigna, WWW 2015).

    A pair counts ``1 / (1 + r_i) + 1 / (1 + r_j)`` with ranks r from 0 for the largest value, so that exchanges at
    the top matter most; the mean of ranking by (x, y) and by (y, x), lexicographically.  Ties enter as in tau-b.
    NaN if one of the lists is constant.  O(n^2).

    Raises:
      ValueError: different lengths, fewer than two values, or values that are not finite.
    """
    x, y = _columns(x, y)
    sx, sy = (np.sign(v[:, None] - v[None, :]) for v in (x, y))

    def tau(first, second):
        rank = np.empty(len(first))
        rank[np.lexsort((second, first))[::-1]] = np.arange(len(first))
        weight = 1 / (1 + rank)
        weight = weight[:, None] + weight[None, :]
        scale = np.sqrt(np.sum(weight * sx * sx)) * np.sqrt(np.sum(weight * sy * sy))
        return np.sum(weight * sx * sy) / scale if scale > 0 else np.nan

    return float((tau(x, y) + tau(y, x)) / 2)


def _columns(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"a rank correlation compares two lists of one length, got {list(x.shape)} and {list(y.shape)}"
        )
    if len(x) < 2:
        raise ValueError(f"a rank correlation needs two values or more, got {len(x)}")
    for name, v in (("first", x), ("second", y)):
        if not np.isfinite(v).all():
            raise ValueError(f"value {int((~np.isfinite(v)).argmax())} of the {name} list is not finite")
    return x, y
