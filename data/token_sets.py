"""Sets of token embeddings: readers of what is on disk, and a generator with topics.

On disk a collection is a folder with ``emb.npy``: either ragged, ``[sum n, d]`` beside ``offsets.npy`` ``[N + 1]``
(set i is rows ``offsets[i] .. offsets[i + 1] - 1``), or padded, ``[N, n, d]`` beside ``lengths.npy`` ``[N]``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.files import open_npy
from data.stream import DataError


def topic_token_sets(
    seed: int = 0,
    topics: int = 40,
    dimension: int = 32,
    documents: int = 400,
    document_tokens: int = 24,
    queries: int = 60,
    query_tokens: int = 8,
    noise: float = 0.15,
) -> Dataset:
    """Documents whose tokens scatter around 3 topics each, and queries made of noisy tokens of one document.

    Topics are standard normal; a token is one of its document's 3 topics plus standard normal noise, normalised; a
    query is some tokens of one document, each plus ``noise`` times a standard normal, normalised.

    Returns:
      Splits ``documents`` (``tokens`` f32 ``[N, n, d]``, ``mask`` bool ``[N, n]``), ``queries`` (the same) and
      ``qrels`` (``query``, ``document``: the document each query was made of).
    """
    if not 1 <= query_tokens <= document_tokens or topics < 3 or queries > documents:
        raise DataError(
            "the generator needs at least 3 topics, no more queries than documents and no more query_tokens than "
            f"document_tokens; got {topics}, {queries}, {documents}, {query_tokens}, {document_tokens}"
        )
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(topics, dimension))
    own = np.argsort(rng.random((documents, topics)), 1)[:, :3]
    which = np.take_along_axis(own, rng.integers(0, 3, (documents, document_tokens)), 1)
    tokens = _unit(centres[which] + rng.normal(size=(documents, document_tokens, dimension)))
    source = rng.permutation(documents)[:queries]
    asked = sample_queries(tokens, np.full(documents, document_tokens), source, query_tokens, noise, rng)
    return _dataset("topics", (tokens, None), (asked, None), source)


def sample_queries(
    tokens: np.ndarray, lengths: np.ndarray, source: np.ndarray, count: int, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Queries ``[Q, count, d]``: noisy tokens of the documents in ``source`` (repeated if too few), normalised."""
    rows = []
    for document in source:
        length = int(lengths[document])
        rows.append(tokens[document][rng.choice(length, count, replace=length < count)])
    rows = np.stack(rows)
    return _unit(rows + noise * rng.normal(size=rows.shape))


def read_token_sets(folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one collection, ragged or padded, into padded arrays.

    Returns:
      ``tokens`` f32 ``[N, n, d]``, 0 where padded, and ``lengths`` int32 ``[N]``.

    Raises:
      DataError: a missing file, wrong shapes or types, offsets that are not monotone or do not end at the last row,
        empty sets, or tokens that are not finite; each with its file and place.
    """
    folder = Path(folder)
    file = folder / "emb.npy"
    emb = open_npy(file, "token embeddings: [sum n, d] with offsets.npy, or [N, n, d] with lengths.npy")
    if emb.dtype.kind != "f" or emb.ndim not in (2, 3) or emb.shape[-1] == 0:
        raise DataError(f"{file}: expected floats [sum n, d] or [N, n, d], got {emb.dtype} {list(emb.shape)}")
    tokens, lengths = _ragged(folder, emb) if emb.ndim == 2 else _padded(folder, emb)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    bad = inside & ~np.isfinite(tokens).all(-1)
    if bad.any():
        at = np.argwhere(bad)[0]
        raise DataError(f"{file}: token {at[1]} of set {at[0]} is not finite ({int(bad.sum())} such); expected numbers")
    return np.where(inside[..., None], tokens, 0).astype(np.float32), lengths.astype(np.int32)


def token_set_dataset(folder: str | Path, seed: int = 0, queries: int = 60, query_tokens: int = 8) -> Dataset:
    """A collection on disk as a data set like :func:`topic_token_sets`.

    ``folder/documents`` and ``folder/queries`` hold a collection each (see :func:`read_token_sets`), and perhaps
    ``folder/qrels.npy``, integers ``[M, 2]`` of relevant (query, document) pairs.  A folder that is itself a collection
    gives documents; its queries are noisy tokens of some of them.

    Raises:
      DataError: as :func:`read_token_sets`, and when documents and queries differ in dimension or qrels do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; expected one with emb.npy, or with documents/ and queries/"
        )
    alone = (folder / "emb.npy").exists()
    tokens, lengths = read_token_sets(folder if alone else folder / "documents")
    if alone or not (folder / "queries").exists():
        rng = np.random.default_rng(seed)
        source = rng.permutation(len(tokens))[:queries]
        # noise as loud against a token as the generator's: 0.15 a coordinate of a unit vector in 32 dimensions
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        scale = float(np.sqrt(np.mean(np.square(tokens[inside], dtype=np.float64))))
        asked = sample_queries(tokens, lengths, source, query_tokens, 0.15 * np.sqrt(32) * scale, rng)
        return _dataset(str(folder), (tokens, lengths), (asked.astype(np.float32), None), source)
    asked, counts = read_token_sets(folder / "queries")
    if asked.shape[-1] != tokens.shape[-1]:
        raise DataError(
            f"{folder / 'queries' / 'emb.npy'}: tokens have {asked.shape[-1]} dimensions, "
            f"those of {folder / 'documents' / 'emb.npy'} {tokens.shape[-1]}; expected one encoder's"
        )
    data = _dataset(str(folder), (tokens, lengths), (asked, counts), None)
    return _with_qrels(data, folder / "qrels.npy") if (folder / "qrels.npy").exists() else data


