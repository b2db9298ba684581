"""Relational graph convolutions: a loop over edges, a graph by hand, DGL's numbers, padding, relabelling, buffers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.graph import RelationalGraphConv, RGCNEncoder, relation_bound
from zoo.nn.partitioning import axis_names, unbox

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "omnimatch_official.npz")


def graph(nodes=6, edges=20, relations=3, inputs=4, seed=0):
    rng = np.random.default_rng(seed)
    ends = [jnp.asarray(rng.integers(0, n, edges), jnp.int32) for n in (nodes, nodes, relations)]
    return jnp.asarray(rng.normal(size=(nodes, inputs)), jnp.float32), *ends, jnp.asarray(rng.random(edges) < 0.8)


def loop(weight, own, bias, x, src, dst, rel, mask):
    """The definition, an edge at a time in float64."""
    x = np.asarray(x, np.float64)
    out = [b @ np.asarray(own, np.float64) + np.asarray(bias) for b in x]
    for s, d, r, real in zip(*(np.asarray(v).tolist() for v in (src, dst, rel, mask)), strict=True):
        if real:
            out[d] = out[d] + x[s] @ np.asarray(weight[r], np.float64)
    return np.stack(out)


def noisy(params, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), unbox(params))


@pytest.mark.parametrize("order", ["aggregate", "transform"])
@pytest.mark.parametrize(("outputs", "bases"), [(5, None), (2, 2)])
def test_a_layer_equals_the_loop(order, outputs, bases):
    args = graph()
    layer = RelationalGraphConv(outputs, 3, bases, order=order)
    p = noisy(layer.init(jax.random.key(0), *args))["params"]
    weight = p["weight"] if bases is None else np.einsum("rb,bio->rio", p["coefficient"], p["weight"])
    assert p["weight"].shape == (bases or 3, 4, outputs)
    np.testing.assert_allclose(layer.apply({"params": p}, *args), loop(weight, p["loop"], p["bias"], *args), atol=1e-5)


def test_three_nodes_by_hand():
    # 0 -> 1 twice by relation 0, 2 -> 1 by relation 1, 1 -> 0 by relation 1; sums, no mean; the loop adds x times 10
    x = jnp.array([[1.0, 0], [0, 1], [2, 3]])
    src, dst, rel = (jnp.array(v) for v in ([0, 0, 2, 1], [1, 1, 1, 0], [0, 0, 1, 1]))
    weight = jnp.array([[[1.0], [2.0]], [[-1.0], [5.0]]])
    params = {"weight": weight, "loop": jnp.array([[10.0], [10.0]]), "bias": jnp.array([0.5])}
    found = RelationalGraphConv(1, 2).apply({"params": params}, x, src, dst, rel)
    np.testing.assert_allclose(found[:, 0], [10 + 5 + 0.5, 10 + 2 * 1 + (15 - 2) + 0.5, 50 + 0.5])
    bare = RelationalGraphConv(1, 2, self_loop=False, use_bias=False)
    np.testing.assert_allclose(bare.apply({"params": {"weight": weight}}, x, src, dst, rel)[:, 0], [5, 15, 0])


@pytest.mark.parametrize("order", ["aggregate", "transform"])
def test_padded_edges_have_no_effect_and_no_gradient(order):
    x, src, dst, rel, mask = graph()
    layer = RelationalGraphConv(5, 3, order=order)
    params = noisy(layer.init(jax.random.key(0), x, src, dst, rel, mask))
    kept = np.flatnonzero(mask)
    few = layer.apply(params, x, *(v[kept] for v in (src, dst, rel)))
    dirty = [jnp.where(mask, v, junk) for v, junk in ((src, 10**6), (dst, -(10**6)), (rel, 99))]
    np.testing.assert_allclose(layer.apply(params, x, *dirty, mask), few, atol=1e-5)
    grads = jax.grad(lambda p, e: jnp.sum(layer.apply(p, x, *e, mask) ** 2))
    for a, b in zip(
        jax.tree.leaves(grads(params, dirty)), jax.tree.leaves(grads(params, [src, dst, rel])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
    assert not np.allclose(layer.apply(params, x, src, dst, rel), few)


def test_relabelling_nodes_permutes_embeddings_of_unit_length():
    x, src, dst, rel, mask = graph(nodes=7)
    encoder = RGCNEncoder(3, (6,), 5, relation_init="per_relation")
    params = noisy(encoder.init(jax.random.key(1), x, src, dst, rel, mask))
    h = encoder.apply(params, x, src, dst, rel, mask)
    np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1, atol=1e-5)
    new = np.random.default_rng(1).permutation(7)
    place = jnp.asarray(np.argsort(new), jnp.int32)
    moved = encoder.apply(params, x[new], place[src], place[dst], rel, mask)
    np.testing.assert_allclose(moved, h[new], atol=1e-5)
    # an edge's direction and type matter
    for other in ((dst, src, rel), (src, dst, (rel + 1) % 3)):
        assert not np.allclose(encoder.apply(params, x, *other, mask), h, atol=1e-2)


def test_the_encoder_equals_dgls():
    params = {c: {k: jnp.asarray(GOLDEN[f"{c}/{k}"]) for k in ("weight", "loop", "bias")} for c in ("conv1", "conv2")}
    ends = [jnp.asarray(GOLDEN[k], jnp.int32) for k in ("src", "dst", "rel")]
    encoder = RGCNEncoder(3, (5,), 5)
    h = encoder.apply({"params": params}, jnp.asarray(GOLDEN["x"]), *ends)
    np.testing.assert_allclose(h, GOLDEN["h"], atol=1e-5)
    # without the last step the rows are as long as they come, and ReLU stands between the layers only
    raw = RGCNEncoder(3, (5,), 5, normalise=False).apply({"params": params}, jnp.asarray(GOLDEN["x"]), *ends)
    assert float(jnp.min(raw)) < 0 and not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-2)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), h, atol=1e-5)


def test_initial_bounds_follow_torchs_fan_rule():
    for relations, inputs, outputs, largest in GOLDEN["bounds"]:
        bound = relation_bound(int(relations), int(inputs), int(outputs))
        assert largest <= bound and largest > 0.99 * bound
    assert relation_bound(5, 40, 30) == pytest.approx((2 * 6 / (40 * 30 + 5 * 30)) ** 0.5)
    assert relation_bound(5, 40, 30, "per_relation") == pytest.approx((2 * 6 / (40 + 30)) ** 0.5)
    args = graph(inputs=40)
    for init in ("dgl", "per_relation"):
        layer = RelationalGraphConv(30, 3, relation_init=init)
        p = unbox(layer.init(jax.random.key(0), *args))["params"]
        for value, bound in ((p["weight"], relation_bound(3, 40, 30, init)), (p["loop"], (12 / 70) ** 0.5)):
            assert 0.98 * bound < float(jnp.abs(value).max()) <= bound and abs(float(value.mean())) < 0.1 * bound
        assert not np.asarray(p["bias"]).any()


def test_parameters_carry_axis_names_and_bf16_sums_in_float32():
    x, src, dst, rel, mask = graph()
    layer = RelationalGraphConv(5, 3, dtype=jnp.bfloat16)
    boxed = layer.init(jax.random.key(0), x, src, dst, rel, mask)
    assert axis_names(boxed)["params/weight"] == (None, "embed", "mlp")
    assert axis_names(boxed)["params/loop"] == ("embed", "mlp") and axis_names(boxed)["params/bias"] == ("mlp",)
    low = layer.apply(noisy(boxed), x, src, dst, rel, mask)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(
        low, layer.clone(dtype=jnp.float32).apply(noisy(boxed), x, src, dst, rel, mask), atol=0.2
    )
    # 600 ones would stop at 256 in bf16
    many = jnp.zeros(600, jnp.int32)
    one = {"params": {"weight": jnp.ones((1, 1, 1))}}
    for order in ("aggregate", "transform"):
        summed = RelationalGraphConv(1, 1, self_loop=False, use_bias=False, order=order, dtype=jnp.bfloat16)
        assert float(summed.apply(one, jnp.ones((2, 1)), many, many, many)[0, 0]) == pytest.approx(600, rel=5e-3)


@pytest.mark.parametrize(("inputs", "outputs", "held"), [(32, 16, "transform"), (16, 32, "aggregate")])
def test_edges_carry_vectors_never_matrices(inputs, outputs, held):
    x, src, dst, rel, mask = graph(nodes=12, edges=120, relations=3, inputs=inputs)
    layer = RelationalGraphConv(outputs, 3)
    params = unbox(layer.init(jax.random.key(0), x, src, dst, rel, mask))
    text = str(jax.make_jaxpr(lambda p: layer.apply(p, x, src, dst, rel, mask))(params))
    sizes = [int(np.prod([int(v) for v in s.split(",")])) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    # the messages are as wide as the narrower side
    assert max(sizes) <= 120 * min(inputs, outputs) and f"f32[120,{min(inputs, outputs)}]" in text
    assert layer._aggregate_first(inputs) == (held == "aggregate")


def test_example_inputs_and_bad_settings():
    encoder = RGCNEncoder(2, (4,), 3)
    shapes = jax.eval_shape(lambda i: encoder.init(jax.random.key(0), **i), encoder.example_inputs())
    assert unbox(shapes)["params"]["conv2"]["weight"].shape == (2, 4, 3)
    args = graph()
    for layer, message in (
        (RelationalGraphConv(5, 0), "num_relations and features must be at least 1, got 0 and 5"),
        (RelationalGraphConv(5, 3, 4), r"num_bases must be in \[1, 3\]"),
        (RelationalGraphConv(5, 3, relation_init="he"), "relation_init must be one of dgl, per_relation; got 'he'"),
        (RelationalGraphConv(5, 3, order="none"), "order must be one of auto, aggregate, transform"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.init(jax.random.key(0), *args)
