"""Adaptive multi-head contrastive learning: several heads, and a temperature for every pair and head.

Wang, Koniusz, Gedeon and Zheng, "Adaptive Multi-head Contrastive Learning", ECCV 2024 (arXiv 2310.05615).

Under strong and varied augmentations positives may look unlike and negatives alike, so one head that pulls all
positives together at one temperature asks for the impossible.  AMCL compares every pair in C heads, and predicts the
temperature of each pair in each head from the pair.  A likelihood gives the form: if ``z_j`` is Gaussian around the
anchor ``z_i`` with variance tau and both are unit vectors, ``-log N = (1 - cos) / tau + (d'/2) log tau + const``.  So
similarities are divided by their own tau and a regulariser keeps tau from escaping; among the negatives only the most
similar one of each head counts.

In the order of the paper: the heads and the temperature network, the temperature and its regulariser, the losses of
the paper's Table 2 as functions of similarities and temperatures, and the plug-in: :class:`AdaptiveHeads` puts the
heads of any encoder where :func:`amcl`, a loss transformation, finds them.  Heads and temperatures serve training only;
inference reads the encoder's features.

Shapes: B examples, C heads of size d', h numbers per head from which a pair's temperature is made.  ``[B, C, .]`` has
the batch first, so that it is gathered over devices and queued like any other output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zoo.base import Context, Elements, LossTransformation, batch_mask
from zoo.catalogue import Card, Claim
from zoo.losses.siamese import cross_correlation
from zoo.nn.pair_temperature import BLOCK, aligned_scores, bounded_temperature, check_limits, pair_scores
from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize

Number = float | int


# --- the temperature of a pair and its regulariser --------------------------------------------------------------------


def gaussian_temperature_regularizer(tau: Float[Array, "*n"], dim: Number) -> Float[Array, "*n"]:
    """``Omega(tau) = (d'/2) log tau + 1 / tau``, what the likelihood adds to ``-cos / tau``; least at ``2 / d'``.

    Args:
      tau: temperatures, positive.
      dim: d', the size of a head (not of a batch).
    """
    tau = tau.astype(jnp.float32)
    return dim / 2 * jnp.log(tau) + 1.0 / tau


# --- the losses of Table 2 --------------------------------------------------------------------------------------------


def amcl_contrastive(
    sim: Float[Array, "c b m"],
    tau: Float[Array, "c b m"],
    pos_mask: Bool[Array, "b m"],
    neg_mask: Bool[Array, "b m"],
    dim: Number,
    beta: Number = 0.1,
    negatives: str = "max",
    positive_in_candidates: bool = False,
) -> Float[Array, "b"]:
    """The loss of hosts with negatives (SimCLR, MoCo, CAN), per anchor, from matrices.

    ``sum_c [-s+/tau+ + s_n*/tau_n* + beta Omega(tau+) - beta Omega(tau_n*)]``, n* the negative of the greatest
    *similarity* in that head.  ``"logsumexp"`` is the soft form, ``-s+/tau+ + log sum_n exp(s_n/tau_n) + beta Omega(
    tau+) - beta sum_n w_n Omega(tau_n)`` with the softmax weights w, through which, as through n*, no gradient flows.
    At one temperature ``max <= logsumexp <= max + log N`` for each head.

    Args:
      sim, tau: similarities and temperatures of anchors (rows) with candidates (columns) by head.
      pos_mask, neg_mask: what each candidate is to each anchor; what is in neither does not exist.  Several positives
        count with the mean of their terms; without negatives the positive's terms are all.
      dim: d', for the regulariser.
      beta: weight of the regulariser, not negative.
      negatives: ``"max"`` or ``"logsumexp"``.
      positive_in_candidates: whether the positives join the negatives in the maximum or sum, as in InfoNCE.

    Raises:
      ValueError: a negative ``beta`` or an unknown ``negatives``.
    """
    _check(beta, negatives)
    sim, tau = sim.astype(jnp.float32), tau.astype(jnp.float32)
    among = (neg_mask | pos_mask) if positive_in_candidates else neg_mask
    # what does not exist must stay finite, for gradients' sake
    tau = jnp.where(pos_mask | among, tau, 1.0)
    scaled, omega = sim / tau, gaussian_temperature_regularizer(tau, dim)
    count = jnp.maximum(jnp.sum(pos_mask, 1), 1)
    near = jnp.sum(jnp.where(pos_mask, -scaled + beta * omega, 0.0), 2) / count
    some = jnp.any(among, 1)
    # an anchor without candidates gets one that is then dropped
    among = among | ~some[:, None]
    if negatives == "max":
        hardest = jnp.argmax(jnp.where(among, jax.lax.stop_gradient(sim), -jnp.inf), 2)[..., None]
        pick = lambda x: jnp.take_along_axis(x, hardest, 2)[..., 0]  # noqa: E731
        far = pick(scaled) - beta * pick(omega)
    else:
        weight = jax.lax.stop_gradient(jax.nn.softmax(scaled, 2, where=among))
        far = jax.nn.logsumexp(scaled, 2, where=among) - beta * jnp.sum(weight * omega, 2)
    return jnp.sum(near + jnp.where(some, far, 0.0), 0)


class HeadRows(NamedTuple):
    """Rows seen by every head.

    Attributes:
      unit: f32 ``[n, C, d']`` unit vectors.
      codes: f32 ``[n, C, h]``, what the temperature network keeps of them; ``None`` at a fixed temperature.
    """

    unit: Any
    codes: Any


class Temperatures(NamedTuple):
    """How a score becomes a temperature.

    Attributes:
      lower, upper: its limits.
      fixed: the same temperature for all pairs; ``None`` for those predicted.
      last: see :func:`zoo.nn.pair_temperature.pair_scores`.
    """

    lower: Any = 1e-2
    upper: Any = 2.0
    fixed: Any = None
    last: Any = None

    def aligned(self, first: HeadRows, second: HeadRows) -> Float[Array, "b c"]:
        """Of the pairs (row i, row i)."""
        if self.fixed is not None:
            return jnp.full(first.unit.shape[:2], self.fixed, jnp.float32)
        return bounded_temperature(aligned_scores(first.codes, second.codes, self.last), self.lower, self.upper)

    def pairs(self, first: HeadRows, second: HeadRows) -> Float[Array, "c b m"]:
        """Of all pairs."""
        if self.fixed is not None:
            shape = (first.unit.shape[1], first.unit.shape[0], second.unit.shape[0])
            return jnp.full(shape, self.fixed, jnp.float32)
        return bounded_temperature(pair_scores(first.codes, second.codes, self.last), self.lower, self.upper)


def amcl_rows(
    anchor: HeadRows,
    positive: HeadRows,
    candidates: HeadRows,
    real: Bool[Array, "m"],
    own: Int[Array, "b k"],
    temperatures: Temperatures,
    beta: Number = 0.1,
    negatives: str = "max",
    positive_in_candidates: bool = False,
) -> Float[Array, "b"]:
    """:func:`amcl_contrastive` from rows instead of matrices.

    In the ``"max"`` form only the hardest negative of each anchor and head matters: it is found in blocks of anchors
    without gradient and gathered, so that temperatures are made for O(B C) pairs and memory is O(B C d' + block).  The
    ``"logsumexp"`` form keeps nothing of its blocks but makes them twice.

    Args:
      anchor, positive: row i of both is a positive pair.
      candidates: the possible negatives.
      real: which candidates exist.
      own: candidates that are no negatives of the anchor (itself, its positive); k may be 0.
      temperatures, beta, negatives, positive_in_candidates: see above.

    Raises:
      ValueError: see :func:`amcl_contrastive`.
    """
    _check(beta, negatives)
    number, (_, heads, dim) = candidates.unit.shape[0], anchor.unit.shape
    block = max(1, BLOCK // max(1, heads * number))

    def allowed(own):
        columns = jnp.arange(number)
        return real[None, :] & jnp.all(columns[None, :, None] != own[:, None, :], -1)

    if negatives == "logsumexp":

        @jax.checkpoint
        def some(rows):
            a, p, own = rows
            join = lambda one, many: jnp.concatenate([one.T[..., None], many], 2)  # noqa: E731
            sim = join(jnp.sum(a.unit * p.unit, -1), _einsum("icd,jcd->cij", a.unit, candidates.unit))
            tau = join(temperatures.aligned(a, p), temperatures.pairs(a, candidates))
            first = jnp.arange(number + 1)[None, :] == 0
            pos = jnp.broadcast_to(first, (own.shape[0], number + 1))
            neg = jnp.concatenate([jnp.zeros((own.shape[0], 1), bool), allowed(own)], 1)
            return amcl_contrastive(sim, tau, pos, neg, dim, beta, negatives, positive_in_candidates)

        return in_blocks(some, (anchor, positive, own), block)

    def hardest(rows):
        unit, own = rows
        sim = jnp.where(allowed(own)[None], _einsum("icd,jcd->cij", unit, candidates.unit), -jnp.inf)
        return jnp.argmax(sim, -1).T, jnp.any(allowed(own), 1)

    at, some_negative = in_blocks(hardest, jax.lax.stop_gradient((anchor.unit, own)), block)
    negative = jax.tree.map(lambda x: x[at, jnp.arange(heads)[None, :]], candidates)
    cosine = lambda other: jnp.sum(anchor.unit * other.unit, -1)  # noqa: E731
    near, far = (cosine(positive), temperatures.aligned(anchor, positive)), cosine(negative)
    far = (far, temperatures.aligned(anchor, negative))
    if positive_in_candidates:
        instead = ~some_negative[:, None] | (near[0] >= far[0])
        far = jax.tree.map(lambda n, f: jnp.where(instead, n, f), near, far)
        some_negative = jnp.ones_like(some_negative)
    omega = lambda tau: beta * gaussian_temperature_regularizer(tau, dim)  # noqa: E731
    pull = -near[0] / near[1] + omega(near[1])
    push = jnp.where(some_negative[:, None], far[0] / far[1] - omega(far[1]), 0.0)
    return jnp.sum(pull + push, 1)


def amcl_negcos(
    prediction: Float[Array, "b c d"], target: Float[Array, "b c d"], tau: Float[Array, "b c"], beta: Number = 0.1
) -> Float[Array, "b"]:
    """One direction of the loss of SimSiam: ``sum_c [-cos(p, stop_gradient(h)) / (2 tau) + beta Omega(tau)]``.

    The loss is the sum of both directions, each with temperatures of its own.

    Args:
      prediction: the predictor's results p by head.
      target: the projector's results h of the other view.
      tau: of the pairs (p, h).
      beta: weight of the regulariser.
    """
    _check(beta)
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    cosine = jnp.sum(l2_normalize(prediction.astype(jnp.float32)) * l2_normalize(target), -1)
    tau = tau.astype(jnp.float32)
    return jnp.sum(-cosine / (2 * tau) + beta * gaussian_temperature_regularizer(tau, prediction.shape[-1]), 1)


def amcl_cross_correlation(
    correlation: Float[Array, "c d d"], tau: Float[Array, "c d d"], beta: Number = 0.1, off_diagonal: Number = 5e-3
) -> Float[Array, ""]:
    """The loss of Barlow Twins, over heads, from cross-correlations and a temperature per pair of features.

    ``sum_l (1 - C_ll/tau_ll)^2 + lambda sum_{l != m} C_lm^2/tau_lm + beta sum_l Omega(tau_ll) - beta sum_{l != m}
    Omega(tau_lm)``, summed over heads.

    Args:
      correlation: of every feature of one view with every feature of the other, in [-1, 1].
      tau: of the same pairs.
      beta: weight of the regulariser.
      off_diagonal: lambda.
    """
    _check(beta)
    tau, dim = tau.astype(jnp.float32), correlation.shape[-1]
    own = jnp.eye(dim, dtype=bool)
    omega = beta * gaussian_temperature_regularizer(tau, dim)
    on = jnp.square(1.0 - correlation / tau) + omega
    off = off_diagonal * jnp.square(correlation) / tau - omega
    return jnp.sum(jnp.where(own, on, off))


# --- the plug-in ------------------------------------------------------------------------------------------------------


NEEDS: dict[str, tuple[str, ...]] = {
    "contrastive": ("views", "instances", "temperature"),
    "queue": ("temperature",),
    "negcos": ("predicted_heads", "temperature", "predicted_temperature"),
    "cross_correlation": ("temperature_table",),
}
"""What each kind of host must provide beside itself and its module's ``heads``."""


def amcl(
    host: str = "contrastive",
    beta: Number = 0.1,
    lower: Number = 1e-2,
    upper: Number = 2.0,
    negatives: str = "logsumexp",
    positive_in_candidates: bool = False,
    fixed: Number | None = None,
    off_diagonal: Number = 5e-3,
    unbiased: bool = False,
) -> LossTransformation:
    """The method, for a host of ``zoo.hosts`` over a module such as :class:`AdaptiveHeads`.

    It replaces the host's elements, so it comes first in a chain.  ``"contrastive"`` (SimCLR, CAN): the candidates of a
    view are the views of all other examples, and an example's loss is the mean of its two views'; labels are not read.
    ``"queue"`` (MoCo): the candidates are the queue's keys, head by head; mean of both orders.  ``"negcos"`` (SimSiam):
    the sum of both directions.  ``"cross_correlation"`` (Barlow Twins): one element of unit ``batch``.

    The soft form is the default, as the brief's safe choice: with the hardest negative alone, the paper's Table 2, our
    encoders of small images collapse (every pair alike, then temperatures at their limits).

    With one head, ``fixed`` at the host's temperature (1 for SimSiam and Barlow Twins), ``beta=0``,
    ``negatives="logsumexp"`` and the host's own ``positive_in_candidates`` the elements are the plain host's.

    Args:
      host: the kind of host, a key of ``NEEDS``.
      beta: weight of the regulariser, not negative.
      lower, upper: limits of the temperature; see :func:`bounded_temperature`.
      negatives, positive_in_candidates: see :func:`amcl_contrastive`.
      fixed: one temperature for all pairs in place of predicted ones: several heads alone.
      off_diagonal, unbiased: of Barlow Twins' loss; see ``zoo.hosts.barlow_twins``.

    Raises:
      ValueError: settings that cannot work, by name.
    """
    if host not in NEEDS:
        raise ValueError(f"host must be one of {', '.join(map(repr, NEEDS))}, got {host!r}")
    _check(beta, negatives)
    check_limits(lower, upper)
    if fixed is not None and not fixed > 0:
        raise ValueError(f"fixed must be a positive temperature, got {fixed}")

    def told(outputs: Any, context: Context) -> Temperatures:
        last = outputs.get("temperature_last")
        return Temperatures(lower, upper, fixed, None if last is None else last.value)

    def rows(outputs: Any, which: Any, mask: Array, prefix: str = "") -> HeadRows:
        # padding may hold anything, NaN included
        keep = mask[:, None, None]
        unit = l2_normalize(jnp.where(keep, outputs[f"{prefix}heads{which}"].astype(jnp.float32), 0.0))
        if fixed is not None:
            return HeadRows(unit, None)
        return HeadRows(unit, jnp.where(keep, outputs[f"{prefix}temperature{which}"].astype(jnp.float32), 0.0))

    def contrastive(outputs: Any, mask: Array, context: Context) -> Array:
        number = mask.shape[0]
        both = [rows(outputs, v, mask) for v in (1, 2)]
        stack = lambda first, second: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)  # noqa: E731
        views, partners, at = stack(*both), stack(*both[::-1]), jnp.arange(2 * number)
        own = jnp.stack([at, (at + number) % (2 * number)], 1)
        real = jnp.concatenate([mask, mask])
        t = told(outputs, context)
        values = amcl_rows(views, partners, views, real, own, t, beta, negatives, positive_in_candidates)
        return (values[:number] + values[number:]) / 2

    def queue(outputs: Any, mask: Array, context: Context) -> Array:
        memory = context.collections["memory"]
        filled, none = memory["filled"], jnp.zeros((mask.shape[0], 0), jnp.int32)
        past = rows(memory["rows"], "", filled)

        def order(queries, keys):
            query, key = rows(outputs, queries, mask), rows(outputs["keys"], keys, mask)
            t = told(outputs, context)
            return amcl_rows(query, key, past, filled, none, t, beta, negatives, positive_in_candidates)

        return (order(1, 2) + order(2, 1)) / 2

    def negcos(outputs: Any, mask: Array, context: Context) -> Array:
        def direction(predicted, target):
            p, h = rows(outputs, predicted, mask, "predicted_"), rows(outputs, target, mask)
            return amcl_negcos(p.unit, h.unit, told(outputs, context).aligned(p, h), beta)

        return direction(1, 2) + direction(2, 1)

    def correlated(outputs: Any, mask: Array, context: Context) -> Array:
        correlate = jax.vmap(lambda a, b: cross_correlation(a, b, mask, unbiased), in_axes=1)
        correlation = correlate(outputs["heads1"], outputs["heads2"])
        if fixed is not None:
            tau = jnp.full(correlation.shape, fixed, jnp.float32)
        else:
            tau = bounded_temperature(outputs["temperature_table"].value, lower, upper)
        return amcl_cross_correlation(correlation, tau, beta, off_diagonal)[None]

    compute = {"contrastive": contrastive, "queue": queue, "negcos": negcos, "cross_correlation": correlated}[host]

    def update(e: Elements, state: Any, context: Context) -> tuple[Elements, Any]:
        mask = batch_mask(context.batch)
        if host in ("contrastive", "cross_correlation") and mask.shape[0] < 2:
            raise ValueError(f"amcl on a {host} host needs 2 examples or more in a batch: one alone meets no others")
        return e.replace(values=jnp.where(e.mask, compute(context.outputs, mask, context), 0.0)), state

    needs = [n for n in NEEDS[host] if fixed is None or not n.endswith(("temperature", "temperature_table"))]
    return LossTransformation(
        lambda number: (), update, ("batch",) if host == "cross_correlation" else ("example",),
        (host, "heads", *needs), name=f"amcl({host}) over a MultiHeadProjector",
    )  # fmt: skip


def _einsum(form: str, *arrays: Array) -> Array:
    # full float32: a cosine rounded to 10 bits and divided by a small temperature is off by per cents
    return jnp.einsum(form, *arrays, precision=jax.lax.Precision.HIGHEST)


def _check(beta: Number, negatives: str = "max") -> None:
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if negatives not in ("max", "logsumexp"):
        raise ValueError(f"negatives must be 'max' or 'logsumexp', got {negatives!r}")


CARD = Card(
    name="amcl",
    family="representation",
    title="Adaptive Multi-head Contrastive Learning",
    year=2024,
    kind="loss transform",
    idea=(
        "Compares every pair in several projection heads, each pair at a temperature of its own that a small network "
        "predicts from the pair. A Gaussian likelihood gives the loss: similarity over temperature, a regulariser "
        "that keeps temperatures from escaping, and the hardest negative of each head or a log-sum-exp of all."
    ),
    citation=("Wang, Koniusz, Gedeon, Zheng. Adaptive Multi-head Contrastive Learning. ECCV 2024, arXiv 2310.05615"),
    plugs_into=("SimCLR", "MoCo", "SimSiam", "Barlow Twins", "InfoNCE with the positive among the candidates"),
    pieces=(
        "zoo.nn.heads:MultiHeadProjector",
        "zoo.nn.pair_temperature:bounded_temperature",
        "zoo.nn.pair_temperature:PairTemperature",
        "zoo.nn.pair_temperature:pair_scores",
        "zoo.nn.pair_temperature:aligned_scores",
        "zoo.nn.pair_temperature:AdaptiveHeads",
        "gaussian_temperature_regularizer",
        "amcl_contrastive",
        "amcl_rows",
        "amcl_negcos",
        "amcl_cross_correlation",
        "amcl",
        "zoo.ops.views:augmentation_stack",
    ),
    claim=Claim(
        statement=(
            "On digits under four types of strong augmentation, SimCLR with three heads and adaptive temperatures "
            "learns features whose nearest neighbours are more accurate than SimCLR's"
        ),
        metric="knn_accuracy",
        effect=0.01,
        method="simclr_amcl",
        baseline="simclr",
        trivial="untrained_encoder",
        remark=(
            "Contradicted: 0.967 against 0.979, on digits where an untrained encoder has 0.972, so neither trains much "
            "of a gain. What the method is meant to change it does change, on all five seeds: a positive pair is more "
            "similar than a negative one with probability 0.841 against 0.791. Temperatures start at 1, the middle of "
            "their range and five times SimCLR's, and reach 0.77 in 400 steps, the same for all pairs: the products of "
            "the paper's network vanish, so that what works here is the heads (temperature='concat' tells pairs apart)"
        ),
    ),
    cost=(
        "with the hardest negative C B^2 d' for the search, then temperatures for O(C B) pairs, memory O(C B d' + a "
        "block of anchors); as a log-sum-exp C B^2 (d' + h)"
    ),
    official_code="https://github.com/LeiWangR/cl",
    departures=(
        "the losses are the paper's Table 2, by default with a log-sum-exp over negatives where it takes the hardest "
        "(negatives='max'), which collapses small encoders; the released training step has no negatives",
        "the temperature network is one perceptron for all heads whose results are multiplied (the paper's text); the "
        "released one, a perceptron per head on the concatenation, is temperature='concat'",
        "the temperature network reads unit vectors and its lower limit is 0.01; the code reads rows as they are, 1e-5",
        "the last layer of 'concat' starts at zero, so that every temperature starts midway; that of 'dot' starts "
        "small, since a product of zeros would never move, and has an offset, without which a pair of like rows could "
        "not get a temperature below midway",
        "the regulariser takes the size of a head; the code takes the size of the batch",
        "for Barlow Twins temperatures are a table per head and pair of features, which no batch size changes",
    ),
)
