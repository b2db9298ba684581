"""DDPM++ and NCSN++ (Song et al., 2021, appendix H) as trained by EDM (Karras et al., 2022), and its preconditioning.

denoise = lambda y, c_noise: model.apply(variables, y, c_noise).prediction
x0 = edm_denoise(denoise, noisy, sigma)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from zoo.nn.dropout import layer_keys
from zoo.nn.partitioning import EMBED, Dense
from zoo.nn.unet_blocks import (
    ResidualBlock,
    SpatialAttention,
    TimeEmbedding,
    UNetOutput,
    conv,
    downsample,
    group_norm,
    sinusoids,
    upsample,
)
from zoo.ops.noise_levels import consistency_precond

CHOICES = {
    "embedding": ("positional", "fourier"), "encoder": ("standard", "skip", "residual"),
    "decoder": ("standard", "skip"), "filter": ((1, 1), (1, 3, 3, 1)),
}  # fmt: skip
ROOT = math.sqrt(0.5)
"""By which every sum of two paths is multiplied."""


@dataclasses.dataclass(frozen=True)
class SongUNetConfig:
    """A network's shape; the defaults are DDPM++ for CIFAR-10.

    Attributes:
      image_size: side of the images it was trained on; the network itself takes any size that can be halved.
      in_channels, out_channels: of images and predictions.
      base_width: channels of the first convolution.
      widths: channels at each resolution, from the full one to the deepest, each half the size.
      num_blocks: residual blocks per resolution on the way down; one more on the way up.
      attention_factors: downsampling factors (1, 2, 4 ...) of the resolutions with attention (one head): after every
        block on the way down, after the last on the way up; the deepest resolution's first block always has it.
      embedding: of the noise level: ``"positional"`` waves, or ``"fourier"`` features of random frequencies.
      noise_width, embedding_width: features of the waves, and after the two linear maps.
      encoder: what reaches the deeper resolutions besides: nothing (``"standard"``), the image made smaller
        (``"skip"``), or that with a convolution at each step (``"residual"``, NCSN++).
      decoder: ``"skip"`` sums predictions of all resolutions.
      filter: of every change of size: (1, 1) or (1, 3, 3, 1).
      num_classes: classes; 0 for a network without labels.
      augment_width: entries of the vector that describes an augmentation; 0 without.
      dropout: rate inside the residual blocks.
      label_dropout: rate of forgetting an example's label.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    base_width: int = 128
    widths: tuple[int, ...] = (256, 256, 256)
    num_blocks: int = 4
    attention_factors: tuple[int, ...] = (2,)
    embedding: str = "positional"
    noise_width: int = 128
    embedding_width: int = 512
    encoder: str = "standard"
    decoder: str = "standard"
    filter: tuple[int, ...] = (1, 1)
    num_classes: int = 0
    augment_width: int = 9
    dropout: float = 0.0
    label_dropout: float = 0.0

    def __post_init__(self):
        """Checks names, and that attention is at a resolution that exists."""
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}")
        possible = tuple(2**i for i in range(len(self.widths)))
        if unknown := set(self.attention_factors) - set(possible):
            raise ValueError(
                f"attention_factors must be among {possible} for {len(self.widths)} widths, got {sorted(unknown)}"
            )

    @classmethod
    def ddpmpp(cls, num_classes: int = 0) -> SongUNetConfig:
        """DDPM++ of EDM's CIFAR-10 models ("vp")."""
        return cls(num_classes=num_classes)

    @classmethod
    def ncsnpp(cls, num_classes: int = 0) -> SongUNetConfig:
        """NCSN++ of EDM's CIFAR-10 models ("ve")."""
        return cls(
            embedding="fourier", noise_width=256, encoder="residual", filter=(1, 3, 3, 1), num_classes=num_classes
        )


