"""Query, document and fine-grained target text: a generator with known answers, and a reader of JSON lines.

A triplet data set has, for each row, ids and masks of ``query``, ``document`` and ``target`` (which ends with the stop
token), ``document_id``, the sentence of each document token (``sentence_ids``, -1 outside all) and the ``sentence``
that holds the target (-1 if none does).
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import Dataset
from data.stream import DataError
from data.text import Tokenizer

PAD, CLS, SEP = 0, 1, 2
"""Ids of padding, of the first token and of the last (also the stop token) in generated data."""


def key_value_documents(
    seed: int = 0,
    train_documents: int = 3000,
    test_documents: int = 200,
    queries: int = 3,
    sentences: int = 6,
    shortest: int = 1,
    topics: int = 60,
    keys: int = 8,
    values: int = 6,
) -> Dataset:
    """Documents of sentences "key a b value value .": the answer stands in the document and nowhere else.

    ``a`` and ``b`` are the document's topics, an ordered pair that no other document has; its keys are distinct; each
    key's two value tokens are drawn anew for every document, from the values that the key may have.  A query is
    "a b key" of one sentence, its target the sentence's two values.  Several queries ask for the same document.  Short
    training documents, in which there is little to choose from, let a small model learn to read in minutes.

    Args:
      seed: of everything.
      train_documents, test_documents: documents of each split; together at most ``topics * (topics - 1)``.
      queries: of each document; those of short documents ask for a sentence again.
      sentences: of a test document, at most ``keys``.
      shortest: training documents have between so many sentences and ``sentences``, evenly.
      topics, keys: words of each kind.
      values: words of each key.

    Raises:
      DataError: sizes that do not allow this.
    """
    count = train_documents + test_documents
    if not (1 <= shortest <= sentences <= keys and min(train_documents, test_documents, queries, values) >= 1):
        raise DataError(
            "the generator needs 1 <= shortest <= sentences <= keys and at least 1 document a split; got "
            f"{shortest}, {sentences}, {keys}, {train_documents} and {test_documents}"
        )
    if count > topics * (topics - 1):
        raise DataError(f"{count} documents need as many pairs of topics; {topics} topics make {topics * (topics - 1)}")
    words = ["[PAD]", "[CLS]", "[SEP]", "."]
    kinds = {}
    for kind, size in (("topic", topics), ("key", keys)):
        kinds[kind] = len(words)
        words += [f"{kind}{i}" for i in range(size)]
    kinds["value"] = len(words)
    words += [f"value{k}.{i}" for k in range(keys) for i in range(values)]
    rng = np.random.default_rng([seed, 7])
    pairs = rng.permutation(topics * (topics - 1))[:count]
    first, second = np.divmod(pairs, topics - 1)
    topic = np.stack([first, second + (second >= first)], 1) + kinds["topic"]
    key = np.argsort(rng.random((count, keys)), 1)[:, :sentences] + kinds["key"]
    value = rng.integers(0, values, (count, sentences, 2)) + kinds["value"] + values * (key - kinds["key"])[..., None]
    length = np.where(np.arange(count) < train_documents, rng.integers(shortest, sentences + 1, count), sentences)
    order = np.argsort(rng.random((count, sentences)) + (np.arange(sentences) >= length[:, None]), 1)
    asked = np.take_along_axis(order, np.arange(queries)[None] % length[:, None], 1)
    both = np.broadcast_to(topic[:, None], (count, sentences, 2))
    body = np.concatenate([key[..., None], both, value, np.full((count, sentences, 1), 3)], 2).reshape(count, -1)
    document = np.pad(body, ((0, 0), (1, 1)))
    place = np.arange(document.shape[1])
    document = np.where(place > 6 * length[:, None], PAD, document)
    document[:, 0], document[np.arange(count), 6 * length + 1] = CLS, SEP
    inside = (place >= 1) & (place <= 6 * length[:, None])
    own, where = np.repeat(np.arange(count), queries), asked.ravel()
    ends = np.full((len(own), 1), CLS), np.full((len(own), 1), SEP)
    rows = {
        "query": np.concatenate([ends[0], topic[own], key[own, where][:, None], ends[1]], 1),
        "document": document[own],
        "target": np.concatenate([value[own, where], ends[1]], 1),
        "document_id": np.where(own < train_documents, own, own - train_documents),
        "sentence_ids": np.where(inside, (place - 1) // 6, -1)[own],
        "sentence": where,
    }
    rows = {k: np.ascontiguousarray(v).astype(np.int32) for k, v in rows.items()}
    rows |= {f"{k}_mask": rows[k] != PAD for k in ("query", "document", "target")}
    edge = train_documents * queries
    splits = {"train": {k: v[:edge] for k, v in rows.items()}, "test": {k: v[edge:] for k, v in rows.items()}}
    info = {"vocab_size": len(words), "stop": SEP, "sentences": sentences, "words": words}
    return Dataset("keyvalue", splits, info)


# --- JSON lines -------------------------------------------------------------------------------------------------------

Encode = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]
"""A text to its token ids and the (start, end) characters of each, without special tokens."""


@dataclasses.dataclass(frozen=True)
class Triplet:
    """One row of a file.

    Attributes:
      query, document, target: texts, none empty.
      spans: the sentences as (start, end) characters of the document, in order.
      doc_id: names the document; by default its text does.
      place: file and line, for messages.
    """

    query: str
    document: str
    target: str
    spans: tuple[tuple[int, int], ...]
    doc_id: str
    place: str

    @property
    def gold(self) -> int:
        """The first sentence that holds the target, -1 if none does."""
        inside = (i for i, (a, b) in enumerate(self.spans) if self.target.strip() in self.document[a:b])
        return next(inside, -1)


def split_sentences(text: str) -> tuple[tuple[int, int], ...]:
    """Sentences as (start, end) characters: up to a full stop, question or exclamation mark and white space."""
    found, start = [], 0
    for mark in re.finditer(r"[.!?]+(?=\s|$)", text):
        found.append((start, mark.end()))
        start = mark.end()
    found.append((start, len(text)))
    trimmed = [(a + len(text[a:b]) - len(text[a:b].lstrip()), b) for a, b in found]
    return tuple((a, b) for a, b in trimmed if a < b)


def read_triplets(path: str | Path) -> list[Triplet]:
    """Reads ``{query, document, target, sentence_spans?, doc_id?}`` a line.

    Raises:
      DataError: no such file, a line that is not such an object, an empty text, spans that overlap or lie outside the
        document; each with file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected one JSON object {{query, document, target}} a line")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; expected JSON lines") from None
    rows = [_triplet(line, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{file}: no rows; expected one JSON object {{query, document, target}} a line")
    shorter = sum(len(r.document) < len(r.query) for r in rows)
    if 2 * shorter > len(rows):
        warnings.warn(
            f"{file}: the document is shorter than the query in {shorter} of {len(rows)} rows; columns swapped?",
            stacklevel=2,
        )
    return rows


def _triplet(line: str, place: str) -> Triplet:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}); expected an object {{query, document, target}}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object {{query, document, target}}, got {type(row).__name__}")
    for name in ("query", "document", "target"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{place}: {name!r} must be a text; the line has {', '.join(sorted(map(str, row)))}")
        if not row[name].strip():
            raise DataError(f"{place}: {name!r} is empty; expected a text")
    document = row["document"]
    spans = row.get("sentence_spans")
    found = split_sentences(document) if spans is None else _spans(spans, len(document), place)
    return Triplet(row["query"], document, row["target"], found, str(row.get("doc_id", document)), place)


def _spans(spans: Any, length: int, place: str) -> tuple[tuple[int, int], ...]:
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool)  # noqa: E731
    pairs = isinstance(spans, list) and all(isinstance(s, list) and len(s) == 2 and all(map(whole, s)) for s in spans)
    if not pairs or not spans:
        raise DataError(f"{place}: sentence_spans must be a list of [start, end] characters, at least one")
    end = 0
    for a, b in spans:
        if not 0 <= a < b <= length:
            raise DataError(f"{place}: sentence span [{a}, {b}] lies outside the document's {length} characters")
        if a < end:
            raise DataError(f"{place}: sentence span [{a}, {b}] overlaps the one before, which ends at {end}")
        end = b
    return tuple((a, b) for a, b in spans)


