"""Generated feedback, runs and document vectors from files, and what cannot be read."""

import numpy as np
import pytest

from data.feedback import clustered_feedback, read_document_vectors, read_run
from data.stream import DataError


def test_generated_feedback_is_what_a_first_pass_finds():
    data = clustered_feedback(3, documents=60, clusters=6, d=8, train=30, test=20, k_max=4)
    vectors, train, test = data["documents"]["vector"], data["train"], data["test"]
    for x in (vectors, train["query"], test["query"]):
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    for part, n in ((train, 30), (test, 20)):
        assert part["query"].shape == (n, 8) and part["positives"].shape == (n, 1)
        scores = part["query"] @ vectors.T
        for own, row in zip(part["feedback"], scores, strict=True):
            assert own.tolist() == sorted(range(60), key=lambda j, row=row: -row[j])[:4]
        # a query is near its document
        near = np.take_along_axis(scores, part["positives"], 1)[:, 0]
        assert near.mean() > scores.mean() + 0.4
    # documents i and i + 6 share a cluster
    alike = vectors @ vectors.T
    assert np.mean([alike[i, i + 6] for i in range(54)]) > np.mean([alike[i, i + 5] for i in range(54)]) + 0.4
    again = clustered_feedback(3, documents=60, clusters=6, d=8, train=30, test=20, k_max=4)
    np.testing.assert_array_equal(again["test"]["query"], test["query"])
    with pytest.raises(DataError, match=r"k_max in \[0, documents\]; got 3, 80, 24, 600, 400 and k_max 4"):
        clustered_feedback(documents=3, k_max=4)


QUERIES, DOCUMENTS = ["a", "b", "c"], ["x", "y", "z", "w"]


@pytest.mark.parametrize(
    "lines",
    [
        ["a\ty\t2", "a\tx\t1", "b\tz\t1", "a\tw\t3", "other\tx\t1"],
        ["a Q0 y 2 0.5 me", "a Q0 x 1 0.9 me", "b Q0 z 1 0.3 me", "a Q0 w 3 0.1 me", "other Q0 nowhere 1 1 me"],
    ],
)
def test_runs_are_read_by_rank(lines, tmp_path):
    (tmp_path / "run.tsv").write_text("\n".join(lines))
    ids, counts = read_run(tmp_path / "run.tsv", QUERIES, DOCUMENTS, 2)
    np.testing.assert_array_equal(ids, [[0, 1], [2, -1], [-1, -1]])
    np.testing.assert_array_equal(counts, [2, 1, 0])


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["a x 1", "a y 2", "a x 3"], "line 3: query 'a' has document 'x' twice"),
        (["a nobody 1"], "line 1: document 'nobody' is not in the collection"),
        (["a x first"], "line 1: expected `qid pid rank` or TREC's `qid Q0 pid rank score tag`, got 'a x first'"),
        (["a x"], "line 1: expected `qid pid rank`"),
    ],
)
def test_runs_that_make_no_sense(lines, says, tmp_path):
    (tmp_path / "run.tsv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=says):
        read_run(tmp_path / "run.tsv", QUERIES, DOCUMENTS, 2)
    with pytest.raises(DataError, match="no such file"):
        read_run(tmp_path / "nothing.tsv", QUERIES, DOCUMENTS, 2)


def test_vectors_take_the_collections_order(tmp_path):
    rows = np.arange(8, dtype=np.float64).reshape(4, 2)
    np.save(tmp_path / "m.npy", rows)
    (tmp_path / "ids.txt").write_text("w\nx\nz\ny\n")
    got = read_document_vectors(tmp_path / "m.npy", tmp_path / "ids.txt", DOCUMENTS)
    np.testing.assert_array_equal(got, rows[[1, 3, 2, 0]])
    assert got.dtype == np.float32
    for text, says in (
        ("w\nx\nz\n", "has 4 rows, but .* names 3 documents"),
        ("w\nx\nz\nx\n", "id 'x' occurs twice"),
        ("w\nx\nz\nq\n", "1 documents of the collection have no vector, first 'y'"),
    ):
        (tmp_path / "ids.txt").write_text(text)
        with pytest.raises(DataError, match=says):
            read_document_vectors(tmp_path / "m.npy", tmp_path / "ids.txt", DOCUMENTS)
