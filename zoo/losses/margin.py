"""The margin loss over triplets that a sampler chooses within the batch, in static shapes.

``zoo.losses.pairs.margin_pairs`` is the loss over masks, a mean per anchor; here positives and negatives are paired and
every triplet counts alike, as in the released codes of divide and conquer and of dynamic subspace learners.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.base import Elements, elements, reduce_nonzero_mean
from zoo.losses.pairs import pair_masks

Number = float | int


def distances(z: Float[Array, "b e"]) -> Float[Array, "b b"]:
    """``sqrt(||z_i - z_j||^2 + 1e-8)``."""
    square = jnp.sum(jnp.square(z), 1)
    gaps = square[:, None] + square[None, :] - 2.0 * jnp.matmul(z, z.T, precision="highest")
    return jnp.sqrt(jnp.maximum(gaps, 0.0) + 1e-8)


def margin_triplets(
    distance: Float[Array, "b b"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"] | None = None,
    per_class: int = 8,
    beta: Number = 1.2,
    alpha: Number = 0.2,
    cutoff: Number = 0.5,
    fill: bool = False,
) -> tuple[Elements, Bool[Array, ""]]:
    """The margin loss over sampled triplets (Wu et al., 2017; brief, Margin loss).

    Every anchor has all its positives and as many negatives: the closest of another class at ``cutoff`` or farther.
    The i-th positive and the i-th negative, in order of their rows, make a triplet, which costs
    ``relu(d_p - beta + alpha) + relu(beta - d_n + alpha)``.  Reduced by ``nonzero_mean`` it is the released loss: the
    sum over the number of triplets with either part above 0.  Which negatives are chosen is not differentiated.

    Args:
      distance: from :func:`distances`.
      labels: classes.
      mask: which rows are real.
      per_class: the sampler's examples of a class; an anchor has at most ``per_class - 1`` triplets.
      beta: the distance that separates positives from negatives (constant: no optimiser of the released code has it).
      alpha: half of the band around it.
      cutoff: negatives nearer than this are not chosen.
      fill: whether an anchor that has too few negatives beyond the cutoff takes the closest of the nearer ones.

    Returns:
      elements of unit ``triplet``, ``[B (per_class - 1)]``, and whether the batch has no pair of two classes.

    Raises:
      ValueError: fewer than two examples of a class.
    """
    if per_class < 2:
        raise ValueError(f"per_class must be at least 2, got {per_class}: an anchor needs a positive")
    rows = labels.shape[0]
    positive, negative = pair_masks(labels, mask=mask)
    real = rows if mask is None else jnp.maximum(jnp.sum(mask), 1)
    wanted = jnp.sum(positive) // real
    k = min(per_class - 1, rows)
    ids = jnp.arange(rows)
    d = jax.lax.stop_gradient(distance)
    far = d >= cutoff
    # nearest first; what may not be chosen comes last
    order = jnp.where(negative & far, d, jnp.where(negative & fill, d + 1e3, jnp.inf))
    nearest = jax.lax.top_k(-order, k)
    chosen = jnp.where(jnp.isfinite(nearest[0]) & (jnp.arange(k) < wanted), nearest[1], rows)
    n = jnp.sort(chosen, 1)
    p = jnp.sort(jnp.where(positive, ids[None, :], rows), 1)[:, :k]
    valid = (p < rows) & (n < rows) & (jnp.arange(k) < wanted)
    p, n = jnp.where(valid, p, 0), jnp.where(valid, n, 0)
    near = jax.nn.relu(jnp.take_along_axis(distance, p, 1) - beta + alpha)
    apart = jax.nn.relu(beta - jnp.take_along_axis(distance, n, 1) + alpha)
    anchors = jnp.broadcast_to(ids[:, None], p.shape)
    index = jnp.stack([anchors, p, n], -1).reshape(-1, 3).astype(jnp.int32)
    return elements((near + apart).reshape(-1), index, valid.reshape(-1), "triplet"), ~jnp.any(negative)


def margin_loss(distance: Float[Array, "b b"], labels: Int[Array, "b"], **settings: Any) -> Float[Array, ""]:
    """:func:`margin_triplets` reduced: the sum of all costs over the number of triplets that cost something."""
    return reduce_nonzero_mean(margin_triplets(distance, labels, **settings)[0])
