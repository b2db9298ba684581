"""Made-up repositories with known joins: typos, table pairs cut from one table, and a stand-in of 15 sources.

A fabricated pair is what OmniMatch learns from (brief, definition 1): two overlapping parts of one table, whose common
columns are joins and whose other pairs of columns are not.
"""

from __future__ import annotations

import dataclasses
import unicodedata
import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta

import numpy as np

from data.stream import DataError
from data.tables import Cells, Table, column_tables, cross_table_pairs, labels_of, make_table

KEYBOARD = (("1234567890", 0.0), ("qwertyuiop", 0.5), ("asdfghjkl", 0.75), ("zxcvbnm", 1.25))
"""Rows of a QWERTY keyboard and how far each is shifted."""

DATES = (
    ("%m/%d/%Y", "%A %d %B %Y"),
    ("%m/%d/%Y %I:%M:%S %p", "%A %d %B %Y"),
    ("%A, %B %d, %Y", "%m/%d/%Y"),
    ("%I:%M %p", "%H:%M"),
    ("%Y-%m-%dT%H:%M:%S.000Z", "%m/%d/%Y %I:%M %p"),
)
"""Five formats of dates that are recognised, and what each becomes."""


def _neighbours() -> dict[str, str]:
    at = {key: (x + shift, y) for y, (row, shift) in enumerate(KEYBOARD) for x, key in enumerate(row)}
    near = lambda p, q: p != q and abs(p[0] - q[0]) <= 1 and abs(p[1] - q[1]) <= 1  # noqa: E731
    return {key: "".join(k for k, q in at.items() if near(p, q)) for key, p in at.items()}


NEIGHBOURS = _neighbours()
"""Keys that touch each key."""


# --- typos ------------------------------------------------------------------------------------------------------------


def typo_perturb(value: str, rng: np.random.Generator, percent: float = 10.0) -> str:
    """Mistypes a string: some letters and digits become keys next to them; symbols stay in their places.

    The value is first reduced to ASCII.  Digits joined by hyphens get blanks for the hyphens instead, and digits alone
    stay.  Otherwise ``max(1, int(percent / 100 * n))`` of its n letters and digits change.
    """
    value = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    if value.replace("-", "").isdigit():
        return value.replace("-", " ")
    places = [i for i, c in enumerate(value) if c.isalnum()]
    if not places:
        return value
    letters = list(value)
    for i in rng.choice(len(places), max(1, int(percent / 100 * len(places))), replace=False):
        key = letters[places[i]].lower()
        letters[places[i]] = NEIGHBOURS[key][rng.integers(len(NEIGHBOURS[key]))]
    return "".join(letters)


def column_kind(cells: Sequence[str | None]) -> str:
    """``"date"`` (by its first value), ``"int"``, ``"float"`` (all values are) or ``"text"``."""
    values = [v for v in cells if v is not None]
    if values and _date_format(values[0]) is not None:
        return "date"
    for kind, cast in (("int", int), ("float", float)):
        try:
            if values and all(np.isfinite(cast(v)) for v in values):
                return kind
        except ValueError:
            pass
    return "text"


def _date_format(value: str) -> int | None:
    return next((i for i, (known, _) in enumerate(DATES) if _parsed(value, known) is not None), None)


def _parsed(value: str, known: str) -> datetime | None:
    try:
        return datetime.strptime(value, known)
    except ValueError:
        return None


def perturb_column(
    cells: Sequence[str | None],
    rng: np.random.Generator,
    percent: float = 10.0,
    coverage: float = 100.0,
    kind: str | None = None,
) -> Cells:
    """Perturbs a column by its kind: typos in text, another format for dates, new draws for floats; integers stay.

    Args:
      cells: values and nulls; nulls stay.
      rng: the source of randomness.
      percent: of the characters of a text value.
      coverage: percent of the rows of text and dates; floats are drawn anew in every row, from
        ``|N((1 + s) mean, (1 + s) sd)|`` with s = +-0.10 .. +-0.50, rounded if all were whole.
      kind: see :func:`column_kind`; found by default.
    """
    kind = column_kind(cells) if kind is None else kind
    new = list(cells)
    if kind == "int":
        return tuple(new)
    if kind == "float":
        values = np.array([float(v) for v in cells if v is not None])
        if not len(values):
            return tuple(new)
        scale = 1 + rng.choice([-1, 1]) * rng.integers(10, 51) / 100
        drawn = np.abs(rng.normal(scale * values.mean(), scale * values.std(), len(values)))
        drawn = np.round(drawn) if np.all(values % 1 == 0) else drawn
        fresh = iter(drawn)
        return tuple(None if v is None else f"{next(fresh):.6g}" for v in cells)
    chosen = rng.choice(len(cells), int(len(cells) * coverage / 100), replace=False)
    known, other = DATES[_date_format(next(v for v in cells if v is not None))] if kind == "date" else ("", "")
    for i in chosen:
        if cells[i] is None:
            continue
        if kind == "text":
            new[i] = typo_perturb(cells[i], rng, percent)
        elif (when := _parsed(cells[i], known)) is not None:
            new[i] = when.strftime(other)
    return tuple(new)


