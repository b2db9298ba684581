"""Verification at one global threshold: false accepts and rejects, by class, and OPIS, which measures their spread.

Two embeddings "match" if their Euclidean distance on the unit sphere is at most a threshold.  Everything is read off
histograms of distances per class, filled a block of rows at a time (memory: block x N and classes x thresholds), never
off an N x N matrix; histograms of row blocks add up, so hosts may share the work.  Counts are int64 on the host.

Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.ops.prototypes import l2_normalize

Rows = Float[np.ndarray, "n d"] | Float[Array, "n d"]
Labels = Int[np.ndarray, "k"] | Int[Array, "k"]


@dataclasses.dataclass(frozen=True)
class PairCounts:
    """How many pairs of each class lie within each threshold.

    Attributes:
      thresholds: ``[G]`` rising distances.
      positive: int64 ``[T, G]``, ordered pairs within the class with distance <= threshold.
      negative: int64 ``[T, G]``, pairs with exactly one member in the class with distance <= threshold.
      positives, negatives: int64 ``[T]``, all such pairs.
    """

    thresholds: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    def __add__(self, other: PairCounts) -> PairCounts:
        """The counts of two disjoint blocks of rows against the same columns."""
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError("counts at different thresholds cannot be added")
        names = ("positive", "negative", "positives", "negatives")
        return PairCounts(self.thresholds, *(getattr(self, n) + getattr(other, n) for n in names))

    @property
    def complete(self) -> np.ndarray:
        """bool ``[T]``: the classes that have a positive and a negative pair; the others have no error rates."""
        return (self.positives > 0) & (self.negatives > 0)


@jax.jit
def _block(rows, row_labels, row_ids, all_rows, all_labels, edges, classes):
    # [T, G + 1] counts by (class of the row, first threshold that the pair is within)
    cosine = jnp.matmul(rows, all_rows.T, precision="highest")
    distance = jnp.sqrt(jnp.maximum(2.0 - 2.0 * cosine, 0.0))
    bins = jnp.searchsorted(edges, distance, side="left")
    real = (row_ids[:, None] != jnp.arange(all_rows.shape[0])[None, :]) & (row_ids[:, None] >= 0)
    same = row_labels[:, None] == all_labels[None, :]
    count, width = classes.shape[0], edges.shape[0] + 1

    def table(chosen):
        slot = jnp.where(chosen, row_labels[:, None] * width + bins, count * width)
        return jax.ops.segment_sum(jnp.ones(slot.size, jnp.int32), slot.ravel(), count * width + 1)[:-1]

    return table(same & real).reshape(count, width), table(~same & real).reshape(count, width)


def pair_counts(
    embeddings: Rows,
    labels: Labels,
    thresholds: Sequence[float] | np.ndarray,
    num_classes: int | None = None,
    block: int = 256,
    rows: tuple[int, int] | None = None,
) -> PairCounts:
    """Counts the pairs of a test set by class and distance.

    Args:
      embeddings: any length, compared on the unit sphere.
      labels: classes in ``[0, T)``.
      thresholds: rising distances in [0, 2].
      num_classes: T; by default one more than the largest label.
      block: rows at a time.
      rows: half-open range of rows to count (a host's share); the columns are always all.

    Raises:
      ValueError: labels of another length or out of range, or thresholds that do not rise.
    """
    labels, edges = np.asarray(labels), np.asarray(thresholds, np.float32)
    if labels.shape != (len(embeddings),):
        raise ValueError(f"labels must be [{len(embeddings)}], one per embedding, got {list(labels.shape)}")
    if edges.ndim != 1 or not len(edges) or (np.diff(edges) < 0).any():
        raise ValueError("thresholds must be a rising list of at least one distance")
    total = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= total:
        raise ValueError(f"labels must lie in [0, {total}), got {labels.min()} to {labels.max()}")
    unit = l2_normalize(jnp.asarray(embeddings, jnp.float32))
    y, classes = jnp.asarray(labels, jnp.int32), jnp.arange(total)
    start, stop = (0, len(labels)) if rows is None else rows
    found = np.zeros((2, total, len(edges) + 1), np.int64)
    size = min(block, max(1, stop - start))
    for first in range(start, stop, size):
        ids = np.arange(first, first + size)
        ids = np.where(ids < stop, ids, -1)
        at = jnp.asarray(np.maximum(ids, 0))
        part = _block(unit[at], y[at], jnp.asarray(ids), unit, y, jnp.asarray(edges), classes)
        found += np.stack([np.asarray(p, np.int64) for p in part])
    within = np.cumsum(found, axis=2)
    return PairCounts(np.asarray(edges, np.float64), within[0, :, :-1], within[1, :, :-1], *within[:, :, -1])


def utility_curves(counts: PairCounts) -> np.ndarray:
    """``U_i(d) = 2 phi psi / (phi + psi)``, float64 ``[T', G]``, of the complete classes (tcm brief, OPIS).

    ``phi`` is the share of the class's positive pairs within the threshold (1 - FRR), ``psi`` that of its negative
    pairs beyond it (1 - FAR); U is 0 where both are.
    """
    keep = counts.complete
    phi = counts.positive[keep] / counts.positives[keep, None]
    psi = 1.0 - counts.negative[keep] / counts.negatives[keep, None]
    whole = phi + psi
    return np.divide(2 * phi * psi, whole, out=np.zeros_like(whole), where=whole > 0)


def opis(utilities: np.ndarray) -> float:
    """``mean_i mean_d |U_i(d) - mean_j U_j(d)|^2``: the spread of utility over classes, in [0, 1/4]; 0 is consistent.

    Args:
      utilities: ``[T, G]`` at equally spaced thresholds.

    Raises:
      ValueError: no class.
    """
    if not len(utilities):
        raise ValueError("OPIS needs a class with a positive and a negative pair; every class has one test sample")
    return float(np.mean(np.square(utilities - utilities.mean(0))))


def epsilon_opis(utilities: np.ndarray, epsilon: float = 0.1) -> float:
    """``mean_d |U_best(d) - U_worst(d)|^2`` between the best and the worst ``epsilon`` of the classes (recalled).

    Classes are ranked by their mean utility; each end has ``ceil(epsilon T)`` classes.

    Raises:
      ValueError: epsilon outside (0, 0.5], or no class.
    """
    if not 0 < epsilon <= 0.5:
        raise ValueError(f"epsilon must lie in (0, 0.5], got {epsilon}")
    if not len(utilities):
        raise ValueError("epsilon-OPIS needs a class with a positive and a negative pair")
    order = np.argsort(utilities.mean(1), kind="stable")
    size = int(np.ceil(epsilon * len(order)))
    best, worst = utilities[order[-size:]].mean(0), utilities[order[:size]].mean(0)
    return float(np.mean(np.square(best - worst)))


def far_thresholds(counts: PairCounts, rates: Sequence[float] | np.ndarray = (1e-2, 1e-1)) -> np.ndarray:
    """The distances at which the global false accept rate takes the given values, float64, linear between thresholds.

    The global rate pools the pairs of all classes.

    Args:
      counts: at fine thresholds (:data:`FINE`).
      rates: rising, in (0, 1).

    Raises:
      ValueError: rates out of order, or too few negative pairs to tell them apart.
    """
    rates = np.asarray(rates, np.float64)
    if not ((rates > 0).all() and (rates < 1).all() and (np.diff(rates) > 0).all()):
        raise ValueError(f"false accept rates must rise within (0, 1), got {rates.tolist()}")
    total = int(counts.negatives.sum()) // 2
    needed = int(np.ceil(1 / rates.min()))
    if total < needed:
        raise ValueError(
            f"{total} negative pairs cannot show a false accept rate of {rates.min():g}; at least {needed} are needed"
        )
    far = counts.negative.sum(0) / counts.negatives.sum()
    found = np.interp(rates, far, counts.thresholds)
    # closer than one bin: the interpolation alone tells them apart
    if (np.diff(found) <= np.diff(counts.thresholds).max(initial=0.0)).any():
        raise ValueError(
            f"the calibration range is empty: the false accept rates {rates.tolist()} fall on one distance "
            f"{found[0]:g}; more than {needed} negative pairs of different distances are needed"
        )
    return found


FINE = tuple(np.linspace(0.0, 2.0, 10_001).tolist())
"""Thresholds fine enough for :func:`far_thresholds`."""


@dataclasses.dataclass(frozen=True)
class Consistency:
    """A test set's threshold consistency.

    Attributes:
      thresholds: ``[G]``, equally spaced over the calibration range.
      utilities: ``[T', G]`` of the complete classes.
      classes: ``[T']`` their labels; ``excluded``: labels of classes with fewer than two samples.
      far, frr: ``[T', G]`` error rates of each complete class.
      opis, epsilon_opis: see the functions.
    """

    thresholds: np.ndarray
    utilities: np.ndarray
    classes: np.ndarray
    excluded: np.ndarray
    far: np.ndarray
    frr: np.ndarray
    opis: float
    epsilon_opis: float


def threshold_consistency(
    embeddings: Rows,
    labels: Labels,
    rates: Sequence[float] | np.ndarray = (1e-2, 1e-1),
    grid: int = 101,
    epsilon: float = 0.1,
    block: int = 256,
) -> Consistency:
    """OPIS over the thresholds between two global false accept rates, with the curves behind it.

    Args:
      embeddings, labels: of a test set.
      rates: global false accept rates at the ends of the calibration range.
      grid: G, number of thresholds.
      epsilon: share of the classes at each end for epsilon-OPIS.
      block: rows at a time.

    Raises:
      ValueError: as :func:`far_thresholds` and :func:`opis`, or a grid below 2.
    """
    if grid < 2:
        raise ValueError(f"grid must hold at least 2 thresholds, got {grid}")
    low, high = far_thresholds(pair_counts(embeddings, labels, FINE, block=block), rates)
    counts = pair_counts(embeddings, labels, np.linspace(low, high, grid), block=block)
    utilities, keep = utility_curves(counts), counts.complete
    present = np.bincount(np.asarray(labels), minlength=len(keep)) > 0
    return Consistency(
        counts.thresholds,
        utilities,
        np.flatnonzero(keep),
        np.flatnonzero(present & ~keep),
        counts.negative[keep] / counts.negatives[keep, None],
        1.0 - counts.positive[keep] / counts.positives[keep, None],
        opis(utilities),
        epsilon_opis(utilities, epsilon),
    )


def choose_threshold(embeddings: Rows, labels: Labels, rate: float, block: int = 256) -> float:
    """The distance at which a (validation) set's global false accept rate is ``rate``."""
    return float(far_thresholds(pair_counts(embeddings, labels, FINE, block=block), (rate,))[0])


def per_class_error_rates(
    embeddings: Rows, labels: Labels, threshold: float, block: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """False accept and false reject rates of each class at one threshold, float64 ``[T]``; NaN where undefined."""
    counts = pair_counts(embeddings, labels, (threshold,), block=block)
    with np.errstate(invalid="ignore", divide="ignore"):
        far = counts.negative[:, 0] / np.where(counts.negatives > 0, counts.negatives, np.nan)
        frr = 1.0 - counts.positive[:, 0] / np.where(counts.positives > 0, counts.positives, np.nan)
    return far, frr
