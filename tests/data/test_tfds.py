"""TFDS without TensorFlow: our builders, other people's builders, and what goes wrong in one line."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.stream import DataError
from data.tfds import data_source, encode_image, load_tfds

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import numpy as np
from data.builders import prepare_digits
from data.tfds import load_tfds
builder = prepare_digits(sys.argv[1])
assert list(builder.info.splits) == ["train", "test"] or set(builder.info.splits) == {"train", "test"}
source = builder.as_data_source(split="test")
assert len(source) == 359, len(source)
from sklearn.datasets import load_digits
bunch = load_digits()
train, test = load_tfds("digits", "train", sys.argv[1]), load_tfds("digits", "test", sys.argv[1])
assert train["image"].shape == (1438, 8, 8, 1) and train["image"].dtype == np.uint8
assert len(train["label"]) + len(test["label"]) == 1797
pixels = np.concatenate([train["image"], test["image"]]).reshape(1797, -1)
expected = np.round(bunch.images * 255 / 16).astype(np.uint8).reshape(1797, -1)
order = lambda rows: rows[np.lexsort(rows.T)]
assert (order(pixels) == order(expected)).all()
assert (source[0]["image"] == test["image"][0]).all() and test["image"].max() == 255
assert "tensorflow" not in sys.modules and "torch" not in sys.modules and "jax" not in sys.modules
"""


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    where = tmp_path_factory.mktemp("tfds")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, where], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""  # standard output belongs to the command
    return where


def test_digits_are_prepared_and_read_without_tensorflow(digits_dir):
    assert list(digits_dir.glob("digits/1.0.0/*.array_record*"))


def test_a_slice_of_a_split(digits_dir):
    whole, part = load_tfds("digits", "test", digits_dir), load_tfds("digits", "test[:10]", digits_dir)
    np.testing.assert_array_equal(part["image"], whole["image"][:10])
    assert len(data_source("digits:1.*.*", "train+test", digits_dir)) == 1797


def test_unknown_names_and_splits_get_the_nearest(digits_dir):
    with pytest.raises(DataError, match="unknown TFDS set 'mnst'; did you mean .*mnist"):
        load_tfds("mnst", "train", digits_dir)
    with pytest.raises(DataError, match="digits has no split 'tset'; did you mean test"):
        load_tfds("digits", "tset", digits_dir)
    with pytest.raises(DataError, match=r"cannot read split 'test\[nonsense\]'"):
        load_tfds("digits", "test[nonsense]", digits_dir)


def test_a_series_problem(tmp_path):
    from data.builders import prepare_series
    from data.timeseries import load_ucr

    for split, n in (("TRAIN", 6), ("TEST", 4)):
        rows = [",".join(f"{i + t / 8}" for t in range(5)) + f":{i % 2}" for i in range(n)]
        header = ["@problemName Tiny", "@timeStamps false", "@univariate true", "@equalLength true",
                  "@seriesLength 5", "@classLabel true 0 1", "@data"]  # fmt: skip
        (tmp_path / f"Tiny_{split}.ts").write_text("\n".join(header + rows) + "\n")
    prepare_series(tmp_path, "Tiny", tmp_path / "tfds")
    expected = load_ucr(tmp_path, "Tiny", normalise="none")
    for split in ("train", "test"):
        out = load_tfds("time_series/Tiny", split, tmp_path / "tfds")
        rows, wanted = np.argsort(out["x"][:, 0, 0]), np.argsort(expected[split]["x"][:, 0, 0])
        np.testing.assert_array_equal(out["x"][rows], expected[split]["x"][wanted])
        np.testing.assert_array_equal(out["label"][rows], expected[split]["label"][wanted])
    with pytest.raises(DataError):
        prepare_series(tmp_path, "Tinny", tmp_path / "tfds")


def test_interactions(tmp_path):
    from data.builders import prepare_interactions
    from data.interactions import load_interactions

    generator = np.random.default_rng(0)
    rows = ["user,item"] + [f"u{u},i{i}" for u in range(12) for i in generator.choice(20, 6, replace=False)]
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n")
    builder = prepare_interactions(tmp_path / "ratings.csv", "mine", tmp_path / "tfds")
    expected = load_interactions(tmp_path / "ratings.csv")
    assert dict(builder.info.metadata) == {"num_users": 12, "num_items": expected.info["num_items"]}
    train = load_tfds("interactions/mine", "train", tmp_path / "tfds")
    pairs = lambda a: sorted(zip(a["user"].tolist(), a["item"].tolist(), strict=True))  # noqa: E731
    assert pairs(train) == pairs(expected["train"])
    test = load_tfds("interactions/mine", "test", tmp_path / "tfds")
    by_user = np.argsort(test["user"])
    width = expected["test"]["relevant"].shape[1]
    np.testing.assert_array_equal(test["relevant"][by_user][:, :width], expected["test"]["relevant"])


