"""Relative representations: what they do not change under, the released code's numbers, and models cut and joined."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.latents import rotated_latents, word_spaces
from zoo.metrics.latents import aligned_mrr, mean_cosine, topk_jaccard
from zoo.nn.mlp import MLP
from zoo.nn.stitching_heads import RelativeHead
from zoo.ops.anchors import AnchorSet
from zoo.representation.relative_representations import (
    RelativeLayer,
    RelativeModel,
    basis_change,
    class_means,
    distances_to_reference,
    quantise_ste,
    relative_projection,
    select_anchors,
    smooth_step,
    stitch,
    stitchable,
    subspace_relative,
)

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "relative_representations_official.npz"))
X, A, LABELS = jnp.asarray(GOLDEN["x"]), jnp.asarray(GOLDEN["anchors"]), jnp.asarray(GOLDEN["targets"])
RNG = np.random.default_rng(0)


def rotation(d, seed=1):
    return jnp.asarray(np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0], jnp.float32)


def test_cosines_by_the_definition():
    r = relative_projection(X, A)
    expected = [[np.dot(x, a) / np.linalg.norm(x) / np.linalg.norm(a) for a in GOLDEN["anchors"]] for x in GOLDEN["x"]]
    np.testing.assert_allclose(r, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(relative_projection(A, A).diagonal(), 1, rtol=1e-6)
    assert float(jnp.abs(r).max()) <= 1 + 1e-6 and r.shape == (7, 9)


def test_what_changes_it_and_what_does_not():
    r, q = relative_projection(X, A), rotation(6)
    np.testing.assert_allclose(relative_projection(3.7 * X @ q, 3.7 * A @ q), r, atol=1e-5)
    mirror = q.at[:, 0].multiply(-1.0)
    np.testing.assert_allclose(relative_projection(X @ mirror, A @ mirror), r, atol=1e-5)
    each = jnp.linspace(0.1, 9, 7)[:, None]
    np.testing.assert_allclose(relative_projection(each * X, A), r, atol=1e-5)
    shift = jnp.linspace(-1, 1, 6)
    assert np.abs(np.asarray(relative_projection(X + shift, A + shift) - r)).max() > 0.05
    assert np.abs(np.asarray(relative_projection(X @ q, A) - r)).max() > 0.05
    # inner products keep their scale, a basis change does not care for any invertible map
    inner = relative_projection(X, A, "inner")
    np.testing.assert_allclose(relative_projection(2 * X @ q, 2 * A @ q, "inner"), 4 * inner, rtol=1e-4, atol=1e-5)
    bend = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
    plain = relative_projection(X, A[:6], "basis")
    np.testing.assert_allclose(relative_projection(X @ bend, A[:6] @ bend, "basis"), plain, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(plain @ A[:6], X, rtol=1e-3, atol=1e-3)


def test_the_order_of_anchors_is_the_order_of_coordinates():
    order = jnp.array([4, 0, 8, 1, 2, 7, 6, 5, 3])
    np.testing.assert_array_equal(relative_projection(X, A[order]), relative_projection(X, A)[:, order])


def test_a_latent_without_direction_is_far_from_everything():
    r = relative_projection(jnp.zeros((1, 6)), A)
    np.testing.assert_array_equal(r, 0)
    gradient = jax.grad(lambda x: relative_projection(x, A).sum())(jnp.zeros((1, 6)))
    np.testing.assert_array_equal(gradient, 0)
    gradient = jax.grad(lambda x: relative_projection(x, A).sum())(1e-6 * X)
    assert float(jnp.abs(gradient).min()) > 1e3


def test_subspaces_turn_each_by_itself():
    blocks = jnp.zeros((6, 6)).at[:2, :2].set(rotation(2, 3)).at[2:4, 2:4].set(rotation(2, 4))
    blocks = blocks.at[4:, 4:].set(5 * rotation(2, 5))
    r = subspace_relative(X, A, 3)
    assert r.shape == (7, 3, 9)
    np.testing.assert_allclose(subspace_relative(X @ blocks, A @ blocks, 3), r, atol=1e-5)
    np.testing.assert_allclose(r[:, 1], relative_projection(X[:, 2:4], A[:, 2:4]), atol=1e-6)
    q = rotation(6)
    assert np.abs(np.asarray(subspace_relative(X @ q, A @ q, 3) - r)).max() > 0.05
    pools = {"sum": r.sum(1), "mean": r.mean(1), "max": r.max(1), "concat": r.reshape(7, 27)}
    for pool, expected in pools.items():
        found = RelativeLayer(subspaces=3, pool=pool, norm="none").apply({}, X, A)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    layer = RelativeLayer(subspaces=3, pool="linear", norm="none")
    variables = layer.init(jax.random.key(0), X, A)
    p = variables["params"]["pool"]
    np.testing.assert_allclose(layer.apply(variables, X, A), r.reshape(7, 27) @ p["kernel"] + p["bias"], rtol=1e-4,
                               atol=1e-5)  # fmt: skip


def test_rounding_passes_gradients_straight_through():
    r = jnp.array([[0.12, -0.26, 0.9]])
    np.testing.assert_allclose(quantise_ste(r, 0.25), [[0.0, -0.25, 1.0]], atol=1e-7)
    np.testing.assert_array_equal(jax.grad(lambda r: (quantise_ste(r, 0.25) * jnp.array([1.0, 2, 3])).sum())(r),
                                  [[1, 2, 3]])  # fmt: skip
    np.testing.assert_allclose(smooth_step(r), r - np.sin(2 * np.pi * np.asarray(r)) / (2 * np.pi), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda r: smooth_step(r).sum())(jnp.zeros((1, 1))), 0, atol=1e-6)
    # the latents' too
    layer = RelativeLayer(latent_bin=0.25, norm="none")
    assert float(jnp.abs(jax.grad(lambda x: layer.apply({}, x, A).sum())(X)).sum()) > 0.1


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_class_means_are_the_released_codes(groups):
    found = class_means(X @ A.T, LABELS, 3, groups)
    np.testing.assert_allclose(found, GOLDEN[f"stratified_mean{groups}"], rtol=1e-5, atol=1e-5)
    s, labels = np.asarray(X @ A.T), GOLDEN["targets"]
    for g in range(groups):
        for c in range(3):
            members = [j for i, j in enumerate(np.flatnonzero(labels == c)) if i % groups == g]
            expected = s[:, members].mean(1) if members else 0.0
            np.testing.assert_allclose(found[:, g * 3 + c], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(class_means(X @ A.T, LABELS, 4)[:, 3], 0)


def linear(name):
    return {"kernel": GOLDEN[f"{name}.weight"].T, "bias": GOLDEN[f"{name}.bias"]}


def norm(name):
    return {"scale": GOLDEN[f"{name}.weight"], "bias": GOLDEN[f"{name}.bias"]}


def attention():
    name, heads, width = "self_attention", 2, 4
    kernels, biases = (np.split(GOLDEN[f"{name}/self_attention.in_proj_{k}"], 3) for k in ("weight", "bias"))
    parts = {
        n: {"kernel": w.T.reshape(width, heads, 2), "bias": b.reshape(heads, 2)}
        for n, w, b in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    out = linear(f"{name}/self_attention.out_proj")
    parts["out"] = {**out, "kernel": out["kernel"].reshape(heads, 2, width)}
    named = {k: GOLDEN[f"{name}/sim_to_{k}"] for k in ("queries", "keys", "values")}
    aggregate = {"kernel": GOLDEN[f"{name}/self_attention_aggregation.weight"].T}
    return {"norm": norm(f"{name}/sim_norm"), "attention": parts, "aggregate": aggregate, **named}


def affine(name):
    return {"norm": norm(f"{name}/outnorm")}


CASES = {
    "cosine": (RelativeLayer(norm="none"), {}),
    "inner": (RelativeLayer("inner", norm="none"), {}),
    "basis": (RelativeLayer("basis", norm="none"), {}),
    "layernorm": (RelativeLayer(), affine("layernorm")),
    "l2": (RelativeLayer(norm="l2"), {}),
    "round": (RelativeLayer(quantise="round", bin_size=0.25, norm="none"), {}),
    "smooth": (RelativeLayer(quantise="smooth", norm="none"), {}),
    "latent_round": (RelativeLayer(latent_bin=0.25, norm="none"), {}),
    "trainable": (RelativeLayer(values="trainable", features=5, norm="none"), {"values": GOLDEN["trainable/values"]}),
    "anchors_values": (RelativeLayer(values="anchors", norm="none"), {}),
    "relative_anchors": (RelativeLayer(values="relative_anchors", norm="none"),
                         {"similarity_norm": norm("relative_anchors/sim_norm")}),
    "self_attention": (RelativeLayer(values="self_attention", norm="none"), {"attention": attention()}),
    "aggregated": (RelativeLayer(num_classes=3, norm="none"), {}),
    "aggregated2": (RelativeLayer(num_classes=3, class_groups=2, norm="none"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_the_released_codes(name):
    layer, params = CASES[name]
    if name == "self_attention":
        layer = layer.clone(attention_features=4)
    found = layer.apply({"params": jax.tree.map(jnp.asarray, params)}, X, A, LABELS)
    np.testing.assert_allclose(found, GOLDEN[name], rtol=2e-4, atol=2e-5)
    made = layer.init(jax.random.key(0), X, A, LABELS).get("params", {})
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_norms_over_the_batch_are_the_released_codes():
    r = RelativeLayer(norm="standardise").apply({}, X, A)
    affine_ = r * GOLDEN["instancenorm/outnorm.weight"] + GOLDEN["instancenorm/outnorm.bias"]
    np.testing.assert_allclose(affine_, GOLDEN["instancenorm"], rtol=1e-4, atol=1e-4)
    layer = RelativeLayer(norm="batch")
    variables = layer.init(jax.random.key(0), X, A)
    variables = {**variables, "params": jax.tree.map(jnp.asarray, affine("batchnorm"))}
    found, mutated = layer.apply(variables, X, A, None, True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, GOLDEN["batchnorm"], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(mutated["batch_stats"]["norm"]["mean"]).max()) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: relative_projection(X, A[:, :4]),
            "latent dim 6 vs anchors 4: anchors must come from the same",
        ),
        (lambda: subspace_relative(X, A[:, :4], 2), "latent dim 6 vs anchors 4: anchors must come from the same"),
        (lambda: relative_projection(X, A, "dot"), "similarity must be one of cosine, inner, basis; got 'dot'"),
        (lambda: subspace_relative(X, A, 4), "subspaces must divide the 6 dimensions of a latent, got 4"),
        (lambda: subspace_relative(X, A, 0), "subspaces must divide"),
        (lambda: RelativeLayer(norm="group").apply({}, X, A), "norm must be one of layer, l2"),
        (lambda: RelativeLayer(quantise="ste").apply({}, X, A), "quantise must be one of none, round, smooth"),
        (lambda: RelativeLayer(pool="min").apply({}, X, A), "pool must be one of concat, sum"),
        (lambda: RelativeLayer(values="keys").apply({}, X, A), "values must be one of similarities, trainable"),
        (lambda: RelativeLayer(similarity="l1").apply({}, X, A), "similarity must be one of"),
        (lambda: RelativeLayer(num_classes=3).apply({}, X, A), "averaging by class needs the anchors' labels"),
        (
            lambda: RelativeLayer(values="relative_anchors", subspaces=2).apply({}, X, A),
            "need one similarity per",
        ),
    ],
)
def test_what_cannot_be_projected_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_is_its_encoder_projection_and_head():
    x, own = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32), jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    model = RelativeModel(MLP((6,), 5), RelativeHead(2))
    variables = model.init(jax.random.key(0), x, own)
    p = variables["params"]
    assert set(p) == {"body", "projection", "top"}
    z, a = (MLP((6,), 5).apply({"params": p["body"]}, v) for v in (x, own))
    r = RelativeLayer().apply({"params": p["projection"]}, z, a)
    expected = RelativeHead(2).apply({"params": p["top"]}, r)
    np.testing.assert_allclose(model.apply(variables, x, own), expected, rtol=1e-5, atol=1e-6)
    cut = stitchable(model, variables, AnchorSet.of(jnp.arange(3), inputs=own))
    np.testing.assert_allclose(stitch(cut, cut)(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cut.anchors.latents, a, rtol=1e-5, atol=1e-6)
    assert cut.width == 5
    absolute = RelativeModel(MLP((6,), 5), RelativeHead(2), None)
    av = absolute.init(jax.random.key(0), x, own)
    plain = stitchable(absolute, av, AnchorSet.of(jnp.arange(3), inputs=own))
    assert plain.represent is None and set(av["params"]) == {"body", "top"}
    with pytest.raises(ValueError, match="reads relative representations"):
        stitch(cut, plain)
    halves = RelativeModel(MLP((6,), 4), RelativeHead(2), RelativeLayer(subspaces=2))
    other = stitchable(halves, halves.init(jax.random.key(0), x, own), AnchorSet.of(jnp.arange(3), inputs=own))
    with pytest.raises(ValueError, match="hands over 6 coordinates, the second's head reads 3"):
        stitch(other, cut)


def test_rotated_copies_are_one_space_and_noise_is_what_is_left():
    latents, truth = rotated_latents(0, samples=80, widths=(12, 12, 20))
    ids = select_anchors(jax.random.key(0), 20, n=80)
    r = [relative_projection(jnp.asarray(v), jnp.asarray(v)[ids]) for v in latents.models.values()]
    z = jnp.asarray(truth["items"]["z"])
    for other in r:
        np.testing.assert_allclose(other, relative_projection(z, z[ids]), atol=1e-5)
    np.testing.assert_allclose(distances_to_reference(r[0], jnp.stack([r[1], r[2] + 1.0])), [0, 20**0.5], atol=1e-4)
    noisy = [rotated_latents(0, samples=80, widths=(12, 12), noise=n)[0].models["model1"] for n in (0.2, 0.4, 0.8)]
    noisy = jnp.stack([relative_projection(jnp.asarray(v), jnp.asarray(v)[ids]) for v in noisy])
    distance = distances_to_reference(r[0], noisy)
    assert 0.1 < distance[0] < distance[1] < distance[2]
    assert distance[1] == pytest.approx(float(np.linalg.norm(noisy[1] - r[0], axis=1).mean()), rel=1e-5)


def test_word_spaces_of_two_corpora_are_matched_and_stitched():
    words = word_spaces(0)
    first, second = (jnp.asarray(v) for v in words.models.values())
    ids = select_anchors(jax.random.key(0), 64, "top_m", n=300, top_m=150)
    a, b = relative_projection(first, first[ids]), relative_projection(second, second[ids])
    measures = jax.jit(lambda x, y: jnp.stack([topk_jaccard(x, y), aligned_mrr(x, y), mean_cosine(x, y)]))
    relative, absolute = measures(a, b), measures(first, second)
    assert (relative > jnp.array([0.55, 0.85, 0.9])).all() and (absolute < jnp.array([0.3, 0.3, 0.6])).all()
    # a classifier of words by topic, fitted in closed form on one corpus, reads the other's words
    target = jnp.eye(8)[words.labels]
    fit = lambda x: jnp.linalg.lstsq(x[words.train], target[words.train], rcond=1e-3)[0]  # noqa: E731
    hit = lambda x, w: float(jnp.mean(jnp.argmax(x[~words.train] @ w, 1) == words.labels[~words.train]))  # noqa: E731
    own, stitched, plain = hit(b, fit(b)), hit(a, fit(b)), hit(first, fit(second))
    assert own > 0.8 and stitched > own - 0.1 and plain < 0.5


def test_basis_change_is_the_shortest_solution():
    c = basis_change(X, A)
    expected = (np.linalg.pinv(np.asarray(A).T) @ np.asarray(X).T).T
    np.testing.assert_allclose(c, expected, rtol=1e-3, atol=1e-4)
