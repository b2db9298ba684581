"""DSL: every piece against loops written from the brief, the released code's numbers, and the transformation's laws."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.ops import masks as ops
from zoo.recommendation import dsl

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "dsl_official.npz")
KEY = jax.random.key(0)
W0 = jnp.array([0, 0.1, -0.2, 0.3, 0, 0])
M0 = jnp.array([0, 1, 1, 1, 0, 0], bool)


def loop_exchange(w, g, mask, ratio):
    """The brief's step 5 in plain Python (no ties in |g| among candidates)."""
    w, g, mask = w.ravel() * mask.ravel(), np.abs(g).ravel(), mask.ravel()
    n, nnz = len(w), int(mask.sum())
    r = math.ceil(ratio * nnz)
    ordered = sorted(abs(x) for x in w)
    tau = ordered[(n - nnz) + r - 1]
    kept = [abs(x) > tau for x in w]
    removed = nnz - sum(kept)
    candidates = sorted((j for j in range(n) if not kept[j]), key=lambda j: -g[j])
    for j in candidates[:removed]:
        kept[j] = True
    return np.array(kept), removed


def random_problem(seed, shape=(9, 5), density=0.5):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    w, g = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return w * mask, g, mask


def make(inner=None, **kw):
    settings = {"density": 0.5, "update_interval": 3, "update_ratio": 0.5, "total_steps": 30, "key": KEY, **kw}
    return dsl.dynamic_sparse(inner or optax.adam(0.05), **settings)


PARAMS = {
    "layer": {"kernel": jax.random.normal(jax.random.key(1), (8, 6)), "bias": jnp.arange(1.0, 7.0)},
    "table": jax.random.normal(jax.random.key(2), (10, 4)),
}


def run(tx, params, gradients, state=None):
    """All parameters and states after each update."""
    state = tx.init(params) if state is None else state
    step = jax.jit(lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    out = []
    for g in gradients:
        params, state = step(params, state, g)
        out.append((params, state))
    return out


def gradients_like(params, steps, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype)  # noqa: E731
    return [jax.tree.map(draw, params) for _ in range(steps)]


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_hand_example_prunes_and_regrows():
    kept = dsl.magnitude_prune(W0, M0, 1)
    assert kept.tolist() == [False, False, True, True, False, False]
    g = jnp.array([0.5, 0.9, 0, 0, 0.1, 0.2])
    assert dsl.gradient_grow(g, kept, 1, KEY).tolist() == [False, True, True, True, False, False]
    g = g.at[1].set(0.4)
    assert dsl.gradient_grow(g, kept, 1, KEY).tolist() == [True, False, True, True, False, False]
    assert dsl.exchange(W0, -g, M0, M0, 1 / 3, KEY).tolist() == [True, False, True, True, False, False]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.77, 1.0])
def test_exchange_is_the_loop(seed, ratio):
    w, g, mask = random_problem(seed)
    got = jax.jit(dsl.exchange)(w, g, mask, mask, jnp.float32(ratio), KEY)
    np.testing.assert_array_equal(np.asarray(got).ravel(), loop_exchange(w, g, mask, ratio)[0])
    assert got.sum() == mask.sum()


def test_magnitude_prune_ties_and_zeros():
    w = jnp.array([0.2, -0.2, 0.2, 0.5, 0.0, 0.0])
    mask = jnp.array([1, 1, 1, 1, 1, 0], bool)
    # an active zero goes first; the second removal ties three ways, so all three go
    assert dsl.magnitude_prune(w, mask, 1).tolist() == [True, True, True, True, False, False]
    assert dsl.magnitude_prune(w, mask, 2).tolist() == [False, False, False, True, False, False]
    assert dsl.magnitude_prune(w, mask, 0).tolist() == mask.tolist()
    assert dsl.magnitude_prune(w, mask, 0, variant="official").tolist() == [True] * 4 + [False] * 2
    assert not dsl.magnitude_prune(w, mask, 5).any()
    # weights where the mask is off do not count, whatever they hold
    assert dsl.magnitude_prune(w.at[5].set(9.0), mask, 2).tolist() == [False, False, False, True, False, False]


