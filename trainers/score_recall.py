"""Recall of searches by a limited number of exact scores: CUR and others, call by call, and the picture of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.metrics.ranking import topk_overlap
from zoo.ops.search import mips_topk
from zoo.retrieval import anncur

ANCHORS = (5, 10, 20, 30, 50, 100, 200)
"""Numbers of anchor items among which the best counts at each budget, as in the paper."""


def overlap(ids: np.ndarray, truth: np.ndarray) -> float:
    """Top-k-recall: the mean share of the exact top k among those found."""
    return float(jnp.mean(topk_overlap(jnp.asarray(ids), jnp.asarray(truth))))


@jax.jit
def _weights(columns: Any, own: Any, rcond: Any) -> Any:
    return jnp.matmul(own, anncur.pseudo_inverse(columns, rcond), precision="highest")


@functools.partial(jax.jit, static_argnums=4)
def _predict(weights: Any, rows: Any, exact: Any, mask: Any, depth: int) -> tuple[Any, Any]:
    wrong = jnp.matmul(weights, rows, precision="highest") - exact
    return mips_topk(weights, rows.T, depth, mask=mask)[1], jnp.linalg.norm(wrong) / jnp.linalg.norm(exact)


def first_stage(
    rows: np.ndarray, exact: np.ndarray, anchors: np.ndarray, rcond: float, depth: int
) -> tuple[np.ndarray, float]:
    """The items predicted best that are no anchors, ids ``[q, depth]``, and the prediction's relative error.

    Queries are written as combinations of the anchor queries, so that one program serves every number of anchors.

    Args:
      rows: anchor queries' scores ``[k_q, N]``.
      exact: the queries' own ``[q, N]``; only the anchors' columns are used to predict.
      anchors, rcond: see ``zoo.retrieval.anncur.cur_fit``.
      depth: how many; ``-1`` where fewer are left.
    """
    mask = np.ones(rows.shape[1], bool)
    mask[anchors] = False
    weights = _weights(rows[:, anchors], exact[:, anchors], rcond)
    found, error = _predict(weights, rows, exact, mask, depth)
    return np.asarray(found), float(error)


def recall_by_depth(found: np.ndarray, truth: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Top-k-recall after exact re-ranking of the first 0, 1, ... depth items found, ``free`` ones known beforehand.

    An item of the exact top k that is re-ranked is found: none but better ones can precede it.
    """
    hit = (found[:, :, None] == truth[:, None, :]).any(-1)
    start = np.isin(truth, free).sum(1, keepdims=True)
    return np.concatenate([start, start + np.cumsum(hit, 1)], 1).mean(0) / truth.shape[1]


def svd_retriever(exact: np.ndarray, rank: int, noise: float, seed: int, known: np.ndarray | None = None) -> np.ndarray:
    """Scores of a dual encoder of limited rank: the truncated SVD of ``scores + noise std E``, of the last rows.

    Args:
      exact: scores ``[q, N]`` of the queries that are searched for.
      rank: dimension of its vectors.
      noise: standard deviation of the noise as a share of the scores' own.
      seed: of the noise.
      known: further queries' rows, which it learns from too.
    """
    matrix = exact if known is None else np.concatenate([known, exact])
    matrix = matrix + noise * matrix.std() * np.random.default_rng(seed).normal(size=matrix.shape)
    u, s, vt = np.linalg.svd(matrix.astype(np.float32), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank])[-len(exact) :]


def best(scores: np.ndarray, depth: int) -> np.ndarray:
    """Ids of the highest scores, best first, ``[q, depth]``."""
    return np.argsort(-scores, 1, kind="stable")[:, :depth]


