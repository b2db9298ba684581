"""Re-ranking with scores that have been paid for already."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.search import rerank

SCORES = jnp.asarray([[5.0, 1, 7, 7, 2, 0], [3.0, 3, 3, 3, 3, 3]])


def scorer(query, ids):
    return query[ids]


def test_known_scores_join_without_a_call_and_ties_fall_to_the_lowest_id():
    candidates = jnp.asarray([[4, 3, -1], [5, 1, 2]])
    known = (jnp.asarray([[7.0, 1.0], [3.0, 9.0]]), jnp.asarray([[2, 1], [0, -1]]))
    found = rerank(SCORES, jnp.arange(6), candidates, scorer, 4, 1, known)
    np.testing.assert_array_equal(found.ids, [[2, 3, 4, 1], [0, 1, 2, 5]])
    np.testing.assert_array_equal(found.scores, [[7, 7, 2, 1], [3, 3, 3, 3]])
    np.testing.assert_array_equal(found.scorer_calls, [2, 3])


def test_as_many_as_candidates_and_known_together():
    candidates = jnp.asarray([[4], [-1]])
    known = (jnp.asarray([[7.0], [3.0]]), jnp.asarray([[2], [1]]))
    found = rerank(SCORES, jnp.arange(6), candidates, scorer, 2, 8, known)
    np.testing.assert_array_equal(found.ids, [[2, 4], [1, -1]])
    np.testing.assert_array_equal(found.scores, [[7, 2], [3, -np.inf]])
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], the number of candidates; got 3"):
        rerank(SCORES, jnp.arange(6), candidates, scorer, 3, 8, known)
    with pytest.raises(ValueError, match=r"k must be in \[1, 1\]"):
        rerank(SCORES, jnp.arange(6), candidates, scorer, 2)
