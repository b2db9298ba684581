"""Mamba: a language model of selective state spaces (Gu and Dao, 2023), without attention.

Each layer gates a causal convolution followed by a recurrence whose step, input and output maps depend on the token
(section 3.2, algorithm 2); a state of fixed size stands in for a cache that grows.

    model = Mamba(PRESETS["mamba-130m"], dtype=jnp.bfloat16)
    out = model.apply(variables, ids, padding_mask)                     # out.logits, out.last_hidden_state
    out = model.apply(variables, token, cache=out.cache)                # one token more, after a call with a cache

Layers are scanned, as in :mod:`zoo.nn.decoder_lm`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.decoder_lm import Head, inner
from zoo.nn.partitioning import EMBED, LAYERS, MLP, Dense, Embed, partitioned


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """What a :class:`Mamba` looks like; the defaults are the 130M model's.

    Attributes:
      vocab_size: tokens.
      hidden_size: width of the residual stream.
      num_layers: layers.
      inner_size: channels of the recurrence; ``None``: twice ``hidden_size``.
      state_size: numbers that each channel remembers (N).
      conv_size: taps of the causal convolution.
      step_rank: rank of the map to step sizes; ``None``: ``hidden_size / 16``, rounded up.
      norm_epsilon: added to the mean square.
      use_bias: whether the projections in and out have biases.
      conv_bias: whether the convolution has one.
      head: ``tied``, ``untied`` or ``none``, as in :class:`zoo.nn.decoder_lm.DecoderConfig`.
      float32_stream: whether the residual stream is float32 whatever ``dtype`` is.
      step_min, step_max, step_floor: step sizes at initialisation are drawn log-uniformly between the first two, and
        are at least the third.

    Raises:
      ValueError: sizes that are not positive, an unknown head.
    """

    vocab_size: int = 50280
    hidden_size: int = 768
    num_layers: int = 24
    inner_size: int | None = None
    state_size: int = 16
    conv_size: int = 4
    step_rank: int | None = None
    norm_epsilon: float = 1e-5
    use_bias: bool = False
    conv_bias: bool = True
    head: str = "tied"
    float32_stream: bool = True
    step_min: float = 0.001
    step_max: float = 0.1
    step_floor: float = 1e-4

    def __post_init__(self):
        """Checks, and writes ``None`` for what is the default, so that equal models have equal configurations."""
        if self.head not in ("tied", "untied", "none"):
            raise ValueError(f"head must be one of tied, untied, none, got {self.head!r}")
        for name in ("hidden_size", "num_layers", "state_size", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, default in (("inner_size", 2 * self.hidden_size), ("step_rank", math.ceil(self.hidden_size / 16))):
            if getattr(self, name) == default:
                object.__setattr__(self, name, None)

    @property
    def channels(self) -> int:
        """Channels of the recurrence."""
        return self.inner_size or 2 * self.hidden_size

    @property
    def rank(self) -> int:
        """Rank of the map to step sizes."""
        return self.step_rank or math.ceil(self.hidden_size / 16)


PRESETS: dict[str, MambaConfig] = {
    "mamba-130m": MambaConfig(),
    "mamba-370m": MambaConfig(hidden_size=1024, num_layers=48),
    "mamba-790m": MambaConfig(hidden_size=1536, num_layers=48),
    "mamba-1.4b": MambaConfig(hidden_size=2048, num_layers=48),
    "mamba-2.8b": MambaConfig(hidden_size=2560, num_layers=64),
}
"""Published models (table 12 of the paper; vocabulary padded to a multiple of 8)."""


@struct.dataclass
class MambaCache:
    """What remains of the tokens so far: of fixed size, however many they were.

    Attributes:
      conv: ``[layers, B, conv_size - 1, inner]``, the last inputs of the convolution.
      state: ``[layers, B, inner, state_size]`` float32.
    """

    conv: Any
    state: Any


@struct.dataclass
class MambaOutput:
    """What a :class:`Mamba` returns.

    Attributes:
      logits: ``[B, T, vocab]`` float32, of the next token; ``None`` without a head.
      last_hidden_state: ``[B, T, hidden]``, after the final norm.
      hidden_states: ``[layers + 1, B, T, hidden]``, the stream before the first layer and after each (the last one
        before the final norm); ``None`` unless asked for.
      cache: what the next call needs; ``None`` if none was given.
    """

    logits: Any
    last_hidden_state: Any
    hidden_states: Any = None
    cache: Any = None


def selective_scan(
    x: Float[Array, "b t c"],
    step: Float[Array, "b t c"],
    decay: Float[Array, "c n"],
    write: Float[Array, "b t n"],
    read: Float[Array, "b t n"],
    state: Float[Array, "b c n"],
    chunk: int = 64,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c n"]]:
    """``h_t = exp(step_t decay) h_{t-1} + step_t write_t x_t`` and ``y_t = read_t . h_t``: outputs and the last state.

    Equations 2 and 4 with the discretisation that the paper's code uses (exact for the decay, Euler for the input).  A
    chunk's states are found by an associative scan, chunks follow one another: ``B chunk C N`` numbers are held at a
    time rather than ``B T C N``, in the backward pass too, which computes each chunk again.

    Args:
      x: inputs.
      step: step sizes, positive.
      decay: of each channel's N states, negative.
      write, read: the token's maps into and out of the state.
      state: before the first token.
      chunk: tokens at a time.

    Raises:
      ValueError: ``chunk`` below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    batch, length = x.shape[:2]
    size = min(chunk, length)
    padding = -length % size

    def chunks(y):  # a step of zero leaves the state as it is
        y = jnp.pad(y, ((0, 0), (0, padding), (0, 0)))
        return y.reshape(batch, -1, size, y.shape[-1]).swapaxes(0, 1)

    @jax.checkpoint
    def one(state, inputs):
        x, step, write, read = inputs
        factor = jnp.exp(step[..., None] * decay)
        term = (step * x)[..., None] * write[:, :, None, :]
        factors, terms = lax.associative_scan(_compose, (factor, term), axis=1)
        states = factors * state[:, None] + terms
        return states[:, -1], jnp.einsum("btcn,btn->btc", states, read, precision="highest")

    state, y = lax.scan(one, state, tuple(map(chunks, (x, step, write, read))))
    return y.swapaxes(0, 1).reshape(batch, -1, x.shape[-1])[:, :length], state


