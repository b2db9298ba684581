"""Text collections for retrieval: documents, queries and judgements, from BEIR, MS MARCO and Cranfield files.

A folder is recognised by what lies in it:

* BEIR: ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` (``_id``, ``text``), ``qrels/train.tsv`` ...
  ``test.tsv`` (``query-id corpus-id score``, with a header);
* MS MARCO: ``collection.tsv`` (``pid text`` or ``docid url title body``), ``queries.tsv`` or ``queries.SPLIT.tsv``, and
  ``qrels.tsv`` or ``qrels.SPLIT.tsv`` (``qid 0 pid grade``, tabs or spaces);
* Cranfield: ``cran.all.1400``, ``cran.qry``, ``cranqrel``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.stream import DataError, arrays_fingerprint


@dataclasses.dataclass(frozen=True)
class Judgements:
    """Which documents answer which queries, as rows of a table.

    Attributes:
      query, document: int32 ``[M]``, numbers within the collection.
      grade: float32 ``[M]``, above 0; larger is more relevant.
    """

    query: np.ndarray
    document: np.ndarray
    grade: np.ndarray

    def padded(self, queries: Sequence[int] | np.ndarray, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Relevant documents of each query, padded with -1, and their grades, padded with 0: ``[q, R]`` both.

        Args:
          queries: numbers of queries.
          least: judgements of a smaller grade do not count.
        """
        rows: dict[int, list[int]] = {}
        for i in np.flatnonzero(self.grade >= least):
            rows.setdefault(int(self.query[i]), []).append(i)
        own = [rows.get(int(q), []) for q in queries]
        width = max([1, *map(len, own)])
        ids, grades = np.full((len(own), width), -1, np.int32), np.zeros((len(own), width), np.float32)
        for at, row in enumerate(own):
            ids[at, : len(row)], grades[at, : len(row)] = self.document[row], self.grade[row]
        return ids, grades


@dataclasses.dataclass(frozen=True)
class Collection:
    """Documents, queries and judgements.

    Attributes:
      name: what it is called.
      titles, texts: of each document; a title may be empty.
      queries: texts.
      document_ids, query_ids: the source's own ids.
      judgements: see :class:`Judgements`.
      splits: split name -> numbers of its queries, int32.
    """

    name: str
    titles: list[str]
    texts: list[str]
    queries: list[str]
    document_ids: list[str]
    query_ids: list[str]
    judgements: Judgements
    splits: Mapping[str, np.ndarray]

    @property
    def documents(self) -> list[str]:
        """Title and text of each document, joined by a space."""
        return [f"{a} {b}".strip() for a, b in zip(self.titles, self.texts, strict=True)]

    @property
    def fingerprint(self) -> str:
        """Checksum of everything."""
        j = self.judgements
        texts = {"documents": self.documents, "queries": self.queries, "ids": self.document_ids + self.query_ids}
        arrays = {k: np.array(v, dtype=object) for k, v in texts.items()}
        return arrays_fingerprint({**arrays, "q": j.query, "d": j.document, "g": j.grade, **dict(self.splits)})


