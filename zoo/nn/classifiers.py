"""Classifiers on an encoder's features: fixed prototypes, learned prototypes under the cosine, and a linear head."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.ops.prototypes import cosine_logits
from zoo.ops.simplex import etf_prototypes


class FixedClassifier(nn.Module):
    """Logits against class prototypes that are never trained: the vertices of a regular simplex.

    The prototypes are the variable ``constants/prototypes`` ``[K, d]``: checkpointed, but without gradient, decay or
    moments.  There is no bias and no temperature; the length of the features is the temperature.

    Attributes:
      num_classes: K, all classes there will ever be; it cannot grow once a model is trained.
      features: d, at least K-1; K-1 by default.
    """

    num_classes: int
    features: int | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """``[B, d] -> [B, K]`` in float32.

        Raises:
          ValueError: features of another size than the prototypes.
        """
        dim = self.num_classes - 1 if self.features is None else self.features
        if z.shape[-1] != dim:
            raise ValueError(f"feature size {z.shape[-1]} differs from simplex dimension {dim}")
        make = lambda: etf_prototypes(self.num_classes, dim)  # noqa: E731
        prototypes = self.variable("constants", "prototypes", make).value
        return z.astype(jnp.float32) @ prototypes.astype(jnp.float32).T


class CosineClassifier(nn.Module):
    """Scaled cosines between features and learned prototypes, ``params/prototypes`` ``[K, d]``.

    Attributes:
      num_classes: K.
      scale: multiplies the cosines.
    """

    num_classes: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, z: Float[Array, "b d"], class_mask: Bool[Array, "k"] | None = None) -> Float[Array, "b k"]:
        """``[B, d] -> [B, K]`` in float32; classes that ``class_mask`` leaves out get minus infinity."""
        shape = (self.num_classes, z.shape[-1])
        prototypes = self.param("prototypes", nn.initializers.lecun_normal(), shape, jnp.float32)
        return cosine_logits(z.astype(jnp.float32), prototypes, self.scale, class_mask)


class RetrievalHead(nn.Module):
    """A linear map from an encoder's features to the space of retrieval; nothing at all if they have its size.

    Attributes:
      dim: d of the result.
      use_bias: whether the map has a bias.
      dtype: of the computation.
    """

    dim: int
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "b f"]) -> Float[Array, "b d"]:
        """``[B, D] -> [B, d]``."""
        if h.shape[-1] == self.dim:
            return h
        return nn.Dense(self.dim, use_bias=self.use_bias, dtype=self.dtype, name="fc")(h.astype(self.dtype))
