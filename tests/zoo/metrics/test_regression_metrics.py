"""Regression metrics against SciPy and hand cases, with masks, and shot regions."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from zoo.metrics import regression

RNG = np.random.default_rng(0)
T = RNG.integers(0, 6, 40).astype(np.float32)
P = (T + RNG.integers(-2, 3, 40)).astype(np.float32)  # ties, and errors of exactly 0
REAL = np.arange(40) % 3 != 0


@pytest.mark.parametrize("mask", [None, REAL])
def test_all_five_are_scipys(mask):
    found = regression.regression_metrics(jnp.asarray(P), jnp.asarray(T), None if mask is None else jnp.asarray(mask))
    p, t = (v.astype(float) if mask is None else v[mask].astype(float) for v in (P, T))
    error = np.abs(p - t)
    assert (error == 0).any()
    want = {
        "mae": error.mean(),
        "mse": (error**2).mean(),
        "gmean": stats.gmean(np.where(error == 0, 1e-10, error)),
        "pearson": stats.pearsonr(p, t)[0],
        "spearman": stats.spearmanr(p, t)[0],
    }
    assert set(found) == set(want)
    for name, value in want.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name


def test_a_hand_case():
    p, t = jnp.asarray([1.0, 2.0, 5.0]), jnp.asarray([1.0, 4.0, 4.5])
    assert float(regression.mae(p, t)) == pytest.approx(2.5 / 3)
    assert float(regression.mse(p, t)) == pytest.approx(4.25 / 3)
    assert float(regression.gmean(p, t)) == pytest.approx((1e-10 * 2 * 0.5) ** (1 / 3), rel=1e-4)
    ranks = regression.mean_ranks(jnp.asarray([3.0, 1.0, 3.0, 7.0]))
    assert ranks.tolist() == [2.5, 1.0, 2.5, 4.0]
    assert np.isnan(float(regression.spearman(jnp.ones(3), t)))


def test_regions_count_training_labels():
    train = np.repeat(np.array([0, 1, 2, 3, 5], np.float32), [101, 100, 20, 19, 1])
    labels = np.array([0, 1, 2, 3, 4, 5, 9, -1], np.float32)
    found = {k: v.tolist() for k, v in regression.shot_regions(labels, train).items()}
    assert found["all"] == [True] * 8
    assert found["many"] == [True] + [False] * 7
    assert found["median"] == [False, True, True] + [False] * 5
    assert found["few"] == [False] * 3 + [True] * 5  # labels never seen in training are few-shot
    with pytest.raises(ValueError, match="shot bounds must rise from above 0, got few 30 and many 20"):
        regression.shot_regions(labels, train, 20, 30)


def test_errors_by_region():
    train = np.repeat(np.array([0, 1], np.float32), [5, 2])
    found = regression.by_shot(
        np.array([1.0, 0.5, 4.0]), np.array([0.0, 1.0, 1.5]), np.array([0.0, 1.0, 1.0]), train, many=4, few=3
    )
    assert set(found) == {"all", "many", "few"}
    assert found["many"]["mae"] == 1.0 and found["few"]["mae"] == pytest.approx(1.5)
    assert found["few"]["rows"] == 2 and "spearman" not in found["many"]
    assert found["all"]["mae"] == pytest.approx(4 / 3)
