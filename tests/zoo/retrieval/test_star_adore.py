"""STAR and ADORE against the released code's numbers, loops from the definition, hand cases, masks and gradients."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.stream import training_stream
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Run
from trainers.record import Record
from trainers.step import phase_key
from zoo.base import Context, reduce_mean, total_loss
from zoo.nn.mlp import MLP
from zoo.nn.retriever import query_tower, two_towers
from zoo.retrieval import star_adore

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "star_adore_official.npz")
LOG2 = math.log(2)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


# --- the released code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["inbatch", "star", "random"])
def test_star_and_its_baselines_are_the_released_codes(which):
    q, x, o, rel, hard = (jnp.asarray(GOLDEN[k]) for k in ("q", "x", "o", "rel", "hard"))

    def loss(q):
        values, mask = star_adore.star_pairs(
            q, x, None if which == "inbatch" else o.reshape(-1, o.shape[-1]),
            None if which == "random" else rel > 0, None if which == "inbatch" else hard > 0,
        )  # fmt: skip
        return jnp.sum(values) / jnp.sum(mask)

    value, grad = jax.value_and_grad(loss)(q)
    np.testing.assert_allclose(value, GOLDEN[f"{which}_loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, GOLDEN[f"{which}_grad"], atol=1e-6)


@pytest.mark.parametrize("cut", [12, 3, 1])
def test_adore_is_the_released_codes(cut):
    q, index, positives = (jnp.asarray(GOLDEN[k]) for k in ("q", "D", "positives"))
    values, found = star_adore.adore_loss(q, index, positives, 12, cut, 16)
    np.testing.assert_array_equal(found, GOLDEN["found"])
    np.testing.assert_allclose(values, GOLDEN[f"adore_{cut}_losses"], rtol=1e-5, atol=1e-7)
    grad = jax.grad(lambda q: jnp.sum(star_adore.adore_loss(q, index, positives, 12, cut, 16)[0]))(q)
    np.testing.assert_allclose(grad, GOLDEN[f"adore_{cut}_grad"], atol=1e-6)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_positives_and_negatives_are_drawn_uniformly_from_real_ids():
    keys = jax.random.split(jax.random.key(0), 3000)
    rows = jnp.tile(jnp.array([[-1, 7, -1, 3, 9]]), (3000, 1))
    drawn = np.asarray(star_adore.sample_positive(keys, rows))
    assert set(drawn) == {7, 3, 9} and min(np.bincount(drawn)[[7, 3, 9]]) > 900
    two = np.asarray(star_adore.sample_hard(keys, rows, 2))
    assert two.shape == (3000, 2) and 0.2 < np.mean(two[:, 0] == two[:, 1]) < 0.5  # with replacement
    empty = star_adore.sample_hard(keys[:2], jnp.full((2, 3), -1), 2)
    assert (np.asarray(empty) == -1).all()
    anywhere = np.asarray(star_adore.sample_random(keys, 5, 1))
    assert set(anywhere.ravel()) == set(range(5)) and min(np.bincount(anywhere.ravel())) > 480
    # a query's draws are its own key's
    np.testing.assert_array_equal(star_adore.sample_hard(keys[5:9], rows[5:9], 2), two[5:9])


def test_mined_negatives_lose_the_positives():
    found = jnp.array([[4, 1, 9, 2, 7], [3, 8, 5, 0, 6]])
    got = star_adore.clean_negatives(found, jnp.array([[1, 4], [6, -1]]), 4)
    np.testing.assert_array_equal(got, [[9, 2, 7, -1], [3, 8, 5, 0]])
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\], the documents found; got 6"):
        star_adore.clean_negatives(found, jnp.array([[1], [1]]), 6)


# --- STAR -------------------------------------------------------------------------------------------------------------


def test_masks_by_hand():
    positives = jnp.array([[5, -1], [6, 5], [7, -1], [8, -1]])
    documents = jnp.array([5, 6, 7, -1])
    mask = jnp.array([True, True, False, True])
    got = star_adore.pair_masks(positives, documents, mask, mask)
    # document 5 answers queries 0 and 1; row 2 is padding, both as a query and as the owner of document 7
    np.testing.assert_array_equal(got, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])


def test_equal_scores_give_log_2_and_only_the_diagonal_is_left_out():
    x = jnp.ones((5, 3))
    off = ~jnp.eye(5, dtype=bool)
    values, mask = star_adore.star_pairs(x, x, x, off, jnp.ones((5, 5), bool))
    assert int(mask.sum()) == 20 + 25
    np.testing.assert_allclose(values[mask], LOG2, rtol=1e-6)


def test_random_weight_weighs_two_means():
    rng = np.random.default_rng(1)
    q, d, h = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(3))
    rel, hard = jnp.asarray(rng.random((4, 4)) < 0.4), jnp.asarray(rng.random((4, 4)) < 0.7)
    s, t = np.asarray(q @ d.T), np.asarray(q @ h.T)
    first = np.mean([softplus(s[i, j] - s[i, i]) for i in range(4) for j in range(4) if rel[i, j]])
    second = np.mean([softplus(t[i, j] - s[i, i]) for i in range(4) for j in range(4) if hard[i, j]])
    values, mask = star_adore.star_pairs(q, d, h, rel, hard, 0.25)
    assert float(values.sum() / mask.sum()) == pytest.approx(0.25 * first + second, rel=1e-5)
    with pytest.raises(ValueError, match="both must be there"):
        star_adore.star_pairs(q, d, None, rel, None, 0.25)
    with pytest.raises(ValueError, match="no negatives"):
        star_adore.star_pairs(q, d, None, None, None)


def batch_of(rng, b=8, n=20):
    positives = np.stack([rng.permutation(n)[:2] for _ in range(b)]).astype(np.int32)
    positives[1, 1] = -1
    positives[2] = -1  # a query without a positive takes no part
    return {
        "query": jnp.asarray(rng.normal(size=(b, 3)), jnp.float32),
        "positives": jnp.asarray(positives),
        "index": jnp.arange(b, dtype=jnp.int32),
        "mask": jnp.arange(b) < b - 1,
    }


@pytest.mark.parametrize(
    ("negatives", "in_batch"), [("hard", True), ("hard", False), ("random", False), ("none", True)]
)
def test_the_objective_is_its_loop(negatives, in_batch):
    rng = np.random.default_rng(2)
    batch = batch_of(rng)
    corpus = jnp.asarray(rng.normal(size=(20, 4)), jnp.float32)
    table = jnp.asarray(rng.integers(0, 20, (8, 5)), jnp.int32)
    objective = star_adore.star(two_towers(MLP((4,), 3), MLP((4,), 3)), negatives, in_batch, 2)
    batch["document"] = corpus[:8]
    variables = objective.init(jax.random.key(0), batch)
    context = Context(rng=jax.random.key(3), artefacts={"corpus": corpus, "negatives": table})
    outputs, _ = objective.forward(variables, batch, context)
    loss = objective.loss(outputs, batch, context)
    apply = lambda part, x: np.asarray(MLP((4,), 3).apply({"params": variables["params"][part]}, x))  # noqa: E731
    q = apply("query", batch["query"])
    ids = np.asarray(outputs["document_id"])
    relevant = [set(row[row >= 0].tolist()) for row in np.asarray(batch["positives"])]
    assert all((i in r) or (i == -1 and not r) for i, r in zip(ids, relevant, strict=True))
    vectors = apply("document", corpus)
    expected, pairs = [], []
    real = [i for i in range(8) if batch["mask"][i] and relevant[i]]
    if in_batch:
        for i in real:
            for j in real:
                if ids[j] not in relevant[i]:
                    expected.append(softplus(q[i] @ vectors[ids[j]] - q[i] @ vectors[ids[i]]))
                    pairs.append((i, j))
    if negatives != "none":
        hard = np.asarray(outputs["hard_id"])
        if negatives == "hard":
            assert all(set(hard[i]) <= set(np.asarray(table[i]).tolist()) for i in range(8))
        for i in real:
            for j in range(8):
                for h in range(2):
                    if batch["mask"][j] and hard[j, h] not in relevant[i]:
                        expected.append(softplus(q[i] @ vectors[hard[j, h]] - q[i] @ vectors[ids[i]]))
                        pairs.append((i, j))
    assert float(reduce_mean(loss.elements)) == pytest.approx(np.mean(expected), rel=1e-5)
    mask = np.asarray(loss.elements.mask)
    np.testing.assert_array_equal(np.asarray(loss.elements.index)[mask], pairs)
    np.testing.assert_allclose(np.asarray(loss.elements.values)[mask], expected, rtol=1e-4, atol=1e-6)
    assert float(loss.metrics["wrong_order"]) == pytest.approx(np.mean(np.array(expected) > LOG2 + 1e-6))


def test_both_towers_learn_from_star():
    rng = np.random.default_rng(4)
    batch = {**batch_of(rng), "document": jnp.ones((8, 4))}
    artefacts = {"corpus": jnp.asarray(rng.normal(size=(20, 4)), jnp.float32), "negatives": jnp.ones((8, 5), jnp.int32)}
    objective = star_adore.star(two_towers(MLP((4,), 3), MLP((4,), 3)))
    variables = objective.init(jax.random.key(0), batch)

    def total(params):
        context = Context(rng=jax.random.key(0), artefacts=artefacts)
        outputs, _ = objective.forward({"params": params}, batch, context)
        return total_loss(objective.loss(outputs, batch, context), None, (), context, "mean")[0]

    for part, grads in jax.grad(total)(variables["params"]).items():
        assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads)), part


def test_star_refuses():
    tower = query_tower(MLP((4,), 3))
    for arguments, says in (
        (("cold",), "negatives must be 'hard', 'random' or 'none', got 'cold'"),
        (("none", False), "leaves nothing to learn from"),
        (("hard", True, 0), "count must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            star_adore.star(tower, *arguments)


# --- ADORE ------------------------------------------------------------------------------------------------------------


def adore_loop(q, index, positives, k, cut):
    out = []
    for row, own in zip(q, positives, strict=True):
        own = [p for p in own if p >= 0]
        scores = index @ row
        found = sorted(range(len(index)), key=lambda j: (-scores[j], j))[:k]
        ids = found if set(own) & set(found) else found + own
        gain = {j: (1 / (r + 1) if r < min(cut, k) else 0.0) for r, j in enumerate(found)}
        pairs = [
            abs(gain.get(a, 0.0) - gain.get(b, 0.0)) * softplus(scores[b] - scores[a])
            for a in ids
            if a in own
            for b in ids
            if b not in own
        ]
        out.append(np.mean(pairs) if pairs else 0.0)
    return np.array(out)


@pytest.mark.parametrize(("k", "cut", "chunk"), [(5, 5, 4), (12, 3, 100), (1, 9, 7)])
def test_adore_is_its_loop(k, cut, chunk):
    rng = np.random.default_rng(5)
    q, index = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(23, 4)).astype(np.float32)
    positives = np.stack([rng.permutation(23)[:3] for _ in range(9)]).astype(np.int32)
    positives[::2, 1] = -1
    positives[4] = -1
    got, _ = star_adore.adore_loss(jnp.asarray(q), jnp.asarray(index), jnp.asarray(positives), k, cut, chunk)
    np.testing.assert_allclose(got, adore_loop(q, index, positives, k, cut), rtol=1e-5, atol=1e-6)
    assert got[4] == 0


def test_permuting_the_index_permutes_ids_only():
    rng = np.random.default_rng(6)
    q, index = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 3), (15, 3)))
    positives, order = jnp.array([[3], [9], [0], [14]]), jnp.asarray(rng.permutation(15))
    at = jnp.argsort(order)
    a, ids = star_adore.adore_loss(q, index, positives, 6, 6)
    b, moved = star_adore.adore_loss(q, index[order], at[positives], 6, 6)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_array_equal(order[moved], ids)


def test_no_gradient_reaches_the_index():
    rng = np.random.default_rng(7)
    q, index = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 3), (15, 3)))
    grads = jax.grad(lambda q, d: jnp.sum(star_adore.adore_loss(q, d, jnp.array([[3]] * 4), 6, 6)[0]), (0, 1))(q, index)
    assert float(jnp.abs(grads[0]).max()) > 0 and float(jnp.abs(grads[1]).max()) == 0


def test_adore_refuses():
    tower = query_tower(MLP((4,), 3))
    for cut in (0, None, -3):
        with pytest.raises(ValueError, match="metric_cut must be a positive int"):
            star_adore.adore(tower, 5, cut)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        star_adore.adore(tower, 0)
    with pytest.raises(ValueError, match=r"k must be in \[1, 15\], the number of documents; got 16"):
        star_adore.adore_loss(jnp.ones((1, 3)), jnp.ones((15, 3)), jnp.array([[1]]), 16)


def test_adore_moves_the_query_tower_alone_and_learns():
    rng = np.random.default_rng(8)
    towers = two_towers(MLP((8,), 4), MLP((8,), 4))
    arrays = {"query": rng.normal(size=(32, 3)).astype(np.float32), "document": np.zeros((32, 3), np.float32)}
    arrays["positives"] = rng.integers(0, 30, (32, 1)).astype(np.int32)
    index = rng.normal(size=(30, 4)).astype(np.float32)
    objective = star_adore.adore(towers, 10, 10)
    init = lambda r: objective.init(r, {k: jnp.asarray(v) for k, v in arrays.items()})  # noqa: E731
    phases = [
        Fit("index", lambda v, a, r: FitResult({}, {"index": index})),
        Train("adore", 60, objective, optax.adam(1e-2), training_stream(arrays, 16), sharded=("index",)),
    ]
    record = Record()
    result = Loop(Run(phases, export=None, init=init), Settings(Parallel(devices=1), 1, 1), record=record)()
    losses = [line["mrr"] for line in record.history if "mrr" in line]
    first = init(phase_key(jnp.uint32(0), "init", jnp.int32(0)))["params"]
    for a, b in zip(
        jax.tree.leaves(first["document"]), jax.tree.leaves(result.variables["params"]["document"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert np.mean(losses[-5:]) > 2 * np.mean(losses[:5])
