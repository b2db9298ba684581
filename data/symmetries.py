"""Digits with planted symmetries: which transformations a task allows is known.  Images are float32 in [-1, 1]."""

from __future__ import annotations

import numpy as np

from data.dataset import Dataset
from data.stream import DataError

SIDE = 8


def six_nine(
    seed: int = 0, train: int = 128, test: int = 256, canvas: int = 12, shift: int = 2, flips: float = 0.0
) -> Dataset:
    """Sixes against sixes turned upside down: displacement changes nothing, a half-turn swaps the two classes.

    Class 0 shows a six of scikit-learn's digits, class 1 *another* six turned by 180 degrees, so that no image is in
    both and the classes differ by the turn alone.  Training images stand in the middle of the canvas; those of the
    split ``test`` are displaced by up to ``shift`` pixels each way, so a model must have learnt the symmetry.  The
    split ``turned`` is ``test`` with every image turned by 180 degrees and its label swapped.

    Args:
      seed: of the choice of digits, places and classes.
      train, test: images per split, drawn with replacement from separate digits.
      canvas: side of the images.
      shift: largest displacement in pixels.
      flips: share of the training labels that are swapped, so that no loss below a level is reachable.

    Returns:
      Splits ``train``, ``test``, ``turned`` with ``x [N, canvas, canvas, 1]``, ``label``; ``test`` and ``turned`` also
      have ``shift`` i32 ``[N, 2]`` (down, right).  ``info`` names ``invariant_to`` and ``changed_by``.

    Raises:
      DataError: sizes that do not go together.
    """
    if train < 2 or test < 2:
        raise DataError(f"train and test must be at least 2 images, got {train} and {test}")
    _check_canvas(canvas, shift)
    if not 0 <= flips < 0.5:
        raise DataError(f"flips is a share of the labels below one half, got {flips}")
    rng = np.random.default_rng([seed, 69])
    images, digit = _digits()
    sixes = rng.permutation(np.flatnonzero(digit == 6))
    parts = {"train": sixes[: 2 * len(sixes) // 3], "test": sixes[2 * len(sixes) // 3 :]}
    splits = {}
    for split, size in (("train", train), ("test", test)):
        own = parts[split]
        label = rng.permutation(np.arange(size) % 2).astype(np.int32)
        # even places of the part are upright, odd ones turned: a digit never shows both ways up
        chosen = own[2 * rng.integers(0, len(own) // 2, size) + label]
        faces = np.where(label[:, None, None] == 1, images[chosen, ::-1, ::-1], images[chosen])
        moves = rng.integers(-shift, shift + 1, (size, 2)) if split == "test" else np.zeros((size, 2), int)
        splits[split] = {"x": _place(faces, moves, canvas), "label": label}
        if split == "test":
            splits["test"]["shift"] = moves.astype(np.int32)
    swapped = rng.permutation(train)[: round(flips * train)]
    splits["train"]["label"][swapped] = 1 - splits["train"]["label"][swapped]
    splits["turned"] = {
        "x": np.ascontiguousarray(splits["test"]["x"][:, ::-1, ::-1]),
        "label": 1 - splits["test"]["label"],
        "shift": -splits["test"]["shift"],
    }
    return Dataset("six_nine", splits, _info(splits["train"], 2, ("translate_x", "translate_y"), ("rotate",)))


def moved_digits(
    seed: int = 0, share: float = 0.1, canvas: int = 12, shift: int = 2, turn: float = 30.0, test: int = 360
) -> Dataset:
    """All ten digits, of which a share of the training images and all test images are displaced and turned.

    Args:
      seed: of the moves and of which training images are moved; which digits are held out never changes.
      share: of the training images that are moved; the others stand upright in the middle.
      canvas: side of the images.
      shift: largest displacement in pixels.
      turn: largest angle in degrees, either way.
      test: digits held out.

    Raises:
      DataError: sizes that do not go together.
    """
    _check_canvas(canvas, shift)
    if not 0 <= share <= 1:
        raise DataError(f"share must lie in [0, 1], got {share}")
    if not 0 < test < 1797:
        raise DataError(f"test must lie in [1, 1796] of the 1,797 digits, got {test}")
    from scipy.ndimage import rotate

    rng = np.random.default_rng([seed, 70])
    images, digit = _digits()
    order = np.random.default_rng(0).permutation(len(images))
    splits = {}
    for split, rows in (("train", np.sort(order[test:])), ("test", np.sort(order[:test]))):
        moved = np.ones(len(rows), bool)
        if split == "train":
            moved = np.isin(np.arange(len(rows)), rng.permutation(len(rows))[: round(share * len(rows))])
        moves = np.where(moved[:, None], rng.integers(-shift, shift + 1, (len(rows), 2)), 0)
        angle = np.where(moved, rng.uniform(-turn, turn, len(rows)), 0.0)
        x = _place(images[rows], np.zeros_like(moves), canvas)[..., 0]
        for i in np.flatnonzero(moved):
            x[i] = rotate(x[i], angle[i], reshape=False, order=1, cval=-1.0)
            x[i] = _displaced(x[i], *moves[i])
        splits[split] = {"x": x[..., None], "label": digit[rows], "moved": moved}
    same = ("translate_x", "translate_y", "rotate")
    return Dataset("moved_digits", splits, _info(splits["train"], 10, same, ()))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 8.0 - 1.0).astype(np.float32), bunch.target.astype(np.int32)


def _check_canvas(canvas: int, shift: int) -> None:
    most = (canvas - SIDE) // 2
    if canvas < SIDE or not 0 <= shift <= most:
        raise DataError(
            f"a {SIDE} x {SIDE} digit on a canvas of {canvas} can be displaced by 0 to {most} pixels, got {shift}"
        )


def _place(faces: np.ndarray, moves: np.ndarray, canvas: int) -> np.ndarray:
    out = np.full((len(faces), canvas, canvas, 1), -1.0, np.float32)
    corner = (canvas - SIDE) // 2
    for i, (down, right) in enumerate(moves):
        top, left = corner + down, corner + right
        out[i, top : top + SIDE, left : left + SIDE, 0] = faces[i]
    return out


def _displaced(image: np.ndarray, down: int, right: int) -> np.ndarray:
    out = np.full_like(image, -1.0)
    h, w = image.shape
    out[max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)] = image[
        max(-down, 0) : h + min(-down, 0), max(-right, 0) : w + min(-right, 0)
    ]
    return out


def _info(train: dict[str, np.ndarray], classes: int, same: tuple[str, ...], changed: tuple[str, ...]) -> dict:
    return {
        "num_classes": classes,
        "shape": train["x"].shape[1:],
        "std": float(train["x"].std()),
        "invariant_to": same,
        "changed_by": changed,
    }
