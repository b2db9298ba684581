"""Interpolation and extrapolation of retrieval models: two ways to resample queries, and what to report.

Zhan, Xie, Mao, Liu, Guo, Zhang, Ma: "Evaluating Interpolation and Extrapolation Performance of Neural Retrieval
Models", CIKM 2022, arXiv 2204.11447.

Test queries of the usual benchmarks are near training queries (the same entities, intents, even labelled passages), so
a score mostly measures interpolation.  The paper embeds queries with a fixed encoder and resamples: **ReSTrain** keeps
a small test set and trains once on its nearest training queries and once on as many that are far from all of it;
**ReSTTest** clusters all queries, leaves one cluster out of training at a time, and tests inside and outside of what
was trained on.  A model is trained anew for each set and its two scores are reported apart.

The sampling code was not released.  Reconstructed here: ReSTrain's order (round robin over the test queries by rank),
its pool of distant queries, and the clustering's settings; they reproduce every property of the released files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from zoo.base import Loss, Objective, batch_mask, example_elements
from zoo.catalogue import Card, Claim
from zoo.losses.retrieval import in_batch_softmax
from zoo.nn.retriever import Towers
from zoo.ops.blocks import in_blocks
from zoo.ops.kmeans import kmeans
from zoo.ops.prototypes import l2_normalize
from zoo.ops.search import mips_topk

__all__ = [
    "ExtrapolationReport", "ReSTrain", "Run", "check_embeddings", "evaluate_protocol", "in_batch_retriever",
    "label_overlap", "max_similarity_to_test", "query_overlap", "report", "restrain", "resttest", "resttest_runs",
]  # fmt: skip

AnyKey = Key[Array, ""] | UInt[Array, "2"]

# --- how much test queries overlap with training queries (paper, section 3) -------------------------------------------


def label_overlap(
    train: Int[Array, "n p"], test: Int[Array, "m r"], documents: int, min_overlap: int = 1
) -> tuple[Float[Array, ""], Bool[Array, "m"]]:
    """Which test queries share labelled passages with the training queries.

    Args:
      train, test: labelled passages of each query, ids below ``documents``, padded with -1.
      documents: how many passages there are.
      min_overlap: passages shared at least; the paper's words say one, the released script counts from two on.

    Returns:
      The share, over ALL test queries, those without a label included, and which they are.
    """
    seen = jnp.zeros(documents, bool).at[jnp.where(train >= 0, train, documents).ravel()].set(True, mode="drop")
    shared = (test >= 0) & jnp.take(seen, jnp.maximum(test, 0))
    # a passage that is listed twice is one passage
    first = ~jnp.any((test[:, :, None] == test[:, None, :]) & jnp.tri(test.shape[1], k=-1, dtype=bool)[None], -1)
    found = jnp.sum(shared & first, 1) >= min_overlap
    return jnp.mean(found.astype(jnp.float32)), found


def max_similarity_to_test(
    train: Float[Array, "n d"], test: Float[Array, "m d"], chunk: int = 4096
) -> Float[Array, "n"]:
    """Each training query's largest cosine with any test query, ``chunk`` training queries at a time."""
    unit = l2_normalize(test.astype(jnp.float32)).T
    most = lambda rows: jnp.max(  # noqa: E731
        jnp.matmul(l2_normalize(rows.astype(jnp.float32)), unit, precision="highest"), 1
    )
    return in_blocks(most, train, chunk)


def query_overlap(
    train: Float[Array, "n d"], test: Float[Array, "m d"], threshold: float | Float[Array, ""] = 0.9
) -> tuple[Float[Array, ""], Bool[Array, "m"]]:
    """Which test queries have a near duplicate, of cosine ``threshold`` at least, among the training queries."""
    found = max_similarity_to_test(test, train) >= threshold
    return jnp.mean(found.astype(jnp.float32)), found


# --- ReSTrain (paper, section 4.2) ------------------------------------------------------------------------------------


class ReSTrain(NamedTuple):
    """Training sets for a small test set; positions in the array of training queries.

    Attributes:
      interpolation, extrapolation: an int32 array for each size asked for; larger sets contain smaller ones.
      neighbourhood: m; a query among the m nearest of any test query is in no extrapolation set.
      available: how many training queries are outside all those neighbourhoods.
    """

    interpolation: list[np.ndarray]
    extrapolation: list[np.ndarray]
    neighbourhood: int
    available: int


