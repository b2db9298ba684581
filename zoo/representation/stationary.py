"""Stationary representations: models that replace one another without their galleries being extracted again.

Biondi, Pernici, Ricci, Del Bimbo: "Stationary Representations: Optimally Approximating Compatibility and Implications
for Improved Model Replacements", CVPR 2024, arXiv 2405.02581.

A retrieval system stores features of an old model; when the model is replaced, those features are worth keeping only if
the new model's can be compared with them.  If every model is trained against the *same* class prototypes, the vertices
of a regular simplex that nobody ever trains, the features of a class settle at the same place in all of them: they are
stationary.  Cross-entropy against fixed prototypes aligns class means; a contrastive term that ties each new feature to
the old model's feature of the same example (higher-order compatibility, HOC) aligns the rest.

In the paper's order: where labels lie in the simplex, the HOC loss, its convex combination with any classification
loss, the network, and the objectives.  K is the number of pre-allocated classes, d = K-1, z the network's feature, h
its direction z / |z|; ``lam`` and ``mu`` are the paper's lambda and mu.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.base import REDUCERS, Batch, CompositionError, Loss, Objective, batch_mask, example_elements
from zoo.catalogue import Card, Claim
from zoo.nn.classifiers import FixedClassifier, RetrievalHead
from zoo.objectives import apply_module, frozen_tower, init_module
from zoo.ops.prototypes import l2_normalize

MASK_MODES = ("zero", "neginf")
"""What becomes of same-class entries in :func:`hoc_loss`."""
Side = Literal["end", "start"]


def reversed_targets(labels: Int[Array, "*b"], num_classes: int) -> Int[Array, "*b"]:
    """``K - 1 - t``: the fine-tuner writes its classes from the simplex's end downward (brief, "shared interface").

    Whoever pre-trains writes from 0 upward, so both fit into one simplex as long as their classes together number K at
    most.
    """
    return num_classes - 1 - labels


def check_capacity(server: int, local: int, num_classes: int) -> None:
    """Raises ValueError unless the classes of both sides fit into the simplex together."""
    if server + local > num_classes:
        raise ValueError(
            f"needs {server + local} classes but the fixed simplex has K_pre={num_classes}; choose preallocated_classes"
            f" >= {server + local} before the first model is trained (it cannot grow later)"
        )


def check_labels(labels: Any, num_classes: int, side: Side = "end") -> None:
    """Checks labels on the host before they are used as rows of the simplex.

    Raises:
      ValueError: one lies outside [0, K) once it is placed; the label and its place are named.
    """
    labels = np.asarray(labels)
    placed = num_classes - 1 - labels if side == "end" else labels
    outside = np.flatnonzero((placed < 0) | (placed >= num_classes))
    if len(outside):
        label, row = int(labels.ravel()[outside[0]]), int(placed.ravel()[outside[0]])
        raise ValueError(f"label {label} lies at row {row} of the simplex, outside [0, {num_classes})")


def check_replacement(features: int, num_classes: int, classifier: str = "simplex") -> None:
    """Refuses a replacement model whose features do not live in this simplex.

    Args:
      features: the model's feature size.
      num_classes: K of the sequence it is to join.
      classifier: what it was trained against.

    Raises:
      ValueError: another size, or a classifier that was learned.
    """
    if features != num_classes - 1:
        raise ValueError(f"feature size {features} differs from simplex dimension {num_classes - 1}")
    if classifier != "simplex":
        raise ValueError(
            f"the replacement was trained with a {classifier} classifier, so that its feature size {features} is no "
            f"simplex dimension {num_classes - 1}; train it against the fixed simplex"
        )


def hoc_loss(
    h_new: Float[Array, "b d"],
    h_old: Float[Array, "b d"],
    labels: Int[Array, "b"],
    mu: float | Float[Array, ""] = 10.0,
    mask_mode: str = "zero",
    mask: Bool[Array, "b"] | None = None,
) -> Float[Array, "b"]:
    """Higher-order compatibility (paper, equation 4): each old feature should find its own new feature in the batch.

    ``S = mu h_old h_new^T`` with old features as rows; the loss of example i is ``-S_ii + logsumexp_j`` over its
    negatives, the new features of other classes.  No gradient reaches ``h_old``.  O(B^2 d) time, O(B^2) memory.

    Args:
      h_new, h_old: unit rows; row i of both is example i.
      labels: classes; only equality matters.
      mu: inverse temperature.
      mask_mode: what becomes of entries of the same class, the positive among them.  ``"zero"`` (the released code)
        sets them to 0, so that each adds ``exp(0)`` to the sum; ``"neginf"`` leaves them out and counts the positive:
        InfoNCE, which is 0 where a batch holds a single class.
      mask: which rows are real; masked rows are no negatives, and their loss is 0.

    Returns:
      f32 ``[B]``.

    Raises:
      ValueError: an unknown ``mask_mode``.
    """
    _check_mask_mode(mask_mode)
    real = jnp.ones(labels.shape, bool) if mask is None else mask
    clean = lambda h: jnp.where(real[:, None], h.astype(jnp.float32), 0.0)  # noqa: E731
    old, new = jax.lax.stop_gradient(clean(h_old)), clean(h_new)
    similarity = mu * jnp.matmul(old, new.T, precision=jax.lax.Precision.HIGHEST)
    same, own = labels[:, None] == labels[None, :], jnp.eye(labels.shape[0], dtype=bool)
    if mask_mode == "zero":
        # every real column counts; a row's own column does in any case, so that padding stays finite
        entries, counted = jnp.where(same, 0.0, similarity), real[None, :] | own
    else:
        entries, counted = similarity, (real[None, :] & ~same) | own
    values = jax.nn.logsumexp(entries, axis=1, where=counted) - jnp.diagonal(similarity)
    return jnp.where(real, values, 0.0)


def convex_combine(a: Float[Array, "*b"], b: Float[Array, "*b"], lam: float) -> Float[Array, "*b"]:
    """``lam a + (1 - lam) b`` (paper, equation 3).

    Raises:
      ValueError: ``lam`` outside [0, 1].
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    return lam * a + (1.0 - lam) * b


