"""The few types everything in the zoo is made of: contexts, elements, losses, objectives and loss transformations.

Optax made optimisers composable by writing them as ``(init, update)`` pairs over gradients.  The same idea serves the
loss: an :class:`Objective` says what a batch *costs*, element by element, and a :class:`LossTransformation` changes
those elements before they are reduced.  Everything here is pure and knows nothing of data, devices or files.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

UNITS: dict[str, int] = {"example": 1, "pair": 2, "triplet": 3, "token": 2, "batch": 0}
"""Columns of ``Elements.index`` for each unit: rows of the global batch (for a token: row and position)."""

Batch = Mapping[str, Any]
Variables = Mapping[str, Any]


class CompositionError(ValueError):
    """Two parts of the zoo that do not fit were put together; the message says which parts would."""


@struct.dataclass
class Context:
    """What a pure function may know of the moment it is called in.

    Attributes:
      rng: a key derived from (seed, stream name, step); never reuse it across purposes, ``fold_in`` a name instead.
      step: i32 scalar, steps already taken in this phase.
      total_steps: i32 scalar, the phase's planned steps.
      steps_per_epoch: i32 scalar, steps in one pass over the phase's (main) stream.
      artefacts: large read-only arrays made by earlier phases, by name.
      outputs, batch: the forward pass's outputs and the batch, global; filled for loss transformations.
      collections: the state's non-parameter collections before this step (memory banks, constants), for ``loss``.
      train: whether this is a training call.
      axis_name: the mapped axis under ``pmap``; modules with batch statistics synchronise over it.
    """

    rng: Any
    step: Any = 0
    total_steps: Any = 1
    steps_per_epoch: Any = 1
    artefacts: Any = struct.field(default_factory=dict)
    outputs: Any = None
    batch: Any = None
    collections: Any = None
    train: bool = struct.field(pytree_node=False, default=True)
    axis_name: str | None = struct.field(pytree_node=False, default=None)

    @property
    def epoch(self) -> Int[Array, ""]:
        """The 0-based epoch of this step."""
        return jnp.asarray(self.step) // jnp.asarray(self.steps_per_epoch)

    @property
    def epoch_start(self) -> Bool[Array, ""]:
        """Whether this step is the first of its epoch."""
        return jnp.asarray(self.step) % jnp.asarray(self.steps_per_epoch) == 0

    def key(self, name: str) -> Array:
        """A key for one named purpose of this step, the same on every device."""
        return named_key(self.rng, name)

    def example_keys(self, batch: Batch, name: str = "") -> Array:
        """One key per example, ``[B]``, that depends on the example's global row and on nothing else.

        Randomness drawn from these is the same however the batch is sharded, which is what makes ``pmap`` over 8
        devices, ``jit`` over 8 and one device the same training run.
        """
        rows = batch["row"] if "row" in batch else jnp.arange(batch_rows(batch))
        return jax.vmap(lambda row: jax.random.fold_in(self.key(name), row))(rows)


def named_key(key: Array, name: str) -> Array:
    """Derives the key for ``name`` from ``key`` (stable across processes, unlike Python's ``hash``)."""
    digest = 2166136261
    for byte in name.encode():
        digest = ((digest ^ byte) * 16777619) & 0xFFFFFFFF
    return jax.random.fold_in(key, digest)


def batch_rows(batch: Batch) -> int:
    """The number of rows of a batch (padding included)."""
    for name in ("index", "mask", "row"):
        if name in batch:
            return batch[name].shape[0]
    return jax.tree.leaves(batch)[0].shape[0]


def batch_mask(batch: Batch) -> Bool[Array, b]:
    """Which rows of the batch are real; all of them if the batch carries no ``mask``."""
    return batch["mask"].astype(bool) if "mask" in batch else jnp.ones(batch_rows(batch), bool)


@struct.dataclass
class Elements:
    """The elements of a loss before any reduction.

    Attributes:
      values: f32 ``[n]``, one loss per element.
      index: i32 ``[n, k]``, the rows of the *global* batch each element is made of; the first column is its anchor.
      mask: bool ``[n]``, which elements are real (the number of elements is static; padding is masked).
      unit: ``"example"`` (k=1), ``"pair"`` (2), ``"triplet"`` (3), ``"token"`` (2: row, position) or ``"batch"`` (0:
        one element that belongs to no row, such as a loss on a correlation matrix).
      terms: scalars that a loss transformation adds to the reduced elements, by name (a regulariser of the batch).
    """

    # pytree fields are untyped: jax fills them with tracers, shapes or None while it rebuilds a tree
    values: Any
    index: Any
    mask: Any
    unit: str = struct.field(pytree_node=False, default="example")
    terms: Any = struct.field(default_factory=dict)


@struct.dataclass
class Shared:
    """Marks a forward output that has no batch axis (a class matrix, a temperature), so that it is never gathered."""

    value: Any


def example_elements(values: Float[Array, b], batch: Batch) -> Elements:
    """Per-example losses ``[B]`` as elements; rows masked in the batch are masked here and hold 0."""
    mask = batch_mask(batch)
    index = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    return Elements(values=jnp.where(mask, values, 0.0), index=index, mask=mask, unit="example")


def elements(values: Array, index: Array, mask: Array, unit: str) -> Elements:
    """Elements of any unit, checked: ``index`` must have the unit's number of columns.

    Raises:
      ValueError: an unknown unit, or shapes that do not belong together.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {unit!r}")
    if values.ndim != 1 or index.shape != (values.shape[0], UNITS[unit]) or mask.shape != values.shape:
        raise ValueError(
            f"elements of unit {unit!r} need values [n], index [n, {UNITS[unit]}] and mask [n]; "
            f"got {values.shape}, {index.shape}, {mask.shape}"
        )
    return Elements(values=jnp.where(mask, values, 0.0), index=index, mask=mask, unit=unit)


def reduce_mean(e: Elements) -> Float[Array, ""]:
    """Mean over real elements.  The denominator is their number, so a down-weighted element lowers the loss."""
    return jnp.sum(jnp.where(e.mask, e.values, 0.0)) / jnp.maximum(jnp.sum(e.mask), 1)


def reduce_sum(e: Elements) -> Float[Array, ""]:
    """Sum over real elements."""
    return jnp.sum(jnp.where(e.mask, e.values, 0.0))


def reduce_nonzero_mean(e: Elements) -> Float[Array, ""]:
    """Mean over the real elements that are not zero (margin losses: the active triplets)."""
    active = e.mask & (e.values != 0)
    return jnp.sum(jnp.where(active, e.values, 0.0)) / jnp.maximum(jnp.sum(active), 1)


REDUCERS: dict[str, Callable[[Elements], Array]] = {
    "mean": reduce_mean,
    "sum": reduce_sum,
    "nonzero_mean": reduce_nonzero_mean,
}


def to_examples(e: Elements, rows: int, how: str = "mean") -> Elements:
    """Reduces elements of any unit to one per example, by their anchor (the first column of ``index``).

    Args:
      e: elements of any unit.
      rows: B, the rows of the global batch (static).
      how: ``"mean"`` over an example's real elements or their ``"sum"``.
    """
    if how not in ("mean", "sum"):
        raise ValueError(f"how must be 'mean' or 'sum', got {how!r}")
    anchor = e.index[:, 0]
    total = jax.ops.segment_sum(jnp.where(e.mask, e.values, 0.0), anchor, rows)
    count = jax.ops.segment_sum(e.mask.astype(jnp.int32), anchor, rows)
    values = total / jnp.maximum(count, 1) if how == "mean" else total
    return e.replace(values=values, index=jnp.arange(rows)[:, None], mask=count > 0, unit="example")


@struct.dataclass
class Loss:
    """What an objective returns: elements, terms that belong to no single element, and metrics to log.

    ``terms`` are scalars added to the reduced elements as they are; ``metrics`` are scalars that are only logged.
    """

    elements: Any
    terms: Any = struct.field(default_factory=dict)
    metrics: Any = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Three pure functions that define what is learned.

    Attributes:
      init: ``(rng, batch) -> variables``: Flax collections, ``params`` and mutable ones (``batch_stats``, ``memory``,
        ``constants``, ...).  ``constants`` receive no gradient, decay or moments but are checkpointed.
      forward: ``(variables, batch, context) -> (outputs, mutated)``: per example; may see one shard of the batch.
        Draw randomness from ``context.example_keys(batch)``.  ``mutated`` holds replacements for whole collections.
      loss: ``(outputs, batch, context) -> Loss``: sees the outputs and the batch of the WHOLE global batch.
      unit: the unit of the loss's elements.
      provides: what a loss transformation may ask for: names of forward outputs and batch fields.
      select: optional ``(batch, context) -> batch`` on the gathered inputs before ``forward`` (fused pairs).
      after_step: optional ``(variables, outputs, batch, context) -> variables`` after the parameter update, on global
        outputs (memory banks, EMA teachers); returns the collections it changes.
      gathers: batch fields that ``loss`` and ``after_step`` read; ``None`` means every field.
      reduce: how elements become the loss, a key of ``REDUCERS``.
      name: for messages.
    """

    init: Callable[[Array, Batch], Variables]
    forward: Callable[[Variables, Batch, Context], tuple[Any, Variables]]
    loss: Callable[[Any, Batch, Context], Loss]
    unit: str = "example"
    provides: tuple[str, ...] = ()
    select: Callable[[Batch, Context], Batch] | None = None
    after_step: Callable[[Variables, Any, Batch, Context], Variables] | None = None
    gathers: tuple[str, ...] | None = None
    reduce: str = "mean"
    name: str = "objective"

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}; got {self.unit!r}")
        if self.reduce not in REDUCERS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCERS)}; got {self.reduce!r}")


