"""What is computed of a column once (profiles, statistics), and what of a pair of columns (five similarities).

Values are compared lower-cased and without a trailing ``.0``; tokens are their runs of ASCII letters and digits.  Every
distinct value and token is hashed to 64 bits once, and a pair costs intersections of sorted arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from data.stream import DataError

RELATIONS = ("infrequent_jaccard", "embedding", "distribution", "jaccard", "containment")
"""The five similarities of a pair, in the order of their columns."""

Vectors = Callable[[str], np.ndarray | None]
"""token -> its vector, or None if it has none."""

CHARACTERS = "".join(c for c in string.printable if c not in "\n\\\v\r\t^") + "\\^"
"""The 96 characters that are counted."""
SPECIAL = '[!@#$%^&*(),.?":{}|<>]'
NUM_FEATURES = 10 * len(CHARACTERS) + 12 + 1 + 10 + 4


def normalise(value: str) -> str:
    """How values are compared: lower case, without a trailing ``.0``."""
    lowered = value.lower()
    return lowered[:-2] if lowered.endswith(".0") else lowered


def tokens_of(value: str) -> list[str]:
    """The runs of ASCII letters and digits of a value."""
    return re.findall("[0-9a-zA-Z]+", value)


def hashes(texts: Sequence[str]) -> np.ndarray:
    """uint64 ``[n]``: the same in every process, unlike ``hash``."""
    digests = b"".join(hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8).digest() for t in texts)
    return np.frombuffer(digests, np.uint64)


# --- token vectors ----------------------------------------------------------------------------------------------------


def hashed_ngrams(dimension: int = 50, low: int = 3, high: int = 5, buckets: int = 4096) -> Vectors:
    """Token vectors without any download: the mean of fixed normal vectors of a token's character n-grams.

    ``<token>`` and its n-grams of ``low`` .. ``high`` characters fall into buckets by hash, as in fastText, whose
    vectors are trained where these are random: near spellings are near, meanings are not.
    """
    table = np.random.default_rng(0).normal(size=(buckets, dimension))

    def vector(token: str) -> np.ndarray:
        marked = f"<{token}>"
        grams = [marked] + [marked[i : i + n] for n in range(low, high + 1) for i in range(len(marked) - n + 1)]
        return table[(hashes(grams) % np.uint64(buckets)).astype(int)].mean(0)

    return vector


def read_vectors(file: str | Path) -> Vectors:
    """Word vectors from a text file in fastText's ``.vec`` layout: ``word number number ...``, perhaps a header line.

    Raises:
      DataError: no such file, a line of another width than the first, or a number that is none; with file and line.
    """
    file, vocabulary, rows, width = Path(file), {}, [], None
    try:
        with file.open(encoding="utf-8") as stream:
            for line, text in enumerate(stream, start=1):
                word, *numbers = text.rstrip("\n").rstrip(" ").split(" ")
                if line == 1 and len(numbers) == 1 and word.isdigit() and numbers[0].isdigit():
                    width = int(numbers[0])
                    continue
                width = len(numbers) if width is None else width
                if len(numbers) != width or not numbers:
                    raise DataError(f"{file}, line {line}: {len(numbers)} numbers, expected {width or 'some'}")
                vocabulary.setdefault(word, len(rows))
                rows.append(np.array(numbers, np.float32))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as word vectors ({error})") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}, line {line}: not a number ({error})") from None
    if not rows:
        raise DataError(f"{file}: holds no word vector; expected lines: word number number ...")
    matrix = np.stack(rows)
    return lambda token: matrix[vocabulary[token]] if token in vocabulary else None


# --- one column -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ColumnProfile:
    """What the similarities need of one column.

    Attributes:
      values: sorted distinct value hashes.
      rare: sorted distinct hashes of each value's least frequent token.
      tokens, counts: sorted distinct token hashes, and how often each occurs in the column.
      embedding: mean vector over the distinct most frequent tokens of the values; None without any.
    """

    values: np.ndarray
    rare: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray
    embedding: np.ndarray | None


def column_profile(cells: Sequence[str | None], vectors: Vectors | None = None) -> ColumnProfile:
    """Profiles a column; nulls are left out.

    Token frequencies count every cell.  Of a value's tokens the least (most) frequent in the column is kept, the first
    if several are.
    """
    vectors = hashed_ngrams() if vectors is None else vectors
    values = [normalise(v) for v in cells if v is not None]
    of_value = {v: tokens_of(v) for v in dict.fromkeys(values)}
    frequency = Counter(t for v in values for t in of_value[v])
    with_tokens = [t for t in of_value.values() if t]
    rare = {min(t, key=lambda x: frequency[x]) for t in with_tokens}
    # sorted: the order of a set of strings differs from process to process
    common = sorted({max(t, key=lambda x: frequency[x]) for t in with_tokens})
    found = [v for v in map(vectors, common) if v is not None]
    names = list(frequency)
    keys = hashes(names)
    order = np.argsort(keys)
    counts = np.array([frequency[n] for n in names], np.int64)
    embedding = np.mean(np.asarray(found, np.float64), 0) if found else None
    return ColumnProfile(
        np.sort(hashes(list(of_value))), np.sort(hashes(list(rare))), keys[order], counts[order], embedding
    )


def column_features(cells: Sequence[str | None], variant: Literal["paper", "official"] = "paper") -> np.ndarray:
    """987 statistics of a column in the manner of Sherlock (Hulsebos et al., 2019), float64.

    In this order: for each of 96 characters ten aggregates (any, all, mean, var, min, max, median, sum, kurtosis,
    skewness) of its counts in the values; entropy of the values in bits; shares of cells that are distinct values, have
    a digit, have a letter; mean and standard deviation of the digits, letters, special characters and words of a value;
    the number of cells; the ten aggregates of the lengths; nulls: any, share, number, all.  Kurtosis (excess) and
    skewness of constants are -3 and 0; a column without values has zeros but for its cells and nulls.

    ``variant="official"`` reproduces the released patterns: a special character counts only if ``]`` follows it, and
    words are separated by blanks and by ``"``.
    """
    values = [v for v in cells if v is not None]
    n, nulls = len(cells), len(cells) - len(values)
    tail = [float(nulls > 0), nulls / max(n, 1), float(nulls), float(n > 0 and nulls == n)]
    if not values:
        return np.array([0.0] * (NUM_FEATURES - 15) + [float(n)] + [0.0] * 10 + tail)
    lengths = np.array([len(v) for v in values])
    points = np.frombuffer("".join(values).encode("utf-32-le", "surrogatepass"), np.uint32)
    places = np.full(128, -1)
    places[[ord(c) for c in CHARACTERS]] = np.arange(len(CHARACTERS))
    place = np.where(points < 128, places[np.minimum(points, 127)], -1)
    owner = np.repeat(np.arange(len(values)), lengths)
    counts = np.zeros((len(values), len(CHARACTERS)))
    np.add.at(counts, (owner[place >= 0], place[place >= 0]), 1)
    of = lambda kind: counts[:, [i for i, c in enumerate(CHARACTERS) if c in kind]].sum(1)  # noqa: E731
    digits, letters = of(string.digits), of(string.ascii_letters)
    if variant == "official":
        followed = re.compile(f"[{re.escape(SPECIAL[:-1])}]]")
        special = np.array([len(followed.findall(v)) for v in values], float)
        words = of(' "') + 1
    else:
        special, words = of(SPECIAL), of(" ") + 1
    share = np.array(list(Counter(values).values())) / len(values)
    moments = [f(x) for x in (digits, letters, special, words) for f in (np.mean, np.std)]
    statistics = [-np.sum(share * np.log2(share)), len(share) / n, np.sum(digits > 0) / n, np.sum(letters > 0) / n]
    parts = [_aggregates(counts).ravel(), statistics, moments, [n], _aggregates(lengths[:, None])[0], tail]
    return np.concatenate([np.asarray(p, np.float64) for p in parts])


def _aggregates(x: np.ndarray) -> np.ndarray:
    """Ten aggregates of each column of ``x [n, c]``: ``[c, 10]``."""
    x = x.astype(np.float64)
    centred = x - x.mean(0)
    second = np.mean(centred**2, 0)
    varies = second > 0
    safe = np.where(varies, second, 1.0)
    kurtosis = np.where(varies, np.mean(centred**4, 0) / safe**2, 0.0) - 3.0
    skewness = np.where(varies, np.mean(centred**3, 0) / safe**1.5, 0.0)
    rows = [(x != 0).any(0), (x != 0).all(0), x.mean(0), second, x.min(0), x.max(0), np.median(x, 0), x.sum(0)]
    return np.stack([*rows, kurtosis, skewness], 1)


def normalised_features(columns: Sequence[Sequence[str | None]], variant: str = "paper") -> np.ndarray:
    """f32 ``[N, 987]``: :func:`column_features` of every column, each feature scaled to length 1 over the columns."""
    features = np.stack([column_features(c, variant) for c in columns])
    return (features / np.maximum(np.linalg.norm(features, axis=0), 1e-12)).astype(np.float32)


# --- pairs of columns -------------------------------------------------------------------------------------------------


def jaccard(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Jaccard similarity of two sorted sets and containment ``|A n B| / min(|A|, |B|)``; 0 if one is empty."""
    if not len(a) or not len(b):
        return 0.0, 0.0
    shared = len(_shared(a, b)[0])
    return shared / (len(a) + len(b) - shared), shared / min(len(a), len(b))


