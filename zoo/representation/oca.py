"""OCA: a new model whose features can be searched in the old model's gallery, and are as good as if they need not be.

Ricci, Biondi, Pernici, Del Bimbo: "Backward-Compatible Aligned Representations via an Orthogonal Transformation
Layer", BEW workshop at ECCV 2024, arXiv 2408.08793.

A model that is trained to stay compatible with its predecessor pays for it: the new classification loss and the pull
to the old model's class prototypes work on the same coordinates.  OCA appends coordinates, aligns the first block alone
to the prototypes, and lets the classification loss see the whole embedding only through a trainable orthogonal layer,
which keeps norms and angles.  The layer is dropped at inference.  An old gallery is searched by the first block, a new
one by everything; the next model appends again.

In the paper's order: the networks, what is checked, the truncation rule by which galleries of different sizes are
searched, and the objectives (OCA and the methods it is compared with).  d_o is the old feature size, e the extra
coordinates, C the classes, P the prototypes ``[C, d_o]``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from zoo.base import (
    REDUCERS,
    Elements,
    Loss,
    LossTransformation,
    Objective,
    batch_mask,
    example_elements,
)
from zoo.catalogue import Card, Claim
from zoo.losses.classification import aligned_ce, cosine_alignment, label_smoothing_ce, prototype_ce
from zoo.nn.basis_transformation import BasisTransformation
from zoo.nn.classifiers import RetrievalHead
from zoo.nn.orthogonal import OrthogonalDense, fold_orthogonal
from zoo.objectives import apply_module, frozen_tower, init_module
from zoo.ops.prototypes import l2_normalize

WEIGHTS = (5.0, 10.0, 5.0)
"""Of the cross-entropy, the cross-entropy against prototypes and the cosine, in the released trainer."""


class PlainEmbedding(nn.Module):
    """A normalised embedding with a linear classifier: an independently trained model, and BCT's.

    Attributes:
      encoder: ``(x, train, mask) -> features [B, D]``, with an ``axis_name``; its parameters lie under ``backbone``.
      features: size of the embedding.
      num_classes: C.
      use_bias: whether the classifier has a bias, as that of a folded OCA model does.
      dtype: of the encoder's computation.
      axis_name: handed on to the encoder.
    """

    encoder: nn.Module
    features: int
    num_classes: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False, mask: Any = None, classify: bool = True):
        """Returns ``h_new`` ``[B, d]``, of unit length, and ``logits`` ``[B, C]``; only the former w/o ``classify``."""
        h_new = l2_normalize(_encoded(self, self.features, x, train, mask))
        if not classify:
            return h_new
        logits = nn.Dense(self.num_classes, use_bias=self.use_bias, name="classifier")(h_new)
        return {"h_new": h_new, "logits": logits}


class ExpandedEmbedding(nn.Module):
    """OCA's network: a normalised embedding of ``d_old + extra`` coordinates, an orthogonal layer and a classifier.

    Attributes:
      encoder: see :class:`PlainEmbedding`.
      d_old: size of the compatible block, the old model's embedding size.
      extra: coordinates appended to it.
      num_classes: C.
      use_bias: whether the orthogonal layer translates too, as the released one does.
      method: see :func:`zoo.nn.orthogonal.rotation`.
      dtype, axis_name: see :class:`PlainEmbedding`.
    """

    encoder: nn.Module
    d_old: int
    extra: int
    num_classes: int
    use_bias: bool = True
    method: str = "expm"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def features(self) -> int:
        """Size of the stored embedding."""
        return self.d_old + self.extra

    @nn.compact
    def __call__(self, x, train: bool = False, mask: Any = None, classify: bool = True):
        """Returns, all float32:

        ``h_new`` ``[B, d_old + extra]``, the embedding to store, of unit length; ``h_bct``, its first ``d_old``
        coordinates as they are; ``h_perp = Q h_new + b``; ``logits = W h_perp``.  Only ``h_new`` without ``classify``.
        """
        h_new = l2_normalize(_encoded(self, self.features, x, train, mask))
        if not classify:
            return h_new
        h_perp = OrthogonalDense(self.features, self.use_bias, self.method, name="orthogonal")(h_new)
        logits = nn.Dense(self.num_classes, use_bias=False, name="classifier")(h_perp)
        return {"h_new": h_new, "h_bct": h_new[:, : self.d_old], "h_perp": h_perp, "logits": logits}


def _encoded(module, features, x, train, mask):
    # a copy, because the mapped axis is known only where the step is built
    h = module.encoder.copy(name="backbone", axis_name=module.axis_name)(x, train, mask)
    return RetrievalHead(features, dtype=module.dtype, name="head")(h).astype(jnp.float32)


def feature_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a network's stored embedding needs of its variables: neither the classifier nor OCA's orthogonal layer.

    BT^2's layers are part of its embedding; its ``orthogonal_old`` says that it is one.
    """
    merged = "orthogonal_old" in variables["params"]
    dropped = {"classifier"} if merged else {"classifier", "orthogonal"}
    kept: dict[str, Any] = {"params": {k: v for k, v in variables["params"].items() if k not in dropped}}
    if variables.get("batch_stats"):
        kept["batch_stats"] = variables["batch_stats"]
    if merged:
        kept["constants"] = {k: variables["constants"][k] for k in ("orthogonal", "orthogonal_old")}
    return kept


