"""Factor images and listed images: what is in them, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from data.factors import COLOURS, factor_images, listed_images
from data.stream import DataError


def test_the_label_is_the_combination_of_independent_factors():
    d = factor_images(1, train=360, validation=36, test=36)
    t = d["train"]
    assert t["x"].shape == (360, 24, 24, 3) and t["x"].dtype == np.float32 and np.abs(t["x"]).max() <= 1
    np.testing.assert_array_equal(t["label"], (t["colour"] * 3 + t["shape"]) * 2 + t["texture"])
    assert np.bincount(t["label"]).tolist() == [20] * 18 and d.info["num_classes"] == 18
    assert factor_images(1, train=360, validation=36, test=36).fingerprint == d.fingerprint
    assert factor_images(2, train=360, validation=36, test=36).fingerprint != d.fingerprint


def test_the_factors_are_what_they_are_called():
    t = factor_images(0, 3, 4, 3, train=360, validation=72, test=72, size=32, noise=0.0)["train"]
    area = t["mask"].sum((1, 2))
    assert area.min() > 20 and area.max() < 32 * 32 / 2
    for i in range(60):
        mask, rgb = t["mask"][i], (t["x"][i] + 1) / 2
        inside = rgb[mask]
        bright = inside[inside.sum(1) > 0.8 * inside.sum(1).max()].mean(0)
        cosine = (COLOURS[:3] @ bright) / np.linalg.norm(COLOURS[:3], axis=1)
        assert cosine.argmax() == t["colour"][i]
        ground = rgb[~mask]
        assert np.ptp(ground) < 1e-6  # no noise: one grey
        levels = inside.sum(1)
        dark = (levels < 0.7 * levels.max()).mean()
        assert dark == 0 if t["texture"][i] == 0 else 0.2 < dark < 0.8
        # squares fill their box, triangles and crosses much less
        rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
        filled = mask.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
        low, high = {0: (0.65, 0.95), 1: (0.99, 1.0), 2: (0.35, 0.7), 3: (0.4, 0.8)}[int(t["shape"][i])]
        assert low <= filled <= high, (t["shape"][i], filled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colours": 6}, "colours must lie in 1..5, got 6"),
        ({"textures": 0}, "textures must lie in 1..3, got 0"),
        ({"validation": 30}, "18 classes need at least 2 of each in every split, got 1152, 30, 720"),
        ({"size": 15}, "size must be at least 16"),
    ],
)
def test_numbers_that_cannot_be(settings, message):
    with pytest.raises(DataError, match=message):
        factor_images(**settings)


def folder_of(tmp_path, train, test):
    for i in range(8):
        grey = np.full((20, 30, 3), 30 * i, np.uint8)
        grey[:, :5] = 255  # cut away by the middle square
        Image.fromarray(grey).save(tmp_path / f"{i}.png")
    (tmp_path / "A_train.txt").write_text("image_id class_id path\n" + train)
    (tmp_path / "A_test.txt").write_text("image_id class_id path\n" + test)
    return tmp_path


def test_listed_images(tmp_path):
    train = "".join(f"{i} {7 if i < 3 else 2} {i}.png\n" for i in range(6))
    d = listed_images(folder_of(tmp_path, train, "1 2 6.png\n2 7 7.png\n"), 16)
    assert d.info["num_classes"] == 2 and d["test"]["label"].tolist() == [0, 1]
    assert sorted(d["train"]["label"].tolist()) == [0, 0, 1, 1] and sorted(d["validation"]["label"]) == [0, 1]
    np.testing.assert_allclose(d["test"]["x"][1][:, 1:], 210 / 127.5 - 1, atol=1e-5)
    assert d["test"]["x"][1].max() < 0.7  # the white edge is gone, but for what scaling mixed into the first column
    assert d["test"]["x"].shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("0 1 0.png\n1 1\n", "", r"A_train.txt:3: expected 'id class path' with an integer class, got '1 1'"),
        ("0 x 0.png\n", "", r"A_train.txt:2: expected 'id class path'"),
        ("0 1 0.png\n1 1 1.png\n", "0 2 2.png\n", r"A_test.txt:2: class 2 has no training image"),
        ("0 1 none.png\n1 1 1.png\n", "0 1 2.png\n", r"A_train.txt:2: .*none.png is not a readable image"),
        ("", "0 1 2.png\n", r"A_train.txt: lists no images"),
        ("0 1 0.png\n1 2 1.png\n", "0 1 2.png\n", "no class has two training images"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, train, test, message):
    with pytest.raises(DataError, match=message):
        listed_images(folder_of(tmp_path, train, test), 16)


def test_a_folder_without_lists(tmp_path):
    with pytest.raises(DataError, match=r"expected one list named \*_train.txt with lines 'id class path', found 0"):
        listed_images(tmp_path)