class StationaryNetwork(nn.Module):
    """An encoder, a map without bias to K-1 features, and a classifier on them.

    Attributes:
      encoder: ``(x, train, mask) -> features [B, D]``, with an ``axis_name``; its parameters lie under ``backbone``.
      num_classes: K, pre-allocated; cannot grow.
      classifier: ``"simplex"``, fixed (``constants/classifier/prototypes``); or ``"linear"``, learned, the baseline's:
        K columns of which ``constants/seen`` says which have come so far.
      dtype: of the computation.
      axis_name: handed on to the encoder.
    """

    encoder: nn.Module
    num_classes: int = 1024
    classifier: Literal["simplex", "linear"] = "simplex"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False, mask: Any = None, classify: bool = True):
        """Returns logits ``[B, K]`` and features z ``[B, K-1]``, both float32; only z without ``classify``."""
        # a copy, because the mapped axis is known only where the step is built
        h = self.encoder.copy(name="backbone", axis_name=self.axis_name)(x, train, mask)
        z = RetrievalHead(self.num_classes - 1, dtype=self.dtype, name="head")(h).astype(jnp.float32)
        if not classify:
            return z
        if self.classifier == "simplex":
            return FixedClassifier(self.num_classes, name="classifier")(z), z
        logits = nn.Dense(self.num_classes, use_bias=False, name="classifier")(z)
        seen = self.variable("constants", "seen", jnp.ones, (self.num_classes,), bool).value
        return jnp.where(seen[None, :], logits, -jnp.inf), z


def frame(variables: Mapping[str, Any]) -> Any:
    """What a network's features are measured against: the simplex, or the weights of a learned classifier.

    For :func:`zoo.ops.lineage.lineage`: two models may be compared if this is the same in both.
    """
    fixed = variables.get("constants", {}).get("classifier")
    return fixed["prototypes"] if fixed is not None else variables["params"]["classifier"]["kernel"]


def feature_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a network's features need: what a frozen old model is made of."""
    params = {k: v for k, v in variables["params"].items() if k != "classifier"}
    kept = {c: v for c, v in variables.items() if c == "batch_stats"}
    return {"params": params, **kept}


