"""Class means in one pass over batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.prototypes import class_prototypes, l2_normalize

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(11, 3)).astype(np.float32), np.array([0, 2, 2, 1, 0, 2, 1, 2, 0, 1, 1])


def batches(x, y, size=4):
    for start in range(0, len(x), size):
        rows = np.minimum(np.arange(start, start + size), len(x) - 1)
        yield {"x": x[rows], "label": y[rows], "mask": np.arange(start, start + size) < len(x)}


def embed(w, batch):
    return batch["x"] @ w


def test_means_by_class_over_batches():
    w = RNG.normal(size=(3, 2)).astype(np.float32)
    means, counts = class_prototypes(embed, jnp.asarray(w), batches(X, Y), 3)
    np.testing.assert_allclose(means, [(X @ w)[c == Y].mean(0) for c in range(3)], atol=1e-5)
    assert counts.tolist() == [3, 4, 4] and means.dtype == jnp.float32


def test_another_label_field_and_no_mask():
    made = ({"x": b["x"], "kind": b["label"]} for b in batches(X[:8], Y[:8]))
    means, _ = class_prototypes(embed, jnp.eye(3), made, 3, label="kind")
    np.testing.assert_allclose(means[1], X[:8][Y[:8] == 1].mean(0), atol=1e-6)


def test_classes_without_images_are_listed():
    with pytest.raises(ValueError, match="no image of class 1, 3: a prototype needs at least one"):
        class_prototypes(embed, jnp.eye(3), batches(X[Y != 1], Y[Y != 1]), 4)
    with pytest.raises(ValueError, match="no image of class 0, 1"):
        class_prototypes(embed, jnp.eye(3), [], 2)


def test_directions():
    x = jnp.asarray(X).at[2].set(0.0)
    found = np.asarray(l2_normalize(x))
    np.testing.assert_allclose(found[3], X[3] / np.linalg.norm(X[3]), atol=1e-6)
    assert not found[2].any()
    w = RNG.normal(size=(11, 3)).astype(np.float32)
    grad = np.asarray(jax.grad(lambda x: jnp.sum(l2_normalize(l2_normalize(x)[:, :2]) * w[:, :2]))(x))
    assert not grad[2].any() and np.isfinite(grad).all() and np.abs(grad[3]).max() > 0


def test_a_nan_row_stays_visible():
    found = np.asarray(l2_normalize(jnp.asarray(X).at[2, 1].set(np.nan)))
    assert np.isnan(found[2]).any() and np.isfinite(np.delete(found, 2, 0)).all()
