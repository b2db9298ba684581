"""Dynamic Bad Pair Mining: the definition as an N x E table, the released code's numbers, limits and gradients."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.base import Context, Elements, Loss, example_elements, total_loss
from zoo.timeseries.dbpm import (
    PairMemory,
    check_pair_index,
    check_pair_memory,
    dynamic_bad_pair_mining,
    pair_means,
    pair_memory_init,
    pair_memory_stats,
    pair_memory_update,
    pair_thresholds,
    pair_weights,
    recency_weight,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "dbpm_mining.npz"
update = jax.jit(pair_memory_update, static_argnames=("recency", "epochs"))


def memory_of(means):
    means = jnp.asarray(means, jnp.float32)
    return PairMemory(means, jnp.ones_like(means), jnp.ones(means.shape, jnp.int32), jnp.int32(-1))


def density(loss, mu, sigma):
    return math.exp(-((loss - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


def loop_training(losses, orders, batch, warm_up, betas, weigh, mean_of):
    """The definition: an N x E table, flags at each epoch's start.  Returns weighted losses in drawing order."""
    number = losses.shape[1]
    table = [[] for _ in range(number)]
    out = []
    for epoch, order in enumerate(orders):
        bad, mu, sigma = set(), 0.0, 0.0
        if epoch >= warm_up and epoch > 0:
            means = np.array([mean_of(np.array(row)) for row in table])
            mu, sigma = means.mean(), means.std()
            bad = {i for i in range(number) if means[i] <= mu - betas[0] * sigma or means[i] >= mu + betas[1] * sigma}
        row = []
        for at, i in enumerate(order):
            loss = float(losses[epoch, at])
            table[i].append(loss)
            row.append(loss * weigh(loss, mu, sigma) if i in bad else loss)
        out.append(row)
    return np.array(out)


def run_training(transform, losses, orders, batch, pad=0):
    """The transformation over the same batches, with ``pad`` masked rows at the end of each."""
    number = losses.shape[1]
    steps = number // batch
    state = transform.init(number)
    step_fn = jax.jit(lambda e, s, c: transform.update(e, s, c))
    out, states = [], []
    for epoch, order in enumerate(orders):
        row = []
        for step in range(steps):
            part = slice(step * batch, (step + 1) * batch)
            index = np.concatenate([order[part], np.full(pad, number)]).astype(np.int32)
            values = np.concatenate([losses[epoch, part], np.full(pad, 1e6)]).astype(np.float32)
            fields = {"index": jnp.asarray(index), "mask": jnp.arange(batch + pad) < batch}
            context = Context(None, epoch * steps + step, len(orders) * steps, steps, batch=fields)
            e, state = step_fn(example_elements(jnp.asarray(values), fields), state, context)
            row.append(np.asarray(e.values)[:batch])
        out.append(np.concatenate(row))
        states.append(state)
    return np.array(out), states


