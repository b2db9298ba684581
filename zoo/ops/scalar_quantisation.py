"""Locally adaptive scalar quantisation (LVQ): each vector has its own range, cut into ``2^B`` equal steps.

Aguerrebere, Bhati, Hildebrand, Tepper, Willke: "Similarity search in the blink of an eye with compressed indices",
VLDB 2023.  A vector v, its data set's mean taken off, keeps ``l = fp16(min v)``,
``D = fp16((max v - min v) / (2^B - 1))`` and codes ``c_j = clip(round((v_j - l) / D), 0, 2^B - 1)``; it decodes to
``mean_j + l + D c_j``, at most ``D / 2`` off (and what float16 takes from l and D).  A second level codes the
remainder, which lies in ``[-D/2, D/2]``, with step ``D / (2^B2 - 1)``.  Inner products and distances are computed from
the codes, without the decoded vectors.

Vectors are kept as *rows*: a float array ``[n, d]`` or :class:`LVQCodes`, whose every leaf has leading axis n, so that
searches slice, gather and shard either alike (``zoo.ops.search``).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, UInt

ENCODINGS = ("float32", "bfloat16", "float16", "lvq8", "lvq4", "lvq4x4", "lvq4x8", "lvq8x8")
"""How rows may be kept: as floats, or LVQ of that many bits, the second level's after ``x``."""

ALMOST_CONSTANT = 7e-5
"""Smallest step worth coding: a vector of a smaller one would have a subnormal float16 step, and gets step 1."""

LARGEST_HALF = 65504.0

Metric = Literal["ip", "l2"]


@struct.dataclass
class LVQCodes:
    """Quantised vectors, rows along the first axis of every leaf; the mean that was taken off is kept elsewhere.

    Attributes:
      codes: uint8 ``[n, d]``, or for 4 bits ``[n, ceil(d / 2)]``: dimension j in the low half of byte j, dimension
        ``ceil(d / 2) + j`` in its high half.
      scale, bias: f16 ``[n]``, the step D and the minimum l of each vector.
      residual: codes of the second level, packed likewise, or ``None``.
      dim: d.
      bits, residual_bits: 8 or 4; residual_bits 0 without a second level.
    """

    codes: Any
    scale: Any
    bias: Any
    residual: Any = None
    dim: int = struct.field(pytree_node=False, default=0)
    bits: int = struct.field(pytree_node=False, default=8)
    residual_bits: int = struct.field(pytree_node=False, default=0)


Rows = Array | LVQCodes


def lvq_encode(
    vectors: Float[Array, "n d"], mean: Float[Array, "d"] | None = None, bits: int = 8, residual_bits: int = 0
) -> LVQCodes:
    """Quantises each vector; the constants go through float16 before the codes are computed.

    A vector whose range is at most ``7e-5 (2^bits - 1)`` counts as constant and gets step 1: scale data so small.

    Args:
      vectors: any float type; computed in float32.
      mean: taken off first; nothing by default.
      bits: of the first level, 8 or 4.
      residual_bits: of the second level, 8 or 4; 0 for none.

    Raises:
      ValueError: an unsupported number of bits.
    """
    if bits not in (4, 8) or residual_bits not in (0, 4, 8):
        raise ValueError(f"bits must be 4 or 8, and residual_bits 0, 4 or 8; got {bits} and {residual_bits}")
    v = vectors.astype(jnp.float32) if mean is None else vectors.astype(jnp.float32) - mean
    top = 2**bits - 1
    low, span = jnp.min(v, -1), jnp.max(v, -1) - jnp.min(v, -1)
    bias = low.astype(jnp.float16)
    scale = jnp.where(span > ALMOST_CONSTANT * top, span / top, 1.0).astype(jnp.float16)
    step, start = scale.astype(jnp.float32)[:, None], bias.astype(jnp.float32)[:, None]
    codes = _levels((v - start) * (1 / step), top)
    kept = LVQCodes(_pack(codes, bits), scale, bias, None, vectors.shape[1], bits, residual_bits)
    if residual_bits == 0:
        return kept
    fine = 2**residual_bits - 1
    rest = v - (start + step * codes)
    return kept.replace(residual=_pack(_levels((rest + step / 2) * (1 / (step / fine)), fine), residual_bits))


