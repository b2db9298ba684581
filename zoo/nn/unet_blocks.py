"""What the U-Nets and the autoencoder share: noise embeddings, group norm, residual and attention blocks, resampling.

Images are NHWC.  A residual block covers DDPM's (the condition shifts), ADM's (it scales and shifts, and may resample
inside) and NCSN++'s (both sums are scaled by ``1/sqrt(2)``, resampling by a smooth filter); see :class:`ResidualBlock`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from zoo.nn.attention import MultiHeadAttention
from zoo.nn.dropout import dropout
from zoo.nn.partitioning import EMBED, MLP, Dense, partitioned


class UNetOutput(NamedTuple):
    """What a U-Net returns.

    Attributes:
      prediction: ``[B, H, W, out_channels]``.
      encoder: the feature maps handed to the decoder, from the first convolution to the deepest block.
      middle: the feature map ``[B, h, w, c]`` before the decoder.
    """

    prediction: Array
    encoder: tuple[Array, ...]
    middle: Array


def sinusoids(
    t: Float[Array, " b"], features: int, max_period: float = 10000.0, shift: float = 0.0, sine_first: bool = False
) -> Float[Array, "b f"]:
    """Cosines and sines of ``t`` at ``features / 2`` frequencies falling geometrically from 1 to ``1/max_period``.

    Args:
      t: noise level or timestep.
      features: width of the result.
      max_period: of the slowest wave, over 2 pi.
      shift: the exponent of frequency i is ``-i / (features / 2 - shift)``: 0 (DDPM's successors) or 1 (tensor2tensor).
      sine_first: sines before cosines.

    Raises:
      ValueError: ``features`` odd.
    """
    if features % 2:
        raise ValueError(f"features must be even (half cosines, half sines), got {features}")
    half = features // 2
    # one rounding: an error of the last digit here is multiplied by timesteps of up to 1000
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / (half - shift)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.sin(angles), jnp.cos(angles)) if sine_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(waves, axis=-1)


def group_norm(channels: int, groups: int, epsilon: float, dtype: Any, name: str, smallest: int = 1) -> nn.GroupNorm:
    """Group normalisation (Wu & He, 2018) with float32 statistics and at least ``smallest`` channels per group.

    Raises:
      ValueError: the groups do not divide the channels.
    """
    groups = min(groups, channels // smallest)
    if channels % max(groups, 1) or groups < 1:
        raise ValueError(
            f"{groups} groups do not divide {channels} channels; change the widths or the config's norm_groups"
        )
    return nn.GroupNorm(
        groups, epsilon=epsilon, dtype=dtype, param_dtype=jnp.float32, use_fast_variance=False, name=name
    )


def conv(
    features: int, size: int, name: str | None, dtype: Any, param_dtype: Any, stride: int = 1, padding: Any = None,
    axes: tuple[str | None, str | None] = (EMBED, EMBED), init: Any = None,
) -> nn.Conv:  # fmt: skip
    """A ``size x size`` convolution, padded by ``size // 2`` on all sides unless told otherwise."""
    init = init or nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
    padding = [(size // 2, size // 2)] * 2 if padding is None else padding
    return nn.Conv(
        features, (size, size), (stride, stride), padding=padding, dtype=dtype, param_dtype=param_dtype, name=name,
        kernel_init=partitioned(init, None, None, *axes),
    )  # fmt: skip


def downsample(
    x: Float[Array, "b h w c"], filter: tuple[int, ...] = (1, 1), padding: int | None = None
) -> Float[Array, "b i j c"]:
    """Half the size: each result is the mean under a separable filter, with zeros outside; (1, 1) is 2 x 2 pooling.

    Args:
      x: image with even sides.
      filter: taps, normalised to sum 1; NCSN++ takes (1, 3, 3, 1).
      padding: zeros on each side; by default what halves the size exactly.
    """
    side = (len(filter) - 1) // 2 if padding is None else padding
    return _filtered(x, _taps(filter), strides=(2, 2), padding=[(side, side)] * 2)


def upsample(x: Float[Array, "b h w c"], filter: tuple[int, ...] = (1, 1)) -> Float[Array, "b i j c"]:
    """Twice the size: the transpose of :func:`downsample`, times 4; (1, 1) repeats each pixel."""
    if tuple(filter) == (1, 1):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    side = len(filter) - 1 - (len(filter) - 1) // 2
    return _filtered(x, 4 * _taps(filter), padding=[(side, side)] * 2, lhs_dilation=(2, 2))


def resize_nearest(x: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b i j c"]:
    """Nearest-neighbour resizing: row r of the result is row ``floor(r * h / height)``."""
    rows = np.arange(height) * x.shape[1] // height
    columns = np.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


def _taps(filter: tuple[int, ...]) -> np.ndarray:
    taps = np.outer(filter, filter).astype(np.float32)
    return taps / taps.sum()


def _filtered(x: Array, taps: np.ndarray, strides=(1, 1), **settings: Any) -> Array:
    channels = x.shape[-1]
    kernel = jnp.tile(jnp.asarray(taps, x.dtype)[:, :, None, None], (1, 1, 1, channels))
    return jax.lax.conv_general_dilated(
        x, kernel, strides, feature_group_count=channels, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


class TimeEmbedding(nn.Module):
    """Two linear maps with a SiLU between, over the waves of the noise level.

    Attributes:
      features: width of the result.
      dtype, param_dtype: of computation and parameters.
    """

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, waves: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """``[B, waves] -> [B, features]``."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.silu(Dense(self.features, (EMBED, MLP), name="first", **settings)(waves))
        return Dense(self.features, (MLP, EMBED), name="second", **settings)(h)


class ResidualBlock(nn.Module):
    """Norm, SiLU, (resample), conv, condition, norm, SiLU, dropout, conv; and the input, projected where it must be.

    Attributes:
      features: channels out.
      condition: how the activated embedding acts: ``"shift"`` is added before the second norm (DDPM); ``"scale_shift"``
        gives scale - 1 and shift after it (ADM, equation in section 3.1); ``"none"`` (autoencoders).
      resample: ``"none"``, ``"down"`` or ``"up"``, on both paths, before the first convolution (BigGAN's placing).
      filter: of the resampling; see :func:`downsample`.
      project: a 1 x 1 convolution on the skip path even where the channels agree.
      skip_scale: of the sum; NCSN++ takes ``1/sqrt(2)``.
      groups, smallest, epsilon: of the norms; see :func:`group_norm`.
      rate: of dropout.
      dtype, param_dtype: of computation and parameters.
    """

    features: int
    condition: str = "shift"
    resample: str = "none"
    filter: tuple[int, ...] = (1, 1)
    project: bool = False
    skip_scale: float = 1.0
    groups: int = 32
    smallest: int = 1
    epsilon: float = 1e-5
    rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"] | None = None, keys: Array | None = None
    ) -> Float[Array, "b i j o"]:
        """``[B, H, W, C] -> [B, H', W', features]``.

        Args:
          x: feature map.
          embedding: of the condition, activated; ``None`` only without one.
          keys: one key per example for dropout, or ``None``.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda h, name: group_norm(  # noqa: E731
            h.shape[-1], self.groups, self.epsilon, self.dtype, name, self.smallest
        )(h)
        move = {
            "none": lambda h: h,
            "down": lambda h: downsample(h, self.filter),
            "up": lambda h: upsample(h, self.filter),
        }
        resample = move[self.resample]
        h = resample(nn.silu(norm(x, "norm1")))
        h = conv(self.features, 3, "conv1", axes=(EMBED, MLP), **settings)(h)
        if self.condition == "none":
            h = norm(h, "norm2")
        else:
            width = self.features * (2 if self.condition == "scale_shift" else 1)
            m = Dense(width, (EMBED, MLP), name="condition", **settings)(embedding)[:, None, None]
            if self.condition == "scale_shift":
                scale, shift = jnp.split(m, 2, axis=-1)
                h = norm(h, "norm2") * (1 + scale) + shift
            else:
                h = norm(h + m, "norm2")
        h = dropout(nn.silu(h), self.rate, keys)
        h = conv(self.features, 3, "conv2", axes=(MLP, EMBED), **settings)(h)
        x = resample(x)
        if self.project or x.shape[-1] != self.features:
            x = conv(self.features, 1, "skip", **settings)(x)
        return (x + h) * self.skip_scale


class SpatialAttention(nn.Module):
    """Self-attention between all positions of a feature map, added to it.

    Attributes:
      num_heads: heads.
      skip_scale: of the sum.
      groups, smallest, epsilon: of the norm before it; see :func:`group_norm`.
      dtype, param_dtype: of computation and parameters.
    """

    num_heads: int = 1
    skip_scale: float = 1.0
    groups: int = 32
    smallest: int = 1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """``[B, H, W, C]``, same shape out.

        Raises:
          ValueError: the heads do not divide the channels.
        """
        b, height, width, channels = x.shape
        if channels % self.num_heads:
            raise ValueError(
                f"{self.num_heads} heads do not divide {channels} channels; change num_heads or head_width"
            )
        h = group_norm(channels, self.groups, self.epsilon, self.dtype, "norm", self.smallest)(x)
        attend = MultiHeadAttention(self.num_heads, dtype=self.dtype, param_dtype=self.param_dtype, name="attention")
        h = attend(h.reshape(b, height * width, channels)).reshape(x.shape)
        return (x + h) * self.skip_scale