class LossTransformation(NamedTuple):
    """A change to the elements of any loss that fits: ``(init, update)`` like an optimiser.

    Attributes:
      init: ``(num_examples) -> state``: a pytree; per-example state is addressed by the batch's ``index``.
      update: ``(elements, state, context) -> (elements, state)``; ``context`` carries outputs and batch.
      units: the units it accepts.
      requires: names it reads from the forward outputs or the batch.
      emits: the unit it returns, ``None`` if it returns what it got.
      name: for messages.
    """

    init: Callable[[int], PyTree]
    update: Callable[[Elements, PyTree, Context], tuple[Elements, PyTree]]
    units: tuple[str, ...] = ("example", "pair", "triplet", "token")
    requires: tuple[str, ...] = ()
    emits: str | None = None
    name: str = "transformation"


def identity() -> LossTransformation:
    """The transformation that changes nothing."""
    return LossTransformation(lambda n: (), lambda e, s, c: (e, s), tuple(UNITS), name="identity")


def examples(how: str = "mean") -> LossTransformation:
    """Reduces any unit to examples, so that per-example transformations can follow in a chain."""

    def update(e, state, context):
        return to_examples(e, batch_rows(context.batch), how), state

    return LossTransformation(lambda n: (), update, emits="example", name="examples")


