"""Alignment, uniformity, CKA and NMI against definitions and scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from zoo.metrics import embeddings

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(21, 3)).astype(np.float32), RNG.normal(size=(21, 5)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_alignment_and_uniformity():
    other = RNG.normal(size=(21, 3)).astype(np.float32)
    gaps = np.linalg.norm(unit(A) - unit(other), axis=1)
    assert float(embeddings.alignment(jnp.asarray(A), jnp.asarray(other), 3.0)) == pytest.approx((gaps**3).mean(), 1e-4)
    z = unit(A)
    far = [np.exp(-1.5 * ((z[i] - z[j]) ** 2).sum()) for i in range(21) for j in range(21) if i != j]
    for block in (4, 64):
        assert float(embeddings.uniformity(jnp.asarray(A), 1.5, block)) == pytest.approx(np.log(np.mean(far)), 1e-4)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        embeddings.uniformity(jnp.ones((1, 3)))


def test_linear_cka_is_that_of_centred_gram_matrices():
    h = np.eye(21) - 1 / 21
    k, m = h @ A @ A.T @ h, h @ B @ B.T @ h
    want = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert float(embeddings.linear_cka(jnp.asarray(A), jnp.asarray(B))) == pytest.approx(want, 1e-4)
    q = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    assert float(embeddings.linear_cka(jnp.asarray(A), jnp.asarray(7 * A @ q + 3))) == pytest.approx(1, 1e-5)


def test_nmi_is_scikit_learns():
    c, y = RNG.integers(0, 4, 50), RNG.integers(0, 3, 50)
    got = embeddings.nmi(jnp.asarray(c), jnp.asarray(y), 4, 3)
    assert float(got) == pytest.approx(normalized_mutual_info_score(y, c), abs=1e-5)
    assert float(embeddings.nmi(jnp.asarray(2 - y), jnp.asarray(y), 3, 3)) == pytest.approx(1, abs=1e-5)
    ones = jnp.zeros(5, jnp.int32)
    assert float(embeddings.nmi(ones, ones, 2, 2)) == 1
    assert float(embeddings.nmi(ones, jnp.arange(5), 2, 5)) == pytest.approx(0, abs=1e-6)
