"""Losses on distances between embeddings that keep one value per element."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

Number = float | int


def pairwise_distance(
    x: Float[Array, "m d"], y: Float[Array, "m d"], p_norm: Number = 2.0, eps: Number = 1e-6
) -> Float[Array, "m"]:
    """``||x - y + eps||_p`` of each pair of rows, in float32.

    ``eps`` is added to every coordinate of the difference *before* the norm (torch's ``pairwise_distance``), so the
    distance is not symmetric to the last digit, and rows that are equal lie ``eps d^(1/p)`` apart.  There the gradient
    is that of the norm at ``(eps, ..., eps)``: for p = 2 it is ``d^-1/2`` in every coordinate, not 0.  Where the norm
    is exactly 0 (``eps = 0`` and equal rows) the gradient is 0, never NaN.

    Args:
      x, y: rows to compare.
      p_norm: p, at least 1; infinity is the largest coordinate.
      eps: 0 or more.

    Raises:
      ValueError: p below 1 or a negative eps.
    """
    if not p_norm >= 1:
        raise ValueError(f"p_norm must be at least 1, got {p_norm}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    size = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32) + eps)
    if p_norm == 1:
        return jnp.sum(size, -1)
    if p_norm == float("inf"):
        return jnp.max(size, -1)
    total = jnp.sum(jnp.square(size) if p_norm == 2 else size**p_norm, -1)
    apart = total > 0
    # the root's slope at 0 is infinite: it is taken elsewhere and its result thrown away
    safe = jnp.where(apart, total, 1.0)
    return jnp.where(apart, jnp.sqrt(safe) if p_norm == 2 else safe ** (1.0 / p_norm), 0.0)


def triplet_margin_loss(
    anchor: Float[Array, "m d"],
    positive: Float[Array, "m d"],
    negative: Float[Array, "m d"],
    margin: Number = 1.0,
    p_norm: Number = 2.0,
    eps: Number = 1e-6,
) -> Float[Array, "m"]:
    """``max(0, d(a, p) - d(a, n) + margin)`` of each triplet (torch's TripletMarginLoss); d: :func:`pairwise_distance`.

    A triplet that is satisfied with room to spare has no gradient; at the hinge itself the gradient is that of the
    active side, as in torch (``clamp_min``).

    Args:
      anchor, positive, negative: embeddings; row i of all three is one triplet.
      margin: by how much the negative should lie further away than the positive.
      p_norm, eps: see :func:`pairwise_distance`.

    Returns:
      f32 ``[M]``.

    Raises:
      ValueError: a negative margin, and as :func:`pairwise_distance`.
    """
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    near = pairwise_distance(anchor, positive, p_norm, eps)
    far = pairwise_distance(anchor, negative, p_norm, eps)
    violation = near - far + margin
    return jnp.where(violation >= 0, violation, 0.0)