def some_losses(number=24, epochs=5, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.gamma(6.0, 0.3, number)
    base[:3] *= 0.2
    base[3:6] *= 2.5
    orders = np.array([rng.permutation(number) for _ in range(epochs)])
    losses = np.abs(base * np.linspace(1, 0.7, epochs)[:, None] + 0.05 * rng.normal(size=(epochs, number)))
    return np.take_along_axis(losses, orders, 1).astype(np.float32), orders


# ------------------------------------------------------------------------------------------ the brief's checks (a)


def test_worked_example():
    stats = pair_memory_stats(memory_of([0, 1, 1, 1, 2]), 1.0, 1.0)
    assert float(stats.mu) == pytest.approx(1.0)
    assert float(stats.sigma) == pytest.approx(0.632456, abs=1e-6)
    low, high = pair_thresholds(stats.mu, stats.sigma, 1.0, 1.0)
    assert float(low) == pytest.approx(0.367544, abs=1e-6)
    assert float(high) == pytest.approx(1.632456, abs=1e-6)
    np.testing.assert_array_equal(stats.noisy, [True, False, False, False, False])
    np.testing.assert_array_equal(stats.faulty, [False, False, False, False, True])
    np.testing.assert_array_equal(stats.bad, [True, False, False, False, True])
    weights = pair_weights(stats, jnp.array([0, 4, 1]), jnp.array([1.0, 2.0, 2.0]), "pdf")
    np.testing.assert_allclose(weights, [0.630783, 0.180723, 1.0], atol=1e-6)
    assert float(weights[2]) == 1.0  # good pairs: exactly 1


def test_thresholds_belong_to_the_flags():
    # means 0 and 2 lie exactly one standard deviation from 1
    stats = pair_memory_stats(memory_of([0.0, 2.0]), 1.0, 1.0)
    np.testing.assert_array_equal(stats.noisy, [True, False])
    np.testing.assert_array_equal(stats.faulty, [False, True])


def test_the_two_betas_are_told_apart():
    means = [0, 1, 1, 1, 2]
    np.testing.assert_array_equal(pair_memory_stats(memory_of(means), 1.0, 5.0).bad, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(pair_memory_stats(memory_of(means), 5.0, 1.0).bad, [0, 0, 0, 0, 1])
    stats = pair_memory_stats(memory_of(np.r_[np.ones(18), 0.5, 1.66]))  # defaults: 2 below, 3 above
    low, high = pair_thresholds(stats.mu, stats.sigma)
    assert float(low) == pytest.approx(float(stats.mu - 2 * stats.sigma), rel=1e-6)
    assert float(high) == pytest.approx(float(stats.mu + 3 * stats.sigma), rel=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(stats.noisy), [18])
    np.testing.assert_array_equal(np.flatnonzero(stats.faulty), [19])


@pytest.mark.parametrize("transform", ["pdf", "pdf_clipped", "gaussian"])
def test_weights_equal_their_definition(transform):
    stats = pair_memory_stats(memory_of([0.0, 0.2, 0.2, 0.2, 0.4]), 1.0, 1.0)
    mu, sigma = 0.2, math.sqrt(0.016)
    losses = np.array([0.2, 0.05, 0.5, 0.21], np.float32)
    wanted = [density(x, mu, sigma) for x in losses]
    if transform == "pdf_clipped":
        wanted = [min(w, 1.0) for w in wanted]
    if transform == "gaussian":
        wanted = [w * sigma * math.sqrt(2 * math.pi) for w in wanted]
    got = pair_weights(stats, jnp.array([0, 4, 0, 4]), jnp.asarray(losses), transform)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert (transform == "pdf") == (float(got[0]) > 1.0)  # sigma < 0.399: the density exceeds 1 at mu


def test_default_transform_is_clipped():
    stats = pair_memory_stats(memory_of([0.0, 0.2, 0.2, 0.2, 0.4]), 1.0, 1.0)
    assert float(pair_weights(stats, jnp.array([0]), jnp.array([0.2]))[0]) == 1.0


def test_padding_weighs_one_and_negative_indices_do_not_wrap():
    stats = pair_memory_stats(memory_of([0.0, 1, 1, 1, 2.0]), 1.0, 1.0)
    np.testing.assert_array_equal(pair_weights(stats, jnp.array([5, 99, -1]), jnp.full(3, 9.0), "pdf"), 1.0)


def test_no_gradient_through_weights_or_memory():
    stats = pair_memory_stats(memory_of([0.0, 1, 1, 1, 2.0]), 1.0, 1.0)
    grad = jax.grad(lambda x: pair_weights(stats, jnp.arange(5), x, "pdf").sum())(jnp.full(5, 1.3))  # away from mu
    np.testing.assert_array_equal(grad, 0.0)
    grad = jax.grad(lambda x: pair_memory_update(pair_memory_init(5), jnp.arange(5), x).loss_sum.sum())(jnp.ones(5))
    np.testing.assert_array_equal(grad, 0.0)


def primed(beta=1.0, **settings):
    """The transformation with a memory of five, at the first step of its first mined epoch."""
    t = dynamic_bad_pair_mining(warm_up=1, beta_np=beta, beta_fp=beta, **settings)
    batch = {"index": jnp.array([4, 2, 0]), "mask": jnp.ones(3, bool)}
    return t, t.init(5).replace(memory=memory_of([0, 1, 1, 1, 2])), Context(None, 2, 8, 2, batch=batch)


def test_gradient_of_a_bad_pair_is_its_weight_over_the_batch():
    t, state, context = primed(transform="pdf")
    losses = jnp.array([1.7, 0.9, 0.4])

    def scalar(x):
        e, _ = t.update(example_elements(x, context.batch), state, context)
        return jnp.sum(jnp.where(e.mask, e.values, 0)) / 3

    wanted = np.array([density(1.7, 1, 0.632456), 1.0, density(0.4, 1, 0.632456)])
    np.testing.assert_allclose(jax.grad(scalar)(losses), wanted / 3, rtol=1e-5)
    assert float(scalar(losses)) == pytest.approx(float(wanted @ np.asarray(losses)) / 3, rel=1e-5)


def test_infinite_betas_leave_loss_and_gradients_identical():
    t, state, context = primed(beta=math.inf)
    objective_losses = lambda w: jnp.array([1.7, 0.9, 0.4]) * jnp.tanh(w)  # noqa: E731

    def scalar(w, transform):
        loss = Loss(example_elements(objective_losses(w), context.batch))
        return total_loss(loss, transform, state if transform else (), context)[0]

    w = jnp.array([0.3, -0.2, 1.0])
    plain, mined = (jax.value_and_grad(scalar)(w, x) for x in (None, t))
    np.testing.assert_array_equal(plain[0], mined[0])
    np.testing.assert_array_equal(plain[1], mined[1])


# -------------------------------------------------------------------------------------------- memory and epochs


def test_memory_equals_the_table_in_any_order():
    losses, orders = some_losses()
    number, epochs = losses.shape[1], len(losses)
    table = np.zeros((number, epochs))
    memories = {"mean": pair_memory_init(number), "linear": pair_memory_init(number)}
    backward = pair_memory_init(number)
    for e in range(epochs):
        table[orders[e], e] = losses[e]
        batches = [slice(i, i + 8) for i in range(0, number, 8)]
        for part in batches:
            idx, x = jnp.asarray(orders[e][part]), jnp.asarray(losses[e][part])
            memories["mean"] = update(memories["mean"], idx, x, e)
            memories["linear"] = update(memories["linear"], idx, x, e, recency="linear", epochs=epochs)
        for part in batches[::-1]:
            backward = update(backward, jnp.asarray(orders[e][part][::-1]), jnp.asarray(losses[e][part][::-1]), e)
    np.testing.assert_allclose(pair_means(memories["mean"]), table.mean(1), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, memories["mean"], backward)
    weights = (1 + np.arange(epochs)) / epochs
    np.testing.assert_allclose(pair_means(memories["linear"]), table @ weights / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(pair_means(memories["linear"], legacy_scale=True), (table * weights).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(memories["linear"].count, epochs)


def test_recency_weights():
    assert float(recency_weight(7)) == 1.0
    assert float(recency_weight(0, "linear", 80)) == pytest.approx(1 / 80)
    assert float(recency_weight(79, "linear", 80)) == pytest.approx(1.0)


def test_an_instance_drawn_twice_counts_twice_and_one_never_drawn_is_not_in_the_population():
    memory = update(pair_memory_init(5), jnp.array([0, 0, 1, 3]), jnp.array([1.0, 3.0, 4.0, 3.0]))
    np.testing.assert_allclose(pair_means(memory), [2.0, 4.0, 0.0, 3.0, 0.0])
    stats = pair_memory_stats(memory, 1.0, 1.0)
    assert float(stats.mu) == pytest.approx(3.0)
    assert float(stats.sigma) == pytest.approx(math.sqrt(2 / 3), rel=1e-6)
    np.testing.assert_array_equal(stats.bad, [True, True, False, False, False])


def test_padding_is_not_recorded():
    memory = update(pair_memory_init(3), jnp.array([1, 3, 7, -1]), jnp.array([2.0, 9.0, 9.0, 9.0]))
    np.testing.assert_array_equal(memory.count, [0, 1, 0])
    np.testing.assert_array_equal(memory.loss_sum, [0.0, 2.0, 0.0])
    assert int(memory.nonfinite) == -1


@pytest.mark.parametrize("value", [0.0, 0.1, 3.7])
def test_constant_losses_flag_nothing(value):
    stats = pair_memory_stats(memory_of(np.full(1000, value)), 0.5, 0.5)
    assert float(stats.sigma) == 0.0
    assert not stats.bad.any()
    np.testing.assert_array_equal(pair_weights(stats, jnp.arange(3), jnp.ones(3)), 1.0)


def test_empty_memory_flags_nothing():
    stats = pair_memory_stats(pair_memory_init(4), 1.0, 1.0)
    assert not stats.bad.any()
    assert np.isfinite([float(stats.mu), float(stats.sigma)]).all()


@pytest.mark.parametrize("recency", ["mean", "linear"])
@pytest.mark.parametrize("transform", ["pdf_clipped", "gaussian"])
def test_training_equals_the_table_of_the_definition(recency, transform):
    losses, orders = some_losses()
    epochs = len(losses)

    def mean_of(row):
        weights = np.ones(len(row)) if recency == "mean" else (1 + np.arange(len(row))) / epochs
        return row @ weights / weights.sum()

    def weigh(loss, mu, sigma):
        w = density(loss, mu, sigma)
        return min(w, 1.0) if transform == "pdf_clipped" else w * sigma * math.sqrt(2 * math.pi)

    wanted = loop_training(losses, orders, 8, 2, (1.2, 1.0), weigh, mean_of)
    t = dynamic_bad_pair_mining(2, epochs, 1.2, 1.0, transform, recency)
    got, _ = run_training(t, losses, orders, 8)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got[:2], losses[:2])  # warm-up: untouched
    assert (got[2:] != losses[2:]).any(axis=1).all()  # and mined from the first epoch after it


def test_official_variant_equals_the_released_code():
    g = np.load(GOLDEN)
    epochs, warm_up, batch = len(g["loss"]), int(g["warm_up"]), int(g["batch"])
    t = dynamic_bad_pair_mining(warm_up, epochs, *g["beta"].tolist(), variant="official")
    got, states = run_training(t, g["loss"], g["order"], batch)
    np.testing.assert_allclose(got, g["weighted"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got.reshape(-1, batch).mean(1), g["batch_loss"], rtol=1e-5)
    for k, state in enumerate(states[warm_up:]):
        np.testing.assert_allclose(state.stats.mu, g["mu"][k], rtol=1e-5)
        np.testing.assert_allclose(state.stats.sigma, g["sigma"][k], rtol=1e-4)
        np.testing.assert_array_equal(np.stack([state.stats.noisy, state.stats.faulty]), g["flags"][k])
    paper, _ = run_training(dynamic_bad_pair_mining(warm_up, epochs, *g["beta"].tolist()), g["loss"], g["order"], batch)
    assert not np.allclose(paper, g["weighted"], rtol=1e-2)


def test_padded_rows_change_nothing():
    losses, orders = some_losses()
    t = dynamic_bad_pair_mining(1, beta_np=1.0, beta_fp=1.0)
    plain, states = run_training(t, losses, orders, 8)
    padded, padded_states = run_training(t, losses, orders, 8, pad=3)
    np.testing.assert_array_equal(plain, padded)
    jax.tree.map(np.testing.assert_array_equal, states[-1], padded_states[-1])


def test_masked_elements_are_ignored_even_with_a_valid_index():
    t, state, context = primed()
    mask = jnp.array([True, False, True])
    e = Elements(jnp.array([1.0, 5.0, 1.0]), jnp.arange(3)[:, None], mask, "example")
    _, new = t.update(e, state, context)
    np.testing.assert_array_equal(new.memory.count - state.memory.count, [1, 0, 0, 0, 1])


def test_elements_are_matched_to_instances_by_their_anchor():
    t, state, context = primed(transform="gaussian")
    e = Elements(jnp.array([0.4, 1.7]), jnp.array([[2], [0]]), jnp.ones(2, bool), "example")  # rows 2 and 0
    out, new = t.update(e, state, context)
    np.testing.assert_allclose(new.memory.loss_sum - state.memory.loss_sum, [0.4, 0, 0, 0, 1.7], rtol=1e-5)
    wanted = [x * math.exp(-((x - 1) ** 2) / (2 * 0.4)) for x in (0.4, 1.7)]
    np.testing.assert_allclose(out.values, wanted, rtol=1e-5)


def test_flags_are_fixed_within_an_epoch():
    t, state, context = primed()
    e = example_elements(jnp.array([50.0, 1.0, 0.0]), context.batch)
    _, first = t.update(e, state, context)
    _, second = t.update(e, first, context.replace(step=3))
    jax.tree.map(np.testing.assert_array_equal, first.stats, second.stats)
    _, third = t.update(e, second, context.replace(step=4))
    assert float(third.stats.mu) > float(second.stats.mu)


def test_flags_do_not_see_the_losses_of_their_own_first_step():
    t, state, context = primed()
    e = example_elements(jnp.array([50.0, 1.0, 0.0]), context.batch)
    _, new = t.update(e, state, context)
    assert float(new.stats.mu) == pytest.approx(1.0)


def test_nothing_is_mined_before_the_warm_up_ends():
    t, state, context = primed()
    e = example_elements(jnp.array([1.7, 0.9, 0.4]), context.batch)
    out, new = t.update(e, state, context.replace(step=0))
    np.testing.assert_array_equal(out.values, e.values)
    assert not new.stats.bad.any()
    np.testing.assert_array_equal(new.memory.count, [2, 1, 2, 1, 2])


def test_one_program_serves_every_epoch_and_maps_over_runs():
    losses, orders = some_losses()
    t = dynamic_bad_pair_mining(1, beta_np=1.0, beta_fp=1.0)
    traces = []

    @jax.jit
    def step(values, index, state, number, length):
        traces.append(1)
        batch = {"index": index, "mask": jnp.ones(8, bool)}
        return t.update(example_elements(values, batch), state, Context(None, number, 15, length, batch=batch))

    state, out = t.init(24), None
    for n in range(12):
        part = slice(8 * (n % 3), 8 * (n % 3) + 8)
        out, state = step(losses[n // 3][part], orders[n // 3][part].astype(np.int32), state, n, 3)
    assert len(traces) == 1
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), (jnp.asarray(losses[4, :8]), jnp.asarray(orders[4, :8]), state))
    mapped, _ = jax.vmap(lambda v, i, s: step(v, i.astype(jnp.int32), s, 12, 3))(*twice)
    single, _ = step(losses[4, :8], orders[4, :8].astype(np.int32), state, 12, 3)
    np.testing.assert_allclose(mapped.values[1], single.values, rtol=1e-6)


def test_a_fresh_state_can_be_donated():
    state = dynamic_bad_pair_mining(1).init(6)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_half_precision_losses_are_remembered_in_float32():
    t, state, context = primed()
    e = Elements(jnp.array([1.7, 0.9, 0.4], jnp.bfloat16), jnp.arange(3)[:, None], jnp.ones(3, bool), "example")
    out, new = t.update(e, state, context)
    assert out.values.dtype == jnp.bfloat16
    assert new.memory.loss_sum.dtype == jnp.float32


# -------------------------------------------------------------------------------------------------- bad input


def test_a_loss_that_is_not_finite_is_kept_out_and_named():
    memory = update(pair_memory_init(4), jnp.array([1, 2, 3, 4]), jnp.array([1.0, np.nan, np.inf, np.nan]))
    np.testing.assert_array_equal(memory.count, [0, 1, 0, 0])
    assert np.isfinite(np.asarray(memory.loss_sum)).all()
    assert np.isfinite(float(pair_memory_stats(memory).mu))
    memory = update(memory, jnp.array([0]), jnp.array([np.nan]))
    with pytest.raises(ValueError, match="the loss of instance 2 was not finite"):
        check_pair_memory(memory, 4)


def test_a_memory_of_another_size_is_named():
    check_pair_memory(pair_memory_init(8), 8)
    with pytest.raises(ValueError, match="pair memory has 8 rows, dataset 9"):
        check_pair_memory(pair_memory_init(8), 9)


def test_indices_out_of_range_are_named_unless_padded():
    check_pair_index(np.array([0, 4, 5]), 5, np.array([True, True, False]))
    for index, row in (([0, 5], r"index\[1\] is 5"), ([-1, 0], r"index\[0\] is -1")):
        with pytest.raises(ValueError, match=row + "; the pair memory takes 0 to 4"):
            check_pair_index(np.array(index), 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": 80, "epochs": 80}, r"warm_up \(80\) must be below epochs \(80\)"),
        ({"warm_up": -1}, "warm_up must be 0 epochs or more, got -1"),
        ({"warm_up": 1, "beta_np": 0.0}, "beta_np must be positive, got 0"),
        ({"warm_up": 1, "beta_fp": -2.0}, "beta_fp must be positive, got -2"),
        ({"warm_up": 1, "beta_fp": math.nan}, "beta_fp must be positive, got nan"),
        ({"warm_up": 1, "variant": "official"}, "needs epochs"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dynamic_bad_pair_mining(**settings)


@pytest.mark.parametrize("setting", ["transform", "recency", "variant"])
def test_unknown_choices_are_named(setting):
    with pytest.raises(Exception, match=setting):
        dynamic_bad_pair_mining(1, **{setting: "other"})


def test_an_empty_memory_is_refused():
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        pair_memory_init(0)
