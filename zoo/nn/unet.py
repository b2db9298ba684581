"""The U-Net for segmentation and image-to-image regression (Ronneberger, Fischer and Brox, MICCAI 2015).

``UNet()(x)`` is the published network up to padding: 3 x 3 convolutions keep their size here, so that the result has
the size of the input.  The number of spatial dimensions is that of the input: the same module serves volumes.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm

NORMS = ("none", "batch", "instance")
POOLS = ("max", "average")


class DoubleConv(nn.Module):
    """Twice: a 3 x 3 convolution, a norm if any, a rectifier.

    Attributes:
      features: channels of the result.
      norm, slope, dtype, axis_name: see :class:`UNet`.
    """

    features: int
    norm: str = "none"
    slope: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *s c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b *s d"]:
        """Features of the same size."""
        for i in (1, 2):
            # a norm takes any constant away again, so that a bias before it would be idle
            x = nn.Conv(
                self.features, (3,) * (x.ndim - 2), padding="SAME", use_bias=self.norm == "none", dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(), name=f"conv{i}",
            )(x)  # fmt: skip
            if self.norm == "batch":
                x = BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name=f"norm{i}")(x, train, mask)
            elif self.norm == "instance":
                x = instance_norm(x).astype(self.dtype)
            x = nn.leaky_relu(x, self.slope)
        return x


class UNet(nn.Module):
    """An encoder that halves, a decoder that doubles, and at each size a skip from the one to the other.

    Attributes:
      out_channels: of the result.
      widths: channels at each size, from the full one to the smallest; halved ``len(widths) - 1`` times.
      norm: after each 3 x 3 convolution: ``"none"`` (published), ``"batch"`` or ``"instance"`` (each channel of each
        example by itself, without scale and bias).
      pool: ``"max"`` (published) or ``"average"``, over 2 in each dimension.
      slope: of the rectifiers below zero; 0 (published) is ReLU.
      dtype: of computation; the result is float32.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
    """

    out_channels: int = 2
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    norm: Literal["none", "batch", "instance"] = "none"
    pool: Literal["max", "average"] = "max"
    slope: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *s c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b *s o"]:
        """Images ``[B, H, W, C]`` (or volumes ``[B, D, H, W, C]``) to ``[B, H, W, out_channels]``, without activation.

        Any size will do: one that cannot be halved often enough is continued at its borders by the border's values,
        half on each side, and the result cut back.  The added border counts in an instance's statistics.

        Args:
          x: images.
          train, mask: of batch normalisation; see :class:`zoo.nn.norm.BatchNorm`.

        Raises:
          ValueError: an unknown norm or pool, or no widths.
        """
        if self.norm not in NORMS or self.pool not in POOLS or not self.widths:
            raise ValueError(
                f"expected norm in {NORMS}, pool in {POOLS} and at least one width, got {self.norm!r}, {self.pool!r} "
                f"and {self.widths}"
            )
        block = lambda width, name: DoubleConv(  # noqa: E731
            width, self.norm, self.slope, self.dtype, self.axis_name, name=name
        )
        dims, depth = x.ndim - 2, len(self.widths) - 1
        short = [-size % 2**depth for size in x.shape[1:-1]]
        border = [(n // 2, n - n // 2) for n in short]
        y = jnp.pad(x.astype(self.dtype), [(0, 0), *border, (0, 0)], mode="edge")
        pool = nn.max_pool if self.pool == "max" else nn.avg_pool
        skips = []
        for i, width in enumerate(self.widths[:-1]):
            skips.append(block(width, f"down{i}")(y, train, mask))
            y = pool(skips[-1], (2,) * dims, (2,) * dims)
        y = block(self.widths[-1], f"down{depth}")(y, train, mask)
        for i in reversed(range(depth)):
            width = self.widths[i]
            y = nn.ConvTranspose(width, (2,) * dims, (2,) * dims, dtype=self.dtype, name=f"double{i}")(y)
            y = block(width, f"up{i}")(jnp.concatenate([skips[i], y], -1), train, mask)
        y = nn.Conv(self.out_channels, (1,) * dims, dtype=self.dtype, name="head")(y)
        inner = tuple(slice(low, low + size) for (low, _), size in zip(border, x.shape[1:-1], strict=True))
        return y[(slice(None), *inner)].astype(jnp.float32)


def instance_norm(x: Float[Array, "b *s c"], epsilon: float = 1e-5) -> Float[Array, "b *s c"]:
    """Each channel of each example with mean 0 and (biased) variance 1 over its places (Ulyanov et al., 2016).

    Args:
      x: activations; computed in float32.
      epsilon: added to the variance.
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(1, x.ndim - 1))
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + epsilon)
