"""Sparse heads: hand cases, masks, special words and lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.sparse_heads import TokenWeights, scatter_max, sparse_vector, vocabulary_max, word_mask


def test_padding_never_wins_the_maximum():
    scores = jnp.array([[[1.0, -200.0, 3.0], [2.0, -300.0, 1.0], [9.0, 9.0, 9.0]], [[5.0, 5.0, 5.0]] * 3])
    mask = jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_array_equal(vocabulary_max(scores, mask), [[2, -200, 3], [0, 0, 0]])
    grad = jax.grad(lambda s: vocabulary_max(s, mask)[0] @ jnp.array([1.0, 2.0, 4.0]))(scores)
    np.testing.assert_array_equal(grad[0], [[0, 2, 4], [1, 0, 0], [0, 0, 0]])
    assert not grad[1].any()


def test_a_words_weight_is_its_largest():
    weights = jnp.array([[1.0, 3.0, 2.0, 9.0], [-1.0, 0.5, 0.0, 0.0]])
    ids, mask = (
        jnp.array([[4, 1, 4, 1], [2, 0, 0, 0]]),
        jnp.array([[True, True, True, False], [True, True, False, False]]),
    )
    np.testing.assert_array_equal(scatter_max(weights, ids, 5, mask), [[0, 3, 0, 0, 2], [0.5, 0, 0, 0, 0]])


def test_special_words_are_exactly_zero():
    words = word_mask(8, 5, (2,))
    np.testing.assert_array_equal(words, [0, 0, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(word_mask(4, 3), [0, 0, 0, 1])
    got = sparse_vector(jnp.full((1, 8), 2.0).at[0, 6].set(-1.0), words, norm="none")
    np.testing.assert_array_equal(got, [[0, 0, 2, 0, 0, 2, 0, 2]])


def test_lengths_and_saturation():
    words = jnp.ones(2, bool)
    scores = jnp.array([[3.0, 4.0], [0.3, 0.4], [-1.0, 0.0]])
    np.testing.assert_allclose(sparse_vector(scores, words), [[0.6, 0.8], [0.6, 0.8], [0, 0]], atol=1e-6)
    got = sparse_vector(scores, words, norm="at_most_unit")
    np.testing.assert_allclose(got, [[0.6, 0.8], [0.3, 0.4], [0, 0]], atol=1e-6)
    damped = sparse_vector(scores, words, True, "none")
    np.testing.assert_allclose(damped, np.log1p(np.maximum(scores, 0)), rtol=1e-6)
    grad = jax.grad(lambda s: jnp.sum(sparse_vector(s, words)))(jnp.zeros((1, 2)))
    assert np.isfinite(grad).all()
    with pytest.raises(ValueError, match="norm must be 'unit', 'at_most_unit' or 'none', got 'l1'"):
        sparse_vector(scores, words, norm="l1")


def test_token_weights_are_a_linear_map_and_relu():
    module = TokenWeights()
    tokens = jnp.array([[[1.0, 2.0], [-1.0, 0.0]]])
    params = {"weight": {"kernel": jnp.array([[2.0], [-0.5]]), "bias": jnp.array([0.25])}}
    np.testing.assert_allclose(module.apply({"params": params}, tokens), [[1.25, 0.0]])
