"""Recipe: scores of anchor queries become an index by CUR; its searches are measured call by call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.collections import read_collection
from data.score_matrices import low_rank_scores, read_score_matrix
from data.stream import DataError, arrays_fingerprint, training_stream
from data.text import Tokenizer
from trainers import recipe as base
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.score_matrix import fill_score_matrix
from trainers.score_recall import best, draw, overlap, recall_by_depth, recall_curves, recall_dip, svd_retriever
from trainers.token_pairs import TAGS, Pairs, generated_pairs, texts_as_pairs
from zoo.nn.bert import BERTConfig
from zoo.nn.cross_encoder import CrossEncoder, join_pairs
from zoo.nn.retriever import DenseRetriever, WeightedWords, shared_towers
from zoo.ops.search import mips_topk
from zoo.retrieval import anncur
from zoo.retrieval.anncur import CURConfig

BUDGETS = (20, 30, 50, 75, 100, 150, 200, 300, 500)
"""Calls of the exact scorer a query at which recall is reported."""

MATRIX, LIVE = "matrix", "live"
LABELS = {MATRIX: "score matrix", LIVE: "cross-encoder"}


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Predicts a scorer's scores of all items from those of a few, and counts what each search asks of the scorer.

    The default measures a generated matrix of scores (300 queries, 3000 items), then trains a small cross-encoder on
    generated token pairs (500 items), fills the anchor queries' rows with it and searches with counted calls.
    --data.path FILE.npy measures a matrix of your own [queries, items]; --data.path DIR (a BEIR, MS MARCO or Cranfield
    folder) trains a cross-encoder on its texts. The paper's models are --width 768 --depth 12 --optimizer.name adamw
    --optimizer.learning-rate 1e-5 --negatives 63 --query-length 128 --item-length 128.
    """

    data: Data = Data("standin")
    """standin (generated matrix, then generated pairs), matrix or pairs (one of them), or --data.path: a score matrix
    .npy [queries, items], or the folder of a text collection"""
    items: str = ""
    """for a score matrix: a text file with a line for each item"""
    anchor_queries: int = 100
    """k_q, queries whose scores of all items are computed beforehand"""
    anchor_items: int = 20
    """k_i, items that every new query is scored against"""
    num_rerank: int = 30
    """k_r, other items that are scored exactly for a query; k_i + k_r calls in all"""
    k: int = 10
    """items returned for a query"""
    rcond: float = 1e-3
    """singular values of the intersection below this share of the largest are cut; 1e-15 cuts none (released code)"""
    ridge: float = 0.0
    """Tikhonov regularisation, relative to the largest squared singular value"""
    embeddings: Literal["float32", "bfloat16"] = "float32"
    """how item embeddings are kept"""
    variant: Literal["paper", "official"] = "paper"
    """official: anchor items are not merged into the ranking, as in the released code"""
    test_queries: int = 200
    """queries searched for and measured, at most"""
    retriever_rank: int = 8
    """rank of the dual encoder that the figure compares with: an SVD of the scores plus noise"""
    retriever_noise: float = 1.0
    """standard deviation of that noise, as a share of the scores'"""
    head: Literal["cls", "emb"] = "emb"
    """cross-encoder: pooled first token, or product of the contextual vectors of mention and title"""
    width: int = 32
    """cross-encoder: width, a multiple of 16"""
    depth: int = 2
    """cross-encoder: layers"""
    loss: Literal["softmax", "hinge", "hinge_squared", "bce"] = "softmax"
    """cross-encoder: loss of a positive and its negatives"""
    negatives: int = 15
    """cross-encoder: negatives of each query, half of them BM25's best where there are texts"""
    train_steps: int = 300
    """cross-encoder: steps"""
    batch_size: int = 16
    """cross-encoder: queries per step"""
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, schedule="linear", warmup_steps=30, clip_norm=1.0)
    """cross-encoder: optimiser"""
    vocab_size: int = 6000
    """texts: ids of the tokenizer, at most"""
    query_length: int = 32
    """texts: tokens of a query, special ones included"""
    item_length: int = 64
    """texts: tokens of an item, special ones included"""
    block: int = 25
    """anchor queries scored in one resumable phase"""

    def build(self) -> Run:
        """The matrix, then the cross-encoder."""
        self._check_numbers()
        path = self.data.path
        folder = path is not None and Path(path).is_dir()
        if path is None and self.data.name not in ("standin", "matrix", "pairs"):
            raise UserError(
                f"--data.name {self.data.name!r} is unknown; use standin, matrix or pairs, or --data.path with a score "
                "matrix .npy or a collection's folder"
            )
        if self.items and (path is None or folder):
            raise UserError(f"--items {self.items} names the items of a score matrix: give --data.path FILE.npy")
        phases: list[Any] = []
        marks: list[str] = []
        pairs = module = None
        if path is None and self.data.name in ("standin", "matrix"):
            scores = low_rank_scores(self.seed)["queries"]["scores"]
            phases += self._matrix(scores)
            marks.append(arrays_fingerprint({"m": scores}))
        elif path is not None and not folder:
            scores, names = read_score_matrix(path, self.items or None)
            phases += self._matrix(scores)
            marks.append(arrays_fingerprint({"m": scores, "names": np.array(names, dtype=object)}))
        if folder or (path is None and self.data.name in ("standin", "pairs")):
            pairs = self._texts() if folder else generated_pairs(self.seed)
            module = self._module(pairs)
            phases += self._live(pairs, module)
            marks.append(pairs.fingerprint)

        def init(rng):
            if module is None:
                return {"params": {}}
            first = {"query": pairs.train[:1], "candidates": np.zeros((1, 2), np.int32)}
            return anncur.cross_encoder(module).init(rng, first)

        def export(variables, artefacts):
            part = MATRIX if module is None else LIVE
            index = {k.split("_", 1)[1]: v for k, v in artefacts.items() if k in (f"{part}_items", f"{part}_anchors")}
            facts: dict[str, Any] = {"scores": "index/items [N, k_i] times a query's scores of index/anchors [k_i]"}
            if module is None:
                config = CURConfig(self.anchor_queries, self.anchor_items, self.rcond, self.ridge)
                return Export(config, {"index": index}, facts)
            facts |= {"inputs": "ids of [CLS] query [SEP] and item [SEP], padded each; see join_pairs"}
            beside = None if pairs.tokenizer is None else _write_tokenizer(pairs.tokenizer)
            return Export(module, {"params": variables["params"], "index": index}, facts, beside)

        steps = 10 if module is not None else 1
        return Run(phases, export, init, _figures, "-".join(marks), _summary, steps_per_call=steps)

    # --- phases -------------------------------------------------------------------------------------------------------

    def _matrix(self, scores: np.ndarray) -> list[Any]:
        queries, items = scores.shape
        anchors, test = self._split(queries, items, queries - 1, "the queries of the matrix less one to search for")
        rows = np.asarray(scores[anchors], np.float32)
        exact = np.asarray(scores[test], np.float32)

        def measure(variables, artefacts, rng):
            index = anncur.CURIndex(jnp.asarray(artefacts["matrix_items"]), jnp.asarray(artefacts["matrix_anchors"]))
            return self._measure(MATRIX, rows, exact, index, table_scorer, (jnp.asarray(exact),), rng)

        return [Fit("matrix_index", lambda v, a, rng: self._index(MATRIX, rows, rng)), Fit("matrix_search", measure)]

    def _live(self, pairs: Pairs, module: CrossEncoder) -> list[Any]:
        items = jnp.asarray(pairs.items)
        objective = anncur.cross_encoder(module, self.loss)
        rng = np.random.default_rng(self.seed + 1)
        again = max(1, min(20, -(-self.train_steps * self.batch_size // len(pairs.train))))
        candidates = np.concatenate([pairs.candidates(self.negatives, rng) for _ in range(again)])
        stream = training_stream(
            {"query": np.tile(pairs.train, (again, 1)), "candidates": candidates}, self.batch_size, self.seed
        )
        anchors, _ = self._split(len(pairs.train), len(items), len(pairs.train), "the training queries")
        test = pairs.test[: self.test_queries]

        def scorer(frozen, queries, ids):
            def score(queries, items):
                joined = join_pairs(queries, items, module.pad_id)
                return module.apply({"params": frozen["params"]}, *joined)["scores"]

            return anncur.pair_scorer(score, frozen["items"])(queries, ids)

        def fill(queries, variables):
            frozen = {"params": variables["params"], "items": items}
            return fill_score_matrix(scorer, frozen, queries, len(items), rows=self.block)

        def rows_of(start):
            part = pairs.train[anchors[start : start + self.block]]
            name = f"rows_{start // self.block}"
            calls = {"scorer_calls": len(part) * len(items)}
            return Fit(name, lambda v, a, rng: FitResult({}, {name: fill(part, v)}, calls))

        blocks = [rows_of(start) for start in range(0, len(anchors), self.block)]

        def whole(artefacts):
            return np.concatenate([np.asarray(artefacts[b.name]) for b in blocks])

        def measure(variables, artefacts, rng):
            index = anncur.CURIndex(jnp.asarray(artefacts["live_items"]), jnp.asarray(artefacts["live_anchors"]))
            exact = fill(test, variables)
            frozen = {"params": variables["params"], "items": items}
            found = self._measure(LIVE, whole(artefacts), exact, index, scorer, (frozen, jnp.asarray(test)), rng)
            if pairs.positive is not None:
                first = np.mean(np.argmax(exact, 1) == pairs.positive[: len(test)])
                found.metrics["exact_accuracy"] = float(first)
            return found

        return [
            Fit("texts", lambda v, a, rng: FitResult({}, {"items": pairs.items}, {"items": len(items)})),
            Train("cross_encoder", self.train_steps, objective, self.optimizer.build(self.train_steps), stream),
            *blocks,
            Fit("live_index", lambda v, a, rng: self._index(LIVE, whole(a), rng)),
            Fit("live_search", measure),
        ]

    def _index(self, part: str, rows: np.ndarray, rng) -> FitResult:
        chosen = anncur.sample_anchors(rng, rows.shape[1], self.anchor_items)
        index = _fit(jnp.asarray(rows), chosen, self.rcond, self.ridge, self.embeddings)
        kept = np.asarray(index.item_embeddings.astype(jnp.float32))
        metrics = {"items": rows.shape[1], "bytes_per_item": index.item_embeddings.nbytes // rows.shape[1]}
        return FitResult({}, {f"{part}_items": kept, f"{part}_anchors": np.asarray(index.anchor_items)}, metrics)

    def _measure(self, part, rows, exact, index, scorer, arguments, rng) -> FitResult:
        # arguments: what the scorer reads, and the queries' arrays last
        n, truth = exact.shape[1], np.asarray(jax.lax.top_k(jnp.asarray(exact), self.k)[1])
        index = index.replace(item_embeddings=index.item_embeddings.astype(self.embeddings))
        queries = arguments[-1] if part == LIVE else {"row": arguments[-1]}

        def search(frozen, queries, index):
            score = lambda q, ids: scorer(frozen, q, ids)  # noqa: E731
            return anncur.cur_search(score, queries, index, self.k, self.num_rerank, self.variant)

        found = jax.jit(search)(arguments[0] if part == LIVE else None, queries, index)
        ids = np.asarray(found.ids)
        own = jnp.asarray(exact[:, np.asarray(index.anchor_items)])
        metrics = {
            "recall": overlap(ids, truth),
            "recall_at_1": float(np.mean(ids[:, 0] == truth[:, 0])),
            "scorer_calls_per_query": float(np.mean(np.asarray(found.scorer_calls))),
            "relative_error": float(_error(own, index, jnp.asarray(exact))),
        }
        budgets = [b for b in BUDGETS if self.k < b <= n]
        curves = recall_curves(rows, exact, truth, budgets, self.retriever_rank, self.retriever_noise, self.rcond, rng)
        for name, curve in curves.items():
            at = int(np.argmin([abs(b - self.anchor_items - self.num_rerank) for b in budgets]))
            metrics[f"{name.replace(' ', '_')}_recall"] = float(curve[at])
        dip = recall_dip(rows, exact, truth, self.num_rerank, (1e-15, 1e-3), rng)
        kept = {"budgets": np.array(budgets), "curves": np.stack(list(curves.values())), **dip,
                "names": np.frombuffer("\n".join(curves).encode(), np.uint8).copy()}  # fmt: skip
        return FitResult({}, {f"{part}_figure": kept, f"{part}_found": {"ids": ids, "exact": truth}}, metrics)

    # --- data and settings --------------------------------------------------------------------------------------------

    def _split(self, queries: int, items: int, most: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        # anchor queries, and others
        if self.anchor_queries > most:
            raise UserError(f"--anchor-queries {self.anchor_queries} is more than {most}, {what}")
        for name in ("anchor_items", "num_rerank"):
            if getattr(self, name) > items:
                value = getattr(self, name)
                raise UserError(f"--{name.replace('_', '-')} {value} is more than the {items} items there are")
        order = np.random.default_rng(self.seed).permutation(queries)
        return np.sort(order[: self.anchor_queries]), np.sort(order[self.anchor_queries :][: self.test_queries])

    def _check_numbers(self) -> None:
        for name in ("anchor_queries", "anchor_items", "num_rerank", "k", "test_queries", "retriever_rank", "depth",
                     "negatives", "train_steps", "batch_size", "block"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.k > self.num_rerank:
            raise UserError(
                f"asked for top-{self.k} but only {self.num_rerank} items are re-ranked: raise --num-rerank"
            )
        for name in ("rcond", "ridge", "retriever_noise"):
            if not 0 <= getattr(self, name) < np.inf:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if self.rcond >= 1:
            raise UserError(f"--rcond must be below 1 (it would cut every singular value), got {self.rcond}")
        if self.width < 16 or self.width % 16:
            raise UserError(f"--width must be a positive multiple of 16 (heads of 16), got {self.width}")

    def _module(self, pairs: Pairs) -> CrossEncoder:
        longest = pairs.train.shape[1] + pairs.items.shape[1]
        config = BERTConfig(pairs.vocab_size, self.width, self.depth, self.width // 16, 4 * self.width, longest, 2)
        return CrossEncoder(config, self.head, pairs.tags, pairs.pad, jnp.dtype(self.dtype))

    def _texts(self) -> Pairs:
        collection = read_collection(self.data.path)
        try:
            tokenizer = Tokenizer.train(collection.documents, self.vocab_size, special=TAGS)
        except DataError as error:
            raise UserError(str(error).replace("vocab_size", "--vocab-size")) from None
        return texts_as_pairs(collection, tokenizer, self.query_length, self.item_length)


def _write_tokenizer(tokenizer: Tokenizer):
    def write(folder) -> None:
        (Path(folder) / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.write(Path(folder) / "tokenizer" / "tokenizer.json")

    return write


# --- measuring --------------------------------------------------------------------------------------------------------

_fit = jax.jit(anncur.cur_fit, static_argnums=4)
_error = jax.jit(anncur.relative_error)


def table_scorer(frozen: Any, queries: Mapping[str, Any], ids: Any) -> Any:
    """Scores looked up in ``queries["row"]`` ``[b, N]``, as if they were computed."""
    return jnp.take_along_axis(queries["row"], ids, 1)


def _summary(metrics: Mapping[str, float]) -> str:
    parts = []
    for part, label in LABELS.items():
        own = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith(f"{part}_search/")}
        if own:
            others = [
                f"{n} {own[n.replace(' ', '_') + '_recall']:.3f}" for n in ("dual encoder", "item mean", "random")
            ]
            parts.append(
                f"{label}: {own['recall']:.3f} of the exact top items found by {own['scorer_calls_per_query']:.0f} "
                f"calls a query instead of {metrics[f'{part}_index/items']:.0f} ({', '.join(others)})"
            )
    return "; ".join(parts)


def _figures(result, workdir: Path) -> None:
    made = {
        label: (result.artefacts[f"{part}_figure"], np.asarray(result.artefacts[f"{part}_found"]["exact"]).shape[1])
        for part, label in LABELS.items()
        if f"{part}_figure" in result.artefacts
    }
    draw(made, workdir / "recall.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "scores": "float [queries, items], no NaN (a .npy file): exact scores; --items names them, one a line",
        "corpus": "or texts: corpus.jsonl (BEIR), collection.tsv (MS MARCO) or cran.all.1400 (Cranfield), with titles",
        "queries": "texts: queries.jsonl, queries.tsv or queries.SPLIT.tsv, cran.qry",
        "qrels": "relevant (query, document, grade), to train the cross-encoder on",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the brief's stand-in: 100 anchor queries, the other 200 are searched for."""
    scores = low_rank_scores(seed)["queries"]["scores"]
    order = np.random.default_rng(seed).permutation(len(scores))
    rows, exact = scores[order[:100]], scores[order[100:]]
    key, found = jax.random.key(seed), {}
    for k, k_i, k_r in ((10, 20, 30), (50, 20, 100)):
        truth, calls, free = best(exact, k), k_i + k_r, np.array([], int)
        if arm == "cur":
            index = _fit(jnp.asarray(rows), anncur.sample_anchors(key, exact.shape[1], k_i), 1e-3, 0.0, "float32")
            search = jax.jit(lambda q, i, k=k, k_r=k_r: anncur.cur_search(functools.partial(table_scorer, None), q, i,
                             k, k_r))  # fmt: skip
            result = search({"row": jnp.asarray(exact)}, index)
            assert int(jnp.max(result.scorer_calls)) == calls
            found[f"recall_{k}_at_{calls}_calls"] = overlap(np.asarray(result.ids), truth)
            continue
        if arm == "rank-limited dual encoder":
            ranked = svd_retriever(exact, 8, 1.0, seed, rows)
        elif arm == "item mean":
            ranked = np.broadcast_to(rows.mean(0), exact.shape)
        elif arm == "random candidates":
            ranked = np.random.default_rng(seed + 1).random(exact.shape)
        else:
            raise UserError(f"unknown arm {arm!r} of anncur's claim")
        found[f"recall_{k}_at_{calls}_calls"] = float(recall_by_depth(best(ranked, calls), truth, free)[-1])
    return found


def benchmarks() -> list[Benchmark]:
    """Fitting and predicting at 100 000 items, against NumPy."""
    k_q, k_i, n, b = 200, 100, 100_000, 32
    key = jax.random.split(jax.random.key(0), 4)
    rows = jax.random.normal(key[0], (k_q, 40)) @ jax.random.normal(key[1], (40, n))
    anchors = anncur.sample_anchors(key[2], n, k_i)
    index = _fit(rows, anchors, 1e-3, 0.0, "float32")
    own = jax.random.normal(key[3], (b, k_i))

    def numpy_fit(rows, anchors):
        rows, anchors = np.asarray(rows), np.asarray(anchors)
        return np.linalg.pinv(rows[:, anchors], 1e-3) @ rows

    def numpy_search(own, index):
        scores = np.asarray(own) @ np.asarray(index.item_embeddings).T
        return np.argpartition(-scores, 100, 1)[:, :100]

    predict = lambda own, index: mips_topk(own, index.item_embeddings, 100)  # noqa: E731
    fit = lambda rows, anchors: anncur.cur_fit(rows, anchors).item_embeddings  # noqa: E731
    return [
        Benchmark(f"cur_fit, {k_q} anchor queries, {k_i} of {n} items", fit, (rows, anchors),
                  2.0 * k_q * k_i * (n + k_i), 4.0 * n * (k_q + k_i), {"numpy": numpy_fit}),
        Benchmark(f"first stage, {b} queries, top 100 of {n} x {k_i}", predict, (own, index), 2.0 * b * n * k_i,
                  4.0 * n * k_i, {"numpy_argpartition": numpy_search}),
    ]  # fmt: skip


def example() -> dict:
    """The conformance rows: a cross-encoder in training, the same with the other head and loss, and a distillation."""
    rng = np.random.default_rng(0)
    words = lambda *shape: rng.integers(6, 20, shape).astype(np.int32)  # noqa: E731
    queries, items = words(16, 7), words(9, 5)
    queries[:, 0], queries[:, 2], queries[:, 4], queries[:, 6] = 1, 3, 4, 2
    items[:, 2], items[:, 4] = 5, 2
    queries[::3, 5], queries[::3, 6], items[::2, 3], items[::2, 4] = 2, 0, 2, 0
    candidates = np.stack([rng.permutation(9)[:4] for _ in range(16)]).astype(np.int32)
    candidates[::4, 3] = -1
    batch = {"query": queries, "candidates": candidates, "index": np.arange(16, dtype=np.int32),
             "mask": np.ones(16, bool)}  # fmt: skip
    config = BERTConfig(20, 16, 1, 2, 16, 12, 2)
    # not Adam: it scales up the rounding noise of the keys' biases, whose gradient is zero
    shared = {"batch": batch, "optimizer": optax.sgd(3e-2), "transform": None, "num_examples": 16,
              "artefacts": {"items": items}}  # fmt: skip
    emb = anncur.cross_encoder(CrossEncoder(config, "emb", (3, 4, 5)))
    cls = anncur.cross_encoder(CrossEncoder(config, "cls"), "bce")
    towers = shared_towers(DenseRetriever(WeightedWords(20, 6), None, "mean"))
    scores = rng.normal(size=(16, 4)).astype(np.float32)
    return {
        **shared, "objective": emb,
        "also": {
            "cls": {**shared, "objective": cls},
            "distil": {**shared, "objective": anncur.distil(towers), "batch": {**batch, "scores": scores}},
        },
    }  # fmt: skip
