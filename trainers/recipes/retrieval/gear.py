"""Recipe: a bi-encoder trained together with a generator of answers, judged by finding, localising and answering."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.stream import evaluation_stream, training_stream
from data.triplets import key_value_documents, text_triplets
from trainers import recipe as base
from trainers.phases import Evaluate, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import suggest
from zoo.metrics.text import cut, text_metrics
from zoo.nn.bert import BERTConfig
from zoo.ops.search import mips_topk
from zoo.retrieval import gear
from zoo.retrieval.gear import GeAR


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains a retriever that also says in which sentence the answer stands, and writes it.

    The defaults use generated documents of six sentences "key a b value value ." that are asked for by "a b key". The
    paper's setting is BERT-base: --data.path FOLDER --width 768 --depth 12 --heads 12 --expansion 4 --dropout 0.1
    --document-length 512 --optimizer.learning-rate 1e-5 --optimizer.weight-decay 0.05 --optimizer.warmup-steps 1000.
    """

    data: Data = Data("keyvalue")
    """keyvalue (generated), or --data.path with a folder of train.jsonl and test.jsonl: one object {query, document,
    target, sentence_spans?, doc_id?} a line"""
    optimizer: Optimizer = Optimizer(
        name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=50, clip_norm=1.0
    )
    """optimiser of all modules together"""
    steps: int = 1500
    """training steps"""
    batch_size: int = 32
    """pairs per step"""
    alpha: float = 0.25
    """weight of the generation loss; 0 trains the bi-encoder alone"""
    soft: float = 0.4
    """share of the momentum encoders' opinion in the contrastive targets, after a ramp over the first epoch"""
    momentum: float = 0.995
    """decay of the momentum encoders"""
    queue_size: int = 0
    """earlier momentum embeddings kept as negatives, a multiple of the batch; 0 for none"""
    tau: float = 0.07
    """temperature at the start; it is learnt"""
    label_smoothing: float = 0.0
    """of the generation loss"""
    width: int = 64
    """features of a token in every tower"""
    depth: int = 2
    """blocks of every tower"""
    heads: int = 4
    """attention heads"""
    expansion: int = 2
    """width of the feed-forward layers over that of a token (BERT: 4)"""
    dropout: float = 0.0
    """dropout rate of the towers (BERT: 0.1)"""
    attention_block: int = -1
    """block of the fusion encoder whose attention localises, from 0; -1 takes the 10th of 12, in proportion"""
    reduce: Literal["mean", "sum"] = "mean"
    """how a sentence's tokens make its score"""
    beams: int = 1
    """continuations kept while generating; 1 is greedy"""
    new_tokens: int = 0
    """the most tokens generated; 0 for the longest target's"""
    query_length: int = 64
    """files: the most tokens of a query; longer ones are cut"""
    document_length: int = 256
    """files: the most tokens of a document; longer ones are cut"""
    target_length: int = 64
    """files: the most tokens of a target; longer ones are refused"""
    vocab_size: int = 8000
    """files: the most words of the tokeniser, which is made of the training texts"""
    eval_every: int = 500
    """steps between evaluations"""

    def build(self) -> Run:
        """Data, the training phase and the evaluation of all three tasks."""
        dataset = self.load()
        model = self.module(dataset)
        train = dataset["train"]
        size = min(self.batch_size, len(train["query"]))
        evaluation = three_tasks(model, dataset, min(256, max(64, size)), self.beams, self.new_tokens, self.reduce)
        phase = Train(
            "train",
            self.steps,
            self.objective(model),
            self.optimizer.build(self.steps),
            training_stream(train, size, self.seed),
            evaluate=(evaluation,),
            eval_every=self.eval_every,
        )

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            facts = {
                "inputs": "int32 ids and bool masks of query [B, Lq] and document [B, Ld]; [CLS] first, [SEP] last",
                "decode_id": model.decode_id,
                "stop": int(dataset.info["stop"]),
                "attention_block": model.shown_block,
                "words": list(dataset.info["words"]),
                "data": dataset.name,
            }
            return Export(model, {"params": variables["params"]}, facts)

        return Run(
            phases=[phase],
            export=export,
            figures=functools.partial(draw_attention, recipe=self, model=model, dataset=dataset),
            data_fingerprint=dataset.fingerprint,
            summary=lambda m: (
                f"document found first {m['test/global_recall_1']:.3f}, sentence found first "
                f"{m['test/local_recall_1']:.3f} (chance {m['test/local_chance']:.3f}), answer exact "
                f"{m['test/exact_match']:.3f}; see attention.png"
            ),
            steps_per_call=10,
        )

    def load(self) -> Dataset:
        """The data, and the settings checked against it."""
        positive = ("steps", "batch_size", "width", "depth", "heads", "expansion", "beams", "eval_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not -1 <= self.attention_block < self.depth:
            raise UserError(
                f"--attention-block must lie in [0, {self.depth - 1}] (or be -1), got {self.attention_block}"
            )
        if self.width % self.heads:
            raise UserError(f"--heads {self.heads} must divide --width {self.width}")
        if not 0 <= self.dropout < 1 or not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"--dropout {self.dropout:g} and --label-smoothing {self.label_smoothing:g} must lie in [0, 1)"
            )
        try:
            gear.check_settings(self.alpha, self.soft, self.momentum, self.tau)
        except ValueError as error:
            name, rest = str(error).split(" ", 1)
            raise UserError(f"--{name} {rest}") from None
        if self.queue_size < 0 or self.queue_size % self.batch_size:
            raise UserError(f"--queue-size {self.queue_size} must be a multiple of --batch-size {self.batch_size}")
        if self.data.path is not None:
            lengths = {k: getattr(self, f"{k}_length") for k in ("query", "document", "target")}
            for name, value in lengths.items():
                if value < 3:
                    raise UserError(f"--{name}-length must be at least 3, got {value}")
            return text_triplets(self.data.path, self.vocab_size, **{f"{k}_length": v for k, v in lengths.items()})
        if self.data.name != "keyvalue":
            raise UserError(
                f"--data.name {self.data.name!r} is unknown; use keyvalue, or --data.path FOLDER with train.jsonl"
            )
        return key_value_documents(self.seed)

    def module(self, dataset: Dataset) -> GeAR:
        """The three towers."""
        longest = max(a[k].shape[1] for a in dataset.splits.values() for k in ("query", "document", "target"))
        shape = BERTConfig(
            vocab_size=int(dataset.info["vocab_size"]), width=self.width, depth=self.depth, num_heads=self.heads,
            mlp_width=self.expansion * self.width, max_positions=max(longest, self.new_tokens), token_types=0,
            dropout=self.dropout, attention_dropout=self.dropout,
        )  # fmt: skip
        block = None if self.attention_block < 0 else self.attention_block
        return GeAR(shape, None, block, self.tau, jnp.dtype(self.dtype))

    def objective(self, model: GeAR):
        """What is minimised."""
        settings = {"momentum": self.momentum, "queue_size": self.queue_size, "label_smoothing": self.label_smoothing}
        return gear.gear(model, self.alpha, self.soft, **settings)


