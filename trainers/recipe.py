"""Recipes: plain frozen dataclasses from which the command line is made, and what they build."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import optax
import tyro

from trainers.errors import UserError
from trainers.phases import Phase

__all__ = ["Benchmark", "Data", "Export", "Optimizer", "Recipe", "Run", "UserError"]


@dataclasses.dataclass(frozen=True)
class Data:
    """Which data: by name, or a file or folder of your own."""

    name: str = "digits"
    """Embedded or generated data, or any TFDS name; zoo train NAME --data help lists the fields it must have."""
    path: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A file or folder of your own; for a TFDS name, where TFDS keeps its data."""
    split: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Which part, where the data has several."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax optimiser and its schedule."""

    name: Literal["adam", "adamw", "sgd", "momentum", "nesterov", "radam", "lamb"] = "adam"
    """The optimiser; momentum and nesterov are sgd with momentum 0.9."""
    learning_rate: float = 1e-3
    """Peak learning rate, above 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the rate goes from its peak to the end of the phase."""
    warmup_steps: int = 0
    """Updates over which the rate rises from 0 to its peak, linearly."""
    final_fraction: float = 0.0
    """The last rate as a share of the peak, for cosine and linear."""
    weight_decay: float = 0.0
    """Decoupled for adamw and lamb, added to the gradient for sgd, momentum and nesterov; the others have none."""
    clip_norm: float = 0.0
    """Global gradient norm above which gradients are scaled down; 0 clips nothing."""
    accumulate: int = 1
    """Steps whose gradients are averaged into one update."""

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a phase of ``steps`` steps."""
        if not self.learning_rate > 0:
            raise UserError(f"--optimizer.learning-rate must be positive, got {self.learning_rate}")
        if self.accumulate < 1:
            raise UserError(f"--optimizer.accumulate must be at least 1, got {self.accumulate}")
        for name in ("warmup_steps", "final_fraction", "weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--optimizer.{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if self.weight_decay and self.name in ("adam", "radam"):
            raise UserError(f"--optimizer.weight-decay does nothing for {self.name}; set it to 0 or choose adamw")
        updates = max(1, steps // self.accumulate)
        decay = max(1, updates - self.warmup_steps)
        main = {
            "constant": lambda: optax.constant_schedule(self.learning_rate),
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, decay, self.final_fraction),
            "linear": lambda: optax.linear_schedule(
                self.learning_rate, self.learning_rate * self.final_fraction, decay
            ),
        }[self.schedule]()
        rate = main
        if self.warmup_steps:
            warm = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
            rate = optax.join_schedules([warm, main], [self.warmup_steps])
        coupled = self.name in ("sgd", "momentum", "nesterov") and self.weight_decay
        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        parts += [optax.add_decayed_weights(self.weight_decay)] if coupled else []
        parts.append(
            {
                "adam": lambda: optax.adam(rate),
                "adamw": lambda: optax.adamw(rate, weight_decay=self.weight_decay),
                "sgd": lambda: optax.sgd(rate),
                "momentum": lambda: optax.sgd(rate, momentum=0.9),
                "nesterov": lambda: optax.sgd(rate, momentum=0.9, nesterov=True),
                "radam": lambda: optax.radam(rate),
                "lamb": lambda: optax.lamb(rate, weight_decay=self.weight_decay),
            }[self.name]()
        )
        tx = optax.chain(*parts)
        return optax.MultiSteps(tx, self.accumulate) if self.accumulate > 1 else tx


@dataclasses.dataclass(frozen=True)
class Export:
    """What a run exports as its model.

    Attributes:
      definition: the frozen dataclass (a Linen module or a configuration) that ``load_model`` rebuilds.
      variables: the pytree of arrays that goes with it, nested dicts.
      preprocessing: plain facts a user needs to prepare her inputs.
      beside: called with the model's folder to put more files into it (``tokenizer/tokenizer.json``).
    """

    definition: Any
    variables: Mapping[str, Any]
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    beside: Callable[[Any], None] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What a recipe builds.

    Attributes:
      phases: in order; names must differ.
      init: ``(rng) -> variables`` for the first phase; ``None`` uses the first update's objective on its first batch.
      export: ``(variables, artefacts) -> Export``; variables hold the averaged parameters if the run keeps them.
      figures: ``(result, workdir) -> None`` draws pictures beyond the curves (``workdir / "x.png"``) from the run's
        ``trainers.loop.Result``: chosen variables, artefacts, metrics, the whole last state.
      data_fingerprint: checksum of the data, recorded with checkpoints and models.
      summary: one line printed at the end from the last metrics: ``(metrics) -> str``.
      sharding_rules: ``(regular expression over parameter paths, PartitionSpec)`` for tensor sharding.
      steps_per_call: steps scanned in one dispatch unless the user says otherwise; small models gain from 10 or so.
      from_export: ``(exported variables) -> variables`` that the evaluations read, so that ``zoo eval`` can evaluate an
        exported model; ``None`` if they read the exported ones as they are.
    """

    phases: Sequence[Phase]
    export: Callable[[Mapping, Mapping], Export]
    init: Callable[[Any], Mapping] | None = None
    figures: Callable[[Any, Path], None] | None = None
    data_fingerprint: str = ""
    summary: Callable[[Mapping[str, float]], str] | None = None
    sharding_rules: tuple = ()
    steps_per_call: int = 1
    from_export: Callable[[Mapping], Mapping] | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Base of every recipe: the settings that all runs share.  Subclasses add theirs and define ``build``."""

    seed: int = 0
    """Decides initialisation, the order of the data and every random number of the run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What modules compute in; parameters and losses stay float32."""

    def build(self) -> Run:
        """Data and phases; raises UserError or DataError for settings that cannot work."""
        raise TypeError(f"{type(self).__name__} does not define build()")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One timed operation: ``fn(*args)`` is jitted; ``flops`` and ``bytes`` are what it must do at least.

    ``baseline`` is an optional (label, host function) timed on the same arguments for a ratio.
    """

    name: str
    fn: Callable
    args: tuple
    flops: float
    bytes: float
    baselines: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    note: str = ""
