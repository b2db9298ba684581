"""T5: an encoder and a decoder with relative positions, original and v1.1 (Raffel et al., 2020; Shazeer, 2020).

Blocks are pre-norm with RMS norms; scores are not scaled by ``1 / sqrt(width)`` (the initialisation has it) and get a
bias that depends on the distance of query and key, shared by all layers (section 2.1).  Version 1.1 gates the
feed-forward layer and gives the output a kernel of its own instead of the rescaled word table.

    out = model.apply(variables, ids, padding_mask, decoder_ids)      # {"encoder_tokens", "tokens", "logits"}
    words = greedy(model, variables, ids, padding_mask, length=20)    # with a key-value cache, in one lax.scan
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.attention import attention, padding_to_mask
from zoo.nn.bert_heads import ACTIVATIONS
from zoo.nn.dropout import dropout, layer_keys
from zoo.nn.partitioning import EMBED, HEADS, LAYERS, MLP, VOCAB, Dense, Embed, partitioned, unbox


@dataclasses.dataclass(frozen=True)
class T5Config:
    """What a T5 is.

    Attributes:
      vocab_size: words.
      width: of the tokens.
      head_dim: width of a head (heads times it need not be ``width``).
      num_heads: attention heads.
      mlp_width: of the feed-forward layer.
      depth: encoder blocks.
      decoder_depth: decoder blocks; 0 for an encoder alone.
      buckets: kinds of distances; even, at least 4.
      max_distance: distances from here on share a bucket.
      epsilon: of the norms.
      activation: ``relu`` (original), ``gelu_tanh`` (v1.1) or ``gelu``.
      gated: whether a second map multiplies the activation's result (v1.1).
      tied: whether logits are products with the word table.
      rescale: whether the decoder's tokens are multiplied by ``width ** -0.5`` before that (original).
      start_id: first input of the decoder.
      dropout: rate, everywhere.
    """

    vocab_size: int = 32128
    width: int = 512
    head_dim: int = 64
    num_heads: int = 8
    mlp_width: int = 2048
    depth: int = 6
    decoder_depth: int = 6
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    rescale: bool = True
    start_id: int = 0
    dropout: float = 0.1

    def __post_init__(self):
        """Refuses what does not fit together."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.buckets % 2 or self.buckets < 4:
            raise ValueError(f"buckets must be even and at least 4, got {self.buckets}")
        half = self.buckets // 2
        if self.max_distance <= half:
            raise ValueError(f"max_distance must exceed half the buckets ({half}), got {self.max_distance}")

    @classmethod
    def small(cls, **changes: Any) -> T5Config:
        """The original t5-small: 60,506,624 parameters."""
        return cls(**changes)

    @classmethod
    def base(cls, **changes: Any) -> T5Config:
        """The original t5-base: 222,903,552 parameters."""
        own = {"width": 768, "num_heads": 12, "mlp_width": 3072, "depth": 12, "decoder_depth": 12}
        return cls(**{**own, **changes})

    @classmethod
    def v1_1_base(cls, **changes: Any) -> T5Config:
        """t5-v1_1-base and flan-t5-base: 247,577,856 parameters."""
        own = {"mlp_width": 2048, "activation": "gelu_tanh", "gated": True, "tied": False, "rescale": False}
        return cls.base(**{**own, **changes})