def _compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """``h -> a h + b``, the first then the second."""
    return first[0] * second[0], second[0] * first[1] + second[1]


class MambaLayer(nn.Module):
    """One layer (figure 3): norm, mixer, residual.

    Attributes:
      config: of the model.
      record: whether the stream after the layer is returned besides.
      chunk: see :func:`selective_scan`.
      dtype, param_dtype: of computation and parameters; the recurrence is float32.
    """

    config: MambaConfig
    record: bool = False
    chunk: int = 64
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, stream: Float[Array, "b t d"], cache: tuple[Array, Array], mask: Bool[Array, "b t"] | None
    ) -> tuple[Float[Array, "b t d"], tuple[Any, Any]]:
        """The stream after the layer, and (this layer's convolution and recurrence states, the stream if recorded)."""
        c = self.config
        x = _norm(c, self.dtype, self.param_dtype, "norm")(stream)
        x = _hide(x, mask)
        gate = self._dense(c.channels, (EMBED, MLP), c.use_bias, "gate")(x)
        x, conv = self._convolve(self._dense(c.channels, (EMBED, MLP), c.use_bias, "in")(x), cache[0])
        x = _hide(nn.silu(x), mask)
        # the paper's delta, B and C; the map to step sizes passes through a low rank (section 3.6)
        step = self._dense(c.rank, (MLP, None), False, "step_down")(x)
        step = Dense(
            c.channels, (None, MLP), False, self.dtype, self.param_dtype, _step_init(c), name="step_up"
        )(step)  # fmt: skip
        bias = self.param("step_bias", _step_bias_init(c), (c.channels,), self.param_dtype)
        step = nn.softplus(step.astype(jnp.float32) + bias.astype(jnp.float32))
        write = self._dense(c.state_size, (MLP, None), False, "write")(x).astype(jnp.float32)
        read = self._dense(c.state_size, (MLP, None), False, "read")(x).astype(jnp.float32)
        log_decay = self.param(
            "log_decay", partitioned(_log_decay_init, MLP, None), (c.channels, c.state_size), self.param_dtype
        )
        skip = self.param("skip", nn.initializers.ones, (c.channels,), self.param_dtype).astype(jnp.float32)
        decay = -jnp.exp(log_decay.astype(jnp.float32))
        x = x.astype(jnp.float32)
        y, state = selective_scan(x, step, decay, write, read, cache[1], self.chunk)
        y = (y + skip * x) * nn.silu(gate.astype(jnp.float32))
        y = self._dense(c.hidden_size, (MLP, EMBED), c.use_bias, "out")(y)
        stream = stream + y.astype(stream.dtype)
        return stream, ((conv, state), stream if self.record else None)

    def _convolve(self, x: Array, before: Array) -> tuple[Array, Array]:
        """Depthwise and causal; returns the result and the inputs that the next call's first tokens see."""
        c = self.config
        init = partitioned(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), None, None, MLP)
        kernel = self.param("conv_kernel", init, (c.conv_size, 1, c.channels), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        length = x.shape[1] - (c.conv_size - 1)
        y = sum(kernel[k] * x[:, k : k + length] for k in range(c.conv_size))
        if c.conv_bias:
            y = y + self.param("conv_bias", nn.initializers.zeros, (c.channels,), self.param_dtype).astype(self.dtype)
        return y, x[:, length:].astype(before.dtype)

    def _dense(self, features: int, axes: tuple, use_bias: bool, name: str) -> Dense:
        return Dense(features, axes, use_bias, self.dtype, self.param_dtype, name=name)


def _norm(config: MambaConfig, dtype: Any, param_dtype: Any, name: str) -> nn.Module:
    return nn.RMSNorm(
        epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name
    )


def _hide(x: Array, mask: Array | None) -> Array:
    return x if mask is None else jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _step_init(config: MambaConfig) -> Any:
    """Uniform, so that the low-rank map keeps the variance of its input."""
    bound = config.rank**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _step_bias_init(config: MambaConfig) -> Any:
    """Biases through which softplus gives log-uniform step sizes (section 3.6)."""

    def init(key, shape, dtype):
        low, high = math.log(config.step_min), math.log(config.step_max)
        step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), config.step_floor)
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)

    return init


