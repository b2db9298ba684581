"""Generated queries over fixed document vectors, for retrievers that train a query encoder only."""

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
