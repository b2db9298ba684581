"""A generator for few-shot class-incremental learning whose true prototypes are known."""

from __future__ import annotations

import numpy as np

from data.dataset import Dataset


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def prototype_mixtures(
    seed: int = 0,
    dimension: int = 64,
    base: int = 60,
    novel: int = 5,
    shots: int = 5,
    noise: float = 0.35,
    test_per_class: int = 50,
) -> Dataset:
    """Classes as directions on a sphere; each novel one is a mixture of two base ones plus a direction of its own.

    Novel directions are ``unit(b_i + b_j + 0.5 u)`` with a random unit ``u``; samples add Gaussian noise with standard
    deviation ``noise`` per coordinate (teen's brief, check c).  Base prototypes are given without noise, as after a
    base session with plenty of data.

    Returns:
      Splits ``shots`` (the few shots of the novel classes) and ``test`` (all classes), fields ``x`` and ``label``;
      base classes are 0 .. base - 1.  ``info``: ``prototypes`` (true directions), ``num_base``, ``num_classes``.
    """
    rng = np.random.default_rng([seed, 71])
    directions = _unit(rng.normal(size=(base, dimension)))
    first = rng.integers(0, base, novel)
    second = (first + rng.integers(1, base, novel)) % base
    own = _unit(rng.normal(size=(novel, dimension)))
    directions = np.concatenate([directions, _unit(directions[first] + directions[second] + 0.5 * own)])

    def sample(classes: np.ndarray) -> dict[str, np.ndarray]:
        x = directions[classes] + noise * rng.normal(size=(len(classes), dimension))
        return {"x": x.astype(np.float32), "label": classes.astype(np.int32)}

    shots_split = sample(np.repeat(np.arange(base, base + novel), shots))
    test = sample(np.repeat(np.arange(base + novel), test_per_class))
    info = {"prototypes": directions.astype(np.float32), "num_base": base, "num_classes": base + novel}
    return Dataset("prototype_mixtures", {"shots": shots_split, "test": test}, info)
