"""Pairs with hubs: the generator's law, and the reader's two layouts and its refusals."""

import numpy as np
import pytest

from data.retrieval_pairs import hub_pairs, retrieval_pairs
from data.stream import DataError


def test_generated_pairs_follow_their_law():
    data = hub_pairs(3, pairs=200, bank=2000, dimension=16)
    for split, rows in (("queries", 200), ("gallery", 200), ("query_bank", 2000), ("gallery_bank", 2000)):
        emb = data[split]["emb"]
        assert emb.shape == (rows, 16) and emb.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(emb, axis=1), 1, rtol=1e-5)
    assert (data["queries"]["item"] == np.arange(200)).all() and (data["gallery"]["item"] == np.arange(200)).all()
    similarities = data["queries"]["emb"] @ data["gallery"]["emb"].T
    assert np.diag(similarities).mean() > similarities.mean() + 0.3
    hub = data.info["hub"] / np.linalg.norm(data.info["hub"])
    along = {s: data[s]["emb"] @ hub for s in ("query_bank", "gallery_bank")}
    # queries all follow the hub direction by 0.8; gallery items by an exponential draw: more unequally
    assert along["gallery_bank"].std() > 1.2 * along["query_bank"].std()
    assert abs(along["gallery_bank"].mean() - along["query_bank"].mean()) < 0.2
    again, other = hub_pairs(3, 200, 2000, 16), hub_pairs(4, 200, 2000, 16)
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_a_shifted_bank_is_off_distribution_in_its_first_rows():
    clean, shifted = hub_pairs(1), hub_pairs(1, shifted=0.5)
    for split in ("queries", "gallery", "gallery_bank"):
        np.testing.assert_array_equal(shifted[split]["emb"], clean[split]["emb"])
    bank = shifted["query_bank"]["emb"]
    np.testing.assert_array_equal(bank[500:], clean["query_bank"]["emb"][500:])
    hub = clean.info["hub"] / np.linalg.norm(clean.info["hub"])
    assert (bank[500:] @ hub).mean() > (bank[:500] @ hub).mean() + 0.3
    assert bank[:500].mean(0) @ bank[:500].mean(0) > 0.3  # they share a direction of their own


@pytest.mark.parametrize("change", [{"pairs": 0}, {"bank": 0}, {"dimension": 0}, {"shifted": 1.5}, {"shifted": -0.1}])
def test_impossible_generators_are_refused(change):
    with pytest.raises(DataError, match="at least one pair, bank sample and dimension and a shifted share"):
        hub_pairs(**change)


def vectors(folder, **change):
    rng = np.random.default_rng(0)
    shapes = {"queries": (6, 4), "gallery": (3, 4), "query_bank": (5, 4), "gallery_bank": (2, 4)}
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    arrays["caption_item"] = np.array([0, 0, 0, 1, 2, 2])
    for name, value in {**arrays, **change}.items():
        if value is not None:
            np.save(folder / f"{name}.npy", value)
    return arrays


def matrices(folder, **change):
    rng = np.random.default_rng(1)
    arrays = {"S": rng.normal(size=(3, 3)), "S_bq": rng.normal(size=(5, 3)), "S_bg": rng.normal(size=(4, 3))}
    for name, value in {**arrays, **change}.items():
        if value is not None:
            np.save(folder / f"{name}.npy", value)
    return arrays


def test_reads_embeddings_and_their_map(tmp_path):
    arrays = vectors(tmp_path)
    data = retrieval_pairs(tmp_path)
    for split in ("queries", "gallery", "query_bank", "gallery_bank"):
        np.testing.assert_array_equal(data[split]["emb"], arrays[split])
    assert data["queries"]["item"].tolist() == [0, 0, 0, 1, 2, 2] and data["gallery"]["item"].tolist() == [0, 1, 2]
    assert data.info["dimension"] == 4
    (tmp_path / "gallery_bank.npy").unlink()
    assert "gallery_bank" not in retrieval_pairs(tmp_path).splits


def test_reads_matrices_in_order(tmp_path):
    arrays = matrices(tmp_path)
    data = retrieval_pairs(tmp_path)
    for split, name in (("queries", "S"), ("query_bank", "S_bq"), ("gallery_bank", "S_bg")):
        np.testing.assert_allclose(data[split]["sim"], arrays[name], rtol=1e-6)
        assert data[split]["sim"].dtype == np.float32
    assert data["queries"]["item"].tolist() == data["gallery"]["item"].tolist() == [0, 1, 2]
    assert set(data["gallery"]) == {"item"}


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (
            vectors,
            {"caption_item": None},
            r"caption_item.npy: there is no such file; expected integers \[6\].*6 queries",
        ),
        (vectors, {"caption_item": np.array([0, 0, 0, 1, 2, 3])}, "query 5 shows item 3; expected 0 .. 2"),
        (vectors, {"caption_item": np.array([0, 0, 0, 1, 2, -1])}, "query 5 shows item -1; expected 0 .. 2"),
        (vectors, {"caption_item": np.array([0, 1])}, r"expected integers \[6\], got int64 \[2\]"),
        (vectors, {"caption_item": np.zeros(6)}, r"expected integers \[6\], got float64 \[6\]"),
        (vectors, {"query_bank": None}, "query_bank.npy: there is no such file"),
        (vectors, {"gallery": None}, "gallery.npy: there is no such file"),
        (vectors, {"gallery_bank": np.ones((2, 3))}, "gallery_bank.npy: 3 columns, queries.npy has 4; expected emb"),
        (vectors, {"query_bank": np.zeros((0, 4))}, r"query_bank.npy: expected numbers \[n, m\], at least one of each"),
        (vectors, {"queries": np.full((6, 4), np.nan)}, "queries.npy: 24 values are not finite, the first in row 0"),
        (vectors, {"queries": np.array(["a", "b"])}, "queries.npy: expected numbers"),
        (
            matrices,
            {"S_bq": np.ones((5, 1000))},
            "S_bq.npy: 1000 columns, S.npy has 3; expected scores against one gall",
        ),
        (matrices, {"S": np.ones((4, 3))}, "4 queries cannot be matched to 3 items by their order"),
        (matrices, {"S_bg": np.array([[0, 1, np.inf]])}, "S_bg.npy: 1 values are not finite, the first in row 0"),
    ],
)
def test_bad_files_are_refused(tmp_path, make, change, message):
    make(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        retrieval_pairs(tmp_path)


def test_no_folder_and_no_array_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such folder; expected one with queries.npy and gallery.npy, or S"):
        retrieval_pairs(tmp_path / "nowhere")
    vectors(tmp_path)
    (tmp_path / "gallery.npy").write_text("no array")
    with pytest.raises(DataError, match="gallery.npy: not a NumPy array file"):
        retrieval_pairs(tmp_path)
