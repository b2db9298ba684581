"""Adaptive multi-head contrastive learning: loops from the definition, hand values, limits, gradients and hosts."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import hosts
from zoo.base import CompositionError, Context, Shared, check_fit, total_loss
from zoo.losses.siamese import cross_correlation
from zoo.metrics.neighbours import knn_classify
from zoo.nn.mlp import MLP
from zoo.nn.pair_temperature import AdaptiveHeads, PairTemperature, aligned_scores, bounded_temperature, pair_scores
from zoo.ops.queues import enqueue, init_queue
from zoo.representation.amcl import (
    HeadRows,
    Temperatures,
    amcl,
    amcl_contrastive,
    amcl_cross_correlation,
    amcl_negcos,
    amcl_rows,
    gaussian_temperature_regularizer,
)

RNG = np.random.default_rng(0)
contrastive = jax.jit(amcl_contrastive, static_argnames=("dim", "beta", "negatives", "positive_in_candidates"))


def omega(tau, dim):
    return dim / 2 * math.log(tau) + 1 / tau


def unit(z):
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def loop_contrastive(sim, tau, pos, neg, dim, beta, negatives, inside):
    """Table 2, one anchor, head and candidate at a time."""
    heads, anchors, many = sim.shape
    out = np.zeros(anchors)
    for i in range(anchors):
        for c in range(heads):
            ps = [j for j in range(many) if pos[i, j]]
            for j in ps:
                out[i] += (-sim[c, i, j] / tau[c, i, j] + beta * omega(tau[c, i, j], dim)) / len(ps)
            ns = [j for j in range(many) if neg[i, j] or (inside and pos[i, j])]
            if not ns:
                continue
            if negatives == "max":
                n = max(ns, key=lambda j: sim[c, i, j])
                out[i] += sim[c, i, n] / tau[c, i, n] - beta * omega(tau[c, i, n], dim)
            else:
                e = [math.exp(sim[c, i, j] / tau[c, i, j]) for j in ns]
                out[i] += math.log(sum(e))
                out[i] -= beta * sum(w * omega(tau[c, i, j], dim) for w, j in zip(e, ns, strict=True)) / sum(e)
    return out


def problem(seed=0, heads=2, anchors=4, many=7):
    rng = np.random.default_rng(seed)
    sim = rng.uniform(-1, 1, (heads, anchors, many)).astype(np.float32)
    tau = rng.uniform(0.2, 1.5, (heads, anchors, many)).astype(np.float32)
    kind = rng.integers(0, 3, (anchors, many))
    kind[:, 0], kind[:, 1], kind[3] = 1, 2, 0
    kind[3, 2] = 1  # the last anchor has a positive and no negative
    return sim, tau, kind == 1, kind == 2


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_the_regulariser_is_the_rest_of_the_gaussian():
    tau, dim = 0.3, 5
    z1, z2 = unit(np.random.default_rng(1).normal(size=(2, dim)))
    nll = dim / 2 * math.log(2 * math.pi * tau) + np.sum((z1 - z2) ** 2) / (2 * tau)
    found = float(gaussian_temperature_regularizer(jnp.float32(tau), dim)) - z1 @ z2 / tau
    assert found == pytest.approx(nll - dim / 2 * math.log(2 * math.pi), rel=1e-5)


def test_its_slope_vanishes_at_two_over_the_dimension():
    slope = jax.grad(lambda t: gaussian_temperature_regularizer(t, 8))
    for tau in (0.1, 0.25, 0.7, 1.9):
        assert float(slope(jnp.float32(tau))) == pytest.approx(8 / (2 * tau) - 1 / tau**2, rel=1e-5, abs=1e-5)
    assert float(slope(jnp.float32(0.24))) < 0 < float(slope(jnp.float32(0.26)))


def test_it_is_float32_whatever_comes_in():
    assert gaussian_temperature_regularizer(jnp.full(2, 0.01, jnp.bfloat16), 4).dtype == jnp.float32
    found = contrastive(*(jnp.asarray(a) for a in problem()), dim=4)
    low = [jnp.asarray(a).astype(jnp.bfloat16) for a in problem()[:2]]
    assert contrastive(*low, *map(jnp.asarray, problem()[2:]), dim=4).dtype == found.dtype == jnp.float32


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("negatives", ["max", "logsumexp"])
def test_contrastive_is_table_2(negatives, inside):
    args = problem()
    found = contrastive(*map(jnp.asarray, args), dim=3, beta=0.3, negatives=negatives, positive_in_candidates=inside)
    np.testing.assert_allclose(found, loop_contrastive(*args, 3, 0.3, negatives, inside), rtol=1e-5, atol=1e-5)


def test_the_briefs_hand_value():
    sim, one = jnp.asarray([[[1.0, 0.0, -0.5]]]), jnp.ones((1, 1, 3))
    pos, neg = jnp.asarray([[True, False, False]]), jnp.asarray([[False, True, True]])
    assert float(contrastive(sim, one, pos, neg, dim=2, beta=0.1)[0]) == pytest.approx(-1.0)
    # another temperature at the hardest negative: -1 + 0/0.5 + 0.1 * 1 - 0.1 * (log 0.5 + 2)
    tau = one.at[0, 0, 1].set(0.5).at[0, 0, 2].set(0.01)
    found = float(contrastive(sim, tau, pos, neg, dim=2, beta=0.1)[0])
    assert found == pytest.approx(-1 + 0.1 - 0.1 * (math.log(0.5) + 2), rel=1e-6)


def test_the_hardest_negative_is_chosen_by_similarity_not_by_its_quotient():
    sim, tau = jnp.asarray([[[0.9, 0.5, 0.4]]]), jnp.asarray([[[1.0, 1.0, 0.1]]])
    pos, neg = jnp.asarray([[True, False, False]]), jnp.asarray([[False, True, True]])
    assert float(contrastive(sim, tau, pos, neg, dim=2, beta=0.0)[0]) == pytest.approx(-0.9 + 0.5)


def test_max_and_logsumexp_bound_each_other_at_one_temperature():
    sim, _, pos, neg = map(jnp.asarray, problem(heads=1))
    tau = jnp.full_like(sim, 0.3)
    hard, soft = (contrastive(sim, tau, pos, neg, dim=3, negatives=n) for n in ("max", "logsumexp"))
    count = np.maximum(np.asarray(neg).sum(1), 1)
    assert np.all(hard <= soft + 1e-6) and np.all(soft <= hard + np.log(count) + 1e-6)
    assert np.any(soft > hard + 1e-3)


def test_heads_are_summed_and_their_order_is_nothing():
    sim, tau, pos, neg = map(jnp.asarray, problem(heads=3))
    whole = contrastive(sim, tau, pos, neg, dim=3)
    np.testing.assert_allclose(contrastive(sim[::-1], tau[::-1], pos, neg, dim=3), whole, rtol=1e-5)
    alone = [contrastive(sim[c : c + 1], tau[c : c + 1], pos, neg, dim=3) for c in range(3)]
    np.testing.assert_allclose(sum(alone), whole, rtol=1e-5)


def test_the_gradient_goes_through_the_hardest_negative_only():
    sim, tau, pos, neg = problem()
    for argument in (0, 1):
        g = jax.grad(lambda s, t: jnp.sum(contrastive(s, t, pos, neg, dim=3)), argument)(
            jnp.asarray(sim), jnp.asarray(tau)
        )
        for c in range(2):
            for i in range(3):
                ns = np.flatnonzero(neg[i])
                n = ns[np.argmax(sim[c, i, ns])]
                touched = set(np.flatnonzero(np.asarray(g[c, i])))
                assert touched == {n, *np.flatnonzero(pos[i])}
    # d/dsim at the hardest negative is 1/tau, at a positive -1/(tau P)
    g = jax.grad(lambda s: jnp.sum(contrastive(s, jnp.asarray(tau), pos, neg, dim=3)))(jnp.asarray(sim))
    ns = np.flatnonzero(neg[0])
    n = ns[np.argmax(sim[0, 0, ns])]
    assert float(g[0, 0, n]) == pytest.approx(1 / tau[0, 0, n], rel=1e-5)
    assert float(g[0, 0, 0]) == pytest.approx(-1 / tau[0, 0, 0] / pos[0].sum(), rel=1e-5)


def test_no_gradient_flows_through_the_soft_weights():
    sim, tau, pos, neg = problem(heads=1)
    by = lambda beta: jax.grad(  # noqa: E731
        lambda s: jnp.sum(contrastive(s, jnp.asarray(tau), pos, neg, dim=3, beta=beta, negatives="logsumexp"))
    )(jnp.asarray(sim))
    np.testing.assert_allclose(by(0.0), by(0.7), atol=1e-6)


def test_what_is_in_neither_mask_does_not_exist():
    sim, tau, pos, neg = problem()
    out = ~(pos | neg)
    for negatives in ("max", "logsumexp"):
        clean = contrastive(*map(jnp.asarray, (sim, tau, pos, neg)), dim=3, negatives=negatives)
        dirty_tau = np.where(out, 0.0, tau)
        value, grads = jax.value_and_grad(
            lambda s, t, n=negatives: jnp.sum(contrastive(s, t, pos, neg, dim=3, negatives=n)), (0, 1)
        )(jnp.asarray(np.where(out, 50.0, sim)), jnp.asarray(dirty_tau))
        assert float(value) == pytest.approx(float(jnp.sum(clean)), rel=1e-5)
        assert all(np.isfinite(g).all() and not np.any(np.asarray(g)[:, out]) for g in grads)


def loop_pairs(za, zp, zc, score, own, real, dim, beta, negatives, inside, limits):
    """Rows to a loss, by brute force: a candidate list per anchor with the positive first."""
    anchors, heads = za.shape[:2]
    sim = np.zeros((heads, anchors, 1 + len(zc)))
    tau = np.ones_like(sim)
    neg = np.zeros((anchors, 1 + len(zc)), bool)
    low, high = limits
    for i in range(anchors):
        for j in range(len(zc)):
            neg[i, 1 + j] = real[j] and j not in own[i]
        for c in range(heads):
            for j, other in enumerate([zp[i], *zc]):
                sim[c, i, j] = za[i, c] @ other[c]
                tau[c, i, j] = low + (high - low) / (1 + math.exp(-score(c, i, j)))
    pos = np.zeros_like(neg)
    pos[:, 0] = True
    return loop_contrastive(sim, tau, pos, neg, dim, beta, negatives, inside)


@pytest.mark.parametrize("kind", ["dot", "concat"])
@pytest.mark.parametrize(("negatives", "inside"), [("max", False), ("max", True), ("logsumexp", False),
                                                   ("logsumexp", True)])  # fmt: skip
def test_rows_give_what_matrices_give(negatives, inside, kind, monkeypatch):
    """Anchors in blocks of two; one head's positive is its hardest candidate, another's is not."""
    monkeypatch.setattr("zoo.representation.amcl.BLOCK", 2 * 2 * 6)
    monkeypatch.setattr("zoo.nn.pair_temperature.BLOCK", 2 * 2 * 6 * 3)
    rng = np.random.default_rng(3)
    za, zp, zc = (unit(rng.normal(size=(n, 2, 4))).astype(np.float32) for n in (5, 5, 6))
    za[1, 0] = zp[1, 0]
    real, own = np.asarray([1, 1, 0, 1, 1, 1], bool), np.asarray([[0, 5], [1, 1], [2, 4], [3, 0], [4, 4]], np.int32)
    h = 3 if kind == "dot" else 6
    ca, cp, cc = (rng.normal(size=(n, 2, h)).astype(np.float32) for n in (5, 5, 6))
    last = None if kind == "dot" else rng.normal(size=(2, 4)).astype(np.float32)

    def score(c, i, j):
        b = cp[i, c] if j == 0 else cc[j - 1, c]
        if kind == "dot":
            return ca[i, c] @ b
        return np.maximum(ca[i, c, :3] + b[3:], 0) @ last[c, :3] + last[c, 3]

    args = [HeadRows(jnp.asarray(z), jnp.asarray(c)) for z, c in ((za, ca), (zp, cp), (zc, cc))]
    t = Temperatures(0.1, 1.7, None, None if last is None else jnp.asarray(last))
    found = jax.jit(lambda *a: amcl_rows(*a, t, 0.3, negatives, inside))(*args, jnp.asarray(real), jnp.asarray(own))
    want = loop_pairs(za, zp, zc, score, own, real, 4, 0.3, negatives, inside, (0.1, 1.7))
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5)


def test_gradients_of_rows_are_those_of_the_matrices():
    rng = np.random.default_rng(4)
    z, codes = (jnp.asarray(rng.normal(size=(6, 2, 3)), jnp.float32) for _ in range(2))
    own, real = jnp.arange(6)[:, None], jnp.ones(6, bool)

    def by_rows(z, codes):
        rows = HeadRows(z, codes)
        partner = HeadRows(jnp.roll(z, 3, 0), jnp.roll(codes, 3, 0))
        return jnp.sum(
            amcl_rows(rows, partner, rows, real, jnp.concatenate([own, (own + 3) % 6], 1), Temperatures(0.1))
        )

    def by_matrices(z, codes):
        sim, tau = jnp.einsum("icd,jcd->cij", z, z), bounded_temperature(pair_scores(codes, codes), 0.1)
        eye = jnp.eye(6, dtype=bool)
        pos = jnp.roll(eye, 3, 1)
        return jnp.sum(amcl_contrastive(sim, tau, pos, ~eye & ~pos, 3))

    for a, b in zip(jax.grad(by_rows, (0, 1))(z, codes), jax.grad(by_matrices, (0, 1))(z, codes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.abs(a).max() > 1e-3


def test_negcos_is_the_definition_and_stops_the_target():
    rng = np.random.default_rng(5)
    p, h = (rng.normal(size=(3, 2, 4)).astype(np.float32) for _ in range(2))
    tau = rng.uniform(0.3, 1.5, (3, 2)).astype(np.float32)
    want = [
        sum(-unit(p[i, c]) @ unit(h[i, c]) / (2 * tau[i, c]) + 0.3 * omega(tau[i, c], 4) for c in range(2))
        for i in range(3)
    ]
    args = tuple(map(jnp.asarray, (p, h, tau)))
    np.testing.assert_allclose(amcl_negcos(*args, 0.3), want, rtol=1e-5)
    grads = jax.grad(lambda *a: jnp.sum(amcl_negcos(*a)), (0, 1, 2))(*args)
    assert np.abs(grads[0]).max() > 0 and not np.any(grads[1]) and np.abs(grads[2]).max() > 0


def test_cross_correlation_is_the_definition():
    rng = np.random.default_rng(6)
    correlation = rng.uniform(-1, 1, (2, 3, 3)).astype(np.float32)
    tau = rng.uniform(0.3, 1.5, (2, 3, 3)).astype(np.float32)
    want = 0.0
    for c in range(2):
        for i in range(3):
            for j in range(3):
                x, t = correlation[c, i, j], tau[c, i, j]
                if i == j:
                    want += (1 - x / t) ** 2 + 0.3 * omega(t, 3)
                else:
                    want += 0.02 * x**2 / t - 0.3 * omega(t, 3)
    found = amcl_cross_correlation(jnp.asarray(correlation), jnp.asarray(tau), 0.3, 0.02)
    assert float(found) == pytest.approx(want, rel=1e-5)
    assert float(amcl_cross_correlation(jnp.eye(3)[None], jnp.ones((1, 3, 3)), 0.0)) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: amcl(beta=-0.1), "beta must not be negative, got -0.1"),
        (lambda: amcl(lower=0.0), "lower must be positive, got 0.0"),
        (lambda: amcl(lower=0.5, upper=0.5), "upper must exceed lower, got lower 0.5 and upper 0.5"),
        (lambda: amcl(negatives="mean"), "negatives must be 'max' or 'logsumexp', got 'mean'"),
        (lambda: amcl("triplet"), "host must be one of 'contrastive', 'queue'"),
        (lambda: amcl(fixed=0.0), "fixed must be a positive temperature, got 0.0"),
        (lambda: amcl_contrastive(*map(jnp.asarray, problem()), 3, -1.0), "beta must not be negative"),
        (lambda: amcl_negcos(jnp.ones((1, 1, 2)), jnp.ones((1, 1, 2)), jnp.ones((1, 1)), -1.0), "beta must not be"),
        (lambda: amcl_cross_correlation(jnp.ones((1, 2, 2)), jnp.ones((1, 2, 2)), -1.0), "beta must not be negative"),
    ],
)
def test_settings_that_cannot_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the released code's numbers --------------------------------------------------------------------------------------

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "amcl_official.npz")


def test_released_temperatures_and_regulariser():
    z1, z2 = (jnp.asarray(GOLDEN[k]) for k in ("z1", "z2"))
    net = PairTemperature("concat", 128, normalise=False)
    params = {k: jnp.asarray(GOLDEN[k]) for k in ("hidden_kernel", "hidden_bias", "out")}
    codes, last = net.apply({"params": params}, jnp.concatenate([z1, z2]), method="embed")
    tau = bounded_temperature(aligned_scores(codes[:5], codes[5:], last), 1e-5, 2.0)
    cosine = jnp.sum(unit(np.asarray(z1)) * unit(np.asarray(z2)), -1)
    # it divides every pair's similarity by every pair's temperature; the pairs' own are on the diagonal
    np.testing.assert_allclose(cosine.T[None] / tau[:, :, None], GOLDEN["scaled"], rtol=1e-5)
    regulariser = 0.1 * jnp.sum(jnp.mean(gaussian_temperature_regularizer(tau, 4), 0))
    assert float(regulariser) == pytest.approx(float(GOLDEN["regulariser"]), rel=1e-5)


def test_released_barlow_twins_and_neighbours():
    a, b = (jnp.asarray(GOLDEN[f"barlow_{k}"]) for k in "ab")
    correlation = cross_correlation(a, b, unbiased=True)[None]
    found = amcl_cross_correlation(correlation, jnp.ones_like(correlation), 0.0)
    assert float(found) == pytest.approx(float(GOLDEN["barlow"]), rel=1e-5)
    args = (jnp.asarray(GOLDEN[f"knn_{k}"]) for k in ("bank", "labels", "queries"))
    np.testing.assert_array_equal(knn_classify(*args, 4, 9, 0.1), GOLDEN["knn_predicted"])


# --- on hosts ---------------------------------------------------------------------------------------------------------

IDENTITY = lambda key, x: (x[0], x[1])  # noqa: E731
BATCH = {
    "x": jnp.asarray(np.random.default_rng(7).normal(size=(6, 2, 5)), jnp.float32),
    "mask": jnp.asarray([1, 1, 1, 0, 1, 1], bool),
    "index": jnp.arange(6, dtype=jnp.int32),
    "row": jnp.arange(6, dtype=jnp.int32),
}
REAL = [0, 1, 2, 4, 5]
KINDS = ("contrastive", "queue", "negcos", "cross_correlation")


class Halves(MLP):
    """An encoder of one view that also accepts the pair it is initialised on."""

    def __call__(self, x, train=False, mask=None):
        return super().__call__(x if x.ndim == 2 else x[:, 0], train, mask)


def module_of(kind, **fields):
    own = {"negcos": {"predictor": 3}, "cross_correlation": {"temperature": "table"}}.get(kind, {})
    settings = {"num_heads": 2, "hidden": 6, "features": 4, "temperature_hidden": 5} | own | fields
    return AdaptiveHeads(Halves((7,), 6), **settings)


def host_of(kind, module, **settings):
    make = {"contrastive": hosts.simclr, "queue": functools.partial(hosts.moco, queue=8), "negcos": hosts.simsiam,
            "cross_correlation": hosts.barlow_twins}  # fmt: skip
    return make[kind](module, IDENTITY, **settings)


def stir(tree):
    """Every parameter nonzero, so that temperatures differ."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return structure.unflatten([x + 0.5 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@functools.cache
