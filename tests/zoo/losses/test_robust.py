"""Pseudo-Huber and l2: definition, limits, gradients, precision, bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses.robust import huber_constant, l2, pseudo_huber

RNG = np.random.default_rng(0)
FIRST = RNG.standard_normal((5, 4, 3, 2)).astype(np.float32)
SIZES = np.array([1e-4, 1e-2, 0.1, 1.0, 10.0]).reshape(-1, 1, 1, 1)
SECOND = (FIRST + RNG.standard_normal(FIRST.shape) * SIZES).astype(np.float32)
U, V = jnp.asarray(FIRST), jnp.asarray(SECOND)
RESIDUAL = FIRST.astype(np.float64) - SECOND
GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ict_reference.npz")


def by_hand(u, v, c, reduction):
    """The definition, one example and one entry at a time, in float64."""
    out = []
    for a, b in zip(np.asarray(u, np.float64), np.asarray(v, np.float64), strict=True):
        squares = [(x - y) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)]
        if reduction == "vector":
            out.append(np.sqrt(sum(squares) + c**2) - c)
        else:
            out.append(sum(np.sqrt(s + c**2) - c for s in squares) / len(squares))
    return np.array(out)


@pytest.mark.parametrize("reduction", ["vector", "elementwise"])
@pytest.mark.parametrize("c", [0.003, 0.5, 20.0])
def test_pseudo_huber_is_its_definition(reduction, c):
    found = jax.jit(pseudo_huber, static_argnames=("reduction",))(U, V, jnp.float32(c), reduction=reduction)
    np.testing.assert_allclose(found, by_hand(U, V, c, reduction), rtol=1e-5)
    assert found.shape == (5,)
    assert found.dtype == jnp.float32


def test_default_constant_is_the_papers():
    assert huber_constant(32 * 32 * 3) == pytest.approx(0.03, rel=0.01)
    assert huber_constant(64 * 64 * 3) == pytest.approx(0.06, rel=0.01)
    np.testing.assert_allclose(pseudo_huber(U, V), by_hand(U, V, 0.00054 * np.sqrt(24), "vector"), rtol=1e-5)


def test_elementwise_agrees_with_the_reimplementation():
    found = pseudo_huber(jnp.asarray(GOLDEN["u"]), jnp.asarray(GOLDEN["v"]), reduction="elementwise")
    # theirs subtracts nearly equal numbers: compare absolutely
    np.testing.assert_allclose(found, GOLDEN["huber_elementwise"], rtol=1e-5, atol=1e-6)


def test_default_reduction_is_the_whole_example_and_differs_from_elementwise():
    np.testing.assert_allclose(pseudo_huber(U, V, 0.1), pseudo_huber(U, V, 0.1, reduction="vector"))
    assert not np.allclose(pseudo_huber(U, V, 0.1), pseudo_huber(U, V, 0.1, reduction="elementwise"), rtol=0.1)


def test_axis_says_what_one_example_is():
    np.testing.assert_allclose(pseudo_huber(U, V, 0.1, axis=(1, 2, 3)), pseudo_huber(U, V, 0.1), rtol=1e-6)
    found = pseudo_huber(U, V, 0.1, axis=-1)
    assert found.shape == (5, 4, 3)
    expected = np.sqrt((RESIDUAL**2).sum(-1) + 0.01) - 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    # the default constant follows the axis
    np.testing.assert_allclose(pseudo_huber(U, V, axis=-1), pseudo_huber(U, V, huber_constant(2), axis=-1), rtol=1e-6)


def test_limits_are_the_norm_and_the_scaled_square():
    norm = np.sqrt((RESIDUAL**2).sum((1, 2, 3)))
    np.testing.assert_allclose(pseudo_huber(U, V, 1e-9), norm, rtol=1e-5)
    np.testing.assert_allclose(pseudo_huber(U, V, 1e4) * 2e4, norm**2, rtol=1e-4)


def test_gradient_is_the_residual_over_the_soft_norm_and_shorter_than_one():
    c = 0.05
    grads = jax.grad(lambda u: jnp.sum(pseudo_huber(u, V, c)))(U)
    r = RESIDUAL
    length = np.sqrt((r**2).sum((1, 2, 3), keepdims=True) + c**2)
    np.testing.assert_allclose(grads, r / length, rtol=1e-4, atol=1e-7)
    assert np.all(np.sqrt(np.sum(np.square(grads), axis=(1, 2, 3))) < 1)


@pytest.mark.parametrize("reduction", ["vector", "elementwise"])
def test_no_residual_costs_nothing_and_has_a_finite_gradient(reduction):
    value, grads = jax.value_and_grad(lambda u: jnp.sum(pseudo_huber(u, U, reduction=reduction)))(U)
    assert value == 0
    assert np.all(np.asarray(grads) == 0)


def test_tiny_residuals_keep_their_digits():
    c, r = 1.0, 1e-5
    found = float(pseudo_huber(jnp.full((1, 1), r), jnp.zeros((1, 1)), c)[0])
    # sqrt(r^2 + c^2) - c is exactly 0 in float32
    assert found == pytest.approx(r * r / 2, rel=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    u, v = jnp.ones((2, 4096), jnp.bfloat16) * 0.1, jnp.zeros((2, 4096), jnp.bfloat16)
    found = l2(u, v)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 4096 * float(u[0, 0]) ** 2, rtol=1e-4)
    assert pseudo_huber(u, v).dtype == jnp.float32


def test_l2_sums_or_averages_squares():
    squares = RESIDUAL**2
    np.testing.assert_allclose(l2(U, V), squares.sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(l2(U, V, reduction="elementwise"), squares.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(l2(U, V, axis=1), squares.sum(1), rtol=1e-4, atol=1e-7)


def test_distances_are_symmetric():
    np.testing.assert_array_equal(pseudo_huber(U, V, 0.1), pseudo_huber(V, U, 0.1))


def test_bad_input():
    for c in (0.0, -1.0):
        with pytest.raises(ValueError, match="c must be positive"):
            pseudo_huber(U, V, c)
    with pytest.raises(ValueError, match=r"reduction must be 'vector' or 'elementwise', got 'sum'"):
        pseudo_huber(U, V, reduction="sum")
    with pytest.raises(ValueError, match="reduction"):
        l2(U, V, reduction="mean")
