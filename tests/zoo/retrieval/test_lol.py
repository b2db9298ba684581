"""LoL against the released code's numbers, loops from the definition, hand cases, masks and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.stream import training_stream
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.phases import Train
from trainers.recipe import Run
from zoo.base import CompositionError, Context, Loss, Objective, chain, elements, examples, total_loss
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.reformulators import DenseReformulator, SetReformulator
from zoo.retrieval import lol

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "lol_official.npz")

# --- revisions --------------------------------------------------------------------------------------------------------


def test_sizes_are_distinct_descending_and_uniform():
    keys = jax.random.split(jax.random.key(0), 4000)
    sizes = np.asarray(lol.sample_nested_sizes(keys, 4, 3))
    assert sizes.shape == (4000, 3) and (np.diff(sizes, axis=1) < 0).all()
    assert set(sizes.ravel()) == set(range(5))
    # each of the 10 subsets of three sizes is as likely as any other
    counts = np.unique(sizes @ [100, 10, 1], return_counts=True)[1]
    assert len(counts) == 10 and counts.min() > 320 and counts.max() < 480
    np.testing.assert_array_equal(lol.sample_nested_sizes(keys[7:9], 4, 3), sizes[7:9])  # a query's key decides
    one = np.asarray(lol.sample_nested_sizes(keys, 2, 1))
    assert np.bincount(one[:, 0]).min() > 1200
    np.testing.assert_array_equal(lol.sample_nested_sizes(keys[:3], 2, 3), [[2, 1, 0]] * 3)


def test_sizes_stop_at_the_documents_there_are():
    keys = jax.random.split(jax.random.key(1), 600)
    available = jnp.asarray(np.arange(600) % 3)
    sizes = np.asarray(lol.sample_nested_sizes(keys, 5, 2, available))
    assert (sizes[::3] == 0).all()
    np.testing.assert_array_equal(sizes[1::3], [[1, 0]] * 200)
    two = np.unique(sizes[2::3] @ [10, 1], return_counts=True)
    np.testing.assert_array_equal(two[0], [10, 20, 21])
    assert two[1].min() > 40
    assert (np.asarray(lol.sample_nested_sizes(keys, 1, 2, available + 7)) == [1, 0]).all()


def test_sizes_that_cannot_be_drawn_are_refused():
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=r"cannot draw 3 distinct sizes from 0\.\.1"):
        lol.sample_nested_sizes(keys, 1, 3)
    with pytest.raises(ValueError, match="k_max must be at least 0 and revisions at least 1, got -1 and 1"):
        lol.sample_nested_sizes(keys, -1, 1)
    with pytest.raises(ValueError, match="got 3 and 0"):
        lol.sample_nested_sizes(keys, 3, 0)


def test_shuffled_feedback_is_a_permutation_with_padding_last():
    keys = jax.random.split(jax.random.key(2), 3000)
    rows = jnp.tile(jnp.array([[8, 3, 5, -1]]), (3000, 1))
    got = np.asarray(lol.shuffle_feedback(keys, rows))
    assert (got[:, 3] == -1).all() and (np.sort(got[:, :3], 1) == [3, 5, 8]).all()
    orders = np.unique(got[:, :3] @ [100, 10, 1], return_counts=True)[1]
    assert len(orders) == 6 and orders.min() > 420
    np.testing.assert_array_equal(lol.shuffle_feedback(keys[5:7], rows[5:7]), got[5:7])


def packed(query, passages, size, separator, length, room):
    # the definition: append passages while at least `room` tokens remain, each cut to what is left
    text, types, ends, read = list(query), [0] * len(query), [len(query) - 1], 0
    for passage in passages[:size]:
        left = length - len(text)
        if not len(passage) or left < room:
            break
        own = [*passage[: left - 1], separator]
        text += own
        types += [1] * len(own)
        ends.append(len(text) - 1)
        read += 1
    return text, types, ends, read


@pytest.mark.parametrize(("length", "room"), [(60, 10), (26, 10), (22, 10), (21, 3), (16, 2), (9, 1)])
def test_texts_are_packed_as_defined(length, room):
    rng = np.random.default_rng(3)
    queries = [[2, *rng.integers(10, 90, n), 3] for n in (3, 1, 7)]
    passages = [[rng.integers(10, 90, n).tolist() for n in lengths] for lengths in ((6, 4, 9), (9, 0, 5), (1, 9, 2))]
    pad = lambda x, n: [*x, *[0] * (n - len(x))]  # noqa: E731
    q = jnp.asarray([pad(x, 9) for x in queries])
    p = jnp.asarray([[pad(x, 9) for x in row] for row in passages])
    sizes = jnp.array([[3, 1], [3, 0], [2, 1]])
    got = lol.build_prf_inputs(q, p, sizes, 3, 0, length, room)
    ids, mask, types = (np.asarray(x).reshape(3, 2, length) for x in (got.ids, got.mask, got.token_types))
    for b in range(3):
        for r in range(2):
            text, kinds, ends, read = packed(queries[b], passages[b], int(sizes[b, r]), 3, length, room)
            assert ids[b, r].tolist() == pad(text, length) and types[b, r].tolist() == pad(kinds, length)
            assert mask[b, r].sum() == len(text) and mask[b, r, : len(text)].all()
            assert int(got.sizes[b, r]) == read
            np.testing.assert_array_equal(np.asarray(got.ends)[b, : read + 1], ends)
        # nested token for token
        shorter = mask[b, 1]
        np.testing.assert_array_equal(ids[b, 0][shorter], ids[b, 1][shorter])


def test_texts_are_the_released_collators():
    passages = jnp.asarray(GOLDEN["passages"])[:, :8]  # at most 8 tokens of a passage
    q = jnp.asarray([[2, 11, 12, 13, 3], [2, 14, 15, 3, 0]])
    p = passages[jnp.array([[0, 3, 2, 5], [1, 4, 0, 2]])]
    got = lol.build_prf_inputs(q, p, jnp.asarray(GOLDEN["col_sizes"], jnp.int32), 3, 0, 60)
    n = GOLDEN["col_input_ids"].shape[1]
    np.testing.assert_array_equal(got.ids[:, :n], GOLDEN["col_input_ids"])
    np.testing.assert_array_equal(got.mask[:, :n], GOLDEN["col_attention_mask"])
    np.testing.assert_array_equal(got.token_types[:, :n], GOLDEN["col_token_type_ids"])
    assert not got.mask[:, n:].any()
    np.testing.assert_array_equal(got.ends[0], GOLDEN["col_sep_indices"][0])
    cut = lol.build_prf_inputs(q, p, jnp.full((2, 1), 4), 3, 0, 25)
    for b in range(2):
        m = len(GOLDEN[f"cut_ids{b}"])
        np.testing.assert_array_equal(cut.ids[b, :m], GOLDEN[f"cut_ids{b}"])
        np.testing.assert_array_equal(cut.token_types[b, :m], GOLDEN[f"cut_types{b}"])
        assert int(cut.sizes[b, 0]) == len(GOLDEN[f"cut_sep{b}"]) - 1 and int(cut.mask[b].sum()) == m


def test_a_query_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="queries have up to 9 tokens, more than max_length 8"):
        lol.build_prf_inputs(jnp.ones((1, 9), int), jnp.ones((1, 2, 3), int), jnp.ones((1, 1), int), 3, 0, 8)


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, 3])
def test_the_comparison_is_the_released_hinge(r):
    losses = jnp.asarray(GOLDEN[f"hinge{r}_losses"])
    value, grad = jax.value_and_grad(lambda x: jnp.mean(lol.comparative_loss_regularizer(x)))(losses)
    np.testing.assert_allclose(value, GOLDEN[f"hinge{r}_value"], rtol=1e-6)
    np.testing.assert_allclose(grad, GOLDEN[f"hinge{r}_grad"], atol=1e-7)


def test_the_comparison_by_hand():
    reg = lambda losses, *rest: np.asarray(lol.comparative_loss_regularizer(jnp.asarray(losses), *rest))  # noqa: E731
    np.testing.assert_allclose(reg([[3.0, 1.0]]), [2])
    np.testing.assert_allclose(reg([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), [4 / 3, 0])
    assert reg([[3.0]]) == [0]
    grad = jax.grad(lambda x: jnp.mean(lol.comparative_loss_regularizer(x)))
    np.testing.assert_allclose(grad(jnp.array([[3.0, 1.0], [1.0, 2.0]])), [[0.5, -0.5], [0, 0]])
    np.testing.assert_allclose(grad(jnp.array([[3.0, 2.0, 1.0]])), [[2 / 3, 0, -2 / 3]], atol=1e-7)
    assert not grad(jnp.array([[1.0, 2.0, 2.0]])).any()  # monotone, equal losses too
    np.testing.assert_allclose(reg([[8.0, 6.5]]), reg([[3.0, 1.5]]))  # a constant changes nothing
    # sizes decide who knows more, whatever the order
    np.testing.assert_allclose(reg([[3.0, 1.0]], jnp.array([[1, 4]])), [0])
    np.testing.assert_allclose(reg([[1.0, 3.0]], jnp.array([[1, 4]])), [2])
    np.testing.assert_allclose(reg([[3.0, 1.0, 7.0]], jnp.array([[4, 4, 0]])), [0])
    np.testing.assert_allclose(reg([[9.0, 7.0, 1.0]], jnp.array([[4, 4, 0]])), [(8 + 6) / 2])
    assert reg([[3.0, 1.0]], jnp.array([[2, 2]])) == [0]
    mask = jnp.array([[True, False, True]])
    np.testing.assert_allclose(reg([[3.0, np.nan, 1.0]], None, mask), [2])
    grad = jax.grad(lambda x: jnp.sum(lol.comparative_loss_regularizer(x, None, mask)))(
        jnp.array([[3.0, jnp.nan, 1.0]])
    )
    np.testing.assert_array_equal(grad, [[1, 0, -1]])


def nested_host(sizes="nested_sizes"):
    """A host that has nothing to do with retrieval: the squared error of a guess from the first features only."""

    def forward(variables, batch, context):
        reads = jnp.broadcast_to(jnp.array([4, 2, 1]), (batch["x"].shape[0], 3))
        seen = jnp.arange(4) < reads[:, :, None]
        guess = jnp.einsum("brd,d->br", jnp.where(seen, batch["x"][:, None], 0), variables["params"]["w"])
        return {"guess": guess, sizes: reads}, {}

    def loss(outputs, batch, context):
        b, r = outputs["guess"].shape
        at = jnp.repeat(jnp.arange(b, dtype=jnp.int32), r)
        values = ((outputs["guess"] - batch["y"][:, None]) ** 2).reshape(-1)
        return Loss(elements(values, at[:, None], batch["mask"][at], "example"))

    init = lambda rng, batch: {"params": {"w": jax.random.normal(rng, (4,))}}  # noqa: E731
    return Objective(init, forward, loss, "example", (sizes, "index"), name="nested")


def test_the_transformation_goes_on_any_host_of_nested_views():
    rng = np.random.default_rng(4)
    batch = {"x": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), "y": jnp.asarray(rng.normal(size=5), jnp.float32),
             "mask": jnp.array([True, True, True, True, False]), "index": jnp.arange(5)}  # fmt: skip
    host = nested_host("views")
    variables, context = host.init(jax.random.key(0), batch), Context(jax.random.key(1), batch=batch)
    outputs, _ = host.forward(variables, batch, context)
    context, loss = context.replace(outputs=outputs), host.loss(outputs, batch, context)
    values = np.asarray(loss.elements.values).reshape(5, 3)[:4]
    extra = [np.mean([max(0, v[0] - v[1]), max(0, v[0] - v[2]), max(0, v[1] - v[2])]) for v in values]
    assert max(extra) > 0
    for weight in (0.0, 1.0, 0.3):
        t = lol.comparative_regularizer(weight, "views")
        got, _, metrics = total_loss(loss, t, t.init(5), context)
        np.testing.assert_allclose(got, values.mean() + weight * np.mean(extra), rtol=1e-6)
        np.testing.assert_allclose(metrics["loss_before"], values.mean(), rtol=1e-6)
    # per example: what its own revisions lose, on each of them
    e = lol.comparative_regularizer(0.3, "views").update(loss.elements, (), context)[0]
    added = np.asarray(e.values).reshape(5, 3)[:4] - values
    np.testing.assert_allclose(added, np.repeat(0.3 * np.array(extra)[:, None], 3, 1), rtol=1e-4, atol=1e-6)
    assert not np.asarray(e.values)[12:].any()
    reduced = chain(lol.comparative_regularizer(0.3, "views"), examples())
    got = total_loss(loss, reduced, reduced.init(5), context)[0]
    np.testing.assert_allclose(got, values.mean() + 0.3 * np.mean(extra), rtol=1e-6)
    with pytest.raises(CompositionError, match="needs one element for each view, 15; got 5"):
        total_loss(loss, chain(examples(), lol.comparative_regularizer(0.3, "views")), ((), ()), context)
    with pytest.raises(CompositionError, match="requires 'nested_sizes'"):
        Train("t", 1, host, optax.sgd(0.1), training_stream({"x": np.ones((4, 4))}, 2), lol.comparative_regularizer())
    with pytest.raises(ValueError, match="weight must not be negative, got -1.0"):
        lol.comparative_regularizer(-1.0)


def test_it_trains_through_the_trainer():
    rng = np.random.default_rng(5)
    arrays = {"x": rng.normal(size=(16, 4)).astype(np.float32), "y": rng.normal(size=16).astype(np.float32)}
    phase = Train("t", 2, nested_host(), optax.sgd(0.01), training_stream(arrays, 8), lol.comparative_regularizer(2.0))
    result = Loop(Run([phase], export=None), Settings(Parallel(devices=1), 1, 1))()
    assert result.metrics["t/loss"] > result.metrics["t/loss_before"]


def test_figures_of_growing_feedback_by_hand():
    got = lol.feedback_figures(jnp.array([[1.0, 2.0, 2.0], [3.0, 1.0, 1.5]]))
    assert float(got["excess"]) == pytest.approx((1 + 0.5) / 4) and float(got["worse"]) == pytest.approx(2 / 4)


# --- the reformulation loss -------------------------------------------------------------------------------------------


def reformulation_loop(q, index, positives):
    out, chosen = [], []
    for row, own in zip(q, positives, strict=True):
        own = [p for p in own if p >= 0]
        s = index @ row
        if not own:
            out.append(0.0), chosen.append(-1)
            continue
        hard = min(own, key=lambda p: s[p])
        keep = [j for j in range(len(index)) if j == hard or j not in own]
        out.append(np.log(np.exp(s[keep]).sum()) - s[hard]), chosen.append(hard)
    return np.array(out), np.array(chosen)


@pytest.mark.parametrize("chunk", [7, 100])
def test_the_loss_is_its_loop(chunk):
    rng = np.random.default_rng(6)
    q, index = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(23, 4)).astype(np.float32)
    positives = np.stack([rng.permutation(23)[:3] for _ in range(6)]).astype(np.int32)
    positives[1, 0] = positives[2, 1:] = -1
    positives[3] = -1
    positives[4, 1] = positives[4, 0]  # labelled twice
    loss = lambda q: lol.reformulation_loss(q, jnp.asarray(index), jnp.asarray(positives), chunk)  # noqa: E731
    values, chosen = jax.jit(loss)(jnp.asarray(q))
    want = reformulation_loop(q, index, positives)
    np.testing.assert_allclose(values, want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(chosen, want[1])

    def plain(q):  # the same by autodiff of whole scores
        s, total = q @ index.T, 0.0
        for b in (0, 1, 2, 4, 5):
            others = [p for p in positives[b] if p >= 0 and p != want[1][b]]
            total += jax.nn.logsumexp(s[b].at[jnp.asarray(others, int)].set(-jnp.inf)) - s[b, want[1][b]]
        return total

    got, known = (jax.jit(jax.grad(f))(jnp.asarray(q)) for f in (lambda q: jnp.sum(loss(q)[0]), plain))
    np.testing.assert_allclose(got, known, atol=1e-5)


def test_other_positives_do_not_count_and_documents_have_no_gradient():
    rng = np.random.default_rng(7)
    q, index = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 3), (9, 3)))
    positives = jnp.array([[2, 5]])
    value, chosen = lol.reformulation_loss(q, index, positives)
    easy = 7 - int(chosen[0])
    # the easier positive may move as long as it stays the easier one
    moved = index.at[easy].set(index[easy] + 3 * q[0])
    np.testing.assert_allclose(lol.reformulation_loss(q, moved, positives)[0], value, rtol=1e-6)
    grad = jax.grad(lambda d: jnp.sum(lol.reformulation_loss(q, d, positives)[0]))(index)
    assert not np.asarray(grad).any()


def test_losses_are_the_released_trainers():
    D, positives = jnp.asarray(GOLDEN["D"]), jnp.asarray(GOLDEN["positives"])
    repeated = jnp.repeat(positives, 3, 0)

    def total(q):
        losses, _ = lol.reformulation_loss(q, D, repeated, 16)
        qr, asked = lol.query_ranking_loss(q.reshape(4, 3, -1), D, positives)
        pr, cr = jnp.mean(losses), jnp.mean(lol.comparative_loss_regularizer(losses.reshape(4, 3)))
        qr = jnp.sum(qr) / jnp.sum(asked)
        return pr + cr + 0.5 * qr, (pr, cr, qr)

    (value, parts), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(GOLDEN["q"]))
    np.testing.assert_allclose(parts, [GOLDEN[f"trainer_loss_{k}"] for k in ("pr", "cr", "qr")], rtol=1e-5)
    np.testing.assert_allclose(value, GOLDEN["trainer_loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, GOLDEN["trainer_grad"], atol=1e-5)


def test_padded_queries_rank_nothing():
    D, positives = jnp.asarray(GOLDEN["D"]), jnp.asarray(GOLDEN["positives"])
    q = jnp.asarray(GOLDEN["q"]).reshape(4, 3, -1)
    mask = jnp.array([True, True, True, False])
    values, asked = lol.query_ranking_loss(q, D, positives, mask)
    alone, real = lol.query_ranking_loss(q[:3], D, positives[:3])
    np.testing.assert_allclose(values[:3], alone, rtol=1e-6)
    np.testing.assert_array_equal(asked, np.concatenate([real, np.zeros((1, 3), bool)]))
    assert not np.asarray(values)[3].any()


# --- the objective ----------------------------------------------------------------------------------------------------


def material(seed=8, b=6, n=20, k=3, d=4):
    rng = np.random.default_rng(seed)
    positives = np.stack([rng.permutation(n)[:2] for _ in range(b)]).astype(np.int32)
    positives[1, 1] = -1
    positives[2] = -1
    feedback = np.stack([rng.permutation(n)[:k] for _ in range(b)]).astype(np.int32)
    feedback[3, 1:] = -1
    batch = {"query": rng.normal(size=(b, d)).astype(np.float32), "feedback": feedback, "positives": positives,
             "index": np.arange(b, dtype=np.int32), "mask": np.arange(b) < b - 1}  # fmt: skip
    index = rng.normal(size=(n, d)).astype(np.float32)
    return jax.tree.map(jnp.asarray, batch), jnp.asarray(index)


def run(objective):
    """``(variables, batch, context) -> (outputs, loss)`` of an objective, compiled."""

    def both(variables, batch, context):
        outputs, _ = objective.forward(variables, batch, context)
        return outputs, objective.loss(outputs, batch, context)

    return jax.jit(both)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_objective_is_its_loop(shuffle):
    batch, index = material()
    module = SetReformulator((5,), 2.0)
    objective = lol.feedback_training(lol.vector_reviser(module), 3, shuffle, chunk=7)
    variables = objective.init(jax.random.key(0), batch)
    context = Context(jax.random.key(3), artefacts={"index": index, "passages": index})
    outputs, loss = run(objective)(variables, batch, context)
    sizes = np.asarray(outputs["nested_sizes"])
    assert set(sizes[3]) <= {0, 1} and (np.diff(sizes[:3], axis=1) < 0).all()
    feedback = batch["feedback"]
    if shuffle:
        feedback = lol.shuffle_feedback(context.example_keys(batch, "feedback"), feedback)
    vectors = jax.jit(module.apply)(variables, batch["query"], index[jnp.maximum(feedback, 0)], outputs["nested_sizes"])
    flat, repeated = np.asarray(vectors).reshape(18, -1), np.repeat(np.asarray(batch["positives"]), 3, 0)
    want = reformulation_loop(flat, np.asarray(index), repeated)[0]
    real = [b not in (2, 5) for b in range(6) for _ in range(3)]
    real = np.array(real)
    np.testing.assert_array_equal(loss.elements.mask, real)
    np.testing.assert_array_equal(loss.elements.index[:, 0], np.repeat(np.arange(6), 3))
    np.testing.assert_allclose(np.asarray(loss.elements.values)[real], np.array(want)[real], rtol=1e-4, atol=1e-5)
    excess = lol.comparative_loss_regularizer(jnp.asarray(want, jnp.float32).reshape(6, 3), jnp.asarray(sizes))
    np.testing.assert_allclose(loss.metrics["excess"], np.mean(np.asarray(excess)[[0, 1, 3, 4]]), rtol=1e-4, atol=1e-6)


def test_queries_are_ranked_too_if_asked():
    batch, index = material()
    reviser = lol.vector_reviser(SetReformulator((5,), 2.0))
    objective = lol.feedback_training(reviser, 2, query_weight=0.7)
    variables = objective.init(jax.random.key(0), batch)
    context = Context(jax.random.key(3), artefacts={"index": index, "passages": index})
    outputs, loss = run(objective)(variables, batch, context)
    term = loss.terms["query_ranking"]
    real = batch["mask"] & (batch["positives"][:, 0] >= 0)
    values, asked = lol.query_ranking_loss(outputs["revisions"], index, batch["positives"], real)
    assert int(asked.sum()) == 7
    np.testing.assert_allclose(term, 0.7 * float(values.sum()) / 7, rtol=1e-5)
    for arguments in ((0,), (2, True, -1.0)):
        with pytest.raises(ValueError, match="revisions must be at least 1 and query_weight not negative"):
            lol.feedback_training(reviser, *arguments)
    sparse = lol.feedback_training(reviser, 2, sparsity_weight=0.3)
    later = context.replace(step=jnp.int32(3), total_steps=jnp.int32(4))
    outputs, loss = run(sparse)(variables, batch, later)
    norms = np.abs(np.asarray(outputs["revisions"])).sum(-1)[np.asarray(real)]
    np.testing.assert_allclose(loss.terms["sparsity"], 0.3 * (3 / 4) ** 2 * norms.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="sparsity_weight must not be negative, got -1"):
        lol.feedback_training(reviser, sparsity_weight=-1.0)


def test_texts_are_revised_row_by_row_with_their_own_dropout():
    rng = np.random.default_rng(9)
    body = BERT(BERTConfig(30, 8, 1, 2, 8, 24, 2, dropout=0.3, attention_dropout=0.0))
    module = DenseReformulator(body, 4)
    reviser = lol.text_reviser(module, 3, 0, 24, 4)
    query = jnp.asarray([[2, 9, 8, 3, 0], [2, 7, 3, 0, 0]])
    passages = jnp.asarray(rng.integers(5, 30, (2, 3, 6)))
    params = jax.jit(reviser.init)(jax.random.key(0), query, passages)
    sizes, revise = jnp.array([[3, 1], [2, 0]]), jax.jit(reviser.revise)
    vectors, read = revise(params, query, passages, sizes, None)
    packed = lol.build_prf_inputs(query, passages, sizes, 3, 0, 24, 4)
    np.testing.assert_array_equal(read, packed.sizes)
    flat = jax.jit(module.apply)({"params": params}, packed.ids, packed.mask, packed.token_types)
    np.testing.assert_allclose(vectors.reshape(4, -1), flat, atol=1e-6)
    # the same text twice in one query: other units are dropped in each revision
    twice = jnp.array([[1, 1], [1, 1]])
    keys = jax.random.split(jax.random.key(4), 2)
    wet, _ = revise(params, query, passages, twice, keys)
    assert float(jnp.abs(wet[:, 0] - wet[:, 1]).max()) > 1e-3
    other, _ = revise(params, query.at[0, 1].set(20), passages, twice, keys)
    np.testing.assert_allclose(other[1], wet[1], atol=1e-6)  # a row of its own
    dry, _ = revise(params, query, passages, twice, None)
    np.testing.assert_array_equal(dry[:, 0], dry[:, 1])


def test_no_scores_of_the_whole_corpus_are_held():
    q, index, n = jnp.ones((6, 8)), jnp.ones((50_000, 8)), 50_000
    positives = jnp.zeros((6, 1), jnp.int32)
    total = lambda q: jnp.sum(lol.reformulation_loss(q, index, positives, 1000)[0])  # noqa: E731
    text = jax.jit(jax.grad(total)).lower(q).as_text()
    assert f"tensor<6x{n}x" not in text and f"tensor<{n}x6x" not in text and "tensor<6x1000xf32>" in text
