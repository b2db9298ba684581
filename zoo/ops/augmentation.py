"""Spaces of image transformations as PIL defines them on uint8, jit-able and batched, without a switch per image.

A transformation is an operation, an integer level and a sign.  Automatic augmentation (AutoAugment, RandAugment,
TrivialAugment, learned augmentation) draws them from a space of 14 operations.  Here every operation is one of three
stages, whose other two are neutral: a nearest-neighbour affine warp in PIL's 16.16 fixed point (shear, translate,
rotate), a look-up table per channel (autocontrast, equalize, solarize, posterize, contrast, brightness), or a blend
with a degenerate image (color, sharpness).  A batch costs one warp, one histogram, one table and one blend per image,
whatever mixture of operations is in it; under ``vmap`` a ``lax.switch`` would run all 14.

All constants that PIL computes in double precision (matrices, thresholds, factors) are tables made on the host, so
results are bit for bit PIL's on every device.  Images are uint8 ``[H, W, C]`` in 0..255 or floats in [0, 1] before
normalisation, with one or three channels; floats are rounded to 1/255 for the operation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

OPS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""The operations of the RandAugment and TrivialAugment spaces."""

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
"""Those that warp, and whose direction is a random sign."""

_WARP, _TABLE, _STRETCH, _EQUALIZE, _CONTRAST, _COLOR, _SHARPNESS = range(7)
_KINDS = {
    "autocontrast": _STRETCH,
    "equalize": _EQUALIZE,
    "contrast": _CONTRAST,
    "color": _COLOR,
    "sharpness": _SHARPNESS,
    "identity": _TABLE,
    "solarize": _TABLE,
    "posterize": _TABLE,
    "brightness": _TABLE,
    **dict.fromkeys(GEOMETRIC, _WARP),
}

ImageArray = Shaped[Array, "h w c"]


@dataclasses.dataclass(frozen=True)
class AugmentationSpace:
    """Which operations there are and what their levels mean; level l of L stands for the strength l / (L - 1).

    Attributes:
      ops: names out of ``OPS``; a transformation's ``op`` counts in this order.
      shear: largest shear, in pixels per pixel.
      translate: largest shift in pixels.
      rotate: largest angle in degrees.
      posterize: most bits of the 8 that are dropped.
      enhance: the factors of color, contrast, brightness and sharpness at the lowest and at the highest level.
      levels: L, number of levels, 0 .. L - 1.
    """

    ops: tuple[str, ...] = OPS
    shear: int | float = 0.3
    translate: int | float = 10
    rotate: int | float = 30
    posterize: int = 4
    enhance: tuple[int | float, int | float] = (0.1, 1.9)
    levels: int = 30

    def __post_init__(self):
        unknown = [op for op in self.ops if op not in OPS]
        if unknown:
            raise ValueError(f"unknown operation {unknown[0]!r}; the operations are {', '.join(OPS)}")
        if not [op for op in self.ops if op != "identity"]:
            raise ValueError(f"an augmentation space needs an operation besides identity, got {self.ops}")
        if len(set(self.ops)) != len(self.ops):
            raise ValueError(f"an operation stands twice in {self.ops}")
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, got {self.levels}")
        if not 0 <= self.translate < 1 << 14:
            raise ValueError(f"translate must lie in 0..16383 pixels, got {self.translate}")
        if not 0 <= self.posterize <= 8:
            raise ValueError(f"posterize must lie in 0..8 bits, got {self.posterize}")


def fixed_standard(ops: tuple[str, ...] = OPS) -> AugmentationSpace:
    """RandAugment's strengths: shear 0.3, 10 pixels, 30 degrees, 4 bits, factors 0.1 to 1.9."""
    return AugmentationSpace(ops)


def wide_standard(ops: tuple[str, ...] = OPS) -> AugmentationSpace:
    """TrivialAugment's wide strengths: shear 0.99, 32 pixels, 135 degrees, 6 bits, factors 0.01 to 2."""
    return AugmentationSpace(ops, 0.99, 32, 135, 6, (0.01, 2.0))


@struct.dataclass
class Transform:
    """Transformations out of a space, of any batch shape.

    Attributes:
      op: i32, position in the space's ``ops``.
      level: i32 in 0 .. levels - 1.
      positive: bool, the direction of a geometric operation.
    """

    op: Any
    level: Any
    positive: Any


