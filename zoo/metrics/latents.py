"""How alike two embeddings of the same items are: shared neighbours, ranks, cosines, and centred kernel alignment.

Row i of both embeddings is the same item; the widths must agree where vectors of one are compared with those of the
other (absolute embeddings of equal size, or relative representations on one list of anchors).  Searches go through
``zoo.ops.search.mips_topk`` in chunks: no N x N matrix exists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize
from zoo.ops.search import mips_topk


def cosine_neighbours(
    queries: Float[Array, "q d"], space: Float[Array, "n e"], k: int, chunk: int = 4096
) -> Int[Array, "q k"]:
    """Ids of the k rows of ``space`` of largest cosine with each query, best first (ties: the first).

    Raises:
      ValueError: different widths.
    """
    if queries.shape[1] != space.shape[1]:
        raise ValueError(f"latents of {queries.shape[1]} and {space.shape[1]} dimensions cannot be compared")
    k, chunk = min(k, space.shape[0]), min(chunk, space.shape[0])
    unit = l2_normalize(space)
    return in_blocks(lambda rows: mips_topk(l2_normalize(rows), unit, k, chunk)[1], queries, 1024)


def topk_jaccard(x: Float[Array, "n d"], y: Float[Array, "n e"], k: int = 10, chunk: int = 4096) -> Float[Array, ""]:
    """Mean ``|A & B| / |A | B|``: A the k nearest of ``x_i`` in the rows of y, B those of ``y_i`` itself (cosine)."""
    crossed, own = cosine_neighbours(x, y, k, chunk), cosine_neighbours(y, y, k, chunk)
    shared = jnp.sum(crossed[:, :, None] == own[:, None, :], (1, 2))
    return jnp.mean(shared / (2 * crossed.shape[1] - shared))


def aligned_mrr(x: Float[Array, "n d"], y: Float[Array, "n e"], k: int = 10, chunk: int = 4096) -> Float[Array, ""]:
    """Mean reciprocal rank of item i itself among the k nearest of ``x_i`` in the rows of y; 0 beyond k."""
    found = cosine_neighbours(x, y, k, chunk)
    hit = found == jnp.arange(x.shape[0])[:, None]
    return jnp.mean(jnp.sum(hit / jnp.arange(1, found.shape[1] + 1), 1))


def mean_cosine(x: Float[Array, "n d"], y: Float[Array, "n e"]) -> Float[Array, ""]:
    """Mean cosine between the two vectors of each item."""
    return jnp.mean(jnp.sum(l2_normalize(x.astype(jnp.float32)) * l2_normalize(y.astype(jnp.float32)), -1))


def latent_distance(x: Float[Array, "n d"], y: Float[Array, "n e"]) -> Float[Array, ""]:
    """Mean Euclidean distance between the two vectors of each item."""
    return jnp.mean(jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), -1)))


def kernel_cka(
    x: Float[Array, "n p"], y: Float[Array, "n q"], bandwidth: float | None = None, chunk: int = 512
) -> Float[Array, ""]:
    """Centred kernel alignment with Gaussian kernels ``exp(-|a - b|^2 / (2 s^2))``.

    ``HSIC(K, L) = sum_ij K_ij L_ij - 2/n sum_i K_i. L_i. + (sum K)(sum L) / n^2``: from row sums and one pass over
    blocks of rows, so that memory is ``chunk x n``.

    Args:
      x, y: embeddings of the same items, of any widths.
      bandwidth: s of both; by default each one's square root of the median squared distance of different items,
        estimated from all pairs of at most 1024 evenly spaced rows.
      chunk: rows at a time.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    n = x.shape[0]
    chunk = min(chunk, n)
    widths = [jnp.square(bandwidth) if bandwidth else _median_square(z) for z in (x, y)]
    starts = jnp.arange(-(-n // chunk)) * chunk

    def step(total, start):
        rows = start + jnp.arange(chunk)
        real = rows < n
        at = jnp.minimum(rows, n - 1)
        kernels = [jnp.exp(-_squares(z[at], z) / (2 * w)) * real[:, None] for z, w in zip((x, y), widths, strict=True)]
        pairs = [(0, 0), (0, 1), (1, 1)]
        products = jnp.stack([jnp.sum(kernels[i] * kernels[j]) for i, j in pairs])
        sums = [jnp.sum(kernel, 1) for kernel in kernels]
        crossed = jnp.stack([jnp.sum(sums[i] * sums[j]) for i, j in pairs])
        whole = jnp.stack([jnp.sum(s) for s in sums])
        return jax.tree.map(jnp.add, total, (products, crossed, whole)), None

    (products, crossed, whole), _ = jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3), jnp.zeros(2)), starts)
    outer = jnp.stack([whole[0] ** 2, whole[0] * whole[1], whole[1] ** 2])
    hsic = products - 2 / n * crossed + outer / n**2
    return hsic[1] / jnp.sqrt(jnp.maximum(hsic[0] * hsic[2], 1e-30))


def _squares(a: Array, b: Array) -> Array:
    products = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum(jnp.sum(a * a, 1)[:, None] - 2 * products + jnp.sum(b * b, 1), 0.0)


def _median_square(x: Array) -> Array:
    few = x[jnp.linspace(0, x.shape[0] - 1, min(x.shape[0], 1024)).astype(jnp.int32)]
    square = _squares(few, few)
    off = ~jnp.eye(few.shape[0], dtype=bool)
    # the lower median, as torch takes it
    ordered = jnp.sort(jnp.where(off, square, jnp.inf).ravel())
    return jnp.maximum(ordered[(few.shape[0] * (few.shape[0] - 1) - 1) // 2], 1e-12)