def classification(
    network: StationaryNetwork,
    loss: Callable[[Array, Array], Array] = optax.softmax_cross_entropy_with_integer_labels,
    side: Side = "end",
    inputs: str = "x",
    label: str = "label",
) -> Objective:
    """Classification against the simplex: cross-entropy of ``W z`` and the label's row (brief, "CE").

    The logits have neither bias nor temperature, and z is not normalised: its length is the temperature.

    Args:
      network: the model.
      loss: ``(logits [B, K], rows [B]) -> [B]``.
      side: from which end of the simplex labels are counted; ``"start"`` is the pre-training side.
      inputs, label: batch fields.
    """

    def forward(variables, batch, context):
        (logits, z), mutated = apply_module(network, variables, batch[inputs], batch=batch, context=context)
        return {"logits": logits, "embedding": z}, mutated

    def value(outputs, batch, context):
        mask = batch_mask(batch)
        # padded rows may hold any label; their loss is masked, their place must only be in range
        rows = jnp.where(mask, batch[label], 0)
        rows = reversed_targets(rows, network.num_classes) if side == "end" else rows
        hits = (jnp.argmax(outputs["logits"], -1) == rows) & mask
        dead = (jnp.linalg.norm(outputs["embedding"], axis=-1) <= 1e-6) & mask
        count = jnp.maximum(jnp.sum(mask), 1)
        metrics = {"accuracy": jnp.sum(hits) / count, "zero_features": jnp.sum(dead) / count}
        return Loss(example_elements(loss(outputs["logits"], rows), batch), metrics=metrics)

    return Objective(
        init=lambda rng, batch: init_module(network, rng, batch, batch[inputs]),
        forward=forward,
        loss=value,
        provides=("embedding", "logits", "label", "index"),
        gathers=(label,),
        name=f"{network.classifier} softmax",
    )


def higher_order_compatibility(
    base: Objective,
    old: Callable[[Any, Batch], Any],
    old_variables: Any,
    lam: float = 0.1,
    mu: float = 10.0,
    mask_mode: str = "zero",
    label: str = "label",
) -> Objective:
    """``lam L + (1 - lam) L_HOC`` for any classification objective L (paper, equation 3).

    Args:
      base: has elements of unit example and an output ``embedding`` [B, d].
      old: ``(variables, batch) -> z [B, d]``, the frozen old model in evaluation mode.
      old_variables: its variables; they live in ``constants/old``.
      lam: weight of ``base``; 1 is ``base`` alone.
      mu, mask_mode: see :func:`hoc_loss`.
      label: the batch field of classes.

    Raises:
      CompositionError: ``base`` yields another unit, or no embedding.
      ValueError: ``lam`` outside [0, 1], or an unknown ``mask_mode``.
    """
    if base.unit != "example" or "embedding" not in base.provides:
        raise CompositionError(
            f"higher-order compatibility needs elements of unit 'example' and an output 'embedding'; {base.name} has "
            f"unit {base.unit!r} and provides {', '.join(map(repr, base.provides)) or 'nothing'}"
        )
    _check_mask_mode(mask_mode)
    convex_combine(jnp.zeros(()), jnp.zeros(()), lam)
    tower = frozen_tower(base, old, old_variables, output="old")

    def value(outputs, batch, context):
        loss, mask = base.loss(outputs, batch, context), batch_mask(batch)
        new, before = l2_normalize(outputs["embedding"]), l2_normalize(outputs["old"].astype(jnp.float32))
        hoc = example_elements(hoc_loss(new, before, batch[label], mu, mask_mode, mask), batch)
        combined = convex_combine(loss.elements.values, hoc.values, lam)
        terms = {name: lam * term for name, term in loss.terms.items()}
        reduce = REDUCERS[base.reduce]
        metrics = {**loss.metrics, "classification": reduce(loss.elements), "hoc": reduce(hoc)}
        return Loss(loss.elements.replace(values=combined), terms, metrics)

    return dataclasses.replace(
        tower,
        loss=value,
        gathers=None if base.gathers is None else tuple(dict.fromkeys((*base.gathers, label))),
        name=f"hoc({base.name})",
    )


