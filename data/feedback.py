"""Pseudo-relevance feedback: runs of a first pass from files, and generated queries with their first documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.collections import _lines, _numbered
from data.dataset import Dataset
from data.stream import DataError


def clustered_feedback(
    seed: int = 0, documents: int = 800, clusters: int = 80, d: int = 24, train: int = 600, test: int = 400,
    spread: float = 0.4, noise: float = 1.3, k_max: int = 5,
) -> Dataset:  # fmt: skip
    """Documents in clusters on the sphere, queries that are noisy copies of one, and what a first pass finds for them.

    A document is ``normalise(centre + spread e / sqrt(d))``, a query ``normalise(target + noise e / sqrt(d))`` with
    standard normal e; feedback are the ``k_max`` documents of the largest inner product (LoL's stand-in).

    Returns:
      Splits ``documents`` (``vector`` f32 ``[N, d]``), ``train`` and ``test`` (``query`` f32 ``[Q, d]``, ``positives``
      int32 ``[Q, 1]``, ``feedback`` int32 ``[Q, k_max]``, best first).

    Raises:
      DataError: sizes below 1, or more feedback than documents.
    """
    if min(documents, clusters, d, train, test) < 1 or not 0 <= k_max <= documents:
        raise DataError(
            f"sizes must be at least 1 and k_max in [0, documents]; got {documents}, {clusters}, {d}, {train}, {test} "
            f"and k_max {k_max}"
        )
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    centres = unit(rng.normal(size=(clusters, d)))
    own = np.arange(documents) % clusters
    vectors = unit(centres[own] + spread * rng.normal(size=(documents, d)) / np.sqrt(d)).astype(np.float32)
    target = rng.integers(0, documents, train + test)
    queries = unit(vectors[target] + noise * rng.normal(size=(train + test, d)) / np.sqrt(d)).astype(np.float32)
    feedback = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k_max].astype(np.int32)
    rows = {"query": queries, "positives": target[:, None].astype(np.int32), "feedback": feedback}
    splits = {"train": {k: v[:train] for k, v in rows.items()}, "test": {k: v[train:] for k, v in rows.items()}}
    return Dataset("clustered feedback", {"documents": {"vector": vectors}, **splits})


def read_run(
    file: str | Path, query_ids: Sequence[str], document_ids: Sequence[str], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``k`` documents of each query of a run: ids int32 ``[Q, k]``, best first, padded with -1.

    Args:
      file: lines ``qid pid rank``, ``qid pid rank score`` or TREC's ``qid Q0 pid rank score tag``, tabs or spaces.
      query_ids, document_ids: of the collection; lines of other queries are skipped, other documents are an error.
      k: at most so many; a shorter list is allowed.

    Returns:
      The ids, and how many documents each query has (0: it is not in the run).

    Raises:
      DataError: a line that cannot be read, a document that the collection lacks, or one that a query has twice.
    """
    file = Path(file)
    query_at, document_at = {q: n for n, q in enumerate(query_ids)}, {d: n for n, d in enumerate(document_ids)}
    rows: Mapping[int, dict[int, int]] = {}
    for n, line in _lines(file):
        parts = line.split()
        try:
            if len(parts) not in (3, 4, 6):
                raise ValueError
            own, found, rank = (parts[0], parts[2], int(parts[3])) if len(parts) == 6 else (*parts[:2], int(parts[2]))
        except ValueError:
            raise DataError(
                f"{file}, line {n}: expected `qid pid rank` or TREC's `qid Q0 pid rank score tag`, got {line[:60]!r}"
            ) from None
        if own not in query_at:
            continue
        if found not in document_at:
            raise DataError(f"{file}, line {n}: document {found!r} is not in the collection")
        seen = rows.setdefault(query_at[own], {})
        if document_at[found] in seen:
            raise DataError(f"{file}, line {n}: query {own!r} has document {found!r} twice")
        seen[document_at[found]] = rank
    out = np.full((len(query_ids), k), -1, np.int32)
    for at, seen in rows.items():
        best = sorted(seen, key=lambda d: (seen[d], d))[:k]
        out[at, : len(best)] = best
    return out, (out >= 0).sum(1).astype(np.int32)


def read_document_vectors(matrix: str | Path, ids: str | Path, document_ids: Sequence[str]) -> np.ndarray:
    """Vectors of a collection's documents from a matrix and the list of whose rows they are, in the collection's order.

    Args:
      matrix: ``.npy`` or another file of ``data.vectors``, ``[n, d]``.
      ids: a text file, one document id a line, in the order of the rows.
      document_ids: of the collection.

    Returns:
      f32 ``[N, d]``.

    Raises:
      DataError: as many rows as ids are not there, an id occurs twice, or a document has no vector.
    """
    from data.vectors import read_vectors

    rows = read_vectors(matrix)
    names = [line.strip() for _, line in _lines(Path(ids))]
    if len(names) != len(rows):
        raise DataError(f"{matrix} has {len(rows)} rows, but {ids} names {len(names)} documents")
    at = _numbered(names, Path(ids))
    missing = [d for d in document_ids if d not in at]
    if missing:
        raise DataError(f"{ids}: {len(missing)} documents of the collection have no vector, first {missing[0]!r}")
    return np.asarray(rows, np.float32)[[at[d] for d in document_ids]]
