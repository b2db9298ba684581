"""Losses without negatives, between two views: SimSiam's cosine and Barlow Twins' cross-correlation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.ops.prototypes import l2_normalize


def negative_cosine(prediction: Float[Array, "*b d"], target: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """``-cos(p, stop_gradient(z))`` of each row (Chen and He, CVPR 2021, equations 1 and 3)."""
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    return -jnp.sum(l2_normalize(prediction.astype(jnp.float32)) * l2_normalize(target), -1)


def cross_correlation(
    z1: Float[Array, "b d"],
    z2: Float[Array, "b e"],
    mask: Bool[Array, "b"] | None = None,
    unbiased: bool = False,
    eps: float = 1e-12,
) -> Float[Array, "d e"]:
    """Correlations of every feature of one view with every feature of the other, over the batch.

    Args:
      z1, z2: features; row i of both belongs to example i.
      mask: which rows are real.
      unbiased: standardise by the deviation with ``n - 1`` while still dividing by n, as released codes do, which
        shrinks everything by ``(n - 1) / n``.
      eps: under the root of the variance, so that a constant feature correlates with nothing.
    """
    real = jnp.ones(z1.shape[0], bool) if mask is None else mask
    count = jnp.maximum(jnp.sum(real), 1).astype(jnp.float32)

    def standardised(z):
        z = jnp.where(real[:, None], z.astype(jnp.float32), 0.0)
        centred = jnp.where(real[:, None], z - jnp.sum(z, 0) / count, 0.0)
        square = jnp.sum(jnp.square(centred), 0) / (jnp.maximum(count - 1, 1) if unbiased else count)
        return centred * jax.lax.rsqrt(square + eps)

    return jnp.matmul(standardised(z1).T, standardised(z2), precision="highest") / count


def barlow_twins(correlation: Float[Array, "d d"], off_diagonal: float = 5e-3) -> Float[Array, ""]:
    """``sum_l (1 - C_ll)^2 + off_diagonal sum_{l != m} C_lm^2`` (Zbontar et al., ICML 2021, equation 1)."""
    diagonal = jnp.diagonal(correlation)
    on = jnp.sum(jnp.square(1.0 - diagonal))
    return on + off_diagonal * (jnp.sum(jnp.square(correlation)) - jnp.sum(jnp.square(diagonal)))
