"""Images and points: scikit-learn's digits (bundled), a mixture of Gaussians with ground truth, and sets of your own.

Images are float32 ``[N, height, width, channels]`` in [-1, 1], labels int32 ``[N]``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import Dataset
from data.stream import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def digits(test: int = 360) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, bundled with it: no download.

    Args:
      test: how many examples are held out; which ones never changes.
    """
    from sklearn.datasets import load_digits

    if not 0 < test < 1797:
        raise DataError(f"test must lie in [1, 1796] of the 1,797 digits, got {test}")
    bunch = load_digits()
    x = (bunch.images / 8.0 - 1.0).astype(np.float32)[..., None]
    label = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    held, kept = np.sort(order[:test]), np.sort(order[test:])
    splits = {name: {"x": x[rows], "label": label[rows]} for name, rows in (("train", kept), ("test", held))}
    return Dataset("digits", splits, {"num_classes": 10, "shape": (8, 8, 1), "std": float(x[kept].std())})


def gaussian_mixture_2d(
    seed: int = 0, modes: int = 8, train: int = 8192, test: int = 4096, radius: float = 0.7, std: float = 0.05
) -> Dataset:
    """Points of a mixture of Gaussians whose means lie evenly on a circle.

    Its ground truth is in ``info``: ``means`` [modes, 2], ``std``, ``weights`` [modes].

    Args:
      seed: of the draw.
      modes: number of Gaussians, equally likely.
      train, test: sizes of the splits, drawn independently.
      radius, std: of the circle, and of each Gaussian per coordinate; the default's coordinates have deviation 0.5.
    """
    if modes < 1 or train < 1 or test < 1 or radius <= 0 or std <= 0:
        raise DataError(
            "modes, train and test must be at least 1, radius and std positive; "
            f"got {modes}, {train}, {test}, {radius}, {std}"
        )
    angle = 2 * np.pi * np.arange(modes) / modes
    means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    rng = np.random.default_rng(seed)

    def draw(size):
        label = rng.integers(modes, size=size)
        x = means[label] + std * rng.standard_normal((size, 2))
        return {"x": x.astype(np.float32), "label": label.astype(np.int32)}

    info = {"means": means, "std": std, "weights": np.full(modes, 1 / modes), "num_classes": modes, "seed": seed}
    return Dataset("mixture", {"train": draw(train), "test": draw(test)}, info)


def image_dataset(name: str = "digits", path: str | None = None, test_share: float = 0.1) -> Dataset:
    """Images by name or from your own files.

    Args:
      name: ``"digits"`` (bundled), ``"mixture"`` (generated points), or any TFDS image set with ``train`` and ``test``
        splits (``"mnist"``, ``"cifar10"``); ignored when ``path`` is an ``.npz`` file or a folder of images.
      path: an ``.npz`` file with ``x`` or ``image`` (and perhaps ``label``); a folder of images of one size, where
        sub-folders are classes; or, for a TFDS name, the folder of TFDS's data.
      test_share: share held out of your own files (a fixed choice).

    Raises:
      DataError: no such file, missing or malformed fields, images of different sizes, NaN, or values of unknown range.
    """
    where = Path(path) if path is not None else None
    if where is not None and not where.exists():
        raise DataError(f"{where}: no such file or folder; give an .npz file or a folder of images")
    if where is not None and where.is_file():
        return _split(_read_npz(where), str(where), test_share)
    if where is not None and _image_files(where):
        return _split(_read_folder(where), str(where), test_share)
    if name == "digits":
        if where is not None:
            raise DataError(f"{where}: holds no images ({', '.join(IMAGE_SUFFIXES)}), directly or one folder down")
        return digits()
    if name == "mixture":
        return gaussian_mixture_2d()

    from data.tfds import load_tfds

    splits = {}
    for split in ("train", "test"):
        arrays = load_tfds(name, split, data_dir=path)
        field = "image" if "image" in arrays else "x"
        if field not in arrays:
            raise DataError(f"TFDS set {name!r} has no field 'image'; it has {', '.join(sorted(arrays))}")
        splits[split] = {"x": scale_images(np.asarray(arrays[field]), f"{name}/{split}")}
        if "label" in arrays:
            splits[split]["label"] = np.asarray(arrays["label"]).astype(np.int32)
    return Dataset(name, splits, _info(splits["train"]))


