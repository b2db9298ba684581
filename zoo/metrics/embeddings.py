"""What embeddings look like without a task: alignment, uniformity, linear CKA, and clusterings compared (NMI)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize


def alignment(z1: Float[Array, "n d"], z2: Float[Array, "n d"], power: float = 2.0) -> Float[Array, ""]:
    """``mean ||z1 - z2||^power`` of positive pairs on the unit sphere; lower is better (Wang and Isola, ICML 2020)."""
    square = jnp.sum(jnp.square(l2_normalize(z1) - l2_normalize(z2)), -1)
    return jnp.mean(square ** (power / 2))


def uniformity(z: Float[Array, "n d"], t: float = 2.0, block: int = 512) -> Float[Array, ""]:
    """``log mean exp(-t ||z_i - z_j||^2)`` over pairs i != j of unit vectors; lower is better (same paper).

    Args:
      z: at least two rows.
      t: sharpness.
      block: rows at a time, so that memory is ``block x n``.

    Raises:
      ValueError: fewer than two rows.
    """
    n = z.shape[0]
    if n < 2:
        raise ValueError(f"uniformity compares pairs: give at least 2 rows, got {n}")
    z = l2_normalize(z.astype(jnp.float32))

    def rows(part):
        x, ids = part
        logits = -t * (2.0 - 2.0 * jnp.matmul(x, z.T, precision="highest"))
        return jax.nn.logsumexp(logits, axis=1, where=ids[:, None] != jnp.arange(n)[None, :])

    return jax.nn.logsumexp(in_blocks(rows, (z, jnp.arange(n)), block)) - jnp.log(n * (n - 1.0))


def linear_cka(x: Float[Array, "n d"], y: Float[Array, "n e"]) -> Float[Array, ""]:
    """Linear centred kernel alignment of two embeddings of the same n items, in [0, 1].

    ``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of centred columns: O(n d e), no n x n (Kornblith et al., ICML 2019,
    equation 5).  It is 1 for rotations and isotropic scalings of one another.  A constant embedding has none: NaN.
    """
    x, y = (v.astype(jnp.float32) - jnp.mean(v.astype(jnp.float32), 0) for v in (x, y))
    product = lambda a, b: jnp.sqrt(jnp.sum(jnp.square(jnp.matmul(a.T, b, precision="highest"))))  # noqa: E731
    # scaled first, so that no square overflows
    x, y = (v / jnp.max(jnp.abs(v)) for v in (x, y))
    return product(y, x) ** 2 / (product(x, x) * product(y, y))


def nmi(clusters: Int[Array, "n"], labels: Int[Array, "n"], num_clusters: int, num_labels: int) -> Float[Array, ""]:
    """Normalised mutual information ``2 I / (H_1 + H_2)`` of two labellings, in [0, 1]; 1 if both are one group.

    Args:
      clusters, labels: of the same items.
      num_clusters, num_labels: their sizes.
    """
    table = jnp.zeros((num_clusters, num_labels), jnp.float32).at[clusters, labels].add(1.0)
    joint = table / jnp.sum(table)
    p, q = jnp.sum(joint, 1), jnp.sum(joint, 0)
    entropy = lambda v: -jnp.sum(jnp.where(v > 0, v * jnp.log(jnp.where(v > 0, v, 1.0)), 0.0))  # noqa: E731
    whole = entropy(p) + entropy(q)
    mutual = whole - entropy(joint.ravel())
    return jnp.where(whole > 0, jnp.maximum(2.0 * mutual, 0.0) / jnp.where(whole > 0, whole, 1.0), 1.0)
