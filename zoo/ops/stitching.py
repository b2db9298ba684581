"""Stitching: encoder i and head j of models trained apart, joined through what both call the same thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from zoo.ops.anchors import AnchorSet, check_same_anchors


@dataclasses.dataclass(frozen=True)
class Stitchable:
    """A trained model, cut where its representation is handed over.

    Attributes:
      encode: inputs to latents ``[B, d]``.
      decode: representation to outputs.
      represent: ``(latents [B, d], anchor latents [k, d]) -> [B, k]``; ``None``: the head reads latents as they are.
      anchors: ids, and their latents in THIS model's space.
      width: d.
      reads: coordinates that the head reads, if known: what ``represent`` of this model gives.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    represent: Callable[[Any, Any], Any] | None
    anchors: AnchorSet | None
    width: int
    reads: int | None = None


def stitch(first: Stitchable, second: Stitchable) -> Callable[[Any], Any]:
    """``x -> decode_2(represent_1(encode_1(x)))``: no training.

    The projection is the first model's, with its own latents of the shared anchors.  Two models without one hand over
    absolute latents.

    Raises:
      ValueError: different lists of anchors, another number of coordinates than the head reads, a relative and an
        absolute model, or absolute latents of different widths.
    """
    if (first.represent is None) != (second.represent is None):
        raise ValueError("one model's head reads relative representations, the other's absolute latents")
    if first.represent is None:
        if first.width != second.width:
            raise ValueError(
                f"the first model's latents have {first.width} dimensions, the second's head reads {second.width}: "
                "absolute latents cannot be stitched"
            )
        return lambda x: second.decode(first.encode(x))
    check_same_anchors(first.anchors, second.anchors)
    if None not in (first.reads, second.reads) and first.reads != second.reads:
        raise ValueError(
            f"the first model hands over {first.reads} coordinates, the second's head reads {second.reads}: project "
            "both with the same layer"
        )
    return lambda x: second.decode(first.represent(first.encode(x), first.anchors.latents))


def stitching_matrix(models: Mapping[str, Stitchable], x: Any, score: Callable[[jax.Array], Any]) -> np.ndarray:
    """``score`` of every encoder with every head, f64 ``[models, models]``; NaN where they cannot be joined.

    Args:
      models: by name; rows are encoders, columns heads.
      x: inputs of all models; with parallel data, a mapping from name to that model's inputs.
      score: outputs to a number.

    Raises:
      ValueError: different anchors (:func:`zoo.ops.anchors.check_same_anchors`).
    """
    table = np.full((len(models), len(models)), np.nan)
    for i, (name, one) in enumerate(models.items()):
        for j, other in enumerate(models.values()):
            if one.represent is None and one.width != other.width:
                continue
            table[i, j] = float(score(stitch(one, other)(x[name] if isinstance(x, Mapping) else x)))
    return table


def own_and_stitched(table: np.ndarray) -> tuple[float, float]:
    """Means of a stitching matrix on and off its diagonal; cells that hold NaN do not count (NaN if none is left)."""
    own = np.eye(len(table), dtype=bool)
    mean = lambda cells: float(np.nanmean(cells)) if np.isfinite(cells).any() else float("nan")  # noqa: E731
    return mean(table[own]), mean(table[~own])
