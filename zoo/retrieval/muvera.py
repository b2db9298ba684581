"""MUVERA: multi-vector retrieval via fixed dimensional encodings.

Dhulipala, Hadian, Jayaram, Lee, Mirrokni: "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings",
NeurIPS 2024, arXiv 2405.19504.

Late-interaction models score a set of query tokens Q against a set of document tokens P by the Chamfer similarity
``sum_q max_p <q, p>``.  MUVERA cuts space into ``B = 2^k_sim`` cells by random hyperplanes and gives each set one block
per cell: queries the *sum* of their tokens in it, documents the *mean*.  The inner product of two such encodings adds
up ``<q, mean of the P in q's cell>``, an estimate of Chamfer that needs no training and depends on no data; repetitions
average it.  Search is then ordinary inner-product search over single vectors, followed by exact Chamfer re-ranking.

Everything random is drawn once by :func:`init_fde` and must be the same for queries and documents: an index keeps a
fingerprint of it.  Blocks come in plain binary order (the released C++ code numbers them by Gray code, a permutation).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Key, UInt

from zoo.catalogue import Card, Claim
from zoo.ops.blocks import in_blocks
from zoo.ops.chamfer import chamfer, check_tokens
from zoo.ops.fingerprint import check_same_fit, fingerprint
from zoo.ops.plain_arrays import to_arrays
from zoo.ops.quantisation import pq_adc_scores, pq_decode, pq_encode, pq_train
from zoo.ops.search import Found, Ranking, check_stages, mips_topk, rerank, scored_topk

__all__ = [
    "FDEConfig", "FDEParams", "MuveraIndex", "ball_carve", "build_index", "candidates", "chamfer", "check_fingerprint",
    "check_tokens", "encode_document_fde", "encode_query_fde", "fingerprint", "index_from_arrays", "init_fde",
    "muvera_search", "params_from_arrays", "pq_adc_scores", "pq_decode", "pq_encode", "pq_train", "to_arrays",
]  # fmt: skip

AnyKey = Key[Array, ""] | UInt[Array, "2"]

# --- the encoding (paper, section 2) ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FDEConfig:
    """The shape of an encoding.

    Attributes:
      d: dimension of a token.
      num_repetitions: R, independent partitions.
      num_simhash: k_sim; B = 2^k_sim cells in each.
      d_proj: dimension of a token inside a block; ``None`` is d.
      final_dim: dimension after the final projection; ``None`` for none.
      projection: inner projection: ``"dense"`` (the paper's signs / sqrt(d_proj)), ``"count_sketch"`` (the released
        code's one signed output per input coordinate) or ``"identity"``.
      final_projection: ``"dense"`` (the paper's signs / sqrt(final_dim); one byte for each of
        ``d_fde * final_dim`` entries) or ``"count_sketch"`` (the released code's).

    Raises:
      ValueError: a size out of range; the message names it.
    """

    d: int
    num_repetitions: int = 20
    num_simhash: int = 5
    d_proj: int | None = 16
    final_dim: int | None = None
    projection: str = "dense"
    final_projection: str = "dense"

    def __post_init__(self):
        if self.d < 1 or self.num_repetitions < 1:
            raise ValueError(f"d and num_repetitions must be at least 1; got {self.d} and {self.num_repetitions}")
        if not 0 <= self.num_simhash <= 30:
            raise ValueError(f"num_simhash must be in [0, 30], got {self.num_simhash}")
        if self.d_proj is not None and not 1 <= self.d_proj <= self.d:
            raise ValueError(f"d_proj must be in [1, {self.d}] (the dimension of a token), got {self.d_proj}")
        if self.projection not in ("dense", "count_sketch", "identity"):
            raise ValueError(f"projection must be 'dense', 'count_sketch' or 'identity', got {self.projection!r}")
        if self.final_projection not in ("dense", "count_sketch"):
            raise ValueError(f"final_projection must be 'dense' or 'count_sketch', got {self.final_projection!r}")
        if self.projection == "identity" and self.d_proj not in (None, self.d):
            raise ValueError(
                f"projection 'identity' keeps all {self.d} dimensions; set d_proj to None, not {self.d_proj}"
            )
        if self.final_dim is not None and self.final_dim < 1:
            raise ValueError(f"final_dim must be at least 1 or None, got {self.final_dim}")

    @property
    def block_dim(self) -> int:
        """Dimension of one block."""
        return self.d if self.d_proj is None else self.d_proj

    @property
    def fde_dim(self) -> int:
        """``R B d_proj``, the dimension before the final projection."""
        return self.num_repetitions * 2**self.num_simhash * self.block_dim

    @property
    def output_dim(self) -> int:
        """The dimension of an encoding."""
        return self.final_dim or self.fde_dim


@struct.dataclass
class FDEParams:
    """What is random in an encoding: fixed arrays, never trained, the same for queries and documents.

    Attributes:
      simhash: f32 ``[R, d, k_sim]``, normals of the hyperplanes.
      proj: f32 ``[R, d, d_proj]``, the inner projection with its scale, or ``None`` for the identity.
      final_matrix: int8 ``[R, B d_proj, final_dim]`` of signs, or ``None``.
      final_index, final_sign: i32 and f32 ``[R B d_proj]``, the final count-sketch, or ``None``.
      final_dim: of the final count-sketch, static.
    """

    simhash: Any
    proj: Any = None
    final_matrix: Any = None
    final_index: Any = None
    final_sign: Any = None
    final_dim: int | None = struct.field(pytree_node=False, default=None)


def init_fde(key: AnyKey, config: FDEConfig) -> FDEParams:
    """Draws the hyperplanes, the inner projections and the final projection."""
    planes, inner, final = jax.random.split(key, 3)
    r, d, p = config.num_repetitions, config.d, config.block_dim
    simhash = jax.random.normal(planes, (r, d, config.num_simhash), jnp.float32)
    proj = None
    if config.projection == "dense" and config.d_proj not in (None, d):
        proj = jax.random.rademacher(inner, (r, d, p), jnp.float32) / math.sqrt(p)
    elif config.projection == "count_sketch" and config.d_proj not in (None, d):
        where, sign = jax.random.split(inner)
        place = jax.nn.one_hot(jax.random.randint(where, (r, d), 0, p), p)
        proj = place * jax.random.rademacher(sign, (r, d, 1), jnp.float32)
    if config.final_dim is None:
        return FDEParams(simhash, proj)
    if config.final_projection == "dense":
        matrix = jax.random.rademacher(final, (r, config.fde_dim // r, config.final_dim), jnp.int8)
        return FDEParams(simhash, proj, final_matrix=matrix, final_dim=config.final_dim)
    where, sign = jax.random.split(final)
    index = jax.random.randint(where, (config.fde_dim,), 0, config.final_dim, jnp.int32)
    signs = jax.random.rademacher(sign, (config.fde_dim,), jnp.float32)
    return FDEParams(simhash, proj, final_index=index, final_sign=signs, final_dim=config.final_dim)


def encode_query_fde(
    params: FDEParams, queries: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, fill_empty: bool = False
) -> Float[Array, "b D"]:
    """``F_q``: in each block the sum of the projected tokens that fall into its cell.

    Args:
      params: what :func:`init_fde` drew.
      queries: tokens; unit length for the paper's guarantee.
      mask: real tokens; all by default.
      fill_empty: always False; a query token must be counted once.

    Returns:
      f32 ``[b, R B d_proj]`` or ``[b, final_dim]``; blocks by cell number, repetitions outermost.  ``<F_q, F_doc> / R``
      estimates Chamfer.

    Raises:
      ValueError: another token dimension than ``params``, or ``fill_empty``.
    """
    if fill_empty:
        raise ValueError("fill_empty is for documents only: it would count a query token in several blocks")
    return _encode(params, queries, mask, mean=False, fill_empty=False)


def encode_document_fde(
    params: FDEParams,
    documents: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | None = None,
    fill_empty: bool = True,
) -> Float[Array, "b D"]:
    """``F_doc``: in each block the mean of the projected tokens that fall into its cell.

    An empty block holds, with ``fill_empty``, the projected token whose sign bits differ from the cell's in the fewest
    places (ties: the first token); without it, zeros.  A row without any token encodes to zeros (:func:`check_tokens`
    refuses it).

    Args, Returns, Raises: as :func:`encode_query_fde`.
    """
    return _encode(params, documents, mask, mean=True, fill_empty=fill_empty)


def _encode(params: FDEParams, x: Array, mask: Any, mean: bool, fill_empty: bool) -> Array:
    sets, tokens, d = x.shape
    if d != params.simhash.shape[1]:
        raise ValueError(f"tokens have {d} dimensions, the encoding's params are for {params.simhash.shape[1]}")
    k_sim = params.simhash.shape[2]
    cells = 2**k_sim
    mask = jnp.ones((sets, tokens), bool) if mask is None else mask
    x = jnp.where(mask[..., None], x, 0.0).astype(jnp.float32)
    powers = 2 ** jnp.arange(k_sim - 1, -1, -1, dtype=jnp.int32)
    # masked tokens go into a cell of their own, which is cut off
    slot = lambda cell: jnp.where(mask, jnp.arange(sets)[:, None] * cells + cell, sets * cells)  # noqa: E731

    def repetition(drawn):
        planes, proj = drawn["simhash"], drawn.get("proj")
        bits = jnp.matmul(x, planes, precision="highest") > 0
        cell = jnp.sum(bits * powers, -1, dtype=jnp.int32)
        psi = x if proj is None else jnp.matmul(x, proj, precision="highest")
        width = psi.shape[-1]
        # one scatter for sums and counts
        rows = jnp.concatenate([psi, jnp.ones((sets, tokens, 1))], -1).reshape(-1, width + 1)
        sums = jax.ops.segment_sum(rows, slot(cell).ravel(), sets * cells + 1)[:-1].reshape(sets, cells, width + 1)
        blocks, counts = sums[..., :-1], sums[..., -1:]
        if mean:
            blocks = blocks / jnp.maximum(counts, 1)
        if fill_empty:
            every = jnp.arange(cells, dtype=jnp.int32)[None, :, None]
            hamming = jax.lax.population_count(cell[:, None, :] ^ every)
            # the smallest (distance, place) pair: an argmin that a CPU can vectorise
            ranked = jnp.where(mask[:, None, :], hamming, k_sim + 1) * tokens + jnp.arange(tokens)
            nearest = jnp.min(ranked, -1) % tokens + jnp.arange(sets)[:, None] * tokens
            blocks = jnp.where(counts > 0, blocks, psi.reshape(-1, width)[nearest])
        return blocks.reshape(sets, cells * width)

    drawn = {"simhash": params.simhash} | ({} if params.proj is None else {"proj": params.proj})
    if params.final_dim is None:
        # one repetition at a time: nothing of size [R, B, n, d] ever exists
        found = jax.lax.map(repetition, drawn)
        return jnp.moveaxis(found, 0, 1).reshape(sets, -1)

    r = params.simhash.shape[0]
    if params.final_matrix is not None:
        final = {"matrix": params.final_matrix}
    else:
        final = {"index": params.final_index.reshape(r, -1), "sign": params.final_sign.reshape(r, -1)}

    def add(total, step):
        blocks = repetition(step[0])
        if "matrix" in step[1]:
            matrix = step[1]["matrix"].astype(jnp.float32) / math.sqrt(params.final_dim)
            return total + jnp.matmul(blocks, matrix, precision="highest"), None
        return total.at[:, step[1]["index"]].add(blocks * step[1]["sign"]), None

    return jax.lax.scan(add, jnp.zeros((sets, params.final_dim)), (drawn, final))[0]


# --- fewer query tokens for the exact scores (paper, section 3.2: ball carving) ---------------------------------------


def ball_carve(
    tokens: Float[Array, "n d"], mask: Bool[Array, "n"] | None = None, tau: float | int | Float[Array, ""] = 0.7
) -> tuple[Float[Array, "n d"], Bool[Array, "n"]]:
    """Replaces a query's clusters of similar tokens by their sums, to re-rank with fewer of them.

    In order, each token that no cluster has yet opens one and takes all unassigned tokens q' with ``<q, q'> >= tau``.

    Args:
      tokens: one query's tokens, unit length.
      mask: real tokens; all by default.
      tau: in [-1, 1]; above 1 every token stays alone, at -1 all become one.

    Returns:
      The sums, each in the place of the token that opened its cluster (0 elsewhere), and the mask of those places.
    """
    mask = jnp.ones(tokens.shape[0], bool) if mask is None else mask
    tokens = jnp.where(mask[:, None], tokens, 0.0)
    near = jnp.matmul(tokens, tokens.T, precision="highest") >= tau
    places = jnp.arange(tokens.shape[0])

    def carve(free, i):
        members = free & (near[i] | (places == i)) & free[i]
        return free & ~members, members

    _, members = jax.lax.scan(carve, mask, places)
    return jnp.matmul(members.astype(tokens.dtype), tokens, precision="highest"), jnp.any(members, -1)


# --- the index and the search (paper, section 3) ----------------------------------------------------------------------


@struct.dataclass
class MuveraIndex:
    """Encoded documents, ready for search.

    Attributes:
      params: the encoding's.
      fingerprint: uint32 ``[2]`` of ``params``.
      tokens, mask: the documents' tokens ``[n, m, d]`` and which are real, for re-ranking.
      fdes: encodings ``[n, D]`` (f32 or bf16), or ``None`` if they are quantised.
      codebooks, codes: f32 ``[M, C, g]`` and uint8 ``[n, M]``, or ``None``.
    """

    params: Any
    fingerprint: Any
    tokens: Any
    mask: Any
    fdes: Any = None
    codebooks: Any = None
    codes: Any = None


def build_index(
    params: FDEParams,
    documents: Float[Array, "n m d"],
    mask: Bool[Array, "n m"] | None = None,
    fill_empty: bool = True,
    dtype: Any = jnp.float32,
    pq_group: int | None = None,
    pq_centroids: int = 256,
    key: AnyKey | None = None,
    block: int = 256,
) -> MuveraIndex:
    """Encodes the documents, ``block`` of them at a time.

    Args:
      params: what :func:`init_fde` drew.
      documents, mask: tokens and which are real.
      fill_empty: see :func:`encode_document_fde`.
      dtype: how encodings are kept.
      pq_group, pq_centroids, key: quantise in groups of that many dimensions; ``None`` keeps them as they are.
      block: documents encoded at a time.

    Raises:
      ValueError: as :func:`encode_document_fde` and :func:`pq_train`; or quantisation without a key.
    """
    mask = jnp.ones(documents.shape[:2], bool) if mask is None else mask
    encode = lambda rows: encode_document_fde(params, *rows, fill_empty).astype(dtype)  # noqa: E731
    fdes = in_blocks(encode, (documents, mask), block)
    index = MuveraIndex(params, fingerprint(params), documents, mask, fdes=fdes)
    if pq_group is None:
        return index
    if key is None:
        raise ValueError("quantisation is random at its start: pass a key")
    codebooks = pq_train(key, fdes, pq_group, pq_centroids)
    return index.replace(fdes=None, codebooks=codebooks, codes=pq_encode(codebooks, fdes))


def candidates(index: MuveraIndex, query_fdes: Float[Array, "q D"], k: int, chunk: int = 16384) -> Found:
    """The first stage: the k documents whose encodings have the largest products with the queries'."""
    if index.codes is None:
        return mips_topk(query_fdes, index.fdes, k, chunk)
    score = lambda q, codes: pq_adc_scores(index.codebooks, q, codes)  # noqa: E731
    return scored_topk(query_fdes, index.codes, score, k, chunk)


def muvera_search(
    index: MuveraIndex,
    queries: Float[Array, "q n d"],
    qmask: Bool[Array, "q n"] | None = None,
    k: int = 10,
    num_candidates: int = 100,
    tau: float | int | None = None,
    chunk: int = 16384,
) -> Ranking:
    """The whole search: encode the queries, take candidates by inner product, re-rank them by exact Chamfer.

    Args:
      index: what :func:`build_index` made.
      queries, qmask: tokens and which are real.
      k, num_candidates: ``1 <= k <= num_candidates <= n``.
      tau: ball-carve the queries before re-ranking (the paper's 0.7); ``None`` re-ranks with all tokens.
      chunk: documents scored at a time in the first stage.

    Raises:
      ValueError: sizes out of range, or another token dimension than the index's.
    """
    check_stages(k, num_candidates, index.tokens.shape[0])
    qmask = jnp.ones(queries.shape[:2], bool) if qmask is None else qmask
    _, found = candidates(index, encode_query_fde(index.params, queries, qmask), num_candidates, chunk)
    if tau is not None:
        queries, qmask = jax.vmap(lambda q, m: ball_carve(q, m, tau))(queries, qmask)

    def scorer(query, documents):
        block = documents["tokens"].shape[0]
        return chamfer(query["tokens"][None], documents["tokens"], query["mask"][None], documents["mask"], block)[0]

    documents = {"tokens": index.tokens, "mask": index.mask}
    return rerank({"tokens": queries, "mask": qmask}, documents, found, scorer, k)


# --- two halves of one search: fingerprints, checks, plain arrays -----------------------------------------------------


def check_fingerprint(index: MuveraIndex, params: FDEParams) -> None:
    """Raises ValueError unless the index was built with these ``params`` (on the host)."""
    check_same_fit(index.fingerprint, fingerprint(params), "FDEParams")


def params_from_arrays(config: FDEConfig, arrays: Any) -> FDEParams:
    """Undoes :func:`to_arrays` for params."""
    return FDEParams(**{k: jnp.asarray(v) for k, v in arrays.items()}, final_dim=config.final_dim)


def index_from_arrays(config: FDEConfig, arrays: Any) -> MuveraIndex:
    """Undoes :func:`to_arrays` for an index."""
    rest = {k: jnp.asarray(v) for k, v in arrays.items() if k not in ("params", "fdes_bits")}
    if "fdes_bits" in arrays:
        rest["fdes"] = jax.lax.bitcast_convert_type(jnp.asarray(arrays["fdes_bits"]), jnp.bfloat16)
    return MuveraIndex(params_from_arrays(config, arrays["params"]), **rest)


CARD = Card(
    name="muvera",
    family="retrieval",
    title="MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings",
    year=2024,
    kind="search",
    idea=(
        "Late-interaction retrieval scores sets of token vectors by Chamfer similarity, which is slow to search. "
        "Random hyperplanes cut space into cells; a query becomes the concatenated sums of its tokens in each cell, a "
        "document the means, and the inner product of the two single vectors approximates Chamfer. Ordinary "
        "inner-product search finds candidates, exact Chamfer re-ranks them. Nothing is trained, no data looked at."
    ),
    citation="Dhulipala, Hadian, Jayaram, Lee, Mirrokni; NeurIPS 2024; arXiv 2405.19504",
    plugs_into=(
        "any encoder that emits token embeddings and a mask",
        "inner-product search",
        "two-stage search with an exact scorer",
    ),
    pieces=(
        "FDEConfig",
        "FDEParams",
        "init_fde",
        "encode_query_fde",
        "encode_document_fde",
        "zoo.ops.chamfer:chamfer",
        "ball_carve",
        "zoo.ops.quantisation:pq_train",
        "zoo.ops.quantisation:pq_encode",
        "zoo.ops.quantisation:pq_decode",
        "zoo.ops.quantisation:pq_adc_scores",
        "MuveraIndex",
        "build_index",
        "candidates",
        "muvera_search",
        "zoo.ops.fingerprint:fingerprint",
        "check_fingerprint",
        "zoo.ops.chamfer:check_tokens",
        "zoo.ops.topk:top_k",
        "zoo.ops.search:mips_topk",
        "zoo.ops.search:sharded_mips_topk",
        "zoo.ops.search:two_stage",
        "zoo.ops.chamfer:chamfer_topk",
        "zoo.ops.kmeans:kmeans",
    ),
    claim=Claim(
        statement=(
            "On token sets around shared topics, the encoding with 20 repetitions, 5 hyperplanes and 16 dimensions "
            "finds the exact Chamfer nearest document first more often than the mean-pooled single vector."
        ),
        metric="recall_1_at_1",
        effect=0.2,
        method="fde (20, 5, 16)",
        baseline="mean pooling",
        trivial="random ranking",
        seeds=5,
        budget="no arm trains or tunes anything; the same documents and queries per seed",
    ),
    cost="query O(R n d (d_proj + k_sim)); document the same plus O(R n 2^k_sim) to fill; a product of d_fde to search",
    official_code="google/graph-mining, sketching/point_cloud (C++, the encodings only)",
    departures=(
        "blocks in binary order; the released code numbers them by Gray code (a permutation)",
        "the inner and final projections are the paper's dense signs; 'count_sketch' gives the released code's",
        "independent draws for hyperplanes and projections; the released code seeds both of a repetition alike",
        "sets without tokens are refused; the released code divides by zero or reads out of bounds",
        "the first stage is exact search in chunks; the paper uses a DiskANN graph",
    ),
)