def encode_triplets(
    rows: Sequence[Triplet],
    encode: Encode,
    special: Mapping[str, int],
    query_length: int = 64,
    document_length: int = 512,
    target_length: int = 64,
    sentences: int | None = None,
) -> dict[str, np.ndarray]:
    """Ids, masks and sentences of rows, padded; query and document stand between ``cls`` and ``sep``.

    Args:
      rows: from :func:`read_triplets`.
      encode: see :data:`Encode`.
      special: ids of ``pad``, ``cls`` and ``sep`` (also the stop token).
      query_length, document_length: the most tokens; longer texts are cut.
      target_length: the most tokens of a target, its stop token included; a longer one is refused.
      sentences: the most sentences of a document; further ones belong to none.  By default as many as there are.

    Raises:
      DataError: a tokenizer without a special token, or a target of more than ``target_length`` tokens (file and line).
    """
    for name in ("pad", "cls", "sep"):
        if special.get(name) is None:
            raise DataError(f"the tokenizer has no {name} token; GeAR needs pad, cls and sep")
    limit = sentences or max(len(r.spans) for r in rows)
    numbers: dict[str, int] = {}
    texts: dict[str, tuple] = {}
    out: dict[str, list] = {k: [] for k in ("query", "document", "target", "document_id", "sentence_ids", "sentence")}
    cut = 0
    for row in rows:
        target = [*encode(row.target)[0], special["sep"]]
        if len(target) > target_length:
            raise DataError(
                f"{row.place}: the target has {len(target) - 1} tokens, the decoder takes {target_length - 1}; "
                "shorten it or raise the limit"
            )
        if row.document not in texts:
            texts[row.document] = encode(row.document)
        ids, offsets = (list(x)[: document_length - 2] for x in texts[row.document])
        owner = [_sentence_of(at, row.spans[:limit]) for at in offsets]
        gold = row.gold if row.gold < limit else -1
        if gold >= 0 and gold not in owner:
            cut, gold = cut + 1, -1
        out["query"].append([special["cls"], *list(encode(row.query)[0])[: query_length - 2], special["sep"]])
        out["document"].append([special["cls"], *ids, special["sep"]])
        out["target"].append(target)
        out["document_id"].append(numbers.setdefault(row.doc_id, len(numbers)))
        out["sentence_ids"].append([-1, *owner, -1])
        out["sentence"].append(gold)
    if cut:
        warnings.warn(
            f"the target sentence lies beyond the {document_length} tokens of a document in {100 * cut / len(rows):.0f}"
            " % of rows; they do not count in local retrieval",
            stacklevel=2,
        )
    arrays = {k: np.asarray(out[k], np.int32) for k in ("document_id", "sentence")}
    for name in ("query", "document", "target"):
        arrays[name], arrays[f"{name}_mask"] = _padded(out[name], special["pad"])
    arrays["sentence_ids"] = _padded(out["sentence_ids"], -1)[0]
    return arrays


