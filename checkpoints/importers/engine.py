"""From a layout's table to a plan, and through the plan in either direction; no files here.

imported = import_tensors(tensors, config)          # tensors: name -> array, config: config.json's content or None
imported.module.apply(imported.variables, ...)
print(imported.report)
tensors == export_tensors(imported)                 # the same names, the same bytes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from checkpoints.arrays import few
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.patterns import match, substitute
from checkpoints.importers.planning import Piece, Plan, applications, check, plan, plan_export, slot_of, slot_text
from checkpoints.importers.recognition import layouts, recognise, split_prefix
from zoo.nn.partitioning import unbox

__all__ = [
    "Imported", "ImporterError", "Plan", "Report", "export_tensors", "import_tensors", "layouts", "plan", "recognise",
]  # fmt: skip

Read = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Report:
    """What came of an import.

    Attributes:
      matched: (source names, target paths) of every piece.
      reshaped: source names whose arrays were rearranged (transposed, reshaped, split, fused).
      missing: targets without a source, initialised afresh because the caller allowed it.
      unused: sources without a target, left out because the caller allowed it.
      buffers: sources kept verbatim beside the model.
      duplicates: second copies of tied weights, equal to the first.
      nonfinite: source name -> how many entries are NaN or infinite.
    """

    matched: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    reshaped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    nonfinite: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{sum(len(s) for s, _ in self.matched)} matched ({len(self.reshaped)} of them re-shaped)"]
        named = (
            ("missing, initialised afresh", self.missing), ("unused", self.unused), ("buffers kept", self.buffers),
            ("tied copies", self.duplicates),
        )  # fmt: skip
        parts += [f"{len(names)} {word}: {few(list(names))}" for word, names in named if names]
        if self.nonfinite:
            total = sum(self.nonfinite.values())
            parts.append(f"WARNING: {total} NaN or infinite entries in {few(sorted(self.nonfinite))}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "matched": [[list(s), list(t)] for s, t in self.matched]}


@dataclasses.dataclass(frozen=True)
class Imported:
    """An imported model.

    Attributes:
      layout: where it came from.
      module: the configured Linen module.
      variables: nested dicts of arrays, in the source's number types unless others were asked for.
      report: see :class:`Report`.
      source: names in their order, the prefix taken off, and config: what an export needs to be complete.
      buffers: original name -> array, of what is no weight.
    """

    layout: Layout
    module: Any
    variables: Mapping[str, Any]
    report: Report
    source: Mapping[str, Any]
    buffers: Mapping[str, np.ndarray]


def fill(
    found: Plan,
    read: Read,
    dtype: Any = None,
    regions: Callable[[str], Sequence[tuple[slice, ...]]] | None = None,
    only: Collection[str] | None = None,
) -> tuple[dict[str, list[tuple[tuple[slice, ...], np.ndarray]]], dict[str, int]]:
    """The target's leaves on the host, and how many entries of each source are not finite.

    Never holds more than the target and the sources of one piece.

    Args:
      found: the plan.
      read: reads a source whole.
      dtype: see :func:`target_dtype`.
      regions: which parts of a leaf are wanted, as slices with whole bounds; the whole leaf by default.
      only: the paths that are wanted; all by default.

    Returns:
      path -> (region, array) of each; and source -> count.
    """
    leaves: dict[str, list[tuple[tuple[slice, ...], np.ndarray]]] = {}
    nonfinite: dict[str, int] = {}
    for piece in found.pieces:
        if only is not None and not any(path in only for path, _ in piece.slots):
            continue
        arrays = piece.rule.forward([read(name) for name in piece.sources])
        for (path, row), array in zip(piece.slots, arrays, strict=True):
            if only is not None and path not in only:
                continue
            if bad := count_nonfinite(array):
                nonfinite[piece.sources[0]] = nonfinite.get(piece.sources[0], 0) + bad
            kind = target_dtype(array.dtype, dtype)
            if path not in leaves:
                shape = found.abstract[path].shape
                wanted = regions(path) if regions else [tuple(slice(0, n) for n in shape)]
                leaves[path] = [(at, np.empty([s.stop - s.start for s in at], kind)) for at in wanted]
            for at, buffer in leaves[path]:
                if buffer.dtype != kind:
                    raise ImporterError(f"{piece.sources[0]} is {kind}, but other layers are {buffer.dtype}")
                if row is None:
                    buffer[...] = array[at]
                elif at[0].start <= row < at[0].stop:
                    buffer[row - at[0].start] = array[at[1:]]
    return leaves, nonfinite


def target_dtype(source: Any, wanted: Any) -> np.dtype:
    """The number type under which an array is kept: the source's, or the wanted one for floating types."""
    return np.dtype(wanted) if wanted is not None and jnp.issubdtype(source, jnp.floating) else np.dtype(source)


