"""Second moments of rows, and the directions in which they vary most."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def second_moment(
    acc: Float[Array, "D D"], batch: Float[Array, "b D"], mask: Bool[Array, "b"] | None = None
) -> Float[Array, "D D"]:
    """``acc + batch^T batch`` over the real rows: a moment of more data than memory holds; sums over devices by psum.

    Args:
      acc: the moment so far, zeros at first; its type is the type of the sums (float64 under ``jax.enable_x64``).
      batch: rows, not centred.
      mask: real rows; all by default.
    """
    batch = batch.astype(acc.dtype)
    batch = batch if mask is None else jnp.where(mask[:, None], batch, 0)
    return acc + jnp.matmul(batch.T, batch, precision="highest")


def moment(rows: Float[Array, "n D"], block: int = 4096) -> Float[Array, "D D"]:
    """The whole second moment of rows at hand, ``block`` of them at a time."""
    n, dimension = rows.shape
    block = min(block, n)

    def step(acc, number):
        start = jnp.minimum(number * block, n - block)
        part = jax.lax.dynamic_slice_in_dim(rows, start, block)
        return second_moment(acc, part, start + jnp.arange(block) >= number * block), None

    kind = jnp.promote_types(rows.dtype, jnp.float32)
    return jax.lax.scan(step, jnp.zeros((dimension, dimension), kind), jnp.arange(-(-n // block)))[0]


def unit_trace(k: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """A moment scaled to trace 1, so that float32 keeps its products; all zeros stays so."""
    trace = jnp.trace(k)
    return k / jnp.where(trace > 0, trace, 1)


def leading_directions(k: Float[Array, "D D"], d: int) -> Float[Array, "D d"]:
    """The d eigenvectors of largest eigenvalues, in falling order; each one's largest entry is positive.

    Raises:
      ValueError: d out of range.
    """
    check_dim(d, k.shape[0])
    _, vectors = jnp.linalg.eigh(unit_trace(k))
    found = vectors[:, ::-1][:, :d]
    largest = jnp.take_along_axis(found, jnp.argmax(jnp.abs(found), 0)[None], 0)
    return found * jnp.where(largest < 0, -1, 1)


def check_dim(d: int, dimension: int) -> None:
    """Raises ValueError unless ``1 <= d <= dimension``."""
    if not 1 <= d <= dimension:
        raise ValueError(f"d must be in [1, {dimension}], the dimension of a vector; got {d}")
