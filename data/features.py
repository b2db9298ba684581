"""Features of several models for one target data set, from a folder: what a choice among models is made from.

Each model is one file:

* ``NAME.npz`` with ``features`` ``[N, D]`` and ``labels`` ``[N]``; perhaps ``general`` ``[G, D]`` (its features of a
  general set), ``source_logits`` or ``source_probabilities`` ``[N, Z]`` (its own classifier's outputs for the target),
  and ``accuracy`` (after fine-tuning);
* or ``NAME.csv`` with a header: a column ``label``, columns ``source_...`` of probabilities, and all other columns are
  features; ``NAME.general.csv``, features only, holds its general set.

``accuracies.json`` (``{"NAME": 0.93, ...}``) or ``accuracies.csv`` (columns ``model`` and ``accuracy``) may give the
fine-tuned accuracies of some or all models.  Labels are the same target set's everywhere, 0..C-1.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.stream import DataError, arrays_fingerprint

ACCURACY_FILES = ("accuracies.json", "accuracies.csv")
EXPECTED = "one NAME.npz (features, labels) or NAME.csv (label and feature columns) for each model"


@dataclasses.dataclass(frozen=True)
class ModelFeatures:
    """What is known of one model.

    Attributes:
      name: the file's, without its suffix.
      features: float32 or float64 ``[N, D]`` of the target's samples.
      labels: int32 ``[N]``.
      general: ``[G, D]`` of a general set, or ``None``.
      source: ``[N, Z]`` probabilities of the model's own classes, or ``None``.
      accuracy: after fine-tuning on the target, or ``None``.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    general: np.ndarray | None = None
    source: np.ndarray | None = None
    accuracy: float | None = None


