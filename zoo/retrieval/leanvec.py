"""LeanVec: two linear maps, one for queries and one for data, that make vectors shorter and keep inner products.

Tepper, Bhati, Aguerrebere, Hildebrand, Willke: "LeanVec: Searching vectors faster by making them fit", TMLR 2024,
arXiv 2312.16335.

Search over D-dimensional vectors is bound by memory bandwidth.  LeanVec replaces ``<q, x>`` by ``<A^T q, B^T x>`` in
d << D dimensions, quantises the short *primary* vectors, searches those, and re-ranks a few candidates with
*secondary* vectors of all D dimensions.  In-distribution maps are PCA of the database, ``A = B``.  Where queries come
from elsewhere (text that asks for images), A and B are learned from both sides by minimising

    f(A, B) = ||Q A B^T X^T - Q X^T||_F^2,   A, B with orthonormal columns,

which needs only the moments ``K_Q = Q^T Q`` and ``K_X = X^T X``: no training, a few small SVDs.

Nothing of size [queries, vectors] is formed while learning.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from zoo.catalogue import Card, Claim
from zoo.ops.blocks import in_blocks
from zoo.ops.fingerprint import check_same_fit, fingerprint
from zoo.ops.line_search import grid_then_golden
from zoo.ops.moments import check_dim, leading_directions, moment, unit_trace
from zoo.ops.plain_arrays import from_arrays, to_arrays
from zoo.ops.scalar_quantisation import ENCODINGS, Metric, check_dimension, encode_rows, prepare_queries, row_scores
from zoo.ops.search import Found, Ranking, scored_topk, sharded_two_stage, two_stage

__all__ = [
    "FrankWolfe", "LeanVecConfig", "LeanVecIndex", "ProjectionMaps", "build_index", "candidates",
    "check_maps", "check_metric", "eigen_search", "fit_maps", "frank_wolfe", "index_from_arrays", "leanvec_search",
    "loss", "loss_gradients", "maps_from_arrays", "moment", "pca", "polar", "project_queries", "project_vectors",
    "relative_loss", "to_arrays",
]  # fmt: skip

METHODS = ("pca", "frank_wolfe", "eigen", "eigen_frank_wolfe")
"""How maps may be learned; all but ``pca`` look at queries."""

# --- the loss and its gradients (paper, equations 3 and 8 to 10) ------------------------------------------------------


def loss(
    k_q: Float[Array, "D D"], k_x: Float[Array, "D D"], a: Float[Array, "D d"], b: Float[Array, "D d"]
) -> Float[Array, ""]:
    """``f(A, B)`` from the moments, in O(D^2 d): ``<A'K_Q A, B'K_X B> - 2 <K_Q A, K_X B> + <K_Q, K_X>``."""
    qa, xb = _times(k_q, a), _times(k_x, b)
    return jnp.sum(_times(a.T, qa) * _times(b.T, xb)) - 2 * jnp.sum(qa * xb) + jnp.sum(k_q * k_x)


def relative_loss(
    k_q: Float[Array, "D D"], k_x: Float[Array, "D D"], a: Float[Array, "D d"], b: Float[Array, "D d"]
) -> Float[Array, ""]:
    """``f(A, B) / ||Q X^T||_F^2``: the share of all inner products' energy that is lost."""
    k_q, k_x = unit_trace(k_q), unit_trace(k_x)
    return loss(k_q, k_x, a, b) / jnp.sum(k_q * k_x)


def loss_gradients(
    k_q: Float[Array, "D D"], k_x: Float[Array, "D D"], a: Float[Array, "D d"], b: Float[Array, "D d"]
) -> tuple[Float[Array, "D d"], Float[Array, "D d"]]:
    """``df/dA = 2 K_Q A B'K_X B - 2 K_Q K_X B`` and ``df/dB = 2 K_X B A'K_Q A - 2 K_X K_Q A``."""
    return _gradient(k_q, k_x, a, b), _gradient(k_x, k_q, b, a)


def _gradient(k_own: Array, k_other: Array, own: Array, other: Array) -> Array:
    image = _times(k_other, other)
    return 2 * _times(k_own, _times(own, _times(other.T, image)) - image)


