"""Protocols: functions that return phases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.stream import Stream
from trainers.errors import UserError
from trainers.phases import Evaluate, Fit, FitResult, Phase, Train
from trainers.trees import to_host
from zoo.base import Context, Objective
from zoo.metrics.compatibility import (
    average_accuracy,
    average_compatibility,
    class_templates,
    compatible,
    identification_top1,
    zero_features,
)
from zoo.metrics.neighbours import retrieval_metrics
from zoo.ops.lineage import check_comparable, comparable, lineage
from zoo.ops.prototypes import class_prototypes


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


@dataclasses.dataclass(frozen=True)
class ModelUpdate:
    """One model of a sequence in which each replaces the one before; backbone and feature size may differ.

    Attributes:
      name: of its phases and its gallery.
      objective, stream, steps: what it learns; no steps for a model that was trained elsewhere, whose own record
        ``start`` hands on.
      optimizer: made anew for this update.
      start: ``(variables of the model before, artefacts, key) -> variables``, all of them: where it starts from (the
        model before, a model trained elsewhere, fresh weights) and its ``constants`` (the frozen old model, anchors).
        A record ``constants/lineage`` that it hands on is that of the model's parent.
      embed: ``(variables, batch, context) -> features [B, d]``, of any length.
      frame: ``(variables) -> arrays`` its features are measured against; see :func:`zoo.ops.lineage.lineage`.
      aligned: whether the objective keeps its features comparable with the parent's.
      prepare: phases before its start (prototypes, features of frozen models); they leave artefacts.
      keep: ``(variables) -> collections`` of the trained model that are kept as the artefact ``model_<update>``, with
        its lineage, for later updates, also those of other sequences of the same run.
    """

    name: str
    objective: Objective
    stream: Stream
    steps: int
    optimizer: optax.GradientTransformation
    start: Callable[[Mapping, Mapping, Any], Mapping]
    embed: Callable[[Mapping, Mapping, Context], Any]
    frame: Callable[[Mapping], Any]
    aligned: bool = True
    prepare: tuple[Phase, ...] = ()
    keep: Callable[[Mapping], Mapping] | None = None


def identification(queries: Any, query_labels: Any, gallery: Any, gallery_labels: Any, num_classes: int) -> dict:
    """1:N identification by class templates: ``{"top1": share}``; the default measure of :func:`model_replacement`."""
    templates = class_templates(gallery, gallery_labels, num_classes)
    return {"top1": float(identification_top1(queries, query_labels, templates))}


def same_set_retrieval(queries: Any, query_labels: Any, gallery: Any, gallery_labels: Any, num_classes: int) -> dict:
    """Nearest neighbours where queries and gallery are the same images, each query without its own image.

    A measure for :func:`model_replacement`: ``top1`` and ``top5`` (cumulative matches) and ``map``, all by cosine.
    """
    found = _retrieval(queries, query_labels, gallery, gallery_labels)
    return {"top1": float(found["recall@1"]), "top5": float(found["recall@5"]), "map": float(found["map"])}


_retrieval = jax.jit(functools.partial(retrieval_metrics, ks=(1, 5), same_items=True))


def model_replacement(
    updates: Sequence[ModelUpdate],
    queries: Stream,
    gallery: Stream,
    num_classes: int,
    align: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    refuse: bool = True,
    name: str = "",
    before: optax.GradientTransformation | None = None,
    earlier: Sequence[ModelUpdate] = (),
    measure: Callable[[Any, Any, Any, Any, int], Mapping[str, float]] = identification,
) -> list[Phase]:
    """Models replace one another, and every gallery that one of them left stays in use.

    For each update: a start, its training with a fresh optimiser, and one pass over queries and gallery.  The gallery's
    features and the model's lineage are kept as the artefact ``gallery_<update>`` and never computed again; the queries
    are searched in the galleries of all models so far: ``<update>_gallery/against_<other>``.  The last phase,
    ``<name>compatibility``, has the average compatibility and accuracy of the whole matrix.

    Args:
      updates: in order; their names differ.
      queries, gallery: evaluation streams with ``label``, identities in ``[0, num_classes)``.
      num_classes: K identities.
      align: ``(queries, gallery features) -> both`` of one size, where models differ in feature size.
      refuse: a model whose lineage is not comparable with that of an older gallery stops the run; if not, the pair is
        measured all the same (that is what a baseline without compatibility is for) and counted as ``incomparable``.
      name: put before the last phase's name.
      before: the optimiser of the training phase before these, if there is one.
      earlier: models that these follow and that another sequence of the run has trained already; their galleries are
        searched and they are part of the matrix.
      measure: ``(queries, labels, gallery, labels, num_classes) -> {name: value}`` of one pair of models; the first is
        the matrix's entry, the others are logged beside it.
    """
    phases: list[Phase] = []
    for number, update in enumerate(updates):
        known = [*earlier, *updates[:number]]
        trained = [u.optimizer for u in updates[:number] if u.steps]
        last = trained[-1] if trained else before
        extract = _extract(update, known, queries, gallery, num_classes, align, refuse, measure)
        phases += [
            *update.prepare,
            Fit(f"{update.name}_start", _start(update, last)),
            *_training(update),
            Fit(f"{update.name}_gallery", extract),
        ]
    everything = [*earlier, *updates]
    return [*phases, Fit(f"{name}compatibility", lambda variables, artefacts, rng: _summarise(everything, artefacts))]


def prototype_pass(
    name: str,
    model: Callable[[Mapping, Mapping], Mapping],
    embed: Callable[[Mapping, Mapping, Context], Any],
    stream: Stream,
    num_classes: int,
) -> Fit:
    """A pass of a frozen model over a training set: its features' means by class, the artefact ``name`` ``[C, d]``.

    Args:
      name: of the phase and the artefact.
      model: ``(variables, artefacts) -> variables`` of the frozen model.
      embed: ``(variables, batch, context) -> features [B, d]``.
      stream: read for one epoch.
      num_classes: C; a class without an image stops the run.
    """

    def fit(variables, artefacts, rng):
        forward = lambda v, batch: embed(v, batch, Context(rng=jax.random.key(0), train=False))  # noqa: E731
        batches = (jax.tree.map(jnp.asarray, stream.batch(i)) for i in range(stream.steps_per_epoch))
        try:
            means, counts = class_prototypes(forward, model(variables, artefacts), batches, num_classes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        return FitResult(artefacts={name: np.asarray(means)}, metrics={"smallest_class": int(jnp.min(counts))})

    return Fit(name, fit)


def fresh_optimizer(optimizer: optax.GradientTransformation | None, params: Mapping) -> Callable[[Any], Any] | None:
    """For :class:`FitResult`'s ``edit``, where a fit changes what parameters there are: the optimiser's first state.

    Args:
      optimizer: of the training phase before; ``None`` if there is none, and nothing to edit.
      params: the new parameters.
    """
    if optimizer is None:
        return None
    return lambda state: optax.with_extra_args_support(optimizer).init(params)


def compatibility_of(artefacts: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The compatibility matrix ``[T, T]`` of a sequence of updates, from what their galleries keep; NaN above."""
    matrix = np.full((len(names), len(names)), np.nan)
    for i, n in enumerate(names):
        matrix[i, : i + 1] = np.asarray(artefacts[f"gallery_{n}"]["row"])
    return matrix


