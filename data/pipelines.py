"""Streams over data on disk, read ahead by Grain, and a prefetch onto the device.

    stream = GrainStream(NpySource("features/"), batch_size=256, order=shuffled(n, seed))
    stream = GrainStream(data_source("imagenet2012", "train"), 256, order, transform=crop)   # data.tfds
    for batch in prefetch(stream.iterate(start), jax.device_put): ...

The order of a :class:`GrainStream` is the same as that of an ``ArrayStream`` with the same sampler, whatever the number
of processes, threads or workers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from data.stream import Batch, DataError, Order, Process, arrays_fingerprint

A = TypeVar("A")
B = TypeVar("B")


class Source(Protocol):
    """Examples by id: array_record data sources of TFDS and Grain, :class:`NpySource`, or any sequence of dicts.

    ``__getitems__(ids)``, where there is one, reads several at once and returns a list.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class NpySource:
    """Fields in ``.npy`` files, mapped into memory: only the rows that are read come from disk.

    Pickled by path, so worker processes map the files themselves.

    Args:
      paths: a folder (one field per ``NAME.npy``) or ``{field: file}``; all of the same length.

    Raises:
      DataError: no files, a file that is no ``.npy``, or lengths that differ.
    """

    def __init__(self, paths: str | Path | Mapping[str, str | Path]):
        if not isinstance(paths, Mapping):
            folder = Path(paths)
            paths = {p.stem: p for p in sorted(folder.glob("*.npy"))}
            if not paths:
                raise DataError(f"{folder}: holds no .npy files; expected one per field")
        self.paths = {name: Path(path) for name, path in paths.items()}
        self._open()

    def _open(self) -> None:
        self.arrays = {}
        for name, path in self.paths.items():
            try:
                self.arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: not readable as .npy ({error})") from error
        lengths = {name: a.shape[0] if a.ndim else None for name, a in self.arrays.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise DataError(f"every field needs the same number of examples; got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: np.asarray(a[index]) for name, a in self.arrays.items()}

    def gather(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Those rows, stacked: one gather per field."""
        return {name: np.asarray(a[ids]) for name, a in self.arrays.items()}

    def __getstate__(self) -> dict:
        return {"paths": self.paths}

    def __setstate__(self, state: dict) -> None:
        self.paths = state["paths"]
        self._open()


@dataclasses.dataclass(frozen=True)
class GrainStream:
    """Batches by position from a random-access source; satisfies ``data.stream.Stream``.

    Attributes:
      source: see :class:`Source`; its examples are flat dicts of arrays of fixed shapes.
      batch_size: rows of the global batch.
      order: a sampler; its epochs must all have the same length.
      remainder: ``"pad"`` or ``"drop"``, as of ``ArrayStream``.
      transform: a NumPy function applied to each batch.
      threads: batches read at the same time in this process, ahead of their use; 0 reads when asked.
      workers: processes that read besides (spawned, never forked); for decoding that holds the interpreter's lock.
        Everything here must then be picklable.
      fingerprint: a checksum of the data; default: of the number of examples and 16 of them.
    """

    source: Any
    batch_size: int
    order: Order
    remainder: Literal["pad", "drop"] = "pad"
    transform: Callable[[Batch], Batch] | None = None
    threads: int = 2
    workers: int = 0
    fingerprint: str = ""
    num_examples: int = dataclasses.field(init=False)
    steps_per_epoch: int = dataclasses.field(init=False)

    def __post_init__(self):
        count = len(self.source)
        if count == 0:
            raise DataError("the source holds no examples")
        if self.batch_size < 1 or self.threads < 0 or self.workers < 0:
            raise DataError(
                "batch_size must be at least 1, threads and workers at least 0; "
                f"got {self.batch_size}, {self.threads} and {self.workers}"
            )
        ids = np.asarray(self.order(0), np.int64)
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= count:
            raise DataError(f"the order must name examples 0 to {count - 1}, at least one")
        full, rest = divmod(len(ids), self.batch_size)
        if self.remainder == "drop" and full == 0:
            raise DataError(
                f"batch_size {self.batch_size} exceeds the {len(ids)} examples; lower it or use remainder='pad'"
            )
        set_ = object.__setattr__
        set_(self, "num_examples", count)
        set_(self, "steps_per_epoch", full + (rest > 0 and self.remainder == "pad"))
        set_(self, "fingerprint", self.fingerprint or source_fingerprint(self.source))
        set_(self, "_epoch", (0, ids))

    def _ids(self, epoch: int) -> np.ndarray:
        # threads may stand in two epochs at once: what is read here must not change before it is returned
        known, ids = self._epoch
        if known != epoch:
            ids = np.asarray(self.order(epoch), np.int64)
            object.__setattr__(self, "_epoch", (epoch, ids))
        return ids

    def batch(self, position: int, process: Process = (0, 1)) -> Batch:
        """Batch ``position`` (or this process's contiguous slice of it), read now; see ``data.stream.Stream``."""
        rank, count = process
        if self.batch_size % count:
            raise DataError(f"batch_size {self.batch_size} does not divide over {count} processes")
        epoch, step = divmod(int(position), self.steps_per_epoch)
        share = self.batch_size // count
        first = step * self.batch_size + rank * share
        ids = self._ids(epoch)[first : first + share]
        valid = len(ids)
        # padding repeats example 0, as in memory; only the real rows and one more are read
        out = _read(self.source, ids if valid == share else np.append(ids, 0))
        if valid < share:
            fill = np.minimum(np.arange(share), valid)
            out = {name: values[fill] for name, values in out.items()}
        out["mask"] = np.arange(share) < valid
        out["index"] = np.full(share, self.num_examples, np.int32)
        out["index"][:valid] = ids
        return self.transform(out) if self.transform else out

    def iterate(self, start: int = 0, process: Process = (0, 1)) -> Iterator[Batch]:
        """Batches from ``start`` on, without end, read ahead in order."""
        self.batch(start, process)  # what cannot work fails here, not in a thread
        import grain

        endless = 2**62
        batches = grain.MapDataset.range(start, endless).map(functools.partial(self.batch, process=process))
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        ahead = batches.to_iter_dataset(options)
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain reads its flags; this may not be an absl program
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2))
        return _closing(iter(ahead))


def _closing(reader: Any) -> Iterator[Batch]:
    # Grain's threads would outlive a reader that is only dropped
    try:
        yield from reader
    finally:
        reader.close()


def source_fingerprint(source: Source, examples: int = 16) -> str:
    """A short checksum of the number of examples and of some of them, evenly spread."""
    ids = np.unique(np.linspace(0, len(source) - 1, examples).astype(np.int64))
    digest = hashlib.sha256(str(len(source)).encode())
    digest.update(arrays_fingerprint(_read(source, ids)).encode())
    return digest.hexdigest()[:16]


def _read(source: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    if hasattr(source, "gather"):
        return source.gather(ids)
    plain = [int(i) for i in ids]
    examples = source.__getitems__(plain) if hasattr(source, "__getitems__") else [source[i] for i in plain]
    out = {}
    for name in examples[0]:
        values = [np.asarray(e[name]) for e in examples]
        shapes = {v.shape for v in values}
        if len(shapes) > 1:
            odd = next(i for i, v in zip(plain, values, strict=True) if v.shape != values[0].shape)
            raise DataError(
                f"field {name!r}: example {odd} has shape {list(np.shape(examples[plain.index(odd)][name]))}, "
                f"example {plain[0]} {list(values[0].shape)}; pad or crop in the source"
            )
        out[name] = np.stack(values)
    return out


def prefetch(iterator: Iterator[A], put: Callable[[A], B], size: int = 2) -> Prefetched[A, B]:
    """Applies ``put`` (such as ``jax.device_put``) to what an iterator gives, ``size`` ahead, in a thread.

    Args:
      iterator: consumed by the thread from the first ``next`` on; closed with it if it has ``close``.
      put: moves one batch; runs in the thread.
      size: how many may wait.

    Returns:
      An iterator; an exception of ``iterator`` or ``put`` is raised in its place in the order.  ``close()`` it, or use
      it in a ``with``; one that is dropped stops its thread as well.
    """
    return Prefetched(iterator, put, size)


class Prefetched(Generic[A, B]):
    """See :func:`prefetch`."""

    def __init__(self, iterator: Iterator[A], put: Callable[[A], B], size: int = 2):
        self._stop = threading.Event()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self._queue: queue.Queue = queue.Queue(size)
        self._ended: BaseException | None = None
        # the thread knows the queue and the event, not this object, which may be dropped under it
        arguments = (iter(iterator), put, self._queue, self._stop)
        self._thread = threading.Thread(target=_fill, args=arguments, name="prefetch", daemon=True)

    def __iter__(self) -> Prefetched[A, B]:
        return self

    def __next__(self) -> B:
        if self._ended is not None:
            raise self._ended
        if self._stop.is_set():
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        value, error = self._queue.get()
        if error is not None:
            self._ended = error if not isinstance(error, StopIteration) else StopIteration()
            raise self._ended
        return value

    def close(self) -> None:
        """Stops the thread and waits for the step it is in."""
        self._stop.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetched[A, B]:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        self._stop.set()


def _fill(iterator: Iterator, put: Callable, out: queue.Queue, stop: threading.Event) -> None:
    def offer(item: tuple) -> None:
        while not stop.is_set():
            try:
                return out.put(item, timeout=0.05)
            except queue.Full:
                continue
        return None

    try:
        while not stop.is_set():
            offer((put(next(iterator)), None))
    except BaseException as error:  # raised by __next__, in its place
        offer((None, error))
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
