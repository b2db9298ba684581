"""Stitching in runs: objectives of several models over one state, and what is reported of encoders and heads joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainers.errors import UserError
from zoo.base import Loss, Objective, batch_mask, example_elements
from zoo.metrics.embeddings import linear_cka
from zoo.metrics.latents import aligned_mrr, mean_cosine, topk_jaccard
from zoo.ops.anchors import AnchorSet, check_anchors
from zoo.ops.stitching import own_and_stitched

KINDS = ("relative", "absolute")
"""Ways of handing over a latent."""


def stitching_metrics(tables: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means on and off the diagonal of each kind's table, and every cell, by name; what is NaN is left out."""
    found = {}
    for kind, table in tables.items():
        own, stitched = own_and_stitched(table)
        found[f"{kind}_own"] = own
        if np.isfinite(stitched):
            found[f"{kind}_stitched"] = stitched
        cells = np.argwhere(np.isfinite(table))
        found |= {f"{kind}_{i}_{j}": float(table[i, j]) for i, j in cells}
    return found


def checked_anchors(model: str, ids: Any, latents: Any) -> AnchorSet:
    """Anchors in a model's space.

    Raises:
      UserError: an anchor without a direction; with the model.
    """
    anchors = AnchorSet.of(ids, latents)
    try:
        check_anchors(anchors)
    except ValueError as error:
        raise UserError(f"model {model}: {error}") from None
    return anchors


