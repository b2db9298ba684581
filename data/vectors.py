"""Vectors for search: readers of what is on disk, and a generator whose queries have another distribution.

``.npy`` holds ``[n, D]``.  ``.fvecs``, ``.ivecs`` and ``.bvecs`` (float32, int32, uint8) hold rows one after the other,
each led by its dimension as a little-endian int32; ground truth is ``.ivecs``, row i the ids of query i's neighbours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.stream import DataError

KINDS = {".fvecs": np.dtype("<f4"), ".ivecs": np.dtype("<i4"), ".bvecs": np.dtype("u1")}
"""Type of an entry, by suffix."""


def shifted_queries(
    seed: int = 0,
    vectors: int = 2000,
    queries: int = 500,
    dimension: int = 64,
    decay: float = 10.0,
    first: tuple[int, int] = (8, 24),
    shifted: bool = True,
) -> Dataset:
    """A database with a decaying spectrum, and queries that vary most where it does not (LeanVec's stand-in).

    With U a random orthonormal basis, database vectors are ``(N(0, I) * exp(-j / decay)) U^T``.  Queries have the same
    spectrum, but its leading directions are columns ``first[0] .. first[1] - 1`` of U; unless ``shifted``, they come
    from the database's own law.

    Returns:
      Splits ``base``, ``learn`` (queries to learn from) and ``queries`` (to measure with; drawn apart from the former),
      each ``x`` f32 ``[., dimension]``.

    Raises:
      DataError: sizes that make no sense.
    """
    if min(vectors, queries, dimension) < 1 or not decay > 0:
        raise DataError(
            f"the generator needs vectors, queries, dimension and decay above 0; got {vectors}, {queries}, "
            f"{dimension}, {decay}"
        )
    if not 0 <= first[0] <= first[1] <= dimension:
        raise DataError(f"the generator's first directions {first} must lie in [0, {dimension}], in order")
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    spectrum = np.exp(-np.arange(dimension) / decay)
    order = np.arange(dimension)
    if shifted:
        leading = np.arange(*first)
        order = np.concatenate([leading, np.setdiff1d(order, leading)])
    sample = lambda n, axes: ((rng.standard_normal((n, dimension), np.float32) * spectrum) @ axes.T).astype(np.float32)  # noqa: E731
    base = sample(vectors, basis)
    learn, asked = sample(queries, basis[:, order]), sample(queries, basis[:, order])
    name = "shifted" if shifted else "matched"
    return Dataset(
        name, {"base": {"x": base}, "learn": {"x": learn}, "queries": {"x": asked}}, {"dimension": dimension}
    )


def read_vectors(file: str | Path, finite: bool = True) -> np.ndarray:
    """One file of vectors, ``[n, D]``, in the type it holds.

    Args:
      file: ``.npy``, ``.fvecs``, ``.ivecs`` or ``.bvecs``.
      finite: refuse rows with NaN or infinite entries.

    Raises:
      DataError: no such file, an unknown suffix, an empty or truncated file, rows of different dimensions, a wrong
        shape or type, or a row that is not finite; with the file and the row.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected vectors in .npy, .fvecs, .ivecs or .bvecs")
    if file.suffix == ".npy":
        found = _read_npy(file)
    elif file.suffix in KINDS:
        found = _read_vecs(file, KINDS[file.suffix])
    else:
        raise DataError(f"{file}: unknown suffix {file.suffix!r}; expected .npy, .fvecs, .ivecs or .bvecs")
    if finite and found.dtype.kind == "f":
        for start in range(0, len(found), 65536):
            bad = np.flatnonzero(~np.isfinite(found[start : start + 65536]).all(1))
            if len(bad):
                raise DataError(f"{file}: row {start + bad[0]} is not finite; expected numbers")
    return found


def _read_npy(file: Path) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a NumPy array file ({str(error).splitlines()[0]}); expected [n, D]") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
        raise DataError(f"{file}: expected numbers [n, D], got {shape}")
    if 0 in found.shape:
        raise DataError(f"{file}: holds no vectors {list(found.shape)}; expected at least one row and one dimension")
    return found


def _read_vecs(file: Path, kind: np.dtype) -> np.ndarray:
    raw = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
    if len(raw) < 4:
        raise DataError(f"{file}: holds no vectors ({len(raw)} bytes); expected rows led by their dimension")
    dimension = int(raw[:4].view("<i4")[0])
    if dimension < 1:
        raise DataError(f"{file}: row 0 has dimension {dimension}; expected at least 1")
    size = 4 + dimension * kind.itemsize
    whole = len(raw) // size
    headers = raw[: whole * size].reshape(whole, size)[:, :4].copy().view("<i4")[:, 0]
    other = np.flatnonzero(headers != dimension)
    if len(other):
        raise DataError(
            f"{file}: row {other[0]} has dimension {headers[other[0]]}; expected {dimension}, that of row 0"
        )
    if len(raw) % size:
        raise DataError(
            f"{file}: truncated: row {whole} has {len(raw) % size} of {size} bytes (dimension {dimension} {kind.name})"
        )
    return np.ascontiguousarray(raw.reshape(whole, size)[:, 4:]).view(kind)


def write_vectors(file: str | Path, rows: np.ndarray) -> None:
    """Writes ``[n, D]`` as ``.npy``, ``.fvecs``, ``.ivecs`` or ``.bvecs``, by the suffix.

    Raises:
      DataError: an unknown suffix, another shape, or entries that the type of the file cannot hold.
    """
    file, rows = Path(file), np.asarray(rows)
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"{file}: expected vectors [n, D] to write, got {list(rows.shape)}")
    if file.suffix == ".npy":
        np.save(file, rows)
        return
    if file.suffix not in KINDS:
        raise DataError(f"{file}: unknown suffix {file.suffix!r}; expected .npy, .fvecs, .ivecs or .bvecs")
    kind = KINDS[file.suffix]
    kept = rows.astype(kind)
    if kind.kind != "f" and not np.array_equal(kept, rows):
        raise DataError(f"{file}: entries do not fit {kind.name}; write .fvecs or .npy")
    header = np.full((len(rows), 1), rows.shape[1], "<i4").view(np.uint8)
    np.concatenate([header, np.ascontiguousarray(kept).view(np.uint8)], 1).tofile(file)


