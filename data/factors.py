"""Images of independent factors, and images listed in text files: what metric learning in subspaces is tried on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.dataset import Dataset
from data.images import scale_images
from data.stream import DataError

COLOURS = np.array(
    [(0.85, 0.25, 0.2), (0.2, 0.7, 0.3), (0.25, 0.35, 0.9), (0.85, 0.75, 0.2), (0.7, 0.3, 0.75)], np.float32
)
SHAPES = ("disk", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks")


def factor_images(
    seed: int = 0,
    colours: int = 3,
    shapes: int = 3,
    textures: int = 2,
    train: int = 1152,
    validation: int = 360,
    test: int = 720,
    size: int = 24,
    noise: float = 0.12,
) -> Dataset:
    """One object an image, its colour, shape and texture drawn independently; the label is their combination.

    Position, size and brightness vary and the background is grey noise, so that no pixel gives a factor away.

    Args:
      seed: of the draw.
      colours, shapes, textures: values of each factor, at most 5, 4 and 3; their product is the number of classes.
      train, validation, test: images of each split, every class equally often up to one.
      size: height and width, at least 16.
      noise: standard deviation of pixel noise, images in [-1, 1].

    Returns:
      ``x`` f32 ``[N, size, size, 3]``, ``label``, ``colour``, ``shape``, ``texture`` i32 ``[N]``, ``mask`` bool
      ``[N, size, size]``, where the object is.

    Raises:
      DataError: a number that cannot be.
    """
    counts = {"colours": (colours, 5), "shapes": (shapes, 4), "textures": (textures, 3)}
    for name, (got, most) in counts.items():
        if not 1 <= got <= most:
            raise DataError(f"{name} must lie in 1..{most}, got {got}")
    classes = colours * shapes * textures
    if classes < 2 or min(train, validation, test) < 2 * classes:
        raise DataError(f"{classes} classes need at least 2 of each in every split, got {train}, {validation}, {test}")
    if size < 16 or noise < 0:
        raise DataError(f"size must be at least 16 and noise not negative, got {size} and {noise}")
    rng = np.random.default_rng([seed, 7])
    splits = {
        name: _draw(rng, number, (colours, shapes, textures), size, noise)
        for name, number in (("train", train), ("validation", validation), ("test", test))
    }
    return Dataset("factors", splits, {"num_classes": classes, "shape": (size, size, 3), "seed": seed})


def _draw(rng: np.random.Generator, number: int, sizes: tuple[int, int, int], side: int, noise: float):
    label = rng.permutation(np.arange(number) % int(np.prod(sizes)))
    colour, shape, texture = np.unravel_index(label, sizes)
    radius = side * rng.uniform(0.2, 0.32, (number, 1, 1))
    centre = side / 2 + (side / 2 - radius - 1) * rng.uniform(-1, 1, (2, number, 1, 1))
    rows, columns = np.mgrid[:side, :side] + 0.5
    v, u = (rows - centre[0]) / radius, (columns - centre[1]) / radius
    inside = np.stack(
        [
            u**2 + v**2 < 1,
            np.maximum(abs(u), abs(v)) < 0.86,
            (v < 0.75) & (v > 1.75 * abs(u) - 1.0),
            np.minimum(abs(u), abs(v)) < 0.36,
        ]
    )
    inside &= np.maximum(abs(u), abs(v)) < 1
    mask = inside[shape, np.arange(number)]
    phase = rng.integers(0, 4, (2, number, 1, 1))
    stripes = ((rows + phase[0]) % 4 < 2) + 0 * u.astype(int)
    checks = ((rows + phase[0]) % 4 < 2) ^ ((columns + phase[1]) % 4 < 2)
    dark = np.stack([np.zeros_like(stripes, bool), stripes.astype(bool), checks])[texture, np.arange(number)]
    paint = COLOURS[colour][:, None, None, :] * rng.uniform(0.75, 1.1, (number, 1, 1, 1))
    paint = np.where(dark[..., None], 0.45 * paint, paint)
    ground = rng.uniform(0.3, 0.6, (number, 1, 1, 1)) * np.ones(3)
    x = 2 * np.where(mask[..., None], paint, ground) - 1 + noise * rng.standard_normal((number, side, side, 3))
    factors = {"label": label, "colour": colour, "shape": shape, "texture": texture}
    return {
        "x": np.clip(x, -1, 1).astype(np.float32),
        **{k: np.asarray(value, np.int32) for k, value in factors.items()},
        "mask": mask,
    }


def listed_images(folder: str | Path, size: int = 64, validation: float = 0.15) -> Dataset:
    """Images named in ``*_train.txt`` and ``*_test.txt`` of a folder, each line ``id class path`` after a header.

    Paths are relative to the folder.  The shorter side is scaled to ``size`` and the middle square cut out.  Classes
    are numbered from 0 in rising order.  The validation split is taken from the training list, every class alike.

    Args:
      folder: with the two lists.
      size: of the square images.
      validation: share of each class that is held out for validation, at least one image where it has two.

    Raises:
      DataError: a missing or doubled list, a malformed line, an unreadable image, or a test class without training
        images; file and line are named.
    """
    folder = Path(folder)
    if size < 1 or not 0 < validation < 1:
        raise DataError(f"size must be at least 1 and validation within (0, 1), got {size} and {validation}")
    listed = {}
    for split in ("train", "test"):
        found = sorted(folder.glob(f"*_{split}.txt")) if folder.is_dir() else []
        if len(found) != 1:
            raise DataError(
                f"{folder}: expected one list named *_{split}.txt with lines 'id class path', found {len(found)}"
            )
        listed[split] = _read_list(found[0])
    classes = sorted({c for c, _, _ in listed["train"]})
    for c, _, where in listed["test"]:
        if c not in classes:
            raise DataError(f"{where}: class {c} has no training image")
    arrays = {
        split: {
            "x": scale_images(np.stack([_square(folder / path, size, where) for _, path, where in rows])),
            "label": np.array([classes.index(c) for c, _, _ in rows], np.int32),
        }
        for split, rows in listed.items()
    }
    held = np.zeros(len(arrays["train"]["label"]), bool)
    rng = np.random.default_rng(0)
    for c in range(len(classes)):
        own = rng.permutation(np.flatnonzero(arrays["train"]["label"] == c))
        held[own[: 0 if len(own) < 2 else max(1, round(validation * len(own)))]] = True
    if not held.any():
        raise DataError(f"{folder}: no class has two training images, so nothing can be held out for validation")
    train = arrays["train"]
    splits = {
        "train": {k: v[~held] for k, v in train.items()},
        "validation": {k: v[held] for k, v in train.items()},
        "test": arrays["test"],
    }
    return Dataset(str(folder), splits, {"num_classes": len(classes), "shape": train["x"].shape[1:]})


def _read_list(file: Path) -> list[tuple[int, str, str]]:
    rows = []
    for number, line in enumerate(file.read_text().splitlines()[1:], 2):
        parts = line.split(maxsplit=2)
        if not parts:
            continue
        if len(parts) != 3 or not parts[1].lstrip("-").isdigit():
            raise DataError(f"{file}:{number}: expected 'id class path' with an integer class, got {line!r}")
        rows.append((int(parts[1]), parts[2].strip(), f"{file}:{number}"))
    if not rows:
        raise DataError(f"{file}: lists no images; expected a header and lines 'id class path'")
    return rows


def _square(path: Path, size: int, where: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            scale = size / min(image.size)
            image = image.resize([max(size, round(s * scale)) for s in image.size], Image.Resampling.BILINEAR)
            left, top = ((s - size) // 2 for s in image.size)
            return np.asarray(image.crop((left, top, left + size, top + size)))
    except Exception as error:
        raise DataError(f"{where}: {path} is not a readable image ({error})") from None
