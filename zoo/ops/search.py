"""Maximum inner product search in chunks, over devices, and in two stages with any exact scorer.

Every search here returns what one exact top-k over all scores would, ties by the lowest document id included, without
ever holding more scores than a chunk's.  A slot that no document fills holds score ``-inf`` and id ``-1``.
"""

from __future__ import annotations

import functools
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


def chunked_topk(
    score: Callable[[Array], Array], queries: int, documents: int, k: int, chunk: int, mask: Any = None
) -> Found:
    """The k best of ``documents`` scores for each query, computed a chunk of documents at a time.

    Args:
      score: ``start -> f32 [q, chunk]``: scores of documents ``start .. start + chunk - 1`` (``start`` is traced).
      queries, documents: q and n.
      k: how many, in ``[1, n]``.
      chunk: documents scored at a time; memory is O(q (chunk + k)).
      mask: bool ``[n]``, documents that may be found; all by default.

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
        values, at = top_k(jnp.where(valid, score(start).astype(jnp.float32), -jnp.inf), min(k, chunk))
        return _merge(best, (values, ids[at]), k), None

    nothing = (jnp.full((queries, k), -jnp.inf), jnp.full((queries, k), -1, jnp.int32))
    first, _ = step(nothing, jnp.int32(0))
    chunks = -(-documents // chunk)
    return first if chunks == 1 else jax.lax.scan(step, first, jnp.arange(1, chunks, dtype=jnp.int32))[0]


def _merge(a: tuple[Array, Array], b: tuple[Array, Array], k: int) -> Found:
    # a holds the lower ids, so the order of places breaks ties by id; its empty slots precede masked documents of b
    values, at = jax.lax.top_k(jnp.concatenate([a[0], b[0]], -1), k)
    return values, jnp.take_along_axis(jnp.concatenate([a[1], b[1]], -1), at, -1)


def mips_topk(
    queries: Float[Array, "q d"],
    documents: Float[Array, "n d"],
    k: int,
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
) -> Found:
    """The k documents with the largest inner products, exactly.

    Products are accumulated in float32 whatever the inputs' type.

    Args:
      queries, documents: vectors of one dimension.
      k: how many, in ``[1, n]``.
      chunk: documents scored at a time (``lax.scan``); memory is O(q (chunk + k)).
      mask: documents that may be found; all by default.

    Returns:
      Scores ``[q, k]``, falling, ties by the lowest id, and ids ``[q, k]``; see :func:`chunked_topk`.

    Raises:
      ValueError: k or chunk out of range.
    """
    kind = jnp.promote_types(queries.dtype, documents.dtype)
    size = min(chunk, documents.shape[0])

    def score(start):
        part = jax.lax.dynamic_slice_in_dim(documents, start, size)
        return jnp.matmul(
            queries.astype(kind), part.astype(kind).T, precision="highest", preferred_element_type=jnp.float32
        )

    return chunked_topk(score, queries.shape[0], documents.shape[0], k, chunk, mask)


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
    gathered = [jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (values, ids)]
    # shards in their order hold rising ids, so places break ties by id again
    values, at = jax.lax.top_k(gathered[0], k)
    return values, jnp.take_along_axis(gathered[1], at, -1)


def sharded_mips_topk(
    queries: Float[Array, "q d"],
    documents: Float[Array, "n d"],
    k: int,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
) -> Found:
    """:func:`mips_topk` with the documents sharded over a mesh axis: the same ids and scores as on one device.

    Every device searches its own shard; all-gather moves ``min(k, shard)`` candidates a device.  Call it under ``jit``
    or not.  If the shards are unequal, documents are padded (a copy): prefer a multiple of the axis' size.

    Args:
      queries: replicated.
      documents: global array, best already sharded along its first axis.
      k, chunk, mask: as in :func:`mips_topk`; chunk counts documents of one shard.
      mesh, axis: the mesh and the axis the documents lie along.

    Raises:
      ValueError: k or chunk out of range, or a mesh without that axis.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [a for a in axes if a not in mesh.shape]
    if missing:
        raise ValueError(f"axis {missing[0]!r} is not one of the mesh's: {', '.join(mesh.shape)}")
    n, shards = documents.shape[0], 1
    for a in axes:
        shards *= mesh.shape[a]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], the number of documents; got {k}")
    short = -n % shards
    mask = jnp.ones(n, bool) if mask is None else mask
    if short:
        documents, mask = jnp.pad(documents, ((0, short), (0, 0))), jnp.pad(mask, (0, short))
    shard = (n + short) // shards
    name = axes if len(axes) > 1 else axes[0]
    spec, everywhere = PartitionSpec(name), PartitionSpec()

    def local(queries, documents, mask):
        values, ids = mips_topk(queries, documents, min(k, shard), chunk, mask)
        return merge_over_axis(values, ids, k, shard, name)

    # the all-gather makes the result equal on all devices, which the checker of replication cannot see
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(everywhere, spec, spec), out_specs=(everywhere, everywhere), check_vma=False
    )
    return mapped(queries, documents, mask)


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
) -> Ranking:
    """Gathers each query's candidates and ranks them by an exact scorer.

    Args:
      queries: arrays with leading axis q; anything the scorer reads.
      documents: arrays with leading axis n.
      candidates: ids, in any order, none twice; ``-1`` is no candidate.
      scorer: pure, ``(query, candidates) -> [c]``: one query's arrays and those of its c candidates.
      k: how many to keep, in ``[1, c]``.
      batch: queries scored at a time; memory is ``batch`` x c gathered documents.

    Raises:
      ValueError: k out of range.
    """
    width = candidates.shape[1]
    if not 1 <= k <= width:
        raise ValueError(f"k must be in [1, {width}], the number of candidates; got {k}")
    # rising ids make ties among exact scores fall to the lowest id; no candidate goes last
    last = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(candidates < 0, last, candidates), -1)

    def one(row):
        query, ids = row
        taken = jax.tree.map(lambda x: jnp.take(x, ids, axis=0, mode="clip"), documents)
        exact = jnp.where(ids == last, -jnp.inf, scorer(query, taken).astype(jnp.float32))
        scores, at = jax.lax.top_k(exact, k)
        return scores, jnp.where(ids[at] == last, -1, ids[at])

    scores, ids = in_blocks(jax.vmap(one), (queries, ordered), batch)
    return Ranking(scores, ids, jnp.sum(candidates >= 0, -1, dtype=jnp.int32))


