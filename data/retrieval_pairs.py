"""Queries, a gallery and a bank of each: a generator with hubs, and a reader of embeddings or similarity matrices.

On disk a folder holds either embeddings, ``queries.npy`` ``[N_q, d]``, ``gallery.npy`` ``[N_g, d]``, ``query_bank.npy``
``[M_q, d]`` and perhaps ``gallery_bank.npy`` ``[M_g, d]``, or similarities, ``S.npy`` ``[N_q, N_g]``, ``S_bq.npy``
``[M_q, N_g]`` and perhaps ``S_bg.npy`` ``[M_g, N_g]``.  ``caption_item.npy``, integers ``[N_q]``, says which gallery
item each query shows; without it query i shows item i, and there must be as many queries as items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.files import open_npy
from data.stream import DataError

VECTORS = {"queries": "queries.npy", "gallery": "gallery.npy", "query_bank": "query_bank.npy"}
MATRICES = {"queries": "S.npy", "query_bank": "S_bq.npy"}


def hub_pairs(seed: int = 0, pairs: int = 500, bank: int = 1000, dimension: int = 32, shifted: float = 0.0) -> Dataset:
    """Pairs in a joint space with hubs: a common direction h, which some gallery items follow much further than others.

    With latents Z, noise e (both standard normal, as h is) and rows of unit length: ``gallery ~ Z + 0.8 e + 0.8 x h``
    with x exponential, ``queries ~ Z + 0.8 e' + 0.8 h``.  Items with a large x are near all queries.  The banks hold
    ``bank`` more pairs of the same law.

    Args:
      seed: of everything.
      pairs, bank: test pairs and bank pairs.
      dimension: of the space.
      shifted: share of the query bank, from its first row on, that is off-distribution: in place of the hub direction
        it follows another one, twice as far and with latents and noise of its own.

    Returns:
      Splits ``queries``, ``gallery``, ``query_bank`` and ``gallery_bank`` with ``emb`` f32 ``[n, d]``; the first two
      with ``item`` i32 ``[n]``, which agree where they match.
    """
    if pairs < 1 or bank < 1 or dimension < 1 or not 0 <= shifted <= 1:
        raise DataError(
            "the generator needs at least one pair, bank sample and dimension and a shifted share in [0, 1]; "
            f"got {pairs}, {bank}, {dimension}, {shifted}"
        )
    rng = np.random.default_rng(seed)
    hub = rng.normal(size=dimension)

    def draw(count):
        latent = rng.normal(size=(count, dimension))
        noise = 0.8 * rng.normal(size=(2, count, dimension))
        return _unit(latent + noise[0] + 0.8 * hub), _unit(
            latent + noise[1] + 0.8 * rng.exponential(size=(count, 1)) * hub
        )

    (queries, gallery), (query_bank, gallery_bank) = draw(pairs), draw(bank)
    away = round(shifted * bank)
    other = rng.normal(size=dimension)
    query_bank[:away] = _unit(np.sqrt(1.64) * rng.normal(size=(away, dimension)) + 1.6 * other)
    item = np.arange(pairs, dtype=np.int32)
    splits = {
        "queries": {"emb": queries, "item": item},
        "gallery": {"emb": gallery, "item": item},
        "query_bank": {"emb": query_bank},
        "gallery_bank": {"emb": gallery_bank},
    }
    splits = {s: {k: v.astype(np.float32) if k == "emb" else v for k, v in a.items()} for s, a in splits.items()}
    return Dataset("hubs", splits, {"dimension": dimension, "hub": hub.astype(np.float32)})


def retrieval_pairs(folder: str | Path) -> Dataset:
    """Reads a folder of embeddings or of similarity matrices (see the module's docstring).

    Returns:
      Splits as :func:`hub_pairs`, with ``emb``, or, from matrices, with ``sim`` f32 ``[n, N_g]`` in place of it (the
      gallery then has ``item`` alone).  ``gallery_bank`` is there if its file is.

    Raises:
      DataError: a missing file, wrong types or shapes, numbers that are not finite, or as many queries as items without
        an index map; each with its file and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected one with queries.npy and gallery.npy, or S.npy")
    whole = (folder / "S.npy").exists()
    files, field = (MATRICES, "sim") if whole else (VECTORS, "emb")
    last = folder / ("S_bg.npy" if whole else "gallery_bank.npy")
    splits = {split: {field: _matrix(folder / file)} for split, file in files.items()}
    if last.exists():
        splits["gallery_bank"] = {field: _matrix(last)}
    width = splits["queries"][field].shape[1]
    files = {**files, "gallery_bank": last.name}
    for split, arrays in splits.items():
        if arrays[field].shape[1] != width:
            raise DataError(
                f"{folder / files[split]}: {arrays[field].shape[1]} columns, {files['queries']} has {width}; expected "
                + ("scores against one gallery" if whole else "embeddings of one dimension")
            )
    items = width if whole else len(splits["gallery"]["emb"])
    splits.setdefault("gallery", {})["item"] = np.arange(items, dtype=np.int32)
    splits["queries"]["item"] = _items(folder / "caption_item.npy", len(splits["queries"][field]), items)
    return Dataset(str(folder), splits, {} if whole else {"dimension": width})


def _items(file: Path, queries: int, items: int) -> np.ndarray:
    if not file.exists():
        if queries != items:
            raise DataError(
                f"{file}: there is no such file; expected integers [{queries}], the gallery item of each query: "
                f"{queries} queries cannot be matched to {items} items by their order"
            )
        return np.arange(items, dtype=np.int32)
    index = open_npy(file, "a NumPy array")
    if index.dtype.kind not in "iu" or index.shape != (queries,):
        raise DataError(f"{file}: expected integers [{queries}], got {index.dtype} {list(index.shape)}")
    outside = (index < 0) | (index >= items)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise DataError(f"{file}: query {row} shows item {index[row]}; expected 0 .. {items - 1}")
    return np.asarray(index).astype(np.int32)


def _matrix(file: Path) -> np.ndarray:
    x = open_npy(file, "a NumPy array")
    if x.dtype.kind not in "fiu" or x.ndim != 2 or 0 in x.shape:
        raise DataError(f"{file}: expected numbers [n, m], at least one of each, got {x.dtype} {list(x.shape)}")
    x = np.asarray(x, np.float32)
    bad = ~np.isfinite(x)
    if bad.any():
        raise DataError(
            f"{file}: {int(bad.sum())} values are not finite, the first in row {np.argwhere(bad)[0][0]}; expected"
            " numbers"
        )
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
