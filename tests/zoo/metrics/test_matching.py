"""Ranks of right items against loops, and the released metric's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics import matching

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "dbnorm_official.npz")


def loop(scores, query_item, gallery_item):
    ranks = []
    for row, item in zip(scores, query_item, strict=True):
        right = [s for s, g in zip(row, gallery_item, strict=True) if g == item]
        wrong = [s for s, g in zip(row, gallery_item, strict=True) if g != item]
        if not right:
            ranks.append(len(row))
            continue
        ranks.append(sum(s > max(right) for s in wrong) + sum(s == max(right) for s in wrong) / 2)
    return np.array(ranks, float)


def test_ranks_and_metrics_equal_the_loops():
    rng = np.random.default_rng(0)
    ranks_of = jax.jit(matching.match_ranks)
    metrics_of = jax.jit(matching.match_metrics)
    for queries in (12, 13):
        scores = rng.integers(0, 9, (queries, 70)).astype(np.float32)
        query_item, gallery_item = rng.integers(0, 11, queries), rng.integers(0, 10, 70)
        query_item[0] = 10  # shown by nothing
        ranks = ranks_of(*map(jnp.asarray, (scores, query_item, gallery_item)))
        want = loop(scores, query_item, gallery_item)
        np.testing.assert_array_equal(ranks, want)
        assert ranks[0] == 70
        mask = rng.random(queries) < 0.7
        got, real = metrics_of(ranks, jnp.asarray(mask)), want[mask]
        for k in (1, 5, 10, 50):
            np.testing.assert_allclose(got[f"r@{k}"], np.mean(real < k if k > 1 else real == 0), rtol=1e-6)
        np.testing.assert_allclose(got["median_rank"], np.median(real) + 1)
        np.testing.assert_allclose(got["mean_rank"], np.mean(real) + 1, rtol=1e-6)
        mean = np.prod([np.mean(real <= k - 1 if k == 1 else real < k) for k in (1, 5, 10)]) ** (1 / 3)
        np.testing.assert_allclose(got["geometric_mean"], mean, rtol=1e-5)


def test_constant_scores_are_no_perfect_ranking():
    ranks = matching.match_ranks(jnp.ones((2, 5)), jnp.array([0, 3]), jnp.arange(5))
    assert ranks.tolist() == [2.0, 2.0]
    # of several right items the best counts, and right items never push each other down
    ranks = matching.match_ranks(jnp.array([[3.0, 2.0, 2.0, 1.0]]), jnp.array([7]), jnp.array([1, 7, 7, 7]))
    assert ranks.tolist() == [1.0]
    nothing = matching.match_metrics(jnp.array([1.0, 2.0]), jnp.zeros(2, bool))
    assert all(v == 0 for v in nothing.values())


@pytest.mark.parametrize("case", ["plain", "masked"])
def test_released_metric(case):
    scores = jnp.asarray(GOLDEN["metric_sims"])
    captions = scores.shape[0] // scores.shape[1]
    items = jnp.arange(scores.shape[1])
    ranks = matching.match_ranks(scores, jnp.repeat(items, captions), items)
    mask = jnp.asarray(GOLDEN["metric_mask"]) if case == "masked" else None
    got = matching.match_metrics(ranks, mask)
    names = {"R1": "r@1", "R5": "r@5", "R10": "r@10", "R50": "r@50", "geometric_mean_R1-R5-R10": "geometric_mean"}
    for theirs, ours in names.items():
        np.testing.assert_allclose(100 * got[ours], GOLDEN[f"metric_{case}_{theirs}"], atol=0.0501)  # it rounds to 0.1
    np.testing.assert_allclose(got["median_rank"], GOLDEN[f"metric_{case}_MedR"])
    np.testing.assert_allclose(got["mean_rank"], GOLDEN[f"metric_{case}_MeanR"], atol=0.0501)
