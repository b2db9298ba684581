"""Residual networks over images (He et al., 2016): ImageNet's 18 to 152, CIFAR's 20, 32 and 56, and their stems."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm
from zoo.nn.partitioning import EMBED, Dense, partitioned


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """What a residual network is.

    Attributes:
      blocks: residual blocks per stage.
      widths: of each stage's blocks (a bottleneck's output is four times as wide).
      block: ``basic`` (two 3 x 3 convolutions) or ``bottleneck`` (1 x 1, 3 x 3 with the stride, 1 x 1; "v1.5").
      stem: ``imagenet`` (7 x 7, stride 2, max-pool), ``cifar`` (3 x 3) or ``deep`` (three 3 x 3, the first with
        stride 2, max-pool; He et al., 2019, "ResNet-C").
      stem_width: channels of the stem's last convolution.
      average_down: shortcuts pool 2 x 2 before a 1 x 1 convolution without stride (He et al., 2019, "ResNet-D").
      shortcut: where the shape changes: ``project`` (1 x 1 convolution), or every second pixel with zeros for the new
        channels (option A of He et al.), on both sides (``pad``) or after the old ones (``append``).
      classes: size of the head on pooled features; 0 for none.
      momentum: of the running statistics.
      epsilon: of the normalisation.
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    block: Literal["basic", "bottleneck"] = "basic"
    stem: Literal["imagenet", "cifar", "deep"] = "cifar"
    stem_width: int = 16
    average_down: bool = False
    shortcut: Literal["project", "pad", "append"] = "project"
    classes: int = 0
    momentum: float = 0.9
    epsilon: float = 1e-5

    @classmethod
    def of_depth(cls, depth: int, stem: str | None = None, classes: int = 0) -> ResNetConfig:
        """The published network of a depth; ``stem="cifar"`` puts the small stem on an ImageNet depth.

        Raises:
          ValueError: an unknown depth.
        """
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, sorted(DEPTHS)))}, got {depth}")
        blocks, block = DEPTHS[depth]
        small = len(blocks) == 3
        widths = (16, 32, 64) if small else (64, 128, 256, 512)
        return cls(blocks, widths, block, stem or ("cifar" if small else "imagenet"), widths[0], classes=classes)


DEPTHS: dict[int, tuple[tuple[int, ...], str]] = {
    18: ((2, 2, 2, 2), "basic"),
    34: ((3, 4, 6, 3), "basic"),
    50: ((3, 4, 6, 3), "bottleneck"),
    101: ((3, 4, 23, 3), "bottleneck"),
    152: ((3, 8, 36, 3), "bottleneck"),
    20: ((3, 3, 3), "basic"),
    32: ((5, 5, 5), "basic"),
    56: ((9, 9, 9), "basic"),
}
"""Blocks per stage and kind of block by depth."""


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size, and its batch normalisation: ``conv``, ``norm``.

    Attributes:
      features, kernel, stride: of the convolution.
      config, dtype, param_dtype, axis_name: see :class:`ResNet`.
    """

    features: int
    kernel: int
    stride: int = 1
    config: ResNetConfig = ResNetConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Array | None) -> Array:
        """``[B, H, W, C] -> [B, H / stride, W / stride, features]``."""
        size, stride, side = (self.kernel,) * 2, (self.stride,) * 2, self.kernel // 2
        y = nn.Conv(
            self.features, size, stride, padding=[(side, side)] * 2, use_bias=False,
            dtype=self.dtype, param_dtype=self.param_dtype, name="conv",
            kernel_init=partitioned(nn.initializers.he_normal(), None, None, None, EMBED),
        )(x)  # fmt: skip
        # the running variance is the unbiased one, as in the libraries that these weights come from
        norm = BatchNorm(self.config.momentum, self.config.epsilon, True, self.dtype, self.axis_name, name="norm")
        return norm(y, train, mask)


class ResidualBlock(nn.Module):
    """A basic or bottleneck block: ``first``, ``second`` (``third``) and, where the shape changes, ``shortcut``.

    Attributes:
      width: channels of the block (of its 3 x 3 convolutions).
      stride: how much smaller the result is.
      config, dtype, param_dtype, axis_name: see :class:`ResNet`.
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
        """``[B, H, W, C] -> [B, H / stride, W / stride, width or 4 width]``."""

        def layer(y, features, kernel, stride, name):
            settings = (self.config, self.dtype, self.param_dtype, self.axis_name)
            return ConvNorm(features, kernel, stride, *settings, name=name)(y, train, mask)

        if self.config.block == "basic":
            out = self.width
            y = nn.relu(layer(x, out, 3, self.stride, "first"))
            y = layer(y, out, 3, 1, "second")
        else:
            out = 4 * self.width
            y = nn.relu(layer(x, self.width, 1, 1, "first"))
            y = nn.relu(layer(y, self.width, 3, self.stride, "second"))
            y = layer(y, out, 1, 1, "third")
        if self.stride != 1 or x.shape[-1] != out:
            if self.config.shortcut != "project":
                more = out - x.shape[-1]
                before = more // 2 if self.config.shortcut == "pad" else 0
                x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0),) * 3 + ((before, more - before),))
            elif self.config.average_down and self.stride != 1:
                x = layer(average_pool(x, self.stride), out, 1, 1, "shortcut")
            else:
                x = layer(x, out, 1, self.stride, "shortcut")
        return nn.relu(y + x)


