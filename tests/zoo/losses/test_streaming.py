"""Streamed pair losses equal those of the whole matrix, gradients too, and hold no matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses import pairs, streaming
from zoo.losses.contrastive import nt_xent_per_example, unit_rows

RNG = np.random.default_rng(3)
Z = unit_rows(jnp.asarray(RNG.normal(size=(13, 5)), jnp.float32))
Y = jnp.asarray(RNG.integers(0, 4, 13))
REAL = jnp.arange(13) < 12
QUEUE, LABELS = unit_rows(jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32)), jnp.asarray(RNG.integers(0, 4, 7))
FILLED = jnp.arange(7) < 5

LOSSES = {
    "supcon": (streaming.streamed_supervised_contrastive, pairs.supervised_contrastive, {"temperature": 0.2}),
    "contrastive": (
        streaming.streamed_contrastive_pairs, pairs.contrastive_pairs,
        {"positive_margin": 0.9, "negative_margin": 0.2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tile", [4, 13, 64])
def test_in_batch_equals_the_matrix(name, tile):
    streamed, whole, settings = LOSSES[name]

    def matrix(z):
        return whole(z @ z.T, *pairs.pair_masks(Y, mask=REAL), **settings)

    def tiles(z):
        return streamed(z, Y, mask=REAL, tile=tile, **settings)

    np.testing.assert_allclose(tiles(Z), matrix(Z), atol=2e-6)
    weights = jnp.arange(13.0)
    grads = [jax.grad(lambda z, f=f: jnp.sum(weights * f(z)))(Z) for f in (tiles, matrix)]
    np.testing.assert_allclose(*grads, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_against_a_queue_with_empty_slots(name):
    streamed, whole, settings = LOSSES[name]
    masks = pairs.pair_masks(Y, LABELS, REAL, FILLED)
    got = streamed(Z, Y, mask=REAL, candidates=QUEUE, other_labels=LABELS, other_mask=FILLED, tile=3, **settings)
    np.testing.assert_allclose(got, whole(Z @ QUEUE.T, *masks, **settings), atol=2e-6)


def test_nt_xent_is_the_case_of_two_views():
    z1, z2 = Z[:6], Z[6:12]
    both = jnp.concatenate([z1, z2])
    got = streaming.streamed_supervised_contrastive(both, jnp.tile(jnp.arange(6), 2), 0.2, tile=5)
    np.testing.assert_allclose((got[:6] + got[6:]) / 2, nt_xent_per_example(z1, z2, 0.2), atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_no_matrix_is_held(name):
    streamed, _, settings = LOSSES[name]
    n, d, tile = 2048, 16, 64
    z, y = jnp.ones((n, d)), jnp.zeros(n, jnp.int32)
    grad = jax.jit(jax.grad(lambda z: jnp.sum(functools.partial(streamed, tile=tile, **settings)(z, y))))
    used = grad.lower(z).compile().memory_analysis().temp_size_in_bytes
    assert used < n * n * 4 / 2, used  # the matrix alone would take 16 MiB


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        streaming.streamed_contrastive_pairs(Z, Y, tile=0)
    with pytest.raises(ValueError, match="give both or neither"):
        streaming.streamed_contrastive_pairs(Z, Y, candidates=QUEUE)
