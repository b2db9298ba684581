"""BM25 on the host: the ranking function against which learned retrievers are measured.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, section 3; the inverse document
frequency is Lucene's, ``log(1 + (N - n + 0.5) / (n + 0.5))``, which is never negative.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from data.stream import DataError

STOP = frozenset(
    [
        *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "from", "had", "has", "have", "in", "into"),
        *("is", "it", "its", "not", "of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they"),
        *("this", "to", "was", "were", "what", "when", "where", "which", "will", "with"),
    ]
)
"""English words too common to rank by."""


def words(text: str, stop: frozenset[str] = STOP, stem: bool = True) -> list[str]:
    """Lower-case runs of letters and digits, without stop words, plurals cut (Harman's S stemmer, 1991)."""
    found = [w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in stop]
    return [s_stem(w) for w in found] if stem else found


def s_stem(word: str) -> str:
    """Plural to singular by three rules, the first that applies: ies -> y, es -> e, s -> nothing."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")) and len(word) > 3:
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")) and len(word) > 3:
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and len(word) > 2:
        return word[:-1]
    return word


class BM25:
    """An inverted index.

    Args:
      documents: texts.
      k1: how slowly repeated words saturate.
      b: how much a document's length counts, in [0, 1].
      stop, stem: see :func:`words`.

    Raises:
      DataError: no documents, or parameters out of range.
    """

    def __init__(
        self, documents: Sequence[str], k1: float = 0.9, b: float = 0.4, stop: frozenset[str] = STOP, stem: bool = True
    ):
        if not len(documents):
            raise DataError("BM25 needs at least one document")
        if not k1 >= 0 or not 0 <= b <= 1:
            raise DataError(f"BM25 needs k1 >= 0 and b in [0, 1]; got k1 {k1}, b {b}")
        self.stop, self.stem, self.size = stop, stem, len(documents)
        bags = [words(d, stop, stem) for d in documents]
        lengths = np.array([len(x) for x in bags], np.float64)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        counts: dict[str, dict[int, int]] = {}
        for n, bag in enumerate(bags):
            for w in bag:
                own = counts.setdefault(w, {})
                own[n] = own.get(n, 0) + 1
        self._postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for w, own in counts.items():
            at = np.fromiter(own, np.int64, len(own))
            tf = np.fromiter(own.values(), np.float64, len(own))
            idf = np.log1p((self.size - len(own) + 0.5) / (len(own) + 0.5))
            self._postings[w] = at, idf * tf * (k1 + 1) / (tf + norm[at])

    def scores(self, query: str) -> np.ndarray:
        """A score for every document, float64 ``[N]``; a word that occurs twice in the query counts twice."""
        out = np.zeros(self.size)
        for w in words(query, self.stop, self.stem):
            if w in self._postings:
                at, weight = self._postings[w]
                out[at] += weight
        return out

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query: scores float32 and ids int32, both ``[q, k]``, ties by the lowest id.

        A document without any of the query's words is not found: score ``-inf``, id -1.

        Raises:
          DataError: k outside ``[1, N]``.
        """
        if not 1 <= k <= self.size:
            raise DataError(f"k must be in [1, {self.size}], the number of documents; got {k}")
        values, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int32)
        for n, query in enumerate(queries):
            scores = self.scores(query)
            best = np.argsort(-scores, kind="stable")[:k]
            best = best[scores[best] > 0]
            values[n, : len(best)], ids[n, : len(best)] = scores[best], best
        return values, ids
