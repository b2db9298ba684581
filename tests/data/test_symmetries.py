"""The planted symmetries are there, and nothing else leaks."""

import numpy as np
import pytest

from data.stream import DataError
from data.symmetries import moved_digits, six_nine


def centred(split, canvas=16):
    """The 8 x 8 digits, moved back."""
    c = (canvas - 8) // 2
    moves = split.get("shift", np.zeros((len(split["x"]), 2), int))
    return np.stack([x[c + d : c + d + 8, c + r : c + r + 8, 0] for x, (d, r) in zip(split["x"], moves, strict=True)])


def test_the_classes_differ_by_a_half_turn_and_share_no_digit():
    data = six_nine(3, train=200, test=100, canvas=16, shift=4)
    train, test = data["train"], data["test"]
    assert train["x"].shape == (200, 16, 16, 1) and train["x"].dtype == np.float32 and train["label"].dtype == np.int32
    assert train["x"].min() == -1 and train["x"].max() == 1
    assert np.bincount(train["label"]).tolist() == [100, 100] and np.bincount(test["label"]).tolist() == [50, 50]
    key = lambda images: {i.tobytes() for i in images}  # noqa: E731
    faces = {}
    for name, split in (("train", train), ("test", test)):
        small = centred(split)
        upright = np.where(split["label"][:, None, None] == 1, small[:, ::-1, ::-1], small)
        zeros, ones = key(upright[split["label"] == 0]), key(upright[split["label"] == 1])
        assert not zeros & ones, "a digit shows both ways up"
        faces[name] = zeros | ones
    assert not faces["train"] & faces["test"]
    np.testing.assert_array_equal(data["turned"]["x"], np.rot90(test["x"], 2, (1, 2)))
    np.testing.assert_array_equal(data["turned"]["label"], 1 - test["label"])
    assert data.info["invariant_to"] == ("translate_x", "translate_y") and data.info["changed_by"] == ("rotate",)


def test_only_test_images_are_displaced_and_all_of_the_digit_stays():
    data = six_nine(0, train=50, test=300, canvas=16, shift=4)
    moves = data["test"]["shift"]
    assert set(np.unique(moves)) == set(range(-4, 5)) and "shift" not in data["train"]
    inside = centred(data["test"])
    outside = (data["test"]["x"] + 1).sum((1, 2, 3)) - (inside + 1).sum((1, 2))
    np.testing.assert_allclose(outside, 0, atol=1e-4)
    np.testing.assert_allclose(
        (data["train"]["x"] + 1).sum((1, 2, 3)), (centred(data["train"]) + 1).sum((1, 2)), rtol=1e-5
    )


def test_seeds_decide_and_labels_can_be_swapped():
    assert six_nine(1).fingerprint == six_nine(1).fingerprint != six_nine(2).fingerprint
    plain, noisy = six_nine(5, train=100), six_nine(5, train=100, flips=0.2)
    np.testing.assert_array_equal(plain["train"]["x"], noisy["train"]["x"])
    assert np.sum(plain["train"]["label"] != noisy["train"]["label"]) == 20
    np.testing.assert_array_equal(plain["test"]["label"], noisy["test"]["label"])


def test_a_share_of_the_digits_is_moved():
    data = moved_digits(0, share=0.25, canvas=12, shift=2, turn=30.0)
    train, test = data["train"], data["test"]
    assert train["x"].shape == (1437, 12, 12, 1) and len(test["x"]) == 360 and data.info["num_classes"] == 10
    assert train["moved"].sum() == round(0.25 * 1437) and test["moved"].all()
    still = train["x"][~train["moved"]]
    frame = still.copy()
    frame[:, 2:10, 2:10] = -1
    assert (frame == -1).all() and still.max() == 1
    assert (train["x"][train["moved"]][:, :2] > -1).any() and train["x"].min() >= -1
    upright = moved_digits(0, share=0.0, turn=0.0, shift=0)
    np.testing.assert_array_equal(upright["test"]["label"], test["label"])
    assert (upright["test"]["x"][:, :2] == -1).all()


def test_displacement_by_hand():
    one = moved_digits(0, share=0.0, turn=0.0, shift=2)["test"]["x"][..., 0]
    base = moved_digits(0, share=0.0, turn=0.0, shift=0)["test"]["x"][..., 0]
    offsets = set()
    for a, b in zip(one, base, strict=True):
        hits = [(d, r) for d in range(-2, 3) for r in range(-2, 3) if np.array_equal(a, np.roll(b, (d, r), (0, 1)))]
        assert hits
        offsets.add(hits[0])
    assert len(offsets) > 15


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (six_nine, {"canvas": 7}, "canvas of 7"),
        (six_nine, {"canvas": 10}, "0 to 1 pixels, got 2"),
        (six_nine, {"train": 1}, "at least 2"),
        (six_nine, {"flips": 0.5}, "below one half"),
        (moved_digits, {"shift": -1}, "got -1"),
        (moved_digits, {"share": 1.5}, "share"),
        (moved_digits, {"test": 0}, "1,797"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(make, change, says):
    with pytest.raises(DataError, match=says):
        make(0, **change)
