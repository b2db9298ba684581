"""Proxy losses and margin heads against loops and hand values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses import proxies

RNG = np.random.default_rng(1)
COS = RNG.uniform(-0.9, 0.9, (6, 4)).astype(np.float32)
Y = np.array([0, 2, 2, 0, 3, 1])
REAL = np.array([1, 1, 1, 1, 1, 0], bool)


def test_proxy_anchor_counts_present_proxies_and_all():
    near, far = np.zeros(4), np.zeros(4)
    for c in range(4):
        own = [COS[i, c] for i in range(6) if REAL[i] and Y[i] == c]
        other = [COS[i, c] for i in range(6) if REAL[i] and Y[i] != c]
        near[c] = np.log(1 + sum(math.exp(-4 * (s - 0.2)) for s in own)) / 3 if own else 0
        far[c] = np.log(1 + sum(math.exp(4 * (s + 0.2)) for s in other)) / 4
    got = proxies.proxy_anchor(jnp.asarray(COS), jnp.asarray(Y), 4.0, 0.2, jnp.asarray(REAL))
    np.testing.assert_allclose(got, near + far, rtol=1e-5)


def test_proxy_nca_leaves_the_own_class_out_of_the_denominator():
    d = 2 - 2 * COS
    got = proxies.proxy_nca(jnp.asarray(d), jnp.asarray(Y), 0.5)
    want = [d[i, Y[i]] / 0.5 + np.log(sum(np.exp(-d[i, c] / 0.5) for c in range(4) if c != Y[i])) for i in range(6)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_margins_change_the_own_class_only():
    y = jnp.asarray(Y)
    own = np.eye(4, dtype=bool)[Y]
    cosface = np.asarray(proxies.cosface_logits(jnp.asarray(COS), y, 0.3, 10.0))
    np.testing.assert_allclose(cosface, 10 * (COS - 0.3 * own), rtol=1e-5, atol=1e-6)
    arcface = np.asarray(proxies.arcface_logits(jnp.asarray(COS), y, 0.4, 10.0))
    turned = np.where(np.arccos(COS) + 0.4 < math.pi, np.cos(np.arccos(COS) + 0.4), COS - 0.4 * math.sin(0.4))
    np.testing.assert_allclose(arcface, 10 * np.where(own, turned, COS), rtol=1e-4, atol=1e-4)


def test_arcface_keeps_falling_beyond_pi_and_its_slope_is_finite_at_the_ends():
    cosine = jnp.asarray([[1.0], [0.5], [-0.8], [-0.999], [-1.0]])
    f = lambda c: proxies.arcface_logits(c, jnp.zeros(5, jnp.int32), 0.5, 1.0)[:, 0]  # noqa: E731
    values = np.asarray(f(cosine))
    assert (np.diff(values) < 0).all()
    assert np.isfinite(jax.grad(lambda c: jnp.sum(f(c)))(cosine)).all()
    assert values[0] == pytest.approx(math.cos(0.5))
    np.testing.assert_allclose(values[3:], [-0.999 - 0.5 * math.sin(0.5), -1 - 0.5 * math.sin(0.5)], rtol=1e-5)
    with pytest.raises(ValueError, match=r"margin must lie in \[0, pi\), got 4"):
        proxies.arcface_logits(cosine, jnp.zeros(5, jnp.int32), 4)
