"""Automatic data augmentation by invariance-constrained learning (Hounie, Chamon, Ribeiro; ICML 2023, 2209.15031).

Which transformations help depends on the task, and searching a policy is costly.  Instead invariance is asked for as a
constraint: the loss under transformations weighted towards the worst must stay below epsilon,
``min l(theta)  s.t.  l_c(theta) = E_{g ~ lambda}[l(f(g x), y)] <= epsilon``, with lambda(g) proportional to
``[l(f(g x), y) - kappa]_+``.  Its multiplier gamma turns augmentation on while the constraint is violated and off
again once it is met.  Lambda is sampled by a few independent Metropolis-Hastings moves between uniform proposals,
whose losses are computed without gradient.

The whole is an :class:`~zoo.base.Objective` around any host that yields losses of examples (pairs and triplets count
for their anchors): the host sees prepared images in place of the batch's.  Where a host's losses look at other rows
(contrastive ones), the proposals of the *global* batch are compared: proposal j of an example together with proposal j
of all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from zoo.base import (
    REDUCERS,
    Batch,
    CompositionError,
    Context,
    Loss,
    Objective,
    Shared,
    Variables,
    batch_mask,
    batch_rows,
    to_examples,
)
from zoo.catalogue import Card, Claim
from zoo.ops.augmentation import (
    AugmentationSpace,
    Transform,
    augment,
    check_images,
    sample_transforms,
    to_float,
    transform_counts,
)
from zoo.ops.images import Augmentation
from zoo.ops.metropolis import Chain, metropolis_hastings
from zoo.optim.dual import DualState, dual_ascent, dual_init, lagrangian

SAMPLERS = ("metropolis_hastings", "adversarial", "adversarial_identity")
STATE = "invariance"
_ROWS_APART = 1 << 22  # between the row numbers of an example's copies, whose randomness must differ


@dataclasses.dataclass(frozen=True)
class Views:
    """How a network's input is made of a raw image: base, operation, scaling, erasing, in this order.

    Attributes:
      space: of the operations.
      base: random ``(key, image) -> image`` before the operation (crop, flip), drawn anew for every view.
      normalise: ``image in [0, 1] -> image``, also outside training.
      erase: random ``(key, image) -> image`` on the normalised image (cutout).
    """

    space: AugmentationSpace
    base: Augmentation | None = None
    normalise: Callable[[Array], Array] | None = None
    erase: Augmentation | None = None

    def plain(self, image: Array) -> Array:
        """The image as it is evaluated: normalised only."""
        image = to_float(image)
        return self.normalise(image) if self.normalise else image

    def view(self, key: Array, image: Array, transform: Transform | None = None) -> Array:
        """One training view of one image; without ``transform`` the clean one."""
        base_key, erase_key = jax.random.split(key)
        if self.base:
            image = self.base(base_key, image)
        if transform is not None:
            image = augment(image, transform, self.space)
        image = self.plain(image)
        return self.erase(erase_key, image) if self.erase else image


def choose_proposals(
    losses: Float[Array, "n m b"],
    uniforms: Float[Array, "moves m b"],
    sampler: str = "metropolis_hastings",
    kappa: int | float = 0.0,
    variant: str = "paper",
) -> Chain:
    """Which proposal each chain ends at.

    Args:
      losses: of ``n`` proposals for each of ``m`` chains of ``B`` examples.
      uniforms: ``[n - 1, m, B]`` in [0, 1), one per move.
      sampler: ``metropolis_hastings`` towards the density ``[loss - kappa]_+``, or the proposal of highest loss
        (``adversarial``; with ``adversarial_identity`` one of the proposals is the clean image).
      kappa: losses at or below count as 0.
      variant: ``official`` does not leave a state of density 0 for another such.

    Raises:
      ValueError: an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    if sampler == "metropolis_hastings":
        return metropolis_hastings(losses - kappa, uniforms, "reject" if variant == "official" else "accept")
    known = jnp.where(jnp.isnan(losses), -jnp.inf, losses)
    return Chain(jnp.argmax(known, axis=0).astype(jnp.int32), jnp.zeros((0, *losses.shape[1:]), bool))


def keep_clean(uniforms: Float[Array, "b"], gamma: Float[Array, ""]) -> Bool[Array, "b"]:
    """Which examples stay clean where the Lagrangian is sampled: each with probability 1 / (1 + gamma)."""
    return uniforms < 1.0 / (1.0 + gamma)