def _oracle(k_own: Array, k_other: Array, own: Array, other: Array) -> Array:
    # where the gradient is zero but for rounding (eigenvectors of one side), any target would do: stay
    gradient = _gradient(k_own, k_other, own, other)
    rounding = 100 * jnp.finfo(gradient.dtype).eps * jnp.linalg.norm(_times(k_own, _times(k_other, other)))
    return jnp.where(jnp.linalg.norm(gradient) > rounding, polar(-gradient), own)


def polar(matrix: Float[Array, "D d"]) -> Float[Array, "D d"]:
    """``U V^T`` of the thin SVD: maximises ``<S, matrix>`` over operator norm at most 1."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return _times(u, vt)


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


# --- the learners (paper, algorithms 1 and 2; section 2.2) ------------------------------------------------------------


@struct.dataclass
class ProjectionMaps:
    """Two linear maps to d dimensions.

    Attributes:
      query, data: A and B, f32 ``[D, d]``.
      mean: f32 ``[D]``, taken off data (PCA); zeros for maps that look at queries.
      centred: whether it is PCA: only then are L2 distances kept.
    """

    query: Any
    data: Any
    mean: Any
    centred: bool = struct.field(pytree_node=False, default=False)


def pca(vectors: Float[Array, "n D"], d: int, block: int = 4096) -> ProjectionMaps:
    """LeanVec-ID: both maps are the d leading principal directions of the centred vectors.

    A direction's sign is such that its largest entry is positive.

    Raises:
      ValueError: d out of range.
    """
    mean = jnp.mean(vectors.astype(jnp.float32), 0)
    directions = leading_directions(moment(vectors - mean, block), d)
    return ProjectionMaps(directions, directions, mean, centred=True)


@struct.dataclass
class FrankWolfe:
    """What :func:`frank_wolfe` found.

    Attributes:
      query, data: A and B ``[D, d]``, operator norm at most 1, nearly orthonormal.
      losses: ``[steps]``, relative loss after each step taken, ``nan`` after the last.
      steps: i32, steps taken.
    """

    query: Any
    data: Any
    losses: Any
    steps: Any


def frank_wolfe(
    k_q: Float[Array, "D D"],
    k_x: Float[Array, "D D"],
    d: int,
    steps: int = 500,
    exponent: float = 0.999,
    tol: float = 1e-3,
    init: Float[Array, "D d"] | None = None,
) -> FrankWolfe:
    """LeanVec-OOD: block-coordinate Frank-Wolfe over operator-norm balls, the hulls of the orthonormal maps.

    Step t moves A, then B given the new A, by ``1 / (t + 1)^exponent`` (``1 / (t + 2)^exponent`` from ``init``) towards
    ``polar(-df)``; where df is zero it stays.  It stops, from the third step on, when the loss changes by less than
    ``tol`` of itself.

    Args:
      k_q, k_x: second moments of queries and vectors; scaled here to trace 1, which changes no step.
      d: dimension of the maps, in ``[1, D]``.
      steps: at most; static.
      exponent: the released code's 0.999.
      tol: 0 takes all steps.
      init: start of both maps; by default zeros, where the first step is ``A = eye(D, d)``.

    Raises:
      ValueError: d or steps out of range.
    """
    check_dim(d, k_q.shape[0])
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    k_q, k_x = unit_trace(k_q), unit_trace(k_x)
    kind, energy = k_q.dtype, jnp.sum(k_q * k_x)
    start = jnp.zeros((k_q.shape[0], d), kind) if init is None else init.astype(kind)
    late = 1 if init is None else 2

    def body(state):
        t, a, b, losses, _ = state
        rate = 1 / (t + late).astype(kind) ** exponent
        target = _oracle(k_q, k_x, a, b)
        if init is None:
            target = jnp.where(t == 0, jnp.eye(*start.shape, dtype=kind), target)
        a = (1 - rate) * a + rate * target
        b = (1 - rate) * b + rate * _oracle(k_x, k_q, b, a)
        value = loss(k_q, k_x, a, b) / energy
        stop = (t > 1) & (jnp.abs(value - losses[t - 1]) < tol * losses[t - 1])
        return t + 1, a, b, losses.at[t].set(value), stop

    state = (jnp.int32(0), start, start, jnp.full(steps, jnp.nan, kind), jnp.bool_(False))
    t, a, b, losses, _ = jax.lax.while_loop(lambda s: (s[0] < steps) & ~s[4], body, state)
    return FrankWolfe(a, b, losses, t)


def eigen_search(
    k_q: Float[Array, "D D"],
    k_x: Float[Array, "D D"],
    m: int | Int[Array, ""],
    n: int | Int[Array, ""],
    d: int,
    num_beta: int = 21,
    refine: int = 12,
) -> tuple[Float[Array, "D d"], Float[Array, ""], Float[Array, ""]]:
    """LeanVec-ES: the best single map P among leading eigenvectors of ``(1 - beta) K_Q / m + beta K_X / n``.

    A grid of betas in [0, 1], then ``refine`` golden sections of the best one's neighbourhood: the loss is smooth in
    beta but need not have one valley.  ``beta = 1`` is uncentred PCA of the data.

    Args:
      k_q, k_x, m, n: second moments of queries and vectors, and how many rows each sums.
      d: dimension of the map.
      num_beta: points of the grid, at least 2.
      refine: golden sections, each one ``eigh``.

    Returns:
      The map P, its beta and its relative loss.

    Raises:
      ValueError: d or num_beta out of range.
    """
    if num_beta < 2 or refine < 0:
        raise ValueError(f"num_beta must be at least 2 and refine at least 0; got {num_beta} and {refine}")
    per_row = jnp.trace(k_q) / m, jnp.trace(k_x) / n
    share = per_row[0] / (per_row[0] + per_row[1])
    k_q, k_x = unit_trace(k_q), unit_trace(k_x)
    energy = jnp.sum(k_q * k_x)

    def at(beta):
        # the mean moments' mixture, scaled
        p = leading_directions((1 - beta) * share * k_q + beta * (1 - share) * k_x, d)
        return p, loss(k_q, k_x, p, p) / energy

    beta, least = grid_then_golden(lambda beta: at(beta)[1], 0.0, 1.0, num_beta, refine, k_q.dtype)
    return at(beta)[0], beta, least


def fit_maps(
    vectors: Float[Array, "n D"],
    queries: Float[Array, "m Dq"] | None,
    d: int,
    method: str = "frank_wolfe",
    steps: int = 500,
    exponent: float = 0.999,
    tol: float = 1e-3,
    num_beta: int = 21,
) -> ProjectionMaps:
    """Maps by any of :data:`METHODS`, from a sample of vectors and, but for ``pca``, one of queries.

    Measure on other queries than these: with few of them, m < D, the maps fit the sample.

    Raises:
      ValueError: an unknown method, no queries where they are needed, or d out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "pca":
        return pca(vectors, d)
    if queries is None:
        raise ValueError(f"method {method!r} learns from queries; pass some, or use 'pca'")
    check_dimension(queries, vectors.shape[1])
    k_q, k_x = moment(queries), moment(vectors)
    none, found = jnp.zeros(vectors.shape[1]), None
    if method != "frank_wolfe":
        found = eigen_search(k_q, k_x, queries.shape[0], vectors.shape[0], d, num_beta)[0]
        if method == "eigen":
            return ProjectionMaps(found, found, none)
    learned = frank_wolfe(k_q, k_x, d, steps, exponent, tol, found)
    return ProjectionMaps(learned.query.astype(jnp.float32), learned.data.astype(jnp.float32), none)


