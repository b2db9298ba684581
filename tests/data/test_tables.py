"""Tables: what is read of a folder of CSV files, what is reported, and every way it can be wrong."""

import numpy as np
import pytest

from data.stream import DataError
from data.tables import (
    Table,
    column_cells,
    column_names,
    column_tables,
    cross_table_pairs,
    labels_of,
    make_table,
    read_joins,
    read_table,
    read_tables,
    write_table,
)


def test_a_folder_is_read_in_order(tmp_path):
    (tmp_path / "b.csv").write_text('\ufeffname,age\nAda,36\n"Byron, Lord",\nNA,nan\nBo\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text("x\n1\n\n 2 \n")
    (tmp_path / "notes.txt").write_text("not a table")
    first, second = read_tables(tmp_path)
    assert (first.name, first.columns, first.cells, first.rows) == ("a.csv", ("x",), (("1", "2"),), 2)
    assert second.columns == ("name", "age") and second["age"] == ("36", None, None, None)
    assert second["name"] == ("Ada", "Byron, Lord", None, "Bo")
    assert column_names([first, second]) == [("a.csv", "x"), ("b.csv", "name"), ("b.csv", "age")]
    assert column_cells([first, second])[1] == second["name"]
    np.testing.assert_array_equal(column_tables([first, second]), [0, 1, 1])
    write_table(tmp_path / "c.csv", second)
    again = read_table(tmp_path / "c.csv")
    assert again.cells == second.cells and again.columns == second.columns


def test_names_that_repeat_or_lack_are_renamed_and_reported(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("x,y,x,,x_2\n1,2,3,4,5\n")
    with pytest.warns(
        UserWarning, match=r"t.csv: renamed columns: x \(place 3\) is called x_3; the unnamed \(place 4\)"
    ):
        table = read_table(file)
    assert table.columns == ("x", "y", "x_3", "column_4", "x_2")
    assert table["x_3"] == ("3",) and table["x_2"] == ("5",)


def test_columns_without_values_are_left_out_and_reported(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("x,empty,y,nulls\n1,,3,NA\n2,,4,null\n")
    with pytest.warns(UserWarning, match="left out columns without any value: empty, nulls"):
        table = read_table(file)
    assert table.columns == ("x", "y") and table["y"] == ("3", "4")


def test_mixed_types_are_cast():
    table = make_table("t", {"a": [1, 2.5, None, float("nan"), "x", True], "b": list("123456")})
    assert table["a"] == ("1", "2.5", None, None, "x", "True") and table.source == "t"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: is empty; expected a header line and rows"),
        (b"a,b\n", "t.csv: has a header but no rows"),
        (b"a,b\n1,2\n\n1,2,3\n", "t.csv, line 4: 3 cells, but the header names 2 columns"),
        (b"a\ncaf\xe9\n", "byte 5 is not utf-8"),
        (b"a,b\n,NA\n", "no column holds any value"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.csv")


def test_another_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a\ncaf\xe9\n")
    assert read_table(tmp_path / "t.csv", "latin-1")["a"] == ("café",)
    with pytest.raises(DataError, match="'klingon' is not a known encoding"):
        read_table(tmp_path / "t.csv", "klingon")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_table(tmp_path / "none.csv")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        read_tables(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"holds 1 .csv file\(s\); joins are discovered between at least two tables"):
        read_tables(tmp_path)


def test_bad_tables():
    with pytest.raises(DataError, match="every column needs its own name"):
        Table("t", ("a", "a"), (("1",), ("2",)))
    with pytest.raises(DataError, match=r"columns differ in length: \[1, 2\]"):
        Table("t", ("a", "b"), (("1",), ("2", "3")))


TABLES = [
    make_table("p", {"a": "xy", "b": "yz"}),
    make_table("q", {"a": "xy"}),
    make_table("r", {"c": "zz", "d": "ab"}),
]


def test_pairs_and_labels(tmp_path):
    pairs = cross_table_pairs(column_tables(TABLES))
    assert pairs.tolist() == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4], [2, 3], [2, 4]]
    (tmp_path / "j.csv").write_text("q,a,p,a\nr,c,p,b\np,a,q,a\n")
    joins = read_joins(tmp_path / "j.csv", TABLES)
    assert joins.tolist() == [[0, 2], [1, 3]] and joins.dtype == np.int32
    assert labels_of(pairs, joins[:, ::-1]).tolist() == [True, False, False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("p,a,q", "line 2: expected file,column,file,column, got 3 cells"),
        ("p,a,z,a", "line 2: there is no table 'z' in the folder"),
        ("p,a,q,b", "line 2: table 'q' has no column 'b'"),
        ("p,a,p,b", "line 2: both columns belong to 'p'"),
    ],
)
def test_bad_labels(tmp_path, line, message):
    (tmp_path / "j.csv").write_text(f"p,a,q,a\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_joins(tmp_path / "j.csv", TABLES)
    (tmp_path / "j.csv").write_text("")
    with pytest.raises(DataError, match="holds no pair"):
        read_joins(tmp_path / "j.csv", TABLES)
    with pytest.raises(DataError, match="cannot be read"):
        read_joins(tmp_path / "none.csv", TABLES)
