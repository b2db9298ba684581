"""Other libraries' searches behind :func:`zoo.ops.search.mips_topk`'s signature, to compare with or to use.

They take and give host arrays.  The library is optional and imported when first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trainers.errors import UserError

Found = tuple[np.ndarray, np.ndarray]


def faiss_library() -> Any:
    """The ``faiss`` module.

    Raises:
      UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("this back end needs faiss, which is not installed: pip install faiss-cpu") from None
    return faiss


def numpy_flat(queries: np.ndarray, documents: np.ndarray, k: int, mask: np.ndarray | None = None) -> Found:
    """Exact search by one matrix product, ``argpartition`` and a sort of k: what one writes without a library."""
    queries, documents = _check(queries, documents, k, mask)
    scores = queries @ documents.T
    if mask is not None:
        scores = np.where(np.asarray(mask), scores, -np.inf)
    n = documents.shape[0]
    at = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k < n else np.tile(np.arange(n), (len(queries), 1))
    return _best_first(np.take_along_axis(scores, at, 1), at)


def faiss_flat(queries: np.ndarray, documents: np.ndarray, k: int, mask: np.ndarray | None = None) -> Found:
    """Exact search by ``IndexFlatIP``.

    Args:
      queries, documents: ``[q, d]`` and ``[n, d]``; computed in float32.
      k: how many, in ``[1, n]``.
      mask: bool ``[n]``, documents that may be found; all by default.

    Returns:
      Scores f32 ``[q, k]``, falling, and ids i32 ``[q, k]``, equal scores by the lowest id among those found; ``-inf``
      and ``-1`` where there is no document.

    Raises:
      UserError: no faiss, or sizes that do not fit.
    """
    return faiss_index(documents, "flat")(queries, k, mask)


def faiss_ivf(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    mask: np.ndarray | None = None,
    lists: int = 256,
    probes: int = 16,
) -> Found:
    """Search in the ``probes`` nearest of ``lists`` clusters (``IndexIVFFlat``); see :func:`faiss_flat`."""
    return faiss_index(documents, "ivf", lists=lists)(queries, k, mask, probes)


def faiss_ivfpq(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    mask: np.ndarray | None = None,
    lists: int = 256,
    probes: int = 16,
    parts: int = 16,
    bits: int = 8,
    refine: int = 1,
) -> Found:
    """:func:`faiss_ivf` over product-quantised residuals, ``parts`` codes of ``bits`` bits each (``IndexIVFPQ``).

    With ``refine`` above 1, that many times k candidates are re-ranked by their exact scores (``IndexRefineFlat``).
    """
    return faiss_index(documents, "ivfpq", lists=lists, parts=parts, bits=bits)(queries, k, mask, probes, refine)


def faiss_index(
    documents: np.ndarray, kind: str, lists: int = 256, parts: int = 16, bits: int = 8
) -> Callable[..., Found]:
    """Builds an index once; what it returns searches it: ``(queries, k, mask=None, probes=16, refine=1) -> Found``.

    Args:
      documents: ``[n, d]``.
      kind: ``"flat"``, ``"ivf"`` or ``"ivfpq"``.
      lists: clusters of the two latter, at most n.
      parts, bits: of product quantisation; ``parts`` must divide d.

    Raises:
      UserError: no faiss, an unknown kind, or sizes that do not fit.
    """
    faiss = faiss_library()
    documents = np.ascontiguousarray(documents, np.float32)
    if documents.ndim != 2 or 0 in documents.shape:
        raise UserError(f"documents must be [n, d] with at least one row, got {list(documents.shape)}")
    n, d = documents.shape
    if kind not in ("flat", "ivf", "ivfpq"):
        raise UserError(f"kind must be 'flat', 'ivf' or 'ivfpq', got {kind!r}")
    if kind != "flat" and not 1 <= lists <= n:
        raise UserError(f"lists must be in [1, {n}], the number of documents; got {lists}")
    if kind == "ivfpq" and (parts < 1 or d % parts or not 1 <= bits <= 8 or 2**bits > n):
        raise UserError(
            f"parts must divide the dimension {d}, and bits be in [1, 8] with at most {n} centroids; "
            f"got {parts}, {bits}"
        )
    inner = faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexFlatIP(d)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(index, d, lists, inner)
    elif kind == "ivfpq":
        index = faiss.IndexIVFPQ(index, d, lists, parts, bits, inner)
    whole = faiss.IndexRefineFlat(index) if kind == "ivfpq" else index
    whole.train(documents)
    whole.add(documents)

    def search(queries: np.ndarray, k: int, mask: np.ndarray | None = None, probes: int = 16, refine: int = 1) -> Found:
        queries, _ = _check(queries, documents, k, mask)
        allowed = {} if mask is None else {"sel": faiss.IDSelectorBatch(np.flatnonzero(mask).astype(np.int64))}
        if kind == "flat":
            chosen = faiss.SearchParameters(**allowed) if allowed else None
        else:
            known = faiss.SearchParametersIVF if kind == "ivf" else faiss.IVFPQSearchParameters
            chosen = known(nprobe=max(1, min(probes, lists)), **allowed)
        if refine > 1 and kind == "ivfpq":
            both = faiss.IndexRefineSearchParameters(k_factor=refine, base_index_params=chosen)
            values, ids = whole.search(queries, k, params=both)
        else:
            values, ids = index.search(queries, k, params=chosen)
        return _best_first(np.where(ids < 0, -np.inf, values).astype(np.float32), ids)

    return search


def _best_first(values: np.ndarray, ids: np.ndarray) -> Found:
    ids = np.where(np.isneginf(values), -1, ids)
    order = np.lexsort((ids, -values), axis=1)
    return np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1).astype(np.int32)


def _check(queries: np.ndarray, documents: np.ndarray, k: int, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    queries, documents = (np.ascontiguousarray(x, np.float32) for x in (queries, documents))
    n, d = documents.shape
    if queries.ndim != 2 or queries.shape[1] != d:
        raise UserError(f"queries have D={queries.shape[-1]}, database D={d}")
    if not 1 <= k <= n:
        raise UserError(f"k must be in [1, {n}], the number of documents; got {k}")
    if mask is not None and np.shape(mask) != (n,):
        raise UserError(f"mask must be bool [{n}], got {list(np.shape(mask))}")
    return queries, documents
