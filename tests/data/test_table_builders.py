"""Typos, table pairs and the stand-in: how much changes, which rows are shared, which pairs join."""

import math

import numpy as np
import pytest

from data.builders.tables import (
    DOMAINS,
    NEIGHBOURS,
    Fabrication,
    bundled_tables,
    column_kind,
    fabricate_repository,
    fabricate_table_pair,
    joinable_repository,
    perturb_column,
    source_tables,
    typo_perturb,
)
from data.stream import DataError
from data.tables import column_names, column_tables, make_table


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_keyboard():
    assert set(NEIGHBOURS["s"]) == set("weadzx") and set(NEIGHBOURS["0"]) == set("9po")
    assert all(k not in near and near for k, near in NEIGHBOURS.items()) and len(NEIGHBOURS) == 36
    assert all(k in NEIGHBOURS[n] for k, near in NEIGHBOURS.items() for n in near)
    assert "p" not in NEIGHBOURS["q"] and "m" not in NEIGHBOURS["q"] and "w" in NEIGHBOURS["q"]


def test_typos_change_few_characters_and_keep_symbols():
    for seed, value in enumerate(["Elm Road 12, Dover!", "x", "abcdefghijklmnopqrstuvwxyz0123", "A-1/B.2 (c)"] * 5):
        new = typo_perturb(value, rng(seed))
        letters = sum(c.isalnum() for c in value)
        changed = [i for i, (a, b) in enumerate(zip(value, new, strict=True)) if a != b]
        assert len(changed) == max(1, int(0.1 * letters)) <= math.ceil(0.1 * letters)
        assert all(value[i].isalnum() and new[i] in NEIGHBOURS[value[i].lower()] for i in changed)
    many = typo_perturb("abcdefghij", rng(), 50)
    assert sum(a != b for a, b in zip("abcdefghij", many, strict=True)) == 5
    assert typo_perturb("555-12-9", rng()) == "555 12 9" and typo_perturb("123", rng()) == "123"
    assert typo_perturb("--!", rng()) == "--!" and typo_perturb("", rng()) == ""
    assert typo_perturb("é", rng()) in NEIGHBOURS["e"]


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", None, "-3"], "int"),
        (["1", "2.5"], "float"),
        (["1e3", "2"], "float"),
        (["inf", "2.5"], "text"),
        (["1", "x"], "text"),
        ([None], "text"),
        (["12/31/2001", "x"], "date"),
        (["12/31/2001 01:02:03 PM"], "date"),
        (["Monday, December 31, 2001"], "date"),
        (["01:30 PM"], "date"),
        (["2001-12-31T05:06:07.000Z"], "date"),
        (["31/12/2001"], "text"),
    ],
)
def test_kinds(cells, kind):
    assert column_kind(cells) == kind


def test_dates_are_reformatted():
    for before, after in (
        ("12/30/2001", "Sunday 30 December 2001"),
        ("12/30/2001 01:02:03 PM", "Sunday 30 December 2001"),
        ("Sunday, December 30, 2001", "12/30/2001"),
        ("01:30 PM", "13:30"),
        ("2001-12-30T05:06:07.000Z", "12/30/2001 05:06 AM"),
    ):
        assert perturb_column([before, None, "unknown"], rng()) == (after, None, "unknown")


def test_numbers_and_coverage():
    assert perturb_column(["-1", "22", None], rng()) == ("-1", "22", None)
    cells = [f"{v:.3f}" for v in rng(1).normal(100, 5, 400)] + [None]
    scales = set()
    for seed in range(12):
        new = perturb_column(cells, rng(seed))
        assert new[-1] is None and all(float(v) >= 0 for v in new[:-1])
        values = np.array([float(v) for v in new[:-1]])
        scale = values.mean() / 100
        assert 0.09 <= abs(scale - 1) <= 0.52
        assert values.std() / 5 == pytest.approx(scale * np.std([float(v) for v in cells[:-1]]) / 5, abs=0.12)
        scales.add(scale > 1)
    assert scales == {True, False}
    whole = perturb_column(["3.0", "4.0", "5.0", "1e1"], rng())
    assert all(float(v) % 1 == 0 for v in whole)
    text = [f"word{chr(97 + i % 26)}" for i in range(40)]
    half = perturb_column(text, rng(), 10, 50)
    assert sum(a != b for a, b in zip(text, half, strict=True)) == 20
    assert perturb_column(text, rng(), 10, 0) == tuple(text)
    assert perturb_column([None, None], rng()) == (None, None) == perturb_column([None, None], rng(), kind="float")