def test_traced_counts_compile_once():
    traces = []

    @jax.jit
    def f(w, g, mask, n):
        traces.append(1)
        return dsl.gradient_grow(jnp.abs(g), dsl.magnitude_prune(w, mask, n), n, KEY)

    w, g, mask = random_problem(0)
    for n in (0, 1, 5):
        assert f(w, g, mask, jnp.int32(n)).sum() == mask.sum()
    assert len(traces) == 1


def test_growth_breaks_ties_at_random_and_only_among_inactive():
    mask = jnp.zeros(200, bool).at[:100].set(True)
    score = jnp.zeros(200).at[:100].set(9.0)  # active scores are never candidates
    grown = [dsl.gradient_grow(score, mask, 10, jax.random.key(s)) for s in range(20)]
    for new in grown:
        assert new[:100].all() and new.sum() == 110
    where = np.concatenate([np.flatnonzero(n)[100:] for n in grown])
    assert len(set(where)) > 60  # spread over the hundred candidates
    assert 120 < where.mean() < 180  # and not favouring low indices
    assert (dsl.gradient_grow(score, mask, 10, KEY) == dsl.gradient_grow(score, mask, 10, KEY)).all()
    # a tie-break never overrules a larger score
    assert dsl.gradient_grow(score.at[150].set(1e-6), mask, 1, KEY)[150]


def test_smallest_is_exact_whatever_ties(monkeypatch):
    rng = np.random.default_rng(0)
    for size, levels in ((50, 3), (64, 1), (40, 1000)):
        cost = jnp.asarray(rng.integers(-levels, levels, size), jnp.float32) / 7
        cost = cost.at[3].set(-0.0).at[4].set(jnp.inf)
        for n in (0, 1, 7, size - 1, size):
            got = np.asarray(ops._smallest(cost, n, KEY))
            np.testing.assert_array_equal(np.sort(np.asarray(cost)[got]), np.sort(np.asarray(cost))[:n])
    # even where all random bits are equal
    monkeypatch.setattr(jax.random, "bits", lambda key, shape: jnp.full(shape, 7, jnp.uint32))
    assert ops._smallest(jnp.array([2.0, 1.0, 2.0, 2.0]), 3, KEY).tolist() == [True, True, True, False]
    # zeros of either sign tie, so that neither sign is favoured
    assert ops._smallest(jnp.array([0.0, -0.0]), 1, KEY).tolist() == [True, False]


