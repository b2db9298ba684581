"""CLIP's image tower of convolutions (Radford et al., 2021, section 2.4): ResNet-D's blocks, attention pooling."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.attention import MultiHeadAttention
from zoo.nn.partitioning import EMBED, partitioned
from zoo.nn.resnet import ConvNorm, ResNetConfig
from zoo.nn.vit import resize_positions

REDUCTION = 32
"""Pixels per side of the last feature map's pixels."""


@dataclasses.dataclass(frozen=True)
class CLIPResNetConfig:
    """What the tower is; the defaults are RN50's.

    Attributes:
      blocks: bottlenecks per stage.
      width: channels of the stem and of the first stage's 3 x 3 convolutions.
      num_heads: of the attention pooling.
      features: size of its result.
      image_size: for which the table of positions is made.
      antialias: how that is resampled for other sizes, see :func:`zoo.nn.vit.resize_positions`.
      momentum, epsilon: of batch normalisation.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_heads: int = 32
    features: int = 1024
    image_size: tuple[int, int] = (224, 224)
    antialias: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5

    def __post_init__(self):
        """Checks what can be checked without inputs."""
        if len(self.blocks) != 4:
            raise ValueError(f"blocks must be four numbers, got {self.blocks}")
        if self.channels % self.num_heads:
            raise ValueError(f"num_heads must divide {self.channels} (32 times width), got {self.num_heads}")
        grid_of(self.image_size)

    @property
    def channels(self) -> int:
        """Of the last feature map."""
        return 32 * self.width


def grid_of(image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the last feature map.

    Raises:
      ValueError: an image whose sides are no multiples of 32.
    """
    h, w = image_size
    if h % REDUCTION or w % REDUCTION or not h or not w:
        raise ValueError(f"image size {h} x {w} is not a multiple of {REDUCTION}: crop, pad or resize the image")
    return h // REDUCTION, w // REDUCTION


class AntialiasedBottleneck(nn.Module):
    """1 x 1, 3 x 3, average pool where the stride is, 1 x 1; the shortcut pools too, then projects.

    Attributes:
      width: channels of the 3 x 3 convolution; the result has four times as many.
      stride: 1 or 2.
      config: of normalisation.
      dtype, param_dtype, axis_name: see :class:`CLIPResNet`.
    """

    width: int
    stride: int
    config: ResNetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b i j k"]:
        """``[B, H, W, C] -> [B, H / stride, W / stride, 4 width]``."""

        def layer(y, features, kernel, name):
            settings = (self.config, self.dtype, self.param_dtype, self.axis_name)
            return ConvNorm(features, kernel, 1, *settings, name=name)(y, train, mask)

        y = nn.relu(layer(x, self.width, 1, "first"))
        y = nn.relu(layer(y, self.width, 3, "second"))
        y = layer(_pool(y, self.stride), 4 * self.width, 1, "third")
        if self.stride != 1 or x.shape[-1] != 4 * self.width:
            x = layer(_pool(x, self.stride), 4 * self.width, 1, "shortcut")
        return nn.relu(y + x)


class CLIPResNet(nn.Module):
    """CLIP's modified residual network; see :class:`CLIPResNetConfig`.

    Attributes:
      config: what it is.
      dtype, param_dtype: of computation and parameters; statistics and softmax are float32.
      remat: recompute each block's activations in the backward pass.
      axis_name: the mapped axis over which batch statistics are global.
    """

    config: CLIPResNetConfig = CLIPResNetConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> dict[str, Any]:
        """Images to features.

        Args:
          images: ``[B, H, W, 3]``, sides multiples of 32.
          train: whether batch statistics are the batch's.
          mask: which rows count in them; ``None`` for all.

        Returns:
          ``stem`` and ``stages``: feature maps; ``tokens [B, 1 + h w, features]``: the attention pooling's result with
          the mean and with every pixel of the last map as the query; ``pooled [B, features]``: the first of them.

        Raises:
          ValueError: sides that are no multiples of 32.
        """
        c = self.config
        grid = grid_of(images.shape[1:3])
        norms = ResNetConfig(momentum=c.momentum, epsilon=c.epsilon)
        settings = (norms, self.dtype, self.param_dtype, self.axis_name)
        y = images.astype(self.dtype)
        for name, width, stride in (("stem1", c.width // 2, 2), ("stem2", c.width // 2, 1), ("stem3", c.width, 1)):
            y = nn.relu(ConvNorm(width, 3, stride, *settings, name=name)(y, train, mask))
        y = stem = _pool(y, 2)
        block_type = nn.remat(AntialiasedBottleneck, static_argnums=(2,)) if self.remat else AntialiasedBottleneck
        stages = []
        for stage, number in enumerate(c.blocks, start=1):
            for block in range(number):
                stride = 2 if stage > 1 and block == 0 else 1
                width = c.width * 2 ** (stage - 1)
                y = block_type(width, stride, *settings, name=f"stage{stage}_block{block}")(y, train, mask)
            stages.append(y)
        tokens = self._attention_pool(y.reshape(y.shape[0], -1, c.channels), grid)
        return {"stem": stem, "stages": tuple(stages), "tokens": tokens, "pooled": tokens[:, 0]}

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments that touch every parameter."""
        return {"images": jax.ShapeDtypeStruct((batch, REDUCTION, REDUCTION, 3), jnp.float32)}

    def _attention_pool(self, x: Array, grid: tuple[int, int]) -> Array:
        """``[B, h w, channels] -> [B, 1 + h w, features]``."""
        c = self.config
        old = grid_of(c.image_size)
        mean = jnp.mean(x.astype(jnp.float32), axis=1, keepdims=True).astype(x.dtype)
        init = partitioned(nn.initializers.normal(c.channels**-0.5), None, EMBED)
        table = self.param("positions", init, (1 + old[0] * old[1], c.channels), self.param_dtype)
        table = resize_positions(table, old, grid, 1, c.antialias).astype(self.dtype)
        x = jnp.concatenate([mean, x], axis=1) + table
        return MultiHeadAttention(
            c.num_heads, features=c.features, dtype=self.dtype, param_dtype=self.param_dtype, name="pool",
            kernel_init=nn.initializers.normal(c.channels**-0.5),
        )(x)  # fmt: skip


def _pool(x: Array, stride: int) -> Array:
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x
