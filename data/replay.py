"""Exemplar memories of class-incremental learning, and batches that are half memory, half new data.

A memory names examples by their ids (rows of a split's arrays), so that it costs nothing and is the same whenever it is
made from the same (labels, seed).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data.stream import DataError, Order


@dataclasses.dataclass(frozen=True)
class ReplayMemory:
    """Up to m examples of each class, in slots whose number never changes.

    Attributes:
      slots: i64 ``[num_classes, m]``, ids of examples; -1 where a slot is empty.
    """

    slots: np.ndarray

    @classmethod
    def empty(cls, num_classes: int, per_class: int) -> ReplayMemory:
        """A memory of ``num_classes`` x ``per_class`` empty slots.

        Raises:
          DataError: either is below 1.
        """
        if num_classes < 1 or per_class < 1:
            raise DataError(f"a memory needs at least one class and one slot each, got {num_classes} x {per_class}")
        return cls(np.full((num_classes, per_class), -1, np.int64))

    @property
    def ids(self) -> np.ndarray:
        """The examples it holds, i64 ``[n]``, by class."""
        return self.slots[self.slots >= 0]

    @property
    def classes(self) -> np.ndarray:
        """The classes of which it holds examples, ascending."""
        return np.flatnonzero((self.slots >= 0).any(1))

    def add(self, ids: np.ndarray, labels: np.ndarray, classes: Sequence[int], seed: int = 0) -> ReplayMemory:
        """The memory with random examples of some classes, which replace those it held of them.

        A class with fewer examples than slots is kept whole.  What is chosen depends on (seed, class) alone.

        Args:
          ids: ``[n]``, the examples to choose from.
          labels: ``[n]``, their classes.
          classes: which classes to keep.
          seed: of the choice.

        Raises:
          DataError: a class without examples, or outside the memory; ids and labels of different lengths.
        """
        ids, labels = np.asarray(ids, np.int64), np.asarray(labels)
        if ids.shape != labels.shape or ids.ndim != 1:
            raise DataError(f"ids and labels must be columns of one length, got {ids.shape} and {labels.shape}")
        slots = self.slots.copy()
        for c in classes:
            if not 0 <= c < len(slots):
                raise DataError(f"class {c} is outside the memory's {len(slots)} classes")
            own = ids[labels == c]
            if not len(own):
                raise DataError(f"class {c} has no example to keep in memory")
            chosen = np.random.default_rng([seed, int(c)]).permutation(own)[: slots.shape[1]]
            slots[c] = -1
            slots[c, : len(chosen)] = chosen
        return ReplayMemory(slots)


def half_memory(
    new_ids: np.ndarray, memory_ids: np.ndarray, batch_size: int, seed: int = 0, batches: int | None = None
) -> Order:
    """Batches whose first half comes from a memory and second half from new data, drawn anew for every batch.

    A pool is drawn from with replacement only if it is not larger than its share of the batch.  Without a memory all of
    a batch is new data.

    Args:
      new_ids, memory_ids: the two pools, ids of examples; the second may be empty.
      batch_size: even, if there is a memory.
      seed: of the draws, which depend on (seed, epoch).
      batches: per epoch; by default as many whole ones as both pools make, at least one.

    Raises:
      DataError: no new data, an odd or non-positive batch size, or ``batches`` below 1.
    """
    new_ids, memory_ids = np.asarray(new_ids, np.int64), np.asarray(memory_ids, np.int64)
    if not len(new_ids):
        raise DataError("there is no new example to learn from")
    if batch_size < 1 or (len(memory_ids) and batch_size % 2):
        raise DataError(f"batch_size must be positive, and even to be half memory and half new; got {batch_size}")
    if batches is not None and batches < 1:
        raise DataError(f"batches must be at least 1, got {batches}")
    count = batches or max(1, (len(new_ids) + len(memory_ids)) // batch_size)
    shares = [(memory_ids, batch_size // 2), (new_ids, batch_size // 2)] if len(memory_ids) else [(new_ids, batch_size)]

    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        rows = [
            np.concatenate([rng.choice(pool, size, replace=len(pool) <= size) for pool, size in shares])
            for _ in range(count)
        ]
        return np.concatenate(rows)

    return order
