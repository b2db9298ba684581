"""Ranks of the right items in cross-modal retrieval, and the numbers its tables report.

A query may have several right items (a video's captions) and several queries one (a video of 20 captions): both sides
carry the number of the item they show, and they match where those agree.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def match_ranks(
    scores: Float[Array, "q n"], query_item: Int[Array, "q"], gallery_item: Int[Array, "n"]
) -> Float[Array, "q"]:
    """Rank of each query's best right item, 0 for the first; ``n`` if the gallery shows none of its item.

    Wrong items that score above it count whole and wrong items that tie with it half: the mean over all orders of the
    ties, so that constant scores are no perfect ranking.
    """
    right = query_item[:, None] == gallery_item[None, :]
    scores = scores.astype(jnp.float32)
    best = jnp.max(jnp.where(right, scores, -jnp.inf), -1, keepdims=True)
    above = jnp.sum((scores > best) & ~right, -1, dtype=jnp.int32)
    ties = jnp.sum((scores == best) & ~right, -1, dtype=jnp.int32)
    return jnp.where(jnp.any(right, -1), above + 0.5 * ties, float(scores.shape[1]))


def match_metrics(ranks: Float[Array, "q"], mask: Bool[Array, "q"] | None = None) -> dict[str, Array]:
    """``r@1``, ``r@5``, ``r@10``, ``r@50``, ``median_rank`` (from 1), ``mean_rank`` and ``geometric_mean``.

    Args:
      ranks: from :func:`match_ranks`.
      mask: real queries (a missing caption is none).

    Returns:
      Shares in [0, 1]; a query that ties for the first place misses R@1; ``geometric_mean`` is that of R@1, 5 and 10.
    """
    mask = jnp.ones(ranks.shape, bool) if mask is None else mask
    count = jnp.sum(mask, dtype=jnp.int32)
    share = lambda hit: jnp.sum(hit & mask, dtype=jnp.int32) / jnp.maximum(count, 1).astype(jnp.float32)  # noqa: E731
    found = {"r@1": share(ranks == 0)} | {f"r@{k}": share(ranks < k) for k in (5, 10, 50)}
    ordered = jnp.sort(jnp.where(mask, ranks, jnp.inf))
    low, high = jnp.maximum((count - 1) // 2, 0), jnp.maximum(count, 1) // 2
    median = 0.5 * (ordered[low] + ordered[high])
    mean = jnp.sum(jnp.where(mask, ranks, 0.0)) / jnp.maximum(count, 1)
    real = count > 0
    product = found["r@1"] * found["r@5"] * found["r@10"]
    return {
        **found,
        "median_rank": jnp.where(real, median + 1, 0.0),
        "mean_rank": jnp.where(real, mean + 1, 0.0),
        "geometric_mean": jnp.cbrt(product),
    }
