"""Anchors: the samples that spaces are compared through, chosen by id and shared as an ordered list.

An anchor is a *sample* (an image, a word, a node), not a vector: two encoders share the list of ids, and each has its
own latents of it.  The order of the list is part of the contract, since coordinate j of a relative representation is
the similarity to anchor j.  Parallel anchors (translations, image and caption) are one list of ids of pairs.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key, Shaped, UInt

from zoo.ops.fingerprint import fingerprint
from zoo.ops.kmeans import kmeans
from zoo.ops.prototypes import l2_normalize

AnyKey = Key[Array, ""] | UInt[Array, "2"]
METHODS = ("uniform", "stratified", "top_m", "farthest", "kmeans", "fixed")


@struct.dataclass
class AnchorSet:
    """An ordered list of anchors as one encoder sees it.

    Attributes:
      ids: i32 ``[k]``, which samples, in order.
      latents: f32 ``[k, d]`` in one encoder's space, or ``None``.
      inputs: ``[k, ...]``, what to encode them from, or ``None``.
      hash: u32 ``[2]``, checksum of the ids in order; what :func:`check_same_anchors` compares.
    """

    ids: Any
    latents: Any = None
    inputs: Any = None
    hash: Any = None

    @classmethod
    def of(cls, ids: Any, latents: Any = None, inputs: Any = None) -> AnchorSet:
        """An anchor set with its checksum.

        Raises:
          ValueError: latents or inputs that are not one per id.
        """
        ids = jnp.asarray(ids, jnp.int32)
        for name, rows in (("latents", latents), ("inputs", inputs)):
            if rows is not None and rows.shape[0] != ids.shape[0]:
                raise ValueError(f"{rows.shape[0]} anchor {name} for {ids.shape[0]} anchor ids: one per id is needed")
        return cls(ids, latents, inputs, fingerprint(ids))


def check_same_anchors(first: AnchorSet, second: AnchorSet) -> None:
    """Refuses to compare what was projected on different lists (ids or their order); on the host.

    Raises:
      ValueError: the checksums differ; both are named.
    """
    was, now = np.asarray(first.hash), np.asarray(second.hash)
    if not np.array_equal(was, now):
        name = lambda x: "".join(f"{int(v):08x}" for v in x)  # noqa: E731
        raise ValueError(
            f"models were projected on different anchors ({first.ids.shape[0]} with checksum {name(was)}, "
            f"{second.ids.shape[0]} with {name(now)}): use one list of ids in one order for both"
        )


def check_anchors(anchors: AnchorSet) -> None:
    """Refuses anchors that have no direction and warns of repeated ones; on the host.

    Raises:
      ValueError: latents that are not finite, or of zero length; the first such anchor is named.
    """
    ids = np.asarray(anchors.ids)
    if len(np.unique(ids)) < len(ids):
        seen, counts = np.unique(ids, return_counts=True)
        warnings.warn(
            f"{int((counts - 1).sum())} of {len(ids)} anchors are duplicates (first: id {int(seen[counts > 1][0])}): "
            "their coordinates repeat",
            stacklevel=2,
        )
    if anchors.latents is None:
        return
    latents = np.asarray(anchors.latents, np.float64)
    for what, bad in (
        ("is not finite", ~np.isfinite(latents).all(1)),
        ("has zero length, so no direction", np.abs(latents).max(1) <= 1e-12),
    ):
        if bad.any():
            place = int(bad.argmax())
            raise ValueError(f"the latent of anchor {place} (id {int(ids[place])}) {what}; choose another anchor")


def select_anchors(
    key: AnyKey,
    k: int,
    method: str = "uniform",
    *,
    n: int | None = None,
    latents: Float[Array, "n d"] | None = None,
    labels: Int[Array, "n"] | None = None,
    top_m: int | None = None,
    ids: Any = None,
) -> Int[Array, "k"]:
    """Chooses k of n candidates (brief, "Anchor selection").

    Args:
      key: share it (or the result) between encoders.
      k: anchors.
      method: ``"uniform"`` without replacement (the paper's default); ``"stratified"``: candidates shuffled, then one
        of each class in turn until there are k; ``"top_m"``: uniform among the first ``top_m`` candidates (words by
        frequency), in increasing order as the released code sorts its words; ``"farthest"``:
        :func:`farthest_points`; ``"kmeans"``: :func:`nearest_to_centroids`; ``"fixed"``: ``ids`` as given, checked.
      n: number of candidates, where neither latents nor labels say it.
      latents: for farthest and kmeans, of ONE encoder; the ids then serve all.
      labels: for stratified.
      top_m: for top_m.
      ids: for fixed.

    Returns:
      i32 ``[k]``, ids of different candidates (fixed ones as given).

    Raises:
      ValueError: an unknown method, what it needs missing, or k out of range.
    """
    needs = {"stratified": ("labels", labels), "top_m": ("top_m", top_m), "farthest": ("latents", latents),
             "kmeans": ("latents", latents), "fixed": ("ids", ids)}  # fmt: skip
    if method not in METHODS:
        raise ValueError(f"anchor method must be one of {', '.join(METHODS)}; got {method!r}")
    if method in needs and needs[method][1] is None:
        raise ValueError(f"anchor method {method!r} needs {needs[method][0]}")
    n = latents.shape[0] if latents is not None else labels.shape[0] if labels is not None else n
    if n is None:
        raise ValueError(f"anchor method {method!r} needs the number of candidates n, their latents or their labels")
    if method == "top_m" and not 1 <= top_m <= n:
        raise ValueError(f"top_m must be in [1, {n}], the candidates; got {top_m}")
    most = top_m if method == "top_m" else n
    if not 1 <= k <= most and method != "fixed":
        raise ValueError(f"the number of anchors must be in [1, {most}], the candidates; got {k}")
    if method == "fixed":
        return _fixed(ids, k, n)
    if method == "farthest":
        return farthest_points(key, latents, k)
    if method == "kmeans":
        return nearest_to_centroids(key, latents, k)
    order = jax.random.permutation(key, most).astype(jnp.int32)
    if method == "top_m":
        return jnp.sort(order[:k])
    return order[:k] if method == "uniform" else order[_round_robin(labels[order])][:k]


def _fixed(ids: Any, k: int, n: int) -> Array:
    given = np.asarray(ids)
    if given.ndim != 1 or len(given) != k or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"fixed anchors must be {k} integer ids [k], got {given.dtype} {given.shape}")
    bad = (given < 0) | (given >= n)
    if bad.any():
        raise ValueError(f"anchor id {int(given[bad][0])} is not in [0, {n}), the candidates")
    return jnp.asarray(given, jnp.int32)


def _round_robin(labels: Array) -> Array:
    # the i-th of every class before the (i+1)-th of any; within a round by class
    n = labels.shape[0]
    by_class = jnp.argsort(labels, stable=True)
    sorted_labels = labels[by_class]
    first = jnp.searchsorted(sorted_labels, sorted_labels, side="left")
    turn = jnp.zeros(n, jnp.int32).at[by_class].set(jnp.arange(n, dtype=jnp.int32) - first.astype(jnp.int32))
    return jnp.lexsort((labels, turn))


def farthest_points(key: AnyKey, latents: Float[Array, "n d"], k: int) -> Int[Array, "k"]:
    """Farthest point sampling on unit sphere: a random start, then always the point farthest from those chosen.

    Keeps the distance of each point to the chosen ones, ``[n]``; O(n d) a point.  Ties: the first.
    """
    unit = l2_normalize(latents.astype(jnp.float32))
    start = jax.random.randint(key, (), 0, unit.shape[0])
    square = lambda i: jnp.sum(jnp.square(unit - unit[i]), -1)  # noqa: E731

    def step(i, state):
        chosen, nearest = state
        new = jnp.argmax(nearest).astype(jnp.int32)
        # a chosen point never comes again, even among duplicates
        return chosen.at[i].set(new), jnp.minimum(nearest, square(new)).at[new].set(-1.0)

    nearest = square(start).at[start].set(-1.0)
    return jax.lax.fori_loop(1, k, step, (jnp.zeros(k, jnp.int32).at[0].set(start), nearest))[0]


def nearest_to_centroids(key: AnyKey, latents: Float[Array, "n d"], k: int, iterations: int = 20) -> Int[Array, "k"]:
    """The real sample nearest to each centroid of k-means on unit vectors; a sample taken by one is not taken again."""
    unit = l2_normalize(latents.astype(jnp.float32))
    centroids = kmeans(key, unit, k, iterations).centroids

    def step(i, state):
        chosen, free = state
        far = jnp.where(free, jnp.sum(jnp.square(unit - centroids[i]), -1), jnp.inf)
        new = jnp.argmin(far).astype(jnp.int32)
        return chosen.at[i].set(new), free.at[new].set(False)

    return jax.lax.fori_loop(0, k, step, (jnp.zeros(k, jnp.int32), jnp.ones(unit.shape[0], bool)))[0]


def random_inputs(key: AnyKey, like: Shaped[Array, "n *dims"], k: int) -> Float[Array, "k *dims"]:
    """Anchors that are no samples at all: uniform noise between the least and the largest value of ``like``."""
    low, high = jnp.min(like).astype(jnp.float32), jnp.max(like).astype(jnp.float32)
    return jax.random.uniform(key, (k, *like.shape[1:]), jnp.float32, low, high)
