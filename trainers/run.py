"""A recipe, run into a folder: refuses what does not belong there, resumes what does, and leaves a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.errors import Diverged, nearest
from trainers.recipe import Recipe, Run, UserError

RUN_FILE = "run.json"
RUN_PARTS = ("checkpoints", "model", "metrics.jsonl")


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

    import zoo
    from checkpoints.model import save_model
    from checkpoints.store import Store
    from trainers import plots
    from trainers.loop import Loop
    from trainers.parallel import describe
    from trainers.record import FileRecord

    identity = recipe_hash(name, recipe)
    if initialised_from:
        identity = hashlib.sha256(f"{identity}{initialised_from}".encode()).hexdigest()[:16]
    before = _held(name, recipe, workdir, identity)
    if before is not None and before.get("complete"):
        return {**before, "already": True}
    run: Run = recipe.build()
    if before is not None and before["data"] != run.data_fingerprint:
        raise UserError(f"{workdir} was trained on other data (checksum {before['data']}, now {run.data_fingerprint})")
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
    whole = workdir.absolute()  # Orbax takes no other paths
    store = Store(whole / "checkpoints", keep=keep)
    record = FileRecord(workdir, progress, writes)
    loop = Loop(run, settings, recipe.seed, record, store, workdir, identity, init)
    made = make_writable(workdir, "--workdir")  # the first thing on disk: whatever is wrong before leaves no trace
    try:
        if writes and before is None:
            write_json(workdir / RUN_FILE, summary)
        result = loop()
        if writes:
            export, card = run.export(result.chosen, result.artefacts), zoo.card(name)
            info = {k: summary[k] for k in ("method", "recipe", "hash", "data", "versions")}
            info |= {"metrics": result.metrics, "preprocessing": dict(export.preprocessing)}
            save_model(whole / "model", export.definition, export.variables, card.to_dict(), info, export.beside)
            plots.curves(record.history, workdir / "curves.png", f"{name}: {card.title}")
            if run.figures is not None:
                run.figures(result, workdir)
            summary |= {"complete": True, "metrics": result.metrics}
            summary["summary"] = run.summary(result.metrics) if run.summary else ""
            write_json(workdir / RUN_FILE, summary)
        record.close()
    except Exception as error:
        with contextlib.suppress(Exception):
            record.close()
        kept = before is not None or isinstance(error, Diverged) or _saved(store)
        if writes and not kept:
            _clear(workdir, made)
        if type(error) is OSError or isinstance(error, (PermissionError, FileNotFoundError)):
            hint = "; the last checkpoint is whole, and the same command goes on from it" if kept else ""
            raise UserError(f"{error.filename or workdir}: {error.strerror or error}{hint}") from error
        raise
    return summary


def train_in_memory(run: Run, steps_per_call: int = 0, seed: int = 0, devices: int = 1) -> InMemory:
    """Runs phases without a folder: nothing is written, printed or resumed.  For notebooks and claims.

    Args:
      run: what a recipe's ``build()`` returns, or a ``Run`` of your own.
      steps_per_call: steps scanned in one dispatch; 0 for the run's own choice.
      seed: every key is derived from it.
      devices: how many to use; 0 for all.

    Returns:
      The variables as trained and as chosen for export, each metric's last value, and every logged line.

    Raises:
      Diverged: a metric became non-finite.
      UserError: settings that do not fit.
    """
    from trainers.loop import Loop, Settings
    from trainers.parallel import Parallel
    from trainers.record import Record

    record = Record()
    result = Loop(run, Settings(Parallel(devices=devices), steps_per_call), seed, record)()
    return InMemory(result.variables, result.chosen, result.artefacts, result.metrics, record.history, result.state)


@dataclasses.dataclass(frozen=True)
class InMemory:
    """What :func:`train_in_memory` returns.

    Attributes:
      variables: as trained, on the host.
      chosen: as evaluated and exported: the averaged parameters where the run keeps them.
      artefacts: of the phases.
      metrics: ``phase/metric`` or ``evaluation/metric`` -> last value.
      history: a dict for every logged line: ``phase``, ``step`` and the metrics.
      state: the whole ``TrainState``: optimisers, ``loss[update]`` of the loss transformations.
    """

    variables: Mapping[str, Any]
    chosen: Mapping[str, Any]
    artefacts: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, Any]]
    state: Any

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric over the run.

        Raises:
          ValueError: a metric that was never logged; those that were are named.
        """
        found = [(h["step"], h[metric]) for h in self.history if metric in h]
        if not found:
            known = dict.fromkeys(k for h in self.history for k in h if k not in ("phase", "step"))
            raise ValueError(f"no metric {metric!r} was logged; {nearest(metric, list(known))}")
        steps, values = zip(*found, strict=True)
        return list(steps), list(values)


def make_writable(folder: Path, option: str) -> list[Path]:
    """Makes sure that files can be written to ``folder``, and returns the folders it had to make, outermost first.

    Raises:
      UserError: they cannot; ``option`` is what the user named the folder by.
    """
    made = [f for f in (folder, *folder.parents) if not f.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.write_bytes(bytes(4096))  # not empty: a full disk takes empty files
        probe.unlink()
    except OSError as error:
        _remove(made)
        with contextlib.suppress(OSError):
            (folder / f".write-{os.getpid()}").unlink()
        raise UserError(f"{option} {folder} cannot be written: {error.strerror or error}") from None
    return made


def read_run(workdir: Path) -> dict[str, Any]:
    """What ``run.json`` says.

    Raises:
      UserError: it cannot be read as a run.
    """
    try:
        found = json.loads((workdir / RUN_FILE).read_text())
        if not {"method", "hash", "recipe", "data"} <= set(found) or not isinstance(found["recipe"], dict):
            raise TypeError
    except (ValueError, TypeError):
        raise UserError(f"{workdir / RUN_FILE} cannot be read as a run; choose another --workdir") from None
    return found


def _held(name: str, recipe: Recipe, workdir: Path, identity: str) -> dict[str, Any] | None:
    """The run that ``workdir`` holds, after checking that it may be gone on with; changes nothing on disk."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    if not (workdir / RUN_FILE).exists():
        if workdir.exists() and any(f.name in RUN_PARTS for f in workdir.iterdir()):
            raise UserError(f"{workdir} holds files of a run but no {RUN_FILE}; choose another --workdir")
        return None
    found = read_run(workdir)
    if found["hash"] != identity:
        was, now = {"method": found["method"], **found["recipe"]}, {"method": name, **resolved(recipe)}
        change = first_difference(was, now) or "it was initialised differently"
        raise UserError(f"{workdir} holds a run of another recipe ({change}); choose another --workdir")
    return found


def _saved(store: Any) -> bool:
    try:
        return bool(store.steps())
    except OSError:
        return True


def _clear(workdir: Path, made: Sequence[Path]) -> None:
    """Takes back what a run that never reached a checkpoint has written, so that it can be started differently."""
    for part in (RUN_FILE, f"{RUN_FILE}.tmp", *RUN_PARTS, "tensorboard", "artefacts", "curves.png"):
        with contextlib.suppress(OSError):
            shutil.rmtree(workdir / part) if (workdir / part).is_dir() else (workdir / part).unlink(missing_ok=True)
    _remove(made)


def _remove(made: Sequence[Path]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):  # not empty: somebody else's
            folder.rmdir()


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
    try:
        scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")
        scratch.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