def count_nonfinite(array: np.ndarray) -> int:
    """How many entries are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array))) if jnp.issubdtype(array.dtype, jnp.inexact) else 0


def fill_missing(
    found: Plan, module: Any, leaves: dict, dtype: Any = None, regions: Any = None, only: Collection[str] | None = None
) -> None:
    """Puts fresh values (the module's initialisers, key 0) where no source was; the other leaves are never made."""
    lost: dict[str, list[int | None]] = {}
    for text in found.missing:
        path, _, row = text.removesuffix("]").partition("[")
        if only is None or path in only:
            lost.setdefault(path, []).append(int(row) if row else None)
    if not lost:
        return

    def make(inputs):
        flat = traverse_util.flatten_dict(unbox(module.init(jax.random.key(0), **inputs)), sep="/")
        return {p: flat[p] for p in lost}

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), module.example_inputs())
    for path, value in jax.jit(make)(zeros).items():
        fresh = np.asarray(value)
        if path not in leaves:
            fresh = fresh.astype(target_dtype(fresh.dtype, dtype))
            wanted = regions(path) if regions else [tuple(slice(0, n) for n in fresh.shape)]
            leaves[path] = [(at, fresh[at]) for at in wanted]
            continue
        for at, buffer in leaves[path]:
            for row in (r for r in lost[path] if at[0].start <= r < at[0].stop):
                buffer[row - at[0].start] = fresh[(row, *at[1:])]


def import_tensors(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] | None = None,
    layout: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    dtype: Any = None,
) -> Imported:
    """Imports weights that are in memory.

    Args:
      tensors: name -> array.
      config: config.json's content, if there is one.
      layout: its name; recognised from config and names by default.
      allow_missing: globs over target paths that may be without a source; they are initialised afresh.
      allow_unused: globs over source names that may be without a target; they are left out.
      dtype: of floating leaves; the source's own by default.

    Raises:
      ImporterError: unknown or ambiguous layout, unsupported config, weights that do not fit.
    """
    chosen, prefix, names = identify(config, tensors, layout)
    shapes = {short: tensors[name] for short, name in names.items()}
    module = configured(chosen, config, shapes)
    found = plan(chosen, module, shapes)
    check(found, chosen, allow_missing, allow_unused)
    read = lambda short: np.asarray(tensors[names[short]])  # noqa: E731
    regions, nonfinite = fill(found, read, dtype)
    fill_missing(found, module, regions, dtype)
    leaves = {path: parts[0][1] for path, parts in regions.items()}
    check_duplicates(found, read)
    variables = traverse_util.unflatten_dict({p: jnp.asarray(x) for p, x in leaves.items()}, sep="/")
    buffers = {names[b]: np.asarray(tensors[names[b]]) for b in found.buffers}
    source = {"names": list(tensors), "prefix": prefix, "config": config}
    return Imported(chosen, module, variables, report_of(found, nonfinite), source, buffers)


def identify(
    config: Mapping[str, Any] | None, tensors: Mapping[str, Any], layout: str | None
) -> tuple[Layout, str, dict[str, str]]:
    """The layout, the prefix before its names, and short name -> name in the file."""
    chosen = named(layout) if layout else recognise(config, tensors)
    prefix, names = split_prefix(chosen, tensors)
    return chosen, prefix, names


def configured(layout: Layout, config: Mapping[str, Any] | None, shapes: Mapping[str, Any]) -> Any:
    """The module that a layout configures.

    Raises:
      ImporterError: unsupported, or entries and weights that a configuration cannot do without are not there.
    """
    try:
        return layout.configure(config, abstract_shapes(shapes))
    except (LookupError, TypeError, AttributeError) as error:
        gist = f"{type(error).__name__}: {error}"
        raise ImporterError(
            f"config and weights do not describe a model of the layout {layout.name} ({gist}); "
            "give the right config.json with --config FILE, or another layout with --as NAME"
        ) from error


def named(layout: str) -> Layout:
    """A layout by name; raises ImporterError with the nearest ones."""
    known = layouts()
    if layout not in known:
        raise ImporterError(f"--as {layout!r} is unknown; there are {', '.join(sorted(known))}")
    return known[layout]


