"""Digits, the mixture, and images of one's own."""

import sys
import types

import numpy as np
import pytest

from data.images import digits, gaussian_mixture_2d, image_dataset, scale_images
from data.stream import DataError

RNG = np.random.default_rng(0)


def test_digits_are_the_bundled_ones_in_range():
    from sklearn.datasets import load_digits

    d = digits()
    train, test = d["train"], d["test"]
    assert train["x"].shape == (1437, 8, 8, 1)
    assert test["x"].shape == (360, 8, 8, 1)
    assert train["x"].dtype == np.float32
    assert train["label"].dtype == np.int32
    assert train["x"].min() == -1
    assert train["x"].max() == 1
    # every digit is in exactly one split, with its own label
    bunch = load_digits()
    known = {(i / 8 - 1).astype(np.float32).tobytes(): t for i, t in zip(bunch.images, bunch.target, strict=True)}
    both = np.concatenate([train["x"], test["x"]])
    labels = np.concatenate([train["label"], test["label"]])
    assert len({x.tobytes() for x in both}) == len(known)
    assert all(known[x.tobytes()] == t for x, t in zip(both, labels, strict=True))


def test_digits_split_never_changes():
    assert digits().fingerprint == digits().fingerprint
    assert digits(100)["test"]["x"].shape == (100, 8, 8, 1)
    assert np.bincount(digits()["test"]["label"], minlength=10).min() > 20
    with pytest.raises(DataError, match=r"test must lie in \[1, 1796\]"):
        digits(0)


def test_mixture_follows_its_ground_truth():
    d = gaussian_mixture_2d(3)
    x, label, means = d["train"]["x"], d["train"]["label"], d.info["means"]
    assert x.shape == (8192, 2)
    assert d["test"]["x"].shape == (4096, 2)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 0.7, rtol=1e-9)
    np.testing.assert_allclose(means[0], [0.7, 0], atol=1e-12)
    np.testing.assert_allclose(means[2], [0, 0.7], atol=1e-12)
    for i in range(8):
        own = x[label == i]
        assert len(own) == pytest.approx(1024, abs=120)
        np.testing.assert_allclose(own.mean(0), means[i], atol=0.01)
        np.testing.assert_allclose(own.std(0), 0.05, atol=0.006)
    assert x.std() == pytest.approx(0.5, abs=0.02)
    assert len({p.tobytes() for p in np.concatenate([x, d["test"]["x"]])}) > 12000


def test_mixture_belongs_to_its_seed():
    assert gaussian_mixture_2d(1).fingerprint == gaussian_mixture_2d(1).fingerprint
    assert gaussian_mixture_2d(1).fingerprint != gaussian_mixture_2d(2).fingerprint
    with pytest.raises(DataError, match="modes, train and test must be at least 1"):
        gaussian_mixture_2d(modes=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([0, 255], np.uint8), [-1, 1]),
        (np.array([0, 1], np.uint8), [-1, 1 / 127.5 - 1]),
        (np.array([0.0, 1.0]), [-1, 1]),
        (np.array([0.0, 255.0]), [-1, 1]),
        (np.array([-1.0, 0.5]), [-1, 0.5]),
    ],
)
def test_images_are_scaled(given, expected):
    found = scale_images(given.reshape(2, 1, 1))
    assert found.shape == (2, 1, 1, 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


def test_bad_images():
    for bad, message in (
        (np.array([-1.0, 2.0]), r"a: expected the range \[-1, 1\] with negative values, got min -1, max 2"),
        (np.array([0.0, 300.0]), r"a: expected integers in \[0, 255\] or floats in \[-1, 1\], got min 0, max 300"),
        (np.array([-5.0, 0.0]), "got min -5"),
        (np.array([-1, 0]), "got min -1"),
        (np.array([0.0, np.nan]), "a: image 1 holds values that are not finite"),
    ):
        with pytest.raises(DataError, match=message):
            scale_images(bad.reshape(2, 1, 1), "a")
    with pytest.raises(
        DataError, match=r"expected images \[N, height, width\(, channels\)\] of one size, got shape \(2, 3\)"
    ):
        scale_images(np.zeros((2, 3)))
    with pytest.raises(DataError, match="holds no images"):
        scale_images(np.zeros((0, 3, 3)))


def test_npz_files(tmp_path):
    images, labels = RNG.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8), np.arange(20) % 3
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    d = image_dataset(path=str(tmp_path / "a.npz"))
    assert d["train"]["x"].shape == (18, 4, 4, 3)
    assert d["test"]["x"].shape == (2, 4, 4, 3)
    assert d.info["num_classes"] == 3
    known = {(i / np.float32(127.5) - 1).astype(np.float32).tobytes(): t for i, t in zip(images, labels, strict=True)}
    for split in ("train", "test"):
        assert all(known[x.tobytes()] == t for x, t in zip(d[split]["x"], d[split]["label"], strict=True))
    np.savez(tmp_path / "b.npz", x=images)
    assert "label" not in image_dataset(path=str(tmp_path / "b.npz"))["train"]


