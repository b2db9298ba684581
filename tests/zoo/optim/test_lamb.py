"""LAMB against the released code's numbers, its formula by hand, and optax where they agree."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.optim.lamb import decay_mask, lamb

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "star_adore_official.npz")


def test_four_steps_are_the_released_codes():
    params = {n: jnp.asarray(GOLDEN[f"lamb_{n}0"]) for n in "wbc"}
    assert np.linalg.norm(params["w"]) > 10 and not params["b"].any()
    tx = lamb(0.05, eps=1e-8, weight_decay=0.01, mask=decay_mask)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for i in range(4):
        updates, state = step({n: jnp.asarray(GOLDEN[f"lamb_g{n}{i}"]) for n in "wbc"}, state, params)
        params = optax.apply_updates(params, updates)
        for n in "wbc":
            np.testing.assert_allclose(params[n], GOLDEN[f"lamb_{n}{i + 1}"], rtol=2e-5, atol=1e-6, err_msg=f"{n}{i}")


def test_one_step_by_hand():
    p, g = np.array([3.0, 4.0], np.float32), np.array([0.5, -2.0], np.float32)
    for corrected, clip in ((False, None), (True, None), (False, 2.0)):
        tx = lamb(0.1, 0.9, 0.99, 1e-3, 0.2, clip, corrected)
        got, state = tx.update(jnp.asarray(g), tx.init(jnp.asarray(p)), jnp.asarray(p))
        m, v = 0.1 * g, 0.01 * g * g
        if corrected:
            m, v = m / 0.1, v / 0.01
        u = m / (np.sqrt(v) + 1e-3) + 0.2 * p
        size = min(5.0, clip or 99)
        np.testing.assert_allclose(got, -0.1 * size / np.linalg.norm(u) * u, rtol=1e-5)
        assert int(state.count) == 1


def test_with_bias_correction_and_no_bound_it_is_optax():
    params = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.array([0.5])}
    ours = lamb(lambda count: 0.01 * (count + 1), weight_decay=0.1, weight_norm_clip=None, bias_correction=True)
    theirs = optax.lamb(lambda count: 0.01 * (count + 1), eps=1e-6, weight_decay=0.1)
    a, b, sa, sb = params, params, ours.init(params), theirs.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i), params)
        ua, sa = ours.update(grads, sa, a)
        ub, sb = theirs.update(grads, sb, b)
        a, b = optax.apply_updates(a, ua), optax.apply_updates(b, ub)
    for k in params:
        np.testing.assert_allclose(a[k], b[k], rtol=1e-5)


def test_masks_zero_steps_and_missing_parameters():
    assert decay_mask({"k": jnp.ones((2, 2)), "b": jnp.ones(2), "s": jnp.ones(())}) == {
        "k": True,
        "b": False,
        "s": False,
    }
    tx = lamb(0.1, weight_decay=0.5, mask={"a": False, "b": True})
    params = {"a": jnp.array([2.0]), "b": jnp.array([2.0])}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert float(updates["a"][0]) == 0 and float(updates["b"][0]) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="lamb needs the parameters"):
        tx.update(zero, tx.init(params))
