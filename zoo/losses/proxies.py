"""Losses against one learned vector per class: proxies and margin-softmax heads, on cosines ``[b, C]``."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.losses.pairs import _softplus_sum

Number = float | int


def proxy_anchor(
    cosine: Float[Array, "b c"],
    labels: Int[Array, "b"],
    alpha: Number = 32.0,
    delta: Number = 0.1,
    mask: Bool[Array, "b"] | None = None,
) -> Float[Array, "c"]:
    """ProxyAnchor, one value per PROXY; their sum is the loss (Kim et al., CVPR 2020, equation 4; tcm brief).

    ``(1/|P+|) sum over proxies with an example of log(1 + sum_{x of its class} exp(-alpha (s - delta)))`` plus
    ``(1/|P|) sum over all proxies of log(1 + sum_{x of other classes} exp(alpha (s + delta)))``.  It belongs to no
    single example: each logarithm runs over the whole batch.

    Args:
      cosine: of each example with each proxy.
      labels: classes in ``[0, C)``.
      alpha, delta: scale and margin.
      mask: which rows are real.
    """
    real = jnp.ones(labels.shape, bool) if mask is None else mask
    own = jax.nn.one_hot(labels, cosine.shape[1], dtype=bool) & real[:, None]
    other = ~jax.nn.one_hot(labels, cosine.shape[1], dtype=bool) & real[:, None]
    s = cosine.astype(jnp.float32).T
    near = _softplus_sum(-alpha * (s - delta), own.T)
    far = _softplus_sum(alpha * (s + delta), other.T)
    present = jnp.any(own, 0)
    return jnp.where(present, near, 0.0) / jnp.maximum(jnp.sum(present), 1) + far / cosine.shape[1]


def proxy_nca(
    squared_distance: Float[Array, "b c"], labels: Int[Array, "b"], temperature: Number = 1.0
) -> Float[Array, "b"]:
    """ProxyNCA: ``d_y / t + log sum_{c != y} exp(-d_c / t)`` (Movshovitz-Attias et al., ICCV 2017, equation 4).

    Args:
      squared_distance: of unit examples to unit proxies.
      labels: classes in ``[0, C)``.
      temperature: 1 in the paper; 1/9 in ProxyNCA++.
    """
    logits = -squared_distance.astype(jnp.float32) / temperature
    own = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    return jax.nn.logsumexp(logits, axis=1, where=~own) - jnp.sum(jnp.where(own, logits, 0.0), 1)


def cosface_logits(
    cosine: Float[Array, "b c"], labels: Int[Array, "b"], margin: Number = 0.35, scale: Number = 64.0
) -> Float[Array, "b c"]:
    """``scale (cos - margin)`` for the own class, ``scale cos`` for the others (Wang et al., CVPR 2018, equation 4)."""
    own = jax.nn.one_hot(labels, cosine.shape[1], dtype=bool)
    return scale * jnp.where(own, cosine - margin, cosine)


def arcface_logits(
    cosine: Float[Array, "b c"], labels: Int[Array, "b"], margin: Number = 0.5, scale: Number = 64.0
) -> Float[Array, "b c"]:
    """``scale cos(theta + margin)`` for the own class, ``scale cos`` for the others (Deng et al., CVPR 2019, eq. 3).

    Where ``theta + margin`` passes pi the cosine would rise again; there it is ``cos - margin sin(margin)``, as in the
    released code, so that the logit keeps falling with the angle.

    Args:
      cosine: of each example with each class vector.
      labels: classes in ``[0, C)``.
      margin: radians, in [0, pi).
      scale: multiplies all logits.

    Raises:
      ValueError: a margin outside [0, pi).
    """
    if not 0 <= margin < math.pi:
        raise ValueError(f"margin must lie in [0, pi), got {margin}")
    # the root's slope at 1 is infinite: a cosine that rounding took there moves by its margin alone
    square = 1.0 - jnp.square(cosine)
    flat = square <= 1e-12
    sine = jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, square)))
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    turned = jnp.where(cosine > math.cos(math.pi - margin), turned, cosine - margin * math.sin(margin))
    own = jax.nn.one_hot(labels, cosine.shape[1], dtype=bool)
    return scale * jnp.where(own, turned, cosine)
