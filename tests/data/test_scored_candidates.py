"""Scored candidates: the generators' laws, and the reader's splits and refusals."""

import numpy as np
import pytest

from data.scored_candidates import calibrated_queries, digit_candidates, scored_candidates
from data.stream import DataError


def test_generated_labels_follow_each_querys_own_curve():
    data = calibrated_queries(2, train=3000, valid=20, test=30, candidates=40)
    assert [len(data[s]["cos"]) for s in ("train", "valid", "test")] == [3000, 20, 30]
    train = data["train"]
    np.testing.assert_allclose(np.linalg.norm(train["query"], axis=1), 1, rtol=1e-5)
    slope, crossing = data.info["slope"][:3000], data.info["crossing"][:3000]
    assert 0.2 <= slope.min() < 0.4 and 1.6 < slope.max() <= 1.8
    assert 0.25 <= crossing.min() < 0.3 and 0.7 < crossing.max() <= 0.75
    np.testing.assert_allclose(train["cos"].mean(), 5 / 9, atol=0.01)
    p = 1 / (1 + np.exp(-20 * slope * (train["cos"] - crossing)))
    for low in np.arange(0, 1, 0.2):
        inside = (p >= low) & (p < low + 0.2)
        np.testing.assert_allclose(train["label"][inside].mean(), p[inside].mean(), atol=0.02)
    assert train["real"].all() and set(np.unique(train["label"])) == {0, 1}
    assert calibrated_queries(2).fingerprint == calibrated_queries(2).fingerprint != calibrated_queries(3).fingerprint
    with pytest.raises(DataError, match="at least one query in each split"):
        calibrated_queries(valid=0)


def test_digits_are_retrieved_by_cosine_and_relevant_by_class():
    data = digit_candidates(0, candidates=50)
    assert [len(data[s]["cos"]) for s in ("train", "valid", "test")] == [450, 120, 227]
    cos, label = (np.concatenate([data[s][k] for s in ("train", "valid", "test")]) for k in ("cos", "label"))
    assert (np.diff(cos, axis=1) <= 0).all() and cos.max() <= 1 + 1e-5
    assert label[:, :5].mean() > 0.9 > label[:, -5:].mean() and cos.shape[1] == 50
    with pytest.raises(DataError, match=r"candidates must be in \[1, 1000\], got 1001"):
        digit_candidates(0, 1001)


def write(folder, count=10, **change):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(count)
    arrays = {
        "query_emb": rng.normal(size=(count, 4)).astype(np.float32),
        "cand_ids": np.arange(count * 3).reshape(count, 3),
        "cand_cos": rng.uniform(-1, 1, (count, 3)).astype(np.float32),
        "labels": (rng.random((count, 3)) < 0.5).astype(np.int64),
    }
    arrays["cand_ids"][2, 1] = -1
    arrays |= change
    for name, value in arrays.items():
        if value is not None:
            np.save(folder / f"{name}.npy", value)
    return arrays


def test_one_folder_is_split_by_the_seed(tmp_path):
    arrays = write(tmp_path / "a", 20)
    data = scored_candidates(tmp_path / "a", 5)
    assert [len(data[s]["cos"]) for s in ("train", "valid", "test")] == [14, 2, 4] and data.info["dimension"] == 4
    order = np.concatenate([data[s]["query"] for s in ("train", "valid", "test")])
    places = [int(np.flatnonzero((arrays["query_emb"] == q).all(1))[0]) for q in order]
    assert sorted(places) == list(range(20)) and places != list(range(20))
    for split, rows in (("train", places[:14]), ("valid", places[14:16]), ("test", places[16:])):
        real = arrays["cand_ids"][rows] >= 0
        np.testing.assert_array_equal(data[split]["real"], real)
        np.testing.assert_array_equal(data[split]["cos"], np.where(real, arrays["cand_cos"][rows], -1))
        np.testing.assert_array_equal(data[split]["label"], np.where(real, arrays["labels"][rows], 0))
    assert (scored_candidates(tmp_path / "a", 6)["test"]["query"] != data["test"]["query"]).any()


def test_folders_of_splits_and_qrels(tmp_path):
    write(tmp_path / "train", 16)
    test = write(tmp_path / "test", 5, labels=None)
    np.save(tmp_path / "test" / "qrels.npy", np.array([[0, 1], [4, 12], [4, 14], [3, 777], [2, -1]]))
    data = scored_candidates(tmp_path)
    assert [len(data[s]["cos"]) for s in ("train", "valid", "test")] == [14, 2, 5]
    np.testing.assert_array_equal(data["test"]["query"], test["query_emb"])
    want = np.zeros((5, 3))
    want[0, 1] = want[4, 0] = want[4, 2] = 1
    np.testing.assert_array_equal(data["test"]["label"], want)
    write(tmp_path / "valid", 3, query_emb=np.ones((3, 7), np.float32))
    with pytest.raises(DataError, match="valid/query_emb.npy: 7 dimensions, those of train/ 4; expected one encoder's"):
        scored_candidates(tmp_path)
    write(tmp_path / "valid", 3)
    assert [len(v["cos"]) for v in scored_candidates(tmp_path).splits.values()] == [16, 3, 5]


NONE = np.arange(30).reshape(10, 3) - 100 * (np.arange(10) == 6)[:, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_emb": np.ones((10, 4), int)}, r"query_emb.npy: expected floats \[N, d\], got int64"),
        ({"query_emb": np.full((10, 4), np.nan)}, "query_emb.npy: row 0, column 0 is not finite"),
        ({"cand_cos": np.ones((9, 3))}, r"cand_cos.npy: expected floats \[10, K\], got float64 \[9, 3\]"),
        ({"cand_cos": np.full((10, 3), np.inf)}, r"cand_cos.npy: row 0, column 0 is not finite \(29 such\)"),
        ({"cand_ids": np.ones((10, 2), int)}, r"cand_ids.npy: expected integers \[10, 3\], got int64 \[10, 2\]"),
        ({"cand_ids": NONE}, "cand_ids.npy: query 6 has no candidate"),
        ({"labels": np.ones((10, 2))}, r"labels.npy: expected numbers \[10, 3\], got float64 \[10, 2\]"),
        ({"labels": np.where(np.eye(10, 3), 2.0, 0.5)}, r"query 0, candidate 0 has label 2; expected \[0, 1\]"),
        ({"labels": np.where(np.eye(10, 3), np.nan, 0.5)}, r"query 0, candidate 0 has label nan; expected \[0, 1\]"),
        ({"labels": None}, r"labels.npy: there is no such file; expected numbers in \[0, 1\], \[10, 3\]"),
        ({"labels": None, "qrels": np.ones((3, 3), int)}, r"qrels.npy: expected integers \[M, 2\], got int64 \[3, 3\]"),
        ({"labels": None, "qrels": np.array([[1, 2], [10, 3]])}, "qrels.npy: row 1 names query 10; expected 0 .. 9"),
        ({"cand_ids": None}, "cand_ids.npy: there is no such file"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    write(tmp_path / "x", **change)
    with pytest.raises(DataError, match=message):
        scored_candidates(tmp_path / "x")


def test_too_few_queries_and_no_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such folder; expected one with query_emb.npy"):
        scored_candidates(tmp_path / "nowhere")
    write(tmp_path / "x", 9)
    with pytest.raises(DataError, match="9 queries; expected at least 10, to split them in three"):
        scored_candidates(tmp_path / "x")
    (tmp_path / "x" / "labels.npy").write_text("no array")
    with pytest.raises(DataError, match="labels.npy: not a NumPy array file"):
        scored_candidates(tmp_path / "x")