def frame(variables: Mapping[str, Any]) -> Any:
    """What a network's features are measured against by itself: its own classifier.

    For :func:`zoo.ops.lineage.lineage`: models trained apart have no frame in common; those that were aligned are
    comparable by their ancestry.
    """
    return variables["params"]["classifier"]["kernel"]


def fold(network: ExpandedEmbedding, variables: Mapping[str, Any]) -> tuple[PlainEmbedding, dict[str, Any]]:
    """The same model without its orthogonal layer: the classifier becomes ``W Q`` with the bias ``W b``.

    Returns:
      The network and its variables, to be exported; features and logits are those of before.
    """
    layer = OrthogonalDense(network.features, network.use_bias, network.method)
    params = dict(variables["params"])
    own = params.pop("orthogonal")
    matrix = layer.apply({"params": own, "constants": variables["constants"]["orthogonal"]}, method="matrix")
    kernel, bias = fold_orthogonal(jnp.asarray(params["classifier"]["kernel"]).T, matrix, own.get("bias"))
    params["classifier"] = {"kernel": kernel.T, "bias": bias}
    plain = PlainEmbedding(network.encoder, network.features, network.num_classes, True, network.dtype)
    return plain, {**{k: v for k, v in variables.items() if k == "batch_stats"}, "params": params}


def check_old_features(features: int, d_old: int) -> None:
    """Raises ValueError unless the old model's features have the compatible block's size."""
    if features != d_old:
        raise ValueError(f"old model yields {features}-d features, expected {d_old}")


def check_gallery(features: int, blocks: Sequence[int], model: str = "its model") -> None:
    """Refuses a gallery whose vectors do not end where a compatible block of the query model ends.

    Args:
      features: size of the gallery's vectors.
      blocks: sizes of the compatible blocks and of the whole embedding, ascending; a larger gallery is cut to it.
      model: which model made the gallery.

    Raises:
      ValueError: fewer coordinates than the query model's, and not those of a block.
    """
    if features not in blocks and features < max(blocks):
        sizes = ", ".join(map(str, sorted(blocks)))
        raise ValueError(
            f"the gallery made by {model} holds {features}-d vectors, but the query model's compatible blocks end at "
            f"{sizes}; extract it again"
        )


def truncate_to_common_dim(
    queries: Float[Array, "q d"], gallery: Float[Array, "g e"]
) -> tuple[Float[Array, "q f"], Float[Array, "g f"]]:
    """Both cut to the smaller one's coordinates, then normalised: how galleries of older models are searched."""
    size = min(queries.shape[1], gallery.shape[1])
    cut = lambda x: l2_normalize(x[:, :size].astype(jnp.float32))  # noqa: E731
    return cut(queries), cut(gallery)


