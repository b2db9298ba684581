"""Pair losses against loops written from their papers' formulas, and what they do at the edges."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses import pairs

RNG = np.random.default_rng(0)
B, M = 7, 9
S = RNG.uniform(-1, 1, (B, M)).astype(np.float32)
LABELS, OTHERS = np.array([0, 0, 1, 2, 1, 0, 5]), np.array([0, 1, 2, 0, 1, 1, 0, 2, 2])
REAL = np.array([1, 1, 1, 0, 1, 1, 1], bool)
P, N = (np.array(m) for m in pairs.pair_masks(jnp.asarray(LABELS), jnp.asarray(OTHERS), jnp.asarray(REAL)))


def split(i):
    """The similarities of row i's positives and negatives."""
    return S[i][P[i]].astype(float), S[i][N[i]].astype(float)


def by_rows(one):
    return np.array([one(i) for i in range(B)])


def relu(x):
    return np.maximum(x, 0)


def contrastive(i):
    p, n = split(i)
    return (relu(0.8 - p).mean() if len(p) else 0) + (relu(n - 0.1).mean() if len(n) else 0)


def batch_hard(i):
    p, n = split(i)
    return max(0, n.max() - p.min() + 0.3) if len(p) and len(n) else 0


def batch_all(i):
    p, n = split(i)
    costs = [b - a + 0.3 for a in p for b in n if b - a + 0.3 > 0]
    return np.mean(costs) if costs else 0


def semi_hard(i):
    p, n = split(i)
    if not len(p) or not len(n):
        return 0
    costs = []
    for a in p:
        below = [b for b in n if b < a]
        costs.append(max(0, (max(below) if below else min(n)) - a + 0.3))
    return np.mean(costs)


def multi_similarity(i, mined=True):
    p, n = split(i)
    hard, near = (p.min() if len(p) else math.inf), (n.max() if len(n) else -math.inf)
    p, n = (p[p - 0.1 < near], n[n + 0.1 > hard]) if mined else (p, n)
    return np.log(1 + np.exp(-2 * (p - 0.5)).sum()) / 2 + np.log(1 + np.exp(10 * (n - 0.5)).sum()) / 10


def margin(i):
    p, n = relu(split(i)[0] - 0.5 + 0.2), relu(0.5 - split(i)[1] + 0.2)
    return (p.sum() + n.sum()) / max(1, (p > 0).sum() + (n > 0).sum())


def supcon(i, inside=True):
    p, n = split(i)
    among = np.exp(np.concatenate([p, n] if inside else [n]) / 0.3)
    return -np.mean([a / 0.3 - np.log(among.sum()) for a in p]) if len(p) else 0


def soft_ranks(i, t):
    p, n = split(i)
    sg = lambda x: 1 / (1 + np.exp(-x / t))  # noqa: E731
    near = [1 + sum(sg(q - a) for k, q in enumerate(p) if k != j) for j, a in enumerate(p)]
    return np.array(near), np.array([r + sum(sg(b - a) for b in n) for r, a in zip(near, p, strict=True)])


def smooth_ap(i):
    near, ranks = soft_ranks(i, 0.2)
    return 1 - np.mean(near / ranks) if len(near) else 0


def recall(i):
    _, ranks = soft_ranks(i, 0.2)
    return 1 - np.mean([np.mean(1 / (1 + np.exp(-(k - ranks) / 0.7))) for k in (1, 3)]) if len(ranks) else 0


