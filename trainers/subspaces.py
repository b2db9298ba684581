"""What recipes that learn subspaces share: k-means with restarts, clustering metrics, embeddings by block, pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from trainers import plots
from zoo.base import Context, Objective
from zoo.metrics.embeddings import nmi
from zoo.metrics.neighbours import retrieval_metrics
from zoo.ops.kmeans import Clusters, kmeans
from zoo.ops.segmentation import class_activation_map, dice, proxy_mask

BLUE, GREEN, RED = "#2a78d6", "#3a9b5c", "#c0392b"


@functools.cache
def _best_clusters_of(count: int, iterations: int, restarts: int):
    def best(key, x):
        found = jax.lax.map(lambda k: kmeans(k, x, count, iterations), jax.random.split(key, restarts))
        chosen = jnp.argmin(found.inertia)
        return jax.tree.map(lambda v: v[chosen], found)

    return jax.jit(best)


def best_clusters(key: Any, x: Any, count: int, iterations: int = 100, restarts: int = 5) -> Clusters:
    """k-means from several starts; that of least inertia.

    Args:
      key: of the starts.
      x: points ``[n, d]``.
      count: clusters.
      iterations, restarts: of k-means.
    """
    return _best_clusters_of(count, iterations, restarts)(key, jnp.asarray(x))


def clustering_metrics(
    z: np.ndarray, labels: np.ndarray, classes: int, key: Any, iterations: int = 100, restarts: int = 5
) -> dict[str, float]:
    """NMI of k-means with as many clusters as classes, and recall@1, 2, 4, 8 by Euclidean distance.

    Args:
      z: embeddings ``[n, d]``.
      labels: their classes, in ``[0, classes)``.
      classes: how many there are.
      key, iterations, restarts: of :func:`best_clusters`.
    """
    found, y = best_clusters(key, z, classes, iterations, restarts), jnp.asarray(labels, jnp.int32)
    near = _recalls(jnp.asarray(z), y)
    recalls = {k: float(v) for k, v in near.items() if k.startswith("recall")}
    return {"nmi": float(nmi(found.assignment, y, classes, classes)), **recalls}


@jax.jit
def _recalls(z: jax.Array, labels: jax.Array) -> Mapping[str, jax.Array]:
    return retrieval_metrics(z, labels, ks=(1, 2, 4, 8), compare="euclidean")


def image_embedder(host: Objective, block: int = 256) -> Callable[[Mapping, np.ndarray], dict[str, np.ndarray]]:
    """``(variables, images [N, ...]) -> outputs`` of a host in evaluation mode, as NumPy arrays, a block at a time."""

    @jax.jit
    def encode(variables, x):
        outputs, _ = host.forward(variables, {"x": x}, Context(jax.random.key(0), train=False))
        return outputs

    def embed(variables: Mapping, images: np.ndarray) -> dict[str, np.ndarray]:
        size = min(block, len(images))
        parts = []
        for i in range(0, len(images), size):
            x = images[i : i + size]
            short = size - len(x)
            full = np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)]) if short else x
            parts.append({k: np.asarray(v)[: len(x)] for k, v in encode(variables, jnp.asarray(full)).items()})
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    return embed


def activation_mapper(module: nn.Module, block: int = 256) -> Callable[[Mapping, np.ndarray], np.ndarray]:
    """``(variables of a softmax classifier, images [N, ...]) -> maps [N, h, w, 1]`` of the predicted classes.

    Args:
      module: the classifier's encoder up to the feature maps ``[B, h, w, d]`` that it pools by their mean.
      block: images at a time.
    """

    @jax.jit
    def find(variables, x):
        own = {**variables, "params": variables["params"]["encoder"]}
        features, weights = module.apply(own, x), variables["params"]["head"]
        logits = jnp.matmul(jnp.mean(features, (1, 2)), weights.T, precision="highest")
        return class_activation_map(features, weights, jnp.argmax(logits, 1))

    def maps(variables: Mapping, images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + block] for i in range(0, len(images), block)]
        return np.concatenate([np.asarray(find(variables, jnp.asarray(x))) for x in parts])

    return maps


def proxy_dice(maps: np.ndarray, masks: np.ndarray) -> float:
    """Mean Dice coefficient of Otsu masks from maps with true masks ``[N, H, W]``."""
    found = proxy_mask(jnp.asarray(maps), masks.shape[1:])
    return float(jnp.mean(dice(found, jnp.asarray(masks))))


def draw_history(history: np.ndarray, finetune: int, file: Path) -> None:
    """Writes validation NMI and the number of learners over epochs, splits marked.

    Args:
      history: ``[epochs, 4]``: NMI, recall@1, K after the epoch, whether it was split.
      finetune: the epoch from which the whole embedding is trained.
      file: where to.
    """
    fig, axes = plots.figure(1, 2, (6.0, 2.2))
    upper, lower = axes[:, 0]
    epochs = np.arange(len(history))
    upper.plot(epochs, history[:, 0], color=BLUE, marker=".", label="NMI")
    upper.plot(epochs, history[:, 1], color=GREEN, marker=".", label="recall@1")
    upper.set_ylabel("validation split", fontsize=8)
    lower.step(np.arange(len(history) + 1), np.concatenate([[history[0, 2] - history[0, 3]], history[:, 2]]),
               where="pre", color="0.2", linewidth=1.6)  # fmt: skip
    lower.set_ylabel("learners", fontsize=8)
    lower.set_ylim(0, history[:, 2].max() + 0.6)
    lower.set_xlabel("epoch", fontsize=8)
    for axis in (upper, lower):
        for e in epochs[history[:, 3] > 0]:
            axis.axvline(e, color=RED, linewidth=1, linestyle="--", label="split" if e == epochs[history[:, 3] > 0][0]
                         else None)  # fmt: skip
        if finetune < len(history):
            axis.axvspan(finetune - 0.5, len(history) - 0.5, color="0.9", label="whole embedding")
        axis.set_xlim(-0.5, len(history) - 0.5)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    upper.legend(fontsize=7, loc="lower right")
    plots.save(fig, file)


def draw_attention(
    images: np.ndarray, maps: np.ndarray, file: Path, predicted: np.ndarray | None = None, name: str = "attention"
) -> None:
    """Writes images in [-1, 1], their maps and the proxy masks from them, one column an image.

    Args:
      images: ``[n, H, W, C]``.
      maps: ``[n, h, w, 1]``.
      file: where to.
      predicted: masks of a segmentation network ``[n, H, W]``, a row more.
      name: of the maps.
    """
    size = images.shape[1:3]
    up = np.asarray(jax.image.resize(jnp.asarray(maps[..., 0]), (len(maps), *size), "bilinear"))
    shown = np.clip((images + 1) / 2, 0, 1)
    rows = {
        "image": (shown if shown.shape[-1] == 3 else shown[..., 0], "gray", {}),
        name: (up, "viridis", {}),
        "proxy mask": (np.asarray(proxy_mask(jnp.asarray(maps), size)), "gray", {"vmin": 0, "vmax": 1}),
    }
    if predicted is not None:
        rows["U-Net's mask"] = (predicted, "gray", {"vmin": 0, "vmax": 1})
    fig, axes = plots.figure(len(images), len(rows), (1.1, 1.15))
    for line, (label, (pictures, cmap, limits)) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap=cmap, **limits)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label, fontsize=7)
    plots.save(fig, file)
