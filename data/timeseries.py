"""Time series: the UCR/UEA archive's ``.ts`` files, a generator with known bad pairs, and digits read as series.

Series are float32 ``[N, T, C]``: examples, time, channels.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from data.dataset import Dataset
from data.stream import DataError

PAIR_TYPES = ("normal", "noisy", "faulty")
"""Names of the values of the field ``pair`` of :func:`bad_pairs`."""

MISSING = ("?", "nan")


@dataclasses.dataclass(frozen=True)
class Series:
    """What a ``.ts`` file holds.

    Attributes:
      x: f32 ``[N, T, C]``.
      label: i32 ``[N]``, places in ``classes``.
      classes: class names in the order of the file's header.
    """

    x: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]


def read_ts(path: str | Path) -> Series:
    """Reads a ``.ts`` file of the UCR/UEA archive.

    Lines that begin with ``#`` are comments; ``@`` lines are a header that ends with ``@data``; then follows one series
    a line, its channels separated by ``:``, the values of a channel by commas, its class name last.

    Raises:
      DataError: a file that is missing or not of this form, or holds what a static array cannot: series of unequal
        length, missing values, time stamps.  The message names the file, the line and what was expected.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise DataError(f"{path}: cannot be read ({why}); expected a .ts file of the UCR/UEA archive") from None
    header, first = _read_header(path, lines)
    classes = _class_names(path, header)
    places = {name: i for i, name in enumerate(classes)}
    rows: list[np.ndarray] = []
    labels: list[int] = []
    for number, line in enumerate(lines[first:], start=first + 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        *channels, name = line.split(":")
        if not channels:
            raise DataError(
                f"{path}:{number}: no ':' in the line; expected channels and a class name, separated by ':'"
            )
        name = name.strip()
        if name not in places:
            raise DataError(f"{path}:{number}: unknown class {name!r}; expected one of {', '.join(classes)}")
        series = [_values(path, number, c, text) for c, text in enumerate(channels, start=1)]
        lengths = [len(c) for c in series]
        if len(set(lengths)) != 1:
            raise DataError(f"{path}:{number}: channels of {lengths} values; expected all of one length")
        stacked = np.stack(series, axis=1)
        _check_shape(path, number, header, stacked, rows)
        rows.append(stacked)
        labels.append(places[name])
    if not rows:
        raise DataError(f"{path}:{len(lines)}: no series after @data; expected one a line")
    return Series(np.stack(rows), np.asarray(labels, np.int32), classes)


def _read_header(path: Path, lines: list[str]) -> tuple[dict[str, tuple[str, int]], int]:
    # tag -> (value, line number), and the place of the first line of data
    header: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not line.startswith("@"):
            raise DataError(f"{path}:{number}: data before an @data line; expected header lines that begin with '@'")
        tag, _, value = line[1:].partition(" ")
        if tag.lower() == "data":
            return header, number
        header[tag.lower()] = (value.strip(), number)
    raise DataError(f"{path}:{max(1, len(lines))}: the file ends without an @data line; expected one after the header")


def _class_names(path: Path, header: Mapping[str, tuple[str, int]]) -> tuple[str, ...]:
    stamps, number = header.get("timestamps", ("false", 0))
    if stamps.lower() == "true":
        raise DataError(f"{path}:{number}: series with time stamps; expected '@timeStamps false' and plain values")
    value, number = header.get("classlabel", ("", 1))
    words = value.split()
    if len(words) < 2 or words[0].lower() != "true":
        raise DataError(f"{path}:{number}: no class names; expected a header line '@classLabel true NAME NAME ...'")
    return tuple(words[1:])


def _values(path: Path, number: int, channel: int, text: str) -> np.ndarray:
    tokens = text.split(",")
    try:
        values = np.asarray(tokens, np.float32)
    except ValueError:
        values = None
    if values is not None and np.isfinite(values).all():
        return values
    for place, token in enumerate(tokens, start=1):
        where = f"{path}:{number}: channel {channel}, value {place}"
        if token.strip().lower() in MISSING:
            raise DataError(f"{where}: {token.strip()!r} is a missing value; expected a number, so fill it in first")
        try:
            finite = np.isfinite(np.float32(token))
        except ValueError:
            finite = False
        if not finite:
            raise DataError(f"{where}: {token.strip()!r}; expected a finite number")
    raise DataError(f"{path}:{number}: channel {channel} cannot be read; expected numbers separated by commas")


def _check_shape(path: Path, number: int, header: Mapping, series: np.ndarray, before: list[np.ndarray]) -> None:
    length, channels = series.shape
    for tag, found, what in (("serieslength", length, "values"), ("dimensions", channels, "channels")):
        value, line = header.get(tag, ("", 0))
        if value.isdigit() and int(value) != found:
            raise DataError(f"{path}:{number}: {found} {what} a series; expected {value}, as line {line} says")
    if before and before[0].shape != series.shape:
        wanted = f"{before[0].shape[0]} and {before[0].shape[1]}"
        raise DataError(
            f"{path}:{number}: a series of {length} steps and {channels} channels; expected {wanted} as the first has "
            "(series of unequal length are not supported: cut or pad them)"
        )


def find_problems(path: str | Path) -> dict[str, Path]:
    """The archive's problems in a folder, ``{NAME: folder with NAME_TRAIN.ts}``, one level of sub-folders included.

    Raises:
      DataError: no such folder, or none in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with NAME_TRAIN.ts and NAME_TEST.ts")
    files = [*folder.glob("*_TRAIN.ts"), *folder.glob("*/*_TRAIN.ts")]
    if not files:
        raise DataError(f"{folder}: holds no problem; expected NAME_TRAIN.ts and NAME_TEST.ts of the UCR/UEA archive")
    return {f.name.removesuffix("_TRAIN.ts"): f.parent for f in sorted(files)}


def load_ucr(
    path: str | Path, problem: str | None = None, normalise: Literal["none", "series", "train"] = "series"
) -> Dataset:
    """A problem of the UCR/UEA archive with its own train and test splits.

    Args:
      path: a folder with ``NAME_TRAIN.ts`` and ``NAME_TEST.ts`` (or with sub-folders that hold them).
      problem: its name; may be left out if there is only one.
      normalise: see :func:`z_normalise`; ``"train"`` uses each channel's statistics over the training split.

    Returns:
      Splits ``train`` and ``test`` of ``x`` f32 ``[N, T, C]`` and ``label`` i32 ``[N]``; ``info`` has ``num_classes``
      and ``classes``.

    Raises:
      DataError: a file is missing or wrong, or several problems lie there and none is named.
    """
    problems = find_problems(path)
    if problem is None:
        if len(problems) > 1:
            raise DataError(
                f"{path}: holds {len(problems)} problems; name one of {', '.join(problems)} (--data.split NAME)"
            )
        problem = next(iter(problems))
    if problem not in problems:
        near = difflib.get_close_matches(problem, problems, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(problems)}"
        raise DataError(f"{path}: holds no problem {problem!r}; {hint}")
    train_file, test_file = (problems[problem] / f"{problem}_{part}.ts" for part in ("TRAIN", "TEST"))
    train, test = read_ts(train_file), read_ts(test_file)
    if test.x.shape[1:] != train.x.shape[1:]:
        raise DataError(
            f"{test_file}: series of {test.x.shape[1]} steps and {test.x.shape[2]} channels; "
            f"expected {train.x.shape[1]} and {train.x.shape[2]} like {train_file.name}"
        )
    unknown = [c for c in test.classes if c not in train.classes]
    if unknown:
        raise DataError(f"{test_file}: classes {', '.join(unknown)}; expected those of {train_file.name}")
    places = np.asarray([train.classes.index(c) for c in test.classes], np.int32)
    splits = {
        "train": {"x": z_normalise(train.x, normalise, train.x), "label": train.label},
        "test": {"x": z_normalise(test.x, normalise, train.x), "label": places[test.label]},
    }
    return Dataset(problem, splits, {"num_classes": len(train.classes), "classes": train.classes})


def z_normalise(
    x: np.ndarray, how: Literal["none", "series", "train"] = "series", train: np.ndarray | None = None
) -> np.ndarray:
    """Series shifted and scaled to mean 0 and standard deviation 1; constant ones become 0.

    Args:
      x: ``[N, T, C]``.
      how: ``"series"``: each series and channel by itself; ``"train"``: each channel by its statistics over ``train``;
        ``"none"``: as they are.
      train: ``[M, T, C]``, for ``"train"``; ``x`` itself if left out.

    Raises:
      ValueError: an unknown ``how``.
    """
    if how not in ("none", "series", "train"):
        raise ValueError(f"normalise must be 'none', 'series' or 'train', got {how!r}")
    if how == "none":
        return x.astype(np.float32)
    source, axes = (x, (1,)) if how == "series" else (x if train is None else train, (0, 1))
    source = source.astype(np.float64)
    mean, spread = source.mean(axes, keepdims=True), source.std(axes, keepdims=True)
    flat = spread <= 1e-8 * np.maximum(1.0, np.abs(mean))
    return np.where(flat, 0.0, (x - mean) / np.where(flat, 1.0, spread)).astype(np.float32)


def bad_pairs(
    seed: int = 0,
    num_train: int = 600,
    num_test: int = 600,
    steps: int = 64,
    classes: int = 6,
    noisy: float = 0.1,
    faulty: float = 0.1,
    noise: float = 0.7,
) -> Dataset:
    """Sinusoids whose positive pairs are good or bad in a known way (dbpm brief, section Backbones, data).

    Class k has its own frequency; an instance has a random phase, amplitude and noise of standard deviation ``noise``.
    Of the training instances a share is *noisy* (a tenth of the signal, all the rest noise, in both views alike) and a
    share *faulty* (the second view is made from a series of another class).  Test instances are normal.

    Args:
      seed: of everything.
      num_train, num_test: instances.
      steps: T.
      classes: number of frequencies, at least 2.
      noisy, faulty: shares of the training instances.
      noise: standard deviation of the normal instances' noise; the signal's amplitude is about 1.

    Returns:
      Splits of ``x`` and ``other`` f32 ``[N, T, 1]`` (what the first and the second view are made from; they differ for
      faulty instances only), ``label`` i32 ``[N]`` and ``pair`` i32 ``[N]`` (a place in ``PAIR_TYPES``).

    Raises:
      DataError: shares that are negative or leave no normal instance, or too few classes.
    """
    if classes < 2:
        raise DataError(f"bad_pairs needs at least 2 classes, got {classes}")
    if min(noisy, faulty) < 0 or noisy + faulty >= 1:
        raise DataError(
            f"the shares of noisy and faulty pairs must be 0 or more and sum below 1, got {noisy} and {faulty}"
        )
    rng = np.random.default_rng([seed, 0xBAD])
    frequencies = 2.0 + 1.5 * np.arange(classes)

    def signal(labels: np.ndarray) -> np.ndarray:
        phase = rng.uniform(0, 2 * np.pi, (len(labels), 1))
        amplitude = rng.uniform(0.7, 1.3, (len(labels), 1))
        return amplitude * np.sin(2 * np.pi * frequencies[labels][:, None] * np.arange(steps) / steps + phase)

    def split(number: int, counts: tuple[int, int]) -> dict[str, np.ndarray]:
        pair = np.zeros(number, np.int32)
        pair[: counts[0]], pair[counts[0] : sum(counts)] = 1, 2
        pair = rng.permutation(pair)
        label = rng.integers(0, classes, number)
        clean = signal(label)
        grain = rng.normal(size=clean.shape)
        scale = np.sqrt(0.5 + noise**2)  # a noisy instance has the energy of a normal one
        x = np.where(pair[:, None] == 1, 0.1 * clean + scale * grain, clean + noise * grain)
        elsewhere = (label + rng.integers(1, classes, number)) % classes
        foreign = signal(elsewhere) + noise * rng.normal(size=clean.shape)
        other = np.where(pair[:, None] == 2, foreign, x)
        fields = {"x": x[..., None].astype(np.float32), "other": other[..., None].astype(np.float32)}
        return {**fields, "label": label.astype(np.int32), "pair": pair}

    counts = (round(noisy * num_train), round(faulty * num_train))
    splits = {"train": split(num_train, counts), "test": split(num_test, (0, 0))}
    info = {"num_classes": classes, "pair_types": PAIR_TYPES, "frequencies": tuple(frequencies.tolist())}
    return Dataset("bad_pairs", splits, info)


def digits_series(seed: int = 0, test_share: float = 0.25) -> Dataset:
    """scikit-learn's 8 x 8 digits, row after row, as series of 64 steps and one channel, scaled to [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.data / 16.0).astype(np.float32)[..., None]
    label = bunch.target.astype(np.int32)
    order = np.random.default_rng([seed, 64]).permutation(len(x))
    test, train = np.split(order, [round(test_share * len(x))])
    splits = {"train": {"x": x[train], "label": label[train]}, "test": {"x": x[test], "label": label[test]}}
    return Dataset("digits_series", splits, {"num_classes": 10})
