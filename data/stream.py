"""Streams: batches addressed by position, so that resuming is arithmetic and any process count sees the same order.

A stream is a pure function of ``position``: the global batch number since the start of training.  Its order depends on
(seed, epoch) only; the state a run must save is one integer, the number of batches *consumed*.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]
Process = tuple[int, int]


class DataError(ValueError):
    """Data that cannot be used; the message names the file or field, the place, and what was expected."""


@runtime_checkable
class Stream(Protocol):
    """Batches by position.  Each batch is a dict of arrays with ``index`` (stable example id) and ``mask``."""

    batch_size: int
    num_examples: int
    steps_per_epoch: int
    fingerprint: str

    def batch(self, position: int, process: Process = (0, 1)) -> Batch:
        """The rows of global batch ``position`` that belong to process ``(rank, count)``: a contiguous slice."""
        ...

    def iterate(self, start: int = 0, process: Process = (0, 1)) -> Iterator[Batch]:
        """Batches from ``start`` on, without end; may read ahead."""
        ...


Order = Callable[[int], np.ndarray]
"""epoch -> the example ids of that epoch, in order (a sampler)."""


def shuffled(num_examples: int, seed: int) -> Order:
    """Every example once per epoch, in an order that depends on (seed, epoch)."""
    return lambda epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)


def sequential(num_examples: int) -> Order:
    """Every example once per epoch, in storage order (streams in time, evaluation)."""
    return lambda epoch: np.arange(num_examples)


@dataclasses.dataclass(frozen=True)
class ArrayStream:
    """An in-memory stream: one NumPy gather per field and batch.

    Attributes:
      arrays: fields of equal length ``N``; ``index`` and ``mask`` are added.
      batch_size: rows of the global batch.
      order: a sampler; its epochs must all have the same length.
      remainder: ``"pad"`` keeps every example (the last batch of an epoch is padded and masked), ``"drop"`` drops the
        incomplete batch.
      transform: a NumPy function applied to each batch (prefer jit-able augmentation inside the objective).
    """

    arrays: Mapping[str, np.ndarray]
    batch_size: int
    order: Order
    remainder: Literal["pad", "drop"] = "pad"
    transform: Callable[[Batch], Batch] | None = None
    num_examples: int = dataclasses.field(init=False)
    steps_per_epoch: int = dataclasses.field(init=False)
    fingerprint: str = dataclasses.field(init=False)

    def __post_init__(self):
        lengths = {k: len(v) for k, v in self.arrays.items()}
        if not lengths or len(set(lengths.values())) != 1 or min(lengths.values()) == 0:
            raise DataError(f"every field needs the same number of examples, at least one; got {lengths}")
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {self.batch_size}")
        set_ = object.__setattr__
        set_(self, "num_examples", next(iter(lengths.values())))
        epoch = len(self.order(0))
        full, rest = divmod(epoch, self.batch_size)
        if self.remainder == "drop" and full == 0:
            raise DataError(f"batch_size {self.batch_size} exceeds the {epoch} examples; lower it or pad the remainder")
        set_(self, "steps_per_epoch", full + (rest > 0 and self.remainder == "pad"))
        set_(self, "fingerprint", arrays_fingerprint(self.arrays))
        set_(self, "_epoch", (-1, None))

    def _ids(self, epoch: int) -> np.ndarray:
        known, ids = self._epoch
        if known != epoch:  # returned from here, not from the cache: another thread may stand in another epoch
            ids = np.asarray(self.order(epoch), np.int64)
            object.__setattr__(self, "_epoch", (epoch, ids))
        return ids

    def batch(self, position: int, process: Process = (0, 1)) -> Batch:
        """Batch ``position`` (or this process's slice of it); see :class:`Stream`."""
        rank, count = process
        if self.batch_size % count:
            raise DataError(f"batch_size {self.batch_size} does not divide over {count} processes")
        epoch, step = divmod(position, self.steps_per_epoch)
        share = self.batch_size // count
        first = step * self.batch_size + rank * share
        ids = self._ids(epoch)[first : first + share]
        valid = len(ids)
        if valid < share:
            ids = np.concatenate([ids, np.zeros(share - valid, np.int64)])
        out = {k: np.asarray(v)[ids] for k, v in self.arrays.items()}
        out["mask"] = np.arange(share) < valid
        # padded rows get an index out of range, so that scatters into per-example state drop them
        out["index"] = np.where(out["mask"], ids, self.num_examples).astype(np.int32)
        return self.transform(out) if self.transform else out

    def iterate(self, start: int = 0, process: Process = (0, 1)) -> Iterator[Batch]:
        """Batches from ``start`` on, without end."""
        position = start
        while True:
            yield self.batch(position, process)
            position += 1


def arrays_fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """A short checksum of names, shapes, dtypes and contents."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes() if array.dtype != object else repr(array.tolist()).encode())
    return digest.hexdigest()[:16]


def training_stream(arrays: Mapping[str, np.ndarray], batch_size: int, seed: int = 0) -> ArrayStream:
    """Shuffled, every example exactly once per epoch."""
    return ArrayStream(arrays, batch_size, shuffled(len(next(iter(arrays.values()))), seed))


def evaluation_stream(arrays: Mapping[str, np.ndarray], batch_size: int) -> ArrayStream:
    """In storage order, padded; one epoch covers every example once."""
    return ArrayStream(arrays, batch_size, sequential(len(next(iter(arrays.values())))))
