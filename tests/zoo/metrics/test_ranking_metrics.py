"""Ranking metrics against loops over Python lists, and the released code's numbers."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics import ranking

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "dsl_official.npz")


def pad(lists, width=None):
    width = width or max(map(len, lists))
    return jnp.array([list(x) + [-1] * (width - len(x)) for x in lists], jnp.int32)


def loop(scores, relevant, exclude, k, denominator="relevant"):
    """Recall, precision, NDCG and hit rate of one user, from the definitions."""
    allowed = [j for j in range(len(scores)) if j not in exclude]
    best = sorted(allowed, key=lambda j: (-scores[j], j))[:k]
    found = [j in relevant for j in best]
    possible = min(k, len(relevant)) if denominator == "min" else len(relevant)
    dcg = sum(h / math.log2(n + 2) for n, h in enumerate(found))
    ideal = sum(1 / math.log2(n + 2) for n in range(min(k, len(relevant))))
    return {"recall": sum(found) / possible, "precision": sum(found) / k, "ndcg": dcg / ideal, "hit": float(any(found))}


def problem(seed, users=23, items=17):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (users, items)).astype(np.float32)  # with many ties
    relevant, exclude = [], []
    for _ in range(users):
        order = rng.permutation(items).tolist()
        r, e = rng.integers(0, 9), rng.integers(0, 6)
        relevant.append(order[:r])
        exclude.append(order[r : r + e])
    return scores, relevant, exclude


@pytest.mark.parametrize("denominator", ["relevant", "min"])
def test_streaming_equals_the_loop_with_ties_padding_and_masks(denominator):
    scores, relevant, exclude = problem(0)
    ks = (1, 3, 10)
    update = jax.jit(lambda a, *x: ranking.ranking_update(a, *x, ks=ks, denominator=denominator))
    total = ranking.ranking_init(ks)
    masks = []
    for start in range(0, 23, 8):
        rows = [min(start + i, 22) for i in range(8)]
        mask = np.array([start + i < 23 and (start + i) % 5 != 4 for i in range(8)])
        masks += [r for r, m in zip(rows, mask, strict=True) if m]
        parts = pad([relevant[r] for r in rows], 9), pad([exclude[r] for r in rows], 6)
        total = update(total, jnp.asarray(scores[rows]), *parts, jnp.asarray(mask))
    got = ranking.ranking_compute(total)
    seen = [u for u in masks if relevant[u]]
    assert total["count"] == len(seen) < len(masks)
    for k in ks:
        want = [loop(scores[u], relevant[u], exclude[u], k, denominator) for u in seen]
        for name in ranking.METRICS:
            np.testing.assert_allclose(got[f"{name}@{k}"], np.mean([w[name] for w in want]), rtol=1e-5)


def test_released_numbers():
    truth = [[1, 4, 7], [2], [0, 1, 2, 3, 4, 5]]
    ranked, relevant = jnp.asarray(GOLDEN["rank_pred"], jnp.int32), pad(truth)
    np.testing.assert_allclose(ranking.recall_at_k(ranked, relevant, 4).mean(), GOLDEN["rank_recall"], rtol=1e-6)
    np.testing.assert_allclose(ranking.precision_at_k(ranked, relevant, 4).mean(), GOLDEN["rank_precision"], rtol=1e-6)
    np.testing.assert_allclose(ranking.ndcg_at_k(ranked, relevant, 4).mean(), GOLDEN["rank_ndcg"], rtol=1e-6)


def test_top_k_ids():
    scores = jnp.array([[1.0, 3.0, 3.0, 2.0, jnp.nan]])
    assert ranking.top_k_ids(scores, 3).tolist() == [[1, 2, 3]]  # ties: the lower id first
    assert ranking.top_k_ids(scores, 4, jnp.array([[1, -1, 3]])).tolist() == [[2, 0, -1, -1]]
    # -1 in the list of exclusions is padding, not the last item
    assert ranking.top_k_ids(jnp.array([[0.0, 1.0]]), 1, jnp.array([[-1]])).tolist() == [[1]]


def test_hand_values_and_empty_queries():
    ranked = jnp.array([[5, 2, 9, -1], [0, 1, 2, 3]])
    relevant = jnp.array([[9, 5, -1], [-1, -1, -1]])
    assert ranking.hits(ranked, relevant).tolist() == [[True, False, True, False], [False] * 4]
    assert ranking.recall_at_k(ranked, relevant, 2).tolist() == [0.5, 0]
    assert ranking.recall_at_k(ranked, relevant, 1, "min").tolist() == [1, 0]
    np.testing.assert_allclose(ranking.ndcg_at_k(ranked, relevant, 3), [1.5 / (1 + 1 / np.log2(3)), 0], rtol=1e-6)
    assert ranking.hit_rate_at_k(ranked, relevant, 1).tolist() == [1, 0]
    np.testing.assert_allclose(ranking.precision_at_k(ranked, relevant, 3), [2 / 3, 0], rtol=1e-6)
    assert ranking.ranking_compute(ranking.ranking_init((3,)))["recall@3"] == 0


def test_bad_input():
    with pytest.raises(ValueError, match="k must be between 1 and the number of items 4, got 5"):
        ranking.top_k_ids(jnp.zeros((1, 4)), 5)
    with pytest.raises(ValueError, match="ranked list's length 2, got 3"):
        ranking.recall_at_k(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 1), jnp.int32), 3)