def _log_decay_init(key: Array, shape: tuple, dtype: Any) -> Array:
    """State n of every channel decays at rate n (S4D-Real, section 3.6)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32)), shape).astype(dtype)


class Mamba(nn.Module):
    """A language model of selective state spaces.

    Attributes:
      config: see :class:`MambaConfig`.
      dtype, param_dtype: of computation and parameters.  The recurrence, norms' statistics and logits are float32.
      remat: recompute each layer in the backward pass rather than keep its activations.
      chunk: tokens whose states are held at a time, see :func:`selective_scan`; no effect on results.
    """

    config: MambaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    chunk: int = 64

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"] | None = None,
        padding_mask: Bool[Array, "b t"] | None = None,
        embeddings: Float[Array, "b t d"] | None = None,
        cache: MambaCache | None = None,
        hidden_states: bool = False,
        train: bool = False,
        keys: Array | None = None,
    ) -> MambaOutput:
        """Scores of every token's successor.

        Padding is kept out of each layer's input and of the recurrence's, as in transformers: on the left it leaves no
        trace at all (without ``use_bias``), and on the right all real tokens come before it.  But there it lets the
        state decay: pad prompts that are to be continued on the left.

        Args:
          ids: tokens; give these or ``embeddings``.
          padding_mask: True at real tokens; all are real by default.
          embeddings: ``[B, T, hidden]`` that stand in for those of tokens.
          cache: from :meth:`init_cache`, or of an earlier call: the tokens follow those.
          hidden_states: whether to return the stream before and after every layer.
          train, keys: have no effect: the model has no dropout.

        Raises:
          ValueError: not exactly one of ``ids`` and ``embeddings``; embeddings of another width.
        """
        c = self.config
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings, " + ("got both" if ids is not None else "got neither"))
        if embeddings is not None and embeddings.shape[-1] != c.hidden_size:
            raise ValueError(f"embeddings are {embeddings.shape[-1]} wide, but hidden_size = {c.hidden_size}")
        tokens = Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype, name="embed")
        x = tokens(ids) if embeddings is None else embeddings
        x = first = x.astype(jnp.float32 if c.float32_stream else self.dtype)

        layer = nn.remat(MambaLayer, prevent_cse=False) if self.remat else MambaLayer
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast), out_axes=0,
            length=c.num_layers, metadata_params={nn.PARTITION_NAME: LAYERS},
        )(c, hidden_states, self.chunk, self.dtype, self.param_dtype, name="layers")  # fmt: skip
        held = self.init_cache(x.shape[0]) if cache is None else cache
        x, ((conv, state), stream) = layers(x, (held.conv, held.state), padding_mask)
        x = _norm(c, self.dtype, self.param_dtype, "final_norm")(x)
        logits = None
        if c.head == "tied":
            logits = inner(x, tokens.embedding.T, self.dtype)
        elif c.head == "untied":
            logits = Head(c.vocab_size, False, self.dtype, self.param_dtype, name="head")(x)
        stream = jnp.concatenate([first[None], stream]) if hidden_states else None
        return MambaOutput(logits, x, stream, None if cache is None else MambaCache(conv, state))

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments with which ``init`` may be called."""
        return {"ids": jax.ShapeDtypeStruct((batch, 1), jnp.int32)}

    def init_cache(self, batch: int, length: int = 0) -> MambaCache:
        """The state before any token; ``length`` is taken for the sake of models whose caches grow, and ignored."""
        del length
        c = self.config
        conv = jnp.zeros((c.num_layers, batch, c.conv_size - 1, c.channels), self.dtype)
        return MambaCache(conv, jnp.zeros((c.num_layers, batch, c.channels, c.state_size), jnp.float32))
