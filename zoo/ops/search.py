"""Top-k search in chunks, over devices, and in two stages, with any score of queries against rows of documents.

Every search here but :func:`approx_mips_topk` returns what one exact top-k over all scores would, ties by the lowest
document id included, without ever holding more scores than a chunk's.  A slot that no document fills holds score
``-inf`` and id ``-1``.  A score is a pure function ``(queries, rows) -> [q, c]`` of pytrees with leading axes q and c:
:func:`inner_products` of plain vectors, or whatever reads codes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from zoo.ops.blocks import in_blocks
from zoo.ops.topk import top_k

Found = tuple[Float[Array, "q k"], Int[Array, "q k"]]
Score = Callable[[PyTree, PyTree], Array]


def chunked_topk(
    score: Callable[[Array], Array],
    queries: int,
    documents: int,
    k: int,
    chunk: int,
    mask: Any = None,
    select: Callable[[Array, int], tuple[Array, Array]] = top_k,
) -> Found:
    """The k best of ``documents`` scores for each query, computed a chunk of documents at a time.

    Args:
      score: ``start -> f32 [q, chunk]``: scores of documents ``start .. start + chunk - 1`` (``start`` is traced).
      queries, documents: q and n.
      k: how many, in ``[1, n]``.
      chunk: documents scored at a time; memory is O(q (chunk + k)).
      mask: bool ``[n]``, documents that may be found; all by default.
      select: ``([q, chunk], k) -> values and places`` of a chunk's best; exact by default.

    Returns:
      Scores f32 ``[q, k]``, falling, and ids i32 ``[q, k]``; ``-inf`` and ``-1`` where there is no document.  A NaN
      score precedes all others (see ``zoo.ops.topk``): check inputs before.

    Raises:
      ValueError: k or chunk out of range.
    """
    if not 1 <= k <= documents:
        raise ValueError(f"k must be in [1, {documents}], the number of documents; got {k}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    chunk = min(chunk, documents)

    def step(best, number):
        # the last chunk ends with the last document; what it shares with the one before is masked, never copied
        start = jnp.minimum(number * chunk, documents - chunk)
        ids = start + jnp.arange(chunk, dtype=jnp.int32)
        valid = ids >= number * chunk
        if mask is not None:
            valid &= jax.lax.dynamic_slice_in_dim(mask, start, chunk)
        values, at = select(jnp.where(valid, score(start).astype(jnp.float32), -jnp.inf), min(k, chunk))
        return _merge(best, (values, ids[at]), k), None

    nothing = (jnp.full((queries, k), -jnp.inf), jnp.full((queries, k), -1, jnp.int32))
    first, _ = step(nothing, jnp.int32(0))
    chunks = -(-documents // chunk)
    return first if chunks == 1 else jax.lax.scan(step, first, jnp.arange(1, chunks, dtype=jnp.int32))[0]


def _merge(a: tuple[Array, Array], b: tuple[Array, Array], k: int) -> Found:
    # a holds the lower ids, so the order of places breaks ties by id; its empty slots precede masked documents of b
    values, at = jax.lax.top_k(jnp.concatenate([a[0], b[0]], -1), k)
    return values, jnp.take_along_axis(jnp.concatenate([a[1], b[1]], -1), at, -1)


def inner_products(queries: Float[Array, "q d"], rows: Float[Array, "c d"]) -> Float[Array, "q c"]:
    """Products of every query with every row, accumulated in float32 whatever the inputs' types."""
    kind = jnp.promote_types(queries.dtype, rows.dtype)
    return jnp.matmul(
        queries.astype(kind), rows.astype(kind).T, precision="highest", preferred_element_type=jnp.float32
    )


