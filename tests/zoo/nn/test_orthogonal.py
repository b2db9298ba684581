"""Orthogonal layers: exactly orthogonal, by every map, after training too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from zoo.nn.orthogonal import METHODS, OrthogonalDense, fold_orthogonal, rotation

RNG = np.random.default_rng(0)
A = RNG.normal(size=(5, 5)).astype(np.float32)


def reference(a, method):
    """Each map from its definition, in float64."""
    a = a.astype(np.float64)
    d = len(a)
    below = np.tril(a, -1)
    s, eye = below - below.T, np.eye(d)
    if method == "expm":
        return scipy.linalg.expm(s)
    if method == "cayley":
        return np.linalg.inv(eye - s) @ (eye + s)
    if method == "householder":
        q = eye.copy()
        for i in range(d):
            v = (eye + below)[:, i]
            q = q @ (eye - 2 * np.outer(v, v) / (v @ v))
        return (-1) ** d * q
    columns = []
    for column in (eye + s).T:  # Gram-Schmidt has a positive triangular factor
        for q in columns:
            column = column - (q @ column) * q
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, 1)


made = jax.jit(rotation, static_argnames="method")


@pytest.mark.parametrize("method", METHODS)
def test_maps_against_their_definitions(method):
    for size in (5, 4):
        a = A[:size, :size]
        q = np.asarray(made(a, method))
        np.testing.assert_allclose(q, reference(a, method), atol=1e-5)
        assert np.linalg.det(q) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(made(np.triu(A), method), np.eye(5))  # nothing on or above the diagonal counts


@pytest.mark.parametrize("method", METHODS)
def test_orthogonal_to_float_precision_whatever_the_size(method):
    for scale in (0.1, 10.0):
        a = (scale * np.random.default_rng(1).normal(size=(96, 96))).astype(np.float32)
        q = np.asarray(made(a, method), np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(96), atol=8e-7)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    w = RNG.normal(size=(5, 5)).astype(np.float32)
    grad = np.asarray(jax.jit(jax.grad(lambda a: jnp.sum(rotation(a, method) * w)))(jnp.asarray(A)))
    assert not np.triu(grad).any()
    step = RNG.normal(size=(5, 5))
    up, down = (np.sum(reference(A + s * 1e-5 * step, method) * w) for s in (1, -1))
    np.testing.assert_allclose(np.sum(grad * step), (up - down) / 2e-5, rtol=1e-3)


def test_a_layer_begins_at_a_random_orthogonal_matrix():
    layer = OrthogonalDense(5)
    first, second = (layer.init(jax.random.key(i), jnp.zeros((1, 5))) for i in range(2))
    assert set(first["params"]) == {"generator", "bias"} and set(first["constants"]) == {"base"}
    q, other = (np.asarray(layer.apply(v, method="matrix"), np.float64) for v in (first, second))
    np.testing.assert_allclose(q, first["constants"]["base"], atol=1e-6)
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=2e-6)
    assert np.abs(q - other).max() > 0.1 and np.abs(q - np.eye(5)).max() > 0.1
    bare = OrthogonalDense(5, use_bias=False).init(jax.random.key(0), jnp.zeros((1, 5)))
    assert set(bare["params"]) == {"generator"}


def test_the_map_is_x_times_q_transposed_plus_b():
    layer = OrthogonalDense(5, method="cayley")
    b = jnp.arange(5.0)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 5)))
    variables = {**variables, "params": {"generator": jnp.asarray(A), "bias": b}}
    q = np.asarray(variables["constants"]["base"], np.float64) @ reference(A, "cayley")
    x = RNG.normal(size=(7, 5)).astype(np.float32)
    y = np.asarray(layer.apply(variables, jnp.asarray(x)))
    np.testing.assert_allclose(y, [[float(q[i] @ row) + i for i in range(5)] for row in x], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y - b, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose((y - b) @ (y - b).T, x @ x.T, atol=1e-4)
    with pytest.raises(ValueError, match="an orthogonal layer of 5 features cannot take 4-d inputs"):
        layer.apply(variables, jnp.asarray(x[:, :4]))


def test_folding_leaves_the_outputs():
    layer = OrthogonalDense(5)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 5)))
    params = {"generator": jnp.asarray(A), "bias": jnp.arange(5.0)}
    variables = {**variables, "params": params}
    w, x = (RNG.normal(size=s).astype(np.float32) for s in ((3, 5), (7, 5)))
    kernel, bias = fold_orthogonal(jnp.asarray(w), layer.apply(variables, method="matrix"), params["bias"])
    np.testing.assert_allclose(x @ kernel.T + bias, layer.apply(variables, jnp.asarray(x)) @ w.T, atol=1e-5)
    _, none = fold_orthogonal(jnp.asarray(w), layer.apply(variables, method="matrix"))
    np.testing.assert_array_equal(none, np.zeros(3))


@pytest.mark.parametrize("method", METHODS)
def test_orthogonal_after_a_thousand_steps(method):
    layer = OrthogonalDense(6, method=method)
    x, y = (jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32) for _ in range(2))
    variables = layer.init(jax.random.key(0), x)
    tx = optax.adam(0.05)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value = lambda p: jnp.mean((layer.apply({**variables, "params": p}, x) - y) ** 2)  # noqa: E731
            updates, state = tx.update(jax.grad(value)(params), state)
            return (optax.apply_updates(params, updates), state), value(params)

        return jax.lax.scan(step, (params, tx.init(params)), None, 1000)

    (params, _), losses = run(variables["params"])
    q = np.asarray(layer.apply({**variables, "params": params}, method="matrix"), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-5)
    assert losses[-1] < losses[0] and np.abs(np.asarray(params["generator"])).max() > 0.1


def test_half_precision_parameters_still_give_an_orthogonal_matrix():
    q = np.asarray(made(jnp.asarray(A, jnp.bfloat16), "expm"), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=2e-6)


def test_unknown_maps():
    with pytest.raises(ValueError, match="method must be one of expm, cayley, householder, qr, got 'exp'"):
        rotation(jnp.asarray(A), "exp")
