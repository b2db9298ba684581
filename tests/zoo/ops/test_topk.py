"""Two-level top-k against lax.top_k: values, places, ties, NaN, types, gradients."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.topk import block_width, top_k


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(67, 5), (64, 1), (64, 7), (71, 8)])
def test_equals_lax_with_many_ties(n, k, width):
    x = jnp.asarray(np.random.default_rng(n + k).integers(0, 6, (9, n)), jnp.float32)
    same(jax.jit(top_k, static_argnums=(1, 2))(x, k, width), jax.lax.top_k(x, k))


def test_equals_lax_by_default_where_blocks_pay():
    x = jax.random.normal(jax.random.key(0), (3, 9001))
    assert block_width(9001, 20) > 1
    same(top_k(x, 20), jax.lax.top_k(x, 20))
    rising = jnp.arange(9001.0)[None]
    same(top_k(rising, 20), jax.lax.top_k(rising, 20))  # all winners in the rest behind the last whole block
    same(top_k(-rising, 20), jax.lax.top_k(-rising, 20))


def test_special_floats_rank_as_in_lax():
    rng = np.random.default_rng(0)
    pool = np.array([1, -1, 0.0, -0.0, np.inf, -np.inf, np.nan, np.copysign(np.nan, -1), 3e-39, -2], np.float32)
    x = jnp.asarray(rng.choice(pool, (40, 66)))
    for k in (1, 5, 12):
        values, places = top_k(x, k, 4)
        expected, where = jax.lax.top_k(x, k)
        np.testing.assert_array_equal(places, where)
        np.testing.assert_array_equal(np.asarray(values).view(np.int32), np.asarray(expected).view(np.int32))
    few = jnp.full((1, 40), -jnp.inf).at[0, 33].set(1.0)
    np.testing.assert_array_equal(top_k(few, 3, 4)[1], [[33, 0, 1]])


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8, jnp.uint8])
def test_other_types(kind):
    x = jnp.asarray(np.random.default_rng(1).integers(0, 100, (4, 80)), kind)
    same(top_k(x, 6, 8), jax.lax.top_k(x, 6))
    if jnp.issubdtype(kind, jnp.signedinteger):
        same(top_k(-x, 6, 8), jax.lax.top_k(-x, 6))


def test_leading_axes_vmap_and_small_rows():
    x = jax.random.normal(jax.random.key(2), (2, 3, 50))
    same(top_k(x, 4, 8), jax.lax.top_k(x, 4))
    same(top_k(x[0, 0], 4, 8), jax.lax.top_k(x[0, 0], 4))
    same(jax.vmap(lambda r: top_k(r, 4, 8))(x), jax.lax.top_k(x, 4))
    same(top_k(x, 50, 8), jax.lax.top_k(x, 50))
    same(top_k(x, 0), jax.lax.top_k(x, 0))
    same(top_k(x, 6, 8), jax.lax.top_k(x, 6))  # as many blocks as winners: nothing to gain


def test_the_gradient_reaches_the_winners_only():
    x = jax.random.normal(jax.random.key(3), (2, 60))
    weights = jnp.array([1.0, 2.0, 3.0])
    loss = lambda f: jax.grad(lambda x: jnp.sum(f(x)[0] * weights))(x)  # noqa: E731
    np.testing.assert_array_equal(loss(lambda x: top_k(x, 3, 4)), loss(lambda x: jax.lax.top_k(x, 3)))


def test_widths():
    assert block_width(100_000, 100) == 32
    assert block_width(1000, 1) == 0
    assert block_width(100_000, 40_000) == 0
    assert block_width(10**7, 1) == 32
    assert block_width(16_384, 100) == 16 and block_width(5000, 1000) == 0


def test_wrong_sizes_are_named():
    x = jnp.zeros((2, 5))
    for k in (6, -1):
        with pytest.raises(ValueError, match=rf"k must be in \[0, 5\], the entries of a row; got {k}"):
            top_k(x, k)
    with pytest.raises(ValueError, match="width must not be negative, got -2"):
        top_k(x, 2, -2)


@pytest.mark.bench
def test_clearly_faster_than_lax():
    x = jax.random.normal(jax.random.key(0), (256, 100_000))
    ours, theirs = jax.jit(lambda x: top_k(x, 100)), jax.jit(lambda x: jax.lax.top_k(x, 100))
    seconds = {}
    for name, f in (("ours", ours), ("lax", theirs)):
        jax.block_until_ready(f(x))
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(f(x))
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    assert seconds["ours"] < 0.8 * seconds["lax"], seconds
