"""``zoo bench losses``: gradients of every pair loss at B = 4096, d = 256: time, memory, and another library's time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.bench import roofline, run_one
from trainers.recipe import Benchmark
from trainers.reference_baselines import metric_learning_baselines
from zoo.losses import pairs, proxies, streaming
from zoo.losses.contrastive import nt_xent_per_example, unit_rows
from zoo.representation import tcm

B, D, PER_CLASS = 4096, 256, 8

MATRIX: dict[str, Callable] = {
    "supervised contrastive": pairs.supervised_contrastive,
    "contrastive pairs": pairs.contrastive_pairs,
    "multi similarity": pairs.multi_similarity,
    "triplet, batch hard": pairs.triplet,
    "triplet, batch all": functools.partial(pairs.triplet, mining="batch_all"),
    "triplet, semi-hard": functools.partial(pairs.triplet, mining="semi_hard"),
    "margin": pairs.margin_pairs,
    "smooth-AP": functools.partial(pairs.smooth_ap, max_positives=PER_CLASS - 1),
    "recall@k surrogate": functools.partial(pairs.recall_surrogate, max_positives=PER_CLASS - 1),
    "tcm": tcm.tcm_loss,
}
"""Losses of ``(similarity, positive, negative)``."""

STREAMED: dict[str, Callable] = {
    "supervised contrastive": streaming.streamed_supervised_contrastive,
    "contrastive pairs": streaming.streamed_contrastive_pairs,
    "tcm": tcm.streamed_tcm,
}
"""Losses of ``(unit rows, labels)`` that hold no similarity matrix."""


def gradients(rows: int = B, dimension: int = D) -> dict[str, tuple[Callable, tuple, float]]:
    """By name: the gradient by the embeddings, its arguments, and the products it must make in floating operations."""
    rng = np.random.default_rng(0)
    z = np.asarray(unit_rows(jnp.asarray(rng.normal(size=(rows, dimension)), jnp.float32)))
    y = np.repeat(np.arange(rows // PER_CLASS), PER_CLASS).astype(np.int32)
    once = 2.0 * rows * rows * dimension
    found: dict[str, tuple[Callable, tuple, float]] = {}
    for name, loss in MATRIX.items():

        def whole(z, y, loss=loss):
            z = unit_rows(z)
            return jnp.mean(loss(jnp.matmul(z, z.T, precision="highest"), *pairs.pair_masks(y)))

        found[f"{name}, matrix"] = jax.grad(whole), (z, y), 3 * once
    for name, loss in STREAMED.items():
        found[f"{name}, streamed"] = (
            jax.grad(lambda z, y, loss=loss: jnp.mean(loss(unit_rows(z), y))), (z, y), 4 * once,
        )  # fmt: skip
    half = rows // 2
    found["nt-xent, matrix"] = (
        jax.grad(lambda z, y: jnp.mean(nt_xent_per_example(z[:half], z[half:]))),
        (z, y),
        3 * once,
    )
    weights = np.asarray(unit_rows(jnp.asarray(rng.normal(size=(rows // PER_CLASS, dimension)), jnp.float32)))
    found["proxy anchor"] = (
        jax.grad(lambda z, y, w: jnp.sum(proxies.proxy_anchor(unit_rows(z) @ w.T, y))),
        (z, y, weights),
        3 * 2.0 * rows * len(weights) * dimension,
    )
    return found


FEWER = {"tcm": 512}
"""Rows at which the other library is timed where it cannot be at B: its TCM needs 20 GiB for 2048 rows."""


def benchmarks() -> list[Benchmark]:
    """All gradients, each with the other library's where that has it and can; ``temporary_bytes`` is to be read against
    the similarity matrix's ``4 B^2``."""

    def case(name: str, found: tuple[Callable, tuple, float], against: dict[str, Callable]) -> Benchmark:
        fn, args, flops = found
        number = len(args[0])
        note = f"gradient, B={number}, d={D}; the similarity matrix is {4 * number * number / 2**20:.0f} MiB"
        return Benchmark(name, fn, args, flops, 8.0 * args[0].size, against, note)

    made = []
    for name, found in gradients().items():
        kind, _, form = name.rpartition(", ")
        against = metric_learning_baselines(kind or name) if form != "streamed" else {}
        made.append(case(name, found, against if kind not in FEWER else {}))
        if against and kind in FEWER:
            made.append(case(f"{name}, B={FEWER[kind]}", gradients(FEWER[kind])[name], against))
    return made


def losses() -> list[dict[str, Any]]:
    """One row a loss."""
    peaks = roofline()
    return [run_one(b, *peaks) for b in benchmarks()]
