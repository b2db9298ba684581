"""How good predictions of a number are: MAE, MSE, G-mean, Pearson and Spearman, over all and by shot region."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

REGIONS = ("all", "many", "median", "few")
"""Shot regions, by how often a label occurs in training."""

Mask = Bool[Array, "n"] | None


def mae(prediction: Float[Array, "n"], target: Float[Array, "n"], mask: Mask = None) -> Float[Array, ""]:
    """Mean absolute error over the rows of the mask; NaN for none."""
    return _mean(jnp.abs(prediction - target), mask)


def mse(prediction: Float[Array, "n"], target: Float[Array, "n"], mask: Mask = None) -> Float[Array, ""]:
    """Mean squared error over the rows of the mask; NaN for none."""
    return _mean(jnp.square(prediction - target), mask)


def gmean(prediction: Float[Array, "n"], target: Float[Array, "n"], mask: Mask = None) -> Float[Array, ""]:
    """Geometric mean of absolute errors, an error of 0 counted as 1e-10 (Yang et al., ICML 2021); NaN for no rows."""
    error = jnp.abs(prediction - target)
    return jnp.exp(_mean(jnp.log(jnp.where(error == 0, 1e-10, error)), mask))


def pearson(a: Float[Array, "n"], b: Float[Array, "n"], mask: Mask = None) -> Float[Array, ""]:
    """Pearson's correlation; NaN where either is constant."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    a, b = a - _mean(a, mask), b - _mean(b, mask)
    return _mean(a * b, mask) / jnp.sqrt(_mean(a * a, mask) * _mean(b * b, mask))


def spearman(a: Float[Array, "n"], b: Float[Array, "n"], mask: Mask = None) -> Float[Array, ""]:
    """Spearman's rank correlation, tied values at their mean rank; NaN where either is constant."""
    return pearson(mean_ranks(a, mask), mean_ranks(b, mask), mask)


def mean_ranks(values: Float[Array, "n"], mask: Mask = None) -> Float[Array, "n"]:
    """Ranks from 1 among the rows of the mask, ties at the mean of theirs; rows outside get ranks without meaning."""
    values = values if mask is None else jnp.where(mask, values, jnp.inf)
    ordered = jnp.sort(values)
    first = jnp.searchsorted(ordered, values, side="left")
    last = jnp.searchsorted(ordered, values, side="right")
    return (first + last + 1).astype(jnp.float32) / 2


def regression_metrics(
    prediction: Float[Array, "n"], target: Float[Array, "n"], mask: Mask = None
) -> dict[str, Float[Array, ""]]:
    """All five: ``mae``, ``mse``, ``gmean``, ``pearson``, ``spearman``."""
    functions = {"mae": mae, "mse": mse, "gmean": gmean, "pearson": pearson, "spearman": spearman}
    return {name: f(prediction, target, mask) for name, f in functions.items()}


def shot_regions(
    labels: Shaped[np.ndarray, "n"], train_labels: Shaped[np.ndarray, "m"], many: int = 100, few: int = 20
) -> dict[str, Bool[np.ndarray, "n"]]:
    """Which test rows belong to which region: their label occurs in training > many, few .. many, or < few times.

    Args:
      labels: of the test rows.
      train_labels: labels of the training set, binned alike.
      many, few: the bounds; both count as median.

    Raises:
      ValueError: bounds that do not rise.
    """
    if not 0 < few <= many:
        raise ValueError(f"shot bounds must rise from above 0, got few {few} and many {many}")
    known, counts = np.unique(train_labels, return_counts=True)
    place = np.clip(np.searchsorted(known, labels), 0, len(known) - 1)
    count = np.where(known[place] == labels, counts[place], 0)
    return {
        "all": np.ones(len(labels), bool),
        "many": count > many,
        "median": (count >= few) & (count <= many),
        "few": count < few,
    }


def by_shot(
    prediction: Float[np.ndarray, "n"],
    target: Float[np.ndarray, "n"],
    labels: Shaped[np.ndarray, "n"],
    train_labels: Shaped[np.ndarray, "m"],
    many: int = 100,
    few: int = 20,
) -> dict[str, dict[str, float]]:
    """:func:`regression_metrics` of every region that holds test rows, and ``rows``, their number.

    A correlation that does not exist (a region of one label) is left out.

    Args:
      prediction, target: of the test rows.
      labels, train_labels, many, few: see :func:`shot_regions`; bins, where the target is continuous.
    """
    found = {}
    for region, rows in shot_regions(labels, train_labels, many, few).items():
        if rows.any():
            p, t = jnp.asarray(prediction[rows], jnp.float32), jnp.asarray(target[rows], jnp.float32)
            values = {name: float(v) for name, v in regression_metrics(p, t).items()}
            found[region] = {k: v for k, v in values.items() if np.isfinite(v)} | {"rows": float(rows.sum())}
    return found


def _mean(values: Array, mask: Mask) -> Array:
    if mask is None:
        return jnp.mean(values.astype(jnp.float32))
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0)) / jnp.sum(mask)
