"""Hubness: how unevenly a search returns its items (Radovanovic et al., JMLR 2010).

Everything is computed from the ids a search returned (``zoo.ops.search.mips_topk``), so nothing of size queries x items
is ever needed.  ``-1`` in a list is an empty slot.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def k_occurrence(ids: Int[Array, "q k"], num_items: int) -> Int[Array, "n"]:
    """``N_k(j)``: how many queries have item j among their k nearest; sums to ``q k`` (less empty slots)."""
    # -1 would wrap around to the last item: send it out of range, where the scatter drops it
    places = jnp.where(ids < 0, num_items, ids).ravel()
    return jnp.zeros(num_items, jnp.int32).at[places].add(1, mode="drop")


def hubness_skewness(counts: Int[Array, "n"]) -> Float[Array, ""]:
    """``E[(N - mu)^3] / sigma^3`` over **all** items, those never returned included; 0 if all counts are equal.

    The population skewness, ``scipy.stats.skew``'s default.
    """
    centred = counts.astype(jnp.float32) - _mean(counts)
    variance = jnp.mean(jnp.square(centred))
    third = jnp.mean(centred**3)
    return jnp.where(variance > 0, third / jnp.maximum(variance, 1e-30) ** 1.5, 0.0)


def robin_hood(counts: Int[Array, "n"]) -> Float[Array, ""]:
    """``sum |N - mu| / (2 sum N)``: share of the returns that would have to move to make all counts equal."""
    spread = jnp.sum(jnp.abs(counts.astype(jnp.float32) - _mean(counts)))
    return spread / (2.0 * jnp.maximum(jnp.sum(counts.astype(jnp.float32)), 1.0))


def never_retrieved(counts: Int[Array, "n"]) -> Float[Array, ""]:
    """Share of the items that no query has among its k nearest."""
    return jnp.mean((counts == 0).astype(jnp.float32))


def hubness(ids: Int[Array, "q k"], num_items: int) -> dict[str, Array]:
    """All of it: ``skewness``, ``robin_hood``, ``max`` (the largest hub's N_k) and ``never_retrieved``."""
    counts = k_occurrence(ids, num_items)
    return {
        "skewness": hubness_skewness(counts),
        "robin_hood": robin_hood(counts),
        "max": jnp.max(counts),
        "never_retrieved": never_retrieved(counts),
    }


def _mean(counts: Array) -> Array:
    return jnp.mean(counts.astype(jnp.float32))
