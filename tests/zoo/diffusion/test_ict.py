"""Improved consistency training: curriculum, law of the levels, loss, gradients, sampling, editing, bad input."""

import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from zoo.base import Context, total_loss
from zoo.diffusion import ict
from zoo.losses.robust import l2, pseudo_huber
from zoo.nn.denoisers import ResidualMLP
from zoo.ops.noise_levels import (
    Levels,
    check_images,
    check_latents,
    check_sigma,
    consistency_precond,
    karras_sigmas,
    slerp,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "ict_reference.npz")
NET = ResidualMLP(8, 1, condition=8)
APPLY = jax.jit(ict.ConsistencyModel(NET).apply)
KEY = jax.random.key(0)
SIGMAS = tuple(GOLDEN["sigmas"].tolist())
B = 16
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (B, 3, 2, 1)), jnp.float32)
BATCH = {"x": X, "index": jnp.arange(B), "mask": jnp.ones(B, bool)}


def context(step=0, total=100, train=True, rng=KEY):
    return Context(rng=rng, step=jnp.int32(step), total_steps=jnp.int32(total), train=train)


def trained(variables, scale=0.3):
    """Weights that are not at their zero initialisation."""
    rng = np.random.default_rng(0)
    move = lambda p: p + scale * rng.standard_normal(p.shape).astype(np.float32)  # noqa: E731
    return {**variables, "params": jax.tree.map(move, jax.device_get(variables["params"]))}


@jax.jit
def noise(ctx):
    """The noise that an objective must draw in this context."""
    return jax.vmap(lambda k: jax.random.normal(k, X.shape[1:]))(ctx.example_keys(BATCH, "noise"))


@functools.cache
def objective(**settings):
    return ict.consistency_training(settings.pop("net", NET), s0=2, s1=8, **settings)


@functools.cache
def variables():
    return trained(jax.jit(objective().init)(KEY, BATCH))


# --- the curriculum ---------------------------------------------------------------------------------------------------


def test_curriculum_of_the_paper():
    steps = jax.jit(ict.discretization_steps)
    for step, levels in (
        (0, 11),
        (49_999, 11),
        (50_000, 21),
        (99_999, 21),
        (100_000, 41),
        (350_000, 1281),
        (399_999, 1281),
    ):
        assert int(steps(step, 400_000)) == levels
    assert int(steps(10**6, 400_000)) == 1281  # past the end
    assert steps(0, 400_000).dtype == jnp.int32


@pytest.mark.parametrize(("s0", "s1", "total"), [(10, 1280, 400_000), (10, 160, 4000), (2, 150, 1000)])
def test_curriculum_agrees_with_the_reimplementation(s0, s1, total):
    name = f"improved_{s0}_{s1}_{total}"
    found = jax.jit(jax.vmap(lambda k: ict.discretization_steps(k, jnp.int32(total), s0, s1)))(GOLDEN[f"{name}_steps"])
    np.testing.assert_array_equal(found, GOLDEN[name])