def test_ties_fall_differently_at_every_exploration():
    # with no gradient at all, growth is a pure draw: two explorations from the same state must differ
    tx = make(optax.sgd(0.0), update_interval=1, update_ratio=0.5, min_ratio=0.5, mask_init="exact")
    params = {"w": jnp.arange(1.0, 201.0)}
    state = tx.init(params)
    zero = {"w": jnp.zeros(200)}
    draws = [tx.update(zero, state._replace(count=jnp.int32(c)), params)[1].mask["w"] for c in (3, 3, 4)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_taylor_set_threshold_and_random_growth():
    w, g, mask = random_problem(3, (40, 6))
    cost = np.where(mask, (w * g) ** 2, np.inf).ravel()
    kept = mask.ravel().copy()
    kept[np.argsort(cost)[:17]] = False
    jw, jg, jm = map(jnp.asarray, (w, g, mask))
    got = ops.taylor_prune(jw, jg, jm, 17, KEY)
    np.testing.assert_array_equal(np.asarray(got).ravel(), kept)
    # SET: ceil(17 / 2) = 9 nearest zero on either side
    flat = w.ravel()
    positive, negative = np.sort(flat[flat > 0])[8], np.sort(-flat[flat < 0])[8]
    want = (flat > positive) | (-flat > negative)
    np.testing.assert_array_equal(np.asarray(ops.set_prune(jw, jm, 17)).ravel(), want)
    assert (ops.set_prune(jw, jm, 0) == mask).all()
    np.testing.assert_array_equal(ops.threshold_prune(jw, jm, 0.5), np.abs(w) > 0.5)
    grown = ops.bernoulli_grow(jm, 40, KEY)
    assert (grown & mask == mask).all() and 20 < (grown & ~mask).sum() < 60


def test_random_unfired_prefers_weights_never_active():
    w, g, mask = map(jnp.asarray, random_problem(5, (100,), 0.3))
    fired = mask | (jnp.arange(100) < 60)
    new = dsl.exchange(w, g, mask, fired, 0.5, KEY, grow="random_unfired")
    removed = math.ceil(0.5 * mask.sum())
    fresh = np.asarray(new) & ~fired
    assert new.sum() == mask.sum() and fresh.sum() == min(removed, (~fired).sum())


@pytest.mark.parametrize("prune", dsl.PRUNE)
@pytest.mark.parametrize("grow", ["gradient", "random", "random_unfired", "momentum"])
def test_every_pair_of_criteria_keeps_the_budget(prune, grow):
    w, g, mask = map(jnp.asarray, random_problem(6))
    new = dsl.exchange(w, g, mask, mask, 0.4, KEY, prune=prune, grow=grow, momentum=g**2, threshold=0.4)
    assert new.sum() == mask.sum()
    assert prune == "threshold" or (new != mask).any()


def test_random_masks():
    loose = dsl.random_mask(KEY, (200, 100), 0.3)
    assert abs(loose.mean() - 0.3) < 0.02 and loose.sum() != 6000
    assert dsl.random_mask(KEY, (37, 5), 0.3, exact=True).sum() == round(0.3 * 185)
    assert dsl.random_mask(KEY, (4, 4), 1.0).all()
    ws = [jnp.array([1.0, -5.0, 0.1]), jnp.array([[2.0, -3.0], [0.2, 0.3]])]
    got = dsl.lottery_ticket_masks(ws, 3.5 / 7)  # floor: three weights over both tensors
    assert got[0].tolist() == [False, True, False] and got[1].tolist() == [[True, True], [False, False]]


def test_update_ratios():
    np.testing.assert_allclose(dsl.cosine_update_ratio(0, 100, 0.5), 0.5, rtol=1e-6)
    np.testing.assert_allclose(dsl.cosine_update_ratio(50, 100, 0.5), 0.2525, rtol=1e-6)
    np.testing.assert_allclose(dsl.cosine_update_ratio(100, 100, 0.5), 0.005, atol=1e-7)
    np.testing.assert_allclose(dsl.cosine_update_ratio(170, 100, 0.5), 0.005, atol=1e-7)
    np.testing.assert_allclose([dsl.cosine_update_ratio(t, 50, 0.5) for t in range(51)], GOLDEN["cosine"], atol=1e-6)
    for t, power in ((0, 0), (599, 0), (600, 1), (1799, 2)):
        np.testing.assert_allclose(dsl.linear_update_ratio(t, 0.5), 0.5 * 0.99**power, rtol=1e-6)


def test_mask_stats_count():
    mask = {"a": jnp.array([1, 0, 0, 1], bool), "b": optax.MaskedNode(), "c": jnp.ones(4, bool)}
    fired = {"a": jnp.array([1, 1, 0, 1], bool), "b": optax.MaskedNode(), "c": jnp.ones(4, bool)}
    stats = {k: float(v) for k, v in dsl.mask_stats(mask, fired).items()}
    assert stats == {"nnz": 6, "total": 8, "density": 0.75, "exploration": 0.875}


# --- the released code ------------------------------------------------------------------------------------------------


def test_one_exploration_is_the_released_codes():
    w, g, mask, ratio = (jnp.asarray(GOLDEN[k]) for k in ("w", "g", "mask", "ratio"))
    n = math.ceil(float(ratio) * mask.sum())
    np.testing.assert_array_equal(dsl.magnitude_prune(w, mask, n), GOLDEN["magnitude"])
    np.testing.assert_array_equal(dsl.exchange(w, g, mask, mask, ratio, KEY), GOLDEN["grown"])
    np.testing.assert_array_equal(ops.taylor_prune(w, g, mask, n, KEY), GOLDEN["taylor"])
    np.testing.assert_array_equal(ops.set_prune(w, mask, n, variant="official"), GOLDEN["set"])
    np.testing.assert_array_equal(ops.threshold_prune(w, mask, 0.5), GOLDEN["threshold"])


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
def test_forty_steps_are_the_released_codes(grow):
    of = lambda name: jnp.asarray(GOLDEN[f"run_{grow}_{name}"])  # noqa: E731
    tx = make(update_interval=8, total_steps=40, grow=grow)
    params = {"a": of("a0"), "b": of("b0")}
    masks = {"a": of("m0a"), "b": of("m0b")}
    state = tx.init(params)._replace(mask=masks, fired=masks)
    gs = [{"a": of("ga")[t], "b": of("gb")[t]} for t in range(40)]
    after = run(tx, dsl.apply_mask(params, masks), gs, state)[7::8]
    for n, (p, s) in enumerate(after):
        for name in ("a", "b"):
            np.testing.assert_array_equal(s.mask[name], of(f"m{name}")[n])
            np.testing.assert_allclose(p[name], of(name)[n], atol=1e-5)
    assert [int(f.sum()) for f in jax.tree.leaves(after[-1][1].fired)] == of("fired").astype(int).tolist()


# --- the transformation -----------------------------------------------------------------------------------------------


def test_density_one_without_exchange_is_the_inner_optimiser_bit_by_bit():
    inner = optax.adamw(0.03)
    tx = make(inner, density=1.0, update_ratio=0.0, min_ratio=0.0)
    a, b, s, t = PARAMS, PARAMS, inner.init(PARAMS), tx.init(PARAMS)
    for g in gradients_like(PARAMS, 4):  # not jitted: two compiled programs may round differently
        u, s = inner.update(g, s, a)
        v, t = tx.update(g, t, b)
        a, b = optax.apply_updates(a, u), optax.apply_updates(b, v)
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert all(bool(m.all()) for m in jax.tree.leaves(t.mask))


def test_budget_is_constant_and_masked_weights_are_exact_zeros_for_a_thousand_steps():
    tx = make(optax.adam(0.05), update_interval=7, total_steps=1000, density=0.4)
    state = tx.init(PARAMS)
    budget = jax.tree.map(jnp.sum, state.mask)

    def body(carry, key):
        p, s = carry
        g = jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape) + 0.1 * x, p)
        u, s = tx.update(g, s, p)
        p = optax.apply_updates(p, u)
        off = jax.tree.map(lambda w, m: jnp.all(jnp.where(m, 0, w) == 0), p, s.mask)
        same = jax.tree.map(lambda m, n: jnp.sum(m) == n, s.mask, budget)
        moved = jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.any(a != b), s.mask, carry[1].mask))))
        return (p, s), (jax.tree.leaves(off), jax.tree.leaves(same), moved)

    (_, state), (off, same, moved) = jax.jit(lambda c, k: jax.lax.scan(body, c, k))(
        (PARAMS, state), jax.random.split(KEY, 1000)
    )
    assert all(x.all() for x in off) and all(x.all() for x in same)
    due = np.arange(1, 1001) % 7 == 0
    assert not moved[~due].any() and moved[due].mean() > 0.9
    assert state.count == 1000 and dsl.mask_stats(state.mask, state.fired)["exploration"] > 0.8


