"""Simplex prototypes: class directions as far apart as directions can be, known before any model is trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def simplex_prototypes(num_classes: int, dtype: Any = jnp.float32) -> Float[Array, "k n"]:
    """The vertices of a regular simplex around the origin: ``[K, K-1]``, the smallest space that holds K of them.

    Rows have unit length, their inner products are -1 / (K-1) and they add up to zero.  The same for every caller, so
    that models trained apart can share them.  Computed in float64, whatever ``dtype`` is.

    Args:
      num_classes: K, at least 2, static.
      dtype: of the result.

    Raises:
      ValueError: fewer than two classes.
    """
    return jnp.asarray(_vertices(num_classes), dtype)


def etf_prototypes(
    num_classes: int, dim: int, key: Array | None = None, dtype: Any = jnp.float32
) -> Float[Array, "k d"]:
    """A simplex equiangular tight frame ``[K, d]`` in a space with room to spare.

    Args:
      num_classes: K, at least 2, static.
      dim: d, at least K-1, static.
      key: turns the simplex into a random (K-1)-dimensional subspace of the d dimensions; by default it lies in the
        first K-1 coordinates, and with d = K-1 it is :func:`simplex_prototypes`.
      dtype: of the result.

    Raises:
      ValueError: fewer than two classes, or ``dim`` below K-1.
    """
    vertices = _vertices(num_classes)
    if dim < num_classes - 1:
        raise ValueError(
            f"{num_classes} prototypes with equal angles need at least {num_classes - 1} dimensions, got {dim}"
        )
    if key is None:
        return jnp.asarray(np.pad(vertices, ((0, 0), (0, dim - num_classes + 1))), dtype)
    basis, triangle = jnp.linalg.qr(jax.random.normal(key, (dim, num_classes - 1)))
    # with the signs of R's diagonal the basis is uniformly distributed
    basis = basis * jnp.where(jnp.diagonal(triangle) < 0, -1.0, 1.0)
    turned = jnp.matmul(jnp.asarray(vertices, jnp.float32), basis.T, precision=jax.lax.Precision.HIGHEST)
    return turned.astype(dtype)


def _vertices(num_classes: int) -> np.ndarray:
    if num_classes < 2:
        raise ValueError(f"a simplex needs at least 2 classes, got {num_classes}")
    n = num_classes - 1
    # the unit vectors, and the point on the diagonal that is as far from each as they are from each other
    rows = np.concatenate([np.eye(n), np.full((1, n), (1 - np.sqrt(1.0 + n)) / n)])
    rows -= rows.mean(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
