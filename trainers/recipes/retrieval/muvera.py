"""Recipe: token sets are encoded into an index, searched, and measured against exhaustive Chamfer search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.token_sets import token_set_dataset, topic_token_sets
from trainers import recipe as base
from trainers.phases import Fit, FitResult
from trainers.recipe import Benchmark, Data, Export, Run, UserError
from zoo.ops.chamfer import chamfer_topk
from zoo.ops.search import mips_topk
from zoo.ops.topk import top_k
from zoo.retrieval import muvera
from zoo.retrieval.muvera import FDEConfig

DEPTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Numbers of candidates at which recall is reported."""


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Encodes documents (sets of token vectors) into an index, and measures searches in it.

    The default is a generated collection (40 topics in 32 dimensions, 400 documents of 24 tokens, 60 queries of 8).
    The paper's search over ColBERTv2 tokens is --data.path DIR --num-repetitions 20 --num-simhash 5 --d-proj 16
    --pq-group 8 --num-candidates 1000.
    """

    data: Data = Data("topics")
    """topics (generated), or --data.path with a folder of token embeddings: emb.npy [sum n, d] and offsets.npy, or
    emb.npy [N, n, d] and lengths.npy, in the folder itself or in its documents/ and queries/ (and qrels.npy)"""
    num_repetitions: int = 20
    """R, independent partitions of space"""
    num_simhash: int = 5
    """k_sim, hyperplanes of each; 2^k_sim blocks"""
    d_proj: int = 16
    """dimension of a token inside a block (at most that of the data); 0 keeps the token's"""
    projection: Literal["dense", "count_sketch"] = "dense"
    """inner projection: dense is the paper's, count_sketch the released code's"""
    final_dim: int = 0
    """dimension after a final random projection; 0 for none"""
    final_projection: Literal["dense", "count_sketch"] = "dense"
    """the final projection: dense is the paper's, count_sketch the released code's"""
    fill_empty: bool = True
    """fill a document's empty blocks with its token nearest in Hamming distance"""
    pq_group: int = 0
    """product quantisation: dimensions in a group (the paper's 8); 0 keeps the encodings"""
    pq_centroids: int = 256
    """product quantisation: centroids of a group"""
    k: int = 10
    """documents returned for a query"""
    num_candidates: int = 50
    """documents re-ranked by exact Chamfer for a query"""
    ball_tau: float = 0.0
    """ball-carve queries before re-ranking (the paper's 0.7); 0 re-ranks with all tokens"""
    compare: bool = True
    """draw the recall of smaller encodings and of mean pooling too"""

    def build(self) -> Run:
        """An index, then its measurement."""
        data = self._data()
        documents, queries = data["documents"], data["queries"]
        config = self._check(data)
        tokens, mask = jnp.asarray(documents["tokens"]), jnp.asarray(documents["mask"])
        asked, qmask = jnp.asarray(queries["tokens"]), jnp.asarray(queries["mask"])

        def init(rng):
            return {"params": {}, "constants": {"fde": muvera.to_arrays(muvera.init_fde(rng, config))}}

        def fit_index(variables, artefacts, rng):
            params = muvera.params_from_arrays(config, variables["constants"]["fde"])
            build = jax.jit(
                lambda p, t, m, key: muvera.build_index(
                    p, t, m, self.fill_empty, jnp.dtype(self.dtype), self.pq_group or None, self.pq_centroids, key
                )
            )
            index = build(params, tokens, mask, rng)
            kept = index.fdes if index.codes is None else index.codes
            metrics = {
                "documents": tokens.shape[0],
                "fde_dim": config.fde_dim,
                "output_dim": config.output_dim,
                "bytes_per_document": kept.nbytes // kept.shape[0],
                "token_bytes_per_document": int(mask.sum()) * tokens.shape[2] * 4 // tokens.shape[0],
            }
            return FitResult({}, {"index": muvera.to_arrays(index)}, metrics)

        def measure(variables, artefacts, rng):
            index = muvera.index_from_arrays(config, artefacts["index"])
            params = muvera.params_from_arrays(config, variables["constants"]["fde"])
            muvera.check_fingerprint(index, params)
            exact = np.asarray(chamfer_topk(asked, tokens, self.k, qmask, mask)[1])
            deep = min(DEPTHS[-1], tokens.shape[0])
            lists = {_label(config): first_stage(index, params, asked, qmask, deep)}
            if self.compare:
                lists |= _others(config, rng, documents, queries, deep, self.fill_empty)
            curves = {name: recall_by_depth(found, exact[:, 0]) for name, found in lists.items()}
            search = jax.jit(
                lambda index, q, m: muvera.muvera_search(
                    index, q, m, self.k, self.num_candidates, self.ball_tau or None
                )
            )
            found = search(index, asked, qmask)
            ids = np.asarray(found.ids)
            mine = curves[_label(config)]
            metrics = {f"recall_1_at_{n}": float(mine[n - 1]) for n in DEPTHS if n <= deep and n in (1, 10, 100)}
            metrics |= {
                "candidates_for_95": int(np.argmax(mine >= 0.95)) + 1 if mine[-1] >= 0.95 else deep + 1,
                "reranked_recall_1_at_1": float(np.mean(ids[:, 0] == exact[:, 0])),
                "reranked_overlap_at_k": overlap(ids, exact),
                "scorer_calls_per_query": float(np.mean(np.asarray(found.scorer_calls))),
                "scorer_calls_exhaustive": float(tokens.shape[0]),
            }
            if self.compare:
                metrics["mean_pooling_recall_1_at_1"] = float(curves["mean pooling"][0])
            if "qrels" in data.splits:
                metrics["qrels_recall_at_k"] = qrels_recall(ids, data["qrels"])
                metrics["exhaustive_qrels_recall_at_k"] = qrels_recall(exact, data["qrels"])
            names = sorted(curves)
            kept = {"names": np.frombuffer("\n".join(names).encode(), np.uint8).copy()}
            return FitResult({}, {"recall": {**kept, "curves": np.stack([curves[n] for n in names])}}, metrics)

        def export(variables, artefacts):
            kept = {"constants": variables["constants"], "index": artefacts["index"]}
            facts = {"inputs": f"token vectors of {config.d} dimensions, unit length", "documents": tokens.shape[0]}
            return Export(config, kept, facts)

        def summary(metrics):
            text = (
                f"exact nearest document first: {metrics['measure/recall_1_at_1']:.3f} by encodings of "
                f"{metrics['index/output_dim']:.0f} dimensions, {metrics['measure/reranked_recall_1_at_1']:.3f} after "
                f"re-ranking {metrics['measure/scorer_calls_per_query']:.0f} of {tokens.shape[0]} documents"
            )
            pooled = metrics.get("measure/mean_pooling_recall_1_at_1")
            return text if pooled is None else f"{text} (mean pooling {pooled:.3f})"

        phases = [Fit("index", fit_index), Fit("measure", measure)]
        return Run(phases, export, init, _figures, data.fingerprint, summary)

    def _data(self) -> Dataset:
        if self.data.path is not None:
            return token_set_dataset(self.data.path, self.seed)
        if self.data.name != "topics":
            raise UserError(f"--data.name {self.data.name!r} is unknown; use topics, or --data.path DIR with emb.npy")
        return topic_token_sets(self.seed)

    def _check(self, data: Dataset) -> FDEConfig:
        documents, queries, d = data["documents"], data["queries"], int(data.info["dimension"])
        n = len(documents["tokens"])
        if not 0 <= self.d_proj <= d:
            raise UserError(f"--d-proj {self.d_proj} must be in [0, {d}], the dimension of a token (0 keeps it)")
        try:
            config = FDEConfig(
                d, self.num_repetitions, self.num_simhash, self.d_proj or None, self.final_dim or None,
                self.projection if self.d_proj else "identity", self.final_projection,
            )  # fmt: skip
            muvera.check_tokens(documents["tokens"], documents["mask"], d, "documents")
            muvera.check_tokens(queries["tokens"], queries["mask"], d, "queries")
        except ValueError as error:
            raise UserError(str(error).replace("num_simhash", "--num-simhash")) from None
        if not 1 <= self.k <= self.num_candidates <= n:
            raise UserError(f"need 1 <= --k {self.k} <= --num-candidates {self.num_candidates} <= {n} documents")
        if self.pq_group < 0 or (self.pq_group and config.output_dim % self.pq_group):
            raise UserError(f"--pq-group {self.pq_group} must divide the encodings' {config.output_dim} dimensions")
        if self.pq_group and self.pq_centroids < 1:
            raise UserError(f"--pq-centroids must be at least 1, got {self.pq_centroids}")
        if self.ball_tau > 1 or self.ball_tau < -1:
            raise UserError(f"--ball-tau must be in [-1, 1] (0 for none), got {self.ball_tau}")
        return config