def test_grown_weights_start_at_zero_and_regrown_keep_their_value():
    # sgd with a gradient that is all on the first and last coordinates
    tx = make(optax.sgd(0.0), update_interval=1, update_ratio=1 / 3, min_ratio=1 / 3)
    params = {"w": W0.at[0].set(7.0)}  # not yet masked: the update must mend that too
    state = tx.init(params)._replace(mask={"w": M0}, fired={"w": M0})
    ((new, after),) = run(tx, params, [{"w": jnp.array([0.5, 0.9, 0, 0, 0.1, 0.2])}], state)
    np.testing.assert_array_equal(new["w"], jnp.array([0, 0.1, -0.2, 0.3, 0, 0]))
    ((new, after),) = run(tx, params, [{"w": jnp.array([0.5, 0.4, 0, 0, 0.1, 0.2])}], state)
    np.testing.assert_array_equal(new["w"], jnp.array([0, 0, -0.2, 0.3, 0, 0]))
    assert after.mask["w"].tolist() == [True, False, True, True, False, False]
    assert after.fired["w"].tolist() == [True, True, True, True, False, False]


def test_exploration_ranks_the_weights_after_the_inner_step():
    # before the step coordinate 1 is smallest; the step makes coordinate 2 the smallest
    tx = make(optax.sgd(1.0), update_interval=1, update_ratio=1 / 3, min_ratio=1 / 3)
    state = tx.init({"w": W0})._replace(mask={"w": M0}, fired={"w": M0})
    ((new, after),) = run(tx, {"w": W0}, [{"w": jnp.array([9.0, -1.0, -0.19, -1.0, 0, 0])}], state)
    assert after.mask["w"].tolist() == [True, True, False, True, False, False]
    np.testing.assert_allclose(new["w"], jnp.array([0, 1.1, 0, 1.3, 0, 0]), atol=1e-6)


