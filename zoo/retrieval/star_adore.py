"""STAR and ADORE: dense retrievers trained with hard negatives.

Zhan, Mao, Liu, Guo, Zhang, Ma: "Optimizing Dense Retrieval Model Training with Hard Negatives", SIGIR 2021, arXiv
2104.08051.

Training against random negatives minimises all pairwise errors alike, and most of those are easy.  Training against
negatives that an older model ranked high looks at the top of the ranking, but such negatives grow stale, and a model
may collapse on what they do not cover.  STAR adds the batch's other documents to the static hard negatives, at no cost.
ADORE then freezes the documents and trains the query encoder alone: in each step it *searches* with the present
queries, and weights each pair of a relevant and an irrelevant document by what swapping them would change in MRR.

The pipeline: warm up; mine with the warmed-up model; STAR; encode the corpus once; ADORE.  Documents keep STAR's
encoder for ever, queries get ADORE's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.base import Loss, Objective, batch_mask, elements, example_elements
from zoo.catalogue import Card, Claim
from zoo.losses.retrieval import lambda_pairwise, pairwise_softplus, reciprocal_rank_gains
from zoo.metrics.ranking import hits, without_ids
from zoo.nn.retriever import Towers
from zoo.ops.rows import as_rows

__all__ = [
    "adore", "adore_loss", "clean_negatives", "pair_masks", "sample_hard", "sample_positive", "sample_random", "star",
    "star_pairs",
]  # fmt: skip

# --- which documents a query sees (paper, sections 4.1 and 4.2) -------------------------------------------------------


def sample_positive(keys: Array, positives: Int[Array, "b p"]) -> Int[Array, "b"]:
    """One of each query's labelled positives, uniformly; -1 for a query without any.

    Args:
      keys: one per query.
      positives: ids padded with -1, anywhere.
    """
    return _choose(keys, positives, 1)[:, 0]


def sample_hard(keys: Array, table: Int[Array, "b k"], count: int = 1) -> Int[Array, "b h"]:
    """``count`` of each query's mined negatives, uniformly and with replacement; -1 where a row has none.

    Args:
      keys: one per query.
      table: each query's mined ids, padded with -1.
      count: h.
    """
    return _choose(keys, table, count)


def sample_random(keys: Array, documents: int, count: int = 1) -> Int[Array, "b h"]:
    """``count`` documents of the corpus for each query, uniformly and with replacement."""
    return jax.vmap(lambda key: jax.random.randint(key, (count,), 0, documents, jnp.int32))(keys)


def _choose(keys: Array, ids: Array, count: int) -> Array:
    real = ids >= 0
    order = jnp.argsort(~real, axis=1, stable=True)
    packed, sizes = jnp.take_along_axis(ids, order, 1), jnp.sum(real, 1)
    draw = jax.vmap(lambda key, size: jax.random.randint(key, (count,), 0, jnp.maximum(size, 1)))(keys, sizes)
    return jnp.where(sizes[:, None] > 0, jnp.take_along_axis(packed, draw, 1), -1).astype(jnp.int32)


def clean_negatives(found: Int[Array, "b n"], positives: Int[Array, "b p"], k: int = 200) -> Int[Array, "b k"]:
    """Mined negatives: what a search found, best first, less the labelled positives; the first k, padded with -1.

    Search for more than k, as many as there are positives at least (the paper: 210 for 200).

    Raises:
      ValueError: k outside ``[1, n]``.
    """
    if not 1 <= k <= found.shape[1]:
        raise ValueError(f"k must be in [1, {found.shape[1]}], the documents found; got {k}")
    return without_ids(found, positives)[:, :k]


# --- STAR (paper, section 4.2) ----------------------------------------------------------------------------------------


def pair_masks(
    positives: Int[Array, "b p"], documents: Int[Array, "n"], mask: Bool[Array, "b"], owners: Bool[Array, "n"]
) -> Bool[Array, "b n"]:
    """Which documents are negatives of which queries: real, and not labelled positive (so the diagonal never is).

    Args:
      positives: each query's labelled positives, padded with -1.
      documents: ids of the documents.
      mask: which queries are real.
      owners: which documents are real.
    """
    labelled = jnp.any(positives[:, :, None] == documents[None, None, :], 1)
    return mask[:, None] & owners[None, :] & (documents >= 0)[None, :] & ~labelled


def star_pairs(
    queries: Float[Array, "b d"],
    documents: Float[Array, "b d"],
    hard: Float[Array, "m d"] | None,
    relevant_mask: Bool[Array, "b b"] | None,
    hard_mask: Bool[Array, "b m"] | None,
    random_weight: float | None = None,
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """The pairwise losses of STAR: every query against the batch's other documents and against every hard negative.

    Args:
      queries, documents: row i of ``documents`` is query i's positive.
      hard: hard negatives of the whole batch; ``None`` for in-batch negatives only.
      relevant_mask: which of ``documents`` are negatives of which query; ``None`` drops this term (static hard only, or
        random negatives given as ``hard``).
      hard_mask: the same for ``hard``.
      random_weight: alpha of ``alpha * mean(in-batch) + mean(hard)`` (the paper's equation 10, whose constant is not
        known); ``None`` pools all pairs in one mean, as the released code does.

    Returns:
      Losses and their mask, in-batch pairs first, each row by row; the loss is the mean of the masked ones.

    Raises:
      ValueError: neither of the terms, or a weight without both.
    """
    if relevant_mask is None and hard is None:
        raise ValueError("no negatives: give relevant_mask (in-batch), hard (mined or random), or both")
    matmul = lambda x: jnp.matmul(queries, x.T, precision="highest")  # noqa: E731
    batch = matmul(documents)
    positive = jnp.diagonal(batch)
    parts = []
    if relevant_mask is not None:
        parts.append((pairwise_softplus(positive, batch, relevant_mask), relevant_mask))
    if hard is not None:
        parts.append((pairwise_softplus(positive, matmul(hard), hard_mask), hard_mask))
    masks = [m.ravel() for _, m in parts]
    values = [v.ravel() for v, _ in parts]
    if random_weight is not None:
        if len(parts) < 2:
            raise ValueError("random_weight weighs in-batch against hard negatives: both must be there")
        total, own = jnp.sum(masks[0]) + jnp.sum(masks[1]), [jnp.maximum(jnp.sum(m), 1) for m in masks]
        # so that the mean over all pairs is the weighted sum of the two means
        values = [values[0] * (random_weight * total / own[0]), values[1] * (total / own[1])]
    return jnp.concatenate(values), jnp.concatenate(masks)


def star(
    towers: Towers,
    negatives: str = "hard",
    in_batch: bool = True,
    count: int = 1,
    random_weight: float | None = None,
    name: str = "star",
) -> Objective:
    """STAR, and the training it is compared with, as an objective over pairs.

    The batch has ``query`` (inputs of the query encoder), ``positives`` int32 ``[B, P]`` (labelled ids, padded with -1)
    and ``index``; the artefacts ``corpus`` (inputs of the document encoder, ``[N, ...]``) and, for hard negatives,
    ``negatives`` int32 ``[Q, K]`` (mined ids by ``index``, padded with -1).

    Args:
      towers: the encoders.
      negatives: ``"hard"`` (mined), ``"random"`` (from the whole corpus), or ``"none"`` (in-batch only).
      in_batch: whether the batch's other documents are negatives too; False gives static hard negatives alone, or
        the paper's random-negative training.
      count: h, negatives drawn for each query; each is used against all queries of the batch.
      random_weight: see :func:`star_pairs`.
      name: for messages.

    Raises:
      ValueError: an unknown kind of negatives, none at all, or fewer than one.
    """
    if negatives not in ("hard", "random", "none"):
        raise ValueError(f"negatives must be 'hard', 'random' or 'none', got {negatives!r}")
    if negatives == "none" and not in_batch:
        raise ValueError("negatives 'none' leaves nothing to learn from without in_batch")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")

    def init(rng, batch):
        # documents only give their shape here, and a shared encoder takes that of queries
        return {"params": towers.init(rng, batch["query"], batch.get("document", batch["query"]))}

    def forward(variables, batch, context):
        params, corpus = variables["params"], context.artefacts["corpus"]
        keys = lambda what: context.example_keys(batch, what)  # noqa: E731
        dropout = lambda what: keys(what) if context.train else None  # noqa: E731
        take = lambda ids: jnp.take(corpus, jnp.maximum(ids, 0), axis=0)  # noqa: E731
        positive = sample_positive(keys("positive"), batch["positives"])
        out = {
            "query": towers.query(params, batch["query"], dropout("query")),
            "document": towers.document(params, take(positive), dropout("document")),
            "document_id": positive,
        }
        if negatives == "none":
            return out, {}
        if negatives == "hard":
            table = context.artefacts["negatives"]
            rows = jnp.take(table, batch["index"], axis=0, mode="fill", fill_value=-1)
            drawn = sample_hard(keys("negative"), rows, count)
        else:
            drawn = sample_random(keys("negative"), corpus.shape[0], count)
        each = [towers.document(params, take(drawn[:, h]), dropout(f"negative{h}")) for h in range(count)]
        return out | {"hard": jnp.stack(each, 1), "hard_id": drawn}, {}

    def loss(outputs, batch, context):
        real, b = batch_mask(batch), outputs["query"].shape[0]
        relevant = hard = hard_mask = None
        ids = outputs["document_id"]
        asked = real & (ids >= 0)  # a query without a positive has no pairs
        if in_batch:
            relevant = pair_masks(batch["positives"], ids, asked, asked)
        columns = [jnp.arange(b)] if in_batch else []
        if negatives != "none":
            hard = outputs["hard"].reshape(-1, outputs["hard"].shape[-1])
            owner = jnp.repeat(jnp.arange(b), outputs["hard"].shape[1])
            hard_mask = pair_masks(batch["positives"], outputs["hard_id"].ravel(), asked, real[owner])
            columns.append(owner)
        values, mask = star_pairs(outputs["query"], outputs["document"], hard, relevant, hard_mask, random_weight)
        grids = [jnp.stack(jnp.meshgrid(jnp.arange(b), c, indexing="ij"), -1).reshape(-1, 2) for c in columns]
        pairs = elements(values, jnp.concatenate(grids).astype(jnp.int32), mask, "pair")
        return Loss(pairs, metrics={"wrong_order": _wrong(values, mask)})

    provides = ("query", "document", "positives", "index")
    return Objective(init, forward, loss, "pair", provides, gathers=("positives",), name=name)


def _wrong(values: Array, mask: Array) -> Array:
    # a softplus above log 2 is a pair in the wrong order
    return jnp.sum(mask & (values > jnp.log(2.0))) / jnp.maximum(jnp.sum(mask), 1)


# --- ADORE (paper, section 4.3) ---------------------------------------------------------------------------------------


def adore_loss(
    queries: Float[Array, "b d"],
    index: Any,
    positives: Int[Array, "b p"],
    k: int = 200,
    metric_cut: int | None = 200,
    chunk: int = 16384,
) -> tuple[Float[Array, "b"], Int[Array, "b k"]]:
    """Searches with the present queries and returns each one's LambdaRank loss over what it found.

    Pairs are weighted by the change of reciprocal rank, ``|1/r_a - 1/r_b|`` with ranks beyond ``metric_cut`` worth 0.
    If a query finds none of its positives, all of them join the end of its list, worth 0.  The gradient reaches queries
    only.

    Args:
      queries: of the whole batch.
      index: frozen document vectors ``[N, d]``, or ``zoo.ops.rows.Rows`` of them over devices.
      positives: labelled ids, padded with -1.
      k: documents retrieved, in ``[1, N]``.
      metric_cut: above 0.
      chunk: documents scored at a time.

    Returns:
      f32 ``[b]``, the mean over pairs, 0 for a query without positives; and the ids found, best first.

    Raises:
      ValueError: k or metric_cut out of range.
    """
    rows, count = as_rows(index), positives.shape[1]
    gains = jnp.concatenate([reciprocal_rank_gains(k, metric_cut), jnp.zeros(count)])[None]
    frozen = jax.lax.stop_gradient(queries)
    _, found = rows.mips_topk(frozen, k, chunk)
    relevant = hits(found, positives)
    joins = ~jnp.any(relevant, 1, keepdims=True) & (positives >= 0)
    ids = jnp.concatenate([found, positives], 1)
    vectors = jax.lax.stop_gradient(rows.take(ids)).astype(jnp.float32)
    scores = jnp.einsum("bd,bkd->bk", queries, vectors, precision="highest")
    positive = jnp.concatenate([relevant, joins], 1)
    mask = jnp.concatenate([found >= 0, joins], 1)
    return lambda_pairwise(scores, positive, gains, mask, max_positives=count), found


def adore(
    towers: Towers, k: int = 200, metric_cut: int | None = 200, chunk: int = 16384, index: str = "index"
) -> Objective:
    """ADORE as an objective: the query encoder against a frozen index, searched anew in every step.

    The batch has ``query`` and ``positives`` as for :func:`star`; the artefact ``index`` is ``[N, d]``, best handed to
    the step by rows over all devices (``Train(..., sharded=("index",))``).

    Raises:
      ValueError: k or metric_cut below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    reciprocal_rank_gains(1, metric_cut)

    def init(rng, batch):
        return {"params": towers.init(rng, batch["query"], batch.get("document", batch["query"]))}

    def forward(variables, batch, context):
        keys = context.example_keys(batch, "query") if context.train else None
        return {"query": towers.query(variables["params"], batch["query"], keys)}, {}

    def loss(outputs, batch, context):
        positives, real = batch["positives"], batch_mask(batch)
        values, found = adore_loss(outputs["query"], context.artefacts[index], positives, k, metric_cut, chunk)
        best = jnp.argmax(hits(found, positives), 1)
        rank = jnp.where(jnp.any(hits(found, positives), 1), 1.0 / (1.0 + best), 0.0)
        mrr = jnp.sum(jnp.where(real, rank, 0.0)) / jnp.maximum(jnp.sum(real), 1)
        return Loss(example_elements(values, batch), metrics={"mrr": mrr})

    return Objective(init, forward, loss, "example", ("query", "index"), gathers=("positives",), name="adore")


