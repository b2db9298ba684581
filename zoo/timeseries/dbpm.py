"""Dynamic Bad Pair Mining: weigh down the positive pairs that a contrastive learner should not learn from.

Lan, Yan, Hong and Feng, "Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach",
ICLR 2024 (arXiv 2302.03357).

In contrastive learning two views of an instance form a positive pair, and some pairs are bad.  A *noisy* pair (the
instance itself is mostly noise) is too easy, its loss stays unusually low and the encoder aligns noise; a *faulty* pair
(the augmentation destroyed the pattern) stays unusually hard.  The method remembers each instance's loss over the
epochs, flags the instances whose mean lies far below or above the population's, and multiplies the loss of a flagged
instance by a small weight, the density of its present loss under the population's Gaussian.  Nothing is learned, so it
goes on any loss that has one value per instance.

In the order of the paper: the memory, the statistics taken at each epoch's start, the weights, and their composition
as a loss transformation.  Epochs are counted from 0 here (from 1 in the paper).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from zoo.base import Context, Elements, LossTransformation
from zoo.catalogue import Card, Claim

Recency = Literal["mean", "linear"]
Transform = Literal["pdf", "pdf_clipped", "gaussian"]


@struct.dataclass
class PairMemory:
    """What is remembered of each instance's losses; the paper's N x E table, kept as running sums.

    Attributes:
      loss_sum: f32 ``[N]``, sum of the losses, each times its epoch's recency weight.
      weight_sum: f32 ``[N]``, sum of those recency weights.
      count: i32 ``[N]``, losses recorded.
      nonfinite: i32 scalar, the first instance whose loss was not finite, -1 if there was none; such losses are not
        recorded.  See :func:`check_pair_memory`.
    """

    loss_sum: Any
    weight_sum: Any
    count: Any
    nonfinite: Any


@struct.dataclass
class PairStats:
    """The population at the start of an epoch and the instances flagged for that epoch.

    Attributes:
      mu, sigma: f32 scalars, mean and population standard deviation of the instances' mean historical losses.
      bad, noisy, faulty: bool ``[N]``; ``bad`` is either of the other two.
    """

    mu: Any
    sigma: Any
    bad: Any
    noisy: Any
    faulty: Any


@struct.dataclass
class MiningState:
    """State of the loss transformation: a :class:`PairMemory` and the :class:`PairStats` of the present epoch."""

    memory: Any
    stats: Any


def pair_memory_init(num_examples: int) -> PairMemory:
    """An empty memory for ``num_examples`` instances.

    Raises:
      ValueError: no instances.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    # separate buffers: a step that donates its state may not be given the same one twice
    return PairMemory(
        loss_sum=jnp.zeros(num_examples, jnp.float32),
        weight_sum=jnp.zeros(num_examples, jnp.float32),
        count=jnp.zeros(num_examples, jnp.int32),
        nonfinite=jnp.full((), -1, jnp.int32),
    )


def recency_weight(epoch: int | Int[Array, ""], recency: Recency = "mean", epochs: int = 1) -> Float[Array, ""]:
    """The weight of an epoch's losses in the mean: 1 (the paper), or ``(1 + epoch) / epochs`` (the released code).

    Args:
      epoch: 0-based epoch.
      recency: ``"mean"`` weighs all epochs alike, ``"linear"`` later ones more.
      epochs: total epochs E; cancels unless ``legacy_scale``.

    Raises:
      ValueError: an unknown ``recency``.
    """
    if recency not in ("mean", "linear"):
        raise ValueError(f"recency must be 'mean' or 'linear', got {recency!r}")
    if recency == "mean":
        return jnp.ones((), jnp.float32)
    return (1 + jnp.asarray(epoch, jnp.float32)) / epochs


