"""Host objectives: what an encoder of images, series or texts is commonly trained with.

Each returns an :class:`zoo.base.Objective`, so that any loss transformation whose needs it ``provides`` goes on it
(``zoo compose`` prints the whole matrix).  An encoder is a Linen module ``(x [B, ...]) -> [B, d]``.  A host of two
views also takes modules that return a dict: its ``projection`` is what the host compares, and every further array
``K`` becomes the outputs ``K1`` and ``K2`` of the two views, which is how heads and temperatures reach a
transformation.

``provides`` names, beside outputs and fields, the kind of a loss: ``contrastive`` (in-batch log-sum-exp; ``instances``
if an example's only positive is its other view), ``queue``, ``negcos``, ``cross_correlation``, ``similarity`` (pairs
within the batch).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.base import Elements, Loss, Objective, Shared, batch_mask, example_elements, named_key
from zoo.losses.classification import label_smoothing_ce
from zoo.losses.contrastive import nt_xent_per_example, unit_rows
from zoo.losses.pairs import pair_masks, rank_n_contrast, supervised_contrastive
from zoo.losses.proxies import arcface_logits, cosface_logits, proxy_anchor, proxy_nca
from zoo.losses.siamese import barlow_twins as barlow_twins_loss
from zoo.losses.siamese import cross_correlation, negative_cosine
from zoo.objectives import apply_module, init_module
from zoo.ops.queues import enqueue, init_queue

Augment = Callable[[Any, Any], tuple[Any, Any]]


def two_views(
    module: nn.Module,
    augment: Augment,
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    inputs: str = "x",
    name: str = "two views",
) -> Objective:
    """Two augmented views of each example through one encoder, compared across the global batch.

    Args:
      module: ``(x [B, ...]) -> z [B, d]`` or a dict with ``projection``; both views go through it as one batch of 2B.
      augment: ``(key, x_i) -> (view, view)`` for one example, vmapped with per-example keys.
      loss: ``(z1 [B, d], z2 [B, d], mask [B]) -> [B]``.
      inputs: the batch field that is augmented.
      name: for messages.
    """

    def value(outputs, batch, context):
        return Loss(example_elements(loss(outputs["z1"], outputs["z2"], batch_mask(batch)), batch))

    return _view_host(module, augment, value, inputs, name)


def simclr(
    module: nn.Module,
    augment: Augment,
    temperature: float = 0.2,
    positive_in_denominator: bool = True,
    inputs: str = "x",
) -> Objective:
    """SimCLR: NT-Xent between the views of the global batch (Chen et al., ICML 2020, equation 1).

    Args:
      module, augment, inputs: see :func:`two_views`.
      temperature: positive.
      positive_in_denominator: False leaves the anchor's own positive out of the denominator.
    """

    def value(outputs, batch, context):
        mask = batch_mask(batch)
        if positive_in_denominator:
            return Loss(example_elements(nt_xent_per_example(outputs["z1"], outputs["z2"], temperature, mask), batch))
        values = _views_contrasted(outputs, jnp.arange(mask.shape[0]), mask, temperature, False)
        return Loss(example_elements(values, batch))

    return _view_host(module, augment, value, inputs, "simclr", ("contrastive", "instances"))


def supervised_contrast(
    module: nn.Module,
    augment: Augment | None = None,
    temperature: float = 0.1,
    label: str = "label",
    inputs: str = "x",
    weights: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """SupCon over the views of the global batch: equal labels are positives (Khosla et al., 2020, equation 2).

    Args:
      module, augment, inputs: see :func:`two_views`; without ``augment`` each example has one view, and an example
        that shares its label with no other costs 0.
      temperature: positive.
      label: the batch field whose equal values are positives: classes, or binned targets.
      weights: optional ``(label differences [n, n]) -> log-weights`` of candidates in the denominator.
    """

    def value(outputs, batch, context):
        mask = batch_mask(batch)
        values = _views_contrasted(outputs, batch[label], mask, temperature, True, weights)
        return Loss(example_elements(values, batch))

    return _view_host(module, augment, value, inputs, "supervised contrastive", ("contrastive", label), label)


def ordinal_contrast(
    module: nn.Module,
    augment: Augment | None = None,
    temperature: float = 2.0,
    label: str = "label",
    inputs: str = "x",
) -> Objective:
    """Rank-N-Contrast on negative Euclidean distances, for ordered labels (Zha et al., NeurIPS 2023, equation 2).

    Args: see :func:`supervised_contrast`; the label may be any number per example.
    """

    def value(outputs, batch, context):
        z, y, mask = _stacked(outputs, batch[label].astype(jnp.float32), batch_mask(batch))
        square = jnp.sum(jnp.square(z), 1)
        gaps = jnp.maximum(square[:, None] + square[None, :] - 2 * jnp.matmul(z, z.T, precision="highest"), 0.0)
        same = gaps <= 1e-12
        similarity = -jnp.where(same, 0.0, jnp.sqrt(jnp.where(same, 1.0, gaps)))
        candidates = mask[:, None] & mask[None, :] & ~jnp.eye(len(z), dtype=bool)
        values = rank_n_contrast(similarity, jnp.abs(y[:, None] - y[None, :]), candidates, temperature)
        return Loss(example_elements(_per_example(values, outputs), batch))

    return _view_host(module, augment, value, inputs, "ordinal contrastive", (label,), label)


def moco(
    module: nn.Module,
    augment: Augment,
    temperature: float = 0.1,
    queue: int = 4096,
    momentum: float = 0.99,
    inputs: str = "x",
) -> Objective:
    """MoCo: queries against the keys of a momentum encoder and a queue of past keys, both orders of the views.

    He et al., CVPR 2020, equations 1 and 2; symmetric as in MoCo v3.  The momentum encoder's parameters are the
    collection ``teacher`` and move after each update; the keys of the second views join the queue ``memory``.  Batch
    statistics are those of the global batch on every device, so there is nothing that shuffling would hide.

    Args:
      module, augment, inputs: see :func:`two_views`; the queue keeps every array of the module's dict.
      temperature: positive.
      queue: keys kept, at least the global batch.
      momentum: of the momentum encoder, in [0, 1).

    Raises:
      ValueError: a momentum outside [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    host = _view_host(module, augment, lambda outputs, batch, context: None, inputs, "moco")

    def student(variables):
        return {c: v for c, v in variables.items() if c not in ("teacher", "memory")}

    def init(rng, batch):
        variables = dict(host.init(rng, batch))
        like = jax.eval_shape(lambda: _named(module.apply(variables, batch[inputs])))
        like = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in like.items() if not isinstance(v, Shared)}
        memory = init_queue(queue, like)
        # the queue starts with random keys, as published: an empty one would make the first steps free
        draw = lambda path, x: jax.random.normal(named_key(rng, jax.tree_util.keystr(path)), x.shape)  # noqa: E731
        memory["rows"] = jax.tree_util.tree_map_with_path(draw, memory["rows"])
        memory["filled"] = jnp.ones(queue, bool)
        return {**variables, "teacher": jax.tree.map(jnp.copy, variables["params"]), "memory": memory}

    def forward(variables, batch, context):
        outputs, mutated = host.forward(student(variables), batch, context)
        # the momentum encoder's batch statistics stay uncommitted
        keys, _ = host.forward({**student(variables), "params": variables["teacher"]}, batch, context)
        keys = jax.lax.stop_gradient({k: v for k, v in keys.items() if k != "embedding"})
        return {**outputs, "keys": keys}, mutated

    def value(outputs, batch, context):
        mask, memory = batch_mask(batch), context.collections["memory"]
        past = unit_rows(memory["rows"]["projection"])

        def order(z, k):
            z, k = unit_rows(z, mask), unit_rows(k, mask)
            positive = jnp.sum(z * k, 1) / temperature
            negatives = jnp.matmul(z, past.T, precision="highest") / temperature
            every = jnp.concatenate([positive[:, None], negatives], 1)
            keep = jnp.concatenate(
                [jnp.ones((len(z), 1), bool), jnp.broadcast_to(memory["filled"], negatives.shape)], 1
            )
            return jax.nn.logsumexp(every, axis=1, where=keep) - positive

        keys = outputs["keys"]
        values = (order(outputs["z1"], keys["z2"]) + order(outputs["z2"], keys["z1"])) / 2
        return Loss(example_elements(values, batch))

    def after_step(variables, outputs, batch, context):
        moved = jax.tree.map(lambda t, p: momentum * t + (1 - momentum) * p, variables["teacher"], variables["params"])
        rows = {k: outputs["keys"]["z2" if k == "projection" else f"{k}2"] for k in variables["memory"]["rows"]}
        return {"teacher": moved, "memory": enqueue(variables["memory"], rows, batch_mask(batch))}

    return Objective(
        init, forward, value, "example", (*host.provides, "queue", "teacher"), after_step=after_step,
        gathers=host.gathers, name="moco",
    )  # fmt: skip


