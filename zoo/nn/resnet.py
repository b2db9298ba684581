"""Residual networks over images (He et al., 2016): the CIFAR family (20, 32, 56) and the ImageNet one (18, 34)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm

DEPTHS = {
    18: ((2, 2, 2, 2), (64, 128, 256, 512)),
    34: ((3, 4, 6, 3), (64, 128, 256, 512)),
    20: ((3, 3, 3), (16, 32, 64)),
    32: ((5, 5, 5), (16, 32, 64)),
    56: ((9, 9, 9), (16, 32, 64)),
}
"""Blocks and widths per stage by depth."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, projected where the shape changes.

    Attributes:
      width: channels.
      stride: of the first convolution.
      dtype, axis_name: see :class:`ResNet`.
    """

    width: int
    stride: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b i j k"]:
        """``[B, H, W, C] -> [B, H / stride, W / stride, width]``."""

        def layer(y, kernel, stride, name):
            side = kernel // 2
            conv = nn.Conv(
                self.width, (kernel, kernel), (stride, stride), padding=[(side, side)] * 2, use_bias=False,
                dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name=f"{name}_conv",
            )  # fmt: skip
            return BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name=f"{name}_norm")(conv(y), train, mask)

        y = nn.relu(layer(x, 3, self.stride, "first"))
        y = layer(y, 3, 1, "second")
        if self.stride != 1 or x.shape[-1] != self.width:
            x = layer(x, 1, self.stride, "shortcut")
        return nn.relu(y + x)


class ResNet(nn.Module):
    """Images to pooled features.

    Attributes:
      depth: 20, 32 or 56 (CIFAR stem: one 3 x 3 convolution) or 18 or 34 (ImageNet stem: 7 x 7, stride 2, max-pool).
      small_stem: use the CIFAR stem whatever the depth.
      dtype: of the computation; parameters are float32.
      axis_name: the mapped axis over which batch statistics are global.
    """

    depth: int = 20
    small_stem: bool | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b f"]:
        """``[B, H, W, C] -> [B, last width]``.

        Raises:
          ValueError: an unknown depth.
        """
        if self.depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, sorted(DEPTHS)))}, got {self.depth}")
        blocks, widths = DEPTHS[self.depth]
        small = self.depth in (20, 32, 56) if self.small_stem is None else self.small_stem
        kernel, stride = (3, 1) if small else (7, 2)
        y = nn.Conv(
            widths[0], (kernel, kernel), (stride, stride), padding=[(kernel // 2, kernel // 2)] * 2, use_bias=False,
            dtype=self.dtype, kernel_init=nn.initializers.he_normal(), name="stem_conv",
        )(x.astype(self.dtype))  # fmt: skip
        y = nn.relu(BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name="stem_norm")(y, train, mask))
        if not small:
            y = nn.max_pool(y, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for stage, (number, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            for block in range(number):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"stage{stage}_block{block + 1}"
                y = BasicBlock(width, stride, self.dtype, self.axis_name, name=name)(y, train, mask)
        return jnp.mean(y.astype(jnp.float32), axis=(1, 2)).astype(self.dtype)
