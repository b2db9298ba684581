"""SupReMix against mixtures built one by one, the released loss, and what it must be invariant to."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import base, hosts
from zoo.base import Context
from zoo.losses import pairs
from zoo.nn.mlp import MLP
from zoo.representation import supremix as method
from zoo.representation.supremix import supremix, supremix_loss

GOLD = np.load(Path(__file__).resolve().parents[2] / "golden" / "supremix_official.npz")
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
N = 12
Y = np.array([0, 1, 2, 2, 3, 5, 1, 4, 0, 7, 3, 6])
F = RNG.normal(size=(N, 3))
F /= np.linalg.norm(F, axis=1, keepdims=True)
F = F.astype(np.float32)
WEIGHTS = {
    "l1_inv": lambda d: abs(d) + 1,
    "l2_inv": lambda d: d * d + 1,
    "l1": lambda d: 1 / (abs(d) + 1),
    "l2": lambda d: 1 / (d * d + 1),
    "none": lambda d: 1.0,
}


@functools.partial(jax.jit, static_argnames="beta")
def drawn(rows, key, beta):
    return jax.vmap(lambda i: REAL_DRAWS(key, i, rows, beta))(rows)


def shares(rows, key=KEY, beta=(2.0, 8.0)):
    return np.asarray(drawn(jnp.asarray(rows), key, beta), np.float64)


REAL_DRAWS = method.negative_coefficients
SHARES = RNG.beta(2, 8, (N, N))


@pytest.fixture
def table(monkeypatch):
    """Draws from a table, which compile at once; the real ones have tests of their own."""
    given = jnp.asarray(SHARES, jnp.float32)
    monkeypatch.setattr(method, "negative_coefficients", lambda key, anchor, rows, beta: given[anchor, rows])


def candidates(f, y, i, a, window, weight, neg=True, pos=True, real=None):
    """Anchor i's candidates by the definition: mixture vector or row, weight, whether positive, its two factors."""
    real = range(len(y)) if real is None else real
    w = WEIGHTS[weight]
    found = [(f[j], w(y[i] - y[j]), y[i] == y[j], "real", j) for j in real if j != i]
    if neg:
        for k in real:
            if y[k] != y[i]:
                label = a[i, k] * y[i] + (1 - a[i, k]) * y[k]
                found.append((a[i, k] * f[i] + (1 - a[i, k]) * f[k], w(y[i] - label), False, "mixed", k))
    if pos:
        for j in real:
            for k in real:
                if y[j] < y[i] < y[k] and y[i] - y[j] < window and y[k] - y[i] < window:
                    b = (y[k] - y[i]) / (y[k] - y[j])
                    found.append((b * f[j] + (1 - b) * f[k], w(0.0), True, "mixed", (j, k)))
    return found


def reference(f, y, a, tau=0.3, window=3, weight="l1_inv", **which):
    """Values of every anchor, and the gradient of their sum with mixtures held fixed, both by hand."""
    f = np.asarray(f, np.float64)
    values, grad = np.zeros(len(y)), np.zeros_like(f)
    real = which.get("real") or range(len(y))
    for i in real:
        found = candidates(f, y, i, a, window, weight, **which)
        count = sum(c[2] for c in found)
        if not count:
            continue
        s = np.array([c[0] @ f[i] for c in found]) / tau
        e = np.array([c[1] for c in found]) * np.exp(s)
        values[i] = np.log(e.sum()) - sum(v for v, c in zip(s, found, strict=True) if c[2]) / count
        for (v, _, positive, kind, j), share in zip(found, e / e.sum(), strict=True):
            coefficient = (share - positive / count) / tau
            grad[i] += coefficient * v
            if kind == "real":
                grad[j] += coefficient * f[i]
    return values, grad


@functools.partial(jax.jit, static_argnames=("tau", "window", "weight", "mix_neg", "mix_pos", "chunk", "variant"))
def value_and_grad(f, y, mask=None, rows=None, **settings):
    def total(f):
        values = supremix_loss(f, y, KEY, mask=mask, rows=rows, **settings)
        return jnp.sum(values), values

    (_, values), grad = jax.value_and_grad(total, has_aux=True)(f)
    return values, grad