def invariance_constrained(
    host: Objective,
    space: AugmentationSpace,
    epsilon: int | float,
    dual_rate: int | float = 1e-4,
    steps: int = 2,
    chains: int = 1,
    *,
    sampler: str = "metropolis_hastings",
    sample: bool = False,
    dual_start: int | float | None = None,
    kappa: int | float = 0.0,
    base: Augmentation | None = None,
    normalise: Callable[[Array], Array] | None = None,
    erase: Augmentation | None = None,
    inputs: str = "x",
    keep_statistics: bool = False,
    epochs: int = 1,
    variant: str = "paper",
) -> Objective:
    """The host's loss subject to ``augmented loss <= epsilon``.

    A training step makes ``steps * chains`` proposals per example in one forward pass without gradient, chooses, and
    runs the clean and the chosen views with gradient: ``n m`` forward and ``1 + m`` forward and backward passes.  It
    descends on ``l + gamma (l_c - epsilon)`` and then ascends on gamma with the global slack.  Loss transformations
    act on the clean elements.  The state is the collection ``invariance``: ``duals [1]``, ``rising [1]`` (steps in a
    row in which gamma rose) and ``counts [epochs, ops, levels]`` of the chosen transformations.

    ``variant="official"`` does as the released code: a zero loss is not left for a zero loss, and proposals update
    the batch statistics.

    Args:
      host: its batch field ``inputs`` holds images: uint8, or floats in [0, 1], before normalisation.
      space: of the transformations.
      epsilon: the level the constrained loss must reach, above ``kappa``.
      dual_rate: of gamma; 0 keeps it (a penalty method).
      steps: n, proposals per chain; 1 is uniform augmentation, and then no proposal is evaluated.
      chains: m, augmented views per example.
      sampler: see :func:`choose_proposals`.
      sample: one forward pass on a mixture, each example clean with probability 1 / (1 + gamma), instead of two; the
        dual variable then sees the losses of the chosen proposals.
      dual_start: gamma_0; by default 0, or 1 with several chains.
      kappa: see :func:`choose_proposals`; hosts whose losses can be negative need their lowest value here.
      base, normalise, erase: see :class:`Views`.
      inputs: the batch field.
      keep_statistics: whether proposals update batch statistics.
      epochs: rows of ``counts``; later epochs are added to the last.
      variant: ``"paper"`` or ``"official"``.

    Raises:
      ValueError: a setting that cannot work, by name.
      CompositionError: a host whose loss belongs to no example.
    """
    if not epsilon > kappa:
        raise ValueError(
            f"epsilon must be above {kappa:g} (kappa), got {epsilon}: no loss would satisfy the constraint and gamma "
            "would grow without end; for a fixed penalty set dual_rate=0"
        )
    if steps < 1 or chains < 1 or epochs < 1:
        raise ValueError(f"steps, chains and epochs must be at least 1, got {steps}, {chains} and {epochs}")
    if dual_rate < 0:
        raise ValueError(f"dual_rate must not be negative, got {dual_rate}")
    if variant not in ("paper", "official"):
        raise ValueError(f"variant must be 'paper' or 'official', got {variant!r}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
    if sampler == "adversarial_identity" and "identity" not in space.ops:
        raise ValueError("sampler 'adversarial_identity' needs the operation 'identity' in the space")
    if sample and chains > 1:
        raise ValueError(f"sample=True mixes one augmented view per example with the clean one; got chains={chains}")
    if host.unit == "batch":
        raise CompositionError(
            f"invariance_constrained needs losses of examples, but {host.name} has one loss for the whole batch"
        )
    start = dual_init([dual_start if dual_start is not None else float(chains > 1)])
    views = Views(space, base, normalise, erase)
    with_clean = sampler == "adversarial_identity"
    uniform = steps == 1 and sampler == "metropolis_hastings" and not sample
    commit = keep_statistics or variant == "official"

    def init(rng: Array, batch: Batch) -> Variables:
        if not isinstance(batch[inputs], jax.core.Tracer):
            check_images(np.asarray(batch[inputs])[np.asarray(batch_mask(batch))], f"batch field {inputs!r}")
        state = {
            "duals": start.duals,
            "rising": start.rising,
            "counts": jnp.zeros((epochs, len(space.ops), space.levels), jnp.int32),
        }
        return {**host.init(rng, {**batch, inputs: jax.vmap(views.plain)(batch[inputs])}), STATE: state}

    def forward(variables: Variables, batch: Batch, context: Context) -> tuple[Any, Variables]:
        own = {c: v for c, v in variables.items() if c != STATE}
        if not context.train:
            return host.forward(own, {**batch, inputs: jax.vmap(views.plain)(batch[inputs])}, context)
        images, b = batch[inputs], batch_rows(batch)
        clean = jax.vmap(views.view)(context.example_keys(batch, "clean view"), images)
        proposals, transforms = _propose(views, steps, chains, with_clean, batch, images, context)
        moves = jax.vmap(lambda k: jax.random.uniform(k, (steps - 1, chains)))(context.example_keys(batch, "moves"))
        moves = jnp.moveaxis(moves, 0, -1)
        mutated: dict[str, Any] = {}
        if uniform:
            chain, losses = Chain(jnp.zeros((chains, b), jnp.int32), jnp.zeros((0, chains, b), bool)), None
        else:
            flat = proposals.reshape(b, -1, *proposals.shape[3:])
            losses, changed = _proposal_losses(host, own, flat, inputs, batch, context)
            losses = losses.reshape(-1, chains, b)
            chain = choose_proposals(losses, moves, sampler, kappa, variant)
            mutated = dict(jax.lax.stop_gradient(changed)) if commit else {}
        pick = lambda v: jnp.take_along_axis(  # noqa: E731 - [b, n, m, ...] at [m, b] -> [b, m, ...]
            v, chain.index.T.reshape(b, 1, chains, *[1] * (v.ndim - 3)), axis=1
        )[:, 0]
        chosen, kept = pick(proposals), jax.tree.map(pick, transforms)
        mine = {"op": kept.op, "level": kept.level, "accepted": jnp.moveaxis(chain.accepted, -1, 0)}
        if sample:
            mine["losses"] = pick(jnp.moveaxis(losses, -1, 0))[:, 0]
            coins = jax.vmap(jax.random.uniform)(context.example_keys(batch, "clean or not"))
            still = keep_clean(coins, variables[STATE]["duals"][0]).reshape(b, *[1] * (images.ndim - 1))
            mixed = jnp.where(still, clean, chosen[:, 0])
            outputs, changed = host.forward({**own, **mutated}, {**batch, inputs: mixed}, context)
            return {**_named(outputs, host), STATE: mine}, {**mutated, **changed}
        outputs, changed = host.forward({**own, **mutated}, {**batch, inputs: clean}, context)
        mutated |= changed
        copies = _copies(batch, chosen, inputs, 1 + proposals.shape[1] * chains)
        augmented, changed = host.forward({**own, **mutated}, copies, context)
        mine["augmented"] = _by_example(augmented, b)
        return {**_named(outputs, host), STATE: mine}, {**mutated, **changed}

    def constraint(mine: dict, batch: Batch, context: Context) -> Float[Array, ""]:
        if sample:
            mask = batch_mask(batch)
            return jnp.sum(jnp.where(mask, mine["losses"], 0.0)) / jnp.maximum(jnp.sum(mask), 1)
        each = [
            REDUCERS[host.reduce](host.loss(_copy(mine["augmented"], j), batch, context).elements)
            for j in range(chains)
        ]
        return sum(each) / chains

    def value(outputs: Any, batch: Batch, context: Context) -> Loss:
        if STATE not in outputs:
            return host.loss(outputs, batch, context)
        mine, theirs = outputs[STATE], {k: v for k, v in outputs.items() if k != STATE}
        loss = host.loss(theirs, batch, context)
        state = context.collections[STATE]
        found = constraint(mine, batch, context)
        rising = state["rising"][0] / jnp.maximum(context.steps_per_epoch, 1)
        metrics = {"gamma": state["duals"][0], "constraint": found, "epochs_rising": rising}
        if mine["accepted"].shape[1]:
            metrics["acceptance"] = acceptance_rate(mine["accepted"], batch_mask(batch))
        terms = loss.terms
        if not sample:
            bound = jnp.full(1, epsilon, jnp.float32)
            terms = {**terms, "penalty": lagrangian(jnp.zeros(()), found[None], state["duals"], bound)}
        return loss.replace(terms=terms, metrics={**loss.metrics, **jax.lax.stop_gradient(metrics)})

    def after_step(variables: Variables, outputs: Any, batch: Batch, context: Context) -> Variables:
        mine, theirs = outputs[STATE], {k: v for k, v in outputs.items() if k != STATE}
        state, before = variables[STATE], {c: v for c, v in variables.items() if c != STATE}
        known = context.replace(collections={c: v for c, v in variables.items() if c != "params"})
        slack = constraint(mine, batch, known) - epsilon
        dual = dual_ascent(DualState(state["duals"], state["rising"]), slack[None], dual_rate)
        mask = jnp.broadcast_to(batch_mask(batch)[:, None], mine["op"].shape)
        counts = transform_counts(Transform(mine["op"], mine["level"], None), mask, space)
        epoch = jnp.minimum(context.epoch, epochs - 1)
        new = {"duals": dual.duals, "rising": dual.rising, "counts": state["counts"].at[epoch].add(counts)}
        changed = host.after_step(before, theirs, batch, context) if host.after_step else {}
        return {**changed, STATE: new}

    return dataclasses.replace(
        host,
        init=init,
        forward=forward,
        loss=value,
        after_step=after_step,
        name=f"invariance_constrained({host.name})",
    )


def acceptance_rate(accepted: Bool[Array, "b moves m"], mask: Bool[Array, "b"]) -> Float[Array, ""]:
    """The share of moves made, over real rows."""
    made = jnp.sum(jnp.where(mask[:, None, None], accepted, False))
    return made / jnp.maximum(jnp.sum(mask) * accepted.shape[1] * accepted.shape[2], 1)


def operation_shares(counts: Int[Array | np.ndarray, "epochs ops levels"]) -> tuple[np.ndarray, np.ndarray]:
    """What the model found hard, on the host.

    Returns:
      ``[epochs, ops]``: each operation's share of the chosen transformations, and ``[epochs, ops]``: the mean level
      of its uses; 0 where an operation (or an epoch) has none.
    """
    counts = np.asarray(counts, np.float64)
    uses = counts.sum(-1)
    levels = counts @ np.arange(counts.shape[-1])
    return uses / np.maximum(uses.sum(-1, keepdims=True), 1), levels / np.maximum(uses, 1)


def rising_warning(rising: int, steps_per_epoch: int, epsilon: float, gamma: float) -> str | None:
    """What to tell a user whose gamma has grown at every step of an epoch or more; ``None`` if it has not."""
    if rising < steps_per_epoch:
        return None
    return (
        f"warning: gamma has grown at each of the last {rising} steps, to {gamma:.3g}; the constrained loss does not "
        f"reach epsilon {epsilon:g}: raise epsilon, train longer, or leave out transformations"
    )


def _propose(views, steps, chains, with_clean, batch, images, context):
    """``proposals [b, n, m, ...]`` and their transforms ``[b, n, m]``; the clean image last if it is one of them."""
    b = images.shape[0]
    number = steps * chains
    drawn = sample_transforms(context.example_keys(batch, "transforms"), views.space, number)
    transforms = jax.tree.map(lambda v: v.T.reshape(b, steps, chains), drawn)
    if with_clean:
        still = Transform(views.space.ops.index("identity"), 0, True)
        more = jax.tree.map(lambda v, s: jnp.full((b, 1, chains), s, v.dtype), transforms, still)
        transforms = jax.tree.map(lambda v, s: jnp.concatenate([v, s], 1), transforms, more)
    shape = transforms.op.shape[1:]
    each = jax.vmap(jax.vmap(views.view, (0, None, 0)))
    split = lambda k: jax.random.split(k, shape[0] * shape[1])  # noqa: E731
    keys = jax.vmap(split)(context.example_keys(batch, "proposal views"))
    proposals = each(keys, images, jax.tree.map(lambda v: v.reshape(b, -1), transforms))
    return proposals.reshape(b, *shape, *proposals.shape[2:]), transforms


def _proposal_losses(host, variables, proposals, inputs, batch, context):
    """Losses ``[proposals, b]`` of this device's rows, each computed on the global batch, without gradient.

    ``proposals [b, k, ...]`` run as one batch of ``b k``.
    """
    b, number = proposals.shape[:2]
    frozen = jax.lax.stop_gradient(variables)
    outputs, mutated = host.forward(frozen, _copies(batch, proposals, inputs, 1), context)
    wanted = {k: v for k, v in batch.items() if host.gathers is None or k in (*host.gathers, "index", "mask", "row")}
    outputs, whole = (_whole(jax.lax.stop_gradient(t), context.axis_name) for t in (_by_example(outputs, b), wanted))
    known = context.replace(batch=whole, collections={c: v for c, v in frozen.items() if c != "params"})
    rows = batch_rows(whole)
    each = [to_examples(host.loss(_copy(outputs, j), whole, known).elements, rows).values for j in range(number)]
    losses = jax.lax.stop_gradient(jnp.stack(each))
    if context.axis_name is not None:
        losses = jax.lax.dynamic_slice_in_dim(losses, jax.lax.axis_index(context.axis_name) * b, b, 1)
    return losses, mutated


def _copies(batch: Batch, images: Array, inputs: str, first: int) -> Batch:
    """A batch of ``b k`` rows, k copies of each example with ``images [b, k, ...]`` for its own."""
    b, number = images.shape[:2]
    repeated = {k: jnp.repeat(v, number, axis=0) for k, v in batch.items() if k != inputs}
    rows = batch["row"] if "row" in batch else jnp.arange(b, dtype=jnp.int32)
    apart = _ROWS_APART * (first + jnp.arange(number, dtype=jnp.int32))
    return {
        **repeated,
        inputs: images.reshape(b * number, *images.shape[2:]),
        "row": (rows[:, None] + apart).reshape(-1),
    }


def _by_example(outputs: Any, b: int) -> Any:
    """Outputs of ``b k`` rows as ``[b, k, ...]``."""
    return _map(lambda v: v.reshape(b, v.shape[0] // b, *v.shape[1:]), outputs)


def _copy(outputs: Any, j: int) -> Any:
    """The outputs of every example's copy ``j``."""
    return _map(lambda v: v[:, j], outputs)


def _whole(tree: Any, axis_name: str | None) -> Any:
    """The global batch under ``pmap``, in global order."""
    if axis_name is None:
        return tree
    return _map(lambda v: jax.lax.all_gather(v, axis_name, axis=0, tiled=True), tree)


def _map(f: Callable[[Array], Array], tree: Any) -> Any:
    # outputs without a batch axis stay as they are
    own = lambda v: v if isinstance(v, Shared) or jnp.ndim(v) == 0 else f(v)  # noqa: E731
    return jax.tree.map(own, tree, is_leaf=lambda v: isinstance(v, Shared))


def _named(outputs: Any, host: Objective) -> dict:
    if not isinstance(outputs, dict):
        raise CompositionError(f"invariance_constrained needs a host whose outputs have names; {host.name} has none")
    return outputs


CARD = Card(
    name="invariance_augment",
    family="representation",
    title="Augmentation by Invariance-Constrained Learning",
    year=2023,
    kind="objective",
    idea=(
        "Asks for invariance as a constraint instead of searching an augmentation policy: the loss under "
        "transformations, weighted towards those of high loss, must stay below epsilon. A few Metropolis-Hastings "
        "moves sample the transformations, and a dual variable turns augmentation on while the constraint is violated "
        "and off when it is slack."
    ),
    citation=(
        "Hounie, Chamon, Ribeiro. Automatic Data Augmentation via Invariance-Constrained Learning. ICML 2023, PMLR "
        "202, 13410-13433, arXiv 2209.15031"
    ),
    plugs_into=(
        "any host with losses of examples, on images",
        "classifiers",
        "SimCLR, MoCo, supervised contrastive, metric learning",
    ),
    pieces=(
        "Views",
        "choose_proposals",
        "keep_clean",
        "invariance_constrained",
        "acceptance_rate",
        "operation_shares",
        "rising_warning",
        "zoo.ops.augmentation:AugmentationSpace",
        "zoo.ops.augmentation:fixed_standard",
        "zoo.ops.augmentation:wide_standard",
        "zoo.ops.augmentation:sample_transforms",
        "zoo.ops.augmentation:augment",
        "zoo.ops.metropolis:metropolis_hastings",
        "zoo.optim.dual:dual_ascent",
        "zoo.optim.dual:lagrangian",
        "zoo.nn.wide_resnet:WideResNet",
    ),
    claim=Claim(
        statement=(
            "On digits whose two classes differ by a half-turn, with harmful rotations among the transformations, "
            "invariance-constrained training classifies displaced digits more accurately than training on uniformly "
            "drawn transformations"
        ),
        metric="accuracy",
        effect=0.01,
        method="constrained",
        baseline="uniform",
        trivial="no augmentation",
        remark=(
            "Uniform augmentation is better on every seed, by the same steps: it trains on a transformed view at "
            "weight 1 throughout, while gamma peaks below 0.3 and falls to about 0 once the constraint is met. The "
            "constraint is worth many points over no augmentation, gamma rises and then decays, and rotations are "
            "chosen nearly twice as often as uniformly, as the paper says"
        ),
    ),
    cost="per step n m forward passes without gradient and 1 + m with: about 2.7 times plain training at n = 2, m = 1",
    official_code="https://github.com/ihounie/daug",
    departures=(
        "proposals leave the batch statistics alone; the code's update them",
        "a state of loss 0 is always left; the code keeps it if the proposal's loss is 0 too",
        "the logged penalty is gamma (l_c - epsilon), the Lagrangian; the code logs gamma l_c, with the same gradient",
    ),
)
