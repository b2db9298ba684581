"""Counterparts of other libraries, timed beside the zoo's own where the ``parity`` extra has them installed.

Nothing here is needed by any run: without the libraries every function returns no baseline.  They are loaded by name
when a benchmark asks, never at import.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np


def metric_learning_baselines(name: str) -> dict[str, Callable[..., np.ndarray]]:
    """pytorch-metric-learning's gradient of a pair loss, ``(z, y) -> dL/dz``, by the benchmark's name.

    Args:
      name: ``supervised contrastive``, ``contrastive pairs``, ``tcm``, ``triplet``, ``multi similarity`` or
        ``proxy anchor``.
    """
    if any(importlib.util.find_spec(m) is None for m in ("torch", "pytorch_metric_learning")):
        return {}
    losses: Any = importlib.import_module("pytorch_metric_learning.losses")
    torch: Any = importlib.import_module("torch")
    makers = {
        "supervised contrastive": lambda: losses.SupConLoss(temperature=0.1),
        "contrastive pairs": lambda: losses.ContrastiveLoss(
            pos_margin=1.0,
            neg_margin=0.5,
            distance=importlib.import_module("pytorch_metric_learning.distances").CosineSimilarity(),
        ),
        "tcm": losses.ThresholdConsistentMarginLoss,
        "multi similarity": losses.MultiSimilarityLoss,
    }
    if name not in makers:
        return {}
    loss = makers[name]()

    def gradient(z: np.ndarray, y: np.ndarray) -> np.ndarray:
        leaf = torch.tensor(np.asarray(z), requires_grad=True)
        loss(leaf, torch.tensor(np.asarray(y))).backward()
        return leaf.grad.numpy()

    return {"pytorch-metric-learning": gradient}