def scored_topk(
    queries: PyTree,
    documents: PyTree,
    score: Score,
    k: int,
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
    select: Callable[[Array, int], tuple[Array, Array]] = top_k,
) -> Found:
    """The k documents with the largest scores, for any score that a chunk of rows is enough for.

    Args:
      queries, documents: pytrees with leading axes q and n.
      score: ``(queries, rows) -> [q, chunk]``; rows are ``chunk`` consecutive documents.
      k: how many, in ``[1, n]``.
      chunk: documents scored at a time (``lax.scan``); memory is O(q (chunk + k)) and what ``score`` takes.
      mask: documents that may be found; all by default.
      select: see :func:`chunked_topk`.

    Returns:
      Scores ``[q, k]``, falling, ties by the lowest id, and ids ``[q, k]``; see :func:`chunked_topk`.

    Raises:
      ValueError: k or chunk out of range.
    """
    n = _rows(documents)
    size = min(chunk, n)

    def part(start):
        return score(queries, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), documents))

    return chunked_topk(part, _rows(queries), n, k, chunk, mask, select)


def mips_topk(
    queries: Float[Array, "q d"],
    documents: Float[Array, "n d"],
    k: int,
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
) -> Found:
    """The k documents with the largest inner products, exactly: :func:`scored_topk` of :func:`inner_products`.

    Args:
      queries, documents: vectors of one dimension.
      k, chunk, mask: as in :func:`scored_topk`.

    Raises:
      ValueError: k or chunk out of range.
    """
    return scored_topk(queries, documents, inner_products, k, chunk, mask)


def approx_mips_topk(
    queries: Float[Array, "q d"],
    documents: Float[Array, "n d"],
    k: int,
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
    recall_target: float = 0.95,
) -> Found:
    """:func:`mips_topk` with ``lax.approx_max_k`` for the selection where it exists, on TPU; exact elsewhere.

    On TPU each chunk keeps one maximum of every bin, so that a document of the true top k is missed with probability at
    most ``1 - recall_target``; scores are exact, and ties may fall to any id.  Other platforms would run a full sort
    instead of it, exact as well: they get :func:`zoo.ops.topk.top_k`, which is exact and faster.

    Args:
      queries, documents, k, chunk, mask: as in :func:`mips_topk`.
      recall_target: expected share of the true top k, in (0, 1].

    Raises:
      ValueError: k, chunk or recall_target out of range.
    """
    if not 0 < recall_target <= 1:
        raise ValueError(f"recall_target must be in (0, 1], got {recall_target}")
    # approx_max_k refuses 1: there is nothing approximate to do
    select = top_k if recall_target == 1 else functools.partial(_approximate, recall_target=recall_target)
    return scored_topk(queries, documents, inner_products, k, chunk, mask, select)


def _approximate(scores: Array, k: int, recall_target: float) -> tuple[Array, Array]:
    approximate = functools.partial(jax.lax.approx_max_k, k=k, recall_target=recall_target)
    return jax.lax.platform_dependent(scores, tpu=lambda x: tuple(approximate(x)), default=lambda x: top_k(x, k))


def merge_over_axis(values: Float[Array, "q c"], ids: Int[Array, "q c"], k: int, shard: int, axis_name: Any) -> Found:
    """Merges each device's candidates under a mapped axis: only the candidates travel, never documents or scores.

    Args:
      values, ids: this device's best, as a search over its own documents returns them (``-1`` where there is none).
      k: how many to keep, at most the number of devices times c.
      shard: documents on each device; device i holds ids ``i * shard`` onwards.
      axis_name: the mapped axis (``shard_map`` or ``pmap``), or several, outermost first.

    Returns:
      The same on every device: scores ``[q, k]`` and global ids.
    """
    ids = jnp.where(ids < 0, -1, ids + shard * jax.lax.axis_index(axis_name))
    values, ids = (jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (values, ids))
    # shards in their order hold rising ids, so places break ties by id again; empty slots go behind every document
    order = jnp.argsort(ids < 0, axis=-1, stable=True)
    values, at = jax.lax.top_k(jnp.take_along_axis(values, order, -1), k)
    return values, jnp.take_along_axis(jnp.take_along_axis(ids, order, -1), at, -1)


