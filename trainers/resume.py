"""Saving a run's state and finding it again: which phase, which step, and a tree of the right structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainers.parallel import Placement
from trainers.phases import Alternate
from trainers.state import TrainState, begin_phase
from trainers.trees import flatten, nest, unflatten


def bare_state(variables: Mapping[str, Any], seed) -> TrainState:
    """The state of a run whose first phase trains nothing: variables, no optimiser."""
    return begin_phase(variables, Alternate("start", 1, {}), seed)


def structure(phases: Sequence[Any], manifest: Mapping[str, Any]) -> TrainState:
    """The state's structure at a checkpoint, as shapes: variables by the manifest's paths, the rest from its phase."""
    meta = manifest["meta"]
    leaves = manifest["leaves"].items()
    shapes = {p: jax.ShapeDtypeStruct(tuple(e["shape"]), jnp.dtype(e["dtype"])) for p, e in leaves}
    variables = {"params": nest(shapes, "params"), **nest(shapes, "collections")}
    # a checkpoint at a phase's first step holds the state with which the phases before ended
    reached = phases[: meta["phase"] + 1] if meta["step"] else phases[: meta["phase"]]
    trained = [p for p in reached if isinstance(p, Alternate)]
    if not trained:
        return jax.eval_shape(lambda v: bare_state(v, 0), variables)
    return jax.eval_shape(lambda v: begin_phase(v, trained[-1], 0), variables)


def abstract(place: Placement, like: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    """The flat tree to restore onto, each leaf with the sharding it has on this run's devices."""
    single = jax.sharding.SingleDeviceSharding(place.devices[0])
    where: Callable = (lambda p, s: single) if place.pmapped else place.leaf_sharding
    return {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(p, x.shape)) for p, x in flatten(like).items()}


def restore(store: Any, phases: Sequence[Any], place: Placement, note: Callable[[str], None]):
    """The newest whole checkpoint: ``(number, state, meta)``, or ``None``; a damaged one is named and passed over."""

    def wanted(manifest):
        place.names = {path: tuple(names) for path, names in manifest["meta"].get("axes", {}).items()}
        return abstract(place, structure(phases, manifest))

    found = store.restore_latest(wanted, note)
    if found is None:
        return None
    number, flat, manifest = found
    return number, unflatten(flat, structure(phases, manifest)), manifest["meta"]