class ResNet(nn.Module):
    """Images to feature maps, pooled features and, with a head, logits.

    Attributes:
      config: what it is; :meth:`ResNetConfig.of_depth` has the published ones.
      dtype, param_dtype: of computation and parameters; statistics, pooling and logits are float32.
      remat: recompute each block's activations in the backward pass.
      axis_name: the mapped axis over which batch statistics are global.
    """

    config: ResNetConfig = ResNetConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> dict[str, Any]:
        """Runs the network.

        Args:
          x: images ``[B, H, W, C]``.
          train: whether batch statistics are the batch's.
          mask: which rows count in them; ``None`` for all.

        Returns:
          ``stem [B, h, w, c]`` (before the max-pool), ``stages``: a tuple of ``[B, h_s, w_s, c_s]``, ``pooled [B, f]``
          and, if there are classes, ``logits [B, classes]`` in float32.
        """
        config = self.config
        settings = (config, self.dtype, self.param_dtype, self.axis_name)
        layer = lambda y, n, k, s, name: ConvNorm(n, k, s, *settings, name=name)(y, train, mask)  # noqa: E731
        y, width = x.astype(self.dtype), config.stem_width
        if config.stem == "deep":
            y = nn.relu(layer(y, width // 2, 3, 2, "stem1"))
            y = nn.relu(layer(y, width // 2, 3, 1, "stem2"))
            y = nn.relu(layer(y, width, 3, 1, "stem3"))
        else:
            kernel, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
            y = nn.relu(layer(y, width, kernel, stride, "stem"))
        stem = y
        if config.stem != "cifar":
            y = nn.max_pool(y, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        block_type = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        stages = []
        for stage, (number, width) in enumerate(zip(config.blocks, config.widths, strict=True), start=1):
            for block in range(number):
                stride = 2 if stage > 1 and block == 0 else 1
                y = block_type(width, stride, *settings, name=f"stage{stage}_block{block}")(y, train, mask)
            stages.append(y)
        pooled = jnp.mean(y.astype(jnp.float32), axis=(1, 2))
        out = {"stem": stem, "stages": tuple(stages), "pooled": pooled.astype(self.dtype)}
        if config.classes:
            head = Dense(config.classes, (EMBED, None), dtype=jnp.float32, param_dtype=self.param_dtype, name="head")
            out["logits"] = head(pooled)
        return out

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments that touch every parameter."""
        return {"x": jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)}


def average_pool(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b i j c"]:
    """Means of ``stride x stride`` squares; a last odd row or column is averaged over the pixels that it has."""
    padding = [(0, -size % stride) for size in x.shape[1:3]]
    return nn.avg_pool(x, (stride, stride), (stride, stride), padding=padding, count_include_pad=False)
