"""Pooled precision and recall against loops over thresholds and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.metrics import precision_recall_curve as sklearn_curve

from zoo.metrics import binary


def problem(seed, shape=(7, 9), levels=12):
    """Scores with many ties, labels and a mask."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels // 2, levels // 2, shape).astype(np.float32) / 4
    labels = (rng.random(shape) < 0.4).astype(np.float32)
    return scores, labels, rng.random(shape) < 0.8


def by_thresholds(scores, labels, mask):
    """``(threshold, precision, recall, kept)`` at each distinct real score, from the definition."""
    pairs = [(float(s), int(y)) for s, y, m in zip(scores.ravel(), labels.ravel(), mask.ravel(), strict=True) if m]
    rows, positives = [], sum(y for _, y in pairs)
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        kept = [y for s, y in pairs if s >= threshold]
        rows.append((threshold, sum(kept) / len(kept), sum(kept) / positives, len(kept)))
    return rows


@pytest.fixture(scope="module")
def everything():
    def call(scores, labels, mask, recall):
        threshold = binary.select_threshold(scores, labels, mask, recall)
        return {
            "curve": binary.precision_recall_curve(scores, labels, mask),
            "ap": binary.average_precision(scores, labels, mask),
            "f1": binary.best_f1(scores, labels, mask),
            "threshold": threshold,
            "precision": binary.precision_at_recall(scores, labels, recall, mask),
            "filter": binary.filter_rate(scores, threshold, mask),
            "null": binary.null_rate(scores, threshold, mask),
            "kept": binary.filter_mask(scores, threshold, mask),
        }

    jitted = jax.jit(call)
    return lambda scores, labels, mask, recall: jax.device_get(
        jitted(jnp.asarray(scores), jnp.asarray(labels), jnp.asarray(mask), jnp.float32(recall))
    )


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_loop_over_thresholds_and_sklearn(everything, seed):
    scores, labels, mask = problem(seed)
    rows = by_thresholds(scores, labels, mask)
    for target in (0.2, 0.5, 0.95, 1.0):
        got = everything(scores, labels, mask, target)
        threshold, precision, _, kept = next(r for r in rows if r[2] >= target - 1e-9)
        assert got["threshold"] == threshold
        np.testing.assert_allclose(got["precision"], precision, rtol=1e-6)
        np.testing.assert_allclose(got["filter"], 1 - kept / mask.sum(), atol=1e-6)
        alive = [bool((scores[i][mask[i]] >= threshold).any()) for i in range(7) if mask[i].any()]
        np.testing.assert_allclose(got["null"], 1 - np.mean(alive), atol=1e-6)
        np.testing.assert_array_equal(got["kept"], (scores >= threshold) & mask)
    np.testing.assert_allclose(got["ap"], average_precision_score(labels[mask], scores[mask]), atol=1e-6)
    f1s = [(2 * p * r / (p + r) if p + r else 0.0, t) for t, p, r, _ in rows]
    best = max(f for f, _ in f1s)
    np.testing.assert_allclose(got["f1"][0], best, rtol=1e-6)
    assert got["f1"][1] == max(t for f, t in f1s if f > best - 1e-9)
    curve = got["curve"]
    points = np.stack([curve.thresholds, curve.precision, curve.recall], 1)[curve.last]
    np.testing.assert_allclose(points, [r[:3] for r in rows], rtol=1e-6)
    precision, recall, thresholds = sklearn_curve(labels[mask], scores[mask], drop_intermediate=False)
    np.testing.assert_allclose(points[::-1], np.stack([thresholds, precision[:-1], recall[:-1]], 1), rtol=1e-6)
    assert curve.positives == labels[mask].sum() and curve.total == mask.sum()
    # members of a tie group share its values; masked places those of all pairs
    by_score = {t: (p, r) for t, p, r, _ in rows}
    for place in range(mask.sum()):
        want = by_score[curve.thresholds[place]]
        np.testing.assert_allclose((curve.precision[place], curve.recall[place]), want, rtol=1e-6)
    assert (curve.thresholds[mask.sum() :] == -np.inf).all() and (curve.recall[mask.sum() :] == 1).all()
    np.testing.assert_allclose(curve.precision[mask.sum() :], labels[mask].mean(), rtol=1e-6)


def test_average_precision_of_many_distinct_scores_in_one_dimension():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=4000).astype(np.float32), rng.random(4000) < 0.3
    got = binary.average_precision(jnp.asarray(scores), jnp.asarray(labels))
    np.testing.assert_allclose(got, average_precision_score(labels, scores), atol=1e-6)


