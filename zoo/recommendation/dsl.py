"""DSL: dynamic sparse learning of recommenders, as one gradient transformation around any optimiser.

Wang, Sui, Wu, Zheng and Xiong, "Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation", WSDM 2024
(arXiv 2402.02855).  A recommender is mostly embedding tables.  Instead of training them dense and pruning afterwards, a
random mask of the wanted density is drawn before the first step and the parameter budget never grows again: only active
weights hold values, and every ``update_interval`` steps the smallest active weights are dropped while as many inactive
ones, those with the largest loss gradient, are activated.  The share exchanged falls along a cosine.

Symbols: weights ``w``, mask ``m``, gradient ``g``, density ``s``, update ratio ``rho_t``, interval ``dT``, total steps
``T``, fired weights ``f`` (ever active). Memory and multiplications saved are *counted* (``nnz``): the arrays stay
dense with exact zeros.

Departures from the released code: growth breaks ties by a random key (the code favours what its sort returns first, and
on ties may spend growth on weights that are active already); ``random`` growth activates exactly the number removed
and ``set`` pruning takes the weights nearest zero on both sides (``variant="official"`` restores the code's Bernoulli
growth and its rule for negative weights); the cosine stays at its minimum after ``T``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from zoo.base import suggest
from zoo.catalogue import Card, Claim
from zoo.ops.masks import (
    AnyKey,
    Scalar,
    bernoulli_grow,
    check_density,
    gradient_grow,
    lottery_ticket_masks,
    magnitude_prune,
    random_mask,
    set_prune,
    taylor_prune,
    threshold_prune,
)

Maskable = Callable[[str, Any], bool]
"""``(path, leaf) -> bool``: which parameters may be masked; ``path`` joins the keys with ``/``."""

PRUNE = ("magnitude", "taylor", "set", "threshold")
GROW = ("gradient", "momentum", "random", "random_unfired")
MASK_INIT = ("uniform", "exact", "lottery_ticket")
DECAY = ("cosine", "linear")
SCOPE = ("per_tensor", "global")
VARIANT = ("paper", "official")


# --- which parameters -------------------------------------------------------------------------------------------------


def everything(path: str, leaf: Any) -> bool:
    """The released code's choice for LightGCN and Mult-VAE: every parameter, biases included."""
    return True


def matrices(path: str, leaf: Any) -> bool:
    """Only tensors of two or more axes: biases and normalisation scales stay dense."""
    return leaf.ndim >= 2


def named(*names: str) -> Maskable:
    """Parameters whose path has one of ``names`` as a component (NeuMF: ``named("mlp_user", "mlp_item")``)."""
    return lambda path, leaf: any(name in path.split("/") for name in names)


# --- stage 1: sparsity initialisation ---------------------------------------------------------------------------------


def initial_masks(
    params: PyTree,
    *,
    density: float | int,
    key: AnyKey,
    mask_init: str = "uniform",
    maskable: Maskable = everything,
) -> PyTree:
    """The masks a run starts with: a tree like ``params`` of bool arrays, ``optax.MaskedNode()`` where not maskable.

    Depends on ``key`` and the shapes only (``lottery_ticket``: on the weights, masked already or not).

    Raises:
      ValueError: density outside (0, 1], an unknown ``mask_init``, or no maskable parameter.
    """
    check_density(density)
    _check_name(mask_init, MASK_INIT, "mask_init")
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    chosen = [i for i, (path, leaf) in enumerate(flat) if _is_maskable(path, leaf, maskable)]
    if not chosen:
        raise ValueError(f"no maskable parameter: check `maskable` ({len(flat)} parameters, none selected)")
    masks: list[Any] = [optax.MaskedNode()] * len(flat)
    if mask_init == "lottery_ticket":
        found = lottery_ticket_masks([flat[i][1] for i in chosen], density)
    else:
        keys = [jax.random.fold_in(key, n) for n in range(len(chosen))]
        shapes = [flat[i][1].shape for i in chosen]
        found = [random_mask(k, s, density, mask_init == "exact") for k, s in zip(keys, shapes, strict=True)]
    for i, mask in zip(chosen, found, strict=True):
        masks[i] = mask
    return jax.tree.unflatten(tree, masks)


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """``w * m`` with exact zeros; parameters without a mask pass unchanged."""

    def one(m, w):
        return w if isinstance(m, optax.MaskedNode) else jnp.where(m, w, jnp.zeros((), w.dtype))

    return jax.tree.map(one, mask, params, is_leaf=_no_mask)


