"""A matrix spread over devices is searched and gathered as on one device, ties and padding included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zoo.ops.rows import Rows, as_rows

N, D = 21, 3


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    documents = rng.integers(-2, 3, (N, D)).astype(np.float32)  # with many ties
    documents[17] = documents[2]
    return rng.integers(-2, 3, (5, D)).astype(np.float32), documents


def spread(documents, how):
    padded = np.concatenate([documents, np.full((3, D), 99, np.float32)])
    if how == "one":
        return as_rows(jnp.asarray(documents))
    if how == "pmap":
        return Rows(padded.reshape(8, 3, D), N, None, "data")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    axes = ("data", "fsdp", "tensor")
    return Rows(jax.device_put(padded, NamedSharding(mesh, P(axes))), N, mesh, axes)


def run(function, rows, how, *args):
    if how == "pmap":
        out = jax.pmap(function, axis_name="data", in_axes=(0, *[None] * len(args)))(rows, *args)
        for x in jax.tree.leaves(out):
            assert (np.asarray(x) == np.asarray(x)[0]).all()
        return jax.tree.map(lambda x: x[0], out)
    return jax.jit(function)(rows, *args)


@pytest.mark.parametrize("how", ["one", "mesh", "pmap"])
@pytest.mark.parametrize("k", [1, 5, 21])
def test_search_is_a_full_sort(problem, how, k):
    queries, documents = problem
    values, ids = run(lambda r, q: r.mips_topk(q, k, 2), spread(documents, how), how, queries)
    scores = queries @ documents.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, order, 1))


@pytest.mark.parametrize("how", ["one", "mesh", "pmap"])
def test_take_gathers_and_gives_zeros_outside(problem, how):
    ids = jnp.array([[0, 20, 7], [-1, 21, 3], [23, 17, 100]])
    got = run(lambda r, i: r.take(i), spread(problem[1], how), how, ids)
    for place, i in np.ndenumerate(np.asarray(ids)):
        np.testing.assert_array_equal(got[place], problem[1][i] if 0 <= i < N else np.zeros(D))


@pytest.mark.parametrize("how", ["one", "mesh", "pmap"])
@pytest.mark.parametrize("chunk", [1, 2, 50])
def test_scan_visits_each_row_once(problem, how, chunk):
    def total(rows):
        def local(shard):
            add = lambda c, part: (c + jnp.where(part.valid[:, None], part.values, 0.0).sum(0), None)  # noqa: E731
            ids = lambda c, part: (  # noqa: E731
                c + jnp.sum(jnp.where(part.valid, part.start + jnp.arange(len(part.valid)), 0)),
                None,
            )
            return (
                shard.sum(shard.scan(add, jnp.zeros(D), chunk)),
                shard.sum(shard.scan(ids, jnp.int32(0), chunk)),
                shard.maximum(
                    jnp.max(jnp.where(shard.offset + jnp.arange(len(shard.values)) < N, shard.values[:, 0], -9))
                ),
            )

        return rows.map_shards(local)

    sums, ids, most = run(total, spread(problem[1], how), how)
    np.testing.assert_allclose(sums, problem[1].sum(0))
    assert int(ids) == N * (N - 1) // 2 and float(most) == problem[1][:, 0].max()


def test_k_out_of_range(problem):
    with pytest.raises(ValueError, match=r"k must be in \[1, 21\], the number of documents; got 22"):
        as_rows(jnp.asarray(problem[1])).mips_topk(jnp.asarray(problem[0]), 22)
    rows = as_rows(jnp.asarray(problem[1]))
    assert as_rows(rows) is rows