def classification(
    network: nn.Module, smoothing: float | int = 0.1, inputs: str = "x", label: str = "label"
) -> Objective:
    """Smoothed cross-entropy on a network's logits: how independent old and new models are trained.

    Its outputs are those of the network and ``embedding``, the one to store.

    Args:
      network: one of this module's.
      smoothing: see :func:`zoo.losses.classification.label_smoothing_ce`.
      inputs, label: batch fields.
    """

    def forward(variables, batch, context):
        outputs, mutated = apply_module(network, variables, batch[inputs], batch=batch, context=context)
        return {**outputs, "embedding": outputs["h_new"]}, mutated

    def value(outputs, batch, context):
        mask = batch_mask(batch)
        # padded rows may hold any label
        labels = jnp.where(mask, batch[label], 0)
        values = label_smoothing_ce(outputs["logits"], labels, smoothing)
        hits = (jnp.argmax(outputs["logits"], -1) == labels) & mask
        metrics = {"accuracy": jnp.sum(hits) / jnp.maximum(jnp.sum(mask), 1)}
        return Loss(example_elements(values, batch), metrics=metrics)

    return Objective(
        init=lambda rng, batch: init_module(network, rng, batch, batch[inputs]),
        forward=forward,
        loss=value,
        provides=("embedding", "logits", "label", "index"),
        gathers=(label,),
        name="normalised softmax",
    )


def prototype_alignment(
    prototypes: Float[Array, "c d"],
    ce: float | int = 10.0,
    cosine: float | int = 5.0,
    smoothing: float | int = 0.1,
    weight: float | int = 1.0,
    label: str = "label",
) -> LossTransformation:
    """``weight L + ACE`` for the loss L of any classifier with an ``embedding``: makes it backward compatible.

    ACE is :func:`zoo.losses.classification.aligned_ce` of the embedding's first d coordinates; the others get no
    gradient from it.

    Args:
      prototypes: the old model's class prototypes; they live in the transformation's state.
      ce, cosine, smoothing: of ACE.
      weight: of the host's loss.
      label: the batch field of classes.
    """

    def update(e: Elements, state, context):
        embedding, mask = context.outputs["embedding"], batch_mask(context.batch)
        if embedding.ndim != 2 or embedding.shape[1] < state.shape[1]:
            raise ValueError(
                f"old model yields {state.shape[1]}-d features, the host's embedding has shape {list(embedding.shape)}"
            )
        labels = jnp.where(mask, context.batch[label], 0)
        aligned = aligned_ce(embedding[:, : state.shape[1]], state, labels, ce, cosine, smoothing)
        return e.replace(values=weight * e.values + jnp.where(e.mask, aligned, 0.0)), state

    return LossTransformation(
        init=lambda num_examples: jnp.asarray(prototypes, jnp.float32),
        update=update,
        units=("example",),
        requires=("embedding", "logits", label),
        name="prototype alignment",
    )


def _against(
    base: Objective,
    prototypes: Any,
    terms: Callable[[Mapping[str, Array], Array, Array], Mapping[str, tuple[float, Array]]],
    weight: float,
    label: str,
    name: str,
) -> Objective:
    # ``weight L + sum of terms``, the terms of (outputs, P, labels) as ``{name: (weight, values [B])}``
    def init(rng, batch):
        own = dict(base.init(rng, batch))
        return {**own, "constants": {**own.get("constants", {}), "prototypes": jnp.asarray(prototypes, jnp.float32)}}

    def value(outputs, batch, context):
        loss, labels = base.loss(outputs, batch, context), jnp.where(batch_mask(batch), batch[label], 0)
        found = terms(outputs, context.collections["constants"]["prototypes"], labels)
        values, metrics = weight * loss.elements.values, {"classification": REDUCERS[base.reduce](loss.elements)}
        for key, (factor, term) in found.items():
            part = example_elements(term, batch)
            values, metrics[key] = values + factor * part.values, REDUCERS[base.reduce](part)
        return Loss(loss.elements.replace(values=values), loss.terms, {**loss.metrics, **metrics})

    return dataclasses.replace(base, init=init, loss=value, name=name)


