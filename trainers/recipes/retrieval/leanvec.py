"""Recipe: maps are learned, vectors encoded into an index and searched, and all is measured against exact search."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.vectors import shifted_queries, vector_dataset
from trainers import recipe as base
from trainers.phases import Fit, FitResult
from trainers.recipe import Benchmark, Data, Export, Run, UserError
from zoo.ops.scalar_quantisation import bytes_per_row, check_range, check_vectors
from zoo.ops.search import mips_topk
from zoo.retrieval import leanvec
from zoo.retrieval.leanvec import LeanVecConfig

WIDTHS = (10, 15, 20, 30, 50, 75, 100, 150, 200)
"""Numbers of candidates at which recall is reported."""

Encoding = Literal["float32", "bfloat16", "float16", "lvq8", "lvq4", "lvq4x4", "lvq4x8", "lvq8x8"]


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Learns two linear maps, builds an index of short quantised vectors, and measures searches in it.

    The default is a generated database (2000 vectors of 64 dimensions) asked by queries of another distribution.  The
    repository's setting for RocketQA or CLIP vectors is --data.path DIR --dim 160 --num-candidates 100.
    """

    data: Data = Data("shifted")
    """shifted (generated; matched has queries of the database's own law), or --data.path with a folder of base,
    queries_learn and queries (.npy, .fvecs or .bvecs) and perhaps groundtruth.ivecs"""
    maps: Literal["frank_wolfe", "eigen", "eigen_frank_wolfe", "pca"] = "frank_wolfe"
    """how the maps are learned; all but pca look at queries_learn"""
    dim: int = 16
    """d, dimension of the primary vectors"""
    steps: int = 500
    """Frank-Wolfe steps at most"""
    exponent: float = 0.999
    """Frank-Wolfe: step t has size 1 / (t + 1)^exponent"""
    tol: float = 1e-3
    """Frank-Wolfe stops when the loss changes by less than this share of itself"""
    num_beta: int = 21
    """eigenvector search: grid points in [0, 1]"""
    sample: int = 100_000
    """vectors that the maps are learned from, at most"""
    primary: Encoding = "lvq8"
    """how primary vectors are kept"""
    secondary: Encoding = "lvq8"
    """how full vectors are kept, for re-ranking"""
    metric: Literal["ip", "cosine", "l2"] = "ip"
    """inner product; cosine normalises everything first; l2 needs --maps pca"""
    k: int = 10
    """vectors returned for a query"""
    num_candidates: int = 50
    """W, vectors re-ranked for a query"""
    compare: bool = True
    """draw the recall of the other maps too"""

    def build(self) -> Run:
        """Maps, an index, then its measurement."""
        data = self._data()
        config = self._check(data)
        vectors, asked = jnp.asarray(data["base"]["x"]), jnp.asarray(data["queries"]["x"])
        learn = jnp.asarray(data["learn"]["x"]) if "learn" in data.splits else None
        some = jnp.asarray(sampled(data["base"]["x"], self.sample, self.seed))

        def learned(method):
            fit = lambda x, q: leanvec.fit_maps(  # noqa: E731
                x, q, self.dim, method, self.steps, self.exponent, self.tol, self.num_beta
            )
            return jax.jit(fit)(some, learn)

        def fit_maps(variables, artefacts, rng):
            maps = learned(self.maps)
            metrics = losses(maps, asked, some)
            trace = {}
            if self.maps.endswith("frank_wolfe"):
                found = frank_wolfe_trace(self, some, learn)
                trace = {"trace": {"losses": np.asarray(found.losses)[: int(found.steps)]}}
                metrics["steps"] = int(found.steps)
            return FitResult({"constants": {"maps": leanvec.to_arrays(maps)}}, trace, metrics)

        def fit_index(variables, artefacts, rng):
            maps = leanvec.maps_from_arrays(config, variables["constants"]["maps"])
            try:
                check_index_ranges(maps, vectors, self.primary, self.secondary)
            except ValueError as error:
                raise UserError(str(error)) from None
            index = build_index(config, maps, vectors)
            metrics = {
                "vectors": vectors.shape[0],
                "primary_bytes": bytes_per_row(index.primary),
                "secondary_bytes": bytes_per_row(index.secondary),
                "float32_bytes": 4 * vectors.shape[1],
            }
            return FitResult({}, {**artefacts, "index": leanvec.to_arrays(index)}, metrics)

        def measure(variables, artefacts, rng):
            index = leanvec.index_from_arrays(config, artefacts["index"])
            leanvec.check_maps(index, leanvec.maps_from_arrays(config, variables["constants"]["maps"]))
            truth = self._truth(data, vectors, asked)
            deep = min(WIDTHS[-1], vectors.shape[0])
            lists = {self.maps: first_stage(index, asked, deep)}
            if self.compare:
                for other in ("pca", "frank_wolfe", "eigen"):
                    if other not in lists and (other == "pca" or learn is not None) and self.metric != "l2":
                        maps = learned(other)
                        lists[other] = first_stage(build_index(config_of(config, maps), maps, vectors), asked, deep)
            found = jax.jit(lambda i, q: leanvec.leanvec_search(i, q, self.k, self.num_candidates))(index, asked)
            curves = {name: recall_by_width(ids, truth) for name, ids in lists.items()}
            metrics = {
                "recall_primary": recall(lists[self.maps][:, : self.k], truth),
                "recall_candidates": recall(lists[self.maps][:, : self.num_candidates], truth),
                "recall_reranked": recall(np.asarray(found.ids), truth),
                "scorer_calls_per_query": float(np.mean(np.asarray(found.scorer_calls))),
            }
            for name, ids in lists.items():
                if name != self.maps:
                    metrics[f"recall_primary_{name}"] = recall(ids[:, : self.k], truth)
            names = sorted(curves)
            kept = {"names": np.frombuffer("\n".join(names).encode(), np.uint8).copy()}
            curves = np.stack([curves[name] for name in names])
            return FitResult({}, {**artefacts, "recall": {**kept, "curves": curves}}, metrics)

        def export(variables, artefacts):
            kept = {"constants": variables["constants"], "index": artefacts["index"]}
            unit = ", unit length" if self.metric == "cosine" else ""
            return Export(config, kept, {"inputs": f"vectors of {config.dimension} dimensions{unit}"})

        def summary(metrics):
            text = (
                f"{metrics['measure/recall_reranked']:.3f} of the true {self.k} nearest found, "
                f"{metrics['index/primary_bytes']:.0f} bytes scanned a vector ({metrics['index/float32_bytes']:.0f} as "
                f"float32), {metrics['measure/scorer_calls_per_query']:.0f} of {vectors.shape[0]} re-ranked; without "
                f"re-ranking {metrics['measure/recall_primary']:.3f}"
            )
            other = metrics.get("measure/recall_primary_pca")
            return text if other is None else f"{text} (PCA {other:.3f})"

        phases = [Fit("maps", fit_maps), Fit("index", fit_index), Fit("measure", measure)]
        return Run(phases, export, lambda rng: {"params": {}}, _figures, data.fingerprint, summary)

    def _data(self) -> Dataset:
        if self.data.path is not None:
            data = vector_dataset(self.data.path)
        elif self.data.name in ("shifted", "matched"):
            data = shifted_queries(self.seed, shifted=self.data.name == "shifted")
        else:
            raise UserError(
                f"--data.name {self.data.name!r} is unknown; use shifted or matched, or --data.path DIR with base and "
                "queries"
            )
        return unit_rows(data) if self.metric == "cosine" else data

    def _check(self, data: Dataset) -> LeanVecConfig:
        n, dimension = data["base"]["x"].shape
        if not 1 <= self.dim <= dimension:
            raise UserError(f"--dim {self.dim} must be in [1, {dimension}], the dimension of a vector")
        if self.dtype != "float32":
            raise UserError("--dtype does nothing here; choose --primary bfloat16 or --secondary bfloat16")
        for name, least in (("steps", 1), ("num_beta", 2), ("sample", 1)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if not 0 < self.exponent <= 1:
            raise UserError(f"--exponent must be in (0, 1], got {self.exponent}")
        if not self.tol >= 0:
            raise UserError(f"--tol must not be negative, got {self.tol}")
        if not 1 <= self.k <= self.num_candidates <= n:
            raise UserError(f"need 1 <= --k {self.k} <= --num-candidates {self.num_candidates} <= {n} vectors")
        if self.maps != "pca":
            if "learn" not in data.splits:
                raise UserError(
                    f"--maps {self.maps} learns from queries: add queries_learn.npy to {self.data.path}, or use "
                    "--maps pca"
                )
            m = len(data["learn"]["x"])
            if m < self.dim:
                warnings.warn(f"K_Q has rank {m} < {self.dim}; maps are under-determined", stacklevel=2)
        metric = "ip" if self.metric == "cosine" else self.metric
        if metric == "l2" and self.maps != "pca":
            text = "OOD maps approximate inner products; normalise vectors or use PCA (--maps pca)"
            raise UserError(f"--metric l2 with --maps {self.maps}: {text}")
        try:
            for split in ("base", "learn", "queries"):
                if split in data.splits:
                    check_vectors(data[split]["x"], dimension, "database" if split == "base" else f"{split} queries")
            return LeanVecConfig(dimension, self.dim, self.maps == "pca", self.primary, self.secondary, metric)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _truth(self, data: Dataset, vectors, asked) -> np.ndarray:
        given = data.splits.get("groundtruth")
        if given is not None:
            if given["ids"].shape[1] < self.k:
                raise UserError(f"the ground truth holds {given['ids'].shape[1]} neighbours, fewer than --k {self.k}")
            return given["ids"][:, : self.k]
        if self.metric == "l2":
            # the nearest maximise <q, x> - ||x||^2 / 2
            vectors = jnp.concatenate([vectors, -0.5 * jnp.sum(vectors**2, 1, keepdims=True)], 1)
            asked = jnp.concatenate([asked, jnp.ones((asked.shape[0], 1))], 1)
        return np.asarray(jax.jit(mips_topk, static_argnums=2)(asked, vectors, self.k)[1])


def sampled(vectors: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most ``count`` of the vectors, drawn without replacement, in their order."""
    if len(vectors) <= count:
        return vectors
    return vectors[np.sort(np.random.default_rng([seed, 1]).permutation(len(vectors))[:count])]


def unit_rows(data: Dataset) -> Dataset:
    """Every vector of a data set divided by its length.

    Raises:
      UserError: a vector of length 0.
    """
    splits = {}
    for name, arrays in data.splits.items():
        splits[name] = arrays
        if "x" in arrays:
            length = np.linalg.norm(arrays["x"], axis=1, keepdims=True)
            if not length.all():
                row = int(np.flatnonzero(length[:, 0] == 0)[0])
                raise UserError(f"--metric cosine: row {row} of {name} has length 0; remove it or use --metric ip")
            splits[name] = {**arrays, "x": arrays["x"] / length}
    return Dataset(data.name, splits, data.info)


def losses(maps, queries, vectors) -> dict[str, float]:
    """The relative loss on these queries, centred as the maps are."""
    k_q, k_x = leanvec.moment(queries), leanvec.moment(vectors - maps.mean)
    return {"relative_loss": float(leanvec.relative_loss(k_q, k_x, maps.query, maps.data))}


def frank_wolfe_trace(recipe: Recipe, vectors, queries) -> leanvec.FrankWolfe:
    """The losses that the recipe's Frank-Wolfe run goes through."""

    def run(x, q):
        k_q, k_x, start = leanvec.moment(q), leanvec.moment(x), None
        if recipe.maps == "eigen_frank_wolfe":
            start = leanvec.eigen_search(k_q, k_x, q.shape[0], x.shape[0], recipe.dim, recipe.num_beta)[0]
        return leanvec.frank_wolfe(k_q, k_x, recipe.dim, recipe.steps, recipe.exponent, recipe.tol, start)

    return jax.jit(run)(vectors, queries)


def config_of(config: LeanVecConfig, maps) -> LeanVecConfig:
    """The same index with other maps."""
    return LeanVecConfig(config.dimension, config.d, maps.centred, config.primary, config.secondary, config.metric)


def build_index(config: LeanVecConfig, maps, vectors) -> leanvec.LeanVecIndex:
    """``zoo.retrieval.leanvec.build_index`` as one compiled call."""
    build = lambda m, x: leanvec.build_index(m, x, config.primary, config.secondary, config.metric)  # noqa: E731
    return jax.jit(build)(maps, vectors)


def check_index_ranges(maps, vectors, primary: str, secondary: str) -> None:
    """Raises ValueError where LVQ could not hold the vectors' ranges."""
    short = jax.jit(leanvec.project_vectors)(maps, vectors)
    for name, rows, encoding in (("the primary vectors", short, primary), ("the vectors", vectors, secondary)):
        if encoding.startswith("lvq"):
            check_range(np.asarray(rows - jnp.mean(rows, 0)), int(encoding[3]), name)


def first_stage(index, queries, depth: int) -> np.ndarray:
    """Ids ``[q, depth]`` of the primary search alone."""
    return np.asarray(jax.jit(lambda i, q: leanvec.candidates(i, q, depth)[1])(index, queries))


def recall(ids: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of a query's true neighbours among the ids."""
    return float(np.mean((truth[:, :, None] == ids[:, None, :]).any(-1)))


def recall_by_width(ids: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """:func:`recall` of the first W ids, for W = 1 .. all."""
    return np.mean(np.cumsum((ids[:, :, None] == truth[:, None, :]).any(-1), 1), 0) / truth.shape[1]


def _figures(result, workdir: Path) -> None:
    from trainers import plots

    names = bytes(np.asarray(result.artefacts["recall"]["names"])).decode().split("\n")
    curves = np.asarray(result.artefacts["recall"]["curves"])
    trace = result.artefacts.get("trace")
    fig, axes = plots.figure(1 if trace is None else 2, 1, (4.6, 3.4))
    axis = axes[0, 0]
    colours = {"pca": "black", "frank_wolfe": "#b04030", "eigen": "#3060a0", "eigen_frank_wolfe": "#608030"}
    for name, curve in sorted(zip(names, curves, strict=True), key=lambda row: -row[1][9:].mean()):
        style, missed = "--" if name == "pca" else "-", 1 - curve[9:]
        label = f"{name.replace('_', ' ')} ({curve[9]:.3f} at 10)"
        axis.plot(np.arange(10, len(curve) + 1), np.maximum(missed, 1e-5), style, color=colours[name], label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("candidates")
    axis.set_ylabel("true nearest not among them")
    axis.legend(fontsize=8)
    axis.set_title("what the primary search misses", fontsize=9)
    axis.grid(alpha=0.25)
    if trace is not None:
        axis = axes[0, 1]
        values = np.asarray(trace["losses"])
        axis.plot(np.arange(1, len(values) + 1), values, color=colours["frank_wolfe"], label="Frank-Wolfe")
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_ylabel("share of inner products' energy lost")
        axis.set_title("learning the maps", fontsize=9)
        axis.grid(alpha=0.25, which="both")
    plots.save(fig, workdir / "recall.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "base/x": "float32 [n, D]: the vectors to search (base.npy, .fvecs or .bvecs)",
        "learn/x": "float32 [m, D]: queries to learn maps from (queries_learn.*); --maps pca needs none",
        "queries/x": "float32 [q, D]: queries to measure with, none of them in learn (queries.*)",
        "groundtruth/ids": "optional int32 [q, at least k]: true neighbours (groundtruth.ivecs or .npy); else computed",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the generated data; vectors and queries are paired by seed."""
    found = {}
    for name in ("shifted", "matched"):
        data = shifted_queries(seed, shifted=name == "shifted")
        vectors, learn, asked = (jnp.asarray(data[s]["x"]) for s in ("base", "learn", "queries"))
        if arm == "LeanVec-OOD (Frank-Wolfe)":
            maps = jax.jit(lambda x, q: leanvec.fit_maps(x, q, 16))(vectors, learn)
        elif arm == "LeanVec-ID (PCA)":
            maps = jax.jit(lambda x: leanvec.pca(x, 16))(vectors)
        elif arm == "random projection":
            matrix = leanvec.polar(jax.random.normal(jax.random.key(seed), (vectors.shape[1], 16)))
            maps = leanvec.ProjectionMaps(matrix, matrix, jnp.zeros(vectors.shape[1]))
        else:
            raise UserError(f"unknown arm {arm!r} of leanvec's claim")
        index = build_index(LeanVecConfig(vectors.shape[1], 16, maps.centred), maps, vectors)
        truth = np.asarray(mips_topk(asked, vectors, 10)[1])
        ids = first_stage(index, asked, 50)
        again = jax.jit(lambda i, q: leanvec.leanvec_search(i, q, 10, 50).ids)(index, asked)
        own = {
            "recall_10_at_10": recall(ids[:, :10], truth),
            "recall_10_at_50": recall(ids, truth),
            "recall_reranked": recall(np.asarray(again), truth),
            **losses(maps, asked, vectors),
        }
        found |= own if name == "shifted" else {f"control_{k}": v for k, v in own.items()}
    return found


def benchmarks() -> list[Benchmark]:
    """The search at 100,000 x 768 and 200,000 x 128 against exact search, NumPy and faiss at recall@10 0.95."""
    from trainers.bench_search import search_benchmarks

    return [*search_benchmarks(100_000, 768, 160, 100.0), *search_benchmarks(200_000, 128, 48, 25.0)]


def example() -> dict:
    """The conformance row: maps by all learners, codes and their products, as pure functions."""
    rng = np.random.default_rng(0)
    spread = np.exp(-np.arange(6) / 2).astype(np.float32)
    vectors = rng.normal(size=(30, 6)).astype(np.float32) * spread
    queries = rng.normal(size=(12, 6)).astype(np.float32) * spread[::-1]

    def function(vectors, queries):
        k_q, k_x = leanvec.moment(queries), leanvec.moment(vectors)
        found = leanvec.frank_wolfe(k_q, k_x, 3, 8, tol=0.0)
        maps = leanvec.ProjectionMaps(found.query, found.data, jnp.zeros(6))
        index = leanvec.build_index(maps, vectors, "float32", "lvq4x8")
        single = leanvec.eigen_search(k_q, k_x, 12, 30, 3, 5, 0)
        # products and losses, not maps: an eigenvector's basis is free where eigenvalues nearly meet
        return {
            "first": leanvec.candidates(index, queries, 4)[0],
            "second": leanvec.leanvec_search(index, queries, 3, 30).scores,
            "losses": found.losses,
            "eigen": single[2],
            "pca": jnp.sum(leanvec.project_vectors(leanvec.pca(vectors, 3), vectors) ** 2),
        }

    return {"objective": None, "function": function, "args": (vectors, queries), "num_examples": 12}