def restrain(
    train: Float[Array, "n d"],
    test: Float[Array, "m d"],
    sizes: Sequence[int],
    key: AnyKey,
    order: str = "random",
    neighbourhood: int | None = None,
    chunk: int = 16384,
) -> ReSTrain:
    """ReSTrain: for a small test set, its nearest training queries, and as many that are far from all of it.

    Interpolation sets are prefixes of one order: every test query's nearest training query, then every one's second
    nearest, and so on (test queries in their order; a query once).  Extrapolation sets are prefixes of another: the
    training queries outside the m nearest of every test query, shuffled once (``"random"``), or by rising largest
    similarity to the test set (``"least_similar"``).  Runs on the host; similarities in blocks on the device.

    Args:
      train, test: query vectors of one fixed encoder, of any length.
      sizes: of the sets.
      key: of the shuffle.
      order: of the extrapolation sets.
      neighbourhood: m; by default as deep as the largest interpolation set reaches.
      chunk: training queries compared at a time.

    Raises:
      ValueError: vectors that :func:`check_embeddings` refuses, no sizes, a size that cannot be had (with how many
        queries are left), or an unknown order.
    """
    check_embeddings(train, test)
    if order not in ("random", "least_similar"):
        raise ValueError(f"order must be 'random' or 'least_similar', got {order!r}")
    n, wanted = train.shape[0], sorted(sizes)
    if not wanted or wanted[0] < 1 or wanted[-1] > n:
        raise ValueError(
            f"sizes must be between 1 and the {n} training queries, at least one of them; got {list(sizes)}"
        )
    a, b = (l2_normalize(x.astype(jnp.float32)) for x in (test, train))
    depth = min(n, -(-wanted[-1] // test.shape[0]) + 8)
    while True:
        ranked = np.asarray(mips_topk(a, b, depth, chunk)[1])
        # rank by rank, test query by test query
        line, first = np.unique(ranked.T.ravel(), return_index=True)
        line = line[np.argsort(first)]
        if len(line) >= wanted[-1] or depth == n:
            break
        depth = min(n, 2 * depth)
    reached = int(np.sort(first)[wanted[-1] - 1]) // test.shape[0] + 1
    m = reached if neighbourhood is None else neighbourhood
    if not reached <= m <= n:
        raise ValueError(
            f"neighbourhood must be in [{reached}, {n}]: the largest interpolation set reaches rank {reached}; got {m}"
        )
    if m > depth:
        ranked = np.asarray(mips_topk(a, b, m, chunk)[1])
    pool = np.setdiff1d(np.arange(n), ranked[:, :m].ravel())
    if len(pool) < wanted[-1]:
        raise ValueError(
            f"only {len(pool)} of {wanted[-1]} queries are outside the top-{m} neighbourhoods of the test queries; "
            "ask for smaller sizes, or use resttest, which is for large test sets"
        )
    if order == "random":
        pool = pool[np.asarray(jax.random.permutation(key, len(pool)))]
    else:
        near = np.asarray(max_similarity_to_test(train, test, chunk))[pool]
        pool = pool[np.argsort(near, kind="stable")]
    take = lambda of: [np.asarray(of[:s], np.int32) for s in sizes]  # noqa: E731
    return ReSTrain(take(line), take(pool), m, len(pool))


# --- ReSTTest (paper, section 4.3) ------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One of ReSTTest's trainings: positions in the arrays of training and of test queries, int32."""

    train: np.ndarray
    interpolation: np.ndarray
    extrapolation: np.ndarray


def resttest(
    train: Float[Array, "n d"], test: Float[Array, "m d"], key: AnyKey, k: int = 5, iterations: int = 25
) -> tuple[Int[Array, "n"], Int[Array, "m"]]:
    """ReSTTest: clusters all queries by direction (spherical k-means of both sets together).

    Args:
      train, test: query vectors of one fixed encoder, of any length.
      key: of k-means++.
      k: buckets, at least 2.
      iterations: of k-means.

    Returns:
      The bucket of each training and of each test query.

    Raises:
      ValueError: vectors that :func:`check_embeddings` refuses, or k out of range.
    """
    check_embeddings(train, test)
    n = train.shape[0]
    if not 2 <= k <= n + test.shape[0]:
        raise ValueError(f"k must be in [2, {n + test.shape[0]}], the number of queries; got {k}")
    both = jnp.concatenate([train, test]).astype(jnp.float32)
    found = kmeans(key, both, k, iterations, spherical=True).assignment
    return found[:n], found[n:]


def resttest_runs(train: Any, test: Any) -> Iterator[Run]:
    """For each bucket: train on all others, test inside them (interpolation) and on the one left out (extrapolation).

    Args:
      train, test: the buckets that :func:`resttest` gave.

    Raises:
      ValueError: a single bucket, or one without test queries or that leaves no training queries.
    """
    train, test = np.asarray(train), np.asarray(test)
    buckets = np.unique(np.concatenate([train, test]))
    if len(buckets) < 2:
        raise ValueError("all queries are in one bucket: there is nothing to leave out; cluster into at least 2")
    for b in buckets:
        rest, inside, outside = (np.flatnonzero(x).astype(np.int32) for x in (train != b, test != b, test == b))
        for rows, what in (
            (rest, "training queries outside it"),
            (outside, "test queries"),
            (inside, "others to test"),
        ):
            if not len(rows):
                raise ValueError(f"bucket {b} has no {what}; use fewer buckets or another key")
        yield Run(rest, inside, outside)


# --- training on a resampled set, and what is reported (paper, section 4.4) -------------------------------------------


class ExtrapolationReport(NamedTuple):
    """Two scores of one model.

    Attributes:
      interpolation, extrapolation: means of the per-run means (as the paper words it).
      gap: extrapolation minus interpolation.
      relative: the gap over interpolation.
      interpolation_pooled, extrapolation_pooled: means over all per-query values; they differ from the former where
        buckets are unequal.
      per_run: ``[runs, 2]`` means.
      per_query: the values by run: ``(interpolation, extrapolation)``.
    """

    interpolation: float
    extrapolation: float
    gap: float
    relative: float
    interpolation_pooled: float
    extrapolation_pooled: float
    per_run: np.ndarray
    per_query: list[tuple[np.ndarray, np.ndarray]]


def report(per_query: Sequence[tuple[Any, Any]]) -> ExtrapolationReport:
    """Reduces per-query values of one or several runs.

    Args:
      per_query: ``(interpolation [i], extrapolation [e])`` of each run.

    Raises:
      ValueError: no runs, or a part without queries.
    """
    rows = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in per_query]
    if not rows or any(not len(a) or not len(b) for a, b in rows):
        raise ValueError("a report needs at least one run, and queries on both sides of each")
    per_run = np.array([[a.mean(), b.mean()] for a, b in rows])
    inside, outside = per_run.mean(0).tolist()
    pooled = [float(np.concatenate([r[i] for r in rows]).mean()) for i in (0, 1)]
    relative = (outside - inside) / inside if inside else float("nan")
    return ExtrapolationReport(inside, outside, outside - inside, relative, *pooled, per_run, rows)


def evaluate_protocol(
    train: Callable[[np.ndarray, int], Any], evaluate: Callable[[Any, np.ndarray], Any], runs: Sequence[Run]
) -> ExtrapolationReport:
    """Trains once for each run and measures the model on both sides.

    Hard negatives, teachers' scores and whatever else training uses must be made within the resampled set: queries that
    were removed leak otherwise.

    Args:
      train: ``(positions of training queries, number of the run) -> model``.
      evaluate: ``(model, positions of test queries) -> per-query values``.
      runs: see :func:`resttest_runs`; for ReSTrain two trainings share one test set: compare two reports' means.
    """
    found = []
    for number, run in enumerate(runs):
        model = train(run.train, number)
        found.append((evaluate(model, run.interpolation), evaluate(model, run.extrapolation)))
    return report(found)


def in_batch_retriever(towers: Towers, temperature: float = 1.0) -> Objective:
    """The dual encoder of the protocol's plainest training: in-batch softmax.

    The batch has ``query`` and ``document`` (inputs of the encoders, row by row) and ``document_id`` int32, so that a
    document that stands twice in a batch is not its own negative.
    """

    def init(rng, batch):
        return {"params": towers.init(rng, batch["query"], batch["document"])}

    def forward(variables, batch, context):
        keys = lambda what: context.example_keys(batch, what) if context.train else None  # noqa: E731
        params = variables["params"]
        query = towers.query(params, batch["query"], keys("query"))
        return {"query": query, "document": towers.document(params, batch["document"], keys("document"))}, {}

    def loss(outputs, batch, context):
        same = batch["document_id"][:, None] == batch["document_id"][None, :]
        query, document = outputs["query"], outputs["document"]
        values = in_batch_softmax(query, document, batch_mask(batch), same, temperature)
        return Loss(example_elements(values, batch))

    provides = ("query", "document", "index")
    return Objective(init, forward, loss, "example", provides, gathers=("document_id",), name="in-batch retriever")


def check_embeddings(train: Any, test: Any, train_ids: Sequence[str] = (), test_ids: Sequence[str] = ()) -> None:
    """Checks query vectors before they are compared.

    Raises:
      ValueError: different dimensions, no queries, vectors that are zero or not finite (with the first), or test ids
        among the training ids.
    """
    train, test = np.asarray(train), np.asarray(test)
    if train.ndim != 2 or test.ndim != 2 or not len(train) or not len(test):
        raise ValueError(f"query vectors must be [n, d] with n >= 1; got {list(train.shape)} and {list(test.shape)}")
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"training queries have {train.shape[1]} dimensions, test queries {test.shape[1]}: "
            "embed both with one encoder"
        )
    for what, x in (("training", train), ("test", test)):
        bad = ~np.isfinite(x).all(1)
        if bad.any():
            raise ValueError(f"the vector of {what} query {int(np.argmax(bad))} is not finite ({int(bad.sum())} such)")
        zero = ~x.any(1)
        if zero.any():
            raise ValueError(f"the vector of {what} query {int(np.argmax(zero))} is zero ({int(zero.sum())} such)")
    both = sorted(set(train_ids) & set(test_ids))
    if both:
        raise ValueError(
            f"{len(both)} test queries are among the training queries, which leaks: {', '.join(map(str, both[:3]))}"
        )


