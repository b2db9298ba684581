"""A function of many rows, applied to a block of them at a time so that its memory is bounded."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def in_blocks(function: Callable[[PyTree], PyTree], rows: PyTree, block: int) -> PyTree:
    """``function(rows)``, computed ``block`` rows at a time (one compiled body, whatever the number of rows).

    The last block ends with the last row; rows it shares with the one before are computed twice, never padded.

    Args:
      function: of arrays with leading axis ``block``, to arrays with that leading axis; row i of its results may depend
        on row i only.
      rows: arrays with leading axis n, at least 1.
      block: rows at a time.

    Raises:
      ValueError: a block smaller than 1.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    n = jax.tree.leaves(rows)[0].shape[0]
    if n <= block:
        return function(rows)
    take = lambda start: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), rows)  # noqa: E731
    shapes = jax.eval_shape(lambda start: function(take(start)), jnp.int32(0))
    blank = jax.tree.map(lambda s: jnp.zeros((n, *s.shape[1:]), s.dtype), shapes)

    def step(done, number):
        start = jnp.minimum(number * block, n - block)
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)  # noqa: E731
        return jax.tree.map(put, done, function(take(start))), None

    return jax.lax.scan(step, blank, jnp.arange(-(-n // block), dtype=jnp.int32))[0]
