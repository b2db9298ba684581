"""Independent Metropolis-Hastings over states whose densities are known beforehand: indices move, states do not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Chain:
    """Where chains end.

    Attributes:
      index: i32 ``[...]``, the proposal each chain ends at.
      accepted: bool ``[n - 1, ...]``, which moves were made.
    """

    index: Any
    accepted: Any


def acceptance(
    proposed: Float[Array, "*dims"], current: Float[Array, "*dims"], zero: str = "accept"
) -> Float[Array, "*dims"]:
    """The probability of moving, ``min(1, proposed / current)``; proposals are uniform, so they cancel.

    Densities need not be normalised.  One that is negative or not a number counts as 0.

    Args:
      proposed, current: unnormalised densities.
      zero: what happens at a current density of 0: ``"accept"`` always leaves it; ``"reject"`` leaves it only for a
        positive density (0 / 0 and anything over a NaN stay), as released code that divides does.

    Raises:
      ValueError: an unknown ``zero``.
    """
    if zero not in ("accept", "reject"):
        raise ValueError(f"zero must be 'accept' or 'reject', got {zero!r}")
    if zero == "reject":
        ratio = proposed / current
        return jnp.clip(jnp.where(jnp.isnan(ratio), 0.0, ratio), 0.0, 1.0)
    proposed, current = (jnp.where(v > 0, v, 0.0) for v in (proposed, current))
    ratio = jnp.where(current > 0, proposed / jnp.where(current > 0, current, 1.0), 1.0)
    return jnp.minimum(jnp.where(jnp.isnan(ratio), 0.0, ratio), 1.0)


def metropolis_hastings(
    density: Float[Array, "n *dims"], uniforms: Float[Array, "moves *dims"], zero: str = "accept"
) -> Chain:
    """Runs chains of ``n - 1`` moves through ``n`` proposals; state 0 is where each begins.

    Args:
      density: ``[n, ...]``, the target's unnormalised density at each proposal, one chain per trailing index.  With
        proposals drawn uniformly, the chain's law tends to the target as n grows.
      uniforms: ``[n - 1, ...]`` in [0, 1): a move is made where its uniform is below its acceptance.
      zero: see :func:`acceptance`.

    Returns:
      Where each chain ends, and which moves it made.

    Raises:
      ValueError: no proposals, or another number of uniforms than moves.
    """
    n = density.shape[0]
    if n < 1:
        raise ValueError("metropolis_hastings needs at least one proposal")
    if uniforms.shape != (n - 1, *density.shape[1:]):
        raise ValueError(f"uniforms must have shape {(n - 1, *density.shape[1:])}, got {uniforms.shape}")

    def move(state, proposal):
        index, current = state
        number, proposed, uniform = proposal
        accepted = uniform < acceptance(proposed, current, zero)
        return (jnp.where(accepted, number, index), jnp.where(accepted, proposed, current)), accepted

    start = (jnp.zeros(density.shape[1:], jnp.int32), density[0])
    (index, _), accepted = jax.lax.scan(move, start, (jnp.arange(1, n, dtype=jnp.int32), density[1:], uniforms))
    return Chain(index, accepted)
