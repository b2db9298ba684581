"""ANNCUR against the released code's numbers, loops from the definition, exact cases, counts of calls and bad input."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from zoo.base import Context, reduce_mean
from zoo.losses.retrieval import in_batch_softmax
from zoo.metrics.ranking import topk_overlap
from zoo.nn.bert import BERTConfig
from zoo.nn.cross_encoder import CrossEncoder, join_pairs
from zoo.nn.retriever import DenseRetriever, WeightedWords, shared_towers
from zoo.retrieval import anncur

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "anncur_official.npz")
RNG = np.random.default_rng(3)


def table(queries, ids):
    """Scores by look-up: a query is its own row of the matrix."""
    return jnp.take_along_axis(queries, ids, 1)


def low_rank(queries=12, items=30, rank=4, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(queries, rank)) @ rng.normal(size=(rank, items))).astype(np.float32)


def overlap(ids, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(np.asarray(ids), np.asarray(truth), strict=True)])


def top(scores, k):
    return np.argsort(-np.asarray(scores), 1, kind="stable")[:, :k]


# --- the released code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [0, 1])
def test_embeddings_and_predictions_are_the_released_codes(case):
    m, rows, cols = GOLDEN["M"], GOLDEN[f"rows{case}"], GOLDEN[f"cols{case}"]
    index = anncur.cur_fit(jnp.asarray(m[rows]), jnp.asarray(cols), 1e-15)
    np.testing.assert_allclose(index.item_embeddings.T, GOLDEN[f"latent_cols{case}"], atol=2e-5)
    row = anncur.cur_scores(jnp.asarray(m[[0, 7]][:, cols]), index)
    np.testing.assert_allclose(row, GOLDEN[f"complete_row{case}"], atol=5e-5)
    # preference cols: the transposed problem
    turned = anncur.cur_fit(jnp.asarray(m[:, cols].T), jnp.asarray(rows), 1e-15)
    column = anncur.cur_scores(jnp.asarray(m[rows][:, [3, 50]].T), turned)
    np.testing.assert_allclose(column.T, GOLDEN[f"complete_col{case}"], atol=5e-5)
    best = anncur.cur_oracle(jnp.asarray(m), jnp.asarray(rows), jnp.asarray(cols), 1e-15)
    found = anncur.cur_scores(jnp.asarray(m[[1, 2, 30]][:, cols]), best)
    np.testing.assert_allclose(found, GOLDEN[f"oracle{case}"], atol=2e-4)


@pytest.mark.parametrize("case", [0, 1])
def test_the_released_evaluation(case):
    m, rows, cols = GOLDEN["M"], GOLDEN[f"rows{case}"], GOLDEN[f"cols{case}"]
    k, k_r = (int(x) for x in GOLDEN[f"sizes{case}"])
    index = anncur.cur_fit(jnp.asarray(m[rows]), jnp.asarray(cols), 1e-15)
    found = jax.jit(anncur.cur_search, static_argnums=(0, 3, 4, 5))(table, jnp.asarray(m), index, k, k_r, "official")
    share = np.asarray(topk_overlap(found.ids, jnp.asarray(top(m, k))))
    others = np.setdiff1d(np.arange(len(m)), rows)
    groups = (rows, others, np.arange(len(m)))
    np.testing.assert_allclose([share[g].mean() for g in groups], GOLDEN[f"frac{case}"], atol=5.1e-5)
    for group, wanted in zip(groups, GOLDEN[f"error{case}"], strict=True):
        error = anncur.relative_error(jnp.asarray(m[group][:, cols]), index, jnp.asarray(m[group]), 7)
        np.testing.assert_allclose(error, wanted, rtol=1e-4)
    np.testing.assert_array_equal(found.scorer_calls, len(cols) + k_r)


def test_losses_and_overlap_are_the_released_codes():
    q, p, n = (jnp.asarray(GOLDEN[x]) for x in "qpn")
    scores = jnp.concatenate([jnp.sum(q * p, 1)[:, None], jnp.einsum("bd,bmd->bm", q, n)], 1)
    real = jnp.ones(scores.shape, bool)
    np.testing.assert_allclose(jnp.mean(anncur.example_losses(scores, real)), GOLDEN["negs_loss"], rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(anncur.example_losses(scores, real)), GOLDEN["ce_loss"], rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(anncur.example_losses(scores, real, "bce")), GOLDEN["bce_loss"], rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(in_batch_softmax(q, p)), GOLDEN["in_batch_loss"], rtol=1e-5)
    share = np.asarray(topk_overlap(jnp.asarray(GOLDEN["list1"]), jnp.asarray(GOLDEN["list2"])))
    np.testing.assert_allclose([share.mean(), share.std()], GOLDEN["overlap"], atol=5.1e-5)


# --- the decomposition ------------------------------------------------------------------------------------------------


def test_the_inverse_is_moore_penroses_with_a_relative_cutoff():
    a = RNG.normal(size=(7, 4)).astype(np.float32)
    np.testing.assert_allclose(anncur.pseudo_inverse(jnp.asarray(a)), np.linalg.pinv(a), atol=1e-5)
    u, _, vt = np.linalg.svd(a, full_matrices=False)
    shrunk = (u * [10.0, 1.0, 0.5, 0.2]) @ vt
    # 0.05 of the largest: 0.2 and 0.5 go (0.5 = the cutoff itself is not above it)
    wanted = (vt.T[:, :2] / [10.0, 1.0]) @ u.T[:2]
    np.testing.assert_allclose(anncur.pseudo_inverse(jnp.asarray(shrunk, jnp.float32), 0.0501), wanted, atol=1e-5)
    wanted = (vt.T[:, :3] / [10.0, 1.0, 0.5]) @ u.T[:3]
    np.testing.assert_allclose(anncur.pseudo_inverse(jnp.asarray(shrunk, jnp.float32), 0.0499), wanted, atol=1e-5)
    # ridge: (A^T A + lambda I)^-1 A^T with lambda = ridge s_max^2
    wanted = np.linalg.solve(shrunk.T @ shrunk + 0.01 * 100 * np.eye(4), shrunk.T)
    np.testing.assert_allclose(anncur.pseudo_inverse(jnp.asarray(shrunk, jnp.float32), 0.0, 0.01), wanted, atol=1e-5)
    np.testing.assert_array_equal(anncur.pseudo_inverse(jnp.zeros((3, 2))), np.zeros((2, 3)))


def test_low_rank_scores_are_predicted_exactly_and_equivariantly():
    m = low_rank()
    rows, cols = jnp.asarray(m[:6]), jnp.asarray([2, 7, 11, 18, 29])
    index = anncur.cur_fit(rows, cols)
    own = jnp.asarray(m[6:, np.asarray(cols)])
    found = anncur.cur_scores(own, index)
    np.testing.assert_allclose(found, m[6:], atol=1e-4)
    # C U C = C on the intersection
    c = np.asarray(rows)[:, np.asarray(cols)]
    u = np.asarray(anncur.pseudo_inverse(jnp.asarray(c)))
    np.testing.assert_allclose(c @ u @ c, c, atol=1e-4)
    # the embeddings of the anchors themselves are U C
    np.testing.assert_allclose(index.item_embeddings[np.asarray(cols)].T, u @ c, atol=1e-5)
    # items permuted: scores permuted
    order = np.random.default_rng(1).permutation(30)
    place = np.argsort(order)
    turned = anncur.cur_fit(rows[:, order], jnp.asarray(place[np.asarray(cols)]))
    own_turned = jnp.asarray(m[6:][:, order][:, np.asarray(turned.anchor_items)])
    np.testing.assert_allclose(anncur.cur_scores(own_turned, turned), np.asarray(found)[:, order], atol=1e-4)
    # scores scaled, the cutoff is relative
    scaled = anncur.cur_fit(1e-5 * rows, cols)
    np.testing.assert_allclose(anncur.cur_scores(1e-5 * own, scaled), 1e-5 * np.asarray(found), rtol=1e-3, atol=1e-9)


def test_anchor_queries_get_their_rows_back_and_all_items_give_the_projection():
    m = RNG.normal(size=(9, 20)).astype(np.float32)
    cols = jnp.asarray([0, 3, 4, 9, 12, 19])
    index = anncur.cur_fit(jnp.asarray(m[:4]), cols)
    np.testing.assert_allclose(anncur.cur_scores(jnp.asarray(m[:4][:, np.asarray(cols)]), index), m[:4], atol=1e-4)
    every = anncur.cur_fit(jnp.asarray(m[:4]), jnp.arange(20))
    onto = m[4:] @ np.linalg.pinv(m[:4]) @ m[:4]
    np.testing.assert_allclose(anncur.cur_scores(jnp.asarray(m[4:]), every), onto, atol=1e-4)


def test_unsorted_anchors_are_sorted_with_their_columns():
    m = low_rank()
    index = anncur.cur_fit(jnp.asarray(m[:6]), jnp.asarray([18, 2, 29, 11]))
    np.testing.assert_array_equal(index.anchor_items, [2, 11, 18, 29])
    np.testing.assert_allclose(anncur.cur_scores(jnp.asarray(m[6:, [2, 11, 18, 29]]), index), m[6:], atol=1e-4)
    anchors, columns = anncur.check_anchors([18, 2, 29, 11], 30, m[6:, [18, 2, 29, 11]])
    np.testing.assert_array_equal(anchors, [2, 11, 18, 29])
    np.testing.assert_array_equal(columns, m[6:, [2, 11, 18, 29]])
    fixed = anncur.fixed_anchor_index(jnp.asarray(m[:, [5, 1, 3]]), jnp.asarray([5, 1, 3]))
    np.testing.assert_array_equal(fixed.anchor_items, [1, 3, 5])
    np.testing.assert_array_equal(fixed.item_embeddings, m[:, [1, 3, 5]])


def test_the_dip_goes_with_a_cutoff():
    rng = np.random.default_rng(5)
    spectrum = np.exp(-np.arange(20) / 5)
    m = (
        (rng.normal(size=(60, 20)) * spectrum) @ rng.normal(size=(20, 200)) + 0.02 * rng.normal(size=(60, 200))
    ).astype(np.float32)
    rows, rest = jnp.asarray(m[:40]), m[40:]
    error = {}
    for count in (20, 40, 80):
        cols = anncur.sample_anchors(jax.random.key(count), 200, count)
        for rcond in (1e-15, 1e-2):
            index = anncur.cur_fit(rows, cols, rcond)
            own = jnp.asarray(rest[:, np.asarray(cols)])
            error[count, rcond] = float(anncur.relative_error(own, index, jnp.asarray(rest)))
    assert error[40, 1e-15] > 2 * max(error[20, 1e-15], error[80, 1e-15])
    assert error[40, 1e-2] < min(error[20, 1e-2], 0.5 * error[40, 1e-15])


def test_the_oracle_is_at_least_as_good_and_bf16_is_near():
    m = (low_rank(rank=8) + 0.1 * RNG.normal(size=(12, 30))).astype(np.float32)
    rows, cols = jnp.asarray([0, 2, 3, 5, 8, 11]), jnp.asarray([1, 4, 9, 13, 20, 27])
    own = jnp.asarray(m[:, np.asarray(cols)])
    plain = anncur.cur_fit(jnp.asarray(m)[rows], cols)
    best = anncur.cur_oracle(jnp.asarray(m), rows, cols)
    errors = [float(anncur.relative_error(own, i, jnp.asarray(m), 5)) for i in (plain, best)]
    assert errors[1] < errors[0]
    wanted = np.linalg.norm(np.asarray(own) @ np.asarray(plain.item_embeddings).T - m) / np.linalg.norm(m)
    assert errors[0] == pytest.approx(wanted, rel=1e-4)
    middle = np.linalg.pinv(np.asarray(own)) @ m @ np.linalg.pinv(m[np.asarray(rows)])
    np.testing.assert_allclose(best.item_embeddings.T, middle @ m[np.asarray(rows)], atol=2e-4)
    low = anncur.cur_fit(jnp.asarray(m)[rows], cols, dtype=jnp.bfloat16)
    assert low.item_embeddings.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(low.item_embeddings, np.float32), plain.item_embeddings, rtol=1e-2)


def test_queries_with_anchors_of_their_own():
    m = low_rank(seed=2)
    anchors = np.array([[1, 9, 4, 20, 7], [29, 0, 3, 15, 16], [5, 6, 28, 8, 22]])
    own = np.take_along_axis(m[6:9], anchors, 1)
    weights = anncur.cur_weights(jnp.asarray(m[:6]), jnp.asarray(anchors), jnp.asarray(own), batch=2)
    np.testing.assert_allclose(np.asarray(weights) @ m[:6], m[6:9], atol=1e-4)
    wanted = own[1] @ np.linalg.pinv(m[:6][:, anchors[1]], 1e-3)
    np.testing.assert_allclose(weights[1], wanted, atol=1e-4)


def test_anchors_are_uniform_distinct_and_rising():
    draw = jax.jit(jax.vmap(lambda key: anncur.sample_anchors(key, 8, 3)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    assert (np.diff(drawn, axis=1) > 0).all() and drawn.min() == 0 and drawn.max() == 7
    np.testing.assert_allclose(np.bincount(drawn.ravel()) / 2000, 3 / 8, atol=0.05)


# --- the search -------------------------------------------------------------------------------------------------------


SEARCH = jax.jit(anncur.cur_search, static_argnums=(0, 3, 4, 5), static_argnames=("chunk", "batch", "mesh"))


def by_definition(m, query, rows, cols, k, k_r):
    """The search of one query, and which items it scored exactly."""
    scored = {int(j): m[query, j] for j in cols}
    predicted = m[query, cols] @ np.linalg.pinv(m[rows][:, cols], 1e-3) @ m[rows]
    rest = [j for j in np.argsort(-predicted, kind="stable") if j not in scored][:k_r]
    scored |= {int(j): m[query, j] for j in rest}
    return sorted(scored, key=lambda j: (-scored[j], j))[:k], len(scored)


@pytest.mark.parametrize("chunk", [7, 64])
def test_the_search_is_its_definition_and_counts_its_calls(chunk):
    m = (low_rank(20, 40, 5, 4) + 0.3 * RNG.normal(size=(20, 40))).astype(np.float32)
    rows, cols = np.arange(8), np.array([3, 8, 21, 30])
    index = anncur.cur_fit(jnp.asarray(m[rows]), jnp.asarray(cols))
    asked = []

    def spy(queries, ids):
        jax.debug.callback(lambda i: asked.append(np.asarray(i).size), ids)
        return table(queries, ids)

    found = SEARCH(spy, jnp.asarray(m[8:]), index, 4, 6, chunk=chunk, batch=4)
    jax.effects_barrier()
    assert sum(asked) == 12 * 10
    for i, query in enumerate(range(8, 20)):
        wanted, calls = by_definition(m, query, rows, cols, 4, 6)
        assert found.ids[i].tolist() == wanted and int(found.scorer_calls[i]) == calls == 10
        np.testing.assert_array_equal(found.scores[i], m[query, wanted])
    # scores that are there already are counted, not computed
    asked.clear()
    again = SEARCH(spy, jnp.asarray(m[8:]), index, 4, 6, anchor_scores=jnp.asarray(m[8:, cols]), batch=4)
    jax.effects_barrier()
    assert sum(asked) == 12 * 6
    np.testing.assert_array_equal(again.ids, found.ids)
    np.testing.assert_array_equal(again.scorer_calls, found.scorer_calls)


def test_anchors_join_for_free_and_the_official_variant_leaves_them_out():
    # two anchor queries that make item 5 look bad, although it is this query's best; item 5 is an anchor
    m = np.zeros((3, 6), np.float32)
    m[0], m[1] = [1, 2, 3, 4, 5, -6], [0, 1, 0, 2, 1, -1]
    m[2] = [0, 0, 0, 1, 2, 9]
    index = anncur.cur_fit(jnp.asarray(m[:2]), jnp.asarray([5, 0]))
    paper = SEARCH(table, jnp.asarray(m[2:]), index, 2, 2)
    assert paper.ids[0].tolist()[0] == 5 and int(paper.scorer_calls[0]) == 4
    official = SEARCH(table, jnp.asarray(m[2:]), index, 2, 2, "official")
    predicted = np.asarray(anncur.cur_scores(jnp.asarray(m[2:, [0, 5]]), index))[0]
    assert sorted(official.ids[0].tolist()) == sorted(np.argsort(-predicted)[:2].tolist())
    assert int(official.scorer_calls[0]) == 4


def test_re_ranking_everything_is_exact_with_at_most_all_items_scored():
    m = RNG.normal(size=(10, 25)).astype(np.float32)
    index = anncur.cur_fit(jnp.asarray(m[:3]), jnp.asarray([4, 9, 17]))
    for variant, calls in (("paper", 25), ("official", 28)):
        found = SEARCH(table, jnp.asarray(m[3:]), index, 10, 25, variant)
        np.testing.assert_array_equal(found.ids, top(m[3:], 10))
        np.testing.assert_array_equal(found.scorer_calls, calls)


def test_recall_rises_with_anchors_up_to_the_rank():
    m = low_rank(40, 120, 6, 7)
    recall = []
    for count in (2, 6):
        cols = anncur.sample_anchors(jax.random.key(1), 120, count)
        index = anncur.cur_fit(jnp.asarray(m[:15]), cols)
        recall.append(overlap(SEARCH(table, jnp.asarray(m[15:]), index, 5, 10).ids, top(m[15:], 5)))
    assert recall[0] < recall[1] == 1.0


def test_the_search_over_devices_is_the_same():
    m = (low_rank(20, 41, 5, 4) + 0.3 * RNG.normal(size=(20, 41))).astype(np.float32)
    index = anncur.cur_fit(jnp.asarray(m[:8]), jnp.asarray([3, 8, 21, 40]))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    alone = SEARCH(table, jnp.asarray(m[8:]), index, 4, 6)
    spread = SEARCH(table, jnp.asarray(m[8:]), index, 4, 6, mesh=mesh)
    np.testing.assert_array_equal(spread.ids, alone.ids)
    np.testing.assert_array_equal(spread.scorer_calls, alone.scorer_calls)


def test_score_functions_from_pairs_and_whole_rows():
    items, queries = RNG.normal(size=(11, 3)).astype(np.float32), RNG.normal(size=(4, 3)).astype(np.float32)
    pairs = lambda q, x: jnp.sum(q["v"] * jnp.tanh(x["v"] + q["v"]), -1)  # noqa: E731
    exact = np.array([[np.sum(q * np.tanh(x + q)) for x in items] for q in queries])
    score = anncur.pair_scorer(pairs, {"v": jnp.asarray(items)}, block=5)
    ids = jnp.asarray([[3, 0, 10], [1, 1, 2], [9, 8, 7], [0, 5, 4]])
    asked = {"v": jnp.asarray(queries)}
    np.testing.assert_allclose(score(asked, ids), np.take_along_axis(exact, np.asarray(ids), 1), atol=1e-5)
    np.testing.assert_allclose(anncur.score_rows(score, asked, 11, block=4), exact, atol=1e-5)


def test_no_matrix_of_all_predictions_is_made():
    index = anncur.CURIndex(jnp.zeros((5000, 8)), jnp.arange(8, dtype=jnp.int32))

    def search(rows, index):
        return anncur.cur_search(lambda q, ids: q[:, :1] * ids, rows, index, 5, 20, chunk=256)

    text = str(jax.make_jaxpr(search)(jnp.ones((16, 2)), index))
    assert "16,5000]" not in text and "16,256]" in text


# --- training ---------------------------------------------------------------------------------------------------------

CONFIG = BERTConfig(20, 16, 1, 2, 16, 16, 2)
TAGS = (3, 4, 5)


def token_batch():
    rng = np.random.default_rng(0)
    words = lambda *shape: rng.integers(6, 20, shape).astype(np.int32)  # noqa: E731
    queries, items = words(3, 6), words(7, 4)
    queries[:, 0], queries[:, 1], queries[:, 4], queries[:, 5] = 1, 3, 4, 2
    items[:, 1], items[:, 3] = 5, 2
    candidates = np.array([[2, 0, 6], [5, -1, 1], [0, 3, -1]], np.int32)
    batch = {"query": jnp.asarray(queries), "candidates": jnp.asarray(candidates),
             "index": jnp.arange(3), "mask": jnp.ones(3, bool)}  # fmt: skip
    return batch, items


def test_losses_by_hand():
    scores, mask = jnp.array([[1.0, 0.0, 2.0, 50.0]]), jnp.array([[True, True, True, False]])
    soft = math.log(math.exp(1) + 1 + math.exp(2)) - 1
    hinge = (max(0, 0.5 - 1 + 0) + (0.5 - 1 + 2)) / 2
    bce = (math.log1p(math.exp(-1)) + (math.log(2) + math.log1p(math.exp(2))) / 2) / 2
    for kind, wanted in (("softmax", soft), ("hinge", hinge), ("hinge_squared", 1.5**2 / 2), ("bce", bce)):
        np.testing.assert_allclose(anncur.example_losses(scores, mask, kind), [wanted], rtol=1e-5)
    np.testing.assert_allclose(anncur.example_losses(scores, mask, "hinge", 3.0), [(2 + 4) / 2], rtol=1e-5)


@pytest.mark.parametrize("head", ["emb", "cls"])
def test_the_cross_encoders_objective_scores_each_pair_by_itself(head):
    batch, items = token_batch()
    module = CrossEncoder(CONFIG, head, TAGS)
    objective = anncur.cross_encoder(module)
    variables = objective.init(jax.random.key(0), batch)
    context = Context(rng=jax.random.key(1), artefacts={"items": jnp.asarray(items)}, train=False)
    outputs, _ = objective.forward(variables, batch, context)
    losses, first = [], []
    for i in range(3):
        own = []
        for j in np.asarray(batch["candidates"])[i]:
            pair = join_pairs(batch["query"][i : i + 1], jnp.asarray(items[max(j, 0)][None]))
            own.append(float(module.apply(variables, *pair)["scores"][0]))
        np.testing.assert_allclose(outputs["scores"][i], own, atol=1e-5)
        real = [s for s, j in zip(own, np.asarray(batch["candidates"])[i], strict=True) if j >= 0]
        losses.append(math.log(sum(math.exp(s) for s in real)) - real[0])
        first.append(all(real[0] > s for s in real[1:]))
    loss = objective.loss(outputs, batch, context)
    np.testing.assert_allclose(reduce_mean(loss.elements), np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(loss.metrics["first"], np.mean(first), rtol=1e-5)
    # dropout: of each pair its own, and none in evaluation
    train = context.replace(train=True)
    dropped, _ = objective.forward(variables, batch, train)
    other, _ = objective.forward(variables, {**batch, "candidates": batch["candidates"].at[:, 2].set(
        batch["candidates"][:, 0])}, train)  # fmt: skip
    assert not np.allclose(dropped["scores"], outputs["scores"])
    assert not np.allclose(other["scores"][:, 0], other["scores"][:, 2])  # one item twice, two masks


def test_a_dual_encoder_learns_the_cross_encoders_lists():
    batch, items = token_batch()
    batch = {**batch, "scores": jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)), jnp.float32)}
    towers = shared_towers(DenseRetriever(WeightedWords(20, 6), None, "mean"))
    objective = anncur.distil(towers)
    variables = objective.init(jax.random.key(0), batch)
    context = Context(rng=jax.random.key(1), artefacts={"items": jnp.asarray(items)})
    outputs, _ = objective.forward(variables, batch, context)
    q = np.asarray(towers.query(variables["params"], batch["query"], None))
    x = np.asarray(towers.document(variables["params"], jnp.asarray(items), None))
    losses = []
    for i, row in enumerate(np.asarray(batch["candidates"])):
        real = row >= 0
        s, t = q[i] @ x[row[real]].T, np.asarray(batch["scores"])[i][real]
        np.testing.assert_allclose(np.asarray(outputs["scores"])[i][real], s, atol=1e-5)
        soft = np.exp(t) / np.exp(t).sum()
        losses.append(-(soft * (s - np.log(np.exp(s).sum()))).sum())
    np.testing.assert_allclose(
        reduce_mean(objective.loss(outputs, batch, context).elements), np.mean(losses), rtol=1e-4
    )
    # no gradient to the teacher
    grad = jax.grad(lambda t: reduce_mean(objective.loss(outputs, {**batch, "scores": t}, context).elements))
    assert float(jnp.abs(grad(batch["scores"])).max()) == 0.0
    assert optax.tree.norm(jax.grad(lambda v: reduce_mean(objective.loss(
        objective.forward(v, batch, context)[0], batch, context).elements))(variables)) > 0  # fmt: skip


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "says"),
    [
        ([0, 30], r"anchor 30 is out of range: ids must lie in \[0, 30\)"),
        ([-1, 2], "anchor -1 is out of range"),
        ([4, 7, 4], "anchor 4 occurs twice"),
        ([], "anchors must be a list of ids, at least one"),
        ([0.5], "anchors must be a list of ids"),
    ],
)
def test_bad_anchors(anchors, says):
    with pytest.raises(ValueError, match=says):
        anncur.check_anchors(anchors, 30)


def test_bad_scores_sizes_and_names():
    m = low_rank()
    with pytest.raises(ValueError, match="anchor 4 occurs twice"):
        anncur.cur_fit(jnp.asarray(m), jnp.asarray([4, 4]))
    with pytest.raises(ValueError, match="31 anchor items are more than the 30 items there are"):
        anncur.cur_fit(jnp.asarray(m), jnp.arange(31))
    bad = m.copy()
    bad[3, 17] = np.nan
    with pytest.raises(ValueError, match="the score of query 3 and item 17 is nan, not finite"):
        anncur.cur_fit(jnp.asarray(bad), jnp.arange(3))
    with pytest.raises(ValueError, match="the score matrix has 30 items, the list of items 29"):
        anncur.check_scores(m, 29)
    with pytest.raises(ValueError, match=r"scores must be \[queries, items\], got \[30\]"):
        anncur.check_scores(m[0])
    with pytest.raises(ValueError, match="2 columns of scores for 3 anchors"):
        anncur.check_anchors([1, 2, 3], 30, m[:, :2])
    for count in (0, 31):
        with pytest.raises(ValueError, match=f"cannot draw {count} anchors from 30"):
            anncur.sample_anchors(jax.random.key(0), 30, count)
    index = anncur.cur_fit(jnp.asarray(m), jnp.arange(3))
    search = lambda k, k_r, **how: anncur.cur_search(table, jnp.asarray(m), index, k, k_r, **how)  # noqa: E731
    with pytest.raises(ValueError, match="asked for top-100 but only 50 items are re-ranked: raise num_rerank"):
        search(100, 50)
    with pytest.raises(ValueError, match="need 1 <= k <= num_rerank <= 30 items; got k 5, num_rerank 31"):
        search(5, 31)
    with pytest.raises(ValueError, match="need 1 <= k"):
        search(0, 5)
    with pytest.raises(ValueError, match="variant must be 'paper' or 'official', got 'code'"):
        search(1, 5, variant="code")
    with pytest.raises(ValueError, match="kind of loss must be softmax, hinge, hinge_squared or bce, got 'mse'"):
        anncur.cross_encoder(CrossEncoder(CONFIG), "mse")