def _with_qrels(data: Dataset, file: Path) -> Dataset:
    pairs = open_npy(file, "integers [M, 2]: relevant (query, document) pairs")
    if pairs.dtype.kind not in "iu" or pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise DataError(f"{file}: expected integers [M, 2], got {pairs.dtype} {list(pairs.shape)}")
    for column, split in enumerate(("queries", "documents")):
        count = len(data[split]["tokens"])
        outside = (pairs[:, column] < 0) | (pairs[:, column] >= count)
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise DataError(f"{file}: row {row} names {split} {pairs[row, column]}; expected 0 .. {count - 1}")
    qrels = {"query": pairs[:, 0].astype(np.int32), "document": pairs[:, 1].astype(np.int32)}
    return Dataset(data.name, {**data.splits, "qrels": qrels}, data.info)


def _dataset(name: str, documents, queries, source: np.ndarray | None) -> Dataset:
    splits = {}
    for split, (tokens, lengths) in (("documents", documents), ("queries", queries)):
        count, width = tokens.shape[:2]
        lengths = np.full(count, width) if lengths is None else lengths
        splits[split] = {"tokens": tokens.astype(np.float32), "mask": np.arange(width) < lengths[:, None]}
    if source is not None:
        splits["qrels"] = {"query": np.arange(len(source), dtype=np.int32), "document": source.astype(np.int32)}
    return Dataset(name, splits, {"dimension": int(documents[0].shape[-1])})


def _ragged(folder: Path, emb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    file = folder / "offsets.npy"
    offsets = open_npy(file, "integers [N + 1], from 0 to the rows of emb.npy")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(f"{file}: expected integers [N + 1], N at least 1, got {offsets.dtype} {list(offsets.shape)}")
    offsets = np.asarray(offsets).astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(emb):
        raise DataError(
            f"{file}: offsets run from {offsets[0]} to {offsets[-1]}; expected 0 to {len(emb)}, the rows of emb.npy"
        )
    lengths = np.diff(offsets)
    if (lengths < 0).any():
        at = int(np.flatnonzero(lengths < 0)[0])
        raise DataError(
            f"{file}: offsets are not monotone: entry {at + 1} is {offsets[at + 1]} after {offsets[at]}; expected more"
        )
    _no_empty(file, lengths)
    tokens = np.zeros((len(lengths), int(lengths.max()), emb.shape[1]), np.float32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = emb
    return tokens, lengths


def _padded(folder: Path, emb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    file = folder / "lengths.npy"
    lengths = open_npy(file, "integers [N], the real tokens of each set in emb.npy")
    if lengths.dtype.kind not in "iu" or lengths.shape != emb.shape[:1] or not len(lengths):
        raise DataError(f"{file}: expected integers [{len(emb)}], got {lengths.dtype} {list(lengths.shape)}")
    lengths = np.asarray(lengths).astype(np.int64)
    outside = (lengths < 0) | (lengths > emb.shape[1])
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"{file}: set {at} has length {lengths[at]}; expected 1 .. {emb.shape[1]}, the width of emb.npy"
        )
    _no_empty(file, lengths)
    return np.asarray(emb), lengths


def _no_empty(file: Path, lengths: np.ndarray) -> None:
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(f"{file}: set {empty[0]} is empty ({len(empty)} such); expected at least one token in each")


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
