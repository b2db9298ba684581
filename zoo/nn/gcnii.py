"""GCNII: graph convolutions that keep the first layer's features and a share of the identity, deep without collapse.

Chen, Wei, Huang, Ding, Li: "Simple and Deep Graph Convolutional Networks", ICML 2020, arXiv 2007.02133.

A graph is ``x [N, d]`` with edges ``src, dst [E]``, ``mask [E]`` as in ``zoo.nn.graph``; an undirected edge is listed
in both directions.  ``weight [E]`` and ``loops [N]`` make the propagation matrix (:func:`symmetric_weights`).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from zoo.nn.dropout import dropout, layer_keys


def symmetric_weights(
    src: Int[Array, "e"], dst: Int[Array, "e"], nodes: int, mask: Bool[Array, "e"] | None = None
) -> tuple[Float[Array, "e"], Float[Array, "n"]]:
    """``D^-1/2 (A + I) D^-1/2``: the weight of each edge ``[E]`` (padding: 0) and of each node's own loop ``[N]``.

    D counts incoming edges and the loop.  List no loop as an edge: it would be added twice.
    """
    real = jnp.ones(src.shape, bool) if mask is None else mask
    degree = 1.0 + jax.ops.segment_sum(real.astype(jnp.float32), jnp.where(real, dst, nodes), nodes + 1)[:-1]
    inverse = jax.lax.rsqrt(degree)
    at = lambda ends: inverse[jnp.where(real, ends, 0)]  # noqa: E731
    return jnp.where(real, at(src) * at(dst), 0.0), 1.0 / degree


def propagate(
    x: Float[Array, "n d"],
    src: Int[Array, "e"],
    dst: Int[Array, "e"],
    weight: Float[Array, "e"],
    loops: Float[Array, "n"],
) -> Float[Array, "n d"]:
    """``P x``: each node's weighted sum over the edges that end in it, and over itself; float32.

    Edges of weight 0 may hold any numbers.
    """
    nodes, x = x.shape[0], x.astype(jnp.float32)
    real = weight != 0
    sent = x[jnp.where(real, src, 0)] * weight[:, None]
    return jax.ops.segment_sum(sent, jnp.where(real, dst, nodes), nodes + 1)[:-1] + loops[:, None] * x


class GCN2Conv(nn.Module):
    """One layer: ``((1 - b) I + b W) ((1 - alpha) P x + alpha x0)`` with ``b = log(theta / layer + 1)``.

    Attributes:
      layer: its number, from 1.
      alpha: share of the first features.
      theta: how fast the share of W fades with depth.
      shared_weights: one W for both terms; otherwise each has its own, as GCNII*.
      dtype: of the products.
    """

    layer: int
    alpha: float = 0.1
    theta: float = 0.5
    shared_weights: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, smoothed: Float[Array, "n d"], first: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """``P x`` (:func:`propagate`) and the first layer's features, to f32 ``[N, d]``.

        Raises:
          ValueError: a layer number below 1.
        """
        if self.layer < 1:
            raise ValueError(f"layers count from 1, got {self.layer}")
        beta = math.log(self.theta / self.layer + 1.0)
        width = first.shape[-1]
        dense = lambda name: nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)  # noqa: E731
        near, start = (1.0 - self.alpha) * smoothed, self.alpha * first
        if self.shared_weights:
            h = near + start
            return (1.0 - beta) * h + beta * dense("weight")(h).astype(jnp.float32)
        mixed = dense("weight")(near) + dense("weight_first")(start)
        return (1.0 - beta) * (near + start) + beta * mixed.astype(jnp.float32)


class GCNII(nn.Module):
    """An encoder of nodes: a linear map with ReLU, ``layers`` convolutions with ReLU, and a linear map.

    Attributes:
      features: width throughout.
      layers: convolutions (32 or 64 in the relative representations' benchmark).
      alpha, theta, shared_weights: see :class:`GCN2Conv`.
      rate: dropout before the first map and before every convolution, in training.
      dtype: of the products.
    """

    features: int = 64
    layers: int = 32
    alpha: float = 0.1
    theta: float = 0.5
    shared_weights: bool = True
    rate: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n i"],
        src: Int[Array, "e"],
        dst: Int[Array, "e"],
        mask: Bool[Array, "e"] | None = None,
        keys: Array | None = None,
    ) -> Float[Array, "n o"]:
        """Node features to embeddings ``[N, features]``; ``keys`` (one per node) switch dropout on."""
        weight, loops = symmetric_weights(src, dst, x.shape[0], mask)
        x = dropout(x, self.rate, layer_keys(keys, 0))
        h = first = nn.relu(nn.Dense(self.features, dtype=self.dtype, name="embed")(x).astype(jnp.float32))
        for layer in range(1, self.layers + 1):
            h = dropout(h, self.rate, layer_keys(keys, layer))
            smoothed = propagate(h, src, dst, weight, loops)
            conv = GCN2Conv(layer, self.alpha, self.theta, self.shared_weights, self.dtype, name=f"conv{layer}")
            h = nn.relu(conv(smoothed, first))
        return nn.Dense(self.features, dtype=self.dtype, name="out")(h).astype(jnp.float32)

    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs of a graph of 2 nodes."""
        edge = jax.ShapeDtypeStruct((2,), jnp.int32)
        return {"x": jax.ShapeDtypeStruct((2, 3), jnp.float32), "src": edge, "dst": edge,
                "mask": jax.ShapeDtypeStruct((2,), bool)}  # fmt: skip
