"""Regression with ordered labels: a generated one-dimensional manifold, scikit-learn's diabetes, csv files of your own.

Every set has ``x``, the ``target`` as it is, and the ``label`` that contrastive learning compares: the target's bin
(``round(target / bin_size)``), so that equal labels exist.  Both are float32 ``[N]``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.images import scale_images
from data.stream import DataError
from data.tables import Table, read_table, split_rows


def checked_targets(values: np.ndarray, where: str = "label") -> np.ndarray:
    """Targets as float32 ``[N]`` from ``[N]`` or ``[N, 1]``.

    Raises:
      DataError: several dimensions, no rows, or a value that is not finite; the row is named.
    """
    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or not len(values):
        raise DataError(
            f"{where}: expected one number per example, [N] or [N, 1], got shape {list(values.shape)}; targets of "
            "several dimensions are not supported"
        )
    try:
        values = values.astype(np.float32)
    except (TypeError, ValueError):
        raise DataError(f"{where}: expected numbers, got {values.dtype}") from None
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(f"{where}: row {int(bad.argmax())} is {values[bad][0]}; every example needs a finite target")
    return values


def binned(targets: np.ndarray, bin_size: float) -> np.ndarray:
    """The bin of each target, ``round(target / bin_size)``, float32; a size of 0 leaves targets as they are.

    Raises:
      DataError: a negative size.
    """
    if bin_size < 0:
        raise DataError(f"bin size must not be negative, got {bin_size}")
    return targets if bin_size == 0 else np.round(targets / bin_size).astype(np.float32)


def check_ties(labels: np.ndarray, views: int, where: str = "label") -> None:
    """Contrastive learning on labels without ties: an error with one view, a warning with two.

    Args:
      labels: of the training split, after binning.
      views: of each example; with two an example's other view is a positive at least.
      where: for messages.

    Raises:
      DataError: one view, and labels that occur once: those anchors have no positive at all.
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    alone = counts[which] == 1
    size = float(np.ptp(labels)) / 40
    if views == 1 and alone.any():
        raise DataError(
            f"{where}: {int(alone.sum())} of {len(labels)} examples share their label with no other and have one view, "
            f"so they have no positive; use two views or bins (such as {size:.3g})"
        )
    if alone.mean() > 0.5:
        warnings.warn(
            f"{where}: {alone.mean():.0%} of the examples share their label with no other, so their only positive is "
            f"their other view; consider bins of size {size:.3g}",
            stacklevel=2,
        )


def ordered_manifold(
    seed: int = 0,
    per_label: int = 3,
    labels: int = 41,
    test_per_label: int = 10,
    nuisance: int = 8,
    noise: float = 1.0,
    imbalance: bool = False,
) -> Dataset:
    """A curve that the label runs along, mixed with nuisance by a fixed random two-layer map: ``x = g(y, nuisance)``.

    The curve is ``(sin, cos)`` of the label at frequencies 1/2, 1 and 3/2 of its range: ordered, bent, not closed.

    Args:
      seed: of everything.
      per_label: training examples of each label, few; with ``imbalance`` the largest count is 40 times it and counts
        fall geometrically to 3 along the labels, so that many, median and few-shot regions exist.
      labels: integer labels 0 .. ``labels - 1``.
      test_per_label: test examples of each label, always balanced.
      nuisance: dimensions that say nothing of the label.
      noise: their standard deviation.
      imbalance: see ``per_label``.

    Returns:
      Splits ``train`` and ``test`` with ``x`` float32 ``[N, 2 (6 + nuisance)]``, ``label`` and ``target``.

    Raises:
      DataError: sizes that cannot be.
    """
    if min(per_label, test_per_label) < 1 or labels < 3 or nuisance < 0 or noise < 0:
        raise DataError(
            "per_label and test_per_label must be at least 1, labels at least 3, nuisance and noise not negative; got "
            f"{per_label}, {test_per_label}, {labels}, {nuisance} and {noise}"
        )
    rng = np.random.default_rng(seed)
    width = 6 + nuisance
    first = rng.normal(size=(width, 2 * width)) / np.sqrt(width)
    second = rng.normal(size=(2 * width, 2 * width)) / np.sqrt(2 * width)
    counts = np.full(labels, per_label)
    if imbalance:
        counts = np.round(np.geomspace(40 * per_label, 3, labels)).astype(int)

    def draw(counts):
        y = np.repeat(np.arange(labels), counts)
        angle = np.pi * (y / (labels - 1))[:, None] * np.array([0.5, 1.0, 1.5])
        side = noise * rng.normal(size=(len(y), nuisance))
        latent = np.concatenate([np.sin(angle), np.cos(angle), side], 1)
        x = np.tanh(1.5 * np.tanh(latent @ first) @ second)
        y = y.astype(np.float32)
        return {"x": x.astype(np.float32), "label": y, "target": y.copy()}

    splits = {"train": draw(counts), "test": draw(np.full(labels, test_per_label))}
    return Dataset("manifold", splits, {"seed": seed, "bin_size": 1.0, "counts": counts})


