"""Improved consistency training: one-step generators learned from data alone, with no diffusion model as a teacher.

Y. Song and P. Dhariwal, "Improved Techniques for Training Consistency Models", ICLR 2024, arXiv 2310.14189 (iCT), on
Y. Song, P. Dhariwal, M. Chen and I. Sutskever, "Consistency Models", ICML 2023, arXiv 2303.01469 (CM).

A consistency model ``f(x, sigma)`` maps every point of a trajectory of the probability-flow ODE of the diffusion
``x_sigma = x_0 + sigma z`` to the trajectory's origin, so that one evaluation at the largest noise gives a sample.
Consistency training learns it by asking for equal answers at two neighbouring noise levels that share the data point
and the noise.  The improvements: no moving average in the target, the pseudo-Huber distance over the whole example, a
weight of one over the levels' distance, a log-normal choice of levels, and a number of levels that doubles in stages.

Shapes: examples ``x`` are ``[B, ...]`` scaled to [-1, 1]; noise levels ``sigma`` are standard deviations ``[B]`` in
[sigma_min, sigma_max]; a grid of ``n`` levels has ``n - 1`` intervals and lives in a padded array of static size, so
that ``n`` may be traced and the whole curriculum is one compilation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from zoo.base import Context, Loss, Objective, batch_mask, example_elements
from zoo.catalogue import Card, Claim
from zoo.losses.robust import l2, pseudo_huber
from zoo.objectives import apply_module, init_module
from zoo.ops.noise_levels import Levels, Scalar, consistency_precond, karras_sigmas

Metric = Callable[[Array, Array], Array]


# --- the model: CM section 3, iCT section 2 ---------------------------------------------------------------------------


class ConsistencyModel(nn.Module):
    """``f(x, sigma)``: a network ``F(x, noise, cond, keys)``, preconditioned so that ``f(x, sigma_min) = x``.

    Attributes:
      denoiser: any module with that call (``zoo.nn.denoisers``); it gets ``noise = ln(sigma) / 4``.
      levels: see :class:`Levels`.
    """

    denoiser: nn.Module
    levels: Levels = Levels()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, " b *dims"],
        sigma: Float[Array, " b"],
        cond: Array | None = None,
        keys: Array | None = None,
    ) -> Float[Array, " b *dims"]:
        over = lambda c: c.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
        c_skip, c_out, c_in = consistency_precond(sigma, self.levels.sigma_data, self.levels.sigma_min)
        noise = 0.25 * jnp.log(sigma)
        return over(c_skip) * x + over(c_out) * self.denoiser(over(c_in) * x, noise, cond, keys)


# --- noise levels and curriculum: iCT section 3.4 ---------------------------------------------------------------------


def discretization_steps(step: Scalar, total_steps: Scalar, s0: int = 10, s1: int = 1280) -> Int[Array, ""]:
    """Number of levels at ``step``: ``min(s0 2^floor(k / K'), s1) + 1``, ``K' = floor(K / (log2(floor(s1/s0)) + 1))``.

    Args:
      step: steps taken, 0 to ``total_steps - 1`` (k and K of the paper); both may be traced.
      s0, s1: intervals at the start and at the end; ``s0 = s1`` keeps the grid fixed.

    Raises:
      ValueError: ``s1 < s0``, ``s0 < 1``, or fewer steps than stages (only if ``total_steps`` is not traced).
    """
    check_curriculum(total_steps if isinstance(total_steps, (int, np.integer)) else None, s0, s1)
    stages = _stages(s0, s1)
    if stages == int(stages):
        length = jnp.asarray(total_steps) // int(stages)
    else:
        length = jnp.floor(jnp.asarray(total_steps) / stages).astype(jnp.int32)
    stage = jnp.asarray(step) // jnp.maximum(length, 1)
    stage = jnp.minimum(stage, math.ceil(math.log2(s1 / s0)))  # the doubling below must not overflow
    return (jnp.minimum(s0 * 2**stage, s1) + 1).astype(jnp.int32)


def original_discretization_steps(step: Scalar, total_steps: Scalar, s0: int = 2, s1: int = 150) -> Int[Array, ""]:
    """The parent paper's number of levels (CM appendix C): ``ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1``.

    Raises:
      ValueError: ``s1 < s0`` or ``s0 < 2`` (one level has no interval).
    """
    check_curriculum(None, s0, s1)
    if s0 < 2:
        raise ValueError(f"s0 must be at least 2 in the original schedule (it starts with s0 levels), got {s0}")
    share = jnp.asarray(step, jnp.float32) / jnp.asarray(total_steps, jnp.float32)
    root = jnp.sqrt(share * ((s1 + 1) ** 2 - s0**2) + s0**2)
    return (jnp.ceil(root - 1) + 1).astype(jnp.int32)


def lognormal_interval_logits(
    sigmas: Float[Array, " m"], n: Scalar, mean: float = -1.1, std: float = 2.0
) -> Float[Array, " m-1"]:
    """Log-probabilities of the intervals between levels: the mass that ``ln sigma ~ N(mean, std^2)`` puts in each.

    Padding has ``-inf``.  The mass of a far interval is a difference of nearly equal ``erf``; taking ``erfc`` on the
    side where it is small keeps its digits in float32.
    """
    z = (jnp.log(sigmas) - mean) / (math.sqrt(2.0) * std)
    low, high = z[:-1], z[1:]
    erf, erfc = jax.scipy.special.erf, jax.scipy.special.erfc
    mass = jnp.where(
        low > 0, erfc(low) - erfc(high), jnp.where(high < 0, erfc(-high) - erfc(-low), erf(high) - erf(low))
    )
    logits = jnp.log(jnp.maximum(mass, jnp.finfo(jnp.float32).tiny))
    return jax.nn.log_softmax(jnp.where(jnp.arange(logits.shape[0]) < n - 1, logits, -jnp.inf))


def uniform_interval_logits(sigmas: Float[Array, " m"], n: Scalar) -> Float[Array, " m-1"]:
    """Log-probabilities of the original consistency training: every interval alike, ``-inf`` on padding."""
    real = jnp.arange(sigmas.shape[0] - 1) < n - 1
    return jax.nn.log_softmax(jnp.where(real, 0.0, -jnp.inf))


def sample_intervals(keys: Array, logits: Float[Array, " k"]) -> Int[Array, " b"]:
    """Draws one interval per key (0-based; interval ``i`` lies between levels ``i`` and ``i + 1``).

    By inverting the cumulative sum: one uniform number per example instead of one Gumbel number per interval.
    """
    cumulative = jnp.cumsum(jax.nn.softmax(logits))
    u = jax.vmap(jax.random.uniform)(keys) * cumulative[-1]
    drawn = jnp.searchsorted(cumulative, u, side="right")
    # u may round up to the total: no further than the last interval that has mass
    last = jnp.max(jnp.where(jnp.isfinite(logits), jnp.arange(logits.shape[0]), 0))
    return jnp.minimum(drawn, last).astype(jnp.int32)


def interval_weights(low: Float[Array, " b"], high: Float[Array, " b"]) -> Float[Array, " b"]:
    """``lambda(s_i) = 1 / (s_{i+1} - s_i)``: small noise counts more (section 3.3).  Reaches the thousands: float32."""
    return 1.0 / (high.astype(jnp.float32) - low.astype(jnp.float32))


# --- the objective: equation 6 ----------------------------------------------------------------------------------------


def consistency_training(
    denoiser: nn.Module,
    levels: Levels = Levels(),
    *,
    s0: int = 10,
    s1: int = 1280,
    curriculum: str = "doubling",
    intervals: str = "lognormal",
    mean: float = -1.1,
    std: float = 2.0,
    weighting: str = "interval",
    metric: Metric | None = None,
    reduction: str = "vector",
    ema_decay: float = 0.0,
    inputs: str = "x",
    label: str | None = None,
    name: str = "ict",
) -> Objective:
    """Improved consistency training as an objective; every improvement has a switch.

    The variables' ``params`` are those of ``ConsistencyModel(denoiser, levels)``.  Outputs, per example: ``prediction``
    at the upper level, ``target`` at the lower one (no gradient), ``sigma`` (lower), ``sigma_next`` and ``weight``.

    Args:
      denoiser: the network F, see :class:`ConsistencyModel`.
      levels: noise range and spacing.
      s0, s1, curriculum: how the number of levels grows over ``context.total_steps``: ``"doubling"`` or ``"original"``.
      intervals, mean, std: how an interval is drawn: ``"lognormal"`` in sigma, or ``"uniform"`` over intervals.
      weighting: ``"interval"``, 1 / (distance of the levels), or ``"uniform"``, 1.
      metric: ``(prediction, target) -> [B]``; ``None`` is the pseudo-Huber distance with the paper's constant.
      reduction: of the default metric: the paper's ``"vector"`` norm, or ``"elementwise"`` as re-implementations do.
      ema_decay: 0 takes the current parameters for the target; more keeps a moving average of them in ``teacher``.
      inputs, label: batch fields; a ``label`` makes the model class-conditional (``denoiser.classes > 0``).

    Raises:
      ValueError: settings outside their range, or (when traced) inputs that are not floating point.
    """
    _one_of("curriculum", curriculum, ("doubling", "original"))
    _one_of("intervals", intervals, ("lognormal", "uniform"))
    _one_of("weighting", weighting, ("interval", "uniform"))
    check_curriculum(None, s0, s1)
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
    model = ConsistencyModel(denoiser, levels)
    distance = metric or (lambda u, v: pseudo_huber(u, v, reduction=reduction))
    count = discretization_steps if curriculum == "doubling" else original_discretization_steps

    def init(rng, batch):
        x = _floating(batch[inputs], inputs)
        sigma = jnp.full(x.shape[0], levels.sigma_max)
        variables = init_module(model, rng, batch, x, sigma, batch[label] if label else None)
        return {**variables, "teacher": jax.tree.map(jnp.copy, variables["params"])} if ema_decay else variables

    def forward(variables, batch, context: Context):
        x = _floating(batch[inputs], inputs)
        # padding may hold anything: it must not reach the gradients, not even as 0 * nan
        x = jnp.where(batch_mask(batch).reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)
        n = count(context.step, context.total_steps, s0, s1)
        grid = karras_sigmas(n, levels, s1 + 1)
        logits = (
            lognormal_interval_logits(grid, n, mean, std)
            if intervals == "lognormal"
            else uniform_interval_logits(grid, n)
        )
        i = sample_intervals(context.example_keys(batch, "interval"), logits)
        low, high = grid[i], grid[i + 1]
        z = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(context.example_keys(batch, "noise"))
        # one set of keys: both branches must drop the same units
        keys = context.example_keys(batch, "dropout") if context.train else None
        cond = batch[label] if label else None

        def f(params):
            own = {**{c: v for c, v in variables.items() if c != "teacher"}, "params": params}
            return lambda x, sigma: apply_module(model, own, x, sigma, cond, keys=keys, batch=batch, context=context)

        taught = jax.lax.stop_gradient(variables["teacher" if ema_decay else "params"])
        (prediction, mutated), (target, _) = consistency_pair(f(variables["params"]), f(taught), x, z, low, high)
        weight = interval_weights(low, high) if weighting == "interval" else jnp.ones_like(low)
        outputs = {"prediction": prediction, "target": jax.lax.stop_gradient(target)}
        return {**outputs, "sigma": low, "sigma_next": high, "weight": weight}, mutated

    def loss(outputs, batch, context):
        values = consistency_loss(outputs["prediction"], outputs["target"], outputs["weight"], distance)
        levels_now = count(context.step, context.total_steps, s0, s1).astype(jnp.float32)
        return Loss(example_elements(values, batch), metrics={"levels": levels_now})

    def after_step(variables, outputs, batch, context):
        move = lambda t, p: ema_decay * t + (1 - ema_decay) * p  # noqa: E731
        return {"teacher": jax.tree.map(move, variables["teacher"], variables["params"])}

    return Objective(
        init,
        forward,
        loss,
        provides=("prediction", "target", "sigma", "weight", "index", *((label,) if label else ())),
        after_step=after_step if ema_decay else None,
        gathers=(),
        name=name,
    )


def original_consistency_training(
    denoiser: nn.Module, levels: Levels = Levels(), *, s0: int = 2, s1: int = 150, ema_decay: float = 0.95, **rest
) -> Objective:
    """The parent paper's consistency training, with its squared l2 distance: the baseline that iCT improves on.

    Uniform intervals, uniform weight, a moving average of the parameters in the target, a square-root curriculum.
    ``rest`` are :func:`consistency_training`'s other arguments (``metric`` to take another distance).
    """
    settings = {"curriculum": "original", "intervals": "uniform", "weighting": "uniform", "metric": l2, "name": "ct"}
    return consistency_training(denoiser, levels, s0=s0, s1=s1, ema_decay=ema_decay, **{**settings, **rest})


def consistency_pair(
    student: Callable[[Array, Array], Any],
    target: Callable[[Array, Array], Any],
    x: Float[Array, " b *dims"],
    z: Float[Array, " b *dims"],
    low: Float[Array, " b"],
    high: Float[Array, " b"],
) -> tuple[Any, Any]:
    """``student(x + high z, high)`` and ``target(x + low z, low)``: the same example and the same noise in both."""
    over = lambda s: s.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    return student(x + over(high) * z, high), target(x + over(low) * z, low)


def consistency_loss(
    prediction: Float[Array, " b *dims"], target: Float[Array, " b *dims"], weight: Float[Array, " b"], metric: Metric
) -> Float[Array, " b"]:
    """``weight * metric(prediction, stop_gradient(target))``, float32 ``[B]`` (equation 6)."""
    return weight.astype(jnp.float32) * metric(prediction, jax.lax.stop_gradient(target)).astype(jnp.float32)


# --- sampling and editing: CM algorithms 1 and 4 ----------------------------------------------------------------------


def consistency_sample(
    apply_fn: Callable[..., Array],
    variables: Any,
    key: Array | None,
    shape: tuple[int, ...],
    sigmas: Float[Array, " t"] | tuple[float, ...] = (80.0,),
    *,
    sigma_min: float = 0.002,
    cond: Array | None = None,
    clip: bool = False,
    noise: Float[Array, "t b *dims"] | None = None,
) -> Float[Array, " b *dims"]:
    """Samples in ``len(sigmas)`` evaluations: ``f(sigma_max z, sigma_max)``, then noise again and ``f`` at each level.

    Args:
      apply_fn: ``(variables, x, sigma[B], cond) -> x``, e.g. ``ConsistencyModel(...).apply``.
      key: of all the noise; ``None`` if ``noise`` is given.
      shape: ``[B, ...]`` of the samples.
      sigmas: decreasing levels, the first is ``sigma_max``; (80, 0.821) is the paper's two-step choice on CIFAR-10.
      cond: class labels of a conditional model.
      clip: clip to [-1, 1] after each evaluation.
      noise: standard normal ``[T, B, ...]`` to use instead of the key's, one per level (chosen latents, see `slerp`).

    Raises:
      ValueError: neither key nor noise, or noise of another shape.
    """
    noise = _noise(key, noise, sigmas, shape)
    return _refine(apply_fn, variables, noise, jnp.zeros(shape), sigmas, sigma_min, cond, clip, lambda x: x)


def consistency_edit(
    apply_fn: Callable[..., Array],
    variables: Any,
    key: Array | None,
    reference: Float[Array, " b *dims"],
    mask: Array,
    sigmas: Float[Array, " t"] | tuple[float, ...],
    *,
    transform: Callable[[Array], Array] = lambda x: x,
    inverse: Callable[[Array], Array] = lambda x: x,
    from_reference: bool = False,
    sigma_min: float = 0.002,
    cond: Array | None = None,
    clip: bool = False,
    noise: Float[Array, "t b *dims"] | None = None,
    variant: str = "paper",
) -> Float[Array, " b *dims"]:
    """Zero-shot editing (inpainting, colourisation, super-resolution, strokes): known parts are put back every time.

    After every evaluation ``x <- A^-1(A(reference) (1 - mask) + A(x) mask)`` for an invertible linear map A.

    Args:
      apply_fn, variables, key, sigmas, cond, clip, noise: as in :func:`consistency_sample`.
      reference: what is edited.
      mask: 1 where to edit, 0 where to keep, in the space of ``transform``; broadcast against it.
      transform, inverse: A and its inverse.
      from_reference: start from the whole reference instead of its kept part (stroke-guided editing).
      variant: ``"paper"``, or ``"official"``: ``x mask`` in place of ``A(x) mask``, as ``Kinyugo/consistency_models``.

    Raises:
      ValueError: an unknown variant, neither key nor noise, or noise of another shape.
    """
    _one_of("variant", variant, ("paper", "official"))
    to_map = transform if variant == "paper" else (lambda x: x)

    def put_back(known, x):
        return inverse(transform(known) * (1 - mask) + to_map(x) * mask)

    start = put_back(reference, reference if from_reference else jnp.zeros_like(reference))
    noise = _noise(key, noise, sigmas, reference.shape)
    return _refine(apply_fn, variables, noise, start, sigmas, sigma_min, cond, clip, lambda x: put_back(start, x))


def _noise(key, noise, sigmas, shape):
    levels = jnp.shape(sigmas)[0] if hasattr(sigmas, "shape") else len(sigmas)
    if key is None and noise is None:
        raise ValueError("sampling needs a key, or the noise itself")
    if noise is None:
        return jax.random.normal(key, (levels, *shape))
    if noise.shape != (levels, *shape):
        raise ValueError(f"noise must be [T, *shape] = {(levels, *shape)} for {levels} levels, got {noise.shape}")
    return noise


def _refine(apply_fn, variables, noise, start, sigmas, sigma_min, cond, clip, put_back):
    sigmas = jnp.asarray(sigmas, jnp.float32)
    # the first noise is whole; later ones add to the sigma_min that a sample is taken to carry
    added = jnp.sqrt(jnp.maximum(sigmas**2 - sigma_min**2, 0.0)).at[0].set(sigmas[0])

    def body(x, now):
        sigma, scale, z = now
        x = apply_fn(variables, x + scale * z, jnp.full(x.shape[0], sigma), cond)
        return put_back(jnp.clip(x, -1.0, 1.0) if clip else x), None

    return jax.lax.scan(body, start, (sigmas, added, noise))[0]


# --- checks of input: the brief's "Bad input" -------------------------------------------------------------------------


def check_curriculum(total_steps: int | None, s0: int, s1: int) -> None:
    """Checks a curriculum's settings on the host.

    Raises:
      ValueError: ``s0 < 1``, ``s1 < s0``, or ``total_steps`` smaller than the number of stages.
    """
    if s0 < 1 or s1 < s0:
        raise ValueError(f"the curriculum needs 1 <= s0 <= s1, got s0={s0}, s1={s1}")
    if total_steps is not None and math.floor(total_steps / _stages(s0, s1)) < 1:
        raise ValueError(
            f"total_steps={total_steps} is less than the {_stages(s0, s1):g} stages from s0={s0} to s1={s1} "
            "(total_steps // stages is 0); train longer or lower s1"
        )


def _stages(s0: int, s1: int) -> float:
    return math.log2(s1 // s0) + 1


def _floating(x: Array, name: str) -> Float[Array, " b *dims"]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name!r} must be floating point in [-1, 1], got {x.dtype}; use x / 127.5 - 1")
    return x.astype(jnp.float32)


def _one_of(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}; got {value!r}")


CARD = Card(
    name="ict",
    family="diffusion",
    title="Improved Techniques for Training Consistency Models",
    year=2023,
    kind="objective",
    idea=(
        "Learns a one-step generator from data alone: the network must give the same answer at two neighbouring noise "
        "levels that share data point and noise. No teacher and no moving average in the target; a pseudo-Huber "
        "distance, a weight of one over the levels' distance, log-normal noise levels and a doubling number of levels "
        "make it better than distillation."
    ),
    citation="Song and Dhariwal, ICLR 2024, arXiv:2310.14189",
    plugs_into=("any denoiser F(x, noise, cond, keys)", "loss transformations on examples", "averaged weights"),
    pieces=(
        "zoo.ops.noise_levels:karras_sigmas",
        "discretization_steps",
        "lognormal_interval_logits",
        "sample_intervals",
        "interval_weights",
        "zoo.ops.noise_levels:consistency_precond",
        "ConsistencyModel",
        "consistency_training",
        "original_consistency_training",
        "consistency_sample",
        "consistency_edit",
        "zoo.ops.noise_levels:slerp",
        "zoo.losses.robust:pseudo_huber",
    ),
    claim=Claim(
        statement=(
            "On a mixture of eight Gaussians in the plane, one-step samples of improved consistency training are "
            "closer to the data than those of the original consistency training after the same steps."
        ),
        metric="sliced_w1",
        effect=0.01,
        method="ict",
        baseline="ct",
        trivial="gaussian",
        higher_is_better=False,
        seeds=5,
        budget="the same network, data, batch, steps, optimiser and averaged weights; no tuning in any arm",
    ),
    cost="two forward passes and one backward pass per step; no second set of weights; one compilation in all",
    official_code="none for iCT; the parent's openai/consistency_models (MIT)",
    departures=(
        "pseudo-Huber over the whole example as in the paper; re-implementations apply it to every entry "
        "(reduction='elementwise')",
        "intervals are drawn by inverting the cumulative distribution, one uniform number per example",
        "editing transforms the sample before masking, as in the parent's algorithm 4; variant='official' does not",
    ),
)
