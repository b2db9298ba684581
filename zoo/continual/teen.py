"""TEEN: few-shot class-incremental learning by training-free prototype calibration.

Wang, Zhou, Zhang, Zhan, Ye: "Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration",
NeurIPS 2023, arXiv 2312.05229.

A base session trains an encoder on many classes with a cosine classifier; afterwards each new session brings N classes
with K images and no old data.  Class means in the frozen feature space classify well but take most new-class images for
base classes.  Yet the base-trained encoder puts a new class nearest to the base classes it resembles: TEEN moves each
new prototype towards a similarity-weighted mean of the base prototypes.  Nothing is trained in the later sessions.

Notation as in the paper: ``b_k`` normalised base prototypes, ``c_n`` normalised new means, ``D_n`` the calibration
direction, ``tau`` the softmax temperature.  ``shift_weight`` multiplies ``D_n`` (the paper's 1 - alpha, the released
code's ``shift_weight``).  The default agrees with the released code; it has no variants.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from zoo.base import Loss, Objective, batch_mask, example_elements
from zoo.catalogue import Card, Claim
from zoo.objectives import apply_module, init_module
from zoo.ops.prototypes import class_means, cosine_logits, l2_normalize


class CosineNetwork(nn.Module):
    """An encoder under a cosine classifier of fixed capacity (brief, base session).

    Attributes:
      encoder: ``(x, train, mask) -> features [B, D]``, with an ``axis_name`` (see ``zoo.nn``).
      capacity: C_max, the classes of all sessions; classes not seen yet are masked by the caller.
      temperature: t, multiplies the cosine in the base session's softmax (argmax does not depend on it).
      axis_name: handed on to the encoder.
    """

    encoder: nn.Module
    capacity: int
    temperature: float = 16.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False, mask: Any = None):
        """Returns logits ``[B, C_max]`` over all classes and un-normalised features ``[B, D]``."""
        # a copy, because the mapped axis is known only where the step is built
        features = self.encoder.copy(name="features", axis_name=self.axis_name)(x, train, mask).astype(jnp.float32)
        shape = (self.capacity, features.shape[-1])
        prototypes = self.param("prototypes", nn.initializers.lecun_normal(), shape, jnp.float32)
        return cosine_logits(features, prototypes, self.temperature), features


def base_session(network: CosineNetwork, num_base: int, name: str = "cosine softmax") -> Objective:
    """The base session's objective: softmax cross-entropy over the base columns of the cosine classifier.

    Args:
      network: encoder and classifier.
      num_base: B; only the first B classes enter the softmax.

    Raises:
      ValueError: ``num_base`` is not in [1, capacity].
    """
    if not 1 <= num_base <= network.capacity:
        raise ValueError(f"num_base must be in [1, {network.capacity}] (the capacity), got {num_base}")

    def forward(variables, batch, context):
        (logits, features), mutated = apply_module(network, variables, batch["x"], batch=batch, context=context)
        return {"logits": logits[:, :num_base], "embedding": features}, mutated

    def loss(outputs, batch, context):
        log_p = jax.nn.log_softmax(outputs["logits"].astype(jnp.float32))
        # padded rows may hold any label; their loss is masked, their index must only be in range
        label = jnp.where(batch_mask(batch), batch["label"], 0)
        values = -jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]
        hits = (jnp.argmax(log_p, -1) == label) & batch_mask(batch)
        accuracy = jnp.sum(hits) / jnp.maximum(jnp.sum(batch_mask(batch)), 1)
        return Loss(example_elements(values, batch), metrics={"accuracy": accuracy})

    return Objective(
        init=lambda rng, batch: init_module(network, rng, batch, batch["x"]),
        forward=forward,
        loss=loss,
        provides=("embedding", "logits", "label", "index"),
        gathers=("label",),
        name=name,
    )


def calibration_direction(
    base: Float[Array, "B d"],
    new: Float[Array, "n d"],
    tau: float | Float[Array, ""],
    base_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, "n d"]:
    """``D_n = l2norm(sum_k softmax_k(tau <c_n, b_k>) b_k)``, over base prototypes only.

    ``tau`` = 0 gives every class the base's mean direction; ``tau`` to infinity copies the nearest base class.
    """
    b, c = l2_normalize(base), l2_normalize(new)
    similarity = tau * (c @ b.T)
    if base_mask is not None:
        similarity = jnp.where(base_mask[None, :], similarity, -jnp.inf)
    return l2_normalize(jax.nn.softmax(similarity, axis=-1) @ b)


def calibrate_prototypes(
    base: Float[Array, "B d"],
    new: Float[Array, "n e"],
    shift_weight: float = 0.5,
    tau: float | Float[Array, ""] = 16.0,
    base_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, "n e"]:
    """The whole method: ``W_n = (1 - shift_weight) c_n + shift_weight D_n`` (brief, session s >= 1).

    ``c_n`` and ``D_n`` have unit length, ``W_n`` has not: it matters to dot products, never to cosines.  Rows do not
    depend on each other.  ``shift_weight`` = 0 is the decoupled-cosine (ProtoNet) baseline.

    Args:
      base: means of un-normalised features of the base classes.
      new: the same of the new classes; e must equal d.
      shift_weight: in [0, 1].
      tau: softmax temperature, at least 0.
      base_mask: which rows of ``base`` are base classes; all by default.

    Raises:
      ValueError: a ``shift_weight`` outside [0, 1], or feature dimensions that differ.
    """
    check_shift_weight(shift_weight)
    if base.shape[-1] != new.shape[-1]:
        raise ValueError(f"base prototypes have {base.shape[-1]} features, new ones {new.shape[-1]}; use one encoder")
    direction = calibration_direction(base, new, tau, base_mask)
    return (1.0 - shift_weight) * l2_normalize(new) + shift_weight * direction


@struct.dataclass
class PrototypeBank:
    """The classifier after some sessions, with fixed capacity so that every session shares one compiled function.

    Attributes:
      weights: f32 ``[C_max, D]``; base rows are means of un-normalised features, novel rows calibrated.
      is_base, is_seen: bool ``[C_max]``.
    """

    weights: Any
    is_base: Any
    is_seen: Any


def base_bank(
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    num_base: int,
    capacity: int,
    valid: Bool[Array, "n"] | None = None,
) -> PrototypeBank:
    """The bank after the base session: ``W_k``, k < B, is the mean of un-normalised features (not the learned W)."""
    means, _ = class_means(features, labels, capacity, valid)
    is_base = jnp.arange(capacity) < num_base
    return PrototypeBank(jnp.where(is_base[:, None], means, 0.0), is_base, is_base)


def add_session(
    bank: PrototypeBank,
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    shift_weight: float = 0.5,
    tau: float | Float[Array, ""] = 16.0,
    valid: Bool[Array, "n"] | None = None,
) -> PrototypeBank:
    """Adds the classes that occur in a few-shot session; each novel row is written once, base rows never change.

    Args:
      bank: the classifier so far.
      features, labels, valid: the session's shots; labels of classes that are seen already are ignored
        (``check_session`` refuses them with a message).
      shift_weight, tau: see :func:`calibrate_prototypes`.
    """
    capacity = bank.weights.shape[0]
    means, counts = class_means(features, labels, capacity, valid)
    calibrated = calibrate_prototypes(bank.weights, means, shift_weight, tau, bank.is_base)
    fresh = (counts > 0) & ~bank.is_seen
    return bank.replace(weights=jnp.where(fresh[:, None], calibrated, bank.weights), is_seen=bank.is_seen | fresh)


def classify(bank: PrototypeBank, features: Float[Array, "n d"]) -> Int[Array, "n"]:
    """``argmax_k cos(f(x), W_k)`` over all seen classes."""
    return jnp.argmax(cosine_logits(features, bank.weights, class_mask=bank.is_seen), axis=-1)


def check_shift_weight(shift_weight: float) -> None:
    """Raises ValueError unless ``shift_weight`` lies in [0, 1]."""
    if not 0.0 <= shift_weight <= 1.0:
        raise ValueError(f"shift_weight must lie in [0, 1], got {shift_weight}")


def check_session(bank: PrototypeBank, features: Any, labels: Any, classes: Any) -> None:
    """Checks a session's arrays on the host, before they are used.

    Args:
      bank: the classifier so far.
      features, labels: the shots as NumPy arrays.
      classes: the classes the session is meant to add.

    Raises:
      ValueError: no base session yet, a class without shots, classes that are seen already, another feature dimension,
        or features that are not finite; each named.
    """
    import numpy as np

    features, labels = np.asarray(features), np.asarray(labels)
    seen, capacity = np.asarray(bank.is_seen), len(np.asarray(bank.is_seen))
    if not np.asarray(bank.is_base).any():
        raise ValueError("there are no base prototypes: run the base session (base_bank) before calibrating")
    if features.shape[-1] != bank.weights.shape[-1]:
        raise ValueError(
            f"the session's features have {features.shape[-1]} dimensions, the bank {bank.weights.shape[-1]}"
        )
    outside = [int(c) for c in np.unique(labels) if not 0 <= c < capacity]
    if outside:
        raise ValueError(f"label {outside[0]} is outside the bank's capacity of {capacity} classes")
    bad = int((~np.isfinite(features)).any(-1).sum())
    if bad:
        raise ValueError(f"{bad} of {len(features)} feature rows are not finite; check the encoder and its inputs")
    empty = [int(c) for c in classes if not (labels == c).any()]
    if empty:
        raise ValueError(f"class {empty[0]} has no shots in this session; its mean would be undefined")
    again = [int(c) for c in np.unique(labels) if seen[c]]
    if again:
        raise ValueError(f"class {again[0]} was learnt in an earlier session; new labels must not overlap")


CARD = Card(
    name="teen",
    family="continual",
    title="Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration",
    year=2023,
    kind="closed form",
    idea=(
        "After a base session, new classes arrive with a few images each. A frozen encoder with class means takes "
        "most of them for base classes; but it also puts each new class near the base classes it resembles. TEEN moves "
        "every new prototype towards the similarity-weighted mean of base prototypes. Two scalars, no training."
    ),
    citation="Wang, Zhou, Zhang, Zhan, Ye; NeurIPS 2023; arXiv 2312.05229",
    plugs_into=("any encoder with class means", "few-shot class-incremental sessions", "nearest-prototype classifiers"),
    pieces=(
        "calibrate_prototypes",
        "calibration_direction",
        "base_session",
        "base_bank",
        "add_session",
        "classify",
        "check_session",
        "CosineNetwork",
        "PrototypeBank",
        "zoo.ops.prototypes:class_means",
        "zoo.metrics.continual:session_metrics",
    ),
    claim=Claim(
        statement=(
            "With new classes that are noisy mixtures of base classes, calibrated prototypes (shift_weight 0.5, tau 16)"
            " have a higher harmonic mean of base and novel accuracy than raw class means (shift_weight 0)."
        ),
        metric="harmonic",
        effect=0.05,
        method="calibrated",
        baseline="raw means",
        trivial="always a base class",
        seeds=5,
        budget="no arm trains or tunes anything; the same shots and test points per seed",
    ),
    cost="O(n B D) once per session; nothing to optimise",
    official_code="wangkiw/TEEN",
    departures=(
        "shift_weight multiplies the calibration direction, as released; the paper's alpha is its complement",
        "model selection by validation accuracy is left to the user; the released code selects on the test set",
        "accuracy is exact over examples; the released code averages per-batch accuracies",
    ),
)
