"""Token sets: the generator, the two layouts on disk, and every way they can be wrong."""

import numpy as np
import pytest

from data.stream import DataError
from data.token_sets import read_token_sets, token_set_dataset, topic_token_sets


def test_the_generator():
    data = topic_token_sets(3)
    documents, queries = data["documents"], data["queries"]
    assert documents["tokens"].shape == (400, 24, 32) and queries["tokens"].shape == (60, 8, 32)
    assert documents["mask"].all() and queries["mask"].all() and documents["tokens"].dtype == np.float32
    for split in (documents, queries):
        np.testing.assert_allclose(np.linalg.norm(split["tokens"], axis=-1), 1, atol=1e-5)
    source = data["qrels"]["document"]
    assert len(set(source)) == 60
    np.testing.assert_array_equal(data["qrels"]["query"], np.arange(60))
    # every query token is a noisy token of its source: 1 / sqrt(1 + 0.15^2 32) = 0.76 on average, each from another
    near = np.einsum("qid,qjd->qij", queries["tokens"], documents["tokens"][source])
    assert abs(near.max(-1).mean() - 0.76) < 0.02
    assert np.mean([len(set(row)) for row in near.argmax(-1)]) > 7.5
    # tokens scatter around three topics: within a document one in three pairs shares one
    first = documents["tokens"] @ documents["tokens"].transpose(0, 2, 1)
    pairs = first[:, *np.triu_indices(24, 1)]
    assert abs(np.mean(pairs) - 0.5 / 3) < 0.02


def test_the_generator_is_seeded():
    assert topic_token_sets(1).fingerprint == topic_token_sets(1).fingerprint != topic_token_sets(2).fingerprint
    with pytest.raises(DataError, match="no more queries than documents"):
        topic_token_sets(0, documents=3, queries=4)


RAGGED = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
OFFSETS = np.array([0, 2, 3, 9])


