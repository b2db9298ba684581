"""What recipes of retrieval share: texts as arrays, encoding in batches, and a ranking's figures in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.collections import Collection, read_collection
from data.stream import DataError
from data.synonym_text import synonym_collection
from data.text import Tokenizer
from trainers.recipe import Data, UserError
from zoo.metrics import ranking
from zoo.ops.search import mips_topk

SPECIAL_IDS = 5
"""Ids below it are special tokens of a tokenizer trained here."""


def text_collection(data: Data, seed: int) -> Collection:
    """The collection that a recipe's ``--data`` names: generated synonyms, or a folder in a known layout.

    Raises:
      UserError: an unknown name, or Cranfield without its folder.
      DataError: what lies in the folder cannot be read.
    """
    if data.path is not None:
        return read_collection(data.path)
    if data.name == "synonyms":
        return synonym_collection(seed)
    if data.name in ("cranfield", "beir", "msmarco"):
        raise UserError(f"--data.name {data.name} needs --data.path DIR, the folder of its files")
    raise UserError(f"--data.name {data.name!r} is unknown; use synonyms, or --data.path with a collection's folder")


@dataclasses.dataclass(frozen=True)
class Texts:
    """A collection as arrays of ids.

    Attributes:
      collection: the texts.
      tokenizer: of both sides.
      documents, queries: int32 ``[N, Ld]`` and ``[Q, Lq]``, padded with ``tokenizer.pad``.
    """

    collection: Collection
    tokenizer: Tokenizer
    documents: np.ndarray
    queries: np.ndarray

    @classmethod
    def of(
        cls,
        collection: Collection,
        query_length: int,
        document_length: int,
        vocab_size: int = 4096,
        kind: str = "wordpiece",
        tokenizer: Tokenizer | None = None,
    ) -> Texts:
        """Encodes a collection; trains a tokenizer on its documents unless one is given.

        Raises:
          UserError: lengths or a vocabulary that are too small.
        """
        try:
            tokenizer = tokenizer or Tokenizer.train(collection.documents, vocab_size, kind)
            documents = tokenizer.encode(collection.documents, document_length)
            return cls(collection, tokenizer, documents, tokenizer.encode(collection.queries, query_length))
        except DataError as error:
            raise UserError(str(error).replace("vocab_size", "--vocab-size")) from None

    def relevant(self, queries: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relevant documents and grades of queries, padded; see ``data.collections.Judgements.padded``."""
        return self.collection.judgements.padded(queries)


def encode_all(encode: Callable[[Any, Any], Any], params: Any, inputs: np.ndarray, batch: int = 256) -> np.ndarray:
    """``encode(params, inputs)`` of all rows, a fixed number at a time (one compiled program): float32 ``[N, d]``.

    Args:
      encode: jitted, ``(params, inputs [B, ...]) -> [B, d]``.
      params: its parameters.
      inputs: ``[N, ...]``.
      batch: rows at a time.
    """
    out = []
    batch = min(batch, len(inputs))
    for start in range(0, len(inputs), batch):
        at = max(0, min(start, len(inputs) - batch))  # the last batch overlaps the one before instead of being padded
        found = np.asarray(encode(params, jnp.asarray(inputs[at : at + batch])), np.float32)
        out.append(found[start - at :])
    return np.concatenate(out)


def search(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """Ids int32 ``[q, k]`` of exact inner-product search; k is cut to the number of documents."""
    k = min(k, len(documents))
    return np.asarray(_search(jnp.asarray(queries), jnp.asarray(documents), k)[1])


_search = jax.jit(mips_topk, static_argnums=2)


def ranking_figures(ids: np.ndarray, relevant: np.ndarray, grades: np.ndarray | None = None) -> dict[str, float]:
    """MRR@10, NDCG@10, MAP@100 and Recall@100 of ranked lists, means over queries with a relevant document.

    Args:
      ids: int32 ``[q, k]``, best first, padded with -1; lists shorter than 100 count as if nothing followed.
      relevant, grades: padded; see ``data.collections.Judgements.padded``.  Without grades NDCG is binary.
    """
    ids = np.concatenate([ids, np.full((len(ids), max(0, 100 - ids.shape[1])), -1, np.int32)], 1)
    found = _figures(jnp.asarray(ids), jnp.asarray(relevant), None if grades is None else jnp.asarray(grades))
    return {k: float(v) for k, v in found.items()}


@jax.jit
def _figures(ids, relevant, grades):
    mean = lambda values: ranking.mean_over_queries(values, relevant)  # noqa: E731
    return {
        "mrr_at_10": mean(ranking.mrr_at_k(ids, relevant, 10)),
        "ndcg_at_10": mean(ranking.ndcg_at_k(ids, relevant, 10, grades)),
        "map_at_100": mean(ranking.average_precision_at_k(ids, relevant, 100)),
        "recall_at_100": mean(ranking.recall_at_k(ids, relevant, 100)),
    }


def figures_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rankings' figures as text, a row each."""
    names = list(next(iter(rows.values())))
    wide = max(12, *map(len, rows))
    lines = [" " * wide + "".join(f"{n:>16}" for n in names)]
    lines += [f"{name:{wide}}" + "".join(f"{row[n]:16.4f}" for n in names) for name, row in rows.items()]
    return "\n".join(lines)
