"""Gaussian likelihoods of reconstructions (their companion, the KL term, is ``zoo.losses.ranking.gaussian_kl``)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def optimal_sigma_nll(
    prediction: Float[Array, "b *dims"], target: Float[Array, "b *dims"], mask: Bool[Array, "b"] | None = None
) -> Float[Array, "b"]:
    """Gaussian negative log-likelihood under the one scale that fits the whole batch best (sigma-VAE; no constant).

    With ``mse`` the mean squared error over all real elements and ``s = 0.5 log mse``, each element costs
    ``0.5 ((x - x') / exp s)^2 + s``.  The gradient flows through s too: the sum over a batch of N elements is
    ``N (1 + log mse) / 2``, whatever the scale of the data.  Pass the WHOLE global batch.

    Args:
      prediction, target: reconstructions and what they should be.
      mask: real rows; others cost 0 and have no say in s.

    Returns:
      f32 ``[b]``, summed over each example's elements.
    """
    axes = tuple(range(1, target.ndim))
    square = jnp.square(target.astype(jnp.float32) - prediction.astype(jnp.float32))
    real = jnp.ones(target.shape[0], bool) if mask is None else mask
    per_example = jnp.where(real, jnp.sum(square, axes), 0.0)
    size = target[0].size
    # a perfect reconstruction has no finite likelihood
    mse = jnp.maximum(jnp.sum(per_example) / (size * jnp.maximum(jnp.sum(real), 1)), 1e-12)
    return jnp.where(real, 0.5 * per_example / mse + 0.5 * size * jnp.log(mse), 0.0)
