"""Flat trees of arrays on disk: one Orbax folder, and a plain-text description of what is in it.

The description (shape, dtype, crc32 of every leaf, size of every file) is what the store and exported models compare
before they believe a folder.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

Manifest = dict[str, Any]
Abstract = Mapping[str, jax.ShapeDtypeStruct]

CHECKSUM_LIMIT = 256 * 2**20
"""Trees up to this many bytes get a crc32 for every leaf; above it the time would show."""

_EMPTY = "(no arrays)"  # Orbax refuses an empty tree; this entry stands in for one


class StoreError(OSError):
    """Checkpoints cannot be written or read where they should be; the message names the folder."""


class CheckpointError(ValueError):
    """A checkpoint does not fit what it is restored into, or is not there; the message names what differs."""


class DamagedError(CheckpointError):
    """A checkpoint is complete on disk but cannot be trusted: truncated, unreadable, or a checksum differs."""


# describing


def describe(tree: Mapping[str, Any]) -> dict[str, dict]:
    """Shape and dtype of every leaf, the implementation of typed keys, and checksums where all of the tree is here."""
    plain = {path: _plain(x) for path, x in tree.items()}
    checksums = sum(x.nbytes for x in plain.values()) <= CHECKSUM_LIMIT and all(map(_is_here, plain.values()))
    leaves = {}
    for path, x in tree.items():
        leaves[path] = {"shape": list(x.shape), "dtype": str(x.dtype)}
        if _is_key(x):
            leaves[path]["key"] = str(jax.random.key_impl(x))
        if checksums:
            leaves[path]["crc32"] = _crc32(plain[path])
    return leaves


def abstract_of(leaves: Mapping[str, Mapping]) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract arrays that a description speaks of, without shardings."""
    dtypes = {p: _key_dtype(v["key"]) if "key" in v else np.dtype(v["dtype"]) for p, v in leaves.items()}
    return {p: jax.ShapeDtypeStruct(tuple(v["shape"]), dtypes[p]) for p, v in leaves.items()}


def check_fit(what: str, leaves: Mapping[str, Mapping], abstract: Abstract) -> None:
    """Compares a description with the arrays that are wanted.

    Raises:
      CheckpointError: the first differing path with both shapes and dtypes, the missing and the unexpected paths.
    """
    missing = sorted(set(abstract) - set(leaves))
    unexpected = sorted(set(leaves) - set(abstract))
    differing = [
        f"{path} is {shape_text(leaf['shape'], leaf['dtype'])} there and {shape_text(x.shape, x.dtype)} here"
        for path, leaf in leaves.items()
        if (x := abstract.get(path)) is not None
        and (tuple(leaf["shape"]), leaf["dtype"]) != (tuple(x.shape), str(x.dtype))
    ]
    said = differing[:1] + ([f"{len(differing) - 1} more differ"] if len(differing) > 1 else [])
    said += [f"missing there: {few(missing)}"] if missing else []
    said += [f"unexpected there: {few(unexpected)}"] if unexpected else []
    if said:
        raise CheckpointError(f"{what} does not fit: {'; '.join(said)}")


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative path."""
    files, folders = {}, [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            else:
                files[str(path.relative_to(folder))] = path.stat().length
    return dict(sorted(files.items()))


def check_files(folder: epath.Path, sizes: Mapping[str, int]) -> None:
    """Raises DamagedError naming the first lost or shortened file.

    Orbax would notice too, but reads on in other threads and complains at length.
    """
    for file, size in sizes.items():
        try:
            there = (folder / file).stat().length
        except OSError as error:
            raise DamagedError(f"{folder / file}: unreadable ({one_line(error)})") from error
        if there != size:
            raise DamagedError(f"{folder / file}: {there} bytes, but {size} were written")


# writing and reading


def saveable(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What Orbax is given for a flat tree: keys as their data, empty leaves left out, never nothing at all."""
    return {p: _plain(x) for p, x in tree.items() if x.size} or {_EMPTY: np.zeros(1, np.int8)}


