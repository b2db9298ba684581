"""Normalisation whose batch statistics ignore padding and do not change with how a batch is sharded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with a row mask and global statistics under ``pmap``.

    Flax's own averages the devices' means, which is wrong when shards hold different numbers of real rows (and NaN for
    a shard of padding); here sums and counts are added over the devices.  Statistics are float32.

    Attributes:
      momentum: of the running statistics, ``running = momentum * running + (1 - momentum) * batch``.
      epsilon: added to the variance.
      unbiased: whether the running variance takes the batch's unbiased one (n - 1), as torch does; the batch itself is
        normalised by the biased one either way.
      dtype: of the result.
      axis_name: the mapped axis to add over; ``None`` outside ``pmap``.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    unbiased: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *dims c"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b *dims c"]:
        """Normalises ``x [B, ..., C]``, in training by the batch's statistics, else by the running ones.

        Args:
          x: activations.
          train: whether to use and record the batch's statistics.
          mask: which rows count in the statistics; ``None`` for all.
        """
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        if train:
            mean, var, count = self._moments(x, mask)
            if not self.is_initializing():
                kept = var * count / jnp.maximum(count - 1, 1) if self.unbiased else var
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * kept
        else:
            mean, var = running_mean.value, running_var.value
        return ((x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias).astype(self.dtype)

    def _moments(self, x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        axes = tuple(range(x.ndim - 1))
        rows = jnp.ones(x.shape[0], bool) if mask is None else mask
        rows = rows.reshape(-1, *[1] * (x.ndim - 1))
        places = x.size // (x.shape[0] * x.shape[-1])
        add = (lambda v: jax.lax.psum(v, self.axis_name)) if self.axis_name else (lambda v: v)
        count = jnp.maximum(add(jnp.sum(rows) * places), 1).astype(jnp.float32)
        mean = add(jnp.sum(jnp.where(rows, x, 0.0), axes)) / count
        var = add(jnp.sum(jnp.where(rows, x - mean, 0.0) ** 2, axes)) / count
        return mean, var, count
