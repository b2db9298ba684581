"""Search in chunks, over eight devices and in two stages, against one exact top-k over all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from zoo.ops import search


def integers(seed, *shape):
    """Small integers: products are exact and tie often."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


QUERIES, DOCUMENTS = integers(0, 5, 3), integers(1, 43, 3)


def brute(queries, documents, k, mask=None):
    """By the definition: sort all scores, equal ones by id."""
    values, ids = [], []
    for q in np.asarray(queries, np.float64):
        scores = [(-float(np.dot(q, p)), i) for i, p in enumerate(np.asarray(documents, np.float64))]
        scores = sorted(s for s in scores if mask is None or mask[s[1]])[:k]
        scores += [(np.inf, -1)] * (k - len(scores))
        values.append([-s for s, _ in scores])
        ids.append([i for _, i in scores])
    return np.array(values), np.array(ids)


def check(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("chunk", [1, 4, 10, 42, 43, 100])
@pytest.mark.parametrize("k", [1, 6, 43])
def test_chunks_give_one_exact_top_k(chunk, k):
    check(search.mips_topk(QUERIES, DOCUMENTS, k, chunk), brute(QUERIES, DOCUMENTS, k))


@pytest.mark.parametrize("chunk", [7, 43])
def test_masked_documents_are_never_found(chunk):
    mask = np.arange(43) % 3 == 1
    found = jax.jit(search.mips_topk, static_argnums=(2, 3))(QUERIES, DOCUMENTS, 20, chunk, jnp.asarray(mask))
    check(found, brute(QUERIES, DOCUMENTS, 20, mask))
    assert (np.asarray(found[1])[:, 14:] == -1).all() and np.isneginf(np.asarray(found[0])[:, 14:]).all()


def test_scores_are_float32_and_equal_products():
    queries, documents = jax.random.normal(jax.random.key(0), (4, 8)), jax.random.normal(jax.random.key(1), (30, 8))
    values, ids = search.mips_topk(queries, documents, 5, 7)
    products = np.asarray(queries, np.float64) @ np.asarray(documents, np.float64).T
    np.testing.assert_array_equal(ids, np.argsort(-products, 1)[:, :5])
    np.testing.assert_allclose(values, -np.sort(-products, 1)[:, :5], atol=1e-5)
    low = search.mips_topk(queries, documents.astype(jnp.bfloat16), 5, 7)
    rounded = np.asarray(queries) @ np.asarray(documents.astype(jnp.bfloat16), np.float32).T
    assert low[0].dtype == jnp.float32
    np.testing.assert_allclose(low[0], -np.sort(-rounded, 1)[:, :5], atol=1e-5)


def test_memory_is_bounded_by_the_chunk():
    queries, documents = jnp.zeros((64, 4)), jnp.zeros((65_536, 4))
    size = lambda chunk: (  # noqa: E731
        jax.jit(search.mips_topk, static_argnums=(2, 3))
        .lower(queries, documents, 5, chunk)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    # all scores would take 16.8 MB
    assert size(1024) < 2e6 < 16e6 < size(65_536)


@pytest.mark.parametrize(("documents", "chunk"), [(DOCUMENTS[:40], 100), (DOCUMENTS, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_eight_devices_find_what_one_finds(documents, chunk, masked):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    n = documents.shape[0]
    mask = np.arange(n) % 4 != 2 if masked else None
    given = None if mask is None else jnp.asarray(mask)
    if n % 8 == 0:
        documents = jax.device_put(documents, NamedSharding(mesh, PartitionSpec("data")))
    for k in (3, n):
        run = jax.jit(lambda q, p, m, k=k: search.sharded_mips_topk(q, p, k, mesh, "data", chunk, m))
        found = run(QUERIES, documents, given)
        check(found, brute(QUERIES, documents, k, mask))
        check(found, search.mips_topk(QUERIES, documents, k, chunk, given))


@pytest.mark.slow
def test_two_axes_and_pmap_merge_alike():
    documents = DOCUMENTS[:40]
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = brute(QUERIES, documents, 7)
    check(search.sharded_mips_topk(QUERIES, documents, 7, mesh, ("data", "fsdp"), 2), expected)
    check(search.sharded_mips_topk(QUERIES, documents, 7, mesh, "fsdp", 2), expected)

    def local(shard):
        return search.merge_over_axis(*search.mips_topk(QUERIES, shard, 5), 7, 5, "i")

    values, ids = jax.pmap(local, "i")(documents.reshape(8, 5, 3))
    for device in range(8):
        check((values[device], ids[device]), expected)


def test_only_candidates_travel():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    documents = jax.device_put(integers(2, 8000, 3), NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda q, p: search.sharded_mips_topk(q, p, 4, mesh))
    text = run.lower(QUERIES, documents).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    assert gathered and "all-reduce(" not in text and "all-to-all(" not in text
    assert all("[5,32]" in line or "[8,5,4]" in line for line in gathered), gathered


def distance(query, candidates):
    """An exact scorer of two arrays: minus the L1 distance, plus the document's bonus."""
    return -jnp.sum(jnp.abs(candidates["x"] - query["x"]), -1) + candidates["bonus"]


def test_two_stages():
    queries, documents = {"x": QUERIES}, {"x": DOCUMENTS, "bonus": jnp.arange(43.0) % 2}
    exact = np.stack([np.asarray(distance({"x": q}, documents)) for q in QUERIES])
    order = np.argsort(-exact, 1, kind="stable")
    full = search.two_stage(QUERIES, DOCUMENTS, queries, documents, distance, 6, 43, 10)
    np.testing.assert_array_equal(full.ids, order[:, :6])  # all are candidates: exact, ties by id
    np.testing.assert_array_equal(full.scores, np.take_along_axis(exact, order[:, :6], 1))
    np.testing.assert_array_equal(full.scorer_calls, 43)
    run = jax.jit(lambda q: search.two_stage(q, DOCUMENTS, {"x": q}, documents, distance, 4, 9, 10, batch=2))
    found = run(QUERIES)
    _, chosen = brute(QUERIES, DOCUMENTS, 9)
    for i, row in enumerate(chosen):
        best = sorted(row, key=lambda j, i=i: (-exact[i, j], j))[:4]
        np.testing.assert_array_equal(found.ids[i], best)
        np.testing.assert_array_equal(found.scores[i], exact[i, best])
    np.testing.assert_array_equal(found.scorer_calls, 9)


def weighted(queries, rows):
    """A score of pytrees: products of the vectors, plus the document's own."""
    return queries["x"] @ rows["x"].T + rows["own"]


ROWS = {"x": DOCUMENTS, "own": jnp.asarray(np.arange(43) % 3, jnp.float32)}


def scored(k, mask=None):
    """The k best under :func:`weighted` by the definition: one more dimension."""
    more = jnp.concatenate([QUERIES, jnp.ones((5, 1))], 1), jnp.concatenate([DOCUMENTS, ROWS["own"][:, None]], 1)
    return brute(*more, k, mask)


@pytest.mark.parametrize("chunk", [5, 50])
def test_any_score_of_rows_can_be_searched(chunk):
    mask = np.arange(43) % 4 != 1
    for given in (None, mask):
        found = search.scored_topk(
            {"x": QUERIES}, ROWS, weighted, 7, chunk, None if given is None else jnp.asarray(given)
        )
        check(found, scored(7, given))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    found = search.sharded_topk({"x": QUERIES}, ROWS, weighted, 7, mesh, "data", chunk, jnp.asarray(mask))
    check(found, scored(7, mask))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [40, 43])
def test_two_stages_over_eight_devices_find_what_one_finds(n, masked):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.tree.map(lambda x: x[:n], ROWS)
    queries, documents = {"x": QUERIES}, {"x": DOCUMENTS[:n], "bonus": jnp.arange(1.0 * n) % 2}
    mask = jnp.arange(n) % 5 != 0 if masked else None
    stages = {"x": QUERIES}, rows, queries, documents, distance
    for k, width in ((4, 9), (n, n)):
        one = search.two_stage(*stages, k, width, 10, mask, score=weighted)
        run = jax.jit(
            lambda k=k, width=width: search.sharded_two_stage(
                *stages, k, width, mesh, "data", 3, mask, batch=2, score=weighted
            )
        )
        eight = run()
        check((eight.scores, eight.ids), (one.scores, one.ids))
        np.testing.assert_array_equal(eight.scorer_calls, one.scorer_calls)
        np.testing.assert_array_equal(eight.scorer_calls, min(width, n if mask is None else int(mask.sum())))
    assert (one.scores[:, 1:] == one.scores[:, :-1]).any()


def test_a_document_that_scores_nothing_is_still_a_document():
    # an exact score of -inf ranks behind every other, before empty slots, on one device and on eight
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    documents = {"x": DOCUMENTS[:40], "bonus": jnp.where(jnp.arange(40) == 37, -jnp.inf, 0.0)}
    mask = jnp.arange(40) >= 36
    stages = QUERIES, DOCUMENTS[:40], {"x": QUERIES}, documents, distance, 6, 6
    one = search.two_stage(*stages, 10, mask)
    eight = search.sharded_two_stage(*stages, mesh, "data", 10, mask)
    check((eight.scores, eight.ids), (one.scores, one.ids))
    np.testing.assert_array_equal(one.ids[:, 3:], np.tile([37, -1, -1], (5, 1)))


def test_only_candidates_travel_in_two_stages():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    documents = jax.device_put(integers(2, 8000, 3), NamedSharding(mesh, PartitionSpec("data")))
    scorer = lambda q, p: p @ q  # noqa: E731
    run = jax.jit(lambda q, p: search.sharded_two_stage(q, p, q, p, scorer, 4, 6, mesh))
    text = run.lower(QUERIES, documents).compile().as_text()
    assert "all-to-all(" not in text
    moved = [line for line in text.splitlines() if "all-gather(" in line or "all-reduce(" in line]
    assert moved and all("8000" not in line and "1000" not in line for line in moved), moved


def test_approximate_search_is_exact_off_tpu_and_approximate_on_it():
    for target in (0.5, 1.0):
        found = search.approx_mips_topk(QUERIES, DOCUMENTS, 6, 10, recall_target=target)
        check(found, brute(QUERIES, DOCUMENTS, 6))
    mask = np.arange(43) % 3 == 1
    check(search.approx_mips_topk(QUERIES, DOCUMENTS, 20, 7, jnp.asarray(mask)), brute(QUERIES, DOCUMENTS, 20, mask))
    run = lambda target: jax.jit(  # noqa: E731
        lambda q, p: search.approx_mips_topk(q, p, 6, 20, recall_target=target)
    )
    text = {
        (platform, target): run(target).trace(QUERIES, DOCUMENTS).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("tpu", "cpu")
        for target in (0.8, 1.0)
    }
    approximate = {key for key, value in text.items() if "ApproxTopK" in value}
    assert approximate == {("tpu", 0.8)}
    assert "recall_target = 8.000000e-01" in text["tpu", 0.8]
    for target in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"recall_target must be in \(0, 1\], got {target}"):
            search.approx_mips_topk(QUERIES, DOCUMENTS, 6, recall_target=target)


def test_fewer_documents_than_candidates():
    mask = jnp.arange(43) < 2
    queries, documents = {"x": QUERIES}, {"x": DOCUMENTS, "bonus": jnp.zeros(43)}
    found = search.two_stage(QUERIES, DOCUMENTS, queries, documents, distance, 3, 5, 10, mask)
    np.testing.assert_array_equal(found.scorer_calls, 2)
    assert (np.sort(np.asarray(found.ids), 1) == [-1, 0, 1]).all()
    assert (np.asarray(found.ids)[:, 2] == -1).all() and np.isneginf(np.asarray(found.scores)[:, 2]).all()
    exact = np.stack([np.asarray(distance({"x": q}, documents)) for q in QUERIES])[:, :2]
    np.testing.assert_array_equal(found.scores[:, :2], -np.sort(-exact, 1))


def test_wrong_sizes_are_named():
    for k in (0, 44):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 43\], the number of documents; got {k}"):
            search.mips_topk(QUERIES, DOCUMENTS, k)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        search.mips_topk(QUERIES, DOCUMENTS, 2, 0)
    with pytest.raises(ValueError, match="need 1 <= k <= num_candidates <= 43 documents; got k 5, num_candidates 4"):
        search.two_stage(QUERIES, DOCUMENTS, {}, {}, distance, 5, 4)
    with pytest.raises(ValueError, match="num_candidates 44"):
        search.check_stages(1, 44, 43)
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], the number of candidates; got 3"):
        search.rerank({}, {}, jnp.zeros((1, 2), jnp.int32), distance, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="axis 'model' is not one of the mesh's: data"):
        search.sharded_mips_topk(QUERIES, DOCUMENTS, 2, mesh, "model")
    with pytest.raises(ValueError, match=r"k must be in \[1, 43\]"):
        search.sharded_mips_topk(QUERIES, DOCUMENTS, 44, mesh)
    with pytest.raises(ValueError, match="num_candidates 44"):
        search.sharded_two_stage(QUERIES, DOCUMENTS, {}, {}, distance, 1, 44, mesh)
