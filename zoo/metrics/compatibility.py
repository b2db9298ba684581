"""Compatibility of models that replace one another: cross-model identification, and the figures made from it.

The entry ``M[i, j]`` of a compatibility matrix is what model i's queries find in the gallery that model j left behind.
Every model's features enter once, already extracted; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import class_means, l2_normalize

BLOCK = 4096
"""Queries compared at a time."""


def class_templates(
    features: Float[Array, "n d"], labels: Int[Array, "n"], num_classes: int, valid: Bool[Array, "n"] | None = None
) -> Float[Array, "k d"]:
    """One template per identity: the mean of its normalised features, normalised again.

    Args:
      features: gallery features, of any length.
      labels: identities in ``[0, num_classes)``; others are dropped.
      num_classes: K, static.
      valid: which rows are real.

    Returns:
      Unit rows ``[K, d]``; zeros for an identity without features.
    """
    means, _ = class_means(l2_normalize(features.astype(jnp.float32)), labels, num_classes, valid)
    return l2_normalize(means)


def identification_top1(
    queries: Float[Array, "n d"],
    labels: Int[Array, "n"],
    templates: Float[Array, "k d"],
    valid: Bool[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """1:N identification: the share of queries whose nearest template, by inner product, is their identity's.

    A template of zeros (an identity that the gallery lacks) is never found, and a query of zeros (a dead network) finds
    nothing.

    Args:
      queries: features of any length; the length does not matter.
      labels: identities, rows of ``templates``.
      templates: as :func:`class_templates` makes them.
      valid: which queries are real; all by default.
    """
    held = jnp.any(templates != 0, axis=-1)

    def nearest(rows):
        products = jnp.matmul(rows, templates.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(jnp.where(held[None, :], products, -jnp.inf), axis=-1)

    rows = queries.astype(jnp.float32)
    valid = jnp.ones(labels.shape, bool) if valid is None else valid
    hit = (in_blocks(nearest, rows, BLOCK) == labels) & jnp.any(rows != 0, axis=-1) & valid
    return jnp.sum(hit) / jnp.maximum(jnp.sum(valid), 1)


def zero_features(features: Float[Array, "n d"], eps: float = 1e-6) -> Int[Array, ""]:
    """How many rows have no length to speak of: the features of a dead network."""
    return jnp.sum(jnp.linalg.norm(features.astype(jnp.float32), axis=-1) <= eps)


def compatibility_matrix(
    query_features: Sequence[Any],
    gallery_features: Sequence[Any],
    query_labels: Any,
    gallery_labels: Any,
    num_classes: int,
    align: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    full: bool = False,
) -> np.ndarray:
    """Cross-model identification: ``M[i, j]``, model i's queries against model j's gallery.

    Args:
      query_features, gallery_features: by model, oldest first: ``[q, d_i]`` and ``[g, d_i]``.
      query_labels, gallery_labels: identities ``[q]`` and ``[g]``, the same for all models.
      num_classes: K.
      align: ``(queries, gallery) -> (queries, gallery)`` of one size, where embeddings of different models differ in
        size (truncation to common dimensions, a learned map).
      full: also old queries in new galleries, above the diagonal.

    Returns:
      float64 ``[T, T]``; NaN above the diagonal unless ``full``.

    Raises:
      ValueError: as many galleries as queries are needed; features whose sizes differ and no ``align``.
    """
    models = len(query_features)
    if len(gallery_features) != models:
        raise ValueError(f"every model needs queries and a gallery; got {models} and {len(gallery_features)}")
    matrix = np.full((models, models), np.nan)
    templates = [_templates(g, gallery_labels, num_classes) for g in gallery_features] if align is None else None
    for i in range(models):
        for j in range(models if full else i + 1):
            queries = jnp.asarray(query_features[i])
            if align is not None:
                queries, gallery = align(queries, jnp.asarray(gallery_features[j]))
                found = _templates(gallery, gallery_labels, num_classes)
            else:
                found = templates[j]
            if queries.shape[-1] != found.shape[-1]:
                raise ValueError(
                    f"model {i} yields {queries.shape[-1]}-d features, the gallery of model {j} holds "
                    f"{found.shape[-1]}-d ones; give align"
                )
            matrix[i, j] = float(_identify(queries, jnp.asarray(query_labels), found))
    return matrix


def compatible(matrix: np.ndarray) -> np.ndarray:
    """The pairwise criterion, bool ``[T, T]``: ``M[i, j] > M[j, j]`` for i > j, the new query beats the old one.

    Equal accuracy does not count; everything on and above the diagonal is False.
    """
    matrix = _square(matrix)
    return np.tril(matrix > np.diag(matrix)[None, :], -1)


def average_compatibility(matrix: np.ndarray) -> float:
    """AC: the share of pairs i > j that meet the criterion :func:`compatible`; 1 if there is one model only."""
    pairs = len(_square(matrix)) * (len(matrix) - 1) // 2
    return float(compatible(matrix).sum() / pairs) if pairs else 1.0


def average_accuracy(matrix: np.ndarray, mask: np.ndarray | None = None) -> float:
    """AA: the mean over all measured entries, those on and below the diagonal by default; as a share, not in percent.

    Args:
      matrix: ``[T, T]``.
      mask: bool ``[T, T]``, which entries count.

    Raises:
      ValueError: an entry that counts is NaN, or none counts.
    """
    matrix = _square(matrix)
    mask = np.tril(np.ones(matrix.shape, bool)) if mask is None else np.asarray(mask, bool)
    if mask.shape != matrix.shape or not mask.any():
        raise ValueError(f"mask must choose entries of the {len(matrix)} x {len(matrix)} matrix")
    if np.isnan(matrix[mask]).any():
        i, j = np.argwhere(np.isnan(matrix) & mask)[0]
        raise ValueError(f"the compatibility matrix lacks M[{i}, {j}]")
    return float(matrix[mask].mean())


def satisfied_constraints(
    new: Float[Array, "n d"], old: Float[Array, "n d"], labels: Int[Array, "n"], block: int = 512
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How far the formal definition of compatibility holds between two models, over all ordered pairs of examples.

    For i != j of one class, ``dist(new_i, old_j) <= dist(old_i, old_j)`` must hold; of different classes, ``>=``.

    Args:
      new, old: features of the same examples by both models; compared by their directions.
      labels: classes.
      block: rows compared at a time; the memory is O(block n).

    Returns:
      The share of same-class pairs and of different-class pairs for which it holds; 1 where there is no pair.
    """
    # for unit vectors the nearer pair is the one with the larger inner product
    n, o = l2_normalize(new.astype(jnp.float32)), l2_normalize(old.astype(jnp.float32))

    def count(rows):
        a, b, label, place = rows
        high = jax.lax.Precision.HIGHEST
        across, before = jnp.matmul(a, o.T, precision=high), jnp.matmul(b, o.T, precision=high)
        other = place[:, None] != jnp.arange(o.shape[0])[None, :]
        same = (label[:, None] == labels[None, :]) & other
        apart = label[:, None] != labels[None, :]
        total = lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)  # noqa: E731
        return jnp.stack([total(same & (across >= before)), total(same), total(apart & (across <= before)),
                          total(apart)], axis=1)  # fmt: skip

    met = jnp.sum(in_blocks(count, (n, o, labels, jnp.arange(n.shape[0])), block), axis=0)
    share = lambda hit, of: jnp.where(of > 0, hit / jnp.maximum(of, 1), 1.0)  # noqa: E731
    return share(met[0], met[1]), share(met[2], met[3])


_identify = jax.jit(identification_top1)


def _templates(features: Any, labels: Any, num_classes: int) -> Array:
    return _made(jnp.asarray(features), jnp.asarray(labels), num_classes)


_made = jax.jit(class_templates, static_argnums=2)


def _square(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"a compatibility matrix is square, got shape {list(matrix.shape)}")
    return matrix
