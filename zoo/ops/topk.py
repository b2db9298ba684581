"""Exact top-k in two levels: block maxima first, then only the blocks that can hold a winner.

``lax.top_k`` looks at every entry with the same care.  Of the k largest entries none lies outside the k blocks with the
largest maxima, so one cheap pass of maxima over blocks of w entries leaves ``n / w + k w`` entries to be ranked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

WIDEST = 32
"""Widest block tried: beyond it XLA's CPU reduction no longer vectorises and costs more than it saves."""


def block_width(n: int, k: int) -> int:
    """Entries in a block for the top k of n: the power of two near ``sqrt(n / k)``, at most 32; 0 if blocks do not pay.

    Args:
      n: entries in a row.
      k: how many are wanted, at least 1.
    """
    width = 1
    while width < WIDEST and 4 * width * width * k <= 2 * n:
        width *= 2
    return width if n >= 4096 and 2 * (n // width + k * width) <= n else 0


def top_k(
    x: Shaped[Array, "*b n"], k: int, width: int | None = None
) -> tuple[Shaped[Array, "*b k"], Int[Array, "*b k"]]:
    """The k largest entries of each row and their places, exactly as ``lax.top_k`` gives them, ties included.

    Equal entries come in the order of their places.  Floats are ranked in IEEE's total order, as ``lax.top_k`` does: a
    NaN precedes everything (one with its sign bit set follows everything), and 0 precedes -0.  An entry of ``-inf`` is
    an entry like any other: with fewer than k finite entries the places of ``-inf`` are returned too.

    Args:
      x: numbers of any type; differentiable with respect to floats.
      k: how many, in ``[0, n]``; static.
      width: entries in a block; 0 calls ``lax.top_k``; default :func:`block_width`.

    Raises:
      ValueError: k outside ``[0, n]``, or a negative width.
    """
    n = x.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, {n}], the entries of a row; got {k}")
    width = (block_width(n, k) if k else 0) if width is None else width
    if width < 0:
        raise ValueError(f"width must not be negative, got {width}")
    blocks = n // width if width else 0
    if blocks <= k or k == 0:
        return tuple(jax.lax.top_k(x, k))
    rows = x.reshape(-1, n)
    # contiguous blocks in increasing order keep ties right twice: among blocks here, among candidates below
    head = _ordered(rows[:, : blocks * width]).reshape(-1, blocks, width)
    maxima = _unordered(jnp.max(head, -1), x.dtype)
    chosen = jnp.sort(jax.lax.top_k(jax.lax.stop_gradient(maxima), k)[1], -1)
    places = (chosen[:, :, None] * width + jnp.arange(width)).reshape(-1, k * width)
    rest = jnp.broadcast_to(jnp.arange(blocks * width, n), (rows.shape[0], n - blocks * width))
    places = jnp.concatenate([places, rest], -1)
    values, at = jax.lax.top_k(jnp.take_along_axis(rows, places, -1), k)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), jnp.take_along_axis(places, at, -1).reshape(shape)


def _ordered(x: Array) -> Array:
    # floats as integers in IEEE's total order, so that maxima know NaN and -0 as lax.top_k does
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    kind = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), kind)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(kind).max, bits)


def _unordered(bits: Array, dtype) -> Array:
    if bits.dtype == dtype:
        return bits
    return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits), dtype)
