"""Recall by calls: re-ranking all that a first stage found, the baselines, and the dip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.score_matrices import low_rank_scores
from trainers import score_recall
from zoo.retrieval import anncur


def test_recall_counts_what_is_re_ranked_or_known():
    found = np.array([[4, 2, 9, -1], [0, 1, 2, 3]])
    truth = np.array([[9, 7], [1, 5]])
    np.testing.assert_allclose(score_recall.recall_by_depth(found, truth, np.array([7])), [0.25, 0.25, 0.5, 0.75, 0.75])
    np.testing.assert_allclose(score_recall.recall_by_depth(found, truth, np.array([], int)), [0, 0, 0.25, 0.5, 0.5])
    assert score_recall.overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 0.75


def test_the_dual_encoder_has_its_rank_and_noise():
    m = low_rank_scores(0, 20, 50, 6, noise=0)["queries"]["scores"]
    np.testing.assert_allclose(score_recall.svd_retriever(m, 20, 0.0, 0), m, atol=1e-4)
    two = score_recall.svd_retriever(m[12:], 2, 0.0, 0, m[:12])
    u, s, vt = np.linalg.svd(m)
    np.testing.assert_allclose(two, ((u[:, :2] * s[:2]) @ vt[:2])[12:], atol=1e-4)
    noisy = score_recall.svd_retriever(m, 20, 0.5, 3)
    assert (noisy - m).std() == pytest.approx(0.5 * m.std(), rel=0.1)
    np.testing.assert_array_equal(score_recall.best(np.array([[1, 3, 3, 2]]), 3), [[1, 2, 3]])


def test_the_first_stage_predicts_as_the_index_does():
    m = low_rank_scores(1, 30, 80, 10, 3)["queries"]["scores"]
    anchors = np.array([3, 20, 21, 60, 79])
    found, error = score_recall.first_stage(m[:12], m[12:], anchors, 1e-3, 78)
    index = anncur.cur_fit(jnp.asarray(m[:12]), jnp.asarray(anchors))
    own = jnp.asarray(m[12:, anchors])
    predicted = np.array(anncur.cur_scores(own, index))
    assert error == pytest.approx(float(anncur.relative_error(own, index, jnp.asarray(m[12:]))), rel=1e-4)
    predicted[:, anchors] = -np.inf
    wanted = np.argsort(-predicted, 1)[:, :75]
    assert (found[:, :75] == wanted).mean() > 0.99 and (found[:, 75:] == -1).all()


def test_curves_and_dip():
    m = low_rank_scores(0)["queries"]["scores"]
    rows, exact = m[:100], m[100:150]
    truth = score_recall.best(exact, 10)
    curves = score_recall.recall_curves(rows, exact, truth, [20, 50, 200], 8, 1.0, 1e-3, jax.random.key(0))
    assert list(curves) == ["CUR", "dual encoder", "item mean", "random"]
    assert all((np.diff(c) >= 0).all() for c in curves.values())
    assert curves["CUR"][1] > curves["dual encoder"][1] > curves["item mean"][1] + 0.5
    assert curves["random"][2] == pytest.approx(200 / 3000, abs=0.03)
    dip = score_recall.recall_dip(rows, exact, truth, 30, (1e-15, 1e-3), jax.random.key(1))
    assert dip["sizes"].tolist() == [10, 30, 60, 90, 100, 110, 150]
    assert dip["recall"][0, 4] < dip["recall"][0, [2, 6]].min() - 0.01 and dip["recall"][1, 2:].min() > 0.99
    assert dip["error"][0, 4] > 3 * dip["error"][1, 4]
