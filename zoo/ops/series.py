"""Augmentations of one series ``[T, C]`` (time, channels) as pure functions of a key, with static shapes.

Each takes ``(key, x)`` first and acts on one example: ``jax.vmap`` them over ``Context.example_keys``.  Defaults are
those of the dbpm brief, section Definition.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]


def ts_scale(
    key: PRNGKey, x: Float[Array, "t c"], sigma: float = 1.1, scale_axis: Literal["time", "channel"] = "time"
) -> Float[Array, "t c"]:
    """Multiplies by factors drawn from N(1, sigma^2).

    Args:
      key: a key.
      x: one series.
      sigma: standard deviation of the factors, 0 or more.
      scale_axis: ``"time"`` draws one factor per time step, shared by the channels (what dbpm's released code does);
        ``"channel"`` one per channel, shared by the steps (what the literature calls scaling).

    Raises:
      ValueError: an unknown ``scale_axis`` or a negative ``sigma``.
    """
    _check_sigma(sigma)
    if scale_axis not in ("time", "channel"):
        raise ValueError(f"scale_axis must be 'time' or 'channel', got {scale_axis!r}")
    shape = (x.shape[0], 1) if scale_axis == "time" else (1, x.shape[1])
    return x * (1 + sigma * jax.random.normal(key, shape, x.dtype))


def ts_jitter(key: PRNGKey, x: Float[Array, "t c"], sigma: float = 0.8) -> Float[Array, "t c"]:
    """Adds independent noise from N(0, sigma^2) to every entry.

    Args:
      key: a key.
      x: one series.
      sigma: standard deviation in the units of ``x``, 0 or more.

    Raises:
      ValueError: a negative ``sigma``.
    """
    _check_sigma(sigma)
    return x + sigma * jax.random.normal(key, x.shape, x.dtype)


def permuted_steps(key: PRNGKey, steps: int, max_segments: int = 8) -> Int[Array, "t"]:
    """The order of time steps after cutting a series into segments and shuffling these.

    The number of segments is uniform in {2, ..., max_segments}; cut points are drawn without replacement from
    {0, ..., T-3}, a cut at ``p`` starting a segment at ``p`` (a cut at 0 leaves the first one empty).

    Args:
      key: a key.
      steps: T.
      max_segments: most segments, 2 to T-1.

    Returns:
      i32 ``[T]``, a permutation of the steps.

    Raises:
      ValueError: ``max_segments`` out of range.
    """
    if not 2 <= max_segments <= steps - 1:
        raise ValueError(f"max_segments must lie in 2..{steps - 1} for a series of {steps} steps, got {max_segments}")
    number_key, cut_key, order_key = jax.random.split(key, 3)
    segments = jax.random.randint(number_key, (), 2, max_segments + 1)
    # a random ranking of the candidates: the first segments-1 of it are the cuts
    rank = jax.random.permutation(cut_key, steps - 2)
    cuts = jnp.pad((rank < segments - 1).astype(jnp.int32), (0, 2))
    segment = jnp.cumsum(cuts)
    place = jax.random.permutation(order_key, max_segments)[segment]
    return jnp.argsort(place, stable=True).astype(jnp.int32)


def ts_permute(key: PRNGKey, x: Float[Array, "t c"], max_segments: int = 8) -> Float[Array, "t c"]:
    """Cuts a series into 2 to ``max_segments`` segments and shuffles them, all channels alike.

    See :func:`permuted_steps`.

    Raises:
      ValueError: ``max_segments`` out of range.
    """
    return x[permuted_steps(key, x.shape[0], max_segments)]


def _check_sigma(sigma: float) -> None:
    if sigma < 0:
        raise ValueError(f"sigma must be 0 or more, got {sigma}")