# --- the index and the search (paper, section 3) ----------------------------------------------------------------------


@struct.dataclass
class LeanVecIndex:
    """Vectors ready for search, as rows of any of ``zoo.ops.scalar_quantisation.ENCODINGS``.

    Attributes:
      maps: what the index was built with.
      fingerprint: uint32 ``[2]`` of ``maps``.
      primary, primary_mean: rows of d dimensions, and f32 ``[d]`` that was taken off them.
      secondary, secondary_mean: rows of D dimensions, and f32 ``[D]``.
      metric: ``"ip"`` or ``"l2"``.
    """

    maps: Any
    fingerprint: Any
    primary: Any
    primary_mean: Any
    secondary: Any
    secondary_mean: Any
    metric: Metric = struct.field(pytree_node=False, default="ip")


def project_vectors(maps: ProjectionMaps, vectors: Float[Array, "n D"]) -> Float[Array, "n d"]:
    """Primary vectors ``(x - mean) B``."""
    return _times(vectors.astype(jnp.float32) - maps.mean, maps.data)


def project_queries(maps: ProjectionMaps, queries: Float[Array, "q D"], metric: Metric = "ip") -> Float[Array, "q d"]:
    """``q A``; for distances ``(q - mean) A``.  A product's constant ``<q, mean>`` ranks nothing and is dropped."""
    queries = queries.astype(jnp.float32)
    return _times(queries - maps.mean if metric == "l2" else queries, maps.query)