def feature_pool(folder: str | Path) -> list[ModelFeatures]:
    """Reads a folder of models' features, by name.

    Raises:
      DataError: no such folder, fewer than two models, a malformed file, labels that skip a class or are of another
        target set than the first model's, values that are not finite, an accuracy of an unknown model; each with file,
        place and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected {EXPECTED}")
    files = [
        f for f in sorted(folder.iterdir())
        if f.suffix in (".npz", ".csv") and f.name not in ACCURACY_FILES and not f.name.endswith(".general.csv")
    ]  # fmt: skip
    if len(files) < 2:
        raise DataError(f"{folder}: holds {len(files)} model(s), a ranking needs two or more; expected {EXPECTED}")
    twice = {f.stem for f in files if [g.stem for g in files].count(f.stem) > 1}
    if twice:
        raise DataError(f"{folder}: {sorted(twice)[0]} is there as .npz and as .csv; keep one")
    pool = [(_read_npz if f.suffix == ".npz" else _read_csv)(f) for f in files]
    first = pool[0]
    for f, model in zip(files, pool, strict=True):
        if not np.array_equal(np.bincount(model.labels), np.bincount(first.labels)):
            raise DataError(
                f"{f}: its labels are not those of {files[0].name} ({len(model.labels)} and {len(first.labels)} "
                "samples, or other counts of a class): models are compared on one target set"
            )
    return given_accuracies(folder, pool)


def given_accuracies(folder: Path, pool: Sequence[ModelFeatures]) -> list[ModelFeatures]:
    """The pool with accuracies from the folder's ``accuracies.json`` or ``accuracies.csv``, if it has one.

    Raises:
      DataError: a malformed file, or a model that is not in the pool.
    """
    found = _accuracies(folder)
    names = [m.name for m in pool]
    for name in found:
        if name not in names:
            raise DataError(f"{folder}: accuracy of {name!r}, which is not among the models {', '.join(names)}")
    return [dataclasses.replace(m, accuracy=found.get(m.name, m.accuracy)) for m in pool]


def pool_fingerprint(pool: Sequence[ModelFeatures]) -> str:
    """Checksum over everything in a pool."""
    flat = {}
    for m in pool:
        kept = {"features": m.features, "labels": m.labels, "general": m.general, "source": m.source}
        flat |= {f"{m.name}/{k}": v for k, v in kept.items() if v is not None}
        if m.accuracy is not None:
            flat[f"{m.name}/accuracy"] = np.float64(m.accuracy).reshape(1)
    return arrays_fingerprint(flat)


def _read_npz(file: Path) -> ModelFeatures:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {k: stored[k] for k in stored.files}
    except Exception as error:
        raise DataError(f"{file}: not a readable .npz file of plain arrays ({str(error).splitlines()[0]})") from None
    for field in ("features", "labels"):
        if field not in arrays:
            raise DataError(f"{file}: expected a field {field!r}, got {', '.join(arrays) or 'none'}")
    source = arrays.get("source_probabilities")
    if source is None and "source_logits" in arrays:
        logits = _matrix(file, "source_logits", arrays["source_logits"]).astype(np.float64)
        source = np.exp(logits - logits.max(1, keepdims=True))
        source = source / source.sum(1, keepdims=True)
    return _model(file, arrays["features"], arrays["labels"], arrays.get("general"), source, arrays.get("accuracy"))


def _read_csv(file: Path) -> ModelFeatures:
    header, rows = _table(file)
    if "label" not in header:
        raise DataError(f"{file}: expected a column 'label' in its first line, got {', '.join(header[:6])}")
    at = header.index("label")
    sources = [i for i, name in enumerate(header) if name.startswith("source_")]
    columns = [i for i in range(len(header)) if i != at and i not in sources]
    if not columns:
        raise DataError(f"{file}: expected columns of features beside 'label'")
    labels = rows[:, at]
    bad = labels != np.round(labels)
    if bad.any():
        raise DataError(f"{file}: line {int(bad.argmax()) + 2} has label {labels[bad][0]:g}, expected an integer")
    beside = file.with_name(f"{file.stem}.general.csv")
    general = _table(beside)[1] if beside.exists() else None
    return _model(file, rows[:, columns], labels.astype(np.int64), general, rows[:, sources] if sources else None, None)


def _table(file: Path) -> tuple[list[str], np.ndarray]:
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a readable .csv file ({error})") from None
    if len(lines) < 2:
        raise DataError(f"{file}: expected a line of column names and then numbers, got {len(lines)} line(s)")
    header = [name.strip() for name in lines[0]]
    rows = np.empty((len(lines) - 1, len(header)))
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DataError(f"{file}: line {number} has {len(line)} values, expected {len(header)}")
        try:
            rows[number - 2] = [float(v) for v in line]
        except ValueError:
            raise DataError(f"{file}: line {number} holds something that is no number") from None
    return header, rows


def _model(file: Path, features, labels, general, source, accuracy) -> ModelFeatures:
    features, labels = _matrix(file, "features", features), np.asarray(labels)
    n, d = features.shape
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise DataError(f"{file}: labels must be one integer for each of {n} rows, got {labels.dtype} {labels.shape}")
    if labels.min() < 0:
        raise DataError(f"{file}: label {labels.min()} in row {int(labels.argmin())} is negative; classes are 0..C-1")
    seen = np.unique(labels)
    if len(seen) != seen[-1] + 1:
        missing = int(np.argmax(seen != np.arange(len(seen))))
        raise DataError(
            f"{file}: labels skip class {missing} (largest {seen[-1]}): they must be 0..C-1 without gaps; "
            "np.unique(labels, return_inverse=True)[1] renumbers them"
        )
    counts = np.bincount(labels)
    if len(counts) < 2 or counts.min() < 2:
        raise DataError(
            f"{file}: class {int(counts.argmin())} has {counts.min()} sample(s) of {len(counts)} class(es); a ranking "
            "needs two classes or more, each with two samples or more"
        )
    if general is not None:
        general = _matrix(file, "general", general)
        if general.shape[1] != d or len(general) < 2:
            raise DataError(f"{file}: general must be [G, {d}] with G at least 2, got {general.shape}")
    if source is not None:
        source = _matrix(file, "source", source)
        if len(source) != n:
            raise DataError(f"{file}: source outputs must have {n} rows, got {len(source)}")
        wrong = (source < -1e-6).any(1) | (np.abs(source.sum(1) - 1) > 1e-3)
        if wrong.any():
            raise DataError(f"{file}: source probabilities of row {int(wrong.argmax())} do not sum to 1")
    if accuracy is not None:
        accuracy = _number(file, "accuracy", accuracy)
    return ModelFeatures(file.stem, features, labels.astype(np.int32), general, source, accuracy)


def _matrix(file: Path, field: str, x) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or not x.size or x.dtype.kind not in "fiu":
        raise DataError(f"{file}: {field} must be numbers [rows, columns], got {x.dtype} {x.shape}")
    x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise DataError(f"{file}: {field} of row {int(bad.argmax())} are not finite")
    return x


def _number(file: Path, name: str, value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{file}: {name} must be a number, got {value!r}") from None
    if not np.isfinite(number):
        raise DataError(f"{file}: {name} must be finite, got {number}")
    return number


def _accuracies(folder: Path) -> Mapping[str, float]:
    there = [folder / name for name in ACCURACY_FILES if (folder / name).exists()]
    if len(there) > 1:
        raise DataError(f"{folder}: holds accuracies.json and accuracies.csv; keep one")
    if not there:
        return {}
    file = there[0]
    if file.suffix == ".json":
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not a readable JSON file ({error})") from None
        if not isinstance(found, dict):
            raise DataError(f'{file}: expected {{"MODEL": accuracy, ...}}, got a {type(found).__name__}')
        return {name: _number(file, f"accuracy of {name!r}", value) for name, value in found.items()}
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a readable .csv file ({error})") from None
    if not lines or [v.strip() for v in lines[0]] != ["model", "accuracy"] or any(len(v) != 2 for v in lines):
        raise DataError(f"{file}: expected a first line 'model,accuracy' and two values in every line")
    return {name.strip(): _number(file, f"accuracy of {name.strip()!r}", value) for name, value in lines[1:]}
