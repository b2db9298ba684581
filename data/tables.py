"""Tables of text cells: a folder of CSV files, labelled joins between their columns, and how columns are numbered.

A cell is a string or ``None`` (null).  The columns of a repository are numbered through, table by table in the order of
the list; a pair of columns is a pair of those numbers, the smaller first.
"""

from __future__ import annotations

import csv
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.stream import DataError

Cells = tuple[str | None, ...]

NULLS = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "<na>"})
"""Cells that count as null, lower case, without surrounding blanks."""


@dataclasses.dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
      name: the file's name, or what it was made as.
      columns: distinct names.
      cells: one tuple of equal length per column.
      source: the table it was cut from; its own name by default.
    """

    name: str
    columns: tuple[str, ...]
    cells: tuple[Cells, ...]
    source: str = ""

    def __post_init__(self):
        if len(set(self.columns)) != len(self.columns) or len(self.columns) != len(self.cells):
            raise DataError(f"{self.name}: every column needs its own name and cells; got {', '.join(self.columns)}")
        if len({len(c) for c in self.cells}) > 1:
            raise DataError(f"{self.name}: columns differ in length: {sorted({len(c) for c in self.cells})}")
        object.__setattr__(self, "source", self.source or self.name)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.cells[0]) if self.cells else 0

    def __getitem__(self, column: str) -> Cells:
        return self.cells[self.columns.index(column)]


def make_table(name: str, columns: Mapping[str, Sequence[Any]], source: str = "") -> Table:
    """A table from Python values: mixed types are cast to strings; ``None``, NaN and :data:`NULLS` are null."""
    return Table(name, tuple(columns), tuple(tuple(_cell(v) for v in values) for values in columns.values()), source)


def _cell(value: Any) -> str | None:
    text = "" if value is None else str(value).strip()
    return None if text.lower() in NULLS else text


# --- a folder of CSV files --------------------------------------------------------------------------------------------


def read_tables(folder: str | Path, encoding: str = "utf-8-sig") -> list[Table]:
    """Reads every ``*.csv`` of a folder, in the order of their names.

    The first line is the header.  Reported as warnings, not errors: a column name that repeats (the second ``x``
    becomes ``x_2``), a column without a name (``column_3``, its place), and a column without any value, which cannot
    be joined and is left out.  A row that ends early is filled with nulls.

    Raises:
      DataError: no such folder, fewer than two tables, a file that is empty, undecodable, without rows or without any
        value, or a row with more cells than the header; each with file and line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected one with at least two .csv files")
    files = sorted(folder.glob("*.csv"))
    if len(files) < 2:
        raise DataError(f"{folder}: holds {len(files)} .csv file(s); joins are discovered between at least two tables")
    return [read_table(file, encoding) for file in files]


def read_table(file: str | Path, encoding: str = "utf-8-sig") -> Table:
    """Reads one CSV file; see :func:`read_tables`."""
    file = Path(file)
    try:
        with file.open(encoding=encoding, newline="") as stream:
            lines = [(reader.line_num, row) for reader in [csv.reader(stream)] for row in reader if row]
    except LookupError:
        raise DataError(f"{file}: {encoding!r} is not a known encoding; try utf-8 or latin-1") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not {encoding} ({error.reason}); save it as UTF-8 or name its encoding"
        ) from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error})") from None
    if not lines:
        raise DataError(f"{file}: is empty; expected a header line and rows")
    header, rows = _header(file, lines[0][1]), lines[1:]
    if not rows:
        raise DataError(f"{file}: has a header but no rows")
    for line, row in rows:
        if len(row) > len(header):
            raise DataError(f"{file}, line {line}: {len(row)} cells, but the header names {len(header)} columns")
    width = len(header)
    full = [[_cell(v) for v in row] + [None] * (width - len(row)) for _, row in rows]
    cells = dict(zip(header, zip(*full, strict=True), strict=True))
    empty = [name for name, column in cells.items() if all(v is None for v in column)]
    if len(empty) == width:
        raise DataError(f"{file}: no column holds any value")
    if empty:
        warnings.warn(f"{file}: left out columns without any value: {', '.join(empty)}", stacklevel=2)
    kept = [name for name in header if name not in empty]
    return Table(file.name, tuple(kept), tuple(cells[name] for name in kept))


