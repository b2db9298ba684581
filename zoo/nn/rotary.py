"""Rotary position embedding (Su et al., 2021, section 3.4.2) and the two rescalings that longer contexts use."""

from __future__ import annotations

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

SCALINGS = ("default", "linear", "llama3")
"""Supported rescalings of the frequencies."""


def rotary_frequencies(
    dim: int,
    theta: float = 10000.0,
    scaling: str = "default",
    factor: float = 1.0,
    low_frequency: float = 1.0,
    high_frequency: float = 4.0,
    original_positions: int = 8192,
) -> np.ndarray:
    """Angles per position, ``[dim / 2]`` float32: ``theta ** (-2 k / dim)`` (equation 15), rescaled.

    ``linear`` divides every frequency by ``factor`` (Chen et al., 2023).  ``llama3`` (Grattafiori et al., 2024, section
    3.4.1, as released) divides only those that turn fewer than ``low_frequency`` times within ``original_positions``,
    keeps those that turn more than ``high_frequency`` times, and goes linearly from the one to the other between.

    Args:
      dim: entries of a head that are rotated.
      theta: the base.
      scaling: one of :data:`SCALINGS`.
      factor, low_frequency, high_frequency, original_positions: of the rescaling.

    Raises:
      ValueError: an odd ``dim`` or an unknown ``scaling``.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim must be a positive even number (pairs are rotated), got {dim}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {scaling!r}")
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    if scaling == "linear":
        frequencies = frequencies / factor
    elif scaling == "llama3":
        turns = original_positions * frequencies / (2 * np.pi)
        kept = np.clip((turns - low_frequency) / (high_frequency - low_frequency), 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    return frequencies.astype(np.float32)


def rotary_tables(
    positions: Int[Array, "b t"], frequencies: Float[np.ndarray, "k"]
) -> tuple[Float[Array, "b t 1 k"], Float[Array, "b t 1 k"]]:
    """Cosines and sines of ``position * frequency``, float32, with an axis to broadcast over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "b t n d"], cos: Float[Array, "#b t 1 k"], sin: Float[Array, "#b t 1 k"]
) -> Float[Array, "b t n d"]:
    """Rotates the first ``2 k`` entries of each head: entry ``j`` is paired with ``j + k``; the rest is untouched.

    The pairing by halves is that of the released LLaMA weights in hub files (the paper pairs neighbours: the same up to
    a permutation of each head's entries).  The rotation is computed in float32.
    """
    k = cos.shape[-1]
    first, second, rest = x[..., :k].astype(jnp.float32), x[..., k : 2 * k].astype(jnp.float32), x[..., 2 * k :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
