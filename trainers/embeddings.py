"""What recipes that learn embeddings share: hosts by name, evaluation of a set's embeddings, open-world splits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.stream import evaluation_stream
from trainers.errors import UserError
from trainers.phases import Evaluate
from zoo import hosts
from zoo.base import Context, Objective
from zoo.losses import pairs
from zoo.metrics.neighbours import retrieval_metrics

METRIC_LOSSES = (
    "contrastive", "triplet", "semi_hard", "multi_similarity", "margin", "supcon", "smooth_ap", "recall",
    "proxy_anchor", "proxy_nca", "softmax", "cosine", "cosface", "arcface",
)  # fmt: skip
"""Names of :func:`metric_host`."""


def metric_host(
    loss: str, module: Any, num_classes: int, per_class: int | None = None, scale: float = 16.0
) -> Objective:
    """A metric-learning host by name, with the published settings of its loss.

    Args:
      loss: one of :data:`METRIC_LOSSES`.
      module: the encoder.
      num_classes: of the training set.
      per_class: K of a P x K sampler, which bounds the positives that rank losses look at.
      scale: of cosines in softmax heads.
    """
    most = None if per_class is None else max(1, per_class - 1)
    similarity = {
        "contrastive": pairs.contrastive_pairs,
        "triplet": pairs.triplet,
        "semi_hard": functools.partial(pairs.triplet, mining="semi_hard"),
        "multi_similarity": pairs.multi_similarity,
        "supcon": pairs.supervised_contrastive,
        "smooth_ap": functools.partial(pairs.smooth_ap, max_positives=most),
        "recall": functools.partial(pairs.recall_surrogate, max_positives=most),
    }
    name = loss.replace("_", " ")
    if loss in similarity:
        return hosts.metric_learning(module, similarity[loss], name=name)
    if loss == "margin":
        return hosts.metric_learning(module, pairs.margin_pairs, "distance", name=name)
    if loss in ("proxy_anchor", "proxy_nca"):
        return hosts.proxies(module, num_classes, loss)
    return hosts.softmax_classifier(module, num_classes, "linear" if loss == "softmax" else loss, scale)


def encoder_params(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The encoder's own parameters, whether the host keeps class vectors beside it or not."""
    return params["encoder"] if set(params) in ({"encoder", "head"}, {"encoder", "proxies"}) else params


def embedding_evaluation(
    name: str,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    embed: Callable[[Mapping, Mapping, Context], jax.Array],
    features: int,
    compute: Callable[[np.ndarray, np.ndarray], Mapping[str, float]],
    label: str = "label",
) -> Evaluate:
    """Embeds a whole set, then measures it: ``compute(embeddings [N, features], labels [N]) -> metrics``.

    Args:
      name: of the evaluation.
      arrays: the set, with its labels.
      batch_size: rows at a time.
      embed: ``(variables, batch, context) -> [B, features]``.
      features: size of an embedding.
      compute: on the host.
      label: the field of labels.
    """
    labels = np.asarray(arrays[label])

    def update(seen, variables, batch, context):
        return seen.at[batch["index"]].set(embed(variables, batch, context).astype(jnp.float32), mode="drop"), {}

    return Evaluate(
        name,
        evaluation_stream(arrays, batch_size),
        init=lambda: jnp.zeros((len(labels), features), jnp.float32),
        update=update,
        compute=lambda seen: compute(np.asarray(seen), labels),
    )


def neighbour_metrics(
    embeddings: np.ndarray, labels: np.ndarray, ks: tuple[int, ...] = (1, 2, 4, 8)
) -> dict[str, float]:
    """:func:`zoo.metrics.neighbours.retrieval_metrics` of a set within itself, as plain numbers."""
    found = retrieval_metrics(jnp.asarray(embeddings), jnp.asarray(labels, jnp.int32), ks=ks)
    return {k: float(v) for k, v in found.items() if k != "queries"}


def open_world(data: Dataset, train_classes: int) -> Dataset:
    """Training on the first classes, evaluation on all images of the others.

    Args:
      data: splits ``train`` and ``test`` with ``label``.
      train_classes: how many classes are trained on, at least 2 and leaving at least 2.

    Returns:
      Splits ``train`` and ``test``; the test classes count from 0 again.

    Raises:
      UserError: no labels, or a number of classes that leaves too few on either side.
    """
    if "label" not in data["train"]:
        raise UserError(f"{data.name!r} has no field 'label'; metric learning needs the class of every example")
    classes = int(max(s["label"].max() for s in data.splits.values())) + 1
    if not 2 <= train_classes <= classes - 2:
        raise UserError(
            f"--train-classes must lie in 2..{classes - 2}: {data.name!r} has {classes} classes and at least 2 are "
            f"needed on either side, got {train_classes}"
        )
    both = {k: np.concatenate([data["train"][k], data["test"][k]]) for k in data["train"] if k in data["test"]}
    known = data["train"]["label"] < train_classes
    train = {k: v[known] for k, v in data["train"].items()}
    held = both["label"] >= train_classes
    test = {k: v[held] for k, v in both.items()}
    test["label"] = (test["label"] - train_classes).astype(np.int32)
    return Dataset(data.name, {"train": train, "test": test}, {**data.info, "num_classes": train_classes})
