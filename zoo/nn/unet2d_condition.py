"""The latent U-Net of Stable Diffusion (Rombach et al., 2022): residual blocks, and attention to a text's tokens.

``UNet2DCondition(UNet2DConditionConfig.sd15())(x, time, context)``, with weights: ``zoo import .../unet``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.attention import MultiHeadAttention, padding_to_mask
from zoo.nn.dropout import layer_keys
from zoo.nn.partitioning import EMBED, MLP, Dense
from zoo.nn.unet_blocks import (
    ResidualBlock,
    TimeEmbedding,
    UNetOutput,
    conv,
    group_norm,
    resize_nearest,
    sinusoids,
)


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """A network's shape; the defaults are Stable Diffusion 1.5's.

    Attributes:
      sample_size: side of the latents it was trained on; the network itself takes any size.
      in_channels, out_channels: of latents and predictions.
      widths: channels at each resolution, from the full one to the deepest, each half the size.
      num_blocks: residual blocks per resolution on the way down; one more on the way up.
      cross_attention: which resolutions have transformers; the middle always has one.
      num_heads: attention heads at each resolution.
      context_width: features of the text's tokens.
      transformer_layers: layers of each transformer.
      linear_projection: how the projections around a transformer are stored: linear maps, or 1 x 1 convolutions.
      upcast_attention: kept for an export; here the softmax is float32 in any case.
      center_input: ``2 x - 1`` before anything else.
      sine_first, frequency_shift: of the waves of the timestep; see :func:`zoo.nn.unet_blocks.sinusoids`.
      norm_groups, norm_epsilon: of the residual blocks' norms; the transformers' use 1e-6.
      dropout: rate inside the residual blocks.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    num_blocks: int = 2
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    transformer_layers: int = 1
    linear_projection: bool = False
    upcast_attention: bool = False
    center_input: bool = False
    sine_first: bool = False
    frequency_shift: float = 0.0
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        """Checks that there is one entry for each resolution, and that heads divide channels."""
        for name in ("cross_attention", "num_heads"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} must have one entry for each of {self.widths}, got {getattr(self, name)}")
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"num_heads={self.num_heads} must divide widths={self.widths}: {heads} and {width}")

    @classmethod
    def sd15(cls) -> UNet2DConditionConfig:
        """Stable Diffusion 1.x."""
        return cls()

    @classmethod
    def sd21(cls) -> UNet2DConditionConfig:
        """Stable Diffusion 2.x, at 768 x 768 pixels."""
        return cls(
            sample_size=96, num_heads=(5, 10, 20, 20), context_width=1024, linear_projection=True, upcast_attention=True
        )


class TransformerLayer(nn.Module):
    """Self-attention, attention to the context and a gated feed-forward block (GEGLU, Shazeer, 2020), norms first.

    Attributes:
      num_heads: heads of both attentions.
      dtype, param_dtype: of computation and parameters.
    """

    num_heads: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], context: Float[Array, "b s c"], mask: Bool[Array, "b 1 1 s"] | None = None
    ) -> Float[Array, "b t d"]:
        """Tokens ``[B, T, D]``, attending to ``context [B, S, C]`` where ``mask`` is true."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = lambda name: nn.LayerNorm(  # noqa: E731
            1e-5, dtype=self.dtype, param_dtype=jnp.float32, use_fast_variance=False, name=name
        )
        attend = lambda name: MultiHeadAttention(self.num_heads, use_bias=False, name=name, **settings)  # noqa: E731
        x = x + attend("self_attention")(norm("norm1")(x))
        x = x + attend("cross_attention")(norm("norm2")(x), context, mask)
        h, hidden = norm("norm3")(x), 4 * x.shape[-1]
        gate = nn.gelu(Dense(hidden, (EMBED, MLP), name="gate", **settings)(h), approximate=False)
        h = Dense(hidden, (EMBED, MLP), name="up", **settings)(h) * gate
        return x + Dense(x.shape[-1], (MLP, EMBED), name="down", **settings)(h)


class Transformer2D(nn.Module):
    """A transformer over the positions of a feature map, added to it.

    Attributes:
      num_heads, layers: its shape.
      groups: of the norm before it.
      dtype, param_dtype: of computation and parameters.
    """

    num_heads: int
    layers: int = 1
    groups: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], context: Float[Array, "b s c"], mask: Bool[Array, "b 1 1 s"] | None = None
    ) -> Float[Array, "b h w d"]:
        """``[B, H, W, D]``, same shape out."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        b, height, width, channels = x.shape
        h = group_norm(channels, self.groups, 1e-6, self.dtype, "norm")(x).reshape(b, height * width, channels)
        h = Dense(channels, (EMBED, EMBED), name="in", **settings)(h)
        for i in range(self.layers):
            h = TransformerLayer(self.num_heads, name=f"layer{i}", **settings)(h, context, mask)
        return x + Dense(channels, (EMBED, EMBED), name="out", **settings)(h).reshape(x.shape)