def idx_files(folder, n):
    images = np.random.default_rng(1).integers(0, 256, (n, 28, 28), np.uint8)
    labels = (np.arange(n) % 10).astype(np.uint8)
    paths = {}
    for kind, array, header in (("images", images, 16), ("labels", labels, 8)):
        paths[kind] = folder / kind
        paths[kind].write_bytes(bytes(header) + array.tobytes())
    return images, labels, paths


def test_mnists_own_builder_is_prepared_without_tensorflow(tmp_path, monkeypatch):
    # the builder opens files by tf.io.gfile and hands arrays to TFDS's TensorFlow encoder
    import data.tfds

    tfds = data.tfds._tfds()
    from tensorflow_datasets.image_classification import mnist

    images, labels, paths = idx_files(tmp_path, 7)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 7)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 3)

    def local(self, urls):
        return {k: paths["images" if k.endswith("data") else "labels"] for k in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", local)
    train = load_tfds("mnist", "train", tmp_path / "tfds")
    order = np.argsort([np.flatnonzero((images == x[..., 0]).all((1, 2)))[0] for x in train["image"]])
    np.testing.assert_array_equal(train["image"][order][..., 0], images)
    np.testing.assert_array_equal(train["label"][order], labels)
    assert len(load_tfds("mnist", "test", tmp_path / "tfds")["label"]) == 3
    assert "tensorflow" not in sys.modules
    # what was lent has been given back
    from tensorflow_datasets.core.utils import lazy_imports_utils

    assert mnist.tf is lazy_imports_utils.tensorflow


def test_without_a_network_the_place_for_prepared_data_is_named(tmp_path, monkeypatch):
    import data.tfds

    tfds = data.tfds._tfds()

    def offline(self, urls):
        raise ConnectionError("Failed to resolve 'storage.googleapis.com'\nTraceback follows")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", offline)
    with pytest.raises(DataError, match="cannot prepare mnist/3.0.1: Failed to resolve .* prepared elsewhere at ") as e:
        load_tfds("mnist", "train", tmp_path)
    assert str(tmp_path / "mnist" / "3.0.1") in str(e.value) and "\n" not in str(e.value)


def test_a_builder_that_needs_tensorflow_is_named(tmp_path, monkeypatch):
    import data.tfds

    tfds = data.tfds._tfds()
    from tensorflow_datasets.image_classification import mnist

    def decode(self, urls):
        return mnist.tf.image.decode_png(b"")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", decode)
    with pytest.raises(DataError, match="preparing mnist/3.0.1 needs TensorFlow, once: .* --file_format=array_record"):
        load_tfds("mnist", "train", tmp_path)


def test_examples_of_different_shapes_are_named(tmp_path):
    import data.tfds

    tfds = data.tfds._tfds()

    class Ragged(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "x": tfds.features.Tensor(shape=(None,), dtype=np.float32),
                "inner": {"n": np.int32, "text": tfds.features.Text()},
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "same": self._generate_examples(1)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"x": np.ones(i + 1, np.float32), "inner": {"n": i, "text": f"t{i}"}}

    data.tfds.prepare(Ragged(data_dir=tmp_path, file_format="array_record"))
    with pytest.raises(DataError, match="field 'x' differ in shape"):
        load_tfds("ragged", "train", tmp_path)
    one = load_tfds("ragged", "same", tmp_path)
    assert one["inner/n"].tolist() == [0] and one["inner/text"].tolist() == [b"t0"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_survive_png(channels):
    import io

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    out = np.asarray(Image.open(io.BytesIO(encode_image(image, "png")))).reshape(image.shape)
    np.testing.assert_array_equal(out, image)
    if channels == 3:
        assert encode_image(image, "jpeg")[:2] == b"\xff\xd8"


def test_bad_images():
    with pytest.raises(DataError, match="an image needs shape"):
        encode_image(np.zeros((3, 3), np.uint8), "png")
    assert gzip is not None
