"""Small convolutional autoencoders: strided convolutions down, transposed ones up, a Gaussian bottleneck between.

Images are NHWC.  Encoder and decoder are modules of their own, so that one model's decoder can read another's latents.
Convolutions before a batch normalisation have no bias: it would change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.nn.norm import BatchNorm

OUTPUTS: dict[str, Callable] = {"sigmoid": nn.sigmoid, "tanh": nn.tanh, "linear": lambda x: x}
"""The decoder's last activation, by the range of the images: [0, 1], [-1, 1], any."""


def encoded_shape(shape: tuple[int, int, int], widths: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width and channels after the encoder: each layer halves, rounding up."""
    height, width, _ = shape
    for _ in widths:
        height, width = -(-height // 2), -(-width // 2)
    return height, width, widths[-1]


class ConvEncoder(nn.Module):
    """3 x 3 convolutions of stride 2, each with batch normalisation and GELU; the result is flattened.

    Attributes:
      widths: channels of the layers.
      last_activation: whether the last layer has its GELU.
      dtype: of the computation.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
    """

    widths: tuple[int, ...] = (32, 64)
    last_activation: bool = True
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b d"]:
        """``[B, H, W, C]`` to ``[B, h w c]``, see :func:`encoded_shape`."""
        h = x.astype(self.dtype)
        for i, width in enumerate(self.widths, start=1):
            h = nn.Conv(width, (3, 3), (2, 2), padding=1, use_bias=False, dtype=self.dtype, name=f"conv{i}")(h)
            h = BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name=f"norm{i}")(h, train, mask)
            h = nn.gelu(h, approximate=False) if i < len(self.widths) or self.last_activation else h
        return h.reshape(h.shape[0], -1)


class ConvDecoder(nn.Module):
    """A linear map with GELU to the encoder's shape, transposed convolutions of stride 2, and a 3 x 3 convolution.

    Attributes:
      shape: of the images.
      widths: the encoder's channels; used in reverse.
      output: a key of :data:`OUTPUTS`.
      dtype: of the computation.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
    """

    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (32, 64)
    output: str = "sigmoid"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, z: Float[Array, "b d"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b h w c"]:
        """``[B, d]`` to ``[B, H, W, C]``, float32.

        Raises:
          ValueError: an unknown output activation.
        """
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {self.output!r}")
        sizes = [encoded_shape(self.shape, self.widths[:i])[:2] for i in range(1, len(self.widths))]
        sizes = [self.shape[:2], *sizes]
        small = encoded_shape(self.shape, self.widths)
        h = nn.Dense(small[0] * small[1] * small[2], dtype=self.dtype, name="embed")(z.astype(self.dtype))
        h = nn.gelu(h, approximate=False).reshape(-1, *small)
        after = [*self.widths[:-1][::-1], self.widths[0]]
        for i, (width, size) in enumerate(zip(after, sizes[::-1], strict=True), start=1):
            h = nn.ConvTranspose(width, (4, 4), (2, 2), use_bias=False, dtype=self.dtype, name=f"conv{i}")(h)
            # an odd size was rounded up on the way down
            h = h[:, : size[0], : size[1]]
            h = BatchNorm(dtype=self.dtype, axis_name=self.axis_name, name=f"norm{i}")(h, train, mask)
            h = nn.gelu(h, approximate=False)
        h = nn.Conv(self.shape[-1], (3, 3), padding=1, dtype=self.dtype, name="out")(h)
        return OUTPUTS[self.output](h.astype(jnp.float32))


class GaussianBottleneck(nn.Module):
    """Two linear maps to a mean and a log-variance, and a draw from that Gaussian.

    Attributes:
      features: z.
      dtype: of the maps.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, h: Float[Array, "b d"], keys: Array | None = None
    ) -> tuple[Float[Array, "b z"], Float[Array, "b z"], Float[Array, "b z"]]:
        """Mean, log-variance and ``z = mean + exp(logvar / 2) eps``; without keys (one per row) z is the mean."""
        mean = nn.Dense(self.features, dtype=self.dtype, name="mean")(h).astype(jnp.float32)
        log_variance = nn.Dense(self.features, dtype=self.dtype, name="log_variance")(h).astype(jnp.float32)
        if keys is None:
            return mean, log_variance, mean
        noise = jax.vmap(lambda key: jax.random.normal(key, (self.features,)))(keys)
        return mean, log_variance, mean + jnp.exp(0.5 * log_variance) * noise


class VariationalDecoder(nn.Module):
    """A Gaussian bottleneck and a decoder behind it.

    Attributes:
      latent: z, the bottleneck's width.
      shape, widths, output, dtype, axis_name: see :class:`ConvDecoder`.
    """

    latent: int
    shape: tuple[int, int, int]
    widths: tuple[int, ...] = (32, 64)
    output: str = "sigmoid"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "b d"],
        train: bool = False,
        mask: Bool[Array, "b"] | None = None,
        keys: Array | None = None,
    ) -> dict[str, Array]:
        """``[B, d]`` to ``reconstruction`` [B, H, W, C], ``mean`` and ``log_variance`` [B, latent]."""
        mean, log_variance, z = GaussianBottleneck(self.latent, self.dtype, name="bottleneck")(h, keys)
        decoder = ConvDecoder(self.shape, self.widths, self.output, self.dtype, self.axis_name, name="decoder")
        return {"reconstruction": decoder(z, train, mask), "mean": mean, "log_variance": log_variance}