def recall_curves(
    rows: np.ndarray, exact: np.ndarray, truth: np.ndarray, budgets: list[int], rank: int, noise: float, rcond: float,
    rng: Any, k_i: tuple[int, ...] = ANCHORS,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Top-k-recall at each number of scorer calls, of CUR (its best split) and of others that re-rank all they may."""
    n, k = exact.shape[1], truth.shape[1]
    depth = min(max(budgets), n)
    cur = np.zeros(len(budgets))
    for number, count in enumerate(c for c in k_i if c + k <= max(budgets)):
        anchors = _draw(rng, number, n, count)
        by_depth = recall_by_depth(first_stage(rows, exact, anchors, rcond, depth)[0], truth, anchors)
        here = [by_depth[min(b - count, depth)] if b >= count + k else 0.0 for b in budgets]
        cur = np.maximum(cur, here)
    seed = int(jax.random.randint(rng, (), 0, 2**31 - 1))
    others = {
        "dual encoder": svd_retriever(exact, rank, noise, seed, rows),
        "item mean": np.broadcast_to(rows.mean(0), exact.shape),
        "random": np.random.default_rng(seed).random(exact.shape),
    }
    nothing = np.array([], int)
    curves = {name: recall_by_depth(best(scores, depth), truth, nothing) for name, scores in others.items()}
    return {"CUR": cur, **{name: curve[[min(b, depth) for b in budgets]] for name, curve in curves.items()}}


def recall_dip(
    rows: np.ndarray, exact: np.ndarray, truth: np.ndarray, num_rerank: int, cutoffs: tuple[float, ...], rng: Any
) -> dict[str, np.ndarray]:
    """Recall and relative error by k_i around k_q, for each cutoff of singular values: ``[cutoffs, sizes]``."""
    k_q, n = rows.shape
    sizes = sorted({min(n, max(1, round(k_q * share))) for share in (0.1, 0.3, 0.6, 0.9, 1.0, 1.1, 1.5)})
    found = np.zeros((2, len(cutoffs), len(sizes)))
    depth = min(max(num_rerank, 500), n)  # that of the curves: one program
    for j, count in enumerate(sizes):
        anchors = _draw(rng, 1000 + j, n, count)
        for i, rcond in enumerate(cutoffs):
            ids, found[1, i, j] = first_stage(rows, exact, anchors, rcond, depth)
            found[0, i, j] = recall_by_depth(ids[:, :num_rerank], truth, anchors)[-1]
    return {"sizes": np.array(sizes), "cutoffs": np.array(cutoffs), "recall": found[0], "error": found[1]}


def _draw(rng: Any, number: int, items: int, count: int) -> np.ndarray:
    # a host's draw: one of jax's would be compiled for each count
    seed = int(jax.random.randint(jax.random.fold_in(rng, number), (), 0, 2**31 - 1))
    return np.sort(np.random.default_rng(seed).choice(items, count, replace=False))


def draw(shown: Mapping[str, tuple[Mapping[str, Any], int]], file: Path) -> None:
    """Recall against calls, and the dip, a row for each scorer.

    Args:
      shown: label -> what :func:`recall_curves` and :func:`recall_dip` found, with ``budgets``, and k.
      file: the picture.
    """
    from trainers import plots

    fig, axes = plots.figure(2, len(shown), (4.8, 3.3))
    for row, (what, (found, k)) in enumerate(shown.items()):
        kept = {name: np.asarray(v) for name, v in found.items()}
        left, right = axes[row, 0], axes[row, 1]
        names = bytes(kept["names"]).decode().split("\n")
        for name, curve, colour in zip(
            names, kept["curves"], ("#b04030", "#3060a0", "#d09040", "#909090"), strict=True
        ):
            left.plot(kept["budgets"], curve, marker="o", markersize=3, linewidth=1.4, label=name, color=colour)
        left.set_xscale("log")
        left.set_xticks(kept["budgets"], [str(b) for b in kept["budgets"]], fontsize=7)
        left.minorticks_off()
        left.set_xlabel("scorer calls a query")
        left.set_ylabel(f"recall of the exact top {k}")
        left.set_title(f"{what}: recall against calls", fontsize=9)
        for i, style in enumerate(("--", "-")):
            label, x = f"rcond {kept['cutoffs'][i]:.0e}", kept["sizes"]
            (line,) = right.plot(x, kept["recall"][i], style, marker="o", markersize=3, label=f"recall, {label}")
            error = np.minimum(kept["error"][i], 1.2)
            right.plot(x, error, style, color=line.get_color(), alpha=0.35, label=f"relative error, {label}")
        right.set_xlabel("k_i, anchor items")
        right.set_title(f"{what}: the dip where k_i meets k_q", fontsize=9)
        for axis in (left, right):
            axis.set_ylim(-0.02, 1.22 if axis is right else 1.04)
            axis.legend(fontsize=7)
            axis.grid(alpha=0.25)
    plots.save(fig, file)
