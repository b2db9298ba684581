"""Pair-based metric learning losses: functions of a similarity matrix and two masks, one value per anchor.

``similarity [b, m]`` compares b anchors with m candidates: the batch itself, a queue, proxies or anything else.
``positive`` and ``negative`` (bool ``[b, m]``) say what each candidate is to each anchor; what is in neither (the
anchor itself, padding) does not exist.  So in-batch, cross-batch, proxy and padded cases are one piece of code.
An anchor that has nothing to compare (no positive, or no negative, where the loss needs one) costs 0, without gradient.

All are float32 and take O(b m) memory, no loss builds ``b x m x m``: where triplets are needed they are counted by
sorting, or anchors are taken one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

Number = float | int
Matrix = Float[Array, "b m"]
Mask = Bool[Array, "b m"]


def pair_masks(
    labels: Shaped[Array, "b *one"],
    others: Shaped[Array, "m *one"] | None = None,
    mask: Bool[Array, "b"] | None = None,
    other_mask: Bool[Array, "m"] | None = None,
) -> tuple[Bool[Array, "b m"], Bool[Array, "b m"]]:
    """Which candidates share each anchor's label, and which do not.

    Args:
      labels: of the anchors; compared exactly.
      others: of the candidates; by default the candidates are the anchors, and none is its own candidate.
      mask, other_mask: which rows are real; padding is in neither mask.

    Raises:
      ValueError: labels that are not a list.
    """
    if labels.ndim != 1 or (others is not None and others.ndim != 1):
        raise ValueError(f"labels must be [b], got {list(labels.shape)}; a column [b, 1] would compare wrongly")
    own = others is None
    others = labels if own else others
    rows = jnp.ones(labels.shape[0], bool) if mask is None else mask
    if other_mask is None:
        other_mask = rows if own else jnp.ones(others.shape[0], bool)
    valid = rows[:, None] & other_mask[None, :]
    if own:
        valid = valid & ~jnp.eye(labels.shape[0], dtype=bool)
    same = labels[:, None] == others[None, :]
    return same & valid, ~same & valid


def contrastive_pairs(
    similarity: Matrix,
    positive: Mask,
    negative: Mask,
    positive_margin: Number = 1.0,
    negative_margin: Number = 0.5,
) -> Float[Array, "b"]:
    """``mean relu(m_p - s_p) + mean relu(s_n - m_n)`` over each anchor's candidates (tcm brief; Hadsell et al., 2006).

    Args:
      similarity, positive, negative: see the module.
      positive_margin, negative_margin: similarities beyond which a pair costs nothing.
    """
    near = _mean(jax.nn.relu(positive_margin - similarity), positive)
    return near + _mean(jax.nn.relu(similarity - negative_margin), negative)


def triplet(
    similarity: Matrix,
    positive: Mask,
    negative: Mask,
    margin: Number = 0.2,
    mining: str = "batch_hard",
) -> Float[Array, "b"]:
    """``relu(s_an - s_ap + margin)`` over the anchor's mined triplets.

    Args:
      similarity, positive, negative: see the module.
      margin: by how much a positive should be more similar than a negative; not negative.
      mining: ``"batch_hard"`` the least similar positive with the most similar negative (Hermans et al., 2017);
        ``"batch_all"`` the mean over all triplets of the anchor that cost something (the same paper's non-zero mean);
        ``"semi_hard"`` for each positive the most similar negative among those less similar than it, or the least
        similar negative if there is none, mean over positives (Schroff et al., 2015).

    Raises:
      ValueError: a negative margin or an unknown miner.
    """
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    usable = jnp.any(positive, 1) & jnp.any(negative, 1)
    if mining == "batch_hard":
        hardest = jnp.min(jnp.where(positive, similarity, jnp.inf), 1)
        nearest = jnp.max(jnp.where(negative, similarity, -jnp.inf), 1)
        gap = jnp.where(usable, nearest, 0.0) - jnp.where(usable, hardest, 0.0)
        return jnp.where(usable, jax.nn.relu(gap + margin), 0.0)
    if mining not in ("batch_all", "semi_hard"):
        raise ValueError(f"mining must be 'batch_hard', 'batch_all' or 'semi_hard', got {mining!r}")
    # negatives in rising order, the others at the end, where no search finds them
    ordered = jnp.sort(jnp.where(negative, similarity, jnp.inf), 1)
    count = jnp.sum(negative, 1, keepdims=True)
    clean = jnp.where(jnp.arange(similarity.shape[1]) < count, ordered, 0.0)
    if mining == "semi_hard":
        below = _searchsorted(ordered, similarity, "left")
        chosen = jnp.take_along_axis(clean, jnp.maximum(below - 1, 0), 1)
        return _mean(jax.nn.relu(chosen - similarity + margin), positive & usable[:, None])
    # sum over negatives n above s_p - margin of (s_n - s_p + margin), by suffix sums of the sorted negatives
    first = _searchsorted(ordered, similarity - margin, "right")
    active = count - first
    sums = jnp.cumsum(clean, 1)
    before = jnp.where(first > 0, jnp.take_along_axis(sums, jnp.maximum(first - 1, 0), 1), 0.0)
    total = sums[:, -1:] - before - active * (similarity - margin)
    chosen = positive & usable[:, None]
    number = jnp.sum(jnp.where(chosen, active, 0), 1)
    return jnp.sum(jnp.where(chosen, total, 0.0), 1) / jnp.maximum(number, 1)


def multi_similarity(
    similarity: Matrix,
    positive: Mask,
    negative: Mask,
    alpha: Number = 2.0,
    beta: Number = 50.0,
    base: Number = 0.5,
    epsilon: Number | None = 0.1,
) -> Float[Array, "b"]:
    """The multi-similarity loss (Wang et al., CVPR 2019, equations 15 and its miner, 11 and 12).

    ``1/alpha log(1 + sum_p exp(-alpha (s_p - base))) + 1/beta log(1 + sum_n exp(beta (s_n - base)))``.

    Args:
      similarity, positive, negative: see the module.
      alpha, beta: sharpness for positives and negatives; positive.
      base: the similarity around which both turn.
      epsilon: the miner's slack: a negative counts if it is more similar than the hardest positive less ``epsilon``, a
        positive if it is less similar than the hardest negative plus ``epsilon``; ``None`` counts all pairs.
    """
    if epsilon is not None:
        hardest = jnp.min(jnp.where(positive, similarity, jnp.inf), 1, keepdims=True)
        nearest = jnp.max(jnp.where(negative, similarity, -jnp.inf), 1, keepdims=True)
        positive, negative = (
            positive & (similarity - epsilon < nearest),
            negative & (similarity + epsilon > hardest),
        )
    near = _softplus_sum(-alpha * (similarity - base), positive) / alpha
    return near + _softplus_sum(beta * (similarity - base), negative) / beta


def margin_pairs(
    distance: Matrix,
    positive: Mask,
    negative: Mask,
    beta: Number | Float[Array, ""] = 1.2,
    alpha: Number = 0.2,
) -> Float[Array, "b"]:
    """The margin loss on DISTANCES: ``relu(d_p - beta + alpha)`` and ``relu(beta - d_n + alpha)`` (Wu et al., 2017).

    Summed over each anchor's pairs and divided by the number of those that cost something (at least 1).

    Args:
      distance: Euclidean, of unit vectors.
      positive, negative: see the module; a sampler's choice is a narrower mask.
      beta: the distance between positives and negatives, perhaps learned.
      alpha: half of the band around it.
    """
    near = jnp.where(positive, jax.nn.relu(distance - beta + alpha), 0.0)
    far = jnp.where(negative, jax.nn.relu(beta - distance + alpha), 0.0)
    active = jnp.sum(near > 0, 1) + jnp.sum(far > 0, 1)
    return jnp.sum(near + far, 1) / jnp.maximum(active, 1)


def supervised_contrastive(
    similarity: Matrix,
    positive: Mask,
    negative: Mask,
    temperature: Number | Float[Array, ""] = 0.1,
    log_weights: Matrix | None = None,
    positive_in_denominator: bool = True,
) -> Float[Array, "b"]:
    """SupCon, the form with the sum outside (Khosla et al., 2020, equation 2); with one positive it is NT-Xent.

    ``-(1/|P|) sum_p [s_p / t - log sum_u w_u exp(s_u / t)]``, u over positives and negatives.

    Args:
      similarity, positive, negative: see the module.
      temperature: positive.
      log_weights: logarithms of the candidates' weights in the denominator; 0 by default.
      positive_in_denominator: whether positives are among the u (the usual form).

    Raises:
      ValueError: a temperature that is not positive.
    """
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = similarity.astype(jnp.float32) / temperature
    among = (positive | negative) if positive_in_denominator else negative
    usable = jnp.any(positive, 1) & jnp.any(among, 1)
    weighted = logits if log_weights is None else logits + log_weights
    # an anchor without candidates gets one, so that its logarithm and its gradient stay finite
    among = among | ~usable[:, None]
    every = jax.nn.logsumexp(jnp.where(usable[:, None], weighted, 0.0), axis=1, where=among)
    return jnp.where(usable, every - _mean(logits, positive), 0.0)


def rank_n_contrast(
    similarity: Matrix,
    label_distance: Matrix,
    candidates: Mask,
    temperature: Number | Float[Array, ""] = 2.0,
) -> Float[Array, "b"]:
    """Rank-N-Contrast, for ordered labels (Zha et al., NeurIPS 2023, equation 2; "SupCR" in supremix's repository).

    Every candidate j is a positive in turn, against all k whose label is at least as far from the anchor's as j's is:
    ``-mean_j [s_j / t - log sum_{k: |y - y_k| >= |y - y_j|} exp(s_k / t)]``.

    Args:
      similarity: the papers take the negative L1 or L2 distance.
      label_distance: ``|y_i - y_j|``, not negative.
      candidates: who takes part; never the anchor itself.
      temperature: positive.
    """
    logits = jnp.where(candidates, similarity.astype(jnp.float32) / temperature, -jnp.inf)
    far = jnp.where(candidates, label_distance, -1.0)
    order = jnp.argsort(-far, axis=1, stable=True)
    ordered = jnp.take_along_axis(far, order, 1)
    usable = jnp.any(candidates, 1)
    # farthest first, so that running log-sum-exps are the denominators; ties read at the end of their group
    safe = jnp.where(usable[:, None], jnp.take_along_axis(logits, order, 1), 0.0)
    running = jax.lax.cumlogsumexp(safe, axis=1)
    end = _searchsorted(-ordered, -far, "right") - 1
    every = jnp.take_along_axis(running, jnp.clip(end, 0), 1)
    clean = jnp.where(candidates, logits, 0.0)
    return _mean(jnp.where(candidates, every, 0.0) - clean, candidates)


def smooth_ap(
    similarity: Matrix,
    positive: Mask,
    negative: Mask,
    temperature: Number = 0.01,
    max_positives: int | None = None,
) -> Float[Array, "b"]:
    """``1 - AP`` with ranks made smooth by sigmoids (Brown et al., ECCV 2020, equation 8).

    Args:
      similarity, positive, negative: see the module.
      temperature: of the sigmoid.
      max_positives: the most positives any anchor has (K - 1 under a P x K sampler), which saves the work on others.
    """
    ranks, among, real = _soft_ranks(similarity, positive, negative, temperature, max_positives)
    precision = among / ranks
    return jnp.where(jnp.any(positive, 1), 1.0 - _mean(precision, real), 0.0)


def recall_surrogate(
    similarity: Matrix,
    positive: Mask,
    negative: Mask,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    rank_temperature: Number = 0.01,
    recall_temperature: Number = 1.0,
    max_positives: int | None = None,
) -> Float[Array, "b"]:
    """RS@k: ``1 - mean_k mean_p sigmoid((k - rank_p) / t_1)`` with smooth ranks (Patel et al., CVPR 2022, eq. 6 to 8).

    The paper divides by ``min(k, |P|)`` positives at most k; here, as in its released form, all positives count.

    Args:
      similarity, positive, negative: see the module; ranks are among negatives and the other positives, from 1.
      ks: cut-offs.
      rank_temperature: of the sigmoids inside the rank.
      recall_temperature: of the sigmoid at k.
      max_positives: see :func:`smooth_ap`.
    """
    ranks, _, real = _soft_ranks(similarity, positive, negative, rank_temperature, max_positives)
    at = jnp.stack([_mean(jax.nn.sigmoid((k - ranks) / recall_temperature), real) for k in ks])
    return jnp.where(jnp.any(positive, 1), 1.0 - jnp.mean(at, 0), 0.0)


def _soft_ranks(similarity, positive, negative, temperature, most):
    # ranks of an anchor's positives among all candidates and among positives, [b, most] each, anchors one at a time
    width = similarity.shape[1]
    most = width if most is None else most
    if not 1 <= most <= width:
        raise ValueError(f"max_positives must lie between 1 and the number of candidates {width}, got {most}")

    @jax.checkpoint
    def one(row):
        s, p, n = row
        ids = jnp.argsort(~p, stable=True)[:most]
        above = jax.nn.sigmoid((s[None, :] - s[ids][:, None]) / temperature)
        above = jnp.where(jnp.arange(width)[None, :] == ids[:, None], 0.0, above)
        near = 1.0 + jnp.sum(jnp.where(p[None, :], above, 0.0), 1)
        return near + jnp.sum(jnp.where(n[None, :], above, 0.0), 1), near, p[ids]

    clean = jnp.where(positive | negative, similarity.astype(jnp.float32), 0.0)
    # as many anchors at once as keep the tile small: memory stays that of the matrix
    return jax.lax.map(one, (clean, positive, negative), batch_size=max(1, (1 << 20) // (most * width)))


def _mean(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0), 1) / jnp.maximum(jnp.sum(mask, 1), 1)


def _softplus_sum(logits: Array, mask: Array) -> Array:
    # log(1 + sum of exp) over what the mask keeps, 0 for none
    zero = jnp.zeros((logits.shape[0], 1), logits.dtype)
    keep = jnp.concatenate([jnp.ones_like(zero, bool), mask], 1)
    return jax.nn.logsumexp(jnp.concatenate([zero, jnp.where(mask, logits, 0.0)], 1), axis=1, where=keep)


def _searchsorted(ordered: Array, values: Array, side: str) -> Int[Array, "b m"]:
    return jax.vmap(lambda o, v: jnp.searchsorted(o, v, side=side, method="sort"))(ordered, values)
