"""Recipe: a retriever trained anew on resampled queries, and scored where it interpolates and where it extrapolates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.bm25 import BM25
from data.lsa import latent_semantic_words
from data.query_vectors import clustered_queries
from data.stream import DataError, arrays_fingerprint, training_stream
from trainers import recipe as base
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.retrieval import SPECIAL_IDS, Texts, encode_all, search, text_collection
from trainers.run import train_in_memory
from zoo.metrics import ranking
from zoo.nn.mlp import MLP
from zoo.nn.retriever import DenseRetriever, Towers, WeightedWords, query_tower, shared_towers
from zoo.retrieval import retrieval_extrapolation as method

METRICS = {"mrr": "MRR@10", "ndcg": "NDCG@10", "recall": "Recall@100"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Queries to train and to test with, documents, and the retriever.

    Attributes:
      train, test: inputs of the query encoder.
      train_vectors, test_vectors: of one fixed encoder, for resampling only.
      train_relevant, test_relevant: padded ids; test_grades beside the latter.
      documents: inputs of the document encoder.
      towers, edit: the retriever, and what is done to its fresh parameters.
      module: what is exported.
      fixed: ``{name: ids [test queries, 100]}`` of rankings that are not trained.
      fingerprint: of all data.
    """

    train: np.ndarray
    test: np.ndarray
    train_vectors: np.ndarray
    test_vectors: np.ndarray
    train_relevant: np.ndarray
    test_relevant: np.ndarray
    test_grades: np.ndarray
    documents: np.ndarray
    towers: Towers
    edit: Callable[[Any], Any]
    module: Any
    fixed: dict[str, np.ndarray]
    fingerprint: str
    train_ids: tuple[str, ...] = ()
    test_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Resamples queries, trains a dual encoder anew on each resampled set, and reports interpolation and extrapolation.

    resttest clusters all queries and leaves each cluster out of training once; restrain keeps a small test set and
    trains on the queries nearest to it and on as many that are far from it. The default is generated: vectors in five
    clusters with one smooth function from query to document. Texts: --data.name synonyms, or --data.path DIR with a
    BEIR, MS MARCO or Cranfield folder (BM25, which is not trained, then shows how hard each side's queries are).
    """

    data: Data = Data("clusters")
    """clusters (generated vectors), synonyms (generated texts), or --data.path with a folder of texts"""
    optimizer: Optimizer = Optimizer(learning_rate=3e-3)
    """optimiser of each training"""
    protocol: Literal["resttest", "restrain"] = "resttest"
    """resttest: leave one cluster out; restrain: nearest against distant training queries, for a small test set"""
    buckets: int = 5
    """resttest: clusters"""
    size: int = 400
    """restrain: queries in each training set"""
    test_size: int = 50
    """restrain: test queries kept (the first of the test split after shuffling)"""
    order: Literal["random", "least_similar"] = "random"
    """restrain: how distant queries are ordered"""
    metric: Literal["mrr", "ndcg", "recall"] = "mrr"
    """what is reported: MRR@10, NDCG@10 or Recall@100"""
    steps: int = 400
    """steps of each training"""
    batch_size: int = 64
    """queries per step; the others' documents are negatives"""
    temperature: float = 0.1
    """divides the scores in the loss"""
    width: int = 64
    """vectors: hidden units of the query tower; texts: dimension of the word vectors"""
    activation: Literal["relu", "tanh"] = "relu"
    """vectors: of the query tower (tanh is the generator's own)"""
    vocab_size: int = 4096
    """texts: ids of the tokenizer, at most"""
    query_length: int = 32
    """texts: tokens of a query"""
    document_length: int = 128
    """texts: tokens of a document"""

    def build(self) -> Run:
        """One training and one measurement for each resampled set."""
        for name in ("buckets", "size", "test_size", "steps", "batch_size", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise UserError(f"--temperature must be positive, got {self.temperature}")
        problem = self._vectors() if self.data.path is None and self.data.name == "clusters" else self._texts()
        try:
            method.check_embeddings(problem.train_vectors, problem.test_vectors, problem.train_ids, problem.test_ids)
            plan, chosen = self._plan(problem)
        except ValueError as error:
            text = str(error).replace("k must be", "--buckets must be").replace("sizes must be", "--size must be")
            raise UserError(text) from None
        towers, objective = problem.towers, method.in_batch_retriever(problem.towers, self.temperature)
        values = _measurement(problem, self.metric)
        start = lambda rng: {"params": problem.edit(towers.init(rng, problem.train[:1], problem.documents[:1]))}  # noqa: E731

        def init(rng):
            # every training starts from the same weights, kept among the constants
            return {**start(rng), "constants": {"start": start(rng)["params"]}}

        def restart(variables, artefacts, rng):
            return FitResult({"params": variables["constants"]["start"]})

        phases: list[Any] = []
        for name, rows, inside, outside in plan:
            stream = training_stream(_pairs(problem, rows), min(self.batch_size, len(rows)), self.seed)

            def measure(variables, artefacts, rng, name=name, inside=inside, outside=outside):
                found = values(variables["params"])[chosen]
                sides = {"interpolation": found[inside], "extrapolation": found[outside]}
                metrics = {k: float(v.mean()) for k, v in sides.items() if len(v)}
                # a saved artefact has at least one number
                kept = {k: np.append(v, np.nan) for k, v in sides.items()}
                return FitResult({}, {f"values_{name}": kept}, metrics)

            phases += [
                Fit(f"{name}_start", restart),
                Train(f"{name}_training", self.steps, objective, self.optimizer.build(self.steps), stream),
                Fit(name, measure),
            ]
        phases.append(Fit("report", self._report(problem, plan, chosen)))

        def export(variables, artefacts):
            own = {"params": variables["params"]["encoder"]}
            return Export(problem.module, own, {"inputs": "as in training", "trained_on": plan[-1][0]})

        figures = _figures([name for name, *_ in plan], METRICS[self.metric])
        return Run(phases, export, init, figures, problem.fingerprint, self._summary, steps_per_call=20)

    # --- resampling and reporting -------------------------------------------------------------------------------------

    def _plan(self, problem: Problem):
        """``(name, training rows, interpolation rows, extrapolation rows)`` of each training; and which test rows."""
        key = jax.random.key(self.seed)
        train, test = jnp.asarray(problem.train_vectors), jnp.asarray(problem.test_vectors)
        everything, nothing = np.arange(len(problem.test)), np.zeros(0, np.int32)
        if self.protocol == "resttest":
            runs = method.resttest_runs(*method.resttest(train, test, key, self.buckets))
            return [(f"without{n}", *run) for n, run in enumerate(runs)], everything
        chosen = np.sort(np.random.default_rng(self.seed).permutation(len(test))[: self.test_size])
        found = method.restrain(train, test[chosen], [self.size], key, self.order)
        all_of = np.arange(len(chosen))
        return [
            ("near", found.interpolation[0], all_of, nothing),
            ("far", found.extrapolation[0], nothing, all_of),
        ], chosen

    def _report(self, problem: Problem, plan, chosen):
        def fit(variables, artefacts, rng):
            sides = [artefacts[f"values_{name}"] for name, *_ in plan]
            rows = [tuple(np.asarray(s[k])[:-1] for k in ("interpolation", "extrapolation")) for s in sides]
            if self.protocol == "restrain":  # two trainings share one test set
                rows = [(rows[0][0], rows[1][1])]
            found = method.report(rows)
            metrics = {f: getattr(found, f) for f in found._fields if not f.startswith("per_")}
            overlap = method.label_overlap(
                jnp.asarray(problem.train_relevant), jnp.asarray(problem.test_relevant), len(problem.documents)
            )[0]
            metrics["label_overlap"] = float(overlap)
            near = method.max_similarity_to_test(jnp.asarray(problem.test_vectors), jnp.asarray(problem.train_vectors))
            metrics["mean_similarity_to_training"] = float(jnp.mean(near))
            for name, ids in problem.fixed.items():
                scores = _values(ids, problem, self.metric)[chosen]
                parts = [(scores[i], scores[o]) for _, _, i, o in plan]
                if self.protocol == "restrain":
                    parts = [(parts[0][0], parts[1][1])]
                fixed = method.report(parts)
                metrics |= {f"{name}_interpolation": fixed.interpolation, f"{name}_extrapolation": fixed.extrapolation}
            return FitResult({}, {}, metrics)

        return fit

    def _summary(self, metrics) -> str:
        text = (
            f"{METRICS[self.metric]}: interpolation {metrics['report/interpolation']:.3f}, extrapolation "
            f"{metrics['report/extrapolation']:.3f}, gap {metrics['report/gap']:+.3f}"
        )
        if "report/bm25_interpolation" in metrics:
            inside, outside = (metrics[f"report/bm25_{k}"] for k in ("interpolation", "extrapolation"))
            text += f" (BM25 on the same queries: {inside:.3f} and {outside:.3f})"
        return text

    # --- the two kinds of data ----------------------------------------------------------------------------------------

    def _vectors(self) -> Problem:
        data = clustered_queries(self.seed)
        x, vectors = data["queries"]["query"], data["documents"]["vector"]
        order = np.random.default_rng(self.seed).permutation(len(x))
        test, train = np.sort(order[: len(x) // 5]), np.sort(order[len(x) // 5 :])
        own = lambda rows: rows[:, None].astype(np.int32)  # noqa: E731
        module = MLP((self.width,), vectors.shape[1], dtype=jnp.dtype(self.dtype), activation=self.activation)
        return Problem(
            x[train], x[test], x[train], x[test], own(train), own(test), np.ones((len(test), 1), np.float32), vectors,
            query_tower(module), lambda params: params, module, {}, data.fingerprint,
        )  # fmt: skip

    def _texts(self) -> Problem:
        collection = text_collection(self.data, self.seed)
        texts = Texts.of(collection, self.query_length, self.document_length, self.vocab_size)
        train, test = collection.splits["train"], collection.splits["test"]
        size, pad = texts.tokenizer.vocab_size, texts.tokenizer.pad
        try:
            words, idf = latent_semantic_words(texts.documents, size, self.width, self.seed, SPECIAL_IDS)
        except DataError as error:
            raise UserError(f"--width {self.width}: {error}") from None
        module = DenseRetriever(WeightedWords(size, self.width), None, "mean", norm=False, pad_id=pad)

        def latent(params):
            own = params["encoder"]
            word = jax.tree.map(lambda _: jnp.asarray(words), own["body"]["word"])
            return {"encoder": {**own, "body": {"word": word, "weight": jnp.asarray(idf)}}}

        # resampling sees latent semantic vectors, which no training changes
        fixed = (words * idf[:, None])[texts.queries].sum(1)
        bm25 = BM25(collection.documents)
        ids = bm25.search([collection.queries[q] for q in test], min(100, bm25.size))[1]
        relevant, grades = texts.relevant(test)
        names = [tuple(collection.query_ids[q] for q in rows) for rows in (train, test)]
        return Problem(
            texts.queries[train], texts.queries[test], fixed[train], fixed[test], texts.relevant(train)[0], relevant,
            grades, texts.documents, shared_towers(module), latent, module, {"bm25": ids},
            f"{collection.fingerprint}-{arrays_fingerprint({'q': texts.queries})[:8]}", *names,
        )  # fmt: skip


def _pairs(problem: Problem, rows: np.ndarray) -> dict[str, np.ndarray]:
    """A row for each (query, relevant document) of the chosen training queries."""
    relevant = problem.train_relevant[rows]
    at, column = np.nonzero(relevant >= 0)
    ids = relevant[at, column]
    return {"query": problem.train[rows[at]], "document": problem.documents[ids], "document_id": ids.astype(np.int32)}


def _values(ids: np.ndarray, problem: Problem, metric: str) -> np.ndarray:
    """A value for each test query."""
    ids, relevant = jnp.asarray(ids), jnp.asarray(problem.test_relevant)
    if metric == "mrr":
        return np.asarray(ranking.mrr_at_k(ids, relevant, min(10, ids.shape[1])))
    if metric == "ndcg":
        return np.asarray(ranking.ndcg_at_k(ids, relevant, min(10, ids.shape[1]), jnp.asarray(problem.test_grades)))
    return np.asarray(ranking.recall_at_k(ids, relevant, ids.shape[1]))


def _measurement(problem: Problem, metric: str):
    """``params -> value of each test query``."""
    query, document = (
        jax.jit(lambda p, x, f=f: f(p, x, None)) for f in (problem.towers.query, problem.towers.document)
    )

    def values(params) -> np.ndarray:
        vectors = encode_all(document, params, problem.documents)
        return _values(search(encode_all(query, params, problem.test), vectors, 100), problem, metric)

    return values


def _figures(names: list[str], label: str):
    def draw(result, workdir: Path) -> None:
        from trainers import plots

        fig, axes = plots.figure(2, 1, (4.2, 3.2))
        left, right = axes[0]
        x = np.arange(len(names))
        for shift, side, colour in ((-0.2, "interpolation", "#3060a0"), (0.2, "extrapolation", "#b04030")):
            heights = [result.metrics.get(f"{n}/{side}", np.nan) for n in names]
            left.bar(x + shift, heights, 0.38, label=side, color=colour)
        left.set_xticks(x, names, fontsize=7)
        left.set_ylabel(label)
        left.legend(fontsize=7)
        left.grid(axis="y", alpha=0.25)
        left.set_title("each training", fontsize=9)
        rows = {"trained": "report/", "BM25": "report/bm25_"}
        rows = {k: v for k, v in rows.items() if f"{v}interpolation" in result.metrics}
        for i, (name, prefix) in enumerate(rows.items()):
            ends = [result.metrics[f"{prefix}{side}"] for side in ("interpolation", "extrapolation")]
            right.plot([0, 1], ends, "o-", label=name, color=["#202020", "#909090"][i])
            for at, value in enumerate(ends):
                right.annotate(f"{value:.3f}", (at, value), textcoords="offset points", xytext=(0, 6), fontsize=7)
        right.set_xticks([0, 1], ["interpolation", "extrapolation"])
        right.set_xlim(-0.3, 1.3)
        right.set_ylim(0, None)
        right.legend(fontsize=7)
        right.grid(alpha=0.25)
        right.set_title("mean over trainings", fontsize=9)
        plots.save(fig, workdir / "extrapolation.png")

    return draw


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "corpus": "texts: corpus.jsonl (BEIR), collection.tsv (MS MARCO) or cran.all.1400 (Cranfield)",
        "queries": "texts of training and test queries",
        "qrels": "relevant (query, document, grade) of both; see zoo train star_adore --data help",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim: ReSTTest's gap (interpolation minus extrapolation) on the generated clusters."""
    known = ("trained dual encoder", "well-specified dual encoder", "untrained dual encoder", "random ranking")
    if arm not in known:
        raise UserError(f"unknown arm {arm!r} of retrieval_extrapolation's claim")
    recipe = Recipe(seed=seed, activation="tanh" if arm.startswith("well") else "relu")
    problem = recipe._vectors()
    plan, _ = recipe._plan(problem)
    values, objective = _measurement(problem, "mrr"), method.in_batch_retriever(problem.towers, recipe.temperature)

    def train(rows, number):
        if arm == "random ranking":
            return np.random.default_rng([seed, number]).permuted(
                np.tile(np.arange(len(problem.documents), dtype=np.int32), (len(problem.test), 1)), axis=1
            )[:, :100]
        fresh = problem.towers.init(jax.random.key(seed), problem.train[:1], None)
        if arm == "untrained dual encoder":
            return fresh
        stream = training_stream(_pairs(problem, rows), recipe.batch_size, seed)
        tx = recipe.optimizer.build(recipe.steps)
        run = Run([Train("t", recipe.steps, objective, tx, stream)], export=None, init=lambda rng: {"params": fresh})
        return train_in_memory(run, 50, seed).variables["params"]

    def evaluate(model, rows):
        return (_values(model, problem, "mrr") if isinstance(model, np.ndarray) else values(model))[rows]

    found = method.evaluate_protocol(train, evaluate, [method.Run(*rest) for _, *rest in plan])
    return {"gap": -found.gap, "interpolation": found.interpolation, "extrapolation": found.extrapolation}


def benchmarks() -> list[Benchmark]:
    """The similarity pass against a NumPy loop over test queries."""
    n, m, d = 200_000, 100, 64
    train, test = jax.random.normal(jax.random.key(0), (n, d)), jax.random.normal(jax.random.key(1), (m, d))

    def loop(train, test):
        train, test = np.asarray(train), np.asarray(test)
        train = train / np.linalg.norm(train, axis=1, keepdims=True)
        best = np.full(len(train), -1.0)
        for row in test:
            best = np.maximum(best, train @ (row / np.linalg.norm(row)))
        return best

    return [Benchmark(f"largest similarity of {n} queries to {m} x {d}", method.max_similarity_to_test, (train, test),
                      2.0 * n * m * d, 4.0 * (n * d + m * d + n), {"numpy_loop": loop})]  # fmt: skip


def example() -> dict:
    """The conformance row: the in-batch retriever that the protocol trains."""
    import optax

    rng = np.random.default_rng(0)
    batch = {
        "query": rng.normal(size=(16, 5)).astype(np.float32),
        "document": rng.normal(size=(16, 4)).astype(np.float32),
        "document_id": np.repeat(np.arange(8, dtype=np.int32), 2),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    return {
        "objective": method.in_batch_retriever(query_tower(MLP((8,), 4)), 0.5),
        "batch": batch,
        "optimizer": optax.adam(1e-2),
        "transform": None,
        "num_examples": 16,
    }
