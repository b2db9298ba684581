"""Modules that turn a query and its feedback documents into a new query vector, dense or sparse (the heads of LoL)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.bert_heads import ACTIVATIONS, l2_normalise, layer_norm
from zoo.nn.mlp import MLP
from zoo.nn.partitioning import EMBED, Dense
from zoo.nn.sparse_heads import TokenWeights, scatter_max, sparse_vector, vocabulary_max, word_mask


def _encode(body: nn.Module, ids: Array, mask: Array, token_types: Array, train: bool, keys: Array | None):
    # RoBERTa has one kind of token only
    two = getattr(getattr(body, "config", None), "token_types", 2) > 1
    return body(ids, padding_mask=mask, token_types=token_types if two else None, train=train, keys=keys)


class DenseReformulator(nn.Module):
    """Layer norm of a linear map of the first token: a dense query vector (ANCE's head), not normalised.

    Attributes:
      body: ``zoo.nn.bert.BERT``, without a head.
      features: of the frozen document vectors.
      dtype, param_dtype: of computation and parameters; the vector is float32.
    """

    body: nn.Module
    features: int = 768
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        token_types: Int[Array, "b t"],
        train: bool = False,
        keys: Array | None = None,
    ) -> Float[Array, "b f"]:
        """``[B, T] -> [B, features]``; ``keys`` (one per row) switch dropout on in training."""
        first = _encode(self.body, ids, mask, token_types, train, keys)["tokens"][:, 0]
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(self.features, (EMBED, None), name="projection", **settings)(first)
        return layer_norm(1e-5, jnp.float32, self.param_dtype, "norm")(x).astype(jnp.float32)


class SparseMLMReformulator(nn.Module):
    """The best score of each word over the tokens of a masked language model, as a unit vector over the vocabulary.

    Attributes:
      body: ``zoo.nn.bert.BERT`` with ``head="mlm"``.
      first_word, kept: ids that are words, see ``zoo.nn.sparse_heads.word_mask``.
      log_saturation: ``log(1 + x)`` of the weights.
    """

    body: nn.Module
    first_word: int = 999
    kept: tuple[int, ...] = (100,)
    log_saturation: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        token_types: Int[Array, "b t"],
        train: bool = False,
        keys: Array | None = None,
    ) -> Float[Array, "b v"]:
        """``[B, T] -> [B, vocabulary]``."""
        scores = vocabulary_max(_encode(self.body, ids, mask, token_types, train, keys)["logits"], mask)
        words = word_mask(scores.shape[1], self.first_word, self.kept)
        return sparse_vector(scores, words, self.log_saturation)


class SparseTokenReformulator(nn.Module):
    """A weight for each token of query and feedback, at the token's own word; length at most 1 (uniCOIL's head).

    Attributes:
      body: ``zoo.nn.bert.BERT``, without a head.
      vocab_size: of the frozen document vectors.
      first_word, kept, log_saturation: as in :class:`SparseMLMReformulator`.
      dtype, param_dtype: of computation and parameters.
    """

    body: nn.Module
    vocab_size: int = 30522
    first_word: int = 999
    kept: tuple[int, ...] = (100,)
    log_saturation: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        token_types: Int[Array, "b t"],
        train: bool = False,
        keys: Array | None = None,
    ) -> Float[Array, "b v"]:
        """``[B, T] -> [B, vocabulary]``."""
        tokens = _encode(self.body, ids, mask, token_types, train, keys)["tokens"]
        weights = TokenWeights(self.dtype, self.param_dtype, name="weights")(tokens)
        words = word_mask(self.vocab_size, self.first_word, self.kept)
        scores = scatter_max(weights, ids, self.vocab_size, mask)
        return sparse_vector(scores, words, self.log_saturation, "at_most_unit")


class SetReformulator(nn.Module):
    """A small reformulator over vectors: a weighted mean of query and feedback, whose weights a network gives.

    The score of a passage comes from ``[q, p, q . p]``; the query itself has score 0, so that a passage may be left out
    and the query alone stays what it is.

    Attributes:
      hidden: of the network.
      scale: length of the vectors (the inverse temperature of the softmax over unit documents).
      dtype: of computation.
    """

    hidden: tuple[int, ...] = (32,)
    scale: float = 12.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, query: Float[Array, "b d"], passages: Float[Array, "b k d"], sizes: Int[Array, "b r"]
    ) -> Float[Array, "b r d"]:
        """A vector for each revision, which reads the first ``sizes`` passages."""
        b, k, d = passages.shape
        asked = jnp.broadcast_to(query[:, None], (b, k, d))
        parts = [asked, passages, jnp.sum(asked * passages, -1, keepdims=True)]
        scorer = MLP(self.hidden, 1, dtype=self.dtype, name="scorer")
        scores = scorer(jnp.concatenate(parts, -1).reshape(b * k, -1)).reshape(b, k).astype(jnp.float32)
        reads = jnp.arange(k) < sizes[:, :, None]
        scores = jnp.concatenate([jnp.zeros((b, 1)), scores], 1)[:, None]
        reads = jnp.concatenate([jnp.ones((*sizes.shape, 1), bool), reads], 2)
        weights = jax.nn.softmax(jnp.broadcast_to(scores, reads.shape), axis=-1, where=reads)
        rows = jnp.concatenate([query[:, None], passages], 1).astype(jnp.float32)
        return self.scale * l2_normalise(jnp.einsum("brk,bkd->brd", weights, rows, precision="highest"))


class FeedbackScorer(nn.Module):
    """Is a feedback passage relevant?  The mean of its tokens, Dense, GELU, layer norm, one logit.

    Optional; trained by ``zoo.losses.retrieval.masked_bce`` with ``positive_weight=7``.

    Attributes:
      dtype, param_dtype: of computation and parameters; logits are float32.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b t d"], ends: Int[Array, "b k1"]
    ) -> tuple[Float[Array, "b k"], Bool[Array, "b k"]]:
        """Logits, and which passages are there, from a text's tokens and the positions of its separators."""
        place = jnp.arange(tokens.shape[1])
        inside = (place > ends[:, :-1, None]) & (place < ends[:, 1:, None])
        total = jnp.einsum("bkt,btd->bkd", inside.astype(jnp.float32), tokens.astype(jnp.float32), precision="highest")
        count = jnp.sum(inside, 2)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Dense(tokens.shape[2], name="dense", **settings)(total / jnp.maximum(count, 1)[..., None])
        x = layer_norm(1e-12, name="norm", **settings)(ACTIVATIONS["gelu"](x))
        return Dense(1, name="out", **settings)(x)[..., 0].astype(jnp.float32), count > 0