def test_schedule_counts_from_one_and_falls():
    # update_ratio 1 at first, 0 at the end: exchanges everything early and nothing at T
    tx = make(optax.sgd(0.0), update_interval=10, total_steps=20, update_ratio=1.0, min_ratio=0.0, mask_init="exact")
    params = {"w": jnp.arange(1.0, 101.0)}
    gs = [{"w": jnp.asarray(np.random.default_rng(t).random(100), jnp.float32)} for t in range(20)]
    states = [s for _, s in run(tx, params, gs)]
    masks = [np.asarray(s.mask["w"]) for s in states]
    assert all((m == masks[0]).all() for m in masks[:9])
    assert (masks[9] != masks[8]).sum() > 20
    assert (masks[19] == masks[18]).all()


def test_static_mask_never_moves():
    tx = make(update_interval=None)
    after = run(tx, PARAMS, gradients_like(PARAMS, 10))
    first = tx.init(PARAMS).mask
    jax.tree.map(np.testing.assert_array_equal, after[-1][1].mask, first)
    jax.tree.map(np.testing.assert_array_equal, after[-1][1].fired, first)


def test_initial_parameters_lie_on_the_initial_mask():
    for mask_init in dsl.MASK_INIT:
        settings = {"density": 0.5, "key": KEY, "mask_init": mask_init, "maskable": dsl.matrices}
        sparse = dsl.dynamic_sparse_init(PARAMS, **settings)
        for given in (PARAMS, sparse):
            mask = make(mask_init=mask_init, maskable=dsl.matrices).init(given).mask
            np.testing.assert_array_equal(sparse["table"], jnp.where(mask["table"], PARAMS["table"], 0))
            assert isinstance(mask["layer"]["bias"], optax.MaskedNode)
        np.testing.assert_array_equal(sparse["layer"]["bias"], PARAMS["layer"]["bias"])
    exact = make(mask_init="exact").init(PARAMS).mask
    assert [int(m.sum()) for m in jax.tree.leaves(exact)] == [3, 24, 20]
    a, b = (make(key=jax.random.key(s)).init(PARAMS).mask["table"] for s in (0, 1))
    assert (a != b).any()