def read_arrays(
    folder: epath.Path, leaves: Mapping[str, Mapping], abstract: Abstract, part: bool = False
) -> dict[str, jax.Array]:
    """Reads leaves that fit (see :func:`check_fit`) onto the shardings of ``abstract``; none given: the first device.

    Args:
      folder: an Orbax folder.
      leaves: its description; checksums are verified where there are some.
      abstract: the same paths.
      part: the folder holds more than ``leaves``.

    Raises:
      DamagedError: truncated, unreadable or altered.
    """
    import orbax.checkpoint as ocp  # more than a second: only those who read or write arrays pay for it

    target = {p: _with_sharding(x) for p, x in abstract.items()}
    wanted = {p: _plain_abstract(x, leaves[p]) for p, x in target.items() if math.prod(x.shape)}
    restored = {}
    if wanted:
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=part)
        try:
            # the handler itself: a Checkpointer would wait for the others at a barrier when one of them fails
            restored = jax.block_until_ready(ocp.PyTreeCheckpointHandler().restore(folder, args=request))
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # not the checkpoint's fault
            raise DamagedError(f"{folder}: unreadable ({one_line(error)})") from error
    out = {}
    for path, x in target.items():
        leaf = leaves[path]
        if path in restored:
            value = restored[path]
            if "crc32" in leaf and _is_here(value) and _crc32(value) != leaf["crc32"]:
                raise DamagedError(f"{folder}: checksum of {path} differs")
            out[path] = jax.random.wrap_key_data(value, impl=leaf["key"]) if "key" in leaf else value
        else:
            out[path] = _empty(x, leaf)
    return out


def place_of(path: Any) -> epath.Path:
    """A folder as Orbax wants it: absolute if it is local, as it is if it names a bucket (``gs://...``)."""
    place = epath.Path(path)
    return place if "://" in str(path) else epath.Path(Path(str(place)).absolute())


def write_text(path: epath.Path | Path, text: str) -> None:
    """Writes a text file at once: under a temporary name first, then renamed."""
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


# text


def json_text(document: Mapping[str, Any]) -> str:
    """JSON with one line per entry of every mapping one level down: readable, and small under diff.

    Raises:
      TypeError, ValueError: something is not JSON (NumPy and jax numbers and arrays are written as lists).
    """

    def block(entries: Mapping[str, Any]) -> str:
        lines = [f"  {json.dumps(k)}: {json.dumps(v, default=_json)}" for k, v in entries.items()]
        return "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"

    parts = [
        f" {json.dumps(k)}: {block(v) if isinstance(v, Mapping) else json.dumps(v, default=_json)}"
        for k, v in document.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def one_line(error: BaseException, most: int = 300) -> str:
    """The gist of an error in one line."""
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= most else text[:most] + " ..."


def shape_text(shape, dtype) -> str:
    """``float32[3, 4]``."""
    return f"{dtype}[{', '.join(map(str, shape))}]"


def few(names: list[str], most: int = 3) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# pieces


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_dtype(impl: str):
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def _plain(x):
    return jax.random.key_data(x) if _is_key(x) else x


def _is_here(x) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _crc32(x) -> int:
    # fetched explicitly: a transfer guard forbids only accidents
    return zlib.crc32(np.ascontiguousarray(jax.device_get(x)).reshape(-1).view(np.uint8))


def _with_sharding(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if x.sharding is not None:
        return x
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first)


def _plain_abstract(x: jax.ShapeDtypeStruct, leaf: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    if "key" not in leaf:
        return x
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=leaf["key"])))
    return jax.ShapeDtypeStruct((*x.shape, *data.shape), data.dtype, sharding=x.sharding)


def _empty(x: jax.ShapeDtypeStruct, leaf: Mapping[str, Any]) -> jax.Array:
    plain = _plain_abstract(x, leaf)
    nothing = np.zeros(plain.shape, plain.dtype)
    array = jax.make_array_from_callback(plain.shape, plain.sharding, lambda at: nothing[at])
    return jax.random.wrap_key_data(array, impl=leaf["key"]) if "key" in leaf else array


def _json(value):
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
