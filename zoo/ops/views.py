"""Stacks of image augmentations by letter, as contrastive learning uses them: one example, one key, under jit and vmap.

Images are float ``[H, W, C]`` in [-1, 1] (see :mod:`zoo.ops.images`).  A stack is a word over the letters

====== =================================================================================================
``a``  random resized crop: a share of the area in [0.08, 1], aspect ratio in [3/4, 4/3], back to the old size
``b``  Gaussian blur with probability 0.5
``c``  grayscale with probability 0.2
``d``  colour jitter with probability 0.8: brightness, contrast and, with three channels, saturation and hue
``e``  horizontal flip with probability 0.5
====== =================================================================================================

so that ``a``, ``ab``, ``abc``, ``abcd``, ``abcde`` are sets of one to five types (amcl brief, "Augmentation sets").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import dm_pix as pix
import jax
import jax.numpy as jnp
from jaxtyping import Array

from zoo.ops.images import Augmentation, Image, compose, random_brightness, random_contrast, random_flip


def random_resized_crop(
    key: Array, image: Image, smallest: float = 0.08, ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Image:
    """Cuts a rectangle of random area and shape and enlarges it, by linear interpolation, to the image's size.

    Args:
      key, image: see the module.
      smallest: least share of the area, in (0, 1]; the share is uniform up to 1.
      ratio: least and greatest aspect ratio (width over height, of the image's own); its logarithm is uniform.

    Raises:
      ValueError: a share outside (0, 1], or ratios that are not positive and in order.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest must lie in (0, 1], got {smallest}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio needs 0 < low <= high, got {ratio}")
    height, width, channels = image.shape
    area_key, shape_key, down_key, across_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (), minval=smallest, maxval=1.0)
    log_ratio = jax.random.uniform(shape_key, (), minval=math.log(ratio[0]), maxval=math.log(ratio[1]))
    # sides as shares of the image's; a rectangle that would stick out is cut to fit
    share = jnp.minimum(jnp.sqrt(area) * jnp.exp(jnp.stack([-log_ratio, log_ratio]) / 2), 1.0)
    corner = jnp.stack([jax.random.uniform(down_key), jax.random.uniform(across_key)]) * (1 - share)
    size = jnp.asarray([height, width], jnp.float32)
    out = jax.image.scale_and_translate(
        image.astype(jnp.float32), image.shape, (0, 1), 1 / share, -corner * size / share, "linear", antialias=False
    )
    return jnp.clip(out, -1.0, 1.0).astype(image.dtype)


def random_blur(key: Array, image: Image, sigma: tuple[float, float] = (0.1, 2.0), extent: float = 0.1) -> Image:
    """Convolves with a Gaussian whose deviation, in pixels, is uniform in ``sigma``.

    Args:
      key, image: see the module.
      sigma: least and greatest standard deviation.
      extent: side of the kernel as a share of the image's shorter side, at least 3 pixels (on small images a tenth
        would be no kernel at all).

    Raises:
      ValueError: deviations that are not positive and in order, or a share outside (0, 1].
    """
    if not 0 < sigma[0] <= sigma[1]:
        raise ValueError(f"sigma needs 0 < low <= high, got {sigma}")
    if not 0 < extent <= 1:
        raise ValueError(f"extent must lie in (0, 1], got {extent}")
    side = max(3, 2 * (int(extent * min(image.shape[:2])) // 2) + 1)
    deviation = jax.random.uniform(key, (), minval=sigma[0], maxval=sigma[1])
    # edges repeat, so that blurring darkens no border
    wide = jnp.pad(image, ((side // 2, side // 2), (side // 2, side // 2), (0, 0)), mode="edge")
    return pix.gaussian_blur(wide, deviation, side, padding="VALID")


def grayscale(key: Array, image: Image) -> Image:
    """Every channel becomes the luma (Rec. 601); images without three channels stay.  The key is not used."""
    return pix.rgb_to_grayscale(image, keep_dims=True) if image.shape[-1] == 3 else image


def colour_jitter(key: Array, image: Image, strength: float = 0.5) -> Image:
    """Changes brightness and contrast by up to 0.8 s, and of three channels saturation by 0.8 s and hue by 0.2 s.

    Args:
      key, image: see the module.
      strength: s, in (0, 1].

    Raises:
      ValueError: a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    most = 0.8 * strength
    light, contrast, saturation, hue = jax.random.split(key, 4)
    out = random_contrast(contrast, random_brightness(light, image, most), 1 - most, 1 + most)
    if image.shape[-1] != 3:
        return out
    unit = pix.random_saturation(saturation, (out + 1) / 2, 1 - most, 1 + most)
    unit = pix.random_hue(hue, jnp.clip(unit, 0.0, 1.0), 0.2 * strength)
    return jnp.clip(2 * unit - 1, -1.0, 1.0).astype(image.dtype)


def sometimes(augmentation: Augmentation, probability: float) -> Augmentation:
    """Applies an augmentation with a probability, else returns the image."""

    def apply(key, image):
        own, coin = jax.random.split(key)
        return jnp.where(jax.random.uniform(coin) < probability, augmentation(own, image), image)

    return apply


LETTERS = "abcde"
"""The types of augmentation: crop, blur, grayscale, colour jitter, flip."""


def augmentation_stack(letters: str = "abcde", smallest: float = 0.08, strength: float = 0.5) -> Augmentation:
    """The augmentation that a word of letters names, in the order written.

    Args:
      letters: of ``LETTERS``, each at most once; the module's docstring says what they do.
      smallest: least share of the area in a crop.
      strength: of the colour jitter.

    Raises:
      ValueError: an unknown or a repeated letter, or none.
    """
    strange = sorted(set(letters) - set(LETTERS))
    if strange or not letters or len(set(letters)) != len(letters):
        raise ValueError(f"augmentations are distinct letters of {LETTERS!r}, got {letters!r}")
    known: dict[str, Augmentation] = {
        "a": functools.partial(random_resized_crop, smallest=smallest),
        "b": sometimes(random_blur, 0.5),
        "c": sometimes(grayscale, 0.2),
        "d": sometimes(functools.partial(colour_jitter, strength=strength), 0.8),
        "e": random_flip,
    }
    return compose(*(known[letter] for letter in letters))


def two_of(augmentation: Augmentation) -> Callable[[Array, Array], tuple[Array, Array]]:
    """``(key, image) -> (view, view)``: the augmentation twice, with keys of their own."""

    def views(key, image):
        first, second = jax.random.split(key)
        return augmentation(first, image), augmentation(second, image)

    return views