def test_bad_npz_files(tmp_path):
    images = np.zeros((4, 2, 2), np.uint8)
    for name, arrays, message in (
        ("a", {"y": images}, "a.npz: expected a field 'x' or 'image', got y"),
        ("b", {"x": images, "label": np.zeros(3, int)}, r"b.npz: label must hold one integer per image \(\[4\]\)"),
        ("c", {"x": images, "label": np.zeros(4)}, "label must hold one integer per image"),
        ("d", {"x": images, "label": np.array([0, -1, 0, 0])}, r"label 1 is negative \(-1\)"),
        ("e", {"x": images[:1]}, "needs two images or more, to hold some out, got 1"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(DataError, match=message):
            image_dataset(path=str(tmp_path / f"{name}.npz"))
    (tmp_path / "f.npz").write_text("nonsense")
    with pytest.raises(DataError, match="f.npz: not a readable .npz file"):
        image_dataset(path=str(tmp_path / "f.npz"))
    with pytest.raises(DataError, match="nowhere.npz: no such file or folder"):
        image_dataset(path=str(tmp_path / "nowhere.npz"))


def test_folders_of_images(tmp_path):
    from PIL import Image

    pixels = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    for i, p in enumerate(pixels):
        folder = tmp_path / ("cat" if i % 2 else "ant")
        folder.mkdir(exist_ok=True)
        Image.fromarray(p).save(folder / f"{i}.png")
    d = image_dataset(path=str(tmp_path))
    known = {(p / np.float32(127.5) - 1).astype(np.float32).tobytes(): i % 2 for i, p in enumerate(pixels)}
    for split, size in (("train", 5), ("test", 1)):
        assert d[split]["x"].shape == (size, 5, 4, 1)
        assert all(known[x.tobytes()] == t for x, t in zip(d[split]["x"], d[split]["label"], strict=True))
    Image.fromarray(RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)).save(tmp_path / "one.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "two.png")
    with pytest.raises(DataError, match=r"two.png: expected \(5, 4, 3\) as in one.png, got \(9, 9, 3\)"):
        image_dataset(path=str(tmp_path))
    (tmp_path / "two.png").write_text("no image")
    with pytest.raises(DataError, match="two.png: not a readable image"):
        image_dataset(path=str(tmp_path))


def test_names(tmp_path, monkeypatch):
    assert image_dataset("digits").fingerprint == digits().fingerprint
    assert image_dataset("mixture").name == "mixture"
    with pytest.raises(DataError, match="holds no images"):
        image_dataset("digits", str(tmp_path))

    def load_tfds(name, split, data_dir=None):
        assert (name, data_dir) == ("mnist", str(tmp_path))
        size = {"train": 6, "test": 3}[split]
        return {"image": np.full((size, 28, 28, 1), 255, np.uint8), "label": np.arange(size)}

    monkeypatch.setitem(sys.modules, "data.tfds", types.SimpleNamespace(load_tfds=load_tfds))
    d = image_dataset("mnist", str(tmp_path))
    assert d["train"]["x"].shape == (6, 28, 28, 1)
    assert d["test"]["x"].max() == 1
    assert d.info["num_classes"] == 6
    monkeypatch.setitem(
        sys.modules, "data.tfds", types.SimpleNamespace(load_tfds=lambda *a, **k: {"text": np.zeros(3)})
    )
    with pytest.raises(DataError, match="has no field 'image'; it has text"):
        image_dataset("imdb")