def simsiam(module: nn.Module, augment: Augment, inputs: str = "x") -> Objective:
    """SimSiam: each view predicts the other's stopped projection (Chen and He, CVPR 2021, equation 2).

    Args:
      module: returns a dict with ``projection`` and ``prediction`` ``[B, d]`` (``zoo.nn.siamese.Siamese``).
      augment, inputs: see :func:`two_views`.
    """

    def value(outputs, batch, context):
        if "prediction1" not in outputs:
            raise ValueError(
                "simsiam needs a module that returns 'prediction' beside 'projection', such as zoo.nn.siamese.Siamese"
            )
        first = negative_cosine(outputs["prediction1"], outputs["z2"])
        return Loss(example_elements((first + negative_cosine(outputs["prediction2"], outputs["z1"])) / 2, batch))

    return _view_host(module, augment, value, inputs, "simsiam", ("negcos",))


def barlow_twins(
    module: nn.Module,
    augment: Augment,
    off_diagonal: float = 5e-3,
    scale: float = 1.0,
    unbiased: bool = False,
    inputs: str = "x",
) -> Objective:
    """Barlow Twins: the views' cross-correlation should be the identity (Zbontar et al., ICML 2021, equation 1).

    Its loss belongs to no example: one element of unit ``batch``.

    Args:
      module, augment, inputs: see :func:`two_views`.
      off_diagonal: weight of the off-diagonal terms.
      scale: multiplies the loss (1/40 in the released code).
      unbiased: see :func:`zoo.losses.siamese.cross_correlation`.
    """

    def value(outputs, batch, context):
        correlation = cross_correlation(outputs["z1"], outputs["z2"], batch_mask(batch), unbiased)
        return Loss(batch_element(scale * barlow_twins_loss(correlation, off_diagonal)))

    return _view_host(module, augment, value, inputs, "barlow twins", ("cross_correlation",), unit="batch")


