"""muvera against its definition, the released code's numbers, and the limits its brief names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.token_sets import topic_token_sets
from zoo.ops.chamfer import chamfer_topk
from zoo.ops.fingerprint import fingerprint as fingerprint_of
from zoo.retrieval import muvera
from zoo.retrieval.muvera import FDEConfig, FDEParams

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "muvera_official.npz")
query = jax.jit(muvera.encode_query_fde)
document = jax.jit(muvera.encode_document_fde, static_argnums=3)


def unit_tokens(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


D, K, R = 6, 3, 2
TOKENS = unit_tokens(0, 4, 9, D)
MASK = jnp.asarray(np.arange(9) < np.array([9, 5, 1, 2])[:, None])
DENSE = muvera.init_fde(jax.random.key(1), FDEConfig(D, R, K, 4))
PLAIN = muvera.init_fde(jax.random.key(2), FDEConfig(D, R, K, None, projection="identity"))


def blocks(params, tokens, mode, k=None):
    """The encoding of one set by the definition, a block at a time in float64: ``[R, B, d_proj]``."""
    planes = np.asarray(params.simhash, np.float64)
    repetitions, _, k = planes.shape
    tokens = np.asarray(tokens, np.float64)
    found = []
    for r in range(repetitions):
        bits = [[1 if float(x @ planes[r][:, j]) > 0 else 0 for j in range(k)] for x in tokens]
        psi = tokens if params.proj is None else tokens @ np.asarray(params.proj[r], np.float64)
        for block in range(2**k):
            wanted = [(block >> (k - 1 - j)) & 1 for j in range(k)]
            inside = [p for b, p in zip(bits, psi, strict=True) if b == wanted]
            row = np.zeros(psi.shape[1])
            if inside:
                row = np.sum(inside, 0) / (1 if mode == "query" else len(inside))
            elif mode == "filled":
                away = [sum(x != y for x, y in zip(b, wanted, strict=True)) for b in bits]
                row = psi[away.index(min(away))]
            found.append(row)
    return np.array(found).reshape(repetitions, 2**k, -1)


@pytest.mark.parametrize("params", [DENSE, PLAIN], ids=["dense", "identity"])
@pytest.mark.parametrize("mode", ["query", "document", "filled"])
def test_encodings_equal_the_definition(params, mode):
    encode = {"query": query, "document": lambda *a: document(*a, False), "filled": lambda *a: document(*a, True)}[mode]
    found = encode(params, TOKENS, MASK)
    for i, row in enumerate(np.asarray(found)):
        expected = blocks(params, TOKENS[i][np.asarray(MASK[i])], mode)
        np.testing.assert_allclose(row, expected.ravel(), atol=1e-5)


@pytest.mark.parametrize("how", ["dense", "count_sketch"])
def test_final_projections_equal_the_definition(how):
    params = muvera.init_fde(jax.random.key(3), FDEConfig(D, R, K, 4, 11, final_projection=how))
    before = params.replace(final_matrix=None, final_index=None, final_sign=None, final_dim=None)
    for encode in (query, lambda p, t, m: document(p, t, m, True)):
        full = np.asarray(encode(before, TOKENS, MASK), np.float64)
        expected = np.zeros((4, 11))
        if how == "dense":
            matrix = np.asarray(params.final_matrix, np.float64).reshape(-1, 11)
            assert set(np.unique(matrix)) == {-1, 1} and params.final_matrix.dtype == jnp.int8
            expected = full @ matrix / np.sqrt(11)
        else:
            for j, (at, sign) in enumerate(zip(params.final_index, params.final_sign, strict=True)):
                expected[:, at] += float(sign) * full[:, j]
        np.testing.assert_allclose(encode(params, TOKENS, MASK), expected, atol=1e-5)


def padded(names, width):
    tokens, mask = np.zeros((len(names), width, 6), np.float32), np.zeros((len(names), width), bool)
    for i, name in enumerate(names):
        tokens[i, : len(GOLDEN[name])], mask[i, : len(GOLDEN[name])] = GOLDEN[name], True
    return jnp.asarray(tokens), jnp.asarray(mask)


def gray_places(k):
    """Where the released code puts the block of each bit string: p_0 = b_0, p_i = p_(i-1) XOR b_i."""
    places = []
    for block in range(2**k):
        place = 0
        for i in range(k - 1, -1, -1):
            place = (place << 1) + (((block >> i) & 1) ^ (place & 1))
        places.append(place)
    return np.array(places)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("kind", ["identity", "sketch", "final"])
def test_released_code_gives_the_same_encodings(k, kind):
    params = FDEParams(jnp.asarray(GOLDEN[f"planes{k}"]), None if kind == "identity" else jnp.asarray(GOLDEN["proj"]))
    places = gray_places(k)
    if kind == "final":
        # the final sketch reads blocks where the released code puts them
        reorder = lambda x: jnp.asarray(x.reshape(3, 2**k, 4)[:, places].ravel())  # noqa: E731
        index, sign = reorder(GOLDEN[f"final_index{k}"]), reorder(GOLDEN[f"final_sign{k}"])
        params = params.replace(final_index=index, final_sign=sign, final_dim=10)
    (queries, qmask), (documents, mask) = padded(["Q0", "Q1"], 5), padded(["P0", "P1", "P2"], 7)
    found = {
        "query": query(params, queries, qmask),
        "document": document(params, documents, mask, False),
        "filled": document(params, documents, mask, True),
    }
    for mode, rows in found.items():
        expected = GOLDEN[f"{mode}_{kind}_{k}"]
        if kind != "final":
            expected = expected.reshape(len(rows), 3, 2**k, -1)[:, :, places].reshape(len(rows), -1)
        np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_without_hyperplanes_it_is_sum_times_mean():
    params = muvera.init_fde(jax.random.key(0), FDEConfig(D, 1, 0, projection="identity", d_proj=None))
    f_q, f_p = query(params, TOKENS, MASK), document(params, TOKENS, MASK, True)
    for i in range(4):
        real = np.asarray(TOKENS[i])[np.asarray(MASK[i])]
        np.testing.assert_allclose(f_q[i], real.sum(0), atol=1e-5)
        np.testing.assert_allclose(f_p[i], real.mean(0), atol=1e-5)
        other = np.asarray(TOKENS[0])
        expected = np.mean([sum(float(q @ p) for q in other) for p in real])
        np.testing.assert_allclose(f_q[0] @ f_p[i], expected, atol=1e-5)


def test_a_filled_document_of_one_token_gives_chamfer_exactly():
    alone = TOKENS[:, :1]
    rows = np.asarray(document(PLAIN, alone, None, True)).reshape(4, R * 2**K, D)
    np.testing.assert_allclose(rows, np.repeat(np.asarray(alone), R * 2**K, 1), atol=1e-6)
    estimate = query(PLAIN, TOKENS, MASK) @ document(PLAIN, alone, None, True).T / R
    np.testing.assert_allclose(estimate, muvera.chamfer(TOKENS, alone, MASK), atol=1e-5)


def test_identities():
    f_q, f_p, bare = (
        query(DENSE, TOKENS, MASK),
        document(DENSE, TOKENS, MASK, True),
        document(DENSE, TOKENS, MASK, False),
    )
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(query(DENSE, TOKENS[:, order], MASK[:, order]), f_q, atol=1e-5)
    np.testing.assert_allclose(document(DENSE, TOKENS[:, order], MASK[:, order], False), bare, atol=1e-5)
    # additive over disjoint unions
    left = MASK & (jnp.arange(9) < 3)
    np.testing.assert_allclose(query(DENSE, TOKENS, left) + query(DENSE, TOKENS, MASK & ~left), f_q, atol=1e-5)
    # duplicates do not move means, but count twice in sums
    twice, both = jnp.concatenate([TOKENS, TOKENS], 1), jnp.concatenate([MASK, MASK], 1)
    for fill, expected in ((True, f_p), (False, bare)):
        np.testing.assert_allclose(document(DENSE, twice, both, fill), expected, atol=1e-5)
    np.testing.assert_allclose(query(DENSE, twice, both), 2 * f_q, atol=1e-5)
    # scale
    np.testing.assert_allclose(document(DENSE, 2.5 * TOKENS, MASK, True), 2.5 * f_p, atol=1e-5)
    # the query's blocks of a repetition add up to the projected sum
    total = np.asarray(f_q).reshape(4, R, 2**K, 4).sum(2)
    expected = np.einsum("bd,rdp->brp", np.where(np.asarray(MASK)[..., None], TOKENS, 0).sum(1), np.asarray(DENSE.proj))
    np.testing.assert_allclose(total, expected, atol=1e-5)


@pytest.mark.parametrize("junk", [0.0, 1e6, np.nan])
def test_masked_tokens_change_nothing(junk):
    more = jnp.concatenate([TOKENS, jnp.full((4, 3, D), junk)], 1)
    mask = jnp.concatenate([MASK, jnp.zeros((4, 3), bool)], 1)
    np.testing.assert_array_equal(query(DENSE, more, mask), query(DENSE, TOKENS, MASK))
    for fill in (True, False):
        np.testing.assert_array_equal(document(DENSE, more, mask, fill), document(DENSE, TOKENS, MASK, fill))
    inside = jnp.where(MASK[..., None], TOKENS, junk)
    for fill in (True, False):
        np.testing.assert_array_equal(document(DENSE, inside, MASK, fill), document(DENSE, TOKENS, MASK, fill))
    base = muvera.chamfer(TOKENS, TOKENS, MASK, MASK)
    np.testing.assert_array_equal(muvera.chamfer(inside, inside, MASK, MASK), base)
    sums, kept = muvera.ball_carve(inside[1], MASK[1], 0.2)
    expected, places = muvera.ball_carve(TOKENS[1][:5], None, 0.2)
    np.testing.assert_allclose(sums[:5], expected, atol=1e-6)
    np.testing.assert_array_equal(kept, np.concatenate([places, np.zeros(4, bool)]))
    assert (np.asarray(sums[5:]) == 0).all()


@pytest.mark.parametrize("k", [1, 4, 6])
def test_every_empty_block_takes_the_nearest_token(k):
    params = muvera.init_fde(jax.random.key(k), FDEConfig(D, 1, k, None, projection="identity"))
    found = np.asarray(document(params, TOKENS[:1], None, True)).reshape(2**k, D)
    np.testing.assert_allclose(found, blocks(params, TOKENS[0], "filled")[0], atol=1e-5)


def test_a_zero_projection_counts_as_a_zero_bit():
    params = FDEParams(jnp.asarray([[[1.0], [0.0]]]))
    tokens = jnp.asarray([[[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]])
    np.testing.assert_allclose(query(params, tokens), [[-1, 1, 1, 0]], atol=1e-6)


def test_drawn_params():
    config = FDEConfig(32, 400, 3, 8)
    params = muvera.init_fde(jax.random.key(0), config)
    assert params.simhash.shape == (400, 32, 3) and params.proj.shape == (400, 32, 8)
    np.testing.assert_allclose(np.abs(params.proj), 1 / np.sqrt(8), atol=1e-6)
    assert abs(float(params.simhash.mean())) < 0.02 and abs(float(params.simhash.std()) - 1) < 0.02
    sketch = np.asarray(muvera.init_fde(jax.random.key(0), FDEConfig(32, 400, 3, 8, projection="count_sketch")).proj)
    np.testing.assert_array_equal((sketch != 0).sum(-1), 1)
    assert set(np.unique(sketch)) == {-1, 0, 1}
    np.testing.assert_allclose((sketch != 0).mean((0, 1)), 1 / 8, atol=0.02)
    # both keep inner products on average over repetitions
    x, y = np.asarray(unit_tokens(5, 2, 32))
    for proj in (np.asarray(params.proj), sketch):
        products = np.einsum("rp,rp->r", np.einsum("d,rdp->rp", x, proj), np.einsum("d,rdp->rp", y, proj))
        assert abs(products.mean() - x @ y) < 4 * products.std() / 20
        assert products.std() > 0.05  # repetitions are independent
    assert muvera.init_fde(jax.random.key(0), FDEConfig(32, 2, 3, 32)).proj is None
    # a final projection keeps inner products of whole encodings too
    rng = np.random.default_rng(0)
    for how in ("dense", "count_sketch"):
        drawn = muvera.init_fde(jax.random.key(1), FDEConfig(D, R, K, 4, 4096, final_projection=how))
        tokens = unit_tokens(int(rng.integers(99)), 2, 5, D)
        plain = drawn.replace(final_matrix=None, final_index=None, final_sign=None, final_dim=None)
        for a, b in ((0, 0), (0, 1)):
            kept = query(drawn, tokens)[a] @ document(drawn, tokens, None, True)[b]
            exact = query(plain, tokens)[a] @ document(plain, tokens, None, True)[b]
            assert abs(float(kept - exact)) < 0.25 * R * 5


def test_chamfer():
    q = jnp.asarray([[[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [9.0, 9.0]]])
    p = jnp.asarray([[[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]], [[-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]])
    qmask = jnp.asarray([[True, True], [True, False]])
    pmask = jnp.asarray([[True, True, False], [True, True, True]])
    expected = [[1.0 + 0.8, 0.0 + 0.0], [1.0, 0.0]]
    for block in (1, 2, 50):
        np.testing.assert_allclose(muvera.chamfer(q, p, qmask, pmask, block), expected, atol=1e-6)
    nothing = muvera.chamfer(q, p, qmask & False, pmask.at[1].set(False))
    np.testing.assert_array_equal(nothing, 0.0)
    assert np.isneginf(muvera.chamfer(q, p, qmask, pmask.at[1].set(False))[:, 1]).all()
    # negative products count: the maximum starts from the tokens, not from 0
    np.testing.assert_allclose(muvera.chamfer(q[:1, :1], p[1:, :1])[0, 0], -1.0)
    scores = np.array(
        [[sum(max(float(a @ b) for b in pp) for a in qq) for pp in np.asarray(TOKENS)] for qq in np.asarray(TOKENS)]
    )
    np.testing.assert_allclose(muvera.chamfer(TOKENS, TOKENS, block=3), scores, atol=1e-5)
    values, ids = chamfer_topk(TOKENS, TOKENS, 3, chunk=3)
    np.testing.assert_array_equal(ids, np.argsort(-scores, 1, kind="stable")[:, :3])
    np.testing.assert_allclose(values, -np.sort(-scores, 1)[:, :3], atol=1e-5)
    np.testing.assert_array_equal(
        chamfer_topk(TOKENS, TOKENS, 1, MASK, MASK)[1][:, 0], jnp.argmax(muvera.chamfer(TOKENS, TOKENS, MASK, MASK), 1)
    )


def test_encodings_differentiate_within_their_cells():
    weights = jax.random.normal(jax.random.key(0), (R * 2**K * 4,))
    for encode in (query, lambda *a: document(*a, True)):
        value = lambda x, encode=encode: jnp.sum(encode(DENSE, x, MASK) @ weights)  # noqa: E731
        grad = jax.grad(value)(TOKENS)
        assert (np.asarray(grad)[~np.asarray(MASK)] == 0).all()
        # linear in the tokens as long as none changes its cell
        np.testing.assert_allclose(jnp.sum(grad * TOKENS), value(TOKENS), rtol=1e-4)


def test_ball_carving():
    tokens = jnp.asarray([[1.0, 0], [0, 1.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0]])
    same, mask = muvera.ball_carve(tokens, tau=1.5)
    np.testing.assert_allclose(same, tokens)
    assert mask.all()
    one, mask = muvera.ball_carve(tokens, tau=-1.0)
    np.testing.assert_allclose(one[0], tokens.sum(0), atol=1e-6)
    np.testing.assert_array_equal(mask, [True, False, False, False, False])
    np.testing.assert_array_equal(one[1:], 0)
    # by hand: (1,0) takes (0.8,0.6); (0,1) takes (0.6,0.8), which the first had not; (-1,0) stays alone
    found, mask = jax.jit(muvera.ball_carve)(tokens, None, 0.7)
    np.testing.assert_allclose(found, [[1.8, 0.6], [0.6, 1.8], [0, 0], [0, 0], [-1, 0]], atol=1e-6)
    np.testing.assert_array_equal(mask, [True, True, False, False, True])
    # a taken token opens no cluster, though a free one lies near it
    chain, mask = muvera.ball_carve(jnp.asarray([[1.0, 0], [0.8, 0.6], [0.28, 0.96]]), tau=0.7)
    np.testing.assert_allclose(chain, [[1.8, 0.6], [0, 0], [0.28, 0.96]], atol=1e-6)
    np.testing.assert_array_equal(mask, [True, False, True])
    # the boundary belongs to the ball, and a taken token is taken once
    edge, mask = muvera.ball_carve(jnp.asarray([[1.0, 0], [0.5, 0.0], [0.5, 0.0]]), tau=0.5)
    np.testing.assert_allclose(edge[0], [2.0, 0.0])
    np.testing.assert_array_equal(mask, [True, False, False])
    np.testing.assert_allclose(found.sum(0), tokens.sum(0), atol=1e-6)
    # carved queries score at most what whole ones do: a sum of maxima bounds the maximum of a sum
    whole = muvera.chamfer(TOKENS, TOKENS, MASK, MASK)
    carved = jax.vmap(lambda q, m: muvera.ball_carve(q, m, 0.3))(TOKENS, MASK)
    assert (muvera.chamfer(carved[0], TOKENS, carved[1], MASK) <= whole + 1e-5).all()


SETS, ASKED = unit_tokens(7, 60, 6, D), unit_tokens(8, 5, 4, D)
SET_MASK = jnp.asarray(np.random.default_rng(9).random((60, 6)) < 0.7).at[:, 0].set(True)
ASKED_MASK = jnp.asarray(np.arange(4) < np.array([4, 2, 3, 1, 4])[:, None])
build = jax.jit(muvera.build_index, static_argnums=(3, 4, 5, 6), static_argnames=("block",))
find = jax.jit(muvera.muvera_search, static_argnums=(3, 4, 5, 6))
INDEX = build(DENSE, SETS, SET_MASK)


def test_search_equals_its_parts():
    exact = np.asarray(muvera.chamfer(ASKED, SETS, ASKED_MASK, SET_MASK))
    encodings = np.asarray(document(DENSE, SETS, SET_MASK, True))
    np.testing.assert_allclose(INDEX.fdes, encodings, atol=1e-6)
    np.testing.assert_allclose(build(DENSE, SETS, SET_MASK, block=7).fdes, encodings, atol=1e-6)
    np.testing.assert_allclose(
        build(DENSE, SETS, SET_MASK, False).fdes, document(DENSE, SETS, SET_MASK, False), atol=1e-6
    )
    first = np.asarray(query(DENSE, ASKED, ASKED_MASK)) @ encodings.T
    found = find(INDEX, ASKED, ASKED_MASK, 3, 12, None, 16)
    for i in range(5):
        chosen = np.argsort(-first[i], kind="stable")[:12]
        best = chosen[np.argsort(-exact[i, chosen], kind="stable")[:3]]
        np.testing.assert_array_equal(found.ids[i], best)
        np.testing.assert_allclose(found.scores[i], exact[i, best], atol=1e-5)
    np.testing.assert_array_equal(found.scorer_calls, 12)
    # with every document a candidate, it is exhaustive search
    full = find(INDEX, ASKED, ASKED_MASK, 4, 60)
    np.testing.assert_array_equal(full.ids, np.argsort(-exact, 1, kind="stable")[:, :4])
    # carved queries are what is re-ranked, whole ones are what is encoded
    carved = jax.vmap(lambda q, m: muvera.ball_carve(q, m, 0.2))(ASKED, ASKED_MASK)
    rough = np.asarray(muvera.chamfer(carved[0], SETS, carved[1], SET_MASK))
    np.testing.assert_array_equal(find(INDEX, ASKED, ASKED_MASK, 4, 60, 0.2).ids, np.argsort(-rough, 1)[:, :4])
    assert not np.allclose(rough, exact)


def test_search_on_eight_devices_finds_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    index = build(DENSE, SETS[:56], SET_MASK[:56])
    spread = index.replace(**{f: jax.device_put(getattr(index, f), rows) for f in ("fdes", "tokens", "mask")})
    one, eight = (find(i, ASKED, ASKED_MASK, 5, 20) for i in (index, spread))
    np.testing.assert_array_equal(eight.ids, one.ids)
    np.testing.assert_allclose(eight.scores, one.scores, atol=1e-6)


def test_quantised_and_low_precision_indices():
    quantised = build(DENSE, SETS, SET_MASK, True, jnp.float32, 4, 64, jax.random.key(0))
    assert quantised.fdes is None and quantised.codes.dtype == jnp.uint8
    # more centroids than documents: nothing is lost
    scores = muvera.pq_adc_scores(quantised.codebooks, INDEX.fdes[:3], quantised.codes)
    np.testing.assert_allclose(scores, INDEX.fdes[:3] @ INDEX.fdes.T, atol=1e-4)
    for chunk in (13, 100):
        found = muvera.candidates(quantised, query(DENSE, ASKED, ASKED_MASK), 7, chunk)
        plain = muvera.candidates(INDEX, query(DENSE, ASKED, ASKED_MASK), 7, chunk)
        np.testing.assert_array_equal(found[1], plain[1])
    low = build(DENSE, SETS, SET_MASK, True, jnp.bfloat16)
    assert low.fdes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(find(low, ASKED, ASKED_MASK, 2, 30).ids, find(INDEX, ASKED, ASKED_MASK, 2, 30).ids)
    config = FDEConfig(D, R, K, 4)
    for index in (INDEX, quantised, low):
        again = muvera.index_from_arrays(config, jax.tree.map(np.asarray, muvera.to_arrays(index)))
        assert jax.tree.structure(again) == jax.tree.structure(index)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(index), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    with pytest.raises(ValueError, match="pass a key"):
        muvera.build_index(DENSE, SETS, SET_MASK, pq_group=4)


def test_fingerprints_tell_params_apart():
    muvera.check_fingerprint(INDEX, DENSE)
    np.testing.assert_array_equal(jax.jit(fingerprint_of)(DENSE), fingerprint_of(jax.tree.map(np.asarray, DENSE)))
    swapped = DENSE.simhash[:, ::-1]
    other = [
        muvera.init_fde(jax.random.key(9), FDEConfig(D, R, K, 4)),
        PLAIN,
        DENSE.replace(simhash=swapped),
        DENSE.replace(proj=DENSE.proj.at[1, 2, 3].multiply(-1)),
        DENSE.replace(simhash=DENSE.proj, proj=DENSE.simhash),
        DENSE.replace(simhash=DENSE.simhash.reshape(R, K, D)),
    ]
    for params in other:
        with pytest.raises(ValueError, match="encoded with different FDEParams.*encode both with the params"):
            muvera.check_fingerprint(INDEX, params)
    prints = {tuple(np.asarray(fingerprint_of(p)).tolist()) for p in [DENSE, *other]}
    assert len(prints) == 7
    kinds = [jnp.int8, jnp.bool_, jnp.bfloat16, jnp.int32, jnp.uint32, jnp.float32]
    assert len({tuple(np.asarray(fingerprint_of(jnp.ones(3, k))).tolist()) for k in kinds}) == 6


def test_recall_rises_with_repetitions_and_beats_mean_pooling():
    data = topic_token_sets(0)
    tokens, asked = jnp.asarray(data["documents"]["tokens"]), jnp.asarray(data["queries"]["tokens"])
    exact = np.asarray(muvera.chamfer(asked, tokens))
    nearest = exact.argmax(1)
    recall, agreement = {}, {}
    for name, config in {
        1: FDEConfig(32, 1, 4, projection="identity", d_proj=None),
        4: FDEConfig(32, 4, 4, projection="identity", d_proj=None),
        16: FDEConfig(32, 16, 4, projection="identity", d_proj=None),
        "paper": FDEConfig(32, 20, 5, 16),
    }.items():
        params = muvera.init_fde(jax.random.key(0), config)
        index = build(params, tokens)
        scores = np.asarray(query(params, asked) @ index.fdes.T)
        recall[name] = np.mean(scores.argmax(1) == nearest)
        agreement[name] = np.corrcoef(scores.ravel(), exact.ravel())[0, 1]
        if name == "paper":
            found = find(index, asked, None, 1, 10)
            np.testing.assert_array_equal(found.ids[:, 0], nearest)
            np.testing.assert_allclose(found.scores[:, 0], exact.max(1), atol=1e-5)
    assert agreement[1] < agreement[4] < agreement[16]
    pooled = np.mean(np.argmax(np.asarray(asked.mean(1) @ tokens.mean(1).T), 1) == nearest)
    assert recall["paper"] >= 0.9 and recall["paper"] >= pooled + 0.2
    assert 0.5 <= pooled <= 0.7 and 0.45 <= recall[1] <= 0.75


def test_the_estimate_nears_chamfer_with_more_hyperplanes_and_never_exceeds_it():
    # the theorem's setting: unit vectors, one repetition, no projection, filled
    exact = np.asarray(muvera.chamfer(ASKED, SETS)) / 4
    error = {}
    for k in (1, 4, 8):
        config, errors = FDEConfig(D, 1, k, projection="identity", d_proj=None), []
        for seed in range(8):
            params = muvera.init_fde(jax.random.key(seed), config)
            errors.append(np.asarray(query(params, ASKED) @ document(params, SETS, None, True).T) / 4 - exact)
        # a mean of tokens, or one token, is at most the best token
        assert np.max(errors) < 1e-5
        error[k] = -np.mean(errors)
    assert error[8] < 0.75 * error[4] < 0.6 * error[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_simhash": 31}, r"num_simhash must be in \[0, 30\], got 31"),
        ({"num_simhash": -1}, r"num_simhash must be in \[0, 30\], got -1"),
        ({"d_proj": 0}, r"d_proj must be in \[1, 6\] \(the dimension of a token\), got 0"),
        ({"d_proj": 7}, r"d_proj must be in \[1, 6\]"),
        ({"num_repetitions": 0}, "must be at least 1; got 6 and 0"),
        ({"projection": "ams"}, "projection must be 'dense', 'count_sketch' or 'identity', got 'ams'"),
        ({"projection": "identity"}, "keeps all 6 dimensions; set d_proj to None, not 4"),
        ({"final_dim": 0}, "final_dim must be at least 1 or None, got 0"),
        ({"final_projection": "ams"}, "final_projection must be 'dense' or 'count_sketch', got 'ams'"),
    ],
)
def test_wrong_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        FDEConfig(**{"d": 6, "d_proj": 4, **change})
    config = FDEConfig(6, 3, 4, 5, 7)
    assert (config.fde_dim, config.output_dim, config.block_dim) == (240, 7, 5)
    assert FDEConfig(6, 3, 4, None).fde_dim == FDEConfig(6, 3, 4, None).output_dim == 288


def test_wrong_tokens_are_named():
    with pytest.raises(ValueError, match="fill_empty is for documents only"):
        muvera.encode_query_fde(DENSE, TOKENS, MASK, fill_empty=True)
    with pytest.raises(ValueError, match="tokens have 5 dimensions, the encoding's params are for 6"):
        muvera.encode_query_fde(DENSE, TOKENS[..., :5])
    with pytest.raises(ValueError, match="need 1 <= k <= num_candidates <= 60 documents; got k 5, num_candidates 4"):
        muvera.muvera_search(INDEX, ASKED, k=5, num_candidates=4)
    good = np.asarray(TOKENS)
    muvera.check_tokens(good, np.asarray(MASK), 6)
    bad = good.copy()
    bad[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="token 2 of set 1 of documents is not finite"):
        muvera.check_tokens(bad, None, 6, "documents")
    hidden = np.asarray(MASK).copy()
    bad[1, 2], bad[1, 7] = good[1, 2], np.nan
    muvera.check_tokens(bad, hidden)  # behind the mask anything may lie
    hidden[3] = False
    with pytest.raises(ValueError, match=r"set 3 of queries has no tokens \(1 such\)"):
        muvera.check_tokens(good, hidden, what="queries")
    for tokens, mask, d, message in (
        (good, MASK, 5, "tokens have 6 dimensions, the encoding expects 5"),
        (good[0], None, None, r"must be \[N, n, d\] with at least one token a set, got \[9, 6\]"),
        (good[:, :0], None, None, r"got \[4, 0, 6\]"),
        (good, MASK[:, :3], None, r"the mask of tokens must be \[4, 9\], got \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            muvera.check_tokens(tokens, mask, d)
    with pytest.warns(UserWarning, match=r"not of unit length \(2 to 2\)"):
        muvera.check_tokens(2 * good)