def build_index(
    maps: ProjectionMaps,
    vectors: Float[Array, "n D"],
    primary: str = "lvq8",
    secondary: str = "lvq8",
    metric: str = "ip",
    block: int = 4096,
) -> LeanVecIndex:
    """Projects and encodes the vectors, ``block`` of them at a time.

    Raises:
      ValueError: another dimension than the maps', an unknown encoding, or a metric that the maps do not keep.
    """
    check_metric(metric, maps.centred)
    if vectors.shape[1] != maps.data.shape[0]:
        raise ValueError(f"vectors have D={vectors.shape[1]}, maps D={maps.data.shape[0]}")
    middle = jnp.mean(vectors.astype(jnp.float32), 0)
    short = project_vectors(maps, middle[None])[0]  # the projected vectors' mean

    def encode(rows):
        first = encode_rows(project_vectors(maps, rows), primary, short)
        return first, encode_rows(rows, secondary, middle)

    first, second = in_blocks(encode, vectors, block)
    return LeanVecIndex(maps, fingerprint(maps), first, short, second, middle, metric)


def candidates(
    index: LeanVecIndex, queries: Float[Array, "q D"], k: int, chunk: int = 4096, mask: Bool[Array, "n"] | None = None
) -> Found:
    """The first stage alone: the k vectors whose primary rows score highest."""
    score = lambda queries, rows: row_scores(queries, rows, index.metric)  # noqa: E731
    return scored_topk(_primary(index, queries), index.primary, score, k, chunk, mask)


def leanvec_search(
    index: LeanVecIndex,
    queries: Float[Array, "q D"],
    k: int = 10,
    num_candidates: int = 50,
    chunk: int = 4096,
    mask: Bool[Array, "n"] | None = None,
    batch: int = 8,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "data",
) -> Ranking:
    """The whole search: project the queries once, scan the primary rows, re-rank with the secondary ones.

    Args:
      index: what :func:`build_index` made.
      queries: of all D dimensions, as they are.
      k, num_candidates: ``1 <= k <= num_candidates <= n``.
      chunk, mask, batch: as in ``zoo.ops.search.two_stage``.
      mesh, axis: search rows sharded over that axis (``sharded_two_stage``): the same ids and scores.

    Raises:
      ValueError: sizes out of range, or another dimension than the index's.
    """
    full = prepare_queries(queries, index.secondary_mean, index.metric)
    score = lambda queries, rows: row_scores(queries, rows, index.metric)  # noqa: E731
    scorer = lambda query, rows: score(jax.tree.map(lambda x: x[None], query), rows)[0]  # noqa: E731
    stages = _primary(index, queries), index.primary, full, index.secondary, scorer, k, num_candidates
    if mesh is None:
        return two_stage(*stages, chunk, mask, batch, score)
    return sharded_two_stage(*stages, mesh, axis, chunk, mask, batch, score)


def _primary(index: LeanVecIndex, queries: Array) -> Any:
    check_dimension(queries, index.maps.query.shape[0])
    return prepare_queries(project_queries(index.maps, queries, index.metric), index.primary_mean, index.metric)


# --- checks on the host, and what the arrays mean ---------------------------------------------------------------------


def check_metric(metric: str, centred: bool) -> None:
    """Raises ValueError for a metric that is unknown or that such maps do not keep."""
    if metric == "cosine":
        raise ValueError("cosine is the inner product of unit vectors: normalise vectors and queries and use 'ip'")
    if metric not in ("ip", "l2"):
        raise ValueError(f"metric must be 'ip' or 'l2', got {metric!r}")
    if metric == "l2" and not centred:
        raise ValueError("OOD maps approximate inner products; normalise vectors or use PCA")


def check_maps(index: LeanVecIndex, maps: ProjectionMaps) -> None:
    """Raises ValueError unless the index was built with these maps, which make the queries (on the host)."""
    check_same_fit(index.fingerprint, fingerprint(maps), "ProjectionMaps")


