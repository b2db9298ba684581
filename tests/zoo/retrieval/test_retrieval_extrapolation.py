"""Resampling of queries: overlaps, ReSTrain, ReSTTest, reports, against loops from the definition and hand cases."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.base import Context
from zoo.nn.mlp import MLP
from zoo.nn.retriever import query_tower
from zoo.ops.kmeans import kmeans
from zoo.retrieval import retrieval_extrapolation as method

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "retrieval_extrapolation_official.npz")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def queries():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_label_overlap_by_hand():
    train, test = jnp.array([[1, 2, -1]]), jnp.array([[2, -1], [3, -1], [1, 2]])
    share, which = method.label_overlap(train, test, 4)
    assert float(share) == pytest.approx(2 / 3) and which.tolist() == [True, False, True]
    share, which = method.label_overlap(train, test, 4, min_overlap=2)
    assert float(share) == pytest.approx(1 / 3) and which.tolist() == [False, False, True]
    # queries without a label stay in the denominator, and a passage listed twice is one
    share, which = method.label_overlap(train, jnp.array([[-1, -1], [2, 2]]), 4, 2)
    assert float(share) == 0 and float(method.label_overlap(train, jnp.array([[-1], [2]]), 4)[0]) == 0.5
    # the last passage counts as any other, and padding is none
    assert method.label_overlap(jnp.array([[3, -1]]), jnp.array([[3, 0], [0, -1]]), 4)[1].tolist() == [True, False]


def test_label_overlap_is_the_released_script():
    found = method.label_overlap(jnp.asarray(GOLDEN["train"]), jnp.asarray(GOLDEN["test"]), 45, 2)
    assert int(found[1].sum()) == int(GOLDEN["count"]) > 2
    assert float(found[0]) == pytest.approx(int(GOLDEN["count"]) / len(GOLDEN["test"]))


@pytest.mark.parametrize("chunk", [7, 60])
def test_largest_similarity(queries, chunk):
    train, test = queries
    want = (unit(train) @ unit(test).T).max(1)
    got = method.max_similarity_to_test(jnp.asarray(train), jnp.asarray(test), chunk)
    np.testing.assert_allclose(got, want, atol=1e-6)
    share, which = method.query_overlap(jnp.asarray(train), jnp.asarray(test), 0.8)
    wanted = (unit(test) @ unit(train).T).max(1) >= 0.8
    np.testing.assert_array_equal(which, wanted)
    assert float(share) == pytest.approx(wanted.mean())


# --- ReSTrain ---------------------------------------------------------------------------------------------------------


def round_robin(train, test, size):
    """Every test query's nearest, then every one's second nearest, ...: from the definition."""
    ranked = [np.argsort(-(unit(train) @ row), kind="stable") for row in unit(test)]
    chosen = []
    for rank in range(len(train)):
        for own in ranked:
            if own[rank] not in chosen:
                chosen.append(int(own[rank]))
                if len(chosen) == size:
                    return chosen, rank + 1
    raise AssertionError


@pytest.mark.parametrize("size", [1, 5, 12, 20])
def test_interpolation_sets_are_round_robins(queries, size):
    train, test = queries
    found = method.restrain(jnp.asarray(train), jnp.asarray(test), [size], jax.random.key(0))
    chosen, reached = round_robin(train, test, size)
    assert found.interpolation[0].tolist() == chosen and found.neighbourhood == reached
    ranked = np.argsort(-(unit(test) @ unit(train).T), 1)[:, :reached]
    assert not set(found.extrapolation[0].tolist()) & set(ranked.ravel().tolist())
    assert found.available == 60 - len(np.unique(ranked)) and len(found.extrapolation[0]) == size
    assert len(set(found.extrapolation[0].tolist())) == size


def test_sets_are_nested_disjoint_and_as_asked(queries):
    train, test = (jnp.asarray(x) for x in queries)
    sizes = [20, 4, 11]
    for order in ("random", "least_similar"):
        found = method.restrain(train, test, sizes, jax.random.key(1), order)
        for sets in (found.interpolation, found.extrapolation):
            assert [len(s) for s in sets] == sizes
            np.testing.assert_array_equal(sets[0][:11], sets[2])
            np.testing.assert_array_equal(sets[2][:4], sets[1])
        assert not set(found.interpolation[0].tolist()) & set(found.extrapolation[0].tolist())
    near = np.asarray(method.max_similarity_to_test(train, test))[found.extrapolation[0]]
    assert (np.diff(near) >= 0).all()
    again = method.restrain(train, test, sizes, jax.random.key(2))
    assert not np.array_equal(
        again.extrapolation[0], method.restrain(train, test, sizes, jax.random.key(1)).extrapolation[0]
    )


def test_the_order_of_training_queries_does_not_matter(queries):
    train, test = queries
    order = np.random.default_rng(3).permutation(60)
    a = method.restrain(jnp.asarray(train), jnp.asarray(test), [13], jax.random.key(0)).interpolation[0]
    b = method.restrain(jnp.asarray(train[order]), jnp.asarray(test), [13], jax.random.key(0)).interpolation[0]
    np.testing.assert_array_equal(order[b], a)


def test_lengths_do_not_matter_and_duplicates_of_a_test_query_are_near(queries):
    train, test = (x.copy() for x in queries)
    train[33] = 5 * test[2]
    found = method.restrain(jnp.asarray(train), jnp.asarray(test), [5], jax.random.key(0))
    assert 33 in found.interpolation[0].tolist()


def test_a_wider_neighbourhood_is_kept_free(queries):
    train, test = queries
    found = method.restrain(jnp.asarray(train), jnp.asarray(test), [5], jax.random.key(0), neighbourhood=9)
    ranked = np.argsort(-(unit(test) @ unit(train).T), 1)[:, :9]
    assert found.neighbourhood == 9 and found.available == 60 - len(np.unique(ranked))
    assert not set(found.extrapolation[0].tolist()) & set(ranked.ravel().tolist())
    with pytest.raises(ValueError, match=r"neighbourhood must be in \[3, 60\]: the largest .* reaches rank 3; got 2"):
        method.restrain(jnp.asarray(train), jnp.asarray(test), [12], jax.random.key(0), neighbourhood=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([40],), r"only \d+ of 40 queries are outside the top-\d+ neighbourhoods"),
        (([61],), "sizes must be between 1 and the 60 training queries, at least one of them; got \\[61\\]"),
        (([],), "at least one of them"),
        (([0],), "sizes must be between 1"),
        (([3], "nearest"), "order must be 'random' or 'least_similar', got 'nearest'"),
    ],
)
def test_restrain_refuses(queries, arguments, says):
    train, test = (jnp.asarray(x) for x in queries)
    sizes, *rest = arguments
    with pytest.raises(ValueError, match=says):
        method.restrain(train, test, sizes, jax.random.key(0), *rest)


# --- ReSTTest ---------------------------------------------------------------------------------------------------------


def test_directions_are_clustered():
    rng = np.random.default_rng(5)
    centres = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    label = rng.integers(0, 3, 90)
    x = (centres[label] + 0.05 * rng.normal(size=(90, 3))) * rng.uniform(0.1, 30, (90, 1))  # of any length
    found = kmeans(jax.random.key(0), jnp.asarray(x, jnp.float32), 3, 20, spherical=True)
    for b in range(3):
        assert len(set(label[np.asarray(found.assignment) == b])) == 1
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5)
    cosines = unit(x) @ np.asarray(found.centroids).T
    np.testing.assert_array_equal(found.assignment, cosines.argmax(1))
    assert float(found.inertia) == pytest.approx((2 - 2 * cosines.max(1)).sum(), rel=1e-3)
    inertia = [
        float(kmeans(jax.random.key(3), jnp.asarray(x, jnp.float32), 4, i, spherical=True).inertia) for i in (0, 1, 5)
    ]
    assert inertia[0] >= inertia[1] - 1e-4 and inertia[1] >= inertia[2] - 1e-4


def test_runs_partition_the_test_queries(queries):
    train, test = (jnp.asarray(x) for x in (queries[0], np.concatenate([queries[1]] * 4 + [queries[0][:20]])))
    a, b = method.resttest(train, test, jax.random.key(0), 3)
    runs = list(method.resttest_runs(a, b))
    assert len(runs) == 3 and sorted(np.concatenate([r.extrapolation for r in runs]).tolist()) == list(range(40))
    for n, run in enumerate(runs):
        np.testing.assert_array_equal(run.extrapolation, np.flatnonzero(np.asarray(b) == n))
        assert sorted([*run.interpolation, *run.extrapolation]) == list(range(40))
        np.testing.assert_array_equal(run.train, np.flatnonzero(np.asarray(a) != n))
    # equal queries fall into one bucket, whichever set they are from
    np.testing.assert_array_equal(np.asarray(b)[20:], np.asarray(a)[:20])


def test_runs_refuse(queries):
    train, test = (jnp.asarray(x) for x in queries)
    for k in (1, 66):
        with pytest.raises(ValueError, match=rf"k must be in \[2, 65\], the number of queries; got {k}"):
            method.resttest(train, test, jax.random.key(0), k)
    with pytest.raises(ValueError, match="all queries are in one bucket"):
        list(method.resttest_runs([0, 0], [0, 0]))
    with pytest.raises(ValueError, match="bucket 2 has no test queries"):
        list(method.resttest_runs([0, 1, 2], [0, 1]))
    with pytest.raises(ValueError, match="bucket 0 has no others to test"):
        list(method.resttest_runs([0, 1], [0, 0]))
    with pytest.raises(ValueError, match="bucket 0 has no training queries outside it"):
        list(method.resttest_runs([0, 0], [0, 1]))


# --- reports ----------------------------------------------------------------------------------------------------------


def test_report_by_hand():
    found = method.report([([1.0, 0.0], [0.5]), ([1.0], [0.0, 0.25, 0.25])])
    assert found.interpolation == pytest.approx(0.75) and found.extrapolation == pytest.approx((0.5 + 1 / 6) / 2)
    assert found.gap == pytest.approx(found.extrapolation - 0.75)
    assert found.relative == pytest.approx(found.gap / 0.75)
    assert found.interpolation_pooled == pytest.approx(2 / 3) and found.extrapolation_pooled == pytest.approx(0.25)
    np.testing.assert_allclose(found.per_run, [[0.5, 0.5], [1, 1 / 6]])
    assert np.isnan(method.report([([0.0], [0.0])]).relative)
    for bad in ([], [([], [1.0])]):
        with pytest.raises(ValueError, match="at least one run, and queries on both sides"):
            method.report(bad)


def test_a_fixed_scorer_has_no_gap_over_all_queries(queries):
    """Each query is outside once and inside k - 1 times, so the pooled means of an untrained scorer are equal."""
    rng = np.random.default_rng(6)
    test = rng.normal(size=(40, 4)).astype(np.float32)
    a, b = method.resttest(jnp.asarray(queries[0]), jnp.asarray(test), jax.random.key(1), 4)
    scores = rng.random(40)
    trained = []
    found = method.evaluate_protocol(
        lambda rows, n: trained.append((n, rows)), lambda model, rows: scores[rows], list(method.resttest_runs(a, b))
    )
    assert found.interpolation_pooled == pytest.approx(scores.mean())
    assert found.extrapolation_pooled == pytest.approx(scores.mean())
    assert [n for n, _ in trained] == [0, 1, 2, 3]
    for n, rows in trained:
        np.testing.assert_array_equal(rows, np.flatnonzero(np.asarray(a) != n))


def test_the_retriever_masks_documents_that_stand_twice():
    objective = method.in_batch_retriever(query_tower(MLP((4,), 3)), 0.5)
    rng = np.random.default_rng(7)
    batch = {"query": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), "document_id": jnp.array([5, 6, 5, 7]),
             "document": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "mask": jnp.array([True] * 3 + [False]),
             "index": jnp.arange(4)}  # fmt: skip
    context = Context(rng=jax.random.key(0), train=False)
    variables = objective.init(jax.random.key(0), batch)
    outputs, _ = objective.forward(variables, batch, context)
    got = objective.loss(outputs, batch, context).elements
    scores = np.asarray(outputs["query"] @ batch["document"].T, np.float64) / 0.5
    for i, among in enumerate([[0, 1], [0, 1, 2], [1, 2]]):
        assert got.values[i] == pytest.approx(np.log(np.exp(scores[i, among]).sum()) - scores[i, i], abs=1e-5)
    assert got.mask.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b: (a, b[:, :3]), "training queries have 4 dimensions, test queries 3: embed both with one encoder"),
        (lambda a, b: (a[:0], b), r"\[n, d\] with n >= 1; got \[0, 4\] and"),
        (
            lambda a, b: (np.where(np.arange(60)[:, None] == 7, np.nan, a), b),
            "vector of training query 7 is not finite",
        ),
        (lambda a, b: (a, np.where(np.arange(5)[:, None] == 2, 0, b)), r"vector of test query 2 is zero \(1 such\)"),
    ],
)
def test_bad_vectors_are_named(queries, change, says):
    with pytest.raises(ValueError, match=says):
        method.check_embeddings(*change(*queries))


def test_test_queries_among_the_training_queries_are_a_leak(queries):
    with pytest.raises(ValueError, match="2 test queries are among the training queries, which leaks: a, c"):
        method.check_embeddings(*queries, ["a", "b", "c"], ["c", "a", "z"])
