"""Host objectives: what each one computes from its encoder's outputs, who gets a gradient, and what is remembered."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo import base, hosts
from zoo.base import Context, Shared, reduce_mean
from zoo.losses import pairs, proxies
from zoo.losses.contrastive import nt_xent_per_example
from zoo.nn.mlp import MLP
from zoo.nn.siamese import Siamese

RNG = np.random.default_rng(4)
B = 6
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(B, 5)), jnp.float32),
    "label": jnp.asarray([0, 1, 0, 2, 1, 0]),
    "index": jnp.arange(B),
    "mask": jnp.arange(B) < 5,
    "row": jnp.arange(B),
}
CONTEXT = Context(rng=jax.random.key(1), step=jnp.int32(0))
NET = MLP((), 3)


def shifted(key, x):
    """Two different views of one row."""
    return x, x + 0.3 * jax.random.normal(key, x.shape)


class Dictionary(nn.Module):
    """An encoder that returns more than its projection."""

    provides = ("heads",)

    @nn.compact
    def __call__(self, x):
        z = nn.Dense(3)(x)
        return {"projection": z, "heads": jnp.stack([z, 2 * z], 1), "table": Shared(jnp.ones(4))}


def run(host, variables=None, batch=None):
    """Outputs and loss of one call."""
    batch = BATCH if batch is None else batch
    variables = host.init(jax.random.key(0), batch) if variables is None else variables
    outputs, mutated = host.forward(variables, batch, CONTEXT)
    return variables, outputs, host.loss(outputs, batch, CONTEXT.replace(collections=variables)), mutated


def unit(x):
    return np.asarray(x) / np.maximum(np.linalg.norm(np.asarray(x), axis=-1, keepdims=True), 1e-12)


def test_simclr_is_nt_xent_and_may_leave_its_positive_out():
    _, out, loss, _ = run(hosts.simclr(NET, shifted, 0.3))
    want = nt_xent_per_example(out["z1"], out["z2"], 0.3, BATCH["mask"])
    np.testing.assert_allclose(loss.elements.values, want, rtol=1e-5)
    _, out, loss, _ = run(hosts.simclr(NET, shifted, 0.3, positive_in_denominator=False))
    z = unit(np.concatenate([out["z1"][:5], out["z2"][:5]]))
    s = np.exp(z @ z.T / 0.3)
    value = lambda i: -np.log(s[i, (i + 5) % 10] / sum(s[i, j] for j in range(10) if j % 5 != i % 5))  # noqa: E731
    np.testing.assert_allclose(loss.elements.values[:5], [(value(i) + value(i + 5)) / 2 for i in range(5)], rtol=1e-4)
    assert loss.elements.values[5] == 0


def test_supervised_contrast_takes_equal_labels_across_views():
    _, out, loss, _ = run(hosts.supervised_contrast(NET, shifted, 0.4))
    z, y = unit(np.concatenate([out["z1"][:5], out["z2"][:5]])), np.tile(np.asarray(BATCH["label"][:5]), 2)
    s = z @ z.T / 0.4
    rows = []
    for i in range(10):
        every = np.log(np.exp(np.delete(s[i], i)).sum())
        rows.append(-np.mean([s[i, j] - every for j in range(10) if j != i and y[j] == y[i]]))
    np.testing.assert_allclose(loss.elements.values[:5], (np.array(rows[:5]) + rows[5:]) / 2, rtol=1e-4)
    _, out, loss, _ = run(hosts.supervised_contrast(NET, None, 0.4))
    assert "z2" not in out and loss.elements.values[3] == 0 and loss.elements.values[0] > 0


def test_ordinal_contrast_compares_distances_with_label_gaps():
    host = hosts.ordinal_contrast(NET, None, 1.5)
    _, out, loss, _ = run(host)
    z, y = np.asarray(out["z1"][:5]), np.asarray(BATCH["label"][:5])
    s = -np.linalg.norm(z[:, None] - z[None], axis=-1) / 1.5
    for i in range(5):
        rest = [k for k in range(5) if k != i]
        costs = [
            -(s[i, j] - np.log(sum(np.exp(s[i, k]) for k in rest if abs(y[k] - y[i]) >= abs(y[j] - y[i]))))
            for j in rest
        ]
        assert float(loss.elements.values[i]) == pytest.approx(np.mean(costs), rel=1e-4)
    lost = host.loss({**out, "z1": out["z1"].at[1, 0].set(jnp.nan)}, BATCH, CONTEXT)
    assert np.isnan(np.asarray(lost.elements.values)[1])


def test_moco_scores_against_its_queue_and_moves_its_teacher():
    host = hosts.moco(NET, shifted, 0.2, queue=8, momentum=0.75)
    variables, out, loss, _ = run(host)
    memory = variables["memory"]
    assert memory["filled"].all() and np.abs(memory["rows"]["projection"]).min() > 0
    queue, keys = unit(memory["rows"]["projection"]), {k: unit(v) for k, v in out["keys"].items()}
    np.testing.assert_allclose(out["keys"]["z2"], out["z2"], rtol=1e-6)  # the teacher starts as a copy

    def order(z, k):
        z = unit(z)
        positive, rest = np.exp((z * k).sum(1) / 0.2), np.exp(z @ queue.T / 0.2).sum(1)
        return -np.log(positive / (positive + rest))

    want = (order(out["z1"], keys["z2"]) + order(out["z2"], keys["z1"])) / 2
    np.testing.assert_allclose(loss.elements.values[:5], want[:5], rtol=1e-4)
    moved = {**variables, "params": jax.tree.map(lambda p: p + 1, variables["params"])}
    changed = host.after_step(moved, out, BATCH, CONTEXT)
    for t, old in zip(jax.tree.leaves(changed["teacher"]), jax.tree.leaves(variables["teacher"]), strict=True):
        np.testing.assert_allclose(t, old + 0.25, rtol=1e-5)
    np.testing.assert_allclose(changed["memory"]["rows"]["projection"][:5], out["keys"]["z2"][:5], rtol=1e-6)
    assert int(changed["memory"]["next"]) == 5
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        hosts.moco(NET, shifted, momentum=1.0)


def test_moco_teaches_through_queries_only_and_queues_every_array():
    host = hosts.moco(Dictionary(), shifted, queue=8)
    variables, out, _, _ = run(host)
    assert set(variables["memory"]["rows"]) == {"projection", "heads"}
    assert variables["memory"]["rows"]["heads"].shape == (8, 2, 3)
    changed = host.after_step(variables, out, BATCH, CONTEXT)
    np.testing.assert_allclose(changed["memory"]["rows"]["heads"][:5], out["keys"]["heads2"][:5], rtol=1e-6)

    def total(teacher):
        v = {**variables, "teacher": teacher}
        outputs, _ = host.forward(v, BATCH, CONTEXT)
        return reduce_mean(host.loss(outputs, BATCH, CONTEXT.replace(collections=v)).elements)

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(total)(variables["teacher"])))


def test_what_a_module_returns_reaches_transformations_by_view():
    host = hosts.two_views(Dictionary(), shifted, lambda a, b, m: jnp.sum(a * b, -1))
    _, out, _, _ = run(host)
    assert set(out) == {"z1", "z2", "heads1", "heads2", "table", "embedding"} and isinstance(out["table"], Shared)
    np.testing.assert_allclose(out["heads2"][:, 1], 2 * out["z2"], rtol=1e-6)
    assert "heads" in host.provides and "views" in host.provides


def test_simsiam_is_symmetric_and_stops_projections():
    net = Siamese(NET, MLP((), 3), MLP((4,), 3))
    host = hosts.simsiam(net, shifted)
    variables, out, loss, _ = run(host)
    cos = lambda a, b: -(unit(a) * unit(b)).sum(1)  # noqa: E731
    want = (cos(out["prediction1"], out["z2"]) + cos(out["prediction2"], out["z1"])) / 2
    np.testing.assert_allclose(loss.elements.values[:5], want[:5], rtol=1e-4)
    grads = jax.grad(lambda z: reduce_mean(host.loss({**out, "z1": z}, BATCH, CONTEXT).elements))(out["z1"])
    assert (np.asarray(grads) == 0).all()
    with pytest.raises(ValueError, match="returns 'prediction' beside 'projection'"):
        run(hosts.simsiam(NET, shifted))


def test_barlow_twins_is_one_element_of_the_batch():
    _, out, loss, _ = run(hosts.barlow_twins(NET, shifted, 0.1, scale=0.5))
    c = np.corrcoef(np.asarray(out["z1"][:5]).T, np.asarray(out["z2"][:5]).T)[:3, 3:]
    want = 0.5 * (((1 - np.diag(c)) ** 2).sum() + 0.1 * ((c**2).sum() - (np.diag(c) ** 2).sum()))
    assert loss.elements.unit == "batch" and loss.elements.values.shape == (1,)
    assert float(loss.elements.values[0]) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("compare", ["cosine", "distance"])
def test_metric_learning_hands_the_loss_what_it_compares(compare):
    seen = {}

    def loss(s, p, n):
        seen.update(s=s, p=p, n=n)
        return jnp.sum(s, 1)

    _, out, found, _ = run(hosts.metric_learning(NET, loss, compare, name="mine"))
    z = unit(out["embedding"][:5])
    want = z @ z.T if compare == "cosine" else np.linalg.norm(z[:, None] - z[None], axis=-1)
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(np.asarray(seen["s"])[:5, :5][off], want[off], atol=1e-5)
    p, n = pairs.pair_masks(BATCH["label"], mask=BATCH["mask"])
    assert (seen["p"] == p).all() and (seen["n"] == n).all() and found.elements.values[5] == 0
    with pytest.raises(ValueError, match="compare must be 'cosine' or 'distance', got 'dot'"):
        hosts.metric_learning(NET, loss, "dot")


def test_proxies_lie_beside_the_encoder():
    variables, out, loss, _ = run(hosts.proxies(NET, 4, alpha=8.0))
    assert set(variables["params"]) == {"encoder", "proxies"} and variables["params"]["proxies"].shape == (4, 3)
    cosine = unit(out["embedding"]) @ unit(variables["params"]["proxies"]).T
    np.testing.assert_allclose(out["logits"], cosine, atol=1e-5)
    want = proxies.proxy_anchor(jnp.asarray(cosine), BATCH["label"], 8.0, mask=BATCH["mask"])
    assert float(loss.elements.values[0]) == pytest.approx(float(want.sum()), rel=1e-4)
    assert loss.elements.unit == "batch"
    _, out, loss, _ = run(hosts.proxies(NET, 4, "proxy_nca"))
    want = proxies.proxy_nca(2 - 2 * out["logits"], BATCH["label"])
    np.testing.assert_allclose(loss.elements.values[:5], want[:5], rtol=1e-5)
    with pytest.raises(ValueError, match="'proxy_anchor' or 'proxy_nca', got 'x'"):
        hosts.proxies(NET, 4, "x")


@pytest.mark.parametrize("head", ["linear", "cosine", "cosface", "arcface", "fixed"])
def test_softmax_heads(head):
    fixed = np.asarray(RNG.normal(size=(4, 3)), np.float32) if head == "fixed" else None
    host = hosts.softmax_classifier(NET, 4, head, scale=5.0, prototypes=fixed, label_smoothing=0.2)
    variables, out, loss, _ = run(host)
    if head == "fixed":
        assert set(variables["params"]) == {"encoder"} and (variables["constants"]["head"] == fixed).all()
        logits = np.asarray(out["embedding"]) @ fixed.T
    elif head == "linear":
        logits = np.asarray(out["embedding"]) @ np.asarray(variables["params"]["head"]).T
    else:
        logits = 5 * unit(out["embedding"]) @ unit(variables["params"]["head"]).T
    np.testing.assert_allclose(out["logits"], logits, atol=1e-4)
    y = np.asarray(BATCH["label"])
    if head == "cosface":
        logits = logits - 5 * 0.35 * np.eye(4)[y]
    if head == "arcface":
        logits = np.asarray(proxies.arcface_logits(jnp.asarray(logits / 5), BATCH["label"], 0.5, 5.0))
    targets = 0.8 * np.eye(4)[y] + 0.2 / 4
    want = optax.softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(loss.elements.values[:5], want[:5], rtol=1e-4)
    hits = (np.asarray(out["logits"]).argmax(1) == y)[:5].mean()
    assert float(loss.metrics["accuracy"]) == pytest.approx(hits)


def test_heads_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="head must be .* got 'dot'"):
        hosts.softmax_classifier(NET, 4, "dot")
    with pytest.raises(ValueError, match="prototypes belong to head='fixed'"):
        hosts.softmax_classifier(NET, 4, "fixed")
    with pytest.raises(ValueError, match="feature size 3 differs from the prototypes' 5"):
        run(hosts.softmax_classifier(NET, 4, "fixed", prototypes=np.ones((4, 5))))
    with pytest.raises(ValueError, match="2 prototypes for 4 classes"):
        run(hosts.softmax_classifier(NET, 4, "fixed", prototypes=np.ones((2, 3))))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.0"):
        hosts.softmax_classifier(NET, 4, label_smoothing=1.0)


def test_terms_that_a_transformation_adds_are_added_once():
    host = hosts.softmax_classifier(NET, 4)
    _, _, loss, _ = run(host)

    def update(e, state, context):
        return e.replace(terms={**e.terms, "extra": jnp.float32(2.0)}), state

    adds = base.LossTransformation(lambda n: (), update, name="adds")
    plain = base.total_loss(loss, None, (), CONTEXT)[0]
    known = CONTEXT.replace(batch=BATCH)
    total, _, metrics = base.total_loss(loss, adds, adds.init(4), known)
    assert float(total - plain) == pytest.approx(2, rel=1e-6) and float(metrics["extra"]) == 2
    half = base.scheduled(adds, lambda step: jnp.float32(0.5))
    assert float(base.total_loss(loss, half, half.init(4), known)[0] - plain) == pytest.approx(1, rel=1e-6)
    some = base.masked(adds, lambda e, c: e.values > 0)
    assert float(base.total_loss(loss, some, some.init(4), known)[0] - plain) == pytest.approx(2, rel=1e-6)
    first = base.chain(adds, base.examples())
    assert float(base.total_loss(loss, first, first.init(4), known)[0] - plain) == pytest.approx(2, rel=1e-6)


def test_a_batch_element_is_refused_where_examples_are_needed():
    host = hosts.barlow_twins(NET, shifted)
    assert base.misfit(base.identity(), host) is None
    assert "yields elements of unit 'batch'" in base.misfit(base.examples(), host)


def test_pmap_sees_the_names_a_host_gathers():
    found = {h.name: h.gathers for h in (hosts.simclr(NET, shifted), hosts.supervised_contrast(NET, label="target"))}
    assert found == {"simclr": ("label",), "supervised contrastive": ("target",)}
    assert hosts.metric_learning(NET, functools.partial(pairs.triplet, margin=0.1)).name == "metric learning"