def read_collection(folder: str | Path) -> Collection:
    """Reads a folder of any of the layouts above.

    Queries without a relevant document stay in the collection but in no split.  Where a source has no training split,
    every third judged query is for testing and the others are for training; where it has no test split but a
    validation split, that is the test split.

    Args:
      folder: see the module.

    Raises:
      DataError: no such folder, no known layout, or a line that cannot be read; names file, line and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; expected a collection in the BEIR, MS MARCO or Cranfield layout"
        )
    for file, read in (("corpus.jsonl", _beir), ("collection.tsv", _msmarco), ("cran.all.1400", _cranfield)):
        if (folder / file).is_file():
            return read(folder)
    raise DataError(
        f"{folder}: holds neither corpus.jsonl (BEIR), collection.tsv (MS MARCO) nor cran.all.1400 (Cranfield)"
    )


# --- assembling what was read -----------------------------------------------------------------------------------------


def _assemble(
    name: str,
    documents: list[tuple[str, str, str]],
    queries: list[tuple[str, str]],
    qrels: Mapping[str, list[tuple[str, str, float]]],
    files: Mapping[str, Path],
) -> Collection:
    if not documents or not queries:
        what = "documents" if not documents else "queries"
        raise DataError(f"{files[what]}: holds no {what}")
    doc_at, query_at = (
        _numbered([d[0] for d in documents], files["documents"]),
        _numbered([q[0] for q in queries], files["queries"]),
    )
    rows, split_of = {}, {}
    for split, triples in qrels.items():
        strangers = sorted({d for _, d, _ in triples if d not in doc_at})
        if strangers:
            raise DataError(
                f"{files[split]}: {len(strangers)} judged documents are not in {files['documents'].name}: "
                f"{', '.join(strangers[:3])}"
            )
        strangers = sorted({q for q, _, _ in triples if q not in query_at})
        if strangers:
            raise DataError(
                f"{files[split]}: {len(strangers)} judged queries are not in {files['queries'].name}: "
                f"{', '.join(strangers[:3])}"
            )
        for q, d, grade in triples:
            if grade > 0:
                rows[query_at[q], doc_at[d]] = grade
                if split_of.setdefault(query_at[q], split) != split:
                    raise DataError(f"query {q!r} has judgements in {split_of[query_at[q]]!r} and in {split!r}")
    if not rows:
        raise DataError(f"{next(iter(files.values())).parent}: no judgement has a grade above 0")
    pairs = np.array(sorted(rows), np.int32)
    grade = np.array([rows[tuple(p)] for p in pairs.tolist()], np.float32)
    splits = {s: np.array(sorted(q for q, of in split_of.items() if of == s), np.int32) for s in qrels}
    splits = {k: v for k, v in splits.items() if len(v)}
    if "test" not in splits and "dev" in splits:
        splits["test"] = splits.pop("dev")
    if "train" not in splits or "test" not in splits:
        judged = np.sort(np.concatenate(list(splits.values())))
        third = np.arange(len(judged)) % 3 == 2
        splits = {"train": judged[~third], "test": judged[third]}
    return Collection(
        name, [d[1] for d in documents], [d[2] for d in documents], [q[1] for q in queries],
        [d[0] for d in documents], [q[0] for q in queries], Judgements(pairs[:, 0], pairs[:, 1], grade), splits,
    )  # fmt: skip


def _numbered(ids: list[str], file: Path) -> dict[str, int]:
    at = {}
    for n, own in enumerate(ids):
        if own in at:
            raise DataError(f"{file}: id {own!r} occurs twice")
        at[own] = n
    return at


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as open_file:
            for n, line in enumerate(open_file, 1):
                if line.strip():
                    yield n, line.rstrip("\r\n")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None


# --- BEIR -------------------------------------------------------------------------------------------------------------


def _beir(folder: Path) -> Collection:
    corpus, asked = folder / "corpus.jsonl", folder / "queries.jsonl"
    documents = [(i, row.get("title") or "", text) for i, text, row in _jsonl(corpus)]
    queries = [(i, text) for i, text, _ in _jsonl(asked)]
    found = sorted((folder / "qrels").glob("*.tsv"))
    if not found:
        raise DataError(f"{folder / 'qrels'}: expected judgements train.tsv, dev.tsv or test.tsv")
    qrels = {f.stem: _beir_qrels(f) for f in found}
    files = {"documents": corpus, "queries": asked, **{f.stem: f for f in found}}
    return _assemble(folder.name, documents, queries, qrels, files)


def _jsonl(file: Path) -> Iterator[tuple[str, str, dict]]:
    for n, line in _lines(file):
        try:
            row = json.loads(line)
            yield str(row["_id"]), str(row["text"]), row
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(
                f'{file}, line {n}: expected a JSON object with "_id" and "text", got {line[:60]!r}'
            ) from None


def _beir_qrels(file: Path) -> list[tuple[str, str, float]]:
    rows = []
    for n, line in _lines(file):
        parts = line.split("\t")
        if n == 1 and parts[-1].strip() in ("score", "relevance"):
            continue
        rows.append(_judgement(file, n, parts, "query-id, corpus-id and score, separated by tabs", (0, 1, 2), 3))
    return rows


def _judgement(file: Path, n: int, parts: list[str], wanted: str, at: tuple[int, int, int], width: int):
    try:
        if len(parts) != width:
            raise ValueError
        return parts[at[0]].strip(), parts[at[1]].strip(), float(parts[at[2]])
    except ValueError:
        raise DataError(f"{file}, line {n}: expected {wanted}; got {' '.join(parts)[:60]!r}") from None


# --- MS MARCO ---------------------------------------------------------------------------------------------------------


def _msmarco(folder: Path) -> Collection:
    corpus = folder / "collection.tsv"
    documents = []
    for n, line in _lines(corpus):
        parts = line.split("\t")
        if len(parts) not in (2, 4):
            raise DataError(
                f"{corpus}, line {n}: expected `pid text` or `docid url title body`, got {len(parts)} columns"
            )
        documents.append((parts[0], parts[2] if len(parts) == 4 else "", parts[-1]))
    asked, judged = (sorted(folder.glob(f"{kind}*.tsv")) for kind in ("queries", "qrels"))
    if not asked or not judged:
        kind = "queries" if not asked else "qrels"
        raise DataError(f"{folder}: expected {kind}.tsv or {kind}.train.tsv, {kind}.dev.tsv ...; there is none")
    queries: dict[str, str] = {}
    for file in asked:
        for n, line in _lines(file):
            own, tab, text = line.partition("\t")
            if not tab:
                raise DataError(f"{file}, line {n}: expected `qid text` separated by a tab, got {line[:60]!r}")
            if queries.setdefault(own, text) != text:
                raise DataError(f"{file}, line {n}: query {own!r} occurs twice with different texts")
    qrels = {}
    for file in judged:
        split = file.stem.partition(".")[2].split(".")[0] or "all"
        rows = [_judgement(file, n, line.split(), "`qid 0 pid grade`", (0, 2, 3), 4) for n, line in _lines(file)]
        qrels.setdefault(split, []).extend(rows)
    names = {f.stem.partition(".")[2].split(".")[0] or "all": f for f in judged}
    files = {"documents": corpus, "queries": asked[0], **names}
    return _assemble(folder.name, documents, list(queries.items()), qrels, files)


# --- Cranfield --------------------------------------------------------------------------------------------------------


def _cranfield(folder: Path) -> Collection:
    """Grades are 5 minus Cleverdon's code (1, a complete answer, gives 4); codes outside 1 .. 4 are no judgement.

    ``cranqrel`` numbers queries 1 .. 225 in order of appearance, not by their ``.I``.
    """
    files = {"documents": folder / "cran.all.1400", "queries": folder / "cran.qry", "all": folder / "cranqrel"}
    documents = [(i, f.get("T", ""), _without_title(f)) for i, f in _records(files["documents"])]
    queries = [(str(n), f.get("W", "")) for n, (_, f) in enumerate(_records(files["queries"]), 1)]
    rows = []
    for n, line in _lines(files["all"]):
        q, d, code = _judgement(files["all"], n, line.split(), "query number, document, code", (0, 1, 2), 3)
        if 1 <= code <= 4:
            rows.append((q, d, 5.0 - code))
    return _assemble("cranfield", documents, queries, {"all": rows}, files)


def _without_title(fields: Mapping[str, str]) -> str:
    # an abstract repeats its title
    title, text = fields.get("T", ""), fields.get("W", "")
    return text[len(title) :].strip() if title and text.startswith(title) else text


def _records(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    own, field, fields = "", "", {}
    for n, line in _lines(file):
        mark = re.fullmatch(r"\.([A-Z])\s*(\S*)\s*", line)
        if mark and mark[1] == "I":
            if own:
                yield own, fields
            own, field, fields = mark[2], "", {}
        elif mark and own:
            field = mark[1]
        elif not (own and field):
            raise DataError(f"{file}, line {n}: expected a record that begins with `.I number`, got {line[:60]!r}")
        else:
            fields[field] = f"{fields.get(field, '')} {line.strip()}".strip()
    if own:
        yield own, fields