def _sentence_of(token: tuple[int, int], spans: Sequence[tuple[int, int]]) -> int:
    # a token belongs where its first character stands; offsets may begin with the space before it
    middle = (token[0] + max(token[1] - 1, token[0])) / 2
    return next((i for i, (a, b) in enumerate(spans) if a <= middle < b), -1)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(r) for r in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, fill, np.int32)
    ids[mask] = np.concatenate([np.asarray(r, np.int32) for r in rows])
    return ids, mask


def text_triplets(
    path: str | Path,
    vocab_size: int = 8000,
    query_length: int = 64,
    document_length: int = 256,
    target_length: int = 64,
) -> Dataset:
    """JSON lines as a data set: a folder's ``train.jsonl`` and ``test.jsonl``, or one file, a tenth of it held out.

    The tokenizer is the folder's ``tokenizer.json`` if there is one, else word pieces learnt from the training texts.

    Raises:
      DataError: as :func:`read_triplets` and :func:`encode_triplets`; or one file with a single document.
    """
    path = Path(path)
    if path.is_dir():
        rows = {s: read_triplets(path / f"{s}.jsonl") for s in ("train", "test")}
    else:
        every = read_triplets(path)
        names = list(dict.fromkeys(r.doc_id for r in every))
        if len(names) < 2:
            raise DataError(f"{path}: holds one document; expected at least 2, one of them to test on")
        held = set(names[::10])
        rows = {"train": [r for r in every if r.doc_id not in held], "test": [r for r in every if r.doc_id in held]}
    file = path / "tokenizer.json"
    if path.is_dir() and file.exists():
        tokenizer = Tokenizer.read(file)
    else:
        texts = dict.fromkeys(t for r in rows["train"] for t in (r.query, r.document, r.target))
        tokenizer = Tokenizer.train(texts, vocab_size)

    def encode(text):
        found = tokenizer.core.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    special = {"pad": tokenizer.pad, "cls": tokenizer.cls, "sep": tokenizer.sep}
    most = max(len(r.spans) for part in rows.values() for r in part)
    splits = {
        s: encode_triplets(part, encode, special, query_length, document_length, target_length, most)
        for s, part in rows.items()
    }
    words = [tokenizer.core.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
    info = {"vocab_size": tokenizer.vocab_size, "stop": tokenizer.sep, "sentences": most, "words": words}
    return Dataset(str(path), splits, info)
