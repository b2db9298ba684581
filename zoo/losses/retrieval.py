"""Losses of learning to rank and to retrieve: one value per example or per pair, masks for whatever is padded.

Scores are taken as they are (no normalisation, no temperature unless an argument says so), and everything is computed
in float32 by softplus and log-sum-exp, so that no score overflows.  A mask is true where an entry counts: padding, a
false negative or an excluded document is simply not there, whatever number stands in its place.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.losses.ranking import binary_cross_entropy
from zoo.ops.rows import Rows, as_rows

# --- pairs ------------------------------------------------------------------------------------------------------------


def pairwise_softplus(
    positive: Float[Array, "*b"], negatives: Float[Array, "*b m"], mask: Bool[Array, "*b m"] | None = None
) -> Float[Array, "*b m"]:
    """RankNet's ``-log sigmoid(s+ - s-) = softplus(s- - s+)`` of each example's positive with each negative.

    Burges et al., "Learning to Rank using Gradient Descent", ICML 2005, equation 3 with target probability 1.

    Returns:
      f32 losses, 0 where masked; ``log 2`` for equal scores.
    """
    losses = jax.nn.softplus(negatives.astype(jnp.float32) - positive.astype(jnp.float32)[..., None])
    return losses if mask is None else jnp.where(mask, losses, 0.0)


def reciprocal_rank_gains(length: int, cut: int | None) -> Float[Array, "k"]:
    """``g(r) = 1 / r`` for the ranks ``r = 1 .. length`` up to ``cut``, 0 beyond: what a document adds to MRR@cut.

    Raises:
      ValueError: a cut below 1 or ``None`` (which would zero every gain, and so the loss).
    """
    if cut is None or cut < 1:
        raise ValueError(f"metric_cut must be a positive int (None would zero the loss), got {cut}")
    rank = np.arange(1, length + 1)
    return jnp.asarray(np.where(rank <= cut, 1.0 / rank, 0.0), jnp.float32)


def lambda_pairwise(
    scores: Float[Array, "b k"],
    positive: Bool[Array, "b k"],
    gains: Float[Array, "#b k"],
    mask: Bool[Array, "b k"] | None = None,
    max_positives: int | None = None,
) -> Float[Array, "b"]:
    """LambdaRank as a loss: the mean over (positive a, negative b) of ``|g(a) - g(b)| softplus(s_b - s_a)``.

    Burges, "From RankNet to LambdaRank to LambdaMART", 2010, section 4, with the change of the metric when a and b swap
    places for a weight.  Weights are constants: no gradient flows through ``gains``.

    Args:
      scores: of a list's documents, in the order in which they were retrieved.
      positive: which are relevant.
      gains: of each document's present rank; 0 where its rank does not count.
      mask: which entries are real.
      max_positives: at most so many positives a list (static): memory is O(b P k) instead of O(b k k).  The first ones
        count, if there are more.

    Returns:
      f32 ``[b]``; 0 for a list without a pair.
    """
    b, k = scores.shape
    scores = scores.astype(jnp.float32)
    real = jnp.ones((b, k), bool) if mask is None else mask
    good, bad = positive & real, ~positive & real
    gains = jax.lax.stop_gradient(jnp.broadcast_to(gains, (b, k)).astype(jnp.float32))
    wide = k if max_positives is None else min(max_positives, k)
    # the places of the positives, first ones first; a list with fewer pads with places that are not positive
    place = jax.lax.top_k(jnp.where(good, k - jnp.arange(k), 0), wide)[1]
    take = functools.partial(jnp.take_along_axis, indices=place, axis=1)
    pair = take(good)[:, :, None] & bad[:, None, :]
    weight = jnp.abs(take(gains)[:, :, None] - gains[:, None, :])
    losses = weight * jax.nn.softplus(scores[:, None, :] - take(scores)[:, :, None])
    return jnp.sum(jnp.where(pair, losses, 0.0), (1, 2)) / jnp.maximum(jnp.sum(pair, (1, 2)), 1)


def hinge_with_negatives(
    positive: Float[Array, "b"],
    negatives: Float[Array, "b m"],
    mask: Bool[Array, "b m"] | None = None,
    margin: float = 0.5,
    squared: bool = False,
) -> Float[Array, "b"]:
    """The mean over an example's negatives of ``max(0, margin - s+ + s-)``, or of its square; 0 without negatives."""
    short = jnp.maximum(0.0, margin - positive.astype(jnp.float32)[:, None] + negatives.astype(jnp.float32))
    short = jnp.square(short) if squared else short
    real = jnp.ones(short.shape, bool) if mask is None else mask
    return jnp.sum(jnp.where(real, short, 0.0), 1) / jnp.maximum(jnp.sum(real, 1), 1)


