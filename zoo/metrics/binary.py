"""Binary precision and recall, pooled over all scored pairs of all queries.

Conventions, for filters of retrieved lists, multi-label matching and out-of-distribution detection alike:

* ``scores``, ``labels`` and ``mask`` have one shape, any; pairs whose mask is false change nothing;
* a label is relevant if it is True or at least 1: a soft grade below 1 is not (:func:`check_binary` refuses such
  labels, so that a graded set is thresholded by its owner and not by accident);
* a threshold keeps ``scores >= threshold``, hence whole groups of equal scores, in every function here;
* recall is relative to the relevant items **among the scored pairs** (the retrieved set), not in the corpus;
* where a value is undefined (no relevant or no irrelevant pair) :func:`check_binary` says which on the host; under
  ``jit`` the functions then return the finite values their docstrings name, never NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Shaped

_ROUNDING = 2.0**-22  # recall is a float32 quotient: 19 of 20 must count as 0.95


@struct.dataclass
class PrecisionRecall:
    """Precision and recall at every score as a threshold, from the highest down; n pairs, so static shapes.

    Attributes:
      thresholds: f32 ``[n]``, the real pairs' scores, falling; ``-inf`` in the places of masked pairs, which come last.
      precision, recall: f32 ``[n]``, of the pairs with ``scores >= thresholds``; members of a tie group share the
        values of the whole group, masked places those of all real pairs.  Without a relevant pair both are 0.
      last: bool ``[n]``, the last member of each tie group: the points of the curve without repetitions.
      positives, total: i32 ``[]``, relevant and real pairs.
      kept, hits: i32 ``[n]``, pairs kept by each threshold and the relevant ones among them.
      relevant: bool ``[n]``, which pairs, in this order, are relevant.
    """

    thresholds: Any
    precision: Any
    recall: Any
    last: Any
    positives: Any
    total: Any
    kept: Any
    hits: Any
    relevant: Any


def precision_recall_curve(
    scores: Float[Array, "*shape"], labels: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"] | None = None
) -> PrecisionRecall:
    """The pooled curve: one sort of all pairs."""
    scores = scores.astype(jnp.float32).ravel()
    real = jnp.ones(scores.shape, bool) if mask is None else mask.ravel()
    relevant = (labels.ravel() >= 1) & real
    # real pairs first, high scores first
    absent, negated, relevant = jax.lax.sort((~real, -scores, relevant), num_keys=2)
    thresholds, n = jnp.where(absent, -jnp.inf, -negated), scores.size
    place = jnp.arange(n, dtype=jnp.int32)
    changes = (negated[1:] != negated[:-1]) | (absent[1:] != absent[:-1])
    last = jnp.concatenate([changes, jnp.ones(1, bool)]) & ~absent
    total = jnp.sum(real, dtype=jnp.int32)
    # each place reads the counts at the end of its tie group; masked places at the end of all
    end = jax.lax.cummin(jnp.where(last, place, n - 1), reverse=True)
    hits = jnp.cumsum(relevant, dtype=jnp.int32)[end]
    kept, positives = jnp.minimum(end + 1, total), jnp.sum(relevant, dtype=jnp.int32)
    precision = hits / jnp.maximum(kept, 1).astype(jnp.float32)
    recall = hits / jnp.maximum(positives, 1).astype(jnp.float32)
    return PrecisionRecall(thresholds, precision, recall, last, positives, total, kept, hits, relevant)


def average_precision(
    scores: Float[Array, "*shape"], labels: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"] | None = None
) -> Float[Array, ""]:
    """PR AUC: ``sum_g (R_g - R_{g-1}) P_g`` over tie groups g, from the highest score down; 0 without a relevant pair.

    Equal to the mean over relevant pairs of the precision at their score, and to scikit-learn's
    ``average_precision_score``: no interpolation.
    """
    curve = precision_recall_curve(scores, labels, mask)
    return jnp.sum(jnp.where(curve.relevant, curve.precision, 0.0)) / jnp.maximum(curve.positives, 1)


def best_f1(
    scores: Float[Array, "*shape"], labels: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest F1 over all thresholds and the largest threshold that reaches it; 0 and the top score if none can."""
    curve = precision_recall_curve(scores, labels, mask)
    f1 = 2.0 * curve.hits / jnp.maximum(curve.kept + curve.positives, 1)
    f1 = jnp.where(curve.last, f1, -1.0)
    at = jnp.argmax(f1)
    return jnp.maximum(f1[at], 0.0), curve.thresholds[at]


