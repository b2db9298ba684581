"""The image autoencoder of latent diffusion (Rombach et al., 2022, section 3.1): Gaussian latents at 1/8 of the size.

mean, logvar = model.apply(variables, images, method="encode")
latents = config.scale(sample_latents(mean, logvar, keys))            # what the U-Net sees
images = model.apply(variables, config.unscale(latents), method="decode")
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from zoo.nn.partitioning import EMBED
from zoo.nn.unet_blocks import ResidualBlock, SpatialAttention, conv, group_norm, upsample

EPSILON = 1e-6
"""Of all norms here."""


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """An autoencoder's shape; the defaults are Stable Diffusion's.

    Attributes:
      sample_size: side of the images it was trained on; the network itself takes any size that can be halved.
      in_channels, out_channels: of images and reconstructions.
      latent_channels: of the latents.
      widths: channels at each resolution, from the full one to the latents', each half the size.
      num_blocks: residual blocks per resolution in the encoder; one more in the decoder.
      scaling_factor, shift_factor: see :meth:`scale`.
      middle_attention: attention in the middle of encoder and decoder.
      quant_conv, post_quant_conv: a 1 x 1 convolution after the encoder, and before the decoder.
      norm_groups: of the group norms.
    """

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    norm_groups: int = 32

    @classmethod
    def sd(cls) -> AutoencoderKLConfig:
        """Stable Diffusion 1.x and 2.x."""
        return cls()

    def scale(self, latents: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """Latents with about unit variance: ``(latents - shift_factor) * scaling_factor``, for a diffusion model."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """The inverse of :meth:`scale`, for the decoder."""
        return latents / self.scaling_factor + self.shift_factor


class AutoencoderOutput(NamedTuple):
    """What a call of the autoencoder returns.

    Attributes:
      mean, logvar: of the latents, ``[B, h, w, latent_channels]``, unscaled.
      reconstruction: of the mean, ``[B, H, W, out_channels]``.
    """

    mean: Array
    logvar: Array
    reconstruction: Array


def sample_latents(
    mean: Float[Array, " b *dims"], logvar: Float[Array, " b *dims"], keys: Array
) -> Float[Array, " b *dims"]:
    """Latents drawn with each example's own key (``keys [B]``)."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    return mean + jnp.exp(0.5 * logvar) * noise


class _Half(nn.Module):
    """What encoder and decoder share: constructors of their blocks, and the middle."""

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def block(self, h, width, name):
        Block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        c = self.config
        return Block(width, "none", groups=c.norm_groups, epsilon=EPSILON, name=name, **self.settings)(h)

    def middle(self, h):
        h = self.block(h, h.shape[-1], "middle_block0")
        if self.config.middle_attention:
            Attention = nn.remat(SpatialAttention) if self.remat else SpatialAttention
            shape = {"groups": self.config.norm_groups, "epsilon": EPSILON}
            h = Attention(1, name="middle_attention", **shape, **self.settings)(h)
        return self.block(h, h.shape[-1], "middle_block1")

    def last(self, h, channels):
        h = nn.silu(group_norm(h.shape[-1], self.config.norm_groups, EPSILON, self.dtype, "norm_out")(h))
        return conv(channels, 3, "conv_out", axes=(EMBED, None), **self.settings)(h)


class Encoder(_Half):
    """Images to the two halves (mean, log-variance) of a feature map, before the 1 x 1 convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j o"]:
        """``[B, H, W, in_channels] -> [B, h, w, 2 latent_channels]``."""
        c = self.config
        h = conv(c.widths[0], 3, "conv_in", axes=(None, EMBED), **self.settings)(x)
        for level, width in enumerate(c.widths):
            for i in range(c.num_blocks):
                h = self.block(h, width, f"level{level}_block{i}")
            if level < len(c.widths) - 1:
                # zeros on the right and below only
                down = conv(width, 3, f"level{level}_down", stride=2, padding=[(0, 1), (0, 1)], **self.settings)
                h = down(h)
        return self.last(self.middle(h), 2 * c.latent_channels)


class Decoder(_Half):
    """Latents, after the 1 x 1 convolution, to images."""

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b i j o"]:
        """``[B, h, w, latent_channels] -> [B, H, W, out_channels]``."""
        c = self.config
        h = self.middle(conv(c.widths[-1], 3, "conv_in", axes=(None, EMBED), **self.settings)(z))
        for level, width in reversed(list(enumerate(c.widths))):
            for i in range(c.num_blocks + 1):
                h = self.block(h, width, f"level{level}_block{i}")
            if level:
                h = conv(width, 3, f"level{level}_up", **self.settings)(upsample(h))
        return self.last(h, c.out_channels)


class AutoencoderKL(nn.Module):
    """Encoder and decoder; see the module's docstring for their use.

    Attributes:
      config: the shape.
      dtype, param_dtype: of computation and parameters; norms' statistics, softmax and results are float32.
      remat: recompute each block in the backward pass rather than keep its activations.
    """

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        """Makes both halves."""
        c, settings = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(c, remat=self.remat, **settings)
        self.decoder = Decoder(c, remat=self.remat, **settings)
        if c.quant_conv:
            self.quant = conv(2 * c.latent_channels, 1, None, axes=(None, None), **settings)
        if c.post_quant_conv:
            self.post_quant = conv(c.latent_channels, 1, None, axes=(None, None), **settings)

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest inputs that reach every parameter."""
        side = 2 ** (len(self.config.widths) - 1)
        return {"x": jax.ShapeDtypeStruct((batch, side, side, self.config.in_channels), jnp.float32)}

    def __call__(self, x: Float[Array, "b h w c"], train: bool = False, keys: Array | None = None) -> AutoencoderOutput:
        """Images in -1..1 to latents and the reconstruction of their mean, or of a sample where there are ``keys``.

        Args:
          x: ``[B, H, W, in_channels]``.
          train: changes nothing here.
          keys: one key per example: the latents are drawn rather than their mean taken.
        """
        mean, logvar = self.encode(x)
        z = mean if keys is None else sample_latents(mean, logvar, keys)
        return AutoencoderOutput(mean, logvar, self.decode(z))

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b i j z"], Float[Array, "b i j z"]]:
        """Mean and log-variance (within -30..20) of the latents, unscaled.

        Raises:
          ValueError: channels or sides that do not fit.
        """
        c, times = self.config, 2 ** (len(self.config.widths) - 1)
        if x.shape[-1] != c.in_channels:
            raise ValueError(f"x must have in_channels={c.in_channels} channels (NHWC), got shape {x.shape}")
        if x.shape[1] % times or x.shape[2] % times:
            raise ValueError(
                f"{len(c.widths)} resolutions need sides divisible by {times}, got {x.shape[1]} x {x.shape[2]}; "
                "pad or resize the images"
            )
        h = self.encoder(x.astype(self.dtype))
        h = self.quant(h) if c.quant_conv else h
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b i j c"]:
        """Images of unscaled latents.

        Raises:
          ValueError: channels that do not fit.
        """
        c = self.config
        if z.shape[-1] != c.latent_channels:
            raise ValueError(f"z must have latent_channels={c.latent_channels} channels (NHWC), got shape {z.shape}")
        z = z.astype(self.dtype)
        z = self.post_quant(z) if c.post_quant_conv else z
        return self.decoder(z).astype(jnp.float32)