def dynamic_sparse_init(
    params: PyTree,
    *,
    density: float | int,
    key: AnyKey,
    mask_init: str = "uniform",
    maskable: Maskable = everything,
) -> PyTree:
    """Initial parameters on the initial mask; give it what :func:`dynamic_sparse` is given.

    An optimiser cannot change the parameters before its first update, so whoever initialises them calls this, that the
    first gradient too is taken at masked weights.
    """
    masks = initial_masks(params, density=density, key=key, mask_init=mask_init, maskable=maskable)
    return apply_mask(params, masks)


# --- stage 2: how much is exchanged -----------------------------------------------------------------------------------


def cosine_update_ratio(t: Scalar, total: Scalar, first: float | int, last: float | int = 0.005) -> Float[Array, ""]:
    """``rho_t = last + (first - last) / 2 * (1 + cos(pi t / T))``, and ``last`` after ``T``."""
    progress = jnp.clip(jnp.asarray(t) / total, 0.0, 1.0)
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * progress))


def linear_update_ratio(
    t: Scalar, first: float | int, factor: float | int = 0.99, every: int = 600
) -> Float[Array, ""]:
    """``rho_t = first * factor ** floor(t / every)`` (what the code's ``LinearDecay`` is meant to be)."""
    return first * jnp.asarray(factor, jnp.float32) ** (jnp.asarray(t) // every)


# --- stage 3: prune and grow ---------------------------------------------------------------------------------------


def exchange(
    w: Float[Array, "*n"],
    g: Float[Array, "*n"],
    mask: Bool[Array, "*n"],
    fired: Bool[Array, "*n"],
    ratio: Scalar,
    key: AnyKey,
    *,
    prune: str = "magnitude",
    grow: str = "gradient",
    momentum: Float[Array, "*n"] | None = None,
    threshold: float | int = 1e-3,
    variant: Literal["paper", "official"] = "paper",
) -> Bool[Array, "*n"]:
    """One exploration of one tensor: prunes ``ceil(ratio * nnz)`` weights, grows as many as were removed.

    Args:
      w: weights, zero where the mask is off.
      g: dense gradient of the loss at the masked weights.
      mask, fired: active weights; ever active weights (read by ``grow="random_unfired"``).
      ratio: the share of active weights to exchange, in [0, 1]; may be traced.
      key: breaks ties and draws random growth; must be the same on every device.
      prune, grow: names in ``PRUNE`` and ``GROW``; ``threshold`` belongs to ``prune="threshold"``.
      momentum: what ``grow="momentum"`` scores by, ``|m / (sqrt(v) + 1e-8)|`` of Adam.
    """
    _check_name(prune, PRUNE, "prune")
    _check_name(grow, GROW, "grow")
    tie, draw = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    active = jnp.sum(mask)
    n_remove = jnp.minimum(jnp.ceil(ratio * active).astype(jnp.int32), active)
    if prune == "magnitude":
        kept = magnitude_prune(w, mask, n_remove, variant)
    elif prune == "taylor":
        kept = taylor_prune(w, g, mask, n_remove, tie)
    elif prune == "set":
        kept = set_prune(w, mask, n_remove, variant)
    else:
        kept = threshold_prune(w, mask, threshold)
    n_grow = active - jnp.sum(kept)
    if grow == "random":
        if variant == "official":
            return bernoulli_grow(kept, n_grow, draw)
        return gradient_grow(jnp.zeros(mask.shape), kept, n_grow, draw)
    if grow == "random_unfired":
        return gradient_grow((~fired).astype(jnp.float32), kept, n_grow, draw)
    score = g if grow == "gradient" else momentum
    return gradient_grow(jnp.abs(score), kept, n_grow, draw)


def mask_stats(mask: PyTree, fired: PyTree) -> dict[str, Array]:
    """Counted, not realised, sparsity: ``nnz`` of ``total`` weights, ``density``, and ``exploration = sum f / N``.

    One multiply-add per active weight and use, so ``density`` is also the share of a layer's MACs.
    """
    masks, ever = jax.tree.leaves(mask), jax.tree.leaves(fired)
    total = sum(m.size for m in masks)
    nnz = sum(jnp.sum(m) for m in masks)
    explored = sum(jnp.sum(f) for f in ever)
    return {"nnz": nnz, "total": jnp.asarray(total), "density": nnz / total, "exploration": explored / total}


# --- the transformation -----------------------------------------------------------------------------------------------


class DynamicSparseState(NamedTuple):
    """State of :func:`dynamic_sparse`.

    Attributes:
      mask: bool tree like the parameters (``optax.MaskedNode()`` where not maskable).
      fired: bool tree, weights that were ever active.
      count: i32 scalar, updates done.
      key: u32 key data; exploration ``t`` uses ``fold_in(key, t)``.  The same on all devices.
      refused: i32 scalar, explorations at which the mask was left alone because a gradient or weight was not finite.
      inner_state: the wrapped optimiser's.
    """

    mask: Any
    fired: Any
    count: Any
    key: Any
    refused: Any
    inner_state: Any


def dynamic_sparse(
    inner: optax.GradientTransformation,
    *,
    density: float | int,
    update_interval: int | None,
    update_ratio: float | int = 0.5,
    total_steps: int,
    key: AnyKey,
    prune: str = "magnitude",
    grow: str = "gradient",
    mask_init: str = "uniform",
    scope: str = "per_tensor",
    decay: str = "cosine",
    min_ratio: float | int = 0.005,
    maskable: Maskable = everything,
    threshold: float | int = 1e-3,
    reset_moments_on_grow: bool = False,
    variant: str = "paper",
) -> optax.GradientTransformationExtraArgs:
    """Trains under a fixed sparse budget with any optimiser: the brief's steps 1 to 5 around ``inner``.

    The update it returns always lands the parameters on masked weights, exact zeros included, whatever it was given:
    ``apply_updates(params, updates)`` is ``(params + u) * mask``, where ``u`` is what ``inner`` returned.  Call
    :func:`dynamic_sparse_init` on fresh parameters so that the first gradient is taken at masked weights too.

    Under ``pmap`` average the gradients *before* ``update``: growth ranks them, so devices that saw different gradients
    would grow different weights.  The key lies in the state and must be the same everywhere, for the same reason.

    Args:
      inner: any optax optimiser.  It sees dense gradients; its moments are not masked.
      density: share of active weights ``s`` in (0, 1].
      update_interval: ``dT``, updates between explorations; ``None`` never explores (a static random mask).
      update_ratio: ``rho_0``, the share of active weights exchanged at first; falls to ``min_ratio``.
      total_steps: ``T`` of the cosine.
      key: draws the initial mask, breaks ties.
      prune, grow, mask_init, decay: see ``PRUNE``, ``GROW``, ``MASK_INIT``, ``DECAY``.
      scope: ``"per_tensor"`` keeps each tensor's budget; ``"global"`` ranks over all maskable tensors together.
      maskable: which parameters are masked; ``matrices`` spares biases and scales.
      threshold: of ``prune="threshold"``.
      reset_moments_on_grow: zero ``inner``'s per-parameter state where a weight is activated (RigL's convention).
      variant: see the module's docstring.

    Raises:
      ValueError: a setting out of range or an unknown name; ``update`` without params, or with a mask tree that does
        not belong to them (the first such path is named).
    """
    check_density(density)
    if update_interval is not None and update_interval < 1:
        raise ValueError(f"update_interval must be at least 1 (or None for a static mask), got {update_interval}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    for value, name in ((update_ratio, "update_ratio"), (min_ratio, "min_ratio")):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    for value, known, name in (
        (prune, PRUNE, "prune"), (grow, GROW, "grow"), (mask_init, MASK_INIT, "mask_init"),
        (decay, DECAY, "decay"), (scope, SCOPE, "scope"), (variant, VARIANT, "variant"),
    ):  # fmt: skip
        _check_name(value, known, name)
    inner = optax.with_extra_args_support(inner)
    typed = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    implementation = jax.random.key_impl(typed)
    rules = {"prune": prune, "grow": grow, "threshold": threshold, "variant": variant}

    def init(params):
        mask = initial_masks(params, density=density, key=typed, mask_init=mask_init, maskable=maskable)
        # copies: the state may be donated, so no two of its leaves (nor the caller's key) may share a buffer
        return DynamicSparseState(
            mask=mask,
            fired=jax.tree.map(jnp.copy, mask),
            count=jnp.zeros((), jnp.int32),
            key=jnp.copy(jax.random.key_data(typed)),
            refused=jnp.zeros((), jnp.int32),
            inner_state=inner.init(apply_mask(params, mask)),
        )

    def ratio_at(count):
        if decay == "linear":
            return linear_update_ratio(count, update_ratio)
        return cosine_update_ratio(count, total_steps, update_ratio, min_ratio)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("dynamic_sparse needs the parameters: call update(grads, state, params)")
        check_masks(state.mask, params)
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra)
        count = optax.safe_increment(state.count)

        tree = jax.tree.structure(params)
        p, u, masks = tree.flatten_up_to(params), tree.flatten_up_to(steps), tree.flatten_up_to(state.mask)
        chosen = [i for i, m in enumerate(masks) if not isinstance(m, optax.MaskedNode)]
        pick = lambda t: [tree.flatten_up_to(t)[i] for i in chosen]  # noqa: E731
        old, fired, g = [masks[i] for i in chosen], pick(state.fired), pick(updates)
        w = [jnp.where(masks[i], (p[i] + u[i]).astype(p[i].dtype), 0) for i in chosen]
        momentum = pick(_momentum(inner_state, params)) if grow == "momentum" else None

        def explore(_):
            ratio = ratio_at(count)
            at = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=implementation), count)
            if scope == "global":
                flat = [_concatenate(x) for x in (w, g, old, fired)]
                score = None if momentum is None else _concatenate(momentum)
                new = _split(exchange(*flat, ratio, at, momentum=score, **rules), old)
            else:
                new = [
                    exchange(
                        w[n], g[n], old[n], fired[n], ratio, jax.random.fold_in(at, n),
                        momentum=None if momentum is None else momentum[n], **rules,
                    )
                    for n in range(len(old))
                ]  # fmt: skip
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in (*g, *w)]))
            new = [jnp.where(finite, a, b) for a, b in zip(new, old, strict=True)]
            return new, jnp.where(finite, state.refused, state.refused + 1)

        if update_interval is None:
            new, refused = old, state.refused
        else:
            due = count % update_interval == 0
            new, refused = jax.lax.cond(due, explore, lambda _: (old, state.refused), None)

        def whole(parts):
            full: list[Any] = [optax.MaskedNode()] * len(masks)
            for i, part in zip(chosen, parts, strict=True):
                full[i] = part
            return jax.tree.unflatten(tree, full)

        out = list(u)
        for n, i in enumerate(chosen):
            # -p lands on an exact zero; u itself keeps the trajectory of `inner` bit by bit where nothing is masked
            out[i] = jnp.where(old[n] & new[n], u[i], -p[i])
        if reset_moments_on_grow and update_interval is not None:
            grown = whole([a & ~b for a, b in zip(new, old, strict=True)])
            inner_state = _reset(inner, inner_state, grown)
        ever = whole([a | b for a, b in zip(fired, new, strict=True)])
        return jax.tree.unflatten(tree, out), DynamicSparseState(
            whole(new), ever, count, state.key, refused, inner_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def sparse_state(optimizer_state: PyTree) -> DynamicSparseState:
    """The :class:`DynamicSparseState` inside any optimiser state (chains, ``MultiSteps``).

    Raises:
      ValueError: there is none.
    """
    is_ours = lambda x: isinstance(x, DynamicSparseState)  # noqa: E731
    found = [x for x in jax.tree.leaves(optimizer_state, is_leaf=is_ours) if is_ours(x)]
    if not found:
        raise ValueError("this optimiser state holds no DynamicSparseState; was it made by dynamic_sparse?")
    return found[0]


def check_masks(mask: PyTree, params: PyTree) -> None:
    """Raises ValueError naming the first path at which a (restored) mask tree does not belong to ``params``."""
    masks = {_path(k): v for k, v in jax.tree_util.tree_flatten_with_path(mask, is_leaf=_no_mask)[0]}
    leaves = {_path(k): v for k, v in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path in (*leaves, *masks):
        if path not in masks:
            raise ValueError(
                f"the masks do not match the parameters: {path} has no mask; was it saved for another model?"
            )
        if path not in leaves:
            raise ValueError(f"the masks do not match the parameters: there is no parameter {path} for this mask")
        if not _no_mask(masks[path]) and masks[path].shape != leaves[path].shape:
            raise ValueError(
                f"the masks do not match the parameters: {path} has shape {leaves[path].shape}, "
                f"its mask {masks[path].shape}"
            )


def _momentum(inner_state: PyTree, params: PyTree) -> PyTree:
    # what the code grows by: Adam's m / (sqrt(v) + 1e-8) without bias correction, else the momentum buffer
    mu = optax.tree.get(inner_state, "mu", None)
    nu = optax.tree.get(inner_state, "nu", None)
    trace = optax.tree.get(inner_state, "trace", None)
    if mu is not None and nu is not None:
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), mu, nu)
    if trace is not None:
        return trace
    raise ValueError("grow='momentum' needs an inner optimiser with moments (adam, or sgd with momentum)")


