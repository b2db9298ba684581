"""The U-Net of ADM (Dhariwal & Nichol, 2021, section 3): class-conditional denoising of pixels.

``UNet2D(UNet2DConfig.adm_64())(x, time, labels)``, or with weights: ``zoo import 64x64_diffusion.pt``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from zoo.nn.dropout import layer_keys
from zoo.nn.partitioning import EMBED, Embed
from zoo.nn.unet_blocks import (
    ResidualBlock,
    SpatialAttention,
    TimeEmbedding,
    UNetOutput,
    conv,
    group_norm,
    sinusoids,
    upsample,
)

ATTENTION_ORDERS = ("legacy", "new", "flash")


@dataclasses.dataclass(frozen=True)
class UNet2DConfig:
    """A network's shape; the defaults are those of the 64 x 64 ImageNet model.

    Attributes:
      image_size: side of the images it was trained on; the network itself takes any size that can be halved.
      in_channels, out_channels: of images and predictions; learned variances double the latter.
      base_width: width of the waves; the embedding has four times as many features.
      widths: channels at each resolution, from the full one to the deepest, each half the size.
      num_blocks: residual blocks per resolution on the way down; one more on the way up.
      attention_factors: downsampling factors (1, 2, 4 ...) of the resolutions with attention; the middle always has it.
      head_width: channels of a head; ``None`` to use ``num_heads``.
      num_heads: heads everywhere, if ``head_width`` is ``None``.
      attention_order: how the stored queries, keys and values interleave: ``"legacy"`` head by head, ``"new"`` all
        queries first, ``"flash"`` like new but stored as 2-D convolutions (consistency models).  It matters to the
        importer alone: here they are three kernels.
      num_classes: classes; 0 for a network without labels.
      scale_shift: the embedding scales and shifts after the norm; else it is added before.
      block_resample: residual blocks halve and double the sizes; else strided and plain convolutions do.
      norm_groups: of the group norms.
      dropout: rate inside the residual blocks.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 6
    base_width: int = 192
    widths: tuple[int, ...] = (192, 384, 576, 768)
    num_blocks: int = 3
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_width: int | None = 64
    num_heads: int = 4
    attention_order: str = "new"
    num_classes: int = 1000
    scale_shift: bool = True
    block_resample: bool = True
    norm_groups: int = 32
    dropout: float = 0.0

    def __post_init__(self):
        """Checks what no shape would."""
        if self.attention_order not in ATTENTION_ORDERS:
            raise ValueError(f"attention_order must be one of {ATTENTION_ORDERS}, got {self.attention_order!r}")
        possible = tuple(2**i for i in range(len(self.widths)))
        if unknown := set(self.attention_factors) - set(possible):
            raise ValueError(
                f"attention_factors must be among {possible} for {len(self.widths)} widths, got {sorted(unknown)}"
            )

    def heads(self, channels: int) -> int:
        """How many heads an attention over so many channels has."""
        if self.head_width is None:
            return self.num_heads
        if channels % self.head_width:
            raise ValueError(f"head_width={self.head_width} does not divide {channels} channels")
        return channels // self.head_width

    @classmethod
    def adm_64(cls) -> UNet2DConfig:
        """ImageNet 64 x 64, class-conditional."""
        return cls()

    @classmethod
    def adm_128(cls) -> UNet2DConfig:
        """ImageNet 128 x 128, class-conditional; four heads everywhere."""
        return cls(
            image_size=128, base_width=256, widths=(256, 256, 512, 768, 1024), num_blocks=2, head_width=None,
            attention_factors=(4, 8, 16), attention_order="legacy",
        )  # fmt: skip

    @classmethod
    def adm_256(cls, num_classes: int = 1000) -> UNet2DConfig:
        """ImageNet 256 x 256; with ``num_classes=0`` the unconditional one, and the LSUN models."""
        return cls(
            image_size=256, base_width=256, widths=(256, 256, 512, 512, 1024, 1024), num_blocks=2,
            attention_factors=(8, 16, 32), attention_order="legacy", num_classes=num_classes,
        )  # fmt: skip

    @classmethod
    def adm_512(cls) -> UNet2DConfig:
        """ImageNet 512 x 512, class-conditional; half the width at the full resolution."""
        return cls(
            image_size=512, base_width=256, widths=(128, 256, 256, 512, 512, 1024, 1024), num_blocks=2,
            attention_factors=(16, 32, 64), attention_order="legacy",
        )  # fmt: skip

    @classmethod
    def consistency_64(cls) -> UNet2DConfig:
        """ImageNet 64 x 64 of the EDM teacher and consistency models (Song et al., 2023)."""
        return cls(out_channels=3, attention_order="flash")

    @classmethod
    def consistency_256(cls) -> UNet2DConfig:
        """LSUN 256 x 256 (bedroom, cat) of the EDM teacher and consistency models."""
        return dataclasses.replace(cls.adm_256(0), out_channels=3, attention_order="flash", scale_shift=False)


