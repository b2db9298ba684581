"""From files of another library to a self-describing model on disk, tensor by tensor.

outcome = import_model("openai-community/gpt2", "models/gpt2")
print(outcome.report)
model = checkpoints.load_model("models/gpt2")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.arrays import json_text, one_line, place_of, write_text
from checkpoints.importers import engine
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.sources import TOKENIZER_FILES, Source, open_source
from checkpoints.importers.writing import write_safetensors
from checkpoints.model import describe_model
from checkpoints.model_folder import write_folder
from zoo.nn.partitioning import abstract_variables, shardings

__all__ = ["Outcome", "ImporterError", "import_model"]

PART_BYTES = 128 * 2**20
"""Leaves are made and written in groups of this size (a larger leaf is a group of its own): writing takes a copy."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an import did.

    Attributes:
      layout: the source's.
      module: what was configured.
      report: matched, missing, unused, re-shaped weights by name.
      parameters: how many numbers the ``params`` are.
      dtypes: number type -> leaves.
      directory: where the model lies; ``None`` after a dry run.
    """

    layout: Layout
    module: Any
    report: engine.Report
    parameters: int
    dtypes: Mapping[str, int]
    directory: Path | None


def import_model(
    origin: str,
    directory: Path | str | None,
    layout: str | None = None,
    config: str | None = None,
    key: str | None = None,
    dtype: Any = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    mesh: Any = None,
    dry_run: bool = False,
) -> Outcome:
    """Imports pretrained weights.

    Reads one tensor and writes one group of leaves at a time: the peak is far below the size of a large model.

    Args:
      origin: see :func:`checkpoints.importers.sources.open_source`.
      directory: where the model goes; must not exist or be empty.
      layout: a layout's name; recognised by default.
      config, key: see ``open_source``.
      dtype: floating weights are converted to it; kept as they are by default.
      allow_missing: globs over target paths that may stay without a source (initialised afresh).
      allow_unused: globs over source names that may be left out.
      mesh: a mesh with axes of :data:`zoo.nn.partitioning.MESH_AXES`; every process then makes and writes its
        shards only.
      dry_run: match and report, read no weights and write nothing.

    Raises:
      ImporterError: anything about the source, the fit or the target folder that the user can mend.
    """
    target = None if directory is None else Path(directory).expanduser()
    if not dry_run:
        _check_target(target)
    source = open_source(origin, config, key)
    chosen, prefix, names = engine.identify(source.config, source.tensors, layout)
    tensors = {short: source.tensors[name] for short, name in names.items()}
    module = engine.configured(chosen, source.config, tensors)
    found = engine.plan(chosen, module, tensors)
    engine.check(found, chosen, allow_missing, allow_unused)
    parameters = sum(int(np.prod(x.shape)) for p, x in found.abstract.items() if p.startswith("params/"))
    if dry_run:
        return Outcome(chosen, module, engine.report_of(found, {}), parameters, {}, None)
    wanted = None if dtype is None else jnp.dtype(dtype)
    read = lambda short: tensors[short].read()  # noqa: E731
    engine.check_duplicates(found, read)
    where = None if mesh is None else shardings(abstract_variables(module), mesh)
    regions = None if where is None else lambda path: _local_regions(where[path], found.abstract[path].shape)
    nonfinite: dict[str, int] = {}
    dtypes: dict[str, int] = {}

    def parts():
        for paths in _groups(found, wanted):
            made, bad = engine.fill(found, read, wanted, regions, paths)
            engine.fill_missing(found, module, made, wanted, regions, paths)
            for name, count in bad.items():
                nonfinite[name] = nonfinite.get(name, 0) + count
            for path in paths:
                kind = str(made[path][0][1].dtype)
                dtypes[kind] = dtypes.get(kind, 0) + 1
            yield {p: _leaf(made.pop(p), where and where[p], found.abstract[p].shape) for p in paths}

    facts = {
        "imported": {
            "origin": source.origin,
            "layout": chosen.name,
            "parameters": parameters,
            "missing": list(found.missing),
            "unused": list(found.unused),
            "nonfinite": nonfinite,  # filled while the parts are written
        }
    }
    prepared = chosen.preprocessing(source.config, source.preprocessor)
    if prepared is not None:
        facts["preprocessing"] = dict(prepared)
    card = {"name": chosen.name, "kind": "backbone", "title": chosen.title}
    buffers = {names[b]: read(b) for b in found.buffers}
    document = describe_model(module, card, facts, [])
    beside = lambda folder: _write_beside(folder, source, chosen, prefix, buffers)  # noqa: E731
    together = mesh is not None and jax.process_count() > 1
    if jax.process_index() == 0 or together:
        write_folder(place_of(target), document, parts(), beside, several=True, together=together)
    return Outcome(chosen, module, engine.report_of(found, nonfinite), parameters, dtypes, target)


def _groups(found: engine.Plan, dtype: Any) -> list[list[str]]:
    """Leaves in the order of their sources, in groups of about :data:`PART_BYTES`: what is in memory at once."""
    order = dict.fromkeys(path for piece in found.pieces for path, _ in piece.slots)
    order |= dict.fromkeys(found.abstract)
    groups: list[list[str]] = [[]]
    size = 0
    for path in order:
        leaf = found.abstract[path]
        own = int(np.prod(leaf.shape)) * (jnp.dtype(dtype or leaf.dtype).itemsize)
        if groups[-1] and size + own > PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += own
    return groups


def _check_target(target: Path | None) -> None:
    if target is None:
        raise ImporterError("--to DIR is needed: the folder where the model goes")
    if target.exists() and not target.is_dir():
        raise ImporterError(f"--to {target}: a file is there; name a new folder")
    if target.exists() and any(target.iterdir()):
        raise ImporterError(f"--to {target}: the folder is not empty; name a new one, or empty it")


def _local_regions(sharding: Any, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The distinct parts of an array that this process holds."""
    wanted = sharding.addressable_devices_indices_map(tuple(shape)).values()
    return [tuple(slice(a, b) for a, b in key) for key in dict.fromkeys(_bounds(at, shape) for at in wanted)]


