"""Phases: what a run consists of, as frozen dataclasses over one state.

A recipe is data and a list of phases; protocols are functions that return phases (``trainers/protocols.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

from data.stream import Stream
from zoo.base import Context, LossTransformation, Objective, check_fit

Streams = Stream | Mapping[str, Stream]
"""One stream (its batch is the batch) or several by name (the batch is a dict of batches)."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """A streaming evaluation, also usable as a phase of its own.

    Attributes:
      name: prefix of its metrics.
      stream: read for exactly one epoch, padding masked.
      init: ``() -> accumulator`` pytree.
      update: ``(accumulator, variables, batch, context) -> (accumulator, mutated)``; jitted; must honour ``mask``.
        ``mutated`` holds replaced collections, committed only if ``commit`` (prequential streams, ring memories).
      compute: ``(accumulator) -> {metric: float}`` on the host, with NumPy arrays.
      weights: evaluate the trained ``"params"`` or the ``"average"`` (falls back to params if none is kept).
      commit, sharded: see ``update``, and :class:`Alternate`.
    """

    name: str
    stream: Stream
    init: Callable[[], Any]
    update: Callable[[Any, Mapping, Mapping, Context], tuple[Any, Mapping]]
    compute: Callable[[Any], Mapping[str, float]]
    weights: Literal["params", "average"] = "average"
    commit: bool = False
    sharded: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Average:
    """Averaged weights kept beside the trained ones: exponential (``decay``) or equal-weight (``decay=None``)."""

    decay: float | None = 0.999
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Stop:
    """Early stopping on an evaluated metric, named ``evaluation/metric``."""

    metric: str
    patience: int
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Update:
    """One gradient update: what is minimised, with what, on which batches, and over which parameters.

    Attributes:
      trainable: regular expressions over parameter paths (``"encoder/.*"``); ``None`` trains all.  Parameters that do
        not match get no gradient and have no moments.
      repeats: how often it is applied in one cycle, each time on the next batch.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    stream: Streams
    loss_transform: LossTransformation | None = None
    trainable: tuple[str, ...] | None = None
    repeats: int = 1

    def __post_init__(self):
        if self.loss_transform is not None:
            check_fit(self.loss_transform, self.objective)


@dataclasses.dataclass(frozen=True)
class Alternate:
    """Several updates in a fixed cycle (bilevel search, primal-dual, min-max); one step is one whole cycle.

    Attributes:
      updates: by name; applied in order, each seeing the parameters the one before it left.
      after_step: ``(variables, context) -> variables``: a pure change inside the same compiled step; returns the
        collections it replaces.
      on_epoch: ``(variables, artefacts, rng) -> variables``: jitted, run between steps at each epoch start.
      prequential: evaluated on each batch *before* it is learnt from; accumulators are part of the state.
      report: ``(state) -> {metric: scalar}`` of the whole state (masks, memories), wherever the phase is evaluated.
      optimizer_state: ``"fresh"`` or ``"keep"`` the one of the phase before, if it fits.
      sharded: artefacts ``[n, d]`` that enter the step by rows over all devices, as ``zoo.ops.rows.Rows``.
      series: phases that differ in name and stream only (one an epoch, with fits between) may name a common series:
        they share one compiled step as long as artefacts keep their shapes, and each has its own random numbers.
    """

    name: str
    steps: int
    updates: Mapping[str, Update]
    average: Average | None = None
    after_step: Callable[[Mapping, Context], Mapping] | None = None
    on_epoch: Callable[[Mapping, Mapping, Any], Mapping] | None = None
    evaluate: tuple[Evaluate, ...] = ()
    eval_every: int | None = None
    stop: Stop | None = None
    prequential: Evaluate | None = None
    report: Callable[[Any], Mapping[str, Any]] | None = None
    optimizer_state: Literal["fresh", "keep"] = "fresh"
    sharded: tuple[str, ...] = ()
    series: str | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def Train(  # noqa: N802 - reads as the dataclass it makes
    name: str,
    steps: int,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    stream: Streams,
    loss_transform: LossTransformation | None = None,
    trainable: tuple[str, ...] | None = None,
    **rest,
) -> Alternate:
    """The common phase: one update per step.  ``rest`` are :class:`Alternate`'s fields."""
    return Alternate(name, steps, {"main": Update(objective, optimizer, stream, loss_transform, trainable)}, **rest)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a :class:`Fit` gives back.

    Attributes:
      variables: replaced collections, ``params`` among them.
      artefacts: large arrays that later phases read but never update.
      metrics: to log.
      edit: ``optimiser state -> optimiser state`` if parameters changed shape (``trainers.trees.edit_optimizer``).
    """

    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    artefacts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    edit: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """A closed-form or search step: prototypes, projections, calibration, an index.

    Attributes:
      fit: ``(variables, artefacts, rng) -> FitResult``.  Its result is checkpointed like a step; the function itself
        reads its own stream and must be deterministic in its arguments.
    """

    name: str
    fit: Callable[[Mapping, Mapping, Any], FitResult]


Phase = Alternate | Fit | Evaluate