class UNet2DCondition(nn.Module):
    """Predicts noise (or velocity) from noisy latents, the timestep and a text's token features.

    Attributes:
      config: the shape.
      dtype, param_dtype: of computation and parameters; norms' statistics and softmax are float32.
      remat: recompute each block in the backward pass rather than keep its activations.
    """

    config: UNet2DConditionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """The smallest inputs that reach every parameter."""
        c, side = self.config, 2 ** (len(self.config.widths) - 1)
        shape = lambda *dims: jax.ShapeDtypeStruct((batch, *dims), jnp.float32)  # noqa: E731
        return {"x": shape(side, side, c.in_channels), "time": shape(), "context": shape(1, c.context_width)}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        context: Float[Array, "b s d"],
        padding_mask: Bool[Array, "b s"] | None = None,
        train: bool = False,
        keys: Array | None = None,
    ) -> UNetOutput:
        """Latents ``[B, H, W, in_channels]`` to predictions ``[B, H, W, out_channels]`` and feature maps.

        Args:
          x: noisy latents, times the autoencoder's scaling factor; sides of any length.
          time: timestep, 0 to 999.
          context: ``[B, S, context_width]``, the text encoder's last hidden states.
          padding_mask: which tokens may be attended to; ``None`` for all (as Stable Diffusion was trained).
          train: changes nothing here: only ``keys`` turn dropout on.
          keys: one key per example for dropout.

        Raises:
          ValueError: channels or context features that are not the config's.
        """
        c = self.config
        if x.shape[-1] != c.in_channels:
            raise ValueError(f"x must have in_channels={c.in_channels} channels (NHWC), got shape {x.shape}")
        if context.shape[-1] != c.context_width:
            raise ValueError(f"context must have context_width={c.context_width} features, got shape {context.shape}")
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        wrap = nn.remat if self.remat else (lambda module: module)
        Block, Transformer = wrap(ResidualBlock), wrap(Transformer2D)
        drawn = iter(range(10**6))
        context, mask = context.astype(self.dtype), padding_to_mask(padding_mask)

        waves = sinusoids(time, c.widths[0], shift=c.frequency_shift, sine_first=c.sine_first)
        emb = nn.silu(TimeEmbedding(4 * c.widths[0], name="time", **settings)(waves.astype(self.dtype)))

        def block(h, width, name):
            groups = {"groups": c.norm_groups, "epsilon": c.norm_epsilon}
            made = Block(width, "shift", rate=c.dropout, name=name, **groups, **settings)
            return made(h, emb, layer_keys(keys, next(drawn)))

        def attend(h, level, name):
            made = Transformer(c.num_heads[level], c.transformer_layers, c.norm_groups, name=name, **settings)
            return made(h, context, mask)

        x = 2 * x - 1 if c.center_input else x
        h = conv(c.widths[0], 3, "conv_in", axes=(None, EMBED), **settings)(x.astype(self.dtype))
        skips = [h]
        for level, width in enumerate(c.widths):
            for i in range(c.num_blocks):
                h = block(h, width, f"encoder{level}_block{i}")
                if c.cross_attention[level]:
                    h = attend(h, level, f"encoder{level}_attention{i}")
                skips.append(h)
            if level < len(c.widths) - 1:
                h = conv(width, 3, f"encoder{level}_down", stride=2, **settings)(h)
                skips.append(h)
        encoder = tuple(skips)

        h = block(h, c.widths[-1], "middle_block0")
        h = attend(h, -1, "middle_attention")
        h = middle = block(h, c.widths[-1], "middle_block1")

        for level, width in reversed(list(enumerate(c.widths))):
            for i in range(c.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), width, f"decoder{level}_block{i}")
                if c.cross_attention[level]:
                    h = attend(h, level, f"decoder{level}_attention{i}")
            if level:
                # an odd side was rounded up on the way down: back to the size of what comes next
                h = resize_nearest(h, *skips[-1].shape[1:3])
                h = conv(width, 3, f"decoder{level}_up", **settings)(h)

        h = nn.silu(group_norm(h.shape[-1], c.norm_groups, c.norm_epsilon, self.dtype, "norm_out")(h))
        h = conv(c.out_channels, 3, "conv_out", axes=(EMBED, None), **settings)(h)
        return UNetOutput(h.astype(jnp.float32), encoder, middle)
