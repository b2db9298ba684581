"""Orthogonal linear layers: trained without leaving the orthogonal group.

A free square matrix A, of which only the part below the diagonal counts, is mapped to a rotation ``R(A)`` with
``R(0) = I``; the layer's matrix is ``Q = Q0 R(A)``, where Q0 is a random orthogonal matrix that is never trained.  So
training starts at Q0, weight decay pulls back to it, and Q stays in the component of the orthogonal group that Q0 lies
in.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

METHODS = ("expm", "cayley", "householder", "qr")
"""Maps from a free matrix to a rotation."""
HIGHEST = jax.lax.Precision.HIGHEST


def rotation(generator: Float[Array, "d d"], method: str = "expm") -> Float[Array, "d d"]:
    """A rotation made of the entries of ``generator`` below its diagonal; the identity if they are 0.

    With ``L`` the part strictly below the diagonal and ``S = L - L^T``:

    - ``expm``: the matrix exponential of S;
    - ``cayley``: ``(I - S)^-1 (I + S)``, by a solve; reaches every rotation without eigenvalue -1;
    - ``householder``: ``(-1)^d H_1 ... H_d`` with the reflections ``H_i = I - 2 v_i v_i^T / |v_i|^2`` along the columns
      of ``I + L``, all at once in their compact form;
    - ``qr``: the orthogonal factor of ``I + S``, whose triangular factor has a positive diagonal.

    Computed in float32.  One Newton-Schulz step at the end removes what rounding has added, so that ``Q^T Q = I`` holds
    to a few units in the last place whatever the generator's size.

    Raises:
      ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    eye = jnp.eye(generator.shape[0], dtype=jnp.float32)
    below = jnp.tril(generator.astype(jnp.float32), -1)
    skew = below - below.T
    if method == "expm":
        q = jax.scipy.linalg.expm(skew)
    elif method == "cayley":
        q = jnp.linalg.solve(eye - skew, eye + skew)
    elif method == "householder":
        q = _reflections(eye + below)
    else:
        q, r = jnp.linalg.qr(eye + skew)
        q = q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)[None, :]
    gram = jnp.matmul(q.T, q, precision=HIGHEST)
    return jnp.matmul(q, 1.5 * eye - 0.5 * gram, precision=HIGHEST)


def _reflections(v: Float[Array, "d d"]) -> Float[Array, "d d"]:
    # H_1 ... H_d = I - V T^-1 V^T with T the upper triangle of V^T V, its diagonal halved
    size = v.shape[0]
    gram = jnp.matmul(v.T, v, precision=HIGHEST)
    triangle = jnp.triu(gram, 1) + 0.5 * jnp.diag(jnp.diagonal(gram))
    solved = jax.scipy.linalg.solve_triangular(triangle, v.T)
    product = jnp.eye(size, dtype=jnp.float32) - jnp.matmul(v, solved, precision=HIGHEST)
    return product if size % 2 == 0 else -product


class OrthogonalDense(nn.Module):
    """``x Q^T + b`` with an orthogonal Q: it keeps norms and angles (up to the translation b).

    The parameters are ``generator`` ``[d, d]``, zero at first, and ``bias``; ``constants/base`` is Q0.

    Attributes:
      features: d, of input and result.
      use_bias: whether there is a b; without it the map is a rotation or reflection and nothing else.
      method: see :func:`rotation`.
    """

    features: int
    use_bias: bool = True
    method: str = "expm"

    def setup(self) -> None:
        """Declares the variables."""
        shape = (self.features, self.features)
        draw = nn.initializers.orthogonal()
        self.base = self.variable("constants", "base", lambda: draw(self.make_rng("params"), shape, jnp.float32))
        self.generator = self.param("generator", nn.initializers.zeros, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None

    def matrix(self) -> Float[Array, "d d"]:
        """Q, float32."""
        # weights that come from a file are NumPy arrays
        turn = rotation(jnp.asarray(self.generator), self.method)
        return jnp.matmul(jnp.asarray(self.base.value), turn, precision=HIGHEST)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """``[..., d] -> [..., d]`` in float32.

        Raises:
          ValueError: an input of another size.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"an orthogonal layer of {self.features} features cannot take {x.shape[-1]}-d inputs")
        turned = jnp.matmul(x.astype(jnp.float32), self.matrix().T, precision=HIGHEST)
        return turned if self.bias is None else turned + self.bias.astype(jnp.float32)


def fold_orthogonal(
    weights: Float[Array, "c d"], matrix: Float[Array, "d d"], bias: Any = None
) -> tuple[Float[Array, "c d"], Float[Array, "c"]]:
    """What a linear layer W on top of ``x Q^T + b`` is on x itself: ``W' = W Q`` and ``b' = W b``.

    Args:
      weights: W, one row per output.
      matrix: Q.
      bias: b ``[d]``; ``None`` counts as 0.
    """
    folded = jnp.matmul(weights, matrix, precision=HIGHEST)
    if bias is None:
        return folded, jnp.zeros(weights.shape[0], folded.dtype)
    return folded, jnp.matmul(weights, bias, precision=HIGHEST)
