"""Residual networks over one-dimensional series (He et al., 2016, with the stem of dbpm's brief: no max-pool)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Blocks per stage by depth; 50 has bottleneck blocks."""


class ResidualBlock(nn.Module):
    """One residual block: two 3-convolutions, or a 1-3-1 bottleneck that ends at four times its width.

    Attributes:
      width: channels inside the block.
      stride: of its (first) 3-convolution.
      bottleneck: which of the two.
      dtype: of the computation.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b s w"]:
        """``[B, T, C] -> [B, ceil(T / stride), width or 4 width]``."""

        def norm(y, name):
            return BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name=name)(y, train, mask)

        plan = [(self.width, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:
            plan = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        y = x
        for i, (width, kernel, stride) in enumerate(plan, start=1):
            y = _conv(width, kernel, stride, self.dtype, f"conv{i}")(y)
            y = norm(y, f"norm{i}")
            y = nn.relu(y) if i < len(plan) else y
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = norm(_conv(plan[-1][0], 1, self.stride, self.dtype, "shortcut_conv")(x), "shortcut_norm")
        return nn.relu(y + x)


class ResNet1D(nn.Module):
    """A residual network from series to features: stem, stages, average over time, linear layer.

    The stem is a 7-convolution of stride 1 with normalisation; every stage but the first halves the time axis.  All
    padding is symmetric, as in torch.  Series shorter than the strides still work (the time axis ends at 1).

    Attributes:
      depth: 18, 34 or 50, or the number of blocks of each stage.
      widths: channels of each stage; the stem has the first's.
      features: size of the result; ``None`` leaves the linear layer out.
      bottleneck: bottleneck blocks; ``None`` for depth 50 only.
      dtype: of the computation; parameters are float32.
      axis_name: the mapped axis over which batch statistics are global.
    """

    depth: int | tuple[int, ...] = 34
    widths: tuple[int, ...] = (64, 128, 256, 512)
    features: int | None = 256
    bottleneck: bool | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b f"]:
        """Features of a batch of series.

        Args:
          x: ``[B, T, C]``: time, then channels.
          train: whether batch statistics are used and recorded.
          mask: which rows are real; the others do not enter batch statistics.

        Raises:
          ValueError: an unknown depth, or stages and widths that do not match.
        """
        if isinstance(self.depth, int) and self.depth not in DEPTHS:
            raise ValueError(f"depth must be 18, 34 or 50, or the blocks of each stage as (1, 1, 1); got {self.depth}")
        blocks = DEPTHS[self.depth] if isinstance(self.depth, int) else self.depth
        if len(blocks) != len(self.widths):
            raise ValueError(f"{len(blocks)} stages {tuple(blocks)} need as many widths, got {tuple(self.widths)}")
        bottleneck = self.depth == 50 if self.bottleneck is None else self.bottleneck
        y = _conv(self.widths[0], 7, 1, self.dtype, "stem_conv")(x.astype(self.dtype))
        y = nn.relu(BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name="stem_norm")(y, train, mask))
        for stage, (number, width) in enumerate(zip(blocks, self.widths, strict=True)):
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                y = ResidualBlock(
                    width, stride, bottleneck, self.dtype, self.axis_name, name=f"stage{stage + 1}_block{block + 1}"
                )(y, train, mask)
        y = jnp.mean(y.astype(jnp.float32), axis=1).astype(self.dtype)
        return y if self.features is None else nn.Dense(self.features, dtype=self.dtype, name="features")(y)


def _conv(width: int, kernel: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    # explicit padding: "SAME" pads strided convolutions on the right only, unlike torch
    side = kernel // 2
    return nn.Conv(
        width,
        (kernel,),
        (stride,),
        padding=[(side, side)],
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )
