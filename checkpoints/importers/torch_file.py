"""Reading tensors from ``torch.save`` files, old and new, without torch: by a reader that can make tensors only.

A pickle is a program.  This one is given no function but those that rebuild a tensor from its storage; whatever else it
names (a class, an optimiser, ``os.system``) is refused before it runs, and the message says what it was.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.importers.layout import ImporterError

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_, "UntypedStorage": np.uint8,
}  # fmt: skip
"""torch's storage classes and what NumPy calls their entries."""

UNTYPED = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2, "uint16": np.uint16,
    "uint32": np.uint32, "uint64": np.uint64,
}  # fmt: skip
"""Number types that have no storage class: their tensors lie in bytes, and name their type themselves."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""How files of torch before 1.6 begin."""

CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "weights", "params", "student",
              "teacher", "encoder", "ema", "model_ema", "state_dict_ema")  # fmt: skip
"""Names under which training codes keep a model's weights inside a larger dict."""


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies in a file: nothing is read until :meth:`read`.

    Attributes:
      file: the zip file.
      offset: of the storage's first byte.
      dtype: of the entries.
      start: index of the tensor's first entry in its storage.
      shape, strides: in entries.
      storage: name of its storage: tensors that share one are tied.
    """

    file: Path
    offset: int
    dtype: Any
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: str

    def __setstate__(self, state: Any) -> None:
        """Refuses to be changed by a pickle, which could put another file in the place of its own."""
        raise ImporterError(f"{self.file}: damaged: it changes a tensor after making it")

    def read(self) -> np.ndarray:
        """The tensor, copied out of the file."""
        dtype = np.dtype(self.dtype)
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        count = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        flat = np.memmap(self.file, np.uint8, "r", self.offset + self.start * dtype.itemsize, (count * dtype.itemsize,))
        strides = tuple(s * dtype.itemsize for s in self.strides)
        return np.ndarray(self.shape, dtype, flat, 0, strides).copy()


def read_index(path: Path, key: str | None = None) -> dict[str, TensorRef]:
    """The tensors of a file by name; reads their places only.

    Args:
      path: a ``.pt``, ``.pth`` or ``.bin`` file, or a TorchScript archive (as OpenAI publishes CLIP).
      key: the entry (``a.b`` for nested ones) that holds the weights, where the file holds more than one dict of them.

    Raises:
      ImporterError: damaged, not of plain tensors, or ambiguous.
    """
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except ImporterError:
        raise
    except OSError as error:
        raise ImporterError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged archive runs into
        raise ImporterError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    return _flat(content if isinstance(content, ScriptModule) else _chosen(content, key, path), path)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        index = next((n for n in names if n.endswith("data.pkl")), None)
        if index is None:
            raise ImporterError(f"{path}: a zip file without data.pkl: not written by torch.save")
        root = index.removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        if order != b"little":
            raise ImporterError(f"{path}: written on a big-endian machine; only little-endian files are read")
        places = {i.filename: i for i in archive.infolist()}
        script = f"{root}constants.pkl" in names
        return _load(_TensorsOnly(io.BytesIO(archive.read(index)), path, root, places, script))


def _read_legacy(path: Path) -> Any:
    """The format before torch 1.6: five pickles, then every storage as its length and its bytes."""
    with path.open("rb") as file:
        head = file.read(4)
        if head == b"PK\x03\x04":
            raise ImporterError(f"{path}: truncated: a torch.save archive without its end")
        if head[:1] != b"\x80":
            raise ImporterError(f"{path}: not a file of torch.save")
        file.seek(0)
        found = [_load(_TensorsOnly(file, path)) for _ in range(2)]
        if found != [LEGACY_MAGIC, 1001]:
            raise ImporterError(f"{path}: a pickle, but not one of torch.save")
        if not _load(_TensorsOnly(file, path)).get("little_endian", True):
            raise ImporterError(f"{path}: written on a big-endian machine; only little-endian files are read")
        reader = _TensorsOnly(file, path)
        content, keys = _load(reader), _load(_TensorsOnly(file, path))
        size = path.stat().st_size
        offsets = {}
        for key in keys:
            entries = int.from_bytes(file.read(8), "little")
            offsets[key] = file.tell()
            file.seek(entries * np.dtype(reader.storages[key]).itemsize, 1)
            if file.tell() > size:
                raise ImporterError(f"{path}: truncated: the storage {key} is not all there")
    lost = set(reader.storages) - set(offsets)
    if lost:
        raise ImporterError(f"{path}: truncated: the storage {sorted(lost)[0]} is missing")
    return _placed(content, offsets)


def _placed(content: Any, offsets: Mapping[str, int]) -> Any:
    """Tensors that know where their storages are, which the file says only behind them."""
    if isinstance(content, TensorRef):
        return dataclasses.replace(content, offset=offsets[content.storage])
    if isinstance(content, Mapping):
        return {k: _placed(v, offsets) for k, v in content.items()}
    return content


def _load(reader: _TensorsOnly) -> Any:
    try:
        return reader.load()
    except ImporterError:
        raise
    except Exception as error:  # whatever a damaged pickle runs into
        what = "truncated" if isinstance(error, EOFError) else f"damaged ({type(error).__name__}: {error})"
        raise ImporterError(f"{reader.path}: {what}") from None


class ScriptModule(dict):
    """What stands in for a module of a TorchScript archive: its attributes by name; its code is never looked at."""

    def __setstate__(self, state: Mapping[str, Any]):
        """Takes the attributes."""
        self.update(state)


class _TensorsOnly(pickle.Unpickler):
    """An unpickler that knows how to rebuild tensors and nothing else."""

    def __init__(
        self,
        file: Any,
        path: Path,
        root: str = "",
        places: Mapping[str, zipfile.ZipInfo] | None = None,
        script: bool = False,
    ):
        super().__init__(file)
        self.path, self.root, self.places, self.script = path, root, places, script
        self.storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Tensors and dicts; anything else is refused by name."""
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return {"_rebuild_tensor_v2": self._tensor, "_rebuild_parameter": lambda data, *_: data}[name]
        if module == "torch._utils" and name == "_rebuild_tensor":  # torch before 0.4
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            return self._untyped
        if module == "torch" and name in UNTYPED:
            return UNTYPED[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            raise ImporterError(f"{self.path}: holds numbers of the type {name}, which is not supported")
        if (module, name) == ("torch", "Size"):
            return tuple
        if self.script and module.split(".")[0] == "__torch__":
            return ScriptModule
        if self.script and module == "torch.jit._pickle":
            return lambda value, *_: value  # lists with a note of their type
        raise ImporterError(
            f"{self.path}: names {module}.{name}, and only plain tensors are read from a pickle (anything else may run "
            "code); save the state_dict() alone, best with safetensors"
        )

    def persistent_load(self, pid: Any) -> tuple:
        """(dtype, offset in the file, storage's name, entries) of a storage."""
        kind, dtype, key, _, entries, *view = pid
        if kind != "storage" or any(view) or not any(dtype is known for known in STORAGES.values()):
            raise ImporterError(f"{self.path}: refers to something that is not a storage ({kind!r})")
        self.storages[key] = dtype
        if self.places is None:
            return dtype, 0, key, entries
        info = self.places.get(f"{self.root}data/{key}")
        if info is None:
            raise ImporterError(f"{self.path}: truncated: the storage {key} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ImporterError(f"{self.path}: a compressed archive; torch.save writes none: save it again")
        if info.file_size < entries * np.dtype(dtype).itemsize:
            raise ImporterError(f"{self.path}: truncated: the storage {key} has {info.file_size} bytes")
        return dtype, self._data_offset(info), key, entries

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        # a local header repeats the name and has an extra field of its own length, by which torch aligns the data
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ImporterError(f"{self.path}: truncated or damaged at byte {info.header_offset}")
        name, extra = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + 30 + name + extra
        if offset + info.file_size > self.path.stat().st_size:
            raise ImporterError(f"{self.path}: truncated or damaged at byte {info.header_offset}")
        return offset

    def _tensor(self, storage: tuple, start: int, shape: tuple, strides: tuple, *_: Any) -> TensorRef:
        dtype, offset, key, entries = storage
        last = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and (start < 0 or any(s < 0 for s in strides) or last >= entries):
            raise ImporterError(f"{self.path}: damaged: a tensor reaches beyond its storage {key}")
        return TensorRef(self.path, offset, dtype, start, tuple(shape), tuple(strides), key)

    def _untyped(self, storage: tuple, start: int, shape: tuple, strides: tuple, *rest: Any) -> TensorRef:
        held, offset, key, entries = storage
        kind = rest[2]
        if not any(kind is known for known in UNTYPED.values()):
            raise ImporterError(f"{self.path}: damaged: a tensor of the type {kind!r}")
        size = entries * np.dtype(held).itemsize
        return self._tensor((kind, offset, key, size // np.dtype(kind).itemsize), start, shape, strides)


def _chosen(content: Any, key: str | None, path: Path) -> Mapping:
    if key:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                there = ", ".join(map(str, content)) if isinstance(content, Mapping) else "no entries"
                raise ImporterError(f"--key {key}: {path} has no {part!r}; it has {there[:200]}")
            content = content[part]
    while isinstance(content, Mapping) and not any(isinstance(v, TensorRef) for v in content.values()):
        inside = [k for k, v in content.items() if isinstance(v, Mapping) and _holds_tensors(v)]
        known = [k for k in inside if k in CONTAINERS]
        pick = known if len(known) == 1 or not inside else inside
        if len(pick) != 1:
            names = ", ".join(map(str, inside)) or "none"
            raise ImporterError(f"{path} holds several dicts of weights or none ({names}); choose one with --key NAME")
        content = content[pick[0]]
    if not isinstance(content, Mapping):
        raise ImporterError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _holds_tensors(content: Mapping) -> bool:
    return any(isinstance(v, TensorRef) or (isinstance(v, Mapping) and _holds_tensors(v)) for v in content.values())


def _flat(content: Mapping, path: Path, prefix: str = "") -> dict[str, TensorRef]:
    out: dict[str, TensorRef] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            out |= _flat(value, path, f"{prefix}{name}.")
        elif isinstance(value, TensorRef):
            out[f"{prefix}{name}"] = value
        # numbers and strings beside the weights (an epoch, a name) are no weights
    return out
