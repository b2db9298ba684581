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
    """pytorch-metric-learning's gradient of a loss, ``(z, y) -> dL/dz``, by the benchmark's name.

    Args:
      name: ``supervised contrastive``, ``contrastive pairs``, ``tcm``, ``triplet, batch hard``, ``multi similarity`` or
        ``proxy anchor``, whose gradient takes the proxies ``[C, d]`` too; none for any other.
    """
    if any(importlib.util.find_spec(m) is None for m in ("torch", "pytorch_metric_learning")):
        return {}
    part = lambda where: importlib.import_module(f"pytorch_metric_learning.{where}")  # noqa: E731
    losses, torch = part("losses"), importlib.import_module("torch")
    cosine = lambda: part("distances").CosineSimilarity()  # noqa: E731
    makers: dict[str, Callable[..., Any]] = {
        "supervised contrastive": lambda: losses.SupConLoss(temperature=0.1),
        # its default averages the pairs that cost something; the zoo's averages all
        "contrastive pairs": lambda: losses.ContrastiveLoss(
            pos_margin=1.0, neg_margin=0.5, distance=cosine(), reducer=part("reducers").MeanReducer()
        ),
        "tcm": losses.ThresholdConsistentMarginLoss,
        "triplet, batch hard": lambda: losses.TripletMarginLoss(margin=0.2, distance=cosine()),
        "multi similarity": losses.MultiSimilarityLoss,
        "proxy anchor": lambda proxies: losses.ProxyAnchorLoss(*proxies.shape),
    }
    if name not in makers:
        return {}
    miner = part("miners").BatchHardMiner(distance=cosine()) if name == "triplet, batch hard" else None

    def gradient(z: np.ndarray, y: np.ndarray, *proxies: np.ndarray) -> np.ndarray:
        loss = makers[name](*proxies)
        if proxies:
            loss.proxies.data = torch.tensor(np.asarray(proxies[0]))
        leaf, labels = torch.tensor(np.asarray(z), requires_grad=True), torch.tensor(np.asarray(y, np.int64))
        loss(leaf, labels, *([] if miner is None else [miner(leaf, labels)])).backward()
        return leaf.grad.numpy()

    return {"pytorch-metric-learning": gradient}
