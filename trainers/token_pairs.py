"""Queries and items as token ids for a cross-encoder: generated, or the texts of a collection."""

from __future__ import annotations

import dataclasses

import numpy as np

from data.bm25 import BM25
from data.collections import Collection
from data.score_matrices import matching_pairs
from data.stream import arrays_fingerprint
from data.text import Tokenizer
from trainers.errors import UserError
from zoo.nn.cross_encoder import check_tags

TAGS = ("[START]", "[END]", "[TITLE]")
"""Special tokens: start and end of the mention (the query), end of the title."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Queries and items as padded ids.

    Attributes:
      items, train, test: int32 ids; queries with ``[CLS]`` and ``[SEP]``, items with ``[SEP]``.
      relevant: int32 ``[Q, P]``, the training queries' items, padded with -1; the first one is the positive.
      positive: int32 ``[test]``, the test queries' one item, or ``None``.
      tags, pad, vocab_size: ids of start, end and title; of padding; and how many there are.
      hard: ids ``[Q, h]`` of another retriever's best, padded with -1, to draw negatives from; ``None`` for none.
      tokenizer: of texts.
    """

    items: np.ndarray
    train: np.ndarray
    test: np.ndarray
    relevant: np.ndarray
    positive: np.ndarray | None
    tags: tuple[int, int, int]
    pad: int
    vocab_size: int
    hard: np.ndarray | None = None
    tokenizer: Tokenizer | None = None

    @property
    def fingerprint(self) -> str:
        """Checksum of all ids."""
        return arrays_fingerprint({"i": self.items, "a": self.train, "t": self.test, "r": self.relevant})

    def candidates(self, negatives: int, rng: np.random.Generator) -> np.ndarray:
        """The positive of each training query and negatives drawn anew, never relevant ones: ``[Q, 1 + negatives]``."""
        drawn = rng.integers(0, len(self.items), (len(self.train), negatives))
        if self.hard is not None:
            half = negatives // 2
            at = rng.integers(0, self.hard.shape[1], (len(self.train), half))
            own = np.take_along_axis(self.hard, at, 1)
            drawn[:, :half] = np.where(own >= 0, own, drawn[:, :half])
        wrong = (drawn[:, :, None] == self.relevant[:, None, :]).any(-1)
        return np.concatenate([self.relevant[:, :1], np.where(wrong, -1, drawn)], 1).astype(np.int32)


def generated_pairs(seed: int) -> Pairs:
    """Generated queries and items, 2000 queries to train on."""
    made = matching_pairs(seed, train=2000)
    train, test = made["train"], made["test"]
    return Pairs(made["items"]["tokens"], train["tokens"], test["tokens"], train["positive"][:, None], test["positive"],
                 made.info["tags"], 0, made.info["vocab_size"])  # fmt: skip


def texts_as_pairs(collection: Collection, tokenizer: Tokenizer, query_length: int, item_length: int) -> Pairs:
    """A collection for a cross-encoder: ``[CLS] [START] query [END] [SEP]`` and ``title [TITLE] text [SEP]``.

    An item without a title has the tag first.

    Raises:
      UserError: lengths too small for the special tokens, a title that leaves its tag no room, or a text with a tag of
        its own.
    """
    if query_length < 5 or item_length < 3:
        raise UserError(f"--query-length and --item-length must be at least 5 and 3, got {query_length}, {item_length}")
    tags = tuple(tokenizer.id_of(t) for t in TAGS)
    rows = lambda texts, make, length: _padded([make(tokenizer.ids(t)) for t in texts], length, tokenizer)  # noqa: E731
    room = query_length - 4
    asked, _ = rows(collection.queries, lambda ids: [tokenizer.cls, tags[0], *ids[:room], tags[1]], query_length)
    heads = [tokenizer.ids(t) for t in collection.titles]
    made = [[*head, tags[2], *tokenizer.ids(text)] for head, text in zip(heads, collection.texts, strict=True)]
    items, _ = _padded(made, item_length, tokenizer)
    try:
        wanted = {"title": tags[2]}
        check_tags(items, wanted, "item", item_length, np.array([len(h) + 2 for h in heads]))
        check_tags(asked, {"start": tags[0], "end": tags[1]}, "query")
    except ValueError as error:
        raise UserError(f"{error}; see --item-length and --query-length") from None
    train, test = collection.splits["train"], collection.splits["test"]
    relevant = collection.judgements.padded(train)[0]
    deep = min(100, len(items))
    hard = BM25(collection.documents).search([collection.queries[q] for q in train], deep)[1]
    return Pairs(items, asked[train], asked[test], relevant, None, tags, tokenizer.pad, tokenizer.vocab_size,
                 np.asarray(hard, np.int32), tokenizer)  # fmt: skip


def _padded(rows: list[list[int]], length: int, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    out = np.full((len(rows), length), tokenizer.pad, np.int32)
    for at, row in enumerate(rows):
        own = [*row[: length - 1], tokenizer.sep]
        out[at, : len(own)] = own
    return out, np.array([len(row) + 1 for row in rows])
