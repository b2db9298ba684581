"""Streams of tasks: classes that arrive in sessions, and days that follow one another.

A task names examples by their ids (rows of a split's arrays); ``rows(arrays, ids)`` gathers them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data.dataset import Dataset
from data.stream import DataError


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
      name: for messages and metrics.
      train: ids of the training split's rows to learn from, i64.
      test: ids of the rows to test on: of the test split (classes) or of the same split (days).
      classes: the classes that arrive with it, in order; empty for days.
      start, stop: the time it spans, ``start <= t < stop``; ``None`` for classes.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    classes: tuple[int, ...] = ()
    start: float | None = None
    stop: float | None = None


def rows(arrays: Mapping[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """Those rows of every field."""
    return {name: np.asarray(values)[ids] for name, values in arrays.items()}


def class_incremental(
    dataset: Dataset,
    base: int,
    way: int,
    shot: int | None = None,
    order: Sequence[int] | None = None,
    seed: int | None = 0,
    label: str = "label",
) -> list[Task]:
    """Class-incremental tasks: ``base`` classes first with all their examples, then ``way`` new ones a session.

    Args:
      dataset: with splits ``train`` and ``test``.
      base: classes of the first task; 0 starts with a session of ``way``.
      way: classes of every later session; must divide the rest.
      shot: training examples per class in later sessions (few-shot), chosen by (seed, class) alone; ``None``: all.
      order: the classes in order of arrival; default: permuted by ``seed``.
      seed: of class order and few-shot choice; ``None``: classes ascending, the first ``shot`` examples of each.
      label: the field of integer classes.

    Returns:
      Tasks whose ``test`` ids are the test examples of their own classes.

    Raises:
      DataError: a class without training or test examples, or with fewer than ``shot`` (named); numbers that do not
        add up; an order that repeats, lacks or invents a class.
    """
    labels = {split: _labels(dataset, split, label) for split in ("train", "test")}
    known = np.unique(np.concatenate(list(labels.values())))
    count = dataset.info.get("num_classes")
    classes = np.arange(count) if count is not None else known
    if strange := sorted(set(known.tolist()) - set(classes.tolist())):
        raise DataError(f"{dataset.name}: label {strange[0]} is not one of the {count} classes")
    if order is None:
        order = classes if seed is None else np.random.default_rng([seed, 0]).permutation(classes)
    order = [int(c) for c in order]
    if sorted(order) != sorted(classes.tolist()):
        wrong = set(order) ^ set(classes.tolist()) or {c for c in order if order.count(c) > 1}
        raise DataError(
            f"{dataset.name}: order must name each of its {len(classes)} classes once; see class {min(wrong)}"
        )
    if not 0 <= base <= len(order) or way < 1 or (shot is not None and shot < 1):
        raise DataError(f"base must lie in [0, {len(order)}], way and shot be at least 1; got {base}, {way} and {shot}")
    if (len(order) - base) % way:
        raise DataError(f"{len(order) - base} classes after the base session do not divide into sessions of {way}")
    groups = [order[:base]] * (base > 0) + [order[i : i + way] for i in range(base, len(order), way)]
    tasks = []
    for number, group in enumerate(groups):
        few = shot if number or not base else None
        train = [_choose(dataset.name, "train", labels["train"], c, few, seed) for c in group]
        test = [_choose(dataset.name, "test", labels["test"], c, None, seed) for c in group]
        name = "base" if number == 0 and base else f"session {number}"
        tasks.append(Task(name, np.sort(np.concatenate(train)), np.sort(np.concatenate(test)), tuple(group)))
    return tasks


def streaming_days(
    dataset: Dataset, time_field: str = "timestamp", split: str = "train", seconds: float = 86400.0
) -> list[Task]:
    """Tasks by day: each trains on its day, in order of time, and tests on the next one that has examples.

    Args:
      dataset: has ``split`` with the field ``time_field``: seconds, or NumPy datetimes.
      time_field, split: where the time is.
      seconds: length of a "day".  Days begin at multiples of it (midnight UTC).

    Returns:
      One task per day with examples; the last one's ``test`` is empty.

    Raises:
      DataError: no such field, a time that is missing or not finite (its row is named), a length that is not positive.
    """
    arrays = dataset[split]
    if time_field not in arrays:
        raise DataError(f"{dataset.name}/{split} has no field {time_field!r}; it has {', '.join(sorted(arrays))}")
    if seconds <= 0:
        raise DataError(f"seconds must be positive, got {seconds}")
    time = np.asarray(arrays[time_field])
    if time.ndim != 1 or not len(time):
        raise DataError(f"{dataset.name}/{split}/{time_field} must be a column of times, got shape {list(time.shape)}")
    missing = np.isnat(time) if time.dtype.kind == "M" else ~np.isfinite(time)
    if missing.any():
        raise DataError(f"{dataset.name}/{split}/{time_field}: row {np.flatnonzero(missing)[0]} has no time")
    if time.dtype.kind == "M":
        time = time.astype("datetime64[us]").astype(np.int64) / 1e6
    day = np.floor(time / seconds).astype(np.int64)
    by_time = np.argsort(time, kind="stable")
    days, first = np.unique(day[by_time], return_index=True)
    parts = np.split(by_time, first[1:])
    tasks = []
    for i, (d, ids) in enumerate(zip(days, parts, strict=True)):
        after = parts[i + 1] if i + 1 < len(parts) else ids[:0]
        tasks.append(Task(f"day {d - days[0]}", ids, after, start=float(d * seconds), stop=float((d + 1) * seconds)))
    return tasks


def _labels(dataset: Dataset, split: str, label: str) -> np.ndarray:
    if split not in dataset.splits or label not in dataset[split]:
        raise DataError(f"{dataset.name} needs a field {label!r} in its split {split!r}")
    labels = np.asarray(dataset[split][label])
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{dataset.name}/{split}/{label} must be integers [N], got {labels.dtype}{list(labels.shape)}")
    return labels


def _choose(name: str, split: str, labels: np.ndarray, c: int, shot: int | None, seed: int | None) -> np.ndarray:
    ids = np.flatnonzero(labels == c)
    if not len(ids):
        raise DataError(f"{name}: class {c} has no example in split {split!r}")
    if shot is None:
        return ids
    if len(ids) < shot:
        raise DataError(f"{name}: class {c} has {len(ids)} examples in split {split!r}, fewer than shot = {shot}")
    # by (seed, class) alone: another class order or way draws the same examples
    return ids[:shot] if seed is None else np.random.default_rng([seed, 1, c]).choice(ids, shot, replace=False)
