"""The smallest encoder of texts: the mean of its words' vectors, and a multi-layer perceptron on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.bert_heads import masked_mean
from zoo.nn.mlp import MLP
from zoo.nn.retriever import WeightedWords


class BagOfWords(nn.Module):
    """Mean of weighted word vectors over a text's real tokens, then one hidden layer with tanh.

    Attributes:
      vocab_size: ids.
      features: size of the result.
      width: of the word vectors and of the hidden layer.
      pad_id: what padding is.
      dtype: of the computation; the mean is taken in float32.
      axis_name: for wrappers that hand it on; nothing here depends on it.
    """

    vocab_size: int
    features: int = 64
    width: int = 64
    pad_id: int = 0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b t"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b f"]:
        """``[B, T] -> [B, features]``; a text without tokens has the mean 0."""
        real = ids != self.pad_id
        tokens = WeightedWords(self.vocab_size, self.width, self.dtype, name="words")(ids, real)["tokens"]
        body = MLP((self.width,), self.features, dtype=self.dtype, activation="tanh", name="body")
        return body(masked_mean(tokens, real)).astype(jnp.float32)

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments that touch every parameter."""
        return {"ids": jax.ShapeDtypeStruct((batch, 2), jnp.int32)}