def sample_transform(key: Array, space: AugmentationSpace) -> Transform:
    """Draws one transformation: operation uniform without identity, level uniform in 1 .. L - 1, direction a coin.

    Args:
      key: of this transformation; vmap over keys for more.
      space: where from.
    """
    real = np.array([i for i, op in enumerate(space.ops) if op != "identity"], np.int32)
    op_key, level_key, sign_key = jax.random.split(key, 3)
    op = jnp.asarray(real)[jax.random.randint(op_key, (), 0, len(real))]
    level = jax.random.randint(level_key, (), 1, space.levels)
    return Transform(op, level, jax.random.bernoulli(sign_key))


def sample_transforms(keys: Array, space: AugmentationSpace, n: int) -> Transform:
    """``n`` transformations for each of ``keys [B]``; fields ``[n, B]``.  They depend on an example's key only."""
    each = lambda j: jax.vmap(lambda k: sample_transform(jax.random.fold_in(k, j), space))(keys)  # noqa: E731
    return jax.vmap(each)(jnp.arange(n))


def transform_counts(
    transform: Transform, mask: Bool[Array, "*n"], space: AugmentationSpace
) -> Int[Array, "ops levels"]:
    """How often each operation occurs at each level among the real (``mask``) transformations."""
    cell = (transform.op * space.levels + transform.level).reshape(-1)
    counts = jax.ops.segment_sum(mask.astype(jnp.int32).reshape(-1), cell, len(space.ops) * space.levels)
    return counts.reshape(len(space.ops), space.levels)


def check_images(images: np.ndarray, where: str = "images") -> None:
    """Checks on the host that images are what the operations are defined on.

    Raises:
      ValueError: another range, type, rank or number of channels.
    """
    images = np.asarray(images)
    expected = "augmentations expect [0,1] or uint8 before normalisation"
    if images.ndim < 3 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{where}: augmentations expect [..., height, width, 1 or 3], got shape {images.shape}")
    if images.dtype == np.uint8:
        return
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{where}: {expected}; got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise ValueError(f"{where}: {expected}; got {images.dtype} from {low:g} to {high:g}")


def augment(image: ImageArray, transform: Transform, space: AugmentationSpace) -> ImageArray:
    """Applies one transformation to one image; vmap over both for a batch.

    Args:
      image: uint8, or float in [0, 1] (NaN and values outside count as 0 or 1 for the operation).
      transform: scalars.
      space: where it is from.

    Returns:
      The image, same shape and type.  The identity returns the very image.

    Raises:
      ValueError: neither one nor three channels, or an integer type other than uint8.
    """
    height, width, channels = image.shape
    if channels not in (1, 3):
        raise ValueError(f"augmentations expect images [height, width, 1 or 3], got shape {image.shape}")
    if image.dtype != jnp.uint8 and not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"augmentations expect [0,1] or uint8 before normalisation; got {image.dtype}")
    pixels = to_uint8(image).astype(jnp.int32)
    kind = jnp.asarray([_KINDS[op] for op in space.ops])[transform.op]

    matrix = jnp.asarray(_matrices(space, height, width))[transform.op, transform.level, transform.positive * 1]
    warped = warp_nearest(pixels, matrix)

    products = jnp.asarray(_products(space))[transform.level]
    grey = luma(pixels)
    counts = histogram(pixels)
    fixed = jnp.asarray(_tables(space))[transform.op, transform.level].astype(jnp.int32)
    flat = blend(_mean_level(grey), jnp.arange(256), products)
    table = jnp.where(kind == _CONTRAST, flat, fixed)[None]
    table = jnp.where(kind == _STRETCH, jax.vmap(autocontrast_table)(counts), table)
    table = jnp.where(kind == _EQUALIZE, jax.vmap(equalize_table)(counts), table)
    looked_up = jax.vmap(lambda t, v: t[v], (0, 2), 2)(table, pixels)

    degenerate = jnp.where(kind == _SHARPNESS, smooth(pixels), grey[..., None])
    blended = blend(degenerate, pixels, products)

    out = jnp.where(kind == _WARP, warped, jnp.where((kind == _COLOR) | (kind == _SHARPNESS), blended, looked_up))
    if image.dtype == jnp.uint8:
        return out.astype(jnp.uint8)
    still = jnp.asarray([op == "identity" for op in space.ops])[transform.op]
    return jnp.where(still, image, (out / 255.0).astype(image.dtype))


