"""Recipe: a reviser of queries from feedback, trained with and without the comparison of its losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.bm25 import BM25
from data.feedback import clustered_feedback, read_document_vectors, read_run
from data.lsa import latent_semantic_words
from data.stream import DataError, arrays_fingerprint, training_stream
from data.text import Tokenizer
from trainers import recipe as base
from trainers.feedback import bag_of_words, bm25_weights, check_positives, latent_vectors, measurement
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.retrieval import SPECIAL_IDS, Texts, figures_table, ranking_figures, search, text_collection
from trainers.run import train_in_memory
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.reformulators import DenseReformulator, SetReformulator, SparseMLMReformulator, SparseTokenReformulator
from zoo.retrieval import lol


@dataclass(frozen=True)
class Material:
    """What training reads, whatever it came from.

    Attributes:
      index: frozen document vectors, f32 ``[N, v]``.
      passages: what the reviser reads of a document, ``[N, ...]``.
      train, test: fields ``query``, ``feedback`` and ``positives`` of the queries.
      grades: of the test queries' positives, or ``None``.
      reviser, module: the reformulator.
      constants: arrays that go with the model.
      facts: how a user prepares inputs.
      tokenizer: of texts, or ``None``.
      fingerprint: of the data.
      start: puts loaded weights into fresh parameters.
    """

    index: np.ndarray
    passages: np.ndarray
    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    grades: np.ndarray | None
    reviser: lol.Reviser
    module: Any
    constants: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    tokenizer: Tokenizer | None
    fingerprint: str
    start: Callable[[Any], Any]


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains a reviser that reads a query and its first-pass documents, against a frozen index of all documents.

    The same start is trained twice on the same queries: with random amounts of feedback only, and with the comparative
    regulariser. Both are measured for 0 .. k-max feedback documents (feedback.png, feedback.txt).

    The default is the claim's stand-in: vectors in clusters, and a small reviser over vectors. --data.name synonyms is
    a generated language, with BM25 as the first pass and latent semantic document vectors. Real data: --data.path DIR
    with a BEIR, MS MARCO or Cranfield folder, with --run FILE for a first pass of your own. The paper's setting is
    --reviser text --backbone DIR (zoo import of an encoder) --vectors matrix.npy --vector-ids pids.txt --run run.tsv
    --query-length 130 --passage-length 128 --max-length 512 --optimizer.name adamw --optimizer.learning-rate 1e-5
    --batch-size 54.
    """

    data: Data = Data("clusters")
    """clusters or synonyms (generated), or --data.path with a folder: BEIR, MS MARCO or Cranfield files"""
    run: str = ""
    """first-pass run of all queries: lines `qid pid rank`, or TREC's; without it the run is made on the fly"""
    first_pass: Literal["bm25", "index"] = "bm25"
    """what makes the run: BM25, or inner products with the index (not with --vectors)"""
    vectors: str = ""
    """frozen document vectors, .npy [N, d], in place of those made here"""
    vector_ids: str = ""
    """the documents of their rows, an id a line"""
    reviser: Literal["vectors", "text", "mlm", "tokens"] = "vectors"
    """vectors: a weighted mean of query and feedback vectors; text: a transformer to a dense vector; mlm and tokens:
    one to a sparse vector over the vocabulary, scored against BM25 weights of tokens"""
    backbone: str = ""
    """text, mlm, tokens: folder of an imported text encoder, whose weights, configuration and tokenizer are used"""
    k_max: int = 5
    """feedback documents at most"""
    revisions: int = 2
    """revisions of each query in a step (the paper's 1 + c)"""
    weight: float = 1.0
    """lambda of the comparative regulariser"""
    sparsity_weight: float = 0.0
    """mlm, tokens: lambda of the L1 norm of query vectors, reached by a quadratic ramp"""
    query_weight: float = 0.0
    """lambda of the optional loss that ranks the batch's queries for each positive"""
    shuffle: bool = True
    """feedback in random order while training, else its first documents"""
    width: int = 128
    """dimension of the latent semantic vectors, and of a transformer without a backbone"""
    hidden: int = 32
    """vectors: hidden units of the reviser"""
    scale: float = 12.0
    """vectors: length of a query vector, the inverse temperature of the softmax"""
    depth: int = 2
    """transformers without a backbone: layers"""
    tokenizer: Literal["wordpiece", "byte"] = "wordpiece"
    """kind of tokenizer, trained on the corpus (a backbone brings its own)"""
    vocab_size: int = 6000
    """ids of that tokenizer, at most"""
    query_length: int = 32
    """tokens of a query, special ones included"""
    passage_length: int = 64
    """tokens of a feedback document that are read"""
    max_length: int = 256
    """tokens of query and feedback together"""
    optimizer: Optimizer = Optimizer(learning_rate=2e-3, schedule="linear", warmup_steps=20)
    """optimiser of both trainings"""
    steps: int = 400
    """steps of each training"""
    batch_size: int = 32
    """queries per step"""
    compare: bool = True
    """also train without the regulariser"""

    def build(self) -> Run:
        """The index, both trainings and their measurements."""
        self._check()
        made = self._clusters() if self.data.name == "clusters" and self.data.path is None else self._texts()
        stream = training_stream(made.train, self.batch_size, self.seed)
        measure = measurement(made.reviser, made.test, made.passages, made.index, made.grades)
        plain = lol.feedback_training(
            made.reviser, self.revisions, self.shuffle, self.query_weight, self.sparsity_weight
        )
        tx, sharded = self.optimizer.build(self.steps), ("index",)

        def init(rng):
            return {"params": made.start(made.reviser.init(rng, *first_inputs(made)))}

        def begin(variables, artefacts, rng):
            first = ranking_figures(made.test["feedback"], made.test["positives"])["mrr_at_10"]
            found = {"documents": len(made.index), "train_queries": len(made.train["query"]), "first_pass_mrr": first}
            kept = {"constants": {"start": variables["params"]}}
            return FitResult(kept, {"index": made.index, "passages": made.passages}, found)

        def without(variables, artefacts, rng):
            found = measure(variables["params"])
            return FitResult({"params": variables["constants"]["start"]}, {}, found)

        phases: list[Any] = [Fit("index", begin)]
        if self.compare:
            phases += [Train("plain_training", self.steps, plain, tx, stream, sharded=sharded), Fit("plain", without)]
        compared = lol.comparative_regularizer(self.weight)
        phases += [
            Train("lol_training", self.steps, plain, tx, stream, compared, sharded=sharded),
            Fit("lol", lambda v, a, r: FitResult({}, {}, measure(v["params"]))),
        ]

        def export(variables, artefacts):
            own = {"params": variables["params"], "constants": made.constants}
            beside = None if made.tokenizer is None else _write_tokenizer(made.tokenizer)
            return Export(made.module, own, made.facts, beside)

        return Run(phases, export, init, _figures, made.fingerprint, _summary, steps_per_call=5)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _clusters(self) -> Material:
        for name, given in (("run", self.run), ("vectors", self.vectors), ("backbone", self.backbone)):
            if given:
                raise UserError(f"--{name} {given} needs texts; --data.name clusters has none")
        if self.reviser != "vectors":
            raise UserError(f"--reviser {self.reviser} reads texts; --data.name clusters has vectors only")
        try:
            data = clustered_feedback(self.seed, k_max=self.k_max)
        except DataError as error:
            raise UserError(f"--k-max {self.k_max}: {error}") from None
        vectors = data["documents"]["vector"]
        arrays = {**{f"train_{k}": v for k, v in data["train"].items()}, "documents": vectors}
        module = SetReformulator((self.hidden,), self.scale, jnp.dtype(self.dtype))
        return Material(
            vectors, vectors, data["train"], data["test"], None, lol.vector_reviser(module), module, {},
            {"inputs": "unit query vectors, feedback vectors best first, sizes"}, None, arrays_fingerprint(arrays),
            lambda params: params,
        )  # fmt: skip

    def _texts(self) -> Material:
        collection = text_collection(self.data, self.seed)
        n = len(collection.document_ids)
        if self.k_max > n:
            raise UserError(f"--k-max {self.k_max} must be at most {n}, the number of documents")
        body, weights, tokenizer = self._body()
        length = self.passage_length + 2
        texts = Texts.of(collection, self.query_length, length, self.vocab_size, self.tokenizer, tokenizer)
        tokens, size, pad = texts.tokenizer, texts.tokenizer.vocab_size, texts.tokenizer.pad
        constants: dict[str, np.ndarray] = {}
        asked: np.ndarray | None = None
        if self.vectors:
            index = read_document_vectors(self.vectors, self.vector_ids, collection.document_ids)
        elif self.reviser in ("mlm", "tokens"):
            index = bm25_weights(tokens.encode(collection.documents, 512), size)
            asked = bag_of_words(texts.queries, size)
        else:
            whole = tokens.encode(collection.documents, 512)
            try:
                words, idf = latent_semantic_words(whole, size, self.width, self.seed, SPECIAL_IDS)
            except DataError as error:
                raise UserError(f"--width {self.width}: {error}") from None
            index, asked = (latent_vectors(x, words, idf) for x in (whole, texts.queries))
            constants = {"words": words, "idf": idf}
        run = self._first_pass(collection, index, asked)
        if self.reviser == "vectors":
            module = SetReformulator((self.hidden,), self.scale, jnp.dtype(self.dtype))
            reviser, query, passages = lol.vector_reviser(module), asked, index
            facts = {"inputs": "unit latent vectors (constants: words, idf) of query and feedback, best first, sizes"}
        else:
            module = self._module(body, size, index.shape[1])
            reviser = lol.text_reviser(module, tokens.sep, pad, self.max_length)
            query = texts.queries
            # passages without [CLS] and [SEP]
            passages = np.where(texts.documents[:, 1:-1] == tokens.sep, pad, texts.documents[:, 1:-1])
            facts = {"inputs": "[CLS] query [SEP] passage [SEP] ...; types 0 and 1", "max_length": self.max_length}
        rows = {}
        for split in ("train", "test"):
            own = collection.splits[split]
            positives, grades = texts.relevant(own)
            check_positives([collection.query_ids[q] for q in own], positives)
            rows[split] = {"query": query[own], "feedback": run[own], "positives": positives}
        arrays = {**rows["train"], "passages": passages, "index": index}
        if self.reviser != "vectors":  # the objective asks batches for a passage's shape
            rows["train"]["passage"] = np.zeros((len(rows["train"]["query"]), passages.shape[1]), np.int32)
        mark = f"{collection.fingerprint}-{arrays_fingerprint(arrays)[:8]}"
        start = (lambda params: params) if weights is None else self._loaded(weights)
        return Material(
            index, passages, rows["train"], rows["test"], grades, reviser, module, constants, facts, tokens, mark, start
        )

    def _first_pass(self, collection, index: np.ndarray, asked: np.ndarray | None) -> np.ndarray:
        if self.run:
            found, counts = read_run(self.run, collection.query_ids, collection.document_ids, self.k_max)
            if not counts[np.concatenate([collection.splits[s] for s in ("train", "test")])].any():
                raise UserError(f"--run {self.run} has no document for any judged query; are its ids the collection's?")
            return found
        if self.first_pass == "bm25":
            return BM25(collection.documents).search(collection.queries, self.k_max)[1]
        return search(asked, index, self.k_max)

    # --- models -------------------------------------------------------------------------------------------------------

    def _module(self, body, size: int, features: int):
        dtype, head = jnp.dtype(self.dtype), "mlm" if self.reviser == "mlm" else "none"
        if self.reviser in ("mlm", "tokens") and features != size:
            raise UserError(
                f"--vectors {self.vectors} have {features} entries, the tokenizer has {size} words: --reviser "
                f"{self.reviser} needs one for each word"
            )
        words = (999, (100,)) if body is not None and body.config.pad_id is None else (SPECIAL_IDS, ())
        if body is None:
            if self.width % 32:
                raise UserError(f"--width {self.width} must be a multiple of 32 for a transformer (heads of 32)")
            config = BERTConfig(
                size, self.width, self.depth, self.width // 32, 4 * self.width, self.max_length, 2, head=head,
            )  # fmt: skip
            body = BERT(config, dtype)
        else:
            config = body.config
            longest = config.max_positions - (0 if config.pad_id is None else config.pad_id + 1)
            if self.max_length > longest:
                raise UserError(f"the backbone reads {longest} tokens: lower --max-length")
        if self.reviser == "text":
            return DenseReformulator(body, features, dtype)
        if self.reviser == "mlm":
            return SparseMLMReformulator(body, *words)
        return SparseTokenReformulator(body, size, *words, dtype=dtype)

    def _body(self) -> tuple[Any, Any, Tokenizer | None]:
        if not self.backbone:
            return None, None, None
        from checkpoints.arrays import one_line
        from checkpoints.model import ModelError, load_model

        try:
            model = load_model(self.backbone)
            if not isinstance(model.definition, BERT):
                kind = type(model.definition).__name__
                raise UserError(f"--backbone {self.backbone} is a {kind}; a text encoder (BERT, RoBERTa) is needed")
            tokenizer = Tokenizer.of(model.tokenizer(), f"--backbone {self.backbone}: its tokenizer")
        except (ModelError, OSError) as error:
            raise UserError(f"--backbone {self.backbone}: {one_line(error)}") from None
        except DataError as error:
            raise UserError(str(error)) from None
        if self.reviser == "mlm" and model.definition.config.head != "mlm":
            raise UserError(f"--backbone {self.backbone} has no masked-language head, which --reviser mlm reads")
        head = "mlm" if self.reviser == "mlm" else "none"
        config = dataclasses.replace(model.definition.config, head=head, pooler=False, next_sentence=False)
        return BERT(config, jnp.dtype(self.dtype)), model.variables["params"], tokenizer

    def _loaded(self, weights):
        def start(params):
            own = params["body"]
            # the weights take the places of the fresh ones, inside the boxes that name their axes
            known = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves({k: weights[k] for k in own}))
            if jax.tree.map(jnp.shape, known) != jax.tree.map(jnp.shape, own):
                raise UserError(f"--backbone {self.backbone}: its weights do not fit its configuration")
            return {**params, "body": known}

        return start

    # --- settings -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        for name in ("k_max", "revisions", "width", "hidden", "depth", "passage_length", "max_length", "steps",
                     "batch_size"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("weight", "query_weight", "sparsity_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if not self.scale > 0:
            raise UserError(f"--scale must be above 0, got {self.scale}")
        if self.revisions > self.k_max + 1:
            raise UserError(
                f"--revisions {self.revisions} with --k-max {self.k_max}: cannot draw {self.revisions} distinct sizes "
                f"from 0..{self.k_max}"
            )
        if self.query_length > self.max_length and self.reviser != "vectors":
            raise UserError(f"--query-length {self.query_length} must be at most --max-length {self.max_length}")
        if bool(self.vectors) != bool(self.vector_ids):
            raise UserError("--vectors and --vector-ids belong together: a matrix, and the documents of its rows")
        if self.vectors and self.reviser == "vectors":
            raise UserError("--vectors has no vectors of queries, which --reviser vectors reads: use --reviser text")
        if self.vectors and self.first_pass == "index" and not self.run:
            raise UserError("--first-pass index cannot search --vectors: give --run FILE or --first-pass bm25")
        if self.backbone and self.reviser == "vectors":
            raise UserError(f"--backbone {self.backbone} needs --reviser text, mlm or tokens")
        self.optimizer.build(self.steps)


def first_inputs(made: Material) -> tuple[Any, Any]:
    """One query and its passages, to initialise a reviser with."""
    ids = np.maximum(made.train["feedback"][:1], 0)
    return jnp.asarray(made.train["query"][:1]), jnp.asarray(made.passages[ids])


def _write_tokenizer(tokenizer: Tokenizer):
    def write(folder) -> None:
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.write(Path(folder) / "tokenizer" / "tokenizer.json")

    return write


STAGES = {"plain": "random amounts of feedback", "lol": "LoL"}


def _curves(metrics: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    found = {}
    for stage, label in STAGES.items():
        if f"{stage}/loss_at_0" not in metrics:
            continue
        most = max(int(k.rpartition("_")[2]) for k in metrics if k.startswith(f"{stage}/loss_at_"))
        of = lambda name, first=0, s=stage, m=most: [metrics[f"{s}/{name}_{k}"] for k in range(first, m + 1)]  # noqa: E731
        found[label] = {"MRR@10": of("mrr_at_10_with"), "loss": of("loss_at"), "worse": of("worse", 1)}
    return found


def _summary(metrics: Mapping[str, float]) -> str:
    ends = lambda values: f"{values[0]:.3f} to {values[-1]:.3f}"  # noqa: E731
    parts = [
        f"{label} MRR@10 {ends(c['MRR@10'])}, loss {ends(c['loss'])}, more is worse {np.mean(c['worse']):.2f}"
        for label, c in _curves(metrics).items()
    ]
    return "test queries, from no feedback to all of it: " + "; ".join(parts)


def _figures(result, workdir: Path) -> None:
    from trainers import plots

    curves = _curves(result.metrics)
    table = {
        f"{label}, k = {k}": {"mrr_at_10": c["MRR@10"][k], "loss": c["loss"][k], "worse": ([np.nan] + c["worse"])[k]}
        for label, c in curves.items()
        for k in range(len(c["loss"]))
    }
    (workdir / "feedback.txt").write_text(figures_table(table) + "\n")
    fig, axes = plots.figure(3, 1, (3.3, 2.9))
    styles = {STAGES["plain"]: ("#909090", "--o"), STAGES["lol"]: ("#b04030", "-o")}
    titles = {"MRR@10": "MRR@10, whole corpus ranked", "loss": "retrieval loss (nats)",
              "worse": "share of queries that lose\nby one more document"}  # fmt: skip
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for label, c in curves.items():
            colour, style = styles[label]
            first = 1 if name == "worse" else 0
            axis.plot(range(first, first + len(c[name])), c[name], style, color=colour, label=label, markersize=3.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("feedback documents", fontsize=8)
        axis.set_xticks(range(first, first + len(c[name])))
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=6, loc="lower left")
    plots.save(fig, workdir / "feedback.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "corpus": "texts: corpus.jsonl (BEIR), collection.tsv (MS MARCO) or cran.all.1400 (Cranfield)",
        "queries": "texts: queries.jsonl, queries.tsv or queries.SPLIT.tsv, cran.qry",
        "qrels": "relevant (query, document, grade): qrels/SPLIT.tsv, qrels.SPLIT.tsv or cranqrel",
        "run": "optional, --run FILE: first-pass documents, `qid pid rank` or TREC's six columns",
        "vectors": "optional, --vectors FILE.npy and --vector-ids FILE.txt: frozen document vectors and their ids",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the brief's stand-in: a set network over vectors, the same start and batches in all."""
    weights = {"lol": 1.0, "lol, weight 2": 2.0, "no comparison": 0.0, "mean of query and feedback": None}
    if arm not in weights:
        raise UserError(f"unknown arm {arm!r} of lol's claim")
    data, weight = clustered_feedback(seed), weights[arm]
    vectors, train, test = data["documents"]["vector"], data["train"], data["test"]
    reviser = lol.vector_reviser(SetReformulator())
    first = [jnp.asarray(train["query"][:1]), jnp.asarray(vectors[train["feedback"][:1]])]
    measure = measurement(reviser, test, vectors, vectors)
    if weight is None:  # a network of zeros weighs query and feedback alike
        return measure(jax.tree.map(jnp.zeros_like, reviser.init(jax.random.key(0), *first)))
    phases: list[Any] = [
        Fit("index", lambda v, a, r: FitResult({}, {"index": vectors, "passages": vectors})),
        Train("train", 800, lol.feedback_training(reviser), optax.adam(3e-3), training_stream(train, 32, seed),
              lol.comparative_regularizer(weight) if weight else None),
    ]  # fmt: skip
    run = Run(phases, export=None, init=lambda rng: {"params": reviser.init(rng, *first)})
    return measure(train_in_memory(run, 50, seed, devices=1).variables["params"])


def benchmarks() -> list[Benchmark]:
    """One loss of a batch of revisions over a large corpus, forward and backward, and the comparison itself."""
    b, r, d, n = 18, 2, 768, 100_000
    key = jax.random.split(jax.random.key(0), 2)
    queries, index = jax.random.normal(key[0], (b * r, d)), jax.random.normal(key[1], (n, d)) / d**0.5
    positives = jnp.repeat(jnp.arange(b, dtype=jnp.int32)[:, None] * 7, r, axis=0)

    def total(q, index, positives):
        losses = lol.reformulation_loss(q, index, positives)[0].reshape(b, r)
        return jnp.mean(losses) + jnp.mean(lol.comparative_loss_regularizer(losses))

    gradient = lambda q, index, positives: jax.value_and_grad(total)(q, index, positives)  # noqa: E731

    def numpy_whole(q, index, positives):
        q, index, positives = (np.asarray(x) for x in (q, index, positives))
        scores = q @ index.T
        top = scores.max(1, keepdims=True)
        weights = np.exp(scores - top)
        norm = weights.sum(1, keepdims=True)
        losses = (np.log(norm) + top)[:, 0] - scores[np.arange(len(q)), positives[:, 0]]
        return losses, weights / norm @ index - index[positives[:, 0]]

    flops = 3 * 2.0 * b * r * n * d
    return [
        Benchmark(f"loss and gradient, {b} queries x {r} revisions, {n} documents x {d}", gradient,
                  (queries, index, positives), flops, 2 * 4.0 * n * d, {"numpy_whole_scores": numpy_whole}),
    ]  # fmt: skip


def example() -> dict:
    """The conformance rows: revisions of vectors over an index by rows, and of texts by a small transformer."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    positives = rng.integers(0, 21, (16, 2)).astype(np.int32)
    positives[::3, 1] = -1
    feedback = np.stack([rng.permutation(21)[:3] for _ in range(16)]).astype(np.int32)
    feedback[::5, 2] = -1
    batch = {"query": normal(16, 4), "feedback": feedback, "positives": positives,
             "index": np.arange(16, dtype=np.int32), "mask": np.ones(16, bool)}  # fmt: skip
    vectors = normal(21, 4)
    objective = lol.feedback_training(lol.vector_reviser(SetReformulator((6,), 3.0)), 3, chunk=4)
    shared = {"optimizer": optax.adam(1e-2), "transform": lol.comparative_regularizer(0.7), "num_examples": 16}
    ids = lambda *shape: rng.integers(5, 30, shape).astype(np.int32)  # noqa: E731
    body = BERT(BERTConfig(30, 8, 1, 2, 16, 20, 2, dropout=0.0, attention_dropout=0.0))
    texts = lol.text_reviser(DenseReformulator(body, 4), 3, 0, 20, 3)
    # sgd: adam would scale up the gradient of a key's bias, which is rounding alone; dense: a maximum over tokens jumps
    asked = {**batch, "query": ids(16, 4), "passage": np.zeros((16, 5), np.int32)}
    return {
        **shared, "objective": objective, "batch": batch, "artefacts": {"index": vectors, "passages": vectors},
        "sharded": ("index",),
        "also": {"text": {
            **shared, "optimizer": optax.sgd(5e-4), "objective": lol.feedback_training(texts, 2, query_weight=0.5),
            "batch": asked, "artefacts": {"index": vectors, "passages": ids(21, 5)},
            "sharded": ("index",),
        }},
    }  # fmt: skip
