"""The store of a run: asynchronous, atomic checkpoints of flat trees, decided from complete folders on disk.

    store = Store(workdir / "checkpoints", keep=3)
    found = store.restore_latest(lambda manifest: abstract, warn=print)   # (step, tree, manifest) or None
    store.save(step, flat, meta={"recipe": "...", "position": {"train": 40}}, metric=0.93)   # returns after the copy
    store.check()                                                         # each step: raises a background error
    store.close()                                                         # waits, and raises what went wrong

``flat`` maps path strings (``"params/Dense_0/kernel"``) to arrays; ``abstract`` maps the same paths to
``jax.ShapeDtypeStruct(shape, dtype, sharding=...)``.  On disk::

    checkpoints/40.json    the manifest, plain text: step, metric, meta; shape, dtype, crc32 of every leaf; file sizes
    checkpoints/40/        the arrays, an Orbax PyTree checkpoint (OCDBT)

The manifest is written first and the folder gets its name last, so a step is complete when both are there: no process
has to remember anything, and a kill at any moment costs at most the save in flight.  Saving a step again writes
``40.1`` and deletes ``40`` once that is complete.  With several processes all call ``save``; process 0 writes manifests
and deletes.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.arrays import (
    Abstract,
    CheckpointError,
    DamagedError,
    Manifest,
    StoreError,
    abstract_of,
    check_files,
    check_fit,
    describe,
    file_sizes,
    json_text,
    one_line,
    place_of,
    read_arrays,
    saveable,
    write_text,
)

__all__ = ["CheckpointError", "DamagedError", "Store", "StoreError"]

_STEP = re.compile(r"(\d+)(?:\.(\d+))?")


class Store:
    """Checkpoints of one run in one folder.

    Attributes:
      root: the folder (local, or any path that ``etils.epath`` knows, such as ``gs://``).
      keep: how many of the newest complete steps are kept; the best by metric is kept besides.
      deadline: seconds after which a save still in flight counts as hung and ``check``, ``save`` and ``close`` say so.
    """

    def __init__(self, root: Path | str, keep: int = 3, deadline: float = 600.0):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.root = place_of(root)
        self.keep = keep
        self.deadline = deadline
        self._checkpointer = None
        self._saving: _Saving | None = None
        self._damaged: set[str] = set()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # what is on disk

    def steps(self) -> list[int]:
        """Complete steps, ascending, read from disk: folders under their final name with a manifest beside them."""
        return sorted({step for step, _ in self._complete()})

    def manifest(self, step: int) -> Manifest:
        """The manifest of a complete step.

        Raises:
          CheckpointError: there is no such step; those that are there are named.
          DamagedError: it cannot be read.
        """
        return self._manifest(self._newest(step))

    def _complete(self) -> list[tuple[int, int]]:
        # (step, generation) of every complete save, ascending
        try:
            names = {p.name for p in self.root.iterdir()}
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read checkpoints in {self.root}: {one_line(error)}") from error
        found = []
        for name in names:
            match = _STEP.fullmatch(name)
            # Orbax writes this file last; on file systems without rename it alone marks a folder as final
            if match and f"{name}.json" in names and (self.root / name / "commit_success.txt").exists():
                found.append((int(match[1]), int(match[2] or 0)))
        return sorted(found)

    def _newest(self, step: int) -> str:
        complete = self._complete()
        generations = [g for s, g in complete if s == step]
        if not generations:
            there = ", ".join(str(s) for s in sorted({s for s, _ in complete})) or "none"
            raise CheckpointError(f"no complete checkpoint of step {step} in {self.root}; there: {there}")
        return _name(step, max(generations))

    def _manifest(self, name: str) -> Manifest:
        path = self.root / f"{name}.json"
        try:
            manifest = json.loads(path.read_text())
            step, leaves = manifest["step"], manifest["leaves"]
            sound = step == int(name.split(".")[0]) and all({"shape", "dtype"} <= set(v) for v in leaves.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path}: unreadable manifest ({one_line(error)})") from error
        if not sound:
            raise DamagedError(f"{path}: not the manifest of step {name}")
        return manifest

    # saving

    def save(
        self,
        step: int,
        tree: Mapping[str, jax.Array],
        meta: Mapping[str, Any],
        metric: float | None = None,
        higher_is_better: bool = True,
    ) -> None:
        """Starts to save ``tree`` and returns when it has been copied: the arrays may then be donated.

        Args:
          step: a number that grows over the whole run, not 0 again in the next phase.
          tree: flat, path -> array (typed PRNG keys too).
          meta: plain facts for the manifest: recipe hash, phase, stream positions, ...
          metric: what "best" is decided on; a NaN counts as none.
          higher_is_better: the metric's direction.

        Raises:
          StoreError: an earlier save failed or hangs, or this one cannot begin (read-only or full disk).
          ValueError: ``meta`` is not JSON, or ``step`` is negative.
        """
        self._settle()
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        tree = {path: x if isinstance(x, jax.Array) else np.asarray(x) for path, x in tree.items()}
        manifest = {
            "format": 1,
            "step": int(step),
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            "higher_is_better": bool(higher_is_better),
            "meta": dict(meta),
            "versions": {"jax": jax.__version__},
            "leaves": describe(tree),
        }
        try:
            text = json_text(manifest)
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta of step {step} must be JSON: {one_line(error)}") from None
        try:
            name = _name(step, 1 + max((g for s, g in self._complete() if s == step), default=-1))
            if jax.process_index() == 0:
                self.root.mkdir(parents=True, exist_ok=True)
                write_text(self.root / f"{name}.json", text)
            checkpointer, ocp = self._orbax()
            checkpointer.save(self.root / name, args=ocp.args.PyTreeSave(saveable(tree)))
        except Exception as error:
            raise StoreError(f"cannot save checkpoint {step} in {self.root}: {one_line(error)}") from error
        self._saving = _Saving(step, checkpointer.wait_until_finished, lambda: self._complete_save(name, manifest))

    def check(self) -> None:
        """Cheap, for every step: raises what went wrong in the background since the last call.

        Raises:
          StoreError: the save in flight failed, or has taken longer than ``deadline``.
        """
        if self._saving and (self._saving.done.is_set() or self._saving.seconds > self.deadline):
            self._settle()

    def wait(self) -> None:
        """Waits until the save in flight is complete on disk; raises as :meth:`check` does."""
        self._settle()

    def close(self) -> None:
        """Waits for the save in flight, raises what went wrong, and lets Orbax's threads go."""
        try:
            self._settle()
        finally:
            if self._checkpointer is not None and self._saving is None:
                self._checkpointer.close()
                self._checkpointer = None

    def _settle(self) -> None:
        saving = self._saving
        if saving is None:
            return
        if not saving.done.wait(max(0.0, self.deadline - saving.seconds)):
            raise StoreError(
                f"checkpoint {saving.step} in {self.root} hangs: not complete {saving.seconds:.0f} s after it was begun"
            )
        self._saving = None
        if saving.error is not None:
            raise StoreError(
                f"checkpoint {saving.step} could not be written to {self.root}: {one_line(saving.error)}"
            ) from saving.error

    def _orbax(self):
        import orbax.checkpoint as ocp  # more than a second: only runs that save pay for it

        if self._checkpointer is None:
            _quiet_orbax()
            options = ocp.options.AsyncOptions(timeout_secs=max(1, math.ceil(self.deadline)))
            self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
        return self._checkpointer, ocp

    def _complete_save(self, name: str, manifest: Manifest) -> None:
        # in the background, once the folder has its name; a kill before this line loses only the sizes
        if jax.process_index() == 0:
            if not (self.root / name).exists():
                raise OSError(f"{name} is not there although Orbax reported success")
            manifest = {**manifest, "files": file_sizes(self.root / name)}
            write_text(self.root / f"{name}.json", json_text(manifest))
            self._retain(name)

    def _retain(self, saved: str) -> None:
        # drops what is neither new nor best, and what kills left behind
        complete = [_name(*entry) for entry in self._complete()]
        newest: dict[str, str] = {name.split(".")[0]: name for name in complete}
        sound = [name for name in newest.values() if name not in self._damaged]
        kept = {saved, *sound[-self.keep :]}
        scores = {}
        for name in sound:
            try:
                manifest = self._manifest(name)
            except DamagedError:
                continue
            if manifest.get("metric") is not None:
                scores[name] = manifest["metric"] if manifest["higher_is_better"] else -manifest["metric"]
        if scores:
            kept.add(max(reversed(list(scores)), key=scores.get))
        for path in self.root.iterdir():
            stem = path.name.split(".orbax-checkpoint-tmp")[0].removesuffix(".tmp").removesuffix(".json")
            if _STEP.fullmatch(stem) and not (stem in kept and path.name in (stem, f"{stem}.json")):
                # the manifest goes first: without it a half deleted folder is no checkpoint
                (self.root / f"{stem}.json").unlink(missing_ok=True) if stem not in kept else None
                path.rmtree() if path.is_dir() else path.unlink(missing_ok=True)

    # restoring

    def restore(self, step: int, abstract: Abstract) -> dict[str, jax.Array]:
        """The arrays of a complete step, on the shardings of ``abstract`` (a missing sharding: the first device).

        Raises:
          CheckpointError: no such step, or it does not fit: the first differing path with both shapes or dtypes, and
            the missing and unexpected paths.
          DamagedError: truncated, unreadable or altered.
        """
        name = self._newest(step)
        return self._restore(name, self._manifest(name), abstract)

    def restore_latest(
        self, abstract_for: Callable[[Manifest], Abstract], warn: Callable[[str], None]
    ) -> tuple[int, dict[str, jax.Array], Manifest] | None:
        """The newest step that can be read; ``None`` if there is no complete one.

        A damaged step is named to ``warn`` and the one before it is tried.

        Raises:
          CheckpointError: the newest readable step does not fit ``abstract_for(manifest)``.
          DamagedError: there are complete steps and all are damaged (starting afresh would overwrite them).
        """
        entries = [_name(*entry) for entry in reversed(self._complete())]
        for name in entries:
            tree, error = None, None
            try:
                manifest = self._manifest(name)
                tree = self._restore(name, manifest, abstract_for(manifest))
            except DamagedError as damage:
                error = damage
            if _everywhere(error is None):
                return manifest["step"], tree, manifest
            self._damaged.add(name)
            warn(f"skipping damaged checkpoint {self.root / name}: {error or 'another process could not read it'}")
        if entries:
            raise DamagedError(f"every checkpoint in {self.root} is damaged; move the folder away to start afresh")
        return None

    def read(self, step: int, paths: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Some leaves of a step (default: all) as host arrays, whatever devices it was saved from.

        Raises:
          CheckpointError, DamagedError: as :meth:`restore`; also for a path that is not there.
        """
        name = self._newest(step)
        manifest = self._manifest(name)
        unknown = [p for p in paths or () if p not in manifest["leaves"]]
        if unknown:
            raise CheckpointError(f"checkpoint {name} in {self.root} has no {unknown[0]!r}")
        leaves = {p: v for p, v in manifest["leaves"].items() if paths is None or p in paths}
        abstract = abstract_of(leaves)
        tree = self._restore(name, {**manifest, "leaves": leaves}, abstract, part=True)
        return {p: x if "key" in leaves[p] else np.asarray(x) for p, x in tree.items()}

    def _restore(self, name: str, manifest: Manifest, abstract: Abstract, part: bool = False) -> dict[str, jax.Array]:
        check_fit(f"checkpoint {self.root / name}", manifest["leaves"], abstract)
        check_files(self.root / name, manifest.get("files", {}))
        return read_arrays(self.root / name, manifest["leaves"], abstract, part)


class _Saving:
    """One save in flight; a daemon thread waits for it, so that a hang can be noticed and reported."""

    def __init__(self, step: int, finish: Callable[[], None], then: Callable[[], None]):
        self.step = step
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._begun = time.monotonic()

        def wait():
            try:
                finish()
                then()
            except BaseException as error:  # raised again by the next check(), save() or close()
                self.error = error
            finally:
                self.done.set()

        threading.Thread(target=wait, name=f"checkpoint-{step}", daemon=True).start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun


def _name(step: int, generation: int) -> str:
    return f"{step}.{generation}" if generation else str(step)


def _everywhere(ok: bool) -> bool:
    # whether every process succeeded: all must fall back to the same step
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _quiet_orbax() -> None:
    # Orbax logs background failures with a traceback; they are raised here, once, in one line
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _OrbaxFilter) for f in logger.filters):
        logger.addFilter(_OrbaxFilter())


class _OrbaxFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or record.levelno >= logging.CRITICAL