CARD = Card(
    name="star_adore",
    family="retrieval",
    title="Optimizing Dense Retrieval Model Training with Hard Negatives",
    year=2021,
    kind="objective",
    idea=(
        "Dense retrievers are trained on pairs of a relevant and an irrelevant document. STAR takes irrelevant ones "
        "that an earlier model ranked high and, for stability, the other documents of the batch. ADORE freezes the "
        "documents and trains the query encoder against the documents that it retrieves at that very step, each pair "
        "weighted by what swapping it would change in the ranking metric."
    ),
    citation="Zhan, Mao, Liu, Guo, Zhang, Ma; SIGIR 2021; arXiv 2104.08051",
    plugs_into=(
        "any encoder of queries and documents",
        "any loss transformation on pairs (STAR) or examples (ADORE)",
        "a frozen index by rows over devices",
    ),
    pieces=(
        "zoo.nn.retriever:DenseRetriever",
        "zoo.nn.retriever:WeightedWords",
        "zoo.nn.retriever:shared_towers",
        "star",
        "star_pairs",
        "pair_masks",
        "sample_positive",
        "sample_hard",
        "sample_random",
        "clean_negatives",
        "adore",
        "adore_loss",
        "zoo.losses.retrieval:pairwise_softplus",
        "zoo.losses.retrieval:lambda_pairwise",
        "zoo.ops.rows:Rows",
        "zoo.optim.lamb:lamb",
    ),
    claim=Claim(
        statement=(
            "From one warmed-up query encoder over frozen document vectors, training against the documents retrieved "
            "at each step (ADORE) ends with a higher MRR@10 than as many steps against random negatives."
        ),
        metric="mrr_at_10",
        effect=0.03,
        method="adore",
        baseline="random negatives",
        trivial="warm-up only",
        seeds=5,
        budget="600 warm-up steps shared by all arms, then 600 steps of Adam at 3e-3 on the same batches",
    ),
    cost="STAR O(B^2 (1 + h) d) beside the encoders; ADORE O(B N d) search and O(B k d); no [B, B h, d], no [B, k, k]",
    official_code="jingtaozhan/DRhard (BSD-3-Clause)",
    departures=(
        "metric_cut must be given: the released command's default (None) zeroes every weight, and so the loss",
        "softplus instead of log(1 + exp), which overflows",
        "in-batch and hard pairs are pooled in one mean, as in the released code; random_weight gives the paper's sum",
        "the linear map of the encoder starts orthogonal instead of normal(0.02); a layer norm follows",
    ),
)