CASES = {
    "contrastive": (functools.partial(pairs.contrastive_pairs, positive_margin=0.8, negative_margin=0.1), contrastive),
    "batch_hard": (functools.partial(pairs.triplet, margin=0.3), batch_hard),
    "batch_all": (functools.partial(pairs.triplet, margin=0.3, mining="batch_all"), batch_all),
    "semi_hard": (functools.partial(pairs.triplet, margin=0.3, mining="semi_hard"), semi_hard),
    "multi_similarity": (functools.partial(pairs.multi_similarity, beta=10), multi_similarity),
    "unmined": (
        functools.partial(pairs.multi_similarity, beta=10, epsilon=None),
        functools.partial(multi_similarity, mined=False),
    ),
    "margin": (functools.partial(pairs.margin_pairs, beta=0.5, alpha=0.2), margin),
    "supcon": (functools.partial(pairs.supervised_contrastive, temperature=0.3), supcon),
    "supcon outside": (
        functools.partial(pairs.supervised_contrastive, temperature=0.3, positive_in_denominator=False),
        functools.partial(supcon, inside=False),
    ),
    "smooth_ap": (functools.partial(pairs.smooth_ap, temperature=0.2), smooth_ap),
    "recall": (
        functools.partial(pairs.recall_surrogate, ks=(1, 3), rank_temperature=0.2, recall_temperature=0.7),
        recall,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_formula_and_gradients_those_of_differences(name):
    loss, reference = jax.jit(CASES[name][0]), CASES[name][1]
    got = np.asarray(loss(jnp.asarray(S), jnp.asarray(P), jnp.asarray(N)))
    np.testing.assert_allclose(got, by_rows(reference), atol=2e-5)
    assert got[3] == 0 and got[6] == 0 or name in ("contrastive", "multi_similarity", "unmined", "margin")
    grad = np.asarray(jax.grad(lambda s: jnp.sum(loss(s, jnp.asarray(P), jnp.asarray(N))))(jnp.asarray(S)))
    assert np.isfinite(grad).all() and (grad[~(P | N)] == 0).all()
    # what a pair is not, it must not read: NaN in ignored places changes nothing
    dirty = np.where(P | N, S, 3.0).astype(np.float32)
    np.testing.assert_allclose(loss(jnp.asarray(dirty), jnp.asarray(P), jnp.asarray(N)), got, atol=1e-6)
    h = 1e-2
    for i, j in ((0, 0), (2, 1), (5, 2)):
        bumped = []
        for sign in (1, -1):
            t = S.copy()
            t[i, j] += sign * h
            bumped.append(float(jnp.sum(loss(jnp.asarray(t), jnp.asarray(P), jnp.asarray(N)))))
        assert abs((bumped[0] - bumped[1]) / (2 * h) - grad[i, j]) < 0.05 * max(1, abs(grad[i, j]))


def test_masks_leave_out_the_anchor_and_padding():
    y, real = jnp.asarray([0, 0, 1, 1]), jnp.asarray([True, True, True, False])
    p, n = pairs.pair_masks(y, mask=real)
    assert p.astype(int).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert n.astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    p, n = pairs.pair_masks(y, jnp.asarray([1, 0]), other_mask=jnp.asarray([True, False]))
    assert p.astype(int).tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]
    assert n.astype(int).tolist() == [[1, 0], [1, 0], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match="would compare wrongly"):
        pairs.pair_masks(y[:, None])


def test_the_miner_has_slack_on_both_sides():
    s = jnp.asarray([[0.5, 0.45, 0.3, 0.56]])  # positives 0.5 and 0.56, negatives 0.45 and 0.3
    p, n = jnp.asarray([[True, False, False, True]]), jnp.asarray([[False, True, True, False]])
    got = float(pairs.multi_similarity(s, p, n, alpha=2.0, beta=10.0, base=0.4, epsilon=0.1)[0])
    want = math.log(1 + math.exp(-2 * 0.1)) / 2 + math.log(1 + math.exp(10 * 0.05)) / 10
    assert got == pytest.approx(want, rel=1e-5)


def test_supcon_weights_count_in_the_denominator_only():
    w = RNG.uniform(0.5, 2, (B, M)).astype(np.float32)
    got = pairs.supervised_contrastive(jnp.asarray(S), jnp.asarray(P), jnp.asarray(N), 0.3, jnp.log(w))
    for i in (0, 2, 5):
        among = (w[i] * np.exp(S[i] / 0.3))[P[i] | N[i]].sum()
        assert abs(float(got[i]) + np.mean(S[i][P[i]] / 0.3 - np.log(among))) < 1e-4


def test_smooth_ap_of_few_positives_is_that_of_all():
    args = jnp.asarray(S), jnp.asarray(P), jnp.asarray(N)
    most = int(P.sum(1).max())
    np.testing.assert_allclose(pairs.smooth_ap(*args, max_positives=most), pairs.smooth_ap(*args), atol=1e-6)
    with pytest.raises(ValueError, match="max_positives must lie between 1 and the number of candidates 9, got 10"):
        pairs.smooth_ap(*args, max_positives=10)


def test_smooth_ap_becomes_average_precision():
    order = jnp.asarray([[0.9, 0.8, 0.7, 0.6]])
    p, n = jnp.asarray([[True, False, True, False]]), jnp.asarray([[False, True, False, True]])
    assert float(pairs.smooth_ap(order, p, n, temperature=1e-3)[0]) == pytest.approx(1 - (1 + 2 / 3) / 2, abs=1e-5)


def test_rank_n_contrast_follows_the_definition_with_ties():
    y = np.array([0.0, 1.0, 1.0, 3.0, 2.0, 2.0])
    s = -np.abs(RNG.normal(size=(6, 6))).astype(np.float32)
    real = np.array([1, 1, 1, 1, 1, 0], bool)
    candidates = real[:, None] & real[None] & ~np.eye(6, dtype=bool)
    gaps = np.abs(y[:, None] - y[None])
    got = pairs.rank_n_contrast(jnp.asarray(s), jnp.asarray(gaps, jnp.float32), jnp.asarray(candidates), 0.7)
    for i in range(5):
        costs = []
        for j in np.flatnonzero(candidates[i]):
            among = [k for k in np.flatnonzero(candidates[i]) if gaps[i, k] >= gaps[i, j]]
            costs.append(-(s[i, j] / 0.7 - np.log(np.exp(s[i, among] / 0.7).sum())))
        assert float(got[i]) == pytest.approx(np.mean(costs), abs=1e-5)
    assert float(got[5]) == 0
    grad = jax.grad(lambda v: jnp.sum(pairs.rank_n_contrast(v, jnp.asarray(gaps), jnp.asarray(candidates), 0.7)))(
        jnp.asarray(s)
    )
    assert np.isfinite(grad).all() and (np.asarray(grad)[~candidates] == 0).all()


def test_settings_that_cannot_be_are_refused():
    args = jnp.asarray(S), jnp.asarray(P), jnp.asarray(N)
    with pytest.raises(ValueError, match="margin must not be negative, got -1"):
        pairs.triplet(*args, margin=-1)
    with pytest.raises(ValueError, match="mining must be 'batch_hard', 'batch_all' or 'semi_hard', got 'easy'"):
        pairs.triplet(*args, mining="easy")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        pairs.supervised_contrastive(*args, temperature=0)
