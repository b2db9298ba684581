"""Where arrays live: ``jit`` over a mesh (``data``, ``fsdp``, ``tensor``), or ``pmap``; chosen, never coded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trainers.recipe import UserError
from trainers.state import TrainState
from trainers.trees import flatten, unflatten
from zoo.nn.partitioning import axis_names, partition_spec, unbox
from zoo.ops.rows import Rows

PMAP_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a run is spread.

    Attributes:
      mode: ``jit`` over a mesh or ``pmap`` over all devices.
      devices: how many to use; 0 means all there are.
      fsdp, tensor: sizes of those mesh axes; ``data`` takes the rest.
      fsdp_minimum: arrays with fewer entries are replicated, since sharding them costs more than it saves.
    """

    mode: Literal["jit", "pmap"] = "jit"
    devices: int = 0
    fsdp: int = 1
    tensor: int = 1
    fsdp_minimum: int = 1024


class Placement:
    """Puts states, batches and artefacts onto devices, and compiles steps for them.

    Args:
      parallel: the choice.
      rules: ``(regular expression over paths, PartitionSpec)`` for tensor sharding; the first match wins.

    Raises:
      UserError: more devices asked for than there are, or sizes that do not multiply.
    """

    def __init__(self, parallel: Parallel, rules: tuple[tuple[str, P], ...] = ()):
        have = len(jax.devices())
        count = parallel.devices or have
        if count > have:
            raise UserError(f"--devices {count} asked for, but there are {have} ({jax.devices()[0].platform})")
        if parallel.fsdp < 1 or parallel.tensor < 1 or count % (parallel.fsdp * parallel.tensor):
            raise UserError(f"--fsdp {parallel.fsdp} x --tensor {parallel.tensor} does not divide {count} devices")
        self.parallel, self.rules, self.count = parallel, rules, count
        self.names: dict[str, tuple[str | None, ...]] = {}
        self.devices = jax.devices()[:count]
        self.pmapped = parallel.mode == "pmap"
        if self.pmapped and parallel.fsdp * parallel.tensor > 1:
            raise UserError("--mode pmap replicates parameters; use --mode jit for --fsdp and --tensor")
        if self.pmapped and jax.process_count() > 1:
            raise UserError("--mode pmap runs in one process; use --mode jit on several hosts")
        shape = (count // (parallel.fsdp * parallel.tensor), parallel.fsdp, parallel.tensor)
        names = ("data", "fsdp", "tensor")
        self.mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=self.devices)
        self.replicated = NamedSharding(self.mesh, P())
        self.rows = NamedSharding(self.mesh, P(("data", "fsdp")))
        self.batch_rows = NamedSharding(self.mesh, P(None, None, ("data", "fsdp")))
        if self.pmapped:
            line = jax.make_mesh((count,), (PMAP_AXIS,), axis_types=(AxisType.Auto,), devices=self.devices)
            self.stacked = NamedSharding(line, P(PMAP_AXIS))
        self.shards = count // parallel.tensor
        self.axis_name = PMAP_AXIS if self.pmapped else None
        self.process = (jax.process_index(), jax.process_count())

    def check_batch(self, batch_size: int) -> None:
        """Raises UserError unless the global batch divides over the devices."""
        if batch_size % self.shards:
            raise UserError(f"--batch-size {batch_size} does not divide over {self.shards} devices; choose a multiple")

    def name_axes(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """Learns the logical axis names that modules put on their parameters; returns the variables without them."""
        self.names |= {path.partition("/")[2]: names for path, names in axis_names(variables).items()}
        return unbox(variables)

    def state_shardings(self, state: Any) -> Any:
        """A sharding for every leaf: the run's rules, then the axes that the module names (zoo.nn.partitioning), then
        the largest divisible axis over ``fsdp``, else replicated."""
        flat = flatten(state)
        return unflatten({path: self.leaf_sharding(path, np.shape(leaf)) for path, leaf in flat.items()}, state)

    def leaf_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of one leaf of the state."""
        fsdp = self.parallel.fsdp
        if path.split("/")[0] in ("params", "optimizer", "average"):
            for pattern, spec in self.rules:
                if self.parallel.tensor > 1 and re.search(pattern, path) and len(spec) <= len(shape):
                    return NamedSharding(self.mesh, spec)
            spec = self._named(path, shape)
            if any(spec):
                return NamedSharding(self.mesh, spec)
            axes = [a for a in range(len(shape)) if shape[a] % fsdp == 0]
            if fsdp > 1 and axes and np.prod(shape) >= self.parallel.fsdp_minimum:
                widest = max(axes, key=lambda a: shape[a])
                return NamedSharding(self.mesh, P(*[None] * widest, "fsdp"))
        return self.replicated

    def _named(self, path: str, shape: tuple[int, ...]) -> P:
        # the moments of a parameter lie under its own path, somewhere below the optimiser
        parts = path.split("/")
        names = next((n for i in range(1, len(parts)) if (n := self.names.get("/".join(parts[i:])))), None)
        if names is None or len(names) != len(shape) or np.prod(shape) < self.parallel.fsdp_minimum:
            return P()
        # an axis of size 1 in the mesh shards nothing: the parameter may yet be spread by its largest axis
        used = [a if a and self.mesh.shape[a] > 1 else None for a in partition_spec(names, shape, self.mesh)]
        return P(*used)

    def put_state(self, state: TrainState) -> TrainState:
        """The state on its devices (under ``pmap`` with a leading device axis)."""
        if self.pmapped:
            spread = lambda x: np.broadcast_to(np.asarray(x), (self.count, *np.shape(x)))  # noqa: E731
            return jax.tree.map(lambda x: jax.device_put(spread(jax.device_get(x)), self.stacked), state)
        return jax.tree.map(self._put_leaf, state, self.state_shardings(state))

    def _put_leaf(self, x, sharding):
        if jax.process_count() > 1:
            host = np.asarray(jax.device_get(x)) if getattr(x, "is_fully_addressable", True) else None
            if host is None:
                return jax.jit(lambda y: y, out_shardings=sharding)(x)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
        # a copy: the step donates its state, and the caller may still hold x
        return jax.device_put(jax.numpy.array(x, copy=True), sharding)

    def put_batches(self, batches: Any) -> Any:
        """Host batches ``[calls, repeats, rows, ...]`` of this process onto the devices, the rows spread."""
        if self.pmapped:

            def split(x):
                calls, repeats, rows = x.shape[:3]
                x = x.reshape(calls, repeats, self.count, rows // self.count, *x.shape[3:])
                return np.moveaxis(x, 2, 0)

            return jax.device_put(jax.tree.map(split, batches), self.stacked)
        return self._from_local(batches, self.batch_rows)

    def put_rows(self, batch: Any) -> Any:
        """One host batch ``[rows, ...]`` onto the devices (for evaluation; under ``pmap`` onto the first)."""
        if self.pmapped:
            return jax.device_put(batch, self.devices[0])
        return self._from_local(batch, self.rows)

    def _from_local(self, tree, sharding):
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    def guard(self):
        """Makes an accidental transfer inside the loop an error (``pmap`` itself copies scalars to devices)."""
        return jax.transfer_guard_device_to_host("disallow") if self.pmapped else jax.transfer_guard("disallow")

    def put_replicated(self, tree: Any) -> Any:
        """Artefacts or scalars onto every device."""
        if self.pmapped:
            return jax.tree.map(lambda x: jax.device_put(x, self.devices[0]), tree)
        return jax.tree.map(lambda x: self._put_leaf(x, self.replicated), tree)

    def put_artefacts(self, artefacts: Mapping[str, Any], sharded: tuple[str, ...] = (), step: bool = True) -> Any:
        """Artefacts onto the devices: those named in ``sharded`` as ``Rows`` spread over all, the others everywhere.

        Args:
          artefacts: by name.
          sharded: names of arrays ``[n, d]``; rows are padded to a multiple of the devices.
          step: for a compiled step; an evaluation under ``pmap`` runs on the first device and gets whole rows.

        Raises:
          ValueError: a name that is no artefact, or an artefact that is no array.
        """
        for name in sharded:
            if np.ndim(artefacts.get(name)) < 1:
                kind = "none" if name not in artefacts else "it is not an array"
                raise ValueError(f"artefact {name!r} is to be sharded by rows, but {kind}; there are {list(artefacts)}")
        placed = self.put_replicated({k: v for k, v in artefacts.items() if k not in sharded})
        return {**placed, **{k: self._put_rows(artefacts[k], step) for k in sharded}}

    def _put_rows(self, x, step: bool) -> Rows:
        count = x.shape[0]
        if self.count == 1 or (self.pmapped and not step):
            return Rows(self.put_replicated(x), count)
        short = -count % self.count
        x = np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)]) if short else x
        if self.pmapped:
            x = np.asarray(x).reshape(self.count, -1, *x.shape[1:])
            return Rows(jax.device_put(x, self.stacked), count, None, PMAP_AXIS)
        axes = ("data", "fsdp", "tensor")
        return Rows(self._put_leaf(x, NamedSharding(self.mesh, P(axes))), count, self.mesh, axes)

    def put_count(self, count: int):
        """How many of a dispatch's calls to make, as the compiled step takes it."""
        return np.int32(count) if self.pmapped else jax.device_put(np.int32(count), self.replicated)

    def local(self, state: Any) -> Any:
        """The state without ``pmap``'s device axis, still on a device."""
        if not self.pmapped:
            return state
        return jax.tree.map(lambda x: jax.device_put(x.addressable_shards[0].data.reshape(x.shape[1:])), state)

    def compile(self, step: Callable, state: Any, batches: Any, artefacts: Any, count: Any) -> Callable:
        """Compiles ``step`` once, ahead of time: other shapes are an error afterwards, never a second compilation."""
        if self.pmapped:
            spread = {k: 0 if isinstance(v, Rows) and v.axis else None for k, v in artefacts.items()}
            mapped = jax.pmap(
                step, axis_name=PMAP_AXIS, in_axes=(0, 0, spread, None), donate_argnums=(0,), devices=self.devices
            )
            return mapped.lower(state, batches, artefacts, count).compile()
        shardings = jax.tree.map(lambda x: x.sharding, state)
        jitted = jax.jit(step, donate_argnums=(0,), out_shardings=(shardings, self.replicated, self.replicated))
        return jitted.lower(state, batches, artefacts, count).compile()


def describe(parallel: Parallel) -> Mapping[str, Any]:
    """What is recorded with a run: topology decides whether a resumption is bitwise."""
    device = jax.devices()[0]
    return {
        **dataclasses.asdict(parallel),
        "devices": parallel.devices or len(jax.devices()),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "processes": jax.process_count(),
    }