def to_uint8(image: Shaped[Array, "*dims"]) -> Shaped[Array, "*dims"]:
    """Floats in [0, 1] as uint8, rounded to the nearest; uint8 as it is."""
    if image.dtype == jnp.uint8:
        return image
    return jnp.round(jnp.clip(jnp.nan_to_num(image), 0.0, 1.0) * 255.0).astype(jnp.uint8)


def to_float(image: Shaped[Array, "*dims"]) -> Float[Array, "*dims"]:
    """uint8 as float32 in [0, 1]; floats as they are."""
    return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image


def warp_nearest(pixels: Int[Array, "h w c"], matrix: Int[Array, "6"]) -> Int[Array, "h w c"]:
    """An affine map from output to input places, in 16.16 fixed point; what lies outside is 0.

    Args:
      pixels: ``[H, W, C]``.
      matrix: ``(a, b, c, d, e, f)`` times 65536, pixel centres included: the output pixel (x, y) shows the input pixel
        (floor(a x + b y + c), floor(d x + e y + f)).
    """
    height, width, channels = pixels.shape
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    column = (matrix[0] * x + matrix[1] * y + matrix[2]) >> 16
    row = (matrix[3] * x + matrix[4] * y + matrix[5]) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    flat = pixels.reshape(height * width, channels)
    return jnp.where(inside[..., None], flat[jnp.where(inside, row * width + column, 0)], 0)


def luma(pixels: Int[Array, "h w c"]) -> Int[Array, "h w"]:
    """ITU-R 601 luma in PIL's integer weights; the only channel of a grey image."""
    if pixels.shape[-1] == 1:
        return pixels[..., 0]
    return (pixels[..., 0] * 19595 + pixels[..., 1] * 38470 + pixels[..., 2] * 7471 + 0x8000) >> 16


def histogram(pixels: Int[Array, "h w c"]) -> Int[Array, "c 256"]:
    """How often each value 0..255 occurs in each channel."""
    channels = pixels.shape[-1]
    return jnp.zeros((channels, 256), jnp.int32).at[jnp.arange(channels), pixels].add(1)


