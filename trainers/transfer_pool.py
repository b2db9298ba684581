"""A pool of small encoders pre-trained on different tasks over digits, with what each attains once fine-tuned.

The digits are divided by the seed: 800 *source* images for pre-training (they are the general set too), 200 target
images with labels, the other 797 to test on.  Pre-training differs in its task, the noise of its labels and its length;
the architecture is the same, so that all models train in one compiled scan.  The target task is the ten digits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.features import ModelFeatures
from data.images import digits
from zoo.nn.mlp import MLP

SOURCE, TARGET = 800, 200
CLASSES = 10
RATES = (0.01, 0.03, 0.1)
FINE_TUNING_STEPS, BATCH = 200, 64


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """How one encoder of the pool came about.

    Attributes:
      name: of the model.
      task: ``digit``, ``parity``, ``high`` (is it above 4?), ``rotation`` (of the image, by quarters), ``quadrant``
        (the darkest one) or ``random`` (labels drawn by lot).
      steps: of Adam, 0 for an untrained encoder.
      noise: share of labels replaced at random.
    """

    name: str
    task: str = "digit"
    steps: int = 300
    noise: float = 0.0


POOL = (
    Pretraining("digits"),
    Pretraining("digits_brief", steps=30),
    Pretraining("digits_noisy", noise=0.5),
    Pretraining("digits_very_noisy", noise=0.9),
    Pretraining("parity", "parity"),
    Pretraining("high_or_low", "high"),
    Pretraining("rotation", "rotation"),
    Pretraining("quadrant", "quadrant"),
    Pretraining("random_labels", "random"),
    Pretraining("untrained", steps=0),
)

_ENCODER = MLP((64,), 32)


@functools.lru_cache(maxsize=8)
def digit_pool(seed: int = 0) -> tuple[ModelFeatures, ...]:
    """The pool: each model's features of the target's training images, source probabilities, and test accuracy.

    Fine-tuning: SGD with Nesterov momentum 0.9 and a cosine schedule on encoder and a new linear head, 200 steps of 64;
    the rate is chosen among 0.01, 0.03 and 0.1 on a fifth of the target's training images, then all of them are used.

    Args:
      seed: of the division, initialisations, tasks' noise and the order of batches.
    """
    whole = digits()
    x = np.concatenate([whole[s]["x"] for s in ("train", "test")])
    y = np.concatenate([whole[s]["label"] for s in ("train", "test")])
    rng = np.random.default_rng([seed, 41])
    order = rng.permutation(len(x))
    source, target, test = np.split(order, [SOURCE, SOURCE + TARGET])
    made = [_task(rng, p, x[source], y[source]) for p in POOL]
    inputs, labels = (jnp.asarray(np.stack(part)) for part in zip(*made, strict=True))
    keys = jax.random.split(jax.random.key(seed), len(POOL))
    steps = jnp.asarray([p.steps for p in POOL])
    params, heads = _pretrain(keys, inputs, labels, steps)

    images = {"target": jnp.asarray(x[target]), "general": jnp.asarray(x[source])}
    found = jax.device_get({name: _encode(params, part) for name, part in images.items()})
    logits = (
        np.einsum("mnd,mdc->mnc", found["target"], np.asarray(heads["kernel"])) + np.asarray(heads["bias"])[:, None]
    )
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits), -1))

    held = np.zeros(TARGET, bool)
    held[rng.permutation(TARGET)[: TARGET // 5]] = True
    tuned = _Tuning(params, images["target"], jnp.asarray(y[target]), jax.random.key(seed + 1))
    valid = np.stack([tuned.accuracy(r, ~held, x[target][held], y[target][held]) for r in RATES])
    chosen = valid.argmax(0)
    tested = np.stack([tuned.accuracy(r, np.ones(TARGET, bool), x[test], y[test]) for r in RATES])
    return tuple(
        ModelFeatures(
            name=p.name,
            features=found["target"][i],
            labels=y[target].astype(np.int32),
            general=found["general"][i],
            source=probabilities[i],
            accuracy=float(tested[chosen[i], i]),
        )
        for i, p in enumerate(POOL)
    )


def _task(rng: np.random.Generator, how: Pretraining, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one pre-training task."""
    if how.task == "rotation":
        label = rng.integers(4, size=len(x))
        x = np.stack([np.rot90(image, turn) for image, turn in zip(x, label, strict=True)])
    elif how.task == "quadrant":
        blocks = x[..., 0].reshape(len(x), 2, 4, 2, 4).sum((2, 4)).reshape(len(x), 4)
        label = blocks.argmin(1)
    else:
        label = {"digit": y, "parity": y % 2, "high": y > 4, "random": rng.integers(CLASSES, size=len(x))}[how.task]
    noisy = rng.random(len(x)) < how.noise
    label = np.where(noisy, rng.integers(CLASSES, size=len(x)), label)
    return np.ascontiguousarray(x, np.float32), label.astype(np.int32)


