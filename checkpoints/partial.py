"""Starting from weights that fit only in part: which match, which are missing, which stay unused, and saying so.

source = load_weights("runs/ict")                              # a run, or an exported model
params, report = merge(flat_params, source, only=("encoder/*",), rename={"backbone": "encoder"})
print(report)
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from checkpoints.arrays import CheckpointError, DamagedError, few, place_of, shape_text
from checkpoints.model_folder import read_document, read_flat
from checkpoints.store import Store

STATISTICS = "batch_stats"
"""The collection that goes with the parameters: a network without its running statistics is not the network."""


class MergeError(ValueError):
    """Weights of which nothing fits, or a pattern that names nothing; the nearest names are offered."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What came of a merge; all paths are the target's, except ``unused``.

    Attributes:
      matched: taken from the source.
      missing: asked for, but not in the source; the target's own value stays.
      unused: of the source (under its own names), not taken.
      mismatched: ``(path, source, target)`` with ``dtype[shape]`` of both; the target's own value stays.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched"]
        differing = [f"{path} ({source} there, {target} here)" for path, source, target in self.mismatched]
        named = (("mismatched", differing), ("missing", self.missing), ("unused", self.unused))
        parts += [f"{len(names)} {word}: {few(list(names))}" for word, names in named if names]
        return "; ".join(parts)


def merge(
    target: Mapping[str, Any],
    source: Mapping[str, Any],
    only: tuple[str, ...] = ("*",),
    rename: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], MergeReport]:
    """Puts a source's arrays into a target of the same or a larger structure.

    Args:
      target: flat parameters, path -> array; their dtypes and shardings are kept.
      source: flat parameters, path -> array.
      only: glob patterns over the target's paths (``*`` crosses ``/``); the rest of the target is left as it is.
      rename: ``{source path or leading part of it: target's}``, whole path parts; the longest that fits is used, and
        ``""`` stands for the root.

    Returns:
      The merged flat parameters and the report.

    Raises:
      MergeError: a pattern matches nothing, two source paths come to the same name, or nothing at all matched.
    """
    for pattern in only:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in target):
            raise MergeError(f"pattern {pattern!r} matches no parameter; {_nearest(pattern, target)}")
    renamed: dict[str, str] = {}
    for path in source:
        new = _rename(path, rename or {})
        if new in renamed:
            raise MergeError(f"{renamed[new]} and {path} of the source would both become {new}")
        renamed[new] = path
    merged, matched, missing, mismatched = dict(target), [], [], []
    for path, own in target.items():
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in only):
            continue
        if path not in renamed:
            missing.append(path)
            continue
        value = source[renamed[path]]
        if tuple(value.shape) != tuple(own.shape) or _sort(value.dtype) != _sort(own.dtype):
            mismatched.append((path, shape_text(value.shape, value.dtype), shape_text(own.shape, own.dtype)))
            continue
        merged[path] = _like(value, own)
        matched.append(path)
    taken = {renamed[path] for path in matched}
    unused = tuple(path for path in source if path not in taken)
    report = MergeReport(tuple(matched), tuple(missing), unused, tuple(mismatched))
    if not matched:
        if mismatched:
            path, theirs, ours = mismatched[0]
            raise MergeError(f"nothing fits: {path} is {theirs} there and {ours} here")
        hint = _nearest(missing[0], renamed) if renamed else "the source is empty"
        raise MergeError(f"nothing fits: {missing[0]} is not among the source's weights; {hint}")
    return merged, report


def merge_variables(
    variables: Mapping[str, Any],
    source: Mapping[str, Mapping[str, Any]],
    only: tuple[str, ...] = ("*",),
    rename: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], MergeReport]:
    """:func:`merge` for nested Flax variables: parameters, and the batch statistics that belong to them.

    Args:
      variables: collection -> nested dicts of arrays.
      source: collection -> flat arrays (see :func:`load_collections`).
      only, rename: see :func:`merge`; patterns are over parameter paths, and statistics follow those they match.

    Returns:
      The variables, and the report; statistics stand in it as ``batch_stats/...``.

    Raises:
      MergeError: see :func:`merge`; only the parameters must match something.
    """
    flat = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    merged, report = merge(flat, source["params"], only, rename)
    out = {**variables, "params": traverse_util.unflatten_dict(merged, sep="/")}
    own, theirs = variables.get(STATISTICS), source.get(STATISTICS)
    if own and theirs:
        flat = traverse_util.flatten_dict(dict(own), sep="/")
        fitting = tuple(p for p in only if any(fnmatch.fnmatchcase(path, p) for path in flat))
        if fitting:
            try:
                merged, more = merge(flat, theirs, fitting, rename)
            except MergeError:  # the parameters are another part of the model than the statistics
                return out, report
            out[STATISTICS] = traverse_util.unflatten_dict(merged, sep="/")
            report = _joined(report, more)
    return out, report