def split_rows(file: Path, table: Table) -> dict[str, np.ndarray]:
    """Rows of ``train`` and ``test`` by a column ``split`` (``val`` is set aside), or a fixed fifth held out.

    Raises:
      DataError: too few rows, another name in the column, or a part without rows; with ``file`` and line.
    """
    if "split" not in table.columns:
        if table.rows < 5:
            raise DataError(f"{file}: has {table.rows} rows; at least 5 are needed to hold a fifth out")
        order = np.random.default_rng(0).permutation(table.rows)
        held = max(1, table.rows // 5)
        return {"train": np.sort(order[held:]), "test": np.sort(order[:held])}
    names = np.array([(c or "").lower() for c in table["split"]])
    known = np.isin(names, ("train", "val", "test"))
    if not known.all():
        i = int((~known).argmax())
        raise DataError(f"{file}, line {i + 2}: split is {table['split'][i]!r}, expected train, val or test")
    rows = {k: np.flatnonzero(names == k) for k in ("train", "test")}
    for k, r in rows.items():
        if not len(r):
            raise DataError(f"{file}: column 'split' has no row {k!r}")
    return rows


def _header(file: Path, names: list[str]) -> list[str]:
    found: list[str] = []
    taken = {n.strip() for n in names}
    renamed = []
    for place, name in enumerate(names, start=1):
        wanted = name.strip() or f"column_{place}"
        new, count = wanted, 1
        while new in found or (new != name.strip() and new in taken):
            count += 1
            new = f"{wanted}_{count}"
        if new != name.strip():
            renamed.append(f"{name.strip() or 'the unnamed'} (place {place}) is called {new}")
        found.append(new)
    if renamed:
        warnings.warn(f"{file}: renamed columns: {'; '.join(renamed)}", stacklevel=3)
    return found


def write_table(file: str | Path, table: Table) -> None:
    """Writes a table as CSV, nulls as empty cells."""
    with Path(file).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(table.columns)
        writer.writerows([["" if v is None else v for v in row] for row in zip(*table.cells, strict=True)])


# --- columns of a repository ------------------------------------------------------------------------------------------


def column_names(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """(table, column) of every column, by number."""
    return [(t.name, c) for t in tables for c in t.columns]


def column_cells(tables: Sequence[Table]) -> list[Cells]:
    """The cells of every column, by number."""
    return [c for t in tables for c in t.cells]


def column_tables(tables: Sequence[Table]) -> np.ndarray:
    """int32 ``[N]``: the table that each column belongs to."""
    return np.repeat(np.arange(len(tables), dtype=np.int32), [len(t.columns) for t in tables])


def cross_table_pairs(table_of: np.ndarray) -> np.ndarray:
    """int32 ``[P, 2]``: all pairs u < v of columns of different tables, in lexicographic order."""
    u, v = np.triu_indices(len(table_of), 1)
    keep = table_of[u] != table_of[v]
    return np.stack([u[keep], v[keep]], 1).astype(np.int32)


def read_joins(file: str | Path, tables: Sequence[Table]) -> np.ndarray:
    """Reads labelled joins: a CSV without header, ``file,column,file,column`` in each line.

    Returns:
      int32 ``[J, 2]`` pairs of column numbers, u < v, sorted and distinct.

    Raises:
      DataError: an unreadable line, an unknown table or column, two columns of one table, or no pair at all; with the
        line.
    """
    file = Path(file)
    number = {name: i for i, name in enumerate(column_names(tables))}
    known, table_of, pairs = {t.name for t in tables}, column_tables(tables), set()
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = [(reader.line_num, row) for reader in [csv.reader(stream)] for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error})") from None
    for line, row in lines:
        if len(row) != 4:
            raise DataError(f"{file}, line {line}: expected file,column,file,column, got {len(row)} cells")
        cells = [c.strip() for c in row]
        ends = [(cells[0], cells[1]), (cells[2], cells[3])]
        for table, column in ends:
            if table not in known:
                raise DataError(f"{file}, line {line}: there is no table {table!r} in the folder")
            if (table, column) not in number:
                raise DataError(f"{file}, line {line}: table {table!r} has no column {column!r}")
        u, v = sorted(number[e] for e in ends)
        if table_of[u] == table_of[v]:
            raise DataError(f"{file}, line {line}: both columns belong to {ends[0][0]!r}; joins are between tables")
        pairs.add((u, v))
    if not pairs:
        raise DataError(f"{file}: holds no pair; expected lines file,column,file,column")
    return np.array(sorted(pairs), np.int32)


def labels_of(pairs: np.ndarray, joins: np.ndarray) -> np.ndarray:
    """bool ``[P]``: which pairs of columns are among the joins."""
    wanted = set(map(tuple, np.sort(joins, 1).tolist()))
    return np.array([tuple(sorted(p)) in wanted for p in pairs.tolist()], bool)
