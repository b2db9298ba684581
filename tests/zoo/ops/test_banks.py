"""Streamed responses of a gallery to a bank, against whole matrices in float64, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops import banks

RNG = np.random.default_rng(3)
BANK, GALLERY = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((21, 4), (13, 4)))
T = np.asarray(BANK, np.float64) @ np.asarray(GALLERY, np.float64).T


def log_norm(beta):
    return np.array([np.log(sum(np.exp(beta * t - beta * col.max()) for t in col)) + beta * col.max() for col in T.T])


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (4, 5), (21, 13), (100, 100)])
def test_log_normalizer_chunked_equals_whole(chunk, block):
    for beta in (0.3, 20.0, 400.0):
        got = banks.bank_log_normalizer(BANK, GALLERY, beta, chunk, block)
        np.testing.assert_allclose(got, log_norm(beta), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [21, 16, 3])
def test_sharded_over_eight_devices_equals_one(rows):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    got = jax.jit(lambda b, g: banks.sharded_bank_log_normalizer(b, g, 20.0, mesh, "data", 2, 5))(BANK[:rows], GALLERY)
    want = banks.bank_log_normalizer(BANK[:rows], GALLERY, 20.0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
    with pytest.raises(ValueError, match="axis 'model' is not one of the mesh's: data"):
        banks.sharded_bank_log_normalizer(BANK, GALLERY, 1.0, mesh, "model")


@pytest.mark.parametrize("k", [1, 3, 13])
def test_activation_is_the_union_of_top_k(k):
    want = np.zeros(13, bool)
    for row in T:
        want[np.argsort(-row)[:k]] = True
    got = banks.bank_activation(BANK, GALLERY, k, chunk=5, block=4)
    np.testing.assert_array_equal(got, want)
    assert want.all() == (k == 13) or k == 3


def test_neighbourhood_is_the_mean_of_the_nearest():
    want = [np.mean(sorted(column)[-4:]) for column in T.T]
    np.testing.assert_allclose(banks.bank_neighbourhood(BANK, GALLERY, 4, 5, 4), want, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_sinkhorn_normalises_bank_and_gallery_in_turn(steps):
    x, columns = 2.0 * T, np.zeros(13)
    for _ in range(steps):
        rows = np.log(np.exp(x - columns).sum(1))
        columns = np.log(np.exp(x - rows[:, None]).sum(0))
    np.testing.assert_allclose(banks.bank_sinkhorn(BANK, GALLERY, 2.0, steps, 4), columns, rtol=1e-4, atol=1e-5)


def test_bfloat16_accumulates_in_float32():
    low = BANK.astype(jnp.bfloat16), GALLERY.astype(jnp.bfloat16)
    got = banks.bank_log_normalizer(*low, 1.0, 4, 5)
    assert got.dtype == jnp.float32
    want = banks.bank_log_normalizer(*(x.astype(jnp.float32) for x in low), 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_no_array_of_bank_times_gallery_exists():
    bank, gallery = jax.ShapeDtypeStruct((6000, 8), jnp.float32), jax.ShapeDtypeStruct((2000, 8), jnp.float32)
    stats = jax.jit(lambda b, g: banks.bank_log_normalizer(b, g, 20.0, 64, 500)).lower(bank, gallery)
    assert stats.compile().memory_analysis().temp_size_in_bytes < 4 * 6000 * 2000 / 20
    stats = jax.jit(lambda b, g: banks.bank_activation(b, g, 1, 500, 64)).lower(bank, gallery)
    assert stats.compile().memory_analysis().temp_size_in_bytes < 4 * 6000 * 2000 / 20
    stats = jax.jit(lambda b, g: banks.bank_sinkhorn(b, g, 20.0, 3, 64)).lower(bank, gallery)
    assert stats.compile().memory_analysis().temp_size_in_bytes < 4 * 6000 * 2000 / 20
