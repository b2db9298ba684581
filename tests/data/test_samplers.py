"""Samplers: who comes, how often, with whom; the same for the same (seed, epoch)."""

import numpy as np
import pytest

from data.samplers import class_balanced, group_wise, length_bucketed, sequential, shuffled
from data.stream import ArrayStream, DataError

LABELS = np.array([0] * 10 + [1] * 7 + [2] * 3 + [3] * 12 + [9] * 8)


@pytest.mark.parametrize(
    "order",
    [
        class_balanced(LABELS, 3, 2, seed=1),
        group_wise(LABELS, seed=1),
        group_wise(LABELS, seed=1, batch_size=4),
        length_bucketed(LABELS, 6, seed=1, window=2),
        shuffled(40, 1),
        sequential(40),
    ],
)
def test_epochs_have_one_length_and_depend_on_seed_and_epoch_only(order):
    epochs = [order(e) for e in range(4)]
    assert len({len(e) for e in epochs}) == 1
    for e in (2, 0):
        np.testing.assert_array_equal(order(e), epochs[e])
    assert all(e.min() >= 0 and e.max() < len(LABELS) and e.dtype == np.int64 for e in epochs)
    stream = ArrayStream({"label": LABELS}, 6, order)
    assert stream.batch(stream.steps_per_epoch)["label"].shape == (6,)


@pytest.mark.parametrize("make", [lambda s: class_balanced(LABELS, 3, 2, s), lambda s: group_wise(LABELS, s),
                                  lambda s: length_bucketed(LABELS, 6, s)])  # fmt: skip
def test_seeds_and_epochs_differ(make):
    assert (make(0)(0) != make(1)(0)).any() and (make(0)(0) != make(0)(1)).any()


def test_p_by_k_batches():
    order = class_balanced(LABELS, 3, 2, seed=0, batches=50)(0).reshape(50, 3, 2)
    labels = LABELS[order]
    assert (labels[..., 0] == labels[..., 1]).all()
    assert all(len(set(row)) == 3 for row in labels[..., 0].tolist())
    assert (order[..., 0] != order[..., 1]).all()
    uses = np.array([(labels[..., 0] == c).sum() for c in np.unique(LABELS)])
    assert uses.max() - uses.min() <= 1
    # within a class, everyone has had a turn before anyone has another
    for c in np.unique(LABELS):
        counts = np.bincount(order[labels == c], minlength=len(LABELS))[c == LABELS]
        assert counts.max() - counts.min() <= 1
    assert len(class_balanced(LABELS, 3, 2)(0)) == 36
    assert len(class_balanced(LABELS[:2], 1, 4)(0)) == 4


def test_a_class_smaller_than_k_repeats_its_own():
    order = class_balanced(LABELS, 5, 5, seed=0, batches=1)(0).reshape(5, 5)
    small = order[LABELS[order[:, 0]] == 2][0]
    assert set(small.tolist()) == set(np.flatnonzero(LABELS == 2).tolist())


def test_groups_stay_together_and_everyone_comes_once():
    ids = group_wise(LABELS, seed=3)(0)
    assert sorted(ids) == list(range(len(LABELS)))
    assert (np.diff(LABELS[ids]) != 0).sum() == len(np.unique(LABELS)) - 1
    assert (np.diff(ids[LABELS[ids] == 0]) != 1).any()  # shuffled within


def test_batches_of_one_group():
    ids = group_wise(LABELS, seed=3, batch_size=4)(0).reshape(-1, 4)
    assert all(len(set(row)) == 1 for row in LABELS[ids].tolist())
    assert len(ids) == sum(-(-n // 4) for n in (10, 7, 3, 12, 8))
    assert set(ids.ravel().tolist()) == set(range(len(LABELS)))
    counts = np.bincount(ids.ravel())
    assert counts.max() <= 2


def test_buckets_hold_similar_lengths_and_everyone_once():
    lengths = np.random.default_rng(0).integers(1, 100, 205)
    ids = length_bucketed(lengths, 10, seed=0, window=20)(0)
    assert sorted(ids) == list(range(205))
    spread = lambda rows: np.mean([np.ptp(lengths[r]) for r in rows])  # noqa: E731
    assert spread(ids[:200].reshape(-1, 10)) < 0.15 * spread(np.arange(200).reshape(-1, 10))
    means = lengths[ids[:200].reshape(-1, 10)].mean(1)
    assert (np.diff(means) < 0).any()  # the batches are mixed
    assert sorted(length_bucketed(lengths[:5], 10)(0)) == list(range(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: class_balanced(LABELS, 6, 2), "classes_per_batch is 6, but there are 5 classes"),
        (lambda: class_balanced(LABELS, 0, 2), "must be at least 1"),
        (lambda: class_balanced(LABELS, 1, 2, batches=0), "must be at least 1"),
        (lambda: class_balanced(np.zeros((2, 2)), 1, 1), r"labels must be a column \[N\]"),
        (lambda: group_wise(np.zeros(0)), "groups must be a column"),
        (lambda: group_wise(LABELS, batch_size=0), "batch_size must be at least 1"),
        (lambda: length_bucketed(LABELS, 0), "batch_size and window must be at least 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(DataError, match=message):
        make()
