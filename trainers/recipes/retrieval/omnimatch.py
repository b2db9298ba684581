"""Recipe: a folder of tables becomes a graph of columns; a graph network learns from parts of it which columns join."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.builders.tables import Fabrication, Repository, bundled_tables, fabricate_repository, joinable_repository
from data.stream import DataError, arrays_fingerprint, evaluation_stream, training_stream
from data.table_profiles import (
    NUM_FEATURES,
    RELATIONS,
    Vectors,
    blocked_pairs,
    column_profile,
    hashes,
    normalised_features,
    pairwise_similarities,
    read_vectors,
)
from data.tables import (
    Table,
    column_cells,
    column_names,
    column_tables,
    cross_table_pairs,
    labels_of,
    read_joins,
    read_tables,
)
from trainers import recipe as base
from trainers.evaluation import mean_metrics
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import Context, Objective, reduce_mean
from zoo.metrics.binary import average_precision, precision_recall_curve
from zoo.nn.graph import RelationalGraphConv, RGCNEncoder
from zoo.nn.partitioning import unbox
from zoo.retrieval import omnimatch
from zoo.retrieval.omnimatch import PairMLP

LISTED = 1000
"""Pairs written to joins.csv, best first."""


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Discovers joinable columns in a repository of tables, from table pairs cut from its own tables.

    The default is a generated repository: 15 sources with columns of 12 domains, each split in two tables, half of them
    with typos. The other settings are the paper's. For your own tables: --data.path DIR, and --labels FILE to measure.
    """

    data: Data = Data("domains")
    """domains (generated), bundled (iris, wine and diabetes, split), or --data.path with a folder of .csv files"""
    labels: str | None = None
    """known joins of --data.path, for the measures only: a CSV with lines file,column,file,column"""
    encoding: str = "utf-8-sig"
    """character encoding of the .csv files"""
    vectors: str | None = None
    """word vectors in fastText's .vec layout; without them tokens are hashed by their character n-grams"""
    optimizer: Optimizer = Optimizer("adam", 1e-3)
    """optimiser of all parameters"""
    objective: Literal["rgcn_margin", "rgcn_cross_entropy", "mlp_cross_entropy"] = "rgcn_margin"
    """triplets (the main one), an MLP on pairs of embeddings, or an MLP on pairs of statistics without any graph"""
    epochs: int = 30
    """passes over the training triplets or pairs"""
    batch_size: int = 0
    """triplets or pairs in a step; 0 takes all at once, as the paper does"""
    k: int = 3
    """neighbours of a column under each similarity"""
    min_sim: float = -1.0
    """only similarities above it make an edge; 0 drops columns that share nothing"""
    threshold: float = 0.0
    """make edges wherever a similarity is at least this, rather than of the k nearest; 0 for the k nearest"""
    hidden: int = 256
    """size of the first layer"""
    features: int = 256
    """size of the embeddings"""
    num_bases: int = 0
    """matrices that the relations' are mixed from; 0 gives every relation its own"""
    relation_init: Literal["dgl", "per_relation"] = "dgl"
    """initial size of the relations' matrices: DGL's small one, or each matrix's own"""
    margin: float = 0.5
    """of the triplet loss"""
    edges: bool = True
    """--no-edges leaves the columns unconnected"""
    similarity: Literal["exact", "minhash"] = "exact"
    """how the three similarities of sets are computed"""
    blocking: bool = False
    """consider only pairs of columns that share a value or a rare token: for large repositories"""
    iterations: int = 1
    """table pairs cut from each table"""
    common: tuple[int, int] = (1, 3)
    """fewest and most common columns of a cut pair"""
    overlaps: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """shares of the rows that a cut pair has in common, one drawn for each"""
    typo_share: float = 0.5
    """probability that a cut pair's second table has typos"""
    typo_percent: float = 10.0
    """percent of a value's characters that are mistyped"""
    coverage: float = 100.0
    """percent of the rows that are mistyped"""

    def build(self) -> Run:
        """Graphs of the cut and of the whole tables, training on the first, discovery in the second."""
        self._check()
        repository = self._repository()
        try:
            config = Fabrication(self.common, self.overlaps, self.typo_share, 0.5, self.typo_percent, self.coverage)
        except DataError as error:
            raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
        try:
            training = fabricate_repository(repository.tables, config, self.iterations, self.seed)
            examples = self._examples(training)
        except DataError as error:
            raise UserError(str(error)) from None
        except ValueError as error:
            raise UserError(f"{error}; lower --common or raise --iterations") from None
        vectors = read_vectors(self.vectors) if self.vectors else None
        encoder, scorer, objective = self._model(training)
        # one tenth is only watched; the order is drawn once
        order = np.random.default_rng([self.seed, 2]).permutation(len(next(iter(examples.values()))))
        held = order[: max(1, len(order) // 10)] if len(order) > 1 else order
        rest = order[len(held) :] if len(order) > 1 else order
        watched, learnt = ({k: v[rows] for k, v in examples.items()} for rows in (held, rest))
        stream = training_stream(learnt, self.batch_size or omnimatch.bucket(len(rest)), self.seed)
        steps = self.epochs * stream.steps_per_epoch
        names = column_names(repository.tables)

        def init(rng):
            if self.objective == "rgcn_margin":
                return {"params": {"encoder": omnimatch.init_encoder(encoder, rng, NUM_FEATURES)}}
            return {"params": omnimatch.init_pair(encoder, scorer, rng, NUM_FEATURES)}

        def fit_graphs(variables, artefacts, rng):
            graph, pairs, _ = self._graph(training.tables, vectors)
            test, candidates, similarities = self._graph(repository.tables, vectors)
            made = {"test": {"graph": test, "pairs": candidates, "similarities": similarities}}
            metrics = {
                "columns": len(names),
                "candidate_pairs": len(candidates),
                "edges": int(test["mask"].sum()),
                "training_columns": len(column_names(training.tables)),
                "training_pairs": len(pairs),
                "training_edges": int(graph["mask"].sum()),
                "training_examples": len(order),
            }
            return FitResult({"constants": {"graph": graph}}, jax.tree.map(np.asarray, made), metrics)

        def values(variables, batch, context):
            outputs, _ = objective.forward(variables, batch, context)
            return {"loss": objective.loss(outputs, batch, context).elements.values}

        watch = mean_metrics("held_out", evaluation_stream(watched, omnimatch.bucket(len(held))), ("loss",), values)

        def discover(variables, artefacts, rng):
            test = artefacts["test"]
            pairs, similarities = np.asarray(test["pairs"]), np.asarray(test["similarities"])
            scores = self._scores(encoder, scorer, variables["params"], test["graph"], pairs)
            metrics = {"best_score": float(scores.max())}
            if repository.joins is not None:
                labels = labels_of(pairs, repository.joins)
                metrics |= omnimatch.join_metrics(scores, labels, pairs)
                metrics |= {"joins": int(labels.sum()), "missed_by_blocking": len(repository.joins) - int(labels.sum())}
                metrics |= {f"{n}_average_precision": v for n, v in single_similarities(similarities, labels).items()}
                found = max_similarity(similarities) > 0.75
                f1 = 2 * int((found & labels).sum()) / max(1, int(found.sum() + labels.sum()))
                metrics["max_similarity_f1"] = f1
            return FitResult({}, {"scores": {"scores": scores}}, metrics)

        def export(variables, artefacts):
            params = variables["params"]
            if encoder is None:
                return Export(scorer, {"params": params["scorer"]}, {"inputs": "statistics of two columns"})
            rest = {"scorer": params["scorer"]} if "scorer" in params else {}
            facts = {"inputs": f"{NUM_FEATURES} statistics a column, typed edges", "relations": list(RELATIONS)}
            return Export(encoder, {"params": params["encoder"], **rest}, facts)

        def summary(metrics):
            if "discover/average_precision" not in metrics:
                return (
                    f"{metrics['graphs/candidate_pairs']:.0f} pairs of {len(names)} columns scored, best "
                    f"{metrics['discover/best_score']:.3f}; joins.csv lists them"
                )
            single = max(metrics[f"discover/{r}_average_precision"] for r in RELATIONS)
            return (
                f"joins among {metrics['graphs/candidate_pairs']:.0f} pairs of {len(names)} columns: average precision "
                f"{metrics['discover/average_precision']:.3f} (best single similarity {single:.3f}), best F1 "
                f"{metrics['discover/best_f1']:.3f}, MRR {metrics['discover/mrr']:.3f}"
            )

        train = Train("train", steps, objective, self.optimizer.build(steps), stream, evaluate=(watch,),
                      eval_every=max(1, steps // 10))  # fmt: skip
        phases = [Fit("graphs", fit_graphs), train, Fit("discover", discover)]
        figures = lambda result, workdir: _figures(result, workdir, names, repository.joins)  # noqa: E731
        cells = {f"{i}": hashes([v or "" for v in c]) for i, c in enumerate(column_cells(repository.tables))}
        return Run(phases, export, init, figures, arrays_fingerprint(cells), summary, steps_per_call=5)

    def _check(self) -> None:
        for name in ("epochs", "k", "hidden", "features", "iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("batch_size", "num_bases", "margin"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if self.num_bases > len(RELATIONS):
            raise UserError(
                f"--num-bases {self.num_bases} exceeds the {len(RELATIONS)} relations; 0 gives each its own"
            )
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold must be in [0, 1] (0 takes the k nearest), got {self.threshold}")
        if self.labels and self.data.path is None:
            raise UserError(f"--labels {self.labels!r} belongs to --data.path; generated repositories know their joins")

    def _repository(self) -> Repository:
        if self.data.path is not None:
            tables = read_tables(self.data.path, self.encoding)
            joins = read_joins(self.labels, tables) if self.labels else None
            return Repository(tuple(tables), joins, None)
        if self.data.name == "domains":
            return joinable_repository(self.seed)
        if self.data.name == "bundled":
            return joinable_repository(self.seed, sources=bundled_tables())
        raise UserError(
            f"--data.name {self.data.name!r} is unknown; use domains, bundled, or --data.path DIR with .csv"
        )

    def _examples(self, training: Repository) -> dict[str, np.ndarray]:
        if self.objective == "rgcn_margin":
            return {"triplet": omnimatch.build_triplets(training.joins, training.non_joins)}
        if not len(training.joins) or not len(training.non_joins):
            raise ValueError(f"{len(training.joins)} joins and {len(training.non_joins)} non-joins: both are needed")
        pairs = np.concatenate([training.joins, training.non_joins])
        labels = np.arange(len(pairs)) < len(training.joins)
        return {"pair": np.concatenate([pairs, pairs[:, ::-1]]), "label": np.tile(labels, 2).astype(np.int32)}

    def _model(self, training: Repository) -> tuple[RGCNEncoder | None, PairMLP | None, Objective]:
        dtype = jnp.dtype(self.dtype)
        encoder = RGCNEncoder(
            len(RELATIONS), (self.hidden,), self.features, self.num_bases or None, self.relation_init, dtype=dtype
        )
        if self.objective == "rgcn_margin":
            return encoder, None, omnimatch.triplet_objective(encoder, self.margin)
        weight = max(1, len(training.non_joins) // max(1, len(training.joins)))
        encoder = None if self.objective == "mlp_cross_entropy" else encoder
        scorer = PairMLP(dtype)
        return encoder, scorer, omnimatch.pair_objective(encoder, scorer, weight, name=self.objective)

    def _graph(self, tables: Sequence[Table], vectors: Vectors | None):
        """A graph of the tables' columns, its candidate pairs and their similarities."""
        try:
            return column_graph(
                tables,
                vectors,
                self.similarity,
                self.blocking,
                self.k,
                self.min_sim,
                self.threshold or None,
                self.edges,
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    @staticmethod
    def _scores(encoder, scorer, params, graph, pairs) -> np.ndarray:
        def score(params, graph, pairs):
            h = graph["features"] if encoder is None else omnimatch.encode(encoder, params["encoder"], graph)
            if scorer is None:
                return omnimatch.join_scores(h, pairs)
            return omnimatch.pair_scores(scorer, params["scorer"], h, pairs)

        return np.asarray(jax.jit(score)(params, graph, jnp.asarray(pairs)))


def column_graph(
    tables: Sequence[Table],
    vectors: Vectors | None = None,
    similarity: str = "exact",
    blocking: bool = False,
    k: int = 3,
    min_sim: float = -1.0,
    threshold: float | None = None,
    edges: bool = True,
) -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray]:
    """The graph of a repository's columns, its candidate pairs ``[P, 2]`` and their similarities ``[P, 5]``."""
    cells, table_of = column_cells(tables), column_tables(tables)
    profiles = [column_profile(c, vectors) for c in cells]
    pairs = blocked_pairs(profiles, table_of) if blocking else cross_table_pairs(table_of)
    similarities = pairwise_similarities(profiles, pairs, similarity)
    graph = omnimatch.typed_graph(normalised_features(cells), pairs, similarities, k, min_sim, threshold)
    return graph if edges else omnimatch.without_edges(graph), pairs, similarities


def single_similarities(similarities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Average precision of each similarity by itself."""
    rank = jax.jit(average_precision)
    truth = jnp.asarray(labels)
    return {n: float(rank(jnp.asarray(similarities[:, i]), truth)) for i, n in enumerate(RELATIONS)}


def max_similarity(similarities: np.ndarray) -> np.ndarray:
    """The released code's matcher without learning: the largest of a pair's similarities."""
    return similarities.max(1)


def random_forest(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int = 0) -> np.ndarray:
    """The paper's baseline: 100 trees on vectors of similarities; probabilities of a join for the test pairs."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(100, random_state=seed).fit(train, labels).predict_proba(test)[:, 1]


def _figures(result, workdir: Path, names: Sequence[tuple[str, str]], joins: np.ndarray | None) -> None:
    from trainers import plots

    pairs = np.asarray(result.artefacts["test"]["pairs"])
    similarities = np.asarray(result.artefacts["test"]["similarities"])
    scores = np.asarray(result.artefacts["scores"]["scores"])
    best = np.argsort(-scores, kind="stable")[:LISTED]
    with (workdir / "joins.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "column", "other_file", "other_column", "score"])
        writer.writerows([*names[pairs[i, 0]], *names[pairs[i, 1]], f"{scores[i]:.4f}"] for i in best)
    fig, axes = plots.figure(2, 1, (4.6, 3.4))
    left, right = axes[0]
    if joins is None:
        left.hist(scores, 40, color="#3060a0")
        left.set_xlabel("score")
        left.set_ylabel("pairs of columns")
    else:
        labels = labels_of(pairs, joins)
        rows = {"omnimatch": scores, **{n: similarities[:, i] for i, n in enumerate(RELATIONS)}}
        for name, row in rows.items():
            curve = precision_recall_curve(jnp.asarray(row), jnp.asarray(labels))
            last = np.asarray(curve.last)
            style = {"color": "black", "linewidth": 2} if name == "omnimatch" else {"linewidth": 1}
            left.plot(np.asarray(curve.recall)[last], np.asarray(curve.precision)[last], label=name, **style)
        left.set_xlabel("recall")
        left.set_ylabel("precision")
        left.set_ylim(0, 1.03)
        left.legend(fontsize=6)
    left.grid(alpha=0.25)
    left.set_title("which columns join", fontsize=9)
    right.set_axis_off()
    right.set_title("best pairs (x: not a join)" if joins is not None else "best pairs", fontsize=9)
    wrong = np.zeros(len(pairs), bool) if joins is None else ~labels_of(pairs, joins)
    for line, i in enumerate(best[:18]):
        ends = "  ~  ".join(".".join(names[e]) for e in pairs[i])
        right.text(0, 1 - line / 18, f"{scores[i]:.3f} {'x' if wrong[i] else ' '} {ends}"[:86], fontsize=5.5,
                   va="top", family="monospace", transform=right.transAxes)  # fmt: skip
    plots.save(fig, workdir / "joins.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "*.csv": "at least two tables in one folder: a header line, then rows; empty cells are nulls",
        "--labels": "optional CSV of known joins, file,column,file,column in each line (measures only)",
        "--vectors": "optional word vectors, a .vec text file: word number number ...",
    }


def trained_scores(
    repository: Repository, seed: int, edges: bool = True, steps: int = 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper's settings from tables to scores: scores and similarities of all candidate pairs, and the pairs."""
    training = fabricate_repository(repository.tables, Fabrication(), 1, seed)
    graph, _, _ = column_graph(training.tables, edges=edges)
    test, pairs, similarities = column_graph(repository.tables, edges=edges)
    triplets = omnimatch.build_triplets(training.joins, training.non_joins)
    size = omnimatch.bucket(len(triplets))
    batch = {"triplet": jnp.asarray(np.pad(triplets, ((0, size - len(triplets)), (0, 0)))),
             "mask": jnp.arange(size) < len(triplets)}  # fmt: skip
    encoder = RGCNEncoder(len(RELATIONS))
    params = {"encoder": omnimatch.init_encoder(encoder, jax.random.key(seed), NUM_FEATURES)}
    objective, optimizer = omnimatch.triplet_objective(encoder), optax.adam(1e-3)

    def step(carry, number):
        params, moments = carry

        def value(params):
            context = Context(rng=jax.random.key(0), step=number, artefacts={"graph": graph})
            outputs, _ = objective.forward({"params": params}, batch, context)
            return reduce_mean(objective.loss(outputs, batch, context).elements)

        updates, moments = optimizer.update(jax.grad(value)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    params = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), jnp.arange(steps))[0][0])(params)
    return Recipe._scores(encoder, None, params, test, pairs), similarities, pairs


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the stand-in; repositories are paired by seed.

    The method's arm also says what becomes of it without edges, and of its lead over the best single similarity where
    no table pair has typos and where all have; the baseline's what the random forest reaches.
    """
    repository = joinable_repository(seed)
    pairs = cross_table_pairs(column_tables(repository.tables))
    labels = labels_of(pairs, repository.joins)
    if arm == "random scores":
        return omnimatch.join_metrics(np.random.default_rng(seed).random(len(pairs)), labels, pairs)
    if arm == "best single similarity":
        _, _, similarities = column_graph(repository.tables)
        alone = single_similarities(similarities, labels)
        found = omnimatch.join_metrics(similarities[:, RELATIONS.index(max(alone, key=alone.get))], labels, pairs)
        training = fabricate_repository(repository.tables, Fabrication(), 1, seed)
        known = np.concatenate([training.joins, training.non_joins])
        profiles = [column_profile(c) for c in column_cells(training.tables)]
        truth = np.arange(len(known)) < len(training.joins)
        forest = random_forest(pairwise_similarities(profiles, known), truth, similarities, seed)
        learnt = omnimatch.join_metrics(forest, labels, pairs)["average_precision"]
        return {**found, **{f"{n}_average_precision": v for n, v in alone.items()}, "forest_average_precision": learnt}
    if arm != "omnimatch":
        raise UserError(f"unknown arm {arm!r} of omnimatch's claim")
    found = omnimatch.join_metrics(trained_scores(repository, seed)[0], labels, pairs)
    bare = omnimatch.join_metrics(trained_scores(repository, seed, edges=False)[0], labels, pairs)
    found["no_edges_average_precision"] = bare["average_precision"]
    for share in (0.0, 1.0):
        other = joinable_repository(seed, share)
        scores, similarities, pairs = trained_scores(other, seed)
        labels = labels_of(pairs, other.joins)
        single = max(single_similarities(similarities, labels).values())
        lead = omnimatch.join_metrics(scores, labels, pairs)["average_precision"] - single
        found[f"lead_at_typo_share_{share:.0f}"] = lead
    return found


def benchmarks() -> list[Benchmark]:
    """A layer at the paper's sizes, the typed edges of a list of pairs, and similarities on the host."""
    nodes, relations, inputs, outputs, degree = 1024, 5, 256, 256, 3
    rng = np.random.default_rng(0)
    count = nodes * relations * degree
    src, dst = (jnp.asarray(rng.integers(0, nodes, count), jnp.int32) for _ in range(2))
    rel = jnp.asarray(rng.integers(0, relations, count), jnp.int32)
    x = jax.random.normal(jax.random.key(0), (nodes, inputs))
    layer = RelationalGraphConv(outputs, relations)
    params = layer.init(jax.random.key(1), x, src, dst, rel)
    params = unbox(params)
    weights = jax.tree.map(np.asarray, params["params"])

    def loop(params, x, src, dst, rel):
        out = np.asarray(x) @ weights["loop"] + weights["bias"]
        for r in range(relations):
            here = np.asarray(rel) == r
            sums = np.zeros((nodes, inputs), np.float32)
            np.add.at(sums, np.asarray(dst)[here], np.asarray(x)[np.asarray(src)[here]])
            out += sums @ weights["weight"][r]
        return out

    flops = 2.0 * nodes * (relations + 1) * inputs * outputs + 1.0 * count * inputs
    moved = 4.0 * (2 * count * inputs + nodes * relations * inputs + 2 * nodes * outputs)
    rows = [Benchmark(f"RelationalGraphConv {nodes} nodes, {count} edges, 256 x 256", layer.apply,
                      (params, x, src, dst, rel), flops, moved, {"numpy_loop": loop})]  # fmt: skip
    pairs = cross_table_pairs(np.arange(300) // 5)
    similarities = rng.random((len(pairs), relations)).astype(np.float32)
    edges = lambda p, s: omnimatch.topk_typed_edges(p, s, 300, 3)  # noqa: E731

    def edge_loop(p, s):
        near = [[] for _ in range(300)]
        for (u, v), row in zip(np.asarray(p).tolist(), np.asarray(s).tolist(), strict=True):
            near[u].append((v, row))
            near[v].append((u, row))
        return [[sorted(n, key=lambda x, r=r: -x[1][r])[:3] for r in range(relations)] for n in near]

    rows.append(Benchmark(f"topk_typed_edges of {len(pairs)} pairs, 5 relations", edges,
                          (jnp.asarray(pairs), jnp.asarray(similarities)), 2.0 * len(pairs) * relations * 16,
                          4.0 * (pairs.size + similarities.size), {"python_sort": edge_loop}))  # fmt: skip
    return rows


def example() -> dict:
    """The conformance row: triplets of a graph of 12 columns."""
    rng = np.random.default_rng(0)
    pairs = cross_table_pairs(np.arange(12) // 3)
    graph = omnimatch.typed_graph(rng.normal(size=(12, 6)).astype(np.float32), pairs,
                                  rng.random((len(pairs), 3)).astype(np.float32), 2)  # fmt: skip
    triplets = np.stack([rng.permutation(12)[:3] for _ in range(16)]).astype(np.int32)
    return {
        "objective": omnimatch.triplet_objective(RGCNEncoder(3, (8,), 8, relation_init="per_relation"), 0.5, graph),
        "batch": {"triplet": triplets, "index": np.arange(16, dtype=np.int32), "mask": np.ones(16, bool)},
        "optimizer": optax.adam(1e-2),
        "transform": None,
        "num_examples": 16,
    }
