"""Distances between samples against SciPy and loops written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from zoo.metrics.distribution import (
    median_bandwidth,
    mmd_rbf,
    precision_recall,
    sliced_wasserstein,
    squared_distances,
    wasserstein_1d,
)

RNG = np.random.default_rng(0)
A = RNG.standard_normal((40, 3)).astype(np.float32)
B = (RNG.standard_normal((27, 3)) * 1.5 + 0.4).astype(np.float32)
X, Y = jnp.asarray(A), jnp.asarray(B)
KEY = jax.random.key(3)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 27), (7, 40)])
def test_wasserstein_on_the_line_agrees_with_scipy(n, m):
    x, y = X[:n, 0], (Y[:m, 0] if m <= 27 else X[::-1, 1])
    assert float(wasserstein_1d(x, y)) == pytest.approx(wasserstein_distance(x, y), rel=1e-5)


def test_wasserstein_of_a_shift_is_the_shift_and_ties_count():
    x = jnp.array([0.0, 0.0, 1.0, 3.0])
    assert float(wasserstein_1d(x, x + 2)) == pytest.approx(2, rel=1e-6)
    assert float(wasserstein_1d(x, x)) == 0
    assert float(wasserstein_1d(x, jnp.array([0.0, 1.0]))) == pytest.approx(
        wasserstein_distance(x, [0.0, 1.0]), rel=1e-6
    )


def test_sliced_distance_is_the_mean_over_unit_directions():
    v = np.asarray(jax.random.normal(KEY, (11, 3)), np.float64)
    v /= np.sqrt((v**2).sum(1, keepdims=True))
    expected = np.mean([wasserstein_distance(A @ d, B @ d) for d in v])
    assert float(sliced_wasserstein(X, Y, KEY, 11)) == pytest.approx(expected, rel=1e-5)
    assert float(sliced_wasserstein(X, Y, KEY, 11, chunk=2)) == pytest.approx(expected, rel=1e-5)


def test_sliced_distance_of_a_shift():
    # the mean of |cos| over the circle is 2 / pi
    x = X[:, :2]
    shifted = x + jnp.array([3.0, 0.0])
    assert float(sliced_wasserstein(x, shifted, KEY, 2000)) == pytest.approx(3 * 2 / np.pi, rel=0.03)
    assert float(sliced_wasserstein(x, x[::-1], KEY)) == pytest.approx(0, abs=1e-6)


def kernel_mean(a, b, h, skip):
    values = [
        np.exp(-((p - q) ** 2).sum() / (2 * h * h))
        for i, p in enumerate(a)
        for j, q in enumerate(b)
        if not (skip and i == j)
    ]
    return np.mean(values)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_mmd_is_its_definition(chunk):
    x, y, h = A.astype(np.float64), B.astype(np.float64), 1.3
    expected = kernel_mean(x, x, h, True) + kernel_mean(y, y, h, True) - 2 * kernel_mean(x, y, h, False)
    assert float(mmd_rbf(X, Y, h, chunk)) == pytest.approx(expected, rel=1e-4)


def test_mmd_of_one_distribution_is_zero_on_average():
    draws = [jnp.asarray(RNG.standard_normal((2, 30, 2)), jnp.float32) for _ in range(40)]
    values = [float(mmd_rbf(a, b, 1.0)) for a, b in draws]
    assert abs(np.mean(values)) < 0.006
    assert min(values) < 0 < max(values)


def test_bandwidth_is_the_median_distance_of_pairs():
    pairs = [np.sqrt(((A[i] - A[j]) ** 2).sum()) for i in range(40) for j in range(i)]
    assert float(median_bandwidth(X)) == pytest.approx(np.median(pairs), rel=1e-5)
    few = [np.sqrt(((A[i] - A[j]) ** 2).sum()) for i in range(10) for j in range(i)]
    assert float(median_bandwidth(X, limit=10)) == pytest.approx(np.median(few), rel=1e-5)


def covered(points, centres, k):
    hits = 0
    radii = [
        np.sort([((c - o) ** 2).sum() for j, o in enumerate(centres) if j != i])[k - 1] for i, c in enumerate(centres)
    ]
    for p in points:
        hits += any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii, strict=True))
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k):
    precision, recall = precision_recall(X, Y, k, chunk=8)
    assert float(precision) == pytest.approx(covered(A, B, k))
    assert float(recall) == pytest.approx(covered(B, A, k))


def test_collapsed_samples_are_precise_but_do_not_cover():
    real = jnp.concatenate([X, X + 100])
    precision, recall = precision_recall(X + 1e-3, real)
    assert float(precision) == 1
    assert float(recall) <= 0.5


def test_squared_distances():
    expected = [[((a - b) ** 2).sum() for b in B] for a in A]
    np.testing.assert_allclose(squared_distances(X, Y), expected, rtol=1e-5)


def test_metrics_can_be_jitted():
    assert jnp.isfinite(jax.jit(mmd_rbf)(X, Y, 1.0))
    assert jnp.isfinite(jax.jit(sliced_wasserstein)(X, Y, KEY))


def test_bad_input():
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sliced_wasserstein(X, Y, KEY, 0)
    with pytest.raises(ValueError, match="two rows or more in each set, got 1 and 27"):
        mmd_rbf(X[:1], Y, 1.0)
    for k in (0, 27):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 26\]"):
            precision_recall(X, Y, k)