def test_hand_cases():
    scores, labels = jnp.array([0.9, 0.8, 0.7, 0.6]), jnp.array([1, 0, 1, 1])
    assert binary.select_threshold(scores, labels, None, 2 / 3) == jnp.float32(0.7)  # the brief's
    assert binary.precision_at_recall(scores, labels, 2 / 3) == jnp.float32(2 / 3)
    np.testing.assert_allclose(binary.average_precision(scores, labels), (1 + 2 / 3 + 3 / 4) / 3, rtol=1e-6)
    f1, at = binary.best_f1(scores, labels)
    np.testing.assert_allclose(f1, 6 / 7, rtol=1e-6)
    assert at == jnp.float32(0.6)
    # ties come in whole groups: the one relevant pair is kept together with its two equals
    scores, labels = jnp.array([0.5, 0.5, 0.5, 0.1]), jnp.array([0, 1, 0, 0])
    np.testing.assert_allclose(binary.average_precision(scores, labels), 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(binary.precision_at_recall(scores, labels, 0.95), 1 / 3, rtol=1e-6)
    # a masked pair that ties with the last real one is no part of its group
    curve = binary.precision_recall_curve(
        jnp.array([0.5, 0.9, 0.5]), jnp.array([1, 0, 1]), jnp.array([True, True, False])
    )
    assert curve.last.tolist() == [True, True, False] and curve.kept.tolist() == [1, 2, 2]
    assert curve.hits.tolist() == [0, 1, 1] and curve.relevant.tolist() == [False, True, False]
    # a threshold keeps what equals it; one query of two with a real pair loses all
    scores = jnp.array([[0.5, 0.4], [0.3, 0.9], [0.9, 0.9]])
    mask = jnp.array([[True, True], [True, False], [False, False]])
    assert binary.filter_mask(scores, 0.5, mask).tolist() == [[True, False], [False, False], [False, False]]
    np.testing.assert_allclose(binary.filter_rate(scores, 0.5, mask), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(binary.filter_rate(scores, 0.5), 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(binary.null_rate(scores, 0.5, mask), 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(binary.null_rate(scores[:2] - 0.45, 0.5), 1.0, rtol=1e-6)


def test_recalls_that_float32_cannot_hold_still_count():
    scores, places = -jnp.arange(101.0), jnp.arange(101)
    select = jax.jit(binary.select_threshold)
    for positives in (3, 7, 10, 20, 49, 97, 100):
        for wanted in range(1, positives + 1):
            got = select(scores, places < positives, places <= positives, wanted / positives)
            assert got == -(wanted - 1.0), (positives, wanted)


def test_soft_grades_are_not_relevant_and_booleans_are():
    scores = jnp.array([0.9, 0.8, 0.7])
    np.testing.assert_allclose(binary.average_precision(scores, jnp.array([0.9, 1.0, 0.0])), 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(binary.average_precision(scores, jnp.array([False, True, False])), 1 / 2, rtol=1e-6)


def test_masked_values_change_nothing(everything):
    scores, labels, mask = problem(9)
    clean = everything(scores, labels, mask, 0.9)
    poisoned = everything(np.where(mask, scores, np.nan), np.where(mask, labels, 1.0), mask, 0.9)
    poisoned["kept"] = clean["kept"]
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


@pytest.mark.parametrize(("labels", "mask"), [(0.0, True), (1.0, True), (1.0, False)])
def test_undefined_cases_are_finite_under_jit(everything, labels, mask):
    scores = problem(1)[0]
    got = everything(scores, np.full(scores.shape, labels, np.float32), np.full(scores.shape, mask), 0.9)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(got))
    if labels == 0 or not mask:
        assert got["ap"] == got["precision"] == got["f1"][0] == 0 and got["threshold"] == -np.inf
        assert got["filter"] == got["null"] == 0
    else:
        assert got["ap"] == got["precision"] == got["f1"][0] == 1


def test_monotone_maps_leave_average_precision_exactly():
    scores, labels, mask = map(jnp.asarray, problem(5))
    want = binary.average_precision(scores, labels, mask)
    assert binary.average_precision(jnp.tanh(scores) * 3 - 1, labels, mask) == want
    assert binary.average_precision(-scores, labels, mask) != want


@pytest.mark.parametrize(
    ("scores", "labels", "mask", "message"),
    [
        ([0.1, 0.2], [0, 1, 1], None, "must have one shape"),
        ([0.1, 0.2], [0, 1], [False, False], "every pair is masked"),
        ([0.1, np.nan], [0, 1], None, "1 of 2 are not"),
        ([0.1, 0.2], [0, 0.5], None, "must be 0 or 1, got 0.5"),
        ([0.1, 0.2], [0, 0], None, "are all 0"),
        ([0.1, 0.2, 0.3], [0, 0, 1], [True, True, False], "are all 0"),
        ([0.1, 0.2], [1, 1], None, "are all 1"),
    ],
)
def test_check_binary_says_which(scores, labels, mask, message):
    with pytest.raises(ValueError, match=message) as error:
        binary.check_binary(scores, labels, mask, "relevance")
    assert "relevance" in str(error.value) or "scores" in str(error.value)
    binary.check_binary([0.1, np.nan, 0.3], [0, 7, 1], [True, False, True])
