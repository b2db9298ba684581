"""Feeds a training phase: host batches of every stream, stacked for one dispatch and put onto the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from data.stream import ArrayStream, Stream
from trainers.parallel import Placement
from trainers.phases import Alternate


def streams_of(update) -> dict[str, Stream]:
    """An update's streams by name; a single stream is named ``""``."""
    return dict(update.stream) if isinstance(update.stream, Mapping) else {"": update.stream}


def host_batch(update, position: int, process=(0, 1)) -> Any:
    """The batch at ``position``, as the objective sees it."""
    group = {n: s.batch(position, process) for n, s in streams_of(update).items()}
    return group.get("", group)


def bound(phase: Alternate, artefacts: Mapping[str, Any]) -> Alternate:
    """The phase with its streams bound to what earlier phases left.

    A stream whose order depends on an artefact (clusters, mined examples) has a method ``bind(artefacts) -> stream``
    that keeps its fields and its batch size; so the order is a function of (seed, epoch, artefact) and resumes exactly.
    """

    def bind(stream: Stream) -> Stream:
        return stream.bind(artefacts) if hasattr(stream, "bind") else stream

    def one(update):
        stream = update.stream
        new = {k: bind(s) for k, s in stream.items()} if isinstance(stream, Mapping) else bind(stream)
        return dataclasses.replace(update, stream=new)

    return dataclasses.replace(phase, updates={name: one(update) for name, update in phase.updates.items()})


class Feed:
    """Batches for a phase, from given positions on.

    Args:
      phase: its updates name the streams.
      positions: batches already consumed, by update.
      place: puts them onto devices.
    """

    def __init__(self, phase: Alternate, positions: Mapping[str, int], place: Placement):
        self.phase, self.place, self.start = phase, place, dict(positions)
        self._iterators: dict[tuple[str, str], Iterator] = {}
        for name, update in phase.updates.items():
            for key, stream in streams_of(update).items():
                iterator = stream.iterate(positions[name], place.process)
                if not isinstance(stream, ArrayStream):  # reading ahead pays for disks, not for one NumPy gather
                    from data.pipelines import prefetch

                    iterator = prefetch(iterator, lambda b: b, size=2)
                self._iterators[name, key] = iterator

    def _next(self, name: str) -> Any:
        keys = [k for n, k in self._iterators if n == name]
        group = {k: next(self._iterators[name, k]) for k in keys}
        return group.get("", group)

    def next(self, take: int, calls: int) -> dict[str, Any]:
        """The batches of the next ``take`` steps, padded to ``calls``, on the devices."""
        out = {}
        for name, update in self.phase.updates.items():
            rows = [self._next(name) for _ in range(take * update.repeats)]
            out[name] = self._stack(rows, update.repeats, take, calls)
        return self.place.put_batches(out)

    def probe(self, calls: int) -> dict[str, Any]:
        """Batches of the right shapes to compile with; consumes nothing."""
        out = {}
        for name, update in self.phase.updates.items():
            row = host_batch(update, 0, self.place.process)
            out[name] = self._stack([row] * update.repeats, update.repeats, 1, calls)
        return self.place.put_batches(out)

    @staticmethod
    def _stack(rows: list, repeats: int, take: int, calls: int) -> Any:
        if take == calls == repeats == 1:
            return jax.tree.map(lambda x: np.asarray(x)[None, None], rows[0])
        rows = rows + [rows[-1]] * ((calls - take) * repeats)
        return jax.tree.map(lambda *x: np.stack(x).reshape(calls, repeats, *np.shape(x[0])), *rows)

    def close(self) -> None:
        """Stops readers."""
        for iterator in self._iterators.values():
            if hasattr(iterator, "close"):
                iterator.close()
