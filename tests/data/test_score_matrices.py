"""Generated score matrices and token pairs, and reading a matrix from disk."""

import numpy as np
import pytest

from data.score_matrices import CLS, END, SEP, START, TITLE, low_rank_scores, matching_pairs, read_score_matrix
from data.stream import DataError


def test_the_stand_in_has_its_spectrum():
    m = low_rank_scores(0)["queries"]["scores"]
    assert m.shape == (300, 3000) and m.dtype == np.float32
    plain = low_rank_scores(0, noise=0.0, bend=0.0)["queries"]["scores"]
    s = np.linalg.svd(plain, compute_uv=False)
    assert s[30] < 1e-4 * s[0] and 0.02 < s[29] / s[0] < 0.06  # e^(-29/8) = 0.027
    np.testing.assert_allclose(
        low_rank_scores(0, noise=0.0)["queries"]["scores"], plain + 0.1 * np.tanh(plain), atol=1e-5
    )
    noisy = low_rank_scores(0, bend=0.0)["queries"]["scores"] - plain
    assert noisy.std() == pytest.approx(0.02, rel=0.01)
    # rows keep the variance of sum_j e^(-2 j / 8)
    assert plain.var() == pytest.approx(1 / (1 - np.exp(-0.25)), rel=0.1)
    assert not np.array_equal(low_rank_scores(1)["queries"]["scores"], m)
    with pytest.raises(DataError, match="sizes and decay must be positive"):
        low_rank_scores(0, items=0)


def test_pairs_ask_for_one_item_by_its_attributes():
    made = matching_pairs(0, items=60, train=50, test=9, values=4)
    items, train = made["items"]["tokens"], made["train"]
    assert items.shape == (60, 8) and train["tokens"].shape == (50, 10) and made["test"]["tokens"].shape == (9, 10)
    assert made.info["tags"] == (START, END, TITLE) and made.info["vocab_size"] == 6 + 24 + 30
    assert (items[:, 2] == TITLE).all() and (items[:, 7] == SEP).all() and (items == TITLE).sum() == 60
    q = train["tokens"]
    assert (q[:, 0] == CLS).all() and (q[:, 3] == START).all() and (q[:, 6] == END).all() and (q[:, 9] == SEP).all()
    # the query's three words are the item's, 12 ids on; no two items have the same three
    own = items[:, [0, 1, 3]]
    assert len({tuple(row) for row in own}) == 60
    np.testing.assert_array_equal(q[:, [4, 5, 7]], own[train["positive"]] + 12)
    assert items.max() < 60 and items[:, 4:7].min() >= 30 and q[:, [1, 2, 8]].min() >= 30
    with pytest.raises(DataError, match="4 values of three attributes make 64 items; asked for 65"):
        matching_pairs(items=65, values=4)


def test_reading_a_matrix(tmp_path):
    file, names = tmp_path / "m.npy", tmp_path / "items.txt"
    m = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float16)
    np.save(file, m)
    found, own = read_score_matrix(file)
    np.testing.assert_array_equal(found, m)
    assert own == ["0", "1", "2", "3", "4"]
    names.write_text("a\nb\nc\nd\ne\n")
    assert read_score_matrix(file, names)[1] == ["a", "b", "c", "d", "e"]
    names.write_text("a\nb\nc\nd\n")
    with pytest.raises(DataError, match=r"m.npy: has 5 items, but .*items.txt lists 4"):
        read_score_matrix(file, names)
    with pytest.raises(DataError, match="nothing.txt: cannot be read"):
        read_score_matrix(file, tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (np.zeros((3,), np.float32), r"expected scores as floats \[queries, items\], got float32 \[3\]"),
        (np.zeros((3, 2), np.int64), r"expected scores as floats \[queries, items\], got int64 \[3, 2\]"),
        (np.zeros((0, 2), np.float32), r"got an empty matrix \[0, 2\]"),
        (np.array([{}], dtype=object), "cannot be read as .npy"),
    ],
)
def test_bad_matrices(tmp_path, made, says):
    np.save(tmp_path / "m.npy", made, allow_pickle=True)
    with pytest.raises(DataError, match=says):
        read_score_matrix(tmp_path / "m.npy")


def test_bad_numbers_and_files(tmp_path):
    m = np.zeros((400, 3), np.float32)
    m[270, 2] = np.nan
    np.save(tmp_path / "m.npy", m)
    with pytest.raises(DataError, match="score of query 270 and item 2 is not finite"):
        read_score_matrix(tmp_path / "m.npy")
    (tmp_path / "text.npy").write_text("no matrix")
    for name in ("text.npy", "nowhere.npy"):
        with pytest.raises(DataError, match=f"{name}: cannot be read as .npy"):
            read_score_matrix(tmp_path / name)