def passed(kind, temperature=None, heads=2, fixed_host=()):
    """Host, variables, outputs and context of a module's forward pass; a queue half full."""
    fields = {} if temperature is None else {"temperature": temperature}
    host = host_of(kind, module_of(kind, num_heads=heads, **fields), **dict(fixed_host))
    variables = dict(host.init(jax.random.key(0), BATCH))
    variables["params"] = stir(variables["params"])
    if kind == "queue":
        variables["teacher"] = stir(variables["teacher"])
        rows = {k: jax.random.normal(jax.random.key(i), (5, *v.shape[1:])) for i, (k, v) in
                enumerate(variables["memory"]["rows"].items())}  # fmt: skip
        rows["projection"] = rows["heads"][:, 0]
        variables["memory"] = enqueue(init_queue(8, rows), rows)
    context = Context(jax.random.key(1), jnp.int32(0), batch=BATCH, collections=variables)
    outputs, _ = jax.jit(host.forward)(variables, BATCH, context)
    return host, variables, outputs, context.replace(outputs=outputs)


def values_of(transform, host, outputs, context):
    before = host.loss(outputs, BATCH, context).elements
    e, _ = jax.jit(lambda e, c: transform.update(e, (), c))(before, context.replace(outputs=outputs))
    return np.asarray(before.values), np.asarray(e.values)