def _start(update: ModelUpdate, before: optax.GradientTransformation | None):
    def fit(variables, artefacts, rng):
        begun = jax.tree.map(jnp.asarray, dict(update.start(variables, artefacts, rng)))
        return FitResult(begun, edit=fresh_optimizer(before, begun["params"]))

    return fit


def _training(update: ModelUpdate) -> list[Phase]:
    if not update.steps:
        return []
    return [Train(update.name, update.steps, update.objective, update.optimizer, update.stream)]


def _extract(update, earlier, queries, gallery, num_classes, align, refuse, measure):
    encode = encoder(update.embed)

    def fit(variables, artefacts, rng):
        constants = dict(variables.get("constants", {}))
        if update.steps:
            record = lineage(update.frame(variables), variables["params"], constants.get("lineage"), update.aligned)
        else:
            record = constants["lineage"]
        sought, held = encode(variables, queries), encode(variables, gallery)
        own = {"features": held["features"], "label": held["label"], "lineage": to_host(record)}
        row, metrics = [], {}
        for other, kept in [*((u.name, artefacts[f"gallery_{u.name}"]) for u in earlier), (update.name, own)]:
            if refuse:
                try:
                    check_comparable(record, kept["lineage"])
                except ValueError as error:
                    raise UserError(f"{update.name} and {other}: {error}") from None
            q, g = jnp.asarray(sought["features"]), jnp.asarray(kept["features"])
            if align is not None:
                try:
                    q, g = align(q, g)
                except ValueError as error:
                    raise UserError(f"{update.name} and the gallery of {other}: {error}") from None
            if q.shape[-1] != g.shape[-1]:
                raise UserError(
                    f"{update.name} yields {q.shape[-1]}-d features, the gallery of {other} holds {g.shape[-1]}-d ones"
                )
            values = measure(q, jnp.asarray(sought["label"]), g, jnp.asarray(kept["label"]), num_classes)
            first, *further = values
            row.append(float(values[first]))
            metrics[f"against_{other}"] = row[-1]
            metrics |= {f"against_{other}_{k}": float(values[k]) for k in further}
        metrics["incomparable"] = sum(
            not comparable(record, artefacts[f"gallery_{u.name}"]["lineage"]) for u in earlier
        )
        metrics["zero_features"] = int(
            zero_features(jnp.asarray(np.concatenate([sought["features"], held["features"]])))
        )
        kept = {f"gallery_{update.name}": {**own, "row": np.array(row)}}
        if update.keep is not None:
            kept[f"model_{update.name}"] = {**to_host(update.keep(variables)), "lineage": own["lineage"]}
        return FitResult({"constants": {**constants, "lineage": record}}, kept, metrics)

    return fit


def _summarise(updates: Sequence[ModelUpdate], artefacts: Mapping[str, Any]) -> FitResult:
    matrix = compatibility_of(artefacts, [u.name for u in updates])
    lower = np.tril(np.ones(matrix.shape, bool), -1)
    cross = float(matrix[lower].mean()) if lower.any() else float("nan")
    metrics = {
        "average_compatibility": average_compatibility(matrix),
        "average_accuracy": average_accuracy(matrix),
        "self_accuracy": float(np.diag(matrix).mean()),
        "compatible_pairs": int(compatible(matrix).sum()),
    }
    return FitResult(metrics={**metrics, "cross_accuracy": cross} if lower.any() else metrics)
