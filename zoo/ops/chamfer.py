"""Sets of token vectors: the Chamfer (MaxSim) similarity of late-interaction retrieval, and checks of such sets."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from zoo.ops.blocks import in_blocks
from zoo.ops.search import Found, chunked_topk


def chamfer(
    queries: Float[Array, "a n d"],
    documents: Float[Array, "b m d"],
    qmask: Bool[Array, "a n"] | None = None,
    pmask: Bool[Array, "b m"] | None = None,
    block: int = 32,
) -> Float[Array, "a b"]:
    """Chamfer (MaxSim) similarity ``sum_q max_p <q, p>`` of every query with every document.

    Args:
      queries, documents: tokens.
      qmask, pmask: real tokens; all by default.
      block: documents compared at a time; memory is O(a n block m).

    Returns:
      f32 scores; a document without tokens scores ``-inf``, a query without tokens 0.
    """
    qmask = jnp.ones(queries.shape[:2], bool) if qmask is None else qmask
    pmask = jnp.ones(documents.shape[:2], bool) if pmask is None else pmask
    queries = queries.astype(jnp.float32)

    def against(part):
        tokens, mask = part
        products = jnp.einsum("and,bmd->banm", queries, tokens.astype(jnp.float32), precision="highest")
        best = jnp.max(jnp.where(mask[:, None, None], products, -jnp.inf), -1, initial=-jnp.inf)
        return jnp.sum(jnp.where(qmask, best, 0.0), -1)

    return in_blocks(against, (documents, pmask), block).T


def chamfer_topk(
    queries: Float[Array, "a n d"],
    documents: Float[Array, "b m d"],
    k: int,
    qmask: Bool[Array, "a n"] | None = None,
    pmask: Bool[Array, "b m"] | None = None,
    chunk: int = 1024,
) -> Found:
    """Exhaustive search: the k documents of highest Chamfer similarity, ``chunk`` documents at a time.

    Returns:
      Scores ``[a, k]``, falling, ties by the lowest id, and ids; see ``zoo.ops.search.chunked_topk``.
    """
    size = min(chunk, documents.shape[0])

    def score(start):
        part = jax.lax.dynamic_slice_in_dim(documents, start, size)
        mask = None if pmask is None else jax.lax.dynamic_slice_in_dim(pmask, start, size)
        return chamfer(queries, part, qmask, mask)

    return chunked_topk(score, queries.shape[0], documents.shape[0], k, size)


def check_tokens(tokens: Any, mask: Any = None, d: int | None = None, what: str = "tokens") -> None:
    """Checks token sets on the host, before they are used; warns if they are not of unit length.

    Args:
      tokens, mask: ``[N, n, d]`` and ``[N, n]``.
      d: the dimension the encoding expects.
      what: a name for messages.

    Raises:
      ValueError: wrong shapes, an empty set, or tokens that are not finite; with the first place.
    """
    tokens = np.asarray(tokens, np.float32)
    if tokens.ndim != 3 or tokens.shape[1] == 0:
        raise ValueError(f"{what} must be [N, n, d] with at least one token a set, got {list(tokens.shape)}")
    mask = np.ones(tokens.shape[:2], bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"the mask of {what} must be {list(tokens.shape[:2])}, got {list(mask.shape)}")
    if d is not None and tokens.shape[2] != d:
        raise ValueError(f"{what} have {tokens.shape[2]} dimensions, the encoding expects {d}")
    empty = np.flatnonzero(~mask.any(1))
    if len(empty):
        raise ValueError(f"set {empty[0]} of {what} has no tokens ({len(empty)} such); drop empty sets")
    bad = mask & ~np.isfinite(tokens).all(-1)
    if bad.any():
        at = np.argwhere(bad)[0]
        raise ValueError(f"token {at[1]} of set {at[0]} of {what} is not finite; check the encoder and its inputs")
    lengths = np.linalg.norm(tokens[mask], axis=-1)
    if np.abs(lengths - 1).max() > 1e-2:
        warnings.warn(
            f"{what} are not of unit length ({lengths.min():.3g} to {lengths.max():.3g}): inner products are no "
            "cosines and guarantees for unit vectors do not hold; normalise them if the model was trained so",
            stacklevel=2,
        )
