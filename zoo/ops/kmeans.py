"""k-means under ``jit``: seeded starts, masks, and no empty clusters; the codebooks of product quantisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize

AnyKey = Key[Array, ""] | UInt[Array, "2"]


@struct.dataclass
class Clusters:
    """What :func:`kmeans` found.

    Attributes:
      centroids: f32 ``[k, d]``.
      assignment: i32 ``[n]``, nearest centroid (ties: the first); masked points too, though they had no say.
      counts: i32 ``[k]``, valid points of each.
      inertia: f32 scalar, summed squared distance of valid points to their centroids.
    """

    centroids: Any
    assignment: Any
    counts: Any
    inertia: Any


def assign(x: Float[Array, "n d"], centroids: Float[Array, "k d"], chunk: int = 4096) -> Int[Array, "n"]:
    """The nearest centroid of each point (squared Euclidean distance; ties: the first), ``chunk`` points at a time."""
    # distances are differences of large numbers unless both are near the origin
    centre = jnp.mean(centroids, 0)
    c = centroids - centre
    half = 0.5 * jnp.sum(jnp.square(c), -1)

    def nearest(points):
        products = jnp.matmul(points - centre, c.T, precision="highest")
        return jnp.argmin(half - products, -1).astype(jnp.int32)

    return in_blocks(nearest, x, chunk)


def kmeans(
    key: AnyKey,
    x: Float[Array, "n d"],
    k: int,
    iterations: int = 20,
    mask: Bool[Array, "n"] | None = None,
    start: str = "++",
    chunk: int = 4096,
    spherical: bool = False,
) -> Clusters:
    """Lloyd's algorithm.

    The start is k-means++ (Arthur and Vassilvitskii 2007: each next centre drawn with probability proportional to the
    squared distance from those there are) or k different points at random.  A cluster that loses all its points moves
    to the point farthest from its centroid, several of them to different points.  With at least as many clusters as
    different points every point becomes a centroid.

    Args:
      key: for the start; nothing else is random.
      x: points.
      k: clusters, at least 1.
      iterations: of assignment and update; a fixed number, so that shapes and time are static.
      mask: points that count; all by default.  At least one must.
      start: ``"++"`` or ``"random"``.
      chunk: points assigned at a time.
      spherical: cluster directions (Dhillon and Modha 2001): points and centroids are scaled to unit length, so that
        the nearest centroid is the one of largest cosine; inertia is the sum of ``2 - 2 cos``.

    Raises:
      ValueError: k or iterations out of range, no points, or an unknown start.
    """
    n = x.shape[0]
    if k < 1 or n < 1:
        raise ValueError(f"k-means needs at least one cluster and one point; got k {k}, {n} points")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    if start not in ("++", "random"):
        raise ValueError(f"start must be '++' or 'random', got {start!r}")
    valid = jnp.ones(n, bool) if mask is None else mask
    weight = valid.astype(jnp.float32)
    x = jnp.where(valid[:, None], x, 0.0).astype(jnp.float32)
    x = l2_normalize(x) if spherical else x
    centroids = (_plus_plus if start == "++" else _random)(key, x, valid, k)

    def lloyd(_, centroids):
        mine = assign(x, centroids, chunk)
        counts = jax.ops.segment_sum(weight, mine, k)
        means = jax.ops.segment_sum(x * weight[:, None], mine, k) / jnp.maximum(counts, 1.0)[:, None]
        means = l2_normalize(means) if spherical else means
        far = jnp.where(valid, jnp.sum(jnp.square(x - centroids[mine]), -1), -1.0)
        # the i-th empty cluster takes the i-th farthest point, as long as there are points
        farthest = jax.lax.top_k(far, min(k, n))[1]
        empty = counts == 0
        rank = jnp.cumsum(empty) - 1
        spare = farthest[jnp.clip(rank, 0, min(k, n) - 1)]
        useful = empty & (rank < n) & (far[spare] > 0)
        return jnp.where(useful[:, None], x[spare], jnp.where(empty[:, None], centroids, means))

    centroids = jax.lax.fori_loop(0, iterations, lloyd, centroids)
    mine = assign(x, centroids, chunk)
    far = jnp.sum(jnp.square(x - centroids[mine]), -1)
    counts = jax.ops.segment_sum(valid.astype(jnp.int32), mine, k)
    return Clusters(centroids, mine, counts, jnp.sum(jnp.where(valid, far, 0.0)))


def _random(key: AnyKey, x: Array, valid: Array, k: int) -> Array:
    # valid points in random order, from the front again if there are fewer than k
    order = jnp.argsort(jnp.where(valid, jax.random.uniform(key, valid.shape), 2.0))
    return x[order[jnp.arange(k) % jnp.maximum(jnp.sum(valid), 1)]]


def _plus_plus(key: AnyKey, x: Array, valid: Array, k: int) -> Array:
    def distance(point):
        return jnp.sum(jnp.square(x - point), -1)

    def draw(i, weight):
        return jax.random.categorical(
            jax.random.fold_in(key, i), jnp.where(valid & (weight > 0), jnp.log(weight), -jnp.inf)
        )

    def step(i, state):
        centroids, nearest = state
        # all points are centres already: any will do
        weight = jnp.where(jnp.any(valid & (nearest > 0)), nearest, 1.0)
        point = x[draw(i, weight)]
        return centroids.at[i].set(point), jnp.minimum(nearest, distance(point))

    point = x[draw(0, jnp.ones(x.shape[0]))]
    centroids = jnp.zeros((k, x.shape[1])).at[0].set(point)
    return jax.lax.fori_loop(1, k, step, (centroids, distance(point)))[0]
