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
from flax import traverse_util

from checkpoints.arrays import json_text, one_line, write_text
from checkpoints.importers import engine
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.sources import TOKENIZER_FILES, Source, open_source
from checkpoints.importers.writing import write_safetensors
from checkpoints.model import save_model
from zoo.nn.partitioning import abstract_variables, shardings

__all__ = ["Outcome", "ImporterError", "import_model"]


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

    Reads one tensor at a time: the peak is the target (or this process's shards of it) and the largest tensor.

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
    module = chosen.configure(source.config, engine.abstract_shapes(tensors))
    found = engine.plan(chosen, module, tensors)
    engine.check(found, chosen, allow_missing, allow_unused)
    parameters = sum(int(np.prod(x.shape)) for p, x in found.abstract.items() if p.startswith("params/"))
    if dry_run:
        return Outcome(chosen, module, engine.report_of(found, {}), parameters, {}, None)
    wanted = None if dtype is None else jnp.dtype(dtype)
    read = lambda short: tensors[short].read()  # noqa: E731
    engine.check_duplicates(found, read)
    where = shardings(abstract_variables(module), mesh) if mesh is not None else None
    regions = None if where is None else lambda path: _local_regions(where[path], found.abstract[path].shape)
    parts, nonfinite = engine.fill(found, read, wanted, regions)
    engine.fill_missing(found, module, parts, wanted, regions)
    dtypes: dict[str, int] = {}
    for pieces in parts.values():
        dtypes[str(pieces[0][1].dtype)] = dtypes.get(str(pieces[0][1].dtype), 0) + 1
    report = engine.report_of(found, nonfinite)
    leaves = {path: _leaf(parts.pop(path), where and where[path], found.abstract[path].shape) for path in list(parts)}
    _save(
        target, source, chosen, module, leaves, report, prefix, {names[b]: read(b) for b in found.buffers}, parameters
    )
    return Outcome(chosen, module, report, parameters, dtypes, target)


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


def _save(target, source: Source, layout, module, leaves, report, prefix, buffers, parameters) -> None:
    facts = {
        "imported": {
            "origin": source.origin,
            "layout": layout.name,
            "parameters": parameters,
            "missing": list(report.missing),
            "unused": list(report.unused),
            "nonfinite": dict(report.nonfinite),
        }
    }
    prepared = layout.preprocessing(source.config, source.preprocessor)
    if prepared is not None:
        facts["preprocessing"] = dict(prepared)
    record = {
        "layout": layout.name,
        "prefix": prefix,
        "config": None if source.config is None else dict(source.config),
        "files": {name: dict(entry) for name, entry in source.files.items()},
        "index": None if source.index is None else {"name": source.index[0], "content": dict(source.index[1])},
    }

    def beside(folder: Any) -> None:
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

    card = {"name": layout.name, "kind": "backbone", "title": layout.title}
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    leaves.clear()
    save_model(target, module, variables, card, facts, beside)


def read_record(directory: Path | str) -> Mapping[str, Any] | None:
    """What is known of where a model's weights came from; ``None`` for one that was never imported."""
    path = Path(directory) / "source.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ImporterError(f"{path}: unreadable ({one_line(error)})") from None
