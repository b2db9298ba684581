"""Streaming evaluation: one exact pass over a stream, and ready-made evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.parallel import Placement
from trainers.phases import Evaluate
from trainers.state import TrainState
from trainers.step import phase_key
from trainers.trees import to_host
from zoo.base import Context, batch_mask


class Evaluator:
    """Runs evaluations, compiling each once.

    Args:
      place: where arrays live.
      seed: of the run; evaluation keys are derived from it.
    """

    def __init__(self, place: Placement, seed: int):
        self.place, self.seed = place, seed
        self._compiled: dict[str, tuple[Evaluate, Callable]] = {}

    def __call__(
        self, evaluation: Evaluate, state: TrainState, artefacts: Mapping
    ) -> tuple[dict[str, float], Mapping[str, Any]]:
        """One pass: the metrics and the collections it changed (only if the evaluation commits)."""
        if self._compiled.get(evaluation.name, (None,))[0] is not evaluation:
            self._compiled[evaluation.name] = (evaluation, jax.jit(evaluation.update))
        update = self._compiled[evaluation.name][1]
        self.place.check_batch(evaluation.stream.batch_size)
        put = self.place.put_replicated
        variables, seen = put(state.chosen(evaluation.weights)), put(evaluation.init())
        artefacts = self.place.put_artefacts(artefacts, evaluation.sharded, step=False)
        kept: Mapping[str, Any] = {}
        for i in range(evaluation.stream.steps_per_epoch):
            batch = self.place.put_rows(evaluation.stream.batch(i, self.place.process))
            key = phase_key(jnp.uint32(self.seed), evaluation.name, jnp.int32(i))
            context = Context(rng=key, step=jnp.int32(i), artefacts=artefacts, train=False)
            seen, mutated = update(seen, variables, batch, context)
            if evaluation.commit:
                kept = {**kept, **mutated}
                variables = {**variables, **mutated}
        return {k: float(v) for k, v in evaluation.compute(to_host(seen)).items()}, kept


def mean_metrics(
    name: str,
    stream: Any,
    metrics: tuple[str, ...],
    values: Callable[[Mapping, Mapping, Context], Mapping[str, jax.Array]],
    **rest,
) -> Evaluate:
    """An evaluation that averages per-example values over the real rows of a stream.

    Args:
      name, stream: as in :class:`Evaluate`.
      metrics: the names that ``values`` returns.
      values: ``(variables, batch, context) -> {metric: [B]}``.
      **rest: :class:`Evaluate`'s other fields.
    """

    def init():
        return {"count": np.zeros((), np.int32), **{m: np.zeros((), np.float32) for m in metrics}}

    def update(seen, variables, batch, context):
        mask = batch_mask(batch)
        found = values(variables, batch, context)
        new = {m: seen[m] + jnp.sum(jnp.where(mask, found[m].astype(jnp.float32), 0.0)) for m in metrics}
        return {"count": seen["count"] + jnp.sum(mask, dtype=jnp.int32), **new}, {}

    def compute(seen):
        return {m: seen[m] / max(int(seen["count"]), 1) for m in metrics}

    return Evaluate(name, stream, init, update, compute, **rest)


def accuracy(name: str, stream: Any, forward: Callable, label: str = "label", **rest) -> Evaluate:
    """Top-1 accuracy of an objective's ``forward`` whose outputs hold ``logits``."""

    def values(variables, batch, context):
        outputs, _ = forward(variables, batch, context)
        return {"accuracy": jnp.argmax(outputs["logits"], -1) == batch[label]}

    return mean_metrics(name, stream, ("accuracy",), values, **rest)
