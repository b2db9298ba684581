"""A generated text collection in which words have synonyms, so that matching words is not enough to find documents."""

from __future__ import annotations

import numpy as np

from data.collections import Collection, Judgements
from data.stream import DataError

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def synonym_collection(
    seed: int = 0,
    documents: int = 600,
    train: int = 900,
    test: int = 200,
    topics: int = 30,
    concepts: int = 240,
    synonyms: int = 4,
    document_length: int = 40,
    query_length: int = 5,
    mismatch: float = 0.7,
) -> Collection:
    """Documents about a few concepts of one topic, and short queries that mostly use other words for them.

    A concept has ``synonyms`` words.  A topic prefers ten concepts.  A document is made of concepts of its topic
    (most), of others (some) and of function words (a third of it); of each concept it uses one word throughout.  A
    query names concepts of its one relevant document, each with probability ``mismatch`` by another of its words.

    Args:
      seed: of everything.
      documents, train, test: how many documents, training and test queries.
      topics, concepts, synonyms: of the language.
      document_length, query_length: in words.
      mismatch: how often a query avoids its document's word.

    Returns:
      A collection with splits ``train`` and ``test``; titles are empty, each query has one relevant document.

    Raises:
      DataError: sizes that cannot be generated.
    """
    if min(documents, train, test, topics, query_length) < 1 or synonyms < 2 or concepts < 10 or document_length < 3:
        raise DataError(
            "the generator needs positive sizes, 2 synonyms, 10 concepts and documents of 3 words at least; got "
            f"{documents}, {train}, {test}, {topics}, {query_length}, {synonyms}, {concepts}, {document_length}"
        )
    if not 0 <= mismatch <= 1:
        raise DataError(f"mismatch is a probability, got {mismatch}")
    rng = np.random.default_rng(seed)
    lexicon = invented_words(rng, concepts * synonyms + 40)
    function_words, names = lexicon[:40], np.array(lexicon[40:]).reshape(concepts, synonyms)
    zipf = 1.0 / np.arange(1, 41)
    zipf /= zipf.sum()
    prefers = np.stack([rng.permutation(concepts)[:10] for _ in range(topics)])
    texts, used = [], []
    for _ in range(documents):
        own = rng.permutation(prefers[rng.integers(topics)])[:6]
        own = np.unique(np.concatenate([own, rng.integers(0, concepts, 3)]))
        word = rng.integers(0, synonyms, len(own))
        content = document_length - document_length // 3
        which = np.concatenate([np.arange(len(own)), rng.integers(0, len(own), max(0, content - len(own)))])
        body = [names[own[i], word[i]] for i in which]
        body += rng.choice(function_words, document_length // 3, p=zipf).tolist()
        texts.append(" ".join(rng.permutation(body)))
        used.append((own, word))
    queries, source = [], rng.integers(0, documents, train + test)
    for d in source:
        own, word = used[d]
        asked = rng.permutation(len(own))[:query_length]
        other = (word[asked] + rng.integers(1, synonyms, len(asked))) % synonyms
        chosen = np.where(rng.random(len(asked)) < mismatch, other, word[asked])
        queries.append(" ".join(names[own[asked], chosen]))
    number = np.arange(train + test, dtype=np.int32)
    judged = Judgements(number, source.astype(np.int32), np.ones(train + test, np.float32))
    return Collection(
        "synonyms", [""] * documents, texts, queries, [f"d{i}" for i in range(documents)],
        [f"q{i}" for i in number], judged, {"train": number[:train], "test": number[train:]},
    )  # fmt: skip


def invented_words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of two or three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = rng.integers(2, 4)
        letters = zip(rng.integers(0, len(CONSONANTS), syllables), rng.integers(0, len(VOWELS), syllables), strict=True)
        found["".join(CONSONANTS[c] + VOWELS[v] for c, v in letters)] = None
    return list(found)
