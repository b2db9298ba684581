"""Rank correlations against SciPy, ties included, and against the released code's weighted tau."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from zoo.metrics.rank_correlation import average_ranks, spearman, weighted_kendall_tau

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ped_official.npz")


@pytest.mark.parametrize("values", [4, 9, 1000])
def test_scipy_agrees_with_ties_and_without(values):
    rng = np.random.default_rng(values)
    for n in (2, 3, 7, 12, 30):
        for _ in range(10):
            x, y = rng.integers(0, values, (2, n)) / 7
            if np.ptp(x) and np.ptp(y):
                np.testing.assert_allclose(weighted_kendall_tau(x, y), scipy.stats.weightedtau(x, y)[0], atol=1e-12)
                np.testing.assert_allclose(spearman(x, y), scipy.stats.spearmanr(x, y)[0], atol=1e-12)
        np.testing.assert_array_equal(average_ranks(x), scipy.stats.rankdata(x))


def test_identities():
    x = [0.3, 0.9, 0.1, 0.5]
    assert weighted_kendall_tau(x, np.exp(x)) == pytest.approx(1) and spearman(x, np.exp(x)) == pytest.approx(1)
    assert weighted_kendall_tau(x, [-v for v in x]) == pytest.approx(-1)
    # an exchange of the best two costs more than one of the worst two
    top, bottom = weighted_kendall_tau([4, 3, 2, 1], [3, 4, 2, 1]), weighted_kendall_tau([4, 3, 2, 1], [4, 3, 1, 2])
    assert top < bottom < 1
    np.testing.assert_allclose(top, 1 - 2 * (1 + 1 / 2) / (3 * (1 + 1 / 2 + 1 / 3 + 1 / 4)))
    assert np.isnan(weighted_kendall_tau([1, 1, 1], [1, 2, 3])) and np.isnan(spearman([1, 2], [3, 3]))


def test_official_taus_of_released_accuracies():
    table = GOLDEN["accuracies"]
    got = [[weighted_kendall_tau(a, b) for b in table] for a in table]
    np.testing.assert_allclose(got, GOLDEN["taus"], atol=1e-12)


@pytest.mark.parametrize("measure", [weighted_kendall_tau, spearman])
def test_bad_input_is_one_clear_line(measure):
    with pytest.raises(ValueError, match=r"two lists of one length, got \[2\] and \[3\]"):
        measure([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="two values or more, got 1"):
        measure([1], [1])
    with pytest.raises(ValueError, match="value 1 of the second list is not finite"):
        measure([1, 2], [1, np.nan])
