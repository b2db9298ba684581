"""``zoo import`` and ``zoo export``: pretrained weights in and out."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from trainers.cli import check_platform, parse_options, prepare_jax, print_json
from trainers.errors import UserError

IMPORT_USAGE = """usage: zoo import SRC --to DIR [options]

Brings pretrained weights into a self-describing model that checkpoints.load_model reads and --init starts from.
SRC is a folder (config.json and one or several weight files), a .safetensors, .pt, .pth, .bin or .ckpt file, or a hub
id (owner/name or owner/name@revision; needs huggingface_hub and a connection).  One tensor is read at a time.

  --to DIR                where the model goes: a new or empty folder
  --as LAYOUT             whose names the weights have; recognised from config.json and the names if not given
  --config FILE           a config.json to use instead of the source's own
  --key NAME              the entry of a torch file that holds the weights (state_dict, ema, a.b)
  --dtype TYPE            convert floating weights: float32, bfloat16 or float16; kept as they are if not given
  --allow-missing GLOBS   parts of the model that may lack a source (comma-separated); they are initialised afresh
  --allow-unused GLOBS    weights that may be left out (comma-separated)
  --fsdp N --tensor N     spread the model over devices; with --distributed every process writes its own shards
  --dry-run               match and report only
  --list                  the layouts
  --report                every weight by name
  --json                  the report as one JSON document
"""
EXPORT_USAGE = """usage: zoo export D --to F [options]

Writes a model back as safetensors under the original names: F is a .safetensors file or a new folder (weights, index,
config.json, tokenizer).  An unchanged import comes back byte for byte.

  --to F                  a .safetensors file, or a new or empty folder
  --as LAYOUT             whose names to write; those it came from if not given
  --dtype TYPE            convert floating weights: float32, bfloat16 or float16
  --shard-gb N            cut a folder's files at N gigabytes (5)
  --json                  what was written as one JSON document
"""
DTYPES = ("float32", "bfloat16", "float16")


def import_weights(argv: list[str]) -> int:
    """``zoo import``."""
    flags = ("dry-run", "list", "report", "json", "distributed")
    values = ("to", "as", "config", "key", "dtype", "allow-missing", "allow-unused", "fsdp", "tensor", "platform")
    names = 0 if "--list" in argv else 1
    positional, o = parse_options(argv, IMPORT_USAGE, flags, values, names)
    prepare_jax(o["platform"] or (None if o["fsdp"] or o["tensor"] or o["distributed"] else "cpu"))
    if o["platform"]:
        check_platform(o["platform"])
    if o["list"]:
        return _list(o["json"])
    if o["to"] is None and not o["dry-run"]:
        raise UserError("zoo import needs --to DIR, the folder where the model goes (or --dry-run)")
    from checkpoints.importers.importing import import_model

    outcome = import_model(
        positional[0], o["to"], o["as"], o["config"], o["key"], _dtype(o["dtype"]),
        _globs(o["allow-missing"]), _globs(o["allow-unused"]), _mesh(o), o["dry-run"],
    )  # fmt: skip
    import jax

    if jax.process_index() != 0:
        return 0
    report = outcome.report
    where = None if outcome.directory is None else str(outcome.directory)
    if o["json"]:
        found = {"layout": outcome.layout.name, "parameters": outcome.parameters, "dtypes": dict(outcome.dtypes)}
        print_json({**found, "definition": _definition(outcome.module), "directory": where, "report": report.to_dict()})
        return 0
    print(f"{outcome.layout.name}: {outcome.layout.title}")
    print(f"{type(outcome.module).__name__}, {outcome.parameters:,} parameters" + _types(outcome.dtypes))
    print(report)
    if o["report"]:
        for sources, targets in report.matched:
            how = " (re-shaped)" if sources[0] in report.reshaped else ""
            print(f"  {' + '.join(sources)} -> {', '.join(targets)}{how}")
        for word in ("missing", "unused", "buffers", "duplicates"):
            for name in getattr(report, word):
                print(f"  {word}: {name}")
    for name, count in report.nonfinite.items():
        print(f"zoo: warning: {name} holds {count} NaN or infinite entries", file=sys.stderr)
    print(
        "nothing is written: a dry run" if where is None else f"{where} holds the model; zoo train NAME --init {where}"
    )
    return 0


def export_weights(argv: list[str]) -> int:
    """``zoo export``."""
    (directory,), o = parse_options(argv, EXPORT_USAGE, ("json",), ("to", "as", "dtype", "shard-gb"), 1)
    if o["to"] is None:
        raise UserError("zoo export needs --to F: a .safetensors file or a new folder")
    if o["shard-gb"] is not None and not re.fullmatch(r"\d+(\.\d+)?", o["shard-gb"]):
        raise UserError(f"--shard-gb needs a number of gigabytes, got {o['shard-gb']!r}")
    dtype = _dtype(o["dtype"])
    shard = int(float(o["shard-gb"] or 5) * 1e9)
    if shard < 1:
        raise UserError("--shard-gb must be above 0")
    prepare_jax("cpu")
    from checkpoints.importers.exporting import export_model

    place = Path(directory)
    if not (place / "model.json").exists() and (place / "model" / "model.json").exists():
        place = place / "model"  # a run's folder: its model is meant
    found = export_model(place, o["to"], o["as"], dtype, shard)
    if o["json"]:
        print_json(found)
        return 0
    size = sum(found["files"].values())
    print(f"{found['layout']}: {found['weights']} weights, {size:,} bytes in {', '.join(found['files'])}")
    if found["left_out"]:
        print(f"left out by the import, so not here: {', '.join(found['left_out'][:5])}", file=sys.stderr)
    return 0


def _list(as_json: bool) -> int:
    from checkpoints.importers.recognition import layouts

    if as_json:
        print_json([{"name": x.name, "title": x.title, "model_types": list(x.model_types)} for x in layouts().values()])
        return 0
    for x in layouts().values():
        print(f"{x.name:24}  {x.title}")
    return 0


def _dtype(text: str | None) -> str | None:
    if text is not None and text not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return text


def _globs(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(p.strip() for p in text.split(",") if p.strip())


def _mesh(o: dict[str, Any]):
    sizes = {}
    for axis in ("fsdp", "tensor"):
        if o[axis] is not None and not re.fullmatch(r"[1-9]\d*", o[axis]):
            raise UserError(f"--{axis} needs a whole number of at least 1, got {o[axis]!r}")
        sizes[axis] = int(o[axis] or 1)
    if o["distributed"]:
        from trainers.options import join_processes

        join_processes()
    elif sizes == {"fsdp": 1, "tensor": 1}:
        return None
    from trainers.parallel import Parallel, Placement

    return Placement(Parallel(fsdp=sizes["fsdp"], tensor=sizes["tensor"])).mesh


def _types(dtypes: Any) -> str:
    return "" if not dtypes else " in " + ", ".join(f"{d} ({n} leaves)" for d, n in dtypes.items())


def _definition(module: Any) -> dict[str, Any]:
    config = getattr(module, "config", None)
    described = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else {}
    return {"module": f"{type(module).__module__}:{type(module).__name__}", "config": described}