def _bounds(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _leaf(parts: list, sharding: Any, shape: tuple[int, ...]) -> Any:
    if sharding is None:
        return parts[0][1]
    by_bounds = {tuple((s.start, s.stop) for s in at): array for at, array in parts}
    return jax.make_array_from_callback(tuple(shape), sharding, lambda index: by_bounds[_bounds(index, shape)])


def _write_beside(folder: Any, source: Source, layout: Layout, prefix: str, buffers: Mapping[str, np.ndarray]) -> None:
    """What an export needs to be complete, and the files that came with the weights."""
    record = {
        "layout": layout.name,
        "prefix": prefix,
        "config": None if source.config is None else dict(source.config),
        "files": {name: dict(entry) for name, entry in source.files.items()},
        "index": None if source.index is None else {"name": source.index[0], "content": dict(source.index[1])},
    }
    write_text(folder / "source.json", json_text(record))
    if buffers:
        write_safetensors(Path(str(folder)) / "source_buffers.safetensors", buffers)
    if source.folder is None:
        return
    extra = [f for f in TOKENIZER_FILES if (source.folder / f).is_file()]
    if extra:
        (folder / "tokenizer").mkdir()
    for name in extra:
        (folder / "tokenizer" / name).write_bytes((source.folder / name).read_bytes())
    for name in ("config.json", "open_clip_config.json", "preprocessor_config.json", "generation_config.json"):
        if (source.folder / name).is_file():
            (folder / f"source_{name}").write_bytes((source.folder / name).read_bytes())


def read_record(directory: Path | str) -> Mapping[str, Any] | None:
    """What is known of where a model's weights came from; ``None`` for one that was never imported."""
    path = Path(directory) / "source.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ImporterError(f"{path}: unreadable ({one_line(error)})") from None
