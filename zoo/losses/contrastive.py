"""Contrastive losses that keep one value per example, in O(B^2 + B d) memory.

Both compare by cosine similarity, in float32 whatever the dtype of the features, and by log-sum-exp, so that no
temperature overflows.  Rows masked out are neither anchors nor negatives, and their loss is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from zoo.ops.prototypes import l2_normalize


def unit_rows(z: Float[Array, "b d"], mask: Bool[Array, "b"] | None = None) -> Float[Array, "b d"]:
    """Rows scaled to length 1, in float32; all-zero and masked rows become 0, with zero gradient.

    Args:
      z: features.
      mask: which rows are real; ``None`` for all.  Masked rows may hold anything, NaN included.
    """
    z = z.astype(jnp.float32)
    if mask is not None:
        z = jnp.where(mask[:, None], z, 0.0)
    return l2_normalize(z)


def nt_xent_per_example(
    z1: Float[Array, "b d"],
    z2: Float[Array, "b d"],
    temperature: float | Float[Array, ""] = 0.2,
    mask: Bool[Array, "b"] | None = None,
) -> Float[Array, "b"]:
    """The normalised temperature-scaled cross-entropy of SimCLR, per example.

    The anchor ``z1[i]`` should pick ``z2[i]`` among the 2B-1 other features of the batch, and the other way round; an
    example's loss is the mean of its two anchors' (Chen et al., 2020, equation 1; dbpm brief, section Definition).

    Args:
      z1, z2: features of the two views; row ``i`` of both belongs to example ``i``.
      temperature: divides the cosine similarities; positive.
      mask: which rows are real; ``None`` for all.

    Returns:
      f32 ``[B]`` losses in nats; 0 where masked.  ``log(2B - 1)`` if all features are equal.

    Raises:
      ValueError: a temperature that is not positive.
    """
    _check_temperature(temperature)
    real = jnp.ones(z1.shape[0], bool) if mask is None else mask
    z1, z2 = unit_rows(z1, real), unit_rows(z2, real)
    own = jnp.eye(z1.shape[0], dtype=bool)
    # an anchor's own positive always counts, so that the log-sum-exp of a masked row stays finite
    keep = jnp.concatenate([real[None, :] | own, real[None, :] & ~own], axis=1)

    def anchors(a: Array, b: Array) -> Array:
        across, within = _matmul(a, b) / temperature, _matmul(a, a) / temperature
        every = jax.nn.logsumexp(jnp.concatenate([across, within], axis=1), axis=1, where=keep)
        return every - jnp.diagonal(across)

    return jnp.where(real, (anchors(z1, z2) + anchors(z2, z1)) / 2, 0.0)


def info_nce_per_example(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    temperature: float | Float[Array, ""] = 0.07,
    mask: Bool[Array, "b"] | None = None,
    symmetric: bool = True,
) -> Float[Array, "b"]:
    """InfoNCE between two towers, per example: negatives come from the other tower only.

    ``a[i]`` should pick ``b[i]`` among all rows of ``b`` (van den Oord et al., 2018, equation 4); symmetric, as for
    image-text pairs (Radford et al., 2021, figure 3), the mean with ``b[i]`` picking ``a[i]``.

    Args:
      a, b: features of the two towers; row ``i`` of both belongs to pair ``i``.
      temperature: divides the cosine similarities; positive.
      mask: which rows are real; ``None`` for all.
      symmetric: whether both directions count.

    Returns:
      f32 ``[B]`` losses in nats; 0 where masked.  ``log(B)`` if all features are equal.

    Raises:
      ValueError: a temperature that is not positive.
    """
    _check_temperature(temperature)
    real = jnp.ones(a.shape[0], bool) if mask is None else mask
    logits = _matmul(unit_rows(a, real), unit_rows(b, real)) / temperature
    keep = real[None, :] | jnp.eye(a.shape[0], dtype=bool)
    positive = jnp.diagonal(logits)
    loss = jax.nn.logsumexp(logits, axis=1, where=keep) - positive
    if symmetric:
        loss = (loss + jax.nn.logsumexp(logits.T, axis=1, where=keep) - positive) / 2
    return jnp.where(real, loss, 0.0)


def _matmul(a: Array, b: Array) -> Array:
    # full float32: a cosine rounded to 10 bits and divided by a small temperature is off by a per cent
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _check_temperature(temperature: float | Array) -> None:
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; the brief's default is 0.2")
