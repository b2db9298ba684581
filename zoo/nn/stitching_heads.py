"""Heads over similarities to anchors, shared by whatever is stitched: their input width is the number of anchors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.ops.prototypes import l2_normalize


def batch_standardise(
    h: Float[Array, "b k"], mask: Bool[Array, "b"] | None = None, eps: float = 1e-5, axis_name: str | None = None
) -> Float[Array, "b k"]:
    """Each feature minus its mean over the batch's real rows, over its (biased) standard deviation.

    There are no running statistics: **the result for one row depends on the other rows**, at test time too.
    """
    h = h.astype(jnp.float32)
    weight = jnp.ones((h.shape[0], 1)) if mask is None else mask[:, None].astype(jnp.float32)
    over = (lambda v: v) if axis_name is None else (lambda v: jax.lax.psum(v, axis_name))
    count = jnp.maximum(over(jnp.sum(weight)), 1.0)
    mean = over(jnp.sum(jnp.where(weight > 0, h, 0.0), 0)) / count
    variance = over(jnp.sum(jnp.where(weight > 0, jnp.square(h - mean), 0.0), 0)) / count
    return (h - mean) * jax.lax.rsqrt(variance + eps)


class SimilarityAttention(nn.Module):
    """Self-attention over anchors: each similarity becomes a token, the tokens attend, one number comes back for each.

    Attributes:
      features, heads: of the attention.
    """

    features: int = 16
    heads: int = 2

    @nn.compact
    def __call__(self, r: Float[Array, "b k"]) -> Float[Array, "b k"]:
        """``[B, k] -> [B, k]``."""
        r = nn.LayerNorm(epsilon=1e-5, name="norm")(r)
        normal = nn.initializers.normal(1.0)
        shape = (r.shape[-1], self.features)
        query, key, value = (r[..., None] * self.param(n, normal, shape) for n in ("queries", "keys", "values"))
        attended = nn.MultiHeadDotProductAttention(self.heads, name="attention")(query, key, value)
        return nn.Dense(1, use_bias=False, name="aggregate")(attended)[..., 0]


class RelativeHead(nn.Module):
    """What sits on a layer whose output is already normalised: hidden layers with tanh, if any, and a linear map.

    Attributes:
      features: outputs (classes).
      hidden: widths of the hidden layers.
      dtype: of the computation.
    """

    features: int
    hidden: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, r: Float[Array, "b k"]) -> Float[Array, "b c"]:
        """``[B, k] -> [B, features]``."""
        for i, width in enumerate(self.hidden, start=1):
            r = nn.tanh(nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(r))
        return nn.Dense(self.features, dtype=self.dtype, name="out")(r)


class StitchingHead(nn.Module):
    """The head of the stitching experiments: L2 rows, LayerNorm, Linear(k, k), activation, normalisation, Linear.

    Attributes:
      features: outputs (classes).
      standardise: ``"layer"`` ends with a layer norm; ``"batch"`` is the released code's :func:`batch_standardise`,
        whose predictions depend on the batch they are made in.
      activation: ``"tanh"`` (images) or ``"silu"`` (text).
      dtype: of the computation.
      axis_name: the mapped axis of ``"batch"``.
    """

    features: int
    standardise: str = "layer"
    activation: str = "tanh"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, r: Float[Array, "b k"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b c"]:
        """``[B, k] -> [B, features]``.

        Raises:
          ValueError: an unknown normalisation or activation.
        """
        if self.standardise not in ("layer", "batch") or self.activation not in ("tanh", "silu"):
            raise ValueError(
                "standardise must be 'layer' or 'batch', activation 'tanh' or 'silu'; got "
                f"{self.standardise!r} and {self.activation!r}"
            )
        h = nn.LayerNorm(epsilon=1e-5, name="norm")(l2_normalize(r))
        h = nn.Dense(r.shape[-1], dtype=self.dtype, name="hidden")(h)
        h = (nn.tanh if self.activation == "tanh" else nn.silu)(h)
        if self.standardise == "batch":
            h = batch_standardise(h, mask, axis_name=self.axis_name)
        else:
            h = nn.LayerNorm(epsilon=1e-5, use_scale=False, use_bias=False, name="hidden_norm")(h)
        return nn.Dense(self.features, dtype=self.dtype, name="out")(h)