def pair_memory_update(
    memory: PairMemory,
    index: Int[Array, "b"],
    loss: Float[Array, "b"],
    epoch: int | Int[Array, ""] = 0,
    recency: Recency = "mean",
    epochs: int = 1,
) -> PairMemory:
    """Records a batch of losses; the order of batches within an epoch does not matter.

    An instance drawn several times (sampling with replacement) counts each time, so its mean is over draws.  Indices
    out of range (padding) and losses that are not finite are dropped.

    Args:
      memory: of N instances.
      index: instances of the losses, ``0 <= index < N``; anything else is padding.
      loss: their losses; no gradient flows into the memory.
      epoch, recency, epochs: see :func:`recency_weight`.
    """
    rows = memory.count.shape[0]
    loss = jax.lax.stop_gradient(loss.astype(jnp.float32))
    real = (index >= 0) & (index < rows)
    finite = jnp.isfinite(loss)
    to = jnp.where(real & finite, index, rows)
    weight = recency_weight(epoch, recency, epochs)
    broken = real & ~finite
    first = jnp.where(jnp.any(broken), index[jnp.argmax(broken)], -1).astype(jnp.int32)
    return PairMemory(
        loss_sum=memory.loss_sum.at[to].add(weight * jnp.where(finite, loss, 0.0), mode="drop"),
        weight_sum=memory.weight_sum.at[to].add(weight, mode="drop"),
        count=memory.count.at[to].add(1, mode="drop"),
        nonfinite=jnp.where(memory.nonfinite >= 0, memory.nonfinite, first),
    )


def pair_means(memory: PairMemory, legacy_scale: bool = False) -> Float[Array, "n"]:
    """Each instance's mean historical loss m_i, 0 if it has none.

    Args:
      memory: of N instances.
      legacy_scale: divide by the number of losses instead of the sum of their recency weights, as the released code
        does; under ``recency="linear"`` this shrinks m_i below the scale of the losses.
    """
    by = memory.count.astype(jnp.float32) if legacy_scale else memory.weight_sum
    return jnp.where(memory.count > 0, memory.loss_sum / jnp.where(memory.count > 0, by, 1.0), 0.0)