def first_stage(index, params, queries, qmask, depth: int) -> np.ndarray:
    """Ids ``[q, depth]`` of the first stage alone."""

    def search(index, params, queries, qmask):
        return muvera.candidates(index, muvera.encode_query_fde(params, queries, qmask), depth)[1]

    return np.asarray(jax.jit(search)(index, params, queries, qmask))


def mean_pooled(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The single-vector baseline: the mean of a set's tokens, ``[N, d]``."""
    weight = mask[..., None].astype(jnp.float32)
    return jnp.sum(tokens * weight, 1) / jnp.sum(weight, 1)


def recall_by_depth(found: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """1Recall@N for N = 1 .. depth: how often the exact nearest document is among the first N found."""
    return np.mean(np.cumsum(found == nearest[:, None], 1) > 0, 0)


def overlap(ids: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact top k among the k found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids.tolist(), exact.tolist(), strict=True)]))


def qrels_recall(ids: np.ndarray, qrels: Mapping[str, np.ndarray]) -> float:
    """Mean share of a query's relevant documents among those found, over queries that have any."""
    shares = []
    for q in np.unique(qrels["query"]):
        relevant = set(qrels["document"][qrels["query"] == q].tolist())
        shares.append(len(relevant & set(ids[q].tolist())) / len(relevant))
    return float(np.mean(shares))