@dataclasses.dataclass(frozen=True)
class LeanVecConfig:
    """What the arrays of an index mean.

    Attributes:
      dimension, d: D and d.
      centred: whether the maps are PCA.
      primary, secondary: encodings.
      metric: ``"ip"`` or ``"l2"``.

    Raises:
      ValueError: d out of range, an unknown encoding, or a metric that the maps do not keep.
    """

    dimension: int
    d: int
    centred: bool = False
    primary: str = "lvq8"
    secondary: str = "lvq8"
    metric: str = "ip"

    def __post_init__(self):
        check_dim(self.d, self.dimension)
        for encoding in (self.primary, self.secondary):
            if encoding not in ENCODINGS:
                raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}; got {encoding!r}")
        check_metric(self.metric, self.centred)


def maps_from_arrays(config: LeanVecConfig, arrays: Any) -> ProjectionMaps:
    """Undoes :func:`to_arrays` for maps."""
    return from_arrays(ProjectionMaps(*[np.zeros(0)] * 3, config.centred), arrays)


def index_from_arrays(config: LeanVecConfig, arrays: Any) -> LeanVecIndex:
    """Undoes :func:`to_arrays` for an index."""
    maps = maps_from_arrays(config, arrays["maps"])
    blank = jax.ShapeDtypeStruct((1, config.dimension), jnp.float32)
    build = lambda x: build_index(maps, x, config.primary, config.secondary, config.metric)  # noqa: E731
    return from_arrays(jax.eval_shape(build, blank), arrays)


CARD = Card(
    name="leanvec",
    family="retrieval",
    title="LeanVec: Searching vectors faster by making them fit",
    year=2024,
    kind="search",
    idea=(
        "Search over long embeddings is bound by memory bandwidth. Two linear maps, one for queries and one for data, "
        "shorten both so that inner products survive; short vectors are quantised one by one and scanned, and a few "
        "candidates are re-ranked with full vectors. Learned from both sides' second moments by Frank-Wolfe steps, the "
        "maps keep rankings for queries whose distribution is not the data's, where PCA of the data does not."
    ),
    citation="Tepper, Bhati, Aguerrebere, Hildebrand, Willke; TMLR 2024; arXiv 2312.16335",
    plugs_into=(
        "precomputed embeddings and a sample of queries",
        "the last dense layer of a dual encoder",
        "two-stage search with an exact scorer",
    ),
    pieces=(
        "zoo.ops.moments:second_moment",
        "loss",
        "relative_loss",
        "loss_gradients",
        "polar",
        "ProjectionMaps",
        "pca",
        "frank_wolfe",
        "eigen_search",
        "fit_maps",
        "zoo.weights.folding:fold_into_dense",
        "zoo.ops.scalar_quantisation:lvq_encode",
        "zoo.ops.scalar_quantisation:encode_rows",
        "LeanVecIndex",
        "build_index",
        "candidates",
        "leanvec_search",
        "check_maps",
        "zoo.ops.search:sharded_two_stage",
    ),  # fmt: skip
    claim=Claim(
        statement=(
            "For queries from another distribution than the data's, maps learned by Frank-Wolfe from both find more of "
            "the true ten nearest in the first ten of the primary search than PCA of the data to as many dimensions."
        ),
        metric="recall_10_at_10",
        effect=0.02,
        method="LeanVec-OOD (Frank-Wolfe)",
        baseline="LeanVec-ID (PCA)",
        trivial="random projection",
        seeds=5,
        budget="the same vectors, dimension 16 of 64, LVQ8 codes and test queries; nothing is tuned",
    ),
    cost="moments O((n + m) D^2) once; T Frank-Wolfe steps O(T D^2 d); search O(n d) bytes scanned, O(W D) re-ranked",
    official_code="IntelLabs/ScalableVectorSearch, bindings/python/src/svs/leanvec.py and include/svs (AGPL, 2024)",
    departures=(
        "moments are scaled to trace 1 and kept in float32; the released learner works in the inputs' type",
        "where a gradient is zero, a map stays (first step: A = eye(D, d)); the released code follows an SVD of zero",
        "eigenvector search is written from the paper: a grid of betas, then golden sections of its best bracket",
        "flat search re-ranks; the released flat index scores primary vectors only, its graph re-ranks",
        "codes lie in plain order, two 4-bit ones in a byte; there is no graph index, every primary row is scanned",
    ),
)
