"""Error rates and OPIS from histograms against loops over all pairs."""

import numpy as np
import pytest

from zoo.metrics import verification as v

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(30, 4)).astype(np.float32), RNG.integers(0, 4, 30)
Y[3] = 4  # a class with one sample
GRID = np.linspace(0.3, 1.7, 12)


def distances():
    z = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float64)
    return np.linalg.norm(z[:, None] - z[None], axis=-1)


def rates(t):
    """phi and psi of each class at one threshold, from all unordered pairs."""
    d, out = distances(), []
    for c in range(4):
        pos, neg = [], []
        for i in range(30):
            for j in range(i):
                if Y[i] == c and Y[j] == c:
                    pos.append(d[i, j])
                elif (Y[i] == c) != (Y[j] == c):
                    neg.append(d[i, j])
        out.append((np.mean(np.array(pos) <= t), np.mean(np.array(neg) > t)))
    return np.array(out)


def test_curves_equal_all_pairs():
    counts = v.pair_counts(X, Y, GRID, block=7)
    assert counts.complete.tolist() == [True] * 4 + [False]
    assert counts.positive.dtype == np.int64
    got = v.utility_curves(counts)
    want = np.stack([2 * r[:, 0] * r[:, 1] / np.maximum(r.sum(1), 1e-300) for r in map(rates, GRID)], 1)
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert v.opis(got) == pytest.approx(((want - want.mean(0)) ** 2).mean(), abs=1e-12)
    order = want.mean(1).argsort()
    assert v.epsilon_opis(got, 0.3) == pytest.approx(
        ((want[order[2:]].mean(0) - want[order[:2]].mean(0)) ** 2).mean(), abs=1e-12
    )


def test_blocks_of_rows_add_up():
    whole = v.pair_counts(X, Y, GRID)
    parts = v.pair_counts(X, Y, GRID, rows=(0, 11), block=4) + v.pair_counts(X, Y, GRID, rows=(11, 30), block=8)
    for name in ("positive", "negative", "positives", "negatives"):
        assert (getattr(whole, name) == getattr(parts, name)).all(), name
    with pytest.raises(ValueError, match="different thresholds"):
        _ = whole + v.pair_counts(X, Y, GRID[:5])


def test_error_rates_of_each_class_at_one_threshold():
    far, frr = v.per_class_error_rates(X, Y, 1.1)
    want = rates(1.1)
    np.testing.assert_allclose(far[:4], 1 - want[:, 1], atol=1e-12)
    np.testing.assert_allclose(frr[:4], 1 - want[:, 0], atol=1e-12)
    assert np.isnan(frr[4]) and np.isfinite(far[4])


def test_thresholds_are_quantiles_of_the_pooled_negatives():
    d, same = distances(), Y[:, None] == Y[None]
    pooled = np.sort(d[~same])
    low, high = v.far_thresholds(v.pair_counts(X, Y, v.FINE), (0.05, 0.4))
    for t, rate in ((low, 0.05), (high, 0.4)):
        assert abs(np.mean(pooled <= t) - rate) <= 2.5 / len(pooled)
    assert v.choose_threshold(X, Y, 0.4) == pytest.approx(high)


def test_opis_is_0_for_like_classes_and_a_quarter_at_most():
    # clusters that are copies of each other about the vertices of a regular simplex
    centres = np.eye(4)
    x = np.concatenate([np.stack([c + 0.2 * np.roll(c, 1), c + 0.2 * np.roll(c, -1)]) for c in centres])
    same = np.repeat(np.arange(4), 2)
    counts = v.pair_counts(x, same, np.linspace(0.1, 1.4, 9))
    ring = v.utility_curves(counts)
    assert v.opis(ring) == pytest.approx(0, abs=1e-12)
    assert v.opis(np.array([[0.0, 0.0], [1.0, 1.0]])) == 0.25
    assert v.epsilon_opis(np.array([[0.0, 0.0], [1.0, 1.0]])) == 1.0


def test_consistency_reports_what_it_left_out():
    found = v.threshold_consistency(X, Y, rates=(0.05, 0.4), grid=11)
    assert found.excluded.tolist() == [4] and found.classes.tolist() == [0, 1, 2, 3]
    assert found.far.shape == found.frr.shape == (4, 11)
    np.testing.assert_allclose(np.diff(found.thresholds), np.diff(found.thresholds)[0], rtol=1e-4)
    want = np.stack([rates(t) for t in found.thresholds], 1)
    np.testing.assert_allclose(found.frr, 1 - want[..., 0], atol=0.02)
    assert found.opis == pytest.approx(v.opis(found.utilities))


def test_what_cannot_be_measured_is_refused():
    few = v.pair_counts(X[:6], np.array([0, 0, 1, 1, 2, 2]), v.FINE)
    with pytest.raises(ValueError, match="12 negative pairs cannot show a false accept rate of 0.01; at least 100"):
        v.far_thresholds(few)
    flat = v.pair_counts(np.ones((40, 3)), np.arange(40) % 2, v.FINE)
    with pytest.raises(ValueError, match="calibration range is empty"):
        v.far_thresholds(flat)
    with pytest.raises(ValueError, match=r"must rise within \(0, 1\), got \[0.1, 0.01\]"):
        v.far_thresholds(few, (0.1, 0.01))
    with pytest.raises(ValueError, match=r"labels must be \[30\], one per embedding, got \[29\]"):
        v.pair_counts(X, Y[:29], GRID)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 0 to 4"):
        v.pair_counts(X, Y, GRID, num_classes=3)
    with pytest.raises(ValueError, match="rising list"):
        v.pair_counts(X, Y, GRID[::-1])
    with pytest.raises(ValueError, match="every class has one test sample"):
        v.opis(v.utility_curves(v.pair_counts(X[:5], np.arange(5), GRID)))
    with pytest.raises(ValueError, match=r"epsilon must lie in \(0, 0.5\], got 0.6"):
        v.epsilon_opis(np.ones((3, 2)), 0.6)
    with pytest.raises(ValueError, match="grid must hold at least 2 thresholds, got 1"):
        v.threshold_consistency(X, Y, grid=1)
