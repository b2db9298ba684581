"""Writing safetensors files tensor by tensor (the library's own writer wants all of them in memory)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints.importers.sources import DTYPES

NAMES = {np.dtype(kind).name: name for name, kind in DTYPES.items()}
ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
)
"""Widening number types, as the library sorts them: the widest come first in a file."""

Shape = tuple[tuple[int, ...], Any]


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray] | Mapping[str, Callable[[], np.ndarray]],
    shapes: Mapping[str, Shape] | None = None,
    header: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a file as the library would, holding one tensor at a time.

    Args:
      path: where to.
      tensors: name -> array, or a function that makes it when its turn comes (then ``shapes`` says what it will make).
      shapes: name -> (shape, dtype).
      header: the text of the header of a file that is being written again; used if it describes just these tensors.
      metadata: the header's ``__metadata__``, for a new header.

    Returns:
      Bytes written.
    """
    shapes = shapes or {n: (x.shape, x.dtype) for n, x in tensors.items()}
    made = header if header is not None and _describes(header, shapes) else new_header(shapes, metadata)
    layout = {n: e for n, e in json.loads(made).items() if n != "__metadata__"}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            raw = made.encode()
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name in sorted(layout, key=lambda n: layout[n]["data_offsets"]):
                value = tensors[name]
                array = np.ascontiguousarray(value() if callable(value) else value)
                if array.nbytes != layout[name]["data_offsets"][1] - layout[name]["data_offsets"][0]:
                    raise ValueError(f"{name} has {array.nbytes} bytes, which is not what the header says")
                file.write(array.reshape(-1).view(np.uint8).data)
            size = file.tell()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def new_header(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> str:
    """The header that the library writes for these tensors: widest types first, then by name, padded to 8 bytes."""
    kinds = {n: NAMES[jnp.dtype(dtype).name] for n, (_, dtype) in shapes.items()}
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in sorted(shapes, key=lambda n: (-ORDER.index(kinds[n]), n)):
        shape, dtype = shapes[name]
        size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        content[name] = {"dtype": kinds[name], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def _describes(header: str, shapes: Mapping[str, Shape]) -> bool:
    found = {n: e for n, e in json.loads(header).items() if n != "__metadata__"}
    return found.keys() == shapes.keys() and all(
        e["shape"] == list(shapes[n][0]) and e["dtype"] == NAMES.get(jnp.dtype(shapes[n][1]).name)
        for n, e in found.items()
    )