def likeness(
    latents: Mapping[str, jax.Array],
    anchors: Mapping,
    represent: Callable,
    absolute: Mapping[str, jax.Array] | None = None,
) -> dict[str, float]:
    """How alike the first two models' spaces are on the test items.

    Args:
      latents: by model, ``[N, d]``.
      anchors: each model's own latents of the anchors, ``m0`` and ``m1``.
      represent: ``(latents, anchors' latents) -> [N, k]``.
      absolute: latents to compare as they are, where models without a projection were trained for that.
    """
    (a, b), own = list(latents.values())[:2], [jnp.asarray(anchors[f"m{i}"]) for i in range(2)]
    pairs = {"relative": (represent(a, own[0]), represent(b, own[1]))}
    a, b = list((latents if absolute is None else absolute).values())[:2]
    pairs |= {"absolute": (a, b)} if a.shape == b.shape else {}
    measures = {"jaccard": topk_jaccard, "mrr": aligned_mrr, "cosine": mean_cosine}
    found = {f"{kind}_{m}": float(jax.jit(f)(x, y)) for kind, (x, y) in pairs.items() for m, f in measures.items()}
    # linear CKA compares spaces of any widths
    pairs = {**pairs, "absolute": (a, b)}
    found |= {f"{kind}_cka": float(jax.jit(linear_cka)(x, y)) for kind, (x, y) in pairs.items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def stitching_table(metrics: Mapping[str, float], names: tuple[str, ...]) -> str:
    """Rows are encoders, columns heads: relative / absolute accuracy, ``-`` where widths differ."""
    wide = max(max(map(len, names)), 13)
    lines = [" " * wide + "  " + "  ".join(f"{n:>{wide}}" for n in names)]
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            both = [metrics.get(f"stitching/{kind}_{i}_{j}") for kind in KINDS]
            cells.append(" / ".join("-" if v is None else f"{v:.3f}" for v in both))
        lines.append(f"{name:<{wide}}  " + "  ".join(f"{c:>{wide}}" for c in cells))
    return "\n".join(lines)


def stitching_figures(result: Any, workdir: Path, names: tuple[str, ...]) -> None:
    """stitching.txt, stitching.png and, where autoencoders were trained, reconstructions.png."""
    from trainers import plots

    (workdir / "stitching.txt").write_text(stitching_table(result.metrics, names) + "\n")
    size = max(3.2, 0.6 * len(names) + 1.6)
    fig, axes = plots.figure(2, 1, (size, 0.9 * size))
    for axis, kind in zip(axes[0], KINDS, strict=True):
        table = np.asarray(result.artefacts["tables"][kind])
        axis.imshow(table, vmin=0, vmax=1, cmap="Blues")
        for (i, j), v in np.ndenumerate(table):
            text = "-" if np.isnan(v) else f"{v:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if v > 0.6 else "black")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xlabel("head of", fontsize=8)
        axis.set_ylabel("encoder", fontsize=8)
        axis.set_title(f"{kind}: test accuracy", fontsize=9)
    plots.save(fig, workdir / "stitching.png")
    if "pictures" not in result.artefacts:
        return
    shown = {k: np.asarray(v) for k, v in result.artefacts["pictures"].items()}
    rows = ["images", "relative_own", "relative_stitched", "absolute_own", "absolute_stitched"]
    sheet = plots.image_grid(np.concatenate([shown[r].mean(-1) for r in rows]), len(shown["images"]))
    fig, axes = plots.figure(1, 1, (6.0, 3.2))
    axis, step = axes[0, 0], (sheet.shape[0] - 1) / len(rows)
    axis.imshow(sheet, cmap="gray")
    axis.set_yticks([step * (i + 0.5) for i in range(len(rows))], [r.replace("_", " ") for r in rows], fontsize=8)
    axis.set_xticks([])
    axis.set_title("reconstructions; stitched: encoder of one seed, decoder of another", fontsize=9)
    plots.save(fig, workdir / "reconstructions.png")


def under(name: str, objective: Objective, shared: tuple[str, ...] = ()) -> Objective:
    """An objective whose variables lie under ``name`` in every collection but the ``shared`` ones."""

    def forward(variables, batch, context):
        own = {c: v if c in shared else v[name] for c, v in variables.items() if c in shared or name in v}
        out, mutated = objective.forward(own, batch, context)
        return out, {c: {**variables[c], name: v} for c, v in mutated.items()}

    return dataclasses.replace(objective, forward=forward)


def heads_objective(head: Any, spaces: Mapping[str, Callable], represent: Callable) -> Objective:
    """The cross-entropies of all heads on frozen latents; their parameters are disjoint.

    Args:
      head: a module ``(representation, train, mask) -> logits``; its parameters lie under ``heads``, by kind and model.
      spaces: each model's ``(params, batch) -> [B, d]``.
      represent: ``(latents, anchors' latents) -> [B, k]``; the anchors' are the artefact ``anchors``.
    """

    def forward(variables, batch, context):
        module, found = head.clone(axis_name=context.axis_name), []
        for i, encode in enumerate(spaces.values()):
            z = jax.lax.stop_gradient(encode(variables["params"], batch))
            r = represent(z, jnp.asarray(context.artefacts["anchors"][f"m{i}"]))
            for kind, x in zip(KINDS, (r, z), strict=True):
                params = {"params": variables["params"]["heads"][f"{kind}{i}"]}
                found.append(module.apply(params, x, context.train, batch_mask(batch)))
        return {"logits": jnp.stack(found, 1).astype(jnp.float32)}, {}

    def loss(outputs, batch, context):
        labels = jnp.broadcast_to(batch["label"][:, None], outputs["logits"].shape[:2])
        values = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], labels)
        hits = jnp.where(batch_mask(batch)[:, None], jnp.argmax(outputs["logits"], -1) == labels, False)
        rate = jnp.sum(hits, 0) / jnp.maximum(jnp.sum(batch_mask(batch)), 1)
        metrics = {f"{kind}_accuracy": jnp.mean(rate[n::2]) for n, kind in enumerate(KINDS)}
        return Loss(example_elements(jnp.sum(values, 1), batch), metrics=metrics)

    return Objective(lambda rng, batch: {}, forward, loss, gathers=("label",), name="heads on frozen latents")


def stitching_summary(metrics: Mapping[str, float], names: tuple[str, ...]) -> str:
    """Means of both kinds in one line, the reconstructions if there are any, and the table."""
    lines = []
    for kind in KINDS:
        own, other = metrics[f"stitching/{kind}_own"], metrics.get(f"stitching/{kind}_stitched")
        lines.append(f"{kind} own {own:.3f}, stitched " + ("impossible" if other is None else f"{other:.3f}"))
    text = "test accuracy: " + "; ".join(lines)
    if "pictures/relative_own_mse" in metrics:
        mse = {k: metrics[f"pictures/{k}_mse"] for k in ("relative_own", "relative_stitched", "absolute_stitched")}
        text += "; reconstruction MSE: " + ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in mse.items())
    return f"{text}\n{stitching_table(metrics, names)}"
