"""Losses of retrieval against loops over numbers, hand cases, masks, gradients, and a corpus spread over devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from zoo.losses import retrieval
from zoo.losses.contrastive import info_nce_per_example
from zoo.ops.rows import Rows

LOG2 = math.log(2)


def rng_arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def test_pairwise_softplus_is_a_two_way_softmax():
    s, n = rng_arrays(0, (4,), (4, 3))
    got = retrieval.pairwise_softplus(jnp.asarray(s), jnp.asarray(n))
    for i in range(4):
        for j in range(3):
            two = np.array([s[i], n[i, j]], np.float64)
            assert got[i, j] == pytest.approx(-(two[0] - np.log(np.exp(two).sum())), abs=1e-6)
    assert retrieval.pairwise_softplus(jnp.zeros(1), jnp.zeros((1, 1)))[0, 0] == pytest.approx(LOG2)
    mask = jnp.array([[True, False]])
    np.testing.assert_allclose(
        retrieval.pairwise_softplus(jnp.array([1.0]), jnp.array([[3.0, 9.0]]), mask), [[softplus(2), 0]], rtol=1e-6
    )
    assert np.isfinite(retrieval.pairwise_softplus(jnp.array([-1e4]), jnp.array([[1e4]])))


def test_gains_of_ranks_and_their_cut():
    np.testing.assert_allclose(retrieval.reciprocal_rank_gains(4, 2), [1, 0.5, 0, 0])
    np.testing.assert_allclose(retrieval.reciprocal_rank_gains(3, 9), [1, 1 / 2, 1 / 3])
    for cut in (0, None, -1):
        with pytest.raises(ValueError, match="metric_cut must be a positive int"):
            retrieval.reciprocal_rank_gains(3, cut)


def lambda_loop(scores, positive, gains, mask):
    out = []
    for s, y, g, m in zip(scores, positive, gains, mask, strict=True):
        pairs = [
            abs(g[a] - g[b]) * softplus(s[b] - s[a])
            for a in range(len(s))
            for b in range(len(s))
            if y[a] and not y[b] and m[a] and m[b]
        ]
        out.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return out


def test_lambda_pairwise_by_hand_and_by_loop():
    hand = retrieval.lambda_pairwise(
        jnp.zeros((1, 3)), jnp.array([[False, True, False]]), retrieval.reciprocal_rank_gains(3, 200)[None]
    )
    assert hand[0] == pytest.approx((0.5 + 1 / 6) / 2 * LOG2)
    # the positive is not in the list: appended with gain 0, its weights are 1 / rank of each negative
    absent = retrieval.lambda_pairwise(
        jnp.zeros((1, 3)), jnp.array([[False, False, True]]), jnp.array([[1.0, 0.5, 0.0]])
    )
    assert absent[0] == pytest.approx((1 + 0.5) / 2 * LOG2)
    scores, gains = rng_arrays(1, (6, 7), (6, 7))
    rng = np.random.default_rng(2)
    positive, mask = rng.random((6, 7)) < 0.3, rng.random((6, 7)) < 0.8
    positive[0] = False
    want = lambda_loop(scores, positive, gains, mask)
    args = [jnp.asarray(x) for x in (scores, positive, gains, mask)]
    for most in (None, 7, 5):
        np.testing.assert_allclose(retrieval.lambda_pairwise(*args, most), want, atol=1e-6)
    assert want[0] == 0


def test_lambda_pairwise_keeps_the_first_positives():
    scores, gains = jnp.array([[0.3, -0.2, 0.9, 0.1]]), jnp.array([[1.0, 0.5, 0.25, 0.125]])
    both = jnp.array([[False, True, False, True]])
    got = retrieval.lambda_pairwise(scores, both, gains, None, 1)[0]
    want = (0.5 * softplus(0.3 + 0.2) + 0.25 * softplus(0.9 + 0.2)) / 2
    assert got == pytest.approx(want, abs=1e-6)


def test_no_gradient_through_the_gains_and_one_through_the_scores():
    scores, gains = (jnp.asarray(x) for x in rng_arrays(3, (2, 4), (2, 4)))
    positive = jnp.array([[True, False, False, True], [False, True, False, False]])
    total = lambda s, g: jnp.sum(retrieval.lambda_pairwise(s, positive, g))  # noqa: E731
    assert float(jnp.abs(jax.grad(total, 1)(scores, gains)).max()) == 0
    check_grads(lambda s: total(jnp.asarray(s), gains), (scores,), 1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_hinges():
    positive, negatives = jnp.array([1.0, 0.0]), jnp.array([[0.8, 2.0, 5.0], [-1.0, 0.1, 0.2]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    got = retrieval.hinge_with_negatives(positive, negatives, mask)
    np.testing.assert_allclose(got, [(0.3 + 1.5) / 2, (0 + 0.6 + 0.7) / 3], rtol=1e-5)
    got = retrieval.hinge_with_negatives(positive, negatives, mask, 0.5, squared=True)
    np.testing.assert_allclose(got, [(0.09 + 2.25) / 2, (0.36 + 0.49) / 3], rtol=1e-5)
    assert retrieval.hinge_with_negatives(positive, negatives, jnp.zeros((2, 3), bool)).tolist() == [0, 0]


def test_softmax_with_negatives():
    s, n = rng_arrays(4, (3,), (3, 5))
    mask = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    got = retrieval.softmax_with_negatives(jnp.asarray(s), jnp.asarray(n), jnp.asarray(mask))
    for i in range(3):
        logits = np.array([s[i], *n[i, mask[i]]], np.float64)
        assert got[i] == pytest.approx(np.log(np.exp(logits).sum()) - logits[0], abs=1e-6)
    assert got[2] == 0
    np.testing.assert_allclose(
        retrieval.softmax_with_negatives(jnp.asarray(s), jnp.asarray(n)),
        optax.softmax_cross_entropy_with_integer_labels(jnp.concatenate([s[:, None], n], 1), jnp.zeros(3, jnp.int32)),
        atol=1e-6,
    )


def test_in_batch_softmax():
    q, d = (jnp.asarray(x) for x in rng_arrays(5, (4, 3), (4, 3)))
    mask = jnp.array([True, True, True, False])
    relevant = jnp.zeros((4, 4), bool).at[0, 2].set(True).at[1, 1].set(True)
    got = retrieval.in_batch_softmax(q.at[3].set(jnp.nan), d.at[3].set(jnp.nan), mask, relevant, 0.5)
    scores = np.asarray(q, np.float64) @ np.asarray(d, np.float64).T / 0.5
    columns = [[0, 1], [0, 1, 2], [0, 1, 2]]
    for i, among in enumerate(columns):
        assert got[i] == pytest.approx(np.log(np.exp(scores[i, among]).sum()) - scores[i, i], abs=1e-5)
    assert got[3] == 0
    same = jnp.ones((5, 2))
    np.testing.assert_allclose(retrieval.in_batch_softmax(same, same), [math.log(5)] * 5, rtol=1e-6)
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(
        retrieval.in_batch_softmax(unit(q), unit(d), temperature=0.07),
        info_nce_per_example(q, d, 0.07, symmetric=False),
        atol=2e-5,
    )


def test_soft_targets():
    s, t = rng_arrays(6, (3, 4), (3, 4))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]], bool)
    dirty = jnp.where(jnp.asarray(mask), jnp.asarray(s), jnp.nan)
    got = retrieval.soft_target_cross_entropy(dirty, jnp.asarray(t), jnp.asarray(mask))
    for i in range(2):
        a, b = s[i, mask[i]].astype(np.float64), t[i, mask[i]].astype(np.float64)
        p = np.exp(b) / np.exp(b).sum()
        assert got[i] == pytest.approx(-(p * (a - np.log(np.exp(a).sum()))).sum(), abs=1e-6)
    assert got[2] == 0
    own = lambda x: jnp.sum(retrieval.soft_target_cross_entropy(x, x))  # noqa: E731
    np.testing.assert_allclose(jax.grad(own)(jnp.asarray(s)), np.zeros((3, 4)), atol=1e-6)
    assert (
        float(jnp.abs(jax.grad(lambda b: jnp.sum(retrieval.soft_target_cross_entropy(jnp.asarray(s), b)))(t)).max())
        == 0
    )
    clean = jax.grad(lambda x: jnp.sum(retrieval.soft_target_cross_entropy(x, jnp.asarray(t), jnp.asarray(mask))))(
        dirty
    )
    assert np.isfinite(clean).all() and float(jnp.abs(clean[2]).max()) == 0


def test_masked_bce():
    z, y = jnp.array([[0.0, 2.0, jnp.inf], [-1.0, 0.5, jnp.nan]]), jnp.array([[1.0, 0.0, 1.0], [0.3, 1.0, 0.0]])
    mask = jnp.array([[True, True, False]] * 2)
    got = retrieval.masked_bce(z, y, mask)
    want = [[LOG2, softplus(2), 0], [0.3 * softplus(1) + 0.7 * softplus(-1), softplus(-0.5), 0]]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(retrieval.masked_bce(x, y, mask)))(z)).all()
    weighted = retrieval.masked_bce(z, y, mask, 3.0)
    want = [[3 * LOG2, softplus(2), 0], [0.9 * softplus(1) + 0.7 * softplus(-1), 3 * softplus(-0.5), 0]]
    np.testing.assert_allclose(weighted, want, rtol=1e-6)


# --- softmax over a corpus --------------------------------------------------------------------------------------------

N, D, Q = 22, 5, 6


@pytest.fixture(scope="module")
def corpus():
    q, d = rng_arrays(7, (Q, D), (N, D))
    positive = np.array([3, 0, 21, 7, 7, 12], np.int32)
    excluded = np.array([[4, -1], [-1, -1], [0, 20], [8, 9], [-1, 6], [21, 13]], np.int32)
    return q, d, positive, excluded


def corpus_loop(q, d, positive, excluded):
    losses, grads = [], []
    for i in range(len(q)):
        keep = [j for j in range(len(d)) if j not in excluded[i].tolist()]
        scores = d[keep].astype(np.float64) @ q[i].astype(np.float64)
        p = np.exp(scores - scores.max())
        losses.append(np.log(p.sum()) + scores.max() - scores[keep.index(positive[i])])
        grads.append((p / p.sum()) @ d[keep] - d[positive[i]])
    return np.array(losses), np.array(grads)


@pytest.mark.parametrize("chunk", [1, 7, 22, 100])
def test_streaming_equals_the_loop_in_value_and_gradient(corpus, chunk):
    q, d, positive, excluded = corpus
    losses, grads = corpus_loop(q, d, positive, excluded)
    weight = jnp.arange(1.0, Q + 1)

    def total(x):
        loss = retrieval.full_corpus_softmax(x, jnp.asarray(d), jnp.asarray(positive), jnp.asarray(excluded), chunk)
        return jnp.sum(loss * weight), loss

    (_, got), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(q))
    np.testing.assert_allclose(got, losses, atol=1e-5)
    np.testing.assert_allclose(gradient, grads * np.asarray(weight)[:, None], atol=2e-5)


def test_large_scores_and_no_exclusions(corpus):
    q, d, positive, _ = corpus
    big = retrieval.full_corpus_softmax(jnp.asarray(q * 300), jnp.asarray(d), jnp.asarray(positive), None, 5)
    losses, _ = corpus_loop(q * 300, d, positive, np.full((Q, 1), -1))
    np.testing.assert_allclose(big, losses, rtol=1e-5, atol=1e-3)


def test_masked_positives_do_not_matter_and_documents_have_no_gradient(corpus):
    q, d, positive, excluded = corpus
    moved = d.copy()
    moved[4] += 100  # excluded for the first query only
    first = [jnp.asarray(x[:1]) for x in (q, positive, excluded)]
    loss = lambda x: retrieval.full_corpus_softmax(first[0], x, *first[1:], 8)  # noqa: E731
    np.testing.assert_array_equal(loss(jnp.asarray(d)), loss(jnp.asarray(moved)))
    assert float(jnp.abs(jax.grad(lambda x: loss(x)[0])(jnp.asarray(d))).max()) == 0


def test_backward_keeps_no_scores(corpus):
    """The memory of value and gradient does not grow with the corpus beyond the corpus itself."""
    sizes = []
    for n in (4096, 16384):
        q, d = jnp.zeros((64, 8)), jnp.zeros((n, 8))
        fn = jax.jit(
            jax.grad(lambda x, d: jnp.sum(retrieval.full_corpus_softmax(x, d, jnp.zeros(64, jnp.int32), None, 512)))
        )
        sizes.append(fn.lower(q, d).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < sizes[0] + 64 * 512 * 4, sizes


@pytest.mark.parametrize("how", ["mesh", "pmap"])
def test_a_corpus_over_8_devices_is_the_corpus(corpus, how):
    q, d, positive, excluded = corpus
    losses, grads = corpus_loop(q, d, positive, excluded)
    padded = np.concatenate([d, np.full((2, D), 50, np.float32)])  # what fills the last shard would win, were it seen

    def total(x, rows):
        loss = retrieval.full_corpus_softmax(x, rows, jnp.asarray(positive), jnp.asarray(excluded), 2)
        return jnp.sum(loss), loss

    value = jax.value_and_grad(total, has_aux=True)
    if how == "mesh":
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        rows = Rows(jax.device_put(padded, NamedSharding(mesh, P(("data", "fsdp")))), N, mesh, ("data", "fsdp"))
        (_, got), gradient = jax.jit(value)(jnp.asarray(q), rows)
    else:
        rows = Rows(padded.reshape(8, 3, D), N, None, "data")
        (_, got), gradient = jax.pmap(value, axis_name="data", in_axes=(None, 0))(jnp.asarray(q), rows)
        assert all((np.asarray(x) == np.asarray(x)[0]).all() for x in (got, gradient))
        got, gradient = got[0], gradient[0]
    np.testing.assert_allclose(got, losses, atol=1e-5)
    np.testing.assert_allclose(gradient, grads, atol=2e-5)


def test_bfloat16_documents_are_summed_in_float32(corpus):
    q, d, positive, _ = corpus
    low = jnp.asarray(d).astype(jnp.bfloat16)
    got = retrieval.full_corpus_softmax(jnp.asarray(q), low, jnp.asarray(positive))
    losses, _ = corpus_loop(q, np.asarray(low.astype(jnp.float32)), positive, np.full((Q, 1), -1))
    np.testing.assert_allclose(got, losses, atol=1e-5)
    assert got.dtype == jnp.float32