def diabetes(bin_size: float = 10.0, test: int = 142) -> Dataset:
    """Scikit-learn's diabetes: ten features of 442 patients, disease progression after a year (25 to 346), binned.

    Args:
      bin_size: of the label, in units of the target.
      test: how many patients are held out; which ones never changes.
    """
    from sklearn.datasets import load_diabetes

    x, target = load_diabetes(return_X_y=True)
    if not 0 < test < len(x):
        raise DataError(f"test must lie in [1, {len(x) - 1}] of the {len(x)} patients, got {test}")
    order = np.random.default_rng(0).permutation(len(x))
    rows = {"train": np.sort(order[test:]), "test": np.sort(order[:test])}
    return _dataset("diabetes", {k: x[r] for k, r in rows.items()}, {k: target[r] for k, r in rows.items()}, bin_size)


def read_regression(file: str | Path, bin_size: float = 0.0) -> Dataset:
    """Reads a csv with a ``label`` column and either numeric features or a ``path`` column of images of one size.

    A ``split`` column says ``train`` or ``test`` (``val`` is set aside); without it a fixed fifth is held out.
    Features are standardised by the training split; image paths count from the csv's folder.

    Raises:
      DataError: a missing column, split or image, or a cell that is not a number, with file and line.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected a csv with columns (features..., label, split)")
    table = read_table(file)
    if "label" not in table.columns:
        raise DataError(f"{file}: has no column 'label'; it has {', '.join(table.columns)}")
    target = checked_targets(_numbers(file, table, "label"), f"{file}, column label")
    rows = split_rows(file, table)
    if "path" in table.columns:
        arrays = {k: _images(file, table, r) for k, r in rows.items()}
    else:
        names = [c for c in table.columns if c not in ("label", "split")]
        if not names:
            raise DataError(f"{file}: has no feature column beside label and split, and no column 'path' of images")
        x = np.stack([_numbers(file, table, c) for c in names], 1)
        arrays = {k: x[r] for k, r in rows.items()}
    return _dataset(file.name, arrays, {k: target[r] for k, r in rows.items()}, bin_size)


def _dataset(name: str, x: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], bin_size: float) -> Dataset:
    if x["train"].ndim == 2:
        centre, spread = x["train"].mean(0), x["train"].std(0)
        x = {k: (v - centre) / np.where(spread > 0, spread, 1.0) for k, v in x.items()}
    splits = {}
    for split in x:
        target = checked_targets(targets[split], f"{name}, {split}")
        splits[split] = {"x": x[split].astype(np.float32), "label": binned(target, bin_size), "target": target}
    return Dataset(name, splits, {"bin_size": bin_size or 1.0})


def _numbers(file: Path, table: Table, column: str) -> np.ndarray:
    out = np.empty(table.rows)
    for i, cell in enumerate(table[column]):
        try:
            out[i] = float("nan" if cell is None else cell)
        except ValueError:
            raise DataError(f"{file}, line {i + 2}: column {column!r} holds {cell!r}, expected a number") from None
        if not np.isfinite(out[i]):
            raise DataError(f"{file}, line {i + 2}: column {column!r} is {cell or 'empty'}, expected a finite number")
    return out


def _images(file: Path, table: Table, rows: np.ndarray) -> np.ndarray:
    from PIL import Image

    found: list[np.ndarray] = []
    for i in rows:
        cell = table["path"][i]
        where = file.parent / (cell or "")
        try:
            with Image.open(where) as image:
                pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB"))
        except Exception as error:
            raise DataError(f"{file}, line {i + 2}: {where}: not a readable image ({error})") from None
        if found and pixels.shape != found[0].shape:
            raise DataError(f"{file}, line {i + 2}: expected an image {found[0].shape}, got {pixels.shape}")
        found.append(pixels)
    return scale_images(np.stack(found), str(file))
