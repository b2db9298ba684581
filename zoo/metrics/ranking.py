"""Ranking metrics over padded id lists: recall, precision, NDCG and hit rate at k, exact and streaming.

Conventions, for recommenders and retrieval alike:

* an id list is ``[b, p]`` int32, padded with ``-1`` anywhere; ids within a row are distinct;
* ``ranked`` lists come best first; equal scores rank the lower id first;
* a query without any relevant id has no defined value: it scores 0, and :func:`ranking_update` leaves it out.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

METRICS = ("recall", "precision", "ndcg", "hit")
Denominator = Literal["relevant", "min"]


def top_k_ids(scores: Float[Array, "b n"], k: int, exclude: Int[Array, "b p"] | None = None) -> Int[Array, "b k"]:
    """The ``k`` best columns of each row, best first; ``exclude`` (train items) never appear.

    Where fewer than ``k`` columns are left the list is padded with -1.  Ties go to the lower id; NaN scores rank as
    minus infinity would, that is nowhere.

    Raises:
      ValueError: k < 1 or k > n.
    """
    rows, n = scores.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of items {n}, got {k}")
    scores = scores.astype(jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    if exclude is not None:
        # -1 would wrap around to the last column: send padding out of range, where the scatter drops it
        columns = jnp.where(exclude < 0, n, exclude)
        scores = scores.at[jnp.arange(rows)[:, None], columns].set(-jnp.inf, mode="drop")
    values, ids = jax.lax.top_k(scores, k)
    return jnp.where(values == -jnp.inf, -1, ids).astype(jnp.int32)


def hits(ranked: Int[Array, "b k"], relevant: Int[Array, "b r"]) -> Bool[Array, "b k"]:
    """Which of the ranked ids are relevant; padding is not."""
    return jnp.any((ranked[:, :, None] == relevant[:, None, :]) & (ranked[:, :, None] >= 0), axis=-1)


def num_relevant(relevant: Int[Array, "b r"]) -> Int[Array, "b"]:
    """How many relevant ids each query has."""
    return jnp.sum(relevant >= 0, axis=-1)


def recall_at_k(
    ranked: Int[Array, "b n"], relevant: Int[Array, "b r"], k: int, denominator: Denominator = "relevant"
) -> Float[Array, "b"]:
    """Relevant ids among the first ``k`` over all relevant ids, or over ``min(k, relevant)`` (Mult-VAE's)."""
    _check_k(ranked, k)
    _check_denominator(denominator)
    found = jnp.sum(hits(ranked[:, :k], relevant), axis=-1)
    possible = num_relevant(relevant)
    possible = jnp.minimum(possible, k) if denominator == "min" else possible
    return found / jnp.maximum(possible, 1)


def precision_at_k(ranked: Int[Array, "b n"], relevant: Int[Array, "b r"], k: int) -> Float[Array, "b"]:
    """Relevant ids among the first ``k`` over ``k``."""
    _check_k(ranked, k)
    return jnp.sum(hits(ranked[:, :k], relevant), axis=-1) / k


def ndcg_at_k(ranked: Int[Array, "b n"], relevant: Int[Array, "b r"], k: int) -> Float[Array, "b"]:
    """``sum_j hit_j / log2(j + 1)`` over its best possible value, with binary relevance and ranks ``j`` from 1."""
    _check_k(ranked, k)
    gain = 1.0 / jnp.log2(jnp.arange(k, dtype=jnp.float32) + 2.0)
    achieved = jnp.sum(hits(ranked[:, :k], relevant) * gain, axis=-1)
    possible = num_relevant(relevant)
    ideal = jnp.sum((jnp.arange(k) < possible[:, None]) * gain, axis=-1)
    return jnp.where(possible > 0, achieved / jnp.maximum(ideal, 1e-9), 0.0)


def hit_rate_at_k(ranked: Int[Array, "b n"], relevant: Int[Array, "b r"], k: int) -> Float[Array, "b"]:
    """1 if any of the first ``k`` is relevant, else 0."""
    _check_k(ranked, k)
    return jnp.any(hits(ranked[:, :k], relevant), axis=-1).astype(jnp.float32)


def ranking_init(ks: Sequence[int] = (20,)) -> dict[str, Any]:
    """An empty accumulator for the four metrics at every ``k``: sums per metric and the number of queries."""
    sums = {f"{name}@{k}": jnp.zeros((), jnp.float32) for k in ks for name in METRICS}
    return {"sum": sums, "count": jnp.zeros((), jnp.float32)}


def ranking_update(
    accumulator: dict[str, Any],
    scores: Float[Array, "b n"],
    relevant: Int[Array, "b r"],
    exclude: Int[Array, "b p"] | None = None,
    mask: Bool[Array, "b"] | None = None,
    *,
    ks: Sequence[int] = (20,),
    denominator: Denominator = "relevant",
) -> dict[str, Any]:
    """Adds a batch of queries: full ranking over all ``n`` items but the excluded ones.  Memory O(batch x items).

    Args:
      accumulator: from :func:`ranking_init` with the same ``ks``.
      scores: one row per query.
      relevant, exclude: padded id lists: the held-out items, and those to leave out of the ranking (train items).
      mask: which queries are real.
      ks, denominator: cut-offs; recall's denominator.
    """
    ranked = top_k_ids(scores, max(ks), exclude)
    real = num_relevant(relevant) > 0
    real = real if mask is None else real & mask
    sums = dict(accumulator["sum"])
    for k in ks:
        values = {
            "recall": recall_at_k(ranked, relevant, k, denominator),
            "precision": precision_at_k(ranked, relevant, k),
            "ndcg": ndcg_at_k(ranked, relevant, k),
            "hit": hit_rate_at_k(ranked, relevant, k),
        }
        for name, value in values.items():
            sums[f"{name}@{k}"] = sums[f"{name}@{k}"] + jnp.sum(jnp.where(real, value, 0.0))
    return {"sum": sums, "count": accumulator["count"] + jnp.sum(real)}


def ranking_compute(accumulator: dict[str, Any]) -> dict[str, Any]:
    """Means over the queries seen: ``{"recall@20": ..., ...}``."""
    return {name: total / jnp.maximum(accumulator["count"], 1) for name, total in accumulator["sum"].items()}


def _check_k(ranked, k):
    if not 1 <= k <= ranked.shape[1]:
        raise ValueError(f"k must be between 1 and the ranked list's length {ranked.shape[1]}, got {k}")


def _check_denominator(denominator):
    if denominator not in ("relevant", "min"):
        raise ValueError(f"denominator must be 'relevant' or 'min', got {denominator!r}")
