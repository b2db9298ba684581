"""First-in-first-out queues of rows with static shapes: the memory of contrastive methods with a momentum encoder.

A queue is a plain dict, so that it may be a collection of a run's state: ``rows`` (a pytree of arrays ``[size, ...]``),
``filled`` bool ``[size]`` and ``next``, the slot that is overwritten first.  Everything is a function of the global
batch, so every device holds the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree


def init_queue(size: int, like: PyTree) -> dict[str, Any]:
    """An empty queue.

    Args:
      size: rows it keeps, at least 1.
      like: a pytree of arrays (or shapes) ``[b, ...]``; the queue keeps rows of their shapes and types.

    Raises:
      ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a queue keeps at least 1 row, got size {size}")
    return {
        "rows": jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), like),
        "filled": jnp.zeros(size, bool),
        "next": jnp.zeros((), jnp.int32),
    }


def enqueue(queue: Mapping[str, Any], rows: PyTree, mask: Bool[Array, "b"] | None = None) -> dict[str, Any]:
    """The queue after the real rows have joined in order; beyond ``size`` the oldest leave.  No gradient passes.

    Args:
      queue: from :func:`init_queue` or the call before.
      rows: ``[b, ...]`` like the queue's, b at most its size.
      mask: which rows are real; the others take no slot.

    Raises:
      ValueError: more rows than the queue keeps (two would claim one slot).
    """
    size, count = queue["filled"].shape[0], jax.tree.leaves(rows)[0].shape[0]
    if count > size:
        raise ValueError(f"{count} rows do not fit a queue of {size}; make it a multiple of the global batch")
    real = jnp.ones(count, bool) if mask is None else mask
    # real rows take consecutive slots; padded ones point past the end and are dropped
    slots = jnp.where(real, (queue["next"] + jnp.cumsum(real, dtype=jnp.int32) - 1) % size, size)
    put = lambda old, new: old.at[slots].set(jax.lax.stop_gradient(new).astype(old.dtype), mode="drop")  # noqa: E731
    return {
        "rows": jax.tree.map(put, queue["rows"], rows),
        "filled": queue["filled"].at[slots].set(True, mode="drop"),
        "next": (queue["next"] + jnp.sum(real, dtype=jnp.int32)) % size,
    }
