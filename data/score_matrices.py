"""Matrices of scores ``[queries, items]``: a generator with a decaying spectrum, token pairs, and a reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.stream import DataError

PAD, CLS, SEP, START, END, TITLE = range(6)
"""Special ids of generated pairs; ordinary words follow."""


def low_rank_scores(
    seed: int = 0, queries: int = 300, items: int = 3000, rank: int = 30, decay: float = 8.0, noise: float = 0.02,
    bend: float = 0.1,
) -> Dataset:  # fmt: skip
    """Scores of nearly low rank: ``M = A B^T + noise E``, then ``M + bend tanh(M)`` (anncur brief, stand-in).

    A is normal ``[queries, rank]`` times ``exp(-j / decay)``; B is normal ``[items, rank]``.

    Returns:
      Split ``queries`` with ``scores`` f32 ``[queries, items]``.

    Raises:
      DataError: sizes below 1 or a decay that is not positive.
    """
    if min(queries, items, rank) < 1 or not decay > 0:
        raise DataError(f"sizes and decay must be positive; got {queries}, {items}, {rank} and {decay}")
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(queries, rank)) * np.exp(-np.arange(rank) / decay)
    m = a @ rng.normal(size=(items, rank)).T + noise * rng.normal(size=(queries, items))
    return Dataset("stand-in", {"queries": {"scores": (m + bend * np.tanh(m)).astype(np.float32)}})


def matching_pairs(
    seed: int = 0, items: int = 500, train: int = 400, test: int = 60, values: int = 8, noise_words: int = 30
) -> Dataset:
    """Queries and items as token ids, to train a small cross-encoder on.

    An item has three attributes of ``values`` values, no two items the same three; two of its words stand in its title
    and one, with three words of noise, in its text.  A query asks for one item by other words for the same three
    attributes: two between the tags of the mention and one in its context, with three words of noise.

    Returns:
      Splits ``items`` (``tokens`` int32 ``[N, 8]``: title, TITLE, text, SEP), ``train`` and ``test`` (``tokens`` int32
      ``[Q, 10]``: CLS, context, START, mention, END, context, SEP; ``positive`` int32 ``[Q]``).  ``info`` has
      ``vocab_size`` and ``tags`` (start, end, title).

    Raises:
      DataError: more items than combinations of values.
    """
    if not 1 <= items <= values**3:
        raise DataError(f"{values} values of three attributes make {values**3} items; asked for {items}")
    rng = np.random.default_rng(seed)
    first = TITLE + 1
    own = rng.permutation(values**3)[:items]
    attributes = np.stack([own // values**2, own // values % values, own % values], 1)
    word = lambda side, which, value: first + (3 * side + which) * values + value  # noqa: E731
    noise = lambda n, count: first + 6 * values + rng.integers(0, noise_words, (n, count))  # noqa: E731
    full = lambda n, tag: np.full((n, 1), tag)  # noqa: E731
    sides = lambda side, rows: [word(side, i, rows[:, i : i + 1]) for i in range(3)]  # noqa: E731
    a, b, c = sides(0, attributes)
    tokens = np.concatenate([a, b, full(items, TITLE), c, noise(items, 3), full(items, SEP)], 1).astype(np.int32)

    def ask(n):
        positive = rng.integers(0, items, n)
        a, b, c = sides(1, attributes[positive])
        parts = [full(n, CLS), noise(n, 2), full(n, START), a, b, full(n, END), c, noise(n, 1), full(n, SEP)]
        return {"tokens": np.concatenate(parts, 1).astype(np.int32), "positive": positive.astype(np.int32)}

    info = {"vocab_size": first + 6 * values + noise_words, "tags": (START, END, TITLE)}
    return Dataset("pairs", {"items": {"tokens": tokens}, "train": ask(train), "test": ask(test)}, info)


def read_score_matrix(file: str | Path, items: str | Path | None = None) -> tuple[np.ndarray, list[str]]:
    """A matrix of scores ``.npy [queries, items]``, mapped from disk, and the items' names.

    Args:
      file: float16, float32 or float64, no NaN.
      items: a text file with a line for each item; without it items are named by their number.

    Raises:
      DataError: it cannot be read, has another shape or type, holds a NaN or infinity, or the numbers of items differ.
    """
    file = Path(file)
    try:
        matrix = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as .npy ({str(error).splitlines()[0]})") from None
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        found = f"{matrix.dtype} {list(matrix.shape)}" if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise DataError(f"{file}: expected scores as floats [queries, items], got {found}")
    if min(matrix.shape) < 1:
        raise DataError(f"{file}: expected scores [queries, items], got an empty matrix {list(matrix.shape)}")
    for start in range(0, len(matrix), 256):
        bad = np.argwhere(~np.isfinite(matrix[start : start + 256]))
        if len(bad):
            raise DataError(f"{file}: score of query {start + bad[0][0]} and item {bad[0][1]} is not finite")
    if not items:
        return matrix, [str(i) for i in range(matrix.shape[1])]
    try:
        names = Path(items).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{items}: cannot be read as UTF-8 text ({error})") from None
    if len(names) != matrix.shape[1]:
        raise DataError(f"{file}: has {matrix.shape[1]} items, but {items} lists {len(names)}")
    return matrix, names
