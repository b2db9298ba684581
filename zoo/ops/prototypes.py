"""Class prototypes: means of features by class, shared by everything that classifies by the nearest mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def l2_normalize(x: Float[Array, "*b d"], eps: float = 1e-12) -> Float[Array, "*b d"]:
    """Rows scaled to unit length; a row shorter than ``eps`` has no direction: it becomes zero and gets no gradient.

    A gradient of ``1 / eps`` there would throw the whole network away for one dead row, and a second normalisation
    would square it.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # written so that NaN counts as long and is seen, not turned into a zero row
    long = ~(square <= eps * eps)
    # the root is taken of 1 where the row has no direction, so that nothing infinite meets the mask
    return jnp.where(long, x, 0.0) * jax.lax.rsqrt(jnp.where(long, square, 1.0))


def class_sums(
    features: Float[Array, "n d"], labels: Int[Array, "n"], num_classes: int, valid: Bool[Array, "n"] | None = None
) -> tuple[Float[Array, "c d"], Int[Array, "c"]]:
    """Sums of un-normalised features and counts by class; they add up over batches.

    Args:
      features: one row per example.
      labels: classes in ``[0, num_classes)``; others are dropped.
      num_classes: C, static.
      valid: which rows are real.
    """
    valid = jnp.ones(labels.shape, bool) if valid is None else valid
    # rows that do not count go to a class of their own, which is cut off
    slot = jnp.where(valid & (labels >= 0) & (labels < num_classes), labels, num_classes)
    rows = jnp.where(valid[:, None], features, 0.0)
    sums = jax.ops.segment_sum(rows, slot, num_classes + 1)[:num_classes]
    counts = jax.ops.segment_sum(jnp.ones_like(slot), slot, num_classes + 1)[:num_classes]
    return sums, counts


def class_means(
    features: Float[Array, "n d"], labels: Int[Array, "n"], num_classes: int, valid: Bool[Array, "n"] | None = None
) -> tuple[Float[Array, "c d"], Int[Array, "c"]]:
    """Means of un-normalised features by class, and counts; a class without examples has mean 0 and count 0.

    Arguments as in :func:`class_sums`.
    """
    sums, counts = class_sums(features, labels, num_classes, valid)
    return sums / jnp.maximum(counts, 1)[:, None], counts


def class_prototypes(
    embed: Callable[[Any, Mapping[str, Any]], Array],
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    num_classes: int,
    label: str = "label",
) -> tuple[Float[Array, "c d"], Int[Array, "c"]]:
    """Means of a frozen model's features by class, in one pass over batches; one batch is in memory at a time.

    Args:
      embed: ``(variables, batch) -> features [B, d]``; their means are taken as they are, normalised or not.
      variables: the model's.
      batches: with ``label`` and perhaps ``mask``, all of one shape.
      num_classes: C.
      label: the batch field of classes.

    Returns:
      The means ``[C, d]`` in float32, and how many examples each is made of.

    Raises:
      ValueError: a class without any example; all such classes are listed.
    """

    @jax.jit
    def one(variables, batch):
        features = embed(variables, batch).astype(jnp.float32)
        return class_sums(features, batch[label], num_classes, batch.get("mask"))

    total = None
    for batch in batches:
        found = one(variables, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    counts = np.zeros(num_classes, int) if total is None else np.asarray(total[1])
    empty = np.flatnonzero(counts == 0)
    if total is None or len(empty):
        raise ValueError(f"no image of class {', '.join(map(str, empty))}: a prototype needs at least one")
    return total[0] / total[1][:, None], total[1]


def cosine_logits(
    features: Float[Array, "b d"],
    prototypes: Float[Array, "c d"],
    temperature: float | Float[Array, ""] = 1.0,
    class_mask: Bool[Array, "c"] | None = None,
) -> Float[Array, "b c"]:
    """``temperature`` times the cosine between rows and prototypes; masked classes get minus infinity."""
    logits = temperature * (l2_normalize(features) @ l2_normalize(prototypes).T)
    return logits if class_mask is None else jnp.where(class_mask[None, :], logits, -jnp.inf)
