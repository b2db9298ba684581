"""LAMB, as papers used it before optax: without bias correction, and with a bounded norm of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LambState(NamedTuple):
    """Moments of the gradients, and how many steps were taken."""

    count: Any
    mu: Any
    nu: Any


def lamb(
    learning_rate: float | Callable[[Any], Any],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    weight_norm_clip: float | None = 10.0,
    bias_correction: bool = False,
    mask: Callable[[Any], Any] | Any | None = None,
) -> optax.GradientTransformation:
    """LAMB: Adam's step, made as long in each array as a multiple of that array's own norm.

    You et al., "Large Batch Optimization for Deep Learning", ICLR 2020, algorithm 2: ``r = m / (sqrt(v) + eps)``,
    ``u = r + decay * w``, ``w -= lr * phi(|w|) / |u| * u`` with ``phi(x) = min(x, weight_norm_clip)``; an array whose
    norm or whose step is 0 moves by ``lr * u``.  ``optax.lamb`` corrects the bias of the moments and does not bound
    the norm.

    Args:
      learning_rate: constant, or ``step -> rate``.
      b1, b2, eps: of the moments.
      weight_decay: of the arrays that ``mask`` chooses.
      weight_norm_clip: the bound; ``None`` for none.
      bias_correction: divide the moments by ``1 - b^t`` (version 1 of the paper).
      mask: tree of booleans, or a function of the parameters that makes one: which arrays decay; all by default.
    """

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)  # noqa: E731
        return LambState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("lamb needs the parameters: call update(grads, state, params)")
        count = state.count + 1
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        moment = lambda b, n, old: jax.tree.map(  # noqa: E731
            lambda m, g: b * m + (1 - b) * g.astype(jnp.float32) ** n, old, grads
        )
        mu, nu = moment(b1, 1, state.mu), moment(b2, 2, state.nu)
        first, second = (1 - b1**count, 1 - b2**count) if bias_correction else (1.0, 1.0)
        decays = mask(params) if callable(mask) else mask
        decays = jax.tree.map(lambda _: True, params) if decays is None else decays

        def move(p, m, v, decay):
            w = p.astype(jnp.float32)
            step = (m / first) / (jnp.sqrt(v / second) + eps)
            step = step + weight_decay * w * jnp.asarray(decay, jnp.float32)
            size, length = jnp.sqrt(jnp.sum(w * w)), jnp.sqrt(jnp.sum(step * step))
            size = size if weight_norm_clip is None else jnp.minimum(size, weight_norm_clip)
            trust = jnp.where((size > 0) & (length > 0), size / jnp.where(length > 0, length, 1.0), 1.0)
            return (-rate * trust * step).astype(p.dtype)

        return jax.tree.map(move, params, mu, nu, decays), LambState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """Which arrays decay: matrices and tables; not biases, scales of norms or other vectors and scalars."""
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
