"""Folders of models' features: what is read, and one clear line for whatever is wrong."""

import json

import numpy as np
import pytest

from data.features import feature_pool, pool_fingerprint
from data.stream import DataError

Y = np.array([0, 1, 2, 1, 0, 2, 2])


def arrays(seed=0, d=3):
    rng = np.random.default_rng(seed)
    return {"features": rng.normal(size=(7, d)), "labels": Y, "general": rng.normal(size=(4, d))}


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "alpha.npz", **arrays(), accuracy=0.5, source_logits=np.eye(7, 4) * 2)
    np.savez(tmp_path / "beta.npz", **arrays(1, 5))
    return tmp_path


def write_csv(file, header, rows):
    file.write_text("\n".join([",".join(header), *(",".join(map(repr, map(float, r))) for r in rows)]) + "\n")


def test_npz_and_csv_are_read_and_accuracies_joined(folder):
    own = arrays(2, 2)
    table = np.column_stack([own["features"][:, 0], Y, own["features"][:, 1], np.full(7, 0.25), np.full(7, 0.75)])
    write_csv(folder / "gamma.csv", ["f0", "label", "f1", "source_a", "source_b"], table)
    write_csv(folder / "gamma.general.csv", ["f0", "f1"], own["general"])
    (folder / "accuracies.json").write_text(json.dumps({"gamma": 0.75, "alpha": 0.625}))
    alpha, beta, gamma = feature_pool(folder)
    assert [m.name for m in (alpha, beta, gamma)] == ["alpha", "beta", "gamma"]
    assert (alpha.accuracy, beta.accuracy, gamma.accuracy) == (0.625, None, 0.75)
    np.testing.assert_array_equal(alpha.features, arrays()["features"])
    np.testing.assert_array_equal(beta.general, arrays(1, 5)["general"])
    e = np.exp(2.0)
    np.testing.assert_allclose(alpha.source[0], np.array([e, 1, 1, 1]) / (e + 3))
    assert beta.source is None
    np.testing.assert_array_equal(gamma.features, own["features"])
    np.testing.assert_array_equal(gamma.general, own["general"])
    np.testing.assert_array_equal(gamma.source, [[0.25, 0.75]] * 7)
    np.testing.assert_array_equal(gamma.labels, Y)
    before = pool_fingerprint([alpha, beta, gamma])
    (folder / "accuracies.json").unlink()
    (folder / "accuracies.csv").write_text("model,accuracy\nbeta,0.25\n")
    pool = feature_pool(folder)
    assert [m.accuracy for m in pool] == [0.5, 0.25, None]
    assert pool_fingerprint(pool) != before


def change(**fields):
    return lambda f: np.savez(f / "beta.npz", **{k: v for k, v in {**arrays(1), **fields}.items() if v is not None})


def text(name, content):
    return lambda f: (f / name).write_text(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "beta.npz").unlink(), "holds 1 model.s., a ranking needs two or more; expected one NAME.npz"),
        (text("beta.npz", "no"), "beta.npz: not a readable .npz file"),
        (change(features=None), "beta.npz: expected a field 'features', got labels, general"),
        (change(labels=None), "expected a field 'labels'"),
        (change(features=np.zeros(7)), r"features must be numbers \[rows, columns\]"),
        (change(features=np.where(np.arange(7)[:, None] == 5, np.nan, 0.0) * np.ones(3)), "row 5 are not finite"),
        (change(labels=Y * 1.0), "labels must be one integer for each of 7 rows"),
        (change(labels=Y[:-1]), "labels must be one integer for each of 7 rows"),
        (change(labels=Y - 1), "label -1 in row 0 is negative"),
        (change(labels=Y + (Y > 0)), "labels skip class 1 .largest 3.: they must be 0..C-1"),
        (change(labels=np.array([0, 1, 2, 1, 0, 2, 3])), r"class 3 has 1 sample\(s\) of 4"),
        (change(labels=Y * 0), r"class 0 has 7 sample\(s\) of 1 class"),
        (change(labels=np.array([0, 1, 1, 1, 0, 2, 2])), "labels are not those of alpha.npz"),
        (change(general=np.zeros((4, 2))), r"general must be \[G, 3\]"),
        (change(general=np.zeros((1, 3))), "with G at least 2"),
        (change(source_probabilities=np.ones((7, 2))), "source probabilities of row 0 do not sum to 1"),
        (change(source_probabilities=np.ones((6, 1))), "source outputs must have 7 rows, got 6"),
        (change(accuracy=np.array("high")), "accuracy must be a number"),
        (change(accuracy=np.inf), "accuracy must be finite"),
        (text("alpha.csv", "label,f\n0,1\n"), "alpha is there as .npz and as .csv"),
        (text("c.csv", "label,f\n"), "c.csv: expected a line of column names and then numbers"),
        (text("c.csv", "f,g\n1,2\n"), "expected a column 'label' in its first line, got f, g"),
        (text("c.csv", "label\n1\n"), "expected columns of features beside 'label'"),
        (text("c.csv", "label,f\n0,1\n1\n"), "line 3 has 1 values, expected 2"),
        (text("c.csv", "label,f\n0,1\n1,x\n"), "line 3 holds something that is no number"),
        (text("c.csv", "label,f\n0,1\n0.5,2\n"), "line 3 has label 0.5, expected an integer"),
        (text("accuracies.json", "{"), "accuracies.json: not a readable JSON file"),
        (text("accuracies.json", "[1]"), 'expected {"MODEL": accuracy, ...}, got a list'),
        (text("accuracies.json", '{"alpha": "good"}'), "accuracy of 'alpha' must be a number, got 'good'"),
        (text("accuracies.json", '{"delta": 1}'), "accuracy of 'delta', which is not among the models alpha, beta"),
        (text("accuracies.csv", "name,score\nalpha,1\n"), "expected a first line 'model,accuracy'"),
        (lambda f: [text("accuracies.csv", "")(f), text("accuracies.json", "{}")(f)], "accuracies.csv; keep one"),
    ],
)
def test_bad_folders_are_one_clear_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as error:
        feature_pool(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="there is no such folder; expected one NAME.npz"):
        feature_pool(tmp_path / "none")