def _shared(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the common entries in two sorted arrays without repetitions: the shorter one is looked up."""
    if len(a) > len(b):
        return _shared(b, a)[::-1]
    at = np.minimum(np.searchsorted(b, a), len(b) - 1)
    here = b[at] == a
    return np.flatnonzero(here), at[here]


def jensen_shannon_similarity(a: ColumnProfile, b: ColumnProfile) -> float:
    """``1 - JS(P, Q)`` of two token distributions, in nats: from ``1 - ln 2`` (disjoint, or one empty) to 1."""
    if not len(a.tokens) or not len(b.tokens):
        return 1.0 - float(np.log(2.0))
    i, j = _shared(a.tokens, b.tokens)
    p, q = a.counts[i] / a.counts.sum(), b.counts[j] / b.counts.sum()
    # tokens of one column alone contribute ln 2 each, by their mass
    alone = np.log(2.0) * (2.0 - p.sum() - q.sum())
    both = np.sum(p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q)))
    return float(1.0 - 0.5 * (alone + both))


def _cosine(a: np.ndarray | None, b: np.ndarray | None) -> float:
    if a is None or b is None:
        return 0.0
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def minhash(values: np.ndarray, count: int = 256) -> np.ndarray:
    """uint64 ``[count]``: the smallest of the values under each of ``count`` random hash functions."""
    draw = np.random.default_rng(1).integers(0, 2**63, (2, count, 1), dtype=np.uint64)
    if not len(values):
        return np.full(count, np.iinfo(np.uint64).max)
    mixed = (values ^ draw[0]) * (draw[1] | np.uint64(1))
    return np.min((mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9), 1)


def pairwise_similarities(
    profiles: Sequence[ColumnProfile],
    pairs: np.ndarray,
    method: Literal["exact", "minhash"] = "exact",
    num_hashes: int = 256,
) -> np.ndarray:
    """f32 ``[P, 5]``: the similarities :data:`RELATIONS` of the listed pairs; symmetric.

    ``"minhash"`` estimates the three set similarities from signatures, in time that does not depend on the columns'
    sizes: Jaccard's standard error is at most ``1 / (2 sqrt(num_hashes))``; containment follows from it and the sizes.

    Raises:
      DataError: vectors of different widths.
    """
    if (widths := {len(p.embedding) for p in profiles if p.embedding is not None}) and len(widths) > 1:
        raise DataError(
            f"token vectors have different widths {sorted(widths)}; use one word-vector file for all columns"
        )
    found = np.zeros((len(pairs), len(RELATIONS)), np.float32)
    signed = [(minhash(p.values, num_hashes), minhash(p.rare, num_hashes)) for p in profiles if method == "minhash"]
    for row, (u, v) in enumerate(pairs.tolist()):
        a, b = profiles[u], profiles[v]
        if method == "minhash":
            whole, inside = _estimated(signed[u][0], signed[v][0], len(a.values), len(b.values))
            rare = _estimated(signed[u][1], signed[v][1], len(a.rare), len(b.rare))[0]
        else:
            (whole, inside), (rare, _) = jaccard(a.values, b.values), jaccard(a.rare, b.rare)
        found[row] = (rare, _cosine(a.embedding, b.embedding), jensen_shannon_similarity(a, b), whole, inside)
    return found


def _estimated(x: np.ndarray, y: np.ndarray, a: int, b: int) -> tuple[float, float]:
    # from signatures x, y of sets of a and b members
    if not a or not b:
        return 0.0, 0.0
    whole = float(np.mean(x == y))
    return whole, min(1.0, whole * (a + b) / (1.0 + whole) / min(a, b))


def blocked_pairs(profiles: Sequence[ColumnProfile], table_of: np.ndarray, limit: int = 64) -> np.ndarray:
    """int32 ``[P, 2]``: the cross-table pairs that share a value or a least frequent token; for large repositories.

    Values and tokens of more than ``limit`` columns tell little and are passed over (reported if that leaves none).
    Pairs that are alike in embedding or distribution only are lost.
    """
    found: set[tuple[int, int]] = set()
    for kind in ("values", "rare"):
        keys = np.concatenate([getattr(p, kind) for p in profiles])
        owners = np.repeat(np.arange(len(profiles)), [len(getattr(p, kind)) for p in profiles])
        order = np.argsort(keys, kind="stable")
        keys, owners = keys[order], owners[order]
        for group in np.split(owners, np.flatnonzero(keys[1:] != keys[:-1]) + 1):
            if 2 <= len(group) <= limit:
                u, v = np.triu_indices(len(group), 1)
                found.update(zip(group[u].tolist(), group[v].tolist(), strict=True))
    kept = sorted(p for p in found if table_of[p[0]] != table_of[p[1]])
    if not kept:
        warnings.warn("no two columns of different tables share a value; there is no candidate pair", stacklevel=2)
    return np.array(kept, np.int32).reshape(-1, 2)
