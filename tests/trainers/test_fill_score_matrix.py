"""Filling a score matrix: on several devices, by blocks, and from where it stopped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers.errors import UserError
from trainers.score_matrix import fill_score_matrix

RNG = np.random.default_rng(0)
QUERIES, ITEMS = RNG.normal(size=(21, 3)).astype(np.float32), RNG.normal(size=(13, 3)).astype(np.float32)
EXACT = np.tanh(QUERIES) @ ITEMS.T


def scorer(frozen, queries, ids):
    return jnp.einsum("bd,bmd->bm", jnp.tanh(queries), frozen[ids], precision="highest")


@pytest.mark.parametrize(("devices", "rows"), [(1, 5), (8, 16), (8, 3), (3, 100)])
def test_rows_are_shared_by_devices(devices, rows):
    found = fill_score_matrix(scorer, ITEMS, QUERIES, 13, rows=rows, block=4, devices=jax.devices()[:devices])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, EXACT, atol=1e-5)


def test_it_goes_on_where_it_stopped(tmp_path):
    file, seen = tmp_path / "scores.npy", []

    def spy(frozen, queries, ids):
        jax.debug.callback(lambda q: seen.append(np.asarray(q)), queries[:, 0])
        return scorer(frozen, queries, ids)

    one = jax.devices()[:1]
    fill = lambda: fill_score_matrix(spy, ITEMS, QUERIES, 13, file, 5, 13, one)  # noqa: E731
    np.testing.assert_allclose(fill(), EXACT, atol=1e-5)
    jax.effects_barrier()
    assert len(seen) == 5
    ledger = tmp_path / "scores.npy.blocks.json"
    kept = json.loads(ledger.read_text())
    assert kept["done"] == [0, 1, 2, 3, 4] and kept["rows"] == 5
    # killed in the fourth and fifth block
    ledger.write_text(json.dumps({**kept, "done": [0, 1, 4]}))
    broken = np.lib.format.open_memmap(file, "r+")
    broken[0], broken[10:20] = 7, 0
    broken.flush()
    seen.clear()
    found = fill()
    jax.effects_barrier()
    np.testing.assert_allclose(np.concatenate(seen), QUERIES[10:20, 0])
    np.testing.assert_allclose(found[10:], EXACT[10:], atol=1e-5)
    assert (found[0] == 7).all()  # a block that is complete is not computed again
    np.testing.assert_array_equal(np.load(file), found)
    # killed before the first block was complete: begun anew
    ledger.write_text(json.dumps({**kept, "done": []}))
    file.unlink()
    np.testing.assert_allclose(fill(), EXACT, atol=1e-5)


def test_what_cannot_be_continued_is_refused(tmp_path):
    file, one = tmp_path / "scores.npy", jax.devices()[:1]
    fill = lambda items, queries, rows=21: fill_score_matrix(scorer, items, queries, 13, file, rows, 13, one)  # noqa: E731
    fill(ITEMS, QUERIES)
    for what in ((ITEMS + 1, QUERIES), (ITEMS, QUERIES + 1), (ITEMS, QUERIES, 4)):
        with pytest.raises(UserError, match="scores.npy holds scores of other queries, items or weights"):
            fill(*what)
    ledger = tmp_path / "scores.npy.blocks.json"
    text = ledger.read_text()
    ledger.write_text("{")
    with pytest.raises(UserError, match="scores.npy.blocks.json: cannot be read"):
        fill(ITEMS, QUERIES)
    ledger.write_text(text)
    file.write_text("x")
    with pytest.raises(UserError, match="scores.npy: cannot be continued"):
        fill(ITEMS, QUERIES)
    ledger.unlink()
    with pytest.raises(UserError, match="is there, but not scores.npy.blocks.json: it was not begun here"):
        fill(ITEMS, QUERIES)


def test_a_score_that_is_not_finite_is_named():
    queries = QUERIES.copy()
    queries[17, 1] = np.nan
    with pytest.raises(UserError, match="the scorer's score of query 17 and item 0 is not finite"):
        fill_score_matrix(scorer, ITEMS, queries, 13, rows=5, devices=jax.devices()[:1])
