"""Task streams: classes in sessions, days in order."""

import numpy as np
import pytest

from data.dataset import Dataset
from data.stream import DataError
from data.tasks import class_incremental, rows, streaming_days


def dataset(classes=8, per_class=6, info=True):
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class)).astype(np.int32)
    test = np.repeat(np.arange(classes), 2).astype(np.int32)
    splits = {
        "train": {"x": np.arange(len(label)), "label": label},
        "test": {"x": -np.arange(len(test)), "label": test},
    }
    return Dataset("toy", splits, {"num_classes": classes} if info else {})


@pytest.mark.parametrize("info", [True, False])
def test_sessions(info):
    data = dataset(info=info)
    tasks = class_incremental(data, base=4, way=2, shot=3)
    assert [t.name for t in tasks] == ["base", "session 1", "session 2"]
    assert sorted(c for t in tasks for c in t.classes) == list(range(8))
    assert [len(t.train) for t in tasks] == [24, 6, 6] and [len(t.test) for t in tasks] == [8, 4, 4]
    for task in tasks:
        train, test = rows(data["train"], task.train), rows(data["test"], task.test)
        assert set(train["label"]) == set(test["label"]) == set(task.classes)
        np.testing.assert_array_equal(train["x"], task.train)
        assert len(set(task.train.tolist())) == len(task.train)
    for task in tasks[1:]:
        assert (np.bincount(data["train"]["label"][task.train])[list(task.classes)] == 3).all()


def test_few_shot_choice_depends_on_seed_and_class_only():
    data = dataset()
    shots = {}
    for way, order in ((1, None), (2, [7, 6, 5, 4, 3, 2, 1, 0]), (4, None)):
        for task in class_incremental(data, base=0 if way == 4 else 2, way=way, shot=2, order=order, seed=5)[
            way != 4 :
        ]:
            for c in task.classes:
                ids = [i for i in task.train if data["train"]["label"][i] == c]
                assert shots.setdefault(c, ids) == ids
    members = {c: np.flatnonzero(data["train"]["label"] == c).tolist() for c in shots}
    assert len({tuple(members[c].index(i) for i in ids) for c, ids in shots.items()}) > 1  # not the same places in all
    a, b = (class_incremental(data, 4, 2, 3, seed=s) for s in (0, 1))
    assert [t.classes for t in a] != [t.classes for t in b]
    again = class_incremental(data, 4, 2, 3, seed=0)
    assert all((x.train == y.train).all() and x.classes == y.classes for x, y in zip(a, again, strict=True))
    plain = class_incremental(data, 4, 2, 1, seed=None)
    assert [t.classes for t in plain] == [(0, 1, 2, 3), (4, 5), (6, 7)]
    assert plain[1].train.tolist() == sorted(np.flatnonzero(data["train"]["label"] == c)[0] for c in (4, 5))


def test_without_a_base_session_and_without_shots():
    tasks = class_incremental(dataset(), base=0, way=4)
    assert [t.name for t in tasks] == ["session 0", "session 1"] and [len(t.train) for t in tasks] == [24, 24]
    few = class_incremental(dataset(), base=0, way=4, shot=2)
    assert [len(t.train) for t in few] == [8, 8]
    assert len(class_incremental(dataset(), base=8, way=3)) == 1


def without(data, split, c):
    keep = data[split]["label"] != c
    return Dataset("toy", {**data.splits, split: rows(data[split], keep)}, data.info)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: class_incremental(without(dataset(), "train", 3), 4, 2), "class 3 has no example in split 'train'"),
        (lambda: class_incremental(without(dataset(), "test", 5), 4, 2), "class 5 has no example in split 'test'"),
        (lambda: class_incremental(dataset(), 4, 2, 7, seed=None), "class 4 has 6 examples .* fewer than shot = 7"),
        (lambda: class_incremental(dataset(), 3, 2), "5 classes after the base session do not divide"),
        (lambda: class_incremental(dataset(), 9, 2), r"base must lie in \[0, 8\]"),
        (lambda: class_incremental(dataset(), 4, 0), "way and shot be at least 1"),
        (lambda: class_incremental(dataset(), 4, 2, order=[0, 1, 2, 3, 4, 5, 6, 6]), "each of its 8 classes once"),
        (lambda: class_incremental(dataset(), 4, 2, label="y"), "needs a field 'y' in its split 'train'"),
        (lambda: class_incremental(Dataset("d", dict.fromkeys(("train", "test"), {"label": np.zeros(3)})), 0, 1),
         "must be integers"),
        (lambda: class_incremental(Dataset("d", dataset().splits, {"num_classes": 6}), 4, 2), "label 6 is not one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def days(times):
    return Dataset("clicks", {"train": {"timestamp": np.asarray(times), "x": np.arange(len(times))}})


def test_days_follow_one_another():
    times = np.array([3.0, 2.5, 0.2, 0.1, 0.9, 2.9, 5.0, 2.5]) * 86400
    tasks = streaming_days(days(times))
    assert [t.name for t in tasks] == ["day 0", "day 2", "day 3", "day 5"]
    assert [t.train.tolist() for t in tasks] == [[3, 2, 4], [1, 7, 5], [0], [6]]
    assert [t.test.tolist() for t in tasks] == [[1, 7, 5], [0], [6], []]
    assert all(t.start <= times[i] < t.stop for t in tasks for i in t.train)
    assert len(streaming_days(days(times), seconds=86400 * 10)) == 1


def test_datetimes_and_midnight():
    times = np.array(["2024-01-01T23:59:59.5", "2024-01-02T00:00:00", "2024-01-02T10:00:00"], "datetime64[ms]")
    assert [t.train.tolist() for t in streaming_days(days(times))] == [[0], [1, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: streaming_days(days([1.0, np.nan])), "row 1 has no time"),
        (lambda: streaming_days(days(np.array(["NaT"], "datetime64[s]"))), "row 0 has no time"),
        (lambda: streaming_days(days([1.0]), "time"), "no field 'time'; it has timestamp, x"),
        (lambda: streaming_days(days([1.0]), seconds=0), "seconds must be positive"),
        (lambda: streaming_days(days(np.zeros((2, 2)))), "must be a column of times"),
    ],
)
def test_bad_times_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()
