"""Filling a matrix of exact scores: by blocks of rows, on all devices, and from where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from data.stream import arrays_fingerprint
from trainers.errors import UserError
from zoo.retrieval.anncur import score_rows


def fill_score_matrix(
    score_fn: Callable[[Any, Any, Any], Any],
    frozen: Any,
    queries: Any,
    items: int,
    file: str | Path | None = None,
    rows: int = 32,
    block: int = 1024,
    devices: Sequence[Any] | None = None,
) -> np.ndarray:
    """Exact scores f32 ``[queries, items]``: ``queries * items`` calls of the scorer.

    With a file, the matrix is an ``.npy`` on disk; ``FILE.blocks.json`` beside it lists the blocks of rows that are
    complete.  Killed and started again, it computes only the others.

    Args:
      score_fn: pure, ``(frozen, queries, ids [b, m]) -> [b, m]``.
      frozen: arrays that the scorer reads (parameters, the items' tokens); copied to every device.
      queries: arrays with leading axis q.
      items: N.
      file: where the matrix is kept; ``None`` keeps it in memory.
      rows: queries at a time, rounded up to a multiple of the devices, which share them.
      block: items at a time.
      devices: which devices; all by default.

    Raises:
      UserError: the file holds the scores of something else, or a score is not finite.
    """
    devices = list(devices or jax.devices())
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    count = jax.tree.leaves(queries)[0].shape[0]
    step = -(-min(rows, count) // len(devices)) * len(devices)

    def local(frozen, part):
        return score_rows(lambda q, ids: score_fn(frozen, q, ids), part, items, block)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False)
    run = jax.jit(mapped)
    queries, frozen = jax.tree.map(np.asarray, (queries, frozen))
    leaves = {str(i): x for i, x in enumerate(jax.tree.leaves((queries, frozen)))}
    frozen = jax.device_put(frozen, NamedSharding(mesh, P()))
    out, done, ledger = _open(file, (count, items), step, leaves)
    for number, start in enumerate(range(0, count, step)):
        if number in done:
            continue
        # the last block repeats the last query, so that every block has one shape
        at = np.minimum(np.arange(start, start + step), count - 1)
        part = jax.tree.map(lambda x, at=at: jax.device_put(x[at], NamedSharding(mesh, P("data"))), queries)
        found = np.asarray(run(frozen, part))
        found = found[: min(step, count - start)]
        if not np.isfinite(found).all():
            query, item = np.argwhere(~np.isfinite(found))[0]
            raise UserError(f"the scorer's score of query {start + query} and item {item} is not finite")
        out[start : start + len(found)] = found
        done.append(number)
        if ledger is not None:
            out.flush()
            _write(ledger, {"of": _of(leaves), "rows": step, "done": done})
    return out


def _of(leaves: dict[str, np.ndarray]) -> str:
    return arrays_fingerprint(leaves)


def _open(file: Any, shape: tuple[int, int], step: int, leaves: dict[str, np.ndarray]) -> tuple[Any, list[int], Any]:
    if file is None:
        return np.zeros(shape, np.float32), [], None
    file = Path(file)
    ledger = file.with_name(file.name + ".blocks.json")
    fresh = {"of": _of(leaves), "rows": step, "done": []}
    if not ledger.exists():
        if file.exists():
            raise UserError(f"{file} is there, but not {ledger.name}: it was not begun here; choose another file")
        _write(ledger, fresh)
    try:
        kept = json.loads(ledger.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{ledger}: cannot be read ({str(error).splitlines()[0]}); remove it and {file}") from None
    if kept == fresh:
        # nothing is complete: the file may not even be whole
        return np.lib.format.open_memmap(file, "w+", np.float32, shape), [], ledger
    try:
        found = np.lib.format.open_memmap(file, "r+")
        same = kept["of"] == fresh["of"] and kept["rows"] == step and found.shape == shape
        done = [int(i) for i in kept["done"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be continued ({str(error).splitlines()[0]}); remove it and {ledger}") from None
    if not same:
        raise UserError(f"{file} holds scores of other queries, items or weights; choose another file or remove it")
    return found, done, ledger


def _write(ledger: Path, what: dict[str, Any]) -> None:
    # whole or not at all
    draft = ledger.with_name(ledger.name + ".new")
    draft.write_text(json.dumps(what))
    os.replace(draft, ledger)