def fields() -> dict[str, str]:
    """The data fields the recipe needs."""
    return {
        "query": "str  a question or search text",
        "document": "str  the text that answers it",
        "target": "str  the answer, or the sentence that answers",
        "sentence_spans": "list of [start, end]  optional: characters of the document's sentences",
        "doc_id": "str  optional: rows with equal names share a document",
    }


# --- evaluation -------------------------------------------------------------------------------------------------------


def three_tasks(
    model: GeAR, dataset: Dataset, batch_size: int, beams: int = 1, new_tokens: int = 0, reduce: str = "mean"
) -> Evaluate:
    """Global retrieval among the split's documents, local retrieval among a document's sentences, and generation."""
    test, info = dataset["test"], dataset.info
    count, width = len(test["query"]), model.shape.width
    documents, sentences = int(test["document_id"].max()) + 1, int(info["sentences"])
    length = new_tokens or max(a["target"].shape[1] for a in dataset.splits.values())
    stop = int(info["stop"])

    def init():
        return {
            "query": jnp.zeros((count, width)),
            "document": jnp.zeros((documents, width)),
            "local": jnp.zeros((count, sentences)),
            "made": jnp.zeros((count, length), jnp.int32),
        }

    def update(seen, variables, batch, context):
        found = all_tasks(model, variables, batch, sentences, length, stop, beams, reduce)
        row = jnp.where(batch["mask"], batch["index"], count)
        where = {"document": jnp.where(batch["mask"], batch["document_id"], documents)}
        return {k: v.at[where.get(k, row)].set(found[k].astype(v.dtype), mode="drop") for k, v in seen.items()}, {}

    def compute(seen):
        return measures(seen, test, stop)

    return Evaluate("test", evaluation_stream(test, batch_size), init, update, compute)


