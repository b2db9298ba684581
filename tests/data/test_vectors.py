"""Vectors on disk and from the generator, and every file that must be refused."""

import numpy as np
import pytest

from data.stream import DataError
from data.vectors import read_vectors, shifted_queries, vector_dataset, write_vectors

RNG = np.random.default_rng(0)
FLOATS = RNG.normal(size=(5, 3)).astype(np.float32)
INTS = RNG.integers(0, 200, (4, 6))


def rows(*parts):
    """Bytes of rows by the format's definition: an int32 dimension, then the entries."""
    return b"".join(np.int32(len(p)).tobytes() + np.asarray(p).tobytes() for p in parts)


def test_formats_are_what_they_say(tmp_path):
    for suffix, kind in ((".fvecs", "<f4"), (".ivecs", "<i4"), (".bvecs", "u1")):
        data = (FLOATS if suffix == ".fvecs" else INTS).astype(kind)
        file = tmp_path / f"x{suffix}"
        file.write_bytes(rows(*data))
        found = read_vectors(file)
        np.testing.assert_array_equal(found, data)
        assert found.dtype == np.dtype(kind)
        write_vectors(tmp_path / f"y{suffix}", data)
        assert (tmp_path / f"y{suffix}").read_bytes() == file.read_bytes()
    write_vectors(tmp_path / "x.npy", FLOATS)
    np.testing.assert_array_equal(read_vectors(tmp_path / "x.npy"), FLOATS)
    for name, data, message in (
        ("a.bvecs", INTS + 100, "entries do not fit uint8; write .fvecs or .npy"),
        ("a.ivecs", FLOATS, "entries do not fit int32"),
        ("a.txt", FLOATS, "unknown suffix '.txt'"),
        ("a.npy", FLOATS[0], r"expected vectors \[n, D\] to write, got \[3\]"),
    ):
        with pytest.raises(DataError, match=message):
            write_vectors(tmp_path / name, data)