CARD = Card(
    name="retrieval_extrapolation",
    family="retrieval",
    title="Evaluating Interpolation and Extrapolation Performance of Neural Retrieval Models",
    year=2022,
    kind="benchmark",
    idea=(
        "Test queries are usually near training queries, so that scores measure interpolation. Queries are embedded by "
        "a fixed encoder and resampled: either a small test set keeps its place while training queries are chosen near "
        "to it or far from it, or all queries are clustered and each cluster is left out of training once. The model "
        "is trained anew for each and scored on either side."
    ),
    citation="Zhan, Xie, Mao, Liu, Guo, Zhang, Ma; CIKM 2022; arXiv 2204.11447",
    plugs_into=("any retriever that can be trained on a subset of queries", "any per-query metric"),
    pieces=(
        "label_overlap",
        "query_overlap",
        "max_similarity_to_test",
        "restrain",
        "resttest",
        "resttest_runs",
        "evaluate_protocol",
        "report",
        "ExtrapolationReport",
        "in_batch_retriever",
        "check_embeddings",
        "zoo.ops.kmeans:kmeans",
        "zoo.metrics.ranking:mrr_at_k",
    ),
    claim=Claim(
        statement=(
            "Leave-one-cluster-out evaluation (ReSTTest, 5 buckets) of a trained dual encoder finds its MRR@10 inside "
            "the trained clusters above that outside, by more than it does for the untrained encoder."
        ),
        metric="gap",
        effect=0.1,
        method="trained dual encoder",
        baseline="untrained dual encoder",
        trivial="random ranking",
        seeds=5,
        budget="a measurement: the same queries, buckets and architecture; five trainings of 400 steps, nothing tuned",
    ),
    cost="similarities O(n m d) in blocks; k-means O(iterations n k d); k + 2 sizes trainings, which dominate",
    official_code="jingtaozhan/extrapolate-eval (MIT): the resampled files and the overlap script, no sampling code",
    departures=(
        "label overlap counts from one shared passage on, as the paper says; min_overlap=2 is the released script",
        "the order of ReSTrain's sets, the pool of distant queries and the clustering are reconstructed",
    ),
)
