"""Contrastive losses per example: loops from the definition, the official numbers, limits, masks and memory."""

from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses.contrastive import info_nce_per_example, nt_xent_per_example, unit_rows

GOLDEN = Path(__file__).parents[2] / "golden" / "dbpm_loss.npz"
nt_xent = jax.jit(nt_xent_per_example)
info_nce = jax.jit(info_nce_per_example, static_argnames="symmetric")


def features(rows=6, size=4, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(rows, size)), jnp.float32) for _ in range(2))


def loop_nt_xent(z1, z2, temperature):
    z = np.concatenate([z1, z2]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    n, out = len(z1), np.zeros(len(z1))
    for a in range(2 * n):
        p = (a + n) % (2 * n)
        total = sum(np.exp(z[a] @ z[k] / temperature) for k in range(2 * n) if k != a)
        out[a % n] += -np.log(np.exp(z[a] @ z[p] / temperature) / total) / 2
    return out


def loop_info_nce(a, b, temperature, symmetric):
    a, b = (np.asarray(z, np.float64) for z in (a, b))
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    out = []
    for i in range(len(a)):
        forth = [np.exp(a[i] @ b[k] / temperature) for k in range(len(a))]
        back = [np.exp(a[k] @ b[i] / temperature) for k in range(len(a))]
        forth, back = -np.log(forth[i] / sum(forth)), -np.log(back[i] / sum(back))
        out.append((forth + back) / 2 if symmetric else forth)
    return np.array(out)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_nt_xent_equals_the_loop(temperature):
    z1, z2 = features()
    np.testing.assert_allclose(nt_xent(z1, z2, temperature), loop_nt_xent(z1, z2, temperature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce_equals_the_loop(symmetric):
    a, b = features()
    got = info_nce(a, b, 0.3, symmetric=symmetric)
    np.testing.assert_allclose(got, loop_info_nce(a, b, 0.3, symmetric), rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_the_brief():
    z1, z2 = features()
    np.testing.assert_array_equal(nt_xent_per_example(z1, z2), nt_xent_per_example(z1, z2, 0.2))
    np.testing.assert_allclose(info_nce_per_example(z1, z2), loop_info_nce(z1, z2, 0.07, True), rtol=1e-4)


def test_nt_xent_and_its_gradients_equal_the_released_code():
    g = np.load(GOLDEN)
    loss, pull = jax.vjp(lambda a, b: nt_xent(a, b, 0.2), g["z1"], g["z2"])
    np.testing.assert_allclose(loss, g["loss"], rtol=1e-5, atol=1e-5)
    for got, wanted in zip(pull(jnp.asarray(g["cotangent"])), (g["grad1"], g["grad2"]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_equal_features_cost_the_log_of_the_choices(rows):
    z = jnp.ones((rows, 3))
    np.testing.assert_allclose(nt_xent_per_example(z, z), np.full(rows, np.log(2 * rows - 1)), atol=1e-6)
    np.testing.assert_allclose(info_nce_per_example(z, z), np.full(rows, np.log(rows)), atol=1e-6)


def test_low_temperature_does_not_overflow_and_perfect_pairs_cost_nothing():
    z = jnp.eye(4)
    for loss in (nt_xent_per_example, info_nce_per_example):
        np.testing.assert_allclose(loss(z, z, 1e-3), np.zeros(4), atol=1e-6)
        worst = loss(z, jnp.roll(z, 1, axis=0), 1e-3)
        np.testing.assert_allclose(worst, np.full(4, 1000.0), rtol=2e-3)


def test_loss_is_symmetric_scale_free_and_equivariant():
    z1, z2 = features()
    base = nt_xent(z1, z2, 0.2)
    np.testing.assert_allclose(nt_xent(z2, z1, 0.2), base, rtol=1e-5)
    np.testing.assert_allclose(nt_xent(7 * z1, 0.1 * z2, 0.2), base, rtol=1e-5)
    order = np.array([3, 1, 0, 5, 4, 2])
    np.testing.assert_allclose(nt_xent(z1[order], z2[order], 0.2), np.asarray(base)[order], rtol=1e-5)


@pytest.mark.parametrize("loss", [nt_xent_per_example, info_nce_per_example])
def test_masked_rows_are_neither_anchors_nor_negatives(loss):
    z1, z2 = features()
    mask = jnp.array([True, True, False, True, False, True])
    alone = loss(z1[mask], z2[mask], 0.2)
    for filler in (0.0, 1e3, np.nan):
        a, b = (jnp.where(mask[:, None], z, jnp.float32(filler)) for z in (z1, z2))
        got = loss(a, b, 0.2, mask)
        np.testing.assert_allclose(got[mask], alone, rtol=1e-5)
        np.testing.assert_array_equal(got[~mask], 0.0)
        grads = jax.grad(lambda a, b, m=mask: loss(a, b, 0.2, m).sum(), (0, 1))(a, b)
        wanted = jax.grad(lambda a, b: loss(a, b, 0.2).sum(), (0, 1))(z1[mask], z2[mask])
        for g, w in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(g[mask], w, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(g[~mask], 0.0)


def test_nothing_real_costs_nothing_and_has_no_gradient():
    z1, z2 = features()
    none = jnp.zeros(6, bool)
    value, grad = jax.value_and_grad(lambda a: nt_xent_per_example(a, z2, 0.2, none).sum())(z1)
    assert value == 0
    np.testing.assert_array_equal(grad, 0.0)


def test_zero_features_have_finite_loss_and_gradient():
    z = jnp.zeros((3, 4))
    value, grad = jax.value_and_grad(lambda a: nt_xent_per_example(a, z).sum())(z)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_unit_rows():
    z, _ = features()
    np.testing.assert_allclose(unit_rows(z), z / np.linalg.norm(z, axis=1, keepdims=True), rtol=1e-6)
    assert unit_rows(jnp.asarray(z, jnp.bfloat16)).dtype == jnp.float32


def test_half_precision_features_are_compared_in_float32():
    z1, z2 = (jnp.asarray(z, jnp.bfloat16) for z in features())
    got = nt_xent_per_example(z1, z2)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loop_nt_xent(np.float32(z1), np.float32(z2), 0.2), rtol=1e-5, atol=1e-5)


def test_temperature_may_be_learned():
    z1, z2 = features()
    grad = jax.grad(lambda t: nt_xent_per_example(z1, z2, t).mean())(jnp.float32(0.2))
    step = 1e-3
    wanted = (loop_nt_xent(z1, z2, 0.2 + step).mean() - loop_nt_xent(z1, z2, 0.2 - step).mean()) / (2 * step)
    np.testing.assert_allclose(grad, wanted, rtol=1e-3)


def test_memory_is_quadratic_in_rows_not_times_features():
    rows, size = 64, 256
    shapes = [jax.ShapeDtypeStruct((rows, size), jnp.float32)] * 2
    grad = jax.grad(lambda a, b: nt_xent_per_example(a, b).sum(), (0, 1))
    largest = 0

    def visit(jaxpr):
        nonlocal largest
        for equation in jaxpr.eqns:
            for v in equation.outvars:
                largest = max(largest, int(np.prod(v.aval.shape)))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(grad)(*shapes).jaxpr)
    assert largest <= max(2 * rows * rows, rows * size)


@pytest.mark.parametrize("loss", [nt_xent_per_example, info_nce_per_example])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(*features(), temperature)