def _levels(x: Array, top: int) -> Array:
    # halves go away from zero, as C's round does
    return jnp.clip(jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO), 0, top)


def _pack(codes: Array, bits: int) -> UInt[Array, "n b"]:
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    half = -(-codes.shape[1] // 2)
    low, high = codes[:, :half], codes[:, half:]
    return low | (jnp.pad(high, ((0, 0), (0, half - high.shape[1]))) << 4)


def _unpack(packed: Array, bits: int, dim: int) -> Float[Array, "n d"]:
    if bits == 4:
        packed = jnp.concatenate([packed & 15, packed >> 4], -1)[:, :dim]
    return packed.astype(jnp.float32)


def _affine(codes: LVQCodes) -> tuple[Array, Array, Array]:
    """Rows as ``start + step * levels``: f32 ``[n, 1]``, ``[n, 1]`` and ``[n, d]``, both levels in one."""
    step, start = (x.astype(jnp.float32)[:, None] for x in (codes.scale, codes.bias))
    levels = _unpack(codes.codes, codes.bits, codes.dim)
    if codes.residual is not None:
        levels = levels + _unpack(codes.residual, codes.residual_bits, codes.dim) / (2**codes.residual_bits - 1)
        start = start - step / 2
    return start, step, levels


def lvq_decode(codes: LVQCodes, mean: Float[Array, "d"] | None = None) -> Float[Array, "n d"]:
    """The vectors that the codes stand for, both levels, the mean added."""
    start, step, levels = _affine(codes)
    decoded = start + step * levels
    return decoded if mean is None else decoded + mean


def lvq_inner_product(
    queries: Float[Array, "b d"], codes: LVQCodes, mean: Float[Array, "d"] | None = None
) -> Float[Array, "b n"]:
    """``<q, v>`` of exact queries and quantised vectors: ``<q, mean> + l sum(q) + D <q, c>``.

    Raises:
      ValueError: another dimension than the codes'.
    """
    check_dimension(queries, codes.dim)
    start, step, levels = _affine(codes)
    queries = queries.astype(jnp.float32)
    products = jnp.matmul(queries, levels.T, precision="highest")
    found = jnp.sum(queries, -1, keepdims=True) * start.T + products * step.T
    return found if mean is None else found + (jnp.matmul(queries, mean, precision="highest"))[:, None]


def lvq_squared_distance(
    queries: Float[Array, "b d"], codes: LVQCodes, mean: Float[Array, "d"] | None = None
) -> Float[Array, "b n"]:
    """``||q - v||^2`` of exact queries and quantised vectors, from products with the codes; never below 0.

    Raises:
      ValueError: another dimension than the codes'.
    """
    check_dimension(queries, codes.dim)
    queries = queries.astype(jnp.float32) if mean is None else queries.astype(jnp.float32) - mean
    start, step, levels = _affine(codes)
    # ||l + D c||^2 = d l^2 + 2 l D sum(c) + D^2 sum(c^2)
    total, squares = jnp.sum(levels, -1, keepdims=True), jnp.sum(levels**2, -1, keepdims=True)
    norms = codes.dim * start**2 + 2 * start * step * total + step**2 * squares
    products = lvq_inner_product(queries, codes)
    return jnp.maximum(jnp.sum(queries**2, -1, keepdims=True) - 2 * products + norms.T, 0.0)


def check_dimension(queries: Array, dim: int) -> None:
    """Raises ValueError unless queries ``[..., D]`` have the database's dimension."""
    if queries.shape[-1] != dim:
        raise ValueError(f"queries have D={queries.shape[-1]}, database D={dim}")


# --- rows of any encoding, and their scores ---------------------------------------------------------------------------


def encode_rows(vectors: Float[Array, "n d"], encoding: str, mean: Float[Array, "d"] | None = None) -> Rows:
    """Vectors as rows of one of :data:`ENCODINGS`; the mean is taken off in every one of them.

    Raises:
      ValueError: an unknown encoding.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}; got {encoding!r}")
    if encoding.startswith("lvq"):
        first, _, second = encoding[3:].partition("x")
        return lvq_encode(vectors, mean, int(first), int(second or 0))
    vectors = vectors.astype(jnp.float32) if mean is None else vectors.astype(jnp.float32) - mean
    return vectors.astype(jnp.dtype(encoding))


@struct.dataclass
class RowQueries:
    """Queries prepared for rows whose mean was taken off.

    Attributes:
      vectors: f32 ``[q, d]``; for distances the mean is taken off here too.
      constant: f32 ``[q]``, added to every score of a query: ``<q, mean>`` for inner products.
    """

    vectors: Any
    constant: Any


def prepare_queries(queries: Float[Array, "q Dq"], mean: Float[Array, "d"], metric: str = "ip") -> RowQueries:
    """What :func:`row_scores` needs of the queries, computed once.

    Raises:
      ValueError: another metric than ``"ip"`` or ``"l2"``, or another dimension than the mean's.
    """
    if metric not in ("ip", "l2"):
        raise ValueError(f"metric must be 'ip' or 'l2', got {metric!r}")
    check_dimension(queries, mean.shape[0])
    queries = queries.astype(jnp.float32)
    if metric == "l2":
        return RowQueries(queries - mean, jnp.zeros(queries.shape[0]))
    return RowQueries(queries, jnp.matmul(queries, mean, precision="highest"))


def row_scores(queries: RowQueries, rows: Rows, metric: Metric = "ip") -> Float[Array, "q n"]:
    """Inner products, or minus squared distances, of prepared queries and rows of any encoding; higher is nearer."""
    q = queries.vectors
    if metric == "l2":
        if isinstance(rows, LVQCodes):
            return -lvq_squared_distance(q, rows)
        rows = rows.astype(jnp.float32)
        products = jnp.matmul(q, rows.T, precision="highest")
        return -jnp.maximum(jnp.sum(q**2, -1, keepdims=True) - 2 * products + jnp.sum(rows**2, -1), 0.0)
    if isinstance(rows, LVQCodes):
        return lvq_inner_product(q, rows) + queries.constant[:, None]
    return jnp.matmul(q, rows.astype(jnp.float32).T, precision="highest") + queries.constant[:, None]


def bytes_per_row(rows: Rows) -> int:
    """Bytes that one row takes."""
    return sum(x.nbytes // x.shape[0] for x in jax.tree.leaves(rows))


def check_range(vectors: np.ndarray, bits: int, what: str = "vectors") -> None:
    """Refuses, on the host, vectors whose range float16 constants cannot hold; call it with the mean taken off.

    Raises:
      ValueError: a minimum or a step beyond float16, or vectors that vary too little to be told from constant ones.
    """
    vectors = np.asarray(vectors, np.float32)
    low = vectors.min(-1)
    span = vectors.max(-1) - low
    top = 2**bits - 1
    far = (np.abs(low) > LARGEST_HALF) | (span / top > LARGEST_HALF)
    if far.any():
        row = int(np.flatnonzero(far)[0])
        raise ValueError(
            f"row {row} of {what} runs from {low[row]:.3g} to {low[row] + span[row]:.3g}: LVQ keeps its minimum and "
            "step in float16; scale the vectors down"
        )
    lost = (span > 0) & (span <= ALMOST_CONSTANT * top)
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        raise ValueError(
            f"row {row} of {what} spans only {span[row]:.3g} ({int(lost.sum())} such): with {bits} bits LVQ takes "
            f"ranges up to {ALMOST_CONSTANT * top:.3g} for constant; scale the vectors up, or keep them as floats"
        )


def check_vectors(vectors: np.ndarray, dimension: int | None = None, what: str = "database") -> None:
    """Refuses, on the host, rows that nothing can be learned from or found among.

    Raises:
      ValueError: not ``[n, D]`` with n and D at least 1, another dimension, or a row that is not finite (the first).
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"{what} must be [n, D] with at least one row, got {list(vectors.shape)}")
    if dimension is not None and vectors.shape[1] != dimension:
        raise ValueError(f"{what} have D={vectors.shape[1]}, database D={dimension}")
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise ValueError(f"row {bad[0]} of {what} is not finite ({len(bad)} such)")
