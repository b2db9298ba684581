"""Ranking metrics over padded id lists: recall, precision, NDCG, MRR, MAP and hit rate at k, exact and streaming.

Conventions, for recommenders and retrieval alike:

* an id list is ``[b, p]`` int32, padded with ``-1`` anywhere; ids within a row are distinct;
* ``ranked`` lists come best first; equal scores rank the lower id first (:func:`target_rank` offers other rules);
* a query may have several relevant ids (targets), in any order, with grades beside them where a metric takes grades;
* a query without any relevant id has no defined value: it scores 0, and :func:`ranking_update` and
  :func:`mean_over_queries` leave it out.
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


def ndcg_at_k(
    ranked: Int[Array, "b n"],
    relevant: Int[Array, "b r"],
    k: int,
    grades: Float[Array, "b r"] | Int[Array, "b r"] | None = None,
    gain: str = "linear",
) -> Float[Array, "b"]:
    """``sum_j gain_j / log2(j + 1)`` over its best possible value, with ranks ``j`` from 1.

    Args:
      ranked, relevant: id lists.
      k: cut-off.
      grades: how relevant each of ``relevant`` is, at least 0; 1 by default.  At padding they do not count.
      gain: of a grade g: ``"linear"`` g (trec_eval) or ``"exponential"`` 2^g - 1 (Burges et al., 2005).

    Raises:
      ValueError: k out of range, or an unknown gain.
    """
    _check_k(ranked, k)
    if gain not in ("linear", "exponential"):
        raise ValueError(f"gain must be 'linear' or 'exponential', got {gain!r}")
    discount = 1.0 / jnp.log2(jnp.arange(max(k, relevant.shape[1]), dtype=jnp.float32) + 2.0)
    worth = jnp.ones(relevant.shape, jnp.float32) if grades is None else grades.astype(jnp.float32)
    worth = jnp.exp2(worth) - 1.0 if gain == "exponential" else worth
    worth = jnp.where(relevant >= 0, worth, 0.0)
    same = (ranked[:, :k, None] == relevant[:, None, :]) & (ranked[:, :k, None] >= 0)
    achieved = jnp.sum(jnp.max(jnp.where(same, worth[:, None, :], 0.0), axis=-1) * discount[:k], axis=-1)
    best = -jnp.sort(-worth, axis=-1)[:, :k]
    ideal = jnp.sum(best * discount[: best.shape[1]], axis=-1)
    return jnp.where(ideal > 0, achieved / jnp.maximum(ideal, 1e-9), 0.0)


def mrr_at_k(ranked: Int[Array, "b n"], relevant: Int[Array, "b r"], k: int) -> Float[Array, "b"]:
    """One over the rank of the first relevant id among the first ``k``; 0 if none is there."""
    _check_k(ranked, k)
    found = hits(ranked[:, :k], relevant)
    return jnp.max(jnp.where(found, 1.0 / (jnp.arange(k) + 1.0), 0.0), axis=-1)


def average_precision_at_k(
    ranked: Int[Array, "b n"], relevant: Int[Array, "b r"], k: int, denominator: Denominator = "relevant"
) -> Float[Array, "b"]:
    """The mean, over all relevant ids, of the precision at each one's rank (0 beyond ``k``); its mean is MAP@k.

    Args:
      ranked, relevant, k: as everywhere.
      denominator: all relevant ids (trec_eval), or ``"min"``: at most k of them.
    """
    _check_k(ranked, k)
    _check_denominator(denominator)
    found = hits(ranked[:, :k], relevant)
    precision = jnp.cumsum(found, axis=-1) / (jnp.arange(k) + 1.0)
    possible = num_relevant(relevant)
    possible = jnp.minimum(possible, k) if denominator == "min" else possible
    return jnp.sum(jnp.where(found, precision, 0.0), axis=-1) / jnp.maximum(possible, 1)


def topk_overlap(found: Int[Array, "b k"], exact: Int[Array, "b m"]) -> Float[Array, "b"]:
    """Which share of the exact list's ids the found list has (k-recall@k of approximate search); order is nothing."""
    return jnp.sum(hits(found, exact), axis=-1) / jnp.maximum(num_relevant(exact), 1)


def without_ids(ranked: Int[Array, "b n"], excluded: Int[Array, "b e"]) -> Int[Array, "b n"]:
    """The ranked lists without each query's excluded ids (its reference image, itself); what follows moves up.

    The ends are padded with -1: retrieve as many more as may be excluded.
    """
    stays = (ranked >= 0) & ~hits(ranked, excluded)
    order = jnp.argsort(~stays, axis=-1, stable=True)
    return jnp.take_along_axis(jnp.where(stays, ranked, -1), order, axis=-1)


def target_rank(scores: Float[Array, "b n"], target: Int[Array, "b"], ties: str = "id") -> Float[Array, "b"]:
    """The rank, from 1, of one target column in each row of scores.

    Args:
      scores: higher is better.
      target: columns.
      ties: where the target stands among equal scores: ``"id"`` after the lower columns (as everywhere here),
        ``"mean"`` in the middle (expected rank of a random order), ``"optimistic"`` first or ``"pessimistic"`` last.

    Raises:
      ValueError: an unknown rule.
    """
    if ties not in ("id", "mean", "optimistic", "pessimistic"):
        raise ValueError(f"ties must be 'id', 'mean', 'optimistic' or 'pessimistic', got {ties!r}")
    own = jnp.take_along_axis(scores, target[:, None], axis=1)
    better, equal = jnp.sum(scores > own, axis=1), scores == own
    if ties == "id":
        among = jnp.sum(equal & (jnp.arange(scores.shape[1]) < target[:, None]), axis=1).astype(jnp.float32)
    else:
        share = {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties]
        among = share * (jnp.sum(equal, axis=1) - 1)
    return better + among + 1.0


def mean_over_queries(
    values: Float[Array, "b"], relevant: Int[Array, "b r"], mask: Bool[Array, "b"] | None = None
) -> Float[Array, ""]:
    """The mean of a per-query metric over the queries that have a relevant id (and whose mask is true)."""
    real = num_relevant(relevant) > 0
    real = real if mask is None else real & mask
    return jnp.sum(jnp.where(real, values, 0.0)) / jnp.maximum(jnp.sum(real), 1)


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