def test_curriculum_that_is_not_a_power_of_two_ends_at_s1():
    found = [int(ict.discretization_steps(k, 100, 10, 50)) for k in range(100)]
    length = math.floor(100 / (math.log2(5) + 1))
    assert found == [min(10 * 2 ** (k // length), 50) + 1 for k in range(100)]


def test_fixed_curriculum():
    assert {int(ict.discretization_steps(k, 50, 10, 10)) for k in (0, 25, 49)} == {11}


def test_original_curriculum():
    total = 4000
    found = jax.jit(jax.vmap(lambda k: ict.original_discretization_steps(k, total)))(GOLDEN["original_steps"])
    np.testing.assert_array_equal(found, GOLDEN["original"])
    assert int(ict.original_discretization_steps(0, total)) == 2
    assert int(ict.original_discretization_steps(total, total)) == 151


# --- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 11, 41, 161, 1281])
def test_grid_agrees_with_the_reimplementation_and_is_padded(n):
    grid = np.asarray(jax.jit(karras_sigmas)(jnp.int32(n)))
    np.testing.assert_allclose(grid[:n], GOLDEN[f"karras_{n}"], rtol=1e-5)
    assert grid[0] == np.float32(0.002)
    assert grid[n - 1] == np.float32(80)
    assert np.all(grid[n - 1 :] == np.float32(80))
    assert np.all(np.diff(grid[:n]) > 0)


def test_grid_is_its_definition():
    levels, n = Levels(0.01, 10.0, 3.0), 7
    expected = [(0.01 ** (1 / 3) + i / (n - 1) * (10 ** (1 / 3) - 0.01 ** (1 / 3))) ** 3 for i in range(n)]
    np.testing.assert_allclose(karras_sigmas(n, levels, 9), [*expected, 10, 10], rtol=1e-5)


@pytest.mark.parametrize("n", [2, 11, 41, 161, 1281])
def test_law_of_the_intervals(n):
    grid = karras_sigmas(n)
    logits = np.asarray(jax.jit(ict.lognormal_interval_logits)(grid, n))
    p = np.exp(logits)
    assert logits.shape == (1280,)
    assert np.all(np.isneginf(logits[n - 1 :]))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    # float32 erf of the reimplementation loses digits at the upper end
    np.testing.assert_allclose(p[: n - 1], GOLDEN[f"law_{n}"], rtol=2e-3, atol=1e-6)
    mass = np.diff(norm.cdf(np.log(np.asarray(grid[:n], np.float64)), -1.1, 2.0))
    np.testing.assert_allclose(p[: n - 1], mass / mass.sum(), rtol=2e-4, atol=1e-9)


def test_law_keeps_its_digits_where_erf_is_flat():
    grid = karras_sigmas(1281, Levels(0.002, 4000.0))
    logits = ict.lognormal_interval_logits(grid, 1281)
    mass = np.diff(norm.sf(-np.log(np.asarray(grid, np.float64)), 1.1, 2.0))
    assert np.all(np.isfinite(logits))
    np.testing.assert_allclose(np.exp(logits)[-20:], (mass / mass.sum())[-20:], rtol=0.02)


def test_other_mean_and_spread():
    grid = karras_sigmas(21, max_n=21)
    mass = np.diff(norm.cdf(np.log(np.asarray(grid, np.float64)), 0.5, 0.7))
    found = np.exp(ict.lognormal_interval_logits(grid, 21, 0.5, 0.7))
    np.testing.assert_allclose(found, mass / mass.sum(), rtol=1e-3, atol=1e-7)


def test_uniform_law():
    p = np.exp(ict.uniform_interval_logits(karras_sigmas(5, max_n=9), 5))
    np.testing.assert_allclose(p, [0.25] * 4 + [0] * 4, atol=1e-6)


def test_intervals_are_drawn_by_their_law():
    n = 6
    logits = ict.lognormal_interval_logits(karras_sigmas(n, max_n=9), n)
    keys = jax.random.split(KEY, 20_000)
    drawn = np.asarray(jax.jit(ict.sample_intervals)(keys, logits))
    assert drawn.dtype == np.int32
    assert drawn.min() == 0
    assert drawn.max() <= n - 2
    share = np.bincount(drawn, minlength=8) / len(drawn)
    np.testing.assert_allclose(share, np.exp(logits), atol=0.01)
    # each draw belongs to its key alone
    np.testing.assert_array_equal(drawn[7:12], ict.sample_intervals(keys[7:12], logits))
    # an interval without mass is never drawn, wherever it lies
    hollow = jnp.log(jnp.array([0.0, 0.5, 0.0, 0.5, 0.0]))
    assert set(np.asarray(ict.sample_intervals(keys[:500], hollow)).tolist()) == {1, 3}


@pytest.mark.parametrize("n", [11, 161, 1281])
def test_weights_agree_with_the_reimplementation(n):
    grid = karras_sigmas(n, max_n=n)
    found = np.asarray(ict.interval_weights(grid[:-1], grid[1:]))
    kept = found if n <= 161 else found[::40]
    np.testing.assert_allclose(kept, GOLDEN[f"weights_{n}"], rtol=2e-3)
    exact = np.diff(np.asarray(grid, np.float64)) ** -1
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    assert np.all(np.diff(found[1:-1]) < 0)  # the lower the noise, the heavier


# --- preconditioning and the model ------------------------------------------------------------------------------------


def test_preconditioning_agrees_with_both_codes():
    skip, out, inner = consistency_precond(jnp.asarray(GOLDEN["sigma"]))
    for found, names in ((skip, ("skip", "oai_skip")), (out, ("output", "oai_out")), (inner, ("oai_in",))):
        for name in names:
            np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-5, atol=1e-7)


def test_preconditioning_without_shift_is_edms():
    s = np.array([0.01, 1.0, 30.0])
    skip, out, inner = consistency_precond(jnp.asarray(s, jnp.float32), 0.7, 0.0)
    np.testing.assert_allclose(skip, 0.49 / (s**2 + 0.49), rtol=1e-5)
    np.testing.assert_allclose(out, s * 0.7 / np.sqrt(s**2 + 0.49), rtol=1e-5)
    np.testing.assert_allclose(inner, 1 / np.sqrt(s**2 + 0.49), rtol=1e-5)


def test_boundary_condition_is_exact():
    skip, out, _ = consistency_precond(jnp.float32(0.002))
    assert skip == 1
    assert out == 0
    np.testing.assert_array_equal(APPLY(variables(), X, jnp.full(B, 0.002)), X)
    assert np.abs(APPLY(variables(), X, jnp.full(B, 1.0)) - X).max() > 0.1


class Spy(nn.Module):
    """Returns what it is given, so that a test can see it."""

    what: str

    @nn.compact
    def __call__(self, x, noise, cond=None, keys=None):
        self.param("unused", nn.initializers.zeros, (1,))
        over = lambda v: jnp.broadcast_to(v.reshape(-1, *[1] * (x.ndim - 1)), x.shape)  # noqa: E731
        return {"x": x, "noise": over(noise), "cond": over(cond) if cond is not None else x}[self.what]


@pytest.mark.parametrize("what", ["x", "noise"])
def test_what_the_network_sees(what):
    levels = Levels(sigma_data=0.7)
    sigma = jnp.asarray(np.geomspace(0.01, 70, B), jnp.float32)
    model = ict.ConsistencyModel(Spy(what), levels)
    found = model.apply(model.init(KEY, X, sigma), X, sigma)
    s, x = np.asarray(sigma, np.float64).reshape(-1, 1, 1, 1), np.asarray(X, np.float64)
    skip, out = 0.49 / ((s - 0.002) ** 2 + 0.49), 0.7 * (s - 0.002) / np.sqrt(0.49 + s**2)
    inner = x / np.sqrt(s**2 + 0.49) if what == "x" else 0.25 * np.log(s) + 0 * x
    np.testing.assert_allclose(found, skip * x + out * inner, rtol=1e-4, atol=1e-5)


# --- the objective ----------------------------------------------------------------------------------------------------


def test_one_step_agrees_with_the_reimplementation():
    g = GOLDEN
    n = int(ict.discretization_steps(1700, 4000, 10, 160))
    assert n == int(g["train_n"])
    grid = karras_sigmas(n, max_n=161)
    low, high = grid[g["train_i"]], grid[g["train_i"] + 1]
    w = jnp.asarray(g["W"])

    def f(x, sigma):  # their wrapper has no c_in
        skip, out, _ = consistency_precond(sigma)
        return skip[:, None] * x + out[:, None] * jnp.tanh(x @ w / (1 + sigma[:, None]))

    x, z = jnp.asarray(g["train_x"]), jnp.asarray(g["train_noise"])
    prediction, target = ict.consistency_pair(f, f, x, z, low, high)
    np.testing.assert_allclose(prediction, g["train_predicted"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(target, g["train_target"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ict.interval_weights(low, high), g["train_weight"], rtol=1e-3)


def test_the_parents_loss_with_their_order_of_levels():
    g = GOLDEN
    grid = karras_sigmas(20, max_n=20)
    # their index 0 is sigma_max
    high, low = grid[19 - g["oai_i"]], grid[18 - g["oai_i"]]

    def net(weights):
        def f(x, sigma):
            skip, out, inner = consistency_precond(sigma)
            raw = jnp.tanh((inner[:, None] * x) @ jnp.asarray(weights) + 0.25 * jnp.log(sigma)[:, None])
            return skip[:, None] * x + out[:, None] * raw

        return f

    pair = ict.consistency_pair(
        net(g["W"]), net(g["V"]), jnp.asarray(g["train_x"]), jnp.asarray(g["oai_noise"]), low, high
    )
    found = ict.consistency_loss(*pair, jnp.ones(6), functools.partial(l2, reduction="elementwise"))
    np.testing.assert_allclose(found, g["oai_loss"], rtol=2e-4)


def forward(obj, v, ctx, batch=BATCH):
    return jax.jit(lambda v, b, c: obj.forward(v, b, c)[0])(v, batch, ctx)


def test_forward_is_equation_six():
    """Recomputes both branches with the weights of the model, outside the objective."""
    obj, v, ctx = objective(), variables(), context(60)
    out = forward(obj, v, ctx)
    n = int(ict.discretization_steps(60, 100, 2, 8))
    grid = np.asarray(karras_sigmas(n, max_n=9))
    low, high = np.asarray(out["sigma"]), np.asarray(out["sigma_next"])
    place = np.searchsorted(grid[: n - 1], low)
    np.testing.assert_array_equal(grid[place], low)
    np.testing.assert_array_equal(grid[place + 1], high)
    np.testing.assert_allclose(out["weight"], 1 / (high - low), rtol=1e-6)
    z = noise(ctx)
    for name, sigma in (("prediction", high), ("target", low)):
        noisy = X + sigma.reshape(-1, 1, 1, 1) * z
        np.testing.assert_allclose(out[name], APPLY(v, noisy, jnp.asarray(sigma)), rtol=1e-4, atol=1e-5)
    values = obj.loss(out, BATCH, ctx).elements
    u, w = np.asarray(out["prediction"], np.float64), np.asarray(out["target"], np.float64)
    c = 0.00054 * np.sqrt(6)
    expected = (np.sqrt(((u - w) ** 2).sum((1, 2, 3)) + c**2) - c) / (high - low)
    np.testing.assert_allclose(values.values, expected, rtol=1e-4)
    assert values.unit == "example"
    assert values.values.dtype == jnp.float32
    assert float(obj.loss(out, BATCH, ctx).metrics["levels"]) == n


def test_noise_and_levels_differ_between_examples_and_steps():
    obj, v = objective(), variables()
    first, second = forward(obj, v, context(60)), forward(obj, v, context(60, rng=jax.random.key(1)))
    assert len(np.unique(first["sigma"])) > 2
    assert not np.array_equal(first["sigma"], second["sigma"])
    same = {**BATCH, "x": jnp.zeros_like(X)}
    out = forward(obj, v, context(60), same)
    assert len(np.unique(np.asarray(out["prediction"]).reshape(B, -1)[:, 0])) == B


def test_randomness_belongs_to_the_row_not_to_the_shard():
    obj, v, ctx = objective(), variables(), context(30)
    whole = forward(obj, v, ctx)
    part = {k: x[4:12] for k, x in BATCH.items()} | {"row": jnp.arange(4, 12)}
    for name, found in forward(obj, v, ctx, part).items():
        np.testing.assert_allclose(found, whole[name][4:12], rtol=1e-5, atol=1e-6)


def test_padded_rows_do_not_count():
    obj, v, ctx = objective(), variables(), context(30)
    mask = jnp.arange(B) < 11
    rows = mask.reshape(-1, 1, 1, 1)

    def loss(params, x):
        batch = {**BATCH, "mask": mask, "x": x}
        out, _ = obj.forward({**v, "params": params}, batch, ctx)
        return total_loss(obj.loss(out, batch, ctx), None, (), ctx)[0]

    value = jax.jit(jax.value_and_grad(loss))
    first = value(v["params"], jnp.where(rows, X, 0.0))
    for junk in (1e6, jnp.nan):
        other = value(v["params"], jnp.where(rows, X, junk))
        jax.tree.map(np.testing.assert_array_equal, first, other)
    out = forward(obj, v, ctx)
    mean = np.asarray(obj.loss(out, BATCH, ctx).elements.values)[:11].mean()
    assert float(first[0]) == pytest.approx(mean, rel=1e-5)


def test_no_gradient_reaches_the_target():
    """The gradient is that of the student's branch with the target held fixed, and of nothing else."""
    obj, v, ctx = objective(), variables(), context(60)
    out = forward(obj, v, ctx)
    z = noise(ctx)

    def student(params):
        noisy = X + out["sigma_next"].reshape(-1, 1, 1, 1) * z
        u = APPLY({**v, "params": params}, noisy, out["sigma_next"])
        return jnp.mean(out["weight"] * pseudo_huber(u, out["target"]))

    def whole(params):
        outputs, _ = obj.forward({**v, "params": params}, BATCH, ctx)
        return total_loss(obj.loss(outputs, BATCH, ctx), None, (), ctx)[0]

    expected, found = jax.jit(jax.grad(student))(v["params"]), jax.jit(jax.grad(whole))(v["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), expected, found)
    # stopped in the forward pass (nothing is kept for it) and in the loss
    through = jax.jit(jax.grad(lambda p: jnp.sum(obj.forward({**v, "params": p}, BATCH, ctx)[0]["target"])))(
        v["params"]
    )
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(through))
    direct = jax.grad(lambda t: jnp.sum(ict.consistency_loss(out["prediction"], t, out["weight"], l2)))(out["target"])
    assert np.all(np.asarray(direct) == 0)


def test_both_branches_drop_the_same_units():
    """With equal levels the two branches are the same computation if, and only if, their masks agree."""
    net = ResidualMLP(32, 1, condition=8, rate=0.5)
    levels = Levels(1.0, 1.0 + 1e-6)  # both ends of every interval are nearly equal
    obj = ict.consistency_training(net, levels, s0=2, s1=2)
    v = trained(jax.jit(obj.init)(KEY, BATCH))
    out = forward(obj, v, context(1))
    np.testing.assert_allclose(out["prediction"], out["target"], atol=1e-4)
    seen = forward(obj, v, context(1, rng=jax.random.key(5)), {**BATCH, "x": jnp.zeros_like(X)})
    other = forward(obj, v, context(1, rng=jax.random.key(6)), {**BATCH, "x": jnp.zeros_like(X)})
    assert not np.allclose(seen["prediction"], other["prediction"], atol=1e-3)


def test_dropout_only_in_training():
    net = ResidualMLP(32, 1, condition=8, rate=0.5)
    obj = ict.consistency_training(net, s0=2, s1=8)
    v = trained(jax.jit(obj.init)(KEY, BATCH))
    quiet, plain = (
        forward(obj, v, context(60, train=False)),
        forward(ict.consistency_training(net.clone(rate=0.0), s0=2, s1=8), v, context(60)),
    )
    np.testing.assert_allclose(quiet["prediction"], plain["prediction"], rtol=1e-5, atol=1e-6)
    assert not np.allclose(forward(obj, v, context(60))["prediction"], plain["prediction"], atol=1e-3)


class Origin(nn.Module):
    """The exact network of a point mass at ``mu``: f(x, s) = mu + smin / s (x - mu)."""

    mu: float
    levels: Levels

    @nn.compact
    def __call__(self, x, noise, cond=None, keys=None):
        scale = self.param("scale", nn.initializers.ones, ())
        s = jnp.exp(4 * noise).reshape(-1, *[1] * (x.ndim - 1))
        skip, out, inner = consistency_precond(s, self.levels.sigma_data, self.levels.sigma_min)
        wanted = self.mu + self.levels.sigma_min / s * (x / inner - self.mu)
        return scale * (wanted - skip * x / inner) / out


def test_a_point_mass_is_solved_exactly():
    levels = Levels(0.01, 10.0)
    obj = ict.consistency_training(Origin(0.3, levels), levels, s0=4, s1=4)
    batch = {**BATCH, "x": jnp.full_like(X, 0.3)}
    v = jax.jit(obj.init)(KEY, batch)
    ctx = context()
    out = forward(obj, v, ctx, batch)
    z = noise(ctx)
    inside = np.asarray(out["sigma"]) > 0.011  # at sigma_min the network is 0/0, which is its own affair
    for name in ("prediction", "target"):
        np.testing.assert_allclose(np.asarray(out[name])[inside], (0.3 + 0.01 * z)[inside], atol=1e-4)
    values = np.asarray(obj.loss(out, batch, ctx).elements.values)
    assert inside.sum() > 4
    assert np.all(values[inside] < 1e-3)


def test_gaussian_data_are_learned_to_their_closed_form():
    """f*(x, s) = x sqrt((v + smin^2) / (v + s^2)); the loss there is far below that of the untrained network."""
    levels, v = Levels(0.02, 5.0, sigma_data=0.6), 0.36
    net = ResidualMLP(32, 2, condition=16)
    steps = 1500
    obj = ict.consistency_training(net, levels, s0=4, s1=32)
    tx = optax.radam(3e-3)

    @jax.jit
    def run(key):
        rows = {"x": jnp.zeros((256, 1)), "index": jnp.arange(256)}
        variables = dict(obj.init(key, rows))

        def body(carry, step):
            params, average, state = carry
            rng = jax.random.fold_in(key, step)
            batch = {**rows, "x": math.sqrt(v) * jax.random.normal(jax.random.fold_in(rng, 1), (256, 1))}
            ctx = Context(rng, step, steps)

            def scalar(params):
                out, _ = obj.forward({**variables, "params": params}, batch, ctx)
                return total_loss(obj.loss(out, batch, ctx), None, (), ctx)[0]

            updates, state = tx.update(jax.grad(scalar)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, params), state), None

        p = variables["params"]
        (_, average, _), _ = jax.lax.scan(body, (p, p, tx.init(p)), jnp.arange(steps))
        return {**variables, "params": average}

    weights = run(jax.random.key(0))
    apply = jax.jit(ict.ConsistencyModel(net, levels).apply)
    for s in (0.3, 1.0, 5.0):
        x = jnp.linspace(-1.5, 1.5, 41)[:, None] * math.sqrt(v + s * s)
        exact = np.asarray(x) * math.sqrt((v + levels.sigma_min**2) / (v + s * s))
        found = apply(weights, x, jnp.full(41, s))
        assert np.sqrt(np.mean((found - exact) ** 2)) < 0.09


def test_settings_change_what_they_name():
    v, ctx = variables(), context(90)
    base = forward(objective(), v, ctx)
    uniform = forward(objective(weighting="uniform"), v, ctx)
    np.testing.assert_array_equal(uniform["weight"], np.ones(B))
    np.testing.assert_array_equal(uniform["prediction"], base["prediction"])
    wide = {k: jnp.tile(x, (256, *[1] * (x.ndim - 1))) for k, x in BATCH.items()}
    grid = np.asarray(karras_sigmas(9, max_n=9))
    for settings, logits in (
        ({"intervals": "uniform"}, ict.uniform_interval_logits(jnp.asarray(grid), 9)),
        ({}, ict.lognormal_interval_logits(jnp.asarray(grid), 9)),
        ({"mean": 1.0, "std": 0.5}, ict.lognormal_interval_logits(jnp.asarray(grid), 9, 1.0, 0.5)),
    ):
        drawn = jax.jit(lambda v, b, c, obj=objective(**settings): obj.forward(v, b, c)[0]["sigma"])(v, wide, ctx)
        found = np.searchsorted(grid * (1 - 1e-5), np.asarray(drawn), side="right") - 1
        np.testing.assert_allclose(np.bincount(found, minlength=8) / 4096, np.exp(logits), atol=0.04)
    for settings, metric in (
        ({"reduction": "elementwise"}, functools.partial(pseudo_huber, reduction="elementwise")),
        ({"metric": l2}, l2),
    ):
        values = objective(**settings).loss(base, BATCH, ctx).elements.values
        np.testing.assert_allclose(values, base["weight"] * metric(base["prediction"], base["target"]), rtol=1e-6)


def test_original_training_is_the_parents():
    obj = ict.original_consistency_training(NET)
    v = jax.jit(obj.init)(KEY, BATCH)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), v["teacher"], v["params"]))
    moved = {**trained(v), "teacher": v["teacher"]}
    ctx = context(50)
    out = forward(obj, moved, ctx)
    n = int(ict.original_discretization_steps(50, 100))
    assert n == math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4))
    assert float(obj.loss(out, BATCH, ctx).metrics["levels"]) == n
    grid = karras_sigmas(n, max_n=151)
    far = np.abs(np.asarray(out["sigma"])[:, None] / np.asarray(grid[: n - 1]) - 1).min(1)
    assert far.max() < 1e-5
    # the target is the teacher's
    z = noise(ctx)
    noisy = X + out["sigma"].reshape(-1, 1, 1, 1) * z
    own = {c: x for c, x in v.items() if c != "teacher"}
    np.testing.assert_allclose(out["target"], APPLY(own, noisy, out["sigma"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(out["weight"], np.ones(B))
    squares = ((np.asarray(out["prediction"], np.float64) - out["target"]) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(obj.loss(out, BATCH, ctx).elements.values, squares, rtol=1e-4)
    # the teacher follows by 5 %
    after = obj.after_step(moved, out, BATCH, ctx)
    expected = jax.tree.map(lambda t, p: 0.95 * t + 0.05 * p, moved["teacher"], moved["params"])
    assert set(after) == {"teacher"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after["teacher"], expected)


def test_improved_training_keeps_no_second_weights():
    assert "teacher" not in variables()
    assert objective().after_step is None


def test_one_compilation_serves_the_whole_curriculum():
    obj, v = objective(), variables()
    traces = []

    @jax.jit
    def loss(v, ctx):
        traces.append(1)
        return obj.loss(obj.forward(v, BATCH, ctx)[0], BATCH, ctx).metrics["levels"]

    assert [float(loss(v, context(k))) for k in (0, 40, 70, 99)] == [3, 5, 9, 9]
    assert len(traces) == 1


def test_labels_reach_the_network():
    obj = ict.consistency_training(ResidualMLP(8, 1, condition=8, classes=3), s0=2, s1=8, label="label")
    batch = {**BATCH, "label": jnp.arange(B) % 3}
    v = trained(jax.jit(obj.init)(KEY, batch))
    first = forward(obj, v, context(60), batch)["prediction"]
    other = forward(obj, v, context(60), {**batch, "label": (jnp.arange(B) + 1) % 3})["prediction"]
    assert np.abs(first - other).reshape(B, -1).max(1).min() > 1e-6
    assert "label" in obj.provides


def test_half_precision_computes_its_loss_in_float32():
    obj = ict.consistency_training(NET.clone(dtype="bfloat16"), s0=2, s1=8)
    out = forward(obj, variables(), context(60))
    exact = forward(objective(), variables(), context(60))
    assert out["prediction"].dtype == jnp.float32
    assert obj.loss(out, BATCH, context(60)).elements.values.dtype == jnp.float32
    np.testing.assert_allclose(out["prediction"], exact["prediction"], rtol=0.1, atol=0.1)


# --- sampling and editing ---------------------------------------------------------------------------------------------


def their_model(weights, x, sigma, cond=None):
    skip, out, _ = consistency_precond(sigma)
    return skip[:, None] * x + out[:, None] * jnp.tanh(x @ weights / (1 + sigma[:, None]))


@pytest.mark.parametrize("name", ["sample", "inpaint", "clip", "stroke", "map"])
def test_sampling_and_editing_agree_with_the_reimplementation(name):
    g = GOLDEN
    w, y, noise = jnp.asarray(g["W"]), jnp.asarray(g["reference"]), jnp.asarray(g[f"noise_{name}"])
    if name == "sample":
        found = ict.consistency_sample(their_model, w, KEY, y.shape, SIGMAS, noise=noise)
    else:
        order, back = jnp.asarray(g["perm"]), jnp.argsort(jnp.asarray(g["perm"]))
        settings = {
            "inpaint": {},
            "clip": {"clip": True},
            "stroke": {"from_reference": True},
            "map": {"transform": lambda x: x[:, order], "inverse": lambda x: x[:, back], "variant": "official"},
        }[name]
        found = ict.consistency_edit(their_model, w, KEY, y, jnp.asarray(g["mask"]), SIGMAS, noise=noise, **settings)
    np.testing.assert_allclose(found, g[f"edit_{name}"], rtol=1e-4, atol=1e-5)


def test_editing_transforms_the_sample_too():
    """The parent's algorithm 4 under an orthogonal map: kept coefficients are the reference's, the others x's own."""
    g = GOLDEN
    rng = np.random.default_rng(1)
    q = jnp.asarray(np.linalg.qr(rng.standard_normal((6, 6)))[0], jnp.float32)
    mask = jnp.array([1.0, 1, 0, 0, 1, 0])
    y, noise = jnp.asarray(g["reference"]), jnp.asarray(rng.standard_normal((1, 4, 6)), jnp.float32)
    edit = functools.partial(ict.consistency_edit, their_model, jnp.asarray(g["W"]), KEY, y, mask, (5.0,), noise=noise)
    found = edit(transform=lambda x: x @ q, inverse=lambda x: x @ q.T)
    start = (y @ q * (1 - mask)) @ q.T
    x = their_model(jnp.asarray(g["W"]), start + 5.0 * noise[0], jnp.full(4, 5.0))
    np.testing.assert_allclose(found @ q, jnp.where(mask == 1, x @ q, y @ q), rtol=1e-3, atol=1e-4)


def test_samples_follow_their_key_and_levels():
    v = variables()
    sample = functools.partial(ict.consistency_sample, APPLY, v)
    one = sample(KEY, X.shape)
    z = jax.random.normal(KEY, (1, *X.shape))
    np.testing.assert_allclose(one, APPLY(v, 80.0 * z[0], jnp.full(B, 80.0)), rtol=1e-4, atol=1e-4)
    assert not np.allclose(one, sample(jax.random.key(9), X.shape))
    z = jax.random.normal(KEY, (2, *X.shape))
    first = APPLY(v, 80.0 * z[0], jnp.full(B, 80.0))
    second = APPLY(v, first + math.sqrt(0.25 - 0.01) * z[1], jnp.full(B, 0.5))
    np.testing.assert_allclose(sample(KEY, X.shape, (80.0, 0.5), sigma_min=0.1), second, rtol=1e-3, atol=1e-3)
    assert np.abs(sample(KEY, X.shape, clip=True)).max() <= 1


def test_labels_reach_the_sampler():
    model = ict.ConsistencyModel(Spy("cond"))
    x = jnp.zeros((3, 2))
    v = model.init(KEY, x, jnp.ones(3), jnp.arange(3.0))
    labels = jnp.array([1.0, 2.0, 3.0])
    found = ict.consistency_sample(model.apply, v, KEY, (3, 2), cond=labels, noise=jnp.zeros((1, 3, 2)))
    out = 0.5 * (80 - 0.002) / math.sqrt(80**2 + 0.25)
    np.testing.assert_allclose(found, out * labels[:, None] * jnp.ones((3, 2)), rtol=1e-5)


def test_slerp_keeps_the_length_and_meets_its_ends():
    a, b = jax.random.normal(KEY, (2, 5, 300))
    a, b = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    np.testing.assert_allclose(slerp(a, b, 1.0), a, atol=1e-5)
    np.testing.assert_allclose(slerp(a, b, 0.0), b, atol=1e-5)
    middle = slerp(a, b, 0.3)
    np.testing.assert_allclose(jnp.linalg.norm(middle, axis=1), np.ones(5), rtol=1e-5)
    angle = lambda u, v: np.arccos(np.clip(np.sum(u * v, 1), -1, 1))  # noqa: E731
    np.testing.assert_allclose(angle(middle, b), 0.3 * angle(a, b), rtol=1e-3)
    np.testing.assert_allclose(slerp(a, a, 0.4), a, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_levels_and_curricula():
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max is needed, got 2.0 and 1.0"):
        Levels(2.0, 1.0)
    with pytest.raises(ValueError, match="rho and sigma_data must be positive"):
        Levels(sigma_data=0.0)
    with pytest.raises(ValueError, match="1 <= s0 <= s1, got s0=20, s1=10"):
        ict.consistency_training(NET, s0=20, s1=10)
    with pytest.raises(ValueError, match="1 <= s0"):
        ict.check_curriculum(None, 0, 10)
    with pytest.raises(ValueError, match="total_steps // stages is 0"):
        ict.discretization_steps(0, 7, 10, 1280)
    assert int(ict.discretization_steps(7, 8, 10, 1280)) == 1281
    ict.check_curriculum(8, 10, 1280)
    with pytest.raises(ValueError, match="s0 must be at least 2"):
        ict.original_discretization_steps(0, 10, 1, 10)


def test_bad_settings():
    for argument in ("curriculum", "intervals", "weighting"):
        with pytest.raises(ValueError, match=f"{argument} must be one of .* got 'other'"):
            ict.consistency_training(NET, **{argument: "other"})
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), got 1.0"):
        ict.consistency_training(NET, ema_decay=1.0)
    with pytest.raises(ValueError, match="variant must be one of"):
        ict.consistency_edit(their_model, None, KEY, jnp.zeros((1, 2)), jnp.ones(2), (1.0,), variant="theirs")
    with pytest.raises(ValueError, match=r"noise must be \[T, \*shape\] = \(2, 3, 4\)"):
        ict.consistency_sample(their_model, None, KEY, (3, 4), (80.0, 1.0), noise=jnp.zeros((1, 3, 4)))


def test_sampling_needs_noise():
    with pytest.raises(ValueError, match="sampling needs a key, or the noise itself"):
        ict.consistency_sample(their_model, None, None, (3, 4))


def test_integer_images_are_refused():
    batch = {**BATCH, "x": jnp.zeros((B, 3, 2, 1), jnp.uint8)}
    for call in (lambda: objective().init(KEY, batch), lambda: objective().forward(variables(), batch, context())):
        with pytest.raises(ValueError, match=r"'x' must be floating point in \[-1, 1\], got uint8; use x / 127.5 - 1"):
            call()


def test_bad_sigma():
    check_sigma([0.002, 80.0])
    check_sigma(karras_sigmas(11))
    for bad in (6400.0, 0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"sigma must lie in \[0.002, 80\], got .*not variances or timesteps"):
            check_sigma([1.0, bad])


def test_bad_images():
    check_images(np.asarray(X))
    with pytest.raises(ValueError, match=r"x must be floating point in \[-1, 1\], got uint8"):
        check_images(np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(
        ValueError, match=r"photos: expected range \[-1, 1\], got min 0, max 255; use photos / 127.5 - 1"
    ):
        check_images(np.array([0.0, 255.0]), "photos")
    with pytest.raises(ValueError, match=r"got min 0, max 1; use 2 \* x - 1"):
        check_images(np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="got min -3"):
        check_images(np.array([-3.0, 1.0]))
    with pytest.raises(ValueError, match="1 values that are not finite"):
        check_images(np.array([np.nan, -1.0]))


def test_bad_latents():
    check_latents(np.ones((3, 2), np.float32) * 50)
    x = np.zeros((4, 2), np.float32)
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match="x: example 2 holds values that are not finite"):
        check_latents(x)
    with pytest.raises(ValueError, match="points must be floating point, got int64"):
        check_latents(np.zeros((2, 2), np.int64), "points")
