"""Protocols: functions that return phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.stream import Stream
from trainers.phases import Evaluate, Fit, FitResult, Phase
from zoo.base import Context


def few_shot_sessions(
    base: Sequence[Phase],
    fit_base: Callable[[Mapping, Mapping, Any], FitResult],
    fit_session: Callable[[int], Callable[[Mapping, Mapping, Any], FitResult]],
    evaluate: Callable[[int], Evaluate],
    sessions: int,
) -> list[Phase]:
    """Few-shot class-incremental learning: a base session, then closed-form ones, each evaluated on all seen classes.

    Args:
      base: phases that train the encoder.
      fit_base: makes the base session's classifier.
      fit_session: ``s -> fit`` for the sessions 1 .. ``sessions``.
      evaluate: ``s -> evaluation`` after session s (0: the base session).
    """
    phases: list[Phase] = [*base, Fit("prototypes", fit_base), evaluate(0)]
    for s in range(1, sessions + 1):
        phases += [Fit(f"session{s}", fit_session(s)), evaluate(s)]
    return phases


def class_incremental(
    train: Callable[[int], Sequence[Phase]], evaluate: Callable[[int, int], Evaluate], tasks: int
) -> list[Phase]:
    """Tasks one after the other; after task s every task j <= s is evaluated, which fills the task matrix ``R[s, j]``.

    Args:
      train: ``s -> phases`` that learn task s.
      evaluate: ``(s, j) -> evaluation`` of task j after task s.
    """
    phases: list[Phase] = []
    for s in range(tasks):
        phases += [*train(s), *(evaluate(s, j) for j in range(s + 1))]
    return phases


def encoder(forward: Callable[[Mapping, Mapping, Context], Any]) -> Callable[[Mapping, Stream], dict[str, np.ndarray]]:
    """Makes ``encode(variables, stream)``: one pass in evaluation mode, padding cut off.

    Args:
      forward: ``(variables, batch, context) -> features [B, D]``.

    Returns:
      A function that returns ``features`` [N, D], ``label`` [N] (if the stream has labels) and ``index`` [N].
    """
    compiled = jax.jit(lambda v, b: forward(v, b, Context(rng=jax.random.key(0), train=False)))

    def encode(variables: Mapping, stream: Stream) -> dict[str, np.ndarray]:
        rows: dict[str, list[np.ndarray]] = {}
        for i in range(stream.steps_per_epoch):
            batch = stream.batch(i)
            features = np.asarray(compiled(variables, jax.tree.map(jnp.asarray, batch)))
            for name, value in {
                "features": features,
                **{k: batch[k] for k in ("label", "index") if k in batch},
            }.items():
                rows.setdefault(name, []).append(value[batch["mask"]])
        return {k: np.concatenate(v) for k, v in rows.items()}

    return encode


def confusion_evaluation(
    name: str,
    stream: Stream,
    predict: Callable[[Mapping, Mapping, Context], Mapping[str, jax.Array]],
    classifiers: Sequence[str],
    num_classes: int,
    compute: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]],
    label: str = "label",
) -> Evaluate:
    """An evaluation that streams a confusion matrix ``[C, C]`` (row: true class) for each of several classifiers.

    Args:
      name, stream: as in :class:`Evaluate`.
      predict: ``(variables, batch, context) -> {classifier: classes [B]}``, in one pass over the encoder.
      classifiers: the names that ``predict`` returns.
      num_classes: C.
      compute: ``{classifier: confusion} -> metrics``.
      label: the batch field with the true class.
    """

    def init():
        return {c: np.zeros(num_classes**2, np.int32) for c in classifiers}

    def update(seen, variables, batch, context):
        predicted = predict(variables, batch, context)
        start = jnp.where(batch["mask"], batch[label] * num_classes, num_classes**2)
        return {c: seen[c].at[start + predicted[c]].add(1, mode="drop") for c in classifiers}, {}

    def finish(seen):
        return compute({c: np.asarray(seen[c]).reshape(num_classes, num_classes) for c in classifiers})

    return Evaluate(name, stream, init, update, finish)
