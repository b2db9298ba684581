"""Clusters on the sphere with known concentrations: what embeddings of classes look like when some are tighter."""

from __future__ import annotations

import numpy as np

from data.dataset import Dataset
from data.stream import DataError


def von_mises_fisher(rng: np.random.Generator, mean: np.ndarray, kappa: float, size: int) -> np.ndarray:
    """Samples of a von Mises-Fisher distribution on the unit sphere (Wood, 1994, algorithm VM*).

    Args:
      rng: of the draw.
      mean: ``[d]`` unit vector, d at least 2.
      kappa: concentration, positive; the mean resultant length rises with it from 0 to 1.
      size: how many.

    Returns:
      float64 ``[size, d]`` unit rows.

    Raises:
      DataError: a mean of fewer than two dimensions, or a concentration that is not positive.
    """
    mean = np.asarray(mean, np.float64)
    if mean.ndim != 1 or len(mean) < 2 or not kappa > 0:
        raise DataError(f"expected a mean [d] with d at least 2 and kappa above 0, got {mean.shape} and {kappa}")
    d = len(mean)
    b = (d - 1) / (2 * kappa + np.sqrt(4 * kappa**2 + (d - 1) ** 2))
    x = (1 - b) / (1 + b)
    c = kappa * x + (d - 1) * np.log(1 - x**2)
    heights = np.empty(0)
    while len(heights) < size:  # the acceptance rate is above 0.6 for every kappa
        z = rng.beta((d - 1) / 2, (d - 1) / 2, 2 * size)
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        kept = kappa * w + (d - 1) * np.log(1 - x * w) - c >= np.log(rng.random(2 * size))
        heights = np.concatenate([heights, w[kept]])
    w = heights[:size, None]
    side = rng.normal(size=(size, d))
    side -= (side @ mean)[:, None] * mean
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    return w * mean + np.sqrt(np.maximum(1 - w**2, 0)) * side


def vmf_clusters(
    seed: int = 0,
    train_classes: int = 40,
    test_classes: int = 16,
    per_class: int = 40,
    dimension: int = 12,
    nuisance: int = 12,
    kappa: tuple[float, float] = (30.0, 300.0),
    noise: float = 0.6,
) -> Dataset:
    """Classes of very different spread, seen through a fixed nonlinear map with nuisance mixed in; open world.

    Latent points are von Mises-Fisher clusters around random means, their concentrations spread evenly in the
    logarithm over ``kappa``; Gaussian nuisance dimensions join them, and a fixed random two-layer map (``tanh``) makes
    the inputs.  The test classes are others than the training classes.

    Args:
      seed: of everything.
      train_classes, test_classes, per_class: sizes.
      dimension, nuisance: latent dimensions that tell the classes, and that do not.
      kappa: smallest and largest concentration.
      noise: standard deviation of the nuisance.

    Returns:
      Splits ``train`` and ``test`` with ``x`` float32 ``[N, 2 (dimension + nuisance)]`` and ``label``; ``info`` holds
      ``kappa`` by split.

    Raises:
      DataError: sizes below 2 or concentrations that do not rise.
    """
    if min(train_classes, test_classes, per_class, dimension) < 2 or nuisance < 0:
        raise DataError(
            "train_classes, test_classes, per_class and dimension must be at least 2 and nuisance at least 0; got "
            f"{train_classes}, {test_classes}, {per_class}, {dimension} and {nuisance}"
        )
    if not 0 < kappa[0] <= kappa[1]:
        raise DataError(f"kappa must be a positive range (smallest, largest), got {kappa}")
    rng = np.random.default_rng(seed)
    width = dimension + nuisance
    first = rng.normal(size=(width, 2 * width)) / np.sqrt(width)
    second = rng.normal(size=(2 * width, 2 * width)) / np.sqrt(2 * width)
    splits, info = {}, {}
    for name, classes in (("train", train_classes), ("test", test_classes)):
        means = rng.normal(size=(classes, dimension))
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        spread = rng.permutation(np.geomspace(*kappa, classes))
        latent = np.concatenate([von_mises_fisher(rng, m, k, per_class) for m, k in zip(means, spread, strict=True)])
        latent = np.concatenate([2.0 * latent, noise * rng.normal(size=(len(latent), nuisance))], 1)
        x = np.tanh(np.tanh(latent @ first) @ second * 2.0)
        splits[name] = {"x": x.astype(np.float32), "label": np.repeat(np.arange(classes), per_class).astype(np.int32)}
        info[name] = spread
    return Dataset("vmf", splits, {"num_classes": train_classes, "kappa": info, "seed": seed, "std": 1.0})
