"""Encoders of queries and documents into one vector each, and which parameters the two sides share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.bert_heads import layer_norm, masked_mean
from zoo.nn.partitioning import EMBED, Dense, Embed


class WeightedWords(nn.Module):
    """A body without layers: each token is its word's vector times its word's weight (a bag of words when averaged).

    Small enough to train from a few hundred queries if it starts from known vectors and weights (latent semantics and
    inverse document frequencies, say).

    Attributes:
      vocab_size, width: of the table.
      dtype, param_dtype: of computation and parameters.
    """

    vocab_size: int
    width: int = 128
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        padding_mask: Bool[Array, "b t"] | None = None,
        train: bool = False,
        keys: Array | None = None,
    ) -> dict[str, Array]:
        """``{"tokens": [B, T, width]}``; ``train`` and ``keys`` are for bodies with dropout."""
        words = Embed(self.vocab_size, self.width, dtype=self.dtype, param_dtype=self.param_dtype, name="word")(ids)
        weight = self.param("weight", nn.initializers.ones, (self.vocab_size,), self.param_dtype)
        return {"tokens": words * jnp.take(weight, ids)[..., None].astype(self.dtype)}


def _orthogonal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    # in float32: there is no QR decomposition of half precision
    return nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


class DenseRetriever(nn.Module):
    """Body, one vector of its tokens, linear map, layer norm: the encoder of ANCE, STAR and ADORE.

    Scores are inner products of two such vectors, with neither normalisation nor temperature.

    Attributes:
      body: ``(ids, padding_mask, train, keys) -> {"tokens": [B, T, width]}``: ``zoo.nn.bert.BERT``, or
        :class:`WeightedWords`.
      features: of the vector; the body's width by default.
      pooling: ``first`` token or ``mean`` of the real ones.
      norm: whether the layer norm is there.
      pad_id: what padding is.
      dtype, param_dtype: of computation and parameters; the vector is float32.
    """

    body: nn.Module
    features: int | None = None
    pooling: str = "first"
    norm: bool = True
    pad_id: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Refuses an unknown pooling."""
        super().__post_init__()
        if self.pooling not in ("first", "mean"):
            raise ValueError(f"pooling must be first or mean, got {self.pooling!r}")

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"], train: bool = False, keys: Array | None = None) -> Float[Array, "b f"]:
        """``[B, T] -> [B, features]``; ``keys`` (one per example) switch dropout on in training."""
        real = ids != self.pad_id
        tokens = self.body(ids, padding_mask=real, train=train, keys=keys)["tokens"]
        x = masked_mean(tokens, real) if self.pooling == "mean" else tokens[:, 0].astype(jnp.float32)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # inner products of what the body knows already are kept
        start = _orthogonal
        x = Dense(self.features or x.shape[-1], (EMBED, None), kernel_init=start, name="projection", **settings)(x)
        return (layer_norm(1e-5, jnp.float32, self.param_dtype, "norm")(x) if self.norm else x).astype(jnp.float32)

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments that touch every parameter."""
        return {"ids": jax.ShapeDtypeStruct((batch, 2), jnp.int32)}


Encode = Callable[[Mapping[str, Any], Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Towers:
    """Two encoders over one tree of parameters.

    Attributes:
      init: ``(rng, queries, documents) -> params``.
      query, document: ``(params, inputs [B, ...], keys) -> vectors [B, d]``; ``keys`` (one per example) mean training.
    """

    init: Callable[[Any, Any, Any], Mapping[str, Any]]
    query: Encode
    document: Encode


def _apply(module: nn.Module, part: str) -> Encode:
    accepted = inspect.signature(type(module).__call__).parameters

    def encode(params, inputs, keys=None):
        offered = {"train": keys is not None, "keys": keys}
        return module.apply({"params": params[part]}, inputs, **{k: v for k, v in offered.items() if k in accepted})

    return encode


def shared_towers(module: nn.Module) -> Towers:
    """One encoder for both sides; its parameters lie under ``encoder``."""
    encode = _apply(module, "encoder")

    def init(rng, queries, documents):
        return {"encoder": module.init(rng, jnp.asarray(queries))["params"]}

    return Towers(init, encode, encode)


def two_towers(query: nn.Module, document: nn.Module) -> Towers:
    """An encoder for each side, under ``query`` and ``document``."""

    def init(rng, queries, documents):
        a, b = jax.random.split(rng)
        return {
            "query": query.init(a, jnp.asarray(queries))["params"],
            "document": document.init(b, jnp.asarray(documents))["params"],
        }

    return Towers(init, _apply(query, "query"), _apply(document, "document"))


def query_tower(module: nn.Module) -> Towers:
    """An encoder of queries, under ``encoder``, for documents that are vectors already (cached, or another model's)."""

    def init(rng, queries, documents):
        return {"encoder": module.init(rng, jnp.asarray(queries))["params"]}

    return Towers(init, _apply(module, "encoder"), lambda params, inputs, keys=None: inputs)