def scale_images(images: np.ndarray, where: str = "images") -> np.ndarray:
    """Images as float32 ``[N, h, w, c]`` in [-1, 1].

    Integers are taken to be 0..255; floats in [-1, 1] with negative values stay, floats in [0, 1] and [0, 255] are
    scaled.

    Raises:
      DataError: another rank, an empty set, NaN or infinity (the first such image is named), or another range.
    """
    if images.dtype == object or images.ndim not in (3, 4):
        raise DataError(
            f"{where}: expected images [N, height, width(, channels)] of one size, got shape {images.shape}"
        )
    if images.size == 0:
        raise DataError(f"{where}: holds no images, shape {images.shape}")
    images = images[..., None] if images.ndim == 3 else images
    x = images.astype(np.float32)
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        raise DataError(f"{where}: image {int(bad.argmax())} holds values that are not finite")
    low, high = float(x.min()), float(x.max())
    if low < (-1.001 if np.issubdtype(images.dtype, np.floating) else 0) or high > 255:
        raise DataError(f"{where}: expected integers in [0, 255] or floats in [-1, 1], got min {low:g}, max {high:g}")
    if low < 0:
        if high > 1.001:
            raise DataError(f"{where}: expected the range [-1, 1] with negative values, got min {low:g}, max {high:g}")
        return x
    if np.issubdtype(images.dtype, np.floating) and high <= 1.0:
        return 2 * x - 1
    return x / 127.5 - 1


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz file of plain arrays ({error})") from None
    field = "x" if "x" in arrays else "image"
    if field not in arrays:
        raise DataError(f"{path}: expected a field 'x' or 'image', got {', '.join(arrays) or 'none'}")
    out = {"x": scale_images(arrays[field], f"{path}: {field}")}
    if "label" in arrays:
        label = arrays["label"]
        if label.shape != (len(out["x"]),) or not np.issubdtype(label.dtype, np.integer):
            raise DataError(
                f"{path}: label must hold one integer per image ([{len(out['x'])}]), got {label.dtype} {label.shape}"
            )
        if label.min() < 0:
            raise DataError(f"{path}: label {int(label.argmin())} is negative ({label.min()}); classes count from 0")
        out["label"] = label.astype(np.int32)
    return out


def _image_files(folder: Path) -> list[tuple[Path, str | None]]:
    # (file, class folder or None), in a fixed order
    def images(f):
        return sorted(p for p in f.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)

    found = [(p, None) for p in images(folder)]
    if not found:
        found = [(p, sub.name) for sub in sorted(folder.iterdir()) if sub.is_dir() for p in images(sub)]
    return found


def _read_folder(folder: Path) -> dict[str, np.ndarray]:
    from PIL import Image

    files = _image_files(folder)
    arrays: list[np.ndarray] = []
    for path, _ in files:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB"))
        except Exception as error:
            raise DataError(f"{path}: not a readable image ({error})") from None
        if arrays and pixels.shape != arrays[0].shape:
            raise DataError(f"{path}: expected {arrays[0].shape} as in {files[0][0].name}, got {pixels.shape}")
        arrays.append(pixels)
    out = {"x": scale_images(np.stack(arrays), str(folder))}
    classes = sorted({c for _, c in files if c is not None})
    if classes:
        out["label"] = np.asarray([classes.index(c) for _, c in files], np.int32)
    return out


def _split(arrays: dict[str, np.ndarray], name: str, test_share: float) -> Dataset:
    size = len(arrays["x"])
    held = max(1, round(size * test_share))
    if size < 2:
        raise DataError(f"{name}: needs two images or more, to hold some out, got {size}")
    order = np.random.default_rng(0).permutation(size)
    rows = {"train": np.sort(order[held:]), "test": np.sort(order[:held])}
    splits = {s: {k: v[ids] for k, v in arrays.items()} for s, ids in rows.items()}
    return Dataset(name, splits, _info(splits["train"]))


def _info(train: dict[str, np.ndarray]) -> dict[str, Any]:
    classes = {"num_classes": int(train["label"].max()) + 1} if "label" in train else {}
    return {**classes, "shape": train["x"].shape[1:], "std": float(train["x"].std())}