def smooth(pixels: Int[Array, "h w c"]) -> Int[Array, "h w c"]:
    """Convolution with [1 1 1; 1 5 1; 1 1 1] / 13, rounded; the border is copied."""
    height, width, _ = pixels.shape
    wide = jnp.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    total = 4 * pixels
    for dy in range(3):
        for dx in range(3):
            total = total + wide[dy : dy + height, dx : dx + width]
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    # 13 is odd: there are no ties, so integers round as floats do.  A select, because XLA's CPU compiler (0.10) writes
    # an update of the inner slice into the buffer whose neighbours it still reads.
    return jnp.where(inside, (2 * total + 13) // 26, pixels)


def autocontrast_table(counts: Int[Array, "256"]) -> Int[Array, "256"]:
    """The table that stretches one channel's range to 0..255, by its histogram.

    PIL truncates ``v * (255 / (hi - lo)) - lo * (255 / (hi - lo))`` in double precision, so some exact integers come
    out one lower (white as 254); those entries are a table here.
    """
    value = jnp.arange(256)
    present = counts > 0
    low, high = jnp.argmax(present), 255 - jnp.argmax(present[::-1])
    stretched = jnp.clip(255 * (value - low) // jnp.maximum(high - low, 1), 0, 255)
    rows, short = _truncated_below()
    stretched = stretched.at[jnp.asarray(short)[jnp.asarray(rows)[low, high]]].add(-1, mode="drop")
    return jnp.where(high > low, stretched, value)


def equalize_table(counts: Int[Array, "256"]) -> Int[Array, "256"]:
    """PIL's histogram equalisation of one channel: cumulative counts in steps of (all but the last value's) / 255."""
    value = jnp.arange(256)
    present = counts > 0
    last = counts[255 - jnp.argmax(present[::-1])]
    step = (jnp.sum(counts) - last) // 255
    before = jnp.cumsum(counts) - counts
    table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
    return jnp.where((step > 0) & (jnp.sum(present) > 1), table, value)


def blend(degenerate: Int[Array, "..."], pixels: Int[Array, "..."], products: Float[Array, "511"]) -> Array:
    """``degenerate + factor (pixels - degenerate)``, truncated and clipped to 0..255.

    Args:
      degenerate, pixels: values 0..255 of shapes that broadcast.
      products: factor times -255..255, each rounded to float32: a fused multiply-add would not round between.
    """
    mixed = degenerate + products[pixels - degenerate + 255]
    return jnp.clip(mixed, 0.0, 255.0).astype(jnp.int32)


def _mean_level(grey: Int[Array, "h w"]) -> Int[Array, ""]:
    # int(mean + 0.5)
    return (2 * jnp.sum(grey) + grey.size) // (2 * grey.size)


@functools.cache
def _matrices(space: AugmentationSpace, height: int, width: int) -> np.ndarray:
    """i32 ``[ops, levels, sign, 6]``: every warp of a space in fixed point; other operations have the identity."""
    out = np.empty((len(space.ops), space.levels, 2, 6), np.int32)
    for i, op in enumerate(space.ops):
        for level in range(space.levels):
            for positive in (0, 1):
                a, b, c, d, e, f = _matrix(space, op, level, 1 if positive else -1, height, width)
                places = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
                out[i, level, positive] = [math.floor(v * 65536.0 + 0.5) for v in places]
    return out


def _matrix(
    space: AugmentationSpace, op: str, level: int, sign: int, height: int, width: int
) -> tuple[int | float, ...]:
    # output to input, origin at the upper left corner; angles and shifts are truncated to integers
    top = space.levels - 1
    if op == "rotate":
        return _rotation(sign * int(level * space.rotate / top), height, width)
    shear, shift = sign * (float(level) * space.shear / top), sign * int(level * space.translate / top)
    across = shear if op == "shear_x" else 0
    down = shear if op == "shear_y" else 0
    return 1, across, shift if op == "translate_x" else 0, down, 1, shift if op == "translate_y" else 0


def _rotation(degrees: int, height: int, width: int) -> tuple[int | float, ...]:
    # counter-clockwise about the centre, rounded to 15 places as PIL does
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


@functools.cache
def _factors(space: AugmentationSpace) -> np.ndarray:
    low, high = space.enhance
    top = space.levels - 1
    return np.array([float(level) * (high - low) / top + low for level in range(space.levels)]).astype(np.float32)


@functools.cache
def _products(space: AugmentationSpace) -> np.ndarray:
    """f32 ``[levels, 511]``: each level's factor times -255..255."""
    return _factors(space)[:, None] * np.arange(-255, 256, dtype=np.float32)


@functools.cache
def _tables(space: AugmentationSpace) -> np.ndarray:
    """u8 ``[ops, levels, 256]``: what solarize, posterize and brightness make of each value; the rest changes none."""
    value = np.arange(256)
    out = np.tile(value.astype(np.uint8), (len(space.ops), space.levels, 1))
    top = space.levels - 1
    for i, op in enumerate(space.ops):
        for level in range(space.levels):
            if op == "solarize":
                out[i, level] = np.where(value < 256 - int(level * 256 / top), value, 255 - value)
            elif op == "posterize":
                out[i, level] = value & ~((1 << int(level * space.posterize / top)) - 1)
            elif op == "brightness":
                out[i, level] = np.clip(_products(space)[level, 255:], 0, 255).astype(np.uint8)
    return out


@functools.cache
def _truncated_below() -> tuple[np.ndarray, np.ndarray]:
    """Where double precision falls just short of an integer in :func:`autocontrast_table`.

    Returns:
      i32 ``[256, 256]`` by (lowest, highest value): a row of the second array, u16 ``[rows, 17]``: the values whose
      entry is one lower, filled up with 256.  Row 0 has none.
    """
    value = np.arange(256)
    rows, short = np.zeros((256, 256), np.int32), [np.full(256, 256)]
    for low in range(255):
        high = np.arange(low + 1, 256)[:, None]
        scale = 255.0 / (high - low)
        truncated = (value * scale + -low * scale).astype(np.int64)
        lower = (truncated < 255 * (value - low) // (high - low)) & (value >= low) & (value <= high)
        for h in np.flatnonzero(lower.any(1)):
            rows[low, low + 1 + h] = len(short)
            short.append(np.sort(np.where(lower[h], value, 256)))
    table = np.stack(short)
    return rows, table[:, : int((table < 256).sum(1).max())].astype(np.uint16)
