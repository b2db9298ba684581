"""Training end to end: where gradients go, whose batch statistics are used and kept, stale anchors, graphs, AEs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.graphs import planted_communities
from zoo.base import Context, total_loss
from zoo.losses.gaussian import optimal_sigma_nll
from zoo.losses.ranking import gaussian_kl
from zoo.nn.conv_autoencoder import ConvDecoder, ConvEncoder, VariationalDecoder
from zoo.nn.gcnii import GCNII
from zoo.nn.mlp import MLP
from zoo.nn.stitching_heads import RelativeHead, StitchingHead
from zoo.ops.anchors import AnchorSet
from zoo.ops.stitching import Stitchable, stitch
from zoo.representation.relative_hosts import relative_autoencoder, relative_classifier, relative_nodes
from zoo.representation.relative_representations import RelativeLayer, RelativeModel, relative_projection, stitchable

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
OWN = jnp.asarray(RNG.normal(size=(3, 4)) + 1, jnp.float32)
ANCHORS = AnchorSet.of(jnp.array([5, 1, 7]), inputs=OWN)
BATCH = {
    "x": X, "label": jnp.asarray(RNG.integers(0, 3, 8), jnp.int32), "index": jnp.arange(8), "row": jnp.arange(8),
    "mask": jnp.array([True] * 6 + [False] * 2),
}  # fmt: skip
PLAIN = RelativeModel(MLP((6,), 5), RelativeHead(3), RelativeLayer(norm="none"))
NORMED = RelativeModel(MLP((6,), 5, normalise=True), RelativeHead(3), RelativeLayer(norm="none"))


def context(step=0, train=True, seed=0):
    return Context(rng=jax.random.key(seed), step=jnp.int32(step), train=train)


def gradient(objective, variables, batch=BATCH):
    def value(params):
        out, _ = objective.forward({**variables, "params": params}, batch, context())
        return total_loss(objective.loss(out, batch, context()), None, (), context(), objective.reduce)[0]

    return jax.jit(jax.value_and_grad(value))(variables["params"])


@functools.cache
def started(normed):
    return relative_classifier(NORMED if normed else PLAIN, ANCHORS).init(jax.random.key(0), BATCH)


def reference(params, stop):
    """Loss of the six real rows with the anchors as constants or not, from the definition."""

    def mlp(p, v):
        hidden = jax.nn.relu(v @ p["hidden1"]["kernel"] + p["hidden1"]["bias"])
        return hidden @ p["out"]["kernel"] + p["out"]["bias"]

    z, a = mlp(params["body"], X[:6]), mlp(params["body"], OWN)
    a = jax.lax.stop_gradient(a) if stop else a
    unit = lambda v: v / jnp.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    r = unit(z) @ unit(a).T
    logits = r @ params["top"]["out"]["kernel"] + params["top"]["out"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), BATCH["label"][:6]])


@pytest.mark.parametrize("stop", [True, False])
def test_gradients_flow_through_anchors_only_if_asked(stop):
    variables = started(False)
    found = gradient(relative_classifier(PLAIN, ANCHORS, stop_gradient=stop), variables)
    expected = jax.value_and_grad(reference)(variables["params"], stop)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    other = jax.grad(reference)(variables["params"], not stop)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found[1], other))
    assert max(moved) > 1e-4


def test_constants_hold_the_anchors_and_the_checksum_of_their_ids():
    kept = started(False)["constants"]
    np.testing.assert_array_equal(kept["anchors"], OWN)
    np.testing.assert_array_equal(kept["anchor_ids"], [5, 1, 7])
    np.testing.assert_array_equal(kept["anchor_hash"], ANCHORS.hash)
    out, mutated = relative_classifier(PLAIN, ANCHORS).forward(started(False), BATCH, context())
    assert mutated == {} and out["embedding"].shape == (8, 3) and out["latents"].shape == (8, 5)
    found = relative_classifier(PLAIN, ANCHORS).loss(out, BATCH, context())
    hit = (np.argmax(out["logits"], 1) == np.asarray(BATCH["label"]))[:6]
    assert float(found.metrics["accuracy"]) == pytest.approx(hit.mean())
    assert found.elements.mask.sum() == 6


def statistics(x):
    h = np.asarray(x @ started(True)["params"]["body"]["hidden1"]["kernel"])
    h = h + np.asarray(started(True)["params"]["body"]["hidden1"]["bias"])
    return h.mean(0), h.var(0), h


def latents(h, mean, var):
    p = jax.tree.map(np.asarray, started(True)["params"]["body"])
    return np.maximum((h - mean) / np.sqrt(var + 1e-5), 0) @ p["out"]["kernel"] + p["out"]["bias"]


def forward(step=0, train=True, **options):
    objective = relative_classifier(NORMED, ANCHORS, **options)
    variables = objective.init(jax.random.key(0), BATCH)
    return variables, jax.jit(lambda v: objective.forward(v, BATCH, context(step, train)))(variables)


def test_the_anchors_own_batch_statistics_are_used_but_not_kept():
    (mx, vx, hx), (ma, va, ha) = statistics(X[:6]), statistics(OWN)
    _, (out, mutated) = forward()
    z, a = latents(hx, mx, vx), latents(ha, ma, va)
    np.testing.assert_allclose(out["latents"][:6], z, rtol=1e-4, atol=1e-5)
    r = relative_projection(jnp.asarray(z), jnp.asarray(a))
    np.testing.assert_allclose(out["embedding"][:6], r, rtol=1e-4, atol=1e-5)
    kept = mutated["batch_stats"]["body"]["norm1"]
    np.testing.assert_allclose(kept["mean"], 0.1 * mx, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kept["var"], 0.9 + 0.1 * vx, rtol=1e-4, atol=1e-6)
    # the released code goes on from there with the anchors
    _, (official, mutated) = forward(variant="official")
    np.testing.assert_allclose(official["embedding"], out["embedding"], rtol=1e-5, atol=1e-6)
    kept = mutated["batch_stats"]["body"]["norm1"]
    np.testing.assert_allclose(kept["mean"], 0.09 * mx + 0.1 * ma, rtol=1e-4, atol=1e-6)
    # evaluation uses the running ones for both
    variables, (out, mutated) = forward(train=False)
    assert mutated == {}
    z, a = latents(hx, 0, 1), latents(ha, 0, 1)
    np.testing.assert_allclose(out["embedding"][:6], relative_projection(jnp.asarray(z), jnp.asarray(a)), rtol=1e-4,
                               atol=1e-5)  # fmt: skip


def test_one_joint_pass_has_common_statistics():
    both = jnp.concatenate([X[:6], OWN])
    mean, var, h = statistics(both)
    _, (out, mutated) = forward(anchor_pass="joint")
    z = latents(h, mean, var)
    r = relative_projection(jnp.asarray(z[:6]), jnp.asarray(z[6:]))
    np.testing.assert_allclose(out["embedding"][:6], r, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mutated["batch_stats"]["body"]["norm1"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)


def test_stale_anchors_are_refreshed_when_due_and_not_before():
    objective = relative_classifier(PLAIN, ANCHORS, refresh=3)
    variables = objective.init(jax.random.key(0), BATCH)
    fresh = PLAIN.apply({"params": variables["params"]}, OWN, method="encode")
    np.testing.assert_allclose(variables["memory"]["anchors"], fresh, rtol=1e-6)
    stale = {**variables, "memory": {"anchors": -fresh + 0.5}}
    run = jax.jit(lambda v, step: objective.forward(v, BATCH, context(step)))
    z = PLAIN.apply({"params": variables["params"]}, X, method="encode")
    for step, own in ((0, fresh), (1, -fresh + 0.5), (2, -fresh + 0.5), (3, fresh)):
        out, mutated = run(stale, jnp.int32(step))
        np.testing.assert_allclose(out["embedding"], relative_projection(z, own), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mutated["memory"]["anchors"], own, rtol=1e-5, atol=1e-6)
    # evaluation never uses what is stale
    out, mutated = objective.forward(stale, BATCH, context(1, train=False))
    np.testing.assert_allclose(out["embedding"], relative_projection(z, fresh), rtol=1e-4, atol=1e-5)
    assert mutated == {}


@pytest.mark.parametrize("variational", [False, True])
def test_autoencoders_pay_the_likelihood_and_the_divergence(variational):
    x = jnp.asarray(RNG.normal(size=(8, 4, 4, 1)), jnp.float32)
    decoder = ConvDecoder((4, 4, 1), (4,), "tanh")
    decoder = VariationalDecoder(2, (4, 4, 1), (4,), "tanh") if variational else decoder
    model = RelativeModel(ConvEncoder((4,)), decoder)
    anchors = AnchorSet.of(jnp.arange(3), inputs=x[:3])
    objective = relative_autoencoder(model, anchors)
    batch = {**BATCH, "x": x}
    variables = objective.init(jax.random.key(0), batch)
    out, mutated = jax.jit(lambda v: objective.forward(v, batch, context()))(variables)
    assert set(mutated) == {"batch_stats"} and {"body", "top"} <= set(mutated["batch_stats"])
    loss = objective.loss(out, batch, context())
    made = out["output"]["reconstruction"] if variational else out["output"]
    expected = optimal_sigma_nll(made[:6], x[:6])
    if variational:
        expected = expected + gaussian_kl(out["output"]["mean"], out["output"]["log_variance"])[:6]
        other, _ = jax.jit(lambda v: objective.forward(v, batch, context(seed=1)))(variables)
        assert np.abs(np.asarray(other["output"]["reconstruction"] - made)).max() > 1e-5
        assert {"mse", "kl"} == set(loss.metrics)
    np.testing.assert_allclose(loss.elements.values[:6], expected, rtol=1e-5)
    np.testing.assert_array_equal(loss.elements.values[6:], 0)
    assert float(loss.metrics["mse"]) == pytest.approx(float(jnp.mean((made - x)[:6] ** 2)), rel=1e-5)
    assert relative_autoencoder(model, anchors, reduce="sum").reduce == "sum"


def train(objective, variables, batch, steps, rate):
    tx = optax.adam(rate)

    def step(carry, number):
        variables, state = carry

        def value(params):
            known = context(number).replace(step=number)
            out, mutated = objective.forward({**variables, "params": params}, batch, known)
            return total_loss(objective.loss(out, batch, known), None, (), known)[0], mutated

        grads, mutated = jax.grad(value, has_aux=True)(variables["params"])
        updates, state = tx.update(grads, state)
        return ({**variables, **mutated, "params": optax.apply_updates(variables["params"], updates)}, state), None

    return jax.lax.scan(step, (variables, tx.init(variables["params"])), jnp.arange(steps))[0][0]


def test_graph_networks_of_two_seeds_are_stitched():
    graph = planted_communities(0, nodes=120, classes=3, features=8)
    ids = jnp.asarray(np.flatnonzero(graph.train)[:24], jnp.int32)
    nodes = np.flatnonzero(graph.train)
    batch = {"node": jnp.asarray(nodes), "label": jnp.asarray(graph.label[nodes]), "index": jnp.arange(len(nodes)),
             "row": jnp.arange(len(nodes)), "mask": jnp.ones(len(nodes), bool)}  # fmt: skip
    parts = {k: jnp.asarray(v) for k, v in graph.arrays().items()}
    edges = {k: parts[k] for k in ("src", "dst")}
    logits, held = {}, np.flatnonzero(~graph.train)
    for kind, layer in (("relative", RelativeLayer(norm="l2")), ("absolute", None)):
        model = RelativeModel(GCNII(16, 3, rate=0.2), RelativeHead(3), layer)
        objective = relative_nodes(model, parts, ids)
        run = jax.jit(lambda v, o=objective: train(o, v, batch, 60, 0.02))
        cuts = []
        for seed in (0, 1):
            own = {"params": run(objective.init(jax.random.key(seed), batch))["params"]}
            cut = stitchable_nodes(model, own, ids, parts, edges)
            cuts.append(cut)
        hit = lambda cut: float(np.mean(np.argmax(cut(parts["x"])[held], 1) == graph.label[held]))  # noqa: E731
        logits[kind] = [hit(stitch(cuts[i], cuts[j])) for i, j in ((0, 0), (1, 1), (0, 1), (1, 0))]
    own, stitched = np.mean(logits["relative"][:2]), np.mean(logits["relative"][2:])
    assert own > 0.8 and stitched > own - 0.1
    assert np.mean(logits["absolute"][:2]) > 0.8 and np.mean(logits["absolute"][2:]) < 0.7


def stitchable_nodes(model, variables, ids, parts, edges):
    encode = lambda x: model.apply(variables, x, mask=parts["mask"], method="encode", **edges)  # noqa: E731
    anchors = AnchorSet.of(ids, encode(parts["x"])[ids], parts["x"][ids])
    represent = None if model.layer is None else lambda z, a: model.apply(variables, z, a, method="represent")
    decode = lambda r: model.apply(variables, r, method="decode")  # noqa: E731
    return Stitchable(encode, decode, represent, anchors, 16)


def test_anchors_of_a_graph_are_rows_and_gradients_flow():
    graph = planted_communities(1, nodes=30, classes=3, features=4)
    model = RelativeModel(GCNII(6, 2), StitchingHead(3), RelativeLayer(norm="none"))
    parts, ids = graph.arrays(), jnp.array([4, 9, 2])
    batch = {k: BATCH[k] for k in ("label", "index", "row", "mask")} | {"node": jnp.array([0, 3, 3, 8, 4, 9, 0, 0])}
    grads = []
    for stop in (False, True):
        objective = relative_nodes(model, parts, ids, stop)
        variables = objective.init(jax.random.key(0), batch)
        out, _ = objective.forward(variables, batch, context(train=False))
        assert float(out["embedding"][4, 0]) == pytest.approx(1, abs=1e-5)
        assert float(out["embedding"][5, 1]) == pytest.approx(1, abs=1e-5)
        np.testing.assert_array_equal(out["embedding"][1], out["embedding"][2])
        grads.append(gradient(objective, variables, batch))
    assert float(grads[0][0]) == pytest.approx(float(grads[1][0]), rel=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), grads[0][1]["body"], grads[1][1]["body"])
    assert max(jax.tree.leaves(moved)) > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": AnchorSet.of([1, 2])}, r"encodes the anchors in every step: AnchorSet.of\(ids, inputs=...\)"),
        ({"anchor_pass": "both"}, "anchor_pass must be 'separate' or 'joint'"),
        ({"variant": "code"}, "variant 'paper' or 'official'"),
        ({"refresh": 0}, "refresh at least 1"),
        ({"refresh": 2, "stop_gradient": False}, "refresh 2 keeps old anchors"),
        ({"refresh": 2, "anchor_pass": "joint"}, "refresh 2 keeps old anchors"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        relative_classifier(PLAIN, **{"anchors": ANCHORS, **options})


def test_a_trained_pair_is_stitched_from_its_variables():
    variables = started(False)
    cut = stitchable(PLAIN, variables, ANCHORS)
    out, _ = relative_classifier(PLAIN, ANCHORS).forward(variables, BATCH, context(train=False))
    np.testing.assert_allclose(stitch(cut, cut)(X), out["logits"], rtol=1e-5, atol=1e-6)
