"""The folder of an exported model: arrays in one or several Orbax folders, ``model.json``, and whatever lies beside.

A large model is written in parts, each made when its turn comes, so that it need never be in memory whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from checkpoints.arrays import (
    DamagedError,
    StoreError,
    abstract_of,
    check_files,
    describe,
    file_sizes,
    json_text,
    one_line,
    read_arrays,
    saveable,
    write_text,
)
from checkpoints.definition import ModelError

Flat = Mapping[str, Any]


def write_folder(
    place: epath.Path,
    document: Mapping[str, Any],
    parts: Iterable[Flat],
    beside: Callable[[epath.Path], None] | None = None,
    several: bool = False,
    together: bool = False,
) -> None:
    """Writes a model at once: under a temporary name, then renamed; an older model is replaced.

    Args:
      place: where to.
      document: ``model.json`` but for its descriptions of arrays and files; read when all parts are written.
      parts: flat arrays, asked for one after the other.
      beside: called with the folder before it gets its name, to put more files into it.
      several: each part has an Orbax folder of its own; otherwise there must be one part.
      together: all processes call this, and each writes its own shards.

    Raises:
      StoreError: the place cannot be written, or holds something that is not a model.
    """
    first = jax.process_index() == 0
    temporary, old = place.parent / f".{place.name}.saving", place.parent / f".{place.name}.replaced"

    def once(step: Callable[[], None], name: str) -> None:
        # by the first process, while the others wait to hear whether it worked
        error = None
        if first:
            try:
                step()
            except Exception as caught:
                error = caught
        if together:
            from jax.experimental import multihost_utils

            if multihost_utils.broadcast_one_to_all(np.asarray(error is not None)) and error is None:
                raise StoreError(f"cannot write the model to {place}: the first process could not ({name})")
        if error is not None:
            raise error

    def prepare() -> None:
        if place.exists() and not (place / "model.json").exists() and any(place.iterdir()):
            raise FileExistsError(f"{place} holds something that is not a model")
        if old.exists() and not place.exists():  # killed between the two renames
            old.rename(place)
        for leftover in (temporary, old):
            if leftover.exists():
                leftover.rmtree()
        temporary.mkdir(parents=True)
        if several:
            (temporary / "weights").mkdir()

    leaves: dict[str, Any] = {}
    where: dict[str, list[str]] = {}

    def finish() -> None:
        if beside is not None:
            beside(temporary)
        found = {**document, "format": 2 if several else 1, "leaves": leaves}
        found |= {"parts": where} if several else {}
        write_text(temporary / "model.json", json_text({**found, "files": file_sizes(temporary / "weights")}))
        if place.exists():
            place.rename(old)
        temporary.rename(place)
        if old.exists():
            old.rmtree()

    try:
        once(prepare, "a new folder")
        for number, part in enumerate(parts):
            leaves |= describe(part)
            where[str(number)] = list(part)
            write_arrays(temporary / "weights" / str(number) if several else temporary / "weights", part, together)
            del part
        once(finish, "model.json")
    except Exception as error:
        raise _wrapped(error, place) from error


def _wrapped(error: Exception, place: epath.Path) -> Exception:
    if isinstance(error, ValueError | StoreError) and type(error).__module__.startswith("checkpoints."):
        return error  # it says already what is wrong with what was to be written
    return StoreError(f"cannot write the model to {place}: {one_line(error)}")


def write_arrays(folder: epath.Path, flat: Flat, together: bool = False) -> None:
    """Writes flat arrays as an Orbax folder: this process alone, or all of them together."""
    import orbax.checkpoint as ocp

    if together:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(saveable(flat)))
        return
    # this process alone: no barrier at which the others would be missing
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0} if jax.process_count() > 1 else None, barrier_sync_key_prefix="model"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(jax.device_get(saveable(flat))))


def read_document(place: epath.Path) -> dict[str, Any]:
    """The ``model.json`` of a model.

    Raises:
      ModelError: not a model.
      DamagedError: unreadable.
    """
    path = place / "model.json"
    if not path.exists():
        there = "holds no model.json" if place.exists() else "does not exist"
        raise ModelError(f"no model in {place}: it {there}")
    try:
        document = json.loads(path.read_text())
        missing = {"format", "definition", "card", "info", "empty", "leaves", "files"} - set(document)
    except (OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{path}: unreadable ({one_line(error)})") from error
    if missing:
        raise ModelError(f"{path} lacks {', '.join(sorted(missing))}")
    if document["format"] not in (1, 2):
        raise ModelError(f"{path} has format {document['format']}; this version reads formats 1 and 2")
    return document


def read_flat(place: epath.Path, document: Mapping[str, Any], sharding: Any = None) -> dict[str, jax.Array]:
    """The flat variables of a model, on a sharding for all or a function of (path, shape).

    Raises:
      DamagedError: truncated, unreadable or altered.
    """
    leaves = document["leaves"]
    check_files(place / "weights", document["files"])
    where = sharding if callable(sharding) else lambda path, shape: sharding
    abstract = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(p, x.shape)) for p, x in abstract_of(leaves).items()
    }
    if "parts" not in document:
        return read_arrays(place / "weights", leaves, abstract)
    out = {}
    for number, paths in document["parts"].items():
        out |= read_arrays(place / "weights" / number, {p: leaves[p] for p in paths}, {p: abstract[p] for p in paths})
    return {p: out[p] for p in leaves}
