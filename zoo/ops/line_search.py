"""The least value of a function of one number on an interval, with a fixed number of evaluations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GOLDEN = (5**0.5 - 1) / 2


def grid_then_golden(
    function: Callable[[Array], Array], low: float, high: float, points: int, sections: int, dtype=jnp.float32
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A grid over ``[low, high]``, then golden sections of the bracket around its best point.

    The grid finds the right valley of a function with several, golden sections its bottom: each keeps 0.618 of the
    bracket for one evaluation.  What is returned is the best point ever evaluated.

    Args:
      function: pure, of a scalar to a scalar; traced twice (``lax.map``, ``lax.scan``).
      low, high: ends of the interval, both on the grid.
      points: of the grid, at least 2.
      sections: golden sections, after the two evaluations that open the bracket; 0 evaluates the grid alone.

    Returns:
      The point and its value.

    Raises:
      ValueError: fewer than 2 points, or a negative number of sections.
    """
    if points < 2 or sections < 0:
        raise ValueError(f"points must be at least 2 and sections at least 0; got {points} and {sections}")
    grid = jnp.linspace(low, high, points, dtype=dtype)
    values = jax.lax.map(function, grid)
    at = jnp.argmin(values)
    best = grid[at], values[at]
    if sections == 0:
        return best
    a, b = grid[jnp.maximum(at - 1, 0)], grid[jnp.minimum(at + 1, points - 1)]

    def better(best, x, value):
        closer = value < best[1]
        return jnp.where(closer, x, best[0]), jnp.where(closer, value, best[1])

    inner = jnp.stack([b - GOLDEN * (b - a), a + GOLDEN * (b - a)])
    known = jax.lax.map(function, inner)
    for i in range(2):
        best = better(best, inner[i], known[i])

    def section(state, _):
        a, b, (left, right), (f_left, f_right), best = state
        down = f_left < f_right
        a, b = jnp.where(down, a, left), jnp.where(down, right, b)
        new = jnp.where(down, b - GOLDEN * (b - a), a + GOLDEN * (b - a))
        value = function(new)
        inner = jnp.where(down, new, right), jnp.where(down, left, new)
        known = jnp.where(down, value, f_right), jnp.where(down, f_left, value)
        return (a, b, inner, known, better(best, new, value)), None

    state = (a, b, (inner[0], inner[1]), (known[0], known[1]), best)
    return jax.lax.scan(section, state, None, length=sections)[0][4]
