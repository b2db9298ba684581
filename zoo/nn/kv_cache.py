"""Keys and values of tokens already seen, and positions and masks that count real tokens only."""

from __future__ import annotations

from typing import Any

from flax import struct
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Int


@struct.dataclass
class KeyValueCache:
    """Keys and values of the tokens so far; every shape is static, so that a loop can carry it.

    Attributes:
      key, value: ``[layers, B, length, kv_heads, head_dim]``.
      mask: ``[B, length]``: slots that hold real tokens.
      index: how many slots are filled.
    """

    key: Any
    value: Any
    mask: Any
    index: Any


def place(
    padding_mask: Bool[Array, "b t"] | None, batch: int, length: int, cache: KeyValueCache | None, window: int | None
) -> tuple[Int[Array, "#b t"], Bool[Array, "b 1 t s"] | None, KeyValueCache | None]:
    """Where a call's tokens stand and what each may look at.

    Args:
      padding_mask: True at the call's real tokens; ``None``: all.
      batch, length: of the call.
      cache: of the tokens before them, or ``None``.
      window: how many real tokens back each may look, itself included; ``None``: all.

    Returns:
      positions (how many real tokens stand before each), the mask of scores (``None``: causal, nothing hidden), and the
      cache with ``mask`` and ``index`` advanced; a cache that is too short ends with ``index`` beyond its length.
    """
    if cache is None and padding_mask is None:
        return jnp.arange(length)[None], None, None
    real = jnp.ones((batch, length), bool) if padding_mask is None else padding_mask
    index, seen = 0, jnp.zeros((batch, 1), jnp.int32)
    slots = real
    if cache is not None:
        index, seen = cache.index, jnp.sum(cache.mask, axis=1, keepdims=True, dtype=jnp.int32)
        slots = lax.dynamic_update_slice_in_dim(cache.mask, real, index, axis=1)
        cache = cache.replace(mask=slots, index=index + length)
    positions = jnp.maximum(seen + ranks(real), 0)
    mask = slots[:, None, :] & (jnp.arange(slots.shape[1]) <= (index + jnp.arange(length))[:, None])
    if window is not None:
        mask &= positions[:, :, None] - ranks(slots)[:, None, :] < window
    return positions, mask[:, None], cache


def ranks(real: Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """How many real tokens stand before each."""
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