def select_threshold(
    scores: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
    target_recall: float | Float[Array, ""] = 0.95,
) -> Float[Array, ""]:
    """The largest threshold whose pooled recall is at least the target (up to float32's rounding).

    ``-inf``, which keeps everything, if there is no relevant pair: :func:`check_binary` refuses that case.
    """
    curve = precision_recall_curve(scores, labels, mask)
    return _at_recall(curve, target_recall)[0]


def precision_at_recall(
    scores: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    recall: float | Float[Array, ""] = 0.95,
    mask: Bool[Array, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Precision at :func:`select_threshold`'s threshold (P@R95 for 0.95); 0 without a relevant pair."""
    return _at_recall(precision_recall_curve(scores, labels, mask), recall)[1]


def _at_recall(curve: PrecisionRecall, target: Any) -> tuple[Array, Array]:
    reached = curve.recall >= target * (1.0 - _ROUNDING)
    at = jnp.argmax(reached)
    possible = (curve.positives > 0) & reached[at]
    return jnp.where(possible, curve.thresholds[at], -jnp.inf), jnp.where(possible, curve.precision[at], 0.0)


def filter_mask(
    scores: Float[Array, "*shape"], threshold: float | Float[Array, ""], mask: Bool[Array, "*shape"] | None = None
) -> Bool[Array, "*shape"]:
    """Which pairs survive: real and ``scores >= threshold``."""
    kept = scores.astype(jnp.float32) >= threshold
    return kept if mask is None else kept & mask


def filter_rate(
    scores: Float[Array, "*shape"], threshold: float | Float[Array, ""], mask: Bool[Array, "*shape"] | None = None
) -> Float[Array, ""]:
    """Share of the real pairs that the threshold removes; 0 if there are none."""
    total = scores.size if mask is None else jnp.sum(mask, dtype=jnp.int32)
    removed = total - jnp.sum(filter_mask(scores, threshold, mask), dtype=jnp.int32)
    return removed / jnp.maximum(total, 1).astype(jnp.float32)


def null_rate(
    scores: Float[Array, "q k"], threshold: float | Float[Array, ""], mask: Bool[Array, "q k"] | None = None
) -> Float[Array, ""]:
    """Share of the queries with a real pair that are left without any; 0 if no query has one."""
    asked = jnp.ones(scores.shape[0], bool) if mask is None else jnp.any(mask, -1)
    empty = asked & ~jnp.any(filter_mask(scores, threshold, mask), -1)
    return jnp.sum(empty, dtype=jnp.int32) / jnp.maximum(jnp.sum(asked, dtype=jnp.int32), 1).astype(jnp.float32)


def check_binary(scores: Any, labels: Any, mask: Any = None, name: str = "labels") -> None:
    """Refuses, on the host, what has no binary precision and recall.

    Args:
      scores, labels, mask: arrays of one shape.
      name: what the messages call the labels.

    Raises:
      ValueError: another shape, no real pair, a score that is not finite, a label that is neither 0 nor 1, labels all 0
        (recall is undefined) or all 1 (every filter has precision 1); one line that says which.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    mask = np.ones(scores.shape, bool) if mask is None else np.asarray(mask, bool)
    if not scores.shape == labels.shape == mask.shape:
        raise ValueError(f"scores {scores.shape}, {name} {labels.shape} and mask {mask.shape} must have one shape")
    scores, labels = scores[mask], labels[mask]
    if not scores.size:
        raise ValueError(f"{name}: every pair is masked, so precision and recall are undefined")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite; {int((~np.isfinite(scores)).sum())} of {scores.size} are not")
    soft = (labels != 0) & (labels != 1)
    if soft.any():
        raise ValueError(
            f"{name} must be 0 or 1, got {labels[soft][0]:g}: threshold graded labels first (exact match 1)"
        )
    if not labels.any():
        raise ValueError(f"{name} are all 0: without a relevant pair recall and PR AUC are undefined")
    if labels.all():
        raise ValueError(f"{name} are all 1: without an irrelevant pair every filter has precision 1")
