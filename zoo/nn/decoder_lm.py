"""Decoder-only language models: GPT-2, OPT, LLaMA 1-3, Mistral, Phi and Qwen as one module, chosen by configuration.

The pre-norm block of GPT-2 (Radford et al., 2019) and its variations: learned or rotary positions, grouped queries
(Ainslie et al., 2023), gated feed-forward (Shazeer, 2020), layer or root-mean-square normalisation, post-norm
(OPT-350m), attention and feed-forward in parallel (Phi), sliding windows (Mistral), normalised queries (Qwen3).

    model = DecoderLM(PRESETS["llama-2-7b"], dtype=jnp.bfloat16)
    out = model.apply(variables, ids, padding_mask)                     # out.logits, out.last_hidden_state
    tokens = zoo.nn.generation.generate(model, variables, ids, steps=32)

Blocks are scanned: every parameter under ``layers`` has a leading axis of layers, and programs do not grow with depth.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import struct
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.attention import attention
from zoo.nn.dropout import dropout, layer_keys
from zoo.nn.kv_cache import KeyValueCache, place
from zoo.nn.partitioning import EMBED, HEADS, LAYERS, MLP, VOCAB, Dense, Embed, partitioned
from zoo.nn.rotary import SCALINGS, rotary_frequencies, rotary_tables, rotate

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
"""Supported activations; ``gelu`` is exact, ``gelu_tanh`` the approximation of GPT-2 and Phi."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a :class:`DecoderLM` looks like; the defaults are GPT-2 small's.

    Attributes:
      vocab_size: tokens.
      hidden_size: width of the residual stream.
      num_layers: blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads, shared by groups of query heads; ``None``: as many as query heads.
      head_dim: width of a head; ``None``: ``hidden_size / num_heads``.
      mlp_dim: hidden width of the feed-forward block.
      max_positions: rows of the table of learned positions.  Rotary positions have no end: it then only records how far
        the model was trained.
      positions: ``learned`` or ``rotary``.
      position_offset: rows at the head of the table of learned positions that no position uses (OPT: 2).
      rotary_fraction: share of each head's entries that is rotated (Phi: less than 1).
      rope_theta, rope_scaling, rope_factor, rope_low_frequency, rope_high_frequency, rope_original_positions: see
        :func:`zoo.nn.rotary.rotary_frequencies`.
      norm: ``layer`` (with bias) or ``rms``.
      norm_epsilon: added to the variance or mean square.
      block: ``pre`` (normalise, transform, add), ``post`` (transform, add, normalise) or ``parallel`` (attention and
        feed-forward read the same normalised input, both are added).
      final_norm: whether the stream is normalised after the last block.
      activation: a name of :data:`ACTIVATIONS`.
      gated: whether the feed-forward block is ``down(act(gate(x)) * up(x))`` rather than ``down(act(up(x)))``.
      qkv_bias, out_bias, mlp_bias, head_bias: whether the projections to heads, the one back, the feed-forward block's
        and the output head have biases.
      qk_norm: whether each head's queries and keys are normalised (with ``norm``) before they are rotated.
      window: a token sees only the last ``window`` real tokens up to itself; ``None``: all.
      head: ``tied`` (logits are inner products with the token embeddings), ``untied`` (a matrix of its own) or ``none``
        (no logits).
      embedding_dim: width of token embeddings and of the last hidden state where it differs from ``hidden_size``
        (OPT-350m): linear maps lead in and out.
      dropout, embedding_dropout, attention_dropout: rates on each branch before it is added to the stream, on the
        embeddings, and on attention's result before the projection back; see :mod:`zoo.nn.dropout`.

    Raises:
      ValueError: sizes that do not divide, unknown names, options that exclude each other.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 3072
    max_positions: int = 1024
    positions: str = "learned"
    position_offset: int = 0
    rotary_fraction: float = 1.0
    rope_theta: float = 10000.0
    rope_scaling: str = "default"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_positions: int = 8192
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    block: str = "pre"
    final_norm: bool = True
    activation: str = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    head: str = "tied"
    embedding_dim: int | None = None
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        """Checks, and writes ``None`` for what is the default, so that equal models have equal configurations."""
        choices = {
            "positions": ("learned", "rotary"), "rope_scaling": SCALINGS, "norm": ("layer", "rms"),
            "block": ("pre", "post", "parallel"), "activation": tuple(ACTIVATIONS), "head": ("tied", "untied", "none"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_size {self.hidden_size}: give head_dim"
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads = {self.kv_heads} must divide num_heads {self.num_heads} into equal groups")
        for name, default in (
            ("num_kv_heads", self.num_heads), ("head_dim", self.hidden_size / self.num_heads),
            ("embedding_dim", self.hidden_size),
        ):  # fmt: skip
            if getattr(self, name) == default:
                object.__setattr__(self, name, None)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself) or None, got {self.window}")
        if self.positions == "rotary" and (self.rotary_dim <= 0 or self.rotary_dim % 2):
            raise ValueError(
                f"rotary_fraction = {self.rotary_fraction} rotates {self.rotary_dim} of {self.head_width} entries; "
                "choose one that gives a positive even number"
            )
        if self.head_bias and self.head != "untied":
            raise ValueError(f"head_bias needs head = 'untied', got head = {self.head!r}")

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def embedding_width(self) -> int:
        """Width of token embeddings."""
        return self.embedding_dim or self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that are rotated."""
        return int(self.head_width * self.rotary_fraction)


def _llama(hidden_size: int, num_layers: int, num_heads: int, mlp_dim: int, **changes: Any) -> DecoderConfig:
    """LLaMA's settings (Touvron et al., 2023); Mistral's and Qwen's are the same but for ``changes``."""
    base = DecoderConfig(
        vocab_size=32000, max_positions=2048, positions="rotary", norm="rms", norm_epsilon=1e-6, activation="silu",
        gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, head="untied", hidden_size=hidden_size,
        num_layers=num_layers, num_heads=num_heads, mlp_dim=mlp_dim,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def _opt(hidden_size: int, num_layers: int, num_heads: int, **changes: Any) -> DecoderConfig:
    """OPT's settings (Zhang et al., 2022)."""
    base = DecoderConfig(
        vocab_size=50272, max_positions=2048, position_offset=2, activation="relu", hidden_size=hidden_size,
        num_layers=num_layers, num_heads=num_heads, mlp_dim=4 * hidden_size,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


PRESETS: dict[str, DecoderConfig] = {
    "gpt2": DecoderConfig(),
    "gpt2-medium": DecoderConfig(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096),
    "gpt2-large": DecoderConfig(hidden_size=1280, num_layers=36, num_heads=20, mlp_dim=5120),
    "gpt2-xl": DecoderConfig(hidden_size=1600, num_layers=48, num_heads=25, mlp_dim=6400),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, block="post", final_norm=False, embedding_dim=512),
    "opt-1.3b": _opt(2048, 24, 32),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-2-7b": _llama(4096, 32, 32, 11008, norm_epsilon=1e-5, max_positions=4096),
    "llama-2-70b": _llama(8192, 80, 64, 28672, num_kv_heads=8, norm_epsilon=1e-5, max_positions=4096),
    "llama-3-8b": _llama(
        4096, 32, 32, 14336, num_kv_heads=8, norm_epsilon=1e-5, max_positions=8192, vocab_size=128256, rope_theta=5e5
    ),
    "llama-3.1-8b": _llama(
        4096, 32, 32, 14336, num_kv_heads=8, norm_epsilon=1e-5, max_positions=131072, vocab_size=128256,
        rope_theta=5e5, rope_scaling="llama3", rope_factor=8.0,
    ),
    "mistral-7b": _llama(
        4096, 32, 32, 14336, num_kv_heads=8, norm_epsilon=1e-5, max_positions=32768, window=4096
    ),
    "phi-2": DecoderConfig(
        vocab_size=51200, hidden_size=2560, num_layers=32, num_heads=32, mlp_dim=10240, max_positions=2048,
        positions="rotary", rotary_fraction=0.4, block="parallel", head="untied", head_bias=True,
    ),
    "phi-3-mini-4k": _llama(
        3072, 32, 32, 8192, vocab_size=32064, norm_epsilon=1e-5, max_positions=4096, window=2047
    ),
    "qwen2-0.5b": _llama(
        896, 24, 14, 4864, num_kv_heads=2, vocab_size=151936, max_positions=131072, rope_theta=1e6, qkv_bias=True,
        head="tied",
    ),
    "qwen3-0.6b": _llama(
        1024, 28, 16, 3072, num_kv_heads=8, head_dim=128, vocab_size=151936, max_positions=40960, rope_theta=1e6,
        qk_norm=True, head="tied",
    ),
}  # fmt: skip
"""Published models."""


@struct.dataclass
class DecoderOutput:
    """What a :class:`DecoderLM` returns.

    Attributes:
      logits: ``[B, T, vocab]`` float32, of the next token; ``None`` without a head.
      last_hidden_state: ``[B, T, embedding_dim]``, after the final norm (and OPT-350m's map out).
      hidden_states: ``[layers + 1, B, T, hidden]``, the stream before the first block and after each (the last one
        before the final norm); ``None`` unless asked for.
      cache: the cache with this call's tokens added; ``None`` if none was given.
    """

    logits: Any
    last_hidden_state: Any
    hidden_states: Any = None
    cache: Any = None


@struct.dataclass
class _Shared:
    """What all blocks read: ``mask [B, 1, T, S]`` or ``None`` (causal), rotary tables or ``None``, the next slot."""

    mask: Any
    rotary: Any
    index: Any


class DecoderBlock(nn.Module):
    """One block; see :class:`DecoderConfig`.

    Attributes:
      config: of the model.
      record: whether the stream after the block is returned besides.
    """

    config: DecoderConfig
    record: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], cache: tuple[Array, Array] | None, keys: Array | None, shared: _Shared
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any]]:
        """The stream after the block, and (this layer's keys and values, the stream again if recorded).

        Args:
          x: the stream.
          cache: this layer's keys and values ``[B, length, kv_heads, head_dim]``, or ``None``.
          keys: this layer's key per example for dropout, or ``None``.
          shared: the same for all blocks.
        """
        rate = self.config.dropout
        attend_norm, feed_norm = self._norm("attention_norm"), self._norm("mlp_norm")
        if self.config.block == "parallel":
            h = attend_norm(x)
            y, cache = self._attend(h, cache, keys, shared)
            x = x + dropout(y, rate, layer_keys(keys, 1)) + dropout(self._feed(h), rate, layer_keys(keys, 2))
        elif self.config.block == "pre":
            y, cache = self._attend(attend_norm(x), cache, keys, shared)
            x = x + dropout(y, rate, layer_keys(keys, 1))
            x = x + dropout(self._feed(feed_norm(x)), rate, layer_keys(keys, 2))
        else:
            y, cache = self._attend(x, cache, keys, shared)
            x = attend_norm(x + dropout(y, rate, layer_keys(keys, 1)))
            x = feed_norm(x + dropout(self._feed(x), rate, layer_keys(keys, 2)))
        return x, (cache, x if self.record else None)

    def _attend(self, x: Array, cache: Any, keys: Array | None, shared: _Shared) -> tuple[Array, Any]:
        c = self.config

        def heads(name, number):
            y = self._dense(number * c.head_width, (EMBED, HEADS), c.qkv_bias, name)(x)
            return y.reshape(*y.shape[:-1], number, c.head_width)

        q, k, v = heads("query", c.num_heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
        if c.qk_norm:
            q, k = self._norm("query_norm")(q), self._norm("key_norm")(k)
        if shared.rotary is not None:
            q, k = rotate(q, *shared.rotary), rotate(k, *shared.rotary)
        if cache is not None:
            k, v = cache = tuple(
                lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), shared.index, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        if shared.mask is None:
            y = attention(q, k, v, causal=True, window=c.window)
        else:
            y = attention(q, k, v, shared.mask)
        y = dropout(y.reshape(*y.shape[:2], -1), c.attention_dropout, layer_keys(keys, 0))
        return self._dense(c.hidden_size, (HEADS, EMBED), c.out_bias, "out", True)(y), cache

    def _feed(self, x: Array) -> Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        up = self._dense(c.mlp_dim, (EMBED, MLP), c.mlp_bias, "up")(x)
        hidden = act(self._dense(c.mlp_dim, (EMBED, MLP), c.mlp_bias, "gate")(x)) * up if c.gated else act(up)
        return self._dense(c.hidden_size, (MLP, EMBED), c.mlp_bias, "down", True)(hidden)

    def _dense(self, features: int, axes: tuple, use_bias: bool, name: str, residual: bool = False) -> Dense:
        # what is added to the stream starts smaller by the square root of how many additions there are (GPT-2, 2.3)
        scale = 0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02
        init = nn.initializers.normal(scale)
        return Dense(features, axes, use_bias, self.dtype, self.param_dtype, init, name=name)

    def _norm(self, name: str) -> nn.Module:
        return _norm(self.config, self.dtype, self.param_dtype, name)


def _norm(config: DecoderConfig, dtype: Any, param_dtype: Any, name: str) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(
        epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name
    )  # fmt: skip


class Head(nn.Module):
    """The matrix of an untied output head; logits are accumulated and returned in float32.

    Attributes:
      features: tokens.
      use_bias: whether a bias is added.
      dtype, param_dtype: of the factors and of the parameters.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*dims d"]) -> Float[Array, "*dims v"]:
        """``[..., d] -> [..., features]``."""
        init = partitioned(nn.initializers.normal(0.02), EMBED, VOCAB)
        y = inner(x, self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype), self.dtype)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, VOCAB)
            y = y + self.param("bias", zeros, (self.features,), self.param_dtype).astype(jnp.float32)
        return y


def inner(x: Float[Array, "*dims d"], kernel: Float[Array, "d v"], dtype: Any) -> Float[Array, "*dims v"]:
    """``x @ kernel`` of factors in ``dtype``, accumulated in float32."""
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


class DecoderLM(nn.Module):
    """A decoder-only language model.

    Attributes:
      config: see :class:`DecoderConfig`.
      dtype, param_dtype: of computation and parameters.  Softmax, norms' statistics and logits are float32 always.
      remat: recompute each block in the backward pass rather than keep its activations.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"] | None = None,
        padding_mask: Bool[Array, "b t"] | None = None,
        embeddings: Float[Array, "b t e"] | None = None,
        cache: KeyValueCache | None = None,
        hidden_states: bool = False,
        train: bool = False,
        keys: Array | None = None,
    ) -> DecoderOutput:
        """Scores of every token's successor.

        Padding may stand on the left or on the right.  A token's position is the number of real tokens before it: what
        transformers computes when given ``position_ids = attention_mask.cumsum(-1) - 1`` (its ``generate`` gives them;
        OPT computes them itself).  Without them it counts padding on the left as positions, and with learned positions
        gives other numbers.  Outputs at padding mean nothing.

        Args:
          ids: tokens; give these or ``embeddings``.
          padding_mask: True at real tokens; all are real by default.
          embeddings: ``[B, T, embedding_dim]`` that stand in for those of tokens.
          cache: from :meth:`init_cache`, or of an earlier call: the tokens follow those in it.  With more tokens than
            it has room for, all results are NaN.
          hidden_states: whether to return the stream before and after every block.
          train: has no effect of its own; see ``keys``.
          keys: one key per example for dropout; ``None``: no dropout.

        Raises:
          ValueError: not exactly one of ``ids`` and ``embeddings``; embeddings of another width; more tokens than
            learned positions, or than the cache's length.
        """
        c = self.config
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings, " + ("got both" if ids is not None else "got neither"))
        if embeddings is not None and embeddings.shape[-1] != c.embedding_width:
            raise ValueError(f"embeddings are {embeddings.shape[-1]} wide, but embedding_dim = {c.embedding_width}")
        tokens = Embed(c.vocab_size, c.embedding_width, dtype=self.dtype, param_dtype=self.param_dtype, name="embed")
        x = tokens(ids) if embeddings is None else embeddings.astype(self.dtype)
        batch, length = x.shape[:2]
        if c.positions == "learned" and length > c.max_positions:
            raise ValueError(
                f"{length} tokens, but max_positions = {c.max_positions}: shorten them or enlarge the position table"
            )
        if cache is not None and length > cache.mask.shape[1]:
            raise ValueError(
                f"{length} tokens, but the cache's length is {cache.mask.shape[1]}: init_cache a longer one"
            )
        positions, mask, cache = place(padding_mask, batch, length, cache, c.window)
        if c.embedding_width != c.hidden_size:
            x = Dense(c.hidden_size, (None, EMBED), False, self.dtype, self.param_dtype, name="project_in")(x)
        rotary = None
        if c.positions == "learned":
            rows = c.max_positions + c.position_offset
            table = Embed(rows, c.hidden_size, (None, EMBED), self.dtype, self.param_dtype, name="positions")
            x = x + table(positions + c.position_offset)
        else:
            rotary = rotary_tables(positions, _frequencies(c))
        if cache is not None:  # a slice that does not fit would be moved back over older tokens without a word
            x = jnp.where(cache.index <= cache.mask.shape[1], x, jnp.nan)
        first = x = dropout(x, c.embedding_dropout, layer_keys(keys, 0))
        block = nn.remat(DecoderBlock, prevent_cse=False) if self.remat else DecoderBlock
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, 0, nn.broadcast), out_axes=0,
            length=c.num_layers, metadata_params={nn.PARTITION_NAME: LAYERS},
        )(c, hidden_states, self.dtype, self.param_dtype, name="layers")  # fmt: skip
        held = None if cache is None else (cache.key, cache.value)
        index = None if cache is None else cache.index - length
        x, (held, stream) = blocks(x, held, _per_layer(keys, c.num_layers), _Shared(mask, rotary, index))
        if cache is not None:
            cache = cache.replace(key=held[0], value=held[1])

        if c.final_norm:
            x = _norm(c, self.dtype, self.param_dtype, "final_norm")(x)
        if c.embedding_width != c.hidden_size:
            x = Dense(c.embedding_width, (EMBED, None), False, self.dtype, self.param_dtype, name="project_out")(x)
        stream = jnp.concatenate([first[None], stream]) if hidden_states else None
        logits = None
        if c.head == "tied":
            logits = inner(x, tokens.embedding.T, self.dtype)
        elif c.head == "untied":
            logits = Head(c.vocab_size, c.head_bias, self.dtype, self.param_dtype, name="head")(x)
        return DecoderOutput(logits, x, stream, cache)

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments with which ``init`` may be called."""
        return {"ids": jax.ShapeDtypeStruct((batch, 1), jnp.int32)}

    def init_cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache with room for ``length`` tokens of each of ``batch`` rows."""
        c = self.config
        shape = (c.num_layers, batch, length, c.kv_heads, c.head_width)
        nothing = jnp.zeros(shape, self.dtype)
        return KeyValueCache(nothing, nothing, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


def _frequencies(c: DecoderConfig) -> np.ndarray:
    return rotary_frequencies(
        c.rotary_dim, c.rope_theta, c.rope_scaling, c.rope_factor, c.rope_low_frequency, c.rope_high_frequency,
        c.rope_original_positions,
    )  # fmt: skip


def _per_layer(keys: Array | None, layers: int) -> Array | None:
    """Each example's key once per layer, ``[layers, B]``; key 0 is left for the embeddings."""
    if keys is None:
        return None
    derive = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return derive(keys, jnp.arange(1, layers + 1))