def _reset(inner, inner_state, grown):
    def one(moment, new):
        if isinstance(new, optax.MaskedNode) or getattr(moment, "shape", None) != new.shape:
            return moment
        return jnp.where(new, jnp.zeros((), moment.dtype), moment)

    return optax.tree.map_params(inner, one, inner_state, grown)


def _concatenate(parts):
    return jnp.concatenate([x.ravel() for x in parts])


def _split(flat, like):
    sizes = [x.size for x in like]
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]
    return [x.reshape(m.shape) for x, m in zip(jnp.split(flat, ends), like, strict=True)]


def _no_mask(x):
    return isinstance(x, optax.MaskedNode)


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_maskable(path, leaf, maskable) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and maskable(_path(path), leaf)


def _check_name(value, known, argument) -> None:
    if value not in known:
        raise ValueError(suggest(value, known, argument))


CARD = Card(
    name="dsl",
    family="recommendation",
    title="Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation",
    year=2024,
    kind="gradient transform",
    idea="Train a recommender under a fixed sparse parameter budget from the first step to inference: draw a random "
    "mask, train the active weights, and every few steps drop the smallest of them and activate as many inactive ones "
    "with the largest loss gradient; the share exchanged falls along a cosine.",
    citation="Wang, Sui, Wu, Zheng and Xiong. WSDM 2024. arXiv:2402.02855",
    plugs_into=("any optax optimiser", "lightgcn", "neumf", "multvae", "matrix factorisation"),
    pieces=(
        "dynamic_sparse",
        "dynamic_sparse_init",
        "exchange",
        "zoo.ops.masks:random_mask",
        "zoo.ops.masks:magnitude_prune",
        "zoo.ops.masks:gradient_grow",
        "cosine_update_ratio",
        "linear_update_ratio",
        "mask_stats",
        "zoo.nn.recommenders:LightGCN",
        "zoo.nn.recommenders:NeuMF",
        "zoo.nn.recommenders:MultVAE",
    ),
    claim=Claim(
        statement="At density 0.2, exploring the mask during training finds a better recommender than keeping the "
        "random mask it started with: higher full-ranking Recall@20 of BPR matrix factorisation, low-rank data.",
        metric="recall@20",
        effect=0.02,
        method="dynamic",
        baseline="static",
        trivial="popular",
    ),
    cost="O(n) elementwise per step; every update_interval steps two or three sorts, O(n log n); two masks per weight",
    official_code="https://github.com/shuyao-wang/DSL (PyTorch, no licence file)",
    departures=(
        "ties in growth are broken by a random key, and only inactive weights are candidates",
        "random growth is exact and SET pruning is symmetric; variant='official' restores the code",
        "scope='global' (budget moves between tensors) is our reconstruction of the abstract",
        "the linear schedule is what the code means: its own cannot run",
    ),
)