def metric_learning(
    module: nn.Module,
    loss: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    compare: str = "cosine",
    label: str = "label",
    inputs: str = "x",
    reduce: str = "mean",
    name: str | None = None,
) -> Objective:
    """Any loss of ``zoo.losses.pairs`` between the examples of the global batch.

    Args:
      module: the encoder; its outputs are compared on the unit sphere.
      loss: ``(similarity [B, B], positive, negative) -> [B]``.
      compare: what the loss is given: cosines, or Euclidean distances of the unit vectors.
      label: the batch field of classes.
      inputs: the batch field that is encoded.
      reduce: ``mean``, or ``nonzero_mean`` over the anchors that cost something.
      name: for messages; by default the loss's.
    """
    if compare not in ("cosine", "distance"):
        raise ValueError(f"compare must be 'cosine' or 'distance', got {compare!r}")

    def value(outputs, batch, context):
        mask = batch_mask(batch)
        z = unit_rows(outputs["embedding"], mask)
        cosine = jnp.matmul(z, z.T, precision="highest")
        compared = cosine if compare == "cosine" else jnp.sqrt(jnp.maximum(2.0 - 2.0 * cosine, 1e-8))
        return Loss(example_elements(loss(compared, *pair_masks(batch[label], mask=mask)), batch))

    return Objective(
        init=lambda rng, batch: init_module(module, rng, batch, batch[inputs]),
        forward=functools.partial(_embed, module, inputs),
        loss=value,
        provides=("embedding", label, "index", "similarity"),
        gathers=(label,),
        reduce=reduce,
        name=name or getattr(loss, "__name__", "metric learning").replace("_", " "),
    )