def chain(*transformations: LossTransformation) -> LossTransformation:
    """Applies transformations in order.

    Raises:
      CompositionError: one of them cannot take the unit that the one before it emits.
    """
    unit: str | None = None
    units = UNITS.keys()
    for t in transformations:
        if unit is None:
            units = [u for u in units if u in t.units]
        elif unit not in t.units:
            raise CompositionError(f"{t.name} takes {_any_of(t.units)}, but the chain hands it unit {unit!r}")
        unit = t.emits or unit
    if not units:
        raise CompositionError(f"no unit is accepted by all of {', '.join(t.name for t in transformations)}")

    def init(num_examples):
        return tuple(t.init(num_examples) for t in transformations)

    def update(e, state, context):
        states = []
        for t, s in zip(transformations, state, strict=True):
            e, s = t.update(e, s, context)
            states.append(s)
        return e, tuple(states)

    requires = tuple(dict.fromkeys(r for t in transformations for r in t.requires))
    name = f"chain({', '.join(t.name for t in transformations)})"
    return LossTransformation(init, update, tuple(units), requires, unit, name)


def masked(inner: LossTransformation, where: Callable[[Elements, Context], Bool[Array, n]]) -> LossTransformation:
    """Applies ``inner`` to the elements for which ``where(elements, context)`` holds; others pass unchanged.

    Elements outside count as padding for ``inner``.  ``inner`` must keep the unit.
    """
    _must_keep_unit(inner, "masked()")

    def update(e, state, context):
        chosen = where(e, context) & e.mask
        new, state = inner.update(e.replace(mask=chosen, values=jnp.where(chosen, e.values, 0.0)), state, context)
        values, mask = jnp.where(chosen, new.values, e.values), jnp.where(chosen, new.mask, e.mask)
        return e.replace(values=values, mask=mask, terms=new.terms), state

    return inner._replace(update=update, name=f"masked({inner.name})")


