"""Interactions: readers, their errors, splits, and the generator's ground truth."""

import numpy as np
import pytest

from data import interactions as ia
from data.stream import DataError


def write(tmp_path, text, name="x.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("d", [",", "\t", ";", "::", "|"])
def test_tables_in_any_delimiter_and_order(tmp_path, d):
    rows = [
        ["Timestamp", "itemId", "user_id", "rating"],
        ["30", "b", "10", "4"],
        ["5", "a", "9", "1.5"],
        ["7", "b", "9", "2"],
    ]
    got = ia.read_interactions(write(tmp_path, "\n".join(d.join(r) for r in rows)))
    assert got.user_ids.tolist() == [9, 10] and got.item_ids.tolist() == ["a", "b"]
    assert got.user.tolist() == [1, 0, 0] and got.item.tolist() == [1, 0, 1]
    assert got.rating.tolist() == [4, 1.5, 2] and got.timestamp.tolist() == [30, 5, 7]
    assert got.user.dtype == np.int32 and got.num_users == 2


def test_quoted_fields_blank_lines_and_duplicates(tmp_path):
    got = ia.read_interactions(write(tmp_path, '\ufeffuser,item\n\n1,"a, b"\n2,c\n1,"a, b"\n'))
    assert got.item_ids.tolist() == ["a, b", "c"] and len(got.user) == 2 and got.rating is None


def test_lightgcn_file_and_folder(tmp_path):
    got = ia.read_interactions(write(tmp_path, "0 3 1\n2 3\n1\n", "train.txt"))
    assert got.user_ids.tolist() == [0, 2] and got.item_ids.tolist() == [1, 3]
    assert list(zip(got.user.tolist(), got.item.tolist(), strict=True)) == [(0, 1), (0, 0), (1, 1)]
    assert got.test is None
    write(tmp_path, "0 5\n2 1\n", "test.txt")
    got = ia.read_interactions(tmp_path)
    assert got.test.tolist() == [False, False, False, True, True]
    made = ia.load_interactions(tmp_path)
    assert made["test"]["user"].tolist() == [0, 1]
    assert made["test"]["seen"].tolist() == [[0, 1], [1, -1]] and made["test"]["relevant"].tolist() == [[2], [0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.csv: is empty"),
        ("user,thing\n1,2\n", r"x.csv, line 1: expected a header with `user` and `item`.*got 'user,thing'"),
        ("hello\n", "line 1: expected a header"),
        ("user,item\n1,2\n1,2,3\n", r"x.csv, line 3: expected 2 fields \(user, item\), got 3"),
        ("user,item\n\n1,\n", "line 3: the field 'item' is empty"),
        ("user,item,rating\n1,2,good\n", "line 2: rating must be a finite number, got 'good'"),
        ("user,item,timestamp\n1,2,nan\n", "line 2: timestamp must be a finite number, got 'nan'"),
        ("user,item\n", "has a header but no interactions"),
        ("0 1 2\n3 x\n", "x.csv, line 2: expected `user item item ...` as whole numbers >= 0, got 'x'"),
        ("0 1 -2\n", "line 1"),
        ("0\n1\n", "no line names an item"),
    ],
)
def test_malformed_files_name_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        ia.read_interactions(write(tmp_path, text))


def test_missing_binary_and_incomplete_sources(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        ia.read_interactions(tmp_path / "absent.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read as text"):
        ia.read_interactions(tmp_path / "b.csv")
    with pytest.raises(DataError, match="train.txt is missing"):
        ia.read_interactions(tmp_path)
    with pytest.raises(DataError, match="split must be"):
        ia.load_interactions(write(tmp_path, "user,item\n1,2\n"), split="no")


def some(seed=0, users=20, items=30):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(1, 12, users))
    item = np.concatenate([rng.permutation(items)[: (user == u).sum()] for u in range(users)])
    order = rng.permutation(len(user))
    time = rng.permutation(len(user)).astype(float)
    return ia.Interactions(
        user[order].astype(np.int32), item[order].astype(np.int32), np.arange(users), np.arange(items), timestamp=time
    )


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_random_holdout_takes_a_share_of_each_user_and_never_all(share):
    data = some()
    held = ia.random_holdout(data, 0, share)
    for u in range(20):
        n = (data.user == u).sum()
        assert held[data.user == u].sum() == min(round(share * n), n - 1)
    held = ia.random_holdout(data, 0, 0.3)
    assert (ia.random_holdout(data, 0, 0.3) == held).all() and (ia.random_holdout(data, 1, 0.3) != held).any()
    with pytest.raises(DataError, match="fraction must be in"):
        ia.random_holdout(data, 0, 1.0)


def test_leave_two_out_takes_the_last_two_by_time():
    data = some()
    validation, test = ia.leave_two_out(data)
    for u in range(20):
        mine = np.flatnonzero(data.user == u)
        order = mine[np.argsort(data.timestamp[mine])]
        if len(mine) < 3:
            assert not (validation | test)[mine].any()
        else:
            assert test[mine].sum() == validation[mine].sum() == 1
            assert test[order[-1]] and validation[order[-2]]


def test_held_out_users_fold_in():
    data = some()
    group, given = ia.held_out_users(data, 0, 3, 4, 0.8)
    assert np.bincount(group).tolist() == [13, 3, 4]
    for u in range(20):
        mine = data.user == u
        assert given[mine].sum() == (mine.sum() if group[u] == 0 else round(0.8 * mine.sum()))
    with pytest.raises(DataError, match="cannot hold out"):
        ia.held_out_users(data, 0, 10, 10)
    with pytest.raises(DataError, match="fold_in"):
        ia.held_out_users(data, 0, 1, 1, 1.0)


def test_filter_counts_repeats_until_stable():
    user, item = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    data = ia.Interactions(user, item, np.array([7, 8, 9]), np.arange(3))
    kept = ia.filter_counts(data, 2, 2)
    assert kept.user_ids.tolist() == [7, 8] and kept.item_ids.tolist() == [0, 1] and len(kept.user) == 4
    with pytest.raises(DataError, match="no interaction is left"):
        ia.filter_counts(data, 3, 3)


def test_data_set_layout():
    data = some()
    validation, test = ia.leave_two_out(data)
    made = ia.as_dataset(data, test, validation)
    sets = lambda keep, u: set(data.item[keep & (data.user == u)].tolist())  # noqa: E731
    row = lambda x: set(x[x >= 0].tolist())  # noqa: E731
    train = ~(test | validation)
    assert len(made["train"]["user"]) == train.sum()
    for part, held, known in (("validation", validation, train), ("test", test, train | validation)):
        assert made[part]["user"].tolist() == sorted(set(data.user[held].tolist()))
        for u, seen, relevant in zip(*(made[part][k] for k in ("user", "seen", "relevant")), strict=True):
            assert row(relevant) == sets(held, u) and row(seen) == sets(known, u)
    for u in range(20):
        mine = made.info["seen"][u]
        assert row(mine) == sets(train, u) and (np.diff(mine[mine >= 0]) > 0).all()
    for u, items in zip(made["profiles"]["user"], made["profiles"]["items"], strict=True):
        assert row(items) == sets(train, u)
    with pytest.raises(DataError, match="both are needed"):
        ia.as_dataset(data, np.zeros(len(data.user), bool))
    full = ia.Interactions(np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([5, 6]), np.arange(2))
    with pytest.raises(DataError, match="user 5 has interacted with all 2 items"):
        ia.as_dataset(full, np.array([False, False, True]))


def test_low_rank_generator():
    made = ia.low_rank_interactions(0)
    assert made["train"]["user"].shape == (300 * 22,) and made["test"]["relevant"].shape == (300, 8)
    assert made["test"]["seen"].shape == (300, 22) and (made["test"]["seen"] >= 0).all()
    both = np.concatenate([made["test"]["seen"], made["test"]["relevant"]], 1)
    assert all(len(set(r)) == 30 for r in both)
    assert np.linalg.matrix_rank(made.info["affinity"].astype(float), tol=1e-3) == 8
    a = made.info["affinity"]
    chosen = np.take_along_axis(a, both, 1).mean()
    assert (
        chosen > a.mean() + 1.5
        and np.corrcoef(
            np.take_along_axis(a, made["test"]["relevant"], 1).mean(1),
            np.take_along_axis(a, made["test"]["seen"], 1).mean(1),
        )[0, 1]
        > 0.5
    )  # held-out items come from the same truth
    assert made.fingerprint == ia.low_rank_interactions(0).fingerprint != ia.low_rank_interactions(1).fingerprint
    assert ia.popularity(made["train"]["item"], 400).sum() == 6600
    with pytest.raises(DataError, match="train \\+ test below items"):
        ia.low_rank_interactions(0, items=20)
