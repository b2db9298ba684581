"""User-item interactions: readers, splits, and a low-rank generator with known ground truth.

Two layouts are read: CSV/TSV with a header (``user,item[,rating][,timestamp]``, any order, the delimiter is found), and
LightGCN's lines ``user item item ...``, one file or a folder with ``train.txt`` and ``test.txt``.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.stream import DataError

NAMES = {
    "user": ("user", "user_id", "userid", "uid", "u"),
    "item": ("item", "item_id", "itemid", "iid", "i", "movie", "movie_id", "movieid", "sid"),
    "rating": ("rating", "ratings", "score", "value", "user_rating"),
    "timestamp": ("timestamp", "time", "ts", "date"),
}
"""Header names that are understood, lower case."""


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Interactions with ids remapped to ``0..n-1``.

    Attributes:
      user, item: i32 ``[N]``.
      user_ids, item_ids: the original ids, by new id.
      rating: f32 ``[N]`` or None.
      timestamp: f64 ``[N]`` or None.
      test: bool ``[N]`` or None: interactions that the source itself holds out.
    """

    user: np.ndarray
    item: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    rating: np.ndarray | None = None
    timestamp: np.ndarray | None = None
    test: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.item_ids)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_interactions(path: str | Path) -> Interactions:
    """Reads a file or a LightGCN folder.

    Raises:
      DataError: nothing there, or a line that cannot be read; names file, line and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    lines = _lines(path)
    first = next((text for _, text in lines), "")
    if re.fullmatch(r"\s*\d+(\s+\d+)*\s*", first):
        users, items = _lightgcn(path, lines)
        return _remap(users, items)
    return _read_table(path, lines)


def _read_folder(path: Path) -> Interactions:
    parts = []
    for name in ("train.txt", "test.txt"):
        file = path / name
        if not file.is_file():
            raise DataError(f"{path}: expected a LightGCN folder with train.txt and test.txt; {name} is missing")
        parts.append(_lightgcn(file, _lines(file)))
    (tu, ti), (eu, ei) = parts
    held = np.r_[np.zeros(len(tu), bool), np.ones(len(eu), bool)]
    users, items = np.concatenate([tu, eu]), np.concatenate([ti, ei])
    # here ids are numbers by agreement: remapped in numeric order, so a complete range stays as it is
    return _remap(users, items, test=held)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected user-item interactions (CSV, TSV or LightGCN lines)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: is empty; expected a header `user,item` or lines `user item item ...`")
    return lines


def _lightgcn(path: Path, lines) -> tuple[np.ndarray, np.ndarray]:
    users, items = [], []
    for n, line in lines:
        words = line.split()
        for word in words:
            if not re.fullmatch(r"\d{1,18}", word):
                raise DataError(f"{path}, line {n}: expected `user item item ...` as whole numbers >= 0, got {word!r}")
        # a user alone on a line has no interaction (the published files contain such lines)
        users += [int(words[0])] * (len(words) - 1)
        items += [int(w) for w in words[1:]]
    if not users:
        raise DataError(f"{path}: no line names an item; expected `user item item ...`")
    return np.asarray(users), np.asarray(items)


def _read_table(path: Path, lines) -> Interactions:
    n, header = lines[0]
    delimiter = next((d for d in ("\t", "::", ",", ";", "|") if d in header), None)
    columns = [] if delimiter is None else [_clean(c) for c in header.split(delimiter)]
    # TFDS and recbole write names like `user_id:token`
    columns = [c.split(":")[0] for c in columns]
    at = {k: next((j for j, c in enumerate(columns) if c in names), None) for k, names in NAMES.items()}
    if at["user"] is None or at["item"] is None:
        raise DataError(
            f"{path}, line {n}: expected a header with `user` and `item` (and perhaps `rating`, `timestamp`), "
            f"or LightGCN lines `user item item ...`; got {header.strip()[:80]!r}"
        )
    found: dict[str, list] = {k: [] for k, j in at.items() if j is not None}
    for n, line in lines[1:]:
        row = line.split(delimiter) if len(delimiter) > 1 else next(csv.reader([line], delimiter=delimiter))
        if len(row) != len(columns):
            raise DataError(f"{path}, line {n}: expected {len(columns)} fields ({', '.join(columns)}), got {len(row)}")
        for key in found:
            value = row[at[key]].strip()
            if not value:
                raise DataError(f"{path}, line {n}: the field {columns[at[key]]!r} is empty; expected a value")
            if key in ("rating", "timestamp"):
                value = _number(value, path, n, columns[at[key]])
            found[key].append(value)
    if not found["user"]:
        raise DataError(f"{path}: has a header but no interactions; expected lines {delimiter.join(columns)}")
    extra = {k: np.asarray(found[k], t) for k, t in (("rating", np.float32), ("timestamp", np.float64)) if k in found}
    return _remap(_ids(found["user"]), _ids(found["item"]), **extra)


def _clean(name: str) -> str:
    return name.strip().strip("\"'").lower()


def _number(text: str, path: Path, n: int, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise DataError(f"{path}, line {n}: {column} must be a finite number, got {text!r}")
    return value


def _ids(values: list[str]) -> np.ndarray:
    # numbers sort as numbers when all of them are
    return (
        np.asarray([int(v) for v in values])
        if all(re.fullmatch(r"\d{1,18}", v) for v in values)
        else np.asarray(values)
    )


def _remap(users, items, rating=None, timestamp=None, test=None) -> Interactions:
    user_ids, user = np.unique(users, return_inverse=True)
    item_ids, item = np.unique(items, return_inverse=True)
    # an interaction told twice is one: the first stays (a train row rather than the same test row)
    _, first = np.unique(user.astype(np.int64) * len(item_ids) + item, return_index=True)
    keep = np.sort(first)
    take = lambda x: None if x is None else np.asarray(x)[keep]  # noqa: E731
    return Interactions(
        user[keep].astype(np.int32), item[keep].astype(np.int32), user_ids, item_ids,
        take(rating), take(timestamp), take(test),
    )  # fmt: skip


def filter_counts(data: Interactions, min_user: int = 1, min_item: int = 1) -> Interactions:
    """Drops users and items with fewer interactions, again and again until none is left to drop; remaps ids.

    Raises:
      DataError: nothing is left.
    """
    keep = np.ones(len(data.user), bool)
    while True:
        users = np.bincount(data.user[keep], minlength=data.num_users)
        items = np.bincount(data.item[keep], minlength=data.num_items)
        new = keep & (users[data.user] >= min_user) & (items[data.item] >= min_item)
        if (new == keep).all():
            break
        keep = new
    if not keep.any():
        raise DataError(f"no interaction is left with at least {min_user} per user and {min_item} per item; lower them")
    take = lambda x: None if x is None else x[keep]  # noqa: E731
    return _remap(
        data.user_ids[data.user[keep]], data.item_ids[data.item[keep]],
        take(data.rating), take(data.timestamp), take(data.test),
    )  # fmt: skip


# --- splitting --------------------------------------------------------------------------------------------------------


def random_holdout(data: Interactions, seed: int, fraction: float = 0.2) -> np.ndarray:
    """Holds out ``round(fraction * n_u)`` random interactions of each user, never all of them.

    Returns:
      bool ``[N]``, True for held-out interactions.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction must be in (0, 1), got {fraction}")
    rank, count = _rank_in_user(data.user, np.random.default_rng(seed).random(len(data.user)))
    return rank < np.minimum(np.round(fraction * count), count - 1)


