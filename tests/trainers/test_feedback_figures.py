"""Vectors of texts and the figures of every amount of feedback, by hand and by loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from data.bm25 import BM25
from data.feedback import clustered_feedback
from data.text import Tokenizer
from trainers.feedback import bag_of_words, bm25_weights, check_positives, latent_vectors, measurement
from trainers.recipe import UserError
from zoo.retrieval.lol import Reviser


def test_bags_of_words_leave_special_tokens_out():
    ids = np.array([[2, 7, 6, 7, 3, 0], [2, 5, 3, 0, 0, 0]])
    np.testing.assert_array_equal(bag_of_words(ids, 8), [[0, 0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 0, 1, 0, 0]])


def test_token_weights_are_bm25():
    texts = ["red fox red dog", "blue fox", "dog dog blue bird cat", "cat"]
    tokenizer = Tokenizer.train(texts, 100)
    weights = bm25_weights(tokenizer.encode(texts, 10), tokenizer.vocab_size)
    asked = ["fox red", "dog", "cat cat bird"]
    got = bag_of_words(tokenizer.encode(asked, 8), tokenizer.vocab_size) @ weights.T
    reference = BM25(texts, stop=frozenset(), stem=False)
    assert len(set(map(tuple, weights))) == 4
    np.testing.assert_allclose(got, [reference.scores(a) for a in asked], rtol=1e-5)


def test_latent_vectors_are_weighted_sums():
    words, idf = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), np.array([0.0, 3.0, 2.0])
    np.testing.assert_allclose(latent_vectors(np.array([[1, 2, 0], [0, 0, 0]]), words, idf), [[0.6, 0.8], [0, 0]])


def test_queries_without_positives_are_named():
    check_positives(["q1"], np.array([[3, -1]]))
    with pytest.raises(UserError, match=r"qid 42: no positive passage in the training sub-corpus \(1 such queries\)"):
        check_positives(["7", "42"], np.array([[3, -1], [-1, -1]]))


def test_measurements_are_their_loop():
    data = clustered_feedback(0, documents=120, clusters=12, d=6, train=1, test=70, k_max=2)
    index, test = data["documents"]["vector"], {k: v.copy() for k, v in data["test"].items()}
    test["feedback"][::4, 1] = -1

    def revise(params, query, passages, sizes, keys):
        reads = jnp.arange(2) < sizes[:, :, None]
        mean = query[:, None] + params * jnp.einsum("brk,bkd->brd", reads.astype(jnp.float32), passages)
        return 5.0 * mean, sizes

    got = measurement(Reviser(revise, revise), test, index, index)(jnp.float32(0.5))
    losses, ranks = np.zeros((70, 3)), np.zeros((70, 3))
    for n in range(70):
        for k in range(3):
            own = [d for d in test["feedback"][n, :k] if d >= 0]
            s = index @ (5 * (test["query"][n] + 0.5 * sum((index[d] for d in own), np.zeros(6))))
            target = test["positives"][n, 0]
            losses[n, k], ranks[n, k] = np.log(np.exp(s).sum()) - s[target], (s > s[target]).sum() + 1
    for k in range(3):
        assert got[f"loss_at_{k}"] == pytest.approx(losses[:, k].mean(), rel=1e-5)
        mrr = np.where(ranks[:, k] <= 10, 1 / ranks[:, k], 0).mean()
        assert got[f"mrr_at_10_with_{k}"] == pytest.approx(mrr, rel=1e-5)
    change = np.diff(losses, axis=1)
    same = np.abs(change) < 1e-9  # without a second document
    assert same.sum() == 18
    assert got["excess"] == pytest.approx(np.maximum(change, 0).mean(), rel=1e-4)
    assert got["worse_2"] == pytest.approx(((change > 1e-6)[:, 1]).mean())
    assert got["worse"] == pytest.approx((change > 1e-6).mean())
