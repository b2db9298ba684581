"""From a model of ours back to files of the library that its weights came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from checkpoints.importers import engine
from checkpoints.importers.importing import read_record
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.recognition import layouts
from checkpoints.importers.sources import CONFIGS, open_safetensors
from checkpoints.importers.writing import write_safetensors
from checkpoints.model import load_model

__all__ = ["export_model"]


def export_model(
    directory: Path | str,
    to: Path | str,
    layout: str | None = None,
    dtype: Any = None,
    shard_bytes: int = 5 * 10**9,
) -> dict[str, Any]:
    """Writes a model as safetensors under the names of its source.

    A model that was imported comes back as it was: file names, order, headers, buffers and config included, so that
    unchanged weights give the same bytes.  One that was trained here is written in a layout's names.

    Args:
      directory: what ``zoo import`` or ``save_model`` wrote (a run's ``model`` folder).
      to: a ``.safetensors`` file, or a folder that does not exist or is empty.
      layout: which library's names; by default those it came from.
      dtype: floating weights are converted to it; kept by default.
      shard_bytes: a new folder's files are cut at this size.

    Returns:
      ``layout``, ``files`` (name -> bytes), ``weights`` (how many), ``left_out`` (names that the import had left out).

    Raises:
      ImporterError: no layout fits the model, or the target is in the way.
    """
    target = Path(to).expanduser()
    single = target.suffix == ".safetensors"
    if target.is_dir() and (single or any(target.iterdir())):
        raise ImporterError(f"--to {target}: the folder is not empty; name a new one, or a .safetensors file")
    if target.exists() and not target.is_dir():
        raise ImporterError(f"--to {target}: a file is there; name another")
    model = load_model(directory)
    record = read_record(directory)
    if record is not None and layout not in (None, record["layout"]):
        record = None
    chosen = engine.named(layout or record["layout"]) if layout or record else _layout_of(model.definition)
    flat = traverse_util.flatten_dict(dict(model.variables), sep="/")
    source, buffers = None, {}
    if record is not None:
        names = [n for entry in record["files"].values() for n in entry["names"]]
        source = {"names": names, "prefix": record["prefix"]}
        kept = Path(directory) / "source_buffers.safetensors"
        buffers = {n: t.read() for n, t in open_safetensors(kept)[0].items()} if kept.exists() else {}
    try:
        makers = engine.export_makers(chosen, model.definition, source, buffers)
    except (KeyError, AttributeError, TypeError) as error:
        raise ImporterError(f"{type(model.definition).__name__} cannot be written as {chosen.name} ({error})") from None
    wanted = None if dtype is None else jnp.dtype(dtype)
    host = lambda path: np.asarray(flat[path])  # noqa: E731

    def make(name: str) -> np.ndarray:
        array = np.asarray(makers[name](lambda path, row: host(path) if row is None else host(path)[row]))
        return array.astype(engine.target_dtype(array.dtype, wanted), copy=False)

    # shapes by making each once: rearrangements are views, so that little is copied
    shapes = {}
    for name in makers:
        array = make(name)
        shapes[name] = (array.shape, array.dtype)
    files = _files(record, shapes, target.name if single else None, shard_bytes)
    folder = target.parent if single else target
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for file, (header, names) in files.items():
        part = {n: (lambda n=n: make(n)) for n in names}
        written[file] = write_safetensors(
            folder / file, part, {n: shapes[n] for n in names}, header, {"format": "pt"}
        )  # fmt: skip
    if not single:
        _write_beside(folder, Path(directory), record, chosen, model.definition, files, shapes, wanted is not None)
    left_out = [] if source is None else [n for n in source["names"] if n not in makers]
    return {"layout": chosen.name, "files": written, "weights": len(makers), "left_out": left_out}


def _layout_of(definition: Any) -> Layout:
    fitting = []
    for layout in layouts().values():
        try:
            engine.export_makers(layout, definition, None, {})
            fitting.append(layout)
        except Exception:  # noqa: S112 - a table made for another module fails in its own way
            continue
    if len(fitting) == 1:
        return fitting[0]
    kind = type(definition).__name__
    if fitting:
        raise ImporterError(
            f"{kind} can be written in several ways; choose with --as: {', '.join(x.name for x in fitting)}"
        )
    raise ImporterError(f"no layout has names for a {kind}; zoo import --list names the layouts")


def _files(record, shapes, single: str | None, shard_bytes: int) -> dict[str, tuple[str | None, list[str]]]:
    """File -> (header to use again, names)."""
    if record is not None and (single is None or len(record["files"]) == 1):
        out = {}
        for name, entry in record["files"].items():
            file = single or (name if name.endswith(".safetensors") else f"{Path(name).stem}.safetensors")
            file = "model.safetensors" if file == "pytorch_model.safetensors" else file
            out[file] = (entry["header"], [n for n in entry["names"] if n in shapes])
        placed = {n for _, names in out.values() for n in names}
        out[file][1].extend(n for n in shapes if n not in placed)  # what the import initialised afresh
        return out
    if single:
        return {single: (None, list(shapes))}
    groups: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in shapes.items():
        own = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if groups[-1] and size + own > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    if len(groups) == 1:
        return {"model.safetensors": (None, groups[0])}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": (None, g) for i, g in enumerate(groups, start=1)}


def _write_beside(folder: Path, directory: Path, record, layout: Layout, definition, files, shapes, converted) -> None:
    """config.json, the index of several files, and the tokenizer's files."""
    kept = [name for name in (*CONFIGS, "preprocessor_config.json", "generation_config.json")
            if record is not None and (directory / f"source_{name}").exists()]  # fmt: skip
    for name in kept:
        (folder / name).write_bytes((directory / f"source_{name}").read_bytes())
    if not set(kept) & set(CONFIGS):
        config = layout.to_config(definition)
        config = record["config"] if config is None and record is not None else config
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if len(files) > 1:
        size = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in shapes.values())
        where = {n: file for file, (_, names) in files.items() for n in names}
        index: Mapping[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        name = "model.safetensors.index.json"
        old = None if record is None else record["index"]
        if old is not None and old["name"].endswith("safetensors.index.json"):
            name = old["name"]
            # the old one is still true if the same weights are in the same files, in their own number types
            index = old["content"] if old["content"]["weight_map"] == where and not converted else index
        (folder / name).write_text(json.dumps(index, indent=2) + "\n")
    if (directory / "tokenizer").is_dir():
        for file in (directory / "tokenizer").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
