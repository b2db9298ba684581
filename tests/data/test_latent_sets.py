"""Latents of several models: the generators keep what they promise, and files are read or refused."""

import numpy as np
import pytest

from data.latents import read_latents, rotated_latents, word_spaces
from data.stream import DataError


def test_copies_are_rotated_scaled_and_noisy():
    latents, truth = rotated_latents(3, samples=50, dimension=4, widths=(4, 6), classes=3)
    z = truth["items"]["z"]
    for i, name in enumerate(("model0", "model1")):
        q, s = truth.info["maps"][i], truth.info["scales"][i]
        np.testing.assert_allclose(q @ q.T, np.eye(4), atol=1e-6)
        np.testing.assert_allclose(latents.models[name], s * z @ q, rtol=1e-4, atol=1e-5)
        assert 0.2 <= s <= 5
    assert latents.models["model1"].shape == (50, 6) and latents.num_classes == 3
    assert latents.train.sum() == 35 and latents.fingerprint == rotated_latents(
        3, samples=50, dimension=4, widths=(4, 6), classes=3
    )[0].fingerprint  # fmt: skip
    noisy = rotated_latents(3, samples=50, dimension=4, widths=(4, 6), classes=3, noise=0.5)[0]
    off = noisy.models["model0"] / truth.info["scales"][0] - z @ truth.info["maps"][0]
    assert off.std() == pytest.approx(0.25, rel=0.2)
    with pytest.raises(DataError, match="widths of at least the dimension 12"):
        rotated_latents(widths=(8,))


def test_words_have_topics_and_two_spaces():
    words = word_spaces(0, words=60, topics=3, documents=400, length=20, features=5)
    assert words.models["first"].shape == words.models["second"].shape == (60, 5)
    assert set(words.labels.tolist()) == {0, 1, 2} and words.train.sum() == 42
    first = words.models["first"] / np.linalg.norm(words.models["first"], axis=1, keepdims=True)
    same = words.labels[:, None] == words.labels[None]
    assert (first @ first.T)[same].mean() > (first @ first.T)[~same].mean() + 0.2
    with pytest.raises(DataError, match="two topics"):
        word_spaces(topics=1)


RNG = np.random.default_rng(0)
GOOD = {"a": RNG.normal(size=(6, 3)), "b": RNG.normal(size=(6, 5)), "labels": np.array([0, 1, 1, 0, 2, 2])}


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_one_file_or_one_per_model(tmp_path):
    found = read_latents(write(tmp_path / "l.npz", **GOOD))
    assert list(found.models) == ["a", "b"] and found.models["b"].dtype == np.float32 and not found.anchors
    np.testing.assert_array_equal(found.labels, GOOD["labels"])
    assert found.train.sum() == 4
    train = np.array([True, False, True, True, True, False])
    named = {f"{k}/encoding": GOOD[k] for k in "ab"} | {f"{k}/anchors_latents": GOOD[k][:2] for k in "ab"}
    found = read_latents(write(tmp_path / "n.npz", **named, label=GOOD["labels"], train=train))
    np.testing.assert_allclose(found.anchors["b"], GOOD["b"][:2], rtol=1e-6)
    np.testing.assert_array_equal(found.train, train)
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder / "b.npz", encoding=GOOD["b"], anchors_latents=GOOD["b"][:2], labels=GOOD["labels"])
    write(folder / "a.npz", encoding=GOOD["a"], anchors_latents=GOOD["a"][:2])
    same = read_latents(folder)
    assert list(same.models) == ["a", "b"]
    np.testing.assert_allclose(same.models["a"], GOOD["a"], rtol=1e-6)
    assert set(same.anchors) == {"a", "b"}


NAN = GOOD["b"].copy()
NAN[4, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "needs the latents of two models or more to stitch, got a"),
        ({"b": np.zeros((5, 2))}, "latents \\[N, d\\] of the same N items"),
        ({"b": np.zeros((6, 2, 2))}, "latents \\[N, d\\] of the same N items"),
        ({"b": NAN}, "b: row 4 is not finite"),
        ({"b": np.ones((6, 2), int)}, "b: expected floats, got int64"),
        ({"labels": None}, "labels must hold one class number .* per item \\(\\[6\\]\\), got none"),
        ({"labels": np.zeros(5, int)}, "labels must hold one class number"),
        ({"labels": np.zeros(6)}, "labels must hold one class number"),
        ({"labels": np.array([0, 1, -1, 0, 0, 0])}, "labels must hold one class number"),
        ({"train": np.ones(6, bool)}, "train must hold one bool per item"),
        ({"train": np.arange(6)}, "train must hold one bool per item"),
        ({"a/extra": np.ones(3)}, "'a/extra' is neither NAME, NAME/encoding nor NAME/anchors_latents"),
        ({"a/anchors_latents": np.ones((2, 3))}, "latents of the same anchors, in one order"),
        ({"a/anchors_latents": np.ones((2, 3)), "b/anchors_latents": np.ones((3, 5))}, "latents of the same anchors"),
        ({"a/anchors_latents": np.ones((2, 3)), "b/anchors_latents": np.ones((2, 3))},
         "b: latent dim 5 vs anchors 3: anchors must come from the same encoder"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path, change, message):
    arrays = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(DataError, match=message):
        read_latents(write(tmp_path / "l.npz", **arrays))


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_latents(tmp_path / "nothing.npz")
    with pytest.raises(DataError, match=r"holds no .npz files"):
        read_latents(tmp_path)
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"not a readable .npz file"):
        read_latents(tmp_path / "bad.npz")