def leave_two_out(data: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """The last interaction of each user is for test, the one before it for validation, by timestamp or else file order.

    Users with fewer than three interactions keep them all for training.

    Returns:
      (validation, test): bool ``[N]`` each.
    """
    time = np.arange(len(data.user)) if data.timestamp is None else data.timestamp
    rank, count = _rank_in_user(data.user, time)
    enough = count >= 3
    return enough & (rank == count - 2), enough & (rank == count - 1)


def held_out_users(
    data: Interactions, seed: int, validation: int, test: int, fold_in: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """Whole users for validation and test; of each, a share ``fold_in`` of its items is given and the rest predicted.

    Returns:
      ``group`` ``[users]``: 0 train, 1 validation, 2 test; ``given`` bool ``[N]``: True for every training interaction
      and for what a held-out user's profile is made of.

    Raises:
      DataError: more users held out than there are, or fold_in outside (0, 1).
    """
    if validation < 0 or test < 0 or validation + test >= data.num_users:
        raise DataError(f"cannot hold out {validation} + {test} of {data.num_users} users; leave some for training")
    if not 0 < fold_in < 1:
        raise DataError(f"fold_in must be in (0, 1), got {fold_in}")
    rng = np.random.default_rng(seed)
    group = np.zeros(data.num_users, np.int32)
    order = rng.permutation(data.num_users)
    group[order[:validation]], group[order[validation : validation + test]] = 1, 2
    rank, count = _rank_in_user(data.user, rng.random(len(data.user)))
    return group, (group[data.user] == 0) | (rank < np.round(fold_in * count))


def _rank_in_user(user: np.ndarray, by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # each interaction's rank among its user's, by value (file order on ties), and that user's number of them
    order = np.lexsort((np.arange(len(user)), by, user))
    count = np.bincount(user)
    start = np.cumsum(count) - count
    rank = np.empty(len(user), np.int64)
    rank[order] = np.arange(len(user)) - start[user[order]]
    return rank, count[user]


# --- as a data set ----------------------------------------------------------------------------------------------------


def padded_lists(user: np.ndarray, item: np.ndarray, num_users: int) -> np.ndarray:
    """Each user's items in ascending order, i32 ``[num_users, longest]`` (at least one column), padded with -1."""
    order = np.lexsort((item, user))
    rank, _ = _rank_in_user(user, item) if len(user) else (np.zeros(0, int), None)
    width = int(rank.max()) + 1 if len(user) else 1
    table = np.full((num_users, width), -1, np.int32)
    table[user[order], rank[order]] = item[order]
    return table


def as_dataset(
    data: Interactions, test: np.ndarray, validation: np.ndarray | None = None, name: str = "interactions"
) -> Dataset:
    """Interactions with held-out parts as a data set.

    Splits: ``train`` has ``user``, ``item`` ``[N]``; ``profiles`` has ``user`` and ``items`` ``[U, P]`` (each user's
    training items, for autoencoders); ``validation`` and ``test`` have one row per user with something held out:
    ``user``, ``seen`` (its training items, left out of the ranking; at test the validation items too) and ``relevant``.
    Lists are padded with -1.  ``info["seen"]`` is every user's training list, for negative sampling.

    Raises:
      DataError: nothing to train on, nothing held out, or a user who has every item (no negative exists).
    """
    validation = np.zeros(len(data.user), bool) if validation is None else validation
    train = ~(test | validation)
    if not train.any() or not test.any():
        counts = f"{train.sum()} training and {test.sum()} test interactions"
        raise DataError(f"{name}: the split leaves {counts}; both are needed")
    seen = padded_lists(data.user[train], data.item[train], data.num_users)
    full = (seen >= 0).sum(1) >= data.num_items
    if full.any():
        who = data.user_ids[np.flatnonzero(full)[0]]
        raise DataError(f"user {who} has interacted with all {data.num_items} items, so it has no negatives; drop it")
    users = np.arange(data.num_users, dtype=np.int32)
    some = (seen >= 0).any(1)
    splits = {
        "train": {"user": data.user[train], "item": data.item[train]},
        "profiles": {"user": users[some], "items": seen[some]},
    }
    for part, held, known in (("validation", validation, train), ("test", test, train | validation)):
        if held.any():
            relevant = padded_lists(data.user[held], data.item[held], data.num_users)
            hide = padded_lists(data.user[known], data.item[known], data.num_users)
            rows = (relevant >= 0).any(1)
            splits[part] = {"user": users[rows], "seen": hide[rows], "relevant": relevant[rows]}
    info = {
        "num_users": data.num_users,
        "num_items": data.num_items,
        "seen": seen,
        "user_ids": data.user_ids,
        "item_ids": data.item_ids,
    }
    return Dataset(name, splits, info)


def load_interactions(
    path: str | Path, split: str = "random", seed: int = 0, min_user: int = 1, min_item: int = 1
) -> Dataset:
    """Reads, filters, splits: ``"random"`` (a fifth of each user), ``"leave_two_out"``, or the source's own test set.

    Raises:
      DataError: unreadable data or an unknown split.
    """
    if split not in ("random", "leave_two_out"):
        raise DataError(f"split must be 'random' or 'leave_two_out', got {split!r}")
    data = read_interactions(path)
    if min_user > 1 or min_item > 1:
        data = filter_counts(data, min_user, min_item)
    name = Path(path).stem
    if data.test is not None:
        return as_dataset(data, data.test, name=name)
    if split == "random":
        return as_dataset(data, random_holdout(data, seed), name=name)
    validation, test = leave_two_out(data)
    return as_dataset(data, test, validation, name)


# --- generator --------------------------------------------------------------------------------------------------------


def low_rank_interactions(
    seed: int,
    users: int = 300,
    items: int = 400,
    rank: int = 8,
    train: int = 22,
    test: int = 8,
    sharpness: float = 3.0,
) -> Dataset:
    """Implicit feedback from a low-rank truth: each user draws items without replacement from a softmax of affinities.

    Affinities are ``sharpness * (p_u . q_i) / sqrt(rank)`` with standard normal factors; ``train + test`` distinct
    items are drawn for each user (Gumbel top-k), of which a random ``test`` are held out.

    Returns:
      A data set as :func:`as_dataset` makes it; ``info`` holds ``user_factors``, ``item_factors`` and ``affinity``.

    Raises:
      DataError: more interactions per user than items, or a size below 1.
    """
    if min(users, items, rank, train, test) < 1 or train + test >= items:
        raise DataError(
            f"users, items, rank, train and test must be at least 1 and train + test below items; "
            f"got {users}, {items}, {rank}, {train}, {test}"
        )
    rng = np.random.default_rng(seed)
    p, q = rng.standard_normal((users, rank)), rng.standard_normal((items, rank))
    affinity = sharpness * (p @ q.T) / np.sqrt(rank)
    drawn = np.argsort(-(affinity + rng.gumbel(size=affinity.shape)), axis=1)[:, : train + test]
    drawn = rng.permuted(drawn, axis=1)
    user = np.repeat(np.arange(users, dtype=np.int32), train + test)
    held = np.tile(np.arange(train + test) >= train, users)
    data = Interactions(user, drawn.ravel().astype(np.int32), np.arange(users), np.arange(items))
    made = as_dataset(data, held, name="low_rank")
    truth = {"user_factors": p, "item_factors": q, "affinity": affinity.astype(np.float32)}
    return dataclasses.replace(made, info={**made.info, **truth})


def popularity(items: np.ndarray, num_items: int) -> np.ndarray:
    """How often each item occurs in training, f32 ``[num_items]``: the recommender that learns nothing."""
    return np.bincount(np.asarray(items), minlength=num_items).astype(np.float32)