def test_tensors_draw_different_masks():
    twins = {"a": jnp.ones((20, 5)), "b": jnp.ones((20, 5))}
    mask = make().init(twins).mask
    assert (mask["a"] != mask["b"]).any()


def test_unmasked_parameters_follow_the_inner_optimiser():
    gs = gradients_like(PARAMS, 8)
    plain = run(optax.adam(0.05), PARAMS, gs)[-1][0]
    ours, state = run(make(maskable=dsl.named("table")), PARAMS, gs)[-1]
    jax.tree.map(np.testing.assert_array_equal, ours["layer"], plain["layer"])
    assert (ours["table"] == 0).sum() >= (~state.mask["table"]).sum() > 0
    assert dsl.named("tab")("table", None) is False and dsl.everything("x", None)


def test_global_scope_moves_budget_between_tensors():
    params = {"small": 0.01 * jnp.arange(1.0, 101.0), "large": jnp.arange(1.0, 101.0)}
    tx = make(optax.sgd(0.0), update_interval=1, scope="global", mask_init="exact", update_ratio=0.4, min_ratio=0.4)
    g = {"small": jnp.full(100, 1e-3) * jnp.arange(100), "large": jnp.arange(100.0) + 1}
    ((_, state),) = run(tx, params, [g])
    nnz = {k: int(m.sum()) for k, m in state.mask.items()}
    assert nnz == {"small": 10, "large": 90}  # 40 smallest of all active go, the 40 largest gradients come
    kept, removed = loop_exchange(
        np.concatenate([np.asarray(params[k] * tx.init(params).mask[k]) for k in ("large", "small")]),
        np.concatenate([np.asarray(g[k]) for k in ("large", "small")]),
        np.concatenate([np.asarray(tx.init(params).mask[k]) for k in ("large", "small")]), 0.4,
    )  # fmt: skip
    assert removed == 40
    np.testing.assert_array_equal(np.concatenate([state.mask["large"], state.mask["small"]]), kept)


def test_nan_gradients_leave_the_mask_alone_and_are_counted():
    tx = make(optax.sgd(0.0), update_interval=2)
    gs = gradients_like(PARAMS, 4)
    gs[1]["table"] = gs[1]["table"].at[0, 0].set(jnp.nan)
    gs[2]["table"] = gs[2]["table"].at[0, 0].set(jnp.nan)  # not an exploration step
    states = [s for _, s in run(tx, PARAMS, gs)]
    assert [int(s.refused) for s in states] == [0, 1, 1, 1]
    jax.tree.map(np.testing.assert_array_equal, states[1].mask, tx.init(PARAMS).mask)
    assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(states[n].mask) for n in (2, 3)), strict=True))


def test_moments_are_reset_where_a_weight_grows_only_if_asked():
    gs = gradients_like(PARAMS, 3)
    kept = run(make(), PARAMS, gs)
    reset = run(make(reset_moments_on_grow=True), PARAMS, gs)
    before, after = kept[1][1], kept[2][1]
    for path in (lambda t: t["table"], lambda t: t["layer"]["kernel"]):
        grown = path(after.mask) & ~path(before.mask)
        assert grown.any() and (path(after.mask) == path(reset[2][1].mask)).all()
        for moment in ("mu", "nu"):
            a, b = (path(getattr(r[2][1].inner_state[0], moment)) for r in (kept, reset))
            assert (a[grown] != 0).all() and (b[grown] == 0).all()
            np.testing.assert_array_equal(a[~grown], b[~grown])
    assert reset[2][1].inner_state[0].count == 3


def test_bfloat16_parameters_keep_dtype_and_zeros():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    new, state = run(make(), params, gradients_like(params, 6))[-1]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(new))
    jax.tree.map(lambda w, m: np.testing.assert_array_equal(w[~m].astype(jnp.float32), 0), new, state.mask)