def _label(config: FDEConfig) -> str:
    return f"FDE ({config.num_repetitions}, {config.num_simhash}, {config.block_dim}): {config.output_dim} dims"


def _others(config: FDEConfig, rng, documents, queries, depth: int, fill_empty: bool) -> dict[str, np.ndarray]:
    """Candidate lists of the paper's smaller encodings and of mean pooling."""
    tokens, mask = jnp.asarray(documents["tokens"]), jnp.asarray(documents["mask"])
    asked, qmask = jnp.asarray(queries["tokens"]), jnp.asarray(queries["mask"])
    found = {}
    for number, (r, k_sim) in enumerate([(1, 4), (5, 3), (20, 3)]):
        small = FDEConfig(config.d, r, k_sim, min(8, config.d))
        params = muvera.init_fde(jax.random.fold_in(rng, number), small)
        index = jax.jit(lambda p: muvera.build_index(p, tokens, mask, fill_empty))(params)
        found[_label(small)] = first_stage(index, params, asked, qmask, depth)
    pooled = mips_topk(mean_pooled(asked, qmask), mean_pooled(tokens, mask), depth)
    return {**found, "mean pooling": np.asarray(pooled[1])}


def _figures(result, workdir: Path) -> None:
    from trainers import plots

    names = bytes(np.asarray(result.artefacts["recall"]["names"])).decode().split("\n")
    curves = np.asarray(result.artefacts["recall"]["curves"])
    fig, axes = plots.figure(1, 1, (5.2, 3.6))
    axis = axes[0, 0]
    shown = min(curves.shape[1], 200)
    x = np.arange(1, shown + 1)
    for name, curve in sorted(zip(names, curves, strict=True), key=lambda row: -row[1][0]):
        style = {"color": "black", "linestyle": "--"} if name == "mean pooling" else {}
        axis.plot(x, curve[:shown], label=name, linewidth=1.4, **style)
    axis.set_xscale("log")
    axis.set_xlabel("candidates")
    axis.set_ylabel("exact nearest document among them")
    axis.set_ylim(min(0.4, curves[:, 0].min()), 1.02)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.25)
    axis.set_title("recall of the first stage", fontsize=9)
    plots.save(fig, workdir / "recall.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "documents/tokens": "float32 [N, n, d], unit length: token embeddings (emb.npy, ragged or padded)",
        "documents/mask": "bool [N, n]: which tokens are real (from offsets.npy or lengths.npy)",
        "queries/tokens": "float32 [Q, m, d] (queries/emb.npy; without it, noisy tokens of some documents)",
        "queries/mask": "bool [Q, m]",
        "qrels": "optional int32 [M, 2], relevant (query, document) pairs (qrels.npy)",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the generated collection; documents and queries are paired by seed."""
    data = topic_token_sets(seed)
    tokens, asked = jnp.asarray(data["documents"]["tokens"]), jnp.asarray(data["queries"]["tokens"])
    key = jax.random.key(seed)
    exact = np.asarray(chamfer_topk(asked, tokens, 1)[1])[:, 0]
    depth = 100
    if arm == "fde (20, 5, 16)":
        params = muvera.init_fde(key, FDEConfig(tokens.shape[2], 20, 5, 16))
        index = jax.jit(lambda p: muvera.build_index(p, tokens))(params)
        found = first_stage(index, params, asked, jnp.ones(asked.shape[:2], bool), depth)
    elif arm == "mean pooling":
        found = np.asarray(mips_topk(jnp.mean(asked, 1), jnp.mean(tokens, 1), depth)[1])
    elif arm == "random ranking":
        scores = jax.random.uniform(key, (asked.shape[0], tokens.shape[0]))
        found = np.asarray(top_k(scores, depth)[1])
    else:
        raise UserError(f"unknown arm {arm!r} of muvera's claim")
    curve = recall_by_depth(found, exact)
    return {f"recall_1_at_{n}": float(curve[n - 1]) for n in (1, 10, 100)}


def benchmarks() -> list[Benchmark]:
    """Encoding at ColBERT's sizes, top-k against jax's, and the re-ranking of 100 candidates."""
    config = FDEConfig(128, 20, 5, 16)
    params = muvera.init_fde(jax.random.key(0), config)
    unit = lambda key, *shape: muvera_unit(jax.random.normal(jax.random.key(key), shape))  # noqa: E731
    documents, queries = unit(1, 64, 80, 128), unit(2, 64, 32, 128)
    rows = []
    for name, x, mean in (("documents", documents, True), ("queries", queries, False)):
        encode = muvera.encode_document_fde if mean else muvera.encode_query_fde
        b, n, d = x.shape
        flops = 2.0 * b * n * d * config.num_repetitions * (config.num_simhash + config.block_dim)
        moved = 4.0 * (x.size + b * config.output_dim + params.simhash.size + params.proj.size)
        loop = lambda p, x, mean=mean: numpy_encoding(p, x, mean, fill_empty=mean)  # noqa: E731
        rows.append(Benchmark(f"encode {b} {name} of {n} x {d}, (20, 5, 16)", encode, (params, x), flops, moved,
                              {"numpy_loop": loop}))  # fmt: skip
    scores = jax.random.normal(jax.random.key(3), (256, 100_000))
    plain = jax.jit(lambda x: jax.lax.top_k(x, 100))
    rows.append(Benchmark("top_k 256 x 100000, k = 100", lambda x: top_k(x, 100), (scores,), 1.0 * scores.size,
                          4.0 * scores.size, {"lax_top_k": plain}))  # fmt: skip
    few, candidates = queries[:8], unit(4, 100, 80, 128)

    def loop(q, p):
        return np.array([[np.max(a @ b.T, 1).sum() for b in np.asarray(p)] for a in np.asarray(q)])

    flops = 2.0 * 8 * 32 * 100 * 80 * 128
    rows.append(Benchmark("chamfer of 8 queries x 100 candidates", muvera.chamfer, (few, candidates), flops,
                          4.0 * (few.size + candidates.size + 800), {"numpy_loop": loop}))  # fmt: skip
    return rows


def muvera_unit(x: jax.Array) -> jax.Array:
    """Rows of unit length."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def numpy_encoding(params, x, mean: bool, fill_empty: bool) -> np.ndarray:
    """The encoding as a NumPy loop over sets, repetitions and blocks: what the benchmark compares with."""
    planes, proj, x = np.asarray(params.simhash), np.asarray(params.proj), np.asarray(x)
    r, _, k_sim = planes.shape
    out = np.zeros((len(x), r, 2**k_sim, proj.shape[2]), np.float32)
    powers = 2 ** np.arange(k_sim - 1, -1, -1)
    for i, tokens in enumerate(x):
        for j in range(r):
            bits, psi = tokens @ planes[j] > 0, tokens @ proj[j]
            cell = bits @ powers
            for block in range(2**k_sim):
                inside = psi[cell == block]
                if len(inside):
                    out[i, j, block] = inside.mean(0) if mean else inside.sum(0)
                elif fill_empty:
                    wanted = (block >> np.arange(k_sim - 1, -1, -1)) & 1
                    out[i, j, block] = psi[np.argmin((bits != wanted).sum(1))]
    return out.reshape(len(x), -1)


def example() -> dict:
    """The conformance row: the two encodings and Chamfer as pure functions."""
    config = FDEConfig(6, 3, 2, 4, final_dim=10, final_projection="count_sketch")
    params = muvera.init_fde(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(4, 5, 6)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    mask = np.arange(5) < np.array([5, 3, 1, 4])[:, None]

    def function(tokens, mask):
        queries = muvera.encode_query_fde(params, tokens, mask)
        documents = muvera.encode_document_fde(params, tokens, mask)
        return {"query": queries, "document": documents, "chamfer": muvera.chamfer(tokens, tokens, mask, mask)}

    return {"objective": None, "function": function, "args": (tokens, mask), "num_examples": 4}
