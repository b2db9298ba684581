"""Searches timed at equal recall: LeanVec's two stages against exact search, NumPy and, where installed, faiss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.vectors import shifted_queries
from trainers import search_backends
from trainers.errors import UserError
from trainers.recipe import Benchmark
from zoo.ops.scalar_quantisation import bytes_per_row
from zoo.ops.search import mips_topk
from zoo.retrieval import leanvec

TARGET = 0.95
"""Recall@10 that every approximate search is set to reach, at the least cost among its settings."""

WIDTHS = (10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000)
TUNED = 200
"""Queries that faiss' settings are chosen on."""

PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def recall(ids: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of a query's true neighbours among the ids."""
    return float(np.mean((truth[:, :, None] == np.asarray(ids)[:, None, :]).any(-1)))


def least(settings: tuple[int, ...], search: Callable[[int], Any], truth: np.ndarray) -> tuple[int, float]:
    """The first setting whose ids reach the target recall, and that recall; the last setting if none does."""
    for setting in settings:
        found = recall(search(setting), truth)
        if found >= TARGET:
            break
    return setting, found


def search_case(
    vectors: int, dimension: int, dim: int, decay: float, primary: str = "lvq8", secondary: str = "lvq8", seed: int = 0
) -> dict[str, Any]:
    """Data of a decaying spectrum with queries of another law, LeanVec's index over it, and the width W that it needs.

    The maps are learned from the first half of 2000 queries; W is the least that reaches the target on the other half.
    """
    first = (dimension // 8, dimension // 8 + dimension // 4)
    data = shifted_queries(seed, vectors, 1000, dimension, decay, first)
    x, learn, asked = (jnp.asarray(data[s]["x"]) for s in ("base", "learn", "queries"))
    truth = np.asarray(jax.jit(mips_topk, static_argnums=2)(asked, x, 10)[1])
    fit = jax.jit(lambda x, q: leanvec.fit_maps(x, q, dim))
    maps = fit(x, learn)
    index = jax.jit(lambda m, x: leanvec.build_index(m, x, primary, secondary))(maps, x)
    # with exact scores of all candidates, recall after re-ranking is that of the candidates: one search finds W
    deep = np.asarray(jax.jit(lambda i, q: leanvec.candidates(i, q, WIDTHS[-1])[1])(index, asked))
    width, _ = least(WIDTHS, lambda w: deep[:, :w], truth)
    for w in WIDTHS[WIDTHS.index(width) :]:
        found = recall(jax.jit(leanvec.leanvec_search, static_argnums=(2, 3))(index, asked, 10, w).ids, truth)
        if found >= TARGET:
            break
    return {"x": x, "asked": asked, "truth": truth, "index": index, "maps": maps, "width": w, "recall": found}


def faiss_searches(
    x: np.ndarray, asked: np.ndarray, truth: np.ndarray, parts: int
) -> tuple[dict[str, Callable[[np.ndarray], Any]], str]:
    """faiss's exact search, inverted lists, and those with product quantisation and re-ranking, at the target recall.

    Args:
      x, asked, truth: vectors, queries to reach the target on, and their true ten.
      parts: bytes of a product-quantised vector, at most; the largest number not above it that divides D is taken.

    Returns:
      Functions of queries, and a note of settings and recalls; without faiss none, and a note that says so.
    """
    try:
        search_backends.faiss_library()
    except UserError as error:
        return {}, str(error)
    lists, parts = min(256, len(x) // 40), max(p for p in range(1, parts + 1) if x.shape[1] % p == 0)
    flat, ivf = search_backends.faiss_index(x, "flat"), search_backends.faiss_index(x, "ivf", lists)
    pq = search_backends.faiss_index(x, "ivfpq", lists, parts)
    probes, ivf_recall = least(PROBES, lambda p: ivf(asked, 10, None, p)[1], truth)
    grid = [(refine, p) for refine in (5, 20) for p in PROBES]
    at, pq_recall = least(tuple(range(len(grid))), lambda i: pq(asked, 10, None, grid[i][1], grid[i][0])[1], truth)
    refine, pq_probes = grid[at]
    note = (
        f"faiss ivf {lists} lists, {probes} probes: recall {ivf_recall:.3f}; ivfpq {parts} bytes, {pq_probes} probes, "
        f"{10 * refine} re-ranked: recall {pq_recall:.3f}"
    )
    return {
        "faiss_flat": lambda few: flat(few, 10),
        "faiss_ivf": lambda few: ivf(few, 10, None, probes),
        "faiss_ivfpq": lambda few: pq(few, 10, None, pq_probes, refine),
    }, note


def search_benchmarks(
    vectors: int, dimension: int, dim: int, decay: float, batches: tuple[int, ...] = (1, 128), **how
) -> list[Benchmark]:
    """One benchmark for each number of queries at a time: LeanVec's search, and the others as its baselines."""
    case = search_case(vectors, dimension, dim, decay, **how)
    x, index, width = case["x"], case["index"], case["width"]
    host, asked = np.asarray(x), np.asarray(case["asked"])
    exact = jax.jit(lambda queries, x: mips_topk(queries, x, 10, 4096))  # the chunk that leanvec_search uses
    others, note = faiss_searches(host, asked[:TUNED], case["truth"][:TUNED], dim // 2)
    rows = []
    for batch in batches:
        queries, few = jnp.asarray(asked[:batch]), asked[:batch]
        baselines: Mapping[str, Callable] = {
            "mips_topk": lambda index, queries: exact(queries, x),
            "numpy_argpartition": lambda index, queries, few=few: search_backends.numpy_flat(few, host, 10),
            **{name: lambda index, queries, few=few, find=find: find(few) for name, find in others.items()},
        }
        primary, secondary = bytes_per_row(index.primary), bytes_per_row(index.secondary)
        rows.append(
            Benchmark(
                f"leanvec {batch} x {vectors} x {dimension}, d {dim}, W {width}, recall@10 {case['recall']:.3f}",
                functools.partial(leanvec.leanvec_search, k=10, num_candidates=width),
                (index, queries),
                2.0 * batch * (dimension * dim + vectors * dim + width * dimension),
                float(vectors * primary + batch * width * secondary + 4 * batch * dimension),
                baselines,
                f"{primary} bytes scanned a vector, {4 * dimension} as float32; {note}",
            )
        )
    return rows