def write(folder, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_ragged_and_padded_agree(tmp_path):
    tokens, lengths = read_token_sets(write(tmp_path / "a", emb=RAGGED, offsets=OFFSETS))
    assert tokens.shape == (3, 6, 4) and tokens.dtype == np.float32
    np.testing.assert_array_equal(lengths, [2, 1, 6])
    np.testing.assert_array_equal(tokens[0, :2], RAGGED[:2])
    np.testing.assert_array_equal(tokens[1, 0], RAGGED[2])
    np.testing.assert_array_equal(tokens[2], RAGGED[3:])
    assert (tokens[0, 2:] == 0).all() and (tokens[1, 1:] == 0).all()
    padded = tokens.astype(np.float64)
    padded[0, 2:] = np.nan  # padding may hold anything
    again, counts = read_token_sets(write(tmp_path / "b", emb=padded, lengths=lengths))
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_array_equal(counts, lengths)


def test_documents_queries_and_relevance(tmp_path):
    write(tmp_path / "documents", emb=RAGGED, offsets=OFFSETS)
    write(tmp_path / "queries", emb=RAGGED[:4], offsets=np.array([0, 3, 4]))
    write(tmp_path, qrels=np.array([[0, 2], [1, 0]]))
    data = token_set_dataset(tmp_path)
    assert data["documents"]["tokens"].shape == (3, 6, 4) and data["queries"]["tokens"].shape == (2, 3, 4)
    np.testing.assert_array_equal(data["queries"]["mask"], [[True] * 3, [True, False, False]])
    np.testing.assert_array_equal(data["documents"]["mask"].sum(1), [2, 1, 6])
    np.testing.assert_array_equal(data["qrels"]["document"], [2, 0])
    assert data.info["dimension"] == 4
    (tmp_path / "qrels.npy").unlink()
    assert "qrels" not in token_set_dataset(tmp_path).splits


def test_documents_alone_are_asked_for_their_own_tokens(tmp_path):
    unit = 3 * RAGGED / np.linalg.norm(RAGGED, axis=1, keepdims=True)
    folder = write(tmp_path, emb=unit, offsets=OFFSETS)
    data = token_set_dataset(folder, seed=1, queries=60, query_tokens=3)
    assert data["queries"]["tokens"].shape == (3, 3, 4)
    np.testing.assert_allclose(np.linalg.norm(data["queries"]["tokens"], axis=-1), 1, atol=1e-5)
    assert sorted(data["qrels"]["document"]) == [0, 1, 2]
    assert data.fingerprint == token_set_dataset(folder, seed=1, query_tokens=3).fingerprint
    near = np.einsum("qid,qjd->qij", data["queries"]["tokens"], data["documents"]["tokens"][data["qrels"]["document"]])
    assert near.max(-1).mean() > 1.5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"offsets": OFFSETS}, r"emb.npy: there is no such file; expected token embeddings"),
        ({"emb": RAGGED}, r"offsets.npy: there is no such file; expected integers \[N \+ 1\]"),
        ({"emb": RAGGED, "offsets": OFFSETS[[0, 2, 1, 3]]}, r"not monotone: entry 2 is 2 after 3"),
        ({"emb": RAGGED, "offsets": OFFSETS[:3]}, r"offsets.npy: offsets run from 0 to 3; expected 0 to 9"),
        ({"emb": RAGGED, "offsets": OFFSETS + 1}, r"offsets run from 1 to 10"),
        ({"emb": RAGGED, "offsets": OFFSETS * 1.0}, r"offsets.npy: expected integers \[N \+ 1\].* got float64 \[4\]"),
        ({"emb": RAGGED, "offsets": np.array([0, 2, 2, 9])}, r"offsets.npy: set 1 is empty \(1 such\)"),
        ({"emb": RAGGED[:, 0], "offsets": OFFSETS}, r"emb.npy: expected floats .* got float32 \[9\]"),
        ({"emb": RAGGED.astype(int), "offsets": OFFSETS}, r"emb.npy: expected floats .* got int64 \[9, 4\]"),
        ({"emb": np.zeros((3, 0)), "offsets": np.array([0, 3])}, r"got float64 \[3, 0\]"),
        ({"emb": np.ones((2, 3, 4)), "lengths": np.array([1, 4])}, r"lengths.npy: set 1 has length 4; expected 1 .. 3"),
        ({"emb": np.ones((2, 3, 4)), "lengths": np.array([0, 3])}, r"lengths.npy: set 0 is empty"),
        ({"emb": np.ones((2, 3, 4)), "lengths": np.array([1])}, r"lengths.npy: expected integers \[2\], got"),
        ({"emb": np.ones((2, 3, 4))}, r"lengths.npy: there is no such file"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        read_token_sets(write(tmp_path, **arrays))


def test_tokens_that_are_not_finite_are_named(tmp_path):
    bad = RAGGED.copy()
    bad[4, 1] = np.nan
    with pytest.raises(DataError, match=r"emb.npy: token 1 of set 2 is not finite \(1 such\)"):
        read_token_sets(write(tmp_path, emb=bad, offsets=OFFSETS))


def test_collections_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no such folder; expected one with emb.npy"):
        token_set_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"documents/emb.npy: there is no such file"):
        token_set_dataset(tmp_path)
    write(tmp_path / "documents", emb=RAGGED, offsets=OFFSETS)
    write(tmp_path / "queries", emb=RAGGED[:, :3], offsets=OFFSETS)
    with pytest.raises(DataError, match=r"queries/emb.npy: tokens have 3 dimensions, those of .*documents/emb.npy 4"):
        token_set_dataset(tmp_path)
    write(tmp_path / "queries", emb=RAGGED, offsets=OFFSETS)
    for pairs, message in (
        ([[0, 3]], r"qrels.npy: row 0 names documents 3; expected 0 .. 2"),
        ([[0, 1], [3, 0]], r"row 1 names queries 3"),
        ([[0, -1]], r"row 0 names documents -1"),
        ([0, 1], r"expected integers \[M, 2\], got int64 \[2\]"),
    ):
        write(tmp_path, qrels=np.array(pairs))
        with pytest.raises(DataError, match=message):
            token_set_dataset(tmp_path)
    (tmp_path / "queries" / "emb.npy").write_bytes(b"not numpy")
    with pytest.raises(DataError, match=r"queries/emb.npy: not a NumPy array file"):
        token_set_dataset(tmp_path)
