"""Segmentation masks from maps: class activation maps, Otsu's threshold, proxy masks, and the Dice coefficient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Number = float | int


def otsu_threshold(values: Float[Array, "n"], bins: int = 256) -> Float[Array, ""]:
    """The threshold in [0, 1] between two groups of values that maximises the variance between them (Otsu, 1979)."""
    cells = jnp.clip((values * bins).astype(jnp.int32), 0, bins - 1)
    counts = jnp.zeros(bins, jnp.float32).at[cells].add(1.0)
    centres = (jnp.arange(bins) + 0.5) / bins
    below, total = jnp.cumsum(counts), jnp.sum(counts)
    moment = jnp.cumsum(counts * centres)
    # between-class variance times total^2; the last cut leaves nothing above it
    gap = moment[-1] * below - moment * total
    score = jnp.square(gap) / jnp.maximum(below * (total - below), 1.0)
    return (jnp.argmax(score) + 1.0) / bins


def proxy_mask(
    attention: Float[Array, "b h w 1"], size: tuple[int, int], threshold: Number | None = None
) -> Bool[Array, "b i j"]:
    """Foreground masks from attention maps: upsampled, scaled to [0, 1] by image, cut (a reconstruction).

    Args:
      attention: maps of any size.
      size: height and width of the masks.
      threshold: a fixed cut; by default :func:`otsu_threshold` of each image.  A map that is constant is background.
    """
    up = jax.image.resize(attention[..., 0], (attention.shape[0], *size), "bilinear")
    low, high = jnp.min(up, (1, 2), keepdims=True), jnp.max(up, (1, 2), keepdims=True)
    scaled = (up - low) / jnp.where(high > low, high - low, 1.0)
    cut = jax.vmap(lambda m: otsu_threshold(m.reshape(-1)))(scaled) if threshold is None else jnp.asarray(threshold)
    return scaled > cut.reshape(-1, 1, 1)


def dice(predicted: Bool[Array, "b h w"], truth: Bool[Array, "b h w"]) -> Float[Array, "b"]:
    """``2 |P and T| / (|P| + |T|)`` of each image; 1 where both are empty."""
    both = jnp.sum(predicted & truth, (1, 2))
    sizes = jnp.sum(predicted, (1, 2)) + jnp.sum(truth, (1, 2))
    return jnp.where(sizes > 0, 2.0 * both / jnp.maximum(sizes, 1), 1.0)


def class_activation_map(
    features: Float[Array, "b h w d"], weights: Float[Array, "c d"], classes: Int[Array, "b"]
) -> Float[Array, "b h w 1"]:
    """A classifier's evidence for a class at each place (CAM; Zhou et al., CVPR 2016, equation 2).

    The classifier is linear on mean-pooled features, so that the mean of a map is the class's logit.

    Args:
      features: before pooling.
      weights: of the classifier, a row a class.
      classes: the class of each image that is asked about, usually the predicted one.
    """
    return jnp.einsum("bhwd,bd->bhw", features, weights[classes], precision="highest")[..., None]
