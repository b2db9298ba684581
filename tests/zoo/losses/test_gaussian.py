"""The likelihood with the optimal scale, against its closed form, the released code's numbers and its gradient."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from zoo.losses.gaussian import optimal_sigma_nll

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "relative_representations_official.npz")


def test_the_released_codes_sum_and_gradient():
    prediction, image = jnp.asarray(GOLDEN["prediction"]), jnp.asarray(GOLDEN["image"])
    value, gradient = jax.value_and_grad(lambda p: optimal_sigma_nll(p, image).sum())(prediction)
    np.testing.assert_allclose(value, GOLDEN["nll"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN["nll_gradient"], rtol=1e-4, atol=1e-5)


def test_each_example_pays_for_its_own_error_and_all_for_the_scale():
    target = jnp.zeros((2, 3))
    prediction = jnp.array([[1.0, 0, 0], [2, 0, 1]])
    mse = 6 / 6
    np.testing.assert_allclose(optimal_sigma_nll(prediction, target), [0.5 / mse, 2.5 / mse], rtol=1e-6)
    mse = 4.0
    expected = [0.5 * 4 / mse + 1.5 * np.log(mse), 0.5 * 20 / mse + 1.5 * np.log(mse)]
    np.testing.assert_allclose(optimal_sigma_nll(2 * prediction, target), expected, rtol=1e-6)


def test_masked_rows_cost_nothing_and_have_no_say():
    rng = np.random.default_rng(0)
    p, t = (jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32) for _ in range(2))
    mask = jnp.array([True, False, True, True])
    found = optimal_sigma_nll(p, t, mask)
    kept = np.array([0, 2, 3])
    np.testing.assert_allclose(found[kept], optimal_sigma_nll(p[kept], t[kept]), rtol=1e-6)
    assert found[1] == 0
    gradient = jax.grad(lambda p: optimal_sigma_nll(p, t, mask).sum())(p)
    assert (gradient[1] == 0).all() and (np.abs(gradient[kept]) > 0).all()


def test_a_perfect_reconstruction_is_finite():
    x = jnp.ones((2, 3))
    value, gradient = jax.value_and_grad(lambda p: optimal_sigma_nll(p, x).sum())(x)
    assert np.isfinite(value) and np.isfinite(gradient).all()