# --- table pairs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fabrication:
    """How table pairs are cut.

    Attributes:
      common: fewest and most common columns.
      overlaps: shares of the rows that both tables hold, one of which is drawn.
      typo_share: probability that the second table's common columns are perturbed.
      cascade_share: probability that, if so, all of its rows are, rather than the overlapping ones.
      typo_percent, coverage: see :func:`perturb_column`.

    Raises:
      DataError: a setting out of range.
    """

    common: tuple[int, int] = (1, 3)
    overlaps: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    typo_share: float = 0.5
    cascade_share: float = 0.5
    typo_percent: float = 10.0
    coverage: float = 100.0

    def __post_init__(self):
        if not 1 <= self.common[0] <= self.common[1]:
            raise DataError(f"common must be a range from 1 up, got {self.common[0]} .. {self.common[1]}")
        if not self.overlaps or not all(0 <= o < 1 for o in self.overlaps):
            raise DataError(f"overlaps are shares of the rows in [0, 1), at least one; got {self.overlaps}")
        for name, most in (("typo_share", 1), ("cascade_share", 1), ("typo_percent", 100), ("coverage", 100)):
            if not 0 <= getattr(self, name) <= most:
                raise DataError(f"{name} must be in [0, {most}], got {getattr(self, name)}")


def fabricate_table_pair(
    rng: np.random.Generator, table: Table, config: Fabrication = Fabrication()
) -> tuple[Table, Table, tuple[str, ...]]:
    """Cuts two overlapping tables out of one.

    The common columns are, by a coin, those with most distinct values or random ones; of the others the first half goes
    to the first table, the rest to the second.  With ``r = int(overlap R)`` and a random s in ``[1, R - r - 1]`` the
    first has the rows ``[0, r + s)``, the second ``[0, r)`` and ``[r + s, R)``: exactly r are shared.

    Returns:
      The two tables, ``source`` set to the table's, and the names of their common columns.

    Raises:
      DataError: no overlap of ``config`` leaves each table a row of its own (R - r < 2).
    """
    rows = table.rows
    possible = [o for o in config.overlaps if rows - int(o * rows) >= 2]
    if not possible:
        raise DataError(
            f"{table.name}: {rows} rows are too few to split at overlaps {config.overlaps}; "
            "each part needs at least one row of its own"
        )
    low, high = config.common
    count = min(int(rng.integers(low, high + 1)), len(table.columns))
    if rng.random() < 0.5:
        distinct = [len({v for v in c if v is not None}) for c in table.cells]
        picked = sorted(range(len(distinct)), key=lambda i: -distinct[i])[:count]
    else:
        picked = rng.permutation(len(table.columns))[:count].tolist()
    rest = [i for i in range(len(table.columns)) if i not in picked]
    half = len(rest) // 2
    shared = int(possible[rng.integers(len(possible))] * rows)
    cut = shared + int(rng.integers(1, rows - shared))
    take = lambda i, keep: tuple(table.cells[i][r] for r in keep)  # noqa: E731
    first, second = range(cut), [*range(shared), *range(cut, rows)]
    cells = {i: take(i, second) for i in picked + rest[half:]}
    if rng.random() < config.typo_share:
        reach = len(second) if rng.random() < config.cascade_share else shared
        for i in picked:
            kind = column_kind(table.cells[i])
            new = perturb_column(cells[i][:reach], rng, config.typo_percent, config.coverage, kind) if reach else ()
            cells[i] = new + cells[i][reach:]
    names = tuple(table.columns[i] for i in picked)
    one = Table(f"{table.name}#1", (*names, *(table.columns[i] for i in rest[:half])),
                tuple(take(i, first) for i in picked + rest[:half]), table.source)  # fmt: skip
    two = Table(f"{table.name}#2", (*names, *(table.columns[i] for i in rest[half:])),
                tuple(cells[i] for i in picked + rest[half:]), table.source)  # fmt: skip
    return one, two, names