def abstract_shapes(shapes: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Anything with shape and dtype, as ``ShapeDtypeStruct``."""
    return {n: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for n, x in shapes.items()}


def report_of(found: Plan, nonfinite: Mapping[str, int]) -> Report:
    """The report of a plan that was carried out."""
    matched = tuple((p.sources, tuple(slot_text(s) for s in p.slots)) for p in found.pieces)
    reshaped = tuple(s for p in found.pieces if p.rule.ops for s in p.sources)
    copies = tuple(copy for copy, _ in found.duplicates)
    return Report(matched, reshaped, found.missing, found.unused, found.buffers, copies, dict(nonfinite))


def check_duplicates(found: Plan, read: Read) -> None:
    """Raises ImporterError if a second copy of a tied weight differs from the first."""
    for copy, original in found.duplicates:
        if not np.array_equal(read(copy), read(original), equal_nan=True):
            raise ImporterError(f"{copy} differs from {original}, which the configuration says is the same weight")


def export_tensors(
    model: Imported | str, module: Any = None, variables: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Weights under the source's names, in memory.

    Args:
      model: an import (its own names, order, buffers and copies come back), or a layout's name.
      module, variables: with a layout's name: a model that was never imported.

    Raises:
      ImporterError: the layout has no place for some weight of the model.
    """
    if isinstance(model, Imported):
        return dict(export_stream(model.layout, model.module, model.variables, model.source, model.buffers))
    return dict(export_stream(named(model), module, variables))


def export_stream(
    layout: Layout,
    module: Any,
    variables: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
    buffers: Mapping[str, np.ndarray] | None = None,
    get: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) one by one, in the source's order if it is known; arguments as :func:`export_tensors`."""
    flat = traverse_util.flatten_dict(unbox(dict(variables)), sep="/")
    makers = export_makers(layout, module, source, buffers or {})
    for name, make in makers.items():
        yield name, np.asarray(make(lambda path, row: _row(flat[path], row, get)), order="C")


def export_makers(layout: Layout, module: Any, source: Mapping[str, Any] | None, buffers: Mapping[str, np.ndarray]):
    """Name -> function that makes its array from ``get(path, row)``."""
    prefix, original, shorts = "", None, None
    found = plan_export(layout, module)
    if source is not None:
        prefix, original = source["prefix"], list(source["names"])
        shorts = {n: n.removeprefix(prefix) for n in original}
        found = _restricted(layout, module, found, set(shorts.values()))
    if found.missing:
        raise ImporterError(f"{layout.name} has no name for {few(list(found.missing))}")
    made: dict[str, Callable] = {}
    for piece in found.pieces:
        for i, name in enumerate(piece.sources):
            made[name] = _maker(piece, i)
    if original is None:
        check_configurable(layout, module, found)
        fixed = {n: lambda get, value=value: value for n, value in layout.new_buffers(module, list(made)).items()}
        return {layout.full_name(module, name): make for name, make in (made | fixed).items()}
    out = {}
    for name in original:
        short = shorts[name]
        copy_of = next((substitute(o, b) for c, o in layout.duplicates if (b := match(c, short)) is not None), None)
        if short in made:
            out[name] = made[short]
        elif name in buffers:
            out[name] = lambda get, value=buffers[name]: value
        elif copy_of in made:
            out[name] = made[copy_of]
    # what the import initialised afresh stood in none of its files
    known = set(shorts.values())
    full = (lambda n: layout.full_name(module, n)) if prefix in layout.prefixes else (lambda n: f"{prefix}{n}")
    return out | {full(name): make for name, make in made.items() if name not in known}


def check_configurable(layout: Layout, module: Any, found: Plan) -> None:
    """Raises ImporterError unless the layout, given what an export writes, would configure this very module again.

    Tables know names and shapes only: a GPT-2 has a place for each of OPT's weights, and is no OPT.
    """
    shapes = {}
    for piece in found.pieces:
        leaves = [found.abstract[path] for path, _ in piece.slots]
        rows = [x.shape if row is None else x.shape[1:] for x, (_, row) in zip(leaves, piece.slots, strict=True)]
        dummies = [np.broadcast_to(np.zeros((), x.dtype), s) for x, s in zip(leaves, rows, strict=True)]
        shapes |= zip(piece.sources, piece.rule.backward(dummies), strict=True)
    again = configured(layout, layout.to_config(module), shapes)
    if type(again) is not type(module):
        raise ImporterError(f"{layout.name} writes a {type(again).__name__}, not a {type(module).__name__}")
    ours, theirs = _facts(module), _facts(again)
    for name, mine in ours.items():
        if mine != theirs[name]:
            raise ImporterError(
                f"this {type(module).__name__} cannot be written as {layout.name}: {name} is {mine!r}, a file "
                f"in that layout would have {theirs[name]!r}"
            )


def _facts(module: Any) -> dict[str, Any]:
    """What a file decides of a module: its configuration, or its fields and those of the modules in them."""
    if hasattr(module, "config"):
        return {f.name: getattr(module.config, f.name) for f in dataclasses.fields(module.config)}
    found = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and field.name != "parent":
            found |= {field.name: type(value).__name__}
            found |= {f"{field.name}.{name}": fact for name, fact in _facts(value).items()}
        elif field.name not in ("parent", "name", "dtype", "param_dtype", "remat"):
            found[field.name] = value
    return found


def _restricted(layout: Layout, module: Any, found: Plan, names: set[str]) -> Plan:
    """The export plan that makes these names, where a table knows several for one leaf."""
    rules = tuple(layout.rules(module))
    applied, _ = applications(rules, dict.fromkeys(names), set())
    pieces = {}
    for rule, bindings, sources in applied:
        slots = tuple(slot_of(t, bindings) for t in rule.target)
        if None not in sources and all(p in found.abstract for p, _ in slots):
            pieces |= dict.fromkeys(slots, Piece(rule, sources, slots))
    kept = {piece.sources: piece for piece in pieces.values()}
    kept |= {p.sources: p for p in found.pieces if not set(p.slots) & set(pieces)}
    return dataclasses.replace(found, pieces=tuple(kept.values()))


def _maker(piece: Piece, which: int) -> Callable:
    return lambda get: piece.rule.backward([get(path, row) for path, row in piece.slots])[which]


def _row(leaf: Any, row: int | None, get: Callable) -> np.ndarray:
    return get(leaf) if row is None else get(leaf)[row]
