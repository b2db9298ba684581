"""SupReMix: supervised contrastive learning for regression with pairs mixed from the batch's own embeddings.

Wu, Dong, Chen, Zhou and Zhou, "Mixup Your Own Pairs" (2023, arXiv 2309.16633).

Supervised contrastive learning knows equal labels (positives) and all others (negatives).  For regression this
ignores the order of labels and leaves a space of fragments.  SupReMix adds harder pairs, made by mixing EMBEDDINGS
within the batch: an anchor mixed with a negative is a hard negative (*mix-neg*, anchor-inclusive); a lower and a
higher label, mixed so that the mixed label is the anchor's, are a hard positive (*mix-pos*, anchor-exclusive), which
asks neighbours on either side to lie in line.  Negatives count more the farther their label is (*distance
magnifying*).

In the order of the paper: the weights, the coefficients of both mixtures, the loss, the transformation that puts it on
a supervised contrastive host, and the two baselines that are not hosts of the zoo.  A mixture is never built: its
similarity to the anchor is the same mixture of two entries of the Gram matrix.  Mixtures are constants of the loss, so
their similarities are read from ``f sg(f)^T``, which hands a gradient to the anchor alone; real pairs keep both sides.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from zoo import hosts
from zoo.base import Context, Elements, Loss, LossTransformation, Objective, batch_mask, example_elements, suggest
from zoo.catalogue import Card, Claim
from zoo.losses.contrastive import unit_rows
from zoo.losses.pairs import rank_n_contrast

Number = float | int

WEIGHTS = ("l1_inv", "l2_inv", "l1", "l2", "none")
"""Names of :func:`label_distance_weights`, as published (the ``inv`` are those that grow with distance)."""

BETA = {"mostly_negative": (2.0, 8.0), "mostly_anchor": (8.0, 2.0), "even": (5.0, 5.0)}
"""The published choices of Beta for the anchor's share in mix-neg (options 0, 1 and 2 of the released code)."""

SECOND_VIEW = 1 << 30
"""Added to the global row of an example's second view, so that both views draw their own coefficients."""


