"""Multipliers: projected ascent by hand, the Lagrangian's gradient, and a small constrained problem solved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.optim.dual import dual_ascent, dual_init, lagrangian


def test_constant_slack_gives_a_line_that_stops_at_zero():
    state = dual_init([0.0, 0.5, 0.0])
    slack = jnp.array([2.0, -1.0, -3.0])
    for t in range(1, 8):
        state = dual_ascent(state, slack, 0.1)
        np.testing.assert_allclose(state.duals, [0.2 * t, max(0.0, 0.5 - 0.1 * t), 0.0], atol=1e-6)
        np.testing.assert_array_equal(state.rising, [t, 0, 0])
    assert float(state.duals.min()) == 0.0
    state = dual_ascent(state, jnp.array([0.0, 4.0, 0.0]), 0.1)  # one that stands still has stopped rising
    np.testing.assert_array_equal(state.rising, [0, 1, 0])


def test_rate_zero_keeps_the_multipliers():
    state = dual_ascent(dual_init([0.7]), jnp.array([5.0]), 0.0)
    assert float(state.duals[0]) == np.float32(0.7) and int(state.rising[0]) == 0


def test_the_lagrangian_and_its_gradients():
    args = jnp.array(1.0), jnp.array([3.0, 5.0]), jnp.array([0.5, 2.0]), jnp.array([1.0, 6.0])
    assert float(lagrangian(*args)) == 1.0 + 0.5 * 2.0 - 2.0 * 1.0
    grads = jax.grad(lagrangian, (0, 1, 2))(*args)
    assert float(grads[0]) == 1
    np.testing.assert_allclose(grads[1], [0.5, 2.0])
    np.testing.assert_allclose(grads[2], 0.0)  # the primal step does not see the multipliers
    moved = jax.grad(lambda s: dual_ascent(dual_init([1.0]), s, 0.1).duals[0])(jnp.array([1.0]))
    assert float(moved[0]) == 0


def test_it_solves_a_constrained_problem():
    """min (x - 3)^2 subject to x <= 1: the multiplier is 4."""

    def step(carry, _):
        x, state = carry
        value = lambda x: lagrangian((x - 3) ** 2, x[None], state.duals, jnp.ones(1))  # noqa: E731
        x = x - 0.05 * jax.grad(value)(x)
        return (x, dual_ascent(state, x[None] - 1.0, 0.1)), None

    (x, state), _ = jax.lax.scan(step, (jnp.array(0.0), dual_init([0.0])), None, length=600)
    np.testing.assert_allclose([x, state.duals[0]], [1.0, 4.0], atol=1e-2)


@pytest.mark.parametrize("bad", [[], [-0.1], [0.0, float("nan")]])
def test_multipliers_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="at least 0"):
        dual_init(bad)
