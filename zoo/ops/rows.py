"""A large frozen matrix whose rows may lie on many devices, and what a loss needs of it: search, gather, reductions.

A step reads such a matrix (an index of document vectors) but never updates it.  The trainer hands it to ``loss`` as
:class:`Rows`; the same code then runs on one device, under ``jit`` on a mesh and under ``pmap``, where each device
holds some of the rows and only candidates, maxima and sums travel.  Queries are global: call these in ``loss``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from zoo.ops.search import Found, merge_over_axis, mips_topk


@struct.dataclass
class Part:
    """Consecutive rows of one device.

    Attributes:
      values: ``[chunk, d]``.
      start: i32, the global id of the first.
      valid: bool ``[chunk]``; rows that were visited before, or only fill a shard, are not.
    """

    values: Any
    start: Any
    valid: Any


@struct.dataclass
class Shard:
    """The rows of one device, as :meth:`Rows.map_shards` hands them to a function.

    Attributes:
      values: ``[rows, d]``.
      offset: i32, the global id of the first.
      count: rows of the whole matrix, static.
      axis: mapped axes over which the other shards lie, static; ``None`` if there are none.
    """

    values: Any
    offset: Any
    count: int = struct.field(pytree_node=False)
    axis: Any = struct.field(pytree_node=False, default=None)

    def scan(self, step: Callable[[Any, Part], tuple[Any, None]], carry: Any, chunk: int) -> Any:
        """Folds ``step(carry, part) -> (carry, None)`` over this device's rows, ``chunk`` at a time."""
        rows = self.values.shape[0]
        size = min(chunk, rows)

        def one(carry, number):
            # the last part ends with the last row; what it shares with the one before is not valid, never copied
            start = jnp.minimum(number * size, rows - size)
            ids = self.offset + start + jnp.arange(size)
            valid = (start + jnp.arange(size) >= number * size) & (ids < self.count)
            part = jax.lax.dynamic_slice_in_dim(self.values, start, size)
            return step(carry, Part(part, self.offset + start, valid))

        return jax.lax.scan(one, carry, jnp.arange(-(-rows // size), dtype=jnp.int32))[0]

    def sum(self, x: Array) -> Array:
        """The sum over all shards."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def maximum(self, x: Array) -> Array:
        """The maximum over all shards."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)


@struct.dataclass
class Rows:
    """A matrix by rows: whole, over the axes of a mesh (under ``jit``), or over ``pmap``'s axis.

    Attributes:
      values: ``[n, d]``; on a mesh a global array with its rows over ``axis``; under ``pmap`` this device's.  Rows past
        ``count`` only make shards equal.
      count: n, static.
      mesh, axis: where the rows lie, static; both ``None`` for one device.
    """

    values: Any
    count: int = struct.field(pytree_node=False)
    mesh: Any = struct.field(pytree_node=False, default=None)
    axis: Any = struct.field(pytree_node=False, default=None)

    def map_shards(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(shard, *args)`` on every device; its result must be the same on all (``shard.sum``, ``maximum``).

        Not differentiable through the shards: wrap it in a ``custom_vjp``, or stop the gradient.

        Args:
          function: closes over no arrays.
          *args: global arrays that every device gets whole.
        """
        if self.axis is None:
            return function(Shard(self.values, jnp.int32(0), self.count), *args)

        def own(values, *args):
            return function(
                Shard(values, values.shape[0] * jax.lax.axis_index(self.axis), self.count, self.axis), *args
            )

        if self.mesh is None:
            return own(self.values, *args)
        everywhere = PartitionSpec()
        specs = (PartitionSpec(self.axis), *[everywhere] * len(args))
        mapped = jax.shard_map(own, mesh=self.mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
        return mapped(self.values, *args)

    def mips_topk(self, queries: Float[Array, "q d"], k: int, chunk: int = 16384) -> Found:
        """``zoo.ops.search.mips_topk`` over all rows, exactly: the same ids and scores however they are spread.

        Raises:
          ValueError: k outside ``[1, n]``.
        """
        if not 1 <= k <= self.count:
            raise ValueError(f"k must be in [1, {self.count}], the number of documents; got {k}")

        def local(shard, queries):
            rows = shard.values.shape[0]
            mask = shard.offset + jnp.arange(rows) < self.count
            values, ids = mips_topk(queries, shard.values, min(k, rows), chunk, mask)
            return (values, ids) if shard.axis is None else merge_over_axis(values, ids, k, rows, shard.axis)

        return self.map_shards(local, queries)

    def take(self, ids: Int[Array, "*b"]) -> Array:
        """Rows ``[*b, d]`` by global id, in the matrix' type; an id outside ``[0, n)`` gives zeros."""

        def local(shard, ids):
            at = ids - shard.offset
            mine = (at >= 0) & (at < shard.values.shape[0]) & (ids >= 0) & (ids < self.count)
            rows = jnp.take(shard.values, jnp.where(mine, at, 0), axis=0)
            return shard.sum(jnp.where(mine[..., None], rows, jnp.zeros((), rows.dtype)))

        return self.map_shards(local, ids)


def as_rows(values: Rows | Float[Array, "n d"]) -> Rows:
    """A plain array as :class:`Rows` on one device; ``Rows`` as they are."""
    return values if isinstance(values, Rows) else Rows(values, values.shape[0])