def test_malformed_files_are_named(tmp_path):
    good = rows(*FLOATS)
    changed = rows(FLOATS[0], FLOATS[1]) + np.int32(2).tobytes() + FLOATS[2].tobytes()
    for name, content, message in (
        ("changed.fvecs", changed, "changed.fvecs: row 2 has dimension 2; expected 3, that of row 0"),
        ("short.fvecs", good[:-5], r"truncated: row 4 has 11 of 16 bytes \(dimension 3 float32\)"),
        ("first.fvecs", good[:10], "truncated: row 0 has 10 of 16 bytes"),
        ("empty.fvecs", b"", r"holds no vectors \(0 bytes\)"),
        ("tiny.ivecs", b"ab", r"holds no vectors \(2 bytes\)"),
        ("zero.ivecs", rows([]), "row 0 has dimension 0; expected at least 1"),
        ("minus.bvecs", np.int32(-3).tobytes() * 4, "row 0 has dimension -3"),
        ("text.npy", b"hello", r"not a NumPy array file .*expected \[n, D\]"),
        ("x.csv", b"1,2", "unknown suffix '.csv'; expected .npy, .fvecs, .ivecs or .bvecs"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_vectors(tmp_path / name)
    for array, message in (
        (FLOATS[0], r"expected numbers \[n, D\], got float32 \[3\]"),
        (np.array([["a"]]), r"expected numbers \[n, D\], got <U1 \[1, 1\]"),
        (FLOATS[:0], r"holds no vectors \[0, 3\]"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=message):
            read_vectors(tmp_path / "x.npy")
    with open(tmp_path / "z.npy", "wb") as file:
        np.savez(file, a=FLOATS)
    with pytest.raises(DataError, match="got an archive"):
        read_vectors(tmp_path / "z.npy")
    with pytest.raises(DataError, match="nowhere.npy: there is no such file"):
        read_vectors(tmp_path / "nowhere.npy")
    bad = FLOATS.copy()
    bad[3, 1] = np.nan
    (tmp_path / "nan.fvecs").write_bytes(rows(*bad))
    with pytest.raises(DataError, match="nan.fvecs: row 3 is not finite"):
        read_vectors(tmp_path / "nan.fvecs")
    assert np.isnan(read_vectors(tmp_path / "nan.fvecs", finite=False)).sum() == 1
    large = np.zeros((70_000, 1), np.float32)
    large[66_000] = np.inf
    np.save(tmp_path / "large.npy", large)
    with pytest.raises(DataError, match="row 66000 is not finite"):
        read_vectors(tmp_path / "large.npy")


@pytest.fixture
def folder(tmp_path):
    write_vectors(tmp_path / "base.fvecs", FLOATS)
    write_vectors(tmp_path / "queries.npy", FLOATS[:2] + 1)
    return tmp_path


def test_folders(folder):
    data = vector_dataset(folder)
    assert set(data.splits) == {"base", "queries"} and data.info["dimension"] == 3
    write_vectors(folder / "queries_learn.bvecs", INTS[:, :3])
    write_vectors(folder / "groundtruth.ivecs", np.array([[0, 4], [2, 1]]))
    data = vector_dataset(folder)
    np.testing.assert_array_equal(data["base"]["x"], FLOATS)
    np.testing.assert_array_equal(data["queries"]["x"], FLOATS[:2] + 1)
    np.testing.assert_array_equal(data["learn"]["x"], INTS[:, :3])
    np.testing.assert_array_equal(data["groundtruth"]["ids"], [[0, 4], [2, 1]])
    assert data["learn"]["x"].dtype == np.float32 and data["groundtruth"]["ids"].dtype == np.int32


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("base.npy", FLOATS, "both base.npy and base.fvecs; expected one base"),
        ("queries_learn.npy", INTS, r"queries_learn.npy: queries have D=6, database D=3"),
        ("queries_learn.npy", np.concatenate([FLOATS, FLOATS + 1]), r"queries.npy: row 0 is also in .*\(2 such\)"),
        ("groundtruth.ivecs", np.array([[0], [5]]), "row 1 names vector 5; expected 0 .. 4"),
        ("groundtruth.npy", np.array([[0], [-1]]), "row 1 names vector -1"),
        ("groundtruth.ivecs", np.array([[0]]), r"expected integers \[2, m\], a row for each query; got int32 \[1, 1\]"),
        ("groundtruth.npy", np.array([[0.0], [1.0]]), r"expected integers \[2, m\].*got float64"),
    ],
)
def test_folders_that_do_not_fit_are_named(folder, name, array, message):
    write_vectors(folder / name, array)
    with pytest.raises(DataError, match=message):
        vector_dataset(folder)


def test_missing_parts_are_named(folder):
    (folder / "queries.npy").unlink()
    with pytest.raises(DataError, match="no queries; expected queries.npy or queries.fvecs or queries.bvecs"):
        vector_dataset(folder)
    with pytest.raises(DataError, match="there is no such folder"):
        vector_dataset(folder / "nowhere")


def test_the_generator_shifts_queries():
    data = shifted_queries(0)
    x, learn, asked = (data[s]["x"] for s in ("base", "learn", "queries"))
    assert x.shape == (2000, 64) and learn.shape == asked.shape == (500, 64) and x.dtype == np.float32
    assert not (learn[:, None, 0] == asked[None, :, 0]).any()
    # the base's directions: variances fall as exp(-2 j / 10) along U, which its own SVD finds
    _, s, basis = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(s[:30] / np.sqrt(2000), np.exp(-np.arange(30) / 10), rtol=0.12)
    spread = lambda rows: np.sqrt(np.mean((rows @ basis.T) ** 2, 0))  # noqa: E731
    for rows in (learn, asked):
        energy = spread(rows) ** 2
        # queries vary most where the base's directions 8 .. 23 lie, then in 0 .. 7
        assert energy[8:24].sum() > 0.9 * energy.sum() and energy[:8].sum() > 3 * energy[24:].sum()
        assert np.argmax(energy) in (7, 8, 9)
    own = shifted_queries(0, shifted=False)
    np.testing.assert_array_equal(own["base"]["x"], x)
    np.testing.assert_allclose(spread(own["queries"]["x"])[:20], np.exp(-np.arange(20) / 10), rtol=0.2)
    assert (shifted_queries(1)["base"]["x"] != x).all()
    assert shifted_queries(0).fingerprint == data.fingerprint != own.fingerprint
    for change in ({"vectors": 0}, {"decay": 0.0}, {"first": (4, 70)}, {"first": (5, 4)}):
        with pytest.raises(DataError, match="the generator"):
            shifted_queries(0, **change)