def proxies(
    module: nn.Module,
    num_classes: int,
    loss: str = "proxy_anchor",
    label: str = "label",
    inputs: str = "x",
    **settings: Any,
) -> Objective:
    """Proxy losses: one learned vector per class, ``params["proxies"]``; the encoder lies under ``params["encoder"]``.

    Args:
      module: the encoder.
      num_classes: C.
      loss: ProxyAnchor (a value per proxy, so one element of unit ``batch``) or ProxyNCA (per example).
      label, inputs: batch fields.
      **settings: of :func:`zoo.losses.proxies.proxy_anchor` or :func:`zoo.losses.proxies.proxy_nca`.
    """
    if loss not in ("proxy_anchor", "proxy_nca"):
        raise ValueError(f"loss must be 'proxy_anchor' or 'proxy_nca', got {loss!r}")

    def value(outputs, batch, context):
        cosine = outputs["logits"]
        if loss == "proxy_anchor":
            return Loss(batch_element(jnp.sum(proxy_anchor(cosine, batch[label], mask=batch_mask(batch), **settings))))
        return Loss(example_elements(proxy_nca(2.0 - 2.0 * cosine, batch[label], **settings), batch))

    unit = "batch" if loss == "proxy_anchor" else "example"
    return _headed(module, num_classes, "proxies", value, 1.0, label, inputs, loss.replace("_", " "), unit)


def softmax_classifier(
    module: nn.Module,
    num_classes: int,
    head: str = "linear",
    scale: float = 16.0,
    margin: float | None = None,
    prototypes: Any = None,
    label_smoothing: float = 0.0,
    label: str = "label",
    inputs: str = "x",
) -> Objective:
    """Softmax cross-entropy over classes with a choice of heads.

    Args:
      module: the encoder, ``params["encoder"]``.
      num_classes: C.
      head: ``linear`` weights without bias; ``cosine`` of unit vectors times ``scale``; ``cosface`` and ``arcface`` the
        same with a margin on the own class; ``fixed`` the given prototypes, which never move (``constants``).
      scale: of the cosines.
      margin: 0.35 for CosFace and 0.5 radians for ArcFace by default.
      prototypes: ``[C, d]`` of the fixed head, d the encoder's size (a simplex: ``zoo.ops.simplex``).
      label_smoothing: share of the target spread over all classes, in [0, 1).
      label, inputs: batch fields.

    Raises:
      ValueError: an unknown head, or prototypes missing or not asked for.
    """
    if head not in ("linear", "cosine", "cosface", "arcface", "fixed"):
        raise ValueError(f"head must be 'linear', 'cosine', 'cosface', 'arcface' or 'fixed', got {head!r}")
    if (head == "fixed") != (prototypes is not None):
        raise ValueError("prototypes belong to head='fixed' and to no other")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")

    def value(outputs, batch, context):
        logits, y = outputs["logits"], batch[label]
        if head == "cosface":
            logits = cosface_logits(logits / scale, y, 0.35 if margin is None else margin, scale)
        elif head == "arcface":
            logits = arcface_logits(logits / scale, y, 0.5 if margin is None else margin, scale)
        values = label_smoothing_ce(logits, y, label_smoothing)
        mask = batch_mask(batch)
        hit = jnp.sum((jnp.argmax(outputs["logits"], 1) == y) & mask) / jnp.maximum(jnp.sum(mask), 1)
        return Loss(example_elements(values, batch), metrics={"accuracy": hit})

    how = "linear" if head in ("linear", "fixed") else "cosine"
    fixed = None if prototypes is None else jnp.asarray(prototypes, jnp.float32)
    return _headed(module, num_classes, how, value, scale, label, inputs, f"softmax, {head} head", "example", fixed)


def batch_element(value: jax.Array) -> Elements:
    """A scalar as the one element of a loss that belongs to no row."""
    return Elements(value[None], jnp.zeros((1, 0), jnp.int32), jnp.ones(1, bool), "batch")


def _named(out: Any) -> Mapping[str, Any]:
    return out if isinstance(out, Mapping) else {"projection": out}


