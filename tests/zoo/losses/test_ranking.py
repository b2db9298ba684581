"""Ranking losses against their definitions in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.losses import ranking

RNG = np.random.default_rng(0)


def close(got, want, tol=1e-5):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def test_bpr():
    p, n = RNG.standard_normal((2, 9)) * 3
    close(ranking.bpr_loss(jnp.float32(p), jnp.float32(n)), -np.log(1 / (1 + np.exp(-(p - n)))))
    big = ranking.bpr_loss(jnp.array([200.0, -200.0, 0.0]), jnp.array([0.0, 0.0, 0.0]))
    close(big, [0, 200, np.log(2)])
    grad = jax.grad(lambda p: ranking.bpr_loss(p, jnp.zeros(1)).sum())(jnp.zeros(1))
    close(grad, [-0.5])
    assert ranking.bpr_loss(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32


def test_binary_cross_entropy():
    z, y = RNG.standard_normal((4, 5)) * 3, RNG.random((4, 5))
    s = 1 / (1 + np.exp(-z))
    close(ranking.binary_cross_entropy(jnp.float32(z), jnp.float32(y)), -y * np.log(s) - (1 - y) * np.log(1 - s))
    close(ranking.binary_cross_entropy(jnp.array([-300.0, 300.0]), jnp.array([1.0, 1.0])), [300, 0])


def test_pointwise_bce_means_over_negatives_only():
    p, n = RNG.standard_normal(3), RNG.standard_normal((3, 4))
    want = np.log1p(np.exp(-p)) + np.log1p(np.exp(n)).mean(1)
    close(ranking.pointwise_bce(jnp.float32(p), jnp.float32(n)), want)


def test_multinomial_nll():
    z, x = RNG.standard_normal((3, 6)), RNG.integers(0, 3, (3, 6)).astype(float)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    close(ranking.multinomial_nll(jnp.float32(z), jnp.float32(x)), -(x * logp).sum(1))


def test_gaussian_kl():
    m, v = RNG.standard_normal((2, 3, 4))
    want = 0.5 * (m**2 + np.exp(v) - 1 - v).sum(1)
    close(ranking.gaussian_kl(jnp.float32(m), jnp.float32(v)), want)
    close(ranking.gaussian_kl(jnp.zeros((2, 3)), jnp.zeros((2, 3))), [0, 0])


def test_linear_anneal():
    assert [round(float(ranking.linear_anneal(s, 10, 0.2)), 6) for s in (0, 1, 2, 3, 99)] == [0, 0.1, 0.2, 0.2, 0.2]
    assert ranking.linear_anneal(jnp.int32(0), 0, 0.2) == jnp.float32(0.2)
