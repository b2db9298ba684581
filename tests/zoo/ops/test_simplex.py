"""Simplex prototypes against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.simplex import etf_prototypes, simplex_prototypes


def official(num_classes):
    """The construction of the brief, in float64."""
    n = num_classes - 1
    rows = np.zeros((n + 1, n))
    for i in range(n):
        rows[i, i] = 1
    rows[n] = (1 - np.sqrt(1 + n)) / n
    rows = rows - rows.mean(0)
    return rows / (np.sqrt((rows**2).sum(1, keepdims=True)) + 1e-8)


@pytest.mark.parametrize("k", [2, 3, 10, 1024])
def test_gram_matrix_and_sum(k):
    w = np.asarray(simplex_prototypes(k), np.float64)
    assert w.shape == (k, k - 1)
    expected = np.full((k, k), -1 / (k - 1)) + np.eye(k) * (1 + 1 / (k - 1))
    np.testing.assert_allclose(w @ w.T, expected, atol=1e-6)
    np.testing.assert_allclose(w.sum(0), 0, atol=1e-5 if k > 10 else 1e-6)
    np.testing.assert_allclose(w, official(k), atol=1e-6)


def test_two_classes_are_opposite_ends():
    np.testing.assert_allclose(simplex_prototypes(2), [[1.0], [-1.0]], atol=1e-7)


def test_rows_keep_their_places():
    w = np.asarray(simplex_prototypes(5))
    assert (w.argmax(1)[:4] == np.arange(4)).all() and (w[4] < 0).all() and np.ptp(w[4]) < 1e-7


def test_dtype_and_jit():
    assert simplex_prototypes(4, jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(lambda: simplex_prototypes(4))(), simplex_prototypes(4))


def test_etf_with_room():
    flat, turned = etf_prototypes(4, 6), etf_prototypes(4, 6, jax.random.key(1))
    np.testing.assert_array_equal(flat[:, :3], simplex_prototypes(4))
    assert not np.asarray(flat[:, 3:]).any()
    gram = np.full((4, 4), -1 / 3) + np.eye(4) * 4 / 3
    for w in (flat, turned):
        assert w.shape == (4, 6)
        np.testing.assert_allclose(np.asarray(w) @ np.asarray(w).T, gram, atol=1e-6)
    assert np.abs(np.asarray(turned)[:, 3:]).max() > 0.05
    assert not np.allclose(turned, etf_prototypes(4, 6, jax.random.key(2)))
    np.testing.assert_array_equal(etf_prototypes(4, 3), simplex_prototypes(4))


def test_a_random_subspace_has_no_preferred_sign():
    first = [float(etf_prototypes(2, 2, jax.random.key(s))[0, 0]) for s in range(40)]
    assert 8 < sum(x > 0 for x in first) < 32


def test_bad_sizes():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        simplex_prototypes(1)
    with pytest.raises(ValueError, match="at least 2 classes, got 0"):
        etf_prototypes(0, 5)
    with pytest.raises(ValueError, match="5 prototypes with equal angles need at least 4 dimensions, got 3"):
        etf_prototypes(5, 3)
