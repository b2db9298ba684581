"""An encoder with a projector and a predictor, for methods that compare a prediction with a projection."""

from __future__ import annotations

from flax import linen as nn
from jaxtyping import Array, Bool, Float


class Siamese(nn.Module):
    """SimSiam's and BYOL's modules; parameters lie under ``encoder``, ``projector`` and ``predictor``.

    Attributes:
      body: ``(x, train, mask) -> h [B, d]``.
      projection, prediction: modules such as :class:`zoo.nn.mlp.MLP`, batch normalised as the papers have them.
      axis_name: handed on to all three.
    """

    body: nn.Module
    projection: nn.Module
    prediction: nn.Module
    axis_name: str | None = None
    provides = ("prediction",)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *dims"], train: bool = False, mask: Bool[Array, "b"] | None = None
    ) -> dict[str, Float[Array, "b f"]]:
        """``features``, ``projection`` and ``prediction``, each ``[B, ...]``."""
        h = self.body.copy(name="encoder", axis_name=self.axis_name)(x, train, mask)
        z = self.projection.copy(name="projector", axis_name=self.axis_name)(h, train, mask)
        p = self.prediction.copy(name="predictor", axis_name=self.axis_name)(z, train, mask)
        return {"features": h, "projection": z, "prediction": p}
