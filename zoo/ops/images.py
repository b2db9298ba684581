"""Image augmentations that jit and vmap: one example, one key, by dm-pix; images are float ``[H, W, C]`` in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

import dm_pix as pix
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Image = Float[Array, "h w c"]
Augmentation = Callable[[Array, Array], Array]


def random_flip(key: Array, image: Image) -> Image:
    """Mirrors left and right with probability one half."""
    return pix.random_flip_left_right(key, image)


def random_crop(key: Array, image: Image, padding: int = 4) -> Image:
    """Pads every side by reflection and cuts a window of the old size at a random place.

    Args:
      key, image: see the module.
      padding: pixels on each side, less than height and width.

    Raises:
      ValueError: a padding that reflection cannot give.
    """
    height, width, _ = image.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding must be in [0, {min(height, width)}) for a {height} x {width} image, got {padding}")
    wide = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    return pix.random_crop(key, wide, image.shape)


def random_brightness(key: Array, image: Image, most: float = 0.2) -> Image:
    """Adds one number drawn uniformly from [-most, most] and clips to [-1, 1].

    Raises:
      ValueError: ``most`` is negative.
    """
    if most < 0:
        raise ValueError(f"most must not be negative, got {most}")
    return jnp.clip(pix.random_brightness(key, image, most), -1.0, 1.0)


def random_contrast(key: Array, image: Image, lower: float = 0.7, upper: float = 1.3) -> Image:
    """Scales the distance from each channel's mean by a factor drawn uniformly from [lower, upper], and clips.

    Raises:
      ValueError: not 0 < lower < upper.
    """
    if not 0 < lower < upper:
        raise ValueError(f"need 0 < lower < upper, got lower {lower} and upper {upper}")
    return jnp.clip(pix.random_contrast(key, image, lower, upper), -1.0, 1.0)


def cutout(key: Array, image: Image, size: int = 16, fill: float = 0.0) -> Image:
    """Fills one square (DeVries and Taylor 2017): its centre is uniform over the image, so it may stick out.

    Args:
      key, image: see the module.
      size: side of the square in pixels, at least 1.
      fill: the value.

    Raises:
      ValueError: ``size`` below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    height, width, _ = image.shape
    across, down = jax.random.split(key)
    top = jax.random.randint(down, (), 0, height) - size // 2
    left = jax.random.randint(across, (), 0, width) - size // 2
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    return jnp.where(inside[..., None], jnp.asarray(fill, image.dtype), image)


def compose(*augmentations: Augmentation) -> Augmentation:
    """Applies augmentations in order, each with a key of its own."""

    def apply(key, image):
        for i, augmentation in enumerate(augmentations):
            image = augmentation(jax.random.fold_in(key, i), image)
        return image

    return apply