def oca(
    network: ExpandedEmbedding,
    prototypes: Float[Array, "c d"],
    weights: tuple[float | int, ...] = WEIGHTS,
    smoothing: float | int = 0.1,
    inputs: str = "x",
    label: str = "label",
) -> Objective:
    """The method: ``5 L_CE + 10 L_bct + 5 L_cos`` (brief, "Losses").

    L_CE is the smoothed cross-entropy of the logits behind the orthogonal layer; L_bct and L_cos pull the first d_o
    coordinates, normalised, to the old model's prototypes.  There is no teacher: the prototypes are
    ``constants/prototypes``.

    Args:
      network: the new model.
      prototypes: P, the old model's mean features of every class of the new training set.
      weights: of L_CE, L_bct and L_cos.
      smoothing: of both cross-entropies.
      inputs, label: batch fields.

    Raises:
      ValueError: prototypes of another size than the compatible block, or of another number of classes.
    """
    _check_prototypes(prototypes, network.d_old, network.num_classes)

    def terms(outputs, fixed, labels):
        return {
            "bct": (weights[1], prototype_ce(outputs["h_bct"], fixed, labels, smoothing)),
            "cosine": (weights[2], cosine_alignment(outputs["h_bct"], fixed[labels])),
        }

    base = classification(network, smoothing, inputs, label)
    return _against(base, prototypes, terms, weights[0], label, "oca")


def bct(
    network: PlainEmbedding,
    prototypes: Float[Array, "c d"],
    alpha: float | int = 10.0,
    smoothing: float | int = 0.1,
    inputs: str = "x",
    label: str = "label",
) -> Objective:
    """Backward-compatible training (Shen et al., CVPR 2020): ``L_CE + alpha L_bct`` on an embedding of the old size.

    Arguments and errors as in :func:`oca`.
    """
    _check_prototypes(prototypes, network.features, network.num_classes)

    def terms(outputs, fixed, labels):
        return {"bct": (alpha, prototype_ce(outputs["h_new"], fixed, labels, smoothing))}

    return _against(classification(network, smoothing, inputs, label), prototypes, terms, 1.0, label, "bct")


def bt2(
    network: BasisTransformation,
    prototypes: Float[Array, "c d"],
    old: nn.Module,
    old_variables: Mapping[str, Any],
    new: nn.Module,
    new_variables: Mapping[str, Any],
    weights: tuple[float | int, ...] = (1.0, 10.0, 5.0),
    smoothing: float | int = 0.0,
    inputs: str = "x",
    label: str = "label",
) -> Objective:
    """BT^2: ``L_CE + 10 L_bct + 1 (1 - cos(free, new)) + 5 (1 - cos(bct, old))``, with two frozen teachers.

    Args:
      network: the new model.
      prototypes: see :func:`oca`.
      old, old_variables: the old model; its variables live in ``constants/old``.
      new, new_variables: an independently trained new model, in ``constants/new``.
      weights: of the cosine to the new model, of L_bct and of the cosine to the old model.
      smoothing: of both cross-entropies; the released trainer smooths neither.
      inputs, label: batch fields.

    Raises:
      ValueError: as :func:`oca`.
    """
    _check_prototypes(prototypes, network.d_old, network.num_classes)

    def terms(outputs, fixed, labels):
        return {
            "bct": (weights[1], prototype_ce(outputs["h_bct"], fixed, labels, smoothing)),
            "to_new": (weights[0], cosine_alignment(outputs["h_free"], outputs["new"])),
            "to_old": (weights[2], cosine_alignment(outputs["h_bct"], outputs["old"])),
        }

    base = classification(network, smoothing, inputs, label)
    for name, model, variables in (("old", old, old_variables), ("new", new, new_variables)):
        base = frozen_tower(base, _tower(model, inputs), variables, name)
    return _against(base, prototypes, terms, 1.0, label, "bt2")


