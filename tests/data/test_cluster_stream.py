"""Batches of one cluster each, in turn, and the stream that names the learner and takes its clusters from artefacts."""

import numpy as np
import pytest

from data.cluster_stream import cluster_stream
from data.samplers import cluster_round_robin
from data.stream import DataError

LABELS = np.repeat(np.arange(4), 12)
CLUSTERS = np.where(np.arange(48) % 12 < 8, 0, 1)
CLUSTERS[0] = -1


def test_clusters_take_turns_and_short_ones_begin_again():
    order = cluster_round_robin(LABELS, CLUSTERS, 2, 2, 2, seed=1)
    rows = order(0).reshape(-1, 4)
    # 31 examples in the larger cluster make 7 batches; the other, of 16, has as many
    assert len(rows) == 14
    for i, row in enumerate(rows):
        assert (CLUSTERS[row] == i % 2).all()
        labels = LABELS[row].reshape(2, 2)
        assert (labels[:, 0] == labels[:, 1]).all() and labels[0, 0] != labels[1, 0]
        assert len(set(row.tolist())) == 4
    small = np.bincount(rows[1::2].ravel(), minlength=48)[CLUSTERS == 1]
    assert small.min() >= 1 and small.max() >= 2 and small.max() - small.min() <= 1
    assert 0 not in rows
    np.testing.assert_array_equal(order(0), cluster_round_robin(LABELS, CLUSTERS, 2, 2, 2, seed=1)(0))
    assert (order(0) != order(1)).any()
    assert (order(0) != cluster_round_robin(LABELS, CLUSTERS, 2, 2, 2, seed=2)(0)).any()


def test_a_fixed_number_of_batches_and_clusters_that_lack_something():
    rows = cluster_round_robin(LABELS, CLUSTERS, 2, 2, 2, batches=5)(0).reshape(5, 4)
    assert [int(CLUSTERS[r[0]]) for r in rows] == [0, 1, 0, 1, 0]
    # one class only: it comes twice; no example at all: all examples take the turn
    few = np.array([0] * 12 + [1] * 3 + [0] * 33)
    rows = cluster_round_robin(LABELS, few, 3, 2, 2, batches=6)(0).reshape(6, 4)
    assert (few[rows[1]] == 1).all() and set(LABELS[rows[1]].tolist()) == {1}
    assert len(set(LABELS[rows[2]].tolist())) == 2


@pytest.mark.parametrize(
    ("clusters", "count", "message"),
    [
        (CLUSTERS[:3], 2, "must be of the same examples, got 48 and 3"),
        (CLUSTERS, 1, r"clusters must lie in 0..0, or be -1, got -1..1"),
        (np.full(48, -1), 2, "clusters must lie in"),
        (CLUSTERS, 0, "must be at least 1"),
    ],
)
def test_clusters_that_cannot_be(clusters, count, message):
    with pytest.raises(DataError, match=message):
        cluster_round_robin(LABELS, clusters, count, 2, 2)


def test_the_stream_names_the_learner_and_is_bound_to_artefacts():
    arrays = {"x": np.arange(48.0, dtype=np.float32), "label": LABELS}
    stream = cluster_stream(arrays, 2, 2, 5, 6)
    assert stream.batch_size == 4 and stream.steps_per_epoch == 6
    assert all((stream.batch(i)["learner"] == 0).all() for i in range(3))
    bound = stream.bind({"clusters": CLUSTERS, "learners": np.int32(2), "other": 1})
    order = cluster_round_robin(LABELS, CLUSTERS, 2, 2, 2, 5, 6)
    for i in (0, 1, 4, 7):
        batch = bound.batch(i)
        assert batch["learner"].dtype == np.int32 and batch["learner"].tolist() == [i % 6 % 2] * 4
        assert (CLUSTERS[batch["index"]] == i % 2).all()
        np.testing.assert_array_equal(batch["index"], order(i // 6).reshape(6, 4)[i % 6])
        half = bound.batch(i, (1, 2))
        assert half["learner"].tolist() == [i % 2] * 2 and (half["index"] == batch["index"][2:]).all()
    # five batches do not divide by two learners: each epoch begins with the first
    odd = cluster_stream(arrays, 2, 2, 5, 5, clusters=CLUSTERS, count=2)
    assert [int(odd.batch(i)["learner"][0]) for i in (4, 5, 6)] == [0, 0, 1]
    assert all((CLUSTERS[odd.batch(i)["index"]] == odd.batch(i)["learner"]).all() for i in (4, 5, 6))
    assert stream.bind({}) is stream
    whole = cluster_stream(arrays, 2, 2, 5, 6, whole=True)
    assert whole.bind({"clusters": CLUSTERS, "learners": np.int32(2)}) is whole
    assert whole.batch(1)["learner"].tolist() == [-1] * 4
