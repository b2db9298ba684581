"""Where weights come from: a folder, one file, or a hub id; opened without reading the weights themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.importers.layout import ImporterError
from checkpoints.importers.torch_file import TensorRef, read_index

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32,
    "U64": np.uint64, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
"""Number types of safetensors files that can be read."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
    "bpe_simple_vocab_16e6.txt.gz",
)  # fmt: skip
"""What is copied beside an imported model."""

WEIGHTS = (
    "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors", "open_clip_model.safetensors", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin", "open_clip_pytorch_model.bin", "diffusion_pytorch_model.bin", "pytorch_model.pth",
)  # fmt: skip
"""Indexes and weight files, the first that is there is read: many a hub id has both kinds, the pickles in pieces."""

CONFIGS = ("config.json", "open_clip_config.json")
TORCH_ENDINGS = (".bin", ".pt", ".pth", ".th", ".ckpt", ".tar")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A weight that has not been read.

    Attributes:
      shape, dtype: of the array.
      read: reads it from its file.
      file: the file's name.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    file: str


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
      origin: what the user gave, made absolute if it is a path.
      folder: where files beside the weights lie; ``None`` for a lone file.
      tensors: name -> weight, in the files' order.
      config: config.json's content, or ``None``.
      preprocessor: preprocessor_config.json's content, or ``None``.
      files: weight file -> ``header`` (the text of a safetensors header, else ``None``) and ``names`` in order: what an
        export needs to write the same file again.
      index: (name, content) of the index over several files, or ``None``.
    """

    origin: str
    folder: Path | None
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    preprocessor: Mapping[str, Any] | None
    files: Mapping[str, Mapping[str, Any]]
    index: tuple[str, Mapping[str, Any]] | None = None


def open_source(origin: str, config: str | None = None, key: str | None = None) -> Source:
    """Opens weights by path or hub id.

    Args:
      origin: a folder (config.json and one or several weight files), a ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or
        ``.ckpt`` file, or a hub id ``owner/name`` (``@revision`` may follow).
      config: a config.json to use instead of the source's own.
      key: the entry of a torch file that holds the weights.

    Raises:
      ImporterError: not there, truncated, incomplete, of unknown types, or not reachable.
    """
    path = Path(origin).expanduser()
    if not path.exists():
        path = _download(origin)
    if path.is_dir():
        folder, files, index = path, *_files_of(path)
    else:
        folder, files, index = None, [path], None
    settings = _json(Path(config)) if config else next((_json(path / c) for c in CONFIGS if (path / c).is_file()), None)
    tensors: dict[str, Tensor] = {}
    record: dict[str, dict[str, Any]] = {}
    for file in files:
        found, header = _open_file(file, key)
        twice = set(found) & set(tensors)
        if twice:
            raise ImporterError(f"{file.name}: {sorted(twice)[0]} is also in {tensors[sorted(twice)[0]].file}")
        tensors |= found
        record[file.name] = {"header": header, "names": list(found)}
    if index is not None:
        name, content = index
        mapped = content["weight_map"]
        lost = [n for n, where in mapped.items() if n not in tensors or tensors[n].file != where]
        if lost:
            raise ImporterError(f"{path / name} says that {lost[0]} is in {mapped[lost[0]]}, but it is not there")
    if not tensors:
        raise ImporterError(f"{path} holds no tensors")
    preprocessor = path / "preprocessor_config.json"
    origin = str(path.absolute()) if Path(origin).expanduser().exists() else origin
    return Source(
        origin, folder, tensors, settings, _json(preprocessor) if preprocessor.is_file() else None, record, index
    )


def _files_of(folder: Path) -> tuple[list[Path], tuple[str, Mapping[str, Any]] | None]:
    name = next((n for n in WEIGHTS if (folder / n).is_file()), None)
    if name is not None:
        if name.endswith(".index.json"):
            content = _json(folder / name)
            mapped = content.get("weight_map")
            if not isinstance(mapped, Mapping) or not mapped or not all(isinstance(f, str) for f in mapped.values()):
                raise ImporterError(f"{folder / name}: no weight_map from names to files")
            files = list(dict.fromkeys(mapped.values()))
            missing = [f for f in files if not (folder / f).is_file()]
            if missing:
                raise ImporterError(f"{folder / name} names {missing[0]}, which is not in the folder")
            return [folder / f for f in files], (name, content)
        return [folder / name], None
    endings = (".safetensors", *TORCH_ENDINGS)
    lone = [f for f in sorted(folder.iterdir()) if f.suffix in endings]
    shard = re.compile(r"(.+)-(\d+)-of-(\d+)\.\w+")
    if lone and all(shard.fullmatch(f.name) for f in lone):
        count = int(shard.fullmatch(lone[0].name)[3])
        if len(lone) != count:
            raise ImporterError(f"{folder}: {len(lone)} of {count} weight files are there, and no index names them")
        return lone, None
    if len(lone) != 1:
        there = ", ".join(f.name for f in lone[:4]) or "no weight file"
        raise ImporterError(f"{folder}: expected model.safetensors or an index of several files; there is {there}")
    return lone, None


def _open_file(path: Path, key: str | None) -> tuple[dict[str, Tensor], str | None]:
    if path.suffix == ".safetensors":
        if key:
            raise ImporterError(f"--key {key}: a safetensors file has no nested entries")
        return open_safetensors(path)
    if path.suffix not in TORCH_ENDINGS:
        raise ImporterError(
            f"{path}: unknown kind of file {path.suffix!r}; .safetensors, .pt, .pth, .bin and .ckpt are read"
        )
    refs = read_index(path, key)

    def tensor(ref: TensorRef) -> Tensor:
        return Tensor(ref.shape, np.dtype(ref.dtype), ref.read, path.name)

    return {name: tensor(ref) for name, ref in refs.items()}, None


def open_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of one file by name, unread, and the text of its header; raises as :func:`open_source`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            kinds = {}
            for name in file.offset_keys():
                piece = file.get_slice(name)
                kinds[name] = (tuple(piece.get_shape()), piece.get_dtype())
        with path.open("rb") as raw:
            header = raw.read(int.from_bytes(raw.read(8), "little")).decode()
    except SafetensorError as error:
        raise ImporterError(f"{path}: {_meaning(str(error))}") from None
    except OSError as error:
        raise ImporterError(f"{path}: {error.strerror or error}") from None
    unknown = [(n, t) for n, (_, t) in kinds.items() if t not in DTYPES]
    if unknown:
        name, dtype = unknown[0]
        raise ImporterError(f"{path}: {name} has the number type {dtype}; supported: {', '.join(DTYPES)}")

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            shape, kind = kinds[name]
            if kind.startswith("F8"):  # which the library does not give as NumPy arrays
                first, last = json.loads(header)[name]["data_offsets"]
                with path.open("rb") as raw:
                    raw.seek(8 + len(header.encode()) + first)
                    return np.frombuffer(bytearray(raw.read(last - first)), DTYPES[kind]).reshape(shape)
            # opened for each weight: a mapping kept open would count every page ever read as this process's
            with safe_open(path, "numpy") as file:
                return file.get_tensor(name)

        return read

    found = {n: Tensor(shape, np.dtype(DTYPES[t]), reader(n), path.name) for n, (shape, t) in kinds.items()}
    return found, header


def _meaning(error: str) -> str:
    if "unknown variant" in error:
        return (
            f"a number type that safetensors does not know ({error.split('unknown variant')[1].split(',')[0].strip()})"
        )
    if "not fully covered" in error or "too small" in error or "invalid header length" in error.lower():
        return "truncated or not a safetensors file"
    return f"damaged ({error})"


def _json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ImporterError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ImporterError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, Mapping):
        raise ImporterError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


def _download(origin: str) -> Path:
    if not HUB_ID.fullmatch(origin) or Path(origin).suffix in (".safetensors", *TORCH_ENDINGS):
        raise ImporterError(f"{origin}: there is no such file or folder")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ImporterError(f"{origin}: no such file or folder here; as a hub id it needs pip install huggingface_hub")
    import huggingface_hub

    name, _, revision = origin.partition("@")
    wanted = ["*.json", "*.safetensors", *TOKENIZER_FILES]
    try:
        with contextlib.redirect_stdout(None):
            found = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted))
            if not any(found.glob("*.safetensors")):
                found = Path(
                    huggingface_hub.snapshot_download(
                        name, revision=revision or None, allow_patterns=[*wanted, "*.bin", "*.pt", "*.pth"]
                    )
                )
    except Exception as error:  # the library has many; each says what went wrong in its first line
        gist = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ImporterError(
            f"{origin}: no such file or folder here, and the hub did not give it ({type(error).__name__}: {gist})"
        ) from None
    return found