@dataclasses.dataclass(frozen=True)
class Repository:
    """Tables with known joins.

    Attributes:
      tables: in the order that numbers their columns.
      joins, non_joins: int32 ``[J, 2]``, ``[K, 2]`` of column numbers; pairs in neither are unknown.
      info: facts about where they come from.
    """

    tables: tuple[Table, ...]
    joins: np.ndarray
    non_joins: np.ndarray
    info: dict = dataclasses.field(default_factory=dict)


def fabricate_repository(
    tables: Sequence[Table], config: Fabrication = Fabrication(), iterations: int = 1, seed: int = 0
) -> Repository:
    """``iterations`` table pairs cut from every table: joins and non-joins within a pair, nothing known between pairs.

    A table with too few rows is left out with a warning; columns that lost all values stay, but are in no pair.

    Raises:
      DataError: no table can be split, or ``iterations`` < 1.
    """
    if iterations < 1:
        raise DataError(f"iterations must be at least 1, got {iterations}")
    rng = np.random.default_rng([seed, 1])
    made: list[Table] = []
    joins, others, start = [], [], 0
    for number in range(iterations):
        for table in tables:
            try:
                one, two, common = fabricate_table_pair(rng, table, config)
            except DataError as error:
                warnings.warn(f"{error}; the table is left out", stacklevel=2)
                continue
            made += [dataclasses.replace(t, name=f"{t.name}.{number}") for t in (one, two)]
            middle = start + len(one.columns)
            for i, a in enumerate(one.columns):
                for j, b in enumerate(two.columns):
                    if any(v is not None for v in one.cells[i]) and any(v is not None for v in two.cells[j]):
                        (joins if a == b and a in common else others).append((start + i, middle + j))
            start = middle + len(two.columns)
    if not made:
        raise DataError("no table has enough rows to be split in two; training pairs cannot be made")
    shape = lambda pairs: np.array(pairs, np.int32).reshape(-1, 2)  # noqa: E731
    return Repository(tuple(made), shape(joins), shape(others))


# --- the stand-in -----------------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words(
    "Ada Ben Carla Dmitri Elena Farid Greta Hiro Ines Jonas Kofi Lena Marco Nadia Omar Petra Quinn Rosa Sven Tara"
)
_LAST = _words(
    "Abbott Brandt Castillo Dubois Eriksen Fischer Garcia Haddad Ivanov Jensen Kowalski Lindqvist Moreau Novak"
)
_PLACE = _words("Ash Birch Cedar Dover Elm Fairfield Granite Hazel Iron Juniper Kings Laurel Maple North Oak Pine")
_ENDING = _words("ton ville ford burgh field haven mouth wick dale port")
_TRADE = _words("Logistics Foods Energy Systems Textiles Optics Media Pharma Robotics Timber Marine Paper")
_FORM = _words("Ltd Inc GmbH SA LLC")
_GOODS = _words("lamp chair desk kettle drill bicycle jacket tent radio camera ladder piano mirror bottle")
_FINISH = _words("red blue oak steel folding compact large cordless vintage waterproof")

DOMAINS = (
    "person", "city", "street", "company", "product", "email", "phone", "code", "date", "number", "price", "measure",
)  # fmt: skip
"""The twelve domains; values of the last three are numbers, which join only with the column they were cut from."""


