"""The recommender backbones and their objectives: loops, the released code's numbers, sampling, sharding, padding."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.base import Context, total_loss
from zoo.nn import recommenders as nets
from zoo.recommendation import hosts

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "dsl_official.npz")
PAIRS = GOLDEN["gcn_pairs"]
SEEN = jnp.array([[0, 1, -1], [1, 2, 5], [0, 3, -1], [1, 4, 5]])
KEY = jax.random.key(0)


def objective(kind, dtype=jnp.float32):
    users, items = jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1])
    if kind in ("lightgcn", "mf"):
        return hosts.bpr(nets.LightGCN(4, 6, 5, 3 if kind == "lightgcn" else 0, dtype), users, items, SEEN)
    if kind == "neumf":
        return hosts.neumf(nets.NeuMF(4, 6, 4, (6, 3), dtype=dtype), SEEN, negatives=7)
    return hosts.multvae(nets.MultVAE(6, 5, 3, dtype=dtype), kl_steps=10)


def batch(kind, n=8):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(PAIRS), n)
    out = {"user": jnp.asarray(PAIRS[rows, 0]), "item": jnp.asarray(PAIRS[rows, 1])}
    if kind == "multvae":
        out = {"items": SEEN[jnp.asarray(rng.integers(0, 4, n))]}
    return {**out, "index": jnp.arange(n), "mask": jnp.ones(n, bool), "row": jnp.arange(n)}


def value(obj, params, rest, data, context):
    outputs, _ = obj.forward({"params": params, **rest}, data, context)
    return total_loss(obj.loss(outputs, data, context), None, (), context)[0]


def split(variables):
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


@functools.cache
def prepared(kind, n=8):
    obj, data = objective(kind), batch(kind, n)
    return obj, data, jax.jit(obj.init)(KEY, data)


@functools.cache
def forward(kind, train=True):
    obj = prepared(kind)[0]
    return jax.jit(lambda v, d, key: obj.forward(v, d, Context(key, train=train))[0])


KINDS = ("mf", "lightgcn", "neumf", "multvae")


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_propagation_is_the_normalised_adjacency():
    graph = nets.bipartite_graph(jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1]), 4, 7)  # item 6 has no edge
    a = np.zeros((11, 11))
    for u, i in PAIRS:
        a[u, 4 + i] = a[4 + i, u] = 1
    d = a.sum(1)
    norm = np.divide(1, np.sqrt(d), out=np.zeros(11), where=d > 0)
    h = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)
    want = (norm[:, None] * a * norm) @ h
    got = nets.propagate(jnp.asarray(h), graph["source"], graph["target"], graph["weight"])
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (got[10] == 0).all() and graph["source"].shape == (20,)


def test_negatives_are_uniform_over_unseen_items():
    seen = jnp.array([0, 3, 4, 7, -1, -1])
    draws = jax.vmap(lambda k: nets.sample_unseen(k, seen, 9))(jax.random.split(KEY, 5000))
    count = np.bincount(draws, minlength=9)
    assert (count[[0, 3, 4, 7]] == 0).all() and len(count) == 9
    np.testing.assert_allclose(count[[1, 2, 5, 6, 8]], 1000, atol=120)
    none = jax.vmap(lambda k: nets.sample_unseen(k, jnp.full(3, -1), 4))(jax.random.split(KEY, 200))
    assert set(none.tolist()) == {0, 1, 2, 3}
    assert nets.sample_unseen(KEY, jnp.array([0, 1]), 3) == 2
    assert 0 <= nets.sample_unseen(KEY, jnp.array([0, 1]), 2) < 2


def test_multi_hot():
    assert nets.multi_hot(jnp.array([[2, 0, -1], [-1, -1, -1]]), 4).tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


# --- the released code ------------------------------------------------------------------------------------------------


def test_lightgcn_is_the_released_one():
    module = nets.LightGCN(4, 6, 5, 3)
    graph = nets.bipartite_graph(jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1]), 4, 6)
    u, i, j = (jnp.asarray(GOLDEN[f"gcn_{k}"]) for k in "uij")
    data = {"index": jnp.arange(5), "mask": jnp.ones(5, bool)}
    obj = objective("lightgcn")

    def loss(table):
        out = module.apply({"params": {"embedding": table}, "constants": graph}, u, i, j)
        part = obj.loss(out, data, Context(KEY))
        return total_loss(part, None, (), Context(KEY))[0], part

    table = jnp.asarray(GOLDEN["gcn_table"])
    (total, part), grad = jax.value_and_grad(loss, has_aux=True)(table)
    np.testing.assert_allclose(
        [total, part.elements.values.mean(), part.terms["regulariser"]], GOLDEN["gcn_loss"], rtol=1e-5
    )
    np.testing.assert_allclose(grad, GOLDEN["gcn_grad"], atol=1e-6)
    nodes = module.apply({"params": {"embedding": table}, "constants": graph}, method="nodes")
    np.testing.assert_allclose(nodes, GOLDEN["gcn_nodes"], atol=1e-6)
    scores = module.apply({"params": {"embedding": table}, "constants": graph}, jnp.array([2, 0]), method="scores")
    np.testing.assert_allclose(scores, GOLDEN["gcn_nodes"][[2, 0]] @ GOLDEN["gcn_nodes"][4:].T, atol=1e-6)


def dense(name):
    return {"kernel": jnp.asarray(GOLDEN[f"{name}.weight"].T), "bias": jnp.asarray(GOLDEN[f"{name}.bias"])}


def test_multvae_is_the_released_one():
    module = nets.MultVAE(9, 5, 3)
    names = {"encoder": "q_layers.0", "posterior": "q_layers.1", "decoder": "p_layers.0", "output": "p_layers.1"}
    params = {ours: dense(f"vae_p_{theirs}") for ours, theirs in names.items()}
    x = jnp.asarray(GOLDEN["vae_x"])
    out = module.apply({"params": params}, x)
    for ours, theirs in (("logits", "logits"), ("mean", "mu"), ("log_variance", "lv")):
        np.testing.assert_allclose(out[ours], GOLDEN[f"vae_{theirs}"], atol=1e-5)
    ids = jnp.array([[*np.flatnonzero(r), *[-1] * (9 - int(r.sum()))] for r in GOLDEN["vae_x"]])
    obj = hosts.multvae(module, kl_cap=0.2, kl_steps=100)
    data = {"items": ids, "index": jnp.arange(4), "mask": jnp.ones(4, bool)}
    got = value(obj, params, {}, data, Context(KEY, step=13, train=False))
    np.testing.assert_allclose(got, GOLDEN["vae_loss"], rtol=1e-5)
    np.testing.assert_allclose(module.apply({"params": params}, ids, method="scores"), GOLDEN["vae_logits"], atol=1e-5)


def test_neumf_is_the_released_one():
    module = nets.NeuMF(5, 7, 4, (6, 3))
    tables = {"gmf_user": "gmf.u_emb", "gmf_item": "gmf.v_emb", "mlp_user": "u_emb", "mlp_item": "v_emb"}
    params = {ours: jnp.asarray(GOLDEN[f"mf_p_{theirs}.weight"]) for ours, theirs in tables.items()}
    params |= {"linear_0": dense("mf_p_linear.0"), "linear_1": dense("mf_p_linear.3"), "predict": dense("mf_p_predict")}
    u, v, n = (jnp.asarray(GOLDEN[f"mf_{k}"]) for k in "uvn")
    logits = module.apply({"params": params}, u, jnp.concatenate([v[:, None], n], 1))
    np.testing.assert_allclose(logits[:, 0], GOLDEN["mf_pos"], atol=1e-5)
    np.testing.assert_allclose(logits[:, 1:], GOLDEN["mf_neg"], atol=1e-5)
    fixed = jnp.zeros((5, 3), jnp.int32).at[u].set(n)
    obj = hosts.neumf(module, jnp.full((5, 1), -1), negatives=fixed)
    data = {"user": u, "item": v, "index": jnp.arange(3), "mask": jnp.ones(3, bool)}
    constants = obj.init(KEY, data)["constants"]
    got = value(obj, params, {"constants": constants}, data, Context(KEY, train=False))
    np.testing.assert_allclose(got, GOLDEN["mf_loss"], rtol=1e-5)
    all_items = module.apply({"params": params}, u, method="scores")
    np.testing.assert_allclose(all_items[jnp.arange(3), v], GOLDEN["mf_pos"], atol=1e-5)


def test_sizes_and_initialisation_are_the_briefs():
    gcn = nets.LightGCN(30, 40)
    row = jnp.zeros(1, jnp.int32)
    table = jax.jit(gcn.init)(KEY, row, row, row)["params"]["embedding"]
    bound = np.sqrt(6 / (70 + 64))
    assert table.shape == (70, 64) and gcn.layers == 3 and 0.98 * bound < jnp.abs(table).max() <= bound
    params = jax.jit(nets.NeuMF(30, 40).init)(KEY, row, row[None])["params"]
    assert [params[f"linear_{n}"]["kernel"].shape for n in range(3)] == [(32, 32), (32, 16), (16, 8)]
    assert params["predict"]["kernel"].shape == (24, 1) and params["gmf_user"].shape == (30, 16)
    assert abs(params["mlp_item"].std() - 1) < 0.1
    for name, fan_in in (("linear_0", 32), ("linear_2", 16)):
        for leaf in params[name].values():
            assert 0.75 * fan_in**-0.5 < jnp.abs(leaf).max() <= fan_in**-0.5
    params = jax.jit(nets.MultVAE(500).init)(KEY, jnp.zeros((1, 500)))["params"]
    shapes = {k: v["kernel"].shape for k, v in params.items()}
    assert shapes == {"encoder": (500, 600), "posterior": (600, 400), "decoder": (200, 600), "output": (600, 500)}
    np.testing.assert_allclose(params["encoder"]["kernel"].std(), np.sqrt(2 / 1100), rtol=0.02)
    assert 0.0005 < params["encoder"]["bias"].std() < 0.0015


# --- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the conformance table asks the same of lightgcn
@pytest.mark.parametrize("kind", KINDS)
def test_one_device_is_pmap_over_eight(kind):
    obj, data, variables = prepared(kind, 16)
    params, rest = split(variables)
    context = Context(jax.random.key(5), step=jnp.int32(1))
    want, grad = jax.jit(jax.value_and_grad(lambda p: value(obj, p, rest, data, context)))(params)

    def shard(p, part):
        def f(p):
            out, _ = obj.forward({"params": p, **rest}, part, context)
            out, whole = jax.tree.map(lambda x: jax.lax.all_gather(x, "d", tiled=True), (out, part))
            return total_loss(obj.loss(out, whole, context), None, (), context)[0]

        v, g = jax.value_and_grad(f)(p)
        return v, jax.lax.pmean(g, "d")

    parts = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), data)
    got, many = jax.pmap(shard, axis_name="d", in_axes=(None, 0))(params, parts)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, atol=1e-5), many, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence_and_gradients_are_finite(kind):
    obj, data, variables = prepared(kind)
    params, rest = split(variables)
    context = Context(jax.random.key(5))
    data = {**data, "mask": jnp.arange(8) < 5}
    f = jax.jit(jax.value_and_grad(lambda p, d: value(obj, p, rest, d, context)))
    a, ga = f(params, data)
    first = jax.tree.map(lambda x: x[:5], data)
    b, gb = jax.jit(jax.value_and_grad(lambda p, d: value(obj, p, rest, d, context)))(params, first)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ga, gb)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(ga)) and a > 0


@pytest.mark.parametrize("kind", KINDS)
def test_randomness_is_per_step_in_training_and_absent_outside(kind):
    _, data, variables = prepared(kind)
    out = [forward(kind)(variables, data, jax.random.key(s)) for s in (0, 0, 1)]
    leaves = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(o)]) for o in out]
    assert (leaves[0] == leaves[1]).all() and (leaves[0] != leaves[2]).any()
    if kind == "multvae":
        a, b = (forward(kind, False)(variables, data, jax.random.key(s))["nll"] for s in (0, 1))
        assert (a == b).all()


def test_bpr_never_draws_a_known_item():
    module = nets.LightGCN(4, 6, 1, 0)
    obj = hosts.bpr(module, jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1]), SEEN)
    data = {k: jnp.tile(v, 50) for k, v in batch("mf").items()} | {"row": jnp.arange(400)}
    variables = jax.jit(obj.init)(KEY, data)
    # item k scores 2 ** k for every user, so the drawn item can be read off
    table = jnp.concatenate([jnp.ones(4), 2.0 ** jnp.arange(6)])[:, None]
    out, _ = obj.forward({**variables, "params": {"embedding": table}}, data, Context(KEY))
    drawn = np.log2(np.asarray(out["negative"])).round().astype(int)
    for user in range(4):
        assert set(drawn[np.asarray(data["user"]) == user]) == set(range(6)) - set(SEEN[user].tolist())


@pytest.mark.parametrize("kind", ["lightgcn", "multvae"])
def test_bfloat16_computation_keeps_float32_parameters_and_loss(kind):
    obj, high, (_, data, variables) = objective(kind, jnp.bfloat16), objective(kind), prepared(kind)
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(obj.init, KEY, data)["params"])} == {jnp.dtype("float32")}
    params, rest = split(variables)
    low, high = (jax.jit(lambda p, o=o: value(o, p, rest, data, Context(KEY)))(params) for o in (obj, high))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=0.03)


def test_dropout_scales_and_dims():
    module = nets.NeuMF(4, 6, 4, (6, 3), dropout=0.5)
    params = jax.jit(module.init)(KEY, jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32))["params"]
    u, v = jnp.arange(4), jnp.zeros((4, 1), jnp.int32)
    calm = module.apply({"params": params}, u, v)
    keys = jax.random.split(KEY, 4)
    run = jax.jit(lambda u, k: module.apply({"params": params}, u, v, k))
    loud = run(u, keys)
    assert (calm != loud).any()
    swapped = run(u[::-1], keys[::-1])
    np.testing.assert_allclose(swapped[::-1], loud, atol=1e-6)


def test_multvae_samples_its_posterior():
    # a posterior of mean 1 and variance 4 whatever the input, and a decoder that is the identity
    module = nets.MultVAE(3, 3, 3, dropout=0.0)
    eye, none = jnp.eye(3), jnp.zeros(3)
    params = {
        "encoder": {"kernel": eye, "bias": none},
        "posterior": {"kernel": jnp.zeros((3, 6)), "bias": jnp.concatenate([jnp.ones(3), jnp.full(3, jnp.log(4.0))])},
        "decoder": {"kernel": 1e-3 * eye, "bias": none},
        "output": {"kernel": 1e3 * eye, "bias": none},
    }
    z = module.apply({"params": params}, jnp.ones((3000, 3)), jax.random.split(KEY, 3000))["logits"]
    np.testing.assert_allclose(z.mean(0), 1, atol=0.15)
    np.testing.assert_allclose(z.std(0), 2, atol=0.1)
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.1
