"""The exemplar memory and the half-and-half batches."""

import numpy as np
import pytest

from data.replay import ReplayMemory, half_memory
from data.stream import ArrayStream, DataError

LABELS = np.array([0, 1, 1, 0, 2, 1, 1, 0, 1, 2])
IDS = np.arange(10) + 100


def test_memory_keeps_random_examples_of_the_right_class():
    memory = ReplayMemory.empty(4, 3)
    assert memory.slots.shape == (4, 3) and not len(memory.ids) and not len(memory.classes)
    full = memory.add(IDS, LABELS, [1, 2], seed=3)
    assert full.slots.shape == (4, 3) and not len(memory.ids)  # the old one is unchanged
    assert list(full.classes) == [1, 2]
    assert set(full.slots[1]) <= set(IDS[LABELS == 1]) and len(set(full.slots[1])) == 3
    assert sorted(full.slots[2]) == [-1, 104, 109]  # fewer than slots: kept whole
    assert (full.slots[[0, 3]] == -1).all()
    np.testing.assert_array_equal(full.ids, [*full.slots[1], *full.slots[2, :2]])


def test_choice_depends_on_seed_and_class_alone():
    memory = ReplayMemory.empty(3, 2)
    alone, together = memory.add(IDS, LABELS, [1], 5), memory.add(IDS, LABELS, [0, 1], 5)
    np.testing.assert_array_equal(alone.slots[1], together.slots[1])
    chosen = {tuple(memory.add(IDS, LABELS, [1], s).slots[1]) for s in range(12)}
    assert len(chosen) > 4
    again = together.add(IDS[:4], LABELS[:4], [0], 5)
    assert set(again.slots[0]) == {100, 103}
    np.testing.assert_array_equal(again.slots[1], together.slots[1])


def test_memory_refuses():
    with pytest.raises(DataError, match="got 0 x 3"):
        ReplayMemory.empty(0, 3)
    with pytest.raises(DataError, match="class 3 is outside the memory's 3 classes"):
        ReplayMemory.empty(3, 2).add(IDS, LABELS, [3])
    with pytest.raises(DataError, match="class 2 has no example"):
        ReplayMemory.empty(3, 2).add(IDS[:3], LABELS[:3], [2])
    with pytest.raises(DataError, match="columns of one length"):
        ReplayMemory.empty(3, 2).add(IDS[:3], LABELS, [2])


def test_half_of_every_batch_is_memory():
    new, old = np.arange(50), 100 + np.arange(14)
    order = half_memory(new, old, 8, seed=1)
    rows = order(0).reshape(-1, 8)
    assert len(rows) == (50 + 14) // 8
    assert (rows[:, :4] >= 100).all() and (rows[:, 4:] < 50).all()
    for half in (rows[:, :4], rows[:, 4:]):  # larger pools: no repeats within a batch
        assert all(len(set(r)) == 4 for r in half)
    np.testing.assert_array_equal(order(0), half_memory(new, old, 8, seed=1)(0))
    assert not np.array_equal(order(0), order(1))
    assert not np.array_equal(order(0), half_memory(new, old, 8, seed=2)(0))
    assert len(order(0)) == len(order(7))


def test_replacement_only_where_a_pool_is_not_larger():
    repeats = lambda pool: any(len(set(r[:4])) < 4 for r in half_memory(np.arange(99), pool, 8)(0).reshape(-1, 8))  # noqa: E731
    assert repeats(np.arange(3)) and repeats(np.arange(4)) and not repeats(np.arange(5))


def test_without_a_memory_all_is_new():
    rows = half_memory(np.arange(20), np.zeros(0), 8)(0).reshape(-1, 8)
    assert rows.shape == (2, 8) and rows.max() < 20 and all(len(set(r)) == 8 for r in rows)
    assert len(half_memory(np.arange(3), np.zeros(0), 8)(0)) == 8  # at least one batch
    assert len(half_memory(np.arange(20), np.arange(5), 8, batches=5)(0)) == 40
    half_memory(np.arange(20), np.zeros(0), 7)(0)


def test_half_memory_refuses():
    for args, words in (
        ((np.zeros(0), np.arange(3), 8), "no new example"),
        ((np.arange(9), np.arange(3), 7), "got 7"),
        ((np.arange(9), np.arange(3), 0), "got 0"),
        ((np.arange(9), np.zeros(0), 0), "got 0"),
        ((np.arange(9), np.arange(3), 8, 0, 0), "batches must be at least 1"),
    ):
        with pytest.raises(DataError, match=words):
            half_memory(*args)


def test_a_stream_resumes_at_any_batch():
    arrays = {"x": np.arange(60.0)}
    stream = ArrayStream(arrays, 8, half_memory(np.arange(40), 40 + np.arange(20), 8))
    assert stream.steps_per_epoch == 7
    first = [stream.batch(i)["x"] for i in range(20)]
    again = ArrayStream(arrays, 8, half_memory(np.arange(40), 40 + np.arange(20), 8)).iterate(11)
    for i in range(11, 20):
        np.testing.assert_array_equal(next(again)["x"], first[i])
    assert all(stream.batch(i)["mask"].all() for i in range(20))
    halves = [stream.batch(3, (r, 2))["x"] for r in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), first[3])