@pytest.mark.parametrize(
    ("settings", "which"),
    [
        ({"window": 3, "weight": "l1_inv", "chunk": 5}, {}),
        ({"window": 5, "weight": "l2_inv", "tau": 0.7}, {"pos": False}),
        ({"window": 5, "weight": "l2", "tau": 0.1}, {"neg": False}),
        ({"window": 4, "weight": "none"}, {}),
    ],
)
def test_the_gram_form_is_the_loss_on_mixtures_that_are_built(table, settings, which):
    flags = {"mix_neg": which.get("neg", True), "mix_pos": which.get("pos", True)}
    values, grad = value_and_grad(F, Y, **settings, **flags)
    plain = {k: v for k, v in settings.items() if k != "chunk"}
    want, want_grad = reference(F, Y, SHARES, **plain, **which)
    np.testing.assert_allclose(values, want, atol=1e-5)
    np.testing.assert_allclose(grad, want_grad, atol=1e-5 * max(1, np.abs(want_grad).max()))


def test_a_hand_case(table):
    # f0 . f1 = 0, labels 0 and 1, no mix-pos: nothing is positive, so nothing is lost
    two = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    assert np.asarray(supremix_loss(two, jnp.asarray([0, 1]), KEY)).tolist() == [0, 0]
    # three in a row: only the middle one has a positive, (f0 + f2) / 2, at similarity 1/2
    three = jnp.asarray([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    values = supremix_loss(three, jnp.asarray([0, 1, 2]), KEY, 1.0, 2, mix_neg=False)
    want = np.log(2 * np.exp(0.5) * 2 + np.exp(0.5)) - 0.5
    np.testing.assert_allclose(values, [0, want, 0], atol=1e-6)
    _, count = method.supremix_terms(three, jnp.asarray([0, 1, 2]), KEY, 1.0, 2, mix_neg=False)
    assert count.tolist() == [0, 1, 0]


def test_without_mixtures_and_weights_it_is_supcon(table):
    values, grad = value_and_grad(F, Y, weight="none", mix_neg=False, mix_pos=False)
    masks = pairs.pair_masks(jnp.asarray(Y))
    supcon = lambda f: pairs.supervised_contrastive(jnp.matmul(f, f.T, precision="highest"), *masks, 0.3)  # noqa: E731
    np.testing.assert_allclose(values, supcon(jnp.asarray(F)), atol=1e-6)
    np.testing.assert_allclose(grad, jax.grad(lambda f: jnp.sum(supcon(f)))(jnp.asarray(F)), atol=1e-5)


@pytest.mark.parametrize("kind", ["l1_inv", "l2_inv", "l1", "l2", "none"])
def test_weights(kind):
    d = np.array([-3.0, 0.0, 0.5, 2.0], np.float32)
    want = [WEIGHTS[kind](float(v)) for v in d]
    np.testing.assert_allclose(method.label_distance_weights(jnp.asarray(d), kind), want, rtol=1e-6)


def test_mixed_positives_have_the_anchors_label_and_lie_within_the_window():
    y = jnp.asarray([0.0, 1.0, 2.5, 4.0, 7.0, 2.5])
    a, exists = (np.asarray(v) for v in method.positive_coefficients(y[2], y, 2.5))
    # y_0 lies exactly at the window, so does not count; j is below, k above
    assert np.argwhere(exists).tolist() == [[1, 3]]
    assert a[1, 3] == pytest.approx(0.5) and (a[~exists] == 0).all()
    a, exists = (np.asarray(v) for v in method.positive_coefficients(y[2], y, 5.0))
    assert np.argwhere(exists).tolist() == [[0, 3], [0, 4], [1, 3], [1, 4]]
    assert ((a[exists] > 0) & (a[exists] < 1)).all()
    mixed = a * np.asarray(y)[:, None] + (1 - a) * np.asarray(y)[None, :]
    np.testing.assert_allclose(mixed[exists], 2.5, atol=1e-6)
    _, none = method.positive_coefficients(y[2], y, 5.0, jnp.asarray([0, 1, 1, 0, 1, 1], bool))
    assert np.argwhere(none).tolist() == [[1, 4]]


def test_a_window_of_one_leaves_integer_labels_without_mixed_positives(table):
    got, _ = value_and_grad(F, Y, window=1, mix_neg=False)
    off, _ = value_and_grad(F, Y, window=1, mix_neg=False, mix_pos=False)
    np.testing.assert_array_equal(got, off)
    more, _ = value_and_grad(F, Y, window=1.5, mix_neg=False)
    assert np.abs(more - off).max() > 0.1


def test_draws_are_beta_and_belong_to_pairs_of_rows():
    many = shares(np.arange(60))
    assert many.mean() == pytest.approx(0.2, abs=0.01) and many.var() == pytest.approx(0.16 / 11, abs=2e-3)
    assert np.unique(many).size > 3500  # (i, k) and (k, i) differ too
    order = np.random.default_rng(1).permutation(60)
    np.testing.assert_array_equal(shares(order), many[np.ix_(order, order)])
    assert shares(np.arange(60), beta=(8.0, 2.0)).mean() == pytest.approx(0.8, abs=0.03)
    assert np.abs(shares(np.arange(60), jax.random.key(4)) - many).min() > 0


def test_permuting_the_batch_permutes_values_and_translating_labels_changes_nothing(table):
    values, _ = value_and_grad(F, Y, window=3)
    order = np.random.default_rng(2).permutation(N)
    again, _ = value_and_grad(F[order], Y[order], rows=jnp.asarray(order, jnp.int32), window=3)
    np.testing.assert_allclose(again, np.asarray(values)[order], atol=1e-5)
    moved, _ = value_and_grad(F, Y + 1000, window=3)
    np.testing.assert_allclose(moved, values, atol=1e-5)
    column, _ = value_and_grad(F, Y[:, None], window=3)
    np.testing.assert_array_equal(column, values)


def test_a_constant_added_to_every_logit_changes_nothing_but_one_added_to_real_pairs_does(table):
    # one more coordinate c adds c^2 / tau to the logits of rows and of mixtures alike
    values, _ = value_and_grad(F, Y, window=3)
    shifted, _ = value_and_grad(np.concatenate([F, np.full((N, 1), 3.0, np.float32)], 1), Y, window=3)
    np.testing.assert_allclose(shifted, values, atol=2e-4)  # 30 added in float32
    official, _ = value_and_grad(F, Y, window=3, variant="official")
    apart = np.abs(official - values)
    assert np.sort(apart)[1:].min() > 0.01 and apart[9] == 0  # scales of their own, but for an anchor without positives


def test_padding_takes_no_part(table):
    mask = np.arange(N) != 4
    dirty, labels = F.copy(), Y.astype(np.float32)
    dirty[4], labels[4] = np.nan, np.nan
    values, grad = value_and_grad(dirty, labels, jnp.asarray(mask), window=3)
    real = [i for i in range(N) if i != 4]
    want, want_grad = reference(np.where(mask[:, None], F, 0), Y, SHARES, real=real)
    np.testing.assert_allclose(values, want, atol=1e-5)
    np.testing.assert_allclose(grad, want_grad, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "l1", "l2", "l1_inv", "l2_inv"])
def test_equals_the_released_loss_without_mixtures(table, name):
    y, weight = np.tile(GOLD["y"], 2), "none" if name == "plain" else name
    for variant in ("exact", "official"):
        values, grad = value_and_grad(
            GOLD["z"], y, weight=weight, mix_neg=False, mix_pos=False, window=3, variant=variant
        )
        assert float(jnp.mean(values)) == pytest.approx(float(GOLD[f"{name}_value"]), abs=2e-6)
        np.testing.assert_allclose(grad / 20, GOLD[f"{name}_grad"], atol=2e-6)


def test_coefficients_equal_the_released_ones():
    y = jnp.asarray(np.tile(GOLD["y"], 2))
    a, exists = jax.vmap(lambda label: method.positive_coefficients(label, y, 3))(y)
    assert np.argwhere(np.asarray(exists)).tolist() == GOLD["triplets"].tolist()
    np.testing.assert_allclose(np.asarray(a)[np.asarray(exists)], GOLD["alpha"], atol=1e-6)


@pytest.mark.parametrize("name", ["l1_inv", "l1", "l2", "none"])
def test_the_official_variant_equals_the_released_loss_with_mixtures(name, monkeypatch):
    given = jnp.asarray(GOLD["share"])
    monkeypatch.setattr(method, "negative_coefficients", lambda key, anchor, rows, beta: given[anchor, rows])
    y = jnp.asarray(np.tile(GOLD["y"], 2))

    def total(f, variant):
        return jnp.mean(supremix_loss(f, y, KEY, 0.3, 3, weight=name, variant=variant))

    value, grad = jax.jit(jax.value_and_grad(functools.partial(total, variant="official")))(jnp.asarray(GOLD["z"]))
    assert float(value) == pytest.approx(float(GOLD[f"mixed_{name}_value"]), abs=3e-6)
    np.testing.assert_allclose(grad, GOLD[f"mixed_{name}_grad"], atol=3e-6)
    if name == "l1_inv":  # and one shift for all is the definition
        want = reference(GOLD["z"], np.tile(GOLD["y"], 2), GOLD["share"].astype(float), 0.3, 3, name)[0].mean()
        assert float(total(jnp.asarray(GOLD["z"]), "exact")) == pytest.approx(want, abs=1e-5)
        assert abs(want - float(value)) > 5e-3


def test_no_buffer_of_all_triplets():
    n, p = 96, 32
    f, y = jnp.ones((n, p)), jnp.arange(n) % 20
    grad = jax.jit(jax.grad(lambda f: jnp.sum(supremix_loss(f, y, KEY, chunk=4))))
    temporary = grad.lower(f).compile().memory_analysis().temp_size_in_bytes
    assert temporary < n**3 * 4 < n**3 * p * 4


BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32),
    "label": jnp.asarray([0, 1, 2, 2, 3, 1, 5, 4]),
    "index": jnp.arange(8),
    "mask": jnp.arange(8) != 6,
    "row": jnp.arange(8) + 100,
}
CONTEXT = Context(rng=jax.random.key(0))