def _view_host(module, augment, value, inputs, name, provides=(), label=None, unit="example") -> Objective:
    keys = ("embedding", "index", *(("views",) if augment is not None else ()))

    def forward(variables, batch, context):
        if augment is None:
            views, twice = batch[inputs], batch
        else:
            first, second = jax.vmap(augment)(context.example_keys(batch, "views"), batch[inputs])
            views = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
            twice = {k: jnp.concatenate([v, v]) for k, v in batch.items() if k in ("mask", "row")}
            if "row" in twice:  # the second view's dropout must differ from the first's
                twice["row"] = twice["row"].at[twice["row"].shape[0] // 2 :].add(1 << 30)
        out, mutated = apply_module(module, variables, views, batch=twice, context=context)
        outputs: dict[str, Any] = {}
        for key, array in _named(out).items():
            short = "z" if key == "projection" else key
            if isinstance(array, Shared):
                outputs[key] = array
            elif augment is None:
                outputs[f"{short}1"] = array.astype(jnp.float32)
            else:
                outputs[f"{short}1"], outputs[f"{short}2"] = jnp.split(array.astype(jnp.float32), 2)
        return {**outputs, "embedding": outputs["z1"]}, mutated

    extra = getattr(module, "provides", ())
    return Objective(
        init=lambda rng, batch: init_module(module, rng, batch, batch[inputs]),
        forward=forward,
        loss=value,
        unit=unit,
        provides=tuple(dict.fromkeys((*keys, *provides, *extra))),
        gathers=("label",) if label is None else (label,),
        name=name,
    )


def _stacked(outputs, y, mask):
    # both views one under the other; with one view as they are
    z = [outputs["z1"], *([outputs["z2"]] if "z2" in outputs else [])]
    return jnp.concatenate(z), jnp.concatenate([y] * len(z)), jnp.concatenate([mask] * len(z))


def _per_example(values, outputs):
    return (values[: len(values) // 2] + values[len(values) // 2 :]) / 2 if "z2" in outputs else values


def _views_contrasted(outputs, y, mask, temperature, positive_in_denominator, weights=None):
    z, y, mask = _stacked(outputs, y, mask)
    if y.ndim != 1:
        raise ValueError(f"labels must be [B], got {list(y.shape)}; squeeze them")
    z = unit_rows(z, mask)
    positive, negative = pair_masks(y, mask=mask)
    logs = None if weights is None else weights(y[:, None] - y[None, :])
    similarity = jnp.matmul(z, z.T, precision="highest")
    values = supervised_contrastive(similarity, positive, negative, temperature, logs, positive_in_denominator)
    return _per_example(values, outputs)


def _embed(module, inputs, variables, batch, context):
    out, mutated = apply_module(module, variables, batch[inputs], batch=batch, context=context)
    return {"embedding": _named(out)["projection"].astype(jnp.float32)}, mutated


def _headed(module, num_classes, how, value, scale, label, inputs, name, unit, fixed=None) -> Objective:
    # an encoder under params/encoder and one vector per class under params/head, or fixed under constants/head
    part = "proxies" if how == "proxies" else "head"

    def init(rng, batch):
        variables = init_module(module, rng, batch, batch[inputs])
        size = jax.eval_shape(lambda: _named(module.apply(variables, batch[inputs]))["projection"]).shape[-1]
        own = {c: v for c, v in variables.items() if c not in ("params", "constants")}
        constants = variables.get("constants", {})
        if fixed is not None:
            if fixed.shape != (num_classes, size):
                raise ValueError(
                    f"feature size {size} differs from the prototypes' {fixed.shape[1]}"
                    if fixed.shape[0] == num_classes
                    else f"{fixed.shape[0]} prototypes for {num_classes} classes"
                )
            own["constants"] = {**constants, part: fixed}
            return {**own, "params": {"encoder": variables["params"]}}
        if constants:
            own["constants"] = constants
        draw = jax.random.normal(jax.random.fold_in(rng, 1), (num_classes, size)) / jnp.sqrt(size)
        return {**own, "params": {"encoder": variables["params"], part: draw}}

    def forward(variables, batch, context):
        constants = {k: v for k, v in variables.get("constants", {}).items() if fixed is None or k != part}
        inner = {c: v for c, v in variables.items() if c not in ("params", "constants")}
        inner = {**inner, "params": variables["params"]["encoder"], **({"constants": constants} if constants else {})}
        outputs, mutated = _embed(module, inputs, inner, batch, context)
        z = outputs["embedding"]
        weight = variables["params"][part] if fixed is None else variables["constants"][part]
        if how != "linear":
            z, weight = unit_rows(z), scale * unit_rows(weight)
        return {**outputs, "logits": jnp.matmul(z, weight.T, precision="highest")}, mutated

    return Objective(
        init=init,
        forward=forward,
        loss=value,
        unit=unit,
        provides=("embedding", "logits", label, "index"),
        gathers=(label,),
        name=name,
    )
