"""How the items of a gallery answer a bank of other samples, streamed: no ``[M, N_g]`` array is ever held.

All of it is a few numbers per gallery item, computed from embeddings a chunk of the bank and a block of the gallery
at a time.  Products are accumulated in float32 whatever the inputs' type.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from zoo.ops.blocks import in_blocks
from zoo.ops.search import mips_topk
from zoo.ops.sinkhorn import sinkhorn_columns, streaming_logsumexp

Scalar = float | int | Float[Array, ""]


def products(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Inner products of rows, f32 ``[n, m]``."""
    kind = jnp.promote_types(a.dtype, b.dtype)
    return jnp.matmul(a.astype(kind), b.astype(kind).T, precision="highest", preferred_element_type=jnp.float32)


def activated(ids: Int[Array, "m k"], n: int) -> Bool[Array, "n"]:
    """Which of n items occur among the ids."""
    return jnp.zeros(n, bool).at[ids.ravel()].set(True)


def bank_log_normalizer(
    bank: Float[Array, "m d"], gallery: Float[Array, "n d"], beta: Scalar, chunk: int = 1024, block: int = 16384
) -> Float[Array, "n"]:
    """``lse_b(beta <bank_b, gallery_j>)`` for each gallery item, streamed: memory is O(chunk x block).

    Args:
      bank, gallery: embeddings of one dimension, unit length for cosines.
      beta: inverse temperature, above 0.
      chunk, block: bank and gallery rows multiplied at a time.

    Raises:
      ValueError: an empty bank, or a chunk or block smaller than 1.
    """
    largest, total = _streamed(bank, gallery, beta, chunk, block, None)
    return largest + jnp.log(total)


def _streamed(bank: Array, gallery: Array, beta: Scalar, chunk: int, block: int, mask: Any) -> tuple[Array, Array]:
    size = min(chunk, bank.shape[0])

    def part(items):
        rows = lambda start: beta * products(jax.lax.dynamic_slice_in_dim(bank, start, size), items)  # noqa: E731
        return streaming_logsumexp(rows, bank.shape[0], items.shape[0], chunk, mask)

    return in_blocks(part, gallery, block)


def sharded_bank_log_normalizer(
    bank: Float[Array, "m d"],
    gallery: Float[Array, "n d"],
    beta: Scalar,
    mesh: Mesh,
    axis: str = "data",
    chunk: int = 1024,
    block: int = 16384,
) -> Float[Array, "n"]:
    """:func:`bank_log_normalizer` with the bank sharded over a mesh axis; the gallery is on every device.

    Each device streams over its own rows; only its largest response and its sum per gallery item travel.

    Raises:
      ValueError: as :func:`bank_log_normalizer`, or a mesh without that axis.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis {axis!r} is not one of the mesh's: {', '.join(mesh.shape)}")
    rows, short = bank.shape[0], -bank.shape[0] % mesh.shape[axis]
    mask = jnp.arange(rows + short) < rows
    bank = jnp.pad(bank, ((0, short), (0, 0))) if short else bank

    def local(bank, mask, gallery):
        largest, total = _streamed(bank, gallery, beta, chunk, block, mask)
        top = jax.lax.pmax(jax.lax.stop_gradient(largest), axis)
        return top + jnp.log(jax.lax.psum(total * jnp.exp(largest - top), axis))

    along, everywhere = PartitionSpec(axis), PartitionSpec()
    # psum and pmax make the result equal on all devices, which the checker cannot see through the scans
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(along, along, everywhere), out_specs=everywhere, check_vma=False)
    return mapped(bank, mask, gallery)


def bank_activation(
    bank: Float[Array, "m d"], gallery: Float[Array, "n d"], k: int = 1, chunk: int = 16384, block: int = 1024
) -> Bool[Array, "n"]:
    """The activation set A: gallery items that at least one bank sample has among its k most similar.

    Raises:
      ValueError: k outside ``[1, n]``.
    """
    search = lambda rows: mips_topk(rows, gallery, k, chunk)[1]  # noqa: E731
    return activated(in_blocks(search, bank, block), gallery.shape[0])


def bank_neighbourhood(
    bank: Float[Array, "m d"], gallery: Float[Array, "n d"], k: int = 10, chunk: int = 16384, block: int = 1024
) -> Float[Array, "n"]:
    """CSLS' ``r_j``: mean similarity of each gallery item to its k nearest bank samples.

    Raises:
      ValueError: k outside ``[1, m]``.
    """
    return in_blocks(lambda items: jnp.mean(mips_topk(items, bank, k, chunk)[0], -1), gallery, block)


def bank_sinkhorn(
    bank: Float[Array, "m d"], gallery: Float[Array, "n d"], beta: Scalar, steps: int = 10, chunk: int = 1024
) -> Float[Array, "n"]:
    """The gallery's log normaliser after ``steps`` of Sinkhorn between bank and gallery (DBSN), streamed.

    Each step normalises every bank sample's responses over the gallery and then every item's over the bank; one step
    over the bank is one pass.  Memory is O(chunk x n).
    """
    size = min(chunk, bank.shape[0])

    def rows(start):
        return beta * products(jax.lax.dynamic_slice_in_dim(bank, start, size), gallery)

    return sinkhorn_columns(rows, bank.shape[0], gallery.shape[0], steps, chunk)