def two(key, x):
    return x, x + 0.3 * jax.random.normal(key, x.shape)


def transformed(transform, augment=two, batch=BATCH):
    host = hosts.supervised_contrast(MLP((), 3), augment, 0.3)
    outputs, _ = host.forward(host.init(jax.random.key(1), batch), batch, CONTEXT)
    e = host.loss(outputs, batch, CONTEXT).elements
    known = CONTEXT.replace(outputs=outputs, batch=batch)
    new, state = jax.jit(transform.update)(e, transform.init(8), known)
    return outputs, e, new, state


def unit(z):
    z = np.asarray(z, np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_switched_off_it_is_the_host():
    off = supremix(0.3, weight="none", mix_neg=False, mix_pos=False)
    for augment in (two, None):
        _, e, new, _ = transformed(off, augment)
        np.testing.assert_allclose(new.values, e.values, atol=1e-6)
        np.testing.assert_array_equal(new.mask, e.mask)
    weighted = supremix(0.3, mix_neg=False, mix_pos=False)
    logs = lambda d: jnp.log(method.label_distance_weights(d.astype(jnp.float32)))  # noqa: E731
    host = hosts.supervised_contrast(MLP((), 3), two, 0.3, weights=logs)
    outputs, _, new, _ = transformed(weighted)
    np.testing.assert_allclose(new.values, host.loss(outputs, BATCH, CONTEXT).elements.values, atol=1e-5)


def test_elements_are_replaced_by_the_mixed_loss_of_both_views():
    pool = 2
    outputs, _, new, state = transformed(supremix(0.4, 3, pool=pool, chunk=3))
    want, z = np.zeros(8), [unit(outputs["z1"]), unit(outputs["z2"])]
    rows = [np.asarray(BATCH["row"]), np.asarray(BATCH["row"]) + method.SECOND_VIEW]
    y, mask = np.asarray(BATCH["label"]), np.asarray(BATCH["mask"])
    for part in np.split(np.arange(8), pool):
        f, labels = np.concatenate([v[part] for v in z]), np.tile(y[part], 2)
        a = shares(np.concatenate([r[part] for r in rows]).astype(np.int32), CONTEXT.key("supremix"))
        real = np.flatnonzero(np.tile(mask[part], 2)).tolist()
        values = reference(f, labels, a, 0.4, 3, real=real)[0]
        want[part] = values.reshape(2, -1).mean(0)
    np.testing.assert_allclose(new.values, want, atol=1e-5)
    assert (np.asarray(new.values)[6] == 0) and int(state["without_positives"]) == 0


def test_anchors_without_positives_are_counted_and_cost_nothing():
    _, _, new, state = transformed(supremix(0.3, mix_pos=False), None)
    # of one view: 0, 3 and 4 stand alone; 5 is padding
    assert int(state["without_positives"]) == 3
    assert [i for i in range(8) if float(new.values[i]) == 0] == [0, 4, 6, 7]
    _, _, new, state = transformed(supremix(0.3, 3), None)
    assert int(state["without_positives"]) == 2  # the lowest and the highest have no one on one side
    assert [i for i in range(8) if float(new.values[i]) == 0] == [0, 6, 7]


def test_it_is_refused_where_it_does_not_belong():
    net, t = MLP((), 3), supremix()
    assert base.misfit(t, hosts.supervised_contrast(net, two)) is None
    for host, reason in [
        (hosts.simclr(net, two), "supremix requires 'label', which simclr does not provide"),
        (hosts.ordinal_contrast(net, two), "requires 'contrastive', which ordinal contrastive does not provide"),
        (hosts.metric_learning(net, pairs.contrastive_pairs), "requires 'contrastive'"),
        (hosts.proxies(net, 4), "supremix acts on 'example', but proxy anchor yields elements of unit 'batch'"),
        (method.supcr(net, two), "requires 'contrastive', which supcr does not provide"),
    ]:
        assert reason in base.misfit(t, host)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"window": 0}, "window must be positive"),
        ({"beta_params": (2.0, 0.0)}, r"beta must be two positive numbers, got \(2.0, 0.0\)"),
        ({"weight": "l1inv"}, "unknown weight 'l1inv'; did you mean 'l1_inv'"),
        ({"chunk": 0}, "chunk must be at least 1 anchor, got 0"),
        ({"variant": "parity"}, "variant must be 'exact' or 'official', got 'parity'"),
        ({"pool": 0}, "pool must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        supremix(**settings)


def test_labels_and_pools_that_cannot_work():
    with pytest.raises(ValueError, match=r"labels must be \[12\] or \[12, 1\].*several dimensions are not supported"):
        supremix_loss(jnp.asarray(F), jnp.ones((12, 2)), KEY)
    with pytest.raises(ValueError, match="pool 3 does not divide the batch of 8"):
        transformed(supremix(pool=3))
    with pytest.raises(ValueError, match="unknown weight"):
        method.label_distance_weights(jnp.ones(2), "l3")


def test_supcr_ranks_by_l1_distances():
    host = method.supcr(MLP((), 3), two, 2.0)
    outputs, _ = host.forward(host.init(jax.random.key(1), BATCH), BATCH, CONTEXT)
    got = host.loss(outputs, BATCH, CONTEXT).elements.values
    z, y = np.concatenate([unit(outputs["z1"]), unit(outputs["z2"])]), np.tile(np.asarray(BATCH["label"]), 2)
    real = [i for i in range(16) if i % 8 != 6]
    want = np.zeros(16)
    s = -np.abs(z[:, None] - z[None]).sum(-1) / 2.0
    for i in real:
        others = [j for j in real if j != i]
        for j in others:
            far = [k for k in others if abs(y[i] - y[k]) >= abs(y[i] - y[j])]
            want[i] += (np.log(np.exp(s[i][far]).sum()) - s[i, j]) / len(others)
    np.testing.assert_allclose(got, want.reshape(2, 8).mean(0), atol=1e-5)


def test_the_regressor_starts_at_its_centre():
    net = method.Regressor(MLP((4,), 3), 20.0, 5.0)
    variables = net.init(jax.random.key(0), BATCH["x"])
    prediction, h = net.apply(variables, BATCH["x"])
    head = variables["params"]["head"]
    want = 20.0 + 5.0 * (np.asarray(h) @ np.asarray(head["kernel"])[:, 0] + np.asarray(head["bias"])[0])
    np.testing.assert_allclose(prediction, want, rtol=1e-5)
    np.testing.assert_allclose(h, MLP((4,), 3).apply({"params": variables["params"]["encoder"]}, BATCH["x"]))
