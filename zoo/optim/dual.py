"""Constrained learning by duality: multipliers that rise while a constraint is violated and fall to 0 when it is slack.

For ``min l(theta)`` subject to ``c_i(theta) <= epsilon_i`` the Lagrangian is ``l + sum_i gamma_i (c_i - epsilon_i)``;
parameters descend on it and the multipliers ascend, projected to ``gamma_i >= 0``, both in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class DualState:
    """The multipliers of k constraints.

    Attributes:
      duals: f32 ``[k]``, never negative.
      rising: i32 ``[k]``, for how many steps in a row each has risen: many epochs' worth mean that its constraint
        cannot be met.
    """

    duals: Any
    rising: Any


def dual_init(duals: Sequence[float]) -> DualState:
    """Multipliers to begin with, one per constraint.

    Raises:
      ValueError: none, or one that is negative.
    """
    if not len(duals) or not all(d >= 0 for d in duals):
        raise ValueError(f"multipliers must be one or more numbers of at least 0, got {list(duals)}")
    return DualState(jnp.asarray(duals, jnp.float32), jnp.zeros(len(duals), jnp.int32))


def dual_ascent(state: DualState, slack: Float[Array, "k"], rate: int | float) -> DualState:
    """One step of projected ascent: ``gamma <- max(0, gamma + rate * slack)``.

    Args:
      state: before.
      slack: ``c - epsilon`` over the whole global batch; positive where a constraint is violated.  No gradient flows.
      rate: step size of the multipliers; 0 keeps them (a penalty method).
    """
    slack = jax.lax.stop_gradient(slack).astype(jnp.float32)
    duals = jnp.maximum(state.duals + rate * slack, 0.0)
    return DualState(duals, jnp.where(duals > state.duals, state.rising + 1, 0))


def lagrangian(
    primal: Float[Array, ""],
    constraints: Float[Array, "k"],
    duals: Float[Array, "k"],
    epsilon: Float[Array, "k"],
) -> Float[Array, ""]:
    """``primal + sum_i duals_i (constraints_i - epsilon_i)``, to be minimised; no gradient reaches the multipliers."""
    return primal + jnp.sum(jax.lax.stop_gradient(duals) * (constraints - epsilon))