def stationary(
    network: StationaryNetwork,
    old: StationaryNetwork,
    old_variables: Mapping[str, Any],
    lam: float = 0.1,
    mu: float = 10.0,
    mask_mode: str = "zero",
    side: Side = "end",
    inputs: str = "x",
) -> Objective:
    """The method: cross-entropy against the fixed simplex and HOC to a frozen old model (d-Simplex-HOC).

    Args:
      network: the model to be trained.
      old, old_variables: the model it replaces or starts from, of any backbone, in the same simplex.
      lam, mu, mask_mode: see :func:`higher_order_compatibility`.
      side, inputs: see :func:`classification`.

    Raises:
      ValueError: the old model lives in another simplex, or was trained against a learned classifier.
    """
    check_replacement(old.num_classes - 1, network.num_classes, old.classifier)

    def embed(variables, batch):
        return old.apply(variables, batch[inputs], classify=False)

    base = classification(network, side=side, inputs=inputs)
    return higher_order_compatibility(base, embed, feature_variables(old_variables), lam, mu, mask_mode)


def _check_mask_mode(mask_mode: str) -> None:
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode must be 'zero' or 'neginf', got {mask_mode!r}")


CARD = Card(
    name="stationary",
    family="representation",
    title=(
        "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved Model "
        "Replacements"
    ),
    year=2024,
    kind="objective",
    idea=(
        "When a retrieval model is replaced, its gallery must be extracted again unless new features can be compared "
        "with old ones. Train every model against the same fixed simplex of class prototypes, and the features of a "
        "class settle at the same place in all of them. A contrastive term ties each new feature to the old model's "
        "feature of the same example. A better model trained elsewhere can then be put in at any time."
    ),
    citation="Biondi, Pernici, Ricci, Del Bimbo; CVPR 2024; arXiv 2405.02581",
    plugs_into=(
        "any classification objective with an embedding",
        "class-incremental tasks with replay",
        "model replacement",
    ),
    pieces=(
        "hoc_loss",
        "convex_combine",
        "reversed_targets",
        "classification",
        "higher_order_compatibility",
        "stationary",
        "StationaryNetwork",
        "frame",
        "feature_variables",
        "check_capacity",
        "check_labels",
        "check_replacement",
        "zoo.ops.simplex:simplex_prototypes",
        "zoo.nn.classifiers:FixedClassifier",
        "zoo.ops.lineage:check_comparable",
        "zoo.metrics.compatibility:compatibility_matrix",
        "zoo.metrics.compatibility:average_compatibility",
    ),
    claim=Claim(
        statement=(
            "Over three class-incremental tasks on digits with one replacement by a model trained elsewhere, training "
            "with the higher-order compatibility term has a higher average compatibility on open-set identities than "
            "cross-entropy against the fixed simplex alone."
        ),
        metric="compatibility",
        effect=0.1,
        method="simplex and hoc",
        baseline="simplex",
        trivial="untrained",
        seeds=5,
        budget="the same server models, steps, batches and optimiser; no tuning in any arm",
        remark=(
            "A pair counts only if the new queries beat the old model's own; a server that has seen 3 to 5 digits "
            "gives unseen identities too few shared directions for that. Cross-model accuracy (0.33 against 0.16) and "
            "average accuracy over all pairs (0.46 against 0.34) are higher with the term on every seed."
        ),
    ),
    cost="HOC O(B^2 d) time and O(B^2) memory per step; logits O(B K d); no old gallery is ever extracted again",
    official_code="miccunifi/iamcl2r",
    departures=(
        "mask_mode='zero' is the released loss and the default: entries of the same class are multiplied by zero "
        "inside the log-sum-exp and each adds exp(0); 'neginf' leaves them out and counts the positive, as InfoNCE",
        "average accuracy takes an explicit mask; the released code reads true zeros as missing and scales by 100 if "
        "the last row lies below 1",
        "the learning rate follows its cosine by step, not by epoch; images are not augmented",
        "each model's queries and gallery are extracted once; the released evaluation extracts them for every pair",
        "a replacement with another feature size or a learned classifier is refused; the released loader skips what it "
        "does not know",
    ),
)
