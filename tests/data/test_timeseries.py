"""Series data: the ``.ts`` reader on good and bad files, normalisation, and the generator's ground truth."""

import numpy as np
import pytest

from data.stream import DataError
from data.timeseries import PAIR_TYPES, bad_pairs, digits_series, find_problems, load_ucr, read_ts, z_normalise

HEADER = (
    "# two made-up channels\n@problemName Toy\n@timeStamps false\n@univariate false\n@classLabel true up down\n@data\n"
)


def write(folder, text, name="Toy_TRAIN.ts"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problem(folder, name="Toy", test=None):
    train = HEADER + "1,2,3:4,5,6:up\n7,8,9:1,1,1:down\n"
    write(folder, train, f"{name}_TRAIN.ts")
    write(folder, test or HEADER + "0,0,6:2,2,2:down\n", f"{name}_TEST.ts")


def test_reads_series_labels_and_classes(tmp_path):
    path = write(tmp_path, HEADER + "1,2.5,-3:4,5,6e1:up\n\n# a comment\n 7,8,9:1,1,1: down \n")
    got = read_ts(path)
    assert got.x.dtype == np.float32
    assert got.label.dtype == np.int32
    np.testing.assert_array_equal(got.x, [[[1, 4], [2.5, 5], [-3, 60]], [[7, 1], [8, 1], [9, 1]]])
    np.testing.assert_array_equal(got.label, [0, 1])
    assert got.classes == ("up", "down")


def test_header_tags_may_be_of_any_case(tmp_path):
    path = write(tmp_path, "@CLASSLABEL TRUE a b\n@seriesLength 2\n@dimensions 1\n@DATA\n1,2:b\n")
    assert read_ts(path).x.shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("@classLabel true up down\n", 1, "ends without an @data line"),
        ("", 1, "ends without an @data line"),
        ("@problemName Toy\n1,2,3:up\n", 2, "data before an @data line"),
        ("@problemName Toy\n@data\n1,2:up\n", 1, "expected a header line '@classLabel true"),
        ("@timeStamps true\n@classLabel true up\n@data\n", 1, "expected '@timeStamps false'"),
        (HEADER, 6, "no series after @data"),
        (HEADER + "1,2,3:4,5:up\n", 7, r"channels of \[3, 2\] values; expected all of one length"),
        (HEADER + "1,2:3,4:up\n1,2,3:4,5,6:up\n", 8, "3 steps and 2 channels; expected 2 and 2 as the first has"),
        (HEADER + "1,2:3,4:up\n1,2:up\n", 8, "2 steps and 1 channels; expected 2 and 2"),
        (HEADER + "1,2:3,x4:up\n", 7, "channel 2, value 2: 'x4'; expected a finite number"),
        (HEADER + "1,2:inf,4:up\n", 7, "channel 2, value 1: 'inf'; expected a finite number"),
        (HEADER + "1,:3,4:up\n", 7, "channel 1, value 2: ''; expected a finite number"),
        (HEADER + "1,?:3,4:up\n", 7, r"channel 1, value 2: '\?' is a missing value"),
        (HEADER + "NaN,2:3,4:up\n", 7, "channel 1, value 1: 'NaN' is a missing value"),
        (HEADER + "1,2:3,4:left\n", 7, "unknown class 'left'; expected one of up, down"),
        (HEADER + "1,2,3\n", 7, "expected channels and a class name"),
        ("@classLabel true up\n@seriesLength 3\n@data\n1,2:up\n", 4, "2 values a series; expected 3, as line 2 says"),
        ("@classLabel true up\n@dimensions 2\n@data\n1,2:up\n", 4, "1 channels a series; expected 2, as line 2 says"),
    ],
)
def test_bad_files_are_named_with_line_and_expectation(tmp_path, text, line, expected):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=expected) as error:
        read_ts(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match="No such file or directory.*expected a .ts file"):
        read_ts(tmp_path / "none.ts")
    (tmp_path / "binary.ts").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="binary.ts: cannot be read .not a text file"):
        read_ts(tmp_path / "binary.ts")


def test_loads_the_only_problem_of_a_folder(tmp_path):
    problem(tmp_path)
    d = load_ucr(tmp_path, normalise="none")
    assert d.name == "Toy"
    assert d.info == {"num_classes": 2, "classes": ("up", "down")}
    assert d["train"]["x"].shape == (2, 3, 2)
    np.testing.assert_array_equal(d["test"]["x"][0, :, 0], [0, 0, 6])
    np.testing.assert_array_equal(d["test"]["label"], [1])


def test_labels_of_the_test_file_follow_the_order_of_the_train_file(tmp_path):
    problem(tmp_path, test=HEADER.replace("up down", "down up") + "0,0,6:2,2,2:down\n1,1,1:1,1,1:up\n")
    np.testing.assert_array_equal(load_ucr(tmp_path)["test"]["label"], [1, 0])