def two_stage(
    query_vectors: Float[Array, "q d"],
    document_vectors: Float[Array, "n d"],
    queries: PyTree,
    documents: PyTree,
    scorer: Callable[[PyTree, PyTree], Array],
    k: int,
    num_candidates: int,
    chunk: int = 16384,
    mask: Bool[Array, "n"] | None = None,
    batch: int = 8,
) -> Ranking:
    """Two-stage search: ``num_candidates`` by inner product, then the k best of them by an exact scorer.

    Args:
      query_vectors, document_vectors: for the first stage, :func:`mips_topk`.
      queries, documents, scorer: for the second, :func:`rerank`.
      k, num_candidates: ``1 <= k <= num_candidates <= n``.
      chunk, mask, batch: see the two stages.

    Returns:
      The ranking and the number of scorer calls of each query.

    Raises:
      ValueError: k, num_candidates or chunk out of range.
    """
    check_stages(k, num_candidates, document_vectors.shape[0])
    first = functools.partial(mips_topk, chunk=chunk, mask=mask)
    _, candidates = first(query_vectors, document_vectors, num_candidates)
    return rerank(queries, documents, candidates, scorer, k, batch)


def check_stages(k: int, num_candidates: int, documents: int) -> None:
    """Raises ValueError unless ``1 <= k <= num_candidates <= documents``."""
    if not 1 <= k <= num_candidates <= documents:
        raise ValueError(
            f"need 1 <= k <= num_candidates <= {documents} documents; got k {k}, num_candidates {num_candidates}"
        )
