"""The training state: one pytree that holds everything the next step depends on."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from trainers.phases import Alternate, Update


@struct.dataclass
class TrainState:
    """Everything the next step depends on.

    Attributes:
      step: i32, steps taken in this phase.
      seed: u32; every key is derived from (seed, stream name, step), none is carried.
      params, collections: the Flax variables; ``collections`` are all but ``params``.
      optimizer, loss: optimiser and loss-transformation state by update name.
      average: averaged parameters, or ``None``.
      streams: i32 by update name, batches consumed; the position of the next batch.
      monitor: the last value of the watched metric, how often it was evaluated, the best value, evaluations since.
      prequential: accumulators of the prequential evaluation, or ``None``.
      fault: i32 ``[2]``: first step with a non-finite metric (-1: none) and which metric.
    """

    step: Any
    seed: Any
    params: Any
    collections: Any
    optimizer: Any
    loss: Any
    average: Any
    streams: Any
    monitor: Any
    prequential: Any
    fault: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The Flax variables."""
        return {"params": self.params, **self.collections}

    def chosen(self, weights: str) -> dict[str, Any]:
        """The variables with ``"params"`` as trained or, where kept, the ``"average"`` in their place."""
        params = self.average if weights == "average" and self.average is not None else self.params
        return {"params": params, **self.collections}


def split_params(params: Mapping, trainable: tuple[str, ...] | None) -> tuple[dict, dict]:
    """Splits parameters into those a phase trains and those it leaves, by regular expressions over paths.

    Raises:
      ValueError: a pattern matches no parameter.
    """
    if trainable is None:
        return dict(params), {}
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in trainable:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise ValueError(f"trainable pattern {pattern!r} matches no parameter; there are {', '.join(sorted(flat))}")
    chosen = {p for p in flat if any(re.fullmatch(pattern, p) for pattern in trainable)}
    return (
        traverse_util.unflatten_dict({p: v for p, v in flat.items() if p in chosen}, sep="/"),
        traverse_util.unflatten_dict({p: v for p, v in flat.items() if p not in chosen}, sep="/"),
    )


def join_params(left: Mapping, right: Mapping) -> dict:
    """Undoes :func:`split_params`."""
    if not right:
        return dict(left)
    flat = {**traverse_util.flatten_dict(left, sep="/"), **traverse_util.flatten_dict(right, sep="/")}
    return traverse_util.unflatten_dict(flat, sep="/")


def num_examples(update: Update) -> int:
    """Rows of per-example state: the examples of the update's (first) stream."""
    stream = update.stream
    return (next(iter(stream.values())) if isinstance(stream, Mapping) else stream).num_examples


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def init_variables(objective, rng, batch) -> dict[str, Any]:
    """An objective's variables with dicts throughout."""
    return jax.tree.map(jnp.asarray, {c: _plain(v) for c, v in objective.init(rng, batch).items()})


def begin_phase(variables: Mapping, phase: Alternate, seed, before: TrainState | None = None) -> TrainState:
    """The state at a training phase's first step; pure, so it can be traced for shapes.

    Args:
      variables: where the phase starts from.
      phase: the phase.
      seed: the run's seed.
      before: the state that the phase before ended with; its optimiser is kept if the phase says so and it fits.
    """
    params = variables["params"]
    optimizer, loss = {}, {}
    for name, update in phase.updates.items():
        optimizer[name] = optax.with_extra_args_support(update.optimizer).init(
            split_params(params, update.trainable)[0]
        )
        if phase.optimizer_state == "keep" and before is not None and name in before.optimizer:
            kept = before.optimizer[name]
            if jax.tree.map(jnp.shape, kept) != jax.tree.map(jnp.shape, optimizer[name]):
                raise ValueError(f"phase {phase.name!r} keeps the optimiser of {name!r}, but its state no longer fits")
            optimizer[name] = kept
        loss[name] = update.loss_transform.init(num_examples(update)) if update.loss_transform else ()
    worst = -jnp.inf if phase.stop is None or phase.stop.higher_is_better else jnp.inf
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        # one compiled step serves a series, so what tells its phases' keys apart is data
        seed=jnp.asarray(seed, jnp.uint32) ^ jnp.uint32(zlib.crc32(phase.name.encode()) if phase.series else 0),
        params=params,
        collections={c: v for c, v in variables.items() if c != "params"},
        optimizer=optimizer,
        loss=loss,
        average=jax.tree.map(jnp.copy, params) if phase.average else None,
        streams={name: jnp.zeros((), jnp.int32) for name in phase.updates},
        monitor={
            "value": jnp.zeros((), jnp.float32),
            "evaluations": jnp.zeros((), jnp.int32),
            "best": jnp.asarray(worst, jnp.float32),
            "since": jnp.zeros((), jnp.int32),
        },
        prequential=phase.prequential.init() if phase.prequential else None,
        fault=jnp.full((2,), -1, jnp.int32),
    )