def all_tasks(
    model: GeAR, variables: Mapping, batch: Mapping, sentences: int, length: int, stop: int, beams: int, reduce: str
) -> dict[str, jax.Array]:
    """Embeddings, sentence scores and generated tokens of a batch of pairs."""
    weights = {"params": variables["params"]}
    query, document = (batch["query"], batch["query_mask"]), (batch["document"], batch["document_mask"])
    q = model.apply(weights, *query, method="encode_query")["embedding"]
    d = model.apply(weights, *document, method="encode_document")
    inside = gear.without_ends(document[1])
    local, fused = gear.localize(
        model, variables, *query, d["tokens"], document[1], jnp.where(inside, batch["sentence_ids"], -1), sentences,
        reduce=reduce,
    )  # fmt: skip
    made = gear.generate(model, variables, fused, query[1], length, stop, beams)
    return {"query": q, "document": d["embedding"], "local": local, "made": made}


def measures(seen: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], stop: int) -> dict[str, float]:
    """Metrics of the three tasks from what :func:`all_tasks` found for every row of the split."""
    own = np.asarray(test["document_id"])
    k = min(5, len(seen["document"]))
    ids = np.asarray(mips_topk(jnp.asarray(seen["query"]), jnp.asarray(seen["document"]), k)[1])
    hit = ids == own[:, None]
    metrics = {
        "global_recall_1": float(hit[:, 0].mean()),
        "global_recall_5": float(hit.any(1).mean()),
        # one relevant document each: average precision is the reciprocal rank
        "global_map_5": float((hit / np.arange(1, k + 1)).sum(1).mean()),
    }
    metrics |= local_measures(np.asarray(seen["local"]), np.asarray(test["sentence"]))
    lengths = np.asarray(test["target_mask"]).sum(1)
    targets = [cut(t[:n], stop) for t, n in zip(test["target"].tolist(), lengths, strict=True)]
    return metrics | text_metrics([cut(m, stop) for m in np.asarray(seen["made"]).tolist()], targets)


