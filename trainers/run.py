"""A recipe, run into a folder: refuses what does not belong there, resumes what does, and leaves a finished run."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainers.recipe import Recipe, Run, UserError

RUN_FILE = "run.json"


def recipe_module(name: str):
    """The recipe module of a method.

    Raises:
      ValueError: an unknown method; the nearest names are offered.
    """
    import zoo

    return importlib.import_module(zoo.card(name).recipe)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings as plain nested data."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def recipe_hash(name: str, recipe: Recipe) -> str:
    """A short hash of everything that decides what a run computes."""
    return hashlib.sha256(json.dumps([name, resolved(recipe)], sort_keys=True).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the git revision if there is one."""
    import flax
    import jax
    import numpy
    import optax

    import zoo

    found = {m.__name__: m.__version__ for m in (jax, flax, optax, numpy)}
    here = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = ""
    return {**found, "zoo": zoo.__version__, "git": revision or "unknown"}


def train(
    name: str,
    recipe: Recipe,
    workdir: Path,
    settings: Any,
    *,
    keep: int = 3,
    progress: bool = True,
    init: Callable[[Mapping], Mapping] | None = None,
    initialised_from: str | None = None,
) -> dict[str, Any]:
    """Runs a recipe into ``workdir``, or goes on with the run that is there.

    Args:
      name: the method.
      recipe: its settings.
      workdir: the run's folder; created if missing.
      settings: a ``trainers.loop.Settings``.
      keep: newest checkpoints kept.
      progress: whether to show a progress bar.
      init: edits the first variables; ``initialised_from`` says where they come from and is part of the run's identity.

    Returns:
      The run's summary, as written to ``run.json``.

    Raises:
      UserError: the folder holds another run, cannot be written, or settings do not fit.
      Diverged, Interrupted: see ``trainers.loop``.
    """
    import jax

    from checkpoints.model import save_model
    from checkpoints.store import Store
    from trainers import plots
    from trainers.loop import Loop
    from trainers.parallel import describe
    from trainers.record import FileRecord

    identity = recipe_hash(name, recipe)
    if initialised_from:
        identity = hashlib.sha256(f"{identity}{initialised_from}".encode()).hexdigest()[:16]
    before = _open(name, recipe, workdir, identity)
    if before is not None and before.get("complete"):
        return {**before, "already": True}
    run: Run = recipe.build()
    writes = jax.process_index() == 0
    summary = {
        "method": name,
        "hash": identity,
        "recipe": resolved(recipe),
        "initialised_from": initialised_from,
        "data": run.data_fingerprint,
        "parallel": dict(describe(settings.parallel)),
        "versions": versions(),
        "complete": False,
    }
    if before is not None and before["data"] != run.data_fingerprint:
        raise UserError(f"{workdir} was trained on other data (checksum {before['data']}, now {run.data_fingerprint})")
    if writes:
        write_json(workdir / RUN_FILE, summary)
    record = FileRecord(workdir, progress, writes)
    store = Store(workdir / "checkpoints", keep=keep)
    loop = Loop(run, settings, recipe.seed, record, store, workdir, identity, init)
    try:
        result = loop()
        if writes:
            export = run.export(result.chosen, result.artefacts)
            import zoo

            info = {k: summary[k] for k in ("method", "recipe", "hash", "data", "versions")}
            info |= {"metrics": result.metrics, "preprocessing": dict(export.preprocessing)}
            save_model(workdir / "model", export.definition, export.variables, zoo.card(name).to_dict(), info)
            plots.curves(record.history, workdir / "curves.png", f"{name}: {zoo.card(name).title}")
            if run.figures is not None:
                run.figures(result.chosen, result.artefacts, workdir)
            summary |= {"complete": True, "metrics": result.metrics}
            summary["summary"] = run.summary(result.metrics) if run.summary else ""
            write_json(workdir / RUN_FILE, summary)
    finally:
        record.close()
    return summary


def _open(name: str, recipe: Recipe, workdir: Path, identity: str) -> dict[str, Any] | None:
    """What ``workdir`` holds, after checking that it may be used."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".write-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written: {error.strerror or error}") from None
    file = workdir / RUN_FILE
    if not file.exists():
        if any(f.name in ("checkpoints", "model", "metrics.jsonl") for f in workdir.iterdir()):
            raise UserError(f"{workdir} holds files of a run but no {RUN_FILE}; choose another --workdir")
        return None
    try:
        found = json.loads(file.read_text())
        was, now = {"method": found["method"], **found["recipe"]}, {"method": name, **resolved(recipe)}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{file} cannot be read as a run; choose another --workdir") from None
    if found["hash"] != identity:
        change = first_difference(was, now) or "it was initialised differently"
        raise UserError(f"{workdir} holds a run of another recipe ({change}); choose another --workdir")
    return found


def first_difference(was: Any, now: Any, path: str = "") -> str | None:
    """The first setting in which two resolved recipes differ, in words."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*was, *now]):
            if (found := first_difference(was.get(key), now.get(key), f"{path}.{key}" if path else key)) is not None:
                return found
        return None
    return None if was == now else f"{path} was {was!r}, now {now!r}"


def write_json(file: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    scratch = file.with_name(file.name + ".tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")
    scratch.replace(file)
