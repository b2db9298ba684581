"""What stands on top of a text encoder's tokens, for BERT's kin and ViLT: pooling, and scores of words and texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.dropout import dropout, layer_keys
from zoo.nn.partitioning import EMBED, VOCAB, Dense, partitioned

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
"""Activations by name: ``gelu`` is the exact one (erf), ``gelu_tanh`` its approximation."""


def layer_norm(epsilon: float, dtype: Any, param_dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """Layer normalisation with float32 statistics; the variance by two passes, as the reference libraries take it."""
    return nn.LayerNorm(epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


def l2_normalise(x: Float[Array, "*dims d"]) -> Float[Array, "*dims d"]:
    """Rows of length one, in float32; rows of zeros stay zero (torch's ``normalize``)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def masked_mean(x: Float[Array, "b t d"], mask: Bool[Array, "b t"] | None) -> Float[Array, "b d"]:
    """Mean over the tokens whose mask is true, in float32; zero where none is."""
    x = x.astype(jnp.float32)
    if mask is None:
        return jnp.mean(x, axis=1)
    total = jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(jnp.float32)


class MaskedLMHead(nn.Module):
    """Dense, activation, norm, then a score for every word of the vocabulary (Devlin et al., 2019, section 3.1).

    Attributes:
      vocab_size: words.
      activation: a name of :data:`ACTIVATIONS`.
      epsilon: of the norm.
      tied: whether the scores are products with the word table, which the caller hands over, or a kernel of its own.
      dtype, param_dtype: of computation and parameters; logits are float32.
    """

    vocab_size: int
    activation: str = "gelu"
    epsilon: float = 1e-12
    tied: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], table: Float[Array, "v d"]) -> Float[Array, "b t v"]:
        """Logits ``[B, T, vocab]`` from tokens and the word table ``[vocab, width]``."""
        width = x.shape[-1]
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(width, (EMBED, None), name="dense", **settings)(x)
        x = layer_norm(self.epsilon, name="norm", **settings)(ACTIVATIONS[self.activation](x))
        if self.tied:
            kernel = table.T
        else:
            init = partitioned(nn.initializers.lecun_normal(), EMBED, VOCAB)
            kernel = self.param("kernel", init, (width, self.vocab_size), self.param_dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros, VOCAB), (self.vocab_size,), self.param_dtype)
        logits = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits + bias.astype(jnp.float32)


class SentenceHead(nn.Module):
    """One row of numbers per text, from its first token or from what a pooler made of it.

    Attributes:
      features: numbers per text (classes; 1 for a cross-encoder's score).
      hidden_activation: activation of a square hidden layer before the output (``tanh``: RoBERTa, ``relu``:
        DistilBERT); ``None`` if a pooler has already been (BERT).
      dropout_first: whether the input of the hidden layer is dropped too (RoBERTa).
      dropout: rate.
      dtype, param_dtype: of computation and parameters; the result is float32.
    """

    features: int
    hidden_activation: str | None = None
    dropout_first: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], keys: Array | None = None) -> Float[Array, "b n"]:
        """``[B, width] -> [B, features]``; ``keys`` (one per example) switch dropout on."""
        if self.hidden_activation is not None:
            x = dropout(x, self.dropout, layer_keys(keys, 0)) if self.dropout_first else x
            x = Dense(
                x.shape[-1], (EMBED, None), dtype=self.dtype, param_dtype=self.param_dtype, name="hidden"
            )(x)  # fmt: skip
            x = ACTIVATIONS[self.hidden_activation](x)
        x = dropout(x, self.dropout, layer_keys(keys, 1)).astype(jnp.float32)
        return Dense(self.features, (EMBED, None), dtype=jnp.float32, param_dtype=self.param_dtype, name="out")(x)
