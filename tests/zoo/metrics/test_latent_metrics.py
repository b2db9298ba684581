"""Comparisons of embeddings, against loops over items."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics.embeddings import linear_cka
from zoo.metrics.latents import (
    aligned_mrr,
    cosine_neighbours,
    kernel_cka,
    latent_distance,
    mean_cosine,
    topk_jaccard,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "relative_representations_official.npz")
RNG = np.random.default_rng(4)
X = RNG.normal(size=(23, 5)).astype(np.float32)
Y = (X + 0.8 * RNG.normal(size=(23, 5))).astype(np.float32) * RNG.uniform(0.1, 5, (23, 1)).astype(np.float32)
JX, JY = jnp.asarray(X), jnp.asarray(Y)


def lists(queries, space, k):
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    return [np.argsort(-row, kind="stable")[:k].tolist() for row in unit(queries) @ unit(space).T]


@pytest.mark.parametrize("k", [1, 4])
def test_shared_neighbours_and_ranks_by_the_definition(k):
    crossed, own = lists(X, Y, k), lists(Y, Y, k)
    np.testing.assert_array_equal(cosine_neighbours(JX, JY, k, chunk=7), crossed)
    jaccard = np.mean([len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(crossed, own, strict=True)])
    assert float(topk_jaccard(JX, JY, k, chunk=7)) == pytest.approx(jaccard, abs=1e-6)
    mrr = np.mean([1 / (1 + found.index(i)) if i in found else 0 for i, found in enumerate(crossed)])
    assert float(aligned_mrr(JX, JY, k)) == pytest.approx(mrr, abs=1e-6)
    assert 0 < jaccard < 1 and 0 < mrr < 1
    assert float(topk_jaccard(JX, JX, k)) == float(aligned_mrr(JX, JX, k)) == 1
    # the roles differ
    assert float(aligned_mrr(JX, JY, 4)) != float(aligned_mrr(JY, JX, 4))


def test_more_items_than_a_block():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1100, 3)), jnp.float32)
    assert float(aligned_mrr(x, 2 * x, 3, chunk=300)) == 1


def test_cosines_and_distances():
    x, y = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[4.0, 3.0], [-2.0, 0.0]])
    assert float(mean_cosine(x, y)) == pytest.approx((24 / 25 - 1) / 2)
    assert float(latent_distance(x, y)) == pytest.approx((np.sqrt(2) + 3) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="latents of 2 and 3 dimensions cannot be compared"):
        cosine_neighbours(x, jnp.ones((4, 3)), 1)


@pytest.mark.parametrize("chunk", [512, 7])
def test_kernel_alignment_is_the_released_codes(chunk):
    x, y = jnp.asarray(GOLDEN["cka_x"]), jnp.asarray(GOLDEN["cka_y"])
    np.testing.assert_allclose(kernel_cka(x, y, chunk=chunk), GOLDEN["kernel_cka"], rtol=1e-4)
    np.testing.assert_allclose(kernel_cka(x, y, 1.7, chunk), GOLDEN["kernel_cka_fixed"], rtol=1e-4)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0], jnp.float32)
    np.testing.assert_allclose(kernel_cka(x, 3 * x @ turn, chunk=chunk), 1, rtol=1e-5)
    # the linear one, in feature space, is the released Gram matrices'
    np.testing.assert_allclose(linear_cka(x, y), GOLDEN["linear_cka"], rtol=1e-4)
    np.testing.assert_allclose(linear_cka(x, 3 * x @ turn), 1, rtol=1e-5)
