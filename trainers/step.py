"""The step: a pure function of state, batches and artefacts, the same under ``jit`` on a mesh and under ``pmap``."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from trainers.gather import fields, gather, share, with_rows
from trainers.phases import Alternate, Average, Update
from trainers.state import TrainState, join_params, split_params
from zoo.base import Context, named_key, total_loss


def phase_key(seed: jax.Array, name: str, step: jax.Array) -> jax.Array:
    """The key of one named purpose at one step; the only way keys are made."""
    return jax.random.fold_in(named_key(jax.random.key(seed), name), step)


def make_step(phase: Alternate, steps_per_epoch: Mapping[str, int], axis_name: str | None = None):
    """Builds ``step(state, batches, artefacts, count) -> (state, metrics, fault)`` for a phase.

    ``batches`` holds, by update name, batches with two leading axes ``[calls, repeats]``; the first ``count`` calls are
    made and the rest skipped, so one compiled program serves any number of steps up to ``calls``.

    Args:
      phase: what to do.
      steps_per_epoch: by update name, cycles in one pass over its stream.
      axis_name: the ``pmap`` axis; the outputs are gathered over it before the loss, which so sees the global batch.
    """

    def cycle(state: TrainState, batches, artefacts):
        metrics: dict[str, jax.Array] = {}
        for name, update in phase.updates.items():
            for r in range(update.repeats):
                batch = jax.tree.map(lambda x, r=r: x[r], batches[name])
                batch = with_rows(batch, axis_name)
                context = Context(
                    rng=phase_key(state.seed, f"{phase.series or phase.name}/{name}/{r}", state.step),
                    step=state.step,
                    total_steps=jnp.asarray(phase.steps, jnp.int32),
                    steps_per_epoch=jnp.asarray(steps_per_epoch[name], jnp.int32),
                    artefacts=artefacts,
                    axis_name=axis_name,
                )
                if phase.prequential is not None and r == 0 and name == next(iter(phase.updates)):
                    seen, mutated = phase.prequential.update(
                        state.prequential, state.variables, gather(batch, axis_name), context.replace(train=False)
                    )
                    kept = {**state.collections, **mutated} if phase.prequential.commit else state.collections
                    state = state.replace(prequential=seen, collections=kept)
                state, logged = _update(state, name, update, batch, context, axis_name)
                prefix = "" if len(phase.updates) == 1 else f"{name}/"
                metrics.update({f"{prefix}{k}": v for k, v in logged.items()})
        if phase.after_step is not None:
            changed = dict(phase.after_step(state.variables, context))
            params = changed.pop("params", state.params)
            state = state.replace(params=params, collections={**state.collections, **changed})
        if phase.average is not None:
            state = state.replace(average=_averaged(phase.average, state))
        finite = jnp.stack([jnp.all(jnp.isfinite(v)) for v in metrics.values()])
        fresh_fault = ~jnp.all(finite) & (state.fault[0] < 0)
        fault = jnp.where(fresh_fault, jnp.stack([state.step, jnp.argmin(finite).astype(jnp.int32)]), state.fault)
        # the fault is returned beside the state too, because the next step takes the state's memory
        return state.replace(step=state.step + 1, fault=fault), metrics, jnp.copy(fault)

    def step(state: TrainState, batches, artefacts, count):
        calls = jax.tree.leaves(batches)[0].shape[0]
        if calls == 1:
            return cycle(state, jax.tree.map(lambda x: x[0], batches), artefacts)
        shapes = jax.eval_shape(lambda s, b: cycle(s, jax.tree.map(lambda x: x[0], b), artefacts)[1:], state, batches)
        blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(carry, inputs):
            i, batch = inputs
            run = lambda c: cycle(c[0], batch, artefacts)  # noqa: E731
            return jax.lax.cond(i < count, run, lambda c: c, carry), None

        return jax.lax.scan(body, (state, *blank), (jnp.arange(calls), batches))[0]

    return step


def _update(state: TrainState, name: str, update: Update, batch, context: Context, axis_name):
    objective = update.objective
    trained, frozen = split_params(state.params, update.trainable)
    if objective.select is not None:  # pairs are chosen across the global batch, each device then takes its share
        batch = share(objective.select(gather(batch, axis_name), context), axis_name)

    def scalar(trained):
        variables = {"params": join_params(trained, frozen), **state.collections}
        outputs, mutated = objective.forward(variables, batch, context)
        outputs = gather(outputs, axis_name)
        whole = gather(fields(batch, objective.gathers), axis_name)
        known = context.replace(outputs=outputs, batch=whole, collections=state.collections)
        loss = objective.loss(outputs, whole, known.replace(outputs=None))
        total, loss_state, metrics = total_loss(loss, update.loss_transform, state.loss[name], known, objective.reduce)
        return total, (outputs, whole, mutated, loss_state, metrics)

    grads, (outputs, whole, mutated, loss_state, metrics) = jax.grad(scalar, has_aux=True)(trained)
    if axis_name is not None:  # the loss is the global one on every device, and all_gather's transpose sums its parts
        grads = jax.lax.pmean(grads, axis_name)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    updates, optimizer = optax.with_extra_args_support(update.optimizer).update(
        grads, state.optimizer[name], trained, value=metrics["loss"], monitor=state.monitor
    )
    params = join_params(optax.apply_updates(trained, updates), frozen)
    collections = {**state.collections, **jax.lax.stop_gradient(dict(mutated))}
    if objective.after_step is not None:
        changed = objective.after_step({"params": params, **collections}, outputs, whole, context)
        collections = {**collections, **jax.lax.stop_gradient(dict(changed))}
    new = state.replace(
        params=params,
        collections=collections,
        optimizer={**state.optimizer, name: optimizer},
        loss={**state.loss, name: loss_state},
        streams={**state.streams, name: state.streams[name] + 1},
    )
    return new, metrics


def _averaged(average: Average, state: TrainState):
    count = (state.step - average.start + 1).astype(jnp.float32)
    decay = jnp.float32(average.decay) if average.decay is not None else 1.0 - 1.0 / jnp.maximum(count, 1.0)
    decay = jnp.where(count <= 0, 0.0, decay)  # before the start the average is the weights themselves
    return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), state.average, state.params)