def relative_buckets(
    distance: np.ndarray, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """The bucket of ``key position - query position`` (appendix of Raffel et al.; mesh-tensorflow's rule).

    Half of the buckets (of each direction's half, if ``bidirectional``; without it keys to come count as distance 0)
    hold one distance each, the others logarithmically growing ranges.  On the host and in float32, so that distances at
    the edge of a range fall where the reference library puts them.

    Args:
      distance: whole numbers of any shape.
      bidirectional: the encoder's, or the decoder's.
      buckets, max_distance: see :class:`T5Config`.
    """
    distance = np.asarray(distance)
    first = 0
    if bidirectional:
        buckets //= 2
        first = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + steps.astype(np.int64), buckets - 1)
    return (first + np.where(distance < exact, distance, far)).astype(np.int32)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x ** 2) + epsilon) * scale``, in float32 (Zhang and Sennrich, 2019).

    Attributes:
      epsilon: added to the mean square.
      dtype, param_dtype: of the result and the scale.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*dims d"]) -> Float[Array, "*dims d"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class T5Attention(nn.Module):
    """Attention without biases and without scaled scores, whose keys and values may come from a cache.

    Attributes:
      config, dtype, param_dtype: see :class:`T5`.
    """

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Float[Array, "b s d"] | None = None,
        mask: Bool[Array, "*#bnts"] | None = None,
        bias: Float[Array, "*#bnts"] | None = None,
        causal: bool = False,
        cache: tuple[Array, Array] | None = None,
        index: Int[Array, ""] | None = None,
        keys: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
        """Reads ``context`` (``x`` itself by default), or a cache of keys and values ``[B, S, heads, head_dim]``.

        With ``cache`` and ``index``, the keys and values of ``x`` are written there first; with ``cache`` alone it is
        read as it is.  Returns the result and the keys and values that were read.
        """
        config = self.config
        inner = config.num_heads * config.head_dim
        settings = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(y, name, std):
            init = nn.initializers.normal(std)
            y = Dense(inner, (EMBED, HEADS), kernel_init=init, name=name, **settings)(y)
            return y.reshape(*y.shape[:-1], config.num_heads, config.head_dim)

        q = heads(x, "query", (config.width * config.head_dim) ** -0.5)
        if cache is None or index is not None:
            source = x if context is None else context
            k, v = (heads(source, name, config.width**-0.5) for name in ("key", "value"))
        if cache is not None:
            place = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, 1)  # noqa: E731
            k, v = cache if index is None else (place(cache[0], k), place(cache[1], v))
        y = attention(q, k, v, mask, bias, causal, scale=1.0)
        y = dropout(y.reshape(*y.shape[:2], inner), config.dropout, keys)
        init = nn.initializers.normal(inner**-0.5)
        return Dense(config.width, (HEADS, EMBED), kernel_init=init, name="out", **settings)(y), (k, v)


class T5Block(nn.Module):
    """One block of either stack; a step of a scan over layers.

    Attributes:
      config, dtype, param_dtype: see :class:`T5`.
      decoder: whether it is causal and reads the encoder's tokens.
    """

    config: T5Config
    decoder: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        layer: Int[Array, ""],
        cache: Mapping[str, Array] | None,
        bias: Float[Array, "#b n t s"],
        mask: Bool[Array, "#b 1 #t s"] | None,
        context: Float[Array, "b u d"] | None,
        context_mask: Bool[Array, "b 1 1 u"] | None,
        index: Int[Array, ""] | None,
        keys: Array | None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the tokens, and beside them this layer's cache, or without one the tokens again."""
        config = self.config
        keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda name: RMSNorm(config.epsilon, name=name, **settings)  # noqa: E731
        drop = lambda y, n: dropout(y, config.dropout, layer_keys(keys, n))  # noqa: E731
        attend = lambda name: T5Attention(config, name=name, **settings)  # noqa: E731
        own = None if cache is None else (cache["key"], cache["value"])
        y, (key, value) = attend("attention")(
            norm("attention_norm")(x), None, mask, bias, self.decoder and cache is None, own, index, layer_keys(keys, 0)
        )
        x = x + drop(y, 1)
        if self.decoder:
            read = None if cache is None else (cache["context_key"], cache["context_value"])
            y, _ = attend("cross_attention")(
                norm("cross_attention_norm")(x), context, context_mask, cache=read, keys=layer_keys(keys, 2)
            )
            x = x + drop(y, 3)
        dense = lambda size, axes, name, std: Dense(  # noqa: E731
            size, axes, False, kernel_init=nn.initializers.normal(std), name=name, **settings
        )
        y = norm("mlp_norm")(x)
        up = dense(config.mlp_width, (EMBED, MLP), "up", config.width**-0.5)(y)
        if config.gated:
            gate = dense(config.mlp_width, (EMBED, MLP), "gate", config.width**-0.5)(y)
            y = ACTIVATIONS[config.activation](gate) * up
        else:
            y = ACTIVATIONS[config.activation](up)
        y = dense(config.width, (MLP, EMBED), "down", config.mlp_width**-0.5)(drop(y, 4))
        x = x + drop(y, 5)
        return x, x if cache is None else {"key": key, "value": value}


