"""Retrieval and neighbour metrics of embeddings with class labels: recall@k, CMC, mAP, mAP@R, kNN classification.

Queries are compared with the gallery by cosine (or Euclidean distance) in blocks of queries: memory is that of one
block by the gallery, never queries by gallery.  Where a query set is its own gallery (``gallery=None``) a query never
finds itself; nor does it with ``same_items``, where row i of both sets is one item seen by two models.  Equal
similarities rank the lower gallery row first.  A query whose class is not in the gallery has no defined value; it is
left out of every mean, and ``queries`` says how many counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize
from zoo.ops.topk import top_k


def similarities(queries: Float[Array, "q d"], gallery: Float[Array, "g e"], compare: str) -> Float[Array, "q g"]:
    """Cosines, or negative squared Euclidean distances; float32.

    Raises:
      ValueError: another comparison, or vectors of different sizes.
    """
    if compare not in ("cosine", "euclidean"):
        raise ValueError(f"compare must be 'cosine' or 'euclidean', got {compare!r}")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, the gallery {gallery.shape[1]}")
    q, g = queries.astype(jnp.float32), gallery.astype(jnp.float32)
    if compare == "cosine":
        return jnp.matmul(l2_normalize(q), l2_normalize(g).T, precision="highest")
    inner = jnp.matmul(q, g.T, precision="highest")
    return 2 * inner - jnp.sum(jnp.square(g), 1)[None, :] - jnp.sum(jnp.square(q), 1)[:, None]


def nearest(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g e"] | None = None,
    k: int = 1,
    compare: str = "cosine",
    block: int = 256,
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Similarities and rows of each query's k nearest in the gallery, best first.

    Args:
      queries, gallery: embeddings; without a gallery the queries are their own, each without itself.
      k: at most the gallery's size (less one without a gallery).
      compare: see :func:`similarities`.
      block: queries at a time.

    Raises:
      ValueError: k out of range.
    """
    own, gallery = gallery is None, queries if gallery is None else gallery
    most = gallery.shape[0] - own
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and the {most} gallery rows that a query may find, got {k}")

    def find(rows):
        x, ids = rows
        s = similarities(x, gallery, compare)
        s = jnp.where(ids[:, None] == jnp.arange(gallery.shape[0])[None, :], -jnp.inf, s) if own else s
        return top_k(s, k)

    return in_blocks(find, (queries, jnp.arange(queries.shape[0])), block)


def retrieval_metrics(
    queries: Float[Array, "q d"],
    query_labels: Int[Array, "q"],
    gallery: Float[Array, "g e"] | None = None,
    gallery_labels: Int[Array, "g"] | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    compare: str = "cosine",
    block: int = 128,
    same_items: bool = False,
) -> dict[str, Float[Array, ""]]:
    """Everything that the whole ranking tells, from one pass.

    Returns:
      ``recall@k`` (some item of the class among the first k: the CMC at k), ``map`` (mean average precision over all
      relevant items), ``map@r`` and ``r_precision`` (Musgrave et al., ECCV 2020: the same over the first R, R the
      number of relevant items), ``mrr`` and ``queries``, the number of queries that counted.

    Args:
      queries, query_labels, gallery, gallery_labels: see the module.
      ks: cut-offs.
      compare: see :func:`similarities`.
      block: queries at a time.
      same_items: row i of queries and gallery is the same item, which does not find itself.

    Raises:
      ValueError: one of gallery and its labels without the other, or ``same_items`` with sets of two sizes.
    """
    values, counted = _per_query(queries, query_labels, gallery, gallery_labels, compare, block, same_items)
    rank, ap, ap_at_r, r_precision = values
    total = jnp.maximum(jnp.sum(counted), 1)
    mean = lambda x: jnp.sum(jnp.where(counted, x, 0.0)) / total  # noqa: E731
    found = {f"recall@{k}": mean((rank <= k).astype(jnp.float32)) for k in ks}
    rest = {"map": ap, "map@r": ap_at_r, "r_precision": r_precision, "mrr": 1.0 / rank}
    return {**found, **{k: mean(v) for k, v in rest.items()}, "queries": jnp.sum(counted)}


def cmc_curve(
    queries: Float[Array, "q d"],
    query_labels: Int[Array, "q"],
    gallery: Float[Array, "g e"] | None = None,
    gallery_labels: Int[Array, "g"] | None = None,
    most: int = 20,
    compare: str = "cosine",
    block: int = 128,
    same_items: bool = False,
) -> Float[Array, "most"]:
    """The cumulative match characteristic: the share of queries whose first match ranks at most 1, 2, ..., ``most``.

    Arguments as in :func:`retrieval_metrics`.
    """
    (rank, *_), counted = _per_query(queries, query_labels, gallery, gallery_labels, compare, block, same_items)
    within = rank[:, None] <= jnp.arange(1, most + 1)[None, :]
    return jnp.sum(within & counted[:, None], 0) / jnp.maximum(jnp.sum(counted), 1)


def _per_query(queries, labels, gallery, gallery_labels, compare, block, same_items):
    if (gallery is None) != (gallery_labels is None):
        raise ValueError("gallery and gallery_labels belong together: give both or neither")
    if same_items and gallery is not None and gallery.shape[0] != queries.shape[0]:
        raise ValueError(
            f"same_items needs as many gallery rows as queries, got {gallery.shape[0]}, {queries.shape[0]}"
        )
    own = gallery is None or same_items
    gallery, gallery_labels = (queries, labels) if gallery is None else (gallery, gallery_labels)
    places = jnp.arange(gallery.shape[0])

    def measure(rows):
        x, y, ids = rows
        s = similarities(x, gallery, compare)
        itself = (ids[:, None] == places[None, :]) if own else jnp.zeros(s.shape, bool)
        relevant = (y[:, None] == gallery_labels[None, :]) & ~itself
        # the query itself goes last, where it shifts nobody's rank
        _, hit = jax.lax.sort((jnp.where(itself, jnp.inf, -s), relevant), dimension=1, num_keys=1, is_stable=True)
        number = jnp.sum(hit, 1)
        rank = jnp.argmax(hit, 1) + 1
        precision = jnp.cumsum(hit, 1) / (places + 1.0)
        within = hit & (places[None, :] < number[:, None])
        some = jnp.maximum(number, 1)
        total = lambda v: jnp.sum(v, 1) / some  # noqa: E731
        values = (rank, total(jnp.where(hit, precision, 0)), total(jnp.where(within, precision, 0)), total(within))
        return tuple(v.astype(jnp.float32) for v in values), number > 0

    return in_blocks(measure, (queries, labels, jnp.arange(queries.shape[0])), block)


def knn_classify(
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    queries: Float[Array, "q d"],
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    block: int = 256,
) -> Int[Array, "q"]:
    """Classes by the k nearest features, each weighing ``exp(cosine / temperature)`` (Wu et al., CVPR 2018).

    Args:
      features, labels: the labelled set; k is cut to its size.
      queries: what to classify.
      num_classes: C.
      k, temperature: of the vote; ties of votes go to the lower class.
      block: queries at a time.
    """
    cosine, ids = nearest(queries, features, min(k, features.shape[0]), "cosine", block)
    weight = jnp.exp((cosine - cosine[:, :1]) / temperature)
    votes = jax.vmap(lambda y, w: jax.ops.segment_sum(w, y, num_classes))(labels[ids], weight)
    return jnp.argmax(votes, 1)