def sharded_topk(
    queries: PyTree,
    documents: PyTree,
    score: Score,
    k: int,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
) -> Found:
    """:func:`scored_topk` with the documents sharded over a mesh axis: the same ids and scores as on one device.

    Every device searches its own shard; all-gather moves ``min(k, shard)`` candidates a device.  Call it under ``jit``
    or not.  If the shards are unequal, documents are padded (a copy): prefer a multiple of the axis' size.

    Args:
      queries: replicated.
      documents: global arrays, best already sharded along their first axis.
      score, k, chunk, mask: as in :func:`scored_topk`; chunk counts documents of one shard.
      mesh, axis: the mesh and the axis the documents lie along.

    Raises:
      ValueError: k or chunk out of range, or a mesh without that axis.
    """
    n = _rows(documents)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], the number of documents; got {k}")

    def local(queries, documents, mask, shard, name):
        values, ids = scored_topk(queries, documents["first"], score, min(k, shard), chunk, mask)
        return merge_over_axis(values, ids, k, shard, name)

    return _over_shards(local, queries, {"first": documents}, mesh, axis, mask)


def _over_shards(local: Callable, queries: PyTree, documents: PyTree, mesh: Mesh, axis: Any, mask: Any) -> PyTree:
    """Runs ``local(queries, documents, mask, shard, axis name)`` on every device's rows; results must be replicated."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [a for a in axes if a not in mesh.shape]
    if missing:
        raise ValueError(f"axis {missing[0]!r} is not one of the mesh's: {', '.join(mesh.shape)}")
    n, shards = _rows(documents), math.prod(mesh.shape[a] for a in axes)
    short = -n % shards
    mask = jnp.ones(n, bool) if mask is None else mask
    if short:
        pad = lambda x: jnp.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1)))  # noqa: E731
        documents, mask = jax.tree.map(pad, documents), pad(mask)
    name = axes if len(axes) > 1 else axes[0]
    spec, everywhere = PartitionSpec(name), PartitionSpec()
    # the collectives make the result equal on all devices, which the checker of replication cannot see
    mapped = jax.shard_map(
        lambda q, d, m: local(q, d, m, (n + short) // shards, name),
        mesh=mesh,
        in_specs=(everywhere, spec, spec),
        out_specs=everywhere,
        check_vma=False,
    )
    return mapped(queries, documents, mask)


def sharded_mips_topk(
    queries: Float[Array, "q d"],
    documents: Float[Array, "n d"],
    k: int,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
) -> Found:
    """:func:`mips_topk` over a mesh axis: :func:`sharded_topk` of :func:`inner_products`."""
    return sharded_topk(queries, documents, inner_products, k, mesh, axis, chunk, mask)


@struct.dataclass
class Ranking:
    """What a two-stage search found.

    Attributes:
      scores: f32 ``[q, k]``, exact scores, falling; ``-inf`` where there is no document.
      ids: i32 ``[q, k]``, ties by the lowest id; ``-1`` where there is no document.
      scorer_calls: i32 ``[q]``, pairs the exact scorer was asked for.
    """

    scores: Any
    ids: Any
    scorer_calls: Any


def rerank(
    queries: PyTree,
    documents: PyTree,
    candidates: Int[Array, "q c"],
    scorer: Callable[[PyTree, PyTree], Array],
    k: int,
    batch: int = 8,
    known: Found | None = None,
) -> Ranking:
    """Gathers each query's candidates and ranks them by an exact scorer.

    Args:
      queries: arrays with leading axis q; anything the scorer reads.
      documents: arrays with leading axis n.
      candidates: ids, in any order, none twice; ``-1`` is no candidate.
      scorer: pure, ``(query, candidates) -> [c]``: one query's arrays and those of its c candidates.
      k: how many to keep, in ``[1, c]``, or ``[1, c + a]`` with ``known``.
      batch: queries scored at a time; memory is ``batch`` x c gathered documents.
      known: exact scores ``[q, a]`` that have been paid for already, and their ids (``-1`` for none; none of them among
        the candidates): they join the ranking without a call.

    Raises:
      ValueError: k out of range.
    """
    width = candidates.shape[1] + (0 if known is None else known[1].shape[1])
    if not 1 <= k <= width:
        raise ValueError(f"k must be in [1, {width}], the number of candidates; got {k}")
    # rising ids make ties among exact scores fall to the lowest id; no candidate goes last
    last = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(candidates < 0, last, candidates), -1)

    def one(row):
        query, ids, *more = row
        taken = jax.tree.map(lambda x: jnp.take(x, ids, axis=0, mode="clip"), documents)
        exact = jnp.where(ids == last, -jnp.inf, scorer(query, taken).astype(jnp.float32))
        if more:
            absent = more[1] < 0
            ids = jnp.concatenate([ids, jnp.where(absent, last, more[1])])
            exact = jnp.concatenate([exact, jnp.where(absent, -jnp.inf, more[0].astype(jnp.float32))])
            order = jnp.argsort(ids)
            ids, exact = ids[order], exact[order]
        scores, at = jax.lax.top_k(exact, k)
        return scores, jnp.where(ids[at] == last, -1, ids[at])

    scores, ids = in_blocks(jax.vmap(one), (queries, ordered, *(known or ())), batch)
    return Ranking(scores, ids, jnp.sum(candidates >= 0, -1, dtype=jnp.int32))


def two_stage(
    query_vectors: PyTree,
    document_vectors: PyTree,
    queries: PyTree,
    documents: PyTree,
    scorer: Callable[[PyTree, PyTree], Array],
    k: int,
    num_candidates: int,
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
    batch: int = 8,
    score: Score = inner_products,
) -> Ranking:
    """Two-stage search: ``num_candidates`` by a cheap score, then the k best of them by an exact scorer.

    Args:
      query_vectors, document_vectors, score: for the first stage, :func:`scored_topk`; inner products by default.
      queries, documents, scorer: for the second, :func:`rerank`.
      k, num_candidates: ``1 <= k <= num_candidates <= n``.
      chunk, mask, batch: see the two stages.

    Returns:
      The ranking and the number of scorer calls of each query.

    Raises:
      ValueError: k, num_candidates or chunk out of range.
    """
    check_stages(k, num_candidates, _rows(document_vectors))
    _, candidates = scored_topk(query_vectors, document_vectors, score, num_candidates, chunk, mask)
    return rerank(queries, documents, candidates, scorer, k, batch)


def sharded_two_stage(
    query_vectors: PyTree,
    document_vectors: PyTree,
    queries: PyTree,
    documents: PyTree,
    scorer: Callable[[PyTree, PyTree], Array],
    k: int,
    num_candidates: int,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
    batch: int = 8,
    score: Score = inner_products,
) -> Ranking:
    """:func:`two_stage` with the documents of both stages sharded over a mesh axis: the same ids and scores.

    Every device searches its shard; the candidates of all are merged, and each device re-ranks those of them that are
    its own.  Ids and scores of candidates travel, documents never do.  Call it under ``jit`` or not.

    Args:
      query_vectors, queries: replicated.
      document_vectors, documents: global arrays, best already sharded along their first axis.
      score, scorer, k, num_candidates, mask, batch: as in :func:`two_stage`.
      mesh, axis, chunk: as in :func:`sharded_topk`.

    Raises:
      ValueError: k, num_candidates or chunk out of range, or a mesh without that axis.
    """
    check_stages(k, num_candidates, _rows(document_vectors))

    def local(asked, held, mask, shard, name):
        found = scored_topk(asked["first"], held["first"], score, min(num_candidates, shard), chunk, mask)
        _, ids = merge_over_axis(*found, num_candidates, shard, name)
        own = ids - shard * jax.lax.axis_index(name)
        own = jnp.where((ids >= 0) & (own >= 0) & (own < shard), own, -1)
        ranking = rerank(asked["second"], held["second"], own, scorer, k, batch)
        best = merge_over_axis(ranking.scores, ranking.ids, k, shard, name)
        return Ranking(*best, jax.lax.psum(ranking.scorer_calls, name))

    asked = {"first": query_vectors, "second": queries}
    return _over_shards(local, asked, {"first": document_vectors, "second": documents}, mesh, axis, mask)


def check_stages(k: int, num_candidates: int, documents: int) -> None:
    """Raises ValueError unless ``1 <= k <= num_candidates <= documents``."""
    if not 1 <= k <= num_candidates <= documents:
        raise ValueError(
            f"need 1 <= k <= num_candidates <= {documents} documents; got k {k}, num_candidates {num_candidates}"
        )


def _rows(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
