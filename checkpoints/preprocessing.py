"""Images as a pretrained model expects them: on the host by Pillow, like the libraries that the weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def prepare_images(
    images: Any,
    size: int | Sequence[int] | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    interpolation: str = "bilinear",
    crop: float | None = 1.0,
    **_: Any,
) -> np.ndarray:
    """Resizes, crops, scales to [0, 1] and normalises.

    Args:
      images: ``[B, H, W, C]`` or ``[H, W, C]`` uint8, or a sequence of such images of different sizes, or of Pillow's.
      size: height and width of the result; ``None`` leaves the size as it is.
      mean, std: of each channel of an image in [0, 1].
      interpolation: Pillow's filter by name.
      crop: the share of the resized image's shorter side that the central crop keeps (timm's ``crop_pct``): the shorter
        side is brought to ``size / crop``; ``None`` squeezes the whole image into ``size``.

    Returns:
      ``[B, h, w, C]`` float32.

    Raises:
      ValueError: images of another type or number of channels, or an unknown filter.
    """
    if interpolation not in FILTERS:
        raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}, got {interpolation!r}")
    if isinstance(images, np.ndarray) and images.ndim == 3 or hasattr(images, "convert"):
        images = [images]
    rows = [_one(image, size, interpolation, crop) for image in images]
    if len({r.shape for r in rows}) > 1:
        raise ValueError("images of different sizes need size=(height, width)")
    stacked = np.stack(rows).astype(np.float32) / 255
    if stacked.shape[-1] != len(mean):
        raise ValueError(f"images have {stacked.shape[-1]} channels, but mean has {len(mean)}")
    return (stacked - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _one(image: Any, size: int | Sequence[int] | None, interpolation: str, crop: float | None) -> np.ndarray:
    from PIL import Image

    if not hasattr(image, "convert"):
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
            raise ValueError(f"images must be uint8 [H, W, 3] (or 1), got {array.dtype}{list(array.shape)}")
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        how = Image.Resampling[interpolation.upper()]
        if crop is None:
            image = image.resize((width, height), how)
        else:
            image = _centre(_shorter_side(image, int(min(height, width) / crop), how), height, width)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _shorter_side(image: Any, side: int, how: Any) -> Any:
    width, height = image.size
    if width <= height:
        return image.resize((side, int(side * height / width)), how)
    return image.resize((int(side * width / height), side), how)


def _centre(image: Any, height: int, width: int) -> Any:
    w, h = image.size
    if w < width or h < height:
        raise ValueError(f"a crop of {height} x {width} does not fit an image resized to {h} x {w}; choose crop <= 1")
    top, left = round((h - height) / 2), round((w - width) / 2)
    return image.crop((left, top, left + width, top + height))
