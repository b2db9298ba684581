"""Noise levels: their range and spacing, preconditioning, interpolation of noise, and checks of what is noised.

Shared by every method that adds Gaussian noise of standard deviation ``sigma`` to data (EDM's convention: levels are
standard deviations, never variances or timesteps).  Karras et al., NeurIPS 2022, arXiv 2206.00364.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scalar = int | Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Levels:
    """The range of noise levels and how they are spaced (section 2 of the paper; the values are EDM's).

    Attributes:
      sigma_min, sigma_max: smallest and largest standard deviation of the noise.
      rho: spacing; larger puts more levels near ``sigma_min``.
      sigma_data: standard deviation of the data, used by the preconditioning.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed, got {self.sigma_min} and {self.sigma_max}")
        if self.rho <= 0 or self.sigma_data <= 0:
            raise ValueError(f"rho and sigma_data must be positive, got {self.rho} and {self.sigma_data}")


def consistency_precond(
    sigma: Float[Array, " *dims"], sigma_data: float = 0.5, sigma_min: float = 0.002
) -> tuple[Float[Array, " *dims"], Float[Array, " *dims"], Float[Array, " *dims"]]:
    """``(c_skip, c_out, c_in)`` of ``f(x, s) = c_skip x + c_out F(c_in x, s)``; at ``sigma_min`` exactly (1, 0, .).

    With ``sigma_min = 0`` this is EDM's preconditioning.
    """
    shifted = sigma - sigma_min
    c_skip = sigma_data**2 / (shifted**2 + sigma_data**2)
    c_out = sigma_data * shifted / jnp.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / jnp.sqrt(sigma**2 + sigma_data**2)
    return c_skip, c_out, c_in


def karras_sigmas(n: Scalar, levels: Levels = Levels(), max_n: int = 1281) -> Float[Array, " m"]:
    """The increasing grid of ``n`` noise levels from ``sigma_min`` to ``sigma_max``, padded with ``sigma_max``.

    Args:
      n: number of levels, 2 to ``max_n``; may be traced.
      levels: range and spacing.
      max_n: static length of the result.
    """
    i = jnp.arange(max_n)
    low, high = levels.sigma_min ** (1 / levels.rho), levels.sigma_max ** (1 / levels.rho)
    share = i / jnp.maximum(n - 1, 1)
    grid = (low + share * (high - low)) ** levels.rho
    # both ends exactly: the power would miss them by a rounding, and the boundary condition needs sigma_min itself
    return jnp.where(i == 0, levels.sigma_min, jnp.where(i >= n - 1, levels.sigma_max, grid)).astype(jnp.float32)


def slerp(a: Float[Array, " b *dims"], b: Float[Array, " b *dims"], share: float) -> Float[Array, " b *dims"]:
    """Spherical interpolation between two noises, per example; ``share`` is that of ``a``."""
    axes = tuple(range(1, a.ndim))
    norm = lambda v: jnp.sqrt(jnp.sum(v * v, axes, keepdims=True))  # noqa: E731
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b, axes, keepdims=True) / (norm(a) * norm(b)), -1.0, 1.0))
    safe = jnp.where(jnp.sin(angle) > 1e-6, angle, 1.0)
    mixed = (jnp.sin(share * safe) * a + jnp.sin((1 - share) * safe) * b) / jnp.sin(safe)
    return jnp.where(jnp.sin(angle) > 1e-6, mixed, share * a + (1 - share) * b)


def check_sigma(sigma: Any, levels: Levels = Levels()) -> None:
    """Checks noise levels on the host.

    Raises:
      ValueError: a level outside [sigma_min, sigma_max]: a variance, or a timestep in [0, 1000].
    """
    values = np.asarray(sigma, np.float64)
    slack = 1e-6 * levels.sigma_max
    bad = ~((values >= levels.sigma_min * (1 - 1e-6)) & (values <= levels.sigma_max + slack))
    if bad.any():
        raise ValueError(
            f"sigma must lie in [{levels.sigma_min:g}, {levels.sigma_max:g}], got {values[bad].flat[0]:g}; "
            "give standard deviations, not variances or timesteps"
        )


def check_images(x: Any, name: str = "x") -> None:
    """Checks on the host that images are floating point, finite and scaled to [-1, 1].

    Raises:
      ValueError: integers, NaN or infinity, or another range; the message says how to mend it.
    """
    values = np.asarray(x)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name} must be floating point in [-1, 1], got {values.dtype}; use {name} / 127.5 - 1")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(values)).sum())} values that are not finite")
    low, high = float(values.min()), float(values.max())
    if low < -1.0 - 1e-3 or high > 1.0 + 1e-3:
        raise ValueError(f"{name}: expected range [-1, 1], got min {low:g}, max {high:g}; use {name} / 127.5 - 1")
    if low >= 0.0 and values.size > 1:
        raise ValueError(f"{name}: expected range [-1, 1], got min {low:g}, max {high:g}; use 2 * {name} - 1")


def check_latents(x: Any, name: str = "x") -> None:
    """Checks on the host that data of any range (points, latents) are floating point and finite.

    Raises:
      ValueError: integers, NaN or infinity; the first offending example is named.
    """
    values = np.asarray(x)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{name} must be floating point, got {values.dtype}")
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if bad.any():
        raise ValueError(f"{name}: example {int(bad.argmax())} holds values that are not finite; remove or mend it")
