"""A supervised objective, and the combinators that join objectives: sums, teachers, memory banks, frozen towers.

What can be learned, host by host, is in ``zoo/hosts.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from zoo.base import REDUCERS, Batch, Context, Loss, Objective, Variables, batch_mask, batch_rows, example_elements

GRADIENT_FREE = ("constants",)
"""Collections that no forward pass may change."""


def apply_module(
    module: nn.Module, variables: Variables, *args, batch: Batch, context: Context, **kwargs
) -> tuple[Any, Variables]:
    """Runs a Linen module as an objective's ``forward`` must: sharding-proof and without touching constants.

    The module's ``__call__`` is given those of ``train``, ``mask`` (real rows), ``keys`` (one per example, for
    dropout) and ``axis_name``-bound batch statistics that it asks for.

    Returns:
      The module's output and the collections it changed (none outside training).
    """
    if "axis_name" in module.__dataclass_fields__:
        module = module.clone(axis_name=context.axis_name)
    offered = {
        "train": lambda: context.train,
        "mask": lambda: batch_mask(batch),
        "keys": lambda: context.example_keys(batch, "dropout") if context.train else None,
    }
    accepted = inspect.signature(type(module).__call__).parameters
    kwargs = {**{k: make() for k, make in offered.items() if k in accepted}, **kwargs}
    mutable = [c for c in variables if c != "params" and c not in GRADIENT_FREE] if context.train else []
    used = {c: v for c, v in variables.items() if jax.tree.leaves(v)}
    if mutable:
        out, mutated = module.apply(used, *args, mutable=mutable, **kwargs)
        return out, {c: v for c, v in mutated.items() if c in mutable}
    return module.apply(used, *args, **kwargs), {}


def init_module(module: nn.Module, rng: jax.Array, batch: Batch, *args, **kwargs) -> Variables:
    """Initialises a module on (a batch of) inputs, outside training."""
    accepted = inspect.signature(type(module).__call__).parameters
    if "train" in accepted:
        kwargs = {"train": False, **kwargs}
    if "mask" in accepted:
        kwargs = {"mask": batch_mask(batch), **kwargs}
    return dict(module.init(rng, *args, **kwargs))


def supervised(
    module: nn.Module,
    loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    inputs: str = "x",
    label: str = "label",
    name: str = "supervised",
) -> Objective:
    """A classifier or regressor.

    Args:
      module: ``(x) -> logits`` or ``(x) -> (logits, embedding)``.
      loss: ``(logits [B, C], label [B]) -> [B]``; softmax cross-entropy with integer labels by default.
      inputs, label: batch fields.
    """
    loss = loss or optax.softmax_cross_entropy_with_integer_labels

    def forward(variables, batch, context):
        out, mutated = apply_module(module, variables, batch[inputs], batch=batch, context=context)
        logits, embedding = out if isinstance(out, tuple) else (out, out)
        return {"logits": logits.astype(jnp.float32), "embedding": embedding}, mutated

    def value(outputs, batch, context):
        values = loss(outputs["logits"], batch[label])
        hit = (jnp.argmax(outputs["logits"], -1) == batch[label]) & batch_mask(batch) if loss_is_class else None
        metrics = {"accuracy": jnp.sum(hit) / jnp.maximum(jnp.sum(batch_mask(batch)), 1)} if loss_is_class else {}
        return Loss(example_elements(values, batch), metrics=metrics)

    loss_is_class = loss is optax.softmax_cross_entropy_with_integer_labels
    return Objective(
        init=lambda rng, batch: init_module(module, rng, batch, batch[inputs]),
        forward=forward,
        loss=value,
        provides=("embedding", "logits", "label", "index"),
        gathers=(label,),
        name=name,
    )


def weighted_sum(parts: Mapping[str, tuple[float, Objective]]) -> Objective:
    """A weighted sum of objectives over shared parameters.

    The first part keeps its elements (times its weight), so loss transformations act on it; the others join as terms.
    Parts whose ``forward`` is the same function share one forward pass.
    """
    names = list(parts)
    first_name, (first_weight, first) = names[0], parts[names[0]]

    def init(rng, batch):
        merged: dict[str, Any] = {}
        for _, part in parts.values():
            merged = _merge(merged, part.init(rng, batch))
        return merged

    def forward(variables, batch, context):
        outputs, mutated, done = {}, {}, {}
        for n in names:
            part = parts[n][1]
            if part.forward not in done:
                done[part.forward], changed = part.forward(variables, batch, context)
                mutated.update(changed)
            outputs[n] = done[part.forward]
        # the first part's outputs also stand at the top level, where loss transformations look
        return ({**outputs[first_name], **outputs} if isinstance(outputs[first_name], dict) else outputs), mutated

    def value(outputs, batch, context):
        terms, metrics, kept = {}, {}, None
        for n in names:
            weight, part = parts[n]
            loss = part.loss(outputs[n], batch, context)
            if n == first_name and loss.elements is not None:
                kept = loss.elements.replace(values=loss.elements.values * first_weight)
            elif loss.elements is not None:
                terms[n] = weight * REDUCERS[part.reduce](loss.elements)
            terms.update({f"{n}/{k}": weight * v for k, v in loss.terms.items()})
            metrics.update({f"{n}/{k}": v for k, v in loss.metrics.items()})
        return Loss(kept, terms, metrics)

    def after_step(variables, outputs, batch, context):
        changed: dict[str, Any] = {}
        for n in names:
            if parts[n][1].after_step is not None:
                changed.update(parts[n][1].after_step({**variables, **changed}, outputs[n], batch, context))
        return changed

    fields = [part.gathers for _, part in parts.values()]
    return Objective(
        init,
        forward,
        value,
        unit=first.unit,
        provides=first.provides,
        after_step=after_step if any(p.after_step for _, p in parts.values()) else None,
        gathers=None if None in fields else tuple(dict.fromkeys(f for fs in fields for f in fs)),
        reduce=first.reduce,
        name=" + ".join(part.name for _, part in parts.values()),
    )


def ema_teacher(
    student: Objective,
    loss: Callable[[Any, Any, Batch, Context], Loss],
    decay: float | Callable[[jax.Array], jax.Array] = 0.99,
) -> Objective:
    """Adds a teacher whose parameters are an exponential moving average of the student's.

    Args:
      student: its ``forward`` is run twice, with the student's and with the teacher's parameters.
      loss: ``(student outputs, teacher outputs, batch, context) -> Loss``; no gradient reaches the teacher.
      decay: constant or ``step -> decay``; the teacher moves after each parameter update.
    """

    def init(rng, batch):
        variables = dict(student.init(rng, batch))
        return {**variables, "teacher": jax.tree.map(jnp.copy, variables["params"])}

    def forward(variables, batch, context):
        own = {c: v for c, v in variables.items() if c != "teacher"}
        outputs, mutated = student.forward(own, batch, context)
        # the teacher's own statistics stay uncommitted
        taught, _ = student.forward({**own, "params": variables["teacher"]}, batch, context)
        nested = {"student": outputs, "teacher": jax.lax.stop_gradient(taught)}
        return ({**outputs, **nested} if isinstance(outputs, dict) else nested), mutated

    def after_step(variables, outputs, batch, context):
        changed = {}
        if student.after_step is not None:
            changed = dict(student.after_step(variables, outputs["student"], batch, context))
        d = decay(context.step) if callable(decay) else decay
        moved = jax.tree.map(lambda t, p: d * t + (1 - d) * p, variables["teacher"], variables["params"])
        return {**changed, "teacher": moved}

    return Objective(
        init,
        forward,
        lambda outputs, batch, context: loss(outputs["student"], outputs["teacher"], batch, context),
        unit=student.unit,
        provides=(*student.provides, "teacher"),
        select=student.select,
        after_step=after_step,
        reduce=student.reduce,
        name=f"ema_teacher({student.name})",
    )


def memory_bank(
    host: Objective,
    loss: Callable[[Any, Mapping[str, jax.Array], Batch, Context], Loss],
    size: int,
    output: str = "embedding",
    by_index: bool = False,
) -> Objective:
    """Adds a bank of past outputs, filled after the loss, bitwise the same on every device.

    Args:
      host: its ``forward`` yields a dict with ``output`` of shape [B, d].
      loss: ``(outputs, bank, batch, context) -> Loss``, ``bank`` with ``values`` [size, d], ``filled`` bool [size] and
        ``index`` i32 [size] (the example each row came from).
      size: rows; with ``by_index`` the number of examples.
      by_index: row ``i`` holds example ``i``; otherwise a ring holds the newest ``size`` rows in global order.
    """

    def init(rng, batch):
        variables = dict(host.init(rng, batch))
        context = Context(rng=rng, train=False)
        shape = jax.eval_shape(lambda: host.forward(variables, batch, context)[0][output].astype(jnp.float32)).shape
        bank = {
            "values": jnp.zeros((size, *shape[1:]), jnp.float32),
            "filled": jnp.zeros(size, bool),
            "index": jnp.full(size, -1, jnp.int32),
            "next": jnp.zeros((), jnp.int32),
        }
        return {**variables, "memory": bank}

    def forward(variables, batch, context):
        return host.forward({c: v for c, v in variables.items() if c != "memory"}, batch, context)

    def after_step(variables, outputs, batch, context):
        changed = dict(host.after_step(variables, outputs, batch, context)) if host.after_step else {}
        bank, mask = variables["memory"], batch_mask(batch)
        if by_index:
            slots = jnp.where(mask, batch["index"], size)
        else:  # real rows take consecutive slots; padded rows fall outside and are dropped
            slots = jnp.where(mask, (bank["next"] + jnp.cumsum(mask) - 1) % size, size)
        values = jax.lax.stop_gradient(outputs[output]).astype(jnp.float32)
        index = batch["index"] if "index" in batch else jnp.full(batch_rows(batch), -1)
        bank = {
            "values": bank["values"].at[slots].set(values, mode="drop"),
            "filled": bank["filled"].at[slots].set(True, mode="drop"),
            "index": bank["index"].at[slots].set(index.astype(jnp.int32), mode="drop"),
            "next": (bank["next"] + jnp.sum(mask, dtype=jnp.int32)) % size,
        }
        return {**changed, "memory": bank}

    return Objective(
        init,
        forward,
        lambda outputs, batch, context: loss(outputs, context.collections["memory"], batch, context),
        unit=host.unit,
        provides=(*host.provides, "bank"),
        select=host.select,
        after_step=after_step,
        reduce=host.reduce,
        name=f"memory_bank({host.name})",
    )


def frozen_tower(
    host: Objective, apply: Callable[[Any, Batch], Any], variables: Any, output: str = "frozen"
) -> Objective:
    """Adds the outputs of a frozen model, whose weights live in ``constants``: checkpointed, never trained.

    Args:
      host: its ``forward`` yields a dict; the tower's result joins it under ``output``.
      apply: ``(variables, batch) -> outputs [B, ...]``.
      variables: the frozen model's variables.
    """

    def init(rng, batch):
        own = dict(host.init(rng, batch))
        return {**own, "constants": {**own.get("constants", {}), output: variables}}

    def forward(state, batch, context):
        outputs, mutated = host.forward(state, batch, context)
        frozen = jax.lax.stop_gradient(apply(state["constants"][output], batch))
        return {**outputs, output: frozen}, mutated

    return Objective(
        init,
        forward,
        host.loss,
        unit=host.unit,
        provides=(*host.provides, output),
        select=host.select,
        after_step=host.after_step,
        gathers=host.gathers,
        reduce=host.reduce,
        name=f"frozen_tower({host.name})",
    )


def _merge(left: Mapping, right: Mapping) -> dict:
    merged = dict(left)
    for k, v in right.items():
        merged[k] = _merge(merged[k], v) if isinstance(merged.get(k), Mapping) and isinstance(v, Mapping) else v
    return merged