def _head(key: Any) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(key, (32, CLASSES)) / np.sqrt(32), "bias": jnp.zeros(CLASSES)}


def _loss(both: Any, x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    encoder, head = both
    logits = _ENCODER.apply({"params": encoder}, x) @ head["kernel"] + head["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(weight * losses) / jnp.maximum(jnp.sum(weight), 1)


@jax.jit
@jax.vmap
def _pretrain(key: Any, x: jax.Array, y: jax.Array, steps: jax.Array) -> tuple[Any, Any]:
    k1, k2, k3 = jax.random.split(key, 3)
    tx = optax.adam(1e-3)
    both = (_ENCODER.init(k1, x[:1])["params"], _head(k2))

    def step(carry, number):
        both, moments = carry
        rows = jax.random.randint(jax.random.fold_in(k3, number), (BATCH,), 0, len(x))
        grads = jax.grad(_loss)(both, x[rows], y[rows], jnp.ones(BATCH))
        updates, moments = tx.update(grads, moments, both)
        going = number < steps  # models whose time is over stand still
        return (jax.tree.map(lambda p, u: jnp.where(going, p + u, p), both, updates), moments), None

    most = max(p.steps for p in POOL)
    return jax.lax.scan(step, (both, tx.init(both)), jnp.arange(most))[0][0]


@jax.jit
def _encode(params: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda p: _ENCODER.apply({"params": p}, x))(params)


@jax.jit
def _fine_tune(params: Any, rate: Any, x: jax.Array, y: jax.Array, weight: jax.Array, key: Any) -> Any:
    tx = optax.sgd(optax.cosine_decay_schedule(1.0, FINE_TUNING_STEPS), momentum=0.9, nesterov=True)
    k1, k2 = jax.random.split(key)

    def one(encoder):
        both = (encoder, _head(k1))

        def step(carry, number):
            both, moments = carry
            rows = jax.random.randint(jax.random.fold_in(k2, number), (BATCH,), 0, len(x))
            grads = jax.grad(_loss)(both, x[rows], y[rows], weight[rows])
            updates, moments = tx.update(grads, moments, both)
            return (jax.tree.map(lambda p, u: p + rate * u, both, updates), moments), None

        return jax.lax.scan(step, (both, tx.init(both)), jnp.arange(FINE_TUNING_STEPS))[0][0]

    return jax.vmap(one)(params)


@dataclasses.dataclass(frozen=True)
class _Tuning:
    params: Any
    x: jax.Array
    y: jax.Array
    key: Any

    def accuracy(self, rate: float, used: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Accuracy of every model ``[M]`` on (x, y) after fine-tuning on the ``used`` rows at one rate."""
        weight = jnp.asarray(used, jnp.float32)
        encoders, heads = _fine_tune(self.params, rate, self.x, self.y, weight, self.key)
        z = _encode(encoders, jnp.asarray(x))
        logits = jnp.einsum("mnd,mdc->mnc", z, heads["kernel"]) + heads["bias"][:, None]
        return np.mean(np.asarray(jnp.argmax(logits, -1)) == y, 1)