PLAIN = {"contrastive": 0.2, "queue": 0.1, "negcos": 1.0, "cross_correlation": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_at_the_hosts_temperature_is_the_plain_host(kind):
    host, _, outputs, context = passed(kind, heads=1)
    t = amcl(kind, beta=0.0, negatives="logsumexp", positive_in_candidates=True, fixed=PLAIN[kind])
    plain, found = values_of(t, host, outputs, context)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    assert np.ptp(found) > 1e-3 or kind == "cross_correlation"


def test_without_the_positive_it_is_simclr_without_it():
    host, _, outputs, context = passed("contrastive", None, 1, (("positive_in_denominator", False),))
    plain, found = values_of(amcl(beta=0.0, negatives="logsumexp", fixed=0.2), host, outputs, context)
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_predicted_but_equal_temperatures_are_the_fixed_one():
    """A network that says 0 of every pair puts tau midway between its limits."""
    host, _, outputs, context = passed("contrastive")
    silent = {k: jax.tree.map(jnp.zeros_like, v) if k.startswith("temp") else v for k, v in outputs.items()}
    _, found = values_of(amcl(lower=0.1, upper=0.5), host, silent, context)
    _, fixed = values_of(amcl(fixed=0.3), host, outputs, context)
    np.testing.assert_allclose(found, fixed, rtol=1e-5)


def midway(score, low=0.1, high=1.7):
    return low + (high - low) / (1 + math.exp(-score))


def score_of(a, b, last, c):
    if last.shape[1] == 1:
        return float(a @ b + last[c, 0])
    half = len(a) // 2
    return float(np.maximum(a[:half] + b[half:], 0) @ last[c, :-1] + last[c, -1])


@pytest.mark.parametrize("negatives", ["max", "logsumexp"])
@pytest.mark.parametrize("temperature", ["dot", "concat"])
def test_on_simclr_it_is_table_2(temperature, negatives):
    host, _, outputs, context = passed("contrastive", temperature)
    _, found = values_of(amcl(beta=0.3, lower=0.1, upper=1.7, negatives=negatives), host, outputs, context)
    last = np.asarray(outputs["temperature_last"].value)
    assert last.shape == {"dot": (2, 1), "concat": (2, 6)}[temperature] and np.all(last != 0)
    z = {v: unit(np.asarray(outputs[f"heads{v}"])) for v in (1, 2)}
    t = {v: np.asarray(outputs[f"temperature{v}"]) for v in (1, 2)}
    rows = [(v, i) for v in (1, 2) for i in REAL]
    for i in REAL:
        want = 0.0
        for v in (1, 2):
            partner = (3 - v, i)
            others = [partner, *(r for r in rows if r[1] != i)]
            sim, tau = np.zeros((2, 1, len(others))), np.zeros((2, 1, len(others)))
            for c in range(2):
                for j, (w, k) in enumerate(others):
                    sim[c, 0, j] = z[v][i, c] @ z[w][k, c]
                    tau[c, 0, j] = midway(score_of(t[v][i, c], t[w][k, c], last, c))
            pos = np.arange(len(others))[None] == 0
            want += loop_contrastive(sim, tau, pos, ~pos, 4, 0.3, negatives, False)[0] / 2
        assert found[i] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert found[3] == 0


def test_on_moco_candidates_are_the_queues_rows_of_the_same_head():
    host, variables, outputs, context = passed("queue")
    _, found = values_of(amcl("queue", 0.3, 0.1, 1.7, "max"), host, outputs, context)
    keys, memory = outputs["keys"], variables["memory"]["rows"]
    added = float(outputs["temperature_last"].value[0, 0])
    assert memory["heads"].shape == (8, 2, 4) and memory["temperature"].shape[:2] == (8, 2)
    for i in REAL:
        want = 0.0
        for v in (1, 2):
            q, tq = unit(np.asarray(outputs[f"heads{v}"]))[i], np.asarray(outputs[f"temperature{v}"])[i]
            zs = [unit(np.asarray(keys[f"heads{3 - v}"]))[i], *unit(np.asarray(memory["heads"])[:5])]
            ts = [np.asarray(keys[f"temperature{3 - v}"])[i], *np.asarray(memory["temperature"])[:5]]
            sim = np.asarray([[[q[c] @ z[c] for z in zs]] for c in range(2)])
            tau = np.asarray([[[midway(float(tq[c] @ t[c]) + added) for t in ts]] for c in range(2)])
            pos = np.arange(6)[None] == 0
            want += loop_contrastive(sim, tau, pos, ~pos, 4, 0.3, "max", False)[0] / 2
        assert found[i] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_an_empty_queue_leaves_the_positive():
    host, variables, outputs, context = passed("queue")
    empty = {**variables, "memory": {**variables["memory"], "filled": jnp.zeros(8, bool)}}
    context = context.replace(collections=empty)
    _, found = values_of(amcl("queue", 0.0, fixed=0.5), host, outputs, context)
    q1, q2, k1, k2 = (
        unit(np.asarray(z)) for z in (outputs["heads1"], outputs["heads2"], outputs["keys"]["heads1"],
                                      outputs["keys"]["heads2"])
    )  # fmt: skip
    want = -(np.sum(q1 * k2, (1, 2)) + np.sum(q2 * k1, (1, 2)))
    np.testing.assert_allclose(found[REAL], want[REAL], rtol=1e-5)


def test_on_simsiam_temperatures_come_from_predictions_and_stopped_targets():
    host, variables, outputs, context = passed("negcos")
    _, found = values_of(amcl("negcos", 0.3, 0.1, 1.7), host, outputs, context)
    get = lambda name, v: np.asarray(outputs[f"{name}{v}"])  # noqa: E731
    for i in REAL:
        want = 0.0
        for v in (1, 2):
            for c in range(2):
                p, h = get("predicted_heads", v)[i, c], get("heads", 3 - v)[i, c]
                score = get("predicted_temperature", v)[i, c] @ get("temperature", 3 - v)[i, c]
                tau = midway(float(score + outputs["temperature_last"].value[c, 0]))
                want += -unit(p) @ unit(h) / (2 * tau) + 0.3 * omega(tau, 4)
        assert found[i] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_on_barlow_twins_it_is_the_definition():
    host, variables, outputs, context = passed("cross_correlation")
    found = values_of(amcl("cross_correlation", 0.3, 0.1, 1.7, off_diagonal=0.02), host, outputs, context)[1]
    table = np.asarray(outputs["temperature_table"].value)
    want = 0.0
    for c in range(2):
        a, b = (np.asarray(outputs[f"heads{v}"], np.float64)[REAL, c] for v in (1, 2))
        a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
        for i in range(4):
            for j in range(4):
                x, t = a[:, i] @ b[:, j] / 5, midway(float(table[c, i, j]))
                want += (1 - x / t) ** 2 + 0.3 * omega(t, 4) if i == j else 0.02 * x**2 / t - 0.3 * omega(t, 4)
    assert found.shape == (1,) and found[0] == pytest.approx(want, rel=1e-4)
    released = amcl("cross_correlation", 0.0, fixed=1.0, unbiased=True)
    plain = host_of("cross_correlation", module_of("cross_correlation", num_heads=1), unbiased=True)
    one = passed("cross_correlation", None, 1)
    by_host, by_us = values_of(released, plain, one[2], one[3])
    np.testing.assert_allclose(by_us, by_host, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything(kind):
    host, _, outputs, context = passed(kind)
    broken = {
        k: v.at[3].set(jnp.nan) if k.startswith(("heads", "temp", "pred")) and not isinstance(v, Shared) else v
        for k, v in outputs.items()
    }
    t = amcl(kind)

    def total(outputs):
        known = context.replace(outputs=outputs)
        e = t.update(host.loss(outputs, BATCH, known).elements, (), known)[0]
        return jnp.sum(e.values)

    clean, dirty = (jax.jit(jax.value_and_grad(total, allow_int=True))(o) for o in (outputs, broken))
    assert float(dirty[0]) == pytest.approx(float(clean[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(clean[1]), jax.tree.leaves(dirty[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "part"), [("contrastive", "temperature"), ("queue", "temperature"),
                                            ("negcos", "temperature"), ("negcos", "predictor"),
                                            ("cross_correlation", "temperature_table")])  # fmt: skip
def test_every_part_learns(kind, part):
    """From a fresh start, so that a network that could never leave zero would show."""
    host = host_of(kind, module_of(kind))
    variables = dict(host.init(jax.random.key(0), BATCH))
    context = Context(jax.random.key(1), jnp.int32(0), batch=BATCH, collections=variables)

    def scalar(params):
        outputs, _ = host.forward({**variables, "params": params}, BATCH, context)
        known = context.replace(outputs=outputs)
        return total_loss(host.loss(outputs, BATCH, known), amcl(kind), (), known)[0]

    grads = jax.jit(jax.grad(scalar))(variables["params"])
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads[part]))
    if kind != "negcos" or part == "predictor":
        kernel = grads["projector"]["heads"]["out"]["kernel"]
        assert kernel.shape == (2, 6, 4) and all(float(jnp.abs(kernel[c]).max()) > 0 for c in range(2))


def test_it_names_the_missing_heads_and_the_kind():
    encoder = Halves((7,), 4)
    with pytest.raises(CompositionError, match=r"MultiHeadProjector requires 'heads', .*which simclr does not provide"):
        check_fit(amcl(), hosts.simclr(encoder, IDENTITY))
    with pytest.raises(CompositionError, match="requires 'contrastive', 'instances', which moco does not provide"):
        check_fit(amcl(), host_of("queue", module_of("queue")))
    with pytest.raises(CompositionError, match="'predicted_heads', 'predicted_temperature', which simsiam does not"):
        check_fit(amcl("negcos"), hosts.simsiam(module_of("contrastive"), IDENTITY))
    with pytest.raises(CompositionError, match="acts on 'example', but barlow twins yields elements of unit 'batch'"):
        check_fit(amcl(), host_of("cross_correlation", module_of("cross_correlation")))
    with pytest.raises(
        CompositionError, match="requires 'views', 'instances', which supervised contrastive does not provide"
    ):
        check_fit(amcl(), hosts.supervised_contrast(module_of("contrastive")))
    for kind in KINDS:
        assert check_fit(amcl(kind), host_of(kind, module_of(kind))).name.startswith(f"amcl({kind})")
        bare = module_of(kind, temperature="none")
        assert check_fit(amcl(kind, fixed=0.5), host_of(kind, bare)) is not None
        with pytest.raises(CompositionError, match="temperature"):
            check_fit(amcl(kind), host_of(kind, bare))


@pytest.mark.parametrize("kind", ["contrastive", "cross_correlation"])
def test_a_batch_of_one_has_no_others(kind):
    host, variables, outputs, context = passed(kind)
    alone = jax.tree.map(lambda x: x[:1], BATCH)
    with pytest.raises(ValueError, match=f"amcl on a {kind} host needs 2 examples or more in a batch"):
        amcl(kind).update(host.loss(outputs, BATCH, context).elements, (), context.replace(batch=alone))
