"""One update without a run around it, for claims and benchmarks that repeat it inside one compiled program.

It computes what :mod:`trainers.step` does on one device for an objective that trains every parameter and selects no
pairs; a run's record, faults and averages are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.base import Context, LossTransformation, Objective, total_loss


class Carry(NamedTuple):
    """What an update takes and returns.

    Attributes:
      variables: ``params`` and the objective's collections.
      moments: the optimiser's state.
      memory: the loss transformation's state.
    """

    variables: Mapping[str, Any]
    moments: Any
    memory: Any = ()


def carry(
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation,
    transform: LossTransformation | None = None,
    num_examples: int = 0,
) -> Carry:
    """The start of a training: fresh moments, and the transformation's memory of ``num_examples`` examples."""
    memory = transform.init(num_examples) if transform is not None else ()
    return Carry(variables, tx.init(variables["params"]), memory)


def bare_update(
    objective: Objective, tx: optax.GradientTransformation, transform: LossTransformation | None = None
) -> Callable[[Carry, Mapping[str, Any], Context], Carry]:
    """``(carry, batch, context) -> carry``: gradient of the transformed loss, optimiser, what the objective does after.

    Raises:
      ValueError: an objective that selects pairs, which only the trainer does.
    """
    if objective.select is not None:
        raise ValueError(f"{objective.name!r} selects pairs from the batch; train it by a run")

    def update(now: Carry, batch: Mapping[str, Any], context: Context) -> Carry:
        variables = now.variables
        rest = {c: v for c, v in variables.items() if c != "params"}

        def scalar(params):
            outputs, mutated = objective.forward({**rest, "params": params}, batch, context)
            known = context.replace(outputs=outputs, batch=batch, collections=rest)
            loss = objective.loss(outputs, batch, known.replace(outputs=None))
            total, memory, _ = total_loss(loss, transform, now.memory, known, objective.reduce)
            return total, (outputs, mutated, memory)

        grads, (outputs, mutated, memory) = jax.grad(scalar, has_aux=True)(variables["params"])
        updates, moments = tx.update(grads, now.moments, variables["params"])
        new = {**rest, **mutated, "params": optax.apply_updates(variables["params"], updates)}
        if objective.after_step is not None:
            new = {**new, **objective.after_step(new, outputs, batch, context)}
        return Carry(new, moments, memory)

    return update


def rows_of(stream: Any, steps: int) -> tuple[jax.Array, jax.Array]:
    """The rows of a stream's first batches, i32 ``[steps, B]``, and which of them are real, bool ``[steps, B]``."""
    batches = [stream.batch(i) for i in range(steps)]
    rows, real = (np.stack([b[k] for b in batches]) for k in ("index", "mask"))
    return jnp.asarray(rows), jnp.asarray(real)


def scan_updates(
    update: Callable[[Carry, Mapping[str, Any], Context], Carry],
    start: Carry,
    arrays: Mapping[str, jax.Array],
    rows: jax.Array,
    real: jax.Array,
    key: jax.Array,
) -> Carry:
    """All updates in one scan over arrays that lie on the device.

    Args:
      update: from :func:`bare_update`.
      start: from :func:`carry`.
      arrays: the training set, one row per example.
      rows, real: from :func:`rows_of`.
      key: of the training; each step folds its number in.
    """

    def body(now, inputs):
        number, index, mask = inputs
        batch = {k: v[jnp.where(mask, index, 0)] for k, v in arrays.items()} | {"index": index, "mask": mask}
        return update(now, batch, Context(jax.random.fold_in(key, number), number, len(rows))), None

    return jax.lax.scan(body, start, (jnp.arange(len(rows)), rows, real))[0]
