"""What becomes of every weight: rules applied to names and shapes, before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from checkpoints.arrays import few, shape_text
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.patterns import match, substitute
from checkpoints.importers.rules import Rule
from zoo.nn.partitioning import abstract_variables, unbox

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
    found, unused = applications(rules, shapes, set(buffers))
    pieces, mismatched = [], []
    filled: dict[Slot, str] = {}
    for rule, bindings, sources in found:
        slots = tuple(slot_of(t, bindings) for t in rule.target)
        lost = [s for s in sources if s is None]
        if lost or any(path not in abstract for path, _ in slots):
            unused += [s for s in sources if s is not None]
            continue
        why = _misfit(rule, sources, slots, shapes, abstract)
        twice = next((s for s in slots if s in filled), None)
        if why is None and twice is not None:
            why = f"{slot_text(twice)} is already filled by {filled[twice]}"
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
    missing = [slot_text(s) for s in all_slots(abstract, pieces, filled) if s not in filled]
    return Plan(
        tuple(pieces), abstract, tuple(missing), tuple(unused), tuple(mismatched), tuple(buffers), tuple(duplicates)
    )


def plan_export(layout: Layout, module: Any) -> Plan:
    """The plan for a model that was never imported: from the target's leaves back to the source's names."""
    abstract = traverse_util.flatten_dict(unbox(abstract_variables(module)), sep="/")
    pieces: list[Piece] = []
    filled: set[Slot] = set()
    for rule in layout.rules(module):
        pattern, row = row_of(rule.target[0])
        for path, leaf in abstract.items():
            bindings = match(pattern, path)
            if bindings is None:
                continue
            rows = [{}] if row is None else [{row: i} for i in range(leaf.shape[0])]
            for extra in rows:
                values = {**bindings, **extra}
                slots = tuple(slot_of(t, values) for t in rule.target)
                if not filled & set(slots) and all(p in abstract for p, _ in slots):
                    filled |= set(slots)
                    pieces.append(Piece(rule, tuple(substitute(s, values) for s in rule.source), slots))
    missing = [slot_text(s) for s in all_slots(abstract, pieces, dict.fromkeys(filled, "")) if s not in filled]
    return Plan(tuple(pieces), abstract, tuple(missing), (), (), (), ())


def check(found: Plan, layout: Layout, allow_missing: Sequence[str] = (), allow_unused: Sequence[str] = ()) -> None:
    """Raises ImporterError unless everything is matched, save for what the patterns (globs) allow."""

    def allowed(name: str, patterns: Sequence[str]) -> bool:
        # a name as the message gives it, layers[1], is no glob
        return any(
            name in (p, f"params/{p}") or fnmatchcase(name, p) or fnmatchcase(name, f"params/{p}") for p in patterns
        )

    missing = [m for m in found.missing if not allowed(m, allow_missing)]
    unused = [u for u in found.unused if not allowed(u, allow_unused)]
    said = [f"{name}: {why}" for name, why in found.mismatched[:1]]
    said += [f"{len(found.mismatched) - 1} more do not fit"] if len(found.mismatched) > 1 else []
    said += [f"{len(missing)} missing: {few(missing)} (--allow-missing PATTERN initialises them)"] if missing else []
    said += [f"{len(unused)} unused: {few(unused)} (--allow-unused PATTERN leaves them out)"] if unused else []
    if said:
        raise ImporterError(f"the weights do not fit {layout.name}: {'; '.join(said)}")


def applications(rules: Sequence[Rule], names: Mapping[str, Any], apart: set[str]):
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
            return f"{array.dtype} where {slot_text(slot)} holds floating numbers (quantised weights are not supported)"
        if tuple(array.shape) != tuple(shape):
            there, here = list(array.shape), list(shape)
            turned = "; it looks transposed: another layout?" if there == here[::-1] else ""
            return f"{there} after rearranging, but {slot_text(slot)} is {here}{turned}"
    return None


def all_slots(abstract, pieces: Sequence[Piece], filled: Mapping[Slot, str]) -> Iterator[Slot]:
    """Every leaf once, or once for each row where rows are filled one by one."""
    stacked = {path for path, row in filled if row is not None}
    for path, leaf in abstract.items():
        if path in stacked:
            yield from ((path, i) for i in range(leaf.shape[0]))
        else:
            yield path, None


def slot_of(target: str, bindings: Mapping[str, int]) -> Slot:
    """What a target pattern is for these numbers."""
    path, _ = row_of(target)
    row = None
    if path != target:
        row = int(substitute(target[len(path) + 1 : -1], bindings))
    return substitute(path, bindings), row


def row_of(target: str) -> tuple[str, str | None]:
    """``layers/kernel[{i}]`` -> (``layers/kernel``, ``i``)."""
    if not target.endswith("]"):
        return target, None
    path, _, row = target[:-1].partition("[")
    return path, row.strip("{}")


def slot_text(slot: Slot) -> str:
    """A slot as reports name it."""
    return slot[0] if slot[1] is None else f"{slot[0]}[{slot[1]}]"
