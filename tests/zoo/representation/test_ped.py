"""ped against loops written from its definition, the released code's numbers, hand cases and its identities."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics import transferability as scores
from zoo.representation import ped
from zoo.representation.ped import PotentialEnergyDescent

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ped_official.npz")
X, Y, G = (GOLDEN[k] for k in ("x", "y", "g"))


def loop_step(means, radii, dt=0.1, ns=0.6, k=1.0):
    """The definition, pair by pair."""
    means, radii = np.asarray(means, np.float64), np.asarray(radii, np.float64)
    moved = np.zeros_like(means)
    for a in range(len(means)):
        for b in range(len(means)):
            d = np.linalg.norm(means[a] - means[b])
            force = max(ns * radii[a] + ns * radii[b] - d, 0)
            if a != b and d > 0:
                moved[a] += min(0.5 * dt**2 * k * force, force) * (means[a] - means[b]) / d
    return moved


def loop_energy(means, radii, ns=0.6, k=1.0):
    means = np.asarray(means, np.float64)
    total = 0.0
    for a in range(len(means)):
        for b in range(a):
            total += k / 2 * max(ns * (radii[a] + radii[b]) - np.linalg.norm(means[a] - means[b]), 0) ** 2
    return total


def loop_simulation(x, y, g, dt=0.1, ns=0.6, k=1.0, er=0.5, most=6):
    mean, std = g.mean(0), np.maximum(g.std(0), 1e-3)
    z = (x - mean) / std
    changes = []
    for _ in range(most):
        means = np.stack([z[y == c].mean(0) for c in range(y.max() + 1)])
        radii = np.array([np.sqrt(z[y == c].var(0).sum()) for c in range(y.max() + 1)])
        delta = loop_step(means, radii, dt, ns, k)
        changes.append(np.abs(delta).sum())
        if not changes[-1] > er * changes[0]:
            return z * std + mean, len(changes) - 1, changes
        z = z + delta[y]
    return z * std + mean, most, changes


@pytest.fixture(scope="module")
def balls():
    rng = np.random.default_rng(3)
    means, radii = 0.7 * rng.normal(size=(5, 4)) + 3, rng.uniform(0.5, 2, 5)
    return jnp.asarray(means, jnp.float32), jnp.asarray(radii, jnp.float32)


# --- moments ----------------------------------------------------------------------------------------------------------


def test_moments_of_batches_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(13, 3)) + 40).astype(np.float32), rng.integers(0, 3, 13)
    y[y == 2] = 0
    y[-2:] = 2  # class 2 comes in the second batch only
    whole = ped.class_stats(jnp.asarray(x), jnp.asarray(y), 4)
    first = ped.class_stats(jnp.asarray(x[:9]), jnp.asarray(y[:9]), 4)
    padded = jnp.asarray(np.concatenate([x[9:], np.full((2, 3), np.nan, np.float32)]))
    mask = jnp.arange(6) < 4
    both = ped.class_stats(padded, jnp.asarray([*y[9:], 0, 1]), 4, mask, first)
    for c in range(3):
        np.testing.assert_allclose(whole.mean[c], x[y == c].mean(0), rtol=1e-6)
        np.testing.assert_allclose(whole.scatter[c], ((x[y == c] - x[y == c].mean(0)) ** 2).sum(0), rtol=1e-4)
    np.testing.assert_array_equal(whole.count, [*np.bincount(y), 0])
    np.testing.assert_array_equal(whole.mean[3], 0)
    for got, want in zip(jax.tree.leaves(both), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)


def test_the_scale_is_of_all_samples_with_a_floor():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(11, 3)).astype(np.float32) * [2, 1, 0] + [0, 5, 7], rng.integers(0, 3, 11)
    x = x.astype(np.float32)
    mean, std = ped.scale_of(ped.class_stats(jnp.asarray(x), jnp.asarray(y), 3))
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, [*x.std(0)[:2], 1e-3], rtol=1e-5)
    centres, radii, present = ped.balls(ped.class_stats(jnp.asarray(x), jnp.asarray(y), 4), mean, std)
    z = (x - x.mean(0)) / np.maximum(x.std(0), 1e-3)
    np.testing.assert_allclose(centres[1], z[y == 1].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(radii[:3], [np.sqrt(z[y == c].var(0).sum()) for c in range(3)], rtol=1e-4)
    np.testing.assert_array_equal(present, [True, True, True, False])


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(0.1, 0.6, 1.0), (0.3, 0.3, 2.5), (3.0, 0.6, 1.0)])
def test_a_step_is_the_pairwise_loop(balls, settings):
    means, radii = balls
    got = jax.jit(ped.potential_energy_step)(means, radii, *settings)
    np.testing.assert_allclose(got, loop_step(*balls, *settings), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(np.sum(got, 0), 0, atol=1e-5)  # momentum
    got = ped.potential_energy(means, radii, *settings[1:])
    np.testing.assert_allclose(got, loop_energy(means, radii, *settings[1:]), rtol=1e-5)


def test_matrix_form_and_loop_agree_to_double_precision():
    rng = np.random.default_rng(5)
    means, radii = rng.normal(size=(6, 9)), rng.uniform(3, 6, 6)
    with jax.enable_x64(True):
        got = np.asarray(ped.potential_energy_step(jnp.asarray(means), jnp.asarray(radii)))
    np.testing.assert_allclose(got, loop_step(means, radii), rtol=1e-12, atol=1e-14)


def test_two_classes_by_hand():
    means, radii = jnp.asarray([[0.0, 0.0], [3.0, 4.0]]), jnp.asarray([4.0, 8.0])
    got = ped.potential_energy_step(means, radii, dt=0.2, ns=0.5, k=3.0)  # F = 2 + 4 - 5 = 1, M = 0.5 * 0.04 * 3
    np.testing.assert_allclose(got, 0.06 * np.array([[-0.6, -0.8], [0.6, 0.8]]), rtol=1e-5)
    np.testing.assert_allclose(ped.potential_energy(means, radii, 0.5, 3.0), 1.5, rtol=1e-5)
    far = ped.potential_energy_step(means, radii, dt=9.0, ns=0.5, k=3.0)  # M = F
    np.testing.assert_allclose(far, [[-0.6, -0.8], [0.6, 0.8]], rtol=1e-5)
    np.testing.assert_array_equal(ped.potential_energy_step(means, radii, ns=0.4), 0)  # 4.8 < 5
    assert float(ped.potential_energy(means, radii, 0.4)) == 0
    np.testing.assert_array_equal(ped.potential_energy_step(means, radii, ns=0.0), 0)


def test_a_small_step_goes_down_the_gradient_of_the_energy(balls):
    means, radii = balls
    slope = jax.grad(ped.potential_energy)(jnp.asarray(means), radii, 0.6, 2.0)
    got = ped.potential_energy_step(means, radii, 0.1, 0.6, 2.0)
    np.testing.assert_allclose(got, -0.5 * 0.1**2 * slope, rtol=1e-4, atol=1e-7)


def test_coincident_means_neither_push_nor_break():
    means = jnp.asarray([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]])
    got = ped.potential_energy_step(means, jnp.ones(3), ns=1.0)
    np.testing.assert_allclose(got, loop_step(np.asarray(means), np.ones(3), ns=1.0), atol=1e-7)
    assert float(got[2, 0]) > 0
    grads = jax.grad(lambda m: jnp.sum(jnp.square(ped.potential_energy_step(m, jnp.ones(3), ns=1.0))))(means)
    assert np.isfinite(grads).all()


def test_classes_without_samples_take_no_part(balls):
    means, radii = balls
    more = jnp.concatenate([jnp.zeros((1, 4)), means]), jnp.concatenate([jnp.full(1, 9.0), radii])
    present = jnp.arange(6) > 0
    got = ped.potential_energy_step(*more, present=present)
    np.testing.assert_allclose(got[1:], ped.potential_energy_step(means, radii), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(got[0], 0)
    here = ped.potential_energy(*more, present=present)
    np.testing.assert_allclose(here, ped.potential_energy(means, radii), rtol=1e-5)


def test_no_array_over_pairs_and_dimensions():
    c, d = 64, 512
    compiled = jax.jit(ped.potential_energy_step).lower(jnp.zeros((c, d)), jnp.ones(c)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < c * c * d  # bytes: a quarter of such an array


# --- the descent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dt": 0.9}, {"dt": 1.3, "er": 0.05}, {"ns": 0.3, "k": 4.0}, {"most": 2}])
def test_the_descent_is_the_loop(settings):
    want, steps, changes = loop_simulation(X, Y, G, **settings)
    names = {"er": "exit_ratio", "most": "max_steps"}
    descent = PotentialEnergyDescent(**{names.get(k, k): v for k, v in settings.items()})
    got, motion = descent.motion(X, Y, G)
    assert int(motion.steps) == steps
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(motion.changes[: len(changes)], changes, rtol=1e-9)
    np.testing.assert_array_equal(motion.changes[len(changes) :], 0)
    np.testing.assert_allclose(X + motion.displacement[Y], got, rtol=1e-12)
    means = np.stack([((got - G.mean(0)) / np.maximum(G.std(0), 1e-3))[c == Y].mean(0) for c in range(5)])
    radii = [np.sqrt((X / np.maximum(G.std(0), 1e-3))[c == Y].var(0).sum()) for c in range(5)]
    want = loop_energy(means, radii, descent.ns, descent.k)
    np.testing.assert_allclose(motion.energies[-1], want, rtol=1e-7, atol=1e-9)
    assert got.dtype == np.float64


def test_energy_never_rises_and_shapes_of_classes_stay():
    moved, motion = PotentialEnergyDescent().motion(X, Y, G)
    assert motion.energies.shape == (7,) and (np.diff(motion.energies) < 0).all() and motion.steps == 6
    for c in range(5):
        np.testing.assert_allclose(np.cov(moved[c == Y].T), np.cov(X[c == Y].T), atol=1e-10)
    np.testing.assert_array_equal(PotentialEnergyDescent(ns=0.0)(X, Y, G), X)


def test_no_overlap_leaves_features_alone():
    far = X + 1000 * np.eye(5, 36)[Y]
    moved, motion = PotentialEnergyDescent().motion(far, Y, G)
    np.testing.assert_array_equal(moved, far)
    assert motion.steps == 0 and np.isfinite(motion.changes).all()


def test_self_rescaling_is_by_the_target_itself():
    own = PotentialEnergyDescent(rescale="self")
    np.testing.assert_allclose(own(X, Y), PotentialEnergyDescent()(X, Y, X), rtol=1e-9)
    np.testing.assert_array_equal(own(X, Y, G), own(X, Y))


def test_float32_and_compiled_simulation_agree_with_the_host():
    run = jax.jit(functools.partial(ped.simulate, num_classes=5))
    got, motion = run(jnp.asarray(X, jnp.float32), jnp.asarray(Y), jnp.asarray(G, jnp.float32))
    want, there = PotentialEnergyDescent().motion(X, Y, G)
    np.testing.assert_allclose(got - X.astype(np.float32), want - X, atol=2e-4)
    np.testing.assert_allclose(motion.displacement, there.displacement, atol=2e-5)
    assert got.dtype == jnp.float32


# --- the released code ------------------------------------------------------------------------------------------------


def test_official_steps():
    one = PotentialEnergyDescent(max_steps=1)
    got, motion = one.motion(X, Y, G)
    np.testing.assert_allclose(got, GOLDEN["one"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(motion.changes[0], GOLDEN["one_change"], rtol=1e-9)
    large, motion = PotentialEnergyDescent(2.0, 0.3, 0.7, max_steps=1).motion(X, Y, G)
    np.testing.assert_allclose(large, GOLDEN["large"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(motion.changes[0], GOLDEN["large_change"], rtol=1e-9)


@pytest.mark.parametrize(("name", "dt"), [("default", 0.1), ("exits", 0.9)])
def test_official_scores(name, dt):
    descent = PotentialEnergyDescent(dt)
    moved, motion = descent.motion(X, Y, G)
    assert int(motion.steps) == GOLDEN[f"{name}_steps"]
    np.testing.assert_allclose(moved, GOLDEN[f"{name}_moved"], rtol=1e-9, atol=1e-9)
    got = ped.score(X, Y, "logme", G, descent, variant="official")
    np.testing.assert_allclose(got, GOLDEN[f"{name}_logme"], rtol=1e-8)
    np.testing.assert_allclose(ped.score(X, Y, "sfda", G, descent), GOLDEN[f"{name}_sfda"], rtol=1e-8)


def test_scores_without_a_descent_and_of_a_pool():
    assert ped.score(X, Y, "gbc", descent=None) == scores.gbc(X, Y)
    pool, general = {"a": X, "b": X[:, :9] + 5}, {"a": G, "b": G[:, :9]}
    ranked = scores.rank_models(pool, Y, "h_score", PotentialEnergyDescent(0.5), general)
    want = {n: ped.score(pool[n], Y, "h_score", general[n], PotentialEnergyDescent(0.5)) for n in pool}
    assert ranked == sorted(want.items(), key=lambda pair: -pair[1])
    assert want["a"] != scores.h_score(X, Y)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PotentialEnergyDescent()(X, Y), "general features are missing: the method rescales by"),
        (lambda: PotentialEnergyDescent()(X, Y, G[:, :5]), r"general features must be \[G, 36\]"),
        (lambda: PotentialEnergyDescent()(X, Y, G[:1]), r"with G at least 2, got \[1, 36\]"),
        (lambda: PotentialEnergyDescent()(X, Y, np.where(np.arange(40)[:, None] == 7, np.nan, G)), "row 7 are not"),
        (lambda: PotentialEnergyDescent()(X, np.where(Y == 2, 9, Y), G), "class 2 has no sample"),
        (lambda: PotentialEnergyDescent()(np.where(np.arange(60)[:, None] == 4, np.inf, X), Y, G), "row 4 are not"),
        (lambda: PotentialEnergyDescent(dt=0), "dt must be positive, got 0"),
        (lambda: PotentialEnergyDescent(k=-1), "k must be positive"),
        (lambda: PotentialEnergyDescent(ns=-0.1), "ns must not be negative"),
        (lambda: PotentialEnergyDescent(exit_ratio=1), r"exit_ratio must be in \[0, 1\)"),
        (lambda: PotentialEnergyDescent(max_steps=0), "max_steps must be at least 1"),
        (lambda: PotentialEnergyDescent(rescale="both"), "rescale must be 'general' or 'self', got 'both'"),
        (lambda: ped.score(X, Y, "leep", G), "'leep' reads a source classifier's outputs"),
        (lambda: ped.score(X, Y, "logm", G), "unknown transferability metric 'logm'; use logme"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_class_of_one_sample_is_a_point():
    x, y = np.concatenate([X, X[:1] + 0.01]), np.append(Y, 5)
    moved, _ = PotentialEnergyDescent().motion(x, y, G)
    np.testing.assert_allclose(moved, loop_simulation(x, y, G)[0], rtol=1e-8, atol=1e-9)
