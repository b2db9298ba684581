"""Losses of binary segmentation, one value an example: soft Dice, and its sum with cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

Number = float | int


def dice_loss(
    probabilities: Float[Array, "b *s"],
    target: Float[Array, "b *s"] | Bool[Array, "b *s"],
    valid: Bool[Array, "b *s"] | None = None,
    smooth: Number = 1.0,
) -> Float[Array, "b"]:
    """``1 - (2 sum p t + s) / (sum p + sum t + s)`` of each example (Milletari et al., 3DV 2016, without squares).

    Args:
      probabilities: p of the foreground, in [0, 1], at each place.
      target: t, true or soft masks.
      valid: places that count; ``None`` for all.  An example without any costs 0.
      smooth: s; with it two empty masks cost 0, and the gradient is finite everywhere.

    Raises:
      ValueError: a ``smooth`` that is not positive.
    """
    if not smooth > 0:
        raise ValueError(f"smooth must be positive, got {smooth}: two empty masks would divide 0 by 0")
    p, t, counts = _places(probabilities, target, valid)
    p, t = jnp.where(counts, p, 0.0), jnp.where(counts, t, 0.0)
    both, sizes = jnp.sum(p * t, 1), jnp.sum(p, 1) + jnp.sum(t, 1)
    return 1.0 - (2.0 * both + smooth) / (sizes + smooth)


def dice_ce(
    logits: Float[Array, "b *s"],
    target: Float[Array, "b *s"] | Bool[Array, "b *s"],
    valid: Bool[Array, "b *s"] | None = None,
    weight: Number = 1.0,
    smooth: Number = 1.0,
) -> Float[Array, "b"]:
    """:func:`dice_loss` of sigmoids plus ``weight`` times the mean cross-entropy of an example's valid places.

    Args:
      logits: of the foreground at each place.
      target, valid, smooth: see :func:`dice_loss`.
      weight: of the cross-entropy.
    """
    z, t, counts = _places(logits, target, valid)
    z = jnp.where(counts, z, 0.0)
    entropy = jnp.where(counts, optax.sigmoid_binary_cross_entropy(z, t), 0.0)
    mean = jnp.sum(entropy, 1) / jnp.maximum(jnp.sum(counts, 1), 1)
    return dice_loss(jax.nn.sigmoid(z), t, counts, smooth) + weight * mean


def _places(values, target, valid):
    # one row of places an example, float32, and which of them count
    flat = lambda x: jnp.reshape(x, (x.shape[0], -1))  # noqa: E731
    values, target = flat(values).astype(jnp.float32), flat(target).astype(jnp.float32)
    return values, target, jnp.ones(values.shape, bool) if valid is None else flat(valid).astype(bool)