WIDE = make_table("w", {c: [f"{c}{i if c != 'k' else i % 3}" for i in range(40)] for c in "abcdefk"})


def test_pairs_share_exactly_the_overlap_and_every_common_column():
    seen = set()
    for seed in range(30):
        config = Fabrication((2, 3), (0.25, 0.5), typo_share=0.0)
        one, two, common = fabricate_table_pair(rng(seed), WIDE, config)
        assert len(common) in (2, 3) and set(one.columns) & set(two.columns) == set(common)
        assert one.columns[: len(common)] == two.columns[: len(common)] == common
        rest = [c for c in WIDE.columns if c not in common]
        assert one.columns[len(common) :] == tuple(rest[: len(rest) // 2])
        assert two.columns[len(common) :] == tuple(rest[len(rest) // 2 :])
        name = next(c for c in common if c != "k")
        a, b = one[name], two[name]
        shared = set(a) & set(b)
        assert len(shared) in (10, 20) and len(a) > len(shared) < len(b) and set(a) | set(b) == set(WIDE[name])
        assert a[: len(shared)] == b[: len(shared)] == WIDE[name][: len(shared)]
        assert (
            a == WIDE[name][: one.rows] and one.source == two.source == "w" and one.rows + two.rows == 40 + len(shared)
        )
        seen |= {(len(shared), len(common), one.rows)}
    assert {s for s, _, _ in seen} == {10, 20} and {n for _, n, _ in seen} == {2, 3}
    assert len({r for _, _, r in seen}) > 8
    # the cut lies anywhere that leaves each table a row of its own
    small = make_table("s", {"a": list("pqrs")})
    cuts = {fabricate_table_pair(rng(s), small, Fabrication((1, 1), (0.25,), 0.0))[0].rows for s in range(40)}
    assert cuts == {2, 3}


def test_common_columns_by_distinct_values_or_at_random():
    config = Fabrication((6, 6), (0.5,), typo_share=0.0)
    picked = [fabricate_table_pair(rng(s), WIDE, config)[2] for s in range(40)]
    distinct = sum("k" not in names and names == tuple("abcdef") for names in picked)
    assert 10 < distinct < 35 and any("k" in names for names in picked)
    whole = fabricate_table_pair(rng(), make_table("t", {"a": "xyzw"}), Fabrication((3, 5), (0.5,)))
    assert whole[2] == ("a",)


def test_typos_reach_the_overlap_or_all_rows_of_the_second_table():
    words = make_table("w", {c: [f"{c} number {i} of many" for i in range(20)] for c in "abc"})
    for cascade in (0.0, 1.0):
        one, two, common = fabricate_table_pair(rng(4), words, Fabrication((1, 1), (0.5,), 1.0, cascade))
        clean = words[common[0]]
        kept = [*clean[:10], *clean[one.rows :]]
        changed = [a != b for a, b in zip(kept, two[common[0]], strict=True)]
        assert changed == [True] * (len(kept) if cascade else 10) + [False] * (0 if cascade else len(kept) - 10)
        assert one[common[0]] == clean[: one.rows]
        assert all(set(two[c]) <= set(words[c]) for c in two.columns if c not in common)
    dirty = [fabricate_table_pair(rng(s), words, Fabrication((1, 1), (0.5,), 0.3)) for s in range(200)]
    share = np.mean([not set(two[names[0]]) <= set(words[names[0]]) for _, two, names in dirty])
    assert 0.2 < share < 0.4


def test_pairs_of_a_repository_are_known_within_a_pair_only():
    tables = [WIDE, make_table("v", {"x": [f"{i}x" for i in range(12)], "y": [f"{i}y" for i in range(12)]})]
    made = fabricate_repository(tables, Fabrication((1, 2), (0.5,)), 2, 3)
    names, table_of = column_names(made.tables), column_tables(made.tables)
    assert len(made.tables) == 8 and len({t.name for t in made.tables}) == 8
    known = {tuple(p) for p in made.joins.tolist()} | {tuple(p) for p in made.non_joins.tolist()}
    expected = {
        (u, v) for u in range(len(names)) for v in range(len(names))
        if table_of[u] % 2 == 0 and table_of[v] == table_of[u] + 1
    }  # fmt: skip
    assert known == expected and len(known) == len(made.joins) + len(made.non_joins)
    assert all(names[u][1] == names[v][1] for u, v in made.joins)
    assert all(names[u][1] != names[v][1] for u, v in made.non_joins)
    again = fabricate_repository(tables, Fabrication((1, 2), (0.5,)), 2, 3)
    assert again.tables == made.tables
    assert fabricate_repository(tables, Fabrication((1, 2), (0.5,)), 2, 4).tables != made.tables


def test_tables_that_cannot_be_split():
    short = make_table("short", {"a": ["1", "2"]})
    with pytest.raises(DataError, match="short: 1 rows are too few to split at overlaps"):
        fabricate_table_pair(rng(), make_table("short", {"a": ["1"]}), Fabrication())
    # two rows: overlaps below one half round to no shared row
    one, two, _ = fabricate_table_pair(rng(), short, Fabrication(overlaps=(0.1, 0.9), typo_share=1.0))
    assert one["a"] == ("1",) and two["a"] == ("2",)
    with pytest.warns(UserWarning, match="too few to split.*the table is left out"):
        made = fabricate_repository([WIDE, make_table("s", {"a": ["1"]})], Fabrication(overlaps=(0.5,)))
    assert len(made.tables) == 2
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="no table has enough rows"):
        fabricate_repository([make_table("s", {"a": ["1"]})])
    # a column that lost all its values is in no pair
    sparse = make_table("s", {"a": [*"pq", *[None] * 8], "b": [str(i) for i in range(10)]})
    made = fabricate_repository([sparse], Fabrication((2, 2), (0.0,), 0.0), 20, 0)
    cells = [c for t in made.tables for c in t.cells]
    pairs = np.concatenate([made.joins, made.non_joins])
    assert all(any(v is not None for v in cells[i]) for i in pairs.ravel()) and len(pairs) < 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"common": (0, 2)}, r"common must be a range from 1 up, got 0 .. 2"),
        ({"common": (3, 2)}, "common must be a range"),
        ({"overlaps": (1.0,)}, r"overlaps are shares of the rows in \[0, 1\)"),
        ({"overlaps": ()}, "overlaps are shares"),
        ({"typo_share": 1.5}, r"typo_share must be in \[0, 1\], got 1.5"),
        ({"coverage": 101}, r"coverage must be in \[0, 100\]"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(DataError, match=message):
        Fabrication(**change)
    with pytest.raises(DataError, match="iterations must be at least 1"):
        fabricate_repository([WIDE], iterations=0)


def test_the_stand_in_knows_its_joins():
    made = joinable_repository(1)
    sources = {t.name: t for t in source_tables(1)}
    assert len(sources) == 15 and all(t.rows == 120 and 5 <= len(t.columns) <= 6 for t in sources.values())
    assert len(made.tables) == 30 and {t.source for t in made.tables} == set(sources)
    owner = [(t.source, c) for t in made.tables for c in t.columns]
    table_of = column_tables(made.tables)
    joins = {tuple(p) for p in made.joins.tolist()}
    for u in range(len(owner)):
        for v in range(u + 1, len(owner)):
            if table_of[u] == table_of[v]:
                assert (u, v) not in joins
                continue
            a, b = owner[u], owner[v]
            alike = a[1] == b[1] and a[1] in DOMAINS[:9]
            alike = alike and bool(set(sources[a[0]][a[1]]) & set(sources[b[0]][b[1]]))
            assert ((u, v) in joins) == (a == b or alike)
    assert len(joins) + len(made.non_joins) == sum(
        table_of[u] != table_of[v] for u in range(len(owner)) for v in range(u + 1, len(owner))
    )
    assert made.info["fabricated"] + made.info["across_sources"] == len(joins) and made.info["fabricated"] > 20
    assert joinable_repository(1).tables == made.tables != joinable_repository(2).tables
    clean, dirty = joinable_repository(1, 0.0), joinable_repository(1, 1.0)
    inside = lambda r: np.mean([set(c) <= set(sources[t.source][n]) for t in r.tables for n, c in  # noqa: E731
                                zip(t.columns, t.cells, strict=True)])  # fmt: skip
    assert inside(clean) == 1 > inside(made) > inside(dirty)


def test_bundled_sets():
    tables = bundled_tables()
    assert [(t.name, t.rows, len(t.columns)) for t in tables] == [
        ("iris", 150, 4),
        ("wine", 178, 13),
        ("diabetes", 442, 10),
    ]
    made = joinable_repository(0, sources=tables)
    names = column_names(made.tables)
    assert len(made.joins) >= 4 and all(names[u][1] == names[v][1] for u, v in made.joins)
