"""Contrastive learning against a momentum encoder's soft targets (ALBEF, BLIP), and the loss of generated tokens.

Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", NeurIPS 2021,
equations 1, 2 and 6; Li et al., "BLIP", ICML 2022.  Both losses keep one value per example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TAU_RANGE = (0.001, 0.5)
"""Where ALBEF and BLIP keep the learnt temperature."""


def clamped_temperature(tau: Float[Array, ""]) -> Float[Array, ""]:
    """``tau`` clipped to :data:`TAU_RANGE`; the gradient passes as if it were not, so that it can come back."""
    return tau + jax.lax.stop_gradient(jnp.clip(tau, *TAU_RANGE) - tau)


def momentum_soft_contrastive(
    a: Float[Array, "b d"],
    b: Float[Array, "b d"],
    a_momentum: Float[Array, "b d"],
    b_momentum: Float[Array, "b d"],
    tau: float | Float[Array, ""] = 0.07,
    soft: float | Float[Array, ""] = 0.4,
    ids: Int[Array, "b"] | None = None,
    mask: Bool[Array, "b"] | None = None,
    queue: Mapping[str, Any] | None = None,
) -> Float[Array, "b"]:
    """Cross-entropy in both directions against ``(1 - soft) multi-hot + soft * softmax(momentum similarities)``.

    Row i of ``a`` is compared with the momentum embeddings of ``b`` (the batch's, then the queue's), and the other way
    round; the loss is the mean of the two directions.  No gradient reaches momentum embeddings, queue or targets (nor
    ``tau`` through them).

    Args:
      a, b: unit vectors; row i of both belongs together.
      a_momentum, b_momentum: the same rows by the momentum encoders.
      tau: divides the similarities; positive.
      soft: share of the momentum model's opinion, in [0, 1].
      ids: rows with equal ids are positives of each other (the same document asked for twice); by default, and beside
        that always, a row is its own positive only.
      mask: which rows are real; the others neither ask nor answer.
      queue: of ``zoo.ops.queues`` with rows ``a``, ``b`` (earlier momentum embeddings) and ``id``.

    Returns:
      f32 ``[b]``, 0 where masked; ``log b`` if all similarities are equal and nothing is masked or queued.

    Raises:
      ValueError: a temperature that is not positive, or a share outside [0, 1].
    """
    if isinstance(tau, (int, float)) and not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}; the published start is 0.07")
    if isinstance(soft, (int, float)) and not 0 <= soft <= 1:
        raise ValueError(f"soft must lie in [0, 1], got {soft}")
    count = a.shape[0]
    real = jnp.ones(count, bool) if mask is None else mask
    own = jnp.eye(count, dtype=bool)
    clean = lambda x: jnp.where(real[:, None], x.astype(jnp.float32), 0.0)  # noqa: E731
    a, b, a_momentum, b_momentum = (clean(x) for x in (a, b, a_momentum, b_momentum))
    positive = own if ids is None else own | (ids[:, None] == ids[None, :])
    # a masked row keeps its own key, so that its log-sum-exp stays finite
    valid = real[None, :] | own
    keys_a, keys_b = a_momentum, b_momentum
    if queue is not None:
        rows, filled = queue["rows"], queue["filled"]
        keys_a, keys_b = (jnp.concatenate([k, rows[n].astype(jnp.float32)]) for k, n in ((keys_a, "a"), (keys_b, "b")))
        again = jnp.zeros((count, len(filled)), bool) if ids is None else ids[:, None] == rows["id"][None, :]
        positive = jnp.concatenate([positive, again], axis=1)
        valid = jnp.concatenate([valid, jnp.broadcast_to(filled[None, :], again.shape)], axis=1)
    hot = (positive & valid).astype(jnp.float32)
    hot = hot / jnp.sum(hot, axis=1, keepdims=True)

    def direction(rows, teacher, keys):
        keys = jax.lax.stop_gradient(keys)
        opinion = jax.nn.softmax(_products(teacher, keys) / tau, axis=1, where=valid)
        target = jax.lax.stop_gradient((1.0 - soft) * hot + soft * opinion)
        logits = _products(rows, keys) / tau
        logs = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True, where=valid)
        return -jnp.sum(jnp.where(valid, target * logs, 0.0), axis=1)

    both = direction(a, a_momentum, keys_b) + direction(b, b_momentum, keys_a)
    return jnp.where(real, both / 2, 0.0)


def _products(rows: Array, keys: Array) -> Array:
    # a cosine rounded to 10 bits and divided by a small temperature is off by a per cent
    return jnp.matmul(rows, keys.T, precision="highest")


def token_cross_entropy(
    logits: Float[Array, "b t v"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    label_smoothing: float = 0.0,
) -> Float[Array, "b"]:
    """``-1/|t| sum_i log P(t_i)`` over a row's real tokens, float32 ``[b]``; 0 for a row without any.

    Args:
      logits: of each position's token.
      targets: token ids; anything where masked.
      mask: True where there is a token to predict.
      label_smoothing: share of the target that is spread evenly over the vocabulary.

    Raises:
      ValueError: ``label_smoothing`` outside [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(logs, jnp.where(mask, targets, 0)[..., None], axis=2)[..., 0]
    losses = -(1.0 - label_smoothing) * picked
    if label_smoothing:
        losses -= label_smoothing * jnp.mean(logs, axis=2)
    return jnp.sum(jnp.where(mask, losses, 0.0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
