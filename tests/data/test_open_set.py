"""Identities nobody trains on: what is held out, what is turned, and what is refused."""

import numpy as np
import pytest

from data.dataset import Dataset
from data.images import digits
from data.open_set import open_set, shuffled_digits
from data.stream import DataError


def small(shape=(3, 3, 1), train=(0, 1, 2, 2), test=(2, 0, 1)):
    rng = np.random.default_rng(0)
    part = lambda labels: {"x": rng.normal(size=(len(labels), *shape)), "label": np.array(labels, np.int32)}  # noqa: E731
    return Dataset("small", {"train": part(train), "test": part(test)}, {"num_classes": 3})


def test_held_out_classes_come_first_and_turned_copies_after():
    data = small()
    queries, gallery, identities = open_set(data, 1, True)
    assert identities == 4
    np.testing.assert_array_equal(queries["label"], [0, 0, 1, 2, 3, 3])
    np.testing.assert_array_equal(gallery["label"], [0, 3, 1, 2])
    x = data["train"]["x"]
    np.testing.assert_array_equal(queries["x"][:2], x[2:])
    for i in range(4):  # a quarter turn of each image, none of the batch
        np.testing.assert_array_equal(queries["x"][2 + i, :, :, 0], np.rot90(x[i, :, :, 0]))


def test_without_turned_copies():
    queries, gallery, identities = open_set(small(), 2, False)
    assert identities == 2
    np.testing.assert_array_equal(queries["label"], [0, 1, 1])
    np.testing.assert_array_equal(gallery["label"], [1, 0])
    assert open_set(small((5,)), 2, False)[2] == 2


def test_what_is_refused():
    for data, args, words in (
        (small(), (1, False), "1 held-out classes without turned copies are 1 identities"),
        (small((3, 4, 1)), (1, True), r"only square images \[N, S, S, C\] can be turned; 'small' has \[4, 3, 4, 1\]"),
        (small((4,)), (1, True), "only square images"),
        (small(train=(0, 1, 0)), (2, False), "identity 1 of 'small' has no query image in the train split"),
        (small(test=(0, 2, 2)), (1, True), "identity 2 of 'small' has no gallery image in the test split"),
    ):
        with pytest.raises(DataError, match=words):
            open_set(data, *args)


def test_digits_are_split_and_named_anew_by_seed():
    a, b, again, whole = shuffled_digits(1), shuffled_digits(2), shuffled_digits(1), digits()
    assert a.fingerprint == again.fingerprint != b.fingerprint
    assert len(a["test"]["x"]) == 360 and len(a["train"]["x"]) == 1437

    def key(d):
        return {(x.tobytes(), int(y)) for s in ("train", "test") for x, y in zip(d[s]["x"], d[s]["label"], strict=True)}

    old, new = dict(key(whole)), dict(key(a))
    assert old.keys() == new.keys()
    names = {(old[k], new[k]) for k in old}  # every class has one new name
    assert len(names) == 10 and any(o != n for o, n in names)
