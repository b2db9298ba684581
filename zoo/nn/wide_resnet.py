"""Wide residual networks over small images (Zagoruyko and Komodakis, 2016): WRN-40-2, WRN-28-10."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm
from zoo.nn.partitioning import EMBED, Dense, partitioned


@dataclasses.dataclass(frozen=True)
class WideResNetConfig:
    """What a wide residual network is: ``WRN-depth-width``.

    Attributes:
      depth: layers, 6 n + 4 for n blocks in each of the three stages.
      width: k; the stages have 16 k, 32 k and 64 k channels.
      stem_width: channels of the first convolution.
      classes: size of the head on pooled features; 0 for none.
      momentum: of the running statistics.
      epsilon: of the normalisation.
      bias: whether convolutions have one; normalisation follows all but the last, the released code has them.
    """

    depth: int = 40
    width: int = 2
    stem_width: int = 16
    classes: int = 0
    momentum: float = 0.9
    epsilon: float = 1e-5
    bias: bool = True

    def __post_init__(self):
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n of at least 1 (10, 16, 28, 40), got {self.depth}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class WideBlock(nn.Module):
    """A pre-activation block: norm, ReLU, 3 x 3, norm, ReLU, 3 x 3 with the stride, plus the input.

    The stride lies on the second convolution, and where the shape changes the input goes through a 1 x 1 convolution
    without normalisation.

    Attributes:
      features: channels of the result.
      stride: how much smaller the result is.
      config, dtype, param_dtype, axis_name: see :class:`WideResNet`.
    """

    features: int
    stride: int
    config: WideResNetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b i j k"]:
        """``[B, H, W, C] -> [B, H / stride, W / stride, features]``."""
        config = self.config
        norm = lambda name: BatchNorm(  # noqa: E731 - as in torch, the running variance is the unbiased one
            config.momentum, config.epsilon, True, self.dtype, self.axis_name, name=name
        )
        settings = (config, self.dtype, self.param_dtype)
        y = convolution(self.features, 3, 1, *settings, name="conv1")(nn.relu(norm("norm1")(x, train, mask)))
        y = convolution(self.features, 3, self.stride, *settings, name="conv2")(nn.relu(norm("norm2")(y, train, mask)))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = convolution(self.features, 1, self.stride, *settings, name="shortcut")(x)
        return y + x


class WideResNet(nn.Module):
    """Images to feature maps, pooled features and, with a head, logits.

    Attributes:
      config: what it is.
      dtype, param_dtype: of computation and parameters; statistics, pooling and logits are float32.
      remat: recompute each block's activations in the backward pass.
      axis_name: the mapped axis over which batch statistics are global.
    """

    config: WideResNetConfig = WideResNetConfig()
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
          ``stages``: a tuple of ``[B, h_s, w_s, c_s]``, ``pooled [B, 64 k]`` and, if there are classes,
          ``logits [B, classes]`` in float32.
        """
        config = self.config
        settings = (config, self.dtype, self.param_dtype)
        y = convolution(config.stem_width, 3, 1, *settings, name="stem")(x.astype(self.dtype))
        block_type = nn.remat(WideBlock, static_argnums=(2,)) if self.remat else WideBlock
        stages = []
        for stage in range(3):
            for block in range((config.depth - 4) // 6):
                stride = 2 if stage and not block else 1
                name = f"stage{stage + 1}_block{block}"
                y = block_type(16 * 2**stage * config.width, stride, *settings, self.axis_name, name=name)(
                    y, train, mask
                )
            stages.append(y)
        norm = BatchNorm(config.momentum, config.epsilon, True, self.dtype, self.axis_name, name="norm")
        pooled = jnp.mean(nn.relu(norm(y, train, mask)).astype(jnp.float32), axis=(1, 2))
        out = {"stages": tuple(stages), "pooled": pooled.astype(self.dtype)}
        if config.classes:
            head = Dense(config.classes, (EMBED, None), dtype=jnp.float32, param_dtype=self.param_dtype, name="head")
            out["logits"] = head(pooled)
        return out

    def example_inputs(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Arguments that touch every parameter."""
        return {"x": jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)}


def convolution(
    features: int, kernel: int, stride: int, config: WideResNetConfig, dtype: Any, param_dtype: Any, name: str
) -> nn.Conv:
    """A convolution padded to keep the size."""
    side = kernel // 2
    return nn.Conv(
        features, (kernel,) * 2, (stride,) * 2, padding=[(side, side)] * 2, use_bias=config.bias,
        dtype=dtype, param_dtype=param_dtype, name=name,
        kernel_init=partitioned(nn.initializers.he_normal(), None, None, None, EMBED),
    )  # fmt: skip
