"""Recipe: a dense retriever from random negatives over STAR to ADORE, measured beside BM25 at each stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.bm25 import BM25
from data.lsa import latent_semantic_words
from data.query_vectors import warped_queries
from data.stream import DataError, arrays_fingerprint, training_stream
from data.text import Tokenizer
from trainers import recipe as base
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.retrieval import SPECIAL_IDS, Texts, encode_all, figures_table, ranking_figures, search, text_collection
from trainers.run import train_in_memory
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.mlp import MLP
from zoo.nn.retriever import DenseRetriever, Towers, WeightedWords, query_tower, shared_towers
from zoo.ops.search import mips_topk
from zoo.retrieval import star_adore

EXTRA = 10
"""Documents mined beyond those kept, beside the most positives a query has."""


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains one encoder for queries and documents (STAR), then the query encoder alone against a frozen index (ADORE).

    Phases: warm-up against random negatives; as many steps again as STAR takes against random negatives, for
    comparison; mining with the warmed-up model; STAR from the warmed-up model; the corpus encoded once; ADORE. Every
    stage is measured on the test queries, BM25 beside it (ranking.png, ranking.txt).

    The default is a generated language with synonyms. Real data: --data.path DIR with a BEIR, MS MARCO or Cranfield
    folder. The paper's setting is --encoder bert --backbone DIR (zoo import roberta-base --to DIR, or the released
    ANCE, STAR or ADORE) --optimizer.name lamb --optimizer.learning-rate 1e-4 --batch-size 256 --query-length 24
    --document-length 120 --star-steps 50000 --adore-optimizer.name adamw --adore-optimizer.learning-rate 5e-6.
    """

    data: Data = Data("synonyms")
    """synonyms (generated), or --data.path with a folder: BEIR, MS MARCO or Cranfield files"""
    encoder: Literal["words", "bert"] = "words"
    """words: weighted averages of word vectors; bert: a transformer (its first token)"""
    backbone: str = ""
    """bert: folder of an imported text encoder, whose weights, configuration and tokenizer are used; of a dense
    retriever (ANCE, STAR, ADORE) the projection and the norm too"""
    start: Literal["lsa", "random"] = "lsa"
    """words: begin with latent semantic vectors of the corpus and inverse document frequencies, or at random"""
    width: int = 128
    """dimension of the word vectors and of the encoder's output; with a backbone, its own"""
    depth: int = 2
    """bert without a backbone: layers"""
    tokenizer: Literal["wordpiece", "byte"] = "wordpiece"
    """kind of tokenizer, trained on the corpus (a backbone brings its own)"""
    vocab_size: int = 6000
    """ids of that tokenizer, at most"""
    query_length: int = 32
    """tokens of a query, special ones included"""
    document_length: int = 256
    """tokens of a document, special ones included"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, schedule="linear", warmup_steps=20)
    """optimiser of warm-up and STAR"""
    adore_optimizer: Optimizer = Optimizer(learning_rate=3e-4, schedule="linear", warmup_steps=20)
    """optimiser of ADORE"""
    epochs: int = 20
    """passes over the training queries in each training whose steps are not given"""
    warmup_steps: int = -1
    """steps against random negatives before mining; -1 for --epochs passes, 0 for none"""
    star_steps: int = -1
    """steps of STAR; -1 for --epochs passes"""
    adore_steps: int = -1
    """steps of ADORE; -1 for --epochs passes, 0 stops after STAR"""
    batch_size: int = 32
    """queries per step"""
    hard: int = 1
    """mined negatives drawn for each query of a STAR batch"""
    mined: int = 100
    """negatives kept for each training query (the paper's 200)"""
    random_weight: float = 0.0
    """weight of STAR's in-batch term against its hard term; 0 pools all pairs, as the released code does"""
    top_k: int = 100
    """documents that ADORE retrieves for each query in each step (the paper's 200)"""
    metric_cut: int = 200
    """rank beyond which a document is worth nothing to ADORE's metric"""
    compare: bool = True
    """also rank by BM25, and train STAR's number of steps against random negatives"""

    def build(self) -> Run:
        """The phases of the pipeline."""
        self._check_numbers()
        collection = text_collection(self.data, self.seed)
        given, weights, tokenizer = self._backbone()
        texts = Texts.of(
            collection, self.query_length, self.document_length, self.vocab_size, self.tokenizer, tokenizer
        )
        self._check(texts)
        module, start = self._encoder(texts, given, weights)
        towers = shared_towers(module)
        train, test = collection.splits["train"], collection.splits["test"]
        positives = texts.relevant(train)[0]
        corpus, asked = texts.documents, texts.queries[train]
        stream = training_stream({"query": asked, "positives": positives}, self.batch_size, self.seed)
        measure = _measurement(towers, texts, test)
        passes = self.epochs * stream.steps_per_epoch
        warmup_steps, star_steps, adore_steps = (
            passes if n < 0 else n for n in (self.warmup_steps, self.star_steps, self.adore_steps)
        )
        encode = jax.jit(lambda p, x: towers.document(p, x))

        def init(rng):
            params = towers.init(rng, jnp.asarray(asked[:1]), None)
            return {"params": start(params)}

        def begin(variables, artefacts, rng):
            found = {}
            if self.compare:
                ids = BM25(collection.documents).search([collection.queries[q] for q in test], min(100, len(corpus)))[1]
                found = {f"bm25_{k}": v for k, v in ranking_figures(ids, *texts.relevant(test)).items()}
            found |= {f"untrained_{k}": v for k, v in measure(variables["params"], variables["params"]).items()}
            return FitResult({}, {"corpus": corpus}, {"documents": len(corpus), "train_queries": len(train), **found})

        def keep(variables, artefacts, rng):
            kept = {**variables.get("constants", {}), "warm": variables["params"]}
            return FitResult({"constants": kept}, {}, measure(variables["params"], variables["params"]))

        def back(variables, artefacts, rng):
            found = measure(variables["params"], variables["params"])
            return FitResult({"params": variables["constants"]["warm"]}, {}, found)

        def mine(variables, artefacts, rng):
            vectors = encode_all(encode, variables["params"], corpus)
            queries = encode_all(encode, variables["params"], asked)
            deep = min(len(corpus), self.mined + positives.shape[1] + EXTRA)
            found = search(queries, vectors, deep)
            table = np.asarray(star_adore.clean_negatives(jnp.asarray(found), jnp.asarray(positives), self.mined))
            short = int((table < 0).any(1).sum())
            if short:
                first = collection.query_ids[train[np.flatnonzero((table < 0).any(1))[0]]]
                raise UserError(
                    f"--mined {self.mined} negatives are more than the corpus has for {short} training queries (first: "
                    f"query {first}); use a smaller number"
                )
            return FitResult({}, {"negatives": table}, {"negatives": table.size})

        def freeze(variables, artefacts, rng):
            vectors = encode_all(encode, variables["params"], corpus)
            constants = {"documents": variables["params"]}
            found = measure(variables["params"], variables["params"], vectors)
            return FitResult({"constants": constants}, {"index": vectors}, found)

        def last(variables, artefacts, rng):
            return FitResult({}, {}, measure(variables["params"], None, artefacts["index"]))

        weight = self.random_weight or None
        random = star_adore.star(towers, "random", in_batch=False, name="random negatives")
        hard = star_adore.star(towers, "hard", True, self.hard, weight)
        optimizer = self.optimizer.build(star_steps)
        phases: list[Any] = [Fit("start", begin)]
        if warmup_steps:
            tx = self.optimizer.build(warmup_steps)
            phases.append(Train("warmup", warmup_steps, random, tx, stream))
        if self.compare:
            phases += [
                Fit("warm", keep),
                Train("random_training", star_steps, random, optimizer, stream),
                Fit("random", back),
            ]
        phases += [
            Fit("mine", mine),
            Train("star_training", star_steps, hard, optimizer, stream),
            Fit("star", freeze),
        ]
        if adore_steps:
            dynamic = star_adore.adore(towers, self.top_k, self.metric_cut)
            tx = self.adore_optimizer.build(adore_steps)
            phases += [
                Train("adore_training", adore_steps, dynamic, tx, stream, sharded=("index",)),
                Fit("adore", last),
            ]

        def export(variables, artefacts):
            own = {"params": variables["params"]["encoder"], "constants": variables["constants"]}
            facts = {
                "inputs": "token ids; queries by params, documents by constants/documents/encoder",
                "query_length": self.query_length,
                "document_length": self.document_length,
            }
            return Export(module, own, facts, _write_tokenizer(texts.tokenizer))

        fingerprint = f"{collection.fingerprint}-{arrays_fingerprint({'d': texts.documents, 'q': texts.queries})[:8]}"
        return Run(phases, export, init, _figures, fingerprint, _summary, steps_per_call=5)

    # --- settings -----------------------------------------------------------------------------------------------------

    def _check_numbers(self) -> None:
        for name in ("width", "depth", "epochs", "batch_size", "hard", "mined", "top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "star_steps", "adore_steps"):
            least = 1 if name == "star_steps" else 0
            if getattr(self, name) < least and getattr(self, name) != -1:
                text = f"--{name.replace('_', '-')} must be at least {least}, or -1 for --epochs passes"
                raise UserError(f"{text}; got {getattr(self, name)}")
        if not self.random_weight >= 0:
            raise UserError(f"--random-weight must not be negative, got {self.random_weight}")
        if self.metric_cut < 1:
            raise UserError(f"--metric-cut must be a positive int (0 would zero the loss), got {self.metric_cut}")
        if self.backbone and self.encoder != "bert":
            raise UserError(f"--backbone {self.backbone} needs --encoder bert")
        self.adore_optimizer.build(max(1, self.adore_steps))

    def _check(self, texts: Texts) -> None:
        n = len(texts.documents)
        if not 1 <= self.top_k <= n:
            raise UserError(f"--top-k {self.top_k} must be in [1, {n}], the number of documents")
        if self.mined >= n:
            raise UserError(f"--mined {self.mined} must be below {n}, the number of documents")

    def _backbone(self) -> tuple[Any, Any, Tokenizer | None]:
        if not self.backbone:
            return None, None, None
        from checkpoints.arrays import one_line
        from checkpoints.model import ModelError, load_model

        try:
            model = load_model(self.backbone)
            whole = model.definition if isinstance(model.definition, DenseRetriever) else None
            body = model.definition if whole is None else whole.body
            if not isinstance(body, BERT):
                kind = type(model.definition).__name__ + ("" if whole is None else f" over {type(body).__name__}")
                raise UserError(f"--backbone {self.backbone} is a {kind}; a text encoder (BERT, RoBERTa) is needed")
            tokenizer = Tokenizer.of(model.tokenizer(), f"--backbone {self.backbone}: its tokenizer")
        except (ModelError, OSError) as error:
            raise UserError(f"--backbone {self.backbone}: {one_line(error)}") from None
        except DataError as error:
            raise UserError(str(error)) from None
        dtype, pad = jnp.dtype(self.dtype), tokenizer.pad
        config = dataclasses.replace(body.config, head="none", pooler=False, next_sentence=False)
        if whole is None:
            module = DenseRetriever(BERT(config, dtype), None, "first", pad_id=pad, dtype=dtype)
            return module, {"body": model.variables["params"]}, tokenizer
        if whole.pad_id != pad:
            raise UserError(f"--backbone {self.backbone} pads with {whole.pad_id}, but its tokenizer with {pad}")
        module = DenseRetriever(BERT(config, dtype), whole.features, whole.pooling, whole.norm, pad, dtype)
        return module, model.variables["params"], tokenizer

    def _encoder(self, texts: Texts, module: Any, weights: Any):
        pad, dtype, size = texts.tokenizer.pad, jnp.dtype(self.dtype), texts.tokenizer.vocab_size
        same = lambda params: params  # noqa: E731
        if module is not None:
            config = module.body.config
            longest = config.max_positions - (0 if config.pad_id is None else config.pad_id + 1)
            if max(self.query_length, self.document_length) > longest:
                raise UserError(f"the backbone reads {longest} tokens: lower --document-length or --query-length")

            def loaded(params):
                own = params["encoder"]
                parts = {**own, "body": {k: weights["body"][k] for k in own["body"]}}
                parts |= {k: weights[k] for k in own if k in weights and k != "body"}
                # the weights take the places of the fresh ones, inside the boxes that name their axes
                known = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(parts))
                if jax.tree.map(jnp.shape, known) != jax.tree.map(jnp.shape, own):
                    raise UserError(f"--backbone {self.backbone}: its weights do not fit its configuration")
                return {"encoder": known}

            return module, loaded
        if self.encoder == "bert":
            if self.width % 32:
                raise UserError(f"--width {self.width} must be a multiple of 32 for --encoder bert (heads of 32)")
            config = BERTConfig(
                size, self.width, self.depth, self.width // 32, 4 * self.width,
                max(self.query_length, self.document_length), 0, pooler=False,
            )  # fmt: skip
            return DenseRetriever(BERT(config, dtype), None, "mean", pad_id=pad, dtype=dtype), same
        module = DenseRetriever(WeightedWords(size, self.width, dtype), None, "mean", pad_id=pad, dtype=dtype)
        if self.start == "random":
            return module, same
        try:
            vectors, idf = latent_semantic_words(texts.documents, size, self.width, self.seed, SPECIAL_IDS)
        except DataError as error:
            raise UserError(f"--width {self.width} with --start lsa: {error}") from None

        def latent(params):
            own = params["encoder"]
            word = jax.tree.map(lambda _: jnp.asarray(vectors), own["body"]["word"])
            return {"encoder": {**own, "body": {"word": word, "weight": jnp.asarray(idf)}}}

        return module, latent


def _measurement(towers: Towers, texts: Texts, test: np.ndarray):
    """``(query parameters, document parameters, document vectors or None) -> figures`` on the test queries."""
    relevant, grades = texts.relevant(test)
    query, document = (jax.jit(lambda p, x, f=f: f(p, x)) for f in (towers.query, towers.document))

    def measure(own, documents, vectors=None) -> dict[str, float]:
        vectors = encode_all(document, documents, texts.documents) if vectors is None else vectors
        return ranking_figures(search(encode_all(query, own, texts.queries[test]), vectors, 100), relevant, grades)

    return measure


def _write_tokenizer(tokenizer: Tokenizer):
    def write(folder) -> None:
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.write(Path(folder) / "tokenizer" / "tokenizer.json")

    return write


STAGES = {"start/bm25_": "BM25", "start/untrained_": "before training", "random/": "random negatives", "star/": "STAR",
          "adore/": "ADORE"}  # fmt: skip


def _table(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    rows = {}
    for prefix, label in STAGES.items():
        own = {k[len(prefix) :]: v for k, v in metrics.items() if k.startswith(prefix)}
        own = {k: own[k] for k in ("mrr_at_10", "ndcg_at_10", "map_at_100", "recall_at_100") if k in own}
        if own:
            rows[label] = own
    return rows


def _summary(metrics: Mapping[str, float]) -> str:
    parts = [f"{label} {row['mrr_at_10']:.3f}" for label, row in _table(metrics).items()]
    return "MRR@10 on the test queries: " + ", ".join(parts)


def _figures(result, workdir: Path) -> None:
    from trainers import plots

    rows = _table(result.metrics)
    (workdir / "ranking.txt").write_text(figures_table(rows) + "\n")
    names = {"mrr_at_10": "MRR@10", "ndcg_at_10": "NDCG@10", "map_at_100": "MAP@100", "recall_at_100": "Recall@100"}
    fig, axes = plots.figure(1, 1, (6.4, 3.4))
    axis, wide = axes[0, 0], 0.8 / len(rows)
    colours = ["#909090", "#c8c8c8", "#d09040", "#3060a0", "#b04030"]
    for i, (label, row) in enumerate(rows.items()):
        at = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * wide
        bars = axis.bar(at, [row[k] for k in names], wide * 0.95, label=label, color=colours[i % 5])
        axis.bar_label(bars, fmt="%.2f", fontsize=5.5)
    axis.set_xticks(range(len(names)), list(names.values()))
    axis.set_ylim(0, 1.05)
    axis.legend(fontsize=7, ncols=len(rows), loc="upper left")
    axis.grid(axis="y", alpha=0.25)
    axis.set_title("test queries, whole corpus ranked", fontsize=9)
    plots.save(fig, workdir / "ranking.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "corpus": "texts: corpus.jsonl (BEIR), collection.tsv (MS MARCO) or cran.all.1400 (Cranfield)",
        "queries": "texts: queries.jsonl, queries.tsv or queries.SPLIT.tsv, cran.qry",
        "qrels": "relevant (query, document, grade): qrels/SPLIT.tsv, qrels.SPLIT.tsv or cranqrel; without a training "
        "split every third judged query is for testing",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the brief's stand-in: a query MLP over frozen vectors, the same warm-up in all arms."""
    if arm not in ("adore", "random negatives", "static hard negatives", "warm-up only"):
        raise UserError(f"unknown arm {arm!r} of star_adore's claim")
    data, steps, k = warped_queries(seed), 600, 50
    vectors, train, test = data["documents"]["vector"], data["train"], data["test"]
    towers = query_tower(MLP((64,), vectors.shape[1]))
    stream = training_stream(train, 32, seed)
    tx = optax.adam(3e-3)
    query = jax.jit(lambda p, x: towers.query(p, x))

    def mine(variables, artefacts, rng):
        found = search(encode_all(query, variables["params"], train["query"]), vectors, k + 1)
        table = star_adore.clean_negatives(jnp.asarray(found), jnp.asarray(train["positives"]), k)
        return FitResult({}, {"negatives": np.asarray(table)})

    random = star_adore.star(towers, "random", in_batch=False)
    objective = {
        "adore": star_adore.adore(towers, k, k),
        "random negatives": random,
        "static hard negatives": star_adore.star(towers, "hard", in_batch=False),
    }.get(arm)
    phases: list[Any] = [
        Fit("corpus", lambda v, a, r: FitResult({}, {"corpus": vectors, "index": vectors})),
        Train("warmup", steps, random, tx, stream),
        Fit("mine", mine),
    ]
    if objective is not None:
        phases.append(Train("train", steps, objective, tx, stream))
    run = Run(phases, export=None, init=lambda rng: {"params": towers.init(rng, jnp.asarray(train["query"][:1]), None)})
    found = train_in_memory(run, 50, seed)
    ids = search(encode_all(query, found.variables["params"], test["query"]), vectors, 100)
    return ranking_figures(ids, test["positives"])


def benchmarks() -> list[Benchmark]:
    """One loss of STAR and one search-and-loss of ADORE at the paper's batch, against loops over queries."""
    b, d, n, k = 32, 768, 100_000, 200
    key = jax.random.split(jax.random.key(0), 4)
    queries, documents, hard = (jax.random.normal(key[i], (b, d)) for i in range(3))
    index = jax.random.normal(key[3], (n, d)) / d**0.5
    positives = jnp.arange(b, dtype=jnp.int32)[:, None] * 7

    def star_loss(q, x, h):
        off = ~jnp.eye(b, dtype=bool)
        values, mask = star_adore.star_pairs(q, x, h, off, jnp.ones((b, b), bool))
        return jnp.sum(values) / jnp.sum(mask)

    def loop(q, index, positives):
        q, index, out = np.asarray(q), np.asarray(index), []
        for row, own in zip(q, np.asarray(positives), strict=True):
            scores = index @ row
            found = np.argpartition(-scores, k)[:k]
            found = found[np.argsort(-scores[found])]
            label = np.isin(found, own)
            ids = found if label.any() else np.concatenate([found, own])
            gains = np.where(np.arange(len(ids)) < k, 1 / np.arange(1, len(ids) + 1), 0)
            label, s = np.isin(ids, own), scores[ids]
            weight = np.abs(gains[label][:, None] - gains[~label][None])
            out.append((weight * np.logaddexp(0, s[~label][None] - s[label][:, None])).mean())
        return np.array(out)

    adore = lambda q, index, positives: star_adore.adore_loss(q, index, positives, k)[0]  # noqa: E731
    exact = lambda q, index: mips_topk(q, index, k)  # noqa: E731
    argpartition = lambda q, index: np.argpartition(-(np.asarray(q) @ np.asarray(index).T), k, 1)[:, :k]  # noqa: E731
    return [
        Benchmark(f"star loss, {b} queries x {2 * b} documents x {d}", star_loss, (queries, documents, hard),
                  4.0 * b * b * d, 4.0 * 3 * b * d),
        Benchmark(f"adore loss, {b} queries, top {k} of {n} x {d}", adore, (queries, index, positives),
                  2.0 * b * n * d, 4.0 * n * d, {"numpy_loop": loop}),
        Benchmark(f"mips_topk, {b} queries, top {k} of {n} x {d}", exact, (queries, index), 2.0 * b * n * d,
                  4.0 * n * d, {"numpy_argpartition": argpartition}),
    ]  # fmt: skip


def example() -> dict:
    """The conformance rows: ADORE over an index by rows, and STAR with mined negatives."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    positives = rng.integers(0, 21, (16, 2)).astype(np.int32)
    positives[::3, 1] = -1
    batch = {"query": normal(16, 5), "positives": positives, "index": np.arange(16, dtype=np.int32),
             "mask": np.ones(16, bool)}  # fmt: skip
    vectors = normal(21, 4)
    table = rng.integers(0, 21, (32, 6)).astype(np.int32)
    tower = query_tower(MLP((8,), 4))
    shared = {"batch": batch, "optimizer": optax.adam(1e-2), "transform": None, "num_examples": 16}
    adore = star_adore.adore(tower, k=6, metric_cut=4, chunk=8)
    hard = star_adore.star(tower, "hard", count=2, random_weight=0.5)
    return {
        **shared, "objective": adore, "artefacts": {"index": vectors}, "sharded": ("index",),
        "also": {"star": {**shared, "objective": hard, "artefacts": {"corpus": vectors, "negatives": table}}},
    }  # fmt: skip
