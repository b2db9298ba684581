"""From a text's tokens to one sparse vector over the vocabulary: maxima of word scores, or of the tokens' own weights.

The maximum over tokens of the scores of a masked language model is SPLADE's vector (Formal et al., SIGIR 2021); one
weight for each token, put at the token's own id, is uniCOIL's (Lin and Ma, arXiv 2106.14807).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.bert_heads import l2_normalise
from zoo.nn.partitioning import EMBED, Dense


def vocabulary_max(scores: Float[Array, "b t v"], mask: Bool[Array, "b t"]) -> Float[Array, "b v"]:
    """The best score of each word over a text's real tokens, in float32; 0 for a text without any.

    Padding never wins, whatever it holds.
    """
    best = jnp.max(scores.astype(jnp.float32), axis=1, where=mask[..., None], initial=-jnp.inf)
    return jnp.where(jnp.any(mask, 1, keepdims=True), best, 0.0)


def scatter_max(
    weights: Float[Array, "b t"], ids: Int[Array, "b t"], vocab_size: int, mask: Bool[Array, "b t"]
) -> Float[Array, "b v"]:
    """The largest weight that a word has in a text, at the word's id; words that do not occur have 0.

    Args:
      weights: of tokens; negative ones count as 0.
      ids: the tokens, in ``[0, vocab_size)``.
      vocab_size: v.
      mask: which tokens are real.
    """
    rows = jnp.arange(ids.shape[0])[:, None]
    weights = jnp.where(mask, weights.astype(jnp.float32), 0.0)
    return jnp.zeros((ids.shape[0], vocab_size), jnp.float32).at[rows, ids].max(weights)


def word_mask(vocab_size: int, first_word: int, kept: tuple[int, ...] = ()) -> Bool[Array, "v"]:
    """Which ids are words: those from ``first_word`` on, and ``kept`` (BERT uncased: 999 and the unknown word, 100)."""
    words = jnp.arange(vocab_size) >= first_word
    return words.at[jnp.asarray(kept, jnp.int32)].set(True) if kept else words


def sparse_vector(
    scores: Float[Array, "b v"],
    words: Bool[Array, "v"],
    log_saturation: bool = False,
    norm: str = "unit",
) -> Float[Array, "b v"]:
    """Scores of words as a vector that is zero at most of them.

    Special tokens are exactly 0; negative scores become 0; ``log(1 + x)`` if asked; then the length.

    Args:
      scores: of words.
      words: which ids are words.
      log_saturation: whether large weights are damped.
      norm: ``unit`` (length 1; a vector of zeros stays so), ``at_most_unit`` (longer ones are cut to 1) or ``none``.

    Raises:
      ValueError: an unknown norm.
    """
    if norm not in ("unit", "at_most_unit", "none"):
        raise ValueError(f"norm must be 'unit', 'at_most_unit' or 'none', got {norm!r}")
    x = jax.nn.relu(jnp.where(words, scores.astype(jnp.float32), 0.0))
    x = jnp.log1p(x) if log_saturation else x
    if norm == "none":
        return x
    if norm == "unit":
        return l2_normalise(x)
    square = jnp.sum(x * x, 1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1.0))


class TokenWeights(nn.Module):
    """One non-negative weight for each token: a linear map to a number, then ReLU (uniCOIL's head).

    Attributes:
      dtype, param_dtype: of computation and parameters; the weights are float32.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b t"]:
        """``[B, T, width] -> [B, T]``."""
        x = Dense(1, (EMBED, None), dtype=self.dtype, param_dtype=self.param_dtype, name="weight")(tokens)
        return jax.nn.relu(x[..., 0].astype(jnp.float32))
