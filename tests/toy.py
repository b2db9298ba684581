"""A tiny run that uses every part of the trainer's state, for the tests of resuming and of parallelism."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.stream import evaluation_stream, training_stream
from trainers.evaluation import mean_metrics
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.phases import Alternate, Average, Evaluate, Fit, FitResult, Train, Update
from trainers.recipe import Run
from trainers.record import FileRecord
from zoo.base import Loss, LossTransformation, batch_mask, example_elements
from zoo.hosts import two_views
from zoo.objectives import memory_bank

N, D = 52, 12
ONE = Parallel(devices=1)


class Encoder(nn.Module):
    """Two layers to the unit sphere."""

    width: int = 40

    @nn.compact
    def __call__(self, x):
        z = nn.Dense(16, name="head")(nn.relu(nn.Dense(self.width, name="body")(x)))
        return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def arrays(n: int = N, seed: int = 0) -> dict[str, np.ndarray]:
    """Gaussian rows with labels."""
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(n, D)).astype(np.float32), "label": rng.integers(0, 4, n).astype(np.int32)}


def contrast(z1, z2, mask):
    """In-batch softmax: negatives come from the whole global batch."""
    s = jnp.where(mask[None, :], 5 * z1 @ z2.T, -jnp.inf)
    s = jnp.where(mask[:, None], s, 0.0)
    return jax.nn.logsumexp(s, 1) - jnp.diag(s)


def noisy(key, x):
    """Two jittered copies."""
    return x + 0.1 * jax.random.normal(key, x.shape), x


def bank_loss(outputs, bank, batch, context):
    """The contrast plus a pull away from what the bank holds."""
    near = outputs["z1"] @ bank["values"].T
    push = jnp.sum(jnp.where(bank["filled"][None], jnp.exp(near), 0.0), 1) / bank["filled"].shape[0]
    values = contrast(outputs["z1"], outputs["z2"], batch_mask(batch)) + push
    return Loss(example_elements(values, batch), {}, {"push": jnp.mean(push)})


def counting_objective():
    """Two views with a memory bank; the bank's ring shows the order of examples."""
    return memory_bank(two_views(Encoder(), noisy, contrast, name="toy"), bank_loss, size=24)


def remembered(decay: float = 0.5) -> LossTransformation:
    """Per-example memory: each loss is divided by a running mean of its own past, counted per example."""

    def init(n):
        return {"mean": jnp.ones(n), "seen": jnp.zeros(n, jnp.int32)}

    def update(e, state, context):
        index = context.batch["index"]
        mean = state["mean"].at[index].get(mode="fill", fill_value=1.0)
        new = decay * mean + (1 - decay) * jax.lax.stop_gradient(e.values)
        at = jnp.where(e.mask, index, state["mean"].shape[0])
        state = {
            "mean": state["mean"].at[at].set(new, mode="drop"),
            "seen": state["seen"].at[at].add(1, mode="drop"),
        }
        return e.replace(values=e.values / jax.lax.stop_gradient(mean)), state

    return LossTransformation(init, update, units=("example",), requires=("index",), name="remembered")


def phases(batch: int = 16, steps: int = 24):
    """Warm up, fit a centre, then alternate two updates with averaged weights, evaluated on the way."""
    objective = counting_objective()
    train, held = training_stream(arrays(), batch, 1), evaluation_stream(arrays(40, 9), 8)

    def values(variables, batch, context):
        z, _ = objective.forward(variables, {**batch, "row": jnp.arange(8)}, context)
        return {"spread": jnp.sum(z["z1"] * z["z2"], -1), "first": z["z1"][:, 0]}

    evaluation = mean_metrics("held", held, ("spread", "first"), values)

    def centre(variables, artefacts, rng):
        mean = jax.tree.map(lambda p: p * 0.99, variables["params"])
        found = {"directions": np.asarray(jax.random.normal(rng, (3, 16)))}
        norm = optax.tree.norm(mean)
        return FitResult({"params": mean, "constants": {"norm": norm}}, found, {"norm": float(norm)})

    second = dataclasses.replace(objective, name="toy again")
    return [
        Train("warm", steps, objective, optax.adam(1e-2), train, remembered(), evaluate=(evaluation,), eval_every=10),
        Fit("centre", centre),
        Alternate(
            "both",
            steps,
            {
                "body": Update(objective, optax.adam(1e-2), train, remembered(), trainable=("body/.*",), repeats=2),
                "head": Update(
                    second, optax.sgd(1e-2, 0.9), training_stream(arrays(), batch, 2), trainable=("head/.*",)
                ),
            },
            average=Average(0.9),
            evaluate=(dataclasses.replace(evaluation, name="later"),),
            eval_every=8,
        ),
        Evaluate("final", held, evaluation.init, evaluation.update, evaluation.compute),
    ]


def loop(
    folder: Path | None = None, parallel: Parallel = Parallel(devices=1), calls: int = 1, first: int = 4, **rest
) -> Loop:  # noqa: B008
    """The toy run, or its ``first`` phases, in a folder or in memory."""
    run = Run(phases(**rest)[:first], export=None)
    settings = Settings(parallel, calls, log_every=4, save_every=7)
    if folder is None:
        return Loop(run, settings)
    from checkpoints.store import Store

    folder.mkdir(parents=True, exist_ok=True)
    record = FileRecord(folder, progress=False)
    return Loop(run, settings, 0, record, Store(folder / "checkpoints"), folder)


def main(name: str, workdir: str, options: list[str]) -> None:
    """For ``unkillable.py``: ``toy``, ``toy-scan`` (steps scanned in one dispatch), ``toy-jit``, ``toy-pmap``."""
    settings = json.loads(options[0]) if options else {}
    calls = 3 if "scan" in name else 1
    parallel = Parallel() if "jit" in name else Parallel("pmap") if "pmap" in name else Parallel(devices=1)
    run = loop(Path(workdir), parallel, calls, **settings)
    run()
    run.record.close()