def local_measures(scores: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Recall of the gold sentence among the first 1 and 3, over rows that have one, and what chance would give.

    Ties go to the earlier sentence; a score of ``-inf`` is no sentence.
    """
    known = gold >= 0
    if not known.any():
        return {"local_recall_1": 0.0, "local_recall_3": 0.0, "local_chance": 0.0}
    scores, gold = scores[known], gold[known]
    rank = np.argsort(np.argsort(-scores, 1, kind="stable"), 1)[np.arange(len(gold)), gold]
    chance = 1 / np.isfinite(scores).sum(1)
    return {
        "local_recall_1": float((rank < 1).mean()),
        "local_recall_3": float((rank < 3).mean()),
        "local_chance": float(chance.mean()),
    }


# --- the picture ------------------------------------------------------------------------------------------------------


def draw_attention(result: Any, workdir: Path, recipe: Recipe, model: GeAR, dataset: Dataset, rows: int = 3) -> None:
    """Writes ``attention.png``: the attention of a few queries over their document, a sentence a line."""
    from trainers import plots

    test, info = dataset["test"], dataset.info
    rows = min(rows, len(test["query"]))
    # rows far apart, so that they ask for different documents
    picked = np.linspace(0, len(test["query"]) - 1, rows).astype(int)
    batch = {k: jnp.asarray(np.asarray(v)[picked]) for k, v in test.items()}
    length = recipe.new_tokens or max(a["target"].shape[1] for a in dataset.splits.values())
    weight, found = jax.jit(
        lambda v: (
            token_attention(model, v, batch),
            all_tasks(model, v, batch, info["sentences"], length, info["stop"], recipe.beams, recipe.reduce),
        )
    )(result.chosen)
    words, stop = info["words"], int(info["stop"])
    fig, axes = plots.figure(rows, 1, (4.4, 3.4))
    for n, axis in enumerate(axes[0]):
        lines, texts = sentence_lines(np.asarray(weight[n]), batch["document"][n], batch["sentence_ids"][n], words)
        axis.imshow(lines, cmap="Blues", vmin=0, aspect="auto")
        for (i, j), value in np.ndenumerate(lines):
            if np.isfinite(value) and lines.shape[1] <= 16:
                tone = "white" if value > 0.6 * np.nanmax(lines) else "black"
                axis.text(j, i, texts[i][j], ha="center", va="center", fontsize=6, color=tone)
        gold, best = int(batch["sentence"][n]), int(jnp.argmax(found["local"][n]))
        axis.set_yticks(range(len(lines)), [f"{'> ' if i == best else ''}{i}" for i in range(len(lines))], fontsize=7)
        axis.set_xticks([])
        if 0 <= gold < len(lines):
            axis.axhline(gold - 0.5, color="#b04030", linewidth=1.2)
            axis.axhline(gold + 0.5, color="#b04030", linewidth=1.2)
        say = lambda ids: " ".join(words[i] for i in ids)[:60]  # noqa: E731
        asked = say(np.asarray(batch["query"][n])[np.asarray(batch["query_mask"][n])][1:-1])
        answer = say(cut(np.asarray(batch["target"][n])[np.asarray(batch["target_mask"][n])], stop))
        wrote = say(i for i in cut(np.asarray(found["made"][n]), stop) if i < len(words))
        axis.set_title(f"query: {asked}\nanswer: {answer}; generated: {wrote}", fontsize=7, loc="left")
    fig.suptitle("fusion attention by sentence (>: ranked first; red: where the answer is)", fontsize=8)
    plots.save(fig, Path(workdir) / "attention.png")


def token_attention(model: GeAR, variables: Mapping, batch: Mapping) -> jax.Array:
    """Weight of each document token ``[B, Ld]``: the shown attention, averaged over heads and inner query tokens."""
    weights = {"params": variables["params"]}
    states = model.apply(weights, batch["document"], batch["document_mask"], method="encode_document")["tokens"]
    _, shown = model.apply(
        weights, batch["query"], batch["query_mask"], states, batch["document_mask"], show=True, method="fuse"
    )
    counted = gear.without_ends(batch["query_mask"])[:, None, :, None]
    return jnp.sum(jnp.where(counted, shown, 0.0), (1, 2)) / (shown.shape[1] * jnp.sum(counted, (1, 2)))


def sentence_lines(weight: np.ndarray, ids: Any, owner: Any, words: Any, most: int = 12) -> tuple[np.ndarray, list]:
    """The weights of a document's tokens as a ragged matrix, a sentence a line (NaN beyond its end), and the words."""
    ids, owner = np.asarray(ids), np.asarray(owner)
    lines = [np.flatnonzero(owner == s) for s in range(min(most, int(owner.max()) + 1))] or [np.arange(0)]
    out = np.full((len(lines), max(1, *(len(x) for x in lines)) if len(lines) > 1 else max(1, len(lines[0]))), np.nan)
    texts = [[""] * out.shape[1] for _ in lines]
    for s, where in enumerate(lines):
        out[s, : len(where)] = weight[where]
        texts[s][: len(where)] = [str(words[i])[:9] for i in ids[where]]
    return out, texts


# --- the claim --------------------------------------------------------------------------------------------------------

ARMS = ("alpha 0.25", "alpha 0", "random sentence")


def arm(arm: str, seed: int) -> dict[str, float]:
    """Trains one arm of the claim: documents, first weights and order are the same for the same seed.

    Returns:
      ``local_recall_1`` and the other metrics of the three tasks.
    """
    from trainers.run import train_in_memory

    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    if arm == "random sentence":
        test = key_value_documents(seed)["test"]
        scores = np.random.default_rng(seed).random((len(test["sentence"]), 6))
        return local_measures(scores, test["sentence"])
    recipe = Recipe(seed=seed, alpha=0.25 if arm == "alpha 0.25" else 0.0, eval_every=10**6)
    found = train_in_memory(recipe.build(), seed=seed)
    return {k.removeprefix("test/"): v for k, v in found.metrics.items() if k.startswith("test/")}


# --- benchmarks and the conformance row -------------------------------------------------------------------------------


def benchmarks() -> list[Benchmark]:
    """Fusion of 8 pairs at BERT-small's size, and greedy generation with its cache against decoding anew."""
    shape = BERTConfig(vocab_size=1000, width=256, depth=4, num_heads=4, mlp_width=1024, max_positions=512)
    model = GeAR(shape)
    pairs, asked, read, length = 8, 16, 256, 32
    ids = jax.random.randint(jax.random.key(0), (pairs, read), 0, 1000)
    real = jnp.ones((pairs, read), bool)
    short, short_real = ids[:, :asked], real[:, :asked]
    variables = jax.jit(model.init)(jax.random.key(1), short, short_real, ids, real, short)
    states = jax.random.normal(jax.random.key(2), (pairs, read, 256))
    fused = states[:, :asked]

    def fuse(v, states):
        return model.apply(v, short, short_real, states, real, show=True, method="fuse")

    def cached(v, fused):
        return gear.generate(model, v, fused, short_real, length, stop=1000)

    @jax.jit
    def anew(v, fused):
        # every step runs the decoder over all places again
        def one(at, made):
            logits = model.apply(v, made, fused, short_real, method="decode_logits")
            word = jnp.argmax(logits[:, at], -1).astype(jnp.int32)
            return made.at[:, at + 1].set(word, mode="drop")

        return jax.lax.fori_loop(0, length, one, jnp.full((pairs, length), model.decode_id, jnp.int32))

    block = 4 * 256**2 + 2 * 256 * 1024
    flops = 2.0 * pairs * 4 * (asked * (block + 2 * 256**2) + read * 2 * 256**2 + 2 * asked * read * 256)
    step = 2.0 * pairs * length * (4 * (block + 2 * 256**2) + 256 * 1001)
    weights = 4.0 * sum(x.size for x in jax.tree.leaves(variables["params"]["decoder"]))
    return [
        Benchmark(
            f"fuse {pairs} pairs of {asked} and {read} tokens, 4 x 256",
            fuse,
            (variables, states),
            flops,
            4.0 * (2 * states.size + 4 * (block + 4 * 256**2)),
        ),
        Benchmark(
            f"generate {length} tokens for {pairs} queries",
            cached,
            (variables, fused),
            step,
            weights * length,
            {"without_cache": anew},
        ),
    ]


def example() -> dict:
    """The conformance row: a tiny GeAR with a queue, shared documents and padded texts."""
    import optax

    rng = np.random.default_rng(0)
    shape = BERTConfig(
        vocab_size=23, width=8, depth=1, num_heads=2, mlp_width=12, max_positions=8, token_types=0, dropout=0.1
    )
    lengths = {"query": (3, 4), "document": (5, 7), "target": (1, 3)}
    batch: dict[str, np.ndarray] = {}
    for name, (low, high) in lengths.items():
        batch[name] = rng.integers(3, 23, (16, high)).astype(np.int32)
        batch[f"{name}_mask"] = np.arange(high) < rng.integers(low, high + 1, 16)[:, None]
    batch |= {
        "document_id": (np.arange(16, dtype=np.int32) // 2).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    return {
        "objective": gear.gear(GeAR(shape), momentum=0.9, queue_size=32),
        "batch": batch,
        # not Adam: it makes steps of the rounding errors that are all the gradient of the keys' biases
        "optimizer": optax.sgd(0.05, 0.9),
        "transform": None,
        "num_examples": 16,
    }
