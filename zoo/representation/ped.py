"""PED: ranking pre-trained models after a simulated fine-tuning of their features, by potential energy descent.

Li, Hu, Ge, Shan, Duan: "Exploring Model Transferability through the Lens of Potential Energy", ICCV 2023,
arXiv 2308.15074.

To choose among pre-trained models without fine-tuning each, one scores their features on the target data (LogME,
SFDA, GBC ...: :mod:`zoo.metrics.transferability`).  Such scores see features as they are, not as fine-tuning would
leave them.  Here every class is a soft ball around its mean, with radius R the root of its total variance.  Balls
that overlap repel each other, ``F_ab = k (ns (R_a + R_b) - d_ab)_+``, the force of the potential energy
``U_ab = k/2 (ns (R_a + R_b) - d_ab)_+^2``; in a time dt a class starting at rest moves by ``F dt^2 / 2`` along the
line that joins the means, at most by the overlap itself.  A few steps separate crowded classes, and any score is
computed on the moved features.

Classes move as a whole, so radii never change and only the means, [C, D], are iterated; samples are shifted once.
With ``W = M / d`` (M the moves, symmetric) the displacement is ``rowsum(W) m - W m``: two products of O(C^2 D), no
[C, C, D] array.  A step is gradient descent on U with rate ``dt^2 / 2``: U falls while ``dt^2 k C / 2 < 2``, that is
for C < 400 at the defaults.

Everything computes in the inputs' precision.  :class:`PotentialEnergyDescent` is the host's way in: float64, like the
scores.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from zoo.catalogue import Card, Claim
from zoo.metrics.transferability import METRICS, check_features, metric_of

Scalar = float | int | Float[Array, ""]
STD_FLOOR = 1e-3
"""Least deviation of a dimension of the general features: a constant dimension is not blown up further."""

# --- what is known of each class: counts, means, variances ------------------------------------------------------------


@struct.dataclass
class ClassStats:
    """Moments of each class, which add up over batches.

    Attributes:
      count: ``[C]`` samples.
      mean: ``[C, D]``, zeros for a class without samples.
      scatter: ``[C, D]``, summed squared deviations from the mean.
    """

    count: Any
    mean: Any
    scatter: Any


def class_stats(
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    num_classes: int,
    mask: Bool[Array, "n"] | None = None,
    before: ClassStats | None = None,
) -> ClassStats:
    """Moments of each class in a batch, on top of those of earlier batches.

    Args:
      features, labels: a batch; labels in ``[0, num_classes)``.
      num_classes: C.
      mask: real rows; all by default.
      before: moments so far; deviations are taken within batches and merged, never from raw second moments.
    """
    x = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    weight = jnp.ones(x.shape[0], x.dtype) if mask is None else mask.astype(x.dtype)
    if mask is not None:
        x = jnp.where(mask[:, None], x, 0)
    add = functools.partial(jax.ops.segment_sum, segment_ids=labels, num_segments=num_classes)
    count = add(weight)
    mean = add(weight[:, None] * x) / jnp.maximum(count, 1)[:, None]
    scatter = add(weight[:, None] * jnp.square(x - mean[labels]))
    if before is None:
        return ClassStats(count, mean, scatter)
    total = before.count + count
    share = (count / jnp.maximum(total, 1))[:, None]
    apart = mean - before.mean
    between = jnp.square(apart) * share * before.count[:, None]
    return ClassStats(total, before.mean + apart * share, before.scatter + scatter + between)


def scale_of(stats: ClassStats, floor: Scalar = STD_FLOOR) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
    """Mean and deviation of each dimension over all samples of all classes (brief, Rescale).

    For a general set its labels do not matter: ``class_stats(general, zeros, 1)``.

    Args:
      stats: of the general features, or of the target's own.
      floor: least deviation.
    """
    total = jnp.maximum(jnp.sum(stats.count), 1)
    mean = jnp.sum(stats.count[:, None] * stats.mean, 0) / total
    within = jnp.sum(stats.scatter, 0)
    between = jnp.sum(stats.count[:, None] * jnp.square(stats.mean - mean), 0)
    return mean, jnp.maximum(jnp.sqrt((within + between) / total), floor)


def balls(
    stats: ClassStats, mean: Float[Array, "d"], std: Float[Array, "d"]
) -> tuple[Float[Array, "c d"], Float[Array, "c"], Bool[Array, "c"]]:
    """Centres ``[C, D]`` and radii ``[C]`` of the classes in rescaled units, and which classes have samples.

    The radius is the root of the variances' sum over dimensions (biased variances).
    """
    variance = stats.scatter / jnp.maximum(stats.count, 1)[:, None]
    radii = jnp.sqrt(jnp.sum(variance / jnp.square(std), -1))
    return (stats.mean - mean) / std, radii, stats.count > 0


# --- forces -----------------------------------------------------------------------------------------------------------


def _pairs(means, radii, ns, present):
    # centred means, distances and overlaps [C, C]; coincident means are exactly 0 apart, the diagonal overlaps by 0
    here = jnp.ones(means.shape[0], bool) if present is None else present
    count = jnp.maximum(jnp.sum(here), 1)
    m = jnp.where(here[:, None], means, 0)
    m = jnp.where(here[:, None], m - jnp.sum(m, 0) / count, 0)  # distances are differences of squares: keep both small
    squares = jnp.sum(jnp.square(m), -1)
    size = squares[:, None] + squares[None, :]
    squared = size - 2 * jnp.matmul(m, m.T, precision="highest")
    apart = squared > 4 * jnp.finfo(m.dtype).eps * size
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
    pair = here[:, None] & here[None, :] & ~jnp.eye(len(m), dtype=bool)
    overlap = jnp.where(pair, jnp.maximum(ns * (radii[:, None] + radii[None, :]) - distance, 0), 0)
    return m, distance, overlap


def potential_energy(
    means: Float[Array, "c d"],
    radii: Float[Array, "c"],
    ns: Scalar = 0.6,
    k: Scalar = 1.0,
    present: Bool[Array, "c"] | None = None,
) -> Float[Array, ""]:
    """``U = sum over pairs of k/2 (ns (R_a + R_b) - d_ab)_+^2`` (brief, Energy view)."""
    overlap = _pairs(means, radii, ns, present)[2]
    return 0.25 * k * jnp.sum(jnp.square(overlap))  # every pair is there twice


def potential_energy_step(
    means: Float[Array, "c d"],
    radii: Float[Array, "c"],
    dt: Scalar = 0.1,
    ns: Scalar = 0.6,
    k: Scalar = 1.0,
    present: Bool[Array, "c"] | None = None,
) -> Float[Array, "c d"]:
    """The displacement of each class in one step (brief, One step): ``sum_b M_ab (m_a - m_b) / d_ab``.

    ``M_ab = min(k F_ab dt^2 / 2, F_ab)`` with overlap ``F_ab = (ns (R_a + R_b) - d_ab)_+``.  Means that coincide (to
    the precision of the arithmetic) have no line between them and do not push each other.

    Args:
      means, radii: the classes, in rescaled units.
      dt: time of a step.
      ns: how many radii reach out (``nsigma``).
      k: acceleration per overlap (``constant``).
      present: classes with samples; the others neither push nor move.
    """
    m, distance, overlap = _pairs(means, radii, ns, present)
    move = jnp.minimum(0.5 * dt**2 * k * overlap, overlap)
    weight = jnp.where(distance > 0, move / jnp.where(distance > 0, distance, 1), 0)
    return jnp.sum(weight, 1)[:, None] * m - jnp.matmul(weight, m, precision="highest")


# --- the descent ------------------------------------------------------------------------------------------------------


@struct.dataclass
class Motion:
    """Where the classes went.

    Attributes:
      displacement: ``[C, D]`` of each class, over all accepted steps.
      steps: i32, how many steps were accepted.
      changes: ``[max_steps]``, L1 size of each step tried, in rescaled units; 0 after the one that was rejected.
      energies: ``[max_steps + 1]``, total potential energy at the start and after each step (a rejected one
        repeats it).
    """

    displacement: Any
    steps: Any
    changes: Any
    energies: Any


def descend(
    means: Float[Array, "c d"],
    radii: Float[Array, "c"],
    dt: Scalar = 0.1,
    ns: Scalar = 0.6,
    k: Scalar = 1.0,
    exit_ratio: Scalar = 0.5,
    max_steps: int = 6,
    present: Bool[Array, "c"] | None = None,
) -> Motion:
    """Steps until one is at most ``exit_ratio`` times the first, which is not applied (brief, Loop).

    Classes that do not overlap at all stay where they are.

    Args:
      means, radii, dt, ns, k, present: as :func:`potential_energy_step`.
      exit_ratio: ``er``.
      max_steps: at most.
    """

    def step(carry, number):
        moved, going, first = carry
        delta = potential_energy_step(means + moved, radii, dt, ns, k, present)
        change = jnp.sum(jnp.abs(delta))
        first = jnp.where(number == 0, change, first)
        going = going & (change > exit_ratio * first)
        tried = (number == 0) | carry[1]
        moved = jnp.where(going, moved + delta, moved)
        energy = potential_energy(means + moved, radii, ns, k, present)
        return (moved, going, first), (jnp.where(tried, change, 0), going, energy)

    start = (jnp.zeros_like(means), jnp.asarray(True), jnp.zeros((), means.dtype))
    (moved, _, _), (changes, accepted, energies) = jax.lax.scan(step, start, jnp.arange(max_steps))
    before = potential_energy(means, radii, ns, k, present)
    return Motion(moved, jnp.sum(accepted, dtype=jnp.int32), changes, jnp.concatenate([before[None], energies]))


def simulate(
    features: Float[Array, "n d"],
    labels: Int[Array, "n"],
    general: Float[Array, "g d"] | None,
    num_classes: int,
    dt: Scalar = 0.1,
    ns: Scalar = 0.6,
    k: Scalar = 1.0,
    exit_ratio: Scalar = 0.5,
    max_steps: int = 6,
) -> tuple[Float[Array, "n d"], Motion]:
    """Features moved by the descent, in their own units, and the motion (its displacement in the features' units).

    Args:
      features, labels: the target's training data.
      general: features of the same model on a general set (the paper's is ImageNet's validation split), whose mean
        and deviation rescale every dimension; ``None`` takes the target's own.
      num_classes: C, static; a class without samples neither pushes nor moves.
      dt, ns, k, exit_ratio, max_steps: as :func:`descend`.
    """
    stats = class_stats(features, labels, num_classes)
    whole = stats if general is None else class_stats(general, jnp.zeros(general.shape[0], jnp.int32), 1)
    mean, std = scale_of(whole)
    centres, radii, present = balls(stats, mean, std)
    motion = descend(centres, radii, dt, ns, k, exit_ratio, max_steps, present)
    motion = motion.replace(displacement=motion.displacement * std)
    return features + motion.displacement[labels].astype(features.dtype), motion


# --- on the host, before any score ------------------------------------------------------------------------------------

_simulate = jax.jit(simulate, static_argnums=(3, 8))
RESCALES = ("general", "self")


def check_settings(
    dt: float | int, ns: float | int, k: float | int, exit_ratio: float | int, max_steps: int, rescale: str
) -> None:
    """Raises ValueError unless the settings make a descent."""
    for name, value in (("dt", dt), ("k", k)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= ns < np.inf:
        raise ValueError(f"ns must not be negative, got {ns}")
    if not 0 <= exit_ratio < 1:
        raise ValueError(f"exit_ratio must be in [0, 1), got {exit_ratio}: the first step has ratio 1")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if rescale not in RESCALES:
        raise ValueError(f"rescale must be 'general' or 'self', got {rescale!r}")


@dataclasses.dataclass(frozen=True)
class PotentialEnergyDescent:
    """The descent with its settings: called with features and labels it returns moved features, float64.

    Attributes:
      dt: time of a step.
      ns: how many radii reach out; the paper uses 0.6 or 0.3.
      k: acceleration per overlap.
      exit_ratio: stop before a step that is at most this share of the first.
      max_steps: at most.
      rescale: ``"general"`` (the paper's) needs general features; ``"self"`` rescales by the target's own.
    """

    dt: float | int = 0.1
    ns: float | int = 0.6
    k: float | int = 1.0
    exit_ratio: float | int = 0.5
    max_steps: int = 6
    rescale: str = "general"

    def __post_init__(self):
        check_settings(self.dt, self.ns, self.k, self.exit_ratio, self.max_steps, self.rescale)

    def __call__(self, features: Any, labels: Any, general: Any = None) -> np.ndarray:
        """Moved features ``[N, D]``; arguments and errors as :meth:`motion`."""
        return self.motion(features, labels, general)[0]

    def motion(self, features: Any, labels: Any, general: Any = None) -> tuple[np.ndarray, Motion]:
        """Moved features ``[N, D]`` and the motion, as NumPy arrays of float64.

        Args:
          features: ``[N, D]``.
          labels: integers ``[N]``, every class of 0..C-1 present.
          general: ``[G, D]`` of the same model; required unless ``rescale`` is ``"self"``, which does not read it.

        Raises:
          ValueError: features or labels that cannot be used, or no general features.
        """
        x, y, classes = check_features(features, labels)
        if self.rescale == "general":
            general = _check_general(general, x.shape[1])
        else:
            general = None
        settings = (self.dt, self.ns, self.k, self.exit_ratio)
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            scales = None if general is None else jnp.asarray(general)
            moved, motion = _simulate(jnp.asarray(x), jnp.asarray(y), scales, classes, *settings, self.max_steps)
            return np.asarray(moved), jax.tree.map(np.asarray, motion)


DEFAULT = PotentialEnergyDescent()


def score(
    features: Any,
    labels: Any,
    metric: str = "logme",
    general: Any = None,
    descent: PotentialEnergyDescent | None = DEFAULT,
    **settings: Any,
) -> float:
    """A model's transferability: a metric of :mod:`zoo.metrics.transferability` on the moved features.

    Args:
      features, labels, general: as :meth:`PotentialEnergyDescent.motion`.
      metric: one that reads features (LEEP and NCE read a source classifier's outputs, which nothing moves).
      descent: its settings; ``None`` scores the features as they are.
      settings: of the metric.

    Raises:
      ValueError: an unknown metric, or what the metric or the descent refuses.
    """
    function = metric_of(metric)
    if not METRICS[metric].moves:
        raise ValueError(f"metric {metric!r} reads a source classifier's outputs, not features: nothing can be moved")
    moved = features if descent is None else descent(features, labels, general)
    return function(moved, labels, **settings)


def _check_general(general: Any, dimension: int) -> np.ndarray:
    if general is None:
        raise ValueError(
            "general features are missing: the method rescales by the model's features on a general set (ImageNet's "
            "validation images); give them, or rescale='self' to use the target's own"
        )
    g = np.asarray(general, np.float64)
    if g.ndim != 2 or g.shape[1] != dimension or len(g) < 2:
        raise ValueError(f"general features must be [G, {dimension}] with G at least 2, got {list(g.shape)}")
    bad = ~np.isfinite(g).all(1)
    if bad.any():
        raise ValueError(f"general features of row {int(bad.argmax())} are not finite")
    return g


CARD = Card(
    name="ped",
    family="representation",
    title="Exploring Model Transferability through the Lens of Potential Energy",
    year=2023,
    kind="closed form",
    idea=(
        "Which of many pre-trained models will fine-tune best? Scores of their features see them as they are. Here "
        "fine-tuning is simulated first: every class is a soft ball, overlapping balls repel each other, and class "
        "means take a few small steps down the potential energy. Then any transferability score is computed on the "
        "moved features. Nothing is trained; only class means are iterated."
    ),
    citation="Li, Hu, Ge, Shan, Duan; ICCV 2023; arXiv 2308.15074",
    plugs_into=(
        "features of any encoder, from files or from exported models",
        "any transferability score of features: LogME, SFDA, NLEEP, H-score, PARC, GBC",
    ),
    pieces=(
        "class_stats",
        "scale_of",
        "balls",
        "potential_energy",
        "potential_energy_step",
        "descend",
        "simulate",
        "PotentialEnergyDescent",
        "score",
        "zoo.metrics.transferability_linear:logme",
        "zoo.metrics.transferability_linear:sfda",
        "zoo.metrics.transferability_linear:h_score",
        "zoo.metrics.transferability_density:leep",
        "zoo.metrics.transferability_density:nce",
        "zoo.metrics.transferability_density:nleep",
        "zoo.metrics.transferability_density:parc",
        "zoo.metrics.transferability_density:gbc",
        "zoo.metrics.transferability:rank_models",
        "zoo.metrics.rank_correlation:weighted_kendall_tau",
        "zoo.metrics.rank_correlation:spearman",
    ),
    claim=Claim(
        statement=(
            "On digits, LogME of features moved by potential energy descent ranks a pool of ten encoders of different "
            "pre-training closer to their fine-tuned accuracies than LogME of the features as they are."
        ),
        metric="weighted_tau",
        effect=0.05,
        method="LogME + PED",
        baseline="LogME",
        trivial="random ranking",
        seeds=5,
        remark=(
            "LogME alone orders these encoders about as well as their closely spaced accuracies allow, and the moves "
            "exchange a few neighbours in both directions; the paper's gains are on self-supervised ResNet-50s."
        ),
        budget="no arm trains or tunes anything; the same pool, features and fine-tuned accuracies per seed",
    ),
    cost="O(N D) for the moments of the classes, then O(C^2 D) a step, at most 6; LogME O(N D min(N, D))",
    official_code="lixiaotong97/PED (no licence file)",
    departures=(
        "only class means are iterated, in matrix form; the released code moves all samples through [C, C, D] arrays",
        "coincident means exert no force; the released code divides by zero",
        "LogME's default counts only the directions that the features span in the evidence's prior; variant='official' "
        "counts all dimensions, as released",
        "LEEP and NLEEP are mean logarithms by default; variant='official' drops the logarithm, as released",
        "PARC's label pairs tie exactly; variant='official' lets rounding break ties, as released",
        "GBC, LEEP, NCE and H-score are not in the released code and follow their own papers",
        "NLEEP's mixture starts from seeded k-means and takes a fixed number of EM iterations",
    ),
)