def vector_dataset(folder: str | Path) -> Dataset:
    """Vectors on disk as a data set like :func:`shifted_queries`.

    ``folder`` holds ``base``, ``queries`` and, for maps that learn from queries, ``queries_learn``, each as ``.npy``,
    ``.fvecs`` or ``.bvecs``; perhaps ``groundtruth.ivecs`` (or ``.npy``), each query's true neighbours, nearest first.

    Returns:
      Splits ``base``, ``queries`` and, where there is one, ``learn``, each ``x`` f32 ``[., D]``; and ``groundtruth``
      (``ids`` int32 ``[queries, m]``).

    Raises:
      DataError: as :func:`read_vectors`; or a missing part, two files for one, dimensions that differ, a query that is
        both in ``queries_learn`` and in ``queries``, or ground truth that does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected one with base and queries (.npy or .fvecs)")
    vectors = (".npy", ".fvecs", ".bvecs")
    files = {"base": _one(folder, "base", vectors), "queries": _one(folder, "queries", vectors)}
    learn = _one(folder, "queries_learn", vectors, optional=True)
    truth = _one(folder, "groundtruth", (".ivecs", ".npy"), optional=True)
    files |= {} if learn is None else {"learn": learn}
    splits = {name: {"x": np.asarray(read_vectors(file), np.float32)} for name, file in files.items()}
    dimension = splits["base"]["x"].shape[1]
    for name, file in files.items():
        if splits[name]["x"].shape[1] != dimension:
            raise DataError(
                f"{file}: queries have D={splits[name]['x'].shape[1]}, database D={dimension} ({files['base']})"
            )
    if learn is not None:
        known = {row.tobytes() for row in splits["learn"]["x"]}
        both = [i for i, row in enumerate(splits["queries"]["x"]) if row.tobytes() in known]
        if both:
            raise DataError(
                f"{files['queries']}: row {both[0]} is also in {learn} ({len(both)} such); expected queries that "
                "nothing was learned from"
            )
    if truth is not None:
        splits["groundtruth"] = {"ids": _groundtruth(truth, len(splits["queries"]["x"]), len(splits["base"]["x"]))}
    return Dataset(str(folder), splits, {"dimension": dimension})


def _one(folder: Path, stem: str, suffixes: tuple[str, ...], optional: bool = False) -> Path | None:
    found = [folder / f"{stem}{s}" for s in suffixes if (folder / f"{stem}{s}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: both {found[0].name} and {found[1].name}; expected one {stem}")
    if not found and not optional:
        raise DataError(f"{folder}: no {stem}; expected {' or '.join(stem + s for s in suffixes)}")
    return found[0] if found else None


def _groundtruth(file: Path, queries: int, base: int) -> np.ndarray:
    ids = read_vectors(file)
    if ids.dtype.kind not in "iu" or len(ids) != queries:
        raise DataError(
            f"{file}: expected integers [{queries}, m], a row for each query; got {ids.dtype} {list(ids.shape)}"
        )
    outside = np.argwhere((ids < 0) | (ids >= base))
    if len(outside):
        row, column = outside[0]
        raise DataError(f"{file}: row {row} names vector {ids[row, column]}; expected 0 .. {base - 1}")
    return ids.astype(np.int32)
