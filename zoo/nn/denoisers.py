"""Noise embeddings and denoising networks ``F(x, noise, cond, keys)``: what every diffusion method trains.

All networks share one call:

    module(x: [B, ...], noise: [B], cond: [B, k] or [B] or None, keys: [B] or None) -> [B, ...] like x

``noise`` is the scalar that stands for the noise level, by convention ``ln(sigma) / 4`` (EDM's ``c_noise``); ``cond``
holds integer class labels ``[B]`` when ``classes > 0``; ``keys`` are the examples' dropout keys (``None``: no dropout).
The last layer starts at zero, so that an untrained network inside a preconditioner is the preconditioner's skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.nn.dropout import dropout, layer_keys

Embedding = Literal["fourier", "positional"]


def positional_embedding(t: Float[Array, " b"], features: int, max_period: float = 10000.0) -> Float[Array, "b f"]:
    """Cosines, then sines, of ``t`` at ``features / 2`` frequencies falling geometrically from 1 to ``1/max_period``.

    Raises:
      ValueError: ``features`` odd.
    """
    if features % 2:
        raise ValueError(f"features must be even (half cosines, half sines), got {features}")
    half = features // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class NoiseEmbedding(nn.Module):
    """Embeds the noise scalar: random Fourier features (NCSN++) or fixed positional ones (ADM), then a two-layer MLP.

    Attributes:
      features: width of the result.
      kind: ``"fourier"`` draws its frequencies once, into the ``constants`` collection; ``"positional"`` multiplies the
        scalar by 1000 first, as the released consistency-model code does.
      scale: standard deviation of the Fourier frequencies.  iCT lowers it from 16 to 0.02 on CIFAR-10: an embedding too
        sensitive to the noise level makes consistency training diverge.
      dtype: of the computation; the angles are always float32.
    """

    features: int
    kind: str = "fourier"
    scale: float = 0.02
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, noise: Float[Array, " b"]) -> Float[Array, "b f"]:
        if self.kind == "fourier":
            half = self.features // 2
            draw = lambda: self.scale * jax.random.normal(self.make_rng("params"), (half,))  # noqa: E731
            frequencies = self.variable("constants", "frequencies", draw).value
            angles = 2 * jnp.pi * noise.astype(jnp.float32)[:, None] * frequencies
            h = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        elif self.kind == "positional":
            h = positional_embedding(1000.0 * noise, 2 * (self.features // 2))
        else:
            raise ValueError(f"kind must be 'fourier' or 'positional', got {self.kind!r}")
        h = nn.Dense(self.features, dtype=self.dtype, name="first")(h.astype(self.dtype))
        return nn.Dense(self.features, dtype=self.dtype, name="second")(nn.silu(h))


class Condition(nn.Module):
    """The noise embedding plus, if ``classes > 0``, a learned vector per class; activated."""

    features: int
    kind: str = "fourier"
    scale: float = 0.02
    classes: int = 0
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, noise: Float[Array, " b"], cond: Array | None = None) -> Float[Array, "b f"]:
        h = NoiseEmbedding(self.features, self.kind, self.scale, self.dtype, name="noise")(noise)
        if (self.classes > 0) != (cond is not None):
            raise ValueError(
                f"a denoiser with classes={self.classes} {'needs' if self.classes else 'takes no'} labels in `cond`; "
                f"got {'none' if cond is None else 'some'}"
            )
        if cond is not None:
            h = h + nn.Embed(self.classes, self.features, dtype=self.dtype, name="label")(cond)
        return nn.silu(h)


class ResidualMLP(nn.Module):
    """A residual MLP over the flattened example, modulated by the noise level: for points and for tiny images.

    Matrix products of a good size are all it does, which is what a CPU is fast at.

    Attributes:
      width, depth: of the residual stream, and its number of blocks.
      condition: width of the noise embedding.
      rate: dropout rate inside the blocks.
      classes: number of classes for conditional generation; 0 is unconditional.
      embedding, scale: see :class:`NoiseEmbedding`.
    """

    width: int = 256
    depth: int = 4
    condition: int = 64
    rate: float = 0.0
    classes: int = 0
    embedding: Embedding = "fourier"
    scale: float = 0.02
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, " b *dims"],
        noise: Float[Array, " b"],
        cond: Array | None = None,
        keys: Array | None = None,
    ) -> Float[Array, " b *dims"]:
        embed = Condition(self.condition, self.embedding, self.scale, self.classes, self.dtype, name="embed")
        condition = embed(noise, cond)
        # one product gives the scales and shifts of all blocks
        modulation = nn.Dense(2 * self.depth * self.width, dtype=self.dtype, name="modulation")(condition)
        modulation = modulation.reshape(-1, self.depth, 2, self.width)
        h = nn.Dense(self.width, dtype=self.dtype, name="inputs")(x.reshape(x.shape[0], -1).astype(self.dtype))
        for i in range(self.depth):
            r = nn.LayerNorm(dtype=self.dtype, use_bias=False, use_scale=False)(h)
            r = r * (1 + modulation[:, i, 0]) + modulation[:, i, 1]
            r = nn.Dense(self.width, dtype=self.dtype, name=f"up_{i}")(r)
            r = dropout(nn.silu(r), self.rate, layer_keys(keys, i))
            h = h + nn.Dense(self.width, dtype=self.dtype, name=f"down_{i}")(r)
        h = nn.LayerNorm(dtype=self.dtype)(h)
        out = nn.Dense(math.prod(x.shape[1:]), dtype=self.dtype, kernel_init=nn.initializers.zeros, name="outputs")(h)
        return out.reshape(x.shape).astype(x.dtype)


class Mixer(nn.Module):
    """An MLP-mixer over the patches of an image, modulated by the noise level.

    Attributes:
      patch: side of a patch; both sides of the image must be multiples of it.
      width: features of a patch.
      token_width, channel_width: hidden widths of the two mixing MLPs.
      depth, rate, classes, embedding, scale: as in :class:`ResidualMLP`.
    """

    patch: int = 2
    width: int = 128
    token_width: int = 64
    channel_width: int = 256
    depth: int = 4
    rate: float = 0.0
    classes: int = 0
    embedding: Embedding = "fourier"
    scale: float = 0.02
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise: Float[Array, " b"],
        cond: Array | None = None,
        keys: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        b, height, width, channels = x.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(f"patch={p} must divide both sides of the image, got {height} x {width}")
        embed = Condition(self.width, self.embedding, self.scale, self.classes, self.dtype, name="embed")
        condition = embed(noise, cond)
        modulation = nn.Dense(4 * self.depth * self.width, dtype=self.dtype, name="modulation")(condition)
        modulation = modulation.reshape(b, self.depth, 4, 1, self.width)

        tokens = x.astype(self.dtype).reshape(b, height // p, p, width // p, p, channels)
        tokens = tokens.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * channels)
        h = nn.Dense(self.width, dtype=self.dtype, name="inputs")(tokens)
        place = self.param("place", nn.initializers.normal(0.02), (h.shape[1], self.width))
        h = h + place.astype(h.dtype)
        for i in range(self.depth):
            m = modulation[:, i]
            r = nn.LayerNorm(dtype=self.dtype, use_bias=False, use_scale=False)(h) * (1 + m[:, 0]) + m[:, 1]
            r = r.transpose(0, 2, 1)
            r = nn.silu(nn.Dense(self.token_width, dtype=self.dtype, name=f"token_up_{i}")(r))
            r = nn.Dense(h.shape[1], dtype=self.dtype, name=f"token_down_{i}")(r)
            h = h + r.transpose(0, 2, 1)
            r = nn.LayerNorm(dtype=self.dtype, use_bias=False, use_scale=False)(h) * (1 + m[:, 2]) + m[:, 3]
            r = nn.silu(nn.Dense(self.channel_width, dtype=self.dtype, name=f"channel_up_{i}")(r))
            r = dropout(r, self.rate, layer_keys(keys, i))
            h = h + nn.Dense(self.width, dtype=self.dtype, name=f"channel_down_{i}")(r)
        h = nn.LayerNorm(dtype=self.dtype)(h)
        out = nn.Dense(p * p * channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="outputs")(h)
        out = out.reshape(b, height // p, width // p, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return out.reshape(x.shape).astype(x.dtype)


class ResidualBlock(nn.Module):
    """ADM's block: norm, swish, conv, scale and shift by the condition, swish, dropout, conv from zero, skip.

    Attributes:
      features: channels out.
      rate: dropout rate.
      resample: ``"none"``, ``"down"`` (mean of 2 x 2) or ``"up"`` (repeat), inside the block, as BigGAN and ADM do it.
      skip_scale: the sum of both paths is multiplied by it; NCSN++ takes ``1/sqrt(2)``, ADM 1.
    """

    features: int
    rate: float = 0.0
    resample: Literal["none", "down", "up"] = "none"
    skip_scale: float = 1.0
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Array, condition: Float[Array, "b f"], keys: Array | None = None) -> Array:
        conv = lambda name, **kw: nn.Conv(self.features, (3, 3), dtype=self.dtype, name=name, **kw)  # noqa: E731
        h = nn.silu(group_norm(self.dtype, x.shape[-1])(x))
        h, x = _resample(h, self.resample), _resample(x, self.resample)
        h = conv("first")(h)
        scale, shift = jnp.split(
            nn.Dense(2 * self.features, dtype=self.dtype, name="modulation")(condition), 2, axis=-1
        )
        h = group_norm(self.dtype, self.features)(h) * (1 + scale[:, None, None]) + shift[:, None, None]
        h = conv("second", kernel_init=nn.initializers.zeros)(dropout(nn.silu(h), self.rate, keys))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="skip")(x)
        return (x + h) * self.skip_scale


class ImageAttention(nn.Module):
    """Self-attention over the positions of a feature map, added to it; the output projection starts at zero."""

    head_features: int = 64
    skip_scale: float = 1.0
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, channels = x.shape
        heads = max(1, channels // self.head_features)
        h = group_norm(self.dtype, channels)(x).reshape(b, height * width, channels)
        qkv = nn.Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        q, k, v = jnp.split(qkv.reshape(b, height * width, heads, -1), 3, axis=-1)
        h = jax.nn.dot_product_attention(q, k, v).reshape(b, height, width, channels)
        h = nn.Dense(channels, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")(h)
        return (x + h) * self.skip_scale


class UNet(nn.Module):
    """A U-Net of the ADM / NCSN++ kind for images of 16 x 16 and more (sides divisible by ``2 ** (levels - 1)``).

    Attributes:
      width: channels at full resolution.
      multipliers: channels per resolution, as multiples of ``width``.
      blocks: residual blocks per resolution (iCT-deep doubles them).
      attention: the resolutions (heights) that get self-attention.
      rate: dropout rate; iCT uses 0.3 on CIFAR-10 and 0.2 on ImageNet-64.
      skip_scale: 1 for ADM, ``1/sqrt(2)`` for NCSN++.
      classes, embedding, scale: as in :class:`ResidualMLP`; ADM takes ``"positional"``.
    """

    width: int = 64
    multipliers: Sequence[int] = (1, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (8,)
    rate: float = 0.0
    classes: int = 0
    embedding: Embedding = "fourier"
    scale: float = 0.02
    skip_scale: float = 1.0
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise: Float[Array, " b"],
        cond: Array | None = None,
        keys: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        times = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % times or x.shape[2] % times:
            raise ValueError(
                f"{len(self.multipliers)} resolutions need sides divisible by {times}, got {x.shape[1]} x {x.shape[2]}"
                "; pad the images or give fewer multipliers"
            )
        embed = Condition(4 * self.width, self.embedding, self.scale, self.classes, self.dtype, name="embed")
        condition = embed(noise, cond)
        drawn = iter(range(10**6))

        def block(h, features, name, resample="none", attend=False):
            made = ResidualBlock(features, self.rate, resample, self.skip_scale, self.dtype, name=name)
            h = made(h, condition, layer_keys(keys, next(drawn)))
            if attend:
                h = ImageAttention(skip_scale=self.skip_scale, dtype=self.dtype, name=f"{name}_attention")(h)
            return h

        h = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="inputs")(x.astype(self.dtype))
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            if level:
                h = block(h, h.shape[-1], f"down_{level}", "down")
                skips.append(h)
            for i in range(self.blocks):
                h = block(h, multiplier * self.width, f"encode_{level}_{i}", attend=h.shape[1] in self.attention)
                skips.append(h)
        h = block(h, h.shape[-1], "middle_0", attend=bool(self.attention))
        h = block(h, h.shape[-1], "middle_1")
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, multiplier * self.width, f"decode_{level}_{i}", attend=h.shape[1] in self.attention)
            if level:
                h = block(h, h.shape[-1], f"up_{level}", "up")
        h = nn.silu(group_norm(self.dtype, h.shape[-1])(h))
        out = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, kernel_init=nn.initializers.zeros, name="outputs")(h)
        return out.astype(x.dtype)


def group_norm(dtype: Any, channels: int) -> nn.GroupNorm:
    """Group normalisation with at most 32 groups of at least 4 channels, for any even number of channels."""
    groups = max(1, min(32, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(num_groups=groups, dtype=dtype)


def _resample(x: Array, how: str) -> Array:
    if how == "down":
        return nn.avg_pool(x, (2, 2), (2, 2))
    if how == "up":
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x
