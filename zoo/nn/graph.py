"""Graph layers over typed edge lists of static size: the relational graph convolution, and an encoder of two.

A graph is ``features [N, d]`` with edges ``src, dst, rel [E]`` and ``mask [E]``: edge e sends the features of node
``src[e]`` to node ``dst[e]`` by relation ``rel[e]``.
Padded edges (mask false) may hold any numbers and send nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.partitioning import EMBED, MLP, partitioned
from zoo.ops.prototypes import l2_normalize

INITS = ("dgl", "per_relation")
ORDERS = ("auto", "aggregate", "transform")


def relation_bound(relations: int, inputs: int, outputs: int, init: str = "dgl") -> float:
    """The bound of the uniform initialisation of ``[relations, inputs, outputs]``: Xavier's, with the gain of ReLU.

    ``"dgl"`` applies torch's fan rule to the whole tensor, as DGL does: fan_in = in * out, fan_out = R * out.
    ``"per_relation"`` gives every matrix the bound of its own: fan_in = in, fan_out = out, a far larger one.
    """
    fans = inputs * outputs + relations * outputs if init == "dgl" else inputs + outputs
    return math.sqrt(2.0) * math.sqrt(6.0 / fans)


def _uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class RelationalGraphConv(nn.Module):
    """``h'_v = sum_r sum_{u in N_r(v)} W_r h_u + W_0 h_v + b``: plain sums, not means (Schlichtkrull et al., 2018).

    Attributes:
      features: size of the result.
      num_relations: R.
      num_bases: B: ``W_r = sum_b a_rb V_b``; ``None`` or R is a full matrix per relation.
      self_loop: whether ``W_0 h_v`` is added.
      use_bias: whether b is added.
      relation_init: see :func:`relation_bound` (``init`` is Linen's own name); the self-loop's matrix and the
        coefficients ``a`` get Xavier's with the gain of ReLU.
      order: ``"aggregate"`` sums the neighbours of each (node, relation) first, ``[N, R, in]``, and then multiplies;
        ``"transform"`` multiplies every node by every matrix, ``[R, N, out]``, and then sums, which is less if the
        result is narrower; ``"auto"`` takes the smaller.  Either way edges carry vectors, never matrices.
      dtype: of the products; sums over neighbours are float32.
      param_dtype: of the parameters.
    """

    features: int
    num_relations: int
    num_bases: int | None = None
    self_loop: bool = True
    use_bias: bool = True
    relation_init: str = "dgl"
    order: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n i"],
        src: Int[Array, "e"],
        dst: Int[Array, "e"],
        rel: Int[Array, "e"],
        mask: Bool[Array, "e"] | None = None,
    ) -> Float[Array, "n o"]:
        """Node features ``[N, in]`` to f32 ``[N, features]``.

        Raises:
          ValueError: sizes or choices out of range, named.
        """
        self._check()
        nodes, inputs = x.shape
        relations, bases = self.num_relations, self.num_bases or self.num_relations
        bound = relation_bound(bases, inputs, self.features, self.relation_init)
        shape = (bases, inputs, self.features)
        weight = self.param("weight", partitioned(_uniform(bound), None, EMBED, MLP), shape, self.param_dtype)
        if bases < relations:
            mixing = partitioned(_uniform(relation_bound(1, relations, bases, "per_relation")), None, None)
            coefficient = self.param("coefficient", mixing, (relations, bases), self.param_dtype)
            weight = jnp.einsum("rb,bio->rio", coefficient.astype(jnp.float32), weight.astype(jnp.float32))
        weight = weight.astype(self.dtype)
        # padded edges point behind the last segment, which is cut off
        real = jnp.ones(src.shape, bool) if mask is None else mask
        if self._aggregate_first(inputs):
            slot = jnp.where(real, dst * relations + rel, nodes * relations)
            sent = x.astype(jnp.float32)[jnp.where(real, src, 0)]
            sums = jax.ops.segment_sum(sent, slot, nodes * relations + 1)[:-1].reshape(nodes, relations, inputs)
            y = jnp.einsum("nri,rio->no", sums.astype(self.dtype), weight, preferred_element_type=jnp.float32)
        else:
            every = jnp.einsum("ni,rio->rno", x.astype(self.dtype), weight, preferred_element_type=jnp.float32)
            sent = every.reshape(relations * nodes, self.features)[jnp.where(real, rel * nodes + src, 0)]
            y = jax.ops.segment_sum(sent, jnp.where(real, dst, nodes), nodes + 1)[:-1]
        if self.self_loop:
            loop = partitioned(_uniform(relation_bound(1, inputs, self.features, "per_relation")), EMBED, MLP)
            kernel = self.param("loop", loop, (inputs, self.features), self.param_dtype).astype(self.dtype)
            y = y + jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, MLP)
            y = y + self.param("bias", zeros, (self.features,), self.param_dtype).astype(jnp.float32)
        return y

    def _aggregate_first(self, inputs: int) -> bool:
        return self.order == "aggregate" or (self.order == "auto" and inputs <= self.features)

    def _check(self):
        if self.num_relations < 1 or self.features < 1:
            raise ValueError(
                f"num_relations and features must be at least 1, got {self.num_relations} and {self.features}"
            )
        if self.num_bases is not None and not 1 <= self.num_bases <= self.num_relations:
            raise ValueError(f"num_bases must be in [1, {self.num_relations}] (the relations), got {self.num_bases}")
        if self.relation_init not in INITS:
            raise ValueError(f"relation_init must be one of {', '.join(INITS)}; got {self.relation_init!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")


class RGCNEncoder(nn.Module):
    """Relational graph convolutions with ReLU between them, and rows of unit length at the end.

    Attributes:
      num_relations: R.
      hidden: sizes of the layers before the last.
      features: size of the last.
      num_bases, relation_init, dtype, param_dtype: see :class:`RelationalGraphConv`.
      normalise: scale rows to unit length (a zero row stays zero).
    """

    num_relations: int
    hidden: tuple[int, ...] = (256,)
    features: int = 256
    num_bases: int | None = None
    relation_init: str = "dgl"
    normalise: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n i"],
        src: Int[Array, "e"],
        dst: Int[Array, "e"],
        rel: Int[Array, "e"],
        mask: Bool[Array, "e"] | None = None,
    ) -> Float[Array, "n o"]:
        """Node features ``[N, in]`` to f32 embeddings ``[N, features]``."""
        layer = lambda width, number: RelationalGraphConv(  # noqa: E731
            width, self.num_relations, self.num_bases, relation_init=self.relation_init, dtype=self.dtype,
            param_dtype=self.param_dtype, name=f"conv{number}",
        )  # fmt: skip
        h = x
        for number, width in enumerate(self.hidden, start=1):
            h = nn.relu(layer(width, number)(h, src, dst, rel, mask))
        h = layer(self.features, len(self.hidden) + 1)(h, src, dst, rel, mask)
        return l2_normalize(h) if self.normalise else h

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs of a graph of 2 nodes with as many features as the first layer has outputs."""
        width = (*self.hidden, self.features)[0]
        edge = jax.ShapeDtypeStruct((2,), jnp.int32)
        nodes = jax.ShapeDtypeStruct((2, width), jnp.float32)
        return {"x": nodes, "src": edge, "dst": edge, "rel": edge, "mask": jax.ShapeDtypeStruct((2,), bool)}
