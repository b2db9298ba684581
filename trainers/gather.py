"""The global batch under ``pmap``: rows numbered, outputs gathered, shares taken.  Without an axis, nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from zoo.base import Shared, batch_rows

ALWAYS_GATHERED = ("index", "mask", "row")


def is_batch(tree: Any) -> bool:
    """Whether a tree is one batch, rather than several by stream name."""
    return isinstance(tree, Mapping) and not any(isinstance(v, Mapping) for v in tree.values())


def with_rows(batch, axis_name):
    """Adds ``row``, the global row of each example: what per-example randomness is derived from."""
    if not is_batch(batch):
        return {k: with_rows(v, axis_name) for k, v in batch.items()}
    rows = jnp.arange(batch_rows(batch), dtype=jnp.int32)
    if axis_name is not None:
        rows = rows + jax.lax.axis_index(axis_name) * batch_rows(batch)
    return {**batch, "row": rows}


def fields(batch, wanted: tuple[str, ...] | None):
    """The fields that a loss reads (``None``: all), and always those that say which rows are which."""
    if not is_batch(batch):
        return {k: fields(v, wanted) for k, v in batch.items()}
    return {k: v for k, v in batch.items() if wanted is None or k in wanted or k in ALWAYS_GATHERED}


def gather(tree, axis_name):
    """Every leaf along the whole global batch, in global order; scalars and :class:`Shared` values as they are."""
    if axis_name is None:
        return tree

    def gather(x):
        if isinstance(x, Shared) or jnp.ndim(x) == 0:
            return x
        return jax.lax.all_gather(x, axis_name, axis=0, tiled=True)

    return jax.tree.map(gather, tree, is_leaf=lambda x: isinstance(x, Shared))


def share(tree, axis_name):
    """This device's slice of a global batch; undoes :func:`gather`."""
    if axis_name is None:
        return tree
    devices, rank = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, rank * (x.shape[0] // devices), x.shape[0] // devices)  # noqa: E731
    return jax.tree.map(take, tree)
