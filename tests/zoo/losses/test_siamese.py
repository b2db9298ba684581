"""Losses without negatives: stopped targets, standardised features, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses import siamese

RNG = np.random.default_rng(2)
A, B = (RNG.normal(size=(6, 3)).astype(np.float32) for _ in range(2))


def test_negative_cosine_stops_its_target():
    got = siamese.negative_cosine(jnp.asarray(A), jnp.asarray(B))
    want = [-(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(A, B, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    to_target = jax.grad(lambda t: jnp.sum(siamese.negative_cosine(jnp.asarray(A), t)))(jnp.asarray(B))
    to_prediction = jax.grad(lambda p: jnp.sum(siamese.negative_cosine(p, jnp.asarray(B))))(jnp.asarray(A))
    assert (np.asarray(to_target) == 0).all() and (np.abs(to_prediction).sum(1) > 0).all()


@pytest.mark.parametrize("unbiased", [False, True])
def test_cross_correlation_is_pearsons_over_real_rows(unbiased):
    mask = np.array([1, 1, 1, 1, 1, 0], bool)
    dirty = A.copy()
    dirty[5] = np.nan
    got = siamese.cross_correlation(jnp.asarray(dirty), jnp.asarray(B), jnp.asarray(mask), unbiased)
    want = np.corrcoef(A[:5].T, B[:5].T)[:3, 3:] * (4 / 5 if unbiased else 1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_barlow_twins_weighs_the_off_diagonal():
    c = np.array([[0.5, 0.1, 0.0], [0.2, 1.0, -0.3], [0.0, 0.4, -1.0]], np.float32)
    want = 0.25 + 0 + 4 + 0.1 * (0.01 + 0.04 + 0.09 + 0.16)
    assert float(siamese.barlow_twins(jnp.asarray(c), 0.1)) == pytest.approx(want, rel=1e-5)
    assert float(siamese.barlow_twins(jnp.eye(3))) == 0


def test_a_dead_row_does_not_throw_the_others_away():
    dead = jnp.asarray(A).at[2].set(0.0)
    grad = np.asarray(jax.grad(lambda p: jnp.sum(siamese.negative_cosine(p, jnp.asarray(B))))(dead))
    assert (grad[2] == 0).all() and (np.abs(grad[[0, 1, 3, 4, 5]]).sum(1) > 0).all() and np.abs(grad).max() < 100
