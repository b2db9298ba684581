"""Losses on distances: torch's numbers, where eps goes, gradients at zero distance and at the hinge."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses.metric import pairwise_distance, triplet_margin_loss

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "omnimatch_official.npz")


@pytest.mark.parametrize("p", [1, 2, 3])
def test_triplets_equal_torchs(p):
    ends = (jnp.asarray(GOLDEN[f"tri/{k}"]) for k in "apn")
    found = triplet_margin_loss(*ends, margin=0.7, p_norm=float(p))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, GOLDEN[f"tri/{p}"], atol=1e-5)


def test_by_hand():
    x, y = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, 4.0], [0.0, 1.0]])
    np.testing.assert_allclose(pairwise_distance(x, y, eps=0.0), [5, 0])
    np.testing.assert_allclose(pairwise_distance(x, y, 1, 0.0), [7, 0])
    np.testing.assert_allclose(pairwise_distance(x, y, float("inf"), 0.0), [4, 0])
    # eps belongs to the difference, before the norm: (3.5, -3.5) and (0.5, 0.5)
    np.testing.assert_allclose(pairwise_distance(x, y, 2, 0.5), [3.5 * 2**0.5, 0.5 * 2**0.5], rtol=1e-6)
    np.testing.assert_allclose(pairwise_distance(y, x, 2, 0.5), [(2.5**2 + 4.5**2) ** 0.5, 0.5 * 2**0.5], rtol=1e-6)
    # d(a, p) = 2, d(a, n) = 3: the margin decides
    a, p, n = (jnp.array([[v]]) for v in (0.0, 2.0, 3.0))
    for margin, value in ((0.5, 0.0), (1.0, 0.0), (1.25, 0.25), (4.0, 3.0)):
        np.testing.assert_allclose(triplet_margin_loss(a, p, n, margin, eps=0.0), [value])
    np.testing.assert_allclose(triplet_margin_loss(a, n, p, 0.5, eps=0.0), [1.5])
    np.testing.assert_allclose(triplet_margin_loss(a, p, n, eps=0.0), [0.0])


def test_gradients_at_zero_distance_and_at_the_hinge():
    x = jnp.ones((1, 4))
    grad = lambda eps, p: jax.grad(lambda v: pairwise_distance(v, x, p, eps).sum())(x)  # noqa: E731
    np.testing.assert_allclose(grad(1e-3, 2), np.full((1, 4), 0.5), rtol=1e-2)
    for p in (2, 3):
        np.testing.assert_array_equal(grad(0.0, p), np.zeros((1, 4)))
    a, p, n = (jnp.array([[v]]) for v in (0.0, 2.0, 3.0))
    slope = lambda margin: jax.grad(lambda p: triplet_margin_loss(a, p, n, margin, eps=0.0).sum())(p)[0, 0]  # noqa: E731
    assert [float(slope(m)) for m in (0.5, 1.0, 1.5)] == [0, 1, 1]
    away = jax.grad(lambda n: triplet_margin_loss(a, p, n, 1.5, eps=0.0).sum())(n)
    assert float(away[0, 0]) == -1


def test_bf16_is_compared_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.bfloat16)
    found = pairwise_distance(x, x[::-1])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, pairwise_distance(x.astype(jnp.float32), x[::-1].astype(jnp.float32)), rtol=1e-6)


def test_bad_settings():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="p_norm must be at least 1, got 0.5"):
        pairwise_distance(x, x, 0.5)
    with pytest.raises(ValueError, match="eps must not be negative"):
        pairwise_distance(x, x, eps=-1.0)
    with pytest.raises(ValueError, match="margin must not be negative, got -0.1"):
        triplet_margin_loss(x, x, x, -0.1)
