"""Retrieved candidates with cosines and relevance labels: generators, real digits, and a reader of files.

Every split holds ``query`` f32 ``[N, d]``, ``cos`` f32 ``[N, K]`` (in any order), ``label`` f32 ``[N, K]`` in [0, 1]
and ``real`` bool ``[N, K]``; a place that no candidate fills has cosine -1, label 0 and ``real`` false.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.files import open_npy
from data.stream import DataError


def calibrated_queries(
    seed: int = 0, train: int = 1000, valid: int = 500, test: int = 500, dimension: int = 32, candidates: int = 30
) -> Dataset:
    """Queries whose own direction decides how their cosines are to be read.

    Unit queries q; with two standard normal directions u and v, slope ``1 + 0.8 tanh(1.5 <q, u>)`` and crossing
    ``c = 0.5 + 0.25 tanh(1.5 <q, v>)`` (1.5 gives raw cosines the brief's PR AUC, about 0.79); cosines
    ``x ~ Beta(5, 4)`` and labels ``y ~ Bernoulli(sigmoid(20 slope (x - c)))``.
    """
    if min(train, valid, test, dimension, candidates) < 1:
        raise DataError("the generator needs at least one query in each split, one dimension and one candidate")
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(dimension, 2))
    count = train + valid + test
    query = _unit(rng.normal(size=(count, dimension)))
    bend = np.tanh(1.5 * query @ directions)
    slope, crossing = 1 + 0.8 * bend[:, :1], 0.5 + 0.25 * bend[:, 1:]
    cos = rng.beta(5, 4, (count, candidates))
    label = rng.random(cos.shape) < 1 / (1 + np.exp(-20 * slope * (cos - crossing)))
    arrays = _arrays(query, cos, label, np.ones(cos.shape, bool))
    info = {"slope": slope.astype(np.float32), "crossing": crossing.astype(np.float32)}
    return _split("calibration", arrays, (train, valid), None, info)


def digit_candidates(seed: int = 0, candidates: int = 100) -> Dataset:
    """scikit-learn's 8 x 8 digits: 1000 images to be searched, the others as queries, relevant if of the same class.

    Vectors are the pixels, scaled to unit length.  Some digits look much like their own class and others do not, so
    that one cosine means different things to different queries.
    """
    from sklearn.datasets import load_digits

    if not 1 <= candidates <= 1000:
        raise DataError(f"there are 1000 images to retrieve; candidates must be in [1, 1000], got {candidates}")
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = _unit(x[order]), y[order]
    cos = x[1000:] @ x[:1000].T
    ids = np.argsort(-cos, 1, kind="stable")[:, :candidates]
    cos = np.take_along_axis(cos, ids, 1)
    label = y[ids] == y[1000:, None]
    return _split("digits", _arrays(x[1000:], cos, label, np.ones(cos.shape, bool)), (450, 120), None, {})


def scored_candidates(folder: str | Path, seed: int = 0) -> Dataset:
    """Reads ``query_emb.npy`` ``[N, d]``, ``cand_ids.npy``, ``cand_cos.npy`` and ``labels.npy`` ``[N, K]``.

    An id of -1 is an empty place.  In place of labels ``qrels.npy``, integers ``[M, 2]``, may list relevant (query row,
    candidate id) pairs: all other candidates then count as irrelevant, which makes precision a lower bound.  A folder
    with ``train/`` and ``test/`` (and perhaps ``valid/``) holds one such set in each; else queries are split
    70 : 10 : 20 in an order drawn from the seed.

    Raises:
      DataError: a missing file, wrong types or shapes, numbers that are not finite, labels outside [0, 1], or a query
        without any candidate; each with its file, place and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; expected one with query_emb.npy, cand_cos.npy and labels.npy"
        )
    if (folder / "train").is_dir():
        found = {s: _read(folder / s) for s in ("train", "valid", "test") if s != "valid" or (folder / s).is_dir()}
        if "valid" not in found:
            count = len(found["train"]["query"])
            parts = _split("", found["train"], (count - max(1, count // 8), 0), seed, {}).splits
            found["train"], found["valid"] = parts["train"], parts["test"]
        for name, arrays in found.items():
            if arrays["query"].shape[1] != found["train"]["query"].shape[1]:
                raise DataError(
                    f"{folder / name / 'query_emb.npy'}: {arrays['query'].shape[1]} dimensions, those of train/ "
                    f"{found['train']['query'].shape[1]}; expected one encoder's"
                )
        return Dataset(str(folder), found, {"dimension": found["train"]["query"].shape[1]})
    arrays = _read(folder)
    count = len(arrays["query"])
    if count < 10:
        raise DataError(f"{folder / 'query_emb.npy'}: {count} queries; expected at least 10, to split them in three")
    return _split(str(folder), arrays, (round(0.7 * count), round(0.1 * count)), seed, {})


def _read(folder: Path) -> dict[str, np.ndarray]:
    file = folder / "query_emb.npy"
    query = open_npy(file, "floats [N, d]")
    if query.dtype.kind != "f" or query.ndim != 2 or 0 in query.shape:
        raise DataError(f"{file}: expected floats [N, d], got {query.dtype} {list(query.shape)}")
    count = len(query)
    _finite(file, query, np.ones(query.shape, bool))
    ids, cos = (open_npy(folder / f, f"[{count}, K]") for f in ("cand_ids.npy", "cand_cos.npy"))
    if cos.dtype.kind != "f" or cos.ndim != 2 or len(cos) != count or cos.shape[1] == 0:
        raise DataError(f"{folder / 'cand_cos.npy'}: expected floats [{count}, K], got {cos.dtype} {list(cos.shape)}")
    if ids.dtype.kind not in "iu" or ids.shape != cos.shape:
        raise DataError(
            f"{folder / 'cand_ids.npy'}: expected integers {list(cos.shape)}, got {ids.dtype} {list(ids.shape)}"
        )
    real = np.asarray(ids).astype(np.int64) >= 0
    if not real.any(1).all():
        row = int(np.flatnonzero(~real.any(1))[0])
        raise DataError(
            f"{folder / 'cand_ids.npy'}: query {row} has no candidate; expected at least one id of 0 or more"
        )
    _finite(folder / "cand_cos.npy", cos, real)
    return _arrays(query, cos, _labels(folder, ids, real), real)


def _labels(folder: Path, ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    file = folder / "labels.npy"
    if not file.exists() and (folder / "qrels.npy").exists():
        pairs = open_npy(folder / "qrels.npy", "integers [M, 2]")
        if pairs.dtype.kind not in "iu" or pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise DataError(f"{folder / 'qrels.npy'}: expected integers [M, 2], got {pairs.dtype} {list(pairs.shape)}")
        outside = (pairs[:, 0] < 0) | (pairs[:, 0] >= len(ids))
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{folder / 'qrels.npy'}: row {row} names query {pairs[row, 0]}; expected 0 .. {len(ids) - 1}"
            )
        label = np.zeros(ids.shape, bool)
        for query in np.unique(pairs[:, 0]):
            label[query] = np.isin(ids[query], pairs[pairs[:, 0] == query, 1])
        return label & real
    label = open_npy(file, f"numbers in [0, 1], {list(ids.shape)} (or qrels.npy)")
    if label.dtype.kind not in "biuf" or label.shape != ids.shape:
        raise DataError(f"{file}: expected numbers {list(ids.shape)}, got {label.dtype} {list(label.shape)}")
    value = np.asarray(label, np.float64)
    bad = real & ~((value >= 0) & (value <= 1))
    if bad.any():
        at = np.argwhere(bad)[0]
        raise DataError(f"{file}: query {at[0]}, candidate {at[1]} has label {value[tuple(at)]:g}; expected [0, 1]")
    return value


def _arrays(query: np.ndarray, cos: np.ndarray, label: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "query": np.asarray(query, np.float32),
        "cos": np.where(real, cos, -1.0).astype(np.float32),
        "label": np.where(real, label, 0).astype(np.float32),
        "real": real,
    }


def _split(name: str, arrays: dict, sizes: tuple[int, int], seed: int | None, info: dict) -> Dataset:
    count = len(arrays["query"])
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    bounds = np.cumsum(sizes)
    parts = dict(zip(("train", "valid", "test"), np.split(order, bounds), strict=True))
    splits = {s: {k: v[rows] for k, v in arrays.items()} for s, rows in parts.items() if len(rows)}
    return Dataset(name, splits, {"dimension": arrays["query"].shape[1], **info})


def _finite(file: Path, x: np.ndarray, real: np.ndarray) -> None:
    bad = real & ~np.isfinite(x)
    if bad.any():
        at = np.argwhere(bad)[0]
        raise DataError(f"{file}: row {at[0]}, column {at[1]} is not finite ({int(bad.sum())} such); expected numbers")


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
