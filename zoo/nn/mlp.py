"""A multi-layer perceptron as an encoder."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm


class MLP(nn.Module):
    """Dense layers with ReLU (or tanh) between them; inputs of any shape are flattened.

    Attributes:
      hidden: sizes of the hidden layers.
      features: size of the result.
      normalise: batch normalisation before each activation.
      dtype: of the computation.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
      activation: ``relu`` or ``tanh``.
    """

    hidden: tuple[int, ...] = (128,)
    features: int = 64
    normalise: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    activation: str = "relu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *dims"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b f"]:
        """``[B, ...] -> [B, features]``."""
        h = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i, width in enumerate(self.hidden, start=1):
            h = nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(h)
            if self.normalise:
                h = BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name=f"norm{i}")(h, train, mask)
            h = {"relu": nn.relu, "tanh": nn.tanh}[self.activation](h)
        return nn.Dense(self.features, dtype=self.dtype, name="out")(h)
