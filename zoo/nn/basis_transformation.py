"""BT^2's network: backward-compatible training by a change of basis."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from zoo.nn.classifiers import RetrievalHead
from zoo.nn.orthogonal import OrthogonalDense
from zoo.ops.prototypes import l2_normalize


class BasisTransformation(nn.Module):
    """BT^2's network (Zhou et al., ICLR 2023): an old-aligned branch and a new one, mixed by two orthogonal layers.

    Attributes:
      encoder: ``(x, train, mask) -> features [B, D]``, with an ``axis_name``; its parameters lie under ``backbone``,
        and a linear map takes its features to ``features + d_old``.
      d_old: size of the old model's embedding.
      features: size of the independently trained new model's.
      extra: coordinates by which the merged embedding exceeds ``features``; at most ``d_old``.
      num_classes: C.
      scale: multiplies the new branch before it is merged.
      method: see :func:`zoo.nn.orthogonal.rotation`.
      dtype: of the encoder's computation.
      axis_name: handed on to the encoder.
    """

    encoder: nn.Module
    d_old: int
    features: int
    extra: int
    num_classes: int
    scale: float = 2.0
    method: str = "expm"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False, mask: Any = None, classify: bool = True):
        """Returns, all float32:

        ``h_new`` ``[B, features + extra]``, the merged embedding to store, whose first ``d_old`` coordinates
        (``h_bct``) meet the old model's; ``h_free`` ``[B, features]``, the new branch; ``logits = W h_free``.

        Raises:
          ValueError: ``extra`` above ``d_old``, or a merged embedding smaller than the old one.
        """
        if not 0 < self.extra <= self.d_old or self.features + self.extra < self.d_old:
            raise ValueError(f"extra must lie in 1..{self.d_old} and features + extra reach it, got {self.extra}")
        # a copy, because the mapped axis is known only where the step is built
        h = self.encoder.copy(name="backbone", axis_name=self.axis_name)(x, train, mask)
        u = RetrievalHead(self.features + self.d_old, dtype=self.dtype, name="head")(h).astype(jnp.float32)
        old = l2_normalize(nn.Dense(self.d_old, name="old_branch")(nn.relu(u)))
        free = l2_normalize(u[:, : self.features])
        turned = OrthogonalDense(self.features, False, self.method, name="orthogonal")(self.scale * free)
        merged = jnp.concatenate([l2_normalize(old[:, : self.extra]), turned], axis=-1)
        bct = OrthogonalDense(self.d_old, False, self.method, name="orthogonal_old")(merged[:, : self.d_old])
        h_new = jnp.concatenate([bct, merged[:, self.d_old :]], axis=-1)
        if not classify:
            return h_new
        logits = nn.Dense(self.num_classes, use_bias=False, name="classifier")(free)
        return {"h_new": h_new, "h_bct": bct, "h_free": free, "logits": logits}
