"""Series augmentations: distributions against the definition and the released code, and what they must keep."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.series import permuted_steps, ts_jitter, ts_permute, ts_scale

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "dbpm_series.npz")
T, SEGMENTS, DRAWS = int(GOLDEN["T"]), int(GOLDEN["segments"]), 20_000
ORDERS = np.asarray(
    jax.jit(jax.vmap(lambda k: permuted_steps(k, T, SEGMENTS)))(jax.random.split(jax.random.key(0), DRAWS))
)


def test_permutation_keeps_every_step():
    np.testing.assert_array_equal(np.sort(ORDERS, axis=1), np.broadcast_to(np.arange(T), ORDERS.shape))


def test_permutation_has_the_distribution_of_the_released_code():
    place = np.stack([(ORDERS[:, t][:, None] == np.arange(T)).mean(0) for t in range(T)])
    np.testing.assert_allclose(place, GOLDEN["place"], atol=0.02)
    breaks = np.bincount((np.diff(ORDERS, axis=1) != 1).sum(1), minlength=SEGMENTS + 1) / DRAWS
    np.testing.assert_allclose(breaks, GOLDEN["breaks"], atol=0.02)


def test_last_two_steps_are_never_cut():
    # cut points lie in 0..T-3, so T-3, T-2 and T-1 stay in order at the end of the last segment
    at = np.argmax(ORDERS == T - 2, axis=1)
    assert (at > 0).all()
    assert (ORDERS[np.arange(DRAWS), at - 1] == T - 3).mean() > 0.5
    np.testing.assert_array_equal(ORDERS[np.arange(DRAWS), at + 1], T - 1)


def test_two_segments_swap_or_stay():
    keys = jax.random.split(jax.random.key(1), 4000)
    orders = np.asarray(jax.vmap(lambda k: permuted_steps(k, 6, 2))(keys))
    allowed = {tuple(np.roll(np.arange(6), -cut)) for cut in range(4)}
    assert {tuple(o) for o in orders} == allowed
    # half stay in order, and so does a swap with the empty segment of a cut at 0
    assert (orders == np.arange(6)).all(1).mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.03)


def test_channels_are_permuted_alike():
    x = jnp.stack([jnp.arange(9.0), 10 + jnp.arange(9.0)], axis=1)
    y = np.asarray(ts_permute(jax.random.key(3), x, 4))
    np.testing.assert_array_equal(y[:, 1] - y[:, 0], 10.0)
    np.testing.assert_array_equal(y[:, 0], np.asarray(permuted_steps(jax.random.key(3), 9, 4)))


def test_scale_and_jitter_have_the_moments_of_the_released_code():
    keys = jax.random.split(jax.random.key(4), 5000)
    ones = jnp.ones((6, 2))
    scaled = np.asarray(jax.vmap(lambda k: ts_scale(k, ones))(keys))
    mean, spread, between = GOLDEN["scale"]
    assert scaled.mean() == pytest.approx(mean, abs=0.03)
    assert scaled.std() == pytest.approx(spread, abs=0.03)
    assert np.abs(scaled[:, :, 0] - scaled[:, :, 1]).max() == between == 0
    assert scaled.std(axis=1).mean() > 0.5
    noise = np.asarray(jax.vmap(lambda k: ts_jitter(k, jnp.zeros((6, 2))))(keys))
    assert noise.mean() == pytest.approx(GOLDEN["jitter"][0], abs=0.02)
    assert noise.std() == pytest.approx(GOLDEN["jitter"][1], abs=0.02)
    assert np.abs(np.corrcoef(noise.reshape(5000, -1).T) - np.eye(12)).max() < 0.08


def test_scale_axis_decides_what_shares_a_factor():
    x = 1.0 + jnp.arange(12.0).reshape(6, 2)
    key = jax.random.key(5)
    by_time = np.asarray(ts_scale(key, x, 0.5, "time") / x)
    np.testing.assert_allclose(by_time[:, 0], by_time[:, 1], rtol=1e-6)
    assert np.ptp(by_time[:, 0]) > 0.1
    by_channel = np.asarray(ts_scale(key, x, 0.5, "channel") / x)
    np.testing.assert_allclose(by_channel, np.broadcast_to(by_channel[:1], (6, 2)), rtol=1e-6)
    assert abs(by_channel[0, 0] - by_channel[0, 1]) > 1e-3
    np.testing.assert_array_equal(ts_scale(key, x, 0.0), x)
    np.testing.assert_array_equal(ts_jitter(key, x, 0.0), x)


def test_jitter_is_added_whatever_the_series():
    key, x = jax.random.key(6), jnp.full((5, 3), 4.0)
    np.testing.assert_allclose(ts_jitter(key, x, 0.3) - x, ts_jitter(key, jnp.zeros((5, 3)), 0.3), atol=1e-6)
    np.testing.assert_allclose(ts_jitter(key, 0 * x, 0.6), 2 * ts_jitter(key, 0 * x, 0.3), rtol=1e-5)


def test_gradients_pass_through():
    key, x = jax.random.key(7), jnp.ones((6, 2))
    np.testing.assert_array_equal(jax.grad(lambda x: ts_jitter(key, x).sum())(x), 1.0)
    np.testing.assert_array_equal(jax.grad(lambda x: ts_permute(key, x, 3).sum())(x), 1.0)
    np.testing.assert_allclose(jax.grad(lambda x: ts_scale(key, x).sum())(x), ts_scale(key, x), rtol=1e-6)


@pytest.mark.parametrize("augment", [ts_scale, ts_jitter])
def test_negative_sigma_is_refused(augment):
    with pytest.raises(ValueError, match="sigma must be 0 or more, got -1"):
        augment(jax.random.key(0), jnp.ones((4, 1)), -1.0)


@pytest.mark.parametrize("segments", [1, 4, 9])
def test_impossible_segments_are_refused(segments):
    with pytest.raises(ValueError, match=r"max_segments must lie in 2\.\.3 for a series of 4 steps"):
        ts_permute(jax.random.key(0), jnp.ones((4, 1)), segments)


def test_unknown_axis_is_refused():
    with pytest.raises(Exception, match="scale_axis"):
        ts_scale(jax.random.key(0), jnp.ones((4, 1)), 0.1, "rows")