def _joined(report: MergeReport, more: MergeReport) -> MergeReport:
    name = lambda names: tuple(f"{STATISTICS}/{n}" for n in names)  # noqa: E731
    mismatched = tuple((f"{STATISTICS}/{p}", a, b) for p, a, b in more.mismatched)
    return MergeReport(
        report.matched + name(more.matched), report.missing + name(more.missing), report.unused + name(more.unused),
        report.mismatched + mismatched,
    )  # fmt: skip


def load_weights(
    path: Path | str,
    weights: Literal["average", "params"] = "average",
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, np.ndarray]:
    """The flat parameters of :func:`load_collections`."""
    return load_collections(path, weights, warn)["params"]


def load_collections(
    path: Path | str,
    weights: Literal["average", "params"] = "average",
    warn: Callable[[str], None] = warnings.warn,
) -> dict[str, dict[str, np.ndarray]]:
    """Flat parameters (paths without ``params/``) of a run or of an exported model, and its batch statistics.

    Args:
      path: a run's folder, its ``checkpoints`` folder, or a model's folder.
      weights: of a run, the averaged parameters if it keeps them, or those it trains.
      warn: told of a damaged checkpoint that is passed over.

    Returns:
      ``params`` and, where there are some, ``batch_stats``.

    Raises:
      CheckpointError: there is nothing to read.
      DamagedError: what is there is damaged.
    """
    if weights not in ("average", "params"):
        raise ValueError(f"weights must be 'average' or 'params', got {weights!r}")
    place = place_of(path)
    if not place.exists():
        raise CheckpointError(f"no weights in {place}: it does not exist")
    if (place / "model.json").exists():
        return _model_weights(place)
    stores = [Store(p) for p in (place / "checkpoints", place) if p.exists()]
    store = next((s for s in stores if s.steps()), None)
    if store is not None:
        return _run_weights(store, weights, warn)
    if (place / "model" / "model.json").exists():
        return _model_weights(place / "model")
    raise CheckpointError(f"no weights in {place}: neither a run with a complete checkpoint nor an exported model")


def _run_weights(store: Store, weights: str, warn: Callable[[str], None]) -> dict[str, dict[str, np.ndarray]]:
    for step in reversed(store.steps()):
        try:
            paths = store.manifest(step)["leaves"]
            chosen = [p for p in paths if p.startswith("average/")] if weights == "average" else []
            chosen = chosen or [p for p in paths if p.startswith("params/")]
            if not chosen:
                raise CheckpointError(f"checkpoint {step} in {store.root} holds no parameters")
            before = f"collections/{STATISTICS}/"
            statistics = [p for p in paths if p.startswith(before)]
            found = store.read(step, chosen + statistics)
            out = {"params": {p.partition("/")[2]: found[p] for p in chosen}}
            return out | ({STATISTICS: {p.removeprefix(before): found[p] for p in statistics}} if statistics else {})
        except DamagedError as damage:
            warn(f"skipping damaged checkpoint {step}: {damage}")
    raise DamagedError(f"every checkpoint in {store.root} is damaged")


def _model_weights(place: epath.Path) -> dict[str, dict[str, np.ndarray]]:
    flat = {p: np.asarray(x) for p, x in read_flat(place, read_document(place)).items()}
    params = {p.removeprefix("params/"): x for p, x in flat.items() if p.startswith("params/")}
    if not params:
        raise CheckpointError(f"the model in {place} holds no parameters")
    before = f"{STATISTICS}/"
    statistics = {p.removeprefix(before): x for p, x in flat.items() if p.startswith(before)}
    return {"params": params} | ({STATISTICS: statistics} if statistics else {})


def _rename(path: str, rename: Mapping[str, str]) -> str:
    for old in sorted(rename, key=len, reverse=True):
        if path == old:
            return rename[old]
        if old == "" or path.startswith(old + "/"):
            rest = path[len(old) + 1 :] if old else path
            return f"{rename[old]}/{rest}" if rename[old] else rest
    return path


def _like(value: Any, own: Any) -> Any:
    if isinstance(own, np.ndarray):
        return np.asarray(value).astype(own.dtype)
    value = np.asarray(value).astype(own.dtype)
    sharding = getattr(own, "sharding", None)
    return jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)


def _sort(dtype: Any) -> str:
    # floating types convert into one another; nothing else does
    return "float" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name.replace("*", ""), list(names), n=3, cutoff=0.3)
    return f"nearest: {', '.join(near)}" if near else f"there are {few(sorted(names))}"