def test_composes_inside_chains_and_finds_its_state():
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), make(optax.lamb(0.01))), 2)
    new, state = run(tx, PARAMS, gradients_like(PARAMS, 6))[-1]
    ours = dsl.sparse_state(state)
    assert ours.count == 3
    jax.tree.map(lambda w, m: np.testing.assert_array_equal(w[~m], 0), new, ours.mask)
    with pytest.raises(ValueError, match="no DynamicSparseState"):
        dsl.sparse_state(optax.adam(1.0).init(PARAMS))


def test_pmap_with_averaged_gradients_is_one_device_bit_by_bit():
    tx = make(grow="random_unfired", update_interval=2)
    x = jax.random.normal(KEY, (8, 10, 4))

    def one(params, state, grad):
        u, state = tx.update({"table": grad}, state, params)
        return optax.apply_updates(params, u), state

    params = {"table": PARAMS["table"]}
    state = tx.init(params)
    rep = lambda t: jax.tree.map(lambda a: jnp.stack([a] * 8), t)  # noqa: E731
    many = jax.pmap(lambda p, s, g: one(p, s, jax.lax.pmean(g, "d")), axis_name="d")
    pp, ss = rep(params), rep(state)
    for _ in range(4):
        params, state = jax.jit(one)(params, state, x.mean(0))
        pp, ss = many(pp, ss, x)
    for d in range(8):
        np.testing.assert_array_equal(ss.mask["table"][d], state.mask["table"])
        np.testing.assert_allclose(pp["table"][d], params["table"], atol=1e-5)


def test_state_may_be_donated_twice():
    tx = make()
    for _ in range(2):
        step = jax.jit(lambda s, g, p: tx.update(g, s, p)[1], donate_argnums=0)
        assert step(tx.init(PARAMS), PARAMS, PARAMS).count == 1


def test_legacy_keys_give_the_same_masks():
    a, b = make(key=KEY).init(PARAMS), make(key=jax.random.key_data(KEY)).init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, a.mask, b.mask)
    assert make(key=jax.random.key_data(KEY)).update(PARAMS, b, PARAMS)[1].count == 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": float("nan")}, "density must be in"),
        ({"update_interval": 0}, "update_interval must be at least 1 .*got 0"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"update_ratio": 1.2}, r"update_ratio must be in \[0, 1\], got 1.2"),
        ({"prune": "magnitud"}, "unknown prune 'magnitud'; did you mean 'magnitude'"),
        ({"grow": "gradients"}, "did you mean 'gradient'"),
        ({"mask_init": "er"}, "unknown mask_init"),
        ({"decay": "step"}, "unknown decay"),
        ({"scope": "local"}, "unknown scope"),
        ({"variant": "code"}, "unknown variant"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(Exception, match=message) as info:
        make(**setting)
    assert isinstance(info.value, ValueError)


def test_bad_parameters():
    with pytest.raises(ValueError, match="no maskable parameter: check `maskable`"):
        make(maskable=lambda path, leaf: False).init(PARAMS)
    with pytest.raises(ValueError, match="no maskable parameter"):
        make().init({"n": jnp.zeros(3, jnp.int32)})
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, state)
    other = {**PARAMS, "table": jnp.zeros((3, 3))}
    with pytest.raises(ValueError, match=r"table has shape \(3, 3\), its mask \(10, 4\)"):
        tx.update(other, state, other)
    with pytest.raises(ValueError, match="extra has no mask"):
        dsl.check_masks(state.mask, {**PARAMS, "extra": jnp.zeros(2)})
    with pytest.raises(ValueError, match="no parameter layer/bias"):
        dsl.check_masks(state.mask, {"layer": {"kernel": PARAMS["layer"]["kernel"]}, "table": PARAMS["table"]})
    tx = make(optax.scale(1.0), grow="momentum")
    with pytest.raises(ValueError, match="needs an inner optimiser with moments"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
