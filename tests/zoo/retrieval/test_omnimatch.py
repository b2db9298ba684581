"""OmniMatch against its definition: typed edges, triplets, objectives, scores, ranks; the released code's numbers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tables import cross_table_pairs
from zoo.base import Context, reduce_mean
from zoo.nn.graph import RGCNEncoder
from zoo.retrieval import omnimatch

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "omnimatch_official.npz")


def random_pairs(nodes=9, relations=3, seed=0, drop=5):
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(cross_table_pairs(np.arange(nodes) // 2))[drop:]
    flip = rng.random(len(pairs)) < 0.5
    pairs = np.where(flip[:, None], pairs[:, ::-1], pairs).astype(np.int32)
    # few distinct values, so that ties are common
    return pairs, (rng.integers(0, 5, (len(pairs), relations)) / 4).astype(np.float32)


def edges_of(found):
    src, dst, rel, mask = map(np.asarray, found)
    return [tuple(e) for e in np.stack([src, dst, rel], 1)[mask].tolist()]


def nearest(pairs, similarities, nodes, k, min_sim):
    """The definition: for each node and relation, its candidates sorted by similarity, then by number."""
    found = []
    for v in range(nodes):
        for r in range(similarities.shape[1]):
            near = [(-s[r], b if a == v else a) for (a, b), s in zip(pairs.tolist(), similarities, strict=True)
                    if v in (a, b) and s[r] > min_sim]  # fmt: skip
            found += [(u, v, r) for _, u in sorted(near)[:k]]
    return found


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "min_sim"), [(2, -1.0), (3, 0.0), (20, 0.25)])
def test_typed_edges_equal_the_definition(k, min_sim):
    pairs, similarities = random_pairs()
    found = omnimatch.topk_typed_edges(jnp.asarray(pairs), jnp.asarray(similarities), 9, k, min_sim)
    assert all(x.shape == (9 * 3 * k,) for x in found)
    assert edges_of(found) == nearest(pairs, similarities, 9, k, min_sim)


def test_typed_edges_by_hand_and_masked_pairs():
    pairs = jnp.array([[0, 2], [3, 0], [1, 0], [2, 1]], jnp.int32)
    similarities = jnp.array([[0.5], [0.9], [0.5], [0.0]])
    found = omnimatch.topk_typed_edges(pairs, similarities, 4, 2)
    # node 0: 3 first, then of the equal 1 and 2 the lower; zero similarities make edges
    assert edges_of(found) == [(3, 0, 0), (1, 0, 0), (0, 1, 0), (2, 1, 0), (0, 2, 0), (1, 2, 0), (0, 3, 0)]
    dropped = edges_of(omnimatch.topk_typed_edges(pairs, similarities, 4, 2, 0.0))
    assert dropped == [(3, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)]
    masked = omnimatch.topk_typed_edges(pairs, similarities, 4, 2, mask=jnp.array([True, False, True, True]))
    assert edges_of(masked) == [(1, 0, 0), (2, 0, 0), (0, 1, 0), (2, 1, 0), (0, 2, 0), (1, 2, 0)]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        omnimatch.topk_typed_edges(pairs, similarities, 4, 0)


def test_thresholded_edges_go_both_ways():
    pairs, similarities = random_pairs()
    mask = jnp.arange(len(pairs)) != 2
    found = omnimatch.thresholded_typed_edges(jnp.asarray(pairs), jnp.asarray(similarities), 0.75, mask)
    expected = {
        e for i, ((u, v), s) in enumerate(zip(pairs.tolist(), similarities, strict=True)) if i != 2
        for r in range(3) if s[r] >= 0.75 for e in ((u, v, r), (v, u, r))
    }  # fmt: skip
    assert set(edges_of(found)) == expected and len(edges_of(found)) == len(expected)


def test_buckets():
    assert [omnimatch.bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 64, 65, 97, 1000)] == [
        16, 16, 24, 24, 32, 48, 64, 64, 96, 128, 1024,
    ]  # fmt: skip


def test_a_graph_is_padded_without_effect_and_without_a_second_compilation():
    pairs, similarities = random_pairs(13)
    features = np.random.default_rng(1).normal(size=(13, 5)).astype(np.float32)
    graph = omnimatch.typed_graph(features, pairs, similarities, 2, -1.0)
    assert graph["features"].shape == (16, 5) and graph["src"].shape == (16 * 3 * 2,)
    assert edges_of([graph[k] for k in ("src", "dst", "rel", "mask")]) == nearest(pairs, similarities, 13, 2, -1.0)
    encoder = RGCNEncoder(3, (4,), 4, relation_init="per_relation")
    params = omnimatch.init_encoder(encoder, jax.random.key(0), 5)
    h = omnimatch.encode(encoder, params, graph)
    src, dst, rel = np.array(nearest(pairs, similarities, 13, 2, -1.0), np.int32).T
    bare = encoder.apply({"params": params}, jnp.asarray(features), *(jnp.asarray(v) for v in (src, dst, rel)))
    np.testing.assert_allclose(h[:13], bare, atol=1e-5)
    np.testing.assert_array_equal(h[13:], 0)
    traced = []
    run = jax.jit(lambda g: traced.append(1) or omnimatch.encode(encoder, params, g))
    again, values = random_pairs(15, seed=4, drop=9)
    other = omnimatch.typed_graph(np.ones((15, 5), np.float32), again, values, 2)
    run(graph), run(other)
    assert len(traced) == 1
    cut = omnimatch.without_edges(graph)
    assert not cut["mask"].any()
    alone = omnimatch.encode(encoder, params, cut)
    assert not np.allclose(alone, h, atol=1e-2) and cut["features"] is graph["features"]
    # more neighbours than there are: a padded pair would show
    every = omnimatch.typed_graph(features, pairs, similarities, 14)
    assert edges_of([every[k] for k in ("src", "dst", "rel", "mask")]) == nearest(pairs, similarities, 13, 14, -1.0)
    thresholded = omnimatch.typed_graph(features, pairs, similarities, threshold=0.75)
    assert int(thresholded["mask"].sum()) == 2 * int((similarities >= 0.75).sum())


def test_bad_graphs():
    pairs, similarities = random_pairs()
    features = np.zeros((9, 2), np.float32)
    with pytest.raises(ValueError, match="no candidate pair of columns: nothing can be discovered within one table"):
        omnimatch.typed_graph(features, pairs[:0], similarities[:0])
    with pytest.raises(ValueError, match="pairs name column 8, but there are 5"):
        omnimatch.typed_graph(features[:5], pairs, similarities)
    with pytest.raises(ValueError, match="must be finite"):
        omnimatch.typed_graph(features, pairs, np.full_like(similarities, np.nan))
    with pytest.raises(ValueError, match="must be finite"):
        omnimatch.typed_graph(np.full_like(features, np.inf), pairs, similarities)


# --- triplets and objectives ------------------------------------------------------------------------------------------


def test_triplets_by_hand():
    joins = np.array([[0, 3], [4, 5], [7, 1], [8, 9]])
    non_joins = np.array([[0, 4], [0, 5], [1, 3], [6, 0]])
    # the anchor of (7, 1) is 1, for 7 has no partner; (8, 9) has none at all
    expected = [[0, 3, 4], [0, 3, 5], [0, 3, 6], [4, 5, 0], [1, 7, 3]]
    found = omnimatch.build_triplets(joins, non_joins)
    assert found.tolist() == expected and found.dtype == np.int32
    with pytest.raises(ValueError, match="no join pair has a known non-join partner"):
        omnimatch.build_triplets(joins[3:], non_joins)
    with pytest.raises(ValueError, match="there is no triplet to learn from"):
        omnimatch.build_triplets(joins[:0], non_joins)


def test_the_released_codes_lost_negatives():
    joins = np.array([[0, 3], [3, 5], [8, 4], [1, 6]])
    non_joins = np.array([[0, 4], [0, 5], [1, 4], [2, 5], [4, 6], [5, 7], [1, 5]])
    official = omnimatch.build_triplets(joins, non_joins, "official")
    np.testing.assert_array_equal(official, GOLDEN["neg/triplets"])
    assert len(omnimatch.build_triplets(joins, non_joins)) > len(official)


def golden_case():
    params = {c: {k: jnp.asarray(GOLDEN[f"{c}/{k}"]) for k in ("weight", "loop", "bias")} for c in ("conv1", "conv2")}
    edges = {k: jnp.asarray(GOLDEN[k], jnp.int32) for k in ("src", "dst", "rel")}
    graph = {"features": jnp.asarray(GOLDEN["x"]), **edges, "mask": jnp.ones(30, bool)}
    batch = {"triplet": jnp.asarray(GOLDEN["triplets"], jnp.int32), "mask": jnp.ones(12, bool)}
    return {"encoder": params}, graph, batch


def test_the_objective_and_its_gradient_equal_the_released_codes():
    params, graph, batch = golden_case()
    objective = omnimatch.triplet_objective(RGCNEncoder(3, (5,), 5), 0.5)

    def value(params):
        context = Context(rng=jax.random.key(0), artefacts={"graph": graph})
        outputs, _ = objective.forward({"params": params}, batch, context)
        loss = objective.loss(outputs, batch, context)
        return reduce_mean(loss.elements), loss.metrics["ordered"]

    (loss, ordered), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    np.testing.assert_allclose(loss, GOLDEN["loss"], atol=1e-5)
    for c in ("conv1", "conv2"):
        for k in ("weight", "loop", "bias"):
            np.testing.assert_allclose(grads["encoder"][c][k], GOLDEN[f"grad/{c}/{k}"], atol=1e-5)
    h = GOLDEN["h"]
    away = lambda i: np.linalg.norm(h[GOLDEN["triplets"][:, 0]] - h[GOLDEN["triplets"][:, i]], axis=1)  # noqa: E731
    np.testing.assert_allclose(ordered, np.mean(away(1) < away(2)))


def test_the_loss_is_zero_once_negatives_lie_further_by_the_margin():
    objective = omnimatch.triplet_objective(RGCNEncoder(1), 0.5)
    outputs = {
        "embedding": jnp.zeros((3, 1)), "positive": jnp.array([[1.0], [1.0], [1.0]]),
        "negative": jnp.array([[1.6], [1.4], [0.25]]),
    }  # fmt: skip
    batch = {"triplet": jnp.zeros((3, 3), jnp.int32), "mask": jnp.array([True, True, False])}
    loss = objective.loss(outputs, batch, Context(rng=jax.random.key(0)))
    np.testing.assert_allclose(loss.elements.values, [0, 0.1, 0], atol=1e-5)
    assert float(loss.metrics["ordered"]) == 1 and loss.elements.unit == "example"


def test_graphs_as_constants_or_artefacts():
    params, graph, batch = golden_case()
    encoder = RGCNEncoder(3, (5,), 5)
    kept = omnimatch.triplet_objective(encoder, graph=graph)
    variables = kept.init(jax.random.key(0), batch)
    assert variables["constants"]["graph"].keys() == graph.keys()
    context = Context(rng=jax.random.key(0), artefacts={"graph": omnimatch.without_edges(graph)})
    whole = kept.forward({**variables, "params": params}, batch, context)[0]
    np.testing.assert_allclose(whole["negative"], GOLDEN["h"][GOLDEN["triplets"][:, 2]], atol=1e-5)
    bare = kept.forward({"params": params}, batch, context)[0]
    assert not np.allclose(bare["negative"], whole["negative"], atol=1e-2)
    for objective in (omnimatch.triplet_objective(encoder), omnimatch.pair_objective(encoder, omnimatch.PairMLP())):
        with pytest.raises(ValueError, match="without a graph the parameters' shapes are unknown"):
            objective.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="margin must not be negative, got -1"):
        omnimatch.triplet_objective(encoder, -1.0)
    with pytest.raises(ValueError, match="positive_weight must be positive, got 0"):
        omnimatch.pair_objective(encoder, omnimatch.PairMLP(), 0.0)


def mlp_params():
    dense = lambda n: {"kernel": jnp.asarray(GOLDEN[f"mlp/W{n}"].T), "bias": jnp.asarray(GOLDEN[f"mlp/b{n}"])}  # noqa: E731
    return {"hidden": dense(1), "out": dense(2)}


def test_the_scorer_equals_the_released_codes():
    u, v = jnp.asarray(GOLDEN["mlp/u"]), jnp.asarray(GOLDEN["mlp/v"])
    found = omnimatch.PairMLP().apply({"params": mlp_params()}, u, v)
    np.testing.assert_allclose(found, GOLDEN["mlp/score"], atol=1e-5)
    pairs = jnp.array([[0, 5], [3, 6], [7, 1]], jnp.int32)
    h = np.concatenate([u, v])
    w1, b1, w2, b2 = (GOLDEN[f"mlp/{k}"] for k in ("W1", "b1", "W2", "b2"))

    def one(i, j):
        return 1 / (1 + np.exp(-float(w2[0] @ np.maximum(w1 @ np.concatenate([h[i], h[j]]) + b1, 0) + b2[0])))

    expected = [(one(i, j) + one(j, i)) / 2 for i, j in pairs.tolist()]
    scores = omnimatch.pair_scores(omnimatch.PairMLP(), mlp_params(), jnp.asarray(h), pairs, block=2)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("with_encoder", [True, False])
def test_weighted_cross_entropy_on_pairs(with_encoder):
    params, graph, _ = golden_case()
    encoder = RGCNEncoder(3, (5,), 5) if with_encoder else None
    objective = omnimatch.pair_objective(encoder, omnimatch.PairMLP(), 2.0, graph)
    batch = {"pair": jnp.array([[0, 1], [4, 2], [8, 8]], jnp.int32), "label": jnp.array([1, 0, 7]),
             "mask": jnp.array([True, True, False])}  # fmt: skip
    variables = objective.init(jax.random.key(1), batch)
    assert ("encoder" in variables["params"]) == with_encoder
    context = Context(rng=jax.random.key(0))
    scorer = variables["params"]["scorer"]
    if with_encoder:
        variables = {**variables, "params": {**params, "scorer": scorer}}
    h = GOLDEN["h"] if with_encoder else GOLDEN["x"]
    z = np.asarray(omnimatch.PairMLP().apply({"params": scorer}, jnp.asarray(h[[0, 4]]), jnp.asarray(h[[1, 2]])))
    outputs, _ = objective.forward(variables, batch, context)
    loss = objective.loss(outputs, batch, context)
    expected = [2 * np.log1p(np.exp(-z[0])), np.log1p(np.exp(z[1])), 0]
    np.testing.assert_allclose(loss.elements.values, expected, atol=1e-5)
    assert loss.elements.mask.tolist() == [True, True, False]


def test_weighted_cross_entropy_equals_the_released_codes():
    objective = omnimatch.pair_objective(None, omnimatch.PairMLP(), 2)
    logits = jnp.concatenate([jnp.asarray(GOLDEN["pos"]), jnp.asarray(GOLDEN["neg"])])
    batch = {"label": jnp.arange(21) < 6, "mask": jnp.ones(21, bool)}
    loss = objective.loss({"logits": logits}, batch, Context(rng=jax.random.key(0)))
    np.testing.assert_allclose(reduce_mean(loss.elements), GOLDEN["bce"], atol=1e-5)


# --- scores and metrics -----------------------------------------------------------------------------------------------


def test_scores_are_one_minus_distances():
    h = jnp.array([[1.0, 0], [0, 1], [1, 0], [-1, 0]])
    pairs = jnp.array([[0, 1], [0, 2], [3, 0]], jnp.int32)
    for block in (1, 2, 8):
        np.testing.assert_allclose(omnimatch.join_scores(h, pairs, block), [1 - 2**0.5, 1, -1], atol=1e-6)
    np.testing.assert_array_equal(omnimatch.join_scores(h, pairs[:, ::-1]), omnimatch.join_scores(h, pairs))


PAIRS = np.array([[0, 2], [0, 3], [1, 2], [1, 3], [0, 4], [2, 4], [1, 4]])
LABELS = np.array([True, False, False, True, False, False, False])
SCORES = np.array([0.7, 0.8, 0.7, 0.2, 0.1, 0.7, 0.3], np.float32)


def test_ranks_by_hand_with_ties():
    higher, equal = omnimatch.join_ranks(SCORES, LABELS, PAIRS)
    # (0, 2) at 0.7: of column 0's non-joins 0.8 is higher; of column 2's two are equal.
    # (1, 3) at 0.2: of column 1's 0.7 and 0.3 are higher; of column 3's 0.8
    assert higher.tolist() == [1, 0, 2, 1] and equal.tolist() == [0, 2, 0, 0]
    found = omnimatch.join_metrics(SCORES, LABELS, PAIRS)
    assert found["mrr"] == pytest.approx(np.mean([1 / 2, (1 + 1 / 2 + 1 / 3) / 3, 1 / 3, 1 / 2]))
    assert found["hits_1"] == pytest.approx(np.mean([0, 1 / 3, 0, 0]))
    assert found["hits_3"] == found["hits_10"] == 1
    assert omnimatch.join_metrics(SCORES, LABELS, PAIRS, (2,))["hits_2"] == pytest.approx(np.mean([1, 2 / 3, 0, 1]))
    # thresholds 0.8, 0.7, 0.3, 0.2: one hit among the first four (three tie), the other at the sixth
    assert found["average_precision"] == pytest.approx(0.5 * 1 / 4 + 0.5 * 2 / 6)
    assert found["best_f1"] == pytest.approx(2 * 2 / (6 + 2))


def test_separable_scores_are_perfect():
    found = omnimatch.join_metrics(np.where(LABELS, 0.9, 0.1).astype(np.float32), LABELS, PAIRS)
    assert set(found.values()) == {1.0}
    higher, equal = omnimatch.join_ranks(np.array([0.5, 0.1]), np.array([True, False]), np.array([[0, 1], [2, 3]]))
    assert higher.tolist() == [0, 0] == equal.tolist()
    for labels, message in ((np.zeros(7, bool), "joins are all 0"), (np.ones(7, bool), "joins are all 1")):
        with pytest.raises(ValueError, match=message):
            omnimatch.join_metrics(SCORES, labels, PAIRS)
    with pytest.raises(ValueError, match="scores must be finite"):
        omnimatch.join_metrics(SCORES * np.nan, LABELS, PAIRS)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_edges_never_need_all_pairs_of_columns():
    text = str(
        jax.make_jaxpr(lambda p, s: omnimatch.topk_typed_edges(p, s, 3000, 3))(
            jnp.zeros((500, 2), jnp.int32), jnp.zeros((500, 5))
        )
    )
    sizes = [int(np.prod([int(v) for v in s.split(",")])) for s in re.findall(r"(?:f32|i32|bool)\[([\d,]+)\]", text)]
    assert max(sizes) <= 3000 * 3 * 5
