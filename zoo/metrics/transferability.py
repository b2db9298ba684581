"""Transferability: which pre-trained model suits the target data?  Eight scores, and the ranking of a pool by them.

A score reads a model's features of the target data (``logme``, ``sfda``, ``nleep``, ``h_score``, ``parc``, ``gbc``)
or its source classifier's outputs (``leep``, ``nce``).  Models with larger scores are expected to do better once
fine-tuned.  Scores are float64 on the host; rank correlations with known accuracies are in
:mod:`zoo.metrics.rank_correlation`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from zoo.metrics.rank_correlation import average_ranks, spearman, weighted_kendall_tau
from zoo.metrics.transferability_density import gbc, leep, nce, nleep, parc
from zoo.metrics.transferability_linear import check_features, h_score, logme, sfda

__all__ = [
    "METRICS", "Metric", "average_ranks", "check_features", "gbc", "h_score", "leep", "logme", "metric_of", "nce",
    "nleep", "parc", "rank_models", "sfda", "spearman", "weighted_kendall_tau",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
      function: ``(features or source outputs, labels, **settings) -> float``.
      title: as people write it.
      moves: whether it reads features, which a simulated fine-tuning moves, rather than a source classifier's
        outputs.
    """

    function: Callable[..., float]
    title: str
    moves: bool = True


METRICS: Mapping[str, Metric] = {
    "logme": Metric(logme, "LogME"),
    "sfda": Metric(sfda, "SFDA"),
    "nleep": Metric(nleep, "NLEEP"),
    "h_score": Metric(h_score, "H-score"),
    "parc": Metric(parc, "PARC"),
    "gbc": Metric(gbc, "GBC"),
    "leep": Metric(leep, "LEEP", moves=False),
    "nce": Metric(nce, "NCE", moves=False),
}


def metric_of(name: str) -> Callable[..., float]:
    """A score by name.

    Raises:
      ValueError: there is none of that name; the nearest are given.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=2, cutoff=0.4) or list(METRICS)
        raise ValueError(f"unknown transferability metric {name!r}; use {' or '.join(near)}")
    return METRICS[name].function


def rank_models(
    features_by_model: Mapping[str, Any],
    labels: Any,
    metric: str = "logme",
    ped: Callable[..., Any] | None = None,
    general_by_model: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[tuple[str, float]]:
    """Models and their scores, best first; models of equal scores in the order given.

    Args:
      features_by_model: each model's features of the same target samples (for ``leep`` and ``nce``: outputs of its
        source classifier).
      labels: integers ``[N]``.
      metric: one of ``METRICS``.
      ped: ``(features, labels, general) -> features`` applied first, such as
        :class:`zoo.representation.ped.PotentialEnergyDescent`.
      general_by_model: each model's features of a general set, handed to ``ped``.
      settings: of the metric.

    Raises:
      ValueError: an unknown metric, no models, ``ped`` with a metric that does not read features, or what a score
        refuses, with the model's name.
    """
    function = metric_of(metric)
    if not features_by_model:
        raise ValueError("there is no model to rank")
    if ped is not None and not METRICS[metric].moves:
        raise ValueError(f"metric {metric!r} reads a source classifier's outputs, not features: nothing can be moved")
    scores = {}
    for name, features in features_by_model.items():
        try:
            if ped is not None:
                features = ped(features, labels, (general_by_model or {}).get(name))
            scores[name] = function(features, labels, **settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return sorted(scores.items(), key=lambda pair: -pair[1])
