"""A temperature for every pair, and encoders under several heads with such temperatures (Wang et al., ECCV 2024; amcl).

Shapes: B rows, C heads of size d', h numbers per row and head from which a pair's temperature is made.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from zoo.base import Shared
from zoo.nn.heads import MultiHeadProjector
from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize

Number = float | int
BLOCK = 1 << 22
"""Entries of a matrix of pairs that are held at once, per head, before anchors are taken in blocks."""


def bounded_temperature(score: Float[Array, "*n"], lower: Number = 1e-2, upper: Number = 2.0) -> Float[Array, "*n"]:
    """``tau = l + (u - l) sigmoid(score)``, in float32 (brief, "Temperature"); the released code has l = 1e-5.

    Args:
      score: what the temperature network says of a pair; at 0 tau is midway.
      lower, upper: l and u.  ``-beta Omega`` of a negative falls like ``-beta / tau``, so l should not be tiny.

    Raises:
      ValueError: not ``0 < l < u``.
    """
    check_limits(lower, upper)
    return lower + (upper - lower) * jax.nn.sigmoid(score.astype(jnp.float32))


class PairTemperature(nn.Module):
    """The temperature network phi: what it keeps of each head's row, so that a pair's score is cheap.

    ``"dot"`` (the paper) is one multi-layer perceptron for all heads; a pair's score is the inner product of its two
    results, plus a learned offset that starts at 0: of two like rows a product is a square, so that without the offset
    the temperature of a good positive pair could never fall below midway.

    ``"concat"`` (the released code) is one perceptron per head on ``[z_i; z_j]`` with a single output; its first layer
    is linear in both, ``W [z_i; z_j] + b = (A z_i + b) + D z_j``, and is applied to rows, not to pairs.

    Attributes:
      kind: see above.
      hidden: size of the hidden layer.
      features: size of the results whose inner product is taken; for ``"dot"``.
      offset: whether ``"dot"`` has its offset.
      normalise: read unit vectors (the released code reads the head's output as it is).
      lower, upper: limits of the temperature, for ``__call__``.
    """

    kind: Literal["dot", "concat"] = "dot"
    hidden: int = 128
    features: int = 32
    offset: bool = True
    normalise: bool = True
    lower: float = 1e-2
    upper: float = 2.0

    def __call__(self, first: Float[Array, "b c d"], second: Float[Array, "m c d"]) -> Float[Array, "c b m"]:
        """Temperatures of all pairs: anchors ``first`` in rows, ``second`` in columns, heads first."""
        codes, last = self.embed(jnp.concatenate([first, second]))
        scores = pair_scores(codes[: first.shape[0]], codes[first.shape[0] :], last)
        return bounded_temperature(scores, self.lower, self.upper)

    @nn.compact
    def embed(self, z: Float[Array, "b c d"]) -> tuple[Float[Array, "b c h"], Float[Array, "c k"] | None]:
        """``(codes [B, C, h], last)``: per row what :func:`pair_scores` reads, and what it adds or applies to pairs.

        At the start every score is 0 or nearly so.  The last layer of ``"concat"`` starts at zero; that of ``"dot"``
        starts small, because a product of two zeros has no gradient and would stay zero.

        Raises:
          ValueError: an unknown kind.
        """
        if self.kind not in ("dot", "concat"):
            raise ValueError(f"temperature kind must be 'dot' or 'concat', got {self.kind!r}")
        z = z.astype(jnp.float32)
        z = l2_normalize(z) if self.normalise else z
        heads, dim = z.shape[1:]
        if self.kind == "dot":
            h = nn.relu(nn.Dense(self.hidden, name="hidden")(z))
            small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
            codes = nn.Dense(self.features, kernel_init=small, name="out")(h)
            if not self.offset:
                return codes, None
            offset = self.param("offset", nn.initializers.zeros, (1,), jnp.float32).astype(jnp.float32)
            return codes, jnp.broadcast_to(offset, (heads, 1))
        init = nn.initializers.lecun_normal(batch_axis=0)
        kernel = self.param("hidden_kernel", init, (heads, 2 * dim, self.hidden), jnp.float32).astype(jnp.float32)
        bias = self.param("hidden_bias", nn.initializers.zeros, (heads, self.hidden), jnp.float32)
        last = self.param("out", nn.initializers.zeros, (heads, self.hidden + 1), jnp.float32)
        left = _einsum("bcd,cdh->bch", z, kernel[:, :dim]) + bias.astype(jnp.float32)
        right = _einsum("bcd,cdh->bch", z, kernel[:, dim:])
        return jnp.concatenate([left, right], -1), last.astype(jnp.float32)


def pair_scores(
    first: Float[Array, "b c h"], second: Float[Array, "m c h"], last: Float[Array, "c k"] | None = None
) -> Float[Array, "c b m"]:
    """Scores of all pairs from what :class:`PairTemperature` keeps of rows.

    With one number per head in ``last``, or none, their inner products plus that: O(C B M h) in one matrix product per
    head.  With more ``w . relu(a_i + b_j) + w_0``: no ``C x B x M x 2d'`` tensor is built, and the hidden ``B x M x
    h/2`` one only for a block of anchors.

    Args:
      first, second: of anchors and candidates; for the second form the halves ``[a | b]`` of each row.
      last: w and, in its last column, the offset w_0.
    """
    if last is None or last.shape[1] == 1:
        return _einsum("ich,jch->cij", first, second) + (0.0 if last is None else last[:, :, None])
    right = second[..., second.shape[-1] // 2 :]

    @jax.checkpoint
    def some(left):
        hidden = nn.relu(left[:, None] + right[None])
        return _einsum("ijch,ch->ijc", hidden, last[:, :-1]) + last[:, -1]

    block = max(1, BLOCK // max(1, right.size))
    return jnp.moveaxis(in_blocks(some, first[..., : first.shape[-1] // 2], block), -1, 0)


def aligned_scores(
    first: Float[Array, "b c h"], second: Float[Array, "b c h"], last: Float[Array, "c k"] | None = None
) -> Float[Array, "b c"]:
    """Scores of the pairs (row i, row i) only; see :func:`pair_scores`."""
    if last is None or last.shape[1] == 1:
        return jnp.sum(first * second, -1) + (0.0 if last is None else last[:, 0])
    half = first.shape[-1] // 2
    return jnp.sum(nn.relu(first[..., :half] + second[..., half:]) * last[:, :-1], -1) + last[:, -1]


class AdaptiveHeads(nn.Module):
    """Any encoder under C projection heads and the temperature network, for the hosts of ``zoo.hosts``.

    The first head is the ``projection`` that a plain host compares, so that the same module serves both.  Parameters
    lie under ``encoder``, ``projector``, ``temperature`` and ``predictor``.

    Attributes:
      body: ``(x, train, mask) -> features [B, D]``, with an ``axis_name`` of its own.
      num_heads: C.
      hidden, features: of each head: ``D -> hidden -> d'``.
      normalise: batch normalisation in the heads (and predictors), for hosts without negatives.
      temperature: ``"dot"`` or ``"concat"`` (:class:`PairTemperature`), ``"table"``, one learnable score per head and
        pair of features, for Barlow Twins, or ``"none"``.
      temperature_hidden: size of phi's hidden layer.
      predictor: hidden size of each head's predictor (SimSiam); 0 for none.
      dtype: of the heads' computation; temperatures are float32.
      axis_name: handed on.
    """

    body: nn.Module
    num_heads: int = 3
    hidden: int = 512
    features: int = 128
    normalise: bool = False
    temperature: Literal["dot", "concat", "table", "none"] = "dot"
    temperature_hidden: int = 128
    predictor: int = 0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def provides(self) -> tuple[str, ...]:
        """What a host of this module provides beside its own: the keys of the result."""
        made = dict.fromkeys(("dot", "concat"), ("temperature", "temperature_last"))
        made["table"] = ("temperature_table",)
        predicted = ("prediction", "predicted_heads") if self.predictor else ()
        predicted += ("predicted_temperature",) if self.predictor and self.temperature in ("dot", "concat") else ()
        return ("projection", "heads", *made.get(self.temperature, ()), *predicted)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *dims"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> dict[str, Any]:
        """``projection`` [B, d'], ``heads`` [B, C, d'], ``temperature`` [B, C, h] and what the host asks for besides.

        ``temperature_last`` is a :class:`zoo.base.Shared`.  With a predictor also ``prediction`` [B, d'] (the first
        head's), ``predicted_heads`` and ``predicted_temperature``; the temperature of the heads is then made from
        stopped rows, as targets are.  For ``"table"`` there is only the shared ``temperature_table``.
        """
        encoder = self.body.copy(name="encoder", axis_name=self.axis_name)
        sizes = (self.num_heads, self.hidden, self.features, self.normalise, self.dtype, self.axis_name)
        z = MultiHeadProjector(*sizes, name="projector")(encoder(x, train, mask), train, mask).astype(jnp.float32)
        out: dict[str, Any] = {"projection": z[:, 0], "heads": z}
        if self.predictor:
            sizes = (self.num_heads, self.predictor, self.features, self.normalise, self.dtype, self.axis_name)
            p = MultiHeadProjector(*sizes, name="predictor")(z, train, mask).astype(jnp.float32)
            out |= {"prediction": p[:, 0], "predicted_heads": p}
        if self.temperature == "table":
            shape = (self.num_heads, self.features, self.features)
            table = self.param("temperature_table", nn.initializers.zeros, shape, jnp.float32)
            return {**out, "temperature_table": Shared(table.astype(jnp.float32))}
        if self.temperature == "none":
            return out
        net = PairTemperature(self.temperature, self.temperature_hidden, name="temperature")
        rows = jnp.concatenate([jax.lax.stop_gradient(z), p]) if self.predictor else z
        codes, last = net.embed(rows)
        out["temperature"] = codes[: z.shape[0]]
        if self.predictor:
            out["predicted_temperature"] = codes[z.shape[0] :]
        return out if last is None else {**out, "temperature_last": Shared(last)}


def _einsum(form: str, *arrays: Array) -> Array:
    # full float32: a cosine rounded to 10 bits and divided by a small temperature is off by per cents
    return jnp.einsum(form, *arrays, precision=jax.lax.Precision.HIGHEST)


def check_limits(lower: Number, upper: Number) -> None:
    """Checks the limits of a temperature.

    Raises:
      ValueError: not ``0 < lower < upper``.
    """
    if not lower > 0:
        raise ValueError(f"lower must be positive, got {lower}; the brief recommends 0.01")
    if not upper > lower:
        raise ValueError(f"upper must exceed lower, got lower {lower} and upper {upper}")
