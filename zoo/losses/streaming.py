"""Pair losses that never hold the similarity matrix: candidates come in tiles, and the backward pass recomputes them.

Memory is O(b d + m d + b tile) instead of O(b m); the price is one more product per tile in the backward pass.  The
values are those of ``zoo.losses.pairs`` on the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

FLOOR = -1e30
"""Stands for the logarithm of nothing: finite, so that its gradient is 0 and not NaN."""


def over_tiles(
    update: Callable[[Any, Array, Array, Array], Any],
    initial: PyTree,
    anchors: Float[Array, "b d"],
    labels: Shaped[Array, "b"],
    candidates: Float[Array, "m d"] | None = None,
    other_labels: Shaped[Array, "m"] | None = None,
    mask: Bool[Array, "b"] | None = None,
    other_mask: Bool[Array, "m"] | None = None,
    tile: int = 512,
) -> PyTree:
    """Folds ``update(carry, similarity [b, tile], positive, negative) -> carry`` over tiles of the candidates.

    Args:
      update: pure; it is differentiated by running it again, so nothing of a tile is kept.
      initial: the first carry: a pytree of per-anchor arrays or scalars.
      anchors, labels, mask: rows whose inner products with the candidates are wanted; unit rows give cosines.
      candidates, other_labels, other_mask: by default the anchors themselves, none its own candidate.
      tile: candidates at a time.

    Raises:
      ValueError: a tile below 1, or candidates without labels.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if (candidates is None) != (other_labels is None):
        raise ValueError("candidates and other_labels belong together: give both or neither")
    own = candidates is None
    rows = jnp.ones(labels.shape[0], bool) if mask is None else mask
    if own:
        candidates, other_labels, other_mask = anchors, labels, rows
    count = other_labels.shape[0]
    tile = min(tile, count)
    steps = -(-count // tile)
    pad = steps * tile - count
    real = jnp.ones(count, bool) if other_mask is None else other_mask
    ids = jnp.arange(steps * tile)
    parts = jax.tree.map(
        lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(steps, tile, *x.shape[1:]),
        (candidates, other_labels, real),
    )

    @jax.checkpoint
    def body(carry, part):
        (x, y, valid), at = part
        valid = rows[:, None] & valid[None, :]
        valid = valid & (jnp.arange(labels.shape[0])[:, None] != at[None, :]) if own else valid
        same = labels[:, None] == y[None, :]
        similarity = jnp.matmul(anchors, x.T, precision="highest")
        return update(carry, similarity, same & valid, ~same & valid), None

    return jax.lax.scan(body, initial, (parts, ids.reshape(steps, tile)))[0]


def streamed_supervised_contrastive(
    anchors: Float[Array, "b d"],
    labels: Shaped[Array, "b"],
    temperature: float | Float[Array, ""] = 0.1,
    tile: int = 512,
    **others: Any,
) -> Float[Array, "b"]:
    """:func:`zoo.losses.pairs.supervised_contrastive` of unit rows; NT-Xent if the labels name pairs of views.

    Args:
      anchors, labels: ``[b, d]`` unit rows and their labels.
      temperature: positive.
      tile: candidates at a time.
      **others: ``candidates``, ``other_labels``, ``mask``, ``other_mask`` of :func:`over_tiles`.
    """
    zero = jnp.zeros(labels.shape[0], jnp.float32)

    def update(carry, similarity, positive, negative):
        every, near, number = carry
        logits = similarity / temperature
        tile_sum = jax.nn.logsumexp(jnp.where(positive | negative, logits, FLOOR), axis=1)
        near = near + jnp.sum(jnp.where(positive, logits, 0.0), 1)
        return jnp.logaddexp(every, tile_sum), near, number + jnp.sum(positive, 1)

    every, near, number = over_tiles(
        update, (zero + FLOOR, zero, zero.astype(jnp.int32)), anchors, labels, tile=tile, **others
    )
    usable = number > 0
    return jnp.where(usable, jnp.where(usable, every, 0.0) - near / jnp.maximum(number, 1), 0.0)


def streamed_contrastive_pairs(
    anchors: Float[Array, "b d"],
    labels: Shaped[Array, "b"],
    positive_margin: float = 1.0,
    negative_margin: float = 0.5,
    tile: int = 512,
    **others: Any,
) -> Float[Array, "b"]:
    """:func:`zoo.losses.pairs.contrastive_pairs` of unit rows; arguments as there and in :func:`over_tiles`."""
    zero = jnp.zeros(labels.shape[0], jnp.float32)
    none = zero.astype(jnp.int32)

    def update(carry, similarity, positive, negative):
        near, far, p, n = carry
        near = near + jnp.sum(jnp.where(positive, jax.nn.relu(positive_margin - similarity), 0.0), 1)
        far = far + jnp.sum(jnp.where(negative, jax.nn.relu(similarity - negative_margin), 0.0), 1)
        return near, far, p + jnp.sum(positive, 1), n + jnp.sum(negative, 1)

    near, far, p, n = over_tiles(update, (zero, zero, none, none), anchors, labels, tile=tile, **others)
    return near / jnp.maximum(p, 1) + far / jnp.maximum(n, 1)
