"""Stitching graph networks: each one's encoder and head are trained together, with anchors among the graph's nodes.

A relative network reads its own embedding of the anchor nodes, and gradients flow through them; an absolute one, of the
same size, reads the latents.  Both kinds are then measured with every other network's head on the held-out nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.stream import training_stream
from trainers.phases import Alternate, Fit, FitResult, Update
from trainers.recipe import Export, Run
from trainers.stitching import (
    KINDS,
    checked_anchors,
    likeness,
    stitching_figures,
    stitching_metrics,
    stitching_summary,
    under,
)
from trainers.stitching_tasks import Task
from zoo.nn.gcnii import GCNII
from zoo.nn.stitching_heads import RelativeHead
from zoo.ops.anchors import AnchorSet
from zoo.ops.stitching import Stitchable, stitching_matrix
from zoo.representation.relative_hosts import relative_nodes
from zoo.representation.relative_representations import RelativeLayer, RelativeModel


def node_run(
    task: Task,
    ids: np.ndarray,
    layer: RelativeLayer,
    head: RelativeHead,
    network: Callable[[int], GCNII],
    steps: int,
    tx: Callable[[int], optax.GradientTransformation],
    batch_size: int,
    seed: int,
) -> Run:
    """The phases: all networks, then the stitching table.

    Args:
      task: of :func:`trainers.stitching_tasks.node_task`.
      ids: anchors, as numbers of training items.
      layer: the relative networks' projection.
      head: of every network.
      network: latent width to encoder.
      steps: of each network.
      tx: steps to optimiser.
      batch_size: nodes per step.
      seed: of the order of nodes.
    """
    graph, anchors = task.graph.arrays(), np.asarray(task.train["node"])[ids]
    represent, logits = jax.jit(lambda z, own: layer.apply({}, z, own)), jax.jit(head.apply)
    networks, objectives, updates = {}, {}, {}
    for i, width in enumerate(task.widths):
        # both kinds of a network see the nodes in one order
        stream = training_stream(task.train, batch_size, 1000 * seed + i + 1)
        for kind in KINDS:
            name, own = f"{kind}{i}", layer if kind == "relative" else None
            networks[name] = RelativeModel(network(width), head, own)
            objectives[name] = relative_nodes(networks[name], graph, anchors)
            alone = under(name, objectives[name], shared=("constants",))
            updates[name] = Update(alone, tx(steps), stream, trainable=(f"{name}/.*",))

    def init(rng):
        keys, batch = jax.random.split(rng, len(objectives)), {"node": jnp.asarray(task.train["node"][:1])}
        started = {n: o.init(k, batch) for k, (n, o) in zip(keys, objectives.items(), strict=True)}
        constants = next(iter(started.values()))["constants"]
        return {
            "params": {name: value["params"] for name, value in started.items()},
            "constants": {**constants, "hash": AnchorSet.of(anchors).hash},
        }

    def measure(variables, artefacts, rng):
        held, target = jnp.asarray(task.test["node"]), task.test["label"]
        tables, latents, own = {}, {}, {}
        for kind in KINDS:
            models, latents[kind] = {}, {}
            for i, name in enumerate(task.names):
                params = variables["params"][f"{kind}{i}"]
                z = embed(networks[f"{kind}{i}"].encoder, params["body"], variables["constants"]["graph"])
                known = checked_anchors(name, anchors, z[anchors])
                decode = functools.partial(logits, {"params": params["top"]})
                how = represent if kind == "relative" else None
                models[name] = Stitchable(lambda z: z, decode, how, known, z.shape[1])
                latents[kind][name] = z[held]
                own.setdefault(f"m{i}", np.asarray(known.latents))
            hit = lambda logits: jnp.mean(jnp.argmax(logits, -1) == target)  # noqa: E731
            tables[kind] = stitching_matrix(models, latents[kind], hit)
        metrics = stitching_metrics(tables)
        metrics |= likeness(latents["relative"], own, represent, latents["absolute"])
        tables = {kind: table.astype(np.float32) for kind, table in tables.items()}
        return FitResult({}, {"tables": tables, "anchors": own}, {**metrics, "anchors": len(ids)})

    def export(variables, artefacts):
        params, kept = variables["params"], {"anchor_ids": anchors, "hash": variables["constants"]["hash"]}
        kept |= {"anchors": artefacts["anchors"], "heads": {name: own["top"] for name, own in params.items()}}
        kept |= {f"encoder{i}": params[f"relative{i}"]["body"] for i in range(len(task.names))}
        kept |= {f"absolute_encoder{i}": params[f"absolute{i}"]["body"] for i in range(len(task.names))}
        first = networks["relative0"]
        facts = {
            "inputs": f"relative representations [B, {len(ids)}], scaled to unit length; params is the head of "
            f"{task.names[0]}",
            "models": list(task.names),
            "similarity": layer.similarity,
            "encoder": f"GCNII of {first.encoder.layers} layers; anchors are nodes of the graph",
        }
        return Export(head, {"params": params["relative0"]["top"], "constants": kept}, facts)

    summary = lambda metrics: stitching_summary(metrics, task.names)  # noqa: E731
    figures = lambda result, workdir: stitching_figures(result, workdir, task.names)  # noqa: E731
    phases: list[Any] = [Alternate("networks", steps, updates), Fit("stitching", measure)]
    return Run(phases, export, init, figures, task.fingerprint, summary, steps_per_call=10)


@functools.partial(jax.jit, static_argnums=0)
def embed(encoder: GCNII, params: Mapping, graph: Mapping) -> jax.Array:
    """Latents of all nodes, ``[N, d]``, outside training."""
    return encoder.apply({"params": params}, graph["x"], *(graph[k] for k in ("src", "dst", "mask")))
