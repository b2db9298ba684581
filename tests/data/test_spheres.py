"""The sphere generators have the law they claim."""

import numpy as np
import pytest

from data.spheres import vmf_clusters, von_mises_fisher
from data.stream import DataError


@pytest.mark.parametrize(("kappa", "d"), [(0.5, 3), (10.0, 3), (40.0, 8)])
def test_samples_have_the_mean_resultant_length_of_their_law(kappa, d):
    rng = np.random.default_rng(0)
    mean = np.zeros(d)
    mean[1] = 1
    x = von_mises_fisher(rng, mean, kappa, 20_000)
    assert np.allclose(np.linalg.norm(x, axis=1), 1)
    # A_d(kappa) = I_{d/2}(kappa) / I_{d/2 - 1}(kappa)
    from scipy.special import ive

    want = ive(d / 2, kappa) / ive(d / 2 - 1, kappa)
    got = x.mean(0)
    assert abs(got[1] - want) < 0.01 and np.abs(np.delete(got, 1)).max() < 0.015


def test_clusters_are_open_world_and_differ_tenfold():
    data = vmf_clusters(3, 4, 5, 6)
    again = vmf_clusters(3, 4, 5, 6)
    assert data.fingerprint == again.fingerprint != vmf_clusters(4, 4, 5, 6).fingerprint
    assert data["train"]["x"].shape == (24, 48) and data["test"]["x"].shape == (30, 48)
    assert np.bincount(data["test"]["label"]).tolist() == [6] * 5
    kappa = data.info["kappa"]["test"]
    assert kappa.max() / kappa.min() == pytest.approx(10)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="at least 2 and nuisance at least 0; got 1, 16, 40, 12 and 12"):
        vmf_clusters(train_classes=1)
    with pytest.raises(DataError, match="kappa must be a positive range"):
        vmf_clusters(kappa=(5.0, 1.0))
    with pytest.raises(DataError, match="kappa above 0"):
        von_mises_fisher(np.random.default_rng(0), np.array([1.0, 0]), 0.0, 3)