class T5Stack(nn.Module):
    """The encoder's or the decoder's blocks, as one scan over layers, and the norm after them.

    Attributes:
      config, dtype, param_dtype, remat: see :class:`T5`.
      decoder: which of the two.
    """

    config: T5Config
    decoder: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        padding_mask: Bool[Array, "b t"] | None = None,
        context: Float[Array, "b u d"] | None = None,
        context_padding_mask: Bool[Array, "b u"] | None = None,
        cache: Mapping[str, Array] | None = None,
        keys: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Tokens after the norm; and every block's output ``[depth, B, T, width]``, or the cache one step on."""
        config = self.config
        table = Embed(
            config.buckets, config.num_heads, (None, None), dtype=self.dtype, param_dtype=self.param_dtype,
            init=nn.initializers.normal(config.width**-0.5), name="relative",
        )  # fmt: skip
        index, mask = None, padding_to_mask(padding_mask)
        if cache is None:
            places = np.arange(x.shape[1])
            buckets = jnp.asarray(self._buckets(places[None, :] - places[:, None]))
        else:
            index, places = cache["index"], jnp.arange(cache["key"].shape[2])
            # the bucket of every distance back from the present, then each key's own; later keys are masked
            back = jnp.asarray(self._buckets(-np.arange(cache["key"].shape[2])))
            buckets = back[jnp.maximum(index - places, 0)][None, :]
            mask = (places <= index)[None, None, None, :]
        bias = jnp.moveaxis(table(buckets), -1, 0)[None]
        block = nn.remat(T5Block, prevent_cse=False) if self.remat else T5Block
        depth = config.decoder_depth if self.decoder else config.depth
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth,
            in_axes=(0, 0, *(nn.broadcast,) * 6), metadata_params={nn.PARTITION_NAME: LAYERS},
        )(config, self.decoder, self.dtype, self.param_dtype, name="layers")  # fmt: skip
        x = dropout(x, config.dropout, layer_keys(keys, depth))
        layers = None if cache is None else {k: v for k, v in cache.items() if k != "index"}
        context_mask = padding_to_mask(context_padding_mask)
        x, beside = blocks(x, jnp.arange(depth), layers, bias, mask, context, context_mask, index, keys)
        x = RMSNorm(config.epsilon, self.dtype, self.param_dtype, name="norm")(x)
        if cache is not None:
            beside = {**cache, **beside, "index": index + 1}
        return dropout(x, config.dropout, layer_keys(keys, depth + 1)), beside

    def _buckets(self, distance: np.ndarray) -> np.ndarray:
        return relative_buckets(distance, not self.decoder, self.config.buckets, self.config.max_distance)