def label_distance_weights(difference: Float[Array, "*s"], kind: str = "l1_inv") -> Float[Array, "*s"]:
    """Distance magnifying: the weight of a candidate in the denominator, 1 at label difference 0.

    ``l1_inv``: ``|d| + 1`` (the default); ``l2_inv``: ``d^2 + 1``; ``l1``: ``1 / (|d| + 1)``;
    ``l2``: ``1 / (d^2 + 1)``; ``none``: 1.

    Args:
      difference: of the anchor's label and the candidate's, real or mixed, in units of the label.
      kind: one of :data:`WEIGHTS`.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in WEIGHTS:
        raise ValueError(suggest(kind, WEIGHTS, "weight"))
    if kind == "none":
        return jnp.ones_like(difference)
    distance = jnp.abs(difference) if kind.startswith("l1") else jnp.square(difference)
    return distance + 1.0 if kind.endswith("inv") else 1.0 / (distance + 1.0)


def negative_coefficients(
    key: Array, anchor: Int[Array, ""], rows: Int[Array, "n"], beta_params: tuple[Number, Number] = (2.0, 8.0)
) -> Float[Array, "n"]:
    """Mix-neg: the anchor's share in its mixture with each row, drawn from Beta independently per pair.

    A draw depends on the key and the two global rows alone, so that neither sharding, chunks nor the order of the batch
    change it.

    Args:
      key: of this step.
      anchor: the anchor's global row.
      rows: of the candidates.
      beta_params: of the Beta distribution; the mean share of the anchor is ``a / (a + b)``.
    """
    own = jax.random.fold_in(key, anchor)
    return jax.vmap(lambda row: jax.random.beta(jax.random.fold_in(own, row), *beta_params))(rows)


def positive_coefficients(
    label: Float[Array, ""], labels: Float[Array, "n"], window: Number, mask: Bool[Array, "n"] | None = None
) -> tuple[Float[Array, "n n"], Bool[Array, "n n"]]:
    """Mix-pos: the share of the lower-label row j in its mixture with the higher-label row k, for one anchor.

    ``a = (y_k - y) / (y_k - y_j)``, so that ``a y_j + (1 - a) y_k = y``, for ``y_j < y < y_k`` with both strictly
    nearer than the window.

    Args:
      label: y, the anchor's.
      labels: of all rows.
      window: eps, in units of the label; at most 1 allows no mixture of integer labels.
      mask: which rows are real.

    Returns:
      ``a [n, n]`` over (j, k), in (0, 1) where a mixture exists and 0 elsewhere; and which exist.
    """
    gap = labels - label
    real = jnp.ones(labels.shape, bool) if mask is None else mask
    lower, upper = real & (gap < 0) & (-gap < window), real & (gap > 0) & (gap < window)
    exists = lower[:, None] & upper[None, :]
    # by differences of labels alone: translating all labels changes nothing
    span = jnp.where(exists, gap[None, :] - gap[:, None], 1.0)
    return jnp.where(exists, gap[None, :] / span, 0.0), exists


def supremix_loss(
    f: Float[Array, "n p"],
    y: Shaped[Array, "..."],
    key: Array,
    tau: Number = 0.3,
    window: Number = 5,
    beta_params: tuple[Number, Number] = (2.0, 8.0),
    weight: str = "l1_inv",
    mix_neg: bool = True,
    mix_pos: bool = True,
    mask: Bool[Array, "n"] | None = None,
    rows: Int[Array, "n"] | None = None,
    chunk: int = 16,
    variant: str = "exact",
) -> Float[Array, "n"]:
    """The SupReMix loss of each anchor (brief, section Definition).

    ``-(1/|V|) sum_{v in V} [s_v / tau - log sum_{u in U} w_u exp(s_u / tau)]``: U are all other rows, the anchor's
    mixtures with every row of another label, and its mix-pos; V are the rows of its label and its mix-pos.

    Args:
      f: embeddings of all views, unit length; all first views, then all second ones.
      y: their labels ``[n]`` (or ``[n, 1]``); equal labels are positives, so bin a continuous target first.
      key: of the Beta draws.
      tau: temperature, positive.
      window: eps of mix-pos, in units of the label.
      beta_params: of the anchor's share in mix-neg; :data:`BETA` has the published ones.
      weight: of candidates by label distance, one of :data:`WEIGHTS`.
      mix_neg, mix_pos: which mixtures take part.
      mask: which rows are real.
      rows: global rows, which the draws depend on; by default 0 .. n - 1.
      chunk: anchors at a time: memory is ``chunk x n x n`` scalars, never ``n x n x n``.
      variant: ``exact``, or ``official``: real pairs and mixtures each shifted by their own largest logit, which
        changes their relation by the exponential of the difference; without mixtures the two agree.

    Returns:
      f32 ``[n]``; 0 for padding and for an anchor without positives.

    Raises:
      ValueError: labels of another shape, a temperature, window, chunk or Beta that is not positive, or an unknown
        weight or variant.
    """
    return supremix_terms(
        f, y, key, tau, window, beta_params, weight, mix_neg, mix_pos, mask, rows, chunk, variant
    )[0]  # fmt: skip


def supremix_terms(
    f: Float[Array, "n p"],
    y: Shaped[Array, "..."],
    key: Array,
    tau: Number = 0.3,
    window: Number = 5,
    beta_params: tuple[Number, Number] = (2.0, 8.0),
    weight: str = "l1_inv",
    mix_neg: bool = True,
    mix_pos: bool = True,
    mask: Bool[Array, "n"] | None = None,
    rows: Int[Array, "n"] | None = None,
    chunk: int = 16,
    variant: str = "exact",
) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    """:func:`supremix_loss` and the number of positives of each anchor, mixed ones included."""
    check_settings(tau, window, beta_params, weight, chunk, variant)
    n = f.shape[0]
    y = squeezed_labels(y, n)
    mask = jnp.ones(n, bool) if mask is None else mask
    rows = jnp.arange(n, dtype=jnp.int32) if rows is None else rows
    f = jnp.where(mask[:, None], f.astype(jnp.float32), 0.0)
    # padding may hold anything; a NaN label would reach gradients through masked coefficients
    y = jax.lax.stop_gradient(jnp.where(mask, y.astype(jnp.float32), 0.0))
    fixed = jax.lax.stop_gradient(f)
    ids = jnp.arange(n)
    shares = jnp.zeros((n, 0))
    if mix_neg:
        shares = jax.vmap(lambda row: negative_coefficients(key, row, rows, beta_params))(rows)

    @jax.checkpoint  # a chunk's [chunk, n, n] is made again backwards rather than kept
    def one(anchor):
        own, label, i, a = anchor
        gap = label - y
        others = mask & (ids != i)
        same = others & (gap == 0)
        real = _dot(f, own) / tau
        # (logits, log-weights, who takes part, which are positives) of each kind of candidate
        blocks = [(real, jnp.log(label_distance_weights(gap, weight)), others, same)]
        mixed = _dot(fixed, own) / tau  # no gradient to what is mixed, the anchor's own copy included
        if mix_neg:
            logits = a * mixed[i] + (1 - a) * mixed
            weights = jnp.log(label_distance_weights((1 - a) * gap, weight))
            blocks.append((logits, weights, mask & (gap != 0), jnp.zeros(n, bool)))
        if mix_pos:
            a, exists = positive_coefficients(label, y, window, mask)
            logits = a * mixed[:, None] + (1 - a) * mixed[None, :]
            blocks.append((logits.ravel(), jnp.zeros(n * n), exists.ravel(), exists.ravel()))
        if variant == "official":
            blocks = _shifted_apart(blocks)
        return _log_ratio(blocks)

    values, positives = jax.lax.map(one, (f, y, ids, shares), batch_size=min(chunk, n))
    return jnp.where(mask, values, 0.0), jnp.where(mask, positives, 0)


def _log_ratio(blocks: list[tuple[Array, Array, Array, Array]]) -> tuple[Array, Array]:
    # log sum of weighted exponentials minus the mean positive logit, with one maximum for all kinds of candidates
    top = jnp.max(jnp.stack([jnp.max(jnp.where(keep, s + w, -jnp.inf)) for s, w, keep, _ in blocks]))
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = sum(jnp.sum(jnp.where(keep, jnp.exp(jnp.where(keep, s + w - top, 0.0)), 0.0)) for s, w, keep, _ in blocks)
    count = sum(jnp.sum(positive, dtype=jnp.int32) for *_, positive in blocks)
    near = sum(jnp.sum(jnp.where(positive, s, 0.0)) for s, *_, positive in blocks)
    usable = count > 0
    every = top + jnp.log(jnp.where(usable, total, 1.0))
    return jnp.where(usable, every - near / jnp.maximum(count, 1), 0.0), count


def _shifted_apart(blocks):
    # the released code: real logits minus their maximum (itself included), mixtures minus theirs
    (real, weights, keep, positive), mixtures = blocks[0], blocks[1:]
    found = [(real - jax.lax.stop_gradient(jnp.max(real)), weights, keep, positive)]
    if mixtures:
        top = jnp.max(jnp.stack([jnp.max(jnp.where(k, s, -jnp.inf)) for s, _, k, _ in mixtures]))
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
        found += [(s - top, *rest) for s, *rest in mixtures]
    return found


def _dot(rows: Array, own: Array) -> Array:
    return jnp.matmul(rows, own, precision="highest")


def squeezed_labels(y: Shaped[Array, "..."], n: int) -> Shaped[Array, "n"]:
    """Labels ``[n]`` from ``[n]`` or ``[n, 1]``, whose differences would silently broadcast the wrong way.

    Raises:
      ValueError: any other shape.
    """
    if y.shape == (n, 1):
        return y[:, 0]
    if y.shape != (n,):
        raise ValueError(
            f"labels must be [{n}] or [{n}, 1], one number per embedding, got {list(y.shape)}; "
            "targets of several dimensions are not supported"
        )
    return y


def check_settings(
    tau: Number, window: Number, beta_params: tuple[Number, Number], weight: str, chunk: int, variant: str
) -> None:
    """Raises ValueError, naming what is wrong, for settings of :func:`supremix_loss` that cannot work."""
    if not tau > 0:
        raise ValueError(f"temperature must be positive, got {tau}")
    if not window > 0:
        raise ValueError(f"window must be positive, in units of the label, got {window}")
    if not (len(beta_params) == 2 and min(beta_params) > 0):
        raise ValueError(f"beta must be two positive numbers, got {beta_params}")
    if weight not in WEIGHTS:
        raise ValueError(suggest(weight, WEIGHTS, "weight"))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 anchor, got {chunk}")
    if variant not in ("exact", "official"):
        raise ValueError(f"variant must be 'exact' or 'official', got {variant!r}")


def supremix(
    temperature: Number = 0.3,
    window: Number = 5,
    beta_params: tuple[Number, Number] = (2.0, 8.0),
    weight: str = "l1_inv",
    mix_neg: bool = True,
    mix_pos: bool = True,
    pool: int = 1,
    label: str = "label",
    chunk: int = 16,
    variant: str = "exact",
) -> LossTransformation:
    """SupReMix on a supervised contrastive host, whose elements it REPLACES by the mixed loss on the host's views.

    Without mixtures and weights it is the host's own loss at this temperature.  An example's value is the mean of its
    views'.  The state counts anchors without any positive, ``without_positives``: with one view there may be some, and
    they cost nothing.

    Args:
      temperature, window, beta_params, weight, mix_neg, mix_pos, chunk, variant: see :func:`supremix_loss`; the
        published temperature is 0.3 for faces and 0.1 for sentences, the window 5 years and 1.0.
      pool: equal parts of the batch, by order, that mix and compare within themselves; it must divide the batch.
      label: the batch field of labels.

    Raises:
      ValueError: settings that cannot work.
    """
    check_settings(temperature, window, beta_params, weight, chunk, variant)
    if pool < 1:
        raise ValueError(f"pool must be at least 1, got {pool}")

    def update(e: Elements, state: dict[str, Array], context: Context) -> tuple[Elements, dict[str, Array]]:
        outputs, batch = context.outputs, context.batch
        mask = batch_mask(batch)
        b = mask.shape[0]
        if b % pool:
            raise ValueError(f"pool {pool} does not divide the batch of {b}")
        rows = batch["row"] if "row" in batch else jnp.arange(b, dtype=jnp.int32)
        z = [unit_rows(outputs[v], mask) for v in ("z1", "z2") if v in outputs]
        y = squeezed_labels(batch[label], b)
        views = len(z)

        def parts(each: list[Array]) -> Array:
            # [pool, views b / pool, ...]: all first views of a part, then all its second views
            stacked = jnp.stack(each).reshape(views, pool, b // pool, *each[0].shape[1:])
            return jnp.swapaxes(stacked, 0, 1).reshape(pool, views * (b // pool), *each[0].shape[1:])

        def part(inputs):
            f, y, mask, rows = inputs
            return supremix_terms(
                f, y, context.key("supremix"), temperature, window, beta_params, weight, mix_neg, mix_pos, mask, rows,
                chunk, variant,
            )  # fmt: skip

        row_of = [rows + SECOND_VIEW * v for v in range(views)]
        values, count = jax.lax.map(part, (parts(z), parts([y] * views), parts([mask] * views), parts(row_of)))
        values = jnp.mean(values.reshape(pool, views, b // pool), 1).reshape(b)
        alone = jnp.sum((count == 0) & parts([mask] * views), dtype=jnp.int32)
        state = {"without_positives": state["without_positives"] + alone}
        return e.replace(values=jnp.where(e.mask, values, 0.0)), state

    return LossTransformation(
        init=lambda n: {"without_positives": jnp.zeros((), jnp.int32)},
        update=update,
        units=("example",),
        requires=("contrastive", label),
        name="supremix",
    )


# --- baselines --------------------------------------------------------------------------------------------------------


def supcr(module: nn.Module, augment: Any, temperature: Number = 2.0, label: str = "label") -> Objective:
    """The baseline "SupCR": Rank-N-Contrast on negative L1 distances of embeddings (brief, section Definition).

    Args:
      module, augment: see :func:`zoo.hosts.two_views`.
      temperature: positive.
      label: the batch field of labels.
    """
    host = hosts.supervised_contrast(module, augment, label=label)

    def value(outputs, batch, context):
        z = jnp.concatenate([outputs["z1"], outputs["z2"]])
        y = batch[label].astype(jnp.float32)
        y, mask = jnp.concatenate([y, y]), jnp.concatenate([batch_mask(batch)] * 2)
        z = unit_rows(z, mask)
        similarity = -jax.lax.map(lambda own: jnp.sum(jnp.abs(own - z), 1), z)
        among = mask[:, None] & mask[None, :] & ~jnp.eye(len(z), dtype=bool)
        values = rank_n_contrast(similarity, jnp.abs(y[:, None] - y[None, :]), among, temperature)
        return Loss(example_elements((values[: len(values) // 2] + values[len(values) // 2 :]) / 2, batch))

    provides = tuple(p for p in host.provides if p != "contrastive")
    return dataclasses.replace(host, loss=value, provides=provides, name="supcr")


class Regressor(nn.Module):
    """An encoder with one linear output, for direct L1 training.

    Attributes:
      body: ``x -> h [B, d]``; its parameters lie under ``encoder``.
      centre, scale: the output is ``centre + scale * (w h + b)``, so that training starts at the label's median.
    """

    body: nn.Module
    centre: float = 0.0
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b *dims"]) -> tuple[Float[Array, "b"], Float[Array, "b d"]]:
        """The prediction and the embedding."""
        h = self.body.copy(name="encoder")(x)
        return self.centre + self.scale * nn.Dense(1, name="head")(h)[:, 0].astype(jnp.float32), h


CARD = Card(
    name="supremix",
    family="representation",
    title="Mixup Your Own Pairs",
    year=2023,
    kind="loss transform",
    idea=(
        "Supervised contrastive learning ignores the order of regression targets. SupReMix mixes embeddings within the "
        "batch: the anchor with a negative gives hard negatives, a lower with a higher label in the proportion of the "
        "anchor's label gives hard positives, and negatives weigh more the farther their label is."
    ),
    citation="Wu, Dong, Chen, Zhou, Zhou; 2023, arXiv 2309.16633",
    plugs_into=(
        "the supervised contrastive host, whose elements it replaces (one or two views, labels that tie)",
        "trainers.probes.ridge_probe and zoo.metrics.regression for the second stage",
    ),
    pieces=(
        "supremix", "supremix_loss", "supremix_terms", "label_distance_weights", "negative_coefficients",
        "positive_coefficients", "squeezed_labels", "check_settings", "supcr", "Regressor",
        "zoo.losses.pairs:supervised_contrastive", "zoo.losses.pairs:rank_n_contrast",
        "zoo.metrics.regression:regression_metrics", "zoo.metrics.regression:by_shot",
    ),
    claim=Claim(
        statement=(
            "With three examples of each of 41 ordered labels, a linear probe of an encoder trained with SupReMix has "
            "a mean absolute error at least 5 per cent (in the logarithm) below that of one trained with SupCon; the "
            "error of direct L1 training and the rank correlation of the first principal component are reported "
            "beside it"
        ),
        metric="log_mae",
        effect=0.05,
        method="SupReMix",
        baseline="SupCon",
        trivial="untrained encoder",
        higher_is_better=False,
        remark=(
            "Confirmed against SupCon: the probe's error fell from 4.86 to 3.48 of 41 labels (29 per cent), and the "
            "rank correlation of the first component rose from 0.27 to 0.88. On the same data direct L1 training "
            "(2.81) and Rank-N-Contrast (2.34) have lower errors than SupReMix, and either half of it does as well as "
            "both (mix-neg 3.37, mix-pos 3.46, with weights): its advantage over direct training does not show here."
        ),
        budget="the same encoder, noisy views, batches of 64 and Adam steps in all arms; published settings, tau 0.3",
    ),
    cost="O(n^2 p + n^3) scalars for n = 2B embeddings, memory O(n^2 + chunk n^2), never n^2 vectors of mixtures",
    official_code="yilei-wu/SupReMix (its README; the training files were read as stored individual files)",
    departures=(
        "One maximum for all logits; variant='official' shifts real pairs and mixtures apart as released.",
        "Mixtures keep their labels and none is dropped; the released compression sorts labels apart from mixtures.",
        "An anchor without positives costs 0 (the image code divides by zero, the text code by count + 1).",
        "l2_inv adds 1 outside the square for mixtures too (the released code adds another inside).",
        "Embeddings are L2-normalised, which is assumed: the encoder's file was not found.",
        "The factor tau / tau_base is 1, as in the scripts.",
    ),
)  # fmt: skip