class UNet2D(nn.Module):
    """Predicts noise (and, with twice the channels, variances) from noisy images, the noise level and class labels.

    Weights of guided-diffusion take ``time`` in steps from 0 to 999 and images as they are; those of consistency models
    take ``time = 250 ln(sigma)`` and images times ``c_in`` of :func:`zoo.ops.noise_levels.consistency_precond`.

    Attributes:
      config: the shape.
      dtype, param_dtype: of computation and parameters; norms' statistics, softmax and the last layer are float32.
      remat: recompute each block in the backward pass rather than keep its activations.
    """

    config: UNet2DConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest inputs that reach every parameter."""
        c, side = self.config, 2 ** (len(self.config.widths) - 1)
        inputs = {
            "x": jax.ShapeDtypeStruct((batch, side, side, c.in_channels), jnp.float32),
            "time": jax.ShapeDtypeStruct((batch,), jnp.float32),
        }
        if c.num_classes:
            inputs["labels"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return inputs

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        labels: Int[Array, " b"] | None = None,
        train: bool = False,
        keys: Array | None = None,
    ) -> UNetOutput:
        """Images ``[B, H, W, in_channels]`` to predictions ``[B, H, W, out_channels]`` and feature maps.

        Args:
          x: noisy images, each side divisible by ``2 ** (len(widths) - 1)``.
          time: noise level; see the class.
          labels: class of each image, if there are classes.
          train: changes nothing here: only ``keys`` turn dropout on.
          keys: one key per example for dropout.

        Raises:
          ValueError: labels missing or not wanted, sides that cannot be halved, channels that are not ``in_channels``.
        """
        c = self.config
        self._check(x, labels)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shared = dict(groups=c.norm_groups, **settings)
        wrap = nn.remat if self.remat else (lambda module: module)
        Block, Attention = wrap(ResidualBlock), wrap(SpatialAttention)
        drawn = iter(range(10**6))

        emb = TimeEmbedding(4 * c.base_width, name="time", **settings)(sinusoids(time, c.base_width).astype(self.dtype))
        if labels is not None:
            emb = emb + Embed(c.num_classes, 4 * c.base_width, (None, EMBED), name="label", **settings)(labels)
        emb = nn.silu(emb)

        def block(h, features, name, resample="none"):
            condition = "scale_shift" if c.scale_shift else "shift"
            made = Block(features, condition, resample, rate=c.dropout, name=name, **shared)
            return made(h, emb, layer_keys(keys, next(drawn)))

        def attend(h, name):
            return Attention(c.heads(h.shape[-1]), name=name, **shared)(h)

        h = conv(c.widths[0], 3, "conv_in", axes=(None, EMBED), **settings)(x.astype(self.dtype))
        skips = [h]
        for level, width in enumerate(c.widths):
            for i in range(c.num_blocks):
                h = block(h, width, f"encoder{level}_block{i}")
                if 2**level in c.attention_factors:
                    h = attend(h, f"encoder{level}_attention{i}")
                skips.append(h)
            if level < len(c.widths) - 1:
                name = f"encoder{level}_down"
                h = block(h, width, name, "down") if c.block_resample else conv(width, 3, name, stride=2, **settings)(h)
                skips.append(h)
        encoder = tuple(skips)

        h = block(h, h.shape[-1], "middle_block0")
        h = attend(h, "middle_attention")
        h = middle = block(h, h.shape[-1], "middle_block1")

        for level, width in reversed(list(enumerate(c.widths))):
            for i in range(c.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), width, f"decoder{level}_block{i}")
                if 2**level in c.attention_factors:
                    h = attend(h, f"decoder{level}_attention{i}")
            if level:
                name = f"decoder{level}_up"
                h = block(h, width, name, "up") if c.block_resample else conv(width, 3, name, **settings)(upsample(h))

        h = h.astype(jnp.float32)
        h = nn.silu(group_norm(h.shape[-1], c.norm_groups, 1e-5, jnp.float32, "norm_out")(h))
        zeros, last = nn.initializers.zeros, {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        h = conv(c.out_channels, 3, "conv_out", axes=(EMBED, None), init=zeros, **last)(h)
        return UNetOutput(h, encoder, middle)

    def _check(self, x: Array, labels: Array | None) -> None:
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
                f"got {'none' if labels is None else 'some'}"
            )
