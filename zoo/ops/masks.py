"""Boolean masks over weights: random masks of a density, and rules that prune and grow them.

Everything is jit-able with static shapes: counts to remove or grow may be traced, so thresholds come from a sort and
never from index lists.  Shared by sparse training (``dsl``) and by pruning methods.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

AnyKey = Key[Array, ""] | UInt[Array, "2"]
Scalar = float | int | Float[Array, ""] | Int[Array, ""]


def check_density(density: float | int) -> None:
    """Raises ValueError for a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


def random_mask(key: AnyKey, shape: Sequence[int], density: float | int, exact: bool = False) -> Bool[Array, "..."]:
    """A random mask: ``m_j ~ Bernoulli(s)`` independently, or exactly ``round(s n)`` ones if ``exact``.

    Raises:
      ValueError: density outside (0, 1].
    """
    check_density(density)
    if not exact:
        return jax.random.bernoulli(key, density, tuple(shape))
    size = math.prod(shape)
    return jax.random.permutation(key, jnp.arange(size) < round(density * size)).reshape(tuple(shape))


def lottery_ticket_masks(weights: Sequence[Float[Array, "..."]], density: float | int) -> list[Bool[Array, "..."]]:
    """One threshold over all tensors together: the ``floor(s N)`` largest ``|w|`` stay (more if they tie)."""
    check_density(density)
    magnitudes = jnp.concatenate([jnp.abs(w).astype(jnp.float32).ravel() for w in weights])
    keep = max(1, math.floor(density * magnitudes.size))
    threshold = jnp.sort(magnitudes)[magnitudes.size - keep]
    return [jnp.abs(w).astype(jnp.float32) >= threshold for w in weights]


# --- stage 3a: prune --------------------------------------------------------------------------------------------------


def magnitude_prune(
    w: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    n_remove: Scalar,
    variant: Literal["paper", "official"] = "paper",
) -> Bool[Array, "*n"]:
    """Drops the ``n_remove`` active weights nearest to zero, and all that tie with the last of them.

    ``|w|`` is sorted with the inactive weights as zeros in front; the value at rank ``zeros + n_remove`` is the
    threshold that survivors must exceed.  ``n_remove`` may be traced.  At ``n_remove = 0`` nothing is dropped
    (``"official"``: active weights that are exactly zero are).
    """
    magnitude = _ordered_bits(jnp.where(mask, jnp.abs(w), 0))
    ordered = jnp.sort(magnitude.ravel())
    zeros = mask.size - jnp.sum(mask)
    rank = jnp.asarray(zeros + n_remove, jnp.int32)
    threshold = ordered[jnp.clip(rank - 1, 0, mask.size - 1)]
    unpruned = mask & (w != 0) if variant == "official" else mask
    return jnp.where(n_remove > 0, mask & (magnitude > threshold), unpruned)


def taylor_prune(
    w: Float[Array, "*n"], g: Float[Array, "*n"], mask: Bool[Array, "*n"], n_remove: Scalar, key: AnyKey
) -> Bool[Array, "*n"]:
    """Drops the ``n_remove`` active weights with the smallest ``(w g)^2``; ties are broken by ``key``."""
    cost = jnp.where(mask, jnp.square(w * g).astype(jnp.float32), jnp.inf)
    return mask & ~_smallest(cost, n_remove, key)


def set_prune(
    w: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    n_remove: Scalar,
    variant: Literal["paper", "official"] = "paper",
) -> Bool[Array, "*n"]:
    """SET: drops the ``ceil(n_remove / 2)`` active weights nearest to zero on each side of it, and active zeros.

    ``"official"`` takes the threshold for negative weights from the wrong end, as the code does: only those below the
    ``ceil(n_remove / 2)``-th most negative weight survive.  At ``n_remove = 0`` nothing is dropped.
    """
    half = jnp.ceil(jnp.asarray(n_remove) / 2).astype(jnp.int32)
    w = jnp.where(mask, w, 0)

    def kth(values, side):  # the half-th smallest of the values on this side of zero (its last if there are fewer)
        count = jnp.sum(side)
        ordered = jnp.sort(jnp.where(side, values, jnp.inf).ravel())
        return ordered[jnp.clip(jnp.minimum(half, count) - 1, 0, w.size - 1)]

    positive, negative = w > 0, w < 0
    kept = positive & (w > kth(w, positive))
    if variant == "official":
        kept |= negative & (w < kth(w, negative))
    else:
        kept |= negative & (-w > kth(-w, negative))
    return jnp.where(n_remove > 0, kept, mask)


def threshold_prune(w: Float[Array, "*n"], mask: Bool[Array, "*n"], threshold: float | int = 1e-3) -> Bool[Array, "*n"]:
    """Drops every active weight with ``|w| <= threshold``, however many they are."""
    return mask & (jnp.abs(w) > threshold)


# --- stage 3b: grow ---------------------------------------------------------------------------------------------------


def gradient_grow(score: Float[Array, "*n"], mask: Bool[Array, "*n"], n_grow: Scalar, key: AnyKey) -> Bool[Array, "*n"]:
    """Activates the ``n_grow`` inactive weights with the largest ``score`` (``|g|``); ``key`` breaks ties at random.

    With embedding tables most rows have no gradient in a batch and tie at zero, so the tie-break matters.  A weight
    that was pruned a moment ago is a candidate like any other.  ``n_grow`` may be traced.
    """
    cost = jnp.where(mask, jnp.inf, -score.astype(jnp.float32))
    return mask | _smallest(cost, n_grow, key)


def bernoulli_grow(mask: Bool[Array, "*n"], n_grow: Scalar, key: AnyKey) -> Bool[Array, "*n"]:
    """Activates each inactive weight with probability ``n_grow / #inactive``: ``n_grow`` of them on average."""
    inactive = mask.size - jnp.sum(mask)
    return mask | jax.random.bernoulli(key, jnp.clip(n_grow / jnp.maximum(inactive, 1), 0.0, 1.0), mask.shape)


def _ordered_bits(x: Array) -> Array:
    # u32 in the order of the float32 values; both zeros are one
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _smallest(cost: Array, n: Scalar, key: AnyKey) -> Array:
    # mask of the n smallest costs, ties at the boundary drawn by random bits: sorts of single integer arrays and
    # comparisons, because sorting floats, pairs or indices costs XLA several times as much on a CPU
    flat = _ordered_bits(cost.ravel())
    n = jnp.asarray(n, jnp.int32)
    at = lambda ordered, count: ordered[jnp.clip(count - 1, 0, flat.size - 1)]  # noqa: E731
    edge = at(jnp.sort(flat), n)
    below, tied = flat < edge, flat == edge
    wanted = n - jnp.sum(below)

    def draw(_):
        bits = jax.random.bits(key, flat.shape)
        last = at(jnp.sort(jnp.where(tied, bits, jnp.uint32(0xFFFFFFFF))), wanted)
        first, again = tied & (bits < last), tied & (bits == last)
        # equal bits too: by position
        return first | (again & (jnp.cumsum(again) <= wanted - jnp.sum(first)))

    drawn = jax.lax.cond(wanted < jnp.sum(tied), draw, lambda _: tied, None)
    return ((below | drawn) & (n > 0)).reshape(cost.shape)