def _tower(model: nn.Module, inputs: str):
    return lambda variables, batch: model.apply(variables, batch[inputs], classify=False)


def _check_prototypes(prototypes: Any, d_old: int, num_classes: int) -> None:
    check_old_features(prototypes.shape[1], d_old)
    if prototypes.shape[0] != num_classes:
        raise ValueError(f"{prototypes.shape[0]} prototypes for {num_classes} classes of the new training set")


CARD = Card(
    name="oca",
    family="representation",
    title="Backward-Compatible Aligned Representations via an Orthogonal Transformation Layer",
    year=2024,
    kind="objective",
    idea=(
        "A new model should be searchable in the old model's gallery, yet lose nothing by it. Append coordinates to "
        "the embedding, align the first block alone to the old model's class prototypes, and let the classification "
        "loss see the whole embedding only through a trainable orthogonal layer, which is dropped at inference. Old "
        "galleries are searched by the first block, new ones by all coordinates; the next model appends again."
    ),
    citation="Ricci, Biondi, Pernici, Del Bimbo; BEW workshop at ECCV 2024; arXiv 2408.08793",
    plugs_into=(
        "any classifier with an embedding and a per-example loss (prototype_alignment)",
        "model replacement, chained",
    ),
    pieces=(
        "oca",
        "ExpandedEmbedding",
        "fold",
        "truncate_to_common_dim",
        "check_gallery",
        "check_old_features",
        "prototype_alignment",
        "classification",
        "PlainEmbedding",
        "bct",
        "bt2",
        "zoo.nn.basis_transformation:BasisTransformation",
        "frame",
        "feature_variables",
        "zoo.nn.orthogonal:OrthogonalDense",
        "zoo.nn.orthogonal:rotation",
        "zoo.losses.classification:aligned_ce",
        "zoo.ops.prototypes:class_prototypes",
        "zoo.metrics.neighbours:retrieval_metrics",
        "zoo.ops.lineage:check_comparable",
    ),
    claim=Claim(
        statement=(
            "When the classes double from five digits to ten, the nearest neighbours that OCA's new model finds among "
            "its own features are of the right class more often than those of a model trained backward compatible "
            "without extra coordinates (BCT)."
        ),
        metric="new_new",
        effect=0.01,
        method="oca",
        baseline="bct",
        trivial="untrained",
        seeds=5,
        budget="the same old model, encoder, steps, batches and optimiser; no tuning in any arm",
        remark=(
            "Among its own features the new model of either arm is right about 97 times in 100: ten digits do not fill "
            "16 coordinates, and appended ones have nothing to add. In the old gallery the new queries beat the old "
            "model's own on every seed (0.87 against 0.78 on average), and those of OCA beat BCT's on every seed "
            "(0.87 against 0.84); this was not the registered metric."
        ),
    ),
    cost=(
        "one d x d matrix exponential (or solve) per step, O(d^3), and O(B C d) for both cross-entropies; no teacher; "
        "retrieval O(q g d) in blocks of queries; no old gallery is ever extracted again"
    ),
    official_code="z3n0e/OCA",
    departures=(
        "weights are 5, 10, 5, which the released trainer has in its code; its configuration's 1, 10, 5 are not read",
        "Q = Q0 R(A) with Q0 drawn uniformly; the released layer begins at the orthogonal factor of a default linear "
        "initialisation; use_bias=False makes the layer a pure rotation or reflection",
        "the embedding's size comes from a linear map on the encoder's features, not from the width of the last block",
        "prototypes come from a pass without augmentation; the learning rate follows its cosine by step, not by epoch",
        "BT^2's two teachers are run beside the network instead of reading dictionaries of features by file name",
        "the chained update (a third model) is a reading: the released code shows one update",
    ),
)
