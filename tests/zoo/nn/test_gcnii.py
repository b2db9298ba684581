"""GCNII against loops over edges, and what padding and depth do to it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.gcnii import GCNII, GCN2Conv, propagate, symmetric_weights

RNG = np.random.default_rng(0)
SRC, DST = jnp.array([0, 1, 1, 2, 3, 9]), jnp.array([1, 0, 2, 1, 1, 9])
MASK = jnp.array([True] * 5 + [False])
X = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)


def matrix():
    a = np.eye(4)
    for s, d in zip(np.asarray(SRC)[:5], np.asarray(DST)[:5], strict=True):
        a[d, s] += 1
    degree = a.sum(1)
    return a / np.sqrt(degree[:, None] * degree[None, :])


def test_propagation_is_the_normalised_matrix_and_padding_sends_nothing():
    weight, loops = symmetric_weights(SRC, DST, 4, MASK)
    np.testing.assert_allclose(propagate(X, SRC, DST, weight, loops), matrix() @ X, rtol=1e-5, atol=1e-6)
    weight, loops = symmetric_weights(SRC[:5], DST[:5], 4)
    np.testing.assert_allclose(propagate(X, SRC[:5], DST[:5], weight, loops), matrix() @ X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_one_layer_by_the_definition(shared):
    smoothed, first = jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32)
    layer = GCN2Conv(3, alpha=0.2, theta=0.6, shared_weights=shared)
    params = layer.init(jax.random.key(0), smoothed, first)["params"]
    w = np.asarray(params["weight"]["kernel"])
    beta = math.log(0.6 / 3 + 1)
    if shared:
        h = 0.8 * smoothed + 0.2 * first
        expected = (1 - beta) * h + beta * h @ w
    else:
        own = np.asarray(params["weight_first"]["kernel"])
        expected = (1 - beta) * (0.8 * smoothed + 0.2 * first) + beta * (0.8 * smoothed @ w + 0.2 * first @ own)
    np.testing.assert_allclose(layer.apply({"params": params}, smoothed, first), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="layers count from 1"):
        GCN2Conv(0).init(jax.random.key(0), smoothed, first)


def test_the_encoder_layer_by_layer():
    module = GCNII(5, 2, alpha=0.3, theta=0.4)
    params = module.init(jax.random.key(1), X, SRC, DST, MASK)["params"]
    p = jax.tree.map(np.asarray, params)
    h = first = np.maximum(X @ p["embed"]["kernel"] + p["embed"]["bias"], 0)
    for layer in (1, 2):
        mixed = 0.7 * matrix() @ h + 0.3 * first
        beta = math.log(0.4 / layer + 1)
        h = np.maximum((1 - beta) * mixed + beta * mixed @ p[f"conv{layer}"]["weight"]["kernel"], 0)
    expected = h @ p["out"]["kernel"] + p["out"]["bias"]
    apply = jax.jit(lambda x, keys=None: module.apply({"params": params}, x, SRC, DST, MASK, keys))
    np.testing.assert_allclose(apply(X), expected, rtol=1e-4, atol=1e-5)
    keys = jax.random.split(jax.random.key(0), 4)
    dropped = apply(X, keys)
    assert np.abs(np.asarray(dropped) - expected).max() > 1e-3
    np.testing.assert_array_equal(dropped, apply(X, keys))


def test_twelve_layers_do_not_collapse():
    module = GCNII(8, 12)
    z = jax.jit(lambda x: module.init_with_output(jax.random.key(0), x, SRC, DST, MASK)[0])(X)
    assert np.isfinite(z).all() and float(jnp.std(z, 0).mean()) > 1e-3
    assert set(module.example_inputs()) == {"x", "src", "dst", "mask"}
