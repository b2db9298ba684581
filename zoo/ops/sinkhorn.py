"""Sinkhorn's algorithm in log space: a matrix whose rows and columns are normalised in turn."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinkhorn_normalize(logits: Float[Array, "n m"], steps: int = 10) -> Float[Array, "n m"]:
    """``exp(logits)`` with its rows and then its columns normalised to equal sums, ``steps`` times, in log space.

    Each step makes every row sum to ``1 / n`` and then every column to ``1 / m``: a transport plan between uniform
    weights whose columns are exact and whose rows become so (Cuturi, NeurIPS 2013).

    Args:
      logits: similarities over a temperature.
      steps: at least 0 (which only makes all entries sum to 1).

    Returns:
      The plan's logarithm, f32.
    """
    logits = logits.astype(jnp.float32)
    if steps == 0:
        return logits - jax.nn.logsumexp(logits)
    n, m = logits.shape

    def step(columns, _):
        rows = jax.nn.logsumexp(logits - columns, 1)
        return jax.nn.logsumexp(logits - rows[:, None], 0), rows

    columns, rows = jax.lax.scan(step, jnp.zeros(m), None, length=steps)
    return logits - rows[-1][:, None] - columns - jnp.log(jnp.float32(m))


def streaming_logsumexp(
    rows: Callable[[Array], Array], count: int, width: int, chunk: int, mask: Array | None = None
) -> tuple[Float[Array, "m"], Float[Array, "m"]]:
    """Log-sum-exp over the rows of a matrix that is computed a chunk of rows at a time.

    Args:
      rows: ``start -> [size, width]``, rows ``start .. start + size - 1``, ``size = min(chunk, count)``; ``start`` is
        traced.
      count, width: rows and columns of the whole matrix.
      chunk: rows at a time; memory is O(chunk x width).
      mask: bool ``[count]``, rows that count; all by default.

    Returns:
      Per column the largest entry and ``sum exp(entry - largest)``, so that shards can be joined; their log-sum-exp is
      ``largest + log(sum)``, ``-inf`` if no row counts.

    Raises:
      ValueError: a chunk smaller than 1, or no row.
    """
    if chunk < 1 or count < 1:
        raise ValueError(f"need at least one row and a chunk of at least 1; got {count} rows, chunk {chunk}")
    size = min(chunk, count)

    def step(carry, number):
        largest, total = carry
        # the last chunk ends with the last row; what it shares with the one before is masked, never copied
        start = jnp.minimum(number * size, count - size)
        valid = start + jnp.arange(size, dtype=jnp.int32) >= number * size
        if mask is not None:
            valid &= jax.lax.dynamic_slice_in_dim(mask, start, size)
        x = jnp.where(valid[:, None], rows(start).astype(jnp.float32), -jnp.inf)
        new = jax.lax.stop_gradient(jnp.maximum(largest, jnp.max(x, 0)))
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        return (new, total * jnp.exp(largest - shift) + jnp.sum(jnp.exp(x - shift), 0)), None

    start = (jnp.full(width, -jnp.inf), jnp.zeros(width))
    return jax.lax.scan(step, start, jnp.arange(-(-count // size), dtype=jnp.int32))[0]


def sinkhorn_columns(
    rows: Callable[[Array], Array], count: int, width: int, steps: int, chunk: int
) -> Float[Array, "m"]:
    """The column normalisers of Sinkhorn on a matrix that is computed a chunk of rows at a time, up to a constant.

    Each step is one pass: every row is normalised over the columns as they stand, then every column over the rows.

    Args:
      rows, count, width, chunk: as in :func:`streaming_logsumexp`.
      steps: at least 1; after them column j of ``exp(logits - row normalisers - columns)`` sums to 1.
    """

    def step(columns, _):
        def normalised(start):
            x = rows(start)
            return x - jax.nn.logsumexp(x - columns, 1, keepdims=True)

        largest, total = streaming_logsumexp(normalised, count, width, chunk)
        return largest + jnp.log(total), None

    return jax.lax.scan(step, jnp.zeros(width), None, length=steps)[0]