class T5(nn.Module):
    """The encoder, and the decoder if there is one.

    Attributes:
      config: see :class:`T5Config`.
      dtype, param_dtype: of computation and parameters; logits are float32.
      remat: whether blocks are recomputed in the backward pass instead of kept.
    """

    config: T5Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        """Makes the word table, the stacks and, if it is not tied, the output kernel."""
        config, settings = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.shared = Embed(config.vocab_size, config.width, init=nn.initializers.normal(1.0), **settings)
        self.encoder = T5Stack(config, False, remat=self.remat, **settings)
        if config.decoder_depth:
            self.decoder = T5Stack(config, True, remat=self.remat, **settings)
            if not config.tied:
                init = partitioned(nn.initializers.normal(1.0), EMBED, VOCAB)
                shape = (config.width, config.vocab_size)
                self.head_kernel = self.param("head_kernel", init, shape, self.param_dtype)

    def __call__(
        self,
        ids: Int[Array, "b s"] | None = None,
        padding_mask: Bool[Array, "b s"] | None = None,
        decoder_ids: Int[Array, "b t"] | None = None,
        decoder_padding_mask: Bool[Array, "b t"] | None = None,
        embeddings: Float[Array, "b s d"] | None = None,
        decoder_embeddings: Float[Array, "b t d"] | None = None,
        hidden_states: bool = False,
        train: bool = False,
        keys: Array | None = None,
    ) -> dict[str, Any]:
        """Encodes, and decodes if there is something to decode.

        Args:
          ids: word ids of the encoder ``[B, S]``.
          padding_mask: True where there is a real token of the encoder.
          decoder_ids: what the decoder has so far ``[B, T]`` (teacher forcing: the target shifted by one, ``start_id``
            first); without it only the encoder runs.
          decoder_padding_mask: True where the decoder has a real token.
          embeddings, decoder_embeddings: rows ``[B, S, width]`` in place of those of the word table.
          hidden_states: whether to return every block's input and, last, the normalised tokens.
          train, keys: dropout is on if both are given; one key per example.

        Returns:
          A dict: ``encoder_tokens [B, S, width]``; the decoder's ``tokens [B, T, width]`` and ``logits [B, T, vocab]``;
          ``encoder_hidden_states`` and ``hidden_states`` on request (tuples of ``depth + 1`` arrays).

        Raises:
          ValueError: neither or both of ids and embeddings; something to decode without a decoder.
        """
        keys = keys if train else None
        x = self._embedded(ids, embeddings, "ids", "embeddings")
        encoded, states = self.encoder(x, padding_mask, keys=layer_keys(keys, 0))
        out: dict[str, Any] = {"encoder_tokens": encoded}
        if hidden_states:
            out["encoder_hidden_states"] = (x, *states[:-1], encoded)
        if decoder_ids is None and decoder_embeddings is None:
            return out
        if not self.config.decoder_depth:
            raise ValueError("decoder_ids given, but there is no decoder: config.decoder_depth = 0")
        x = self._embedded(decoder_ids, decoder_embeddings, "decoder_ids", "decoder_embeddings")
        y, states = self.decoder(x, decoder_padding_mask, encoded, padding_mask, keys=layer_keys(keys, 1))
        if hidden_states:
            out["hidden_states"] = (x, *states[:-1], y)
        return out | {"tokens": y, "logits": self._logits(y)}

    def init_cache(self, encoded: Float[Array, "b s d"], length: int) -> dict[str, Array]:
        """What the decoder keeps between steps: keys and values of up to ``length`` tokens, and those of the encoder.

        Args:
          encoded: ``encoder_tokens [B, S, width]``.
          length: the most steps that will be taken.  (A step beyond overwrites the last place.)

        Returns:
          ``key``, ``value [decoder_depth, B, length, heads, head_dim]``, ``context_key``, ``context_value`` (``S`` in
          place of ``length``) and ``index``, the number of steps taken.
        """
        config = self.config
        weights = unbox(self.variables["params"])["decoder"]["layers"]["cross_attention"]
        shape = (config.decoder_depth, *encoded.shape[:2], config.num_heads, config.head_dim)

        def project(name):
            kernel = weights[name]["kernel"].astype(self.dtype)
            return jnp.einsum("bsd,ldh->lbsh", encoded.astype(self.dtype), kernel).reshape(shape)

        empty = jnp.zeros((*shape[:2], length, *shape[3:]), self.dtype)
        return {
            "key": empty, "value": empty, "context_key": project("key"), "context_value": project("value"),
            "index": jnp.zeros((), jnp.int32),
        }  # fmt: skip

    def step(
        self, cache: Mapping[str, Array], ids: Int[Array, "b"], padding_mask: Bool[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b v"], dict[str, Array]]:
        """One more token of the decoder: logits of the next one ``[B, vocab]``, and the cache one step on.

        Args:
          cache: from :meth:`init_cache` or the last step.
          ids: the decoder's newest token ``[B]``.
          padding_mask: of the encoder.
        """
        x = self.shared(ids[:, None])
        y, cache = self.decoder(x, context_padding_mask=padding_mask, cache=cache)
        return self._logits(y)[:, 0], cache

    def _embedded(self, ids: Array | None, rows: Array | None, name: str, other: str) -> Array:
        if (ids is None) == (rows is None):
            raise ValueError(f"give either {name} or {other}, got " + ("neither" if ids is None else "both"))
        return self.shared(ids) if rows is None else rows.astype(self.dtype)

    def _logits(self, x: Array) -> Array:
        x = x * self.config.width**-0.5 if self.config.rescale else x
        kernel = self.shared.embedding.T if self.config.tied else self.head_kernel
        return jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Keyword arguments that touch every parameter."""
        ids = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        return {"ids": ids, "decoder_ids": ids} if self.config.decoder_depth else {"ids": ids}


def greedy(
    model: T5, variables: Any, ids: Int[Array, "b s"], padding_mask: Bool[Array, "b s"] | None, length: int
) -> Int[Array, "b {length}"]:
    """The likeliest next token, ``length`` times, with a cache: linear in ``length``, one compiled step.

    Args:
      model, variables: a T5 with a decoder.
      ids, padding_mask: of the encoder.
      length: tokens to make; the caller cuts at the end token.
    """
    encoded = model.apply(variables, ids, padding_mask)["encoder_tokens"]
    cache = model.apply(variables, encoded, length, method="init_cache")

    def one(state, _):
        cache, last = state
        logits, cache = model.apply(variables, cache, last, padding_mask, method="step")
        word = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (cache, word), word

    start = jnp.full(ids.shape[0], model.config.start_id, jnp.int32)
    return jax.lax.scan(one, (cache, start), length=length)[1].T
