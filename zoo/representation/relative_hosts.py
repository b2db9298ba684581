"""Objectives for relative representations trained end to end: classifiers, autoencoders, and classifiers of nodes.

The anchors are inputs, kept in ``constants`` beside the checksum of their ids, and encoded again in every step with the
present encoder; :mod:`zoo.representation.relative_representations` has the projection and the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from zoo.base import Loss, Objective, batch_mask, example_elements
from zoo.losses.gaussian import optimal_sigma_nll
from zoo.losses.ranking import gaussian_kl
from zoo.objectives import apply_module
from zoo.ops.anchors import AnchorSet
from zoo.representation.relative_representations import RelativeModel

__all__ = ["relative_autoencoder", "relative_classifier", "relative_nodes"]


def relative_classifier(
    model: RelativeModel,
    anchors: AnchorSet,
    anchor_labels: Int[Array, "k"] | None = None,
    loss: Callable[[Array, Array], Array] | None = None,
    stop_gradient: bool = True,
    anchor_pass: str = "separate",
    refresh: int = 1,
    inputs: str = "x",
    variant: str = "paper",
) -> Objective:
    """A classifier on relative representations, encoder and head trained together; anchors encoded in every step.

    Args:
      model: encoder, projection, head -> logits ``[B, C]``; with ``layer=None`` the absolute baseline.
      anchors: ids and ``inputs`` ``[k, ...]``; they and their checksum are kept in ``constants``.
      anchor_labels: classes of the anchors, for averaging by class.
      loss: ``(logits, label) -> [B]``; softmax cross-entropy by default.
      stop_gradient: anchors are targets, not trained through (the paper's image and text models); False lets gradients
        flow (its graph network).
      anchor_pass: ``"separate"`` or ``"joint"``: one batch ``[x, anchors]`` with common batch statistics.
      refresh: encode the anchors every so many steps only and remember them between (collection ``memory``): saves
        k / B of the forward pass, at the price of stale anchors.  1 is the method.
      inputs: batch field.
      variant: ``"official"`` commits the batch statistics of the anchors' separate pass as well, after those of x; the
        paper's default leaves them uncommitted.

    Raises:
      ValueError: anchors without inputs, or options that do not go together.
    """
    loss = loss or optax.softmax_cross_entropy_with_integer_labels
    forward, init = _relative_forward(
        model, anchors, anchor_labels, stop_gradient, anchor_pass, refresh, inputs, variant
    )

    def value(outputs, batch, context):
        values = loss(outputs["output"].astype(jnp.float32), batch["label"])
        mask = batch_mask(batch)
        hit = jnp.sum((jnp.argmax(outputs["output"], -1) == batch["label"]) & mask)
        return Loss(example_elements(values, batch), metrics={"accuracy": hit / jnp.maximum(jnp.sum(mask), 1)})

    def named(variables, batch, context):
        outputs, mutated = forward(variables, batch, context)
        return {**outputs, "logits": outputs["output"]}, mutated

    provides = ("embedding", "latents", "logits", "label", "index")
    return Objective(init, named, value, provides=provides, gathers=("label",), name="relative classifier")


def relative_autoencoder(
    model: RelativeModel,
    anchors: AnchorSet,
    stop_gradient: bool = True,
    refresh: int = 1,
    inputs: str = "x",
    reduce: str = "mean",
    variant: str = "paper",
) -> Objective:
    """RelAE and RelVAE: reconstruct from relative representations; :func:`zoo.losses.gaussian.optimal_sigma_nll`.

    Args:
      model: its head is a decoder: ``r -> reconstruction``, or a dict with ``mean`` and ``log_variance`` too, whose
        divergence from N(0, I) is then added (RelVAE).
      reduce: ``"mean"`` over examples of each one's summed loss, or ``"sum"`` as the released code: the same minimum.
      anchors, stop_gradient, refresh, inputs, variant: as in :func:`relative_classifier`.
    """
    forward, init = _relative_forward(model, anchors, None, stop_gradient, "separate", refresh, inputs, variant)

    def value(outputs, batch, context):
        out, mask = outputs["output"], batch_mask(batch)
        out = out if isinstance(out, Mapping) else {"reconstruction": out}
        values = optimal_sigma_nll(out["reconstruction"], batch[inputs], mask)
        square = jnp.square(out["reconstruction"] - batch[inputs]).reshape(values.shape[0], -1).mean(-1)
        metrics = {"mse": jnp.sum(jnp.where(mask, square, 0.0)) / jnp.maximum(jnp.sum(mask), 1)}
        if "mean" in out:
            divergence = gaussian_kl(out["mean"], out["log_variance"])
            values = values + divergence
            metrics["kl"] = jnp.sum(jnp.where(mask, divergence, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
        return Loss(example_elements(values, batch), metrics=metrics)

    provides = ("embedding", "latents", "index")
    return Objective(init, forward, value, provides=provides, gathers=(inputs,), reduce=reduce, name="relative AE")


def relative_nodes(
    model: RelativeModel, graph: Mapping[str, Any], anchor_ids: Any, stop_gradient: bool = False
) -> Objective:
    """A classifier of a graph's nodes; anchors are rows of the same embedding, and gradients flow through them.

    Args:
      model: its encoder is ``(x, src, dst, mask, keys) -> [N, d]`` (:class:`zoo.nn.gcnii.GCNII`).
      graph: ``x`` [N, i], ``src``, ``dst``, ``mask`` [E]; kept in ``constants``.
      anchor_ids: nodes.
      stop_gradient: keep gradients out of the anchors.

    Batches hold ``node`` [B], which nodes to classify, and ``label`` [B].
    """
    held = {"graph": {k: jnp.asarray(v) for k, v in graph.items()}, "anchor_ids": jnp.asarray(anchor_ids, jnp.int32)}

    def through(module, graph, ids, nodes, keys=None, train=False, mask=None):
        edges = {k: graph[k] for k in ("src", "dst")}
        z = module.encode(graph["x"], mask=graph["mask"], keys=keys, **edges)
        own = z[ids]
        own = jax.lax.stop_gradient(own) if stop_gradient else own
        r = module.represent(z[nodes], own, None, train, mask)
        return {"output": module.decode(r, train, mask), "embedding": r, "latents": z[nodes]}

    def init(rng, batch):
        made = model.init(rng, held["graph"], held["anchor_ids"], batch["node"], method=through)
        return {**made, "constants": held}

    def forward(variables, batch, context):
        kept = variables["constants"]
        nodes = jnp.arange(kept["graph"]["x"].shape[0])
        keys = jax.vmap(lambda n: jax.random.fold_in(context.key("dropout"), n))(nodes) if context.train else None
        own = {c: v for c, v in variables.items() if c != "constants"}
        args = kept["graph"], kept["anchor_ids"], batch["node"], keys, context.train, batch_mask(batch)
        module = model.clone(axis_name=context.axis_name)
        mutable = [c for c in own if c != "params"] if context.train else []
        out, mutated = module.apply(own, *args, method=through, mutable=mutable)
        return {**out, "logits": out["output"].astype(jnp.float32)}, mutated

    def value(outputs, batch, context):
        values = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["label"])
        return Loss(example_elements(values, batch))

    provides = ("embedding", "latents", "logits", "label", "index")
    return Objective(init, forward, value, provides=provides, gathers=("label",), name="relative nodes")


def _relative_forward(model, anchors, labels, stop_gradient, anchor_pass, refresh, inputs, variant):
    if anchors.inputs is None:
        raise ValueError("training end to end encodes the anchors in every step: AnchorSet.of(ids, inputs=...)")
    if anchor_pass not in ("separate", "joint") or variant not in ("paper", "official") or refresh < 1:
        raise ValueError(
            "anchor_pass must be 'separate' or 'joint', variant 'paper' or 'official' and refresh at least 1; got "
            f"{anchor_pass!r}, {variant!r} and {refresh}"
        )
    if refresh > 1 and (not stop_gradient or anchor_pass == "joint"):
        raise ValueError(f"refresh {refresh} keeps old anchors: it needs stop_gradient and a separate pass")
    held = {"anchors": jnp.asarray(anchors.inputs), "anchor_ids": anchors.ids, "anchor_hash": anchors.hash}
    k, labels = held["anchors"].shape[0], None if labels is None else jnp.asarray(labels)

    def init(rng, batch):
        made = dict(model.init(rng, batch[inputs], held["anchors"], labels))
        if refresh > 1:
            made["memory"] = {"anchors": model.apply(made, held["anchors"], method="encode").astype(jnp.float32)}
        return {**made, "constants": held}

    def encode_anchors(variables, context):
        module = model.clone(axis_name=context.axis_name)
        own = {c: v for c, v in variables.items() if c in ("params", "batch_stats")}
        keys = jax.vmap(lambda j: jax.random.fold_in(context.key("anchors"), j))(jnp.arange(k))
        x = variables["constants"]["anchors"]
        if not context.train:
            return module.apply(own, x, method="encode"), {}
        mutable = [c for c in own if c != "params"]
        return module.apply(own, x, True, None, keys, method="encode", mutable=mutable)

    def forward(variables, batch, context):
        x, rows = batch[inputs], batch_mask(batch).shape[0]
        memory = variables.get("memory", {})
        known = {c: v for c, v in variables.items() if c != "memory"}
        if anchor_pass == "joint" and context.train:
            # under pmap every device holds the anchors: one of them counts
            first = True if context.axis_name is None else jax.lax.axis_index(context.axis_name) == 0
            both = jnp.concatenate([x, variables["constants"]["anchors"].astype(x.dtype)])
            mask = jnp.concatenate([batch_mask(batch), jnp.broadcast_to(first, (k,))])
            keys = [context.example_keys(batch, "dropout")]
            keys.append(jax.vmap(lambda j: jax.random.fold_in(context.key("anchors"), j))(jnp.arange(k)))
            twice = {"mask": mask, "keys": jnp.concatenate(keys)}
            z, mutated = apply_module(model, known, both, batch=batch, context=context, method="encode", **twice)
            z, own = z[:rows], z[rows:]
        else:
            z, mutated = apply_module(model, known, x, batch=batch, context=context, method="encode")
            now = {**known, **(mutated if variant == "official" else {})}
            fresh = lambda: encode_anchors(now, context)  # noqa: E731
            if refresh == 1 or not context.train:
                own, changed = fresh()
            else:
                old = lambda: (memory["anchors"], {c: v for c, v in now.items() if c == "batch_stats"})  # noqa: E731
                own, changed = jax.lax.cond(jnp.asarray(context.step) % refresh == 0, fresh, old)
                mutated = {**mutated, "memory": {"anchors": jax.lax.stop_gradient(own)}}
            mutated = {**mutated, **changed} if variant == "official" else mutated
        own = jax.lax.stop_gradient(own) if stop_gradient else own
        parts = {"train": context.train, "mask": batch_mask(batch)}
        module = model.clone(axis_name=context.axis_name)
        state = {c: v for c, v in {**known, **mutated}.items() if c in ("params", "batch_stats")}
        keys = context.example_keys(batch, "head") if context.train else None

        def rest(module, z, own):
            r = module.represent(z, own, labels, **parts)
            return r, module.decode(r, keys=keys, **parts)

        mutable = [c for c in state if c != "params"] if context.train else []
        if mutable:
            (r, out), changed = module.apply(state, z, own, method=rest, mutable=mutable)
            mutated = {**mutated, **changed}
        else:
            r, out = module.apply(state, z, own, method=rest)
        return {"output": out, "embedding": r, "latents": z}, mutated

    return forward, init
