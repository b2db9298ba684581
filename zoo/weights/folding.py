"""Linear maps folded into the layers before them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def fold_into_dense(
    kernel: Float[Array, "i D"],
    bias: Float[Array, "D"] | None,
    matrix: Float[Array, "D d"],
    mean: Any = None,
) -> tuple[Float[Array, "i d"], Float[Array, "d"]]:
    """A dense layer followed by a map, as one dense layer: ``(x W + b - mean) M = x (W M) + (b - mean) M``.

    LeanVec's maps shorten a dual encoder's vectors for nothing: fold ``maps.query`` into the query tower's last layer,
    and ``maps.data`` with ``maps.mean`` into the document tower's.

    Args:
      kernel, bias: the layer's W and b; no bias is zeros.
      matrix: M.
      mean: f32 ``[D]``, taken off before the map; nothing by default.

    Returns:
      The new kernel and bias.
    """
    shift = jnp.zeros(kernel.shape[1]) if bias is None else bias
    shift = shift if mean is None else shift - mean
    return jnp.matmul(kernel, matrix, precision="highest"), jnp.matmul(shift, matrix, precision="highest")
