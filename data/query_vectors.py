"""Generated query vectors: bent images of documents, and clusters of queries that all ask in one way."""

from __future__ import annotations

import numpy as np

from data.dataset import Dataset
from data.stream import DataError


def warped_queries(
    seed: int = 0, documents: int = 2000, d: int = 16, width: int = 24, train: int = 1000, test: int = 500,
    noise: float = 0.25,
) -> Dataset:  # fmt: skip
    """Documents on the unit sphere, and queries that are a noisy, bent image of their one relevant document.

    A query is ``tanh(1.5 x T) + noise e`` for its document x, a fixed standard normal T ``[d, width]`` and standard
    normal e (star_adore brief, stand-in).

    Returns:
      Splits ``documents`` (``vector`` f32 ``[N, d]``), ``train`` and ``test`` (``query`` f32 ``[Q, width]``,
      ``positives`` int32 ``[Q, 1]``).

    Raises:
      DataError: sizes below 1.
    """
    if min(documents, d, width, train, test) < 1:
        raise DataError(f"sizes must be at least 1; got {documents}, {d}, {width}, {train} and {test}")
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(documents, d))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bend = rng.normal(size=(d, width))
    relevant = rng.integers(0, documents, train + test)
    queries = np.tanh(1.5 * vectors[relevant] @ bend) + noise * rng.normal(size=(train + test, width))
    rows = {"query": queries.astype(np.float32), "positives": relevant[:, None].astype(np.int32)}
    return Dataset(
        "warped queries",
        {
            "documents": {"vector": vectors.astype(np.float32)},
            "train": {k: v[:train] for k, v in rows.items()},
            "test": {k: v[train:] for k, v in rows.items()},
        },
    )


def clustered_queries(
    seed: int = 0, queries: int = 3000, clusters: int = 5, d: int = 24, hidden: int = 32, noise: float = 0.1
) -> Dataset:
    """Queries in clusters, whose one document is the same smooth function of the query in all of them.

    Clusters have centres ``1.2 e`` and unit variance; the document of a query is ``normalise(tanh(x A) B + noise e)``
    with fixed A and B, so what is learnt in some clusters could hold in the others (retrieval_extrapolation brief).

    Returns:
      Splits ``queries`` (``query`` f32 ``[Q, d]``, ``cluster`` int32 ``[Q]``; query i's document is row i) and
      ``documents`` (``vector`` f32 ``[Q, d]``).

    Raises:
      DataError: sizes below 1.
    """
    if min(queries, clusters, d, hidden) < 1:
        raise DataError(f"sizes must be at least 1; got {queries}, {clusters}, {d} and {hidden}")
    rng = np.random.default_rng(seed)
    centres = 1.2 * rng.normal(size=(clusters, d))
    cluster = rng.integers(0, clusters, queries)
    x = centres[cluster] + rng.normal(size=(queries, d))
    a, b = rng.normal(size=(d, hidden)) / np.sqrt(d), rng.normal(size=(hidden, d)) / np.sqrt(hidden)
    target = np.tanh(x @ a) @ b
    vectors = target / np.linalg.norm(target, axis=1, keepdims=True) + noise * rng.normal(size=target.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Dataset(
        "clustered queries",
        {
            "queries": {"query": x.astype(np.float32), "cluster": cluster.astype(np.int32)},
            "documents": {"vector": vectors.astype(np.float32)},
        },
    )
