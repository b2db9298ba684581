"""Hubness against Python counters and scipy."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from zoo.metrics import hubness

found_by = jax.jit(hubness.hubness, static_argnums=1)


def test_equals_counters_and_scipy_with_items_never_returned():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ids = np.stack([rng.permutation(40)[:5] ** 2 // 40 for _ in range(30)])  # skewed towards low ids
        counter = Counter(ids.ravel().tolist())
        counts = np.array([counter[j] for j in range(60)])
        np.testing.assert_array_equal(hubness.k_occurrence(jnp.asarray(ids), 60), counts)
        got = found_by(jnp.asarray(ids), 60)
        np.testing.assert_allclose(got["skewness"], scipy.stats.skew(counts), rtol=1e-5)
        np.testing.assert_allclose(
            got["robin_hood"], np.abs(counts - counts.mean()).sum() / (2 * counts.sum()), rtol=1e-5
        )
        assert got["max"] == max(counter.values())
        np.testing.assert_allclose(got["never_retrieved"], np.mean(counts == 0), rtol=1e-6)
        assert got["never_retrieved"] > 0.3


def test_hand_case():
    # item 0 is everybody's, 1 and 2 are returned once, 3 never; the empty slot is no item
    ids = jnp.array([[0, 1], [0, 2], [0, -1]])
    np.testing.assert_array_equal(hubness.k_occurrence(ids, 4), [3, 1, 1, 0])
    got = hubness.hubness(ids, 4)
    deviations = np.array([3, 1, 1, 0]) - 1.25
    np.testing.assert_allclose(got["skewness"], np.mean(deviations**3) / np.mean(deviations**2) ** 1.5, rtol=1e-5)
    np.testing.assert_allclose(got["robin_hood"], 1.75 * 2 / 10, rtol=1e-6)
    assert got["max"] == 3 and got["never_retrieved"] == 0.25


def test_even_and_empty_lists_are_no_hubs():
    got = hubness.hubness(jnp.array([[0, 1], [2, 3]]), 4)
    assert got["skewness"] == got["robin_hood"] == got["never_retrieved"] == 0 and got["max"] == 1
    got = hubness.hubness(jnp.array([[-1, -1]]), 3)
    assert got["skewness"] == got["robin_hood"] == got["max"] == 0 and got["never_retrieved"] == 1