# --- softmax over candidates ------------------------------------------------------------------------------------------


def softmax_with_negatives(
    positive: Float[Array, "b"], negatives: Float[Array, "b m"], mask: Bool[Array, "b m"] | None = None
) -> Float[Array, "b"]:
    """Cross-entropy of the positive among itself and its own negatives; 0 without negatives."""
    positive, negatives = positive.astype(jnp.float32), negatives.astype(jnp.float32)
    real = jnp.ones(negatives.shape, bool) if mask is None else mask
    scores = jnp.concatenate([positive[:, None], negatives], 1)
    counts = jnp.concatenate([jnp.ones((len(real), 1), bool), real], 1)
    return jax.nn.logsumexp(scores, axis=1, where=counts) - positive


def in_batch_softmax(
    queries: Float[Array, "b d"],
    documents: Float[Array, "b d"],
    mask: Bool[Array, "b"] | None = None,
    relevant: Bool[Array, "b b"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, "b"]:
    """Each query should pick its own document among the batch's, by inner product.

    For unit vectors this is ``zoo.losses.contrastive.info_nce_per_example`` in one direction.

    Args:
      queries, documents: row i of both belongs together.
      mask: which rows are real; the others are neither queries nor negatives.
      relevant: ``[i, j]``: document j answers query i too, and is no negative of it (false negatives).
      temperature: divides the scores.

    Returns:
      f32 ``[b]``, 0 where masked; ``log b`` if all scores are equal and nothing is masked.
    """
    real = jnp.ones(queries.shape[0], bool) if mask is None else mask
    clean = lambda x: jnp.where(real[:, None], x.astype(jnp.float32), 0.0)  # noqa: E731
    scores = jnp.matmul(clean(queries), clean(documents).T, precision="highest") / temperature
    own = jnp.eye(len(real), dtype=bool)
    counts = jnp.broadcast_to(real[None, :], own.shape) if relevant is None else real[None, :] & ~relevant
    losses = jax.nn.logsumexp(scores, axis=1, where=counts | own) - jnp.diagonal(scores)
    return jnp.where(real, losses, 0.0)


def soft_target_cross_entropy(
    scores: Float[Array, "b k"], targets: Float[Array, "b k"], mask: Bool[Array, "b k"] | None = None
) -> Float[Array, "b"]:
    """Cross-entropy of ``softmax(scores)`` against ``softmax(targets)``: a student's list against its teacher's.

    No gradient reaches the targets.  The minimum, the entropy of the targets, is not subtracted.
    """
    real = jnp.ones(scores.shape, bool) if mask is None else mask
    goal = jax.nn.softmax(jax.lax.stop_gradient(targets.astype(jnp.float32)), axis=1, where=real)
    shift = jax.nn.logsumexp(jnp.where(real, scores.astype(jnp.float32), -jnp.inf), axis=1, keepdims=True, where=real)
    logs = jnp.where(real, scores.astype(jnp.float32) - shift, 0.0)
    return -jnp.sum(jnp.where(real, goal, 0.0) * logs, 1)


def masked_bce(
    logits: Float[Array, "*n"],
    labels: Float[Array, "*n"],
    mask: Bool[Array, "*n"] | None = None,
    positive_weight: float = 1.0,
) -> Float[Array, "*n"]:
    """Binary cross-entropy with logits, entry by entry; labels may lie between 0 and 1.

    Args:
      logits, labels: of one shape.
      mask: which entries are real; the others are 0 and have no gradient, whatever they hold.
      positive_weight: factor of the positive term (1: calibrated).
    """
    real = jnp.ones(logits.shape, bool) if mask is None else mask
    # before the loss, so that padding that is not finite has a zero gradient
    z, y = (jnp.where(real, x.astype(jnp.float32), 0.0) for x in (logits, labels))
    losses = binary_cross_entropy(z, y)
    if positive_weight != 1.0:
        losses = positive_weight * y * jax.nn.softplus(-z) + (1.0 - y) * jax.nn.softplus(z)
    return jnp.where(real, losses, 0.0)


# --- softmax over a whole corpus --------------------------------------------------------------------------------------


def full_corpus_softmax(
    queries: Float[Array, "q d"],
    documents: Rows | Float[Array, "n d"],
    positive: Int[Array, "q"],
    excluded: Int[Array, "q e"] | None = None,
    chunk: int = 8192,
) -> Float[Array, "q"]:
    """Cross-entropy of each query's positive document among ALL documents of a frozen corpus.

    ``-log softmax(q D^T)[positive]``, without ever holding more than ``[q, chunk]`` scores: a running log-sum-exp
    forward; backward the scores of each chunk are computed again.  No gradient with respect to the documents exists.

    Args:
      queries: any scale; products are accumulated in float32 whatever the documents' type.
      documents: an array, or ``zoo.ops.rows.Rows`` spread over devices (maxima and sums travel, nothing else).
      positive: the id of each query's positive.
      excluded: ids that do not count in the denominator (other positives), padded with -1; never the positive itself.
      chunk: documents scored at a time on each device.

    Returns:
      f32 ``[q]`` losses in nats.
    """
    rows = as_rows(documents)
    excluded = jnp.full((queries.shape[0], 1), -1, jnp.int32) if excluded is None else excluded
    return _full_corpus(queries, rows, positive.astype(jnp.int32), excluded.astype(jnp.int32), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _full_corpus(queries, rows, positive, excluded, chunk):
    return _corpus_forward(queries, rows, positive, excluded, chunk)[0]


def _corpus_forward(queries, rows, positive, excluded, chunk):
    x = queries.astype(jnp.float32)

    def local(shard, x, excluded):
        def step(carry, part):
            top, total = carry
            scores = _scores(x, part, excluded)
            new = jnp.maximum(top, jnp.max(scores, 1))
            safe = jnp.where(new == -jnp.inf, 0.0, new)
            total = total * jnp.exp(top - safe) + jnp.sum(jnp.exp(scores - safe[:, None]), 1)
            return (new, total), None

        nothing = (jnp.full(len(x), -jnp.inf), jnp.zeros(len(x)))
        top, total = shard.scan(step, nothing, chunk)
        peak = shard.maximum(top)
        return peak + jnp.log(shard.sum(total * jnp.exp(top - peak)))

    total = rows.map_shards(local, x, excluded)
    mine = rows.take(positive).astype(jnp.float32)
    loss = total - jnp.einsum("qd,qd->q", x, mine, precision="highest")
    return loss, (queries, rows, positive, excluded, total, mine)


def _corpus_backward(chunk, kept, g):
    queries, rows, positive, excluded, total, mine = kept
    x = queries.astype(jnp.float32)

    def local(shard, x, excluded, total):
        def step(mean, part):
            weights = jnp.exp(_scores(x, part, excluded) - total[:, None])
            return mean + jnp.matmul(weights, part.values.astype(jnp.float32), precision="highest"), None

        return shard.sum(shard.scan(step, jnp.zeros_like(x), chunk))

    gradient = g[:, None] * (rows.map_shards(local, x, excluded, total) - mine)
    return (
        gradient.astype(queries.dtype),
        jax.tree.map(_no_gradient, rows),
        _no_gradient(positive),
        _no_gradient(excluded),
    )


_full_corpus.defvjp(_corpus_forward, _corpus_backward)


def _scores(x: Array, part: Any, excluded: Array) -> Array:
    scores = jnp.matmul(x, part.values.astype(jnp.float32).T, precision="highest")
    at = excluded - part.start
    at = jnp.where((at < 0) | (at >= scores.shape[1]), scores.shape[1], at)
    scores = scores.at[jnp.arange(len(x))[:, None], at].set(-jnp.inf, mode="drop")
    return jnp.where(part.valid, scores, -jnp.inf)


def _no_gradient(x):
    kind = jnp.result_type(x)
    return jnp.zeros_like(x) if jnp.issubdtype(kind, jnp.inexact) else np.zeros(jnp.shape(x), jax.dtypes.float0)
