"""From a layout's table to a plan, and through the plan in either direction; no files here.

imported = import_tensors(tensors, config)          # tensors: name -> array, config: config.json's content or None
imported.module.apply(imported.variables, ...)
print(imported.report)
tensors == export_tensors(imported)                 # the same names, the same bytes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from checkpoints.arrays import few, shape_text
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.patterns import match, substitute
from checkpoints.importers.recognition import layouts, recognise, split_prefix
from checkpoints.importers.rules import Rule
from zoo.nn.partitioning import abstract_variables, unbox

__all__ = [
    "Imported", "ImporterError", "Plan", "Report", "export_tensors", "import_tensors", "layouts", "plan", "recognise",
]  # fmt: skip

Read = Callable[[str], np.ndarray]
Slot = tuple[str, int | None]
"""A target: path, and the row of a leaf stacked over layers (``None``: the whole leaf)."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One application of a rule: these sources become these slots."""

    rule: Rule
    sources: tuple[str, ...]
    slots: tuple[Slot, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an import would do; names are the source's without the prefix, paths the target's.

    Attributes:
      pieces: the applications of rules.
      abstract: path -> shape of every leaf of the target.
      missing: slots that no source fills, as text.
      unused: source names that nothing takes.
      mismatched: (source name, what does not fit).
      buffers: source names kept verbatim.
      duplicates: (copy, original) source names.
    """

    pieces: tuple[Piece, ...]
    abstract: Mapping[str, jax.ShapeDtypeStruct]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[tuple[str, str], ...]
    buffers: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]


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


def plan(layout: Layout, module: Any, shapes: Mapping[str, Any]) -> Plan:
    """Decides what becomes of every source name; reads and allocates nothing.

    Args:
      layout: the table's owner.
      module: what ``layout.configure`` made.
      shapes: source name (prefix taken off) -> anything with ``shape`` and ``dtype``.

    Raises:
      ImporterError: a name that fits two rules (the table's fault).
    """
    abstract = traverse_util.flatten_dict(unbox(abstract_variables(module)), sep="/")
    rules = tuple(layout.rules(module))
    buffers = [n for n in shapes if any(match(p, n) is not None for p in layout.buffers)]
    found, unused = _applications(rules, shapes, set(buffers))
    pieces, mismatched = [], []
    filled: dict[Slot, str] = {}
    for rule, bindings, sources in found:
        slots = tuple(_slot(t, bindings) for t in rule.target)
        lost = [s for s in sources if s is None]
        if lost or any(path not in abstract for path, _ in slots):
            unused += [s for s in sources if s is not None]
            continue
        why = _misfit(rule, sources, slots, shapes, abstract)
        twice = next((filled[s] for s in slots if s in filled), None)
        if why is None and twice is not None:
            why = f"{_text(slots[0])} is already filled by {twice}"
        if why:
            mismatched.append((sources[0], why))
        else:
            pieces.append(Piece(rule, sources, slots))
        filled |= dict.fromkeys(slots, sources[0])
    duplicates = []
    for copy_pattern, original_pattern in layout.duplicates:
        for name in list(unused):
            bindings = match(copy_pattern, name)
            original = None if bindings is None else substitute(original_pattern, bindings)
            if original in shapes and original != name:
                duplicates.append((name, original))
                unused.remove(name)
    missing = [_text(s) for s in _slots(abstract, pieces, filled) if s not in filled]
    return Plan(
        tuple(pieces), abstract, tuple(missing), tuple(unused), tuple(mismatched), tuple(buffers), tuple(duplicates)
    )


def plan_export(layout: Layout, module: Any) -> Plan:
    """The plan for a model that was never imported: from the target's leaves back to the source's names."""
    abstract = traverse_util.flatten_dict(unbox(abstract_variables(module)), sep="/")
    pieces: list[Piece] = []
    filled: set[Slot] = set()
    for rule in layout.rules(module):
        pattern, row = _row_of(rule.target[0])
        for path, leaf in abstract.items():
            bindings = match(pattern, path)
            if bindings is None:
                continue
            rows = [{}] if row is None else [{row: i} for i in range(leaf.shape[0])]
            for extra in rows:
                values = {**bindings, **extra}
                slots = tuple(_slot(t, values) for t in rule.target)
                if not filled & set(slots) and all(p in abstract for p, _ in slots):
                    filled |= set(slots)
                    pieces.append(Piece(rule, tuple(substitute(s, values) for s in rule.source), slots))
    missing = [_text(s) for s in _slots(abstract, pieces, dict.fromkeys(filled, "")) if s not in filled]
    return Plan(tuple(pieces), abstract, tuple(missing), (), (), (), ())


def check(found: Plan, layout: Layout, allow_missing: Sequence[str] = (), allow_unused: Sequence[str] = ()) -> None:
    """Raises ImporterError unless everything is matched, save for what the patterns (globs) allow."""
    allowed = lambda name, patterns: any(fnmatchcase(name, p) or fnmatchcase(name, f"params/{p}") for p in patterns)  # noqa: E731
    missing = [m for m in found.missing if not allowed(m, allow_missing)]
    unused = [u for u in found.unused if not allowed(u, allow_unused)]
    said = [f"{name}: {why}" for name, why in found.mismatched[:1]]
    said += [f"{len(found.mismatched) - 1} more do not fit"] if len(found.mismatched) > 1 else []
    said += [f"{len(missing)} missing: {few(missing)} (--allow-missing PATTERN initialises them)"] if missing else []
    said += [f"{len(unused)} unused: {few(unused)} (--allow-unused PATTERN leaves them out)"] if unused else []
    if said:
        raise ImporterError(f"the weights do not fit {layout.name}: {'; '.join(said)}")


def rearranged(found: Plan, read: Read) -> Iterator[tuple[Piece, list[np.ndarray]]]:
    """Every piece with its targets' arrays, reading each source once, one piece at a time."""
    for piece in found.pieces:
        yield piece, piece.rule.forward([read(name) for name in piece.sources])


def fill(found: Plan, read: Read, dtype: Any = None) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The target's leaves on the host, and how many entries of each source are not finite.

    Never holds more than the target and the sources of one piece.
    """
    leaves: dict[str, np.ndarray] = {}
    nonfinite: dict[str, int] = {}
    for piece, arrays in rearranged(found, read):
        bad = sum(count_nonfinite(a) for a in arrays)
        if bad:
            nonfinite[piece.sources[0]] = bad
        for (path, row), array in zip(piece.slots, arrays, strict=True):
            kind = target_dtype(array.dtype, dtype)
            if path not in leaves:
                leaves[path] = np.empty(found.abstract[path].shape, kind)
            if leaves[path].dtype != kind:
                raise ImporterError(f"{piece.sources[0]} is {kind}, but other layers are {leaves[path].dtype}")
            leaves[path][... if row is None else row] = array
    return leaves, nonfinite


def target_dtype(source: Any, wanted: Any) -> np.dtype:
    """The number type under which an array is kept: the source's, or the wanted one for floating types."""
    return np.dtype(wanted) if wanted is not None and jnp.issubdtype(source, jnp.floating) else np.dtype(source)


def count_nonfinite(array: np.ndarray) -> int:
    """How many entries are NaN or infinite."""
    return int(array.size - np.count_nonzero(np.isfinite(array))) if jnp.issubdtype(array.dtype, jnp.inexact) else 0


def initialised(module: Any, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Fresh values of some leaves (key 0); the others are never made."""
    if not paths:
        return {}

    def make(inputs):
        flat = traverse_util.flatten_dict(unbox(module.init(jax.random.key(0), **inputs)), sep="/")
        return {p: flat[p] for p in paths}

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), module.example_inputs())
    return {p: np.asarray(x) for p, x in jax.jit(make)(zeros).items()}


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
    module = chosen.configure(config, abstract_shapes(shapes))
    found = plan(chosen, module, shapes)
    check(found, chosen, allow_missing, allow_unused)
    read = lambda short: np.asarray(tensors[names[short]])  # noqa: E731
    leaves, nonfinite = fill(found, read, dtype)
    check_duplicates(found, read)
    whole = [p for p in found.abstract if p not in leaves]
    leaves |= initialised(module, whole)
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
    matched = tuple((p.sources, tuple(_text(s) for s in p.slots)) for p in found.pieces)
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
        yield name, np.ascontiguousarray(make(lambda path, row: _row(flat[path], row, get)))


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
        return made
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
    return out


def _restricted(layout: Layout, module: Any, found: Plan, names: set[str]) -> Plan:
    """The export plan that makes these names, where a table knows several for one leaf."""
    rules = tuple(layout.rules(module))
    applied, _ = _applications(rules, dict.fromkeys(names), set())
    pieces = {}
    for rule, bindings, sources in applied:
        slots = tuple(_slot(t, bindings) for t in rule.target)
        if None not in sources and all(p in found.abstract for p, _ in slots):
            pieces |= dict.fromkeys(slots, Piece(rule, sources, slots))
    kept = {piece.sources: piece for piece in pieces.values()}
    kept |= {p.sources: p for p in found.pieces if not set(p.slots) & set(pieces)}
    return dataclasses.replace(found, pieces=tuple(kept.values()))


def _maker(piece: Piece, which: int) -> Callable:
    return lambda get: piece.rule.backward([get(path, row) for path, row in piece.slots])[which]


def _row(leaf: Any, row: int | None, get: Callable) -> np.ndarray:
    return get(leaf) if row is None else get(leaf[row])


def _applications(rules: Sequence[Rule], names: Mapping[str, Any], apart: set[str]):
    """((rule, bindings, sources or None where one lacks) ..., names that no rule takes)."""
    groups: dict[tuple, list[str | None]] = {}
    unused = []
    for name in names:
        if name in apart:
            continue
        hits = [
            (r, k, b)
            for r, rule in enumerate(rules)
            for k, pattern in enumerate(rule.source)
            if (b := match(pattern, name)) is not None
        ]
        if len(hits) > 1:
            raise ImporterError(f"{name} fits {len(hits)} rules of the table: {rules[hits[0][0]]}, {rules[hits[1][0]]}")
        if not hits:
            unused.append(name)
            continue
        ((r, k, bindings),) = hits
        key = (r, tuple(sorted(bindings.items())))
        groups.setdefault(key, [None] * len(rules[r].source))[k] = name
    return [(rules[r], dict(b), tuple(s)) for (r, b), s in groups.items()], unused


def _misfit(rule: Rule, sources, slots, shapes, abstract) -> str | None:
    # arrays of one entry spread without memory: the rearrangement is tried on shapes alone
    dummies = [np.broadcast_to(np.zeros((), shapes[s].dtype), shapes[s].shape) for s in sources]
    try:
        arrays = rule.forward(dummies)
    except (ValueError, IndexError) as error:
        return f"{shape_text(shapes[sources[0]].shape, shapes[sources[0]].dtype)} cannot be rearranged ({error})"
    for slot, array in zip(slots, arrays, strict=True):
        leaf = abstract[slot[0]]
        shape = leaf.shape if slot[1] is None else leaf.shape[1:]
        if slot[1] is not None and slot[1] >= leaf.shape[0]:
            return f"layer {slot[1]} of {leaf.shape[0]}"
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.floating):
            return f"{array.dtype} where {_text(slot)} holds floating numbers (quantised weights are not supported)"
        if tuple(array.shape) != tuple(shape):
            there, here = list(array.shape), list(shape)
            turned = "; it looks transposed: another layout?" if there == here[::-1] else ""
            return f"{there} after rearranging, but {_text(slot)} is {here}{turned}"
    return None


def _slots(abstract, pieces: Sequence[Piece], filled: Mapping[Slot, str]) -> Iterator[Slot]:
    stacked = {path for path, row in filled if row is not None}
    for path, leaf in abstract.items():
        if path in stacked:
            yield from ((path, i) for i in range(leaf.shape[0]))
        else:
            yield path, None


def _slot(target: str, bindings: Mapping[str, int]) -> Slot:
    path, _ = _row_of(target)
    row = None
    if path != target:
        row = int(substitute(target[len(path) + 1 : -1], bindings))
    return substitute(path, bindings), row


def _row_of(target: str) -> tuple[str, str | None]:
    """``layers/kernel[{i}]`` -> (``layers/kernel``, ``i``)."""
    if not target.endswith("]"):
        return target, None
    path, _, row = target[:-1].partition("[")
    return path, row.strip("{}")


def _text(slot: Slot) -> str:
    return slot[0] if slot[1] is None else f"{slot[0]}[{slot[1]}]"
