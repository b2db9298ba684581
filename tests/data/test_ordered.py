"""Ordered regression data: the manifold, diabetes, csv files, and labels that cannot be."""

import warnings

import numpy as np
import pytest

from data import ordered
from data.stream import DataError


def test_the_manifold_is_ordered_and_few():
    data = ordered.ordered_manifold(3)
    train, test = data["train"], data["test"]
    assert train["x"].shape == (123, 28) and test["x"].shape == (410, 28)
    assert np.bincount(train["label"].astype(int)).tolist() == [3] * 41
    np.testing.assert_array_equal(train["label"], train["target"])
    assert ordered.ordered_manifold(3).fingerprint == data.fingerprint != ordered.ordered_manifold(4).fingerprint
    # without nuisance x is a function of y, and neighbours in y are neighbours in x
    clean = ordered.ordered_manifold(3, noise=0.0)["train"]["x"][::3]
    far = np.linalg.norm(clean[:, None] - clean[None], axis=-1)
    step = far[np.arange(40), np.arange(1, 41)]
    assert (step > 0).all() and (far[np.arange(39), np.arange(2, 41)] > step[:-1]).all()
    assert far[0, 40] > 10 * step.max() / 5


def test_imbalance_has_all_regions():
    counts = np.bincount(ordered.ordered_manifold(0, 3, imbalance=True)["train"]["label"].astype(int))
    assert counts[0] == 120 and counts[-1] == 3 and (np.diff(counts) <= 0).all()
    assert ((counts >= 20) & (counts <= 100)).any()


def test_diabetes_is_binned_and_standardised():
    data = ordered.diabetes()
    assert len(data["train"]["x"]) == 300 and len(data["test"]["x"]) == 142
    np.testing.assert_array_equal(data["train"]["label"], np.round(data["train"]["target"] / 10))
    np.testing.assert_allclose(data["train"]["x"].mean(0), 0, atol=1e-5)
    assert np.unique(data["train"]["label"]).size < 40 and data["train"]["target"].max() > 300
    with pytest.raises(DataError, match=r"test must lie in \[1, 441\]"):
        ordered.diabetes(test=442)


def written(folder, text):
    file = folder / "set.csv"
    file.write_text(text)
    return file


def test_a_csv_of_features(tmp_path):
    rows = "a,b,label,split\n1,2,10.4,train\n3,2,19.6,train\n5,2,31,val\n7,2,12,test\n"
    data = ordered.read_regression(written(tmp_path, rows), 10)
    assert data["train"]["label"].tolist() == [1, 2] and data["test"]["label"].tolist() == [1]
    np.testing.assert_allclose(data["train"]["target"], [10.4, 19.6], rtol=1e-6)
    # standardised by training rows; a constant column stays 0
    np.testing.assert_allclose(data["train"]["x"], [[-1, 0], [1, 0]])
    np.testing.assert_allclose(data["test"]["x"], [[5, 0]])
    unsplit = ordered.read_regression(written(tmp_path, "a,label\n" + "".join(f"{i},{i}\n" for i in range(10))))
    assert len(unsplit["train"]["x"]) == 8 and len(unsplit["test"]["x"]) == 2


def test_a_csv_of_images(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(np.full((4, 5, 3), 100 * i, np.uint8)).save(tmp_path / f"{i}.png")
    rows = "path,label,split\n0.png,1,train\n1.png,2,train\n2.png,3,test\n"
    data = ordered.read_regression(written(tmp_path, rows))
    assert data["train"]["x"].shape == (2, 4, 5, 3) and data["train"]["x"].dtype == np.float32
    np.testing.assert_allclose(data["test"]["x"][0, 0, 0], 200 / 127.5 - 1, rtol=1e-5)
    with pytest.raises(DataError, match=r"line 4: .*7.png: not a readable image"):
        ordered.read_regression(written(tmp_path, rows.replace("2.png", "7.png")))
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"line 3: expected an image \(4, 5, 3\), got \(4, 6, 3\)"):
        ordered.read_regression(written(tmp_path, rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,y\n1,2\n", "has no column 'label'; it has a, y"),
        ("label,split\n1,train\n2,test\n", "has no feature column beside label and split"),
        ("a,label,split\n1,1,train\n1,x,test\n", r"line 3: column 'label' holds 'x', expected a number"),
        ("a,label,split\n1,,train\n1,2,test\n", r"line 2: column 'label' is empty, expected a finite number"),
        ("a,label,split\n1,nan,train\n1,2,test\n", r"line 2: column 'label' is empty, expected a finite number"),
        ("a,label,split\ninf,1,train\n1,2,test\n", r"line 2: column 'a' is inf, expected a finite number"),
        ("a,label,split\n1,1,train\n1,2,dev\n", r"line 3: split is 'dev', expected train, val or test"),
        ("a,label,split\n1,1,train\n1,2,val\n", "column 'split' has no row 'test'"),
        ("a,label\n1,1\n2,2\n", "has 2 rows; at least 5 are needed"),
    ],
)
def test_csv_files_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        ordered.read_regression(written(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no such file; expected a csv"):
        ordered.read_regression(tmp_path / "none.csv")


def test_targets_are_validated():
    assert ordered.checked_targets(np.array([[1], [2]])).tolist() == [1, 2]
    for values, message in [
        (np.ones((3, 2)), r"got shape \[3, 2\]; targets of several dimensions are not supported"),
        (np.ones(0), "one number per example"),
        (np.array([1.0, np.nan]), "row 1 is nan; every example needs a finite target"),
        (np.array(["a"]), "expected numbers"),
    ]:
        with pytest.raises(DataError, match=message):
            ordered.checked_targets(values)
    assert ordered.binned(np.array([4.0, 16.0, -16.0]), 10).tolist() == [0, 2, -2]
    with pytest.raises(DataError, match="bin size must not be negative, got -1"):
        ordered.binned(np.ones(2), -1)
    with pytest.raises(DataError, match="labels at least 3"):
        ordered.ordered_manifold(labels=2)


def test_labels_without_ties_are_warned_of_or_refused():
    with pytest.warns(UserWarning, match="75% of the examples share their label with no other.*bins of size 0.2"):
        ordered.check_ties(np.array([0.0, 8.0, 1.0, 2.0, 3.0, 4.0, 1.0, 5.0]), 2)
    with pytest.raises(DataError, match="1 of 3 examples share their label with no other and have one view"):
        ordered.check_ties(np.array([0.0, 0.0, 8.0]), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ordered.check_ties(np.array([0.0, 0.0, 8.0]), 2)
        ordered.check_ties(np.array([0.0, 0.0, 8.0, 8.0]), 1)
