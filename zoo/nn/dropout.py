"""Dropout whose masks depend on each example's own key, so that they do not change with how a batch is sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, " b *dims"], rate: float, keys: Array | None) -> Float[Array, " b *dims"]:
    """Zeroes entries with probability ``rate`` and scales the others by ``1 / (1 - rate)``.

    Two calls with the same keys drop the same entries: that is how two branches of one loss share their masks.

    Args:
      x: activations, one row per example.
      rate: probability of dropping an entry, in [0, 1).
      keys: one key per example, ``[b]`` (from ``Context.example_keys``); ``None`` means evaluation: ``x`` is returned.

    Raises:
      ValueError: ``rate`` outside [0, 1), or a number of keys that is not the number of rows.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate must lie in [0, 1), got {rate}")
    if keys is None or rate == 0.0:
        return x
    if keys.shape[0] != x.shape[0]:
        raise ValueError(f"dropout needs one key per example: got {keys.shape[0]} keys for {x.shape[0]} rows")
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def layer_keys(keys: Array | None, layer: int) -> Array | None:
    """Derives the keys of dropout layer number ``layer`` from each example's key; ``None`` stays ``None``."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
