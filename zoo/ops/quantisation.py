"""Product quantisation: vectors as short codes, scored against exact queries by look-up tables (Jegou et al. 2011)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from zoo.ops.kmeans import AnyKey, assign, kmeans

Codes = Int[Array, "n M"] | UInt[Array, "n M"]


def pq_train(
    key: AnyKey,
    x: Float[Array, "n D"],
    group: int = 8,
    centroids: int = 256,
    iterations: int = 10,
    mask: Bool[Array, "n"] | None = None,
) -> Float[Array, "M C g"]:
    """Codebooks: k-means of each group of ``group`` dimensions, on a sample of vectors (MUVERA: at most 100 000).

    Raises:
      ValueError: D is not a multiple of ``group``, or no centroids.
    """
    if group < 1 or x.shape[1] % group:
        raise ValueError(f"group must divide the vectors' dimension {x.shape[1]}, got {group}")
    groups = jnp.moveaxis(x.astype(jnp.float32).reshape(x.shape[0], -1, group), 1, 0)
    keys = jax.random.split(key, groups.shape[0])
    return jax.lax.map(lambda g: kmeans(g[0], g[1], centroids, iterations, mask).centroids, (keys, groups))


def pq_encode(codebooks: Float[Array, "M C g"], x: Float[Array, "n D"]) -> Codes:
    """The nearest centroid of each group: uint8 for up to 256 centroids, else int32."""
    groups = jnp.moveaxis(x.astype(jnp.float32).reshape(x.shape[0], -1, codebooks.shape[2]), 1, 0)
    codes = jax.lax.map(lambda g: assign(g[1], g[0]), (codebooks, groups))
    return codes.T.astype(jnp.uint8 if codebooks.shape[1] <= 256 else jnp.int32)


def pq_decode(codebooks: Float[Array, "M C g"], codes: Codes) -> Float[Array, "n D"]:
    """The vectors that the codes stand for."""
    return codebooks[jnp.arange(codebooks.shape[0]), codes.astype(jnp.int32)].reshape(codes.shape[0], -1)


def pq_adc_scores(codebooks: Float[Array, "M C g"], queries: Float[Array, "q D"], codes: Codes) -> Float[Array, "q n"]:
    """Inner products of exact queries with quantised vectors, from one look-up table for each query and group."""
    parts = queries.astype(jnp.float32).reshape(queries.shape[0], *codebooks.shape[::2])
    tables = jnp.einsum("qmg,mcg->mqc", parts, codebooks, precision="highest")

    def add(total, step):
        table, code = step
        return total + jnp.take(table, code, axis=1), None

    nothing = jnp.zeros((queries.shape[0], codes.shape[0]))
    return jax.lax.scan(add, nothing, (tables, codes.T.astype(jnp.int32)))[0]
