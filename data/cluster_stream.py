"""A stream of batches by cluster: each says which learner it trains; the clusters may come from an earlier phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.samplers import cluster_round_robin
from data.stream import ArrayStream, Batch, Process


@dataclasses.dataclass(frozen=True)
class ClusterStream(ArrayStream):
    """Class-balanced batches of one cluster each, in turn, with the field ``learner`` i32 ``[B]``, the cluster's id.

    Made by :func:`cluster_stream`.

    Attributes:
      settings: of the sampler: label field, P, K, seed and batches per epoch.
      whole: whether every batch is of learner -1, the whole embedding, and of all examples.
      clusters, count: i32 ``[N]`` and how many there are.
    """

    settings: tuple = ()
    whole: bool = False
    clusters: np.ndarray | None = None
    count: int = 1

    def batch(self, position: int, process: Process = (0, 1)) -> Batch:
        """Batch ``position``; see :class:`data.stream.Stream`."""
        out = super().batch(position, process)
        learner = -1 if self.whole else position % self.steps_per_epoch % self.count
        return {**out, "learner": np.full(len(out["mask"]), learner, np.int32)}

    def bind(self, artefacts: Mapping[str, Any]) -> ClusterStream:
        """This stream over the clusters that an earlier phase left as ``clusters`` i32 ``[N]`` and ``learners`` K."""
        if self.whole or "clusters" not in artefacts:
            return self
        return cluster_stream(
            self.arrays, *self.settings, clusters=np.asarray(artefacts["clusters"]), count=int(artefacts["learners"])
        )


def cluster_stream(
    arrays: Mapping[str, np.ndarray],
    classes_per_batch: int,
    per_class: int,
    seed: int = 0,
    batches: int | None = None,
    whole: bool = False,
    clusters: np.ndarray | None = None,
    count: int = 1,
) -> ClusterStream:
    """A :class:`ClusterStream`; without clusters all examples are one.

    Args:
      arrays: fields with ``label``.
      classes_per_batch, per_class, seed, batches: of :func:`data.samplers.cluster_round_robin`.
      whole: see :class:`ClusterStream`.
      clusters, count: cluster of each example (-1: none), and how many there are.
    """
    ids = np.zeros(len(arrays["label"]), np.int32) if clusters is None else clusters
    settings = (classes_per_batch, per_class, seed, batches)
    order = cluster_round_robin(arrays["label"], ids, count, classes_per_batch, per_class, seed, batches)
    size = classes_per_batch * per_class
    return ClusterStream(arrays, size, order, settings=settings, whole=whole, clusters=ids, count=count)
