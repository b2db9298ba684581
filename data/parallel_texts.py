"""Labelled texts, perhaps in several languages at once: generated translations, and a reader of a csv of your own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.stream import DataError, arrays_fingerprint
from data.synonym_text import invented_words
from data.tables import read_table, split_rows


@dataclasses.dataclass(frozen=True)
class ParallelTexts:
    """Documents in one language or more, the same ones in each.

    Attributes:
      texts: by language, ``N`` texts; row i is the same document in all.
      labels: i32 ``[N]``, numbers of classes.
      classes: their names.
      train: bool ``[N]``, documents to train on.
      source: for messages.
    """

    texts: Mapping[str, tuple[str, ...]]
    labels: np.ndarray
    classes: tuple[str, ...]
    train: np.ndarray
    source: str = "texts"

    @property
    def fingerprint(self) -> str:
        """Checksum of everything."""
        named = {f"text/{k}": np.array(v, dtype=object) for k, v in self.texts.items()}
        return arrays_fingerprint({**named, "labels": self.labels, "train": self.train})


def translated_documents(
    seed: int = 0,
    documents: int = 900,
    topics: int = 6,
    concepts: int = 120,
    synonyms: int = 3,
    length: int = 14,
    focus: float = 0.5,
    languages: tuple[str, ...] = ("north", "south"),
    test_share: float = 0.3,
) -> ParallelTexts:
    """Documents about topics, translated word by word into languages that share no word.

    A concept has ``synonyms`` words in every language, and word s of one is translated by word s of the other.  A topic
    prefers ``concepts // topics`` concepts of its own.  Each word of a document names a concept of its topic with
    probability ``focus``, any concept otherwise, by a synonym drawn anew.

    Args:
      seed: of everything.
      documents, topics, concepts, synonyms: how many.
      length: words of a document.
      focus: see above.
      languages: their names.
      test_share: share of documents held out.

    Raises:
      DataError: sizes that cannot be generated.
    """
    if min(documents, synonyms, length, len(languages)) < 1 or topics < 2 or concepts < topics or documents < topics:
        raise DataError(
            "need two topics, as many concepts and documents, and positive sizes; got "
            f"{topics}, {concepts}, {documents}, {synonyms}, {length} and {len(languages)} languages"
        )
    if not 0 <= focus <= 1 or not 0 < test_share < 1:
        raise DataError(f"focus must be in [0, 1] and test_share in (0, 1); got {focus} and {test_share}")
    rng = np.random.default_rng(seed)
    lexicon = np.array(invented_words(rng, len(languages) * concepts * synonyms))
    lexicon = lexicon.reshape(len(languages), concepts, synonyms)
    label = rng.permutation(np.arange(documents) % topics).astype(np.int32)
    share = concepts // topics
    own = label[:, None] * share + rng.integers(share, size=(documents, length))
    concept = np.where(rng.random((documents, length)) < focus, own, rng.integers(concepts, size=(documents, length)))
    word = rng.integers(synonyms, size=(documents, length))
    texts = {name: tuple(map(" ".join, lexicon[i, concept, word])) for i, name in enumerate(languages)}
    held = rng.permutation(documents)[: max(1, round(documents * test_share))]
    names = tuple(f"topic {t}" for t in range(topics))
    return ParallelTexts(texts, label, names, ~np.isin(np.arange(documents), held), "translations")


def read_labelled_texts(path: str | Path) -> ParallelTexts:
    """A csv with a header: ``text``, ``label`` and perhaps ``split`` (train or test; a fifth is held out without it).

    Translations of the same documents stand in columns ``text_LANGUAGE`` instead of ``text``.  Labels are names of
    classes, numbered in sorted order.

    Raises:
      DataError: no such file or column, a row without text or label, a single class, one without training documents;
        with the line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected a csv with columns text, label and perhaps split")
    table = read_table(file)
    found = {c: c.removeprefix("text_") for c in table.columns if c == "text" or c.startswith("text_")}
    for needed, there in (("text", bool(found)), ("label", "label" in table.columns)):
        if not there:
            raise DataError(f"{file}: has no column {needed!r}; it has {', '.join(table.columns)}")
    for column in (*found, "label"):
        if None in table[column]:
            line = table[column].index(None) + 2
            raise DataError(f"{file}, line {line}: the cell of column {column!r} is empty or null")
    rows = split_rows(file, table)
    classes = tuple(sorted(set(table["label"])))
    if len(classes) < 2:
        raise DataError(f"{file}: every row has the label {classes[0]!r}; a classifier needs two classes or more")
    labels = np.array([classes.index(c) for c in table["label"]], np.int32)
    unseen = np.setdiff1d(labels[rows["test"]], labels[rows["train"]])
    if len(unseen):
        raise DataError(f"{file}: no training document has the label {classes[unseen[0]]!r}")
    kept = np.sort(np.concatenate([rows["train"], rows["test"]]))
    texts = {name: tuple(table[column][i] for i in kept) for column, name in found.items()}
    return ParallelTexts(texts, labels[kept], classes, np.isin(kept, rows["train"]), str(file))