def _entities(domain: str, rng: np.random.Generator, count: int) -> list[str]:
    pick = lambda words: words[rng.integers(len(words))]  # noqa: E731
    city = lambda: pick(_PLACE) + pick(_ENDING)  # noqa: E731
    start = datetime(2001, 1, 1)
    make = {
        "person": lambda: f"{pick(_FIRST)} {pick(_FIRST)[0]}. {pick(_LAST)}",
        "city": lambda: f"{pick(('New', 'Old', 'Upper', 'Lower', 'Saint', 'Great'))} {city()}",
        "street": lambda: f"{rng.integers(1, 200)} {city()} {pick(('Road', 'Street', 'Lane', 'Avenue'))}",
        "company": lambda: f"{pick(_LAST)} {pick(_TRADE)} {pick(_FORM)}",
        "product": lambda: f"{pick(_FINISH)} {pick(_GOODS)} {rng.integers(10, 99)}",
        "email": lambda: f"{pick(_FIRST)}.{pick(_LAST)}{rng.integers(100)}@{city()}.org".lower(),
        "phone": lambda: f"{rng.integers(200, 999)}-{rng.integers(200, 999)}-{rng.integers(1000, 9999)}",
        "code": lambda: f"{pick('ABCDEFGH')}{pick('KLMNPRST')}-{rng.integers(1000, 9999)}-{pick('XYZ')}",
        "date": lambda: (start + timedelta(days=int(rng.integers(7000)))).strftime("%m/%d/%Y"),
        "number": lambda: str(rng.integers(1, 5000)),
        "price": lambda: f"{rng.gamma(2.0, 20.0):.2f}",
        "measure": lambda: f"{rng.normal(50.0, 10.0):.3f}",
    }[domain]
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(make())
    return list(found)


def source_tables(seed: int = 0, sources: int = 15, rows: int = 120, vocabulary: int = 300) -> list[Table]:
    """Source tables with 5 or 6 columns each, of different domains; a column's name is its domain.

    Every text domain has one vocabulary.  A column draws its rows, with repetition, from a window of half of it, so
    columns of one domain overlap much, little or not at all.  The last three domains draw numbers afresh.
    """
    rng = np.random.default_rng([seed, 0])
    words = {d: _entities(d, rng, vocabulary) for d in DOMAINS[:9]}
    tables = []
    for number in range(sources):
        columns = {}
        for domain in [DOMAINS[i] for i in rng.permutation(len(DOMAINS))[: rng.integers(5, 7)]]:
            if domain in words:
                window = (rng.integers(vocabulary) + np.arange(vocabulary // 2)) % vocabulary
                columns[domain] = [words[domain][i] for i in rng.choice(window, rows)]
            else:
                columns[domain] = _entities(domain, rng, rows)
        tables.append(make_table(f"source{number:02d}", columns))
    return tables


def bundled_tables() -> list[Table]:
    """Iris, wine and diabetes, scikit-learn's bundled sets, as three source tables of numeric columns."""
    from sklearn import datasets

    found = []
    for name in ("iris", "wine", "diabetes"):
        loaded = getattr(datasets, f"load_{name}")()
        columns = zip(loaded.feature_names, loaded.data.T, strict=True)
        found.append(make_table(name, {c: [f"{v:.5g}" for v in values] for c, values in columns}))
    return found


def joinable_repository(
    seed: int = 0,
    typo_share: float = 0.5,
    sources: Sequence[Table] | None = None,
    config: Fabrication = Fabrication(common=(2, 4)),
) -> Repository:
    """The stand-in: a test repository cut from :func:`source_tables`, whose joins are all known.

    Each source is split in two tables, with typos in some.  Two columns of different tables join if they come from one
    column of one source, or from text columns of one domain whose *clean* source columns share a value.

    Args:
      seed: decides everything.
      typo_share: see :class:`Fabrication`.
      sources: other source tables; their text columns join by name as domains do.
      config: how the sources are split.
    """
    sources = source_tables(seed) if sources is None else sources
    made = fabricate_repository(sources, dataclasses.replace(config, typo_share=typo_share), 1, seed + 7919)
    clean = {(t.source, c): set(t[c]) - {None} for t in sources for c in t.columns}
    kinds = {(t.source, c): column_kind(t[c]) for t in sources for c in t.columns}
    origin = [(t.source, c) for t in made.tables for c in t.columns]
    pairs = cross_table_pairs(column_tables(made.tables))

    def joined(a: tuple[str, str], b: tuple[str, str]) -> bool:
        text = kinds[a] in ("text", "date") and kinds[b] in ("text", "date")
        return a == b or (text and a[1] == b[1] and not clean[a].isdisjoint(clean[b]))

    true = np.array([joined(origin[u], origin[v]) for u, v in pairs.tolist()], bool)
    same = labels_of(pairs, made.joins)
    info = {"fabricated": int(same.sum()), "across_sources": int((true & ~same).sum())}
    return Repository(made.tables, pairs[true], pairs[~true], info)