def pair_thresholds(
    mu: Float[Array, ""], sigma: Float[Array, ""], beta_np: float = 2.0, beta_fp: float = 3.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``(mu - beta_np * sigma, mu + beta_fp * sigma)``: at or below the first is noisy, at or above the second faulty.

    Raises:
      ValueError: a beta that is not positive.
    """
    _check_betas(beta_np, beta_fp)
    return mu - beta_np * sigma, mu + beta_fp * sigma


def pair_memory_stats(
    memory: PairMemory, beta_np: float = 2.0, beta_fp: float = 3.0, legacy_scale: bool = False
) -> PairStats:
    """Population statistics and flags from the memory, in O(N); run at each epoch's start.

    Instances never seen belong to no population and carry no flag.  A spread within float32's rounding counts as 0,
    and then nothing is flagged.

    Args:
      memory: of N instances.
      beta_np, beta_fp: how many standard deviations below (noisy) and above (faulty) the mean; ``math.inf`` flags
        none.
      legacy_scale: see :func:`pair_means`.

    Raises:
      ValueError: a beta that is not positive.
    """
    _check_betas(beta_np, beta_fp)
    seen = memory.count > 0
    number = jnp.maximum(jnp.sum(seen), 1)
    means = pair_means(memory, legacy_scale)
    mu = jnp.sum(means) / number
    sigma = jnp.sqrt(jnp.sum(jnp.where(seen, (means - mu) ** 2, 0.0)) / number)
    sigma = jnp.where(sigma > 1e-6 * jnp.abs(mu), sigma, 0.0)
    low, high = pair_thresholds(mu, sigma, beta_np, beta_fp)
    noisy = seen & (sigma > 0) & (means <= low)
    faulty = seen & (sigma > 0) & (means >= high)
    return PairStats(mu=mu, sigma=sigma, bad=noisy | faulty, noisy=noisy, faulty=faulty)


def pair_weights(
    stats: PairStats, index: Int[Array, "b"], loss: Float[Array, "b"], transform: Transform = "pdf_clipped"
) -> Float[Array, "b"]:
    """The weight of each loss: exactly 1 for a good pair, T(loss) for a flagged one.  No gradient flows into it.

    With z = (loss - mu) / sigma, T is ``"pdf"``: exp(-z^2/2) / (sigma sqrt(2 pi)), the paper's density, which exceeds
    1 near mu if sigma < 0.399; ``"pdf_clipped"``: the same, at most 1, the range that the paper states;
    ``"gaussian"``: exp(-z^2/2).

    Args:
      stats: of N instances.
      index: instances of the losses; padding (out of range) gets weight 1.
      loss: their *present* losses.
      transform: T.

    Raises:
      ValueError: an unknown ``transform``.
    """
    if transform not in ("pdf", "pdf_clipped", "gaussian"):
        raise ValueError(f"transform must be 'pdf', 'pdf_clipped' or 'gaussian', got {transform!r}")
    # a negative index would count from the end
    bad = stats.bad.at[jnp.where(index < 0, stats.bad.shape[0], index)].get(mode="fill", fill_value=False)
    sigma = jnp.where(stats.sigma > 0, stats.sigma, 1.0)
    weight = jnp.exp(-(((loss.astype(jnp.float32) - stats.mu) / sigma) ** 2) / 2)
    if transform != "gaussian":
        weight = weight / (sigma * math.sqrt(2 * math.pi))
    if transform == "pdf_clipped":
        weight = jnp.minimum(weight, 1.0)
    return jax.lax.stop_gradient(jnp.where(bad, weight, 1.0))


def dynamic_bad_pair_mining(
    warm_up: int,
    epochs: int | None = None,
    beta_np: float = 2.0,
    beta_fp: float = 3.0,
    transform: Transform = "pdf_clipped",
    recency: Recency = "mean",
    legacy_scale: bool = False,
    variant: Literal["paper", "official"] = "paper",
) -> LossTransformation:
    """The method, for any objective with one loss per example and a stable ``index`` in its batch.

    Every step records its losses.  At the first step of every epoch from ``warm_up`` on, before that step's losses are
    recorded, the flags are taken anew; they hold for the epoch.  Good pairs keep their loss untouched; the mean that
    follows still divides by all examples.  O(B) per step, O(N) per epoch.

    ``variant="official"`` sets what the released code does otherwise: ``transform="pdf"``, ``recency="linear"`` and
    ``legacy_scale=True``.

    Args:
      warm_up: epochs before mining starts.
      epochs: total epochs E; needed by ``legacy_scale``, otherwise only checked against ``warm_up``.
      beta_np, beta_fp: see :func:`pair_memory_stats`.
      transform: see :func:`pair_weights`.
      recency: see :func:`recency_weight`.
      legacy_scale: see :func:`pair_means`.
      variant: ``"paper"`` or ``"official"``.

    Raises:
      ValueError: settings that cannot work, by name.
    """
    if variant not in ("paper", "official"):
        raise ValueError(f"variant must be 'paper' or 'official', got {variant!r}")
    if variant == "official":
        transform, recency, legacy_scale = "pdf", "linear", True
    if transform not in ("pdf", "pdf_clipped", "gaussian"):
        raise ValueError(f"transform must be 'pdf', 'pdf_clipped' or 'gaussian', got {transform!r}")
    recency_weight(0, recency)
    _check_betas(beta_np, beta_fp)
    if warm_up < 0:
        raise ValueError(f"warm_up must be 0 epochs or more, got {warm_up}")
    if epochs is not None and warm_up >= epochs:
        raise ValueError(f"warm_up ({warm_up}) must be below epochs ({epochs}), or mining never starts")
    if legacy_scale and epochs is None:
        raise ValueError("legacy_scale (variant='official') needs epochs, the total number of epochs")

    def init(num_examples: int) -> MiningState:
        memory = pair_memory_init(num_examples)
        return MiningState(memory, pair_memory_stats(memory, beta_np, beta_fp, legacy_scale))

    def update(e: Elements, state: MiningState, context: Context) -> tuple[Elements, MiningState]:
        if context.batch is None or "index" not in context.batch:
            raise ValueError("dynamic_bad_pair_mining needs 'index' in the batch: each example's stable number")
        memory, epoch = state.memory, context.epoch
        index = jnp.where(e.mask, context.batch["index"][e.index[:, 0]], memory.count.shape[0])
        stats = jax.lax.cond(
            context.epoch_start & (epoch >= warm_up),
            lambda: pair_memory_stats(memory, beta_np, beta_fp, legacy_scale),
            lambda: state.stats,
        )
        losses = jax.lax.stop_gradient(e.values)
        memory = pair_memory_update(memory, index, losses, epoch, recency, epochs or 1)
        values = e.values * pair_weights(stats, index, losses, transform).astype(e.values.dtype)
        return e.replace(values=values), MiningState(memory, stats)

    return LossTransformation(init, update, ("example",), ("index",), name="dynamic_bad_pair_mining")


def check_pair_index(index: np.ndarray, num_examples: int, mask: np.ndarray | None = None) -> None:
    """Checks on the host that the instance numbers of a batch or a data set fit a memory of ``num_examples``.

    Raises:
      ValueError: a number out of range; it and its row are named.
    """
    index = np.asarray(index)
    wrong = (index < 0) | (index >= num_examples)
    if mask is not None:
        wrong &= np.asarray(mask, bool)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"index[{row}] is {int(index[row])}; the pair memory takes 0 to {num_examples - 1}")


def check_pair_memory(memory: PairMemory, num_examples: int) -> None:
    """Checks on the host that a memory, restored or trained, belongs to the data and is sound.

    Raises:
      ValueError: another number of instances, or an instance whose loss was not finite; it is named.
    """
    rows = memory.count.shape[0]
    if rows != num_examples:
        raise ValueError(
            f"pair memory has {rows} rows, dataset {num_examples}; start a new run or restore the matching checkpoint"
        )
    if int(memory.nonfinite) >= 0:
        raise ValueError(f"the loss of instance {int(memory.nonfinite)} was not finite; look at that row of the data")


def _check_betas(beta_np: float, beta_fp: float) -> None:
    for name, beta in (("beta_np", beta_np), ("beta_fp", beta_fp)):
        if not beta > 0:
            raise ValueError(f"{name} must be positive, got {beta}; math.inf flags nothing")


CARD = Card(
    name="dbpm",
    family="timeseries",
    title="Dynamic Bad Pair Mining",
    year=2024,
    kind="loss transform",
    idea=(
        "Remembers every instance's contrastive loss over the epochs. Instances whose mean loss is unusually low "
        "(noisy pairs: two views of noise) or unusually high (faulty pairs: the augmentation destroyed the pattern) "
        "have their loss weighed down by the density of the population at the present loss."
    ),
    citation=(
        "Lan, Yan, Hong, Feng. Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach. "
        "ICLR 2024, arXiv 2302.03357"
    ),
    plugs_into=("any per-example loss with an index", "SimCLR / NT-Xent", "InfoNCE", "supervised losses"),
    pieces=(
        "pair_memory_init",
        "recency_weight",
        "pair_memory_update",
        "pair_means",
        "pair_thresholds",
        "pair_memory_stats",
        "pair_weights",
        "dynamic_bad_pair_mining",
        "check_pair_index",
        "check_pair_memory",
        "zoo.losses.contrastive:nt_xent_per_example",
        "zoo.nn.resnet1d:ResNet1D",
        "zoo.ops.series:ts_scale",
        "zoo.ops.series:ts_jitter",
        "zoo.ops.series:ts_permute",
    ),
    claim=Claim(
        statement=(
            "On series of which a tenth are noisy and a tenth faulty, SimCLR with bad pair mining learns features "
            "whose linear probe is more accurate than SimCLR's alone"
        ),
        metric="probe_accuracy",
        effect=0.01,
        method="simclr_dbpm",
        baseline="simclr",
        trivial="untrained_encoder",
        remark=(
            "The gain is positive on four of five seeds but below the registered point: SimCLR alone is near its "
            "ceiling here, and the mining flags under half of the planted pairs (precision 1.0), mostly faulty ones"
        ),
    ),
    cost="O(B) per step and O(N) per epoch beside the host's loss; 3 numbers and 3 flags per instance",
    official_code="https://github.com/lanxiang1017/DynamicBadPairMining_ICLR24",
    departures=(
        "m_i is the paper's plain mean; the code weighs later epochs more and does not normalise",
        "the density is clipped at 1, the range that the paper states; the code's weight can exceed 1",
        "losses are computed by log-sum-exp; the code exponentiates similarities",
    ),
)
