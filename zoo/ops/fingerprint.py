"""Checksums of trees of arrays that can be computed under ``jit`` and kept beside what was made with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt


def fingerprint(tree: PyTree) -> UInt[Array, "2"]:
    """A checksum (uint32 ``[2]``) of every number of a tree, its place, its type and the arrays' shapes, in tree order.

    The same on every device and under ``jit``; sums of mixed words, so the order of computation does not matter.
    """
    total = jnp.zeros(2, jnp.uint32)
    for x in map(jnp.asarray, jax.tree.leaves(tree)):
        words = _words(x.ravel())
        place = jnp.arange(words.size, dtype=jnp.uint32)
        mixed = _mix(words + _mix(place))
        for size in (*x.shape, x.ndim, sum(map(ord, x.dtype.name))):
            total = _mix(total + jnp.uint32(size) + jnp.array([1, 0x9E3779B9], jnp.uint32))
        sums = jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(_mix(mixed + 1), dtype=jnp.uint32)])
        total = _mix(total + sums)
    return total


def check_same_fit(index: PyTree, queries: PyTree, what: str) -> None:
    """Refuses two halves of one search that come from different fits; on the host.

    Args:
      index: the fingerprint (uint32 ``[2]``) that the index keeps of what it was made with.
      queries: the fingerprint of what the queries are made with.
      what: the thing that differs, as the message names it (``"FDEParams"``).

    Raises:
      ValueError: the fingerprints differ; both are named.
    """
    was, now = np.asarray(index), np.asarray(queries)
    if not np.array_equal(was, now):
        name = lambda x: "".join(f"{int(v):08x}" for v in x)  # noqa: E731
        raise ValueError(
            f"queries and documents are encoded with different {what} (index {name(was)}, queries {name(now)}); "
            "encode both with the params the index was built with"
        )


def _words(flat: Array) -> Array:
    if flat.dtype == bool or flat.dtype.itemsize < 4 and jnp.issubdtype(flat.dtype, jnp.integer):
        return flat.astype(jnp.uint32)
    if flat.dtype.itemsize < 4:
        return flat.astype(jnp.float32).view(jnp.uint32)
    return jax.lax.bitcast_convert_type(flat, jnp.uint32).ravel()


def _mix(x: Array) -> Array:
    # a bijection of 32-bit words whose every output bit depends on every input bit (murmur3's finaliser)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
