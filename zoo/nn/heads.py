"""Heads that sit on an encoder during pretraining."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from zoo.nn.mlp import MLP


class ProjectionHead(nn.Module):
    """A multi-layer perceptron from features to the space where a contrastive loss compares them (SimCLR's g).

    Attributes:
      hidden: sizes of the hidden layers, each followed by ReLU.
      features: size of the result.
      dtype: of the computation.
    """

    hidden: tuple[int, ...] = (512,)
    features: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "b d"]) -> Float[Array, "b f"]:
        """``[B, d] -> [B, features]``."""
        h = h.astype(self.dtype)
        for i, width in enumerate(self.hidden, start=1):
            h = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(h))
        return nn.Dense(self.features, dtype=self.dtype, name="out")(h)


class WithHead(nn.Module):
    """An encoder and the head on it; its parameters lie under ``encoder`` and ``head``.

    Attributes:
      body: ``(x, train, mask) -> h [B, d]``; x may be ids of tokens; with an ``axis_name`` of its own.
      projection: ``(h) -> z [B, f]``.
      axis_name: handed on to the encoder.
    """

    body: nn.Module
    projection: nn.Module
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Num[Array, "b *dims"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b f"]:
        """``[B, ...] -> [B, f]``: what the head makes of the encoder's features."""
        # copies, because the axis is known only where the step is built
        encoder = self.body.copy(name="encoder", axis_name=self.axis_name)
        return self.projection.copy(name="head")(encoder(x, train, mask))


class Pick(nn.Module):
    """One array of a backbone that returns several by name, as encoders under a head must.

    Attributes:
      body: ``(x, train, mask) -> {name: array}``; its parameters lie under ``backbone``.
      name_of: which one: ``pooled``.
      axis_name: handed on to the backbone.
    """

    body: nn.Module
    name_of: str = "pooled"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *dims"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b *out"]:
        """``[B, ...]`` to what the backbone calls by that name."""
        fields = {"axis_name": self.axis_name} if hasattr(self.body, "axis_name") else {}
        return self.body.copy(name="backbone", **fields)(x, train=train, mask=mask)[self.name_of]


class MultiHeadProjector(nn.Module):
    """Several projection heads of one architecture with weights of their own (``nn.vmap``; drawn independently).

    Attributes:
      num_heads: C; parameters have a leading axis of that size.
      hidden: size of the hidden layer, followed by ReLU.
      features: d', size of each head's result.
      normalise: batch normalisation before the ReLU, per head (for hosts without negatives).
      dtype: of the computation.
      axis_name: see :class:`zoo.nn.norm.BatchNorm`.
    """

    num_heads: int = 3
    hidden: int = 512
    features: int = 128
    normalise: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, h: Float[Array, "b *dims"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> Float[Array, "b c f"]:
        """``[B, D] -> [B, C, d']``, every head on the same features; ``[B, C, D]`` gives each head its own row.

        Raises:
          ValueError: no heads, or rows for another number of heads.
        """
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {self.num_heads}")
        if h.ndim not in (2, 3) or (h.ndim == 3 and h.shape[1] != self.num_heads):
            raise ValueError(f"expected features [B, D] or [B, {self.num_heads}, D], got {h.shape}")
        heads = nn.vmap(
            MLP, in_axes=(1 if h.ndim == 3 else None, None, None), out_axes=1, axis_size=self.num_heads,
            variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
        )  # fmt: skip
        made = heads((self.hidden,), self.features, self.normalise, self.dtype, self.axis_name, name="heads")
        return made(h, train, mask)
