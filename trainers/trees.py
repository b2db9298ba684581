"""Trees of arrays: as flat ``{path: leaf}`` for checkpoints and messages, on the host, edited together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as ``{path: leaf}``, in the tree's order; what a checkpoint stores."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(k) for k in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """Undoes :func:`flatten`, given a tree of the same structure."""
    paths = list(flatten(like))
    return jax.tree.unflatten(jax.tree.structure(like), [flat[p] for p in paths])


def nest(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The nested dict below ``prefix`` of a flat tree of dicts."""
    chosen = {p[len(prefix) + 1 :]: v for p, v in flat.items() if p.startswith(prefix + "/")}
    return traverse_util.unflatten_dict(chosen, sep="/")


def _part(key) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def edit_optimizer(optimizer_state: Any, params: Mapping, edit: Callable[[Any], Any]) -> Any:
    """Applies an edit of the parameter tree to every part of an optimiser's state shaped like the parameters.

    Args:
      optimizer_state: e.g. Adam's, with its two moments.
      params: the tree before the edit, to recognise those parts.
      edit: ``params-like tree -> edited tree``.
    """
    wanted = jax.tree.structure(params)
    shaped = lambda x: jax.tree.structure(x) == wanted  # noqa: E731
    return jax.tree.map(lambda x: edit(x) if shaped(x) else x, optimizer_state, is_leaf=shaped)


def to_host(tree: Any) -> Any:
    """Arrays as NumPy, fetched explicitly (typed keys as their data), whole even if other processes hold parts."""

    def fetch(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if getattr(x, "is_fully_addressable", True):
            return np.asarray(jax.device_get(x))
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)
