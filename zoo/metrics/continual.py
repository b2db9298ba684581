"""Metrics of continual learning: accuracy per session over seen classes, and the task matrix."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts ``[C, C]``: row the true class, column the predicted one."""
    flat = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def harmonic_mean(seen: float, unseen: float) -> float:
    """``2 s u / (s + u + 1e-12)`` (TEEN brief, metrics per session)."""
    return 2 * seen * unseen / (seen + unseen + 1e-12)


def session_metrics(confusion: np.ndarray, num_base: int, num_seen: int) -> dict[str, float]:
    """Metrics after one session, over test examples of the classes seen so far.

    Args:
      confusion: counts ``[C, C]`` from :func:`confusion_matrix`; rows of classes not seen yet do not count.
      num_base, num_seen: classes ``[0, num_base)`` are base, ``[num_base, num_seen)`` novel.

    Returns:
      ``accuracy`` over examples; ``seen`` and ``unseen``, the mean per-class accuracy of base and of novel classes;
      their ``harmonic`` mean; ``novel_as_base``, the share of novel examples taken for a base class (the false
      negatives TEEN is about), and ``base_as_novel``.  Novel figures are 0 before any novel class.

    Raises:
      ValueError: no example of any seen class.
    """
    rows = np.asarray(confusion, np.float64)[:num_seen]
    counts = rows.sum(1)
    if not counts.sum():
        raise ValueError(f"no test example belongs to the {num_seen} classes seen so far")
    hits = np.diag(rows[:, :num_seen])
    by_class = hits[counts > 0] / counts[counts > 0]
    is_base = (np.arange(num_seen) < num_base)[counts > 0]
    seen = float(by_class[is_base].mean()) if is_base.any() else 0.0
    unseen = float(by_class[~is_base].mean()) if (~is_base).any() else 0.0
    base, novel = rows[:num_base], rows[num_base:]
    return {
        "accuracy": float(hits.sum() / counts.sum()),
        "seen": seen,
        "unseen": unseen,
        "harmonic": harmonic_mean(seen, unseen),
        "novel_as_base": float(novel[:, :num_base].sum() / novel.sum()) if novel.sum() else 0.0,
        "base_as_novel": float(base[:, num_base:].sum() / base.sum()) if base.sum() else 0.0,
    }


def performance_drop(session_accuracies: np.ndarray) -> float:
    """PD: the first session's accuracy minus the last's."""
    return float(session_accuracies[0] - session_accuracies[-1])


def task_matrix(results: Mapping[tuple[int, int], float], tasks: int) -> np.ndarray:
    """``R[s, j]``, the metric on task j after learning task s, NaN where it was not measured."""
    matrix = np.full((tasks, tasks), np.nan)
    for (after, task), value in results.items():
        matrix[after, task] = value
    return matrix


def continual_summary(matrix: np.ndarray) -> dict[str, float]:
    """Figures of a full lower-triangular task matrix ``R[s, j]`` of a metric that is better when higher.

    Returns:
      ``final``: mean of the last row; ``incremental``: mean over s of the mean of row s up to s (average incremental
      accuracy); ``forgetting``: mean over j < T of ``max_{j <= s < T-1} R[s, j] - R[T-1, j]`` (Chaudhry et al. 2018);
      ``backward_transfer``: mean over j < T-1 of ``R[T-1, j] - R[j, j]`` (Lopez-Paz and Ranzato 2017).

    Raises:
      ValueError: an entry on or below the diagonal is missing.
    """
    tasks = len(matrix)
    lower = np.tril(np.ones((tasks, tasks), bool))
    if matrix.shape != (tasks, tasks) or np.isnan(matrix[lower]).any():
        where = np.argwhere(np.isnan(matrix) & lower)
        raise ValueError(f"the task matrix lacks R[{where[0][0]}, {where[0][1]}]" if len(where) else "not square")
    last = matrix[-1]
    earlier = range(tasks - 1)
    forgetting = [np.max(matrix[j : tasks - 1, j]) - last[j] for j in earlier]
    return {
        "final": float(last.mean()),
        "incremental": float(np.mean([matrix[s, : s + 1].mean() for s in range(tasks)])),
        "forgetting": float(np.mean(forgetting)) if tasks > 1 else 0.0,
        "backward_transfer": float(np.mean([last[j] - matrix[j, j] for j in earlier])) if tasks > 1 else 0.0,
    }
