"""Metrics of retrieval against loops over Python lists, hand cases, and every convention on ties and padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from zoo.metrics import ranking


def pad(lists, width, fill=-1, dtype=jnp.int32):
    return jnp.array([list(x) + [fill] * (width - len(x)) for x in lists], dtype)


def lists(seed=0, queries=30, items=12, length=9):
    rng = np.random.default_rng(seed)
    ranked = [rng.permutation(items)[:length].tolist() for _ in range(queries)]
    relevant = [rng.permutation(items)[: rng.integers(0, 6)].tolist() for _ in range(queries)]
    grades = [rng.integers(0, 4, len(r)).tolist() for r in relevant]
    return ranked, relevant, grades


def loop(ranked, relevant, grades, k, gain):
    graded = dict(zip(relevant, grades, strict=True))
    worth = (lambda g: g) if gain == "linear" else (lambda g: 2**g - 1)
    dcg = sum(worth(graded.get(d, 0)) / math.log2(n + 2) for n, d in enumerate(ranked[:k]))
    ideal = sum(worth(g) / math.log2(n + 2) for n, g in enumerate(sorted(grades, reverse=True)[:k]))
    first = next((n for n, d in enumerate(ranked[:k]) if d in graded), None)
    seen, total = 0, 0.0
    for n, d in enumerate(ranked[:k]):
        if d in graded:
            seen += 1
            total += seen / (n + 1)
    return {
        "ndcg": dcg / ideal if ideal else 0.0,
        "mrr": 0.0 if first is None else 1 / (first + 1),
        "map": total / len(relevant) if relevant else 0.0,
        "map_min": total / min(k, len(relevant)) if relevant else 0.0,
    }


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_every_metric_is_its_loop(k, gain):
    ranked, relevant, grades = lists()
    a, b, g = pad(ranked, 9), pad(relevant, 6), pad(grades, 6, 7.0, jnp.float32)
    got = jax.jit(
        lambda a, b, g: {
            "ndcg": ranking.ndcg_at_k(a, b, k, g, gain),
            "mrr": ranking.mrr_at_k(a, b, k),
            "map": ranking.average_precision_at_k(a, b, k),
            "map_min": ranking.average_precision_at_k(a, b, k, "min"),
        }
    )(a, b, g)
    for i in range(len(ranked)):
        want = loop(ranked[i], relevant[i], grades[i], k, gain)
        for name, value in want.items():
            assert got[name][i] == pytest.approx(value, abs=1e-6), (name, i)


def test_they_agree_with_sklearn_where_it_has_them():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(6, 10)).astype(np.float32)
    truth = rng.integers(0, 4, (6, 10))
    ranked = ranking.top_k_ids(jnp.asarray(scores), 10)
    ids = jnp.tile(jnp.arange(10), (6, 1))
    for k in (3, 10):
        want = [ndcg_score(truth[i : i + 1], scores[i : i + 1], k=k) for i in range(6)]
        np.testing.assert_allclose(ranking.ndcg_at_k(ranked, ids, k, jnp.asarray(truth)), want, atol=1e-6)
    relevant = jnp.where(jnp.asarray(truth) > 1, ids, -1)
    want = [average_precision_score(truth[i] > 1, scores[i]) for i in range(6)]
    np.testing.assert_allclose(ranking.average_precision_at_k(ranked, relevant, 10), want, atol=1e-6)


def test_padding_in_the_ranked_list_is_no_hit():
    ranked, relevant = jnp.array([[-1, -1, 4]]), jnp.array([[-1, 4]])
    assert ranking.mrr_at_k(ranked, relevant, 3)[0] == pytest.approx(1 / 3)
    assert ranking.ndcg_at_k(ranked, relevant, 3, jnp.array([[9.0, 1.0]]))[0] == pytest.approx(0.5)
    assert ranking.average_precision_at_k(ranked, relevant, 3)[0] == pytest.approx(1 / 3)


def test_overlap_and_exclusion():
    found, exact = jnp.array([[1, 2, 3], [4, -1, -1]]), jnp.array([[3, 9, 1], [4, 5, -1]])
    np.testing.assert_allclose(ranking.topk_overlap(found, exact), [2 / 3, 1 / 2])
    left = ranking.without_ids(jnp.array([[7, 3, 5, 1], [2, -1, 4, 6]]), jnp.array([[3, 1], [-1, 2]]))
    np.testing.assert_array_equal(left, [[7, 5, -1, -1], [4, 6, -1, -1]])


def test_target_rank_and_its_ties():
    scores = jnp.array([[2.0, 5.0, 2.0, 2.0, 9.0]])
    rank = lambda target, ties: float(ranking.target_rank(scores, jnp.array([target]), ties)[0])  # noqa: E731
    assert [rank(2, t) for t in ("id", "mean", "optimistic", "pessimistic")] == [4, 4, 3, 5]
    assert [rank(0, t) for t in ("id", "mean")] == [3, 4] and rank(4, "id") == 1 and rank(1, "mean") == 2
    # the rule "id" is the one that ranked lists follow
    ids = ranking.top_k_ids(scores, 5)[0].tolist()
    assert [ids.index(t) + 1 for t in range(5)] == [rank(t, "id") for t in range(5)]
    with pytest.raises(ValueError, match="ties must be 'id', 'mean', 'optimistic' or 'pessimistic', got 'best'"):
        ranking.target_rank(scores, jnp.array([0]), "best")


def test_means_leave_out_queries_without_targets():
    values, relevant = jnp.array([0.5, 0.0, 1.0, 0.2]), jnp.array([[1], [-1], [3], [4]])
    assert float(ranking.mean_over_queries(values, relevant)) == pytest.approx(1.7 / 3)
    assert float(ranking.mean_over_queries(values, relevant, jnp.array([True, True, True, False]))) == 0.75


def test_out_of_range_is_refused():
    ranked, relevant = jnp.array([[1, 2]]), jnp.array([[1]])
    for metric in (ranking.mrr_at_k, ranking.average_precision_at_k, ranking.ndcg_at_k):
        with pytest.raises(ValueError, match="k must be between 1 and the ranked list's length 2, got 3"):
            metric(ranked, relevant, 3)
    with pytest.raises(ValueError, match="gain must be 'linear' or 'exponential', got 'square'"):
        ranking.ndcg_at_k(ranked, relevant, 1, gain="square")