def scheduled(inner: LossTransformation, schedule: Callable[[Array], Array]) -> LossTransformation:
    """Blends ``inner`` in: ``(1 - s) * elements + s * inner(elements)`` with ``s = schedule(step)`` in [0, 1].

    The inner state is updated whatever ``s`` is, so a warm-up still records.  At s = 0 and 1 the blend is exact.
    """
    _must_keep_unit(inner, "scheduled()")

    def update(e, state, context):
        new, state = inner.update(e, state, context)
        s = jnp.asarray(schedule(jnp.asarray(context.step)), e.values.dtype)
        blend = (1 - s) * e.values + s * new.values
        values = jnp.where(s <= 0, e.values, jnp.where(s >= 1, new.values, blend))
        terms = {**{k: s * v for k, v in new.terms.items()}, **e.terms}
        return e.replace(values=values, mask=jnp.where(s > 0, new.mask, e.mask), terms=terms), state

    return inner._replace(update=update, name=f"scheduled({inner.name})")


def _must_keep_unit(inner: LossTransformation, who: str) -> None:
    if inner.emits is not None:
        raise CompositionError(f"{who} needs a transformation that keeps the unit; {inner.name} emits {inner.emits!r}")


def check_fit(
    transformation: LossTransformation, objective: Objective, hosts: Sequence[Objective] = ()
) -> LossTransformation:
    """Returns the transformation if it fits the objective.

    Args:
      transformation, objective: the two to be joined.
      hosts: other objectives to name as alternatives in the error.

    Raises:
      CompositionError: the unit or a required output is missing; the message names what would fit.
    """
    problem = misfit(transformation, objective)
    if problem is None:
        return transformation
    fitting = [h.name for h in hosts if misfit(transformation, h) is None]
    hint = f"; it fits {', '.join(fitting)}" if fitting else ""
    raise CompositionError(problem + hint)


def misfit(transformation: LossTransformation, objective: Objective) -> str | None:
    """Why a transformation does not fit an objective, or ``None`` if it does."""
    if objective.unit not in transformation.units:
        hint = ""
        if "example" in transformation.units:
            hint = f"; reduce first: chain(examples(), {transformation.name})"
        return (
            f"{transformation.name} acts on {_any_of(transformation.units)}, "
            f"but {objective.name} yields elements of unit {objective.unit!r}{hint}"
        )
    missing = [r for r in transformation.requires if r not in objective.provides]
    if missing:
        return (
            f"{transformation.name} requires {', '.join(map(repr, missing))}, which {objective.name} does not provide "
            f"(it provides {', '.join(map(repr, objective.provides)) or 'nothing'})"
        )
    return None


def total_loss(
    loss: Loss,
    transformation: LossTransformation | None,
    state: PyTree,
    context: Context,
    reduce: str = "mean",
) -> tuple[Float[Array, ""], PyTree, dict[str, Array]]:
    """Transforms, reduces and adds up a loss.

    Returns:
      The scalar to differentiate, the transformation's new state, and the metrics, ``loss`` first.
    """
    total = jnp.zeros((), jnp.float32)
    metrics: dict[str, Array] = {}
    if loss.elements is not None:
        e = loss.elements
        if transformation is not None:
            metrics["loss_before"] = jax.lax.stop_gradient(REDUCERS[reduce](e))
            e, state = transformation.update(e, state, context)
        total = total + REDUCERS[reduce](e)
    added = {} if loss.elements is None else e.terms
    for name, term in {**loss.terms, **added}.items():
        total = total + term
        metrics[name] = jax.lax.stop_gradient(term)
    metrics.update(loss.metrics)
    return total, jax.lax.stop_gradient(state), {"loss": total, **metrics}


def suggest(name: str, known: Sequence[str], what: str) -> str:
    """An error line for an unknown name that offers the nearest right ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    known_list = ", ".join(sorted(known))
    return f"unknown {what} {name!r}; " + (f"did you mean {_any_of(near)}?" if near else f"known: {known_list}")


def _any_of(names: Sequence[str]) -> str:
    names = [repr(n) for n in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
