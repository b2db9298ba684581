"""Distances between two sets of samples: sliced Wasserstein-1, kernel MMD, and precision and recall of manifolds.

All are exact for the given directions and sets, seeded by the caller's key, and work in chunks, so that memory is that
of one chunk.  Samples are rows ``[N, d]``; flatten images first.  Lower is better for the two distances.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wasserstein_1d(x: Float[Array, " n"], y: Float[Array, " m"]) -> Float[Array, ""]:
    """Wasserstein-1 distance of two empirical distributions on the line: the area between their step functions."""
    cuts = jnp.sort(jnp.concatenate([x, y]))
    below_x = jnp.searchsorted(jnp.sort(x), cuts[:-1], side="right") / x.shape[0]
    below_y = jnp.searchsorted(jnp.sort(y), cuts[:-1], side="right") / y.shape[0]
    return jnp.sum(jnp.abs(below_x - below_y) * jnp.diff(cuts))


def sliced_wasserstein(
    x: Float[Array, "n d"], y: Float[Array, "m d"], key: Array, projections: int = 128, chunk: int = 16
) -> Float[Array, ""]:
    """Mean over random directions of the Wasserstein-1 distance of the projections (Rabin et al. 2011).

    Args:
      x, y: two sets; their sizes may differ.
      key: of the directions; use the same one for everything that is compared.
      projections: number of directions, uniform on the sphere.
      chunk: directions at a time.

    Raises:
      ValueError: fewer than one projection.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    directions = jax.random.normal(key, (projections, x.shape[1]))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    distances = jax.lax.map(lambda v: wasserstein_1d(x @ v, y @ v), directions, batch_size=chunk)
    return jnp.mean(distances)


def median_bandwidth(x: Float[Array, "n d"], limit: int = 1000) -> Float[Array, ""]:
    """The median distance between two different rows among the first ``limit``: the usual bandwidth of a kernel."""
    x = x[:limit]
    squares = squared_distances(x, x)
    upper = jnp.triu_indices(x.shape[0], 1)
    return jnp.sqrt(jnp.median(squares[upper]))


def mmd_rbf(
    x: Float[Array, "n d"], y: Float[Array, "m d"], bandwidth: float | Float[Array, ""], chunk: int = 1024
) -> Float[Array, ""]:
    """Unbiased squared maximum mean discrepancy with the kernel ``exp(-|a - b|^2 / (2 bandwidth^2))`` (Gretton 2012).

    It may be slightly negative when the distributions agree.

    Args:
      x, y: two sets of at least two rows.
      bandwidth: take it from the data (``median_bandwidth``), not from the samples.
      chunk: rows of the kernel matrix at a time.

    Raises:
      ValueError: a set with fewer than two rows.
    """
    n, m = x.shape[0], y.shape[0]
    if min(n, m) < 2:
        raise ValueError(f"the unbiased estimate needs two rows or more in each set, got {n} and {m}")

    def total(a, b):
        row = lambda r: jnp.sum(jnp.exp(-jnp.sum((r - b) ** 2, -1) / (2 * bandwidth**2)))  # noqa: E731
        return jnp.sum(jax.lax.map(row, a, batch_size=min(chunk, a.shape[0])))

    # a row's kernel with itself is 1 and does not belong in the unbiased mean
    within = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def precision_recall(
    samples: Float[Array, "n d"], real: Float[Array, "m d"], k: int = 3, chunk: int = 256
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of samples that lie within the k-th neighbour distance of some real example, recall the share
    of real examples that lie within that of some sample.

    Raises:
      ValueError: ``k`` not smaller than both sets.
    """
    if not 1 <= k < min(samples.shape[0], real.shape[0]):
        raise ValueError(f"k must lie in [1, {min(samples.shape[0], real.shape[0]) - 1}], got {k}")

    def radii(a):
        # the nearest neighbour of a row in its own set is the row itself, so the k-th other one is number k + 1
        kth = lambda r: -jax.lax.top_k(-jnp.sum((r - a) ** 2, -1), k + 1)[0][-1]  # noqa: E731
        return jax.lax.map(kth, a, batch_size=min(chunk, a.shape[0]))

    def covered(points, centres):
        limits = radii(centres)
        inside = lambda r: jnp.any(jnp.sum((r - centres) ** 2, -1) <= limits)  # noqa: E731
        return jnp.mean(jax.lax.map(inside, points, batch_size=min(chunk, points.shape[0])).astype(jnp.float32))

    return covered(samples, real), covered(real, samples)


def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Squared Euclidean distances of all pairs, by differences: exact where ``|x|^2 - 2xy + |y|^2`` would cancel."""
    return jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
