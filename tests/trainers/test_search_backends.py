"""Searches of other libraries against the definition; what needs faiss is skipped without it."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from trainers import search_backends as backends
from trainers.errors import UserError
from zoo.ops import search

RNG = np.random.default_rng(0)
QUERIES = RNG.integers(-2, 3, (4, 6)).astype(np.float32)
DOCUMENTS = RNG.integers(-2, 3, (40, 6)).astype(np.float32)
FLAT, SHARP = RNG.normal(size=(5, 8)).astype(np.float32), RNG.normal(size=(300, 8)).astype(np.float32)


def mips_topk(queries, documents, k, mask=None):
    mask = None if mask is None else jnp.asarray(mask)
    return tuple(map(np.asarray, search.mips_topk(jnp.asarray(queries), jnp.asarray(documents), k, mask=mask)))


def same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[0].dtype == np.float32 and found[1].dtype == np.int32


@pytest.mark.parametrize("name", ["numpy_flat", "faiss_flat"])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_exact_searches_find_what_ours_finds(name, k, masked):
    if name.startswith("faiss"):
        pytest.importorskip("faiss")
    mask = np.arange(300) % 5 == 2 if masked else None
    same(getattr(backends, name)(FLAT, SHARP, k, mask), mips_topk(FLAT, SHARP, k, mask=mask))


def test_equal_scores_come_by_their_ids():
    found = backends.numpy_flat(QUERIES, DOCUMENTS, 40)
    same(found, mips_topk(QUERIES, DOCUMENTS, 40))


def test_clusters_find_all_when_all_are_probed_and_less_otherwise():
    pytest.importorskip("faiss")
    expected = mips_topk(FLAT, SHARP, 9)
    same(backends.faiss_ivf(FLAT, SHARP, 9, None, 12, 12), expected)
    few = backends.faiss_ivf(FLAT, SHARP, 9, None, 12, 1)
    assert 0.05 < np.mean([len(set(a) & set(b)) / 9 for a, b in zip(few[1], expected[1], strict=True)]) < 1
    mask = np.arange(300) < 4
    masked = backends.faiss_ivf(FLAT, SHARP, 6, mask, 12, 12)
    assert (masked[1][:, 4:] == -1).all() and np.isneginf(masked[0][:, 4:]).all()
    np.testing.assert_array_equal(np.sort(masked[1][:, :4], 1), np.tile(np.arange(4), (5, 1)))
    coarse = backends.faiss_ivfpq(FLAT, SHARP, 9, None, 12, 12, 4, 4)
    share = np.mean([len(set(a) & set(b)) / 9 for a, b in zip(coarse[1], expected[1], strict=True)])
    assert 0.3 < share < 1
    same(backends.faiss_ivfpq(FLAT, SHARP, 9, None, 12, 12, 4, 4, 33), expected)
    refined = backends.faiss_ivfpq(FLAT, SHARP, 9, None, 12, 12, 4, 4, 3)
    assert share < np.mean([len(set(a) & set(b)) / 9 for a, b in zip(refined[1], expected[1], strict=True)])


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="needs faiss, which is not installed: pip install faiss-cpu"):
        backends.faiss_flat(QUERIES, DOCUMENTS, 3)


def test_wrong_sizes_are_named():
    with pytest.raises(UserError, match="queries have D=5, database D=6"):
        backends.numpy_flat(QUERIES[:, :5], DOCUMENTS, 3)
    for k in (0, 41):
        with pytest.raises(UserError, match=rf"k must be in \[1, 40\], the number of documents; got {k}"):
            backends.numpy_flat(QUERIES, DOCUMENTS, k)
    with pytest.raises(UserError, match=r"mask must be bool \[40\], got \[39\]"):
        backends.numpy_flat(QUERIES, DOCUMENTS, 3, np.ones(39, bool))


def test_wrong_indices_are_named():
    pytest.importorskip("faiss")
    for kind, change, message in (
        ("hnsw", {}, "kind must be 'flat', 'ivf' or 'ivfpq', got 'hnsw'"),
        ("ivf", {"lists": 41}, r"lists must be in \[1, 40\]"),
        ("ivfpq", {"lists": 2, "parts": 4, "bits": 4}, "parts must divide the dimension 6"),
        ("ivfpq", {"lists": 2, "parts": 3, "bits": 6}, "at most 40 centroids"),
    ):
        with pytest.raises(UserError, match=message):
            backends.faiss_index(DOCUMENTS, kind, **change)
    with pytest.raises(UserError, match=r"documents must be \[n, d\]"):
        backends.faiss_index(DOCUMENTS[:0], "flat")
