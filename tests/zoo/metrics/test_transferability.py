"""Eight transferability scores against their definitions in loops, the released code's numbers and hand cases."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from zoo.metrics import transferability as t
from zoo.metrics.transferability_density import (
    _stratified,
    gaussian_mixture,
    principal_components,
)
from zoo.metrics.transferability_linear import fisher_posterior

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ped_official.npz")
X, Y = GOLDEN["x"], GOLDEN["y"]


@pytest.fixture(scope="module")
def few():
    """26 samples of three classes (13, 8, 5) in four dimensions."""
    rng = np.random.default_rng(2)
    y = rng.permutation(np.repeat([0, 1, 2], [13, 8, 5]))
    return rng.normal(size=(26, 4)) * [1, 2, 0.5, 1] + 0.8 * rng.normal(size=(3, 4))[y] + 0.5, y


@pytest.fixture(autouse=True)
def untouched():
    before = X.copy()
    yield
    np.testing.assert_array_equal(X, before)


# --- LogME ------------------------------------------------------------------------------------------------------------


def dense_evidence(x, target):
    """The fixed point and the evidence with an explicit inverse and determinant, per sample."""
    n, d = x.shape
    alpha = beta = 1.0
    for _ in range(11):
        a = alpha * np.eye(d) + beta * x.T @ x
        inverse = np.linalg.inv(a)
        m = beta * inverse @ x.T @ target
        gamma = d - alpha * np.trace(inverse)
        residual = np.sum((target - x @ m) ** 2)
        r = alpha / beta
        alpha, beta = gamma / (m @ m + 1e-5), (n - gamma) / (residual + 1e-5)
        if abs(alpha / beta - r) / r <= 1e-3:
            break
    log_det = np.linalg.slogdet(alpha * np.eye(d) + beta * x.T @ x)[1]
    found = d * np.log(alpha) + n * np.log(beta) - log_det - beta * residual - alpha * m @ m - n * np.log(2 * np.pi)
    return found / 2 / n


def test_logme_is_the_dense_evidence(few):
    x, y = few
    want = np.mean([dense_evidence(x, (y == c) * 1.0) for c in range(3)])
    np.testing.assert_allclose(t.logme(x, y), want, rtol=1e-9)
    np.testing.assert_allclose(t.logme(x, y, "official"), want, rtol=1e-9)
    doubled = np.concatenate([x, x[:, :2]], 1)  # spans four of six dimensions
    want = np.mean([dense_evidence(doubled, (y == c) * 1.0) for c in range(3)])
    np.testing.assert_allclose(t.logme(doubled, y), want, rtol=1e-7)
    wide = np.random.default_rng(0).normal(size=(26, 40))
    want = np.mean([dense_evidence(wide, (y == c) * 1.0) for c in range(3)])
    np.testing.assert_allclose(t.logme(wide, y), want, rtol=1e-6)
    assert abs(t.logme(wide, y, "official") - want) > 0.1


def test_logme_of_regression(few):
    x, _ = few
    targets = np.random.default_rng(4).normal(size=(26, 2)) + x[:, :2]
    want = [dense_evidence(x, targets[:, j]) for j in range(2)]
    np.testing.assert_allclose(t.logme(x, targets), np.mean(want), rtol=1e-9)
    np.testing.assert_allclose(t.logme(x, targets[:, 1]), want[1], rtol=1e-9)


def test_official_numbers():
    np.testing.assert_allclose(t.logme(X, Y), GOLDEN["logme"], rtol=1e-8)
    np.testing.assert_allclose(t.logme(X[:30], Y[:30], "official"), GOLDEN["logme_few"], rtol=1e-8)
    np.testing.assert_allclose(t.logme(X, GOLDEN["targets"]), GOLDEN["logme_regression"], rtol=1e-8)
    np.testing.assert_allclose(t.sfda(X, Y), GOLDEN["sfda"], rtol=1e-9)
    np.testing.assert_allclose(t.sfda(0.2 * X, Y), GOLDEN["sfda_small"], rtol=1e-9)
    np.testing.assert_allclose(t.parc(X, Y, variant="official"), GOLDEN["parc"], rtol=1e-6)
    assert 0.1 < abs(t.parc(X, Y) - GOLDEN["parc"]) < 0.5  # ties that rounding broke
    np.testing.assert_allclose(t.leep(GOLDEN["posterior"], Y, "official"), GOLDEN["nleep"], rtol=1e-9)
    assert principal_components(X, energy=0.8).shape[1] == GOLDEN["pca_components"]
    got = gaussian_mixture(X[:, :4], GOLDEN["start"], 5, 7)
    np.testing.assert_allclose(got, GOLDEN["posterior"], atol=1e-9)


# --- H-score and SFDA -------------------------------------------------------------------------------------------------


def test_h_score_of_labels_is_one_less_than_classes(few):
    x, y = few
    np.testing.assert_allclose(t.h_score(np.eye(3)[y], y), 2, rtol=1e-9)
    means = np.stack([x[y == y[i]].mean(0) for i in range(26)])
    want = np.trace(np.linalg.inv(np.cov(x.T, bias=True)) @ np.cov(means.T, bias=True))
    np.testing.assert_allclose(t.h_score(x, y), want, rtol=1e-9)


def loop_fisher(x, y, shrinkage=None):
    """By generalised eigenvectors, as defined."""
    n, d = x.shape
    classes = range(y.max() + 1)
    priors = np.array([np.mean(y == c) for c in classes])
    means = np.stack([x[y == c].mean(0) for c in classes])
    within = sum(p * np.cov(x[y == c].T, bias=True) for c, p in zip(classes, priors, strict=True))
    if shrinkage is None:
        v = within.sum(1)
        for _ in range(3):
            u = within @ v / np.linalg.norm(within @ v)
            v = within @ u / np.linalg.norm(within @ u)
        shrinkage = max(np.exp(-5 * v @ within @ u), 1e-10)
    whole = np.cov(x.T, bias=True)
    total = (1 - shrinkage) * whole + shrinkage * np.trace(whole) / d * np.eye(d)
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / d * np.eye(d)
    e = scipy.linalg.eigh(total - shrunk, shrunk)[1]
    coefficients = means @ e @ e.T
    scores = x @ coefficients.T - 0.5 * np.diag(means @ coefficients.T) + np.log(priors)
    p = np.exp(scores - scores.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), shrinkage


def test_sfda_is_its_definition(few):
    x, y = few
    x = 0.3 * x  # so small that the shrinkage is felt
    want, lam = loop_fisher(x, y)
    got, shrinkage = fisher_posterior(x, y, 3)
    np.testing.assert_allclose(got, want, rtol=1e-8)
    np.testing.assert_allclose(shrinkage, lam, rtol=1e-10)
    assert 0.01 < lam < 0.99
    soft = np.exp(want) / np.exp(want).sum(1, keepdims=True)
    means = [x[y == c].mean(0) for c in range(3)]
    mixed = np.stack([
        soft[i, c] * x[i] + (1 - soft[i, c]) * np.mean([means[b] for b in range(3) if b != c], 0)
        for i, c in enumerate(y)
    ])  # fmt: skip
    right = loop_fisher(mixed, y, lam)[0][np.arange(26), y]
    np.testing.assert_allclose(t.sfda(x, y), right.mean(), rtol=1e-8)
    np.testing.assert_allclose(t.sfda(x, y, "log"), np.log(right).mean(), rtol=1e-8)


# --- LEEP, NCE, NLEEP -------------------------------------------------------------------------------------------------


def test_leep_is_its_definition():
    rng = np.random.default_rng(1)
    p, y = rng.dirichlet(np.ones(4), 11), np.array([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0])
    joint = np.zeros((3, 4))
    for i in range(11):
        joint[y[i]] += p[i] / 11
    right = [sum(joint[y[i], z] / joint[:, z].sum() * p[i, z] for z in range(4)) for i in range(11)]
    np.testing.assert_allclose(t.leep(p, y), np.log(right).mean(), rtol=1e-10)
    np.testing.assert_allclose(t.leep(p, y, "official"), np.mean(right), rtol=1e-10)


def test_nce_by_hand_and_determinism():
    z, y = np.array([7, 7, 7, 7, 3, 3]), np.array([0, 0, 0, 1, 1, 1])
    want = 4 / 6 * (0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(t.nce(z, y), want, rtol=1e-12)
    scores = np.zeros((6, 9))
    scores[np.arange(6), z] = 2
    np.testing.assert_allclose(t.nce(scores, y), want, rtol=1e-12)
    decided = np.array([5, 2, 9, 5, 2, 9])
    y = np.array([0, 1, 0, 0, 1, 0])  # a function of the source class, and not the other way round
    np.testing.assert_allclose([t.nce(decided, y), t.leep(np.eye(10)[decided], y)], 0, atol=1e-12)
    assert t.nce(y, decided // 4) < -0.1


def test_mixture_finds_planted_components():
    rng = np.random.default_rng(0)
    z = np.repeat([0, 1, 2], 30)
    x = rng.normal(size=(90, 2)) * [[0.3, 1.0]] + 8 * np.array([[0, 0], [1, 0], [0, 2]])[z]
    noisy = np.where(rng.random(90) < 0.3, rng.integers(0, 3, 90), z)
    assert np.array_equal(gaussian_mixture(x, noisy, 3).argmax(1), z)
    score = t.nleep(x, z, ratio=1, energy=0.999)
    np.testing.assert_allclose(score, 0, atol=1e-6)
    assert t.nleep(x, rng.permutation(z), ratio=1, energy=0.999) < -0.5


def test_nleep_is_leep_of_a_mixture_of_few_principal_components():
    got = t.nleep(X, Y, ratio=2, iterations=3, seed=1)
    assert got == t.nleep(X, Y, ratio=2, iterations=3, seed=1) < 0
    assert 0 < t.nleep(X, Y, 2, "official", iterations=3, seed=1) < 1
    # features beyond 80 % of the variance do not matter
    z = np.concatenate([principal_components(X, energy=0.8), np.zeros((60, 2))], 1)
    np.testing.assert_allclose(t.nleep(z, Y, 2, energy=0.9999999, iterations=3, seed=1), got, rtol=1e-3)


# --- PARC and GBC -----------------------------------------------------------------------------------------------------


def test_parc_is_its_definition(few):
    x, y = few
    centred = x - x.mean(0)
    directions = [v * np.sign(v[np.abs(v).argmax()]) for v in np.linalg.svd(centred)[2][:3]]
    z = centred @ np.stack(directions).T
    z = z / z.std(0)
    labels = np.eye(3)[y]
    pairs = [(i, j) for i in range(26) for j in range(i + 1, 26)]
    first = [1 - np.corrcoef(z[i], z[j])[0, 1] for i, j in pairs]
    second = [np.round(1 - np.corrcoef(labels[i], labels[j])[0, 1], 9) for i, j in pairs]
    np.testing.assert_allclose(t.parc(x, y, 3), 100 * scipy.stats.spearmanr(first, second)[0], rtol=1e-8)


def test_parc_uses_a_part_in_which_classes_keep_their_share():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    rows = _stratified(y, 3, 20, 0)
    np.testing.assert_array_equal(np.bincount(y[rows]), [12, 6, 2])
    x = np.random.default_rng(0).normal(size=(100, 5)) + np.eye(3, 5)[y]
    np.testing.assert_allclose(t.parc(x, y, most=20), t.parc(x[rows], y[rows]), rtol=1e-10)
    assert (rows != _stratified(y, 3, 20, 1)).any()


@pytest.mark.parametrize("covariance", ["diagonal", "spherical"])
def test_gbc_is_its_definition(few, covariance):
    x, y = few
    centred = x - x.mean(0)
    z = centred @ np.linalg.svd(centred)[2][:3].T
    total = 0.0
    for a in range(3):
        for b in range(3):
            va, vb = z[y == a].var(0), z[y == b].var(0)
            if covariance == "spherical":
                va, vb = np.full(3, va.mean()), np.full(3, vb.mean())
            s = (va + vb) / 2
            away = z[y == a].mean(0) - z[y == b].mean(0)
            bhattacharyya = away @ np.diag(1 / s) @ away / 8
            bhattacharyya += 0.5 * np.log(s.prod() / np.sqrt(va.prod() * vb.prod()))
            total -= np.exp(-bhattacharyya) if a != b else 0
    np.testing.assert_allclose(t.gbc(x, y, covariance, 3), total, rtol=1e-9)


def test_gbc_between_its_limits():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2, 3], 20)
    x = rng.normal(size=(80, 3))
    np.testing.assert_allclose(t.gbc(np.tile(x[:20], (4, 1)), y), -12, rtol=1e-9)  # all pairs coincide
    np.testing.assert_allclose(t.gbc(x + 100 * np.eye(4, 3)[y], y), 0, atol=1e-9)
    assert np.isfinite(t.gbc(np.eye(4)[y], y))  # no variance within classes


# --- a pool -----------------------------------------------------------------------------------------------------------


def test_rank_models_orders_by_score_and_keeps_ties_in_order(few):
    x, y = few
    pool = {"noise": np.random.default_rng(0).normal(size=x.shape), "same": x, "again": x, "labels": np.eye(3)[y]}
    ranked = t.rank_models(pool, y, "h_score")
    assert [n for n, _ in ranked] == ["labels", "same", "again", "noise"]
    np.testing.assert_allclose([s for _, s in ranked], [t.h_score(pool[n], y) for n, _ in ranked])
    asked = []

    def move(features, labels, general):
        asked.append(general)
        return -2 * features + 1

    t.rank_models(pool, y, "logme", move, {"same": "G"}, variant="official")
    assert asked == [None, "G", None, None]
    assert dict(t.rank_models({"a": x}, y, "logme", move))["a"] == t.logme(1 - 2 * x, y)
    assert set(t.METRICS) == {"logme", "sfda", "nleep", "h_score", "parc", "gbc", "leep", "nce"}
    assert [n for n, m in t.METRICS.items() if not m.moves] == ["leep", "nce"]


WRONG = X.copy()
WRONG[3, 1] = np.nan
GAPS = np.where(Y == 1, 7, Y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t.logme(WRONG, Y), "features of row 3 are not finite"),
        (lambda: t.sfda(X, GAPS), r"labels must be 0..C-1 without gaps, but class 1 has no sample \(largest label 7\)"),
        (lambda: t.h_score(X, 10**9 * Y), "class 1 has no sample"),
        (lambda: t.h_score(X, Y - 1), "labels must not be negative, got -1"),
        (lambda: t.gbc(X, Y * 0), "labels hold a single class"),
        (lambda: t.parc(X, Y[:-1]), r"one integer for each of the 60 rows, got int64 \[59\]"),
        (lambda: t.parc(X, Y * 1.0), "one integer for each"),
        (lambda: t.nleep(X[0], Y), r"features must be \[N, D\], got \[36\]"),
        (lambda: t.gbc(np.concatenate([X, X[:1]]), np.append(Y, 5)), r"class 5 has 1 sample\(s\), too few"),
        (lambda: t.nleep(X, Y, ratio=13), "65 components .13 for each of 5 classes. for 60 samples: lower ratio"),
        (lambda: t.parc(X[:, :1], Y), "features vary in one dimension only"),
        (lambda: t.logme(np.zeros((60, 3)), Y), "features are all zero"),
        (lambda: t.sfda(np.eye(5)[Y], Y), "features do not vary within classes"),
        (lambda: t.leep(X, Y), "source probabilities of row 0 are no distribution; apply softmax"),
        (lambda: t.nce(X[0], Y), "source labels must be integers"),
        (lambda: t.logme(X, Y, "log"), "variant must be 'evidence' or 'official', got 'log'"),
        (lambda: t.sfda(X, Y, "evidence"), "variant must be 'log' or 'official'"),
        (lambda: t.leep(np.eye(5)[Y], Y, "no"), "variant must be 'log' or 'official'"),
        (lambda: t.parc(X, Y, variant="log"), "variant must be 'ties' or 'official', got 'log'"),
        (lambda: t.gbc(X, Y, "full"), "covariance must be 'diagonal' or 'spherical', got 'full'"),
        (lambda: t.logme(X, np.full((60, 2), np.nan)), "targets of row 0 are not finite"),
        (lambda: t.logme(X, np.zeros((9, 2))), r"targets \[N\] or \[N, T\], got \[60, 36\] and \[9, 2\]"),
        (lambda: t.rank_models({}, Y), "there is no model to rank"),
        (lambda: t.rank_models({"a": X, "b": WRONG}, Y), "b: features of row 3 are not finite"),
        (lambda: t.rank_models({"a": X}, Y, "nce", lambda x, y, g: x), "'nce' reads a source classifier's outputs"),
        (lambda: t.rank_models({"a": X}, Y, "hscore"), "unknown transferability metric 'hscore'; use h_score"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
