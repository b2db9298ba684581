"""Spatial attention: one weight per position of a feature map, learned by whatever loss uses the gated features."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class SpatialAttentionGate(nn.Module):
    """``F' = F A(F)``: three 3 x 3 convolutions, ReLU between them and a sigmoid after, shared by all channels.

    Attributes:
      first, second: channels of the first two convolutions (published: an eighth and a 32nd of the input's).
      dtype: of computation.
    """

    first: int
    second: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w 1"]]:
        """Gates a feature map.

        Returns:
          the gated features, and the map, float32 in (0, 1).
        """
        layer = lambda n, name: nn.Conv(n, (3, 3), padding=[(1, 1)] * 2, dtype=self.dtype, name=name)  # noqa: E731
        y = nn.relu(layer(self.first, "conv1")(x))
        y = nn.relu(layer(self.second, "conv2")(y))
        weight = nn.sigmoid(layer(1, "conv3")(y).astype(jnp.float32))
        return x * weight.astype(x.dtype), weight