class SongUNet(nn.Module):
    """Predicts from noisy images, the noise level and labels what the preconditioning asks for.

    Attributes:
      config: the shape.
      dtype, param_dtype: of computation and parameters; norms' statistics, waves and softmax are float32.
      remat: recompute each block in the backward pass rather than keep its activations.
    """

    config: SongUNetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest inputs that reach every parameter."""
        c, side = self.config, 2 ** (len(self.config.widths) - 1)
        shape = lambda *dims: jax.ShapeDtypeStruct((batch, *dims), jnp.float32)  # noqa: E731
        inputs = {"x": shape(side, side, c.in_channels), "noise": shape()}
        if c.num_classes:
            inputs["labels"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return inputs | ({"augment": shape(c.augment_width)} if c.augment_width else {})

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise: Float[Array, " b"],
        labels: Int[Array, " b"] | None = None,
        augment: Float[Array, "b a"] | None = None,
        train: bool = False,
        keys: Array | None = None,
    ) -> UNetOutput:
        """Images ``[B, H, W, in_channels]`` to predictions ``[B, H, W, out_channels]`` and feature maps.

        Args:
          x: noisy images times ``c_in``, each side divisible by ``2 ** (len(widths) - 1)``.
          noise: ``c_noise``, the noise level as the network sees it.
          labels: class of each image, -1 for none, if there are classes.
          augment: how each image was augmented; ``None`` for not at all.
          train: changes nothing here: only ``keys`` turn dropout on.
          keys: one key per example for dropout of activations and labels.

        Raises:
          ValueError: labels missing or not wanted, sides that cannot be halved, channels that do not fit.
        """
        c = self.config
        self._check(x, labels, augment)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shape = {"skip_scale": ROOT, "smallest": 4, "epsilon": 1e-6, **settings}
        wrap = nn.remat if self.remat else (lambda module: module)
        Block, Attention = wrap(ResidualBlock), wrap(SpatialAttention)
        drawn = iter(range(10**6))

        emb = nn.silu(self._embedding(noise, labels, augment, layer_keys(keys, 10**6), settings))

        def block(h, features, name, resample="none", attend=False):
            made = Block(features, "shift", resample, c.filter, resample != "none", rate=c.dropout, name=name, **shape)
            h = made(h, emb, layer_keys(keys, next(drawn)))
            return Attention(1, name=f"{name}_attention", **shape)(h) if attend else h

        h, aux = x.astype(self.dtype), x.astype(self.dtype)
        h = conv(c.base_width, 3, "conv_in", axes=(None, EMBED), **settings)(h)
        skips = [h]
        for level, width in enumerate(c.widths):
            attend = 2**level in c.attention_factors
            if level:
                h = block(h, h.shape[-1], f"encoder{level}_down", "down")
                h, aux = self._auxiliary_input(h, aux, f"encoder{level}_aux", settings)
                skips.append(h)
            for i in range(c.num_blocks):
                h = block(h, width, f"encoder{level}_block{i}", attend=attend)
                skips.append(h)
        encoder = tuple(skips)

        h = block(h, h.shape[-1], "middle_block0", attend=True)
        h = middle = block(h, h.shape[-1], "middle_block1")

        sum_of_levels = None
        for level, width in reversed(list(enumerate(c.widths))):
            if level < len(c.widths) - 1:
                h = block(h, h.shape[-1], f"decoder{level}_up", "up")
            for i in range(c.num_blocks + 1):
                attend = i == c.num_blocks and 2**level in c.attention_factors
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), width, f"decoder{level}_block{i}", attend=attend)
            if c.decoder == "skip" or level == 0:
                y = nn.silu(group_norm(width, 32, 1e-6, self.dtype, f"decoder{level}_norm_out", smallest=4)(h))
                y = conv(c.out_channels, 3, f"decoder{level}_conv_out", axes=(EMBED, None), **settings)(y)
                sum_of_levels = y if sum_of_levels is None else y + upsample(sum_of_levels, c.filter)
        return UNetOutput(sum_of_levels.astype(jnp.float32), encoder, middle)

    def _embedding(self, noise, labels, augment, keys, settings):
        c = self.config
        if c.embedding == "positional":
            waves = sinusoids(noise, c.noise_width, shift=1.0, sine_first=True)
        else:
            draw = lambda: 16.0 * jax.random.normal(self.make_rng("params"), (c.noise_width // 2,))  # noqa: E731
            frequencies = self.variable("constants", "frequencies", draw).value
            angles = noise.astype(jnp.float32)[:, None] * (2 * jnp.pi * frequencies)
            waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        waves = waves.astype(self.dtype)
        if labels is not None:
            one_hot = math.sqrt(c.num_classes) * jax.nn.one_hot(labels, c.num_classes)
            if keys is not None and c.label_dropout:
                kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - c.label_dropout))(keys)
                one_hot = one_hot * kept[:, None]
            waves = waves + Dense(c.noise_width, (None, None), name="label", **settings)(one_hot)
        if augment is not None:
            waves = waves + Dense(c.noise_width, (None, None), use_bias=False, name="augment", **settings)(augment)
        return TimeEmbedding(c.embedding_width, name="noise", **settings)(waves)

    def _auxiliary_input(self, h, aux, name, settings):
        """The feature map joined by the smaller image, and that for the next level."""
        c = self.config
        if c.encoder == "skip":
            aux = downsample(aux, c.filter)
            return h + conv(h.shape[-1], 1, name, axes=(None, EMBED), **settings)(aux), aux
        if c.encoder == "residual":
            # the convolution before the filter, which sees its borders: padded for both at once
            side = 1 + (len(c.filter) - 1) // 2
            made = conv(h.shape[-1], 3, name, padding=[(side, side)] * 2, axes=(None, EMBED), **settings)
            h = (h + downsample(made(aux), c.filter, padding=0)) * ROOT
            return h, h
        return h, aux

    def _check(self, x: Array, labels: Array | None, augment: Array | None) -> None:
        c, times = self.config, 2 ** (len(self.config.widths) - 1)
        if x.shape[-1] != c.in_channels:
            raise ValueError(f"x must have in_channels={c.in_channels} channels (NHWC), got shape {x.shape}")
        if x.shape[1] % times or x.shape[2] % times:
            raise ValueError(
                f"{len(c.widths)} resolutions need sides divisible by {times}, got {x.shape[1]} x {x.shape[2]}; "
                "pad or resize the images"
            )
        if (labels is None) != (c.num_classes == 0):
            raise ValueError(
                f"a network with num_classes={c.num_classes} {'needs' if c.num_classes else 'takes no'} labels, "
                f"got {'none (-1 stands for no class)' if labels is None else 'some'}"
            )
        if augment is not None and augment.shape[-1] != c.augment_width:
            raise ValueError(f"augment must have augment_width={c.augment_width} entries, got shape {augment.shape}")


def edm_precondition(
    sigma: Float[Array, "*dims"], sigma_data: float = 0.5
) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, "*dims"]]:
    """``(c_skip, c_out, c_in, c_noise)`` of Karras et al. (2022), table 1.

    Args:
      sigma: standard deviations of the noise, positive.
      sigma_data: of the data.
    """
    return *consistency_precond(sigma, sigma_data, sigma_min=0.0), jnp.log(sigma) / 4


def edm_denoise(
    network: Callable[[Array, Array], Array],
    x: Float[Array, "b h w c"],
    sigma: Float[Array, " b"],
    sigma_data: float = 0.5,
) -> Float[Array, "b h w c"]:
    """The denoiser ``D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)`` (Karras et al., 2022, equation 7).

    Args:
      network: ``F(images [B, H, W, C], c_noise [B]) -> [B, H, W, C]``.
      x: noisy images.
      sigma: standard deviation of the noise of each.
      sigma_data: of the data.
    """
    c_skip, c_out, c_in, c_noise = edm_precondition(sigma.astype(jnp.float32), sigma_data)
    over = lambda c: c[:, None, None, None]  # noqa: E731
    return over(c_skip) * x + over(c_out) * network(over(c_in) * x, c_noise)
