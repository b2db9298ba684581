"""Classification losses that keep one value per example: smoothed cross-entropy, and alignment to fixed prototypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.ops.prototypes import l2_normalize

Number = float | int


def label_smoothing_ce(
    logits: Float[Array, "*b c"], labels: Int[Array, "*b"], smoothing: Number = 0.1
) -> Float[Array, "*b"]:
    """``(1 - s) (-log p_t) + s mean_k (-log p_k)``: the smoothing mass lies on all C classes, the target's included.

    Args:
      logits: of any dtype; computed in float32.
      labels: classes t in ``[0, C)``.
      smoothing: s in [0, 1]; 0 is the softmax cross-entropy.

    Raises:
      ValueError: s outside [0, 1].
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    target = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return -(1 - smoothing) * target - smoothing * jnp.mean(log_p, axis=-1)


def prototype_ce(
    h: Float[Array, "b d"],
    prototypes: Float[Array, "c d"],
    labels: Int[Array, "b"],
    smoothing: Number = 0.1,
    scale: Number = 1.0,
) -> Float[Array, "b"]:
    """Smoothed cross-entropy of ``scale h P^T / |h|`` against fixed prototypes: the influence loss of backward
    compatible training (Shen et al., CVPR 2020).

    Args:
      h: features of any length; their directions are compared.
      prototypes: P, as they are (not normalised); no gradient reaches them.
      labels, smoothing: see :func:`label_smoothing_ce`.
      scale: inverse temperature.
    """
    fixed = jax.lax.stop_gradient(prototypes.astype(jnp.float32))
    logits = scale * jnp.matmul(l2_normalize(h.astype(jnp.float32)), fixed.T, precision=jax.lax.Precision.HIGHEST)
    return label_smoothing_ce(logits, labels, smoothing)


def cosine_alignment(h: Float[Array, "b d"], targets: Float[Array, "b d"]) -> Float[Array, "b"]:
    """``1 - cos(h, target)`` of each row; no gradient reaches the targets, and none flows where a row is zero.

    Args:
      h, targets: rows of any length.
    """
    fixed = jax.lax.stop_gradient(targets.astype(jnp.float32))
    return 1.0 - jnp.sum(l2_normalize(h.astype(jnp.float32)) * l2_normalize(fixed), axis=-1)


def aligned_ce(
    h: Float[Array, "b d"],
    prototypes: Float[Array, "c d"],
    labels: Int[Array, "b"],
    ce: Number = 10.0,
    cosine: Number = 5.0,
    smoothing: Number = 0.1,
) -> Float[Array, "b"]:
    """``ce prototype_ce(h, P, t) + cosine cosine_alignment(h, p_t)``: OCA's "aligned cross-entropy" (ACE).

    Args:
      h, prototypes, labels, smoothing: see :func:`prototype_ce`.
      ce, cosine: weights of both parts.
    """
    return ce * prototype_ce(h, prototypes, labels, smoothing) + cosine * cosine_alignment(h, prototypes[labels])