def test_several_problems_must_be_named(tmp_path):
    problem(tmp_path, "Toy")
    problem(tmp_path / "Other", "Other")
    assert list(find_problems(tmp_path)) == ["Other", "Toy"] or set(find_problems(tmp_path)) == {"Other", "Toy"}
    assert load_ucr(tmp_path, "Other").name == "Other"
    with pytest.raises(DataError, match="holds 2 problems; name one of .*Other.*--data.split NAME"):
        load_ucr(tmp_path)
    with pytest.raises(DataError, match="holds no problem 'Tay'; did you mean Toy"):
        load_ucr(tmp_path, "Tay")


def test_incomplete_problems_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder; expected one with NAME_TRAIN.ts"):
        load_ucr(tmp_path / "none")
    with pytest.raises(DataError, match="holds no problem; expected NAME_TRAIN.ts"):
        load_ucr(tmp_path)
    problem(tmp_path, test=HEADER + "1,2:3,4:up\n")
    with pytest.raises(DataError, match="2 steps and 2 channels; expected 3 and 2 like Toy_TRAIN.ts"):
        load_ucr(tmp_path)
    problem(tmp_path, test=HEADER.replace("down", "left") + "1,2,3:3,4,5:left\n")
    with pytest.raises(DataError, match="classes left; expected those of Toy_TRAIN.ts"):
        load_ucr(tmp_path)
    (tmp_path / "Toy_TEST.ts").unlink()
    with pytest.raises(DataError, match="Toy_TEST.ts: cannot be read"):
        load_ucr(tmp_path)


def test_normalisation():
    x = np.random.default_rng(0).normal(3, 5, size=(4, 20, 2)).astype(np.float32)
    x[1, :, 0] = 7.0
    by_series = z_normalise(x)
    np.testing.assert_allclose(by_series[0].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(by_series[0].std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(by_series[1, :, 0], 0.0)  # constant
    by_train = z_normalise(x, "train", x[2:])
    np.testing.assert_allclose(by_train[2:].mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(by_train[2:].std((0, 1)), 1, rtol=1e-5)
    np.testing.assert_allclose(by_train[0], (x[0] - x[2:].mean((0, 1))) / x[2:].std((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(z_normalise(x, "none"), x)
    assert by_series.dtype == by_train.dtype == np.float32
    with pytest.raises(ValueError, match="normalise must be"):
        z_normalise(x, "minmax")


def test_load_normalises_each_series_unless_told_otherwise(tmp_path):
    problem(tmp_path)
    np.testing.assert_allclose(load_ucr(tmp_path)["train"]["x"][:, :, 0].mean(1), 0, atol=1e-6)
    by_train = load_ucr(tmp_path, normalise="train")
    np.testing.assert_allclose(by_train["test"]["x"][0, 0, 0], (0 - 5) / np.std([1, 2, 3, 7, 8, 9]), rtol=1e-5)


def test_bad_pairs_are_what_they_say():
    d = bad_pairs(3, num_train=400, num_test=50, steps=64, classes=4, noisy=0.1, faulty=0.2, noise=0.3)
    train = d["train"]
    kinds = {name: train["pair"] == i for i, name in enumerate(PAIR_TYPES)}
    assert [int(k.sum()) for k in kinds.values()] == [280, 40, 80]
    assert d.info["pair_types"] == PAIR_TYPES == ("normal", "noisy", "faulty")

    def strongest(x):
        # the class whose frequency holds most of the energy
        t = np.arange(64) / 64
        power = [np.abs((x[..., 0] * np.exp(-2j * np.pi * f * t)).sum(1)) for f in d.info["frequencies"]]
        return np.argmax(power, axis=0)

    same = (train["x"] == train["other"]).all((1, 2))
    np.testing.assert_array_equal(same, ~kinds["faulty"])
    found, other = strongest(train["x"]), strongest(train["other"])
    clear = ~kinds["noisy"]
    assert (found[clear] == train["label"][clear]).mean() > 0.99
    assert (other[kinds["faulty"]] != train["label"][kinds["faulty"]]).mean() > 0.98
    assert (found[kinds["noisy"]] == train["label"][kinds["noisy"]]).mean() < 0.7
    energy = [train["x"][k].std() for k in kinds.values()]
    assert max(energy) / min(energy) < 1.15
    assert (d["test"]["pair"] == 0).all()
    assert set(d["test"]["label"]) == {0, 1, 2, 3}


def test_bad_pairs_depend_on_the_seed_alone():
    a, b, c = bad_pairs(1), bad_pairs(1), bad_pairs(2)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert a["train"]["x"].shape == (600, 64, 1)
    assert a["train"]["x"].dtype == np.float32


@pytest.mark.parametrize("settings", [{"noisy": -0.1}, {"noisy": 0.5, "faulty": 0.5}, {"classes": 1}])
def test_impossible_shares_are_refused(settings):
    with pytest.raises(DataError, match="bad_pairs needs at least 2 classes|shares of noisy and faulty"):
        bad_pairs(0, **settings)


def test_digits_as_series():
    d = digits_series(0)
    assert d["train"]["x"].shape == (1348, 64, 1)
    assert d["test"]["x"].shape == (449, 64, 1)
    assert d["train"]["x"].min() == 0
    assert d["train"]["x"].max() == 1
    assert d["train"]["label"].dtype == np.int32
